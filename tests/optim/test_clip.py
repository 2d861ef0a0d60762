import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.optim.clip import clip_by_global_norm, global_norm


def test_norm_is_over_all_leaves_in_fp32():
    big = jnp.full((300, 300), 0.01, jnp.bfloat16)  # summed in bf16, 90,000 squares stop adding at 0.03
    tree = {"a": big, "b": {"c": jnp.array([4.0])}}
    expected = np.sqrt(np.square(np.float64(big)).sum() + 16)
    np.testing.assert_allclose(global_norm(tree), expected, rtol=1e-5)
    assert global_norm(tree).dtype == jnp.float32


@pytest.mark.parametrize(("max_norm", "factor"), [(10.0, 1.0), (5.0, 1.0), (1.0, 0.2)])
def test_scales_down_and_never_up(max_norm, factor):
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0], jnp.bfloat16)}
    clipped, norm = clip_by_global_norm(grads, max_norm)
    assert norm == 5.0
    np.testing.assert_allclose(clipped["a"], 3 * factor, rtol=1e-6)
    np.testing.assert_allclose(np.float32(clipped["b"]), 4 * factor, rtol=2**-8)
    assert clipped["b"].dtype == jnp.bfloat16


def test_zero_and_non_finite():
    clipped, norm = clip_by_global_norm({"a": jnp.zeros(2)}, 1.0)
    assert norm == 0
    assert (np.asarray(clipped["a"]) == 0).all()
    _, norm = clip_by_global_norm({"a": jnp.array([jnp.inf, 1.0])}, 1.0)
    assert not np.isfinite(norm)  # the step skips the update by it
