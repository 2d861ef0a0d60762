"""Which documents are read: each once per epoch, filters, holdout, limits, refusals, and the cost of opening."""

import collections
import re

import numpy as np
import pytest

from jaxtrain.data.io import retry
from jaxtrain.data.source_reader import Position, ReadOptions, SourceReader, describe
from jaxtrain.errors import TransientError, UserError
from jaxtrain.plan import stable_hash
from tests.data.memory_source import Flaky, MemorySource
from tests.data.runs import Drop

Found = list[tuple[int, int]]  # (file, row)


def reader(source: MemorySource, lanes: int = 4, retry_seconds: float = 60.0, **options) -> SourceReader:
    settings = {"seed": 3, "shuffle": True, "shuffle_window": 5, "holdout": 0.0, **options}
    return SourceReader("web", source, source, ReadOptions(num_lanes=lanes, **settings), retry_seconds=retry_seconds)


def numbered(sizes: list[int], **settings) -> MemorySource:
    return MemorySource(rows=[[f"{file} {row}" for row in range(size)] for file, size in enumerate(sizes)], **settings)


def lane_rows(made: SourceReader, lane: int, epochs: int = 1, start: Position | None = None) -> Found:
    found: Found = []
    for window in made.windows(lane, start or Position(0, 0, 0), epochs):
        assert len(window.texts) == len(window.positions) == len(window.file_rows)
        assert window.texts == [f"{window.file} {row}" for row in window.file_rows.tolist()]
        assert (np.diff(window.positions) > 0).all()
        found += [(window.file, row) for row in window.file_rows.tolist()]
    return found


def all_rows(made: SourceReader, epochs: int = 1) -> Found:
    lanes = range(made.options.num_lanes)
    made.register(dict.fromkeys(lanes, Position(0, 0, 0)))
    return [row for lane in lanes for row in lane_rows(made, lane, epochs)]


