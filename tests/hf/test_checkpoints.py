"""A checkpoint's config against its tensors; damaged, quantized and unsupported checkpoints are refused."""

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtrain import hf
from jaxtrain.errors import UserError
from jaxtrain.hf import families, reading
from jaxtrain.model.rope import LinearRopeScaling, Llama3RopeScaling, YarnRopeScaling
from tests.hf.test_hf import GOLDEN, ONE_DEVICE, in_float32, logits
from tests.hub import LoopbackHub

HEAD, EMBEDDING = families.HEAD, families.EMBEDDING
LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}
SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32}


def copied(
    tmp_path: Path, family: str = "llama2", tensors: dict[str, np.ndarray] | None = None, **changes: Any
) -> Path:
    """A golden checkpoint with other settings and further tensors."""
    folder = tmp_path / "model"
    shutil.copytree(GOLDEN / family, folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    if tensors:
        save_file(load_file(folder / "model.safetensors") | tensors, folder / "model.safetensors")
    return folder


def test_a_head_of_its_own_is_not_tied(tmp_path):
    """llama2 has one; transformers computes the same logits, with a warning."""
    folder = copied(tmp_path, tie_word_embeddings=True)
    assert not hf.config(str(folder))[0].tie_embeddings
    model, expected = in_float32(folder), np.load(GOLDEN / "llama2" / "expected.npz")
    got = logits(model, hf.load(str(folder), model, ONE_DEVICE), expected["tokens"])
    np.testing.assert_allclose(got, expected["logits"], rtol=0, atol=2e-5 * np.abs(expected["logits"]).max())
    config, vocab_size = hf.config(str(folder))
    config.tie_embeddings = True
    with pytest.raises(UserError, match=r"an output head separate from its embedding: set model\.tie_embeddings=false"):
        hf.load(str(folder), config.build(vocab_size, None), ONE_DEVICE)


def test_a_copy_of_the_embedding_is_tied(tmp_path):
    embedding = load_file(GOLDEN / "llama3" / "model.safetensors")[EMBEDDING]
    folder = copied(tmp_path, "llama3", {HEAD: embedding.copy()})
    assert hf.config(str(folder))[0].tie_embeddings
    hf.load(str(folder), in_float32(folder), ONE_DEVICE)
    (tmp_path / "model" / "model.safetensors").unlink()
    assert hf.config(str(folder))[0].tie_embeddings  # the config needs no tensors


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("family", ["llama2", "llama3"])
def test_tied_or_not_on_the_hub(family, sharded, hub: LoopbackHub, tmp_path):
    """The header or index shows whether a checkpoint is tied: no tensor is downloaded."""
    folder = copied(tmp_path, family, tie_word_embeddings=True)
    content = {path.name: path.read_bytes() for path in folder.iterdir()}
    if sharded:
        data = content.pop("model.safetensors")
        names = load_file(folder / "model.safetensors").keys()
        content["one.safetensors"] = data
        content[reading.INDEX] = json.dumps({"weight_map": dict.fromkeys(names, "one.safetensors")}).encode()
    hub.commit("org/model", content, repo_type="model")
    config, vocab_size = hf.config("org/model")
    assert config.tie_embeddings == (family == "llama3")
    if family == "llama3":
        assert not list(Path(tmp_path).rglob("snapshots/*/*.safetensors"))
    config.dtype = "float32"
    hf.load("org/model", config.build(vocab_size, None), ONE_DEVICE)


def test_other_heads_of_the_same_shape_are_refused_and_other_functions_reported(tmp_path, caplog):
    folder = str(copied(tmp_path))
    config, vocab_size = hf.config(folder)
    config.num_heads, config.num_kv_heads, config.head_dim = 8, 4, 2
    with pytest.raises(UserError, match=r"model\.num_heads=8, but .* has 4: its tensors would mean something else"):
        hf.load(folder, config.build(vocab_size, None), ONE_DEVICE)
    config, _ = hf.config(folder)
    hf.load(folder, config.build(vocab_size, None), ONE_DEVICE)
    assert not caplog.records
    config.rope_theta, config.norm_eps = 1e6, 1e-3
    hf.load(folder, config.build(vocab_size, None), ONE_DEVICE)
    assert [record.getMessage() for record in caplog.records] == [
        f"model.rope_theta=1000000.0, but {folder} was trained with 500.0.",
        f"model.norm_eps=0.001, but {folder} was trained with 1e-06.",
    ]


@pytest.mark.parametrize("dtype", [ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2, np.int8, np.uint8], ids=str)
def test_quantized_tensors_are_refused(dtype, tmp_path):
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(GOLDEN / "llama2" / "model.safetensors")[name]
    folder = copied(tmp_path, tensors={name: weight.astype(dtype), f"{name}_scale_inv": np.ones(1, np.float32)})
    with pytest.raises(
        UserError, match=rf"{name} is (F8_E4M3|F8_E5M2|I8|U8)\. Quantized checkpoints are not supported"
    ):
        hf.load(str(folder), in_float32(folder), ONE_DEVICE)


@pytest.mark.parametrize("text", ["", "{", '{"model_type": "llama", "vocab', "[]", "null", "\xff"])
def test_a_cut_config_or_index(text, tmp_path):
    folder = copied(tmp_path)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00001.safetensors")
    for name in ("config.json", reading.INDEX):
        before = (folder / name).read_bytes() if (folder / name).exists() else None
        (folder / name).write_bytes(text.encode("latin-1"))
        with pytest.raises(UserError, match=rf"{name} (is truncated or not JSON|is not a JSON object)"):
            hf.load(str(folder), in_float32(folder), ONE_DEVICE)
        if before is not None:
            (folder / name).write_bytes(before)
    for index in ({}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": {"a": 1}}):
        (folder / reading.INDEX).write_text(json.dumps(index))
        with pytest.raises(UserError, match="lists no tensors"):
            hf.load(str(folder), in_float32(GOLDEN / "llama2"), ONE_DEVICE)
    (folder / reading.INDEX).write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}))
    with pytest.raises(UserError, match=r"has no model-00002-of-00002\.safetensors"):
        hf.load(str(folder), in_float32(GOLDEN / "llama2"), ONE_DEVICE)


