"""Converts config.json and tensor names of each supported architecture to and from LlamaConfig.

Architectures differ in which keys their config.json may omit and in what they can express; each entry of FAMILIES
lists both. Based on the configuration classes of transformers 5.24. Reads and writes the keys of version 5
(`rope_parameters`, `dtype`) and of version 4 (`rope_theta`, `rope_scaling`, `torch_dtype`).
"""

import dataclasses
import math
import sys
from typing import Any

import numpy as np

from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, Model
from jaxtrain.model import pattern
from jaxtrain.model.experts import Experts
from jaxtrain.model.layers import ACTIVATIONS
from jaxtrain.model.llama import MOST_LAYERS, Llama, LlamaConfig
from jaxtrain.model.pattern import Kind
from jaxtrain.model.rope import LinearRopeScaling, Llama3RopeScaling, RopeScaling, YarnRopeScaling


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture of transformers.

    Attributes:
        architecture: class name in config.json.
        defaults: values of the keys that config.json may omit.
        biases: the supported combinations of (attention_bias, attention_output_bias, mlp_bias).
        options: fields of LlamaConfig in which it differs from Llama.
        free: fields of LlamaConfig that its config.json sets and Llama's does not.
        no_rope: whether some layers may have no rotary positions.
        windows: whether "no", "all" or any number of its layers ("some") may have a sliding window.
        tensors: its names of a layer's tensors, where they are not Llama's.
        divides: whether transformers requires that heads divide the width.
        experts: its keys for the number and the width of experts; None for dense models.
    """

    architecture: str
    defaults: Json
    biases: tuple[tuple[bool, bool, bool], ...]
    options: Json = dataclasses.field(default_factory=dict)
    free: tuple[str, ...] = ()
    no_rope: bool = False
    windows: str = "no"
    tensors: dict[tuple[str, ...], str] = dataclasses.field(default_factory=dict)
    divides: bool = False
    experts: tuple[str, str] | None = None


_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False, "hidden_act": "silu"}
_QWEN = {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_GEMMA = _COMMON | {
    "head_dim": 256,
    "num_key_value_heads": 4,
    "tie_word_embeddings": True,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_OLMO = _COMMON | {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048}
_NONE, _QKV, _ATTENTION = (False, False, False), (True, False, False), (True, True, False)
_MLP, _EVERYWHERE = (False, False, True), (True, True, True)
_ALL = (_NONE, _ATTENTION, _MLP, _EVERYWHERE)
_GEMMA_OPTIONS = {"norm": "rms_plus_one", "norm_position": "both", "scale_embeddings": True}
_OLMO_OPTIONS = {"norm_position": "after", "qk_norm": True, "qk_norm_over": "projection"}
_AFTER = {
    ("attention_post_norm", "scale"): "post_attention_layernorm.weight",
    ("mlp_post_norm", "scale"): "post_feedforward_layernorm.weight",
}
_AROUND = _AFTER | {("mlp_norm", "scale"): "pre_feedforward_layernorm.weight"}

# By model_type. A model is exported as the first family that can express it.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _COMMON | {"max_position_embeddings": 2048}, _ALL, divides=True),
    "mistral": Family(
        "MistralForCausalLM",
        _COMMON | {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
        (_NONE,),
        windows="all",
    ),
    "qwen2": Family("Qwen2ForCausalLM", _COMMON | _QWEN, (_QKV,), windows="some"),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _COMMON | _QWEN | {"head_dim": 128},
        (_NONE, _ATTENTION),
        options={"qk_norm": True},
        windows="some",
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        _COMMON
        | {
            "max_position_embeddings": 32_768,
            "num_key_value_heads": 4,
            "rope_theta": 2_000_000.0,
            "tie_word_embeddings": True,
            "no_rope_layer_interval": 4,
        },
        _ALL,
        no_rope=True,
        windows="some",
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA
        | {
            "max_position_embeddings": 8192,
            "final_logit_softcapping": 30.0,
            "attn_logit_softcapping": 50.0,
            "sliding_window_pattern": 2,
        },
        (_NONE, _ATTENTION),
        options=_GEMMA_OPTIONS,
        free=("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
        windows="some",
        tensors=_AROUND,
        divides=True,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA
        | {
            "max_position_embeddings": 131_072,
            "rope_theta": 1_000_000.0,
            "rope_local_base_freq": 10_000.0,
            "sliding_window_pattern": 6,
        },
        (_NONE, _ATTENTION),
        options=_GEMMA_OPTIONS | {"qk_norm": True},
        free=("query_pre_attn_scalar", "final_logit_softcapping", "rope_local_base_freq"),
        windows="some",
        tensors=_AROUND,
        divides=True,
    ),
    "olmo2": Family("Olmo2ForCausalLM", _OLMO, (_NONE, _ATTENTION), options=_OLMO_OPTIONS, tensors=_AFTER),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        _OLMO
        | {
            "rope_theta": 500_000.0,
            "rope_local_base_freq": 500_000.0,
            "sliding_window": 4096,
            "sliding_window_pattern": 4,
        },
        (_NONE, _ATTENTION),
        options=_OLMO_OPTIONS,
        free=("rope_local_base_freq",),
        windows="some",
        tensors=_AFTER,
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        _COMMON | {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        (_NONE,),
        free=("partial_rotary_factor",),
        windows="all",
        tensors={
            **{("attention", name, "kernel"): "self_attn.qkv_proj.weight" for name in "qkv"},
            **{("mlp", name, "kernel"): "mlp.gate_up_proj.weight" for name in ("gate", "up")},
        },
    ),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM",
        _COMMON | {"rms_norm_eps": 1e-5, "max_position_embeddings": 2048, "hidden_act": "gelu", "attention_bias": True},
        (_MLP, _EVERYWHERE),
        options={"norm": "layer", "gated_mlp": False},
        free=("parallel_residual", "partial_rotary_factor"),
        tensors={
            (*path, leaf): f"{theirs}.{'weight' if leaf in ('scale', 'kernel') else 'bias'}"
            for path, theirs in {
                ("attention_norm",): "input_layernorm",
                ("mlp_norm",): "post_attention_layernorm",
                **{("attention", name): "attention.query_key_value" for name in "qkv"},
                ("attention", "o"): "attention.dense",
                ("mlp", "up"): "mlp.dense_h_to_4h",
                ("mlp", "down"): "mlp.dense_4h_to_h",
            }.items()
            for leaf in ("scale", "kernel", "bias")
        },
        divides=True,
    ),
}
FAMILIES |= {
    "mixtral": Family(
        "MixtralForCausalLM",
        _COMMON
        | {
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 131_072,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "router_aux_loss_coef": 0.001,
            "sliding_window": None,
        },
        (_NONE,),
        windows="all",
        experts=("num_local_experts", "intermediate_size"),
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        _COMMON
        | _QWEN
        | {
            "num_key_value_heads": 4,
            "max_window_layers": 0,
            "decoder_sparse_step": 1,
            "norm_topk_prob": False,
            "num_experts": 128,
            "moe_intermediate_size": 768,
            "num_experts_per_tok": 8,
            "router_aux_loss_coef": 0.001,
        },
        (_NONE, _ATTENTION),
        options={"qk_norm": True},
        windows="some",
        experts=("num_experts", "moe_intermediate_size"),
    ),
    "olmoe": Family(
        "OlmoeForCausalLM",
        _OLMO
        | {
            "max_position_embeddings": 4096,
            "norm_topk_prob": False,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "router_aux_loss_coef": 0.01,
        },
        (_NONE, _ATTENTION),
        options={"qk_norm": True, "qk_norm_over": "projection"},
        experts=("num_experts", "intermediate_size"),
    ),
}
# transformers has separate rotary settings for the local and the global layers of these.
_ROPE_BY_KIND = ("gemma3_text", "olmo3")
# GPT-NeoX's names of the keys that others name as Llama does.
_NEOX_KEYS = {"layer_norm_eps": "rms_norm_eps", "rotary_emb_base": "rope_theta", "rotary_pct": "partial_rotary_factor"}
_CAPS = ("attn_logit_softcapping", "final_logit_softcapping")
_ACTIVATIONS = {"swish": "silu", "gelu_new": "gelu_pytorch_tanh"} | {name: name for name in ACTIVATIONS}
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_TYPES: dict[str, type] = {
    **dict.fromkeys((*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"), int),
    **dict.fromkeys(("sliding_window", "max_window_layers", "no_rope_layer_interval", "sliding_window_pattern"), int),
    **dict.fromkeys(("num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size"), int),
    "decoder_sparse_step": int,
    **dict.fromkeys(("router_aux_loss_coef", "router_jitter_noise", "clip_qkv"), float),
    "norm_topk_prob": bool,
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "rope_local_base_freq", "partial_rotary_factor"), float),
    **dict.fromkeys(("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"), float),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), bool),
    **dict.fromkeys(("use_parallel_residual", "use_bidirectional_attention"), bool),
    **dict.fromkeys(("no_rope_layers", "layer_types", "mlp_only_layers"), list),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), dict),
}
_ROPE_TYPES: dict[str, type] = {
    **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"), float),
    **dict.fromkeys(("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"), float),
    "original_max_position_embeddings": int,
    "truncate": bool,
}
_TYPE_NAMES = {
    int: "a whole number below 2^31",
    float: "a finite number",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def _check_types(values: Json, types: dict[str, type], where: str) -> None:
    for key, kind in types.items():
        value: Any = values.get(key)
        if kind is float:  # not NaN either
            fits = type(value) in (int, float) and abs(value) <= sys.float_info.max
        else:
            fits = type(value) is kind and (kind is not int or abs(value) < 2**31)
        if value is not None and not fits:
            raise UserError(f"{where}: {key}={value!r} in config.json is not {_TYPE_NAMES[kind]}.")


def kind_of(content: Json, where: str) -> str:
    """Returns the family of a config.json. Raises UserError, with `where` in the message, if it is none of ours."""
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type={kind!r} is not supported. Supported architectures: "
            f"{', '.join(family.architecture for family in FAMILIES.values())}."
        )
    return kind


def from_json(content: Json, where: str) -> tuple[LlamaConfig, int]:
    """Reads a config.json.

    Args:
        content: The content of config.json.
        where: the checkpoint, for messages.

    Returns:
        The model's config and its vocabulary size.

    Raises:
        UserError: a key is missing, malformed or unsupported; the message names it.
    """
    kind = kind_of(content, where)
    family = FAMILIES[kind]
    if kind == "gpt_neox":
        content = {_NEOX_KEYS.get(key, key): value for key, value in content.items()}
        content = {"partial_rotary_factor": 0.25, "use_parallel_residual": True} | content
        content.pop("num_key_value_heads", None)  # its class has none
    # For these null means "derived" or "none"; any other key that is null counts as omitted.
    nullable = (
        "num_key_value_heads",
        "head_dim",
        "sliding_window",
        "attn_logit_softcapping",
        "final_logit_softcapping",
    )
    known: Json = family.defaults | {
        key: value for key, value in content.items() if value is not None or key in nullable
    }
    missing = [key for key in _REQUIRED if key not in known]
    if missing:
        raise UserError(f"{where}: config.json lacks {', '.join(missing)}.")
    _check_types(known, _TYPES, where)
    if known["vocab_size"] < 1:
        raise UserError(f"{where}: vocab_size={known['vocab_size']} in config.json must be at least 1.")
    if (layers := known["num_hidden_layers"]) > MOST_LAYERS:
        raise UserError(f"{where}: num_hidden_layers={layers} in config.json must be at most {MOST_LAYERS:,}.")
    act_key = "hidden_activation" if "hidden_activation" in family.defaults else "hidden_act"
    if not isinstance(known[act_key], str) or known[act_key] not in _ACTIVATIONS:
        raise UserError(
            f"{where}: {act_key}={known[act_key]!r} is not supported. Supported: {', '.join(_ACTIVATIONS)}."
        )
    if known.get("use_bidirectional_attention"):
        raise UserError(f"{where}: use_bidirectional_attention=True is not supported: attention is causal.")
    # Classes without this key ignore it.
    attention_bias = known.get("attention_bias", False) and {_ATTENTION, _EVERYWHERE} & {*family.biases}
    if kind in _ROPE_BY_KIND:
        theta, scaling, local_base = _rope_by_kind(known, where)
    else:
        (theta, scaling), local_base = (
            _rope(known, known.get("rope_scaling") or known.get("rope_parameters"), where),
            None,
        )
    if kind == "phi3" and scaling is not None:
        raise UserError(f"{where}: rope_type='yarn' of phi3 means longrope to transformers, which is not supported.")
    experts, has_experts = _experts(known, family, where)
    kv_heads = known.get("num_key_value_heads")
    scalar, head_dim = known.get("query_pre_attn_scalar"), known.get("head_dim")
    config = LlamaConfig(
        hidden_size=known["hidden_size"],
        intermediate_size=known["intermediate_size"],
        num_layers=known["num_hidden_layers"],
        num_heads=known["num_attention_heads"],
        num_kv_heads=known["num_attention_heads"] if kv_heads is None else kv_heads,
        head_dim=head_dim,
        max_seq_len=known["max_position_embeddings"],
        rope_theta=theta,
        rope_scaling=scaling,
        rope_local_base_freq=local_base,
        **_layers(kind, family, known, has_experts, where),
        experts=experts,
        norm_eps=known["rms_norm_eps"],
        hidden_act=_ACTIVATIONS[known[act_key]],
        tie_embeddings=known["tie_word_embeddings"],
        attention_bias=bool(attention_bias) or kind == "qwen2",
        attention_output_bias=bool(attention_bias),
        mlp_bias=kind == "gpt_neox" or (known.get("mlp_bias", False) and family.biases == _ALL),
        **family.options,
    )
    if "query_pre_attn_scalar" in family.free and scalar != head_dim:
        config.query_pre_attn_scalar = scalar
    for name in _CAPS:
        if name in family.free:
            setattr(config, name, known.get(name))
    if "parallel_residual" in family.free:
        config.parallel_residual = known["use_parallel_residual"]
    if "partial_rotary_factor" in family.free:
        config.partial_rotary_factor = _partial(known, known.get("rope_scaling") or known.get("rope_parameters") or {})
    elif (partial := _partial(known, known.get("rope_scaling") or known.get("rope_parameters") or {})) != 1:
        raise UserError(f"{where}: partial_rotary_factor={partial} is not supported in {family.architecture}.")
    try:
        config.check()
        if scaling is not None:
            scaling.check()
    except UserError as error:
        raise UserError(f"{where}: config.json describes an invalid model. {error}") from error
    return config, known["vocab_size"]


def _experts(known: Json, family: Family, where: str) -> tuple[Experts | None, list[bool]]:
    """The experts, and whether each layer has them."""
    layers = known["num_hidden_layers"]
    if family.experts is None:
        return None, [False] * layers
    key, width = family.experts
    # Each is an alias of the other.
    number = known.get("num_experts" if key == "num_local_experts" else "num_local_experts", known[key])
    for key in ("router_jitter_noise", "clip_qkv"):
        if known.get(key):
            raise UserError(f"{where}: {key}={known[key]} is not supported.")
    every, dense = 1, ()
    if "decoder_sparse_step" in family.defaults:  # classes without these keys ignore them
        every, dense = known["decoder_sparse_step"], known.get("mlp_only_layers") or ()
    if every < 1:
        raise UserError(f"{where}: decoder_sparse_step={every} in config.json must be at least 1.")
    has = [number > 0 and i not in dense and (i + 1) % every == 0 for i in range(layers)]
    if not any(has):
        return None, has
    return Experts(
        num_experts=number,
        experts_per_token=known["num_experts_per_tok"],
        intermediate_size=known[width],
        normalize=known["norm_topk_prob"] if "norm_topk_prob" in family.defaults else True,
        balance_loss=known["router_aux_loss_coef"],
        z_loss=0.0,
    ), has


def _partial(known: Json, rope: Json) -> float:
    return rope.get("partial_rotary_factor", known.get("partial_rotary_factor", 1.0))


def _rope(known: Json, rope: Json | None, where: str) -> tuple[float, RopeScaling | None]:
    """The RoPE base and scaling of one group of settings, with the precedence and fallbacks of transformers."""
    rope = rope or {}
    _check_types(rope, _ROPE_TYPES, where)
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise UserError(f"{where}: separate rotary settings for {', '.join(nested)} are not supported.")
    theta = rope.get("rope_theta", known["rope_theta"])
    if theta is None:
        raise UserError(f"{where}: rope_theta is null in config.json.")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    classes: dict[str, Any] = {"linear": LinearRopeScaling, "llama3": Llama3RopeScaling, "yarn": YarnRopeScaling}
    if not isinstance(kind, str) or kind not in classes:
        raise UserError(f"{where}: rope_type={kind!r} is not supported. Supported: default, {', '.join(classes)}.")
    original = "original_max_position_embeddings"
    settings = {original: known["max_position_embeddings"]} | rope
    if known.get(original) is not None:
        settings[original] = known[original]
    names = [field.name for field in dataclasses.fields(classes[kind])]
    required = ("factor", original) if kind == "yarn" else names
    missing = [name for name in names if name in required and settings.get(name) is None]
    if missing:
        raise UserError(f"{where}: rope_type={kind!r} in config.json lacks {', '.join(missing)}.")
    if kind == "yarn" and settings.get("attention_factor") is None:
        # DeepSeek's two scales. transformers ignores one without the other.
        scales = [settings.get(name) or 0.0 for name in ("mscale", "mscale_all_dim")]
        if all(scales) and settings["factor"] > 1:
            above, below = (0.1 * scale * math.log(settings["factor"]) + 1 for scale in scales)
            settings["attention_factor"] = above / below
    given = {name: settings[name] for name in names if settings.get(name) is not None}
    return theta, classes[kind](**given)


def _rope_by_kind(known: Json, where: str) -> tuple[float, RopeScaling | None, float | None]:
    """The base and scaling of global layers, and the base of local ones if theirs is another."""
    parts = known.get("rope_parameters") or {}
    full, local = parts.get("full_attention") or {}, parts.get("sliding_attention") or {}
    if not isinstance(full, dict) or not isinstance(local, dict):
        raise UserError(f"{where}: rope_parameters={parts} in config.json must hold an object for each kind of layer.")
    partial = [part["partial_rotary_factor"] for part in (full, local) if part.get("partial_rotary_factor", 1) != 1]
    if partial:
        raise UserError(f"{where}: partial_rotary_factor={partial[0]} is not supported by kind of layer.")
    theta, scaling = _rope(known, full | (known.get("rope_scaling") or {}), where)
    local_theta, local_scaling = _rope(known | {"rope_theta": known["rope_local_base_freq"]}, local, where)
    if (local_theta, local_scaling) == (theta, scaling):
        return theta, scaling, None
    if local_scaling is not None:
        raise UserError(f"{where}: scaled rotary positions in layers with a sliding window are not supported.")
    return theta, scaling, local_theta


def _layers(kind: str, family: Family, known: Json, has_experts: list[bool], where: str) -> Json:
    """The fields of LlamaConfig that say which layers have a window, no rotary positions or experts."""
    layers, window, types = known["num_hidden_layers"], known.get("sliding_window"), known.get("layer_types")
    rotates, every = [True] * layers, None
    if family.no_rope:
        rotates = _rotates(known, where)
        every = layers if all(rotates) else rotates.index(False) + 1
        every = every if not all(rotates) and rotates == [(i + 1) % every != 0 for i in range(layers)] else None
    switched = kind in ("qwen2", "qwen3", "qwen3_moe", "smollm3")
    enabled = window is not None and (not switched or known.get("use_sliding_window", False))
    if family.windows == "no":
        slides = [False] * layers
    elif family.windows == "all":
        slides = [enabled] * layers
    elif kind == "smollm3":  # the layers without rotary positions
        slides = [enabled and not rotate for rotate in rotates]
    elif switched:
        first = 0 if kind == "qwen3_moe" else known["max_window_layers"]  # whose class ignores it
        slides = [enabled and i >= first for i in range(layers)]
    else:
        slides = [(i + 1) % known["sliding_window_pattern"] != 0 for i in range(layers)]
    if types is not None and family.windows != "no":
        named = [name == "sliding_attention" for name in types]
        other = [name for name in types if name not in ("sliding_attention", "full_attention")]
        wrong = other or len(types) != layers or (any(named) and not enabled)
        if wrong or (family.windows == "all" and named != slides):
            raise UserError(
                f"{where}: layer_types={types} with use_sliding_window={known.get('use_sliding_window')} and "
                f"sliding_window={window} is not supported; each of the {layers} layers must have full_attention or "
                "sliding_attention, as the other two say."
            )
        slides = named
    if any(slides) and not enabled:
        raise UserError(f"{where}: config.json has layers with a sliding window, and sliding_window=None.")
    kinds = [Kind(*which) for which in zip(slides, rotates, has_experts, strict=True)]
    is_simple = len(set(slides)) <= 1 and (every is not None or all(rotates)) and len(set(has_experts)) <= 1
    return {
        "sliding_window": window if any(slides) else None,
        "no_rope_every": every if is_simple else None,
        "layers": None if is_simple else pattern.text_of(pattern.shortest(kinds)),
    }


def _rotates(known: Json, where: str) -> list[bool]:
    """Whether each layer has rotary positions."""
    layers, every = known["num_hidden_layers"], known["no_rope_layer_interval"]
    if every < 1:
        raise UserError(f"{where}: no_rope_layer_interval={every} in config.json must be at least 1.")
    found = known.get("no_rope_layers", [(i + 1) % every for i in range(layers)])
    if len(found) < layers:
        raise UserError(f"{where}: no_rope_layers={found} in config.json is shorter than the {layers} layers.")
    return [bool(rotates) for rotates in found[:layers]]


def llama(model: Model) -> Llama:
    """Returns the model if it is a Llama; raises UserError otherwise."""
    if not isinstance(model, Llama):
        raise UserError(
            f"{type(model).__name__} is not of the Llama family, the only one supported in Hugging Face checkpoints."
        )
    return model


# The fields of LlamaConfig that not every family can express.
_OPTIONS = (
    *("qk_norm", "qk_norm_over", "norm", "norm_position", "parallel_residual", "gated_mlp", "scale_embeddings"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping"),
    *("rope_local_base_freq", "partial_rotary_factor"),
)
# The fields that change a model's function but not its tensors.
SAME_TENSORS = (
    *("rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor", "layers", "no_rope_every"),
    *("sliding_window", "norm", "norm_eps", "parallel_residual", "hidden_act", "scale_embeddings"),
    *("query_pre_attn_scalar", "attn_logit_softcapping", "final_logit_softcapping", "experts"),
)
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(LlamaConfig)}


def family_of(config: LlamaConfig) -> str:
    """Returns the first model_type that can express the config.

    Raises:
        UserError: no family can.
    """
    biases = (config.attention_bias, config.attention_output_bias, config.mlp_bias)
    kinds = config.pattern
    for kind, family in FAMILIES.items():
        if (
            biases in family.biases
            and all(
                name in family.free or getattr(config, name) == family.options.get(name, _DEFAULTS[name])
                for name in _OPTIONS
            )
            and (family.no_rope or all(kind.rotary for kind in kinds))
            and (family.windows != "no" or not any(kind.local for kind in kinds))
            and (family.windows != "all" or len({kind.local for kind in kinds}) == 1)
            and _can_have(family, config)
            and (not family.divides or config.hidden_size % config.num_heads == 0)
            and (kind != "phi3" or config.rope_scaling is None)
            and (kind not in ("phi3", "gpt_neox") or config.resolved_head_dim * config.num_heads == config.hidden_size)
            and (kind != "gpt_neox" or config.num_kv_heads == config.num_heads)
        ):
            return kind
    names = ("attention_bias", "attention_output_bias", "mlp_bias", *_OPTIONS, "no_rope_every", "layers", "experts")
    asked = [
        f"{name}={getattr(config, name)}"
        for name in (*names, "sliding_window")
        if getattr(config, name) != _DEFAULTS[name]
    ]
    raise UserError(
        f"No architecture of transformers has {', '.join(asked)} together, so this model cannot be exported."
    )


def _can_have(family: Family, config: LlamaConfig) -> bool:
    """Whether a family can have the config's experts, in those layers that have them."""
    experts = config.experts
    if experts is None or family.experts is None:
        return experts is None and family.experts is None
    normalizes = experts.normalize or "norm_topk_prob" in family.defaults
    # A family without a width of experts has no other MLPs.
    is_whole = config.intermediate_size == experts.intermediate_size and all(kind.experts for kind in config.pattern)
    return normalizes and not experts.shared_size and (is_whole or family.experts[1] != "intermediate_size")


