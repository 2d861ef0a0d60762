"""Lion, Signum, Adan and Adafactor against optax's own.

The battery is slow here; tests/optim/test_from_optax.py has Lion's in the default tier.
"""

import jax
import optax
import pytest

from jaxtrain.optim.base import decay_mask
from jaxtrain.optim.directions import Adafactor, Adan, Lion, Signum
from tests.optim.battery import AXES, Battery, assert_trees_close, run, sample


@pytest.mark.slow
class TestLion(Battery):
    config = Lion(learning_rate=0.01, weight_decay=0.1)
    wrong_fields = ({"learning_rate": 0.0}, {"weight_decay": -0.1}, {"betas": (0.9, 1.0)})


@pytest.mark.slow
class TestSignum(Battery):
    config = Signum(learning_rate=0.01, weight_decay=0.1)
    wrong_fields = ({"learning_rate": 0.0}, {"weight_decay": -0.1}, {"momentum": 1.0})


@pytest.mark.slow
class TestAdan(Battery):
    config = Adan(learning_rate=0.01)
    wrong_fields = (*Battery.wrong_fields[:2], {"betas": (0.9, 0.9, 1.0)}, {"epsilon": 0.0})


@pytest.mark.slow
class TestAdafactor(Battery):
    config = Adafactor(min_dim_size_to_factor=8, momentum=0.5, weight_decay=0.1)
    unused_size = 1
    wrong_fields = (
        *Battery.wrong_fields[:2],
        {"decay_rate": 1.0},
        {"momentum": 1.0},
        {"clipping_threshold": 0.0},
        {"min_dim_size_to_factor": 1},
    )


RATE, MASK = 0.02, decay_mask(AXES, decay_embeddings=True)


@pytest.mark.parametrize(
    ("config", "reference"),
    [
        (Lion(), optax.lion(RATE, 0.9, 0.99, weight_decay=1.0, mask=MASK)),
        (Adan(), optax.adan(RATE, eps_root=0.0, weight_decay=0.02, mask=MASK)),
        # Optax's decay of Adafactor is not multiplied by the rate.
        (
            Adafactor(min_dim_size_to_factor=8, weight_decay=0.3),
            optax.adafactor(RATE, 8, weight_decay_rate=RATE * 0.3, weight_decay_mask=MASK),
        ),
        (
            Adafactor(clipping_threshold=None, relative=False, momentum=0.9),
            optax.adafactor(RATE, 128, 0.8, 0, False, None, 0.9),
        ),
        (Signum(momentum=0.8, weight_decay=0.0), optax.signum(RATE, 0.8)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_equals_optax(config, reference):
    gradients = [sample(seed) for seed in range(1, 4)]
    config.decay_embeddings = True
    params, _ = run(config.build(AXES), sample(0), gradients, rate=RATE)
    wanted, update = sample(0), jax.jit(reference.update)
    state = reference.init(wanted)
    for gradient in gradients:
        updates, state = update(gradient, state, wanted)
        wanted = optax.apply_updates(wanted, updates)
    assert_trees_close(params, wanted, rtol=1e-5, atol=1e-6)
