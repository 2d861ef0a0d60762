"""Schedule-free AdamW against optax's, which keeps other sequences of the same algorithm."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import schedule_free, schedule_free_eval_params

from jaxtrain.interfaces import AveragingOptimizer
from jaxtrain.optim.adamw import AdamW
from jaxtrain.optim.base import decay_mask
from jaxtrain.optim.schedule_free import ScheduleFreeAdamW
from tests.optim.battery import AXES, Battery, assert_trees_close, sample


class TestScheduleFreeAdamW(Battery):
    config = ScheduleFreeAdamW(learning_rate=0.01)


def test_equals_optax():
    """Parameters are optax's for evaluation, and gradients are taken at optax's own."""
    mask = decay_mask(AXES, decay_embeddings=False)
    config = ScheduleFreeAdamW(betas=(0.8, 0.9), epsilon=1e-3, weight_decay=0.3)
    optimizer, params = config.build(AXES), sample(0)
    assert isinstance(optimizer, AveragingOptimizer)
    assert not isinstance(AdamW().build(AXES), AveragingOptimizer)
    rates = [0.01, 0.03, 0.02, 0.02]  # a warmup, then lower: the weights are the largest so far
    plain = optax.chain(
        optax.scale_by_rms(0.9, 1e-3, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(0.3, mask),
        optax.scale_by_learning_rate(lambda count: jnp.array(rates)[count]),
    )
    theirs = schedule_free(plain, lambda count: jnp.array(rates)[count - 1], b1=0.8)
    state, their_params = jax.jit(optimizer.init)(params), sample(0)
    their_state, their_update = theirs.init(their_params), jax.jit(theirs.update)
    for seed, rate in enumerate(rates, start=1):
        params, state = jax.jit(optimizer.update)(sample(seed), state, params, jnp.float32(rate))
        updates, their_state = their_update(sample(seed), their_state, their_params)
        their_params = optax.apply_updates(their_params, updates)
        assert_trees_close(params, schedule_free_eval_params(their_state, their_params), rtol=1e-4, atol=1e-5)
        assert_trees_close(optimizer.gradient_at(params, state), their_params, rtol=1e-4, atol=1e-5)


def test_with_equal_rates_it_is_the_mean_of_all_iterates():
    optimizer, params = ScheduleFreeAdamW().build(AXES), sample(0)
    state, seen, update = optimizer.init(params), [], jax.jit(optimizer.update)
    for seed in range(1, 5):
        params, state = update(sample(seed), state, params, jnp.float32(0.1))
        seen.append(state.z)
    mean = jax.tree.map(lambda *z: np.mean(z, axis=0), *seen)
    assert_trees_close(params, mean, rtol=1e-5, atol=1e-6)
