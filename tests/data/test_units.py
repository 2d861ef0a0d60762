"""How sources are partitioned, and golden values: the place of a unit or row must never change for a resumed run."""

import numpy as np
import pytest

from jaxtrain.data import units
from jaxtrain.data.units import Unit
from tests.data import reference
from tests.data.memory_source import MemorySource


def source(files: int, groups: list[int], random_access: bool = True, max_samples: int | None = None) -> MemorySource:
    return MemorySource(
        rows=[["1"] * sum(groups)] * files,
        groups=[groups] * files,
        random_access=random_access,
        max_samples=max_samples,
    )


def test_many_files_are_units_and_no_footer_is_read():
    def refuse(files):
        raise AssertionError("a footer was read")

    cut = units.partition(source(32, [5]), 2, None, refuse)
    assert cut == units.Partition(tuple(Unit(file) for file in range(32)), shared=False)
    cut = units.partition(source(2, [5], random_access=False), 2, None, refuse)
    assert cut == units.Partition((Unit(0), Unit(1)), shared=False)


def test_fewer_files_are_cut_into_ranges_of_row_groups():
    cut = reference.partition(source(3, [5, 0, 7, 9] * 20), 2)  # 240 groups for 32 units: 7 each
    assert not cut.shared
    first = [unit for unit in cut.units if unit.file == 0]
    assert first[:2] == [Unit(0, 0, 5 + 0 + 7 + 9 + 5 + 0 + 7), Unit(0, 33, 9 + 5 + 0 + 7 + 9 + 5 + 0)]
    assert sum(unit.rows or 0 for unit in first) == 420
    assert [unit.first for unit in first[1:]] == np.cumsum([unit.rows or 0 for unit in first[:-1]]).tolist()


def test_few_units_are_shared():
    assert reference.partition(source(3, [5, 0, 7]), 2) == units.Partition(
        (Unit(0, 0, 12), Unit(1, 0, 12), Unit(2, 0, 12)), shared=True
    )
    assert reference.partition(source(1, [5], random_access=False), 2) == units.Partition((Unit(0),), shared=True)


@pytest.mark.parametrize("random_access", [True, False])
@pytest.mark.parametrize("max_samples", [1, 12, 30, 10_000])
def test_max_samples_are_the_first_rows_of_the_listing(max_samples, random_access):
    cut = reference.partition(source(40, [5, 7] * 4, random_access, max_samples), 2)
    if not random_access:
        assert (cut.shared, cut.limit, len(cut.units)) == (True, max_samples, 40)
        return
    rows = sorted((unit.file, row) for unit in cut.units for row in range(unit.first, unit.first + (unit.rows or 0)))
    assert rows == [(file, row) for file in range(40) for row in range(48)][:max_samples]
    assert cut.limit is None


def test_only_the_footers_that_max_samples_needs_are_read():
    read: list[int] = []

    def row_groups(files):
        read.extend(files)
        return [[10]] * len(files)

    units.partition(source(1000, [10]), 2, 400, row_groups)
    assert read == list(range(64))


def test_golden_orders():
    order = units.order(9, seed=1, source="web", epoch=2, shuffle=True)
    assert order.tolist() == [1, 3, 6, 0, 2, 7, 8, 4, 5]
    rows = units.row_order(9, seed=1, source="web", epoch=2, file="a.parquet", first=512, shuffle=True)
    assert rows.tolist() == [5, 2, 1, 8, 4, 3, 6, 0, 7]
    assert units.order(3, seed=1, source="web", epoch=2, shuffle=False).tolist() == [0, 1, 2]
    steps = [units.interleave_step(lanes) for lanes in (1, 2, 3, 4, 6, 8, 12, 64, 1000, 16384)]
    assert steps == [1, 1, 2, 3, 5, 5, 7, 45, 633, 10155]
    assert units.RULE == "units-2"


@pytest.mark.parametrize("lanes", [1, 2, 5, 8, 64, 1000])
def test_files_of_one_window_give_every_lane_its_turn(lanes):
    step = units.interleave_step(lanes)
    assert sorted(position * step % lanes for position in range(lanes)) == list(range(lanes))


@pytest.mark.parametrize("files", [3, 10, 40, 100])
def test_files_of_a_few_windows_lie_evenly_over_the_lanes(files):
    """At most about twice the average number of lanes lie between adjacent starts of two files."""
    step = units.interleave_step(1000)
    starts = np.sort(np.arange(files) * step % 1000)
    gaps = np.diff(starts, append=starts[0] + 1000)
    assert gaps.max() < 2.2 * 1000 / files
