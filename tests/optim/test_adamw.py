"""AdamW against float64 NumPy and torch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.optim.adamw import AdamW
from tests.optim.battery import AXES, Battery, assert_trees_close, run, sample


class TestAdamW(Battery):
    config = AdamW(learning_rate=0.01)


def reference(params, gradients, decays, rate, betas, epsilon, weight_decay):
    """Loshchilov and Hutter, algorithm 2, in float64 (with the decay multiplied by the rate)."""
    first, second = betas
    m = v = 0.0
    params = np.asarray(params, np.float64)
    for t, gradient in enumerate(gradients, start=1):
        gradient = np.asarray(gradient, np.float64)
        m = first * m + (1 - first) * gradient
        v = second * v + (1 - second) * gradient**2
        direction = (m / (1 - first**t)) / (np.sqrt(v / (1 - second**t)) + epsilon)
        params = params - rate * (direction + decays * weight_decay * params)
    return params


def expected_mask(embedding):
    matrix, vector = True, False
    return {
        "embedding": embedding,
        "head": matrix,
        "norm": {"scale": vector},
        "layers": {
            "norm": {"scale": vector},
            "query": {"kernel": matrix, "bias": vector},
            "out": {"kernel": matrix},
            "up": matrix,
            "down": matrix,
            "experts": {"up": matrix, "down": matrix, "router": matrix},
        },
    }


@pytest.mark.parametrize("decay_embeddings", [False, True])
def test_equals_float64(decay_embeddings):
    config = AdamW(betas=(0.8, 0.9), epsilon=1e-3, weight_decay=0.3, decay_embeddings=decay_embeddings)
    gradients = [sample(seed) for seed in range(1, 9)]
    params, state = run(config.build(AXES), sample(0), gradients, rate=0.02)
    expected = jax.tree.map(
        lambda decays, p, *g: reference(p, g, decays, 0.02, (0.8, 0.9), 1e-3, 0.3),
        expected_mask(decay_embeddings),
        sample(0),
        *gradients,
    )
    assert_trees_close(params, expected, rtol=1e-5, atol=1e-6)
    assert state.count == 8


def test_without_decay_of_a_plain_1d_array():
    """Stacked [L, D] norms are two-dimensional arrays but not matrices: their decay would show here."""
    params, _ = run(AdamW(weight_decay=100.0).build(AXES), sample(0), [sample(1, scale=0.0)])
    unchanged = jax.tree.map(lambda a, b: bool((np.asarray(a) == b).all()), params, sample(0))
    assert unchanged == jax.tree.map(lambda decays: not decays, expected_mask(False))


@pytest.mark.parity
def test_equals_torch():
    torch = pytest.importorskip("torch")
    gradients = [sample(seed)["layers"]["up"] for seed in range(1, 6)]
    parameter = torch.nn.Parameter(torch.tensor(np.array(sample(0)["layers"]["up"])))
    optimizer = torch.optim.AdamW([parameter], lr=0.02, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for gradient in gradients:
        parameter.grad = torch.tensor(np.array(gradient))
        optimizer.step()
    axes = {"up": AXES["layers"]["up"]}
    params, _ = run(AdamW().build(axes), {"up": sample(0)["layers"]["up"]}, [{"up": g} for g in gradients], 0.02)
    np.testing.assert_allclose(params["up"], jnp.asarray(parameter.detach().numpy()), rtol=1e-5, atol=1e-6)
