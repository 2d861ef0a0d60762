"""Corrupt files: reported by default; skipped by a list, and then as if a filter had dropped their rows."""

import dataclasses
import pathlib
import random
import threading
from typing import Any

import numpy as np
import pytest
from etils import epath

from jaxtrain.data import skipped_files
from jaxtrain.data.io import retry
from jaxtrain.data.pipeline import DataConfig, StepBatch
from jaxtrain.data.source_reader import SourceReader
from jaxtrain.data.sources import rows as rows_module
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.errors import CorruptError, UserError
from jaxtrain.interfaces import BATCH_FIELDS
from jaxtrain.plan import Stage
from tests.data.memory_source import MemorySource
from tests.data.runs import Case, plan_of
from tests.hub import LoopbackHub, jsonl_bytes, parquet_bytes


@dataclasses.dataclass
class Without:
    """A filter that drops `given` documents, which have unique first words."""

    texts: frozenset[str]
    columns: tuple[str, ...] = ()

    def __call__(self, document: dict[str, Any]) -> dict[str, Any] | None:
        return None if document["text"] in self.texts else document


def unique(files: int, rows: int, seed: int = 0) -> list[list[str]]:
    rng = random.Random(seed)
    return [
        [" ".join(str(10_000 * file + row) for _ in range(rng.randint(1, 6))) for row in range(rows)]
        for file in range(files)
    ]


def case_of(
    source: Any, lanes: int = 2, steps: int = 60, window: int = 8, holdout: float = 0.0, batch: int = 2
) -> Case:
    data = DataConfig(sources={"web": source}, num_lanes=lanes, shuffle_window=window, holdout=holdout)
    return Case(data, plan_of(data, [Stage(seq_len=16, batch_size=batch * lanes)], 0, steps=steps), 0, 2)


def same(a: StepBatch, b: StepBatch) -> None:
    for name in BATCH_FIELDS:
        np.testing.assert_array_equal(a.arrays[name], b.arrays[name], err_msg=f"{name}, step {a.step}")
    for lane, state in a.states.items():
        np.testing.assert_array_equal(state, b.states[lane], err_msg=f"state of lane {lane}, step {a.step}")


