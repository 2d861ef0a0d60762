"""The decoder of the Llama family: Llama 2 and 3, Mistral, Qwen2 and 3, SmolLM, by options of one config.

Layers are stacked ([L, ...] parameters) and scanned, so that compile time does not grow with depth. Shapes: see
interfaces.py.
"""

import dataclasses
import functools
import logging
import math
import threading
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain.distributed import sharding
from jaxtrain.errors import UserError
from jaxtrain.model import attention, rope
from jaxtrain.model.layers import DecoderLayer, Frame, activation_axes
from jaxtrain.model.rope import LinearRopeScaling, Llama3RopeScaling

logger = logging.getLogger("jaxtrain")

Params = dict[str, Any]
Method = TypeVar("Method", bound=Callable[..., Any])

# NNX's modules may be made and called in several threads only from flax 0.12.9 on, which Python 3.11 does not have; and
# the next stage is traced in the background.
_nnx = threading.RLock()


def _one_thread_at_a_time(method: Method) -> Method:
    """For methods that run NNX's modules. They only do while JAX traces, so a step never waits."""

    @functools.wraps(method)
    def locked(*args: Any, **kwargs: Any) -> Any:
        with _nnx:
            return method(*args, **kwargs)

    return locked  # type: ignore[return-value]


VOCAB_MULTIPLE = 128  # lanes of a TPU register, and any tensor axis up to it divides the vocabulary
# What a layer's backward pass finds in memory besides its input.
REMAT_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(kw_only=True)
class LlamaConfig:
    """Names are those of Hugging Face configs where they have one.

    hidden_size, intermediate_size: width of the model and of the MLP.
    num_layers, num_heads, num_kv_heads: num_heads is a multiple of num_kv_heads (grouped-query attention).
    head_dim: width of a head; None for hidden_size / num_heads.
    max_seq_len: tokens of context that the model is meant for. Recorded in exports; nothing is sized by it.
    rope_theta: base of the rotary frequencies. rope_scaling: how they stretch to a longer context; None: not at all.
    no_rope_every: every n-th layer goes without rotary positions (SmolLM3's 4); None: none does.
    sliding_window: tokens that a token sees, itself included (Mistral 7B's 4,096); None for all.
    norm_eps: added to the mean square in RMSNorm.
    tie_embeddings: the output head is the embedding's transpose.
    attention_bias: biases on q, k and v (Qwen2). attention_output_bias: on the output projection. mlp_bias: in the MLP.
    qk_norm: RMSNorm on each head of q and k (Qwen3).
    initializer_std: of all matrices; the two projections into the residual stream get it / sqrt(2 * num_layers)
        (GPT-2, Radford et al. 2019, section 2.3).
    dtype: of activations and matmuls ("bfloat16", "float32"; "float64" for tests). Parameters, norms, softmax: fp32.
    remat: what the backward pass computes again: "none"; "full" all of a layer; "dots" all but its weight matmuls.
    scan_layers: off unrolls the layers: slower to compile, at times faster to run.
    attention: "auto", "xla", "splash" (TPU) or "cudnn" (NVIDIA GPU).
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int | None = None
    max_seq_len: int = 2048
    rope_theta: float = 10_000.0
    rope_scaling: LinearRopeScaling | Llama3RopeScaling | None = None
    no_rope_every: int | None = None
    sliding_window: int | None = None
    norm_eps: float = 1e-5
    tie_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    initializer_std: float = 0.02
    dtype: str = "bfloat16"
    remat: str = "full"
    scan_layers: bool = True
    attention: str = "auto"

    def check(self) -> None:
        for name in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "max_seq_len"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1.")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} is not a multiple of num_kv_heads={self.num_kv_heads}: each key head "
                f"serves the same number of query heads. num_kv_heads that work: "
                f"{', '.join(map(str, sharding.divisors(self.num_heads)))}."
            )
        if self.head_dim is None and self.hidden_size % self.num_heads:
            raise UserError(
                f"hidden_size={self.hidden_size} is not a multiple of num_heads={self.num_heads}: set head_dim."
            )
        if self.resolved_head_dim < 2 or self.resolved_head_dim % 2:
            raise UserError(f"A head of width {self.resolved_head_dim}: rotary positions need an even one, at least 2.")
        for name in ("sliding_window", "no_rope_every"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: it must be at least 1, or none.")
        for name in ("rope_theta", "norm_eps", "initializer_std"):
            if not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)}: it must be above 0.")
        for name, allowed in (
            ("dtype", ("bfloat16", "float32", "float64")),
            ("remat", ("none", *REMAT_POLICIES)),
            ("attention", attention.IMPLEMENTATIONS),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}='{getattr(self, name)}' is not known. Use one of: {', '.join(allowed)}.")

    @property
    def resolved_head_dim(self) -> int:
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def output_std(self) -> float:
        return self.initializer_std / math.sqrt(2 * self.num_layers)

    def build(self, vocab_size: int, mesh: Mesh | None) -> "Llama":
        """The model for ids below `vocab_size`. Raises UserError where the mesh does not divide it."""
        return Llama(self, vocab_size, mesh)


class Llama:
    """Pure functions of a plain dict of fp32 parameters.

    axes: the dict's tree with a tuple of logical axes for each leaf. vocab_size: ids in use; padded_vocab_size: rows of
    the embedding. num_params: without padding; num_params_non_embedding: without embedding and output head.
    """

    @_one_thread_at_a_time
    def __init__(self, config: LlamaConfig, vocab_size: int, mesh: Mesh | None):
        config.check()
        self.config = config
        self.mesh = mesh
        self.vocab_size = vocab_size
        self.padded_vocab_size = -(-vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        frame_graph, frame = nnx.split(nnx.eval_shape(lambda: self._frame(jax.random.key(0))))
        layer_graph, layer = nnx.split(nnx.eval_shape(lambda: self._layer(jax.random.key(0))))
        self._frame_graph, self._layer_graph = frame_graph, layer_graph
        layer_axes = jax.tree.map(lambda axes: ("layers", *axes), _axes(layer), is_leaf=sharding.is_axes)
        self.axes: dict[str, Any] = _axes(frame) | {"layers": layer_axes}
        self.shapes: Params = jax.eval_shape(self.init, jax.random.key(0))
        if mesh is not None:
            self._check_mesh(mesh)
        self._choices: dict[attention.Shape, attention.Choice] = {}
        self._frequencies = rope.frequencies(config.resolved_head_dim, config.rope_theta, config.rope_scaling)
        self.num_params_non_embedding = _size(self.shapes["layers"]) + _size(self.shapes["norm"])
        matrices = 1 if config.tie_embeddings else 2
        self.num_params = self.num_params_non_embedding + matrices * vocab_size * config.hidden_size

    def _frame(self, key: jax.Array) -> Frame:
        return Frame(self.config, self.vocab_size, self.padded_vocab_size, nnx.Rngs(params=key))

    def _layer(self, key: jax.Array) -> DecoderLayer:
        return DecoderLayer(self.config, self.mesh, nnx.Rngs(params=key))

    def _check_mesh(self, mesh: Mesh) -> None:
        tensor = mesh.shape["tensor"]
        for name in ("num_heads", "num_kv_heads"):
            if getattr(self.config, name) % tensor:
                works = ", ".join(
                    map(str, sharding.divisors(math.gcd(self.config.num_heads, self.config.num_kv_heads)))
                )
                raise UserError(
                    f"{name}={getattr(self.config, name)} is not divisible by mesh.tensor={tensor}: a device holds "
                    f"whole heads. mesh.tensor that works for this model: {works}."
                )
        sharding.check_divides(mesh, self.axes, self.shapes)
        heads = self.config.num_heads // tensor
        if heads % mesh.shape["context"]:
            works = ", ".join(map(str, sharding.divisors(heads)))
            logger.warning(
                "num_heads=%d / mesh.tensor=%d is not divisible by mesh.context=%d: each of its devices computes the "
                "whole attention. mesh.context that shares it: %s.",
                *(self.config.num_heads, tensor, mesh.shape["context"], works),
            )

    @_one_thread_at_a_time
    def init(self, key: jax.Array) -> Params:
        """Fresh parameters; under jit with `out_shardings` they are born sharded. Layer i depends on (key, i) alone."""
        frame_key, layers_key = jax.random.split(key)
        keys_L = jax.vmap(functools.partial(jax.random.fold_in, layers_key))(jnp.arange(self.config.num_layers))

        def layer(layer_key: jax.Array) -> Params:
            return nnx.to_pure_dict(nnx.state(self._layer(layer_key), nnx.Param))

        # A loop: on jax 0.12 it compiles in 2 s on CPU, vmap in 8.
        layers = jax.lax.map(layer, keys_L)
        return nnx.to_pure_dict(nnx.state(self._frame(frame_key), nnx.Param)) | {"layers": layers}

    def hidden(
        self, params: Params, tokens_BT: jax.Array, segment_ids_BT: jax.Array, positions_BT: jax.Array
    ) -> jax.Array:
        """Final hidden states after the last norm, in the compute dtype: x_BTD. All inputs are int32 [B, T]."""
        implementation = self.attention_choice(*tokens_BT.shape).name

        def attend(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array) -> tuple[jax.Array, None]:
            window = self.config.sliding_window
            x_BTHh = attention.attend(
                q_BTHh,
                k_BTKh,
                v_BTKh,
                segment_ids_BT,
                mesh=self.mesh,
                implementation=implementation,
                sliding_window=window,
            )
            return x_BTHh, None

        return self.decode(params, tokens_BT, positions_BT, lambda _: attend, None)[0]

    @_one_thread_at_a_time
    def decode(
        self, params: Params, tokens_BT: jax.Array, positions_BT: jax.Array, attend_with: Any, extras_L: Any
    ) -> tuple[jax.Array, Any]:
        """The decoder around a given attention, such as one with a key/value cache.

        attend_with: a layer's slice of `extras_L` (a tree of [L, ...] arrays, or None) → `Attend`. Returns (x_BTD, what
        the layers' attentions gave back, stacked).
        """
        dtype = jnp.dtype(self.config.dtype)
        layers = params["layers"]
        frame = nnx.merge(self._frame_graph, {name: leaf for name, leaf in params.items() if name != "layers"})
        x = self._embedded(frame.embedding[...], tokens_BT).astype(dtype)
        tables = rope.tables(positions_BT, self._frequencies, jnp.promote_types(dtype, jnp.float32))

        def body(x: jax.Array, layer: tuple[Params, Any, Any]) -> tuple[jax.Array, Any]:
            layer_params, rotates, extra = layer
            cos, sin = tables
            if rotates is not None:
                cos, sin = jnp.where(rotates, cos, 1), jnp.where(rotates, sin, 0)
            return nnx.merge(self._layer_graph, layer_params)(x, (cos, sin), attend_with(extra))

        x, extras_L = self._over_layers(body, x, (layers, self._rotates(), extras_L))
        return frame.norm(x).reshape(*tokens_BT.shape, -1), extras_L

    def _embedded(self, embedding_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        """[B * T, D], or [B, T, D] where `context` splits the sequence (it could not be merged with the batch).

        The former is faster on CPU. In fp32: the gradient adds up thousands of rows of a frequent token, which bf16
        would lose.
        """
        split = self.mesh is not None and self.mesh.shape["context"] > 1 and tokens_BT.shape[1] > 1
        x = embedding_VD[tokens_BT]
        if self.mesh is not None:
            # Each fsdp shard looks up its own columns for the rows of its whole group, then an all-to-all hands each
            # device its rows: neither the table nor its gradient is ever gathered.
            columns = NamedSharding(self.mesh, PartitionSpec("data", "context" if split else None, "fsdp"))
            x = jax.lax.with_sharding_constraint(x, columns)
        x = x if split else x.reshape(-1, x.shape[-1])
        return sharding.constrain(x, self.mesh, activation_axes(x))

    def _rotates(self) -> np.ndarray | None:
        every = self.config.no_rope_every
        return None if every is None else np.arange(1, self.config.num_layers + 1) % every != 0

    def _over_layers(self, body: Any, x: jax.Array, layers: Any) -> tuple[jax.Array, Any]:
        if self.config.remat != "none":
            # A scan's body cannot be merged with its recomputation; unrolled layers could.
            body = jax.checkpoint(
                body, policy=REMAT_POLICIES[self.config.remat], prevent_cse=not self.config.scan_layers
            )
        if self.config.scan_layers:
            return jax.lax.scan(body, x, layers)
        extras = []
        for index in range(self.config.num_layers):
            x, extra = body(x, jax.tree.map(lambda leaf, index=index: leaf[index], layers))
            extras.append(extra)
        return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *extras)

    def head(self, params: Params) -> jax.Array:
        """The output head, fp32: w_DV over the padded vocabulary (padding columns are zero, mask their logits)."""
        return params["embedding"].T if self.config.tie_embeddings else params["head"]

    def attention_choice(self, batch_size: int, seq_len: int) -> attention.Choice:
        """The attention implementation for rows of this shape.

        A kernel is run once against XLA (`attention.self_check`) when it is first chosen for a shape on real devices;
        one that fails is replaced by XLA, with a warning. Raises UserError where the config asks for the impossible.
        """
        shape = self._attention_shape(batch_size, seq_len)
        if shape not in self._choices:
            self._choices[shape] = self._choose(shape)
        return self._choices[shape]

    def _choose(self, shape: attention.Shape) -> attention.Choice:
        choice = attention.choose(self.config.attention, shape)
        # Devices of another platform are those of a topology that is only compiled for.
        if choice.name == "xla" or shape.platform != jax.default_backend():
            return choice
        problem = attention.self_check(choice.name, shape)
        if problem is None:
            return choice
        logger.warning("Attention kernel %s is not used for rows of %d: %s", choice.name, shape.seq_len, problem)
        return attention.Choice("xla", f"{choice.name} failed its check: {problem}")

    def _attention_shape(self, batch_size: int, seq_len: int) -> attention.Shape:
        config = self.config
        device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        capability = getattr(device, "compute_capability", None)
        ways = dict.fromkeys(sharding.MESH_AXES, 1) if self.mesh is None else self.mesh.shape
        tensor = ways["tensor"]
        whole = (config.num_heads // tensor, config.num_kv_heads // tensor)
        heads, kv_heads = attention.share_of_context(self.mesh, config.num_heads, config.num_kv_heads) or whole
        return attention.Shape(
            platform=device.platform,
            compute_capability=None if capability is None else tuple(int(n) for n in str(capability).split(".")),
            rows=max(1, batch_size // (ways["data"] * ways["fsdp"])),
            seq_len=seq_len,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=config.resolved_head_dim,
            dtype=config.dtype,
            sliding_window=config.sliding_window,
        )

    def flops_per_token(self, seq_len: int) -> float:
        """Training FLOPs for one token in rows of `seq_len`: 6 for each weight in a matmul, and 12 h H for each key.

        (PaLM, Chowdhery et al. 2022, appendix B; causality leaves half of the keys, a window fewer.) The embedding's
        look-up is free; recomputation does not count.
        """
        config = self.config
        seen = min(seq_len, config.sliding_window or seq_len)
        keys = seen - seen * seen / (2 * seq_len)
        attention_flops = 12 * config.num_layers * config.num_heads * config.resolved_head_dim * keys
        return 6.0 * (self.num_params_non_embedding + self.vocab_size * config.hidden_size) + attention_flops


def _axes(state: nnx.State) -> dict[str, Any]:
    axes = jax.tree.map(lambda v: v.get_metadata("axes"), state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return nnx.to_pure_dict(axes)


def _size(tree: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))
