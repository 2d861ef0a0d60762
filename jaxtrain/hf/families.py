"""config.json of each supported architecture to and from LlamaConfig, and the names of the tensors.

The architectures differ in what their config.json may leave out and in what they cannot express; a row of FAMILIES says
both. Written from the configuration classes of transformers 5.23. The spelling of its version 5 (`rope_parameters`,
`dtype`) and that of version 4 (`rope_theta`, `rope_scaling`, `torch_dtype`) are both read and written.
"""

import dataclasses
from typing import Any

from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, Model
from jaxtrain.model.llama import Llama, LlamaConfig
from jaxtrain.model.rope import LinearRopeScaling, Llama3RopeScaling


@dataclasses.dataclass(frozen=True)
class Family:
    """architecture: the class in config.json. defaults: of keys that config.json may leave out.

    biases: which of (attention_bias, attention_output_bias, mlp_bias) the class can have together. The rest: whether it
    has QK-norm, can have layers without rotary positions, and can have a sliding window.
    """

    architecture: str
    defaults: Json
    biases: tuple[tuple[bool, bool, bool], ...]
    qk_norm: bool = False
    no_rope: bool = False
    sliding_window: bool = False


_COMMON = {"rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "tie_word_embeddings": False, "hidden_act": "silu"}
_NONE, _QKV, _ATTENTION = (False, False, False), (True, False, False), (True, True, False)

# By model_type; the first that can express a model is the one it is exported as.
FAMILIES = {
    "llama": Family(
        "LlamaForCausalLM",
        _COMMON | {"max_position_embeddings": 2048},
        (_NONE, _ATTENTION, (False, False, True), (True, True, True)),
    ),
    "mistral": Family(
        "MistralForCausalLM",
        _COMMON | {"max_position_embeddings": 131_072, "num_key_value_heads": 8, "sliding_window": 4096},
        (_NONE,),
        sliding_window=True,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        _COMMON | {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "max_window_layers": 28},
        (_QKV,),
        sliding_window=True,
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        _COMMON
        | {"max_position_embeddings": 32_768, "num_key_value_heads": 32, "head_dim": 128, "max_window_layers": 28},
        (_NONE, _ATTENTION),
        qk_norm=True,
        sliding_window=True,
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
            "max_window_layers": 0,
        },
        (_NONE, _ATTENTION, (False, False, True), (True, True, True)),
        no_rope=True,
        sliding_window=True,
    ),
}


def from_json(given: Json, where: str) -> tuple[LlamaConfig, int]:
    """config.json → (config, vocabulary size). where: for messages. UserError names what is not supported."""
    kind = given.get("model_type")
    if kind not in FAMILIES:
        raise UserError(
            f"{where}: model_type={kind!r} is not supported. Supported architectures: "
            f"{', '.join(family.architecture for family in FAMILIES.values())}."
        )
    family = FAMILIES[kind]
    # A key with null means the same as none.
    known = family.defaults | {key: value for key, value in given.items() if value is not None}
    missing = [
        key
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
        if key not in known
    ]
    if missing:
        raise UserError(f"{where}: config.json lacks {', '.join(missing)}.")
    if known["hidden_act"] != "silu":
        raise UserError(f"{where}: hidden_act={known['hidden_act']!r} is not supported; the MLP is SwiGLU ('silu').")
    attention_bias = bool(known.get("attention_bias", False))
    theta, scaling = _rope(known, where)
    config = LlamaConfig(
        hidden_size=known["hidden_size"],
        intermediate_size=known["intermediate_size"],
        num_layers=known["num_hidden_layers"],
        num_heads=known["num_attention_heads"],
        num_kv_heads=known.get("num_key_value_heads", known["num_attention_heads"]),
        head_dim=known.get("head_dim"),
        max_seq_len=known["max_position_embeddings"],
        rope_theta=theta,
        rope_scaling=scaling,
        no_rope_every=_no_rope_every(known, where) if family.no_rope else None,
        sliding_window=_sliding_window(kind, given, known, where) if family.sliding_window else None,
        norm_eps=known["rms_norm_eps"],
        tie_embeddings=known["tie_word_embeddings"],
        attention_bias=attention_bias or kind == "qwen2",
        attention_output_bias=attention_bias and kind != "qwen2",
        mlp_bias=bool(known.get("mlp_bias", False)),
        qk_norm=family.qk_norm,
    )
    config.check()
    return config, known["vocab_size"]


