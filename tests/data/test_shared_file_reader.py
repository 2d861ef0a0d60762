"""Readers that feed several lanes: every window, requested in any order, kept, spilled, evicted or lost."""

import datetime
import os
import random
import threading
from collections.abc import Iterator

import numpy as np
import pytest

from jaxtrain.data import shared_file_reader
from jaxtrain.data.shared_file_reader import SharedFileReader, Want, regroup
from jaxtrain.data.token_arrays import TokenArrays
from jaxtrain.interfaces import Block
from tests.data.memory_source import MemorySource

LANES, SIZE = 4, 3


def files(lengths: list[int]) -> MemorySource:
    return MemorySource(rows=[[f"{file} {row}" for row in range(count)] for file, count in enumerate(lengths)])


def window(source: MemorySource, file: int, number: int) -> list[str] | None:
    return source.rows[file][number * SIZE : (number + 1) * SIZE] or None


def test_regroup_keeps_rows_and_stops_at_its_limit():
    source = files([20])
    for size in (1, 4, 7, 50):
        for limit in (None, 0, 1, 8, 19, 20, 100):
            blocks = list(regroup(source.open(0, 0), size, limit))
            assert [text for block in blocks for text in block["text"]] == source.rows[0][:limit]
            assert all(len(block["text"]) == size for block in blocks[:-1])
            assert all(len(block["text"]) == len(block["number"]) > 0 for block in blocks)


@pytest.mark.parametrize("seed", range(30))
def test_every_lane_gets_its_windows_in_any_order_of_lanes(seed, monkeypatch):
    rng = random.Random(seed)
    monkeypatch.setattr(shared_file_reader, "_IN_MEMORY_BYTES", rng.choice([0, 30, 1 << 20]))
    monkeypatch.setattr(shared_file_reader, "_OPEN_FILES", rng.choice([1, 2, 4]))
    source = files(rng.choices([0, 2, 3, 7, 30, 61], k=5))
    shared = SharedFileReader(source.open, SIZE, LANES)
    lanes = rng.sample(range(LANES), rng.randint(1, LANES))
    shared.register({lane: Want((0, 0), shared.first_window(lane, 0)) for lane in lanes})
    left = {
        lane: [
            (file, number)
            for file in range(len(source.rows))
            for number in range(shared.first_window(lane, file), 30, LANES)
        ]
        for lane in lanes
    }
    while any(left.values()):
        lane = rng.choice([lane for lane in lanes if left[lane]])
        for _ in range(rng.choice([1, 2, 20])):
            if left[lane]:
                file, number = left[lane].pop(0)
                block = shared.get((0, file), file, lane, number)
                assert (None if block is None else block["text"]) == window(source, file, number)
        if rng.random() < 0.2:
            file = rng.randrange(5)
            limit = rng.choice([0, 1, 6, 30, 100])
            assert shared.rows((0, file), file, limit) == min(len(source.rows[file]), limit)
    assert all(not reader._kept for reader in shared._readers.values()), "windows that nobody will ask for"
    shared.close()


@pytest.mark.parametrize("start", range(8))
@pytest.mark.parametrize("count", [0, 1, 3, 7, 9])
def test_rows_are_exact_wherever_the_reader_stands(start, count):
    source = files([count])
    shared = SharedFileReader(source.open, SIZE, LANES)
    shared.register({0: Want((0, 0), start)})
    shared.get((0, 0), 0, 0, start)  # often past the end, where a fresh reader learns nothing
    for limit in (100, 4, 9, 1):
        assert shared.rows((0, 0), 0, limit) == min(count, limit)


def test_a_fault_in_one_lane_never_ends_the_file_for_another():
    source = files([40])
    shared = SharedFileReader(source.open, SIZE, LANES)
    shared.register({lane: Want((0, 0), lane) for lane in range(LANES)})

    def fail(file: int, row: int) -> None:
        if row >= 9:
            raise OSError("gone")

    assert shared.get((0, 0), 0, 0, 0) is not None
    source.fault = fail
    for lane in (0, 3, 0, 3):
        with pytest.raises(OSError, match="gone"):
            shared.get((0, 0), 0, lane, 8 if lane == 0 else 7)
    with pytest.raises(OSError, match="gone"):
        shared.rows((0, 0), 0, 100)
    source.fault = None
    assert shared.rows((0, 0), 0, 100) == 40
    for lane in range(1, LANES):
        block = shared.get((0, 0), 0, lane, lane)
        assert block is not None
        assert block["text"] == window(source, 0, lane)


def test_short_files_are_opened_about_once_for_all_lanes():
    source = files([SIZE] * 60)
    shared = SharedFileReader(source.open, SIZE, LANES)
    shared.register({lane: Want((0, 0), shared.first_window(lane, 0)) for lane in range(LANES)})
    for lane in range(LANES):  # one after the other: as far apart as possible
        for file in range(60):
            shared.get((0, file), file, lane, shared.first_window(lane, file))
    # Once to yield the window, once to see the end, and again if the file was closed in between; not once per lane.
    assert len(source.opened) <= 3 * 60
    assert source.rows_read <= 2 * 60 * SIZE


