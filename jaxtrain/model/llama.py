"""The decoder of all families of dense models, from Llama and Gemma to OLMo and Pythia, as options of one config.

Start with `Llama.hidden`, the forward pass. The modules of a layer are in layers.py, attention is in attention.py. NNX
modules are built once, abstractly, for their structure; training uses the plain dict of their parameters. The layers
repeat a pattern of kinds (pattern.py). They are stacked ([L, ...] parameters) and scanned, so that compile time does
not grow with depth. Shapes: see interfaces.py.
"""

import copy
import dataclasses
import functools
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxtrain import cli
from jaxtrain.distributed import consensus, sharding
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Hidden, Params
from jaxtrain.losses.head import SoftCapped
from jaxtrain.model import attention, embedding, experts, fp8, pattern, rope
from jaxtrain.model.attention_xla import SAVED
from jaxtrain.model.base import BaseModel, one_thread_at_a_time
from jaxtrain.model.experts import Experts
from jaxtrain.model.layers import ACTIVATIONS, NORMS, Attend, DecoderLayer, Frame, activation_axes
from jaxtrain.model.pattern import Extras, Kind
from jaxtrain.model.rope import LinearRopeScaling, Llama3RopeScaling, YarnRopeScaling

logger = logging.getLogger("jaxtrain")

# Keys and values of a layer, each [B, S, K, h] in the compute dtype. A local layer keeps only the last `sliding_window`
# slots: slot s of the text is slot s % S of the cache.
Cache = tuple[jax.Array, jax.Array]

VOCAB_MULTIPLE = 128  # lanes of a TPU register; any tensor axis up to it divides the padded vocabulary
MOST_LAYERS = 1 << 16  # absurd numbers end in a message, not in an error of NumPy or of the memory
REMAT = ("auto", "none", "full", "dots")


def remat_policy(remat: str) -> Any:
    """Returns what the backward pass keeps of each layer, besides its input, as a policy for `jax.checkpoint`.

    Args:
        remat: "full" ("auto" is the same here) or "dots".
    """
    if remat != "dots":
        return None
    policies = jax.checkpoint_policies
    named = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(SAVED, experts.SAVED)
    )
    # cuDNN's output and statistics have no name: they belong to JAX's function.
    return lambda primitive, *args, **params: (
        primitive.name == "dot_product_attention_fwd_wrapper" or named(primitive, *args, **params)
    )


