"""Optax transformations as optimizers."""

import jax
import jax.numpy as jnp
import optax
import pytest

from examples.lion import Lion
from jaxtrain.distributed.sharding import is_axes
from jaxtrain.optim.base import decay_mask, from_optax, state_axes
from tests.optim.battery import AXES, Battery, assert_trees_close, run, sample


class TestLion(Battery):
    config = Lion(learning_rate=0.01, weight_decay=0.1)
    wrong_fields = ({"learning_rate": 0.0},)


@pytest.mark.parametrize("given", [optax.adamw(1.0, mask=decay_mask(AXES, False)), None], ids=["built", "function"])
def test_it_is_what_optax_does(given):
    gradients = [sample(1), sample(2)]
    mask = decay_mask(AXES, False)
    params, _ = run(from_optax(given or (lambda rate: optax.adamw(rate, mask=mask))), sample(0), gradients, rate=0.02)
    plain, wanted = optax.adamw(0.02, mask=mask), sample(0)
    state = plain.init(wanted)
    for gradient in gradients:
        updates, state = plain.update(gradient, state, wanted)
        wanted = optax.apply_updates(wanted, updates)
    assert_trees_close(params, wanted, rtol=1e-5, atol=1e-7)


def test_factored_moments_are_sharded_like_what_is_left_of_the_parameter():
    axes = {"up": ("embed", "mlp"), "scale": ("norm",)}
    params = {"up": jnp.zeros((256, 384)), "scale": jnp.zeros(256)}
    optimizer = from_optax(lambda rate: optax.adafactor(rate))
    found = jax.tree.leaves(state_axes(optimizer, axes, params), is_leaf=is_axes)
    shapes = [leaf.shape for leaf in jax.tree.leaves(jax.eval_shape(optimizer.init, params))]
    by_shape = dict(zip(shapes, found, strict=True))
    assert by_shape[(256,)] in (("embed",), ("norm",))
    assert by_shape[(384,)] == ("mlp",)
    assert by_shape[()] == ()
