"""Rotary positions against multiplication by complex numbers in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.model import rope


@pytest.mark.parametrize("form", [rope._rotate_heads, rope._rotate_halves, None], ids=["heads", "halves", "rotate"])
def test_rotation_and_its_gradient(form):
    """Each platform has one of the forms."""
    rng = np.random.default_rng(0)
    x, dx = (rng.standard_normal((2, 5, 3, 8)) for _ in range(2))
    positions = np.stack([np.arange(5), np.arange(5) + 300])
    frequencies = rope.frequencies(8, 10_000.0, None)
    turn = np.exp(1j * positions[:, :, None, None] * frequencies)

    def turned(x: np.ndarray, by: np.ndarray) -> np.ndarray:
        made = (x[..., :4] + 1j * x[..., 4:]) * by
        return np.concatenate([made.real, made.imag], axis=-1)

    cos, sin = rope.tables(jnp.asarray(positions), frequencies, jnp.dtype("float32"))

    def rotate(x: jax.Array) -> jax.Array:
        return rope.rotate(x, cos, sin) if form is None else form(x, cos[:, :, None], sin[:, :, None])

    y, pull = jax.vjp(rotate, jnp.asarray(x, jnp.float32))
    # fp32 angles of up to 304 radians.
    np.testing.assert_allclose(y, turned(x, turn), rtol=0, atol=1e-4)
    np.testing.assert_allclose(pull(jnp.asarray(dx, jnp.float32))[0], turned(dx, turn.conj()), rtol=0, atol=1e-4)
