"""Causal attention within the documents of packed rows. Platform and shape select the implementation.

Shapes: see interfaces.py.
"""

import dataclasses
import functools
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxtrain.distributed.sharding import BATCH_MESH_AXES, spec
from jaxtrain.errors import UserError
from jaxtrain.model import attention_xla
from jaxtrain.model.attention_xla import attend_xla

IMPLEMENTATIONS = ("auto", "xla", "splash", "cudnn")
PLATFORM = {"splash": "tpu", "cudnn": "gpu"}
# Shorter rows are one [T, T] block, for which XLA's batched matmuls are no worse than a flash kernel's 128-wide tiles.
SHORTEST_FOR_KERNELS = 128
# Maximum difference of a kernel from XLA in bfloat16, relative to the largest element: rounding is at most 2^-7, bugs
# are near 1.
TOLERANCE = 0.03


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of attention on one device, which determines the implementation.

    Attributes:
        platform: "cpu", "gpu" or "tpu".
        compute_capability: Of an NVIDIA GPU; (9, 0) for Hopper.
        rows: Rows of the batch.
        sliding_window, query_scalar, softcap: See `attend`.
    """

    platform: str
    compute_capability: tuple[int, ...] | None
    rows: int
    seq_len: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    dtype: str
    sliding_window: int | None
    query_scalar: float | None = None
    softcap: float | None = None


@dataclasses.dataclass(frozen=True)
class Choice:
    """An implementation by name ("xla", "splash" or "cudnn"), and the reason for choosing it."""

    name: str
    reason: str


def choose(implementation: str, shape: Shape) -> Choice:
    """Chooses the implementation for a shape.

    Args:
        implementation: One of IMPLEMENTATIONS.
        shape: The shape on one device.

    Raises:
        UserError: `implementation` names one that cannot run there.
    """
    if implementation == "xla":
        return Choice("xla", "the config asks for it")
    kernel = {"tpu": "splash", "gpu": "cudnn"}.get(shape.platform)
    if implementation != "auto" and implementation != kernel:
        raise UserError(
            f"attention='{implementation}' needs a {PLATFORM[implementation].upper()}, and this is a "
            f"{shape.platform.upper()}: use 'auto' or 'xla'."
        )
    if kernel is None:
        return Choice("xla", f"no flash kernel for {shape.platform}")
    obstacle = _cudnn_obstacle(shape) if kernel == "cudnn" else None
    if implementation != "auto":
        if obstacle:
            raise UserError(f"attention='{kernel}' cannot be used: {obstacle}. Use 'auto' or 'xla'.")
        return Choice(kernel, "the config asks for it")
    if shape.seq_len < SHORTEST_FOR_KERNELS:
        obstacle = f"rows of {shape.seq_len} tokens are shorter than a kernel's tile of {SHORTEST_FOR_KERNELS}"
    if obstacle:
        return Choice("xla", obstacle)
    return Choice(kernel, f"the flash kernel for {shape.platform}")


def _cudnn_obstacle(shape: Shape) -> str | None:
    if shape.compute_capability is None or shape.compute_capability < (9, 0):
        found = "not an NVIDIA GPU" if shape.compute_capability is None else f"this is {shape.compute_capability}"
        return f"cuDNN's packed attention needs compute capability 9.0 (Hopper), and {found}"
    if shape.dtype != "bfloat16":
        return f"cuDNN's attention computes in bfloat16, not in {shape.dtype}"
    if shape.head_dim > 256 or shape.head_dim % 8:
        return f"cuDNN's attention needs heads of a multiple of 8 up to 256, not {shape.head_dim}"
    if shape.softcap is not None:
        return "cuDNN's packed attention has no soft cap of the scores"
    if shape.seq_len * shape.num_heads * shape.head_dim >= 1 << 31:
        return "a single row's queries have 2^31 elements or more, beyond cuDNN's int32 offsets in JAX"
    return None


def documents(segment_ids_BT: jax.Array, mesh: Mesh | None, implementation: str, shape: Shape) -> Any:
    """Returns what an implementation needs to know of the documents: the argument `documents` of `attend`.

    Layers share it. It is a tree of arrays with a row for each row of the batch.

    Args:
        segment_ids_BT: Document of each token, int32.
        mesh: The mesh that the ids are sharded over, if any.
        implementation: A name from `choose`.
        shape: The shape on one device.
    """
    if implementation != "cudnn":
        return segment_ids_BT
    from jaxtrain.model import attention_cudnn

    find = functools.partial(attention_cudnn.documents, num_heads=shape.num_heads, head_dim=shape.head_dim)
    if mesh is None or mesh.size == 1:
        return find(segment_ids_BT)
    rows = spec(("batch", None))
    return jax.shard_map(find, mesh=mesh, in_specs=rows, out_specs=rows, check_vma=False)(segment_ids_BT)


def most_documents(implementation: str, shape: Shape) -> tuple[int, int] | None:
    """Returns (rows, documents): that many rows of a device may have that many documents together. None for any."""
    if implementation != "cudnn":
        return None
    from jaxtrain.model import attention_cudnn

    return attention_cudnn.most_documents((shape.rows, shape.seq_len, shape.num_heads, shape.head_dim))


def attend(
    q_BTHh: jax.Array,
    k_BTKh: jax.Array,
    v_BTKh: jax.Array,
    documents: Any,
    *,
    mesh: Mesh | None,
    implementation: str,
    sliding_window: int | None = None,
    query_scalar: float | None = None,
    softcap: float | None = None,
) -> jax.Array:
    """Computes softmax(q kᵀ / sqrt(h)) v, where a token attends to itself and to earlier tokens of its segment.

    Args:
        q_BTHh: Queries.
        k_BTKh: Keys.
        v_BTKh: Values.
        documents: What `documents` returned: for "xla" and "splash", the document of each token, int32 [B, T].
        mesh: The mesh that the arrays are sharded over, if any.
        implementation: A name from `choose`. "splash" runs interpreted if the mesh has no TPU.
        sliding_window: Visible tokens, including the token itself; None for all.
        query_scalar: Its root divides the scores, instead of that of h; None for h.
        softcap: Scores s become softcap * tanh(s / softcap); None leaves them. Not for "cudnn".

    Returns:
        x_BTHh.
    """
    kernel = functools.partial(
        _kernel(implementation, mesh), sliding_window=sliding_window, query_scalar=query_scalar, softcap=softcap
    )
    if mesh is None or mesh.size == 1:
        return kernel(q_BTHh, k_BTKh, v_BTKh, documents)
    rows, names = spec(("batch", None)), ("batch", None, "activation_heads", None)
    if share_of_context(mesh, q_BTHh.shape[2], k_BTKh.shape[2]) is not None:
        kernel, names = _by_heads(kernel, mesh.shape["context"]), ("batch", "sequence", "activation_heads", None)
    # Each device has its own rows and heads, so there is no other communication.
    heads = spec(names)
    return jax.shard_map(kernel, mesh=mesh, in_specs=(heads, heads, heads, rows), out_specs=heads, check_vma=False)(
        q_BTHh, k_BTKh, v_BTKh, documents
    )


def attend_one(
    q_BTHh: jax.Array,
    k_BSKh: jax.Array,
    v_BSKh: jax.Array,
    visible_BS: jax.Array,
    *,
    query_scalar: float | None,
    softcap: float | None,
) -> jax.Array:
    """Attention of a single query (T = 1) to the visible keys, otherwise as `attend`: x_BTHh."""
    batch, _, heads, width = q_BTHh.shape
    q_BKGh = q_BTHh.reshape(batch, k_BSKh.shape[2], -1, width)
    wide = jnp.promote_types(q_BTHh.dtype, jnp.float32)
    scores = (
        jnp.einsum("bkgh,bskh->bkgs", q_BKGh, k_BSKh, preferred_element_type=wide) * (query_scalar or width) ** -0.5
    )
    if softcap is not None:
        scores = softcap * jnp.tanh(scores / softcap)
    weights = jax.nn.softmax(jnp.where(visible_BS[:, None, None], scores, -jnp.inf), axis=-1)
    x_BKGh = jnp.einsum("bkgs,bskh->bkgh", weights.astype(v_BSKh.dtype), v_BSKh, preferred_element_type=wide)
    return x_BKGh.reshape(batch, 1, heads, width).astype(q_BTHh.dtype)


def max_logits(
    q_BTHh: jax.Array,
    k_BTKh: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    mesh: Mesh | None,
    sliding_window: int | None = None,
    query_scalar: float | None = None,
) -> jax.Array:
    """The largest attention logit of each query head over the rows and all visible keys. Arguments: see `attend`.

    Exact for any implementation of `attend`, by one more product of queries and keys, which has no gradient.

    Returns:
        fp32 [H], the same on all devices.
    """
    q_BTHh, k_BTKh = jax.lax.stop_gradient((q_BTHh, k_BTKh))
    find = functools.partial(attention_xla.max_logits, sliding_window=sliding_window, query_scalar=query_scalar)
    if mesh is None or mesh.size == 1:
        return find(q_BTHh, k_BTKh, segment_ids_BT)
    rows, names = spec(("batch", None)), ("batch", None, "activation_heads", None)
    trades = mesh.shape["context"] > 1 and share_of_context(mesh, q_BTHh.shape[2], k_BTKh.shape[2]) is not None
    if trades:
        names = ("batch", "sequence", "activation_heads", None)

    def device(q_BTHh: jax.Array, k_BTKh: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
        if trades:
            q_BTHh, k_BTKh = _to_heads(mesh.shape["context"], q_BTHh, k_BTKh)
        top_H = find(q_BTHh, k_BTKh, segment_ids_BT)
        if trades:
            top_H = jax.lax.all_gather(top_H, "context", tiled=True)
        return jax.lax.pmax(top_H, BATCH_MESH_AXES)

    heads, all_heads = spec(names), spec(("activation_heads",))
    return jax.shard_map(device, mesh=mesh, in_specs=(heads, heads, rows), out_specs=all_heads, check_vma=False)(
        q_BTHh, k_BTKh, segment_ids_BT
    )


def share_of_context(mesh: Mesh | None, num_heads: int, num_kv_heads: int) -> tuple[int, int] | None:
    """Returns (query heads, key heads) per device, over whole rows, if `context` splits the sequence.

    The devices of `context` exchange their parts of the sequence for parts of the heads, attend, and exchange back
    (DeepSpeed Ulysses, Jacobs et al. 2023, arXiv:2309.14509, section 3). Each device gets an equal share of the causal
    mask, any kernel works, and no array grows. If there are too few key heads to split, they are repeated. Returns None
    if the query heads cannot be split: every device of `context` then gathers the rows and computes all of its heads.
    """
    tensor, context = (1, 1) if mesh is None else (mesh.shape["tensor"], mesh.shape["context"])
    heads, kv_heads = num_heads // tensor, num_kv_heads // tensor
    if heads % context:
        return None
    return heads // context, kv_heads * _repeats(heads, kv_heads, context) // context


def _repeats(heads: int, kv_heads: int, context: int) -> int:
    """The fewest copies of the key heads such that `context` divides them and they divide the query heads."""
    return next(n for n in range(1, heads + 1) if kv_heads * n % context == 0 and heads % (kv_heads * n) == 0)


def _by_heads(kernel: Any, context: int) -> Any:
    def attend_share(q_BTHh, k_BTKh, v_BTKh, documents):
        x_BTHh = kernel(*_to_heads(context, q_BTHh, k_BTKh, v_BTKh), documents)
        return jax.lax.all_to_all(x_BTHh, "context", split_axis=1, concat_axis=2, tiled=True)

    return attend_share


def _to_heads(context: int, q_BTHh: jax.Array, *keys_BTKh: jax.Array) -> list[jax.Array]:
    """Trades a device's part of the sequence for its part of the heads, of queries, and of keys and values."""
    copies = _repeats(q_BTHh.shape[2], keys_BTKh[0].shape[2], context)
    arrays = [q_BTHh, *(x if copies == 1 else x.repeat(copies, axis=2) for x in keys_BTKh)]
    return [jax.lax.all_to_all(x, "context", split_axis=2, concat_axis=1, tiled=True) for x in arrays]


