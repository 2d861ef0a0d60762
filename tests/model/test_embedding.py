"""The lookup whose gradient sums equal tokens in a fixed order: as XLA's, on every kind of mesh."""

import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding

from jaxtrain.distributed.sharding import MeshConfig, sharding, spec
from jaxtrain.model import embedding


@pytest.mark.parametrize(
    "axes", [None, {}, {"data": 2, "tensor": 2}, {"data": 2, "expert": 2, "fsdp": 1, "context": 2}], ids=str
)
def test_the_gradient_is_that_of_a_lookup(axes: dict[str, int] | None) -> None:
    rng = np.random.default_rng(0)
    table_VD = rng.normal(size=(32, 16)).astype(np.float32)
    tokens_BT = rng.choice(30, (8, 24), p=np.arange(30) ** 2 / (np.arange(30) ** 2).sum())  # 0 never occurs
    weights_BTD = rng.normal(size=(8, 24, 16)).astype(np.float32)
    columns = jax.sharding.PartitionSpec(("data", "expert"), "context", "fsdp")
    mesh = None if axes is None else MeshConfig(**axes).build()
    if mesh is not None:
        table_VD = jax.device_put(table_VD, NamedSharding(mesh, spec(("vocab", "embed"))))
        tokens_BT = jax.device_put(tokens_BT, sharding(mesh, ("batch", "sequence")))

    @jax.jit
    def both(table_VD: jax.Array, tokens_BT: jax.Array) -> tuple[jax.Array, jax.Array]:
        def weighted(table_VD: jax.Array) -> tuple[jax.Array, jax.Array]:
            x_BTD = embedding.lookup(table_VD, tokens_BT, mesh, columns)
            return (x_BTD * weights_BTD).sum(), x_BTD

        (_, x_BTD), gradient_VD = jax.value_and_grad(weighted, has_aux=True)(table_VD)
        return x_BTD, gradient_VD

    x_BTD, gradient_VD = jax.device_get(both(table_VD, tokens_BT))
    expected_VD = np.zeros((32, 16))
    np.add.at(expected_VD, np.asarray(tokens_BT), weights_BTD)
    np.testing.assert_array_equal(x_BTD, np.asarray(table_VD)[np.asarray(tokens_BT)])
    np.testing.assert_allclose(gradient_VD, expected_VD, atol=1e-5)
    # Only tokens are sorted, not their rows' elements.
    assert "scatter-add" not in jax.jit(both).lower(table_VD, tokens_BT).as_text()


def test_flags_ask_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=x --xla_gpu_exclude_nondeterministic_ops=true")
    assert embedding.is_wanted("gpu")
    assert not embedding.is_wanted("tpu")
    monkeypatch.setenv("XLA_FLAGS", "")
    assert not embedding.is_wanted("gpu")
