"""Causal attention within segments by JAX's splash kernel, the flash attention for TPUs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

LANES = 128  # the kernel's blocks are multiples of it
BLOCKS = (512, 256, LANES)  # the largest that divides the row is fastest on v5e and v5p (MaxText uses 512 too)


def attend_splash(
    q_BTHh: jax.Array,
    k_BTKh: jax.Array,
    v_BTKh: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    sliding_window: int | None,
    interpret: bool,
) -> jax.Array:
    """Computes softmax(q kᵀ / sqrt(h)) v within segments, up to `sliding_window` - 1 tokens back.

    Rows are padded to a multiple of 128.

    Args:
        q_BTHh: Queries.
        k_BTKh: Keys.
        v_BTKh: Values.
        segment_ids_BT: Document of each token, int32.
        sliding_window: Visible tokens, including the token itself; None for all.
        interpret: Run the kernel without a TPU, slowly.

    Returns:
        x_BTHh.
    """
    batch, seq_len, heads, width = q_BTHh.shape
    padding = -seq_len % LANES
    # Padding follows all real tokens, so the causal mask already hides it.
    q, k, v = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q_BTHh, k_BTKh, v_BTKh))
    segments = jnp.pad(segment_ids_BT, ((0, 0), (0, padding)))
    kv_heads = k.shape[2]
    # The kernel has no scale argument.
    q_BKGTh = (q / math.sqrt(width)).reshape(batch, -1, kv_heads, heads // kv_heads, width).transpose(0, 2, 3, 1, 4)
    k_BKTh, v_BKTh = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    kernel = _kernel(heads // kv_heads, q.shape[1], sliding_window, interpret)
    by_kv_head = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    x_BKGTh: Any = jax.vmap(by_kv_head)(q_BKGTh, k_BKTh, v_BKTh, splash.SegmentIds(segments, segments))
    x_BTHh = x_BKGTh.transpose(0, 3, 1, 2, 4).reshape(batch, -1, heads, width)
    return x_BTHh[:, :seq_len].astype(q_BTHh.dtype)


def _kernel(group: int, length: int, sliding_window: int | None, interpret: bool) -> splash.SplashAttentionKernel:
    shape = (length, length)
    mask = masks.CausalMask(shape) if sliding_window is None else masks.LocalMask(shape, (sliding_window - 1, 0), 0)
    block = next(block for block in BLOCKS if length % block == 0)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=block,
        block_kv_dq=block,
    )
    return splash.make_splash_mqa(
        masks.MultiHeadMask([mask] * group), block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret
    )