def test_lanes_together_read_a_file_once():
    source = files([600])
    shared = SharedFileReader(source.open, SIZE, LANES)
    shared.register({lane: Want((0, 0), lane) for lane in range(LANES)})

    def read(lane):
        for number in range(lane, 200, LANES):
            block = shared.get((0, 0), 0, lane, number)
            assert block is not None
            assert block["text"] == window(source, 0, number)

    threads = [threading.Thread(target=read, args=[lane]) for lane in range(LANES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert source.rows_read <= 605  # perhaps one more block


def test_windows_of_lanes_elsewhere_are_not_kept():
    source = files([600])
    shared = SharedFileReader(source.open, SIZE, LANES)
    shared.register({lane: Want((0, 0), lane or 100) for lane in range(LANES)})
    shared.get((0, 0), 0, 0, 100)
    (reader,) = shared._readers.values()
    assert len(reader._kept) == 75
    shared.register({1: Want((0, 0), 1)})
    shared.get((0, 0), 0, 1, 197)
    assert all(number % LANES == 1 for number in reader._kept if number > 100)


def test_an_empty_spill_gives_its_disk_back(monkeypatch, tmp_path):
    monkeypatch.setattr(shared_file_reader, "_IN_MEMORY_BYTES", 0)
    source = files([600])
    source.rows[0][4] = "\udcff"  # a lone surrogate
    shared = SharedFileReader(source.open, SIZE, LANES, str(tmp_path))
    shared.register({1: Want((0, 0), 1), 2: Want((0, 0), 2)})
    shared.get((0, 0), 0, 2, 2)
    block = shared.get((0, 0), 0, 1, 1)
    assert block is not None
    assert block["text"] == ["0 3", "\udcff", "0 5"]
    (reader,) = shared._readers.values()
    assert reader._spill is not None
    assert os.fstat(reader._spill.fileno()).st_dev == os.stat(tmp_path).st_dev
    assert os.path.dirname(os.readlink(f"/proc/self/fd/{reader._spill.fileno()}")) == str(tmp_path)
    assert os.listdir(tmp_path) == []
    assert reader._spill.seek(0, 2) == 0
    shared.close()


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_token_ids_are_spilled_and_come_back(monkeypatch, dtype):
    monkeypatch.setattr(shared_file_reader, "_IN_MEMORY_BYTES", 0)
    rows = TokenArrays(np.array([7, 8, 9, 1, 65_535, 0, 10, 2], dtype), np.array([1, 0, 2, 2, 0, 3, 0, 0, 0]))
    stripes = SharedFileReader(lambda file, row: iter([{"text": rows[row:9]}]), SIZE, LANES)
    stripes.register({1: Want((0, 0), 1), 2: Want((0, 0), 2)})
    stripes.get((0, 0), 0, 2, 2)
    (reader,) = stripes._readers.values()
    assert isinstance(reader._kept[1], tuple)
    block = stripes.get((0, 0), 0, 1, 1)
    assert block is not None
    back = block["text"]
    assert (back.ids.tolist(), back.ids.dtype, back.lengths.tolist()) == ([1, 65_535, 0, 10, 2], dtype, [2, 0, 3])
    stripes.close()


def test_other_columns_come_back_as_they_were(monkeypatch):
    """They may contain dates, bytes and tuples."""
    monkeypatch.setattr(shared_file_reader, "_IN_MEMORY_BYTES", 0)
    when = datetime.datetime(2026, 11, 25)
    odd = [when, b"bytes", (1, 2), {"a": [when]}, {"b": 1.5}, None, float("inf"), 1 << 70, {"c": [True, "x"]}]

    def open_at(file: int, row: int) -> Iterator[Block]:
        for at in range(row, 36):
            yield {"text": [str(at)], "odd": [odd[at // SIZE % len(odd)]]}

    shared = SharedFileReader(open_at, SIZE, LANES)
    shared.register({lane: Want((0, 0), shared.first_window(lane, 0)) for lane in range(LANES)})
    for lane in reversed(range(LANES)):
        for number in range(lane, 12, LANES):
            block = shared.get((0, 0), 0, lane, number)
            assert block is not None
            assert block["odd"] == [odd[number % len(odd)]] * SIZE
            assert type(block["odd"][0]) is type(odd[number % len(odd)])
    shared.close()


def test_closing_waits_for_no_reader():
    """It may be in an outage, or hold the lock forever at exit."""
    reads, goes_on = threading.Event(), threading.Event()

    def open_at(file: int, row: int) -> Iterator[Block]:
        reads.set()
        goes_on.wait(10)
        yield {"text": ["a"] * SIZE}

    shared = SharedFileReader(open_at, SIZE, LANES)
    shared.register({0: Want((0, 0), 0)})
    found = []
    reader = threading.Thread(target=lambda: found.append(shared.get((0, 0), 0, 0, 0)), daemon=True)
    reader.start()
    assert reads.wait(10)
    closing = threading.Thread(target=shared.close, daemon=True)
    closing.start()
    closing.join(5)
    assert not closing.is_alive()
    goes_on.set()
    reader.join(10)
    assert found == [{"text": ["a"] * SIZE}]
