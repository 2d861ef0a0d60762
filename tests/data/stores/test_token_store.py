"""Token stores: a stream's batches from its tokens, written by any workers, killed or not; TFDS reads them too."""

import dataclasses
import json
import logging
import pathlib
import random
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxtrain.data import modes
from jaxtrain.data.io import retry
from jaxtrain.data.pipeline import DataConfig, StepBatch
from jaxtrain.data.stores import token_store, writer
from jaxtrain.data.stores.token_store import RamCache, TokenManifest, TokenStore
from jaxtrain.data.stores.writer import Job
from jaxtrain.data.token_arrays import TokenArrays
from jaxtrain.errors import CorruptError, TransientError, UserError
from jaxtrain.interfaces import Source, versioned
from tests.data.memory_source import MemorySource, WordTokenizer, documents
from tests.data.runs import Case, Drop, batches_of, random_case

TOKENIZER = WordTokenizer()


def write(folder: pathlib.Path, sources: Mapping[str, Any], workers: int = 1, tokenizer: Any = TOKENIZER) -> None:
    for name, source in sources.items():
        done = [
            writer.write_tokens(job(folder, name, source, tokenizer), worker, workers, lambda *_: None)
            for worker in range(workers)
        ]
        assert any(done)


def job(folder: pathlib.Path, name: str, source: Any, tokenizer: Any = TOKENIZER) -> Job:
    return Job(name, str(folder / name), source, source.resolve(), tokenizer, retry_seconds=10.0)


def stored(folder: pathlib.Path, data: Any, **changes: Any) -> dict[str, Source]:
    data = dataclasses.replace(data, **{"mode": "pretokenized", **changes})
    return {name: one.source for name, one in modes.open_sources(data, TOKENIZER, str(folder)).items()}


def assert_same(found: Sequence[StepBatch], expected: Sequence[StepBatch]) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.step, a.ended) == (b.step, b.ended)
        for name, values in b.arrays.items():
            np.testing.assert_array_equal(a.arrays[name], values)
        for lane, state in b.states.items():
            np.testing.assert_array_equal(a.states[lane], state)


def ids_of(source: Source, file: int, row: int = 0) -> list[list[int]]:
    found: list[list[int]] = []
    for block in source.open(file, row):
        texts = block["text"]
        found += [ids.tolist() for ids in np.split(texts.ids, texts.starts[1:-1])]
    return found


def words(text: str) -> list[int]:
    return TOKENIZER.encode_batch([text])[0].tolist()


@pytest.mark.parametrize("seed", range(12))
def test_a_store_gives_the_streams_batches(seed, tmp_path):
    """Divided and shared files, random access or not, shuffled, mixed, filtered, cut, held out: every lane's state."""
    case = random_case(seed)
    write(tmp_path, case.data.sources, workers=1 + seed % 3)
    resolved = stored(tmp_path, case.data, ram_cache_gb=[0.0, 1e-6, 1.0][seed % 3])
    assert_same(case.run(resolved=resolved), case.run())
    if case.data.holdout:
        assert_same(case.run(resolved=resolved, held_out=True), case.run(held_out=True))


@pytest.mark.parametrize("seed", [3, 4, 8])
def test_the_mode_may_change_at_every_step(seed, tmp_path):
    case = random_case(seed)
    write(tmp_path, case.data.sources)
    expected = case.run()
    after: StepBatch | None = None
    found: list[StepBatch] = []
    for step in range(len(expected)):
        resolved = stored(tmp_path, case.data) if step % 2 == seed % 2 else None
        states = after.states if after else {}
        with batches_of(case, after=step, states=states, resolved=resolved) as batches:
            after = next(batches)
        found.append(after)
    assert_same(found, expected)


def test_one_record_for_each_row_in_order(tmp_path):
    texts = [documents(70, 1, longest=40), [], documents(3, 2), ["", "", ""]]
    source = MemorySource(rows=texts, transforms=(Drop(5),))
    write(tmp_path, {"a": source})
    found = TokenManifest.load(str(tmp_path / "a"))
    assert [file.rows for file in found.files] == [70, 0, 3, 3]
    assert [file.shard is None for file in found.files] == [False, True, False, False]
    (store,) = stored(tmp_path, data_of({"a": source})).values()
    for number, rows in enumerate(texts):
        expected = [[] if row % 5 == 0 else words(text) for row, text in enumerate(rows)]
        for first in range(len(rows) + 1):
            assert ids_of(store, number, first) == expected[first:]
        assert store.row_groups(number) == source.row_groups(number)
    assert store.identity == versioned(source.identity)