SHAPES = {
    "many files": numbered([7] * 70),
    "row groups": numbered([100, 0, 250]),
    "shared": numbered([90, 60]),
    "many files, in order only": numbered([7] * 70, random_access=False),
    "one file, in order only": numbered([200], random_access=False),
}


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_document_once_an_epoch(shape, shuffle):
    source = SHAPES[shape]
    everything = [(file, row) for file, rows in enumerate(source.rows) for row in range(len(rows))]
    found = all_rows(reader(source, shuffle=shuffle))
    assert sorted(found) == everything
    assert collections.Counter(all_rows(reader(source, shuffle=shuffle), epochs=2)) == dict.fromkeys(everything, 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_epochs_and_seeds_differ_where_shuffled(shape):
    made, source = reader(SHAPES[shape]), SHAPES[shape]
    twice = lane_rows(made, 1, 2)
    first = lane_rows(made, 1)
    assert twice[: len(first)] == first
    assert twice[len(first) :] != first
    assert lane_rows(reader(source, seed=4), 1) != first
    plain = lane_rows(reader(source, shuffle=False), 1, 2)
    assert plain[: len(plain) // 2] == plain[len(plain) // 2 :]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("max_samples", [60, 131])
def test_max_samples_are_the_first_of_the_listing_for_any_lanes_in_every_epoch(shape, max_samples):
    sizes = [len(rows) for rows in SHAPES[shape].rows]
    for lanes in (1, 3, 4):
        source = numbered(sizes, random_access=SHAPES[shape].random_access, max_samples=max_samples)
        everything = [(file, row) for file, rows in enumerate(source.rows) for row in range(len(rows))][:max_samples]
        assert collections.Counter(all_rows(reader(source, lanes), 2)) == dict.fromkeys(everything, 2)


@pytest.mark.parametrize("shape", SHAPES)
def test_held_out_and_trained_documents_are_disjoint_and_together_all(shape):
    source = SHAPES[shape]
    train = all_rows(reader(source, holdout=0.2))
    held = all_rows(reader(source, holdout=0.2, held_out=True))
    assert sorted(train + held) == sorted(all_rows(reader(source)))
    names = source.files
    assert all(stable_hash.is_held_out("web", names[file], np.array([row]), 0.2)[0] for file, row in held)
    assert 0.1 < len(held) / len(train + held) < 0.3
    assert set(held) == set(all_rows(reader(source, 2, holdout=0.2, held_out=True, seed=9, shuffle_window=50)))
    assert not all_rows(reader(source, held_out=True))


def test_transforms_see_their_columns_and_drop_rows_without_moving_others():
    source = numbered([40, 40])
    whole = lane_rows(reader(source), 2)
    filtered = numbered([40, 40], transforms=(Drop(3),))
    assert lane_rows(reader(filtered), 2) == [row for row in whole if row[1] % 3]
    assert describe(Drop(3)) != describe(Drop(4))
    assert describe(Drop(3)) == describe(Drop(3))
    assert reader(filtered).identity != reader(source).identity


def test_empty_documents_keep_their_row():
    source = numbered([40, 40])
    whole = lane_rows(reader(source), 1)
    source.rows[0][7] = source.rows[1][12] = ""
    assert lane_rows(reader(source), 1) == [row for row in whole if row not in ((0, 7), (1, 12))]


@pytest.mark.parametrize("shape", SHAPES)
def test_reading_goes_on_from_any_window(shape):
    made = reader(SHAPES[shape])
    made.register(dict.fromkeys(range(4), Position(0, 0, 0)))
    windows = list(made.windows(2, Position(0, 0, 0), 2))
    for index, window in enumerate(windows):
        fresh = reader(SHAPES[shape])
        inside = Position(window.start.epoch, window.start.unit, window.start.row + window.rows - 1, window.start.base)
        fresh.register({2: inside})
        rest = fresh.windows(2, inside, 2)
        for wanted in windows[index : index + 3]:
            found = next(rest)
            assert (found.start, found.file, found.texts) == (wanted.start, wanted.file, wanted.texts)


@pytest.mark.parametrize("random_access", [True, False])
def test_a_lane_without_documents_is_refused_with_lanes_that_work(random_access):
    def source():
        return numbered([14], random_access=random_access)  # 3 windows

    fixes = r"Set data\.num_lanes=2 or data\.shuffle_window=none, or use a larger"
    with pytest.raises(UserError, match=rf"lane 3 of data.num_lanes=4 gets no document.*{fixes}"):
        lane_rows(reader(source(), 4), 3, 2)
    if random_access:  # parquet is refused before anything is read
        with pytest.raises(UserError, match="lane 3"):
            reader(source(), 4).check_lanes()
    assert len(all_rows(reader(source(), 2), 2)) == 28
    if random_access:
        assert len(all_rows(reader(source(), 4, shuffle_window=None), 2)) == 28
    with pytest.raises(UserError, match="gets no document"):  # filters drop everything: an end, not a loop
        lane_rows(reader(numbered([40], random_access=random_access, transforms=(Drop(1),)), 2), 0, 10**9)
    assert not lane_rows(reader(source(), 1, held_out=True), 0, 10**9)
    with pytest.raises(UserError, match="has no rows"):
        reader(numbered([], random_access=random_access))


@pytest.mark.parametrize(
    ("sizes", "lanes", "limit", "window"),
    [
        ([5000], 8, None, 512),  # ten windows of 512 are enough, as in version 0.1
        ([4000], 8, None, 512),  # eight, too
        ([3000], 8, None, 64),  # 375 rows a lane
        ([1000] * 10, 64, 10_000, 32),
        ([100_000], 64, 10_000, 32),
        ([200], 64, None, 1),
        ([140, 130], 16, None, 4),
        ([1] * 400, 64, None, 512),  # whole files are distributed
    ],
)
@pytest.mark.parametrize("holdout", [0.0, 0.1])
def test_the_window_follows_the_size(sizes, lanes, limit, window, holdout):
    sizes = [min(size, 20_000) for size in sizes]
    source = numbered(sizes, groups=[[size] for size in sizes], max_samples=limit)  # as parquet has them
    made = reader(source, lanes, shuffle_window=None, holdout=holdout)
    assert made.window == window
    assert made.identity["shuffle_window"] == window
    assert "shuffle_window" not in reader(source, lanes, shuffle_window=window, holdout=holdout).identity
    starts = dict.fromkeys(range(lanes), Position(0, 0, 0))
    made.register(starts)
    assert all(next(made.windows(lane, start, 1), None) for lane, start in starts.items())


def test_limits_bound_streams_whose_rows_are_not_known():
    source = numbered([3000], random_access=False, max_samples=1000)
    assert reader(source, 8, shuffle_window=None).window == 16
    assert reader(numbered([3000], random_access=False), 8, shuffle_window=None).window == 512
    many = numbered([30] * 40, random_access=False, max_samples=1000)
    assert reader(many, 8, shuffle_window=None).window == 512  # each file is a window at least


@pytest.mark.parametrize("sizes", [[700], [300, 100], [64], [30, 30, 30], [5]])
def test_the_lanes_that_are_advised_work_and_more_do_not(sizes):
    with pytest.raises(UserError, match="gets no document") as caught:
        reader(numbered(sizes), 64, shuffle_window=50, holdout=0.2).check_lanes()
    found = re.search(r"data\.num_lanes=(\d+) or data\.shuffle_window=none|data\.num_lanes=(\d+),", str(caught.value))
    assert found
    lanes = int(found[1] or found[2])
    reader(numbered(sizes), lanes, shuffle_window=50, holdout=0.2).check_lanes()
    with pytest.raises(UserError, match="gets no document"):
        reader(numbered(sizes), 2 * lanes, shuffle_window=50, holdout=0.2).check_lanes()


def test_a_lane_without_documents_in_a_later_epoch_goes_on():
    source = numbered([1] * 8, random_access=False)
    for file in range(5):
        source.rows[file] = [""]
    made = next(m for m in (reader(source, 2, seed=seed) for seed in range(50)) if _epochs_of(m, 0) == [True, False])
    found = lane_rows(made, 0, 40)
    assert {file for file, _ in found} == {5, 6, 7}


def _epochs_of(made: SourceReader, lane: int) -> list[bool]:
    """Whether the lane has documents in epochs 0 and 1."""
    try:
        count = len(lane_rows(made, lane, 1))
        return [count > 0, len(lane_rows(made, lane, 2)) > count]
    except UserError:
        return []


def test_opening_costs_the_same_at_any_depth():
    for depth in (0, 5_000, 19_990):
        source = numbered([20_000] * 70)
        made = reader(source, 4, shuffle=False)
        source.rows_read = 0
        next(made.windows(1, Position(0, 5, depth), 1))
        assert source.rows_read <= 15
        assert len(source.opened) == 1


def test_footers_are_read_side_by_side_and_again_after_a_fault(monkeypatch):
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)
    source, flaky = numbered([40] * 20), Flaky(1, 0.5, 10)
    read = source.row_groups
    monkeypatch.setattr(source, "row_groups", lambda file: (flaky(file, 0), read(file))[1], raising=False)
    assert sorted(all_rows(reader(source))) == [(file, row) for file in range(20) for row in range(40)]
    assert flaky.left == 0

    def down(file):
        raise TransientError("503")

    monkeypatch.setattr(source, "row_groups", down, raising=False)
    with pytest.raises(TransientError, match="source 'web', file file-"):
        reader(source)