def to_json(config: LlamaConfig, vocab_size: int, dtype: str) -> Json:
    """Returns the model's config.json, without special tokens.

    Args:
        config: the model's config.
        vocab_size: rows of the exported embedding.
        dtype: type of the exported tensors.
    """
    kind = family_of(config)
    family, layers, every = FAMILIES[kind], config.num_layers, config.no_rope_every
    kinds = [config.pattern[i % len(config.pattern)] for i in range(layers)]
    extra: dict[str, Any] = {}
    if kind not in ("mistral", "mixtral", "qwen2", "phi3"):
        extra["attention_bias"] = config.attention_bias
    if kind in ("llama", "smollm3"):
        extra["mlp_bias"] = config.mlp_bias
    if family.windows != "no":
        extra["sliding_window"] = config.sliding_window
    if family.windows == "some":
        extra["layer_types"] = ["sliding_attention" if kind.local else "full_attention" for kind in kinds]
    if kind in ("qwen2", "qwen3", "qwen3_moe", "smollm3"):
        extra["use_sliding_window"] = config.sliding_window is not None
        extra["max_window_layers"] = 0 if config.sliding_window is not None else layers
    if config.experts is not None:
        number, width = family.experts or ("", "")
        extra |= {number: config.experts.num_experts, width: config.experts.intermediate_size}
        extra["num_experts_per_tok"] = config.experts.experts_per_token
        extra["router_aux_loss_coef"] = config.experts.balance_loss
        extra["norm_topk_prob"] = config.experts.normalize
    if kind == "qwen3_moe":
        extra["decoder_sparse_step"] = 1
        extra["mlp_only_layers"] = [i for i, kind in enumerate(kinds) if not kind.experts]
    if kind == "smollm3":
        extra["no_rope_layers"] = [int(kind.rotary) for kind in kinds]
        extra["no_rope_layer_interval"] = every or layers + 1
    if kind in ("gemma2", "gemma3_text"):
        extra["hidden_activation"] = config.hidden_act
        extra["query_pre_attn_scalar"] = config.query_pre_attn_scalar or config.resolved_head_dim
        extra |= {name: getattr(config, name) for name in _CAPS}
    if kind == "gpt_neox":
        extra["use_parallel_residual"] = config.parallel_residual
    rope: Json = {"rope_type": "default"}
    if config.rope_scaling is not None:
        names = {LinearRopeScaling: "linear", Llama3RopeScaling: "llama3", YarnRopeScaling: "yarn"}
        rope = {"rope_type": names[type(config.rope_scaling)], **dataclasses.asdict(config.rope_scaling)}
    rope = {name: value for name, value in rope.items() if value is not None}
    if "partial_rotary_factor" in family.free:
        extra["partial_rotary_factor"] = rope["partial_rotary_factor"] = config.partial_rotary_factor
    parameters = rope | {"rope_theta": config.rope_theta}
    if kind in _ROPE_BY_KIND:
        base = config.rope_local_base_freq
        local = parameters if base is None else {"rope_type": "default", "rope_theta": base}
        extra["rope_local_base_freq"] = local["rope_theta"]
        parameters = {"full_attention": parameters, "sliding_attention": local}
    written = {
        "architectures": [family.architecture],
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.resolved_head_dim,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.initializer_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling is not None else None,
        "rope_parameters": parameters,
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
        **extra,
    }
    if kind == "gpt_neox":
        theirs = {name: key for key, name in _NEOX_KEYS.items()}
        written = {theirs.get(name, name): value for name, value in written.items()}
    return written