@pytest.mark.parametrize(
    ("reason", "said"),
    [
        ("write() failed: No space left on device; Failed to close chunk_writer", "is full .*Finished shards are kept"),
        ("write() failed: Disk quota exceeded; writing a", "is full .*Finished shards are kept"),
        ("open() failed: Permission denied; opening a", "cannot be written .*Give an --output that you can write to"),
        ("open() failed: Operation not permitted; opening a", "cannot be written"),
        ("open() failed: Read-only file system; opening a", "cannot be written"),
        ("open() failed: Not a directory; opening a", "cannot be written"),
        ("open() failed: No such file or directory; opening a", "cannot be written"),
    ],
)
def test_a_disk_that_refuses_is_the_users_matter(tmp_path, monkeypatch, reason, said):
    class Refusing:
        """ArrayRecord's writer, in its own words."""

        def __init__(self, path: str, options: str):
            pathlib.Path(path).write_bytes(b"a part")

        def write(self, record: bytes) -> None:
            pass

        def close(self) -> None:
            raise RuntimeError(reason)

    source = MemorySource(rows=[documents(9, 1)])
    with monkeypatch.context() as patched:
        patched.setattr(writer, "array_records", lambda: SimpleNamespace(ArrayRecordWriter=Refusing))
        with pytest.raises(UserError, match=said):
            write(tmp_path, {"a": source})
    assert not list((tmp_path / "a").rglob("*.tmp"))
    write(tmp_path, {"a": source})
    TokenManifest.verify(str(tmp_path / "a"))


def test_a_removed_folder_is_the_users_matter(tmp_path):
    """By ArrayRecord itself."""
    source = MemorySource(rows=[documents(9, 1)])
    one = writer._Writer(job(tmp_path, "a", source), TokenManifest, 0, 1)
    path = str(tmp_path / "none" / "x")
    with pytest.raises(UserError, match=r"cannot be written .*No such file"), one._record_writer(path, "") as to:
        to.write(b"a")


def test_tfds_opens_it(tmp_path):
    """With its own parser and features, without our code."""
    tfds = pytest.importorskip("tensorflow_datasets")
    texts = [documents(40, 1, longest=300), [], documents(9, 2)]
    write(tmp_path, {"a": MemorySource(rows=texts)}, workers=2)
    for folder, dtype in ((tmp_path / "a", np.uint32), (_small(tmp_path, texts), np.uint16)):
        data = tfds.builder_from_directory(folder).as_data_source(split="train")
        assert len(data) == 49
        rows = [data[index]["tokens"] for index in range(49)]
        assert {row.dtype for row in rows} == {np.dtype(dtype)}
        assert [row.tolist() for row in rows] == [words(text) for file in texts for text in file]


def _small(folder: pathlib.Path, texts: list[list[str]]) -> pathlib.Path:
    tokenizer = WordTokenizer()
    tokenizer.vocab_size = 1 << 16
    write(folder / "small", {"a": MemorySource(rows=texts)}, tokenizer=tokenizer)
    return folder / "small" / "a"


def test_records_are_those_that_tfds_writes():
    tfds = pytest.importorskip("tensorflow_datasets")
    for dtype in (np.dtype("<u2"), np.dtype("<u4")):
        tensor = tfds.features.Tensor(shape=(None,), dtype=dtype.type, encoding="bytes")
        features = tfds.features.FeaturesDict({"tokens": tensor})
        # Wherever a length of the nested messages takes another byte, and nearby.
        sizes = [*range(140), *range(8160, 8200), (1 << 20) - 8, 1 << 20]
        lists = [np.arange(size).astype(dtype) for size in sizes]
        records = [token_store.encode(ids) for ids in lists]
        assert records == [features.serialize_example({"tokens": ids}) for ids in lists]
        decoded = token_store.decode(records, dtype)
        assert decoded.lengths.tolist() == sizes
        np.testing.assert_array_equal(decoded.ids, np.concatenate(lists))


def data_of(sources: dict[str, Any], **more: Any) -> DataConfig:
    return DataConfig(sources=sources, **more)


def content(folder: pathlib.Path) -> dict[str, Any]:
    """Every file; of the manifest, all but its record of the config, where tests inject their faults."""
    found: dict[str, Any] = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads(found.pop(TokenManifest.FILE).read_text())
    del manifest["settings"], manifest["digest"]
    return {**{name: path.read_bytes() for name, path in found.items()}, TokenManifest.FILE: manifest}


class Killed(BaseException):
    pass


