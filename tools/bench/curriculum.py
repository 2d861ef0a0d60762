"""`bench curriculum`: tokens/s of the train step, its parts and the data path, by stage of the ten-stage curriculum."""

import contextlib
import dataclasses
import pathlib
import statistics
import tempfile
from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxtrain import cli
from jaxtrain.cli import Command, Flag, Flags
from jaxtrain.data import fingerprint
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.model import attention, rope
from jaxtrain.model.llama import Llama, LlamaConfig
from jaxtrain.optim.adamw import AdamW
from jaxtrain.plan import Stage, build_plan
from jaxtrain.tokenizers.training import TrainTokenizer
from tools.bench import corpus, stream
from tools.bench.common import (
    Stopwatch,
    at_least_one,
    cpus,
    in_turns,
    median,
    one_core,
    progress,
    ratio,
    result,
    rounds_flag,
    short,
    walls,
)
from tools.bench.jax_step import CLIP_NORM, LEARNING_RATE, JaxStep, Size, batch

# Measures its stages; --size=270m also uses its model.
_CONFIG = cli.load(str(pathlib.Path(__file__).parents[2] / "configs" / "270m_curriculum.py"))
SEQ_LENS = tuple(stage.seq_len for stage in _CONFIG.stages)
COMMAND = Command(
    name="python -m tools.bench curriculum",
    description="For each stage of the ten-stage curriculum (rows of 8 to 2,048 tokens, half of a row overlapping): "
    "tokens/s of the train step alone (forward, backward, clipping, AdamW), the time of each part of it, measured "
    "alone, also as a fraction of the step (CPU seconds without an accelerator), and tokens/s of the data path for "
    "batches of --data_tokens tokens. The default model is small enough for two cores; --size=270m is the "
    "curriculum's own, for a GPU.",
    examples=(
        "python -m tools.bench curriculum",
        "python -m tools.bench curriculum --size=270m --tokens_per_batch=32768 --dtype=bfloat16",
        "python -m tools.bench curriculum --stages=1,2 --data_tokens=0",
    ),
    flags=(
        Flag(name="stages", type=tuple[int, ...], default=tuple(range(1, 11)), help="stages to measure, from 1"),
        Flag(name="size", type=Literal["small", "270m"], default="small", help="the model: 12.6M or 270M parameters"),
        Flag(name="tokens_per_batch", type=int, default=4096, help="tokens of a step, at least one row"),
        Flag(name="dtype", type=Literal["float32", "bfloat16"], default="float32", help="of activations"),
        Flag(name="remat", type=Literal["none", "dots", "full"], default="full", help="see jaxtrain.model.llama"),
        Flag(name="hidden_size", type=int, default=0, help="width of the small model; 0: 384"),
        Flag(name="num_layers", type=int, default=0, help="layers of the small model; 0: 6"),
        Flag(name="vocab_size", type=int, default=0, help="its vocabulary, a multiple of 128; 0: 5,120"),
        Flag(
            name="data_tokens", type=int, default=524_288, help="tokens per batch of the data path; 0: do not measure"
        ),
        Flag(name="data_batches", type=int, default=4, help="batches of the data path per stage"),
        Flag(name="data_vocab_size", type=int, default=8000, help="tokens of the data path's tokenizer"),
        Flag(name="megabytes", type=float, default=16.0, help="millions of characters for the data path"),
        Flag(name="one_core", type=bool, default=False, help="use one core: other load hardly changes its CPU seconds"),
        rounds_flag(3),
    ),
    config="none",
)


def measure(flags: Flags) -> Json:
    at_least_one(rounds=flags.rounds, tokens_per_batch=flags.tokens_per_batch, data_batches=flags.data_batches)
    for number in flags.stages:
        if not 1 <= number <= len(SEQ_LENS):
            raise UserError(f"--stages: there is no stage {number}; give numbers from 1 to {len(SEQ_LENS)}")
    with one_core() if flags.one_core else contextlib.nullcontext():
        return result("curriculum", _stages(flags), device=True)


def _stages(flags: Flags) -> Json:
    stages: dict[int, Json] = {number: {"stage": number, "seq_len": SEQ_LENS[number - 1]} for number in flags.stages}
    for number, about in stages.items():
        about |= _step(flags, SEQ_LENS[number - 1])
        progress(
            f"stage {number}: {about['tokens_per_second']:,.0f} tokens/s, {about['tokens_per_cpu_second']:,.0f} by CPU "
            f"seconds, mostly {about['bound']}"
        )
    if flags.data_tokens:
        _data(flags, stages)
    config, vocab_size = _model(flags, min(SEQ_LENS))
    return {
        "settings": {flag.name: getattr(flags, flag.name) for flag in COMMAND.flags},
        "parameters": config.build(vocab_size, None).num_params,
        "stages": list(stages.values()),
    }


