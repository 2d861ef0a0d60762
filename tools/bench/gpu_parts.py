"""The parts of `bench gpu`: functions that map sizes to measurements."""

import dataclasses
import functools
import importlib.util
import math
import pathlib
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxtrain import cli
from jaxtrain.cost.roofline import peak_flops
from jaxtrain.interfaces import Json
from jaxtrain.metrics.monitor import peak_memory_gb
from jaxtrain.model import attention
from jaxtrain.model.llama import LlamaConfig
from tools.bench import jax_step, loss
from tools.bench.common import device_name, median, progress, short
from tools.bench.jax_step import JaxStep, Size

_DOCUMENT_TOKENS = 512  # mean length of packed documents


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes to measure. `calls` is the number of repetitions per clock reading."""

    step: Size
    attention_batch: int
    attention_seq_len: int
    heads: tuple[tuple[int, int], ...]  # (query heads, key/value heads)
    head_dim: int
    loss: dict[str, Any]
    matmul: int
    rounds: int
    calls: int
    compile_torch: bool


def full() -> Sizes:
    """Returns the sizes of the 1B model, with micro-batches of 16,384 tokens."""
    config = cli.load(str(pathlib.Path(__file__).parents[2] / "configs" / "1b.py"), ())
    model: LlamaConfig = config.model
    vocab_size = 49_152  # vocabulary of the config's tokenizer
    return Sizes(
        step=Size(model, vocab_size, 16_384 // model.max_seq_len, model.max_seq_len),
        attention_batch=8,
        attention_seq_len=2048,
        heads=((16, 8), (16, 16), (32, 8)),
        head_dim=128,
        loss={"tokens": 16_384, "vocab_size": vocab_size, "hidden_size": model.hidden_size, "chunk_tokens": 1024},
        matmul=8192,
        rounds=5,
        calls=5,
        compile_torch=True,
    )


def tiny() -> Sizes:
    """Returns sizes for a CPU."""
    config = full().step.model
    model = dataclasses.replace(
        config, hidden_size=64, intermediate_size=128, num_layers=2, num_heads=4, num_kv_heads=2, max_seq_len=64
    )
    return Sizes(
        step=Size(model, 256, 2, 64),
        attention_batch=2,
        attention_seq_len=128,
        heads=((4, 2),),
        head_dim=16,
        loss={"tokens": 128, "vocab_size": 640, "hidden_size": 32, "chunk_tokens": 32},
        matmul=64,
        rounds=2,
        calls=1,
        compile_torch=False,
    )


def run(name: str, is_tiny: bool) -> Json | None:
    """Returns the numbers of one part; None if it cannot be measured here."""
    if name != "torch" and jax.default_backend() == "gpu":
        jax.config.update("jax_optimization_level", "O1")  # as jaxtrain.trainer.session does
    return _PARTS[name](tiny() if is_tiny else full())


def failure(error: Exception) -> Json:
    traceback.print_exception(error)
    lines = str(error).strip().splitlines()
    return {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"[:400]}


def guarded(function: Callable[[], Json]) -> Json:
    """Returns the function's result, or {"error": ...}, so that other measurements continue."""
    try:
        return function()
    except Exception as error:
        return failure(error)


def _device(sizes: Sizes) -> Json:
    """Returns the device, and the speed of a large matrix product: the upper bound for everything below."""
    about: Json = {
        "name": device_name(),
        "platform": jax.default_backend(),
        "devices": jax.device_count(),
        "compute_capability": getattr(jax.devices()[0], "compute_capability", None),
    }
    n = sizes.matmul
    if about["platform"] == "cpu" and n > tiny().matmul:
        return about  # the product would take minutes
    a = jax.random.normal(jax.random.key(0), (n, n), jnp.bfloat16)
    product = jax.jit(jnp.dot)
    seconds = median(_seconds(lambda: product(a, a), sizes))
    peak = peak_flops()
    return about | {
        "published_tflops": None if peak is None else peak / jax.device_count() / 1e12,
        "matmul_size": n,
        "matmul_tflops": short(2 * n**3 / seconds / 1e12),
    }


def _seconds(run: Callable[[], Any], sizes: Sizes) -> list[float]:
    """Returns seconds per call, for each round. The first calls compile and are not counted."""
    jax.block_until_ready(run())
    found = []
    for _ in range(sizes.rounds):
        begun = time.perf_counter()
        jax.block_until_ready([run() for _ in range(sizes.calls)][-1])
        found.append((time.perf_counter() - begun) / sizes.calls)
    return found


