"""A teacher's cache: written by any workers, killed anywhere, it returns each token's own record in any batch."""

import dataclasses
import pathlib
import re
import threading
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from jaxtrain.data.pipeline import DataConfig, host_batches, pools
from jaxtrain.data.stores import teacher_store
from jaxtrain.data.stores.teacher_store import TeacherManifest, TeacherStore
from jaxtrain.data.stores.writer import Job, TeacherWriter
from jaxtrain.errors import CorruptError, UserError
from jaxtrain.interfaces import RECORDS
from jaxtrain.losses.cached import Layout
from jaxtrain.plan import Stage
from jaxtrain.tokenizers.spelling import Speller
from tests.data.memory_source import MemorySource, WordTokenizer, documents
from tests.data.runs import Drop, plan_of

LAYOUT = Layout(1 << 20, 1, ())  # 5 bytes, with arbitrary content here


def records_of(tokens: np.ndarray, following: np.ndarray) -> np.ndarray:
    """The content of a record here: the token and the one after it. [n] each → uint8 [n, 5]"""
    both = np.stack([tokens, following], axis=-1).astype("<u2").view(np.uint8)
    return np.concatenate([both, np.full((*both.shape[:-1], 1), 7, np.uint8)], axis=-1)


def score(found: list[np.ndarray]) -> list[np.ndarray]:
    return [records_of(tokens, np.append(tokens[1:], 0)) for tokens in found]


class KilledError(Exception):
    pass


class Killed:
    """Scores a few times, and then dies."""

    def __init__(self, times: int, score: Any = score):
        self.left, self._score = times, score

    def __call__(self, found: list[np.ndarray]) -> list[np.ndarray]:
        self.left -= 1
        if self.left < 0:
            raise KilledError
        return self._score(found)


def source(seed: int = 0, **options: Any) -> MemorySource:
    rows = [documents(count, seed + count, longest=30) for count in (40, 0, 9, 81, 1, 33)]
    return MemorySource(rows=rows, **options)


def job(config: MemorySource, folder: pathlib.Path, **changes: Any) -> tuple[Job, TeacherManifest]:
    said = {"add_bos": False, "teacher": {"found": "x"}, "layout": LAYOUT, "context": 8, "stride": 4, "part_rows": 16}
    made = TeacherManifest.of(config, config, WordTokenizer(), **(said | changes))
    return Job("a", str(folder), config, config, WordTokenizer(), 5.0), made


@pytest.fixture(autouse=True)
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jaxtrain.data.stores.writer._SCORED_TOKENS", 300)


def write(made: Any, workers: int = 1, score: Any = score, spellers: Any = None) -> list[bool]:
    where, planned = made
    return [
        TeacherWriter(where, planned, worker, workers, spellers).write(score, lambda documents, tokens: None)
        for worker in range(workers)
    ]