def _rope(known: Json, where: str) -> tuple[float, LinearRopeScaling | Llama3RopeScaling | None]:
    given = known.get("rope_parameters") or known.get("rope_scaling") or {}
    theta = given.get("rope_theta", known["rope_theta"])
    kind = given.get("rope_type") or given.get("type") or "default"
    partial = given.get("partial_rotary_factor", known.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        raise UserError(f"{where}: partial_rotary_factor={partial} is not supported; whole heads are rotated.")
    if kind == "default":
        return theta, None
    if kind == "linear":
        return theta, LinearRopeScaling(factor=given["factor"])
    if kind == "llama3":
        return theta, Llama3RopeScaling(**{f.name: given[f.name] for f in dataclasses.fields(Llama3RopeScaling)})
    raise UserError(f"{where}: rope_type={kind!r} is not supported. Supported: default, linear, llama3.")


def _no_rope_every(known: Json, where: str) -> int | None:
    layers, every = known["num_hidden_layers"], known["no_rope_layer_interval"]
    rotates = known.get("no_rope_layers", [int((i + 1) % every != 0) for i in range(layers)])
    if all(rotates):
        return None
    every = rotates.index(0) + 1
    if [bool(r) for r in rotates] != [(i + 1) % every != 0 for i in range(layers)]:
        raise UserError(f"{where}: no_rope_layers={rotates} is not supported; only every n-th layer may be without.")
    return every


def _sliding_window(kind: str, given: Json, known: Json, where: str) -> int | None:
    # Mistral's null means no window, where the missing key means 4,096.
    if kind == "mistral":
        return given["sliding_window"] if "sliding_window" in given else known["sliding_window"]
    window = known.get("sliding_window")
    if not known.get("use_sliding_window", False) or window is None:
        return None
    layers, full = known["num_hidden_layers"], known["max_window_layers"]
    types = known.get("layer_types") or ["full_attention" if i < full else "sliding_attention" for i in range(layers)]
    if len(set(types)) > 1:
        raise UserError(f"{where}: layers with and without a sliding window are not supported; it is all or none.")
    return window if types[0] == "sliding_attention" else None


def llama(model: Model) -> Llama:
    """The model if it is of these families. Raises UserError."""
    if not isinstance(model, Llama):
        raise UserError(
            f"{type(model).__name__} is not of the Llama family, the only one that is read from and written to Hugging "
            "Face checkpoints."
        )
    return model


def family_of(config: LlamaConfig) -> str:
    """The model_type that can express the config. UserError if none can."""
    biases = (config.attention_bias, config.attention_output_bias, config.mlp_bias)
    for kind, family in FAMILIES.items():
        if (
            biases in family.biases
            and config.qk_norm == family.qk_norm
            and (config.no_rope_every is None or family.no_rope)
            and (config.sliding_window is None or family.sliding_window)
        ):
            return kind
    raise UserError(
        f"No architecture of transformers has attention_bias={biases[0]}, attention_output_bias={biases[1]}, "
        f"mlp_bias={biases[2]}, qk_norm={config.qk_norm}, no_rope_every={config.no_rope_every} and "
        f"sliding_window={config.sliding_window} together, so that this model cannot be exported."
    )


def to_json(config: LlamaConfig, vocab_size: int, dtype: str, bos_id: int | None, eos_id: int | None) -> Json:
    """config.json for the model. dtype: of the exported tensors."""
    kind = family_of(config)
    rope: Json = {"rope_type": "default"}
    if isinstance(config.rope_scaling, LinearRopeScaling):
        rope = {"rope_type": "linear", **dataclasses.asdict(config.rope_scaling)}
    elif isinstance(config.rope_scaling, Llama3RopeScaling):
        rope = {"rope_type": "llama3", **dataclasses.asdict(config.rope_scaling)}
    layers = config.num_layers
    extra: dict[str, Any] = {}
    if kind in ("llama", "smollm3", "qwen3"):
        extra["attention_bias"] = config.attention_bias
    if kind in ("llama", "smollm3"):
        extra["mlp_bias"] = config.mlp_bias
    if kind == "mistral":
        extra["sliding_window"] = config.sliding_window
    if kind in ("qwen2", "qwen3", "smollm3"):
        windowed = config.sliding_window is not None
        extra |= {"use_sliding_window": windowed, "sliding_window": config.sliding_window}
        extra["max_window_layers"] = 0 if windowed else layers
        extra["layer_types"] = ["sliding_attention" if windowed else "full_attention"] * layers
    if kind == "smollm3":
        every = config.no_rope_every
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
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        # Rows may have padding on either side: no position is lost to it.
        "pad_token_id": None,
        "use_cache": True,
        **extra,
    }


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of a checkpoint. transposed: [out, in] there, [in, out] here. vocabulary: one of its axes is."""

    name: str
    transposed: bool
    vocabulary: bool


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
_FRAME = {
    ("embedding",): "model.embed_tokens.weight",
    ("norm", "scale"): "model.norm.weight",
    ("head",): "lm_head.weight",
}


def tensors(path: tuple[str, ...], num_layers: int) -> list[Tensor]:
    """The checkpoint's tensors for the parameter at `path`: one, or one for each layer of a stacked parameter."""
    transposed = path[-1] in ("kernel", "head")
    if path[0] != "layers":
        return [Tensor(_FRAME[path], transposed, path != ("norm", "scale"))]
    return [Tensor(f"model.layers.{layer}.{_LAYER[path[1:]]}", transposed, False) for layer in range(num_layers)]
