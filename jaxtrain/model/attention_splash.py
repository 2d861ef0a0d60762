"""Causal attention within segments by JAX's splash kernel, the flash attention for TPUs."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from jaxtrain.model.attention_xla import SAVED

LANES = 128  # the kernel's blocks are multiples of it


def attend_splash(
    q_BTHh: jax.Array,
    k_BTKh: jax.Array,
    v_BTKh: jax.Array,
    segment_ids_BT: jax.Array,
    *,
    sliding_window: int | None,
    query_scalar: float | None,
    softcap: float | None,
    device_kind: str,
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
        query_scalar: Its root divides the scores, instead of that of h; None for h.
        softcap: Scores s become softcap * tanh(s / softcap); None leaves them.
        device_kind: JAX's name of the TPU, which determines the blocks.
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
    q_BKGTh = (
        (q / math.sqrt(query_scalar or width))
        .reshape(batch, -1, kv_heads, heads // kv_heads, width)
        .transpose(0, 2, 3, 1, 4)
    )
    k_BKTh, v_BKTh = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    kernel = _kernel(heads // kv_heads, q.shape[1], sliding_window, softcap, device_kind, interpret)
    by_kv_head = jax.vmap(kernel, in_axes=(0, 0, 0, None))
    x_BKGTh: Any = jax.vmap(by_kv_head)(q_BKGTh, k_BKTh, v_BKTh, splash.SegmentIds(segments, segments))
    x_BTHh = x_BKGTh.transpose(0, 3, 1, 2, 4).reshape(batch, -1, heads, width)
    return x_BTHh[:, :seq_len].astype(q_BTHh.dtype)


def block_sizes(length: int, device_kind: str) -> tuple[int, bool]:
    """Returns the side of the blocks, and whether one kernel computes the whole backward pass.

    Larger blocks read k and v less often, but compute more scores above the diagonal: with 4 blocks a row, 62% of the
    square instead of 50%. No number below is measured here.

    | rows of | block | source |
    |---|---|---|
    | < 4,096 | 512 | MaxText's default. At 2,048 tokens, 1,024 would compute 20% more scores. |
    | 4,096 and more | 1,024 | As many blocks a row. 2,048 exceeds the scoped VMEM of a v5e, 16 MiB (compiled). |
    | 8,192 and more on a v6e | 2,048 | MaxText's Trillium recipe for Llama 3.1 8B. |

    One kernel needs 5 products instead of the 7 of two, and sums one dq per block of keys afterwards: 5% of a 1B step
    on a v5e by estimate. On a v5p with 8,192 tokens MaxText's recipe uses two, and others measured them to be faster.
    """
    trillium = "v6" in device_kind
    largest = 512 if length < 4096 else 2048 if trillium and length >= 8192 else 1024
    block = next(block for block in (2048, 1024, 512, 256, LANES) if block <= largest and length % block == 0)
    return block, not (device_kind in ("TPU v5", "TPU v5p") and length >= 8192)


def _kernel(
    group: int, length: int, sliding_window: int | None, softcap: float | None, device_kind: str, interpret: bool
) -> splash.SplashAttentionKernel:
    shape = (length, length)
    mask = masks.CausalMask(shape) if sliding_window is None else masks.LocalMask(shape, (sliding_window - 1, 0), 0)
    block, fused = block_sizes(length, device_kind)
    sizes = splash.BlockSizes(
        block_q=block,
        block_kv=block,
        block_kv_compute=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_kv_dkv_compute=block,
        block_q_dq=None if fused else block,
        block_kv_dq=None if fused else block,
        use_fused_bwd_kernel=fused,
    )
    return splash.make_splash_mqa(
        masks.MultiHeadMask([mask] * group),
        block_sizes=sizes,
        attn_logits_soft_cap=softcap,
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=SAVED,
        interpret=interpret,
    )
