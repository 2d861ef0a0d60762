"""transformers itself, on the machine: random models of every family read, and exported ones loaded by it."""

import jax
import numpy as np
import pytest

from jaxtrain import hf
from tests.hf.test_hf import FAMILIES, ONE_DEVICE, in_float32, logits

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
