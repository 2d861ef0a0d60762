"""The device mesh, and the one table that maps logical axes to mesh axes.

Parameters and activations name their dimensions ("embed", "mlp", "batch"); `RULES` says which mesh axes split them.
The mesh is in Auto mode: shardings are pinned where they matter (parameters, optimizer state, batches, some
activations) and XLA chooses the rest, which behaves the same on every supported JAX version.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxtrain import cli
from jaxtrain.distributed import processes
from jaxtrain.errors import UserError

Device = Any  # jax.Device; a variable to type checkers, or a stand-in from a compile-only topology
Axes = tuple[str | None, ...]  # the logical axis of each dimension of an array

MESH_AXES = ("data", "fsdp", "expert", "tensor", "context")
# Rows of the batch. `fsdp` comes last, so that its group holds consecutive rows (`Llama._embed`).
BATCH_MESH_AXES = ("data", "expert", "fsdp")

RULES: dict[str, str | tuple[str, ...] | None] = {
    # activations
    "batch": BATCH_MESH_AXES,
    "sequence": "context",
    "activation_embed": None,
    "activation_mlp": "tensor",
    "activation_heads": "tensor",
    # parameters
    "embed": "fsdp",
    "mlp": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "vocab": "tensor",
    "experts": "expert",
    "router": None,
    "layers": None,
    "head_dim": None,
    "norm": None,
}


@dataclasses.dataclass(kw_only=True)
class MeshConfig:
    """How many ways each kind of parallelism splits the work. The product is the number of devices.

    At most one size may be -1: it takes all devices that the others leave.

    Attributes:
        data: Copies of the parameters, each with its own rows of the batch.
        fsdp: Shards of the parameters and optimizer state (ZeRO-3), each with its own rows of the batch.
        expert: Shards of the experts, each with its own rows of the batch, whose tokens it sends to the experts that
            they chose. All other parameters are copied along it, as along `data`.
        tensor: Shards of heads, MLP width and vocabulary; adjacent devices, so that they share a host.
        context: Shards of the sequence.
    """

    data: int = 1
    fsdp: int = -1
    expert: int = dataclasses.field(default=1, metadata={cli.BEFORE: 1})
    tensor: int = 1
    context: int = 1

    def check(self) -> None:
        for axis in MESH_AXES:
            size = getattr(self, axis)
            if size != -1 and size < 1:
                raise UserError(f"mesh.{axis}={size}: a mesh axis has a size of at least 1; -1 fills it automatically.")
        automatic = [axis for axis in MESH_AXES if getattr(self, axis) == -1]
        if len(automatic) > 1:
            raise UserError(f"mesh.{' and mesh.'.join(automatic)} are -1: only one axis can be filled automatically.")

    def sizes(self, num_devices: int) -> tuple[int, ...]:
        """Sizes of MESH_AXES with -1 filled in.

        Raises:
            UserError: They do not multiply to `num_devices`.
        """
        self.check()
        sizes = {axis: getattr(self, axis) for axis in MESH_AXES}
        fixed = {axis: size for axis, size in sizes.items() if size != -1}
        product = math.prod(fixed.values())
        automatic = [axis for axis in MESH_AXES if axis not in fixed]
        if num_devices % product if automatic else num_devices != product:
            raise UserError(_size_message(fixed, automatic, num_devices))
        return tuple(sizes[axis] if axis in fixed else num_devices // product for axis in MESH_AXES)

    def build(self, devices: Sequence[Device] | None = None) -> Mesh:
        """The mesh over `devices` (by default all of the run), with axes MESH_AXES, all Auto.

        Raises:
            UserError: The sizes do not fit the number of devices; the message names the axis and sizes that work.
        """
        devices = list(processes.devices() if devices is None else devices)
        return Mesh(
            _arrange(self.sizes(len(devices)), devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)
        )


@dataclasses.dataclass(kw_only=True)
class AutoMesh(MeshConfig):
    """`mesh=auto`: the trainer and the tools that plan choose the mesh (trainer/meshes.py). Elsewhere all is `fsdp`.

    A size that is set makes it an ordinary mesh.
    """


def _size_message(fixed: dict[str, int], automatic: list[str], num_devices: int) -> str:
    product = math.prod(fixed.values())
    asked = " x ".join(f"{axis}={size}" for axis, size in fixed.items())
    fixes = []
    for axis, size in fixed.items():
        others = product // size
        if size > 1 and num_devices % others == 0:
            works = divisors(num_devices // others) if automatic else [num_devices // others]
            fixes.append(f"With the others unchanged mesh.{axis} may be {', '.join(map(str, works))}")
    if not automatic or not fixes:
        works = ", ".join(map(str, divisors(num_devices)))
        fixes.append(f"With one axis at -1 the others may multiply to {works}")
    verb = "does not divide" if automatic else "is not"
    return f"mesh {asked} = {product} {verb} the number of devices, {num_devices}. {'. '.join(fixes)}."


def divisors(n: int) -> list[int]:
    """All divisors of n, in order."""
    low = [d for d in range(1, math.isqrt(n) + 1) if n % d == 0]
    return low + [n // d for d in reversed(low) if d * d != n]


def _arrange(sizes: tuple[int, ...], devices: list[Device]) -> np.ndarray:
    """Devices as an array of shape `sizes`: `tensor` varies fastest, so stays in a host; `data` and `fsdp` span hosts.

    On TPUs mesh_utils follows each slice's torus; `data`, then `fsdp` cross slices (no torus, slow network).
    """
    data, fsdp, expert, tensor, context = sizes
    # mesh_utils wants axes ordered by network intensity: `context` moves less than `tensor`.
    shape = (data, fsdp, expert, context, tensor)
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    if devices[0].platform == "tpu" and slices > 1:
        data_slices = math.gcd(data, slices)
        fsdp_slices = slices // data_slices
        if fsdp % fsdp_slices:
            raise UserError(
                f"mesh.data={data}, mesh.fsdp={fsdp} cannot be split over {slices} TPU slices: make mesh.data a "
                f"multiple of {slices}."
            )
        inner = (data // data_slices, fsdp // fsdp_slices, expert, context, tensor)
        array = mesh_utils.create_hybrid_device_mesh(
            inner, (data_slices, fsdp_slices, 1, 1, 1), devices, allow_split_physical_axes=True
        )
    elif devices[0].platform == "tpu":
        array = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    else:
        # A process owns a host's devices or one of them. Either way ordering by process keeps hosts together.
        ordered = sorted(devices, key=lambda d: (getattr(d, "slice_index", 0) or 0, d.process_index, d.id))
        array = np.asarray(ordered).reshape(shape)
    return array.swapaxes(3, 4)


def is_axes(x: Any) -> bool:
    """Whether `x` is the leaf of a tree of logical axes (NamedTuples, such as optimizer states, are not)."""
    return type(x) is tuple and all(e is None or isinstance(e, str) for e in x)


def spec(axes: Axes) -> PartitionSpec:
    """Mesh axes of an array's dimensions, from one logical axis each; None is unsharded."""
    return PartitionSpec(*(None if axis is None else RULES[axis] for axis in axes))