@dataclasses.dataclass(kw_only=True)
class LlamaConfig:
    """The shape of the decoder. Fields have the names of Hugging Face configs where those exist.

    Attributes:
        hidden_size: Width of the model.
        intermediate_size: Width of the MLP.
        num_layers: Decoder layers.
        num_heads: Query heads, a multiple of num_kv_heads.
        num_kv_heads: Key and value heads (grouped-query attention).
        head_dim: Width of a head; None for hidden_size / num_heads.
        max_seq_len: Context length in tokens that the model is meant for. Recorded in exports; no array depends on it.
        rope_theta: Base of the rotary frequencies.
        rope_scaling: Scaling of the frequencies for a longer context; None for no scaling.
        rope_local_base_freq: Base of local layers' frequencies, which are not scaled (10,000 in Gemma 3). None: theirs
            are those of all layers.
        partial_rotary_factor: The part of each head that has rotary positions, from its first element on (0.25 in
            Pythia).
        layers: The repeated pattern of the layers' kinds, as "5 local : 1 global" (pattern.py). None: all layers are of
            one kind, local if sliding_window is set, but for no_rope_every.
        no_rope_every: Every N-th layer has no rotary positions (4 in SmolLM3); None if all layers have them, or if
            `layers` says which.
        sliding_window: Tokens that a token sees in local layers, including itself (4,096 in Mistral 7B); None for all.
        experts: The mixtures of experts in place of MLPs, in all layers or in those that `layers` says.
        norm: "rms", "rms_plus_one" (Gemma) or "layer" (Pythia): see layers.NORMS.
        norm_eps: Added to the mean square in norms.
        norm_position: Norms "before" attention and MLP, "after" them (OLMo 2), or "both" (Gemma 2).
        parallel_residual: Whether the MLP reads what attention reads, instead of its result (Pythia).
        hidden_act: "silu", "gelu" or "gelu_pytorch_tanh" (Gemma).
        gated_mlp: Whether the MLP is gated (SwiGLU, GeGLU).
        tie_embeddings: Use the transposed embedding as the output head.
        attention_bias: Biases on q, k and v (Qwen2).
        attention_output_bias: A bias on the output projection of attention.
        mlp_bias: Biases in the MLP.
        qk_norm: Norms on q and k.
        qk_norm_over: Each "head" (Qwen3), or all heads together, the "projection" (OLMo 2).
        query_pre_attn_scalar: Attention scores are divided by its root, instead of that of a head's width (Gemma).
        attn_logit_softcapping: Bounds attention scores: s becomes c tanh(s / c) (50 in Gemma 2); None for no bound.
        final_logit_softcapping: Bounds logits in the same way (30 in Gemma 2).
        scale_embeddings: Whether embeddings are multiplied by the root of hidden_size (Gemma).
        initializer_std: Standard deviation of all matrices. The two projections into the residual stream use it divided
            by sqrt(2 * num_layers) (GPT-2, Radford et al. 2019, section 2.3).
        width_transfer: "mup": initialization, multipliers and learning rates such that the best learning rate is that
            of the model with base_width, whose other widths are smaller in the same proportion; see docs/optimizers.md.
            "none": as at base_width.
        base_width: The hidden_size of that model, for "mup".
        base_head_dim: Its head_dim; None for this model's, if a wider model has more heads instead of wider ones.
        dtype: Type of activations and matmuls: "bfloat16", "float32", or "float64" for tests. Parameters, norms and
            softmax are fp32.
        remat: What the backward pass recomputes: "none"; "full", a whole layer; "dots", everything but its matmuls with
            weights and its attention. "auto": the trainer chooses (trainer/tuning.py); outside of it, as "full".
        scan_layers: False unrolls the layers: slower to compile, sometimes faster to run. None: the trainer chooses.
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
    rope_scaling: LinearRopeScaling | Llama3RopeScaling | YarnRopeScaling | None = None
    rope_local_base_freq: float | None = None
    partial_rotary_factor: float = 1.0
    layers: str | None = None
    no_rope_every: int | None = None
    sliding_window: int | None = None
    norm: str = "rms"
    norm_eps: float = 1e-5
    norm_position: str = "before"
    parallel_residual: bool = False
    hidden_act: str = "silu"
    gated_mlp: bool = True
    tie_embeddings: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    qk_norm_over: str = "head"
    query_pre_attn_scalar: float | None = None
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    scale_embeddings: bool = False
    experts: Experts | None = dataclasses.field(default=None, metadata={cli.BEFORE: None})
    initializer_std: float = 0.02
    width_transfer: str = "none"
    base_width: int | None = None
    base_head_dim: int | None = None
    dtype: str = "bfloat16"
    remat: str = dataclasses.field(default="auto", metadata={cli.BEFORE: "full"})
    scan_layers: bool | None = dataclasses.field(default=None, metadata={cli.BEFORE: True})
    attention: str = "auto"

    def check(self) -> None:
        widths = ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
        widths += ("base_width", "base_head_dim")
        positions = ("max_seq_len", "sliding_window", "no_rope_every")
        most = {**dict.fromkeys(widths, 1 << 24), "num_layers": MOST_LAYERS, **dict.fromkeys(positions, (1 << 31) - 1)}
        for name, limit in most.items():
            value = getattr(self, name)
            if value is not None and not 1 <= value <= limit:
                raise UserError(f"{name}={value}: it must be from 1 to {limit:,}.")
        if self.experts is not None:
            self.experts.check()
            if self.hidden_act != "silu":
                raise UserError(f"hidden_act='{self.hidden_act}' with experts: they are SwiGLU, so set 'silu'.")
            if (self.hidden_act, self.gated_mlp) != ("silu", True):
                raise UserError(f"hidden_act='{self.hidden_act}', gated_mlp={self.gated_mlp}: experts are SwiGLU.")
        if self.layers is not None:
            self._check_pattern(self.layers)
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
        if not 0 < self.partial_rotary_factor <= 1:
            raise UserError(f"partial_rotary_factor={self.partial_rotary_factor}: it must be above 0 and at most 1.")
        if self.rotary_width < 2 or self.rotary_width % 2:
            raise UserError(
                f"A head of width {self.resolved_head_dim} with partial_rotary_factor={self.partial_rotary_factor}: "
                "rotary positions need an even part of it, at least 2."
            )
        above_zero = ("rope_theta", "rope_local_base_freq", "norm_eps", "initializer_std", "query_pre_attn_scalar")
        for name in (*above_zero, "attn_logit_softcapping", "final_logit_softcapping"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise UserError(f"{name}={getattr(self, name)}: it must be above 0.")
        for name, allowed in (
            ("width_transfer", ("none", "mup")),
            ("dtype", ("bfloat16", "float32", "float64")),
            ("remat", REMAT),
            ("attention", attention.IMPLEMENTATIONS),
            ("norm", NORMS),
            ("norm_position", ("before", "after", "both")),
            ("hidden_act", tuple(ACTIVATIONS)),
            ("qk_norm_over", ("head", "projection")),
        ):
            if getattr(self, name) not in allowed:
                raise UserError(f"{name}='{getattr(self, name)}' is not known. Use one of: {', '.join(allowed)}.")
        if self.width_transfer == "mup" and self.base_width is None:
            raise UserError("width_transfer='mup' needs base_width: the hidden_size at which you tune learning rates.")
        if self.width_transfer == "none" and (self.base_width or self.base_head_dim):
            raise UserError(
                f"base_width={self.base_width} and base_head_dim={self.base_head_dim} do nothing with "
                "width_transfer='none': set it to 'mup', or them to none."
            )
        if self.width_transfer == "mup" and self.scale_embeddings:
            raise UserError("width_transfer='mup' is not for scale_embeddings, whose factor grows with the width.")

    def _check_pattern(self, layers: str) -> None:
        if self.no_rope_every is not None:
            raise UserError(
                f"layers='{layers}' and no_rope_every={self.no_rope_every}: write 'nope' in the pattern instead, "
                "as in '3 global : 1 global nope'."
            )
        is_local = any(kind.local for kind in pattern.parse(layers))
        if is_local != (self.sliding_window is not None):
            fix = "set it to the tokens that local layers see" if is_local else "remove it, or make some layers local"
            raise UserError(f"layers='{layers}' with sliding_window={self.sliding_window}: {fix}.")
        has_experts = any(kind.experts for kind in pattern.parse(layers))
        if has_experts != (self.experts is not None):
            fix = "set experts" if has_experts else "write which layers have them, as in '1 global : 1 global experts'"
            raise UserError(f"layers='{layers}' with experts={self.experts}: {fix}.")

    @property
    def pattern(self) -> tuple[Kind, ...]:
        """The kinds of the layers of one period."""
        if self.layers is not None:
            return pattern.shortest(pattern.parse(self.layers)[: self.num_layers])
        kinds = [Kind(local=self.sliding_window is not None, experts=self.experts is not None)] * self.num_layers
        if self.no_rope_every is not None:
            for layer in range(self.no_rope_every - 1, self.num_layers, self.no_rope_every):
                kinds[layer] = dataclasses.replace(kinds[layer], rotary=False)
        return pattern.shortest(kinds)

    @property
    def resolved_head_dim(self) -> int:
        """Width of a head."""
        return self.hidden_size // self.num_heads if self.head_dim is None else self.head_dim

    @property
    def rotary_width(self) -> int:
        """Elements of a head that have rotary positions, as transformers rounds."""
        return int(self.resolved_head_dim * self.partial_rotary_factor)

    @property
    def width_ratio(self) -> float:
        """The width as a multiple of that of the model whose learning rates it shares; 1 without width transfer."""
        return 1.0 if self.base_width is None else self.hidden_size / self.base_width

    @property
    def hidden_std(self) -> float:
        """Initial standard deviation of the layers' matrices."""
        return self.initializer_std / math.sqrt(self.width_ratio)

    @property
    def output_std(self) -> float:
        """Initial standard deviation of the projections into the residual stream."""
        return self.hidden_std / math.sqrt(2 * self.num_layers)

    @property
    def query_scale(self) -> float:
        """With width transfer, logits of attention are divided by the width of a head, not by its root."""
        return math.sqrt((self.base_head_dim or self.resolved_head_dim) / self.resolved_head_dim)

    def build(self, vocab_size: int, mesh: Mesh | None) -> "Llama":
        """Builds the model for ids below `vocab_size`.

        Args:
            vocab_size: Number of ids, without padding.
            mesh: The device mesh; None for one device.

        Raises:
            UserError: The config is inconsistent, or the mesh does not divide the model.
        """
        return Llama(self, vocab_size, mesh)


