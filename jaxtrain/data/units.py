"""How a source is partitioned: its units, their order in an epoch, and their lanes. Pure except for reading footers.

The files and `num_lanes` alone decide between two ways:

- *Whole units*: units (files, or ranges of a parquet file's row groups) are permuted by (seed, source, epoch), and lane
  l takes every num_lanes-th unit from the l-th on.
- *Shared files*, if there are too few units: files come in the epoch's order, and their windows are interleaved: lane l
  takes the windows w of the i-th file with (i · interleave_step + w) mod num_lanes = l.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np

from jaxtrain.interfaces import Source
from jaxtrain.plan import stable_hash

FILES_PER_LANE = 16  # with fewer, parquet files are cut into ranges of row groups
UNITS_PER_LANE = 4  # with fewer, lanes would end an epoch far apart: share files instead
_FOOTERS_AT_ONCE = 32  # if max_samples decides how many are needed
RULE = "units-2"  # goes into the identity; change it with the rules above


@dataclasses.dataclass(frozen=True)
class Unit:
    """A contiguous part of a file that can be opened alone: rows [first, first + rows), to its end if rows is None."""

    file: int
    first: int = 0
    rows: int | None = None


@dataclasses.dataclass(frozen=True)
class Partition:
    """How a source is partitioned.

    Attributes:
        units: In the order of the listing.
        shared: Whether all lanes read every unit, which is a file, and take turns at its windows.
        limit: The most rows to read, in the order of the listing (shared files only); None for all.
    """

    units: tuple[Unit, ...]
    shared: bool
    limit: int | None = None


def partition(
    source: Source,
    num_lanes: int,
    max_samples: int | None,
    row_groups: Callable[[Sequence[int]], list[list[int]]],
) -> Partition:
    """Partitions a source for `num_lanes` lanes.

    Args:
        max_samples: Read the first `max_samples` rows in the order of the listing; None for all.
        row_groups: `source.row_groups` of several files at once. Called only if the footers are needed.
    """
    files = range(len(source.files))
    if not source.random_access:
        shared = max_samples is not None or len(files) < num_lanes
        return Partition(tuple(Unit(file) for file in files), shared, max_samples)
    if max_samples is None and len(files) >= FILES_PER_LANE * num_lanes:
        return Partition(tuple(Unit(file) for file in files), shared=False)
    groups = groups_within(len(files), max_samples, row_groups)
    total = sum(len(sizes) for sizes in groups)
    per_unit = max(1, total // (FILES_PER_LANE * num_lanes))
    units = tuple(unit for file, sizes in enumerate(groups) for unit in _ranges(file, sizes, per_unit))
    if len(units) >= UNITS_PER_LANE * num_lanes:
        return Partition(units, shared=False)
    whole = tuple(Unit(file, 0, sum(sizes)) for file, sizes in enumerate(groups) if sum(sizes))
    return Partition(whole, shared=True)


def groups_within(
    files: int, max_samples: int | None, row_groups: Callable[[Sequence[int]], list[list[int]]]
) -> list[list[int]]:
    """Rows of the row groups of each file, cut after `max_samples` rows."""
    if max_samples is None:
        return row_groups(range(files))
    groups: list[list[int]] = []
    left = max_samples
    for first in range(0, files, _FOOTERS_AT_ONCE):
        for sizes in row_groups(range(first, min(first + _FOOTERS_AT_ONCE, files))):
            kept = [min(size, max(left - before, 0)) for size, before in zip(sizes, _starts(sizes), strict=True)]
            groups.append([size for size in kept if size])
            left -= sum(kept)
        if not left:
            break
    return groups


def idle_lane(
    cut: Partition,
    rows: Sequence[int | None],
    order: Iterable[int],
    num_lanes: int,
    window: int,
    keeps: Callable[[int, int, int], bool],
) -> int | None:
    """The first lane that gets no document in an epoch; None if every lane has one, or if only reading shows it.

    Args:
        cut: The partition.
        rows: Rows of each unit; None if unknown.
        order: The epoch's order of the units.
        num_lanes: The number of lanes.
        window: Rows that are permuted together; lanes take turns at shared files by window.
        keeps: (unit, row in the unit, count) → whether the holdout leaves one of these rows.
    """
    idle, left = set(range(num_lanes)), cut.limit
    for position, unit in enumerate(order):
        count = rows[unit]
        if count is None:
            return None
        if left is not None:
            count, left = min(count, left), left - min(count, left)
        first, size = (position * interleave_step(num_lanes), window) if cut.shared else (position, count or 1)
        for number in range(-(-count // size)):
            lane = (first + number) % num_lanes
            if lane in idle and keeps(unit, number * size, min(size, count - number * size)):
                idle.remove(lane)
            if not idle:
                return None
    return min(idle)


def _starts(sizes: Sequence[int]) -> list[int]:
    """The first row of each group."""
    return [0, *itertools.accumulate(sizes)][: len(sizes)]


def _ranges(file: int, sizes: Sequence[int], per_unit: int) -> list[Unit]:
    """Ranges of `per_unit` row groups each; the last may have fewer."""
    starts = [0, *itertools.accumulate(sizes)]
    bounds = [*range(0, len(sizes), per_unit), len(sizes)]
    return [
        Unit(file, starts[a], starts[b] - starts[a]) for a, b in itertools.pairwise(bounds) if starts[b] > starts[a]
    ]


def order(num_units: int, *, seed: int, source: str, epoch: int, shuffle: bool) -> np.ndarray:
    """The order of a source's units in an epoch: int64 [num_units]."""
    if not shuffle:
        return np.arange(num_units)
    return stable_hash.permutation(num_units, seed, "units", source, epoch)


def share(units: np.ndarray, lane: int, num_lanes: int) -> np.ndarray:
    """A lane's share of the units. units: In the order of an epoch."""
    return units[lane::num_lanes]


@functools.cache
def interleave_step(num_lanes: int) -> int:
    """How many lanes after the first lane of a shared file the next file's first lane comes.

    It is coprime to num_lanes, so that files of one window each reach every lane, and it spreads the starts of any
    number of files evenly over the lanes, if the partial quotients of step / num_lanes are small, as they are
    near the golden ratio (Niederreiter 1992, "Random number generation and quasi-Monte Carlo methods", theorem 3.4).
    With a step of 1 a thousand files of about 20 windows reached 1,104 of 16,384 lanes.
    """
    about = round(num_lanes * 0.6180339887498949)
    near = range(max(about - 50, 1), min(about + 50, num_lanes) + 1)
    able = [step for step in near if math.gcd(step, num_lanes) == 1]
    return min(able, key=lambda step: (max(_quotients(num_lanes, step)), abs(step - about), step))


def _quotients(a: int, b: int) -> Iterator[int]:
    """The partial quotients of the continued fraction of a / b."""
    while b:
        yield a // b
        a, b = b, a % b


def row_order(rows: int, *, seed: int, source: str, epoch: int, file: str, first: int, shuffle: bool) -> np.ndarray:
    """The order of the rows of the window that begins at row `first` of a file: int64 [rows]."""
    if not shuffle:
        return np.arange(rows)
    return stable_hash.permutation(rows, seed, "rows", source, epoch, file, first)