def compiler_options(mesh: Mesh | None, *names: str, unrolled: bool = False) -> dict[str, str]:
    """XLA options for `jax.jit` of any function that runs layers with the implementations `names`.

    XLA's pass that gathers the next layer's parameters one loop iteration ahead clones the loop body, and the clones
    share its inner loops. A later pass then aborts the process ("Call graph must have been flattened": jaxlib 0.10.2,
    1B model on 8 A100s). The block rows of attention_xla are such inner loops, and so are the loss's chunks in the loop
    over micro-batches if layers are unrolled; without the pass they compile.
    """
    if mesh is None or mesh.size == 1 or platform_of(mesh) != "gpu" or not ("xla" in names or unrolled):
        return {}
    return {"xla_disable_hlo_passes": "collective-pipeliner-backward"}


def platform_of(mesh: Mesh | None) -> str:
    """Returns the platform of the mesh's devices, or JAX's default platform."""
    return jax.default_backend() if mesh is None else mesh.devices.flat[0].platform


def _kernel(implementation: str, mesh: Mesh | None) -> Any:
    # Imported on use: Pallas takes 0.5 s, and the private cuDNN module may not exist.
    if implementation == "splash":
        from jaxtrain.model.attention_splash import attend_splash

        device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
        return functools.partial(attend_splash, device_kind=device.device_kind, interpret=platform_of(mesh) != "tpu")
    if implementation == "cudnn":
        from jaxtrain.model.attention_cudnn import attend_cudnn

        return attend_cudnn
    return _xla


