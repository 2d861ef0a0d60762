"""Clusters by name: `v5e:2x4`, `v5p:8x8x8` (a slice's shape in chips), `h100:8`, `h200:8x8` (hosts x GPUs)."""

import dataclasses
import difflib
import importlib.util
import math
import os
import re
from typing import Any

from jaxtrain.cost import hardware
from jaxtrain.cost.hardware import Chip
from jaxtrain.errors import UserError

# Slices that can be had (cloud.google.com/tpu/docs), in chips. v4 and v5p also have all whose sides are multiples of 4.
_FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBES = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8", "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16")
_SHAPES = {"v4": _CUBES, "v5e": _FLAT, "v5p": (*_CUBES, "16x16x24"), "v6e": _FLAT}
_MOST_CHIPS = {"v4": 4096, "v5p": 6144}
MOST_GPUS = 16  # of a host


@dataclasses.dataclass(frozen=True)
class Cluster:
    """Some chips of one kind. shape: of a TPU slice; (hosts, GPUs of each) for GPUs. slices: of TPUs, 1 for GPUs."""

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def num_chips(self) -> int:
        return math.prod(self.shape) * self.slices

    @property
    def chips_per_island(self) -> int:
        """Chips that `chip.links` join: a TPU slice, the GPUs of a host. Between islands is `chip.network`."""
        return self.shape[1] if self.chip.platform == "gpu" else math.prod(self.shape)

    @property
    def islands(self) -> int:
        return self.num_chips // self.chips_per_island

    def __str__(self) -> str:
        name = f"{self.chip.name}:{'x'.join(map(str, self.shape))}"
        return name if self.slices == 1 else f"{self.slices} slices of {name}"


def parse(text: str, flag: str, slices: int = 1) -> Cluster:
    """text: KIND:SHAPE, in any case. flag: what errors call it. slices: TPU slices joined by the data centre's network.

    Raises UserError that names the nearest kinds, and the shapes that there are.
    """
    kind, colon, shape = text.strip().lower().partition(":")
    chip = hardware.BY_NAME.get(kind)
    if chip is None:
        near = difflib.get_close_matches(kind, hardware.BY_NAME, cutoff=0.5) or list(hardware.BY_NAME)
        raise UserError(f"--{flag}={text}: there is no chip {kind!r} in the table; did you mean {' or '.join(near)}?")
    if slices < 1 or (slices > 1 and chip.platform != "tpu"):
        raise UserError(f"--slices={slices}: TPUs come in one slice or more, GPUs in none (give hosts x GPUs)")
    if not colon or not re.fullmatch(r"\d+(x\d+)*", shape):
        example = f"{kind}:2x8 (hosts x GPUs)" if chip.platform == "gpu" else f"{kind}:{_SHAPES[kind][2]}"
        raise UserError(f"--{flag}={text}: the shape is missing or not of the form 2x4; for example {example}")
    sides = tuple(map(int, shape.split("x")))
    if chip.platform == "gpu":
        return Cluster(chip, _gpus(text, flag, sides))
    if shape not in _SHAPES[kind] and not _is_of_cubes(kind, sides):
        raise UserError(_shape_message(text, flag, kind, sides))
    return Cluster(chip, sides, slices)


def _gpus(text: str, flag: str, sides: tuple[int, ...]) -> tuple[int, int]:
    sides = (1, *sides) if len(sides) == 1 else sides
    if len(sides) != 2 or not sides[0] or not 1 <= sides[1] <= MOST_GPUS:
        raise UserError(
            f"--{flag}={text}: give hosts x GPUs, of 1 to {MOST_GPUS} GPUs a host: 8 is one host with 8, 4x8 four"
        )
    return sides[0], sides[1]


def _is_of_cubes(kind: str, sides: tuple[int, ...]) -> bool:
    three = kind in _MOST_CHIPS and len(sides) == 3 and math.prod(sides) <= _MOST_CHIPS[kind]
    return three and all(side and side % 4 == 0 for side in sides) and sides == tuple(sorted(sides))


def _shape_message(text: str, flag: str, kind: str, sides: tuple[int, ...]) -> str:
    chips = math.prod(sides)
    near = min(_SHAPES[kind], key=lambda shape: abs(math.log(_chips(shape) / max(chips, 0.5))))
    more = ""
    if kind in _MOST_CHIPS:
        more = f", and those of three sides that are multiples of 4, ascending, up to {_MOST_CHIPS[kind]:,} chips"
    elif chips > _chips(_SHAPES[kind][-1]):
        more = f". More chips are several slices: --{flag}={kind}:{_SHAPES[kind][-1]} --slices=2"
    return (
        f"--{flag}={text}: there is no slice {kind}:{'x'.join(map(str, sides))}; the nearest in size is "
        f"{kind}:{near}. There are {', '.join(_SHAPES[kind])}{more}."
    )


def _chips(shape: str) -> int:
    return math.prod(map(int, shape.split("x")))


def prepare_environment() -> None:
    """Before JAX is imported: the host's CPU is the only device, no metadata server and no Hub is asked."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["HF_HUB_OFFLINE"] = "1"
    # What libtpu would like to ask the metadata server, and says at length that it could not.
    for name, value in (("TPU_ACCELERATOR_TYPE", "v5litepod-1"), ("TPU_WORKER_HOSTNAMES", "localhost")):
        os.environ.setdefault(name, value)
    os.environ.setdefault("TPU_WORKER_ID", "0")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    # No TPU is taken, so several of these may compile side by side; libtpu's lock file is for those that take one.
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    # Nothing is run, so nothing can be tried out: XLA takes its default algorithms.
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_autotune_level=0".strip()


def devices(cluster: Cluster) -> list[Any]:
    """Stand-ins for the cluster's devices, to build a mesh of and to compile for.

    Raises UserError where the compiler for them is not installed.
    """
    from jax.experimental import topologies

    if cluster.chip.platform == "gpu":
        return _gpu_devices(cluster)
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f"{cluster} needs the compiler for TPUs, libtpu, which is not installed: pip install -e '.[tpu-check]' (it "
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

    from jaxtrain.cost.gpu_targets import target_config

    plugins = ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13")
    if importlib.util.find_spec("jax_plugins") is None or not any(map(importlib.util.find_spec, plugins)):
        raise UserError(
            f"{cluster} needs the compiler for NVIDIA GPUs, JAX's CUDA plugin, which is not installed: pip install -e "
            "'.[gpu]' (4.4 GB; it compiles without a GPU)"
        )
    from jaxtrain.model import attention_cudnn  # not before the plugin is known to be there

    assert cluster.chip.compute_capability is not None
    attention_cudnn.compile_for(cluster.chip.compute_capability)
    hosts, gpus = cluster.shape
    target = target_config(cluster.chip)
    described = topologies.get_topology_desc(
        platform="cuda", topology_name="", topology=f"1x{hosts}x{gpus}", target_config=target
    )
    return list(described.devices)
