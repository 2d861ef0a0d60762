"""The ways to compute a step that a config leaves open, with their time and memory by arithmetic."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from jax.sharding import AbstractMesh

from jaxtrain.config import Config
from jaxtrain.cost import memory_formula, roofline, step_formula
from jaxtrain.cost.clusters import Cluster
from jaxtrain.distributed import sharding
from jaxtrain.plan.plan import StagePlan
from jaxtrain.trainer.step import StepComponents, Variant, accumulation

_REMAT = ("none", "dots", "full")
_CHUNKS = (1024, 4096)
# Where the compiler has the last word, what arithmetic finds that much too large may fit: programs of docs/scale.json
# need 0.58 to 1.29 times what it says.
DOUBT = 1.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranked:
    """A variant with the seconds of a step and the bytes of a device, by arithmetic or by the compiler."""

    variant: Variant
    seconds: float
    bytes: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What a choice is for.

    Attributes:
        config: The run's config.
        components: The components of a step, on any mesh.
        mesh: Sizes of the run's mesh by axis.
        cluster: None for CPUs and unknown devices.
        limit: Bytes that a step may use on a device; None for no limit but the machine's memory.
    """

    config: Config
    components: StepComponents
    mesh: Mapping[str, int]
    cluster: Cluster | None
    limit: int | None


def rank(target: Target, stage: StagePlan, unrolled: bool = False, doubt: float = 1.0) -> list[Ranked]:
    """The variants that a config leaves open and that fit by arithmetic, the fastest first.

    Args:
        target: What the choice is for.
        stage: The stage whose steps are meant.
        unrolled: Whether layers are unrolled, rather than scanned, if the config leaves it open.
        doubt: Times of the limit that a variant may need by arithmetic.
    """
    assert target.limit is not None
    most = doubt * target.limit
    found: list[Ranked] = []
    for remat in open_values(target, "remat", _REMAT):
        for chunk in open_values(target, "chunk_tokens", _CHUNKS):
            (scan,) = open_values(target, "scan_layers", (not unrolled,))
            how = Variant(remat=remat, scan_layers=scan, chunk_tokens=chunk, micro_batches=1)
            variants = [dataclasses.replace(how, micro_batches=count) for count in micro_batch_counts(target, stage)]
            fitting = [one for one in (by_arithmetic(target, stage, v) for v in variants) if one.bytes <= most]
            # Time falls and memory grows with larger micro-batches, usually: the largest that fit and the next.
            found += fitting[:2]
    found.sort(key=lambda one: (one.seconds, one.bytes))
    # Chunks are chosen by arithmetic alone.
    best: dict[Variant, Ranked] = {}
    for one in found:
        best.setdefault(dataclasses.replace(one.variant, chunk_tokens=None), one)
    return list(best.values())


def open_values(target: Target, field: str, values: Sequence[Any]) -> Sequence[Any]:
    """`values` if the config leaves the field open; otherwise None alone: what the config says."""
    return values if is_open(target, field) else (None,)


def is_open(target: Target, field: str) -> bool:
    config: Any = target.config.loss if field == "chunk_tokens" else target.config.model
    return getattr(config, field, ()) in ("auto", None)


def micro_batch_counts(target: Target, stage: StagePlan) -> list[int]:
    """Numbers of micro-batches that the config allows, ascending; one if it sets their size."""
    mesh: Any = AbstractMesh(tuple(target.mesh.values()), tuple(target.mesh))
    fewest = accumulation(mesh, stage.batch_size, stage.seq_len, target.config.micro_batch_tokens)
    rows = stage.batch_size // sharding.batch_ways(target.mesh)
    return [fewest] if target.config.micro_batch_tokens is not None else sharding.divisors(rows)


def by_arithmetic(target: Target, stage: StagePlan, variant: Variant) -> Ranked:
    """The seconds (0 without a cluster) and bytes of a stage's step, without compiling it."""
    parts, chip = target.components.arranged(variant), target.cluster and target.cluster.chip
    shape = roofline.Shape(
        batch_size=stage.batch_size, seq_len=stage.seq_len, micro_batches=variant.micro_batches, mesh=dict(target.mesh)
    )
    chunk = variant.chunk_tokens or roofline.loss_chunk(target.config.loss)
    held = memory_formula.state_bytes(parts.model, parts.optimizer, target.mesh)
    teacher = None if parts.distilled is None else parts.distilled.teacher
    if parts.distilled is not None and teacher is not None:
        held += memory_formula.tree_bytes(teacher.axes, parts.distilled.abstract, target.mesh)
    tokens = shape.chip_tokens / variant.micro_batches
    held += memory_formula.temporary_bytes(parts.model, chip, target.mesh, chunk, tokens, variant.micro_batches)
    seconds = 0.0
    if target.cluster is not None:
        seconds = step_formula.seconds(target.cluster, parts, shape, chunk)
    return Ranked(variant=variant, seconds=seconds, bytes=held)