@pytest.mark.parametrize("cut", [None, 31])
@pytest.mark.parametrize("random_access", [True, False])
def test_workers_and_kills_leave_no_trace(tmp_path, random_access, cut):
    """Any number of workers, each killed at every file and restarted, write the same store as a single one."""
    rows = [documents(size, size) for size in (9, 30, 0, 4, 17)]

    def source(**more: Any) -> MemorySource:
        return MemorySource(rows=rows, random_access=random_access, max_samples=cut, **more)

    write(tmp_path / "one", {"a": source()})
    write(tmp_path / "three", {"a": source()}, workers=3)
    expected = content(tmp_path / "one" / "a")
    assert not [name for name in expected if "work" in name]
    assert content(tmp_path / "three" / "a") == expected

    rng, complete = random.Random(0), False
    for _ in range(100):
        left = rng.randint(1, 6)

        def fault(file: int, row: int) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Killed

        try:
            killed = job(tmp_path / "killed", "a", source(fault=fault, block=40))
            complete = writer.write_tokens(killed, rng.randrange(3), 3, lambda *_: None) or complete
        except Killed:
            pass
    assert complete
    assert content(tmp_path / "killed" / "a") == expected


def test_a_finisher_that_is_killed_anywhere(tmp_path, monkeypatch):
    source = MemorySource(rows=[documents(8, 1), documents(8, 2)])
    write(tmp_path / "whole", {"a": source})
    for name in ("_move", "_write_metadata", "write_text"):
        folder = tmp_path / name
        calls = 0
        original = getattr(writer, name)

        def dying(*arguments: Any, original: Any = original) -> None:
            nonlocal calls
            calls += 1
            original(*arguments)
            if calls == 2:
                raise Killed

        for _ in range(9):
            monkeypatch.setattr(writer, name, dying)
            try:
                writer.write_tokens(job(folder, "a", source), 0, 1, lambda *_: None)
            except Killed:
                continue
            finally:
                monkeypatch.undo()
            break
        assert content(folder / "a") == content(tmp_path / "whole" / "a")


def test_outages_while_writing_change_nothing(tmp_path, monkeypatch):
    rows = [documents(40, 1), documents(40, 2)]
    write(tmp_path / "calm", {"a": MemorySource(rows=rows)})
    rng = random.Random(0)
    monkeypatch.setattr(retry, "sleep", lambda seconds: None)

    def fault(file: int, row: int) -> None:
        if rng.random() < 0.3:
            raise TransientError("reset")

    write(tmp_path / "rough", {"a": MemorySource(rows=rows, fault=fault)})
    assert content(tmp_path / "rough" / "a") == content(tmp_path / "calm" / "a")


SOURCE = MemorySource(rows=[documents(30, 1), documents(30, 2)], max_samples=50)


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    write(tmp_path, {"a": SOURCE})
    return tmp_path


class OtherTokenizer(WordTokenizer):
    identity = dict.fromkeys(("kind", "hash", "vocab_size", "eos_id", "bos_id", "probe"), 0)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (dataclasses.replace(SOURCE, name="other"), "source name: the store has 'file', expected 'other'"),
        (dataclasses.replace(SOURCE, transforms=(Drop(3),)), r"transforms: the store has \[\], the config \[.*Drop"),
        (dataclasses.replace(SOURCE, max_samples=51), "max_samples: the store has 50, the config 51"),
        (dataclasses.replace(SOURCE, max_samples=None), "max_samples: the store has 50, the config None"),
    ],
)
def test_a_store_of_another_run_is_refused(folder, source, said, caplog):
    with pytest.raises(UserError, match=said) as refused:
        stored(folder, data_of({"a": source}))
    assert "tools.pretokenize" in str(refused.value)
    # "auto" logs it, and streams.
    with caplog.at_level(logging.WARNING, "jaxtrain"):
        (one,) = modes.open_sources(data_of({"a": source}, mode="auto"), TOKENIZER, str(folder)).values()
    assert one.mode == "stream"
    assert "does not belong to this run" in caplog.text


def test_another_tokenizer_or_commit_is_refused(folder, monkeypatch):
    saved = dict.fromkeys(OtherTokenizer.identity, 1)
    manifest = dataclasses.replace(TokenManifest.load(str(folder / "a")), tokenizer=saved)
    with pytest.raises(UserError, match=r"(?s)tokenizer has changed.*hash: was 1, is 0"):
        token_store.check(manifest, "there", SOURCE, OtherTokenizer(), None)
    data = data_of({"a": SOURCE}, mode="pretokenized")
    moved = {"a": {"source": {**SOURCE.identity, "revision": "abc"}}}
    with pytest.raises(UserError, match="source revision: the store has None, expected abc"):
        modes.open_sources(data, TOKENIZER, str(folder), moved)
    modes.open_sources(data, TOKENIZER, str(folder), {"a": {"source": SOURCE.identity}})


