"""Causal attention within segments by cuDNN's flash attention for packed sequences, on NVIDIA Hopper GPUs or newer.

JAX's public function does not support segments, so this calls a private one. `attention.self_check` compares it with
the XLA implementation on the run's own shapes before use.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from jaxtrain.distributed import sharding
from jaxtrain.model.attention_xla import attend_xla

# Maximum documents per row that the kernel is compiled for. It keeps MAX_DOCUMENTS * H * T fp32 softmax statistics per
# row (17 MB at H=32, T=2,048), so this cannot be T. A batch with more documents in a row uses XLA.
MAX_DOCUMENTS = 64
# The largest offset, in elements of the queries, that JAX's wrapper can represent (int32).
MAX_OFFSET = (1 << 31) - 1
# Grouped queries give silently wrong results in jax before 0.11.2 (jax PR 39521).
GROUPS_ARE_RIGHT = jax.__version_info__ >= (0, 11, 2)


def attend_cudnn(
    q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array, segment_ids_BT: jax.Array, *, sliding_window: int | None
) -> jax.Array:
    """Computes softmax(q kᵀ / sqrt(h)) v in bfloat16, within segments, up to `sliding_window` - 1 tokens back.

    Args:
        q_BTHh: Queries.
        k_BTKh: Keys.
        v_BTKh: Values.
        segment_ids_BT: Document of each token, int32.
        sliding_window: Visible tokens, including the token itself; None for all.

    Returns:
        x_BTHh.
    """
    parts = row_parts(q_BTHh.shape)
    if parts > 1:
        arrays = (q_BTHh, k_BTKh, v_BTKh, segment_ids_BT)
        split = tuple(x.reshape(parts, -1, *x.shape[1:]) for x in arrays)
        x = jax.lax.map(lambda part: attend_cudnn(*part, sliding_window=sliding_window), split)
        return x.reshape(q_BTHh.shape)
    starts_BM, lengths_BM, count_B = documents(segment_ids_BT, min(MAX_DOCUMENTS, segment_ids_BT.shape[1]))

    def packed(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array) -> jax.Array:
        if not GROUPS_ARE_RIGHT:
            group = q_BTHh.shape[2] // k_BTKh.shape[2]
            k_BTKh, v_BTKh = jnp.repeat(k_BTKh, group, axis=2), jnp.repeat(v_BTKh, group, axis=2)
        x_BTHh: Any = cudnn.dot_product_attention(
            q_BTHh,
            k_BTKh,
            v_BTKh,
            q_seqlen=lengths_BM,
            kv_seqlen=lengths_BM,
            q_offsets=starts_BM,
            kv_offsets=starts_BM,
            scale=1 / math.sqrt(q_BTHh.shape[-1]),
            mask_type=cudnn.MaskType.PADDING_CAUSAL,
            sliding_window_length=sliding_window,
        )
        return x_BTHh

    def general(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array) -> jax.Array:
        return attend_xla(q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, sliding_window)

    return jax.lax.cond(jnp.all(count_B <= starts_BM.shape[1] - 1), packed, general, q_BTHh, k_BTKh, v_BTKh)


def row_parts(shape_BTHh: tuple[int, ...]) -> int:
    """Returns the fewest equal parts of the rows such that no offset reaches 2^31.

    JAX's wrapper multiplies document offsets, up to B * T, by H * h in int32 (`_fix_seqlen_offsets`), so larger queries
    would silently overflow. `attention.choose` has already ruled out a single row of that size.
    """
    rows, *row = shape_BTHh
    return next(parts for parts in sharding.divisors(rows) if rows // parts * math.prod(row) <= MAX_OFFSET)


def documents(segment_ids_BT: jax.Array, most: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds the runs of equal ids in each row, in the layout that cuDNN's wrapper requires.

    Padding (0) is a run like any other.

    Returns:
        (starts [B, most + 1], lengths [B, most], count [B]), int32, filled up with -1.
    """
    seq_len = segment_ids_BT.shape[1]
    changes = segment_ids_BT[:, 1:] != segment_ids_BT[:, :-1]
    first_BT = jnp.pad(changes, ((0, 0), (1, 0)), constant_values=True)
    count_B = first_BT.sum(axis=1, dtype=jnp.int32)
    starts = jax.vmap(lambda first_T: jnp.nonzero(first_T, size=most + 1, fill_value=seq_len)[0])(first_BT)
    slots = jnp.arange(most + 1)[None]
    lengths = jnp.where(slots[:, :-1] < count_B[:, None], jnp.diff(starts, axis=1), -1)
    return jnp.where(slots < count_B[:, None], starts, -1).astype(jnp.int32), lengths.astype(jnp.int32), count_B


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