def sharding(mesh: Mesh, axes: Axes) -> NamedSharding:
    """The sharding of an array with these logical axes."""
    return NamedSharding(mesh, spec(axes))


def tree_shardings(mesh: Mesh, axes_tree: Any) -> Any:
    """The sharding of each leaf of a tree of tuples of logical axes."""
    return jax.tree.map(lambda axes: sharding(mesh, axes), axes_tree, is_leaf=is_axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of a [B, T] array of the batch: rows over BATCH_MESH_AXES, positions over `context`."""
    return sharding(mesh, ("batch", "sequence"))


def batch_ways(mesh: Mapping[str, int]) -> int:
    """How many ways a mesh with these sizes splits the rows of the batch."""
    return math.prod(mesh[axis] for axis in BATCH_MESH_AXES)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def constrain(x: jax.Array, mesh: Mesh | None, axes: Axes) -> jax.Array:
    """Pins the sharding of an intermediate array inside jit. Without a mesh: x itself."""
    return x if mesh is None else jax.lax.with_sharding_constraint(x, sharding(mesh, axes))


def check_divides(mesh: Mesh, axes_tree: Any, shapes_tree: Any) -> None:
    """Refuses parameters that the mesh does not divide evenly.

    Args:
        mesh: The device mesh.
        axes_tree: A tree of tuples of logical axes.
        shapes_tree: The same tree of arrays, or of anything with `.shape`.

    Raises:
        UserError: It names the parameter, its axis and size, and the mesh sizes that work.
    """

    def check(path: Any, axes: Axes, leaf: Any) -> None:
        assert len(axes) == len(leaf.shape), (jax.tree_util.keystr(path), axes, leaf.shape)
        for dimension, (axis, size) in enumerate(zip(axes, leaf.shape, strict=True)):
            names = RULES[axis] if axis is not None else None
            names = (names,) if isinstance(names, str) else names or ()
            ways = math.prod(mesh.shape[name] for name in names)
            if size % ways:
                parameter = jax.tree_util.keystr(path, simple=True, separator="/")
                works = ", ".join(str(d) for d in divisors(size) if d <= mesh.size)
                raise UserError(
                    f"{parameter} has shape {tuple(leaf.shape)}: its dimension {dimension} ('{axis}', {size}) is not "
                    f"divisible by mesh.{' * mesh.'.join(names)} = {ways}. Sizes that work: {works}."
                )

    jax.tree_util.tree_map_with_path(check, axes_tree, shapes_tree, is_leaf=is_axes)