def test_less_than_the_store_has_may_be_read(folder):
    source = dataclasses.replace(SOURCE, max_samples=7)
    assert stored(folder, data_of({"a": source}))["a"].identity == versioned(source.identity)


def test_what_is_not_whole_is_refused(folder, tmp_path):
    data = data_of({"a": SOURCE})
    with pytest.raises(UserError, match=r"no token store .*elsewhere/a. Write one with tools.pretokenize"):
        stored(folder / "elsewhere", data)
    shard = next((folder / "a").glob("*.array_record-00001-*"))
    whole = shard.read_bytes()
    shard.write_bytes(whole + b"x")
    with pytest.raises(UserError, match=r"00001-of-00002 has .* bytes, not"):
        stored(folder, data)
    shard.unlink()
    with pytest.raises(UserError, match=r"00001-of-00002 is missing"):
        stored(folder, data)
    shard.write_bytes(whole)
    TokenManifest.verify(str(folder / "a"))
    manifest = folder / "a" / TokenManifest.FILE
    text = manifest.read_text()
    manifest.write_text(text.replace('"rows": 30', '"rows": 31'))
    with pytest.raises(UserError, match=r"store.json is damaged"):
        stored(folder, data)
    manifest.write_text(json.dumps({**json.loads(text), "format": 99}))
    with pytest.raises(UserError, match="format 99"):
        stored(folder, data)
    manifest.unlink()
    with pytest.raises(UserError, match=r"not finished: run tools.pretokenize again"):
        stored(folder, data)


def test_changed_bytes_are_found(folder):
    """By the digests in a verification, otherwise by ArrayRecord's own hashes when reading."""
    shard = next((folder / "a").glob("*.array_record-00000-*"))
    data = bytearray(shard.read_bytes())
    ids = np.array(words(SOURCE.rows[0][20]), "<u4").tobytes()
    assert len(ids) > 4
    data[data.index(ids)] ^= 1
    shard.write_bytes(data)
    (store,) = stored(folder, data_of({"a": SOURCE})).values()
    with pytest.raises(CorruptError, match="00000-of-00002 is damaged"):
        ids_of(store, 0)
    with pytest.raises(UserError, match="does not match its checksum"):
        TokenManifest.verify(str(folder / "a"))


def test_auto_takes_what_is_there_for_each_source(folder, caplog):
    sources = {"a": SOURCE, "b": MemorySource(rows=[documents(30, 3)])}
    opened = modes.open_sources(data_of(sources, mode="auto"), TOKENIZER, str(folder))
    assert {name: one.mode for name, one in opened.items()} == {"a": "pretokenized", "b": "stream"}
    assert isinstance(opened["a"].source, TokenStore)
    assert not caplog.records
    with pytest.raises(UserError, match="source 'b': there is no token store"):
        modes.open_sources(data_of(sources, mode="pretokenized"), TOKENIZER, str(folder))


def test_the_ram_cache_forgets_the_least_recently_used():
    block = TokenArrays.of([[1] * 10])
    cache = RamCache(3.5 * block.nbytes)
    for number in range(3):
        cache.put(("a", number), block)
    assert cache.get(("a", 0)) is block
    cache.put(("a", 3), block)
    assert [cache.get(("a", number)) is not None for number in range(4)] == [True, False, True, True]
    assert cache.used == 3 * block.nbytes
    cache.put(("b", 0), TokenArrays.of([[1] * 100]))
    assert cache.get(("b", 0)) is None


def test_a_second_epoch_reads_the_ram_cache(folder, monkeypatch):
    source = stored(folder, data_of({"a": SOURCE}), ram_cache_gb=1.0)["a"]
    first = ids_of(source, 0)
    monkeypatch.setattr("jaxtrain.data.stores.record_store.array_records", None)
    assert ids_of(source, 0) == first
    assert ids_of(source, 0, 13) == first[13:]


def test_cases_are_of_every_kind():
    """What the seeds above cover, so that a change of random_case does not empty the tests."""
    cases: list[Case] = [random_case(seed) for seed in range(12)]
    sources: list[Any] = [source for case in cases for source in case.data.sources.values()]
    assert {source.random_access for source in sources} == {True, False}
    assert {source.max_samples is None for source in sources} == {True, False}
    assert {bool(source.transforms) for source in sources} == {True, False}
    assert any(case.data.holdout for case in cases)
    assert {len(case.data.sources) for case in cases} == {1, 2}
