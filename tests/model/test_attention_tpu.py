"""The TPU kernel compiled for real TPUs, on any machine that has libtpu (not a dependency)."""

import jax
import jax.numpy as jnp
import pytest

from jaxtrain.distributed.sharding import MeshConfig, sharding
from jaxtrain.model.attention import attend


@pytest.mark.nightly
@pytest.mark.parametrize("window", [None, 300])
def test_splash_compiles_for_a_tpu_mesh(window, monkeypatch):
    pytest.importorskip("libtpu")
    from jax.experimental import topologies

    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # another worker may compile for one, too
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = MeshConfig(fsdp=2, tensor=2).build(devices)

    def on_mesh(shape, dtype, axes):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, axes))

    heads = ("batch", None, "activation_heads", None)
    q = on_mesh((4, 1024, 8, 128), jnp.bfloat16, heads)
    k = on_mesh((4, 1024, 2, 128), jnp.bfloat16, heads)
    segment_ids = on_mesh((4, 1024), jnp.int32, ("batch", None))

    def loss(q, k, v, segment_ids):
        x = attend(q, k, v, segment_ids, mesh=mesh, implementation="splash", sliding_window=window)
        return x.astype(jnp.float32).sum()

    text = str(jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, k, segment_ids).compile().as_text())
    assert text.count("tpu_custom_call") == 2  # forward, and one kernel backward for dq, dk and dv
    assert "all-gather" not in text
