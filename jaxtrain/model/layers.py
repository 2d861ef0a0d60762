"""The modules of a decoder layer in Flax NNX: structure, initializers, logical axes and math.

Modules are built once, abstractly; training uses the plain dict of their parameters (see llama.py). Shapes: see
interfaces.py. Activations are [B * T, D] or [B, T, D] ("..D"); every module here accepts both.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from jaxtrain.distributed.sharding import Axes, constrain
from jaxtrain.model import fp8 as eight_bits
from jaxtrain.model.attention import platform_of
from jaxtrain.model.experts import Experts, MixtureOfExperts
from jaxtrain.model.rope import rotate

if TYPE_CHECKING:
    from jaxtrain.model.llama import LlamaConfig

# (q_BTHh, k_BTKh, v_BTKh) → (x_BTHh, any extra output, such as the layer's key/value cache)
Attend = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, Any]]
# RMSNorm; RMSNorm times 1 + scale, for a scale that starts at 0 (Gemma); LayerNorm with a bias (Ba et al. 2016,
# arXiv:1607.06450).
NORMS = ("rms", "rms_plus_one", "layer")
ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
Rope = tuple[jax.Array, jax.Array]  # rope.tables; None for a layer without rotary positions


class Norm(nnx.Module):
    """RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) in fp32 or wider, or another of NORMS."""

    def __init__(self, size: int, axis: str, config: "LlamaConfig"):
        self.kind, self.epsilon = config.norm, config.norm_eps
        ones = jnp.zeros if self.kind == "rms_plus_one" else jnp.ones
        self.scale = nnx.Param(ones((size,), jnp.float32), axes=(axis,))
        self.bias = nnx.Param(jnp.zeros((size,), jnp.float32), axes=(axis,)) if self.kind == "layer" else None

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        if self.kind == "layer":
            wide -= jnp.mean(wide, axis=-1, keepdims=True)
        mean_square = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = wide * jax.lax.rsqrt(mean_square + self.epsilon)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        y = normed * (1 + scale if self.kind == "rms_plus_one" else scale)
        if self.bias is not None:
            y += self.bias[...].reshape(scale.shape)
        return y.astype(x.dtype)


class Linear(nnx.Module):
    """x @ kernel (+ bias), the kernel cast to x's dtype. With `fp8`, a product of values of 8 bits (fp8.py)."""

    def __init__(
        self,
        sizes: tuple[int, int],
        axes: tuple[str, str],
        std: float,
        bias: bool,
        mesh: Mesh | None,
        rngs: nnx.Rngs,
        fp8: bool,
    ):
        self.kernel = nnx.Param(std * jax.random.normal(rngs.params(), sizes, jnp.float32), axes=axes)
        self.bias = nnx.Param(jnp.zeros(sizes[1:], jnp.float32), axes=axes[1:]) if bias else None
        self.axes = axes
        self.mesh = mesh
        self.fp8 = fp8

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.weight(x.dtype)
        y: jax.Array = eight_bits.matmul(x, kernel, self._gather) if self.fp8 else x @ kernel  # type: ignore[assignment]
        return y if self.bias is None else y + self.bias[...].astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))

    def weight(self, dtype: jnp.dtype) -> jax.Array:
        """The kernel in `dtype`. The cast comes before the FSDP all-gather and halves its size."""
        return constrain(self.kernel[...].astype(dtype), self.mesh, self.axes)

    def _gather(self, kernel_DF: jax.Array) -> jax.Array:
        """Gathers the shards of fsdp. Pinned on both sides, or XLA would gather before the rounding to 8 bits."""
        gathered = tuple(None if axis == "embed" else axis for axis in self.axes)
        return constrain(constrain(kernel_DF, self.mesh, self.axes), self.mesh, gathered)

    def to_heads(self, x: jax.Array, shape_BT: tuple[int, ...], head_dim: int) -> jax.Array:
        """Projects [B, T, D], or [B * T, D], to [B, T, H, h].

        From [B, T, D] the product has the shape of heads itself: as a reshape of [B, T, H * h] it would be a copy in a
        TPU's tiled layout.
        """
        if x.ndim == 2 or self.fp8:
            return self(x).reshape(*shape_BT, -1, head_dim)
        y = jnp.einsum("btd,dkh->btkh", x, self.weight(x.dtype).reshape(x.shape[-1], -1, head_dim))
        return y if self.bias is None else y + self.bias[...].astype(x.dtype).reshape(1, 1, -1, head_dim)

    def from_heads(self, x_BTHh: jax.Array, ndim: int) -> jax.Array:
        """Projects [B, T, H, h] to [B, T, D], or to [B * T, D] if ndim is 2."""
        batch, seq_len, heads, head_dim = x_BTHh.shape
        if ndim == 2 or self.fp8:
            return self(x_BTHh.reshape((batch * seq_len, -1) if ndim == 2 else (batch, seq_len, -1)))
        kernel = self.weight(x_BTHh.dtype).reshape(heads, head_dim, -1)
        y = jnp.einsum("bthk,hkd->btd", x_BTHh, kernel)
        return y if self.bias is None else y + self.bias[...].astype(y.dtype).reshape(1, 1, -1)


