"""A model in one file: a decoder in the style of GPT-2 (Radford et al. 2019) in Flax NNX.

Learned positions, LayerNorm, biases, GELU, tied embeddings.

    python -m jaxtrain.main --config=examples/gpt2.py
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from configs import quickstart
from jaxtrain.config import Config
from jaxtrain.interfaces import Hidden, Mesh, Params
from jaxtrain.model.base import BaseModel, one_thread_at_a_time


@dataclasses.dataclass(kw_only=True)
class GPT2Config:
    """The shape of the decoder.

    Attributes:
        hidden_size: Width of the model; the MLP is four times as wide.
        num_layers: Decoder layers.
        num_heads: Heads; they divide hidden_size.
        num_positions: Rows of the table of positions, the longest row in tokens.
    """

    hidden_size: int = 128
    num_layers: int = 3
    num_heads: int = 4
    num_positions: int = 256

    @property
    def max_seq_len(self) -> int:
        return self.num_positions

    def build(self, vocab_size: int, mesh: Mesh | None) -> "GPT2":
        return GPT2(self, vocab_size, mesh)


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPT2Config, rngs: nnx.Rngs):
        width = config.hidden_size
        self.norm1, self.norm2 = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.qkv, self.out = nnx.Linear(width, 3 * width, rngs=rngs), nnx.Linear(width, width, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)
        self.num_heads = config.num_heads

    def __call__(self, x: jax.Array, visible: jax.Array) -> jax.Array:
        q, k, v = (
            part.reshape(*x.shape[:2], self.num_heads, -1) for part in jnp.split(self.qkv(self.norm1(x)), 3, axis=-1)
        )
        x = x + self.out(jax.nn.dot_product_attention(q, k, v, mask=visible).reshape(x.shape))
        return x + self.down(jax.nn.gelu(self.up(self.norm2(x))))


class Decoder(nnx.Module):
    """Every parameter of the model. The head is the embedding's transpose."""

    def __init__(self, config: GPT2Config, vocab_size: int, rngs: nnx.Rngs):
        self.tokens = nnx.Embed(vocab_size, config.hidden_size, rngs=rngs)
        self.positions = nnx.Embed(config.num_positions, config.hidden_size, rngs=rngs)
        for index in range(config.num_layers):
            setattr(self, f"block_{index}", Block(config, rngs))
        self.norm = nnx.LayerNorm(config.hidden_size, rngs=rngs)
        self.num_layers = config.num_layers

    def __call__(self, tokens_BT: jax.Array, segment_ids_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        index = jnp.arange(tokens_BT.shape[1])
        same = segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :]
        visible = (same & (index[:, None] >= index[None, :])[None])[:, None]  # [B, 1, T, T]
        x = self.tokens(tokens_BT) + self.positions(positions_BT)
        for index in range(self.num_layers):
            x = getattr(self, f"block_{index}")(x, visible)
        return self.norm(x)


# How each kind of parameter is split over the mesh: see RULES in jaxtrain/distributed/sharding.py.
AXES = {
    ("tokens", "embedding"): ("vocab", "embed"),
    ("positions", "embedding"): (None, "embed"),
    ("qkv", "kernel"): ("embed", "heads"),
    ("qkv", "bias"): ("heads",),
    ("out", "kernel"): ("heads", "embed"),
    ("up", "kernel"): ("embed", "mlp"),
    ("up", "bias"): ("mlp",),
    ("down", "kernel"): ("mlp", "embed"),
}


class GPT2(BaseModel):
    """Implements interfaces.Model."""

    @one_thread_at_a_time
    def __init__(self, config: GPT2Config, vocab_size: int, mesh: Mesh | None):
        self._make = lambda key: Decoder(config, vocab_size, nnx.Rngs(params=key))
        # The structure of the modules, without arrays.
        self._graph, state = nnx.split(nnx.eval_shape(lambda: self._make(jax.random.key(0))))

        def axes(path: Any, leaf: Any) -> tuple[str | None, ...]:
            return AXES.get((path[-2].key, path[-1].key), ("norm",) * leaf.ndim)

        super().__init__(config, vocab_size, mesh, jax.tree_util.tree_map_with_path(axes, nnx.to_pure_dict(state)))

    @one_thread_at_a_time
    def init(self, key: jax.Array) -> Params:
        return nnx.to_pure_dict(nnx.state(self._make(key), nnx.Param))

    @one_thread_at_a_time
    def hidden(
        self, params: Params, tokens_BT: jax.Array, segment_ids_BT: jax.Array, positions_BT: jax.Array
    ) -> Hidden:
        return Hidden(nnx.merge(self._graph, params)(tokens_BT, segment_ids_BT, positions_BT))

    def head(self, params: Params) -> jax.Array:
        return params["tokens"]["embedding"].T

    def flops_per_token(self, seq_len: int) -> float:
        weights = self.num_params_non_embedding + self.vocab_size * self.config.hidden_size
        return 6.0 * weights + 6.0 * self.config.num_layers * self.config.hidden_size * seq_len


def get_config(arg: str = "") -> Config:
    return dataclasses.replace(quickstart.get_config(), model=GPT2Config())