def stored(folder: pathlib.Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


SOURCES = {
    "random access": source(),
    "in order": source(random_access=False),
    "the first 70": source(max_samples=70),
    "the first 70, in order": source(max_samples=70, random_access=False),
    "filtered": source(transforms=(Drop(3),)),
}


@pytest.mark.parametrize("name", SOURCES)
def test_any_workers_killed_anywhere_write_the_same(name: str, tmp_path: pathlib.Path) -> None:
    config = SOURCES[name]
    assert write(job(config, tmp_path / "whole")) == [True]
    wanted = stored(tmp_path / "whole")
    assert "work" not in wanted
    folder = tmp_path / "killed"
    for times in range(30):
        try:
            ends = write(job(config, folder), workers=3, score=Killed(times % 3))
        except KilledError:
            with pytest.raises(UserError, match="is not finished"):
                TeacherManifest.load(str(folder))
            for thread in threading.enumerate():  # a killed process has none
                if thread.name.startswith("jaxtrain-cache-teacher"):
                    thread.join(60)
            continue
        break
    assert ends == [False, False, True]  # pyright: ignore[reportPossiblyUnboundVariable]
    assert stored(folder) == wanted
    assert all(TeacherWriter(*job(config, folder), worker, 3).complete for worker in range(3))
    made = TeacherManifest.verify(str(folder))
    parts = [part for file in made.parts for part in file]
    rows = sum(part.rows for part in parts)
    assert rows == (164 if config.max_samples is None else 70)
    estimate = teacher_store.size_of(made.total("tokens"), rows, len(parts), LAYOUT.width)
    assert made.total("size") <= estimate <= 1.2 * made.total("size")


def batches(
    config: MemorySource, folder: pathlib.Path, data: DataConfig, stages: Sequence[Stage], tokenizer: Any
) -> Iterator[Any]:
    records = TeacherStore(str(folder), TeacherManifest.load(str(folder)))
    rows = dataclasses.replace(data.row_spec(tokenizer, 2), records={"a": records}, width=LAYOUT.width)
    readers = data.build({"a": config}, seed=3)
    plan, threads = plan_of(data, stages, 3), pools(data)
    found = host_batches(readers, plan, rows, range(data.num_lanes), threads, after=0, states={}, prefetch=2)
    try:
        yield from found
    finally:
        found.close()


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.parametrize("lanes", [1, 2])
def test_every_token_gets_its_own_record(name: str, lanes: int, tmp_path: pathlib.Path) -> None:
    """Two epochs of shuffled rows of three lengths, overlapping, by best fit and cut."""
    config = SOURCES[name]
    write(job(config, tmp_path, add_bos=lanes == 2))
    data = DataConfig(sources={"a": config}, num_lanes=lanes, shuffle_window=8, holdout=0.1, add_bos=lanes == 2)
    stages = [
        Stage(seq_len=5, batch_size=8, overlap=0.4, tokens=400),
        Stage(seq_len=12, batch_size=8, tokens=960, packing="fit"),
        Stage(seq_len=64, batch_size=4, tokens=64 * 4 * 30),
    ]
    seen = 0
    for batch in batches(config, tmp_path, data, stages, WordTokenizer()):
        fields = batch.arrays
        wanted = records_of(fields["tokens"], fields["targets"])
        where = fields["loss_mask"]
        np.testing.assert_array_equal(fields[RECORDS][where], wanted[where])
        assert not fields[RECORDS][fields["segment_ids"] == 0].any()
        seen += where.sum()
        if batch.ended:
            break
    assert seen > 500


class Shifted(WordTokenizer):
    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids, lengths = super().encode_batch(texts)
        return ids + 1, lengths


def test_other_tokens_and_rows_are_refused(tmp_path: pathlib.Path) -> None:
    config = source()
    write(job(config, tmp_path))
    data = DataConfig(sources={"a": config}, num_lanes=1)
    stages = [Stage(seq_len=8, batch_size=4, tokens=320)]
    with pytest.raises(
        UserError, match=r"tokens for row \d+ of file-\d, but the run reads \d+ there, or different ones"
    ):
        list(batches(config, tmp_path, data, stages, Shifted()))
    records = TeacherStore(str(tmp_path), TeacherManifest.load(str(tmp_path)))
    with pytest.raises(UserError, match="no row 40 of file-0: the file has grown"):
        records.read(0, np.array([40]), np.zeros(1, np.int32), np.array([1]))
    path = tmp_path / teacher_store.shard_name(3, 1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"000003-000001\.array_record does not match its checksum"):
        TeacherManifest.verify(str(tmp_path))
    texts = [(row, config.rows[3][row]) for row in range(16, 32) if config.rows[3][row].strip()]
    encoded = [(row, WordTokenizer().encode_batch([text])) for row, text in texts]
    with pytest.raises((CorruptError, UserError)):  # depends on what is in the middle of the file
        [records.read(3, np.array([row]), np.append(ids, 1), lengths + 1) for row, (ids, lengths) in encoded]
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"000003-000001\.array_record has"):
        TeacherManifest.load(str(tmp_path))