class Attention(nnx.Module):
    """Grouped-query attention (Ainslie et al. 2023, arXiv:2305.13245) with rotary positions and optional QK-norm."""

    def __init__(self, config: "LlamaConfig", mesh: Mesh | None, rngs: nnx.Rngs, fp8: bool):
        width, head = config.hidden_size, config.resolved_head_dim
        queries, keys = config.num_heads * head, config.num_kv_heads * head
        linear = functools.partial(Linear, mesh=mesh, rngs=rngs, fp8=fp8)
        std, bias = config.hidden_std, config.attention_bias
        self.q = linear((width, queries), ("embed", "heads"), std, bias)
        self.k = linear((width, keys), ("embed", "kv_heads"), std, bias)
        self.v = linear((width, keys), ("embed", "kv_heads"), std, bias)
        self.o = linear((queries, width), ("heads", "embed"), config.output_std, config.attention_output_bias)
        # The size and axis of the norms on q and k: a head's, or those of all heads.
        sizes = ((head, "head_dim"),) * 2 if config.qk_norm_over == "head" else ((queries, "heads"), (keys, "kv_heads"))
        self.q_norm, self.k_norm = (Norm(*size, config) if config.qk_norm else None for size in sizes)
        self.head_dim = head
        self.query_scale = config.query_scale

    def __call__(
        self, x: jax.Array, shape_BT: tuple[int, ...], rope: Rope | None, attend: Attend
    ) -> tuple[jax.Array, Any]:
        q_BTHh, k_BTKh, v_BTKh = (p.to_heads(x, shape_BT, self.head_dim) for p in (self.q, self.k, self.v))
        if self.q_norm is not None and self.k_norm is not None:
            q_BTHh, k_BTKh = _normed(self.q_norm, q_BTHh), _normed(self.k_norm, k_BTKh)
        if self.query_scale != 1:
            q_BTHh = q_BTHh * self.query_scale
        if rope is not None:
            q_BTHh, k_BTKh = (rotate(x, *rope, platform_of(self.q.mesh)) for x in (q_BTHh, k_BTKh))
        y_BTHh, extra = attend(q_BTHh, k_BTKh, v_BTKh)
        return self.o.from_heads(y_BTHh, x.ndim), extra


def _normed(norm: Norm, x_BTHh: jax.Array) -> jax.Array:
    """Normalizes each head, or all heads together."""
    width = norm.scale.shape[0]
    if width == x_BTHh.shape[-1]:
        return norm(x_BTHh)
    return norm(x_BTHh.reshape(*x_BTHh.shape[:2], width)).reshape(x_BTHh.shape)


