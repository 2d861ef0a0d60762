"""Hugging Face checkpoints against transformers' logits for them (made by tests/golden/make_llama.py)."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtrain import hf
from jaxtrain.distributed import sharding
from jaxtrain.errors import UserError
from jaxtrain.hf import families, reading, writing
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.model.rope import Llama3RopeScaling

GOLDEN = Path(__file__).parents[1] / "golden"
FAMILIES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))
ONE_DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def in_float32(folder, mesh=None):
    config, vocab_size = hf.config(str(folder))
    config.dtype = "float32"
    return config.build(vocab_size, mesh)


def logits(model, params, tokens_BT):
    batch, seq_len = tokens_BT.shape
    positions = np.broadcast_to(np.arange(seq_len, dtype=np.int32), (batch, seq_len))

    @jax.jit
    def run(params):
        return model.hidden(params, tokens_BT, np.ones_like(positions), positions).x @ model.head(params)

    return np.asarray(run(params))[..., : model.vocab_size]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers(family):
    model = in_float32(GOLDEN / family)
    params = hf.load(str(GOLDEN / family), model, ONE_DEVICE)
    expected = np.load(GOLDEN / family / "expected.npz")
    got = logits(model, params, expected["tokens"])
    np.testing.assert_allclose(got, expected["logits"], rtol=0, atol=2e-5 * np.abs(expected["logits"]).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_a_round_trip_changes_no_bit_and_no_setting(family, tmp_path):
    model = in_float32(GOLDEN / family)
    hf.export(hf.load(str(GOLDEN / family), model, ONE_DEVICE), model, str(tmp_path), dtype="float32")
    before, after = (load_file(folder / "model.safetensors") for folder in (GOLDEN / family, tmp_path))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name], err_msg=name)
    config, vocab_size = hf.config(str(tmp_path))
    original, original_size = hf.config(str(GOLDEN / family))
    original.head_dim = original.resolved_head_dim
    assert (config, vocab_size) == (original, original_size)
    architecture = json.loads((GOLDEN / family / "config.json").read_text())["architectures"]
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == architecture


@pytest.mark.parametrize("mesh", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_every_mesh_loads_the_same_parameters_as_shards(mesh):
    folder = GOLDEN / "llama2"
    whole = hf.load(str(folder), in_float32(folder), ONE_DEVICE)
    built = sharding.MeshConfig(**mesh).build()
    model = in_float32(folder, built)
    shardings = sharding.tree_shardings(built, model.axes)
    params = hf.load(str(folder), model, shardings)
    jax.tree.map(lambda a, s: pytest.fail(f"{a.sharding}") if a.sharding != s else None, params, shardings)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(whole))


def test_padding_rows_of_the_vocabulary_are_zero_and_are_not_exported(tmp_path):
    model = in_float32(GOLDEN / "llama2")
    params = hf.load(str(GOLDEN / "llama2"), model, ONE_DEVICE)
    assert params["embedding"].shape == (128, 16)
    assert params["head"].shape == (16, 128)
    assert not np.asarray(params["embedding"])[40:].any()
    assert not np.asarray(params["head"])[:, 40:].any()
    hf.export(params, model, str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    assert saved["lm_head.weight"].shape == (40, 16)
    assert all(array.dtype == ml_dtypes.bfloat16 for array in saved.values())


def test_rows_that_no_id_of_the_tokenizer_uses_are_left_out(caplog):
    caplog.set_level("INFO", "jaxtrain")
    config, _ = hf.config(str(GOLDEN / "llama2"))
    params = hf.load(str(GOLDEN / "llama2"), config.build(33, None), ONE_DEVICE)
    whole = load_file(GOLDEN / "llama2" / "model.safetensors")
    np.testing.assert_array_equal(params["head"][:, :33], whole["lm_head.weight"][:33].T)
    assert not np.any(params["head"][:, 33:])
    assert not np.any(params["embedding"][33:])
    assert "lm_head.weight: 7 rows beyond the vocabulary of 33 are dropped" in caplog.text


@pytest.mark.parametrize("tied", [True, False])
def test_a_width_that_is_also_the_padded_vocabulary(tied, tmp_path):
    config, _ = hf.config(str(GOLDEN / "llama2"))
    model = dataclasses.replace(config, hidden_size=128, tie_embeddings=tied).build(100, None)
    params = jax.tree.map(lambda s: np.random.default_rng(0).standard_normal(s.shape, np.float32), model.shapes)
    params["embedding"][100:] = 0
    if not tied:
        params["head"][:, 100:] = 0
    hf.export(params, model, str(tmp_path), dtype="float32")
    jax.tree.map(np.testing.assert_array_equal, hf.load(str(tmp_path), model, ONE_DEVICE), params)


def test_several_files_with_an_index(tmp_path, monkeypatch):
    monkeypatch.setattr(writing, "SHARD_BYTES", 4000)
    model = in_float32(GOLDEN / "llama2")
    params = hf.load(str(GOLDEN / "llama2"), model, ONE_DEVICE)
    hf.export(params, model, str(tmp_path), dtype="float32")
    index = json.loads((tmp_path / reading.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 2
    assert index["metadata"]["total_size"] == 4 * model.num_params
    again = hf.load(str(tmp_path), model, ONE_DEVICE)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(again), jax.device_get(params))


def test_bfloat16_checkpoints_load_exactly(tmp_path):
    shutil.copytree(GOLDEN / "qwen2", tmp_path, dirs_exist_ok=True)
    arrays = {name: a.astype(ml_dtypes.bfloat16) for name, a in load_file(tmp_path / "model.safetensors").items()}
    save_file(arrays, tmp_path / "model.safetensors")
    params = hf.load(str(tmp_path), in_float32(tmp_path), ONE_DEVICE)
    np.testing.assert_array_equal(params["norm"]["scale"], arrays["model.norm.weight"].astype(np.float32))
    teacher = hf.load(str(tmp_path), in_float32(tmp_path), ONE_DEVICE, dtype="bfloat16")
    assert {leaf.dtype.name for leaf in jax.tree.leaves(teacher)} == {"bfloat16"}


def test_the_spelling_of_transformers_4():
    given = {
        "model_type": "llama",
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "hidden_act": "silu",
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    config, vocab_size = families.from_json(given, "Llama-3.2-1B")
    assert config == LlamaConfig(
        hidden_size=2048,
        intermediate_size=8192,
        num_layers=16,
        num_heads=32,
        num_kv_heads=8,
        head_dim=64,
        max_seq_len=131_072,
        rope_theta=500_000.0,
        rope_scaling=Llama3RopeScaling(factor=32.0),
        tie_embeddings=True,
    )
    assert config.build(vocab_size, None).num_params == 1_235_814_400  # as published


def changed(tmp_path, **changes):
    """llama2's folder with other settings; None removes a setting."""
    shutil.copytree(GOLDEN / "llama2", tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text()) | changes
    (tmp_path / "model" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return str(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "mamba"}, "model_type='mamba' is not supported.*LlamaForCausalLM, MistralForCausalLM"),
        ({"hidden_act": "relu2"}, "hidden_act='relu2' is not supported"),
        ({"rope_parameters": {"rope_type": "longrope", "factor": 4.0}}, "rope_type='longrope'"),
        ({"num_hidden_layers": None}, "lacks num_hidden_layers"),
        ({"model_type": "gemma3_text", "use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ],
)
def test_an_unsupported_config_is_named(changes, message, tmp_path):
    with pytest.raises(UserError, match=message):
        hf.config(changed(tmp_path, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 1}, "has tensors that this model does not: model.layers.1.input_layernorm.weight"),
        ({"num_hidden_layers": 3}, "lacks model.layers.2.input_layernorm.weight, .* and 4 more"),
        ({"vocab_size": 41}, r"model.embed_tokens.weight has shape \(40, 16\), but the model has \(41, 16\)"),
        ({"intermediate_size": 32}, r"mlp.down_proj.weight has shape \(16, 24\), but the model has \(16, 32\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(changes, message, tmp_path):
    folder = changed(tmp_path, **changes)
    with pytest.raises(UserError, match=message):
        hf.load(folder, in_float32(folder), ONE_DEVICE)


def test_a_checkpoint_that_is_not_there_or_not_whole(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        hf.config(str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"has no config\.json"):
        hf.config(str(tmp_path))
    folder = Path(changed(tmp_path))
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="cannot be read"):
        hf.load(str(folder), in_float32(folder), ONE_DEVICE)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="Only safetensors are read"):
        hf.load(str(folder), in_float32(folder), ONE_DEVICE)


def test_a_model_that_no_architecture_expresses_is_refused(tmp_path):
    config, vocab_size = hf.config(str(GOLDEN / "qwen3"))
    config.no_rope_every = 2
    model = config.build(vocab_size, None)
    with pytest.raises(UserError, match="qk_norm=True, no_rope_every=2"):
        hf.export({}, model, str(tmp_path))
    assert not list(tmp_path.iterdir())