def test_what_was_cached_otherwise_is_refused(tmp_path: pathlib.Path) -> None:
    config = source(max_samples=70)
    write(job(config, tmp_path))
    with pytest.raises(UserError, match=r"holds a different cache.*\n.*context: the cache has 8, expected 16"):
        TeacherWriter(*job(config, tmp_path, context=16), 0, 1)
    made, tokenizer = TeacherManifest.load(str(tmp_path)), WordTokenizer()
    teacher_store.check(made, str(tmp_path), source(max_samples=50), config, tokenizer)
    other = source(max_samples=71, transforms=(Drop(3),), name="b")
    tokenizer.identity = {"kind": "words", "hash": "new", "vocab_size": 1, "eos_id": 1, "bos_id": 0, "probe": [1]}
    old = dict(tokenizer.identity, hash="old")
    with pytest.raises(UserError) as refused:
        teacher_store.check(dataclasses.replace(made, tokenizer=old), str(tmp_path), other, other, tokenizer)
    for part in ("source files: the cache has ['file-0'", "transforms:", "max_samples: the cache has 70", "tokenizer:"):
        assert part in str(refused.value)
    with pytest.raises(UserError, match="there is no teacher's cache"):
        TeacherManifest.load(str(tmp_path / "nowhere"))
    (tmp_path / "cache.json").write_text((tmp_path / "cache.json").read_text().replace('"stride": 4', '"stride": 3'))
    with pytest.raises(UserError, match="is damaged"):
        TeacherManifest.planned(str(tmp_path))


class Bytes(WordTokenizer):
    """A token is a byte, or two digits if there is a token for them."""

    bos_id: int | None = 1
    eos_id = 0

    def __init__(self, pairs: int):
        digits = [f"{pair:02}".encode() for pair in range(pairs)]
        self.spellings = [b"", b"", *(bytes([byte]) for byte in range(256)), *digits]
        self.vocab_size, self.identity = len(self.spellings), {"kind": "bytes", "hash": pairs, "eos_id": 0}
        self._id = {spelling: id for id, spelling in enumerate(self.spellings)}
        self._pieces = re.compile(b"|".join([*digits, b"."]), re.DOTALL)

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [[self._id[piece] for piece in self._pieces.findall(text.encode())] for text in texts]
        return np.array([id for some in ids for id in some], np.int32), np.array(list(map(len, ids)), np.int64)


def ends_of(tokenizer: Bytes, tokens: np.ndarray) -> np.ndarray:
    return np.cumsum([len(tokenizer.spellings[token]) for token in tokens])