class MLP(nnx.Module):
    """SwiGLU or another gated unit (Shazeer 2020, arXiv:2002.05202), or without a gate, by the config's options."""

    def __init__(self, config: "LlamaConfig", mesh: Mesh | None, rngs: nnx.Rngs, fp8: bool):
        linear = functools.partial(Linear, bias=config.mlp_bias, mesh=mesh, rngs=rngs, fp8=fp8)
        width, inner = config.hidden_size, config.intermediate_size
        self.gate = linear((width, inner), ("embed", "mlp"), config.hidden_std) if config.gated_mlp else None
        self.up = linear((width, inner), ("embed", "mlp"), config.hidden_std)
        self.down = linear((inner, width), ("mlp", "embed"), config.output_std)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.gate is None:
            return self.down(self.activation(self.up(x)))
        return self.down(self.activation(self.gate(x)) * self.up(x))


class DecoderLayer(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). The MLP may be a mixture of experts, with one for all tokens.

    By the config the norms come after attention and MLP, too or instead, and the MLP may read what attention reads.
    """

    def __init__(
        self, config: "LlamaConfig", mesh: Mesh | None, rngs: nnx.Rngs, fp8: bool, experts: Experts | None = None
    ):
        def norm(position: str) -> Norm | None:
            return Norm(config.hidden_size, "norm", config) if config.norm_position in (position, "both") else None

        self.attention_norm, self.attention_post_norm = norm("before"), norm("after")
        self.attention = Attention(config, mesh, rngs, fp8)
        self.mlp_norm, self.mlp_post_norm = norm("before"), norm("after")
        self.mlp = MLP(config, mesh, rngs, fp8) if experts is None else MixtureOfExperts(config, experts, mesh, rngs)
        shared = 0 if experts is None else experts.shared_size
        of_all = dataclasses.replace(config, intermediate_size=shared)
        self.shared = MLP(of_all, mesh, rngs, fp8) if shared else None
        self.is_parallel = config.parallel_residual
        self.mesh = mesh

    def __call__(
        self, x: jax.Array, real_BT: jax.Array, rope: Rope | None, attend: Attend
    ) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        """Applies the layer.

        Args:
            x: [B, T, D] or [B * T, D].
            real_BT: Whether a token is one, not padding.
            rope: The tables of the positions; None for a layer without.
            attend: Attention between the heads' projections.

        Returns:
            x, what `attend` returned besides, and the statistics of the experts, if any.
        """

        def normed(norm: Norm | None, x: jax.Array) -> jax.Array:
            return x if norm is None else norm(x)

        y, extra = self.attention(normed(self.attention_norm, x), real_BT.shape, rope, attend)
        attended = constrain(x + normed(self.attention_post_norm, y), self.mesh, activation_axes(x))
        read, statistics = normed(self.mlp_norm, x if self.is_parallel else attended), {}
        if isinstance(self.mlp, MixtureOfExperts):
            y, statistics = self.mlp(read, real_BT.reshape(x.shape[:-1]))
        else:
            y = self.mlp(read)
        if self.shared is not None:
            y = y + self.shared(read)
        x = attended + normed(self.mlp_post_norm, y)
        return constrain(x, self.mesh, activation_axes(x)), (extra, statistics)


class Frame(nnx.Module):
    """The parameters around the layers: embedding, final norm, and the output head unless it is tied to the embedding.

    Rows of the embedding from `vocab_size` on are zero padding.
    """

    def __init__(self, config: "LlamaConfig", vocab_size: int, padded_vocab_size: int, rngs: nnx.Rngs):
        real = jnp.arange(padded_vocab_size)[:, None] < vocab_size

        def rows() -> jax.Array:
            normal = jax.random.normal(rngs.params(), (padded_vocab_size, config.hidden_size), jnp.float32)
            return jnp.where(real, config.initializer_std * normal, 0)

        self.embedding = nnx.Param(rows(), axes=("vocab", "embed"))
        self.norm = Norm(config.hidden_size, "norm", config)
        self.head = None if config.tie_embeddings else nnx.Param(rows().T, axes=("embed", "vocab"))


def activation_axes(x: jax.Array) -> Axes:
    """Returns the logical axes of activations [B * T, D] or [B, T, D]."""
    return ("batch", "activation_embed") if x.ndim == 2 else ("batch", "sequence", "activation_embed")
