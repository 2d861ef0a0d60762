import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from jaxtrain.distributed.sharding import (
    MESH_AXES,
    MeshConfig,
    _arrange,
    batch_sharding,
    check_divides,
    constrain,
    replicated,
    sharding,
    tree_shardings,
)
from jaxtrain.errors import UserError


@pytest.mark.parametrize(
    ("config", "sizes"),
    [
        (MeshConfig(), (1, 8, 1, 1, 1)),
        (MeshConfig(data=2), (2, 4, 1, 1, 1)),
        (MeshConfig(data=-1, fsdp=1, tensor=2), (4, 1, 1, 2, 1)),
        (MeshConfig(data=1, fsdp=2, tensor=2, context=-1), (1, 2, 1, 2, 2)),
        (MeshConfig(data=2, fsdp=2, tensor=2), (2, 2, 1, 2, 1)),
    ],
)
def test_one_axis_is_filled(config, sizes):
    mesh = config.build()
    assert mesh.axis_names == MESH_AXES
    assert mesh.devices.shape == sizes
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert set(mesh.devices.flat) == set(jax.devices())


def test_devices_can_be_given():
    assert MeshConfig().build(jax.devices()[:3]).devices.shape == (1, 3, 1, 1, 1)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (MeshConfig(data=3), "data=3 .* does not divide the number of devices, 8.* mesh.data may be 1, 2, 4, 8"),
        (MeshConfig(data=2, fsdp=3), "data=2 x fsdp=3 .* = 6 is not the number of devices, 8.* mesh.fsdp may be 4"),
        (MeshConfig(data=3, tensor=3), "= 9 does not divide .* multiply to 1, 2, 4, 8"),
        (MeshConfig(fsdp=4), "= 4 is not the number of devices, 8.* mesh.fsdp may be 8"),
        (MeshConfig(data=-1), "mesh.data and mesh.fsdp are -1"),
        (MeshConfig(tensor=0), "mesh.tensor=0"),
        (MeshConfig(context=-2), "mesh.context=-2"),
    ],
)
def test_refuses_sizes_that_do_not_fit(config, message):
    with pytest.raises(UserError, match=message):
        config.build()


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    id: int
    process_index: int
    platform: str = "gpu"
    device_kind: str = "fake"
    slice_index: int = 0
    coords: tuple[int, int, int] = (0, 0, 0)
    core_on_chip: int = 0