@dataclasses.dataclass(frozen=True)
class Part:
    """The rows of a stored tensor that one parameter has: row i of the parameter is first + i // run * step + i % run.

    Attributes:
        rows: rows of the stored tensor.
    """

    first: int
    run: int
    step: int
    rows: int

    def of(self, rows: np.ndarray) -> np.ndarray:
        """The stored rows of a parameter's rows."""
        return self.first + rows // self.run * self.step + rows % self.run


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint.

    Attributes:
        name: name in the safetensors files.
        index: its place in the parameter: none, (layer,) or (layer, expert).
        transposed: whether it is [out, in] there and [in, out] in jaxtrain.
        vocabulary: whether its first axis there is the vocabulary.
        part: the rows that belong to the parameter, if others share the tensor.
    """

    name: str
    index: tuple[int, ...]
    transposed: bool
    vocabulary: bool = False
    part: Part | None = None


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
_LAYER = {
    ("attention_norm", "scale"): "input_layernorm.weight",
    ("mlp_norm", "scale"): "post_attention_layernorm.weight",
    ("attention", "q_norm", "scale"): "self_attn.q_norm.weight",
    ("attention", "k_norm", "scale"): "self_attn.k_norm.weight",
    **{
        (part, name, leaf): f"{theirs}.{name}_proj.{'weight' if leaf == 'kernel' else 'bias'}"
        for part, theirs, names in (("attention", "self_attn", "qkvo"), ("mlp", "mlp", ("gate", "up", "down")))
        for name in names
        for leaf in ("kernel", "bias")
    },
}
_FRAME = {("embedding",): EMBEDDING, ("norm", "scale"): "model.norm.weight", ("head",): HEAD}
_NEOX_FRAME = {
    ("embedding",): "gpt_neox.embed_in.weight",
    ("norm", "scale"): "gpt_neox.final_layer_norm.weight",
    ("norm", "bias"): "gpt_neox.final_layer_norm.bias",
    ("head",): "embed_out.weight",
}


def frame(kind: str) -> dict[tuple[str, ...], str]:
    """The names of a family's tensors outside of the layers."""
    return _NEOX_FRAME if kind == "gpt_neox" else _FRAME