def test_the_single_file_comes_before_an_index(tmp_path):
    folder = copied(tmp_path)
    (folder / reading.INDEX).write_text(json.dumps({"weight_map": {"a": "stale.safetensors"}}))
    hf.load(str(folder), in_float32(folder), ONE_DEVICE)


REFUSED = [
    ({"vocab_size": "200"}, "vocab_size='200' in config.json is not a whole number"),
    ({"vocab_size": 0}, "vocab_size=0 in config.json must be at least 1"),
    ({"hidden_size": 16.0}, r"hidden_size=16\.0 in config.json is not a whole number"),
    ({"num_hidden_layers": True}, "num_hidden_layers=True in config.json is not a whole number"),
    ({"num_hidden_layers": 0}, "describes an invalid model. num_layers=0"),
    ({"num_hidden_layers": 10**30}, "num_hidden_layers=10{30} in config.json is not a whole number below 2\\^31"),
    ({"num_hidden_layers": 10**9}, "num_hidden_layers=10{9} in config.json must be at most 65,536"),
    ({"model_type": "smollm3", "num_hidden_layers": 10**9}, "num_hidden_layers=10{9} in config"),
    ({"vocab_size": 10**12}, "vocab_size=10{12} in config.json is not a whole number below 2"),
    ({"hidden_size": 2**30, "head_dim": 2}, "hidden_size=1073741824: it must be from 1 to"),
    ({"head_dim": 2**30}, "head_dim=1073741824: it must be from 1 to"),
    ({"num_attention_heads": 2**25, "num_key_value_heads": 3}, "num_heads=33554432: it must be from 1 to"),
    ({"rope_parameters": {"rope_theta": None}, "rope_theta": 7.0}, "rope_theta is null"),
    ({"rope_theta": math.inf}, "rope_theta=inf in config.json is not a finite number"),
    ({"rope_theta": 10**400}, "rope_theta=10{400} in config.json is not a finite number"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan in config.json is not a finite number"),
    ({"rope_scaling": {"type": "linear", "factor": 1e999}}, "factor=inf in config.json is not a finite number"),
    ({"num_key_value_heads": 3}, "num_kv_heads=3"),
    ({"rms_norm_eps": "1e-6"}, "rms_norm_eps='1e-6' in config.json is not a finite number"),
    ({"tie_word_embeddings": "true"}, "tie_word_embeddings='true' in config.json is not true or false"),
    ({"model_type": ["llama"]}, r"model_type=\['llama'\] is not supported"),
    ({"model_type": None}, "model_type=None is not supported"),
    ({"hidden_act": ["silu"]}, "hidden_act="),
    ({"rope_scaling": [1.0]}, r"rope_scaling=\[1\.0\] in config.json is not an object"),
    ({"rope_scaling": {"type": "linear"}}, "rope_type='linear' in config.json lacks factor"),
    ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor='2' in config.json is not a finite number"),
    ({"rope_scaling": {"type": "linear", "factor": 0.5}}, r"rope_scaling.factor=0\.5"),
    ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_factor, high_freq_factor"),
    ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type='dynamic' is not supported"),
    ({"rope_parameters": {"rope_type": ["x"]}}, r"rope_type=\['x'\] is not supported"),
    ({"rope_parameters": {"full_attention": SCALED}}, "separate rotary settings for full_attention"),
    (
        {"model_type": "olmo3", "rope_parameters": {"sliding_attention": SCALED}},
        "scaled rotary positions in layers with",
    ),
    ({"model_type": "gemma3_text", "rope_parameters": {"full_attention": 1}}, "an object for each kind of layer"),
    (
        {"model_type": "gemma3_text", "rope_parameters": {"full_attention": {"partial_rotary_factor": 0.5}}},
        r"partial_rotary_factor=0\.5 is not supported by kind of layer",
    ),
    ({"model_type": "gemma2", "sliding_window": None}, "layers with a sliding window, and sliding_window=None"),
    ({"model_type": "phi3", "rope_scaling": YARN}, "rope_type='yarn' of phi3 means longrope"),
    ({"model_type": "phi3", "rope_scaling": {"type": "longrope"}}, "rope_type='longrope' is not supported"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_type='yarn' in config.json lacks factor"),
    ({"model_type": "phi3", "partial_rotary_factor": 1.5}, r"partial_rotary_factor=1\.5: it must be above 0"),
    ({"model_type": "gpt_neox", "rotary_pct": 0.2}, r"partial_rotary_factor=0\.2: rotary positions need an even part"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, r"partial_rotary_factor=0\.5"),
    ({"partial_rotary_factor": 0.25}, r"partial_rotary_factor=0\.25"),
    ({"model_type": "smollm3", "no_rope_layer_interval": 0}, "no_rope_layer_interval=0"),
    ({"model_type": "smollm3", "no_rope_layers": [1, 1]}, "no_rope_layers"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 4}, "layer_types.*use_sliding_window=None"),
    ({"model_type": "qwen2", "layer_types": ["chunked_attention"] * 4}, "layer_types=.*chunked_attention"),
    ({"model_type": "qwen2", "layer_types": ["full_attention"] * 3}, "layer_types"),
    ({"model_type": "qwen2", "layer_types": [{}] * 4}, "layer_types"),
    ({"model_type": "mistral", "layer_types": ["full_attention"] * 4}, "layer_types=.*sliding_window=4096"),
    ({"model_type": "mixtral", "num_key_value_heads": 2, "router_jitter_noise": 0.1}, "router_jitter_noise=0.1"),
    ({"model_type": "mixtral", "num_key_value_heads": 2, "num_experts_per_tok": 9}, "experts_per_token=9"),
    ({"model_type": "mixtral", "num_key_value_heads": 2, "hidden_act": "gelu"}, "hidden_act='gelu' with experts"),
    ({"model_type": "olmoe", "clip_qkv": 8.0}, "clip_qkv=8.0"),
    ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "decoder_sparse_step=0"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_what_cannot_be_represented_is_refused_by_name(changes, message):
    with pytest.raises(UserError, match=message):
        families.from_json(LLAMA | changes, "org/model")


def llama3(original: int) -> Llama3RopeScaling:
    return Llama3RopeScaling(factor=8.0, original_max_position_embeddings=original)


READ: list[tuple[dict[str, Any], dict[str, Any]]] = [
    # As transformers 5.24 reads them: tests/hf/test_hf_parity.py compares the logits.
    ({"rope_scaling": {"type": "linear", "factor": 2}}, {"rope_scaling": LinearRopeScaling(factor=2)}),
    ({"rope_scaling": {"type": "default"}}, {"rope_scaling": None}),
    ({"rope_scaling": {}}, {"rope_scaling": None}),
    ({"rope_scaling": SCALED}, {"rope_scaling": llama3(2048)}),
    ({"rope_scaling": SCALED | {"original_max_position_embeddings": 32}}, {"rope_scaling": llama3(32)}),
    (
        {"rope_scaling": SCALED | {"original_max_position_embeddings": 32}, "original_max_position_embeddings": 64},
        {"rope_scaling": llama3(64)},
    ),
    (
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
        {"rope_scaling": LinearRopeScaling(factor=2.0)},
    ),
    ({"rope_parameters": {"rope_theta": 300.0}, "rope_theta": 7.0}, {"rope_theta": 300.0}),
    ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 7.0}, {"rope_theta": 7.0}),
    ({"rope_parameters": {"rope_type": "default"}, "model_type": "smollm3"}, {"rope_theta": 2e6}),
    ({"hidden_act": "swish"}, {}),
    ({"model_type": "qwen2", "num_key_value_heads": None}, {"num_kv_heads": 4}),
    ({"model_type": "smollm3", "num_key_value_heads": None}, {"num_kv_heads": 4}),
    ({"model_type": "smollm3", "no_rope_layers": [1, 1, 1, 0, 1, 1, 1, 0]}, {"no_rope_every": 4}),
    (
        {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 4, "no_rope_layer_interval": 1},
        {"sliding_window": 4, "no_rope_every": 1},
    ),
    (
        {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 4, "no_rope_layer_interval": 9},
        {"sliding_window": None, "no_rope_every": None},
    ),
    (
        {"model_type": "qwen2", "num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 0},
        {"sliding_window": 4096},
    ),
    (
        {"model_type": "qwen2", "num_key_value_heads": 2, "sliding_window": 4, "use_sliding_window": False},
        {"sliding_window": None},
    ),
    ({"model_type": "mistral", "num_key_value_heads": 2}, {"sliding_window": 4096}),
    ({"model_type": "mistral", "num_key_value_heads": 2, "sliding_window": None}, {"sliding_window": None}),
    ({"model_type": "mistral", "num_key_value_heads": 2, "attention_bias": True}, {"attention_bias": False}),
    (
        {"model_type": "smollm3", "use_sliding_window": True, "sliding_window": 8},
        {"layers": "3 global : 1 local nope", "sliding_window": 8, "no_rope_every": None},
    ),
    (
        {"model_type": "qwen3", "num_key_value_heads": 2, "use_sliding_window": True, "max_window_layers": 2},
        {"layers": "2 global : 2 local", "sliding_window": 4096},
    ),
    (
        {"model_type": "smollm3", "no_rope_layers": [0, 1, 1, 1]},
        {"layers": "1 global nope : 3 global", "no_rope_every": None},
    ),
    ({"hidden_act": "gelu_new"}, {"hidden_act": "gelu_pytorch_tanh"}),
    ({"rope_scaling": YARN}, {"rope_scaling": YarnRopeScaling(factor=8.0, original_max_position_embeddings=32)}),
    (
        {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.3, "truncate": False, "beta_fast": 4}},
        {
            "rope_scaling": YarnRopeScaling(
                factor=8.0,
                original_max_position_embeddings=32,
                beta_fast=4,
                truncate=False,
                attention_factor=(0.07 * math.log(8) + 1) / (0.13 * math.log(8) + 1),
            )
        },
    ),
    (
        {"model_type": "gemma2", "head_dim": 4, "num_key_value_heads": 2, "sliding_window": 4},
        {"layers": "1 local : 1 global", "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 256},
    ),
    (
        {"model_type": "gemma3_text", "head_dim": 4, "num_key_value_heads": 2, "sliding_window_pattern": 2},
        {"layers": "1 local : 1 global", "rope_theta": 1e6, "rope_local_base_freq": 1e4, "tie_embeddings": True},
    ),
    (
        {"model_type": "gemma3_text", "head_dim": 4, "num_key_value_heads": 2, "rope_local_base_freq": 7.0}
        | {"rope_theta": 70.0, "rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 4},
        {"layers": None, "rope_theta": 70.0, "rope_local_base_freq": 7.0},
    ),
    ({"model_type": "olmo3", "sliding_window": 4}, {"layers": "3 local : 1 global", "rope_local_base_freq": None}),
    ({"model_type": "olmo3", "rope_theta": 70.0}, {"rope_theta": 70.0, "rope_local_base_freq": 5e5}),
    ({"model_type": "phi3", "attention_bias": True}, {"attention_bias": False, "partial_rotary_factor": 1.0}),
    (
        {"model_type": "gpt_neox", "num_attention_heads": 2, "head_dim": 8, "rotary_pct": 0.5, "rotary_emb_base": 70},
        {"partial_rotary_factor": 0.5, "rope_theta": 70, "parallel_residual": True},
    ),
    (
        {"model_type": "gpt_neox", "num_attention_heads": 2, "head_dim": 8}
        | {"use_parallel_residual": False, "attention_bias": False},
        {"parallel_residual": False, "attention_bias": False, "mlp_bias": True},
    ),
]


@pytest.mark.parametrize(("changes", "expected"), READ)
def test_other_spellings(changes, expected):
    config, vocab_size = families.from_json(LLAMA | changes, "org/model")
    assert vocab_size == 40
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("changes", "layers"),
    [
        ({}, None),
        ({"decoder_sparse_step": 2}, "1 global : 1 global experts"),
        ({"mlp_only_layers": [0, 1]}, "2 global : 2 global experts"),
        ({"mlp_only_layers": [3], "use_sliding_window": True}, "3 local experts : 1 local"),
        ({"model_type": "mixtral", "decoder_sparse_step": 2}, None),
    ],
)
def test_which_layers_have_experts(changes, layers):
    given = LLAMA | {"model_type": "qwen3_moe", "num_key_value_heads": 2, "num_experts": 4, "num_experts_per_tok": 2}
    config, _ = families.from_json(given | changes, "org/model")
    assert config.layers == layers
    assert config.experts is not None
    assert config.experts.num_experts == 4
    assert families.from_json(families.to_json(config, 40, "float32"), "")[0] == dataclasses.replace(
        config, head_dim=config.resolved_head_dim
    )


def test_a_model_with_shared_experts_is_not_exported():
    config, _ = families.from_json(LLAMA | {"model_type": "mixtral", "num_key_value_heads": 2}, "")
    assert config.experts is not None
    config.experts.shared_size = 8
    with pytest.raises(UserError, match="shared_size=8"):
        families.to_json(config, 40, "float32")


def test_llama_heads_that_do_not_divide_the_width_are_exported_as_mistral(tmp_path):
    """transformers refuses them for the Llama class."""
    config, _ = families.from_json(LLAMA | {"num_attention_heads": 3, "head_dim": 4}, "")
    written = families.to_json(config, 40, "float32")
    assert (written["model_type"], written["sliding_window"]) == ("mistral", None)
    model = config.build(40, None)
    params = jax.tree.map(lambda s: np.zeros(s.shape, np.float32), model.shapes)
    hf.export(params, model, str(tmp_path))
    assert hf.config(str(tmp_path))[0] == config