@pytest.mark.parametrize("tensor", [2, 4])
def test_tensor_stays_inside_a_host(tensor):
    hosts, per_host = 3, 4
    devices = [FakeDevice(id=i, process_index=i // per_host) for i in range(hosts * per_host)]
    devices = [devices[i] for i in np.random.default_rng(0).permutation(len(devices))]
    array = _arrange((hosts, per_host // tensor, 1, tensor, 1), devices)
    for block in array.reshape(-1, tensor):
        assert len({device.process_index for device in block}) == 1
    for host in array:
        assert len({device.process_index for device in host.flat}) == 1


def test_context_is_further_apart_than_tensor():
    devices = [FakeDevice(id=i, process_index=i // 2) for i in range(8)]
    array = _arrange((1, 2, 1, 2, 2), devices)
    assert len({device.process_index for device in array[0, 0, 0, :, 0]}) == 1
    assert len({device.process_index for device in array[0, 0, 0, 0, :]}) == 2


def test_experts_are_nearer_than_fsdp():
    devices = [FakeDevice(id=i, process_index=i // 4) for i in range(8)]
    array = _arrange((1, 2, 4, 1, 1), devices)
    for host in array[0]:
        assert len({device.process_index for device in host.flat}) == 1


def slices_of_tpu(slices, side=2):
    coords = [(x, y, 0) for y in range(side) for x in range(side)]
    return [
        FakeDevice(id=s * side**2 + i, process_index=s, platform="tpu", device_kind="fake", slice_index=s, coords=c)
        for s in range(slices)
        for i, c in enumerate(coords)
    ]


@pytest.mark.parametrize(("data", "fsdp"), [(2, 2), (1, 4), (4, 1)])
def test_tpu_slices_are_split_by_data_then_fsdp(data, fsdp):
    array = _arrange((data, fsdp, 1, 2, 1), slices_of_tpu(2))
    assert array.shape == (data, fsdp, 1, 2, 1)
    for pair in array.reshape(-1, 2):
        assert len({device.slice_index for device in pair}) == 1
    halves = array.reshape(2, 4)
    assert [{device.slice_index for device in half} for half in halves] == [{0}, {1}]


@pytest.mark.parametrize("slices", [1, 2])
def test_an_axis_may_take_a_part_of_a_slice_side(slices):
    """8 is no product of the sides 4 and 4."""
    array = _arrange((2 * slices, 8, 1, 1, 1), slices_of_tpu(slices, side=4))
    assert len({device.id for device in array.flat}) == 16 * slices
    for group in array.reshape(-1, 8):  # a rectangle
        assert len({device.slice_index for device in group}) == 1
        assert len({d.coords[0] for d in group}) * len({d.coords[1] for d in group}) == 8


def test_refuses_tensor_across_tpu_slices():
    with pytest.raises(UserError, match="2 TPU slices"):
        _arrange((1, 1, 1, 8, 1), slices_of_tpu(2))


def test_logical_axes():
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    assert sharding(mesh, ("layers", "embed", "mlp")).spec == PartitionSpec(None, "fsdp", "tensor")
    assert sharding(mesh, ("vocab", "embed")).spec == PartitionSpec("tensor", "fsdp")
    assert sharding(mesh, ("batch", "sequence", "activation_embed")).spec == PartitionSpec(
        ("data", "expert", "fsdp"), "context", None
    )
    assert batch_sharding(mesh).spec == PartitionSpec(("data", "expert", "fsdp"), "context")
    assert replicated(mesh).spec == PartitionSpec()
    with pytest.raises(KeyError):
        sharding(mesh, ("embd",))


def test_trees_of_axes():
    mesh = MeshConfig().build()
    shardings = tree_shardings(mesh, {"a": {"w": ("embed", "mlp"), "step": ()}, "norm": (None,)})
    assert jax.tree.map(lambda s: s.spec, shardings) == {
        "a": {"w": PartitionSpec("fsdp", "tensor"), "step": PartitionSpec()},
        "norm": PartitionSpec(None),
    }


def test_constrain():
    x = jnp.zeros((8, 4, 6))
    assert constrain(x, None, ("batch", "sequence", "activation_embed")) is x
    mesh = MeshConfig(data=2, fsdp=2, tensor=2).build()
    y = jax.jit(lambda x: constrain(x + 1, mesh, ("batch", None, "activation_mlp")))(x)
    assert y.sharding.is_equivalent_to(sharding(mesh, ("batch", None, "activation_mlp")), 3)


def test_check_divides():
    mesh = MeshConfig(data=1, fsdp=4, tensor=2).build()
    axes = {"layers": {"up": ("layers", "embed", "mlp")}, "tokens": ("batch", None)}
    shapes = {
        "layers": {"up": jax.ShapeDtypeStruct((3, 8, 6), jnp.float32)},
        "tokens": jax.ShapeDtypeStruct((4, 7), jnp.int32),
    }
    check_divides(mesh, axes, shapes)
    shapes["layers"]["up"] = jax.ShapeDtypeStruct((3, 6, 6), jnp.float32)
    message = "layers/up has shape (3, 6, 6): its dimension 1 ('embed', 6) is not divisible by mesh.fsdp = 4"
    with pytest.raises(UserError, match=re.escape(message) + ".* work: 1, 2, 3, 6"):
        check_divides(mesh, axes, shapes)
    shapes["layers"]["up"] = jax.ShapeDtypeStruct((3, 8, 6), jnp.float32)
    shapes["tokens"] = jax.ShapeDtypeStruct((6, 7), jnp.int32)
    with pytest.raises(UserError, match=r"mesh.data \* mesh.expert \* mesh.fsdp = 4"):
        check_divides(mesh, axes, shapes)
