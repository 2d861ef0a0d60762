"""Width transfer: what it changes, and that exports hold the same function."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from examples.gpt2 import GPT2Config
from jaxtrain.errors import UserError
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.optim import base
from jaxtrain.optim.adamw import AdamW
from jaxtrain.optim.directions import Adafactor, Adan, Lion, Signum
from jaxtrain.optim.muon import Muon
from jaxtrain.optim.schedule_free import ScheduleFreeAdamW
from tests.optim.battery import AXES, run, sample

PLAIN = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_layers=2, num_heads=4, num_kv_heads=2, dtype="float32", remat="none"
)
WIDE = dataclasses.replace(PLAIN, width_transfer="mup", base_width=16, base_head_dim=4)
RATIO = 4
KEY = jax.random.key(0)


def logits(model, params):
    tokens = np.random.default_rng(0).integers(0, 50, (2, 12)).astype(np.int32)
    where = np.broadcast_to(np.arange(12, dtype=np.int32), tokens.shape)
    return model.hidden(params, tokens, np.ones_like(tokens), where).x @ model.head(params)


def test_at_the_base_width_nothing_changes():
    plain = PLAIN.build(50, None)
    same = dataclasses.replace(PLAIN, width_transfer="mup", base_width=64, base_head_dim=16).build(50, None)
    params = plain.init(KEY)
    jax.tree.map(np.testing.assert_array_equal, same.init(KEY), params)
    np.testing.assert_array_equal(logits(same, params), logits(plain, params))


def test_matrices_of_layers_begin_smaller():
    plain, wide = (config.build(50, None).init(KEY) for config in (PLAIN, WIDE))
    expected = jax.tree.map(lambda leaf: leaf, plain)
    for module in ("attention", "mlp"):
        expected["layers"][module] = jax.tree.map(lambda leaf: leaf / RATIO**0.5, plain["layers"][module])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), wide, expected)


def test_logits_and_attention_have_multipliers():
    """Against the plain model with the multipliers in its head and queries."""
    wide, plain = WIDE.build(50, None), PLAIN.build(50, None)
    params = wide.init(KEY)
    scaled = jax.tree.map(lambda leaf: leaf, params)
    scaled["head"] = params["head"] / RATIO
    scaled["layers"]["attention"]["q"]["kernel"] = params["layers"]["attention"]["q"]["kernel"] * (4 / 16) ** 0.5
    np.testing.assert_allclose(logits(wide, params), logits(plain, scaled), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "changes",
    [
        {"tie_embeddings": True, "attention_bias": True, "norm": "layer"},
        {"qk_norm": True, "norm": "rms_plus_one", "final_logit_softcapping": 3.0},
    ],
    ids=str,
)
def test_an_export_is_the_same_function(changes):
    wide = dataclasses.replace(WIDE, initializer_std=0.5, **changes).build(50, None)
    params = jax.tree.map(lambda leaf: leaf + 0.1, wide.init(KEY))
    kept = jax.tree.map(jnp.copy, params)
    plain, folded = wide.without_width_transfer(params)
    assert (plain.config.width_transfer, plain.width_ratio) == ("none", 1)
    np.testing.assert_allclose(logits(plain, folded), logits(wide, params), rtol=1e-4, atol=1e-5)
    jax.tree.map(np.testing.assert_array_equal, params, kept)


MATRICES = base.rate_scales(AXES, 2.0)


@pytest.mark.parametrize(
    ("config", "power"),
    [(AdamW(), 1), (Lion(), 1), (Signum(), 1), (Adan(), 1), (ScheduleFreeAdamW(), 1), (Muon(), 0.5)],
    ids=lambda value: type(value).__name__,
)
def test_matrices_of_layers_move_less(config, power):
    """The decay does not change."""
    config = dataclasses.replace(config, weight_decay=0.0)
    gradients = [sample(1), sample(2)]
    before = sample(0)
    plain, _ = run(config.build(AXES), before, gradients)
    wide, _ = run(config.build_scaled(AXES, None, RATIO), before, gradients)
    jax.tree.map(
        lambda a, b, p, scale: np.testing.assert_allclose(
            a - p, (b - p) * (RATIO**-power if scale == 2 else 1), rtol=1e-3, atol=1e-6
        ),
        wide,
        plain,
        before,
        MATRICES,
    )
    decaying = dataclasses.replace(config, weight_decay=0.3)
    decayed, _ = run(decaying.build_scaled(AXES, None, RATIO), before, [sample(1, scale=0.0)])
    up = before["layers"]["up"]
    np.testing.assert_allclose(decayed["layers"]["up"], up * (1 - 0.01 * 0.3), rtol=1e-6)


def test_who_has_no_rule():
    wide = WIDE.build(50, None)
    with pytest.raises(UserError, match="no rule for Adafactor"):
        base.built(Adafactor(), wide, None)
    assert base.built(Adafactor(), PLAIN.build(50, None), None)

    class Mine:
        learning_rate = 1.0

    with pytest.raises(UserError, match="`build_scaled`, which Mine lacks"):
        base.built(Mine(), wide, None)  # type: ignore[arg-type]
    assert base.built(AdamW(), GPT2Config(hidden_size=32, num_layers=1, num_heads=2).build(50, None), None)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width_transfer": "mup"}, "needs base_width"),
        ({"width_transfer": "mup", "base_width": 32, "scale_embeddings": True}, "factor grows with the width"),
        ({"base_width": 32}, "base_width=32 and base_head_dim=None do nothing"),
        ({"width_transfer": "mu", "base_width": 32}, "width_transfer='mu' is not known. Use one of: none, mup"),
        ({"width_transfer": "mup", "base_width": 0}, "base_width=0: it must be from 1"),
    ],
)
def test_wrong_settings(changes, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(PLAIN, **changes).check()