class Llama(BaseModel):
    """Implements interfaces.Model, AttentionModel, BoundedModel, EightBitModel, ClippableModel and CachingModel.

    Parameters are {"embedding": [V, D], "norm": ..., "head": [D, V] unless tied, "layers": a DecoderLayer's, stacked}.
    Layers with experts are in a stack of their own, "expert_layers" (pattern.Kind.stack).
    """

    config: LlamaConfig
    watches_logits = False

    @one_thread_at_a_time
    def __init__(self, config: LlamaConfig, vocab_size: int, mesh: Mesh | None, in_fp8: bool = False):
        config.check()
        self.config = config = dataclasses.replace(config, head_dim=config.resolved_head_dim)
        self.vocab_size, self.mesh, self.is_fp8 = vocab_size, mesh, in_fp8
        self.width_ratio = config.width_ratio
        # An NNX module consists of a graph (structure) and a state (arrays). Here the arrays are abstract.
        self._frame_graph, frame = nnx.split(nnx.eval_shape(lambda: self._frame(jax.random.key(0))))
        self._pattern = config.pattern
        self.stacks = pattern.stacks(self._pattern, config.num_layers)
        self._layer_graphs: dict[str, Any] = {}
        axes = _axes(frame)
        for kind in self._pattern:
            self._layer_graphs[kind.stack], layer = nnx.split(
                nnx.eval_shape(lambda kind=kind: self._layer(kind, jax.random.key(0)))
            )
            axes[kind.stack] = jax.tree.map(lambda axes: ("layers", *axes), _axes(layer), is_leaf=sharding.is_axes)
        self._choices: dict[Sequence[attention.Shape], attention.Choice] = {}
        self._verdicts: dict[attention.Shape, str | None] = {}
        if mesh is not None:
            self._check_heads(mesh)
        if config.experts is not None:
            self.experts_per_token = config.experts.experts_per_token
        super().__init__(config, vocab_size, mesh, axes)

    def _frame(self, key: jax.Array) -> Frame:
        padded = -(-self.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
        return Frame(self.config, self.vocab_size, padded, nnx.Rngs(params=key))

    def _layer(self, kind: Kind, key: jax.Array) -> DecoderLayer:
        """A layer of a kind. Kinds that share a stack have equal parameters."""
        experts = self.config.experts if kind.experts else None
        return DecoderLayer(self.config, self.mesh, nnx.Rngs(params=key), self.is_fp8, experts)

    def _check_heads(self, mesh: Mesh) -> None:
        tensor = mesh.shape["tensor"]
        for name in ("num_heads", "num_kv_heads"):
            if getattr(self.config, name) % tensor:
                common = math.gcd(self.config.num_heads, self.config.num_kv_heads)
                raise UserError(
                    f"{name}={getattr(self.config, name)} is not divisible by mesh.tensor={tensor}: a device holds "
                    "whole heads. Values of mesh.tensor that work for this model: "
                    f"{', '.join(map(str, sharding.divisors(common)))}."
                )
        heads = self.config.num_heads // tensor
        if heads % mesh.shape["context"]:
            logger.warning(
                "num_heads=%d / mesh.tensor=%d is not divisible by mesh.context=%d: each of its devices computes "
                "the whole attention. Values of mesh.context that divide it: %s.",
                *(self.config.num_heads, tensor, mesh.shape["context"]),
                ", ".join(map(str, sharding.divisors(heads))),
            )

    @one_thread_at_a_time
    def init(self, key: jax.Array) -> Params:
        """Returns fresh parameters. Layer i depends only on (key, i)."""
        frame_key, layers_key = jax.random.split(key)
        params = nnx.to_pure_dict(nnx.state(self._frame(frame_key), nnx.Param))
        kinds = {kind.stack: kind for kind in self._pattern}
        for name, layers in self.stacks.items():

            def layer(key: jax.Array, kind: Kind = kinds[name]) -> Params:
                return nnx.to_pure_dict(nnx.state(self._layer(kind, key), nnx.Param))

            keys_L = jax.vmap(functools.partial(jax.random.fold_in, layers_key))(jnp.array(layers))
            # A loop compiles in 2 s on CPU with jax 0.12, vmap in 8 s.
            params[name] = jax.lax.map(layer, keys_L)
        return params

    def hidden(
        self, params: Params, tokens_BT: jax.Array, segment_ids_BT: jax.Array, positions_BT: jax.Array
    ) -> Hidden:
        implementation = self.attention_choice(*tokens_BT.shape).name
        shape = self._attention_shape(*tokens_BT.shape, kind=self._pattern[0])
        documents = attention.documents(segment_ids_BT, self.mesh, implementation, shape)

        def attend_with(kind: Kind, _: None) -> Attend:
            def attend(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array) -> tuple[jax.Array, Any]:
                top_H = None
                if self.watches_logits:
                    top_H = attention.max_logits(
                        q_BTHh,
                        k_BTKh,
                        segment_ids_BT,
                        mesh=self.mesh,
                        sliding_window=self._window(kind),
                        query_scalar=self.config.query_pre_attn_scalar,
                    )
                return self._attend(kind, q_BTHh, k_BTKh, v_BTKh, documents, implementation), top_H

            return attend

        policy = remat_policy(self.config.remat) if self.config.remat != "none" else None
        real_BT = segment_ids_BT != 0
        x_BTD, tops, statistics = self._decode(params, tokens_BT, positions_BT, real_BT, attend_with, None, policy)
        max_logits_LH = pattern.in_order(tops) if self.watches_logits else None
        if self.config.experts is None:
            return Hidden(x_BTD, max_logits=max_logits_LH)
        return Hidden(x_BTD, *experts.losses_and_metrics(self.config.experts, statistics), max_logits_LH)

    def head(self, params: Params) -> jax.Array | SoftCapped:
        """The output head, fp32 w_DV. Its padding columns are zero, so their logits must be masked."""
        w_DV = params["embedding"].T if self.config.tie_embeddings else params["head"]
        cap = self.config.final_logit_softcapping
        return w_DV if cap is None else SoftCapped(w_DV, cap)

    def flops_per_token(self, seq_len: int) -> float:
        """Returns 6 FLOPs per weight in a matmul, plus 12 h H per key (PaLM, Chowdhery et al. 2022, appendix B).

        The causal mask leaves half of the keys, a sliding window fewer. Experts that a token does not choose, and the
        embedding lookup, are free.
        """
        config = self.config
        keys = 0.0
        for layer in range(config.num_layers):
            seen = min(seq_len, self._window(self._pattern[layer % len(self._pattern)]) or seq_len)
            keys += seen - seen * seen / (2 * seq_len)
        attention_flops = 12 * config.num_heads * config.resolved_head_dim * keys
        return 6.0 * (self.num_active_params + self.vocab_size * config.hidden_size) + attention_flops

    def memory_advice(self) -> tuple[str, ...]:
        return () if self.config.remat in ("auto", "full") else (f"model.remat=full (now {self.config.remat})",)

    # ---- The decoder around a given attention

    @one_thread_at_a_time
    def _decode(
        self,
        params: Params,
        tokens_BT: jax.Array,
        positions_BT: jax.Array,
        real_BT: jax.Array,
        attend_with: Any,
        extras: Extras | None,
        policy: Any = None,
    ) -> tuple[jax.Array, Extras, list[Any]]:
        """Applies embedding, layers and final norm.

        Args:
            real_BT: Whether a token is one, not padding.
            attend_with: Maps a layer's kind and its part of `extras` to its `Attend`. Training needs no extras;
                generation passes the key/value cache and gets it back.
            extras: A tree for each layer, in the form of `pattern.run`; or None.
            policy: The checkpoint policy of a layer, if the config asks for remat.

        Returns:
            x_BTD, the extra outputs of all layers' attention, and the statistics of those with experts.
        """
        config, dtype = self.config, jnp.dtype(self.config.dtype)
        frame = nnx.merge(
            self._frame_graph, {name: leaf for name, leaf in params.items() if name not in self._layer_graphs}
        )
        x = self._embed(frame.embedding[...], tokens_BT).astype(dtype)
        if config.scale_embeddings:
            x *= jnp.asarray(math.sqrt(config.hidden_size), dtype)  # rounded to the compute dtype, as in Gemma's code
        rotations = self._rotations(positions_BT, jnp.promote_types(dtype, jnp.float32))

        def layer_of(kind: Kind) -> Any:
            def layer(x: jax.Array, layer_params: Params, extra: Any) -> tuple[jax.Array, Any]:
                module = nnx.merge(self._layer_graphs[kind.stack], layer_params)
                return module(x, real_BT, rotations[kind], attend_with(kind, extra))

            if config.remat == "none":
                return layer
            # XLA cannot merge a scan's body with its recomputation, but it could merge layers that are written out.
            # The barrier also keeps the recomputation of one layer from starting before the one above it is done.
            is_alone = config.scan_layers is not False and len(self._pattern) == 1
            return jax.checkpoint(layer, policy=policy, prevent_cse=not is_alone)

        x, extras = pattern.run(
            {kind: layer_of(kind) for kind in self._pattern},
            self._pattern,
            config.num_layers,
            x,
            {name: params[name] for name in self._layer_graphs},
            extras,
            scan=config.scan_layers is not False,
        )
        scanned, rest = extras
        statistics = [found for _, found in (*scanned, *rest) if found]
        extras = tuple(extra for extra, _ in scanned), tuple(extra for extra, _ in rest)
        x = frame.norm(x)
        if self.width_ratio != 1:  # the multiplier of the logits, for a head that may be the embedding
            x = x / self.width_ratio
        return x.reshape(*tokens_BT.shape, -1), extras, statistics

    def _rotations(self, positions_BT: jax.Array, dtype: jnp.dtype) -> dict[Kind, tuple[jax.Array, jax.Array] | None]:
        """The rotary tables of each kind of layer; None without rotary positions."""
        config, found = self.config, {}
        width, local_base = config.rotary_width, config.rope_local_base_freq
        for kind in dict.fromkeys(self._pattern):
            theta, scaling = config.rope_theta, config.rope_scaling
            if kind.local and local_base is not None:
                theta, scaling = local_base, None
            amplitude = scaling.amplitude if isinstance(scaling, YarnRopeScaling) else 1.0
            frequencies = rope.frequencies(width, theta, scaling)
            found[kind] = rope.tables(positions_BT, frequencies, dtype, amplitude) if kind.rotary else None
        return found

    def _embed(self, embedding_VD: jax.Array, tokens_BT: jax.Array) -> jax.Array:
        """Returns [B, T, D] on TPU. Elsewhere [B * T, D], which is faster there, unless `context` splits T.

        The lookup is in fp32: the gradient of a frequent token sums thousands of rows, more than bf16 can resolve.
        """
        split = self.mesh is not None and self.mesh.shape["context"] > 1 and tokens_BT.shape[1] > 1
        flat = attention.platform_of(self.mesh) != "tpu" and not split
        # Each fsdp shard looks up its own columns for the rows of its whole group, and an all-to-all returns each
        # device's rows. Neither the table nor its gradient is ever gathered.
        columns = PartitionSpec(("data", "expert"), "context" if split else None, "fsdp")
        if embedding.is_wanted(attention.platform_of(self.mesh)):
            x = embedding.lookup(embedding_VD, tokens_BT, self.mesh, columns)
        else:
            x = embedding_VD[tokens_BT]
        if self.mesh is not None:
            x = jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, columns))
        x = x.reshape(-1, x.shape[-1]) if flat else x
        return sharding.constrain(x, self.mesh, activation_axes(x))

    # ---- Attention

    def _window(self, kind: Kind) -> int | None:
        return self.config.sliding_window if kind.local else None

    def _attend(
        self, kind: Kind, q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array, documents: Any, implementation: str
    ) -> jax.Array:
        return attention.attend(
            q_BTHh,
            k_BTKh,
            v_BTKh,
            documents,
            mesh=self.mesh,
            implementation=implementation,
            sliding_window=self._window(kind),
            query_scalar=self.config.query_pre_attn_scalar,
            softcap=self.config.attn_logit_softcapping,
        )

    def attention_choice(self, batch_size: int, seq_len: int) -> attention.Choice:
        """Returns the attention implementation for rows of this shape, the same for all layers.

        The first time a kernel is chosen for a row length on real devices, it is compared with XLA
        (`attention.self_check`), for each kind of layer. If it fails on any process, all processes use XLA, with a
        warning. All processes must therefore make the first call for each length in the same order. Later calls, for
        any number of rows, may come from any thread.

        Raises:
            UserError: The config selects an implementation that cannot run here.
        """
        shapes = tuple(dict.fromkeys(self._attention_shape(batch_size, seq_len, kind) for kind in self._pattern))
        if shapes not in self._choices:
            choice = attention.choose(self.config.attention, shapes[0])
            for shape in shapes:
                # Devices of another platform belong to a topology that is only compiled for.
                if choice.name == "xla" or shape.platform != jax.default_backend():
                    break
                problem = self._verdict(choice.name, shape)
                if problem is not None:
                    logger.warning("Attention kernel %s is not used for rows of %d: %s", choice.name, seq_len, problem)
                    choice = attention.Choice("xla", f"{choice.name} failed its check: {problem}")
            self._choices[shapes] = choice
        return self._choices[shapes]

    def _verdict(self, implementation: str, shape: attention.Shape) -> str | None:
        """Returns a kernel's failure on any process, or None. Independent of the number of rows."""
        key = dataclasses.replace(shape, rows=2)
        if key not in self._verdicts:
            problem = attention.self_check(implementation, key)
            failed = consensus.any_process(problem is not None)
            self._verdicts[key] = problem or ("it fails on another process" if failed else None)
        return self._verdicts[key]

    def most_documents(self, batch_size: int, seq_len: int) -> tuple[int, int] | None:
        shape = self._attention_shape(batch_size, seq_len, self._pattern[0])
        return attention.most_documents(self.attention_choice(batch_size, seq_len).name, shape)

    def unbounded(self) -> "Llama":
        return Llama(dataclasses.replace(self.config, attention="xla"), self.vocab_size, self.mesh, self.is_fp8)

    def in_fp8(self) -> "Llama":
        shape = self._attention_shape(1, 1, self._pattern[0])
        if shape.compute_capability is None or shape.compute_capability < (8, 9):
            logger.warning(
                "precision='fp8': no cuBLAS product of 8 bits on this %s (it needs an NVIDIA GPU of compute capability "
                "8.9 or higher); values are rounded to 8 bits and multiplied in %s.",
                *(shape.platform.upper(), self.config.dtype),
            )
        return Llama(self.config, self.vocab_size, self.mesh, in_fp8=True)

    def without_width_transfer(self, params: Params) -> tuple["Llama", Params]:
        """The same function as a model without width transfer, whose weights hold the multipliers."""
        config = self.config
        if config.width_transfer == "none":
            return self, params
        changes: Any = {"width_transfer": "none", "base_width": None, "base_head_dim": None}
        model = Llama(dataclasses.replace(config, **changes), self.vocab_size, self.mesh, self.is_fp8)
        params = jax.tree.map(lambda leaf: leaf, params)  # copies the dicts
        shift = float(config.norm == "rms_plus_one")

        def normed(leaves: Params, factor: float) -> Params:
            scale = (leaves["scale"] + shift) * factor - shift
            return {name: scale if name == "scale" else leaf * factor for name, leaf in leaves.items()}

        params["norm"] = normed(params["norm"], 1 / self.width_ratio)
        for stack in self.stacks:
            module = params[stack]["attention"]
            if config.qk_norm:  # which would undo the scale of the projection
                module["q_norm"] = normed(module["q_norm"], config.query_scale)
            else:
                module["q"] = {name: leaf * config.query_scale for name, leaf in module["q"].items()}
        return model, params

    def watching_logits(self) -> "Llama":
        for name in ("qk_norm", "attn_logit_softcapping"):
            if getattr(self.config, name):
                raise UserError(f"qk_clip is not for a model with {name}, which already bounds the logits: drop one")
        model = copy.copy(self)  # shares what this one has found out about its kernels
        model.watches_logits = True
        return model

    def clip_logits(self, params: Params, max_logits_LH: jax.Array, threshold: float) -> Params:
        """QK-clip (Kimi K2, arXiv 2507.20534, algorithm 1): W_q and W_k by sqrt(threshold / largest logit).

        Query heads that share a key head share the largest logit of them all.
        """
        config = self.config
        top_LK = max_logits_LH.reshape(config.num_layers, config.num_kv_heads, -1).max(-1)
        scale_LK = jnp.sqrt(threshold / jnp.maximum(top_LK, threshold))

        def scaled(leaf: jax.Array, scale_LK: jax.Array, heads: int) -> jax.Array:
            """leaf: [L, ..., heads * h], a kernel or a bias."""
            scale_LX = scale_LK.repeat(heads // config.num_kv_heads * config.resolved_head_dim, axis=1)
            return leaf * scale_LX.reshape(leaf.shape[0], *(1,) * (leaf.ndim - 2), -1)

        params = {**params}
        for stack, layers in self.stacks.items():
            module = {**params[stack]["attention"]}
            for name, heads in (("q", config.num_heads), ("k", config.num_kv_heads)):
                scales = scale_LK[np.array(layers)]
                module[name] = {leaf: scaled(value, scales, heads) for leaf, value in module[name].items()}
            params[stack] = {**params[stack], "attention": module}
        return params

    def compiler_options(self, batch_size: int, seq_len: int) -> dict[str, str]:
        names = [self.attention_choice(batch_size, seq_len).name]
        if self.config.experts is not None and self.mesh is not None and self.mesh.shape["expert"] > 1:
            names.append("xla")  # exchanges of experts are loops inside the loop over layers too
        options = attention.compiler_options(self.mesh, *names, unrolled=self.config.scan_layers is False)
        return options | (fp8.GPU_OPTIONS if self.is_fp8 and attention.platform_of(self.mesh) == "gpu" else {})

    def _attention_shape(self, batch_size: int, seq_len: int, kind: Kind) -> attention.Shape:
        config = self.config
        device = jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]
        capability = getattr(device, "compute_capability", None)
        ways: Mapping[str, int] = (
            self.mesh.shape if self.mesh is not None else dict.fromkeys(map(str, sharding.MESH_AXES), 1)
        )
        whole = (config.num_heads // ways["tensor"], config.num_kv_heads // ways["tensor"])
        heads, kv_heads = attention.share_of_context(self.mesh, config.num_heads, config.num_kv_heads) or whole
        return attention.Shape(
            platform=device.platform,
            compute_capability=None if capability is None else tuple(int(n) for n in str(capability).split(".")),
            rows=max(1, batch_size // (sharding.batch_ways(ways))),
            seq_len=seq_len,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=config.resolved_head_dim,
            dtype=config.dtype,
            sliding_window=self._window(kind),
            query_scalar=config.query_pre_attn_scalar,
            softcap=config.attn_logit_softcapping,
        )

    # ---- Generation (interfaces.CachingModel)

    @property
    def decoding_options(self) -> dict[str, str]:
        return attention.compiler_options(self.mesh, "xla")

    def prefill(self, params: Params, tokens_BT: jax.Array, start_B: jax.Array, length: int) -> tuple[jax.Array, Any]:
        seq_len = tokens_BT.shape[1]
        slots = jnp.arange(seq_len)[None]
        segment_ids_BT = (slots >= start_B[:, None]).astype(jnp.int32)
        positions_BT = jnp.maximum(slots - start_B[:, None], 0)

        def kept(kind: Kind, x_BTKh: jax.Array) -> jax.Array:
            size = min(length, self._window(kind) or length)
            if seq_len <= size:
                return jnp.pad(x_BTKh, ((0, 0), (0, size - seq_len), (0, 0), (0, 0)))
            return jnp.roll(x_BTKh[:, -size:], seq_len % size, axis=1)

        def attend_with(kind: Kind, _: None) -> Attend:
            def attend_and_keep(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array) -> tuple[jax.Array, Cache]:
                x_BTHh = self._attend(kind, q_BTHh, k_BTKh, v_BTKh, segment_ids_BT, "xla")
                return x_BTHh, (kept(kind, k_BTKh), kept(kind, v_BTKh))

            return attend_and_keep

        real_BT = segment_ids_BT != 0
        x_BTD, cache, _ = self._decode(params, tokens_BT, positions_BT, real_BT, attend_with, None)
        return x_BTD[:, -1], cache

    def decode_one(
        self, params: Params, token_B: jax.Array, slot: jax.Array, start_B: jax.Array, cache: Any
    ) -> tuple[jax.Array, Any]:
        def with_cache(_: Kind, layer_cache: Cache) -> Attend:
            size = layer_cache[0].shape[1]
            # The slot of the text in each slot of the cache, once this token is written: the last one that falls there.
            slots = slot - (slot - jnp.arange(size)[None]) % size
            visible_BS = slots >= start_B[:, None]

            def attend_to_cache(q_BTHh: jax.Array, k_BTKh: jax.Array, v_BTKh: jax.Array) -> tuple[jax.Array, Cache]:
                k_BSKh, v_BSKh = (
                    jax.lax.dynamic_update_slice_in_dim(old, new, slot % size, 1)
                    for old, new in zip(layer_cache, (k_BTKh, v_BTKh), strict=True)
                )
                x_BTHh = attention.attend_one(
                    *(q_BTHh, k_BSKh, v_BSKh, visible_BS),
                    query_scalar=self.config.query_pre_attn_scalar,
                    softcap=self.config.attn_logit_softcapping,
                )
                return x_BTHh, (k_BSKh, v_BSKh)

            return attend_to_cache

        real_B1 = jnp.ones((len(token_B), 1), bool)
        positions_B1 = (slot - start_B)[:, None]
        x_BTD, cache, _ = self._decode(params, token_B[:, None], positions_B1, real_B1, with_cache, cache)
        return x_BTD[:, 0], cache


def _axes(state: nnx.State) -> dict[str, Any]:
    axes = jax.tree.map(lambda v: v.get_metadata("axes"), state, is_leaf=lambda v: isinstance(v, nnx.Variable))
    return nnx.to_pure_dict(axes)