def _model(flags: Flags, seq_len: int) -> tuple[LlamaConfig, int]:
    """Returns the model of configs/270m_curriculum.py or a small one, and its vocabulary size."""
    how = {"max_seq_len": seq_len, "dtype": flags.dtype, "remat": flags.remat}
    if flags.size == "270m":
        return dataclasses.replace(_CONFIG.model, **how), 49_152  # vocabulary of the tokenizer on the Hub
    width = flags.hidden_size or 384
    heads = max(width // 64, 1)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3,
        num_layers=flags.num_layers or 6,
        num_heads=heads,
        num_kv_heads=heads,
        tie_embeddings=True,
        **how,
    )
    config.check()
    return config, flags.vocab_size or 5120


def _step(flags: Flags, seq_len: int) -> Json:
    config, vocab_size = _model(flags, seq_len)
    rows = max(flags.tokens_per_batch // seq_len, 1)
    size = Size(config, vocab_size, rows, seq_len)
    step = JaxStep(size)
    step.use(batch(size, document_tokens=600))
    parts = _parts(step, size)
    runs = {"step": step.run} | {name: run for name, (_, run) in parts.items()}
    for run in runs.values():
        run()  # compiles
    spent = in_turns(runs, flags.rounds)
    # CPU seconds exclude other programs.
    of = cpus if jax.default_backend() == "cpu" else walls
    shares = {name: count * ratio(of(spent[name]), of(spent["step"])) for name, (count, _) in parts.items()}
    whole = statistics.median(of(spent["step"]))
    choice = step.model.attention_choice(rows, seq_len)
    flops = step.model.flops_per_token(seq_len) * size.tokens
    return {
        "rows": rows,
        "step_seconds": median(walls(spent["step"])),
        "step_cpu_seconds": median(cpus(spent["step"])),
        "tokens_per_second": median([size.tokens / one.wall for one in spent["step"]]),
        "tokens_per_cpu_second": median([size.tokens / one.cpu for one in spent["step"]]),
        "model_tflops_per_second": short(flops / whole / 1e12),
        "attention": choice.name,
        "bound": max(shares, key=lambda name: shares[name]),
        "share_of_step": {name: short(share) for name, share in shares.items()},
    }


def _parts(step: JaxStep, size: Size) -> Mapping[str, tuple[int, Callable[[], object]]]:
    """Returns the separately compiled parts of a step, forward and backward: (count in the step, function to run it).

    With remat="full" a layer's forward pass runs twice. The parts count it once, so the layers' shares are too low.
    """
    model = step.model
    params = jax.tree.map(jnp.copy, step.state["params"])  # copied, because the step donates its state
    arrays = {name: jnp.asarray(array) for name, array in batch(size, document_tokens=600).items()}
    dtype, shape_BTD = jnp.dtype(size.model.dtype), (size.batch_size, size.seq_len, size.model.hidden_size)
    x_BTD = jax.random.normal(jax.random.key(0), shape_BTD).astype(dtype)
    loss = CrossEntropy().build(size.vocab_size, None)

    def embed(embedding: jax.Array, tokens: jax.Array) -> jax.Array:
        return embedding[tokens].reshape(-1, shape_BTD[-1]).astype(dtype)

    def of_head(x_and_head: Any, targets: jax.Array, mask: jax.Array) -> jax.Array:
        x_BTD, head_DV = x_and_head
        return loss(x_BTD, head_DV, targets, mask)["loss"]

    optimizer = AdamW(learning_rate=LEARNING_RATE).build(model.axes, None)

    def update(grads: Any, opt: Any, params: Any) -> Any:
        clipped: Any = optax.clip_by_global_norm(CLIP_NORM).update(grads, optax.EmptyState())[0]
        return optimizer.update(clipped, opt, params, jnp.float32(LEARNING_RATE))

    opt = jax.jit(optimizer.init)(params)
    zeros = jnp.zeros(size.batch_size, jnp.uint32)
    hashed = jax.jit(lambda fields: fingerprint.of_rows(fields, zeros, zeros, jnp))
    layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    return {
        "embedding": (1, _both(embed, params["embedding"], arrays["tokens"])),
        **_layer_parts(model, layer, x_BTD.reshape(-1, shape_BTD[-1]), arrays),
        "head and loss": (1, _both(of_head, (x_BTD, model.head(params)), arrays["targets"], arrays["loss_mask"])),
        "optimizer": (1, _waiting(jax.jit(update), params, opt, params)),
        "fingerprint": (1, _waiting(hashed, arrays)),
    }


def _layer_parts(
    model: Llama, layer: Any, x_ND: jax.Array, arrays: Mapping[str, jax.Array]
) -> dict[str, tuple[int, Callable[[], object]]]:
    """Returns the parts of a layer, whose parameters are `layer`."""
    config, dtype = model.config, x_ND.dtype
    shape_BT, head_dim = arrays["tokens"].shape, config.resolved_head_dim
    implementation = model.attention_choice(*shape_BT).name
    frequencies = rope.frequencies(head_dim, config.rope_theta, None)

    def matmul(x: jax.Array, linear: Any) -> jax.Array:
        return x @ linear["kernel"].astype(dtype)

    def projections(layer: Any, x: jax.Array) -> jax.Array:
        of = layer["attention"]
        q, k, v = (matmul(x, of[name]) for name in "qkv")
        groups = config.num_heads // config.num_kv_heads
        return matmul(q + jnp.tile(k + v, (1, groups)), of["o"])

    def mlp(layer: Any, x: jax.Array) -> jax.Array:
        of = layer["mlp"]
        return matmul(jax.nn.silu(matmul(x, of["gate"])) * matmul(x, of["up"]), of["down"])

    def attend(qkv: Any, segment_ids: jax.Array, positions: jax.Array) -> jax.Array:
        tables = rope.tables(positions, frequencies, jnp.dtype(jnp.float32))
        q, k, v = qkv
        turned = rope.rotate(q, *tables), rope.rotate(k, *tables)
        return attention.attend(*turned, v, segment_ids, mesh=None, implementation=implementation)

    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads)
    qkv = tuple(jax.random.normal(jax.random.key(n), (*shape_BT, n, head_dim)).astype(dtype) for n in heads)
    layers = config.num_layers
    return {
        "projections": (layers, _both(projections, layer, x_ND, through=2)),
        "attention": (layers, _both(attend, qkv, arrays["segment_ids"], arrays["positions"])),
        "mlp": (layers, _both(mlp, layer, x_ND, through=2)),
    }


