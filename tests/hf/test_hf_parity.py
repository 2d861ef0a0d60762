"""Against transformers itself: random models of every family are read, and exported ones are loaded by it."""

import json

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxtrain import hf
from jaxtrain.losses.cross_entropy import CrossEntropy
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer
from tests.hf.test_checkpoints import READ
from tests.hf.test_export import chat_model, sentencepiece_model
from tests.hf.test_hf import FAMILIES, GOLDEN, ONE_DEVICE, in_float32, logits

pytestmark = pytest.mark.parity
torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Larger than the golden ones: several attention blocks, a window shorter than the row.
SIZES = {"vocab_size": 200, "hidden_size": 48, "intermediate_size": 80}


@pytest.fixture(scope="module")
def make_llama():
    from tests.golden import make_llama

    return make_llama


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_equal_within_rounding(family, make_llama, tmp_path):
    theirs = make_llama.random_model(family, seed=1, **SIZES)
    theirs.save_pretrained(tmp_path)
    tokens = np.random.default_rng(1).integers(0, 200, (2, 150)).astype(np.int32)
    model = in_float32(tmp_path)
    got = logits(model, hf.load(str(tmp_path), model, ONE_DEVICE), tokens)
    want = make_llama.logits(theirs, tokens)
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("family", FAMILIES)
def test_transformers_loads_an_export_with_the_same_logits(family, make_llama, tmp_path):
    model = in_float32(f"tests/golden/{family}")
    params = jax.tree.map(lambda a: a + 0.1, hf.load(f"tests/golden/{family}", model, ONE_DEVICE))
    hf.export(params, model, str(tmp_path), dtype="float32")
    tokens = np.random.default_rng(1).integers(0, 40, (2, 20)).astype(np.int32)
    theirs, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values())
    assert next(theirs.parameters()).dtype == torch.float32
    want = make_llama.logits(theirs, tokens)
    np.testing.assert_allclose(logits(model, params, tokens), want, rtol=0, atol=2e-5 * np.abs(want).max())


def test_gradients_are_those_of_transformers(make_llama, tmp_path):
    """Of the mean cross-entropy, for the family with the most parts."""
    theirs = make_llama.random_model("gemma2", seed=1, **SIZES)
    theirs.save_pretrained(tmp_path)
    tokens = np.random.default_rng(1).integers(0, 200, (2, 150)).astype(np.int32)
    theirs(torch.tensor(tokens).long(), labels=torch.tensor(tokens).long()).loss.backward()
    model = in_float32(tmp_path)
    positions = np.broadcast_to(np.arange(150, dtype=np.int32), tokens.shape)
    loss = CrossEntropy().build(200, None)
    mask = positions < 149
    hidden = jax.jit(model.hidden)

    def mean(params):
        x = hidden(params, tokens, np.ones_like(tokens), positions).x
        return loss(x, model.head(params), np.roll(tokens, -1, axis=1), mask)["loss"] / mask.sum()

    grads = jax.jit(jax.grad(mean))(hf.load(str(tmp_path), model, ONE_DEVICE))
    hf.export(grads, model, str(tmp_path / "grads"), dtype="float32")
    got = load_file(tmp_path / "grads" / "model.safetensors")
    want = {name: parameter.grad.numpy() for name, parameter in theirs.named_parameters()}
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-4 * np.abs(want[name]).max(), err_msg=name)


TINY = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
    "torch_dtype": "float32",
}


def with_head_of_its_own(arrays):
    return arrays | {"lm_head.weight": np.roll(arrays["model.embed_tokens.weight"], 1, 0).copy()}


def as_saved(arrays):
    """GPT-NeoX's head has another name in files than in the module."""
    return {name.replace("lm_head", "embed_out"): array for name, array in arrays.items()}


def with_copied_head(arrays):
    return arrays | {"lm_head.weight": arrays["model.embed_tokens.weight"].copy()}


@pytest.mark.parametrize(
    ("changes", "tensors"),
    [
        *((changes, as_saved if changes.get("model_type") == "gpt_neox" else None) for changes, _ in READ),
        ({"tie_word_embeddings": True}, with_head_of_its_own),
        ({"tie_word_embeddings": True}, with_copied_head),
        ({"tie_word_embeddings": True, "model_type": "qwen2"}, with_head_of_its_own),
        ({"model_type": "smollm3"}, with_head_of_its_own),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_every_spelling_means_what_it_means_to_transformers(changes, tensors, tmp_path):
    """The same config.json and tensors, read by both."""
    given = TINY | {"model_type": "llama"} | changes
    (tmp_path / "config.json").write_text(json.dumps(given))
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    arrays = {
        name: tensor.numpy().astype(np.float32) * (1 if "norm" in name else 12)
        for name, tensor in transformers.AutoModelForCausalLM.from_config(config).state_dict().items()
    }
    if given.get("tie_word_embeddings", given["model_type"] == "smollm3"):
        arrays.pop("lm_head.weight")
    arrays = tensors(arrays) if tensors else arrays
    save_file(arrays, tmp_path / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = np.random.default_rng(1).integers(0, 40, (2, 60)).astype(np.int32)
    model = in_float32(tmp_path)
    got = logits(model, hf.load(str(tmp_path), model, ONE_DEVICE), tokens)
    with torch.no_grad():
        want = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * np.abs(want).max())


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("kind", ["adds", "omits", "sentencepiece"])
def test_an_exported_tokenizer_adds_what_training_added(kind, add_bos, tmp_path):
    """Not what the original files asked for."""
    source = sentencepiece_model(tmp_path) if kind == "sentencepiece" else chat_model(tmp_path, kind == "adds")
    tokenizer = HuggingFaceTokenizer(name=str(source)).build("")
    model = in_float32(GOLDEN / "llama2")
    model.vocab_size = 40
    hf.export(
        hf.load(str(GOLDEN / "llama2"), model, ONE_DEVICE),
        model,
        str(tmp_path / "out"),
        tokenizer=tokenizer,
        add_bos=add_bos,
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "first half second"
    assert theirs(text)["input_ids"] == [tokenizer.bos_id] * add_bos + tokenizer.encode_batch([text])[0].tolist()
    assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode_batch([text])[0].tolist()
    assert (theirs.bos_token_id, theirs.eos_token_id) == (tokenizer.bos_id, tokenizer.eos_id)
    generation = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    if kind != "sentencepiece":
        assert (generation.eos_token_id, generation.temperature, generation.top_p) == ([2, 3], 0.6, 0.9)
