"""Clusters by name: `v5e:2x4`, `v5p:8x8x8` (a slice's shape in chips), `h100:8`, `h200:8x8` (hosts x GPUs)."""

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from collections.abc import Sequence
from typing import Any

from jaxtrain.cost import hardware
from jaxtrain.cost.hardware import Chip
from jaxtrain.errors import UserError

# Available slices (cloud.google.com/tpu/docs), in chips. v4 and v5p also have all shapes of multiples of 4.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_SHAPES = {"v4": _CUBES, "v5e": _FLAT, "v5p": (*_CUBES, "16x16x24"), "v6e": _FLAT}
_MAX_CHIPS = {"v4": 4096, "v5p": 6144}
MAX_GPUS = 16  # per host
# For compiling without the GPU: cores, FPUs per core, shared memory per core, of that for one block at most, L2, GHz,
# threads per core, JAX's device kind. From NVIDIA's architecture white papers and the CUDA C++ Programming Guide,
# "Compute Capabilities".
_DETAILS = {
    "a100-40gb": (108, 64, 167_936, 166_912, 40 << 20, 1.41, 2048, "NVIDIA A100-SXM4-40GB"),
    "a100": (108, 64, 167_936, 166_912, 40 << 20, 1.41, 2048, "NVIDIA A100-SXM4-80GB"),
    "h100-pcie": (114, 128, 233_472, 232_448, 50 << 20, 1.755, 2048, "NVIDIA H100 PCIe"),
    "h100": (132, 128, 233_472, 232_448, 50 << 20, 1.98, 2048, "NVIDIA H100 80GB HBM3"),
    "h200": (132, 128, 233_472, 232_448, 60 << 20, 1.98, 2048, "NVIDIA H200"),
    "l40s": (142, 128, 102_400, 101_376, 96 << 20, 2.52, 1536, "NVIDIA L40S"),
    "rtx4090": (128, 128, 102_400, 101_376, 72 << 20, 2.52, 1536, "NVIDIA GeForce RTX 4090"),
}
# CUDA's version there. Without one XLA leaves products of 8-bit values in bf16, without a word.
_CUDA = "13.0.0"


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Chips of one kind.

    Attributes:
        shape: of a TPU slice in chips; for GPUs (hosts, GPUs per host).
        slices: number of TPU slices; 1 for GPUs.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def chips_per_island(self) -> int:
        """Chips joined by `chip.links`: a TPU slice, the GPUs of a host. `chip.network` joins islands."""
        return self.shape[1] if self.chip.platform == "gpu" else math.prod(self.shape)

    @property
    def islands(self) -> int:
        return self.num_chips // self.chips_per_island

    def __str__(self) -> str:
        name = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return name if self.slices == 1 else f"{self.slices} slices of {name}"


def parse(text: str, flag: str, slices: int = 1) -> Cluster:
    """The cluster that a flag names.

    Args:
        text: KIND:SHAPE, in any case.
        flag: the flag's name, for messages.
        slices: TPU slices joined by the data center's network.

    Raises:
        UserError: no such cluster; the message lists the nearest kinds or the available shapes.
    """
    kind, colon, shape = text.strip().lower().partition(":")
    chip = hardware.BY_NAME.get(kind)
    if chip is None:
        near = difflib.get_close_matches(kind, hardware.BY_NAME, cutoff=0.5) or list(hardware.BY_NAME)
        raise UserError(f"--{flag}={text}: there is no chip {kind!r} in the table; did you mean {' or '.join(near)}?")
    if slices < 1 or (slices > 1 and chip.platform != "tpu"):
        raise UserError(f"--slices={slices}: TPUs need at least one slice; for GPUs give hosts x GPUs instead")
    if not colon or not re.fullmatch(r"\d+(x\d+)*", shape):
        example = f"{kind}:2x8 (hosts x GPUs)" if chip.platform == "gpu" else f"{kind}:{_SHAPES[kind][2]}"
        raise UserError(f"--{flag}={text}: the shape is missing or not of the form 2x4; for example {example}")
    sides = tuple(map(int, shape.split("x")))
    if chip.platform == "gpu":
        sides = (1, *sides) if len(sides) == 1 else sides
        if len(sides) != 2 or not sides[0] or not 1 <= sides[1] <= MAX_GPUS:
            raise UserError(
                f"--{flag}={text}: give hosts x GPUs, with 1 to {MAX_GPUS} GPUs per host: 8 is one host with 8, 4x8 "
                "is four"
            )
        return Cluster(chip, sides)
    if shape not in _SHAPES[kind] and not _is_of_cubes(kind, sides):
        raise UserError(_shape_message(text, flag, kind, sides))
    return Cluster(chip, sides, slices)


def _is_of_cubes(kind: str, sides: tuple[int, ...]) -> bool:
    three = kind in _MAX_CHIPS and len(sides) == 3 and math.prod(sides) <= _MAX_CHIPS[kind]
    return three and all(side and side % 4 == 0 for side in sides) and sides == tuple(sorted(sides))