def _both(function: Callable[..., jax.Array], *arguments: Any, through: int = 1) -> Callable[[], object]:
    """Returns a function that runs forward and backward, with gradients for the first `through` arguments."""

    def run(*arguments: Any) -> Any:
        y, pull = jax.vjp(lambda *inputs: function(*inputs, *arguments[through:]), *arguments[:through])
        return pull(y)

    return _waiting(jax.jit(run), *arguments)


def _waiting(function: Callable[..., Any], *arguments: Any) -> Callable[[], object]:
    return lambda: jax.block_until_ready(function(*arguments))


@dataclasses.dataclass(frozen=True)
class _Prepared:
    """A trained tokenizer, and the name of the measurement."""

    name: str
    tokenizer: Any


def _data(flags: Flags, stages: Mapping[int, Json]) -> None:
    """Adds the data path's trained tokens/s, with a sentencepiece tokenizer and with prepared ids."""
    with tempfile.TemporaryDirectory() as folder:
        paths = corpus.write(folder, flags.megabytes, files=4, groups=64)
        data = stream.config(paths, num_lanes=8, workers=2)
        trainer = TrainTokenizer(kind="sentencepiece", vocab_size=flags.data_vocab_size, sample_mb=2.0)
        trainer.train(corpus.documents(2.0), folder, progress=False)
        kinds = (
            _Prepared("data", trainer.build(folder)),
            _Prepared("data_without_tokenizer", stream.Prepared(3.5, flags.data_vocab_size)),
        )
        for number, about in stages.items():
            seq_len = SEQ_LENS[number - 1]
            for kind in kinds:
                rates = [_rate(flags, data, kind.tokenizer, seq_len) for _ in range(flags.rounds)]
                by_wall, by_cpu = zip(*rates, strict=True)
                about[kind.name] = {"tokens_per_second": median(by_wall), "tokens_per_cpu_second": median(by_cpu)}
            about["data_rows"] = _rows(flags, seq_len)
            shown = (f"{kind.name} {about[kind.name]['tokens_per_cpu_second']:,.0f}" for kind in kinds)
            progress(f"stage {number}: tokens per CPU second: {', '.join(shown)}")


def _rows(flags: Flags, seq_len: int) -> int:
    return max(flags.data_tokens // seq_len // 8 * 8, 8)


def _rate(flags: Flags, data: Any, tokenizer: Any, seq_len: int) -> tuple[float, float]:
    """Returns tokens per second, and per CPU second of all threads, from the first batch on."""
    rows = _rows(flags, seq_len)
    plan = build_plan(
        (Stage(seq_len=seq_len, batch_size=rows, overlap=0.5),),
        source_names=tuple(data.sources),
        num_lanes=data.num_lanes,
        seed=0,
        total_tokens=None,
        steps=flags.data_batches + 1,
        epochs=None,
        learning_rate=1.0,
        schedule=lambda tokens, total: 1.0,
    )
    with stream.batches(data, plan, tokenizer) as batches:
        next(batches)
        watch = Stopwatch()
        taken = sum(int(np.prod(found.arrays["tokens"].shape)) for found in batches)
        spent = watch.spent()
        return taken / spent.wall, taken / spent.cpu