# By whether the family is Mixtral.
_EXPERTS = {
    True: {
        "router": "block_sparse_moe.gate.weight",
        **{
            ours: f"block_sparse_moe.experts.{{}}.{theirs}.weight"
            for ours, theirs in zip(("gate", "down", "up"), ("w1", "w2", "w3"), strict=True)
        },
    },
    False: {
        "router": "mlp.gate.weight",
        **{name: f"mlp.experts.{{}}.{name}_proj.weight" for name in ("gate", "up", "down")},
    },
}


def tensors(path: tuple[str, ...], kind: str, model: Llama) -> list[Tensor]:
    """Returns the tensors of a family's checkpoint for the parameter at `path`.

    Args:
        path: the parameter.
        kind: the family.
        model: the model that has the parameter.

    Returns:
        One, or one per layer if the parameter is stacked, or per expert of a layer.
    """
    if path[0] not in model.stacks:
        return [Tensor(frame(kind)[path], (), path == ("head",), path[0] != "norm")]
    config, (stack, *inner) = model.config, path
    prefix = "gpt_neox" if kind == "gpt_neox" else "model"
    layers = [f"{prefix}.layers.{layer}." for layer in model.stacks[stack]]
    if config.experts is None or len(inner) > 2 or inner[0] != "mlp":
        name, transposed = (_LAYER | FAMILIES[kind].tensors)[tuple(inner)], inner[-1] == "kernel"
        part = _part(tuple(inner), kind, config)
        return [Tensor(layer + name, (i,), transposed, part=part) for i, layer in enumerate(layers)]
    name = _EXPERTS[kind == "mixtral"][inner[-1]]
    if inner[-1] == "router":
        return [Tensor(layer + name, (i,), True) for i, layer in enumerate(layers)]
    return [
        Tensor(layer + name.format(expert), (i, expert), True)
        for i, layer in enumerate(layers)
        for expert in range(config.experts.num_experts)
    ]


def _part(path: tuple[str, ...], kind: str, config: LlamaConfig) -> Part | None:
    """The rows of a parameter in a tensor of several: of q, k and v, or of the MLP's gate and input."""
    head = config.resolved_head_dim
    sizes: dict[str, int] = {"q": config.num_heads * head, **dict.fromkeys("kv", config.num_kv_heads * head)}
    if kind == "gpt_neox" and path[1] in sizes:  # by head
        return Part("qkv".index(path[1]) * head, head, 3 * head, sum(sizes.values()))
    if kind == "phi3" and path[1] in ("gate", "up"):
        sizes = dict.fromkeys(("gate", "up"), config.intermediate_size)
    if kind != "phi3" or path[1] not in sizes:
        return None
    first = sum(size for name, size in sizes.items() if list(sizes).index(name) < list(sizes).index(path[1]))
    return Part(first, sizes[path[1]], 0, sum(sizes.values()))