def _attention(sizes: Sizes) -> Json:
    """Measures every implementation available on this platform, on every shape: errors against fp32, and seconds."""
    platform = jax.default_backend()
    kernels = [name for name, wanted in attention.PLATFORM.items() if wanted == platform]
    found: Json = {}
    for heads, kv_heads in sizes.heads:
        for documents in (None, _DOCUMENT_TOKENS):
            for name in ("xla", *kernels, "jax_causal"):
                if name == "jax_causal" and documents is not None:
                    continue  # JAX's public function does not support documents
                key = f"{heads}x{kv_heads} {'causal' if documents is None else 'packed'} {name}"
                found[key] = guarded(functools.partial(_case, sizes, heads, kv_heads, documents, name))
                progress(f"attention {key}: {found[key]}")
    return found


def _case(sizes: Sizes, heads: int, kv_heads: int, document_tokens: int | None, name: str) -> Json:
    return _Case(sizes, heads, kv_heads, document_tokens).numbers(name)


class _Case:
    """Attention on queries, keys and values of one shape in bf16."""

    def __init__(self, sizes: Sizes, heads: int, kv_heads: int, document_tokens: int | None):
        self.sizes, self.causal = sizes, document_tokens is None
        batch, length, width = sizes.attention_batch, sizes.attention_seq_len, sizes.head_dim
        rng = np.random.default_rng(0)

        def normal(count: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal((batch, length, count, width), np.float32), jnp.bfloat16)

        self.qkv = normal(heads), normal(kv_heads), normal(kv_heads)
        self.dx = normal(heads)
        # As in rows of the step; short rows get at least about four documents.
        tokens = None if document_tokens is None else min(document_tokens, length // 4)
        self.segment_ids = jnp.asarray(jax_step.segments((batch, length), tokens))
        self.shape = attention.Shape(
            platform=jax.default_backend(),
            compute_capability=_compute_capability(),
            rows=batch,
            seq_len=length,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=width,
            dtype="bfloat16",
            sliding_window=None,
        )
        # Half of the pairs, with 4 FLOPs per pair and element: 2 in q k, 2 in the weighted sum (Dao et al. 2022).
        self.flops = 4 * batch * heads * length * length * width / 2

    def numbers(self, name: str) -> Json:
        attend = self._implementation(name)
        forward, both = jax.jit(attend), jax.jit(functools.partial(_with_gradients, attend))
        errors = self._errors(both)
        seconds = median(_seconds(lambda: forward(*self.qkv, self.segment_ids), self.sizes))
        both_seconds = median(_seconds(lambda: both(*self.qkv, self.segment_ids, self.dx), self.sizes))
        found: Json = {"errors": errors, "forward_seconds": seconds, "forward_backward_seconds": both_seconds}
        if self.causal:
            # The backward pass computes five matrix products, the forward pass two.
            found["forward_backward_tflops"] = short(3.5 * self.flops / both_seconds / 1e12)
        return found

    def _implementation(self, name: str) -> Callable[..., jax.Array]:
        if name == "jax_causal":
            public = "cudnn" if self.shape.platform == "gpu" else "xla"

            def attend_public(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
                return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=public)

            return attend_public
        attention.choose(name, self.shape)  # raises if it cannot run here

        def attend(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array) -> jax.Array:
            documents = attention.documents(segment_ids, None, name, self.shape)
            return attention.attend(q, k, v, documents, mesh=None, implementation=name)

        return attend

    def _errors(self, both: Callable[..., tuple]) -> Json:
        """Largest differences from the fp32 reference, relative to its largest element, on the first row."""
        first = [x[:1] for x in (*self.qkv, self.segment_ids, self.dx)]
        with jax.default_matmul_precision("highest"):
            want = jax.jit(functools.partial(_with_gradients, _reference))(
                *(x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x for x in first)
            )
        got = both(*self.qkv, self.segment_ids, self.dx)
        errors = {}
        for part, a, b in zip(("output", "dq", "dk", "dv"), got, want, strict=True):
            a, b = np.asarray(a[:1], np.float32), np.asarray(b, np.float32)
            error = float(np.abs(a - b).max() / np.abs(b).max())
            errors[part] = short(error) if math.isfinite(error) else None
        return errors


def _compute_capability() -> tuple[int, ...] | None:
    found = getattr(jax.devices()[0], "compute_capability", None)
    return None if found is None else tuple(int(part) for part in str(found).split("."))


def _with_gradients(attend: Callable[..., jax.Array], q: Any, k: Any, v: Any, segment_ids: Any, dx: Any) -> tuple:
    x, pull = jax.vjp(lambda *qkv: attend(*qkv, segment_ids), q, k, v)
    return x, *pull(dx.astype(x.dtype))


def _reference(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Attention by its definition, with all scores in memory."""
    group = q_BTHh.shape[2] // k_BTKh.shape[2]
    k_BTHh, v_BTHh = jnp.repeat(k_BTKh, group, axis=2), jnp.repeat(v_BTKh, group, axis=2)
    scores_BHTS = jnp.einsum("BTHh,BSHh->BHTS", q_BTHh, k_BTHh) / math.sqrt(q_BTHh.shape[-1])
    order = np.arange(q_BTHh.shape[1])
    see_BTS = (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]) & (order[:, None] >= order)[None]
    weights_BHTS = jax.nn.softmax(jnp.where(see_BTS[:, None], scores_BHTS, -jnp.inf), axis=-1)
    return jnp.einsum("BHTS,BSHh->BTHh", weights_BHTS, v_BTHh)


def _loss(sizes: Sizes) -> Json:
    dtypes = ("bfloat16", "float32")
    return {t: guarded(lambda t=t: loss.compare(**sizes.loss, dtype=t, rounds=sizes.rounds)) for t in dtypes}


def _step(sizes: Sizes, **changes: Any) -> Json:
    """Measures the train step of the 1B model on one device."""
    size = dataclasses.replace(sizes.step, model=dataclasses.replace(sizes.step.model, **changes))
    begun = time.perf_counter()
    step = JaxStep(size)
    first = step.run()
    choice = step.model.attention_choice(size.batch_size, size.seq_len)
    found: Json = {
        **changes,
        "parameters": step.model.num_params,
        "tokens": size.tokens,
        "attention": choice.name,
        "attention_reason": choice.reason,
        "first_step_seconds": short(time.perf_counter() - begun),
        "first_loss": short(first),
        **{name: None if mb is None else short(mb) for name, mb in step.memory().items()},
    }
    peak = peak_flops()
    for name, documents in (("causal", None), ("packed", _DOCUMENT_TOKENS)):
        step.use(jax_step.batch(size, documents))
        step.run()
        seconds = median([_timed(step.run, sizes.calls) for _ in range(sizes.rounds)])
        flops = size.tokens * step.model.flops_per_token(size.seq_len) / seconds
        found[name] = {
            "step_seconds": seconds,
            "tokens_per_second": short(size.tokens / seconds),
            "model_tflops": short(flops / 1e12),
            "mfu": None if peak is None else round(flops / (peak / jax.device_count()), 4),
        }
        progress(f"step {changes} {name}: {found[name]}")
    return found | {"peak_memory_mb": short(1000 * peak_memory_gb())}


def _timed(run: Callable[[int], object], calls: int) -> float:
    begun = time.perf_counter()
    run(calls)
    return (time.perf_counter() - begun) / calls


def _torch(sizes: Sizes) -> Json | None:
    """Measures the same step in torch; None if torch is not installed or has no CUDA. Each row is one document."""
    if importlib.util.find_spec("torch") is None:
        progress("torch is not installed")
        return None
    from tools.bench import torch_step

    device = "cuda" if torch_step.available("cuda") else "cpu"
    if device == "cpu" and sizes.compile_torch:
        progress("torch has no CUDA here")
        return None
    size = sizes.step
    begun = time.perf_counter()
    step = torch_step.TorchStep(size, device=device, compile=sizes.compile_torch)
    first = step.run()
    found: Json = {"first_step_seconds": short(time.perf_counter() - begun), "first_loss": short(first)}
    step.run()
    seconds = median([_timed(step.run, sizes.calls) for _ in range(sizes.rounds)])
    return found | {
        "step_seconds": seconds,
        "tokens_per_second": short(size.tokens / seconds),
        "peak_memory_mb": step.peak_memory_mb(),
        "attention": guarded(lambda: torch_step.attention_seconds(device, **_attention_sizes(sizes))),
    }


def _attention_sizes(sizes: Sizes) -> dict[str, Any]:
    heads, kv_heads = sizes.heads[0]
    return {
        "shape": (sizes.attention_batch, sizes.attention_seq_len, sizes.head_dim),
        "heads": heads,
        "kv_heads": kv_heads,
        "rounds": sizes.rounds,
        "calls": sizes.calls,
    }


_PARTS: dict[str, Callable[[Sizes], Json | None]] = {
    "device": _device,
    "attention": _attention,
    "loss": _loss,
    "step": _step,
    "torch": _torch,
    "step_dots": functools.partial(_step, remat="dots"),
    "step_no_remat": functools.partial(_step, remat="none"),
    "step_xla_attention": functools.partial(_step, attention="xla"),
}
