"""Converts config.json and tensor names of each supported architecture to and from LlamaConfig.

Architectures differ in which keys their config.json may omit and in what they can express; each entry of FAMILIES
lists both. Based on the configuration classes of transformers 5.24. Reads and writes the keys of version 5
(`rope_parameters`, `dtype`) and of version 4 (`rope_theta`, `rope_scaling`, `torch_dtype`).
"""

import dataclasses
import sys
from typing import Any

from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, Model
from jaxtrain.model.experts import Experts
from jaxtrain.model.llama import MOST_LAYERS, Llama, LlamaConfig
from jaxtrain.model.pattern import Kind, shortest, text_of
from jaxtrain.model.rope import LinearRopeScaling, Llama3RopeScaling, RopeScaling


@dataclasses.dataclass(frozen=True)
class Family:
    """An architecture of transformers.

    Attributes:
        architecture: class name in config.json.
        defaults: values of the keys that config.json may omit.
        biases: the supported combinations of (attention_bias, attention_output_bias, mlp_bias).
        qk_norm: whether it normalizes queries and keys.
        no_rope: whether some layers may have no rotary positions.
        sliding_window: whether attention may have a sliding window.
        experts: its keys for the number and the width of experts; None for dense models.
    """

    architecture: str
    defaults: Json
    biases: tuple[tuple[bool, bool, bool], ...]
    qk_norm: bool = False
    no_rope: bool = False
    sliding_window: bool = False
    experts: tuple[str, str] | None = None


_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False, "hidden_act": "silu"}
_QWEN = {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28}
_NONE, _QKV, _ATTENTION = (False, False, False), (True, False, False), (True, True, False)
_ALL = (_NONE, _ATTENTION, (False, False, True), (True, True, True))