def _shape_message(text: str, flag: str, kind: str, sides: tuple[int, ...]) -> str:
    chips = {shape: math.prod(map(int, shape.split("x"))) for shape in _SHAPES[kind]}
    wanted, largest = math.prod(sides), _SHAPES[kind][-1]
    near = min(chips, key=lambda shape: abs(math.log(chips[shape] / max(wanted, 0.5))))
    more = ""
    if kind in _MAX_CHIPS:
        more = f", and any three ascending multiples of 4, up to {_MAX_CHIPS[kind]:,} chips"
    elif wanted > chips[largest]:
        more = f". For more chips, use several slices: --{flag}={kind}:{largest} --slices=2"
    return (
        f"--{flag}={text}: there is no slice {kind}:{'x'.join(map(str, sides))}; the nearest in size is "
        f"{kind}:{near}. There are {', '.join(_SHAPES[kind])}{more}."
    )


def of_devices(devices: Sequence[Any]) -> Cluster | None:
    """The cluster that the devices of a run are; None if its chips or its shape are not in the tables."""
    chip = hardware.of_kind(devices[0].device_kind)
    if chip is None:
        return None
    slices = len({getattr(device, "slice_index", 0) or 0 for device in devices})
    if chip.platform == "gpu":
        return Cluster(chip, (slices, len(devices) // slices))
    coords = [getattr(device, "coords", (0,)) for device in devices if not getattr(device, "slice_index", 0)]
    sides = sorted(1 + max(axis) - min(axis) for axis in zip(*coords, strict=True))
    shape = "x".join(str(side) for side in (sides[-2:] if chip.name in ("v5e", "v6e") else sides))
    try:
        found = parse(f"{chip.name}:{shape}", "topology", slices)
    except UserError:
        return None
    return found if found.num_chips == len(devices) else None


def islands(cluster: Cluster, devices: Sequence[Any]) -> list[int]:
    """Of each device, which slice or host it is in."""
    if cluster.chip.platform != "gpu":
        return [getattr(device, "slice_index", 0) or 0 for device in devices]

    def place(index: int) -> tuple[int, int, int]:
        device = devices[index]
        return getattr(device, "slice_index", 0) or 0, device.process_index, device.id

    order = sorted(range(len(devices)), key=place)
    return [order.index(index) // cluster.chips_per_island for index in range(len(devices))]


def prepare_environment() -> None:
    """Call before importing JAX. The CPU becomes the only device; libtpu and the Hub's client stay off the network."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    # Otherwise libtpu asks the metadata server for these, and prints long errors.
    for name, value in (("TPU_ACCELERATOR_TYPE", "v5litepod-1"), ("TPU_WORKER_HOSTNAMES", "localhost")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_WORKER_ID", "0")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    # No TPU is used, so several processes may compile at the same time despite libtpu's lock.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Nothing runs, so XLA cannot time algorithms and uses its defaults.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()


def devices(cluster: Cluster) -> list[Any]:
    """Stand-ins for the cluster's devices, to build a mesh of and to compile for.

    Raises:
        UserError: if the compiler for them is not installed.
    """
    from jax.experimental import topologies

    if cluster.chip.platform == "gpu":
        return _gpu_devices(cluster)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"{cluster} needs libtpu, the compiler for TPUs, which is not installed: pip install -e '.[tpu-check]' (it "
            "runs on any Linux machine, without a TPU)"
        )
    options: dict[str, Any] = {} if cluster.slices == 1 else {"num_slices": cluster.slices}
    if cluster.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # a chip's two cores as one device, as on a TPU VM
    if cluster.num_chips == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)  # by default a host has four
    name = f"{cluster.chip.name}:{'x'.join(map(str, cluster.shape))}"
    return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)


def _gpu_devices(cluster: Cluster) -> list[Any]:
    from jax.experimental import topologies

    plugins = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    if importlib.util.find_spec("jax_plugins") is None or not any(map(importlib.util.find_spec, plugins)):
        raise UserError(
            f"{cluster} needs JAX's CUDA plugin, the compiler for NVIDIA GPUs, which is not installed: pip install -e "
            "'.[gpu]' (4.4 GB; it compiles without a GPU)"
        )
    from jaxtrain.model import attention_cudnn  # needs the plugin

    assert cluster.chip.compute_capability is not None
    attention_cudnn.compile_for(cluster.chip.compute_capability)
    hosts, gpus = cluster.shape
    target = target_config(cluster.chip)
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x{hosts}x{gpus}", target_config=target
    )
    return list(described.devices)


def target_config(chip: Chip) -> str:
    """A GpuTargetConfigProto as text: what XLA's compiler needs to know about a GPU that is not present."""
    cores, fpus, shared, optin, l2, clock, threads, kind = _DETAILS[chip.name]
    assert chip.compute_capability is not None
    major, minor = chip.compute_capability
    return f"""gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: {threads}
  shared_memory_per_block: 49152 shared_memory_per_core: {shared} shared_memory_per_block_optin: {optin}
  core_count: {cores} fpus_per_core: {fpus} clock_rate_ghz: {clock}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {chip.bandwidth:.0f} l2_cache_size: {l2} device_memory_size: {chip.memory}
  cuda_compute_capability {{ major: {major} minor: {minor} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  compile_time_toolkit_version: "{_CUDA}" runtime_version: "{_CUDA}" driver_version: "{_CUDA}"
}}
platform_name: "CUDA"
dnn_version_info {{ major: 9 minor: 10 }}
device_description_str: "{kind}"
"""