@pytest.mark.parametrize(("theirs", "ours"), [(40, 70), (0, 100), (100, 0), (50, 50)])
def test_a_teacher_with_another_tokenizer(theirs: int, ours: int, tmp_path: pathlib.Path) -> None:
    """Killed anywhere, it writes the same; each token that ends where one of the teacher's does gets that record."""
    config, teacher, run = source(), Bytes(theirs), Bytes(ours)
    spellers = Speller(teacher, "the teacher's"), Speller(run, "the run's")

    def score(found: list[np.ndarray]) -> list[np.ndarray]:
        assert all(tokens[-1] == teacher.eos_id for tokens in found)
        return [records_of(ends_of(teacher, tokens), 1 + np.arange(len(tokens))) for tokens in found]

    def made(folder: pathlib.Path) -> Any:
        vocabulary = [spelling.decode("latin-1") for spelling in teacher.spellings]
        said = {"layout": LAYOUT, "context": 8, "stride": 4, "part_rows": 16, "vocabulary": vocabulary}
        planned = TeacherManifest.of(config, config, teacher, add_bos=True, teacher={"found": "x"}, **said)
        return Job("a", str(folder), config, config, teacher, 5.0), planned

    assert write(made(tmp_path / "whole"), score=score, spellers=spellers) == [True]
    for _ in range(2):
        with pytest.raises(KilledError):
            write(made(tmp_path / "killed"), score=Killed(1, score), spellers=spellers)
    assert write(made(tmp_path / "killed"), workers=2, score=score, spellers=spellers)[-1]
    manifest = TeacherManifest.verify(str(tmp_path / "whole"))
    assert manifest == TeacherManifest.verify(str(tmp_path / "killed"))
    store = TeacherStore(str(tmp_path / "killed"), manifest, spellers[1])
    share = [0, 0]
    for file, texts in enumerate(config.rows):
        for row, text in enumerate(texts):
            ids = run.encode_batch([text])[0]
            if not len(ids):
                continue
            tokens = np.array([1, *ids, run.eos_id], np.int32)
            found = store.read(file, np.array([row]), tokens, np.array([len(tokens)]))
            at = {
                end: 2 + index for index, end in enumerate(ends_of(teacher, teacher.encode_batch([text])[0]).tolist())
            }
            at[0] = 1  # after BOS
            mine = ends_of(run, tokens).tolist()
            wanted = [records_of(np.array(end), np.array(at[end])) if end in at else np.zeros(5) for end in mine]
            wanted[-1] = np.zeros(5)
            np.testing.assert_array_equal(found, wanted)
            share[0] += sum(end in at for end in mine[1:-1])
            share[1] += len(ids)
    where, planned = made(tmp_path / "again")
    counts = TeacherWriter(where, planned, 0, 1, spellers)
    counts.sample()
    assert (counts.alignment.unfollowed, counts.alignment.documents > 5) == (0, True)
    assert (share[0] == share[1]) == (theirs in (0, ours))
    with pytest.raises(UserError, match="has other tokens for row 0 of file-0"):
        store.read(0, np.array([0]), np.append(run.encode_batch(["another"])[0], 0), np.array([8]))
    where, planned = made(tmp_path / "whole")
    with pytest.raises(UserError, match="vocabulary: the cache has"):
        TeacherWriter(where, dataclasses.replace(planned, vocabulary=None), 0, 1)


def test_a_worker_that_still_counts_when_another_finishes(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = where, planned = job(source(random_access=False), tmp_path)
    slow: Any = TeacherWriter(where, planned, 0, 2)

    def counting() -> Iterator[Any]:
        assert write(made, workers=2)[1]
        slow._mark_done("0.rows", 1)
        yield from ()

    monkeypatch.setattr(slow, "_unfinished", counting)
    assert slow.write(score, lambda documents, tokens: None)


def test_a_full_disk_stops_it_and_keeps_what_is_done(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = job(source(), tmp_path)
    free = iter([1 << 40, 1 << 40, 1 << 20])

    def disk_usage(path: str) -> Any:
        return SimpleNamespace(free=next(free))

    monkeypatch.setattr("jaxtrain.data.stores.writer.shutil.disk_usage", disk_usage)
    with pytest.raises(UserError, match=r"is full \(0\.00 GB are free\)\. Finished shards are kept"):
        write(made)
    documents, tokens, size = TeacherWriter(*made, 0, 1).done()
    assert documents > 0
    assert tokens * LAYOUT.width < size
    monkeypatch.undo()

    class Full:
        """ArrayRecord's writer on a full disk."""

        def __init__(self, path: str, options: str):
            pathlib.Path(path).write_bytes(b"a part")

        def write(self, record: bytes) -> None:
            raise RuntimeError("write() failed: No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("jaxtrain.data.stores.writer.array_records", lambda: SimpleNamespace(ArrayRecordWriter=Full))
        with pytest.raises(UserError, match=r"is full \(write\(\) failed: No space left on device\)"):
            write(made)
    assert not [path for path in (tmp_path / "work").iterdir() if path.suffix == ".tmp"]
    assert write(made) == [True]