# files shared by all lanes, units of row groups, units of whole files
LAYOUTS = {"shared": (3, 90, 45), "ranges": (5, 60, 6), "files": (40, 20, 20)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("holdout", [0.0, 0.3])
def test_skipped_rows_are_as_if_filtered(layout, holdout):
    """The same batches and positions, also from each state in between."""
    files, count, group = LAYOUTS[layout]
    rows = unique(files, count)
    given_up = {"file-1": count // 2 + 1, "file-2": 0}
    gone = frozenset([*rows[1][count // 2 + 1 :], *rows[2]])
    groups = [[min(group, count - at) for at in range(0, count, group)]] * files
    filtered = case_of(MemorySource(rows=rows, groups=groups, transforms=(Without(gone),)), holdout=holdout).run()
    source = MemorySource(rows=rows, groups=groups, transforms=(Without(frozenset()),), block=1)
    source.fault = corrupt_from({1: count // 2 + 1, 2: 0})
    case = case_of(source, holdout=holdout)
    found = case.run(skipped={"web": given_up})
    for a, b in zip(filtered, found, strict=True):
        same(a, b)
    for at in found[3:40:12]:
        for a, b in zip(
            filtered[at.step :], case.run(after=at.step, states=at.states, skipped={"web": given_up}), strict=True
        ):
            same(a, b)


def corrupt_from(rows: dict[int, int]) -> Any:
    """A fault of `MemorySource` with blocks of one row: these files cannot be decoded from these rows on."""

    def fault(file: int, row: int) -> None:
        if row >= rows.get(file, 10**9):
            raise CorruptError("nonsense", f"file {file}", row)

    return fault


@pytest.mark.parametrize("random_access", [True, False])
def test_a_list_that_grows_in_mid_run(random_access):
    """Documents at a lane's cursor may be skipped: the next ones follow, the same for every run from there."""
    rows = unique(3, 120, seed=1)
    case = case_of(MemorySource(rows=rows, random_access=random_access), lanes=4, steps=110)
    whole = case.run()
    for at in whole[2:100:24]:
        for given_up in ({"file-0": 30}, {"file-0": 0, "file-2": 65}):
            rest = case.run(after=at.step, states=at.states, skipped={"web": given_up})
            again = case.run(after=at.step, states=at.states, skipped={"web": given_up}, prefetch=1)
            for a, b in zip(rest, again, strict=True):
                same(a, b)
            later = case.run(after=rest[4].step, states=rest[4].states, skipped={"web": given_up})
            for a, b in zip(rest[5:], later, strict=True):
                same(a, b)
            gone = {10_000 * int(name[-1]) + row + 2 for name, first in given_up.items() for row in range(first, 120)}
            assert not gone & {int(token) for batch in rest for token in np.unique(batch.arrays["tokens"])}


def test_a_source_of_corrupt_files_alone_is_refused():
    source = MemorySource(rows=unique(2, 60))
    with pytest.raises(UserError, match="all of its rows are in corrupt files that are skipped"):
        case_of(source).run(skipped={"web": {"file-0": 0, "file-1": 0}})


def run_or_find(case: Case, given_up: dict[str, dict[str, int]]) -> list[StepBatch]:
    """The run; or nothing, and `given_up` has the corrupt file."""
    try:
        return case.run(skipped=given_up)
    except CorruptError as error:
        text, found = str(error), skipped_files.union(given_up, {error.source: {error.file: error.row}})
    assert found != given_up
    assert "file train-1." in text
    assert "data.on_corrupt=skip" in text
    given_up.update(found)
    return []


def spoiled(data: bytes, part: float) -> bytes:
    """With 60 changed bytes at a fraction of the file."""
    at = int(part * len(data))
    return data[:at] + bytes(byte ^ 0x5A for byte in data[at : at + 60]) + data[at + 60 :]


@pytest.mark.parametrize("suffix", ["parquet", "jsonl.gz"])
@pytest.mark.parametrize("lanes", [1, 4])
def test_the_real_readers_name_the_file_and_go_on_without_it(hub: LoopbackHub, monkeypatch, suffix, lanes):
    """The list that a run builds, one entry per start, is the same in any order of reading."""
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)
    monkeypatch.setattr(rows_module, "CHUNK_CHARACTERS", 1 << 11)
    rows = unique(3, 2000)

    def make(file: int) -> bytes:
        if suffix == "parquet":
            return parquet_bytes(rows[file], row_group_size=250)
        return jsonl_bytes(rows[file], compress=True)

    files = [make(0), spoiled(make(1), 0.6), make(2)]
    hub.commit("org/web", {f"train-{file}.{suffix}": data for file, data in enumerate(files)})
    source = HuggingFace(name="org/web", fetch_rows=100)
    case = case_of(source, lanes=lanes, steps=100, window=64, batch=32)
    given_up: dict[str, dict[str, int]] = {}
    while not (found := run_or_find(case, given_up)):
        assert given_up.keys() == {"web"}
    ((name, row),) = given_up["web"].items()
    assert name == f"train-1.{suffix}"
    assert 250 <= row < 1400
    if suffix == "parquet":
        assert row % 250 == 0
    seen = {int(token) - 2 for batch in found for token in np.unique(batch.arrays["tokens"])} - {-1, -2}
    assert seen == {10_000 * file + at for file in range(3) for at in range(row if file == 1 else 2000)}


def test_a_footer_that_cannot_be_read(hub: LoopbackHub, monkeypatch):
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)
    rows = unique(3, 300)
    files = [parquet_bytes(texts, row_group_size=100) for texts in rows]
    good = files[1]
    files[1] = good[:-30] + b"?" * 22 + good[-8:]
    hub.commit("org/web", {f"train-{file}.parquet": data for file, data in enumerate(files)})
    case = case_of(HuggingFace(name="org/web"), steps=20, window=64)
    with pytest.raises(CorruptError, match="footer") as caught:
        case.run()
    assert (caught.value.source, caught.value.file, caught.value.row) == (
        "web",
        "train-1.parquet",
        skipped_files.FOOTER,
    )
    assert len(case.run(skipped={"web": {"train-1.parquet": skipped_files.FOOTER}})) == 20
    hub.commit("org/web", {"train-1.parquet": good})
    hub.fault("train-1", "corrupt", count=1)
    assert len(case.run()) == 20


# The list itself


def corrupt(source: str, file: str, row: int) -> CorruptError:
    return CorruptError("bad", file, row, source)


def test_the_list_grows_and_survives(tmp_path: pathlib.Path):
    path = epath.Path(tmp_path / "skips.json")
    assert skipped_files.load(path) == {}
    skipped_files.record(path, corrupt("web", "a", 512))
    skipped_files.record(path, corrupt("code", "b", 0))
    skipped_files.record(path, corrupt("web", "a", 256))
    skipped_files.record(path, corrupt("web", "a", 1024))
    assert skipped_files.load(path) == {"web": {"a": 256}, "code": {"b": 0}}
    assert [file.name for file in tmp_path.iterdir()] == ["skips.json"]
    path.write_text('{"web": 3}')
    with pytest.raises(UserError, match=r"skips\.json"):
        skipped_files.load(path)


def test_writers_at_one_moment_leave_a_whole_list(tmp_path: pathlib.Path):
    path = epath.Path(tmp_path / "skips.json")
    skipped_files.record(path, corrupt("web", "first", 1))
    stop = threading.Event()

    def write(name: str) -> None:
        for row in range(100, 0, -1):
            skipped_files.record(path, corrupt("web", name, row))
        stop.set()

    writer = threading.Thread(target=write, args=("a",))
    writer.start()
    while not stop.is_set():
        assert skipped_files.load(path)["web"]["first"] == 1
    writer.join()
    assert skipped_files.load(path)["web"] == {"first": 1, "a": 1}


def test_what_a_resume_allows():
    old = {"a": 10, "b": 20}
    assert skipped_files.compare("web", old, old) == ([], [])
    allowed, refused = skipped_files.compare("web", old, {**old, "c": 5, "a": 3})
    assert allowed == [
        "source 'web': a is skipped from row 3, was from row 10",
        "source 'web': c is skipped from row 5, was nowhere",
    ]
    assert not refused
    for new in ({"a": 10}, {"a": 11, "b": 20}, {**old, "c": skipped_files.FOOTER}):
        allowed, refused = skipped_files.compare("web", old, new)
        assert len(refused) == 1


def test_identity_has_the_list():
    source = MemorySource(rows=unique(2, 60))
    case = case_of(source)
    reader = SourceReader("web", source, source, case.data.read_options(0), retry_seconds=1, skipped={"file-0": 7})
    assert reader.identity["skips"] == {"file-0": 7}
    assert skipped_files.saved({"web": reader.identity}) == {"web": {"file-0": 7}}