# By model_type. A model is exported as the first family that can express it.
FAMILIES = {
    "llama": Family("LlamaForCausalLM", _COMMON | {"max_position_embeddings": 2048}, _ALL),
    "mistral": Family(
        "MistralForCausalLM",
        _COMMON | {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
        (_NONE,),
        sliding_window=True,
    ),
    "qwen2": Family("Qwen2ForCausalLM", _COMMON | _QWEN, (_QKV,), sliding_window=True),
    "qwen3": Family(
        "Qwen3ForCausalLM", _COMMON | _QWEN | {"head_dim": 128}, (_NONE, _ATTENTION), qk_norm=True, sliding_window=True
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
        sliding_window=True,
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
        sliding_window=True,
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
        qk_norm=True,
        sliding_window=True,
        experts=("num_experts", "moe_intermediate_size"),
    ),
}
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_TYPES: dict[str, type] = {
    **dict.fromkeys((*_REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings"), int),
    **dict.fromkeys(("sliding_window", "max_window_layers", "no_rope_layer_interval"), int),
    **dict.fromkeys(("num_local_experts", "num_experts", "num_experts_per_tok", "moe_intermediate_size"), int),
    "decoder_sparse_step": int,
    **dict.fromkeys(("rms_norm_eps", "rope_theta", "partial_rotary_factor"), float),
    **dict.fromkeys(("router_aux_loss_coef", "router_jitter_noise"), float),
    **dict.fromkeys(("tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"), bool),
    "norm_topk_prob": bool,
    **dict.fromkeys(("no_rope_layers", "layer_types", "mlp_only_layers"), list),
    **dict.fromkeys(("rope_parameters", "rope_scaling"), dict),
}
_ROPE_TYPES: dict[str, type] = {
    **dict.fromkeys(("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "partial_rotary_factor"), float),
    "original_max_position_embeddings": int,
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
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type={kind!r} is not supported. Supported architectures: "
            f"{', '.join(family.architecture for family in FAMILIES.values())}."
        )
    family = FAMILIES[kind]
    # For these three null means "derived" or "none"; any other key that is null counts as omitted.
    nullable = ("num_key_value_heads", "head_dim", "sliding_window")
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
    if known["hidden_act"] not in ("silu", "swish"):
        raise UserError(f"{where}: hidden_act={known['hidden_act']!r} is not supported; the MLP is SwiGLU ('silu').")
    # Classes without this key ignore it.
    attention_bias = known.get("attention_bias", False) and _ATTENTION in family.biases
    theta, scaling = _rope(known, where)
    kv_heads = known.get("num_key_value_heads")
    rotates = _rotates(known, where) if family.no_rope else [True] * known["num_hidden_layers"]
    window = _sliding_window(kind, known, rotates, where) if family.sliding_window else None
    experts, has_experts = _experts(known, family, where)
    kinds = [Kind(local=window is not None, experts=has) for has in has_experts]
    config = LlamaConfig(
        hidden_size=known["hidden_size"],
        intermediate_size=known["intermediate_size"],
        num_layers=known["num_hidden_layers"],
        num_heads=known["num_attention_heads"],
        num_kv_heads=known["num_attention_heads"] if kv_heads is None else kv_heads,
        head_dim=known.get("head_dim"),
        max_seq_len=known["max_position_embeddings"],
        rope_theta=theta,
        rope_scaling=scaling,
        no_rope_every=None if all(rotates) else rotates.index(False) + 1,
        sliding_window=window,
        experts=experts,
        layers=text_of(shortest(kinds)) if len(set(has_experts)) > 1 else None,
        norm_eps=known["rms_norm_eps"],
        tie_embeddings=known["tie_word_embeddings"],
        attention_bias=attention_bias or kind == "qwen2",
        attention_output_bias=attention_bias,
        mlp_bias=known.get("mlp_bias", False) and family.biases == _ALL,
        qk_norm=family.qk_norm,
    )
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
    if noise := known.get("router_jitter_noise"):
        raise UserError(f"{where}: router_jitter_noise={noise} is not supported; routers have no noise.")
    # Classes without these keys ignore them.
    mine = known if "decoder_sparse_step" in family.defaults else {}
    every, dense = mine.get("decoder_sparse_step", 1), mine.get("mlp_only_layers") or ()
    if every < 1:
        raise UserError(f"{where}: decoder_sparse_step={every} in config.json must be at least 1.")
    has = [number > 0 and i not in dense and (i + 1) % every == 0 for i in range(layers)]
    if not any(has):
        return None, has
    return Experts(
        num_experts=number,
        experts_per_token=known["num_experts_per_tok"],
        intermediate_size=known[width],
        normalize=mine.get("norm_topk_prob", True),
        balance_loss=known["router_aux_loss_coef"],
        z_loss=0.0,
    ), has


def _rope(known: Json, where: str) -> tuple[float, RopeScaling | None]:
    """The RoPE base and scaling, with the precedence and fallbacks of transformers."""
    rope = known.get("rope_scaling") or known.get("rope_parameters") or {}
    _check_types(rope, _ROPE_TYPES, where)
    nested = [key for key, value in rope.items() if isinstance(value, dict)]
    if nested:
        raise UserError(f"{where}: separate rotary settings for {', '.join(nested)} are not supported.")
    partial = rope.get("partial_rotary_factor", known.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UserError(f"{where}: partial_rotary_factor={partial} is not supported; only whole heads can be rotated.")
    theta = rope.get("rope_theta", known["rope_theta"])
    if theta is None:
        raise UserError(f"{where}: rope_theta is null in config.json.")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return theta, None
    if kind not in ("linear", "llama3"):
        raise UserError(f"{where}: rope_type={kind!r} is not supported. Supported: default, linear, llama3.")
    original = "original_max_position_embeddings"
    settings = {original: known["max_position_embeddings"]} | rope
    if known.get(original) is not None:
        settings[original] = known[original]
    scaling = LinearRopeScaling if kind == "linear" else Llama3RopeScaling
    names = [field.name for field in dataclasses.fields(scaling)]
    missing = [name for name in names if settings.get(name) is None]
    if missing:
        raise UserError(f"{where}: rope_type={kind!r} in config.json lacks {', '.join(missing)}.")
    return theta, scaling(**{name: settings[name] for name in names})


def _rotates(known: Json, where: str) -> list[bool]:
    """Whether each layer has rotary positions."""
    layers, every = known["num_hidden_layers"], known["no_rope_layer_interval"]
    if every < 1:
        raise UserError(f"{where}: no_rope_layer_interval={every} in config.json must be at least 1.")
    pattern = known.get("no_rope_layers", [(i + 1) % every for i in range(layers)])
    rotates = [bool(r) for r in pattern[:layers]]
    every = layers + 1 if all(rotates) else rotates.index(False) + 1
    if rotates != [(i + 1) % every != 0 for i in range(layers)]:
        raise UserError(f"{where}: no_rope_layers={pattern} is not supported; only every n-th layer may have none.")
    return rotates


def _sliding_window(kind: str, known: Json, rotates: list[bool], where: str) -> int | None:
    window, types = known.get("sliding_window"), known.get("layer_types")
    if kind in ("mistral", "mixtral"):
        if window is None:
            return None
        enabled, slides = True, [True] * len(rotates)
    else:
        enabled = window is not None and known.get("use_sliding_window", False)
        # SmolLM3 applies the window to layers without rotary positions, Qwen to layers from max_window_layers on.
        first = 0 if kind == "qwen3_moe" else known.get("max_window_layers", 0)  # whose class ignores it
        slides = [not r if kind == "smollm3" else i >= first for i, r in enumerate(rotates)]
    if types is not None:
        slides = [name == "sliding_attention" for name in types]
        other = [name for name in types if name not in ("sliding_attention", "full_attention")]
        if other or len(types) != len(rotates) or (any(slides) and not enabled):
            raise UserError(
                f"{where}: layer_types={types} with use_sliding_window={known.get('use_sliding_window')} and "
                f"sliding_window={window} is not supported; each of the {len(rotates)} layers must have "
                "full_attention or sliding_attention, as the other two say."
            )
    if kind not in ("mistral", "mixtral") and not (enabled and any(slides)):
        return None
    if not all(slides):
        raise UserError(f"{where}: a sliding window in only some of the layers is not supported.")
    return window


def llama(model: Model) -> Llama:
    """Returns the model if it is a Llama; raises UserError otherwise."""
    if not isinstance(model, Llama):
        raise UserError(
            f"{type(model).__name__} is not of the Llama family, the only one supported in Hugging Face checkpoints."
        )
    return model


def family_of(config: LlamaConfig) -> str:
    """Returns the first model_type that can express the config.

    Raises:
        UserError: no family can.
    """
    biases = (config.attention_bias, config.attention_output_bias, config.mlp_bias)
    for kind, family in FAMILIES.items():
        if (
            biases in family.biases
            and config.qk_norm == family.qk_norm
            and (config.no_rope_every is None or family.no_rope)
            and (config.sliding_window is None or family.sliding_window)
            and _can_have(family, config)
            # transformers requires this of the Llama class only.
            and (kind != "llama" or config.hidden_size % config.num_heads == 0)
        ):
            return kind
    raise UserError(
        f"No architecture of transformers has attention_bias={biases[0]}, attention_output_bias={biases[1]}, "
        f"mlp_bias={biases[2]}, qk_norm={config.qk_norm}, no_rope_every={config.no_rope_every} and "
        f"sliding_window={config.sliding_window} together"
        f"{'' if config.experts is None else f', with {config.experts} in layers={config.layers}'}, so this model "
        "cannot be exported."
    )


def _can_have(family: Family, config: LlamaConfig) -> bool:
    """Whether a family can have the config's experts, in those layers that have them."""
    experts = config.experts
    if experts is None or family.experts is None:
        return experts is None and family.experts is None
    if experts.shared_size:
        return False
    if family.architecture == "MixtralForCausalLM":
        is_same = config.intermediate_size == experts.intermediate_size
        return experts.normalize and is_same and all(kind.experts for kind in config.pattern)
    return True


def to_json(config: LlamaConfig, vocab_size: int, dtype: str) -> Json:
    """Returns the model's config.json, without special tokens.

    Args:
        config: the model's config.
        vocab_size: rows of the exported embedding.
        dtype: type of the exported tensors.
    """
    kind = family_of(config)
    rope: Json = {"rope_type": "default"}
    if config.rope_scaling is not None:
        name = "linear" if isinstance(config.rope_scaling, LinearRopeScaling) else "llama3"
        rope = {"rope_type": name, **dataclasses.asdict(config.rope_scaling)}
    layers, every = config.num_layers, config.no_rope_every
    extra: dict[str, Any] = {}
    if kind in ("llama", "smollm3", "qwen3", "qwen3_moe"):
        extra["attention_bias"] = config.attention_bias
    if kind in ("llama", "smollm3"):
        extra["mlp_bias"] = config.mlp_bias
    if kind != "llama":
        extra["sliding_window"] = config.sliding_window
    if kind in ("qwen2", "qwen3", "smollm3", "qwen3_moe"):
        windowed = config.sliding_window is not None
        extra["use_sliding_window"] = windowed
        extra["max_window_layers"] = 0 if windowed else layers
        extra["layer_types"] = ["sliding_attention" if windowed else "full_attention"] * layers
    if config.experts is not None:
        number, width = FAMILIES[kind].experts or ("", "")
        extra |= {number: config.experts.num_experts, width: config.experts.intermediate_size}
        extra["num_experts_per_tok"] = config.experts.experts_per_token
        extra["router_aux_loss_coef"] = config.experts.balance_loss
    if kind == "qwen3_moe" and config.experts is not None:
        extra |= {"norm_topk_prob": config.experts.normalize, "decoder_sparse_step": 1}
        period = config.pattern
        extra["mlp_only_layers"] = [i for i in range(layers) if not period[i % len(period)].experts]
    if kind == "smollm3":
        extra["no_rope_layers"] = [int(every is None or (i + 1) % every != 0) for i in range(layers)]
        extra["no_rope_layer_interval"] = every or layers + 1
    return {
        "architectures": [FAMILIES[kind].architecture],
        "model_type": kind,
        "vocab_size": vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.resolved_head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.initializer_std,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_embeddings,
        "rope_theta": config.rope_theta,
        "rope_scaling": rope if config.rope_scaling is not None else None,
        "rope_parameters": rope | {"rope_theta": config.rope_theta},
        "torch_dtype": dtype,
        "dtype": dtype,
        "use_cache": True,
        **extra,
    }


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint.

    Attributes:
        name: name in the safetensors files.
        index: its place in the parameter: none, (layer,) or (layer, expert).
        transposed: whether it is [out, in] there and [in, out] in jaxtrain.
        vocabulary: whether its first axis there is the vocabulary.
    """

    name: str
    index: tuple[int, ...]
    transposed: bool
    vocabulary: bool


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


def tensors(path: tuple[str, ...], model: Llama) -> list[Tensor]:
    """Returns the checkpoint's tensors for the parameter at `path`: one, or one per layer, or per expert of a layer."""
    if path[0] not in model.stacks:
        return [Tensor(_FRAME[path], (), path == ("head",), path != ("norm", "scale"))]
    config, (stack, *inner) = model.config, path
    layers = [f"model.layers.{layer}." for layer in model.stacks[stack]]
    if config.experts is None or len(inner) > 2 or inner[0] != "mlp":
        name, transposed = _LAYER[tuple(inner)], inner[-1] == "kernel"
        return [Tensor(layer + name, (i,), transposed, False) for i, layer in enumerate(layers)]
    name = _EXPERTS[family_of(config) == "mixtral"][inner[-1]]
    if inner[-1] == "router":
        return [Tensor(layer + name, (i,), True, False) for i, layer in enumerate(layers)]
    return [
        Tensor(layer + name.format(expert), (i, expert), True, False)
        for i, layer in enumerate(layers)
        for expert in range(config.experts.num_experts)
    ]
