"""Causal attention within segments by cuDNN's flash attention for packed sequences, on NVIDIA Hopper GPUs or newer.

JAX's public function does not support segments, so this calls a private one. `attention.self_check` compares it with
the XLA implementation on the run's own shapes before use.

cuDNN sees a device's rows as one sequence of tokens and takes a list of the documents in it, of fixed length. The list
is made once per micro-batch, for all layers (`documents`). A batch with more documents gets another program, chosen on
the host (`most_documents`): a branch on the device would make the host wait for it in every layer, copy its operands,
and double the compile time (1B on an H200: 3,904 waits a step).
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from jaxtrain.distributed import sharding

# The kernel keeps [slots, H, T] fp32 softmax statistics, so there cannot be a slot for every token. With a slot for 64
# tokens they are half as large as the queries at T=2,048, h=128, and documents may be as short as 64 tokens on average
# over the rows of a device: web pages and code files have 500 to 1,500, chat turns about 100.
_TOKENS_PER_SLOT = 64
# A few rows may be far from the average.
_LEAST_SLOTS = 64
# The largest offset, in elements of the queries, that cuDNN's offsets can represent (int32).
MAX_OFFSET = (1 << 31) - 1


class Documents(NamedTuple):
    """The documents of a device's rows, in the order of the rows. There are B * M slots; unused ones are empty.

    Attributes:
        lengths: Tokens of each document, int32 [B, M].
        starts: Its first token, counted from that of the first row, int32 [B, M + 1].
    """

    lengths: jax.Array
    starts: jax.Array


def documents(segment_ids_BT: jax.Array, num_heads: int, head_dim: int) -> Documents:
    """Finds the runs of equal ids in each row. Padding (0) is a run like any other.

    Args:
        segment_ids_BT: Document of each token, int32. At most `most_documents` runs.
        num_heads: Query heads on this device.
        head_dim: Width of a head.
    """
    batch, seq_len = segment_ids_BT.shape
    parts = row_parts((batch, seq_len, num_heads, head_dim))
    rows, changes = batch // parts, segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    first_BT = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    slots = slots_per_row(rows, seq_len)

    def starts(first_N: jax.Array) -> jax.Array:
        return jnp.nonzero(first_N, size=rows * (slots + 1), fill_value=first_N.size)[0]

    starts_PN = jax.vmap(starts)(first_BT.reshape(parts, -1)).astype(jnp.int32)
    lengths_PN = jnp.diff(starts_PN, axis=1)[:, : rows * slots]
    return Documents(lengths_PN.reshape(batch, slots), starts_PN.reshape(batch, slots + 1))


def slots_per_row(rows: int, seq_len: int) -> int:
    """Documents per row, on average over the rows, that the kernel is compiled for."""
    return max(2, -(-max(_LEAST_SLOTS, rows * seq_len // _TOKENS_PER_SLOT) // rows))


def most_documents(shape_BTHh: tuple[int, ...]) -> tuple[int, int]:
    """Returns (rows, documents): that many rows of a device may have that many runs of equal ids together."""
    rows = shape_BTHh[0] // row_parts(shape_BTHh)
    return rows, rows * slots_per_row(rows, shape_BTHh[1])


def row_parts(shape_BTHh: tuple[int, ...]) -> int:
    """Returns the fewest equal parts of the rows such that no offset, in elements of the queries, reaches 2^31.

    `attention.choose` has already ruled out a single row of that size.
    """
    rows, *row = shape_BTHh
    return next(parts for parts in sharding.divisors(rows) if rows // parts * math.prod(row) <= MAX_OFFSET)


def attend_cudnn(
    q_BTHh: jax.Array,
    k_BTKh: jax.Array,
    v_BTKh: jax.Array,
    found: Documents,
    *,
    sliding_window: int | None,
    query_scalar: float | None,
    softcap: None,
) -> jax.Array:
    """Computes softmax(q kᵀ / sqrt(h)) v in bfloat16, within documents, up to `sliding_window` - 1 tokens back.

    Args:
        q_BTHh: Queries.
        k_BTKh: Keys.
        v_BTKh: Values.
        found: The documents, from `documents`.
        sliding_window: Visible tokens, including the token itself; None for all.
        query_scalar: Its root divides the scores, instead of that of h; None for h.
        softcap: The kernel has none.

    Returns:
        x_BTHh.
    """
    parts = row_parts(q_BTHh.shape)
    if parts > 1:
        split = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), (q_BTHh, k_BTKh, v_BTKh, found))
        options: Any = {"sliding_window": sliding_window, "query_scalar": query_scalar, "softcap": softcap}
        x = jax.lax.map(lambda part: attend_cudnn(*part, **options), split)
        return x.reshape(q_BTHh.shape)
    x_BTHh: Any = cudnn.dot_product_attention(
        q_BTHh,
        k_BTKh,
        v_BTKh,
        q_seqlen=found.lengths,
        kv_seqlen=found.lengths,
        q_offsets=found.starts * math.prod(q_BTHh.shape[2:]),
        kv_offsets=found.starts * math.prod(k_BTKh.shape[2:]),
        scale=1 / math.sqrt(query_scalar or q_BTHh.shape[-1]),
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
        sliding_window_length=sliding_window,
    )
    return x_BTHh


def _as_given(q_seqlen: Any, kv_seqlen: Any, q_offsets: Any, kv_offsets: Any, query: Any, key: Any) -> tuple[Any, ...]:
    return q_seqlen, kv_seqlen, q_offsets, kv_offsets


# JAX's own function turns documents by row into cuDNN's list again in every layer, with room for the most crowded row
# in each, and until 0.11.2 with wrong offsets for grouped keys (jax PR 39521). Ours are in the final form.
assert callable(cudnn._fix_seqlen_offsets)
cudnn._fix_seqlen_offsets = _as_given


def compile_for(capability: tuple[int, int]) -> None:
    """Sets the compute capability to compile for, in this process.

    JAX's wrapper queries the local GPU, which does not exist when compiling ahead of time.

    Args:
        capability: The compute capability of the target GPUs.
    """

    def parsed(text: str) -> tuple[int, ...]:
        return tuple(int(part) for part in text.split("."))

    cudnn.check_compute_capability = lambda text: capability >= parsed(text)
    cudnn.is_cuda_compute_capability_equal = lambda text: capability == parsed(text)