def _xla(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, *, sliding_window, query_scalar, softcap):
    return attend_xla(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, sliding_window, query_scalar, softcap)


def self_check(implementation: str, shape: Shape) -> str | None:
    """Compares a kernel's forward and backward pass with XLA's, on at most two packed rows on the first local device.

    May be called during tracing.

    Returns:
        A description of the failure, or None.
    """
    try:
        # A new thread has no trace in progress, so the kernel runs instead of being traced.
        with ThreadPoolExecutor(1) as thread:
            got, want = thread.map(lambda name: jax.device_get(_run(name, shape)), (implementation, "xla"))
    # This is private or new code on an unknown machine: any exception is a reason not to use it.
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
    for name, a, b in zip(("output", "dq", "dk", "dv"), got, want, strict=True):
        error = np.abs(a.astype(np.float32) - b.astype(np.float32)).max() / np.abs(b.astype(np.float32)).max()
        # Not `>`: NaN must fail too.
        if not error <= TOLERANCE:
            return f"its {name} differs from XLA's by {error:.1%} of the largest element"
    return None


def _run(implementation: str, shape: Shape) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)
    rows = min(shape.rows, 2)

    def normal(heads: int) -> np.ndarray:
        return rng.standard_normal((rows, shape.seq_len, heads, shape.head_dim), np.float32).astype(shape.dtype)

    q, k, v = normal(shape.num_heads), normal(shape.num_kv_heads), normal(shape.num_kv_heads)
    dx = normal(shape.num_heads)
    segment_ids = np.sort(rng.integers(1, 6, (rows, shape.seq_len)), axis=1).astype(np.int32)

    @jax.jit
    def run(q, k, v, dx, segment_ids):
        options: Any = {"mesh": None, "implementation": implementation}
        options |= {name: getattr(shape, name) for name in ("sliding_window", "query_scalar", "softcap")}
        found = documents(segment_ids, None, implementation, shape)
        x, pull = jax.vjp(lambda q, k, v: attend(q, k, v, found, **options), q, k, v)
        return x, *pull(dx)

    return run(q, k, v, dx, segment_ids)
