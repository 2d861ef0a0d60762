"""Writes token and teacher stores. Workers run side by side, may be killed at any point, and resume where they stopped.

A store is a set of ArrayRecord shards and a manifest that is written last. Until then `FOLDER/work` holds `plan.json`,
the manifest without shards, which the first worker writes and all others follow, and a JSON marker for each finished
shard: `FILE.json` in a token store, `FILE-PART.json` in a teacher store (where `FILE.rows` also records how many rows a
file turned out to have). A shard appears whole, by a rename, or not at all; a restarted worker rewrites an unfinished
one. Whichever worker finds all shards done finishes the store. Every step of finishing is idempotent, so several
workers may finish at once and any of them may be killed.
"""

import contextlib
import dataclasses
import functools
import itertools
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

import numpy as np

from jaxtrain.data.io import retry
from jaxtrain.data.shared_file_reader import head, regroup
from jaxtrain.data.source_reader import text_of
from jaxtrain.data.sources.streams import read_now
from jaxtrain.data.stores import record_store, teacher_store, token_store
from jaxtrain.data.stores.record_store import WORK, Shard, array_records, digest_of, write_text
from jaxtrain.data.stores.teacher_store import TeacherManifest, shard_name
from jaxtrain.data.stores.token_store import StoredFile, TokenManifest
from jaxtrain.data.threads import DaemonPool, Prefetcher
from jaxtrain.data.token_arrays import TokenArrays
from jaxtrain.data.tokenizing import CHUNK_CHARACTERS, encode
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Block, Source, SourceConfig, Tokenizer
from jaxtrain.tokenizers.identity import well_formed
from jaxtrain.tokenizers.spelling import Speller, predicts

# Messages of the operating system for a full disk and for an unwritable folder.
_FULL = ("No space left", "quota")
_REFUSED = (
    *("Permission denied", "Operation not permitted", "Read-only file system"),
    *("Not a directory", "No such file or directory"),
)
# Groups of 16 read at 735 M tokens/s in ranges and at 42 in single records, as TFDS reads them. Uncompressed, since
# zstd saves little on ids and writes at 37 M tokens/s instead of 190.
_TOKEN_OPTIONS = "group_size:16,uncompressed"
# Teacher records are read one at a time, in shuffled order.
_TEACHER_OPTIONS = "group_size:1,uncompressed"
_TFDS_NAME = "tokens"
_RESERVED_BYTES = 1 << 28  # disk space to leave free
_SAMPLED_FILES = 16  # for the size estimate
# Shards are scored together up to this many tokens: many files hold only a document or two, far less than a batch.
_SCORED_TOKENS = 200_000

Progress = Callable[[int, int], None]  # called with the (documents, tokens) written since the last call
_TokenizedShard = tuple[int, int, list["_Row"]]  # file, number of the shard in it, its rows


class Score(Protocol):
    """A teacher: maps the tokens of documents, int32 [n] each, to their records, uint8 [n, W] each."""

    def __call__(self, documents: list[np.ndarray]) -> list[np.ndarray]: ...


class _Row(NamedTuple):
    """A row of a teacher store: the tokens to score, int32 [n], what precedes their records, and how many to store."""

    tokens: np.ndarray
    head: bytes
    records: int


@dataclasses.dataclass
class Alignment:
    """How the tokens of a teacher with its own tokenizer fit the run's.

    Attributes:
        documents: Documents read.
        unfollowed: Those that one of the two tokenizers changes, so that nothing aligns.
        positions: The run's tokens that predict another or the end.
        aligned: Those that end where one of the teacher's does.
    """

    documents: int = 0
    unfollowed: int = 0
    positions: int = 0
    aligned: int = 0


@dataclasses.dataclass(frozen=True)
class Job:
    """One source and where its store goes.

    Attributes:
        name: The source's name.
        folder: The store's folder.
        retry_seconds: How long an outage of the source may last.
    """

    name: str
    folder: str
    config: SourceConfig
    source: Source
    tokenizer: Tokenizer
    retry_seconds: float


class _Writer:
    """What both kinds of store share, for worker `worker` (from 0) of `workers`.

    Attributes:
        manifest: The store's plan, written by the first worker.
        complete: Whether the store was complete before this worker started.
    """

    def __init__(self, job: Job, manifest: Any, worker: int, workers: int):
        self.job, self.manifest, self.worker, self.workers = job, manifest, worker, workers
        self.complete = manifest.exists(job.folder)
        self._work = os.path.join(job.folder, WORK)
        self._half = f".worker-{worker}.tmp"  # suffix of the file this worker is writing
        if self.complete:
            shutil.rmtree(self._work, ignore_errors=True)  # whichever worker finished it may have been killed
            return
        os.makedirs(self._work, exist_ok=True)
        for name in os.listdir(self._work):
            if name.endswith(self._half):
                # A failed writer of this process may still be cleaning up.
                pathlib.Path(self._work, name).unlink(missing_ok=True)

    def _what(self, file: int) -> str:
        return f"source {self.job.name!r}, file {self.job.source.files[file]}"

    def _row_groups(self, file: int) -> list[int]:
        read = functools.partial(self.job.source.row_groups, file)
        return retry.attempt(read, what=self._what(file), deadline=self.job.retry_seconds)

    def _wanted_rows(self) -> list[int]:
        """Rows to write of each file of a random-access source, up to the last file with any."""
        rows: list[int] = []
        left = self.manifest.max_samples
        while len(rows) < len(self.job.source.files) and left != 0:
            count = sum(self._row_groups(len(rows)))
            rows.append(count if left is None else min(count, left))
            left = None if left is None else left - rows[-1]
        return rows

    def _read(self, file: int, row: int, stop: int | None) -> Iterator[Block]:
        opening = functools.partial(self.job.source.open, file, stop=stop)
        return retry.retrying(opening, row, what=self._what(file), deadline=self.job.retry_seconds)

    def _texts(self, block: Block) -> list[str]:
        """The text of each row; "" if it has none or a filter drops it."""
        return [text_of(block, row, self.job.config.transforms) for row in range(len(block["text"]))]

    def _ids(self, texts: list[str], file: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return encode(self.job.tokenizer, texts, self.job.name, self.job.source.files[file], rows)

    @contextlib.contextmanager
    def _record_writer(self, path: str, options: str) -> Iterator[Any]:
        """An ArrayRecordWriter for `path`.

        Raises:
            UserError: The disk is full or refuses the file. Other errors pass.
        """
        writer = None
        try:
            writer = array_records().ArrayRecordWriter(path, options)
            yield writer
            writer.close()
        except BaseException as error:
            with contextlib.suppress(Exception):
                writer.close()  # pyright: ignore[reportOptionalMemberAccess] - if it was never opened
            # ArrayRecord reports disk errors as RuntimeError, and so does JAX for other errors.
            is_full = isinstance(error, OSError | RuntimeError) and any(text in str(error) for text in _FULL)
            is_refused = isinstance(error, OSError | RuntimeError) and any(text in str(error) for text in _REFUSED)
            if not (is_full or is_refused):
                raise
            with contextlib.suppress(OSError):
                os.unlink(path)
            if is_full:
                raise self._full(str(error)) from None
            raise UserError(f"{path} cannot be written ({error}). Give an --output that you can write to.") from None

    def _full(self, why: str) -> UserError:
        return UserError(
            f"{self.job.folder} is full ({why}). Finished shards are kept: free some space and run the same command "
            "again, or start another store with a smaller --max_samples."
        )

    def _mark_done(self, marker: str, content: object) -> None:
        path = os.path.join(self._work, marker)
        write_text(path + self._half, json.dumps(content))
        os.replace(path + self._half, path)

    def _is_done(self, marker: str) -> bool:
        return os.path.exists(os.path.join(self._work, marker))

    def _marked(self, marker: str) -> Any:
        with open(os.path.join(self._work, marker), encoding="utf-8") as file:
            return json.load(file)

    def _finish(self, publish: Callable[[], record_store.Manifest]) -> bool:
        """Completes the store. publish: puts the shards in place and returns the manifest."""
        try:
            manifest = publish()
            path = os.path.join(self._work, manifest.FILE + self._half)
            write_text(path, manifest.to_json())
            os.replace(path, os.path.join(self.job.folder, manifest.FILE))
        except FileNotFoundError:
            if not self.manifest.exists(self.job.folder):
                raise
            # Another worker finished the store and removed the work folder.
        shutil.rmtree(self._work, ignore_errors=True)
        return True


def write_tokens(job: Job, worker: int, workers: int, progress: Progress) -> bool:
    """Writes this worker's files of a token store, and finishes the store if all files are done.

    Args:
        job: The source and where its store goes.
        worker: Index of this worker, from 0.
        workers: Number of workers.
        progress: Called with the documents and tokens written since the last call.

    Returns:
        Whether the store is complete.

    Raises:
        UserError: The folder holds another run's store, or the disk is full.
        TransientError, CorruptError: Raised by the source.
    """
    made = TokenManifest.of(
        job.source,
        job.config,
        job.tokenizer,
        random_access=job.source.random_access,
        vocab_size=job.tokenizer.vocab_size,
    )
    begun = dataclasses.replace(made, source=read_now(made.source)).begun(job.folder)
    token_store.check(begun, job.folder, job.config, job.tokenizer, job.source.identity)
    writer = _TokenWriter(job, begun, worker, workers)
    return writer.complete or writer.write(progress)


class _TokenWriter(_Writer):
    """Writes one shard per file of the source."""

    manifest: TokenManifest

    def write(self, progress: Progress) -> bool:
        files, left = self.job.source.files, self.manifest.max_samples
        if left is None or self.job.source.random_access:
            rows = [None] * len(files) if left is None else self._wanted_rows()
            count = len(rows)
            for file in range(self.worker, count, self.workers):
                self._file(file, rows[file], progress)
        elif self.worker:
            return self.manifest.exists(
                self.job.folder
            )  # only reading shows which file holds the last document: worker 0 does
        else:
            count = 0
            while left and count < len(files):
                left -= self._file(count, left, progress).rows
                count += 1
        markers = [f"{file}.json" for file in range(count)]
        if not all(map(self._is_done, markers)):
            return self.manifest.exists(self.job.folder)
        return self._finish(functools.partial(self._publish, markers))

    def _file(self, file: int, limit: int | None, progress: Progress) -> StoredFile:
        """Writes the shard of a file unless it is done. limit: rows to write; None: all."""
        marker = f"{file}.json"
        if not self._is_done(marker):
            shard = os.path.join(self._work, f"{file}.array_record")
            rows, tokens = self._shard(file, limit, shard + self._half, progress)
            groups = self._row_groups(file) if self.job.source.random_access else None
            assert groups is None or limit is not None or rows == sum(groups), f"{self._what(file)}: {rows} rows"
            size, digest = os.path.getsize(shard + self._half), digest_of(shard + self._half)
            os.replace(shard + self._half, shard)
            done = StoredFile(rows=rows, tokens=tokens, size=size, digest=digest, row_groups=groups, shard=None)
            self._mark_done(marker, dataclasses.asdict(done))
        return StoredFile(**self._marked(marker))

    def _shard(self, file: int, limit: int | None, path: str, progress: Progress) -> tuple[int, int]:
        """Writes one record per row. Returns (rows, tokens)."""
        rows = tokens = reported = 0
        pool = DaemonPool(1, "jaxtrain-pretokenize")
        try:
            with self._record_writer(path, _TOKEN_OPTIONS) as writer:
                for block in Prefetcher(self._blocks(file, limit), pool):
                    for ids in self._encoded(block, file, rows):
                        writer.write(token_store.encode(ids))
                        tokens += len(ids)
                    rows += len(block["text"])
                    progress(len(block["text"]), tokens - reported)
                    reported = tokens
        finally:
            pool.shutdown(wait=False)
        return rows, tokens

    def _blocks(self, file: int, limit: int | None) -> Iterator[Block]:
        """The file's rows in the source's own blocks, which are small enough to hold a few."""
        left = limit
        for block in self._read(file, 0, limit):
            if left is not None:
                block = head(block, left)
                left -= len(block["text"])
            if block["text"]:
                yield block
            if left == 0:
                return

    def _encoded(self, block: Block, file: int, first: int) -> Iterator[np.ndarray]:
        """The ids of each row, in chunks that the tokenizer's threads can share. first: the first row's number."""
        texts, dtype = self._texts(block), token_store.dtype_of(self.job.tokenizer.vocab_size)
        sizes = itertools.accumulate(map(len, texts))
        for _, group in itertools.groupby(zip(texts, sizes, strict=True), lambda item: item[1] // CHUNK_CHARACTERS):
            chunk = [text for text, _ in group]
            rows = first + np.flatnonzero([bool(text) for text in chunk])
            first += len(chunk)
            ids, lengths = self._ids([text for text in chunk if text], file, rows)
            # `np.split` takes 1.5 microseconds per document, a slice 0.2.
            ids, ends = ids.astype(dtype), lengths.cumsum()
            slices = iter(map(slice, (ends - lengths).tolist(), ends.tolist()))
            yield from (ids[next(slices)] if text else ids[:0] for text in chunk)

    def _publish(self, markers: list[str]) -> TokenManifest:
        """Names the shards and writes the metadata as TFDS expects them. Returns the manifest."""
        folder = self.job.folder
        files = [StoredFile(**self._marked(marker)) for marker in markers]
        shards = [number for number, file in enumerate(files) if file.rows]
        if not shards:
            raise UserError(f"source {self.job.name!r} has no rows. Check its name, split and files.")
        for place, number in enumerate(shards):
            name = f"{_TFDS_NAME}-train.array_record-{place:05d}-of-{len(shards):05d}"
            files[number] = dataclasses.replace(files[number], shard=name)
            _move(os.path.join(self._work, f"{number}.array_record"), os.path.join(folder, name))
        with tempfile.TemporaryDirectory(dir=self._work) as mine:
            _write_metadata(mine, [files[number] for number in shards], token_store.dtype_of(self.manifest.vocab_size))
            for name in os.listdir(mine):
                os.replace(os.path.join(mine, name), os.path.join(folder, name))
        return dataclasses.replace(self.manifest, files=files)


def _move(source: str, target: str) -> None:
    try:
        os.rename(source, target)
    except FileNotFoundError:  # another worker has moved it
        if not os.path.exists(target):
            raise


def _write_metadata(folder: str, files: list[StoredFile], dtype: np.dtype) -> None:
    """Writes what TFDS needs to open the store. Importing TFDS takes 2 s, so only this function does."""
    import tensorflow_datasets as tfds

    tokens = tfds.features.Tensor(shape=(None,), dtype=dtype.newbyteorder("=").type, encoding="bytes")
    # TFDS reads the shards' names from the folder, but the shards lie elsewhere: empty files stand in for them.
    names = [os.path.join(folder, str(file.shard)) for file in files]
    for name in names:
        open(name, "w").close()
    lengths, size = [file.rows for file in files], sum(file.size for file in files)
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=tfds.features.FeaturesDict({"tokens": tokens}),
        split_infos=[tfds.core.SplitInfo(name="train", shard_lengths=lengths, num_bytes=size)],
        check_data=False,
    )
    for name in names:
        os.unlink(name)


class TeacherWriter(_Writer):
    """Writes the teacher store of one source."""

    manifest: TeacherManifest

    def __init__(
        self,
        job: Job,
        manifest: TeacherManifest,
        worker: int,
        workers: int,
        spellers: tuple[Speller, Speller] | None = None,
    ):
        """Joins the plan in the store's folder, or writes it.

        Args:
            job: The source and where its store goes; its tokenizer is the teacher's.
            manifest: The manifest to write, without shards.
            worker: Index of this worker, from 0.
            workers: Number of workers.
            spellers: Of the teacher's own tokenizer and the run's, if they differ.

        Raises:
            UserError: The folder holds a different store, finished or not. The message shows both sides.
        """
        super().__init__(job, _begin_teacher(job.folder, manifest), worker, workers)
        self.alignment = Alignment()
        self._spellers = spellers
        self._largest = 0  # bytes of the largest shard so far

    @functools.cached_property
    def known_rows(self) -> list[int] | None:
        """Rows to write of each file, up to the last one with any; None if they are known only by reading."""
        return self._wanted_rows() if self.job.source.random_access else None

    def sample(self) -> tuple[int, int, int | None]:
        """Samples the source for a size estimate.

        Returns:
            (documents, tokens) of the first few shards, and the most documents the store can have; None if unknown.
        """
        documents = tokens = 0
        for file in range(min(len(self.job.source.files), _SAMPLED_FILES)):
            left = None if self.manifest.max_samples is None else self.manifest.max_samples - documents
            for _, _, found in self._shards(file, 0, left, {0}):
                documents, tokens = documents + len(found), tokens + sum(row.records for row in found)
            if documents >= self.manifest.part_rows or documents == self.manifest.max_samples:
                break
        return documents, tokens, self.manifest.max_samples if self.known_rows is None else sum(self.known_rows)

    def done(self) -> tuple[int, int, int]:
        """(documents, tokens, bytes) of the shards that all workers have finished."""
        names = [name for name in os.listdir(self._work) if name.endswith(".json") and "-" in name]
        shards = [Shard(**self._marked(name)) for name in names]
        return sum(s.rows for s in shards), sum(s.tokens for s in shards), sum(s.size for s in shards)

    def write(self, score: Score, progress: Progress) -> bool:
        """Writes this worker's shards, and finishes the store if all shards are done.

        Args:
            score: The teacher.
            progress: Called with the documents and tokens written since the last call.

        Returns:
            Whether the store is complete.

        Raises:
            UserError: The disk is full. Finished shards are kept.
            TransientError, CorruptError: Raised by the source.
        """
        try:
            return self._write(score, progress)
        except FileNotFoundError:
            if not self.manifest.exists(self.job.folder):
                raise
            # This worker's shards were done and it was still counting rows when another one finished the store and
            # removed the work folder.
            return True

    def _write(self, score: Score, progress: Progress) -> bool:
        pool = DaemonPool(1, "jaxtrain-cache-teacher")
        try:
            for group in Prefetcher(_grouped(self._unfinished()), pool):
                free = shutil.disk_usage(self.job.folder).free
                if free < 2 * self._largest + _RESERVED_BYTES:
                    raise self._full(f"{free / 1e9:.2f} GB are free")
                records = iter(score([row.tokens for _, _, rows in group for row in rows if len(row.tokens)]))
                for file, number, rows in group:
                    self._shard(file, number, rows, records)
                    progress(len(rows), sum(row.records for row in rows))
        finally:
            pool.shutdown(wait=False)
        counts = self.known_rows
        if counts is None:
            counts, left = [], self.manifest.max_samples
            while len(counts) < len(self.job.source.files) and left != 0:
                if not self._is_done(f"{len(counts)}.rows"):
                    return self.manifest.exists(self.job.folder)
                counts.append(self._marked(f"{len(counts)}.rows"))
                left = None if left is None else left - counts[-1]
        names = [[f"{file}-{number}.json" for number in range(self._num_shards(n))] for file, n in enumerate(counts)]
        if not all(map(self._is_done, itertools.chain(*names))):
            return self.manifest.exists(self.job.folder)

        def publish() -> TeacherManifest:
            parts = [[Shard(**self._marked(name)) for name in of_file] for of_file in names]
            return dataclasses.replace(self.manifest, parts=parts)

        return self._finish(publish)

    def _num_shards(self, rows: int) -> int:
        return -(-rows // self.manifest.part_rows)

    def _unfinished(self) -> Iterator[_TokenizedShard]:
        """This worker's unfinished shards, tokenized."""
        rows = self.known_rows
        if rows is not None:
            shards = [(file, number) for file, n in enumerate(rows) for number in range(self._num_shards(n))]
            # Consecutive shards go to the same worker, so a file is opened once and read sequentially.
            begin, end = (len(shards) * worker // self.workers for worker in (self.worker, self.worker + 1))
            for file, group in itertools.groupby(shards[begin:end], lambda shard: shard[0]):
                left = {number for _, number in group if not self._is_done(f"{file}-{number}.json")}
                if left:
                    yield from self._shards(file, min(left), rows[file], left)
            return
        # If row counts are unknown, every worker reads all text, which is cheap next to a teacher.
        limit = self.manifest.max_samples
        for file in range(len(self.job.source.files)):
            if limit == 0:
                return
            counted = f"{file}.rows"
            numbers = range(self._num_shards(self._marked(counted))) if self._is_done(counted) else None
            if numbers is None or not all(self._is_done(f"{file}-{number}.json") for number in numbers):
                yield from self._shards(file, 0, limit, None)
            limit = None if limit is None else limit - self._marked(counted)

    def _shards(self, file: int, first: int, limit: int | None, wanted: set[int] | None) -> Iterator[_TokenizedShard]:
        """Shards of a file from number `first` on.

        Args:
            limit: rows to write of the file; None: all.
            wanted: numbers of the shards to yield. None: those of this worker that are not done; the file is then read
                to its end and its rows are recorded.
        """
        size = self.manifest.part_rows
        stop = limit if wanted is None or limit is None else min(limit, (max(wanted) + 1) * size)
        blocks = self._read(file, first * size, stop)
        rows = 0
        try:
            left = None if stop is None else stop - first * size
            for number, block in enumerate(regroup(blocks, size, left), first):
                rows += len(block["text"])
                mine = (file + number) % self.workers == self.worker and not self._is_done(f"{file}-{number}.json")
                if number in wanted if wanted is not None else mine:
                    yield file, number, self._rows(block, file, number * size)
        finally:
            retry.close(blocks)
        if wanted is None:
            self._mark_done(f"{file}.rows", rows)

    def _rows(self, block: Block, file: int, first: int) -> list[_Row]:
        """The rows of a block, from row `first` on, tokenized as training does. A row without text is empty."""
        tokenizer, texts = self.job.tokenizer, self._texts(block)
        rows = [row for row, text in enumerate(texts) if text]
        found = [_Row(np.empty(0, np.int32), b"", 0)] * len(texts)
        ids, lengths = self._ids([texts[row] for row in rows], file, first + np.array(rows, np.int64))
        kept = np.flatnonzero(lengths)
        bos_id = tokenizer.bos_id if self.manifest.add_bos else None
        flat, closed = TokenArrays(ids, lengths).closed(kept, tokenizer.eos_id, bos_id)
        documents = dict(zip(kept.tolist(), np.split(flat, closed.cumsum()[:-1]), strict=False))
        for index, row in enumerate(rows):
            tokens = documents.get(index)
            if self._spellers is not None:
                found[row] = self._aligned(texts[row], tokens, *self._spellers)
            elif tokens is not None:
                found[row] = _Row(tokens, teacher_store.head_of_tokens(tokens), len(tokens))
        return found

    def _aligned(self, text: str, tokens: np.ndarray | None, theirs: Speller, ours: Speller) -> _Row:
        """A row by the teacher's own tokenizer. Compares it with the run's."""
        content = well_formed([text])[0].encode()
        ends = None if tokens is None else _ends(theirs, tokens, content)
        ids = ours.tokenizer.encode_batch([text])[0]
        our_ends = _ends(ours, np.append(ids, ours.tokenizer.eos_id), content)
        count = self.alignment
        count.documents += 1
        if our_ends is not None:
            places = our_ends[predicts(our_ends)]
            count.positions += len(places)
            count.aligned += 0 if ends is None else int(np.isin(places, ends).sum())
        count.unfollowed += ends is None or our_ends is None
        if tokens is None or ends is None:
            return _Row(np.empty(0, np.int32), teacher_store.head_of_text(content, None), 0)
        return _Row(tokens, teacher_store.head_of_text(content, ends[:-1]), len(tokens) - 1)

    def _shard(self, file: int, number: int, rows: list[_Row], records: Iterator[np.ndarray]) -> None:
        name = shard_name(file, number)
        half = os.path.join(self._work, name + self._half)
        with self._record_writer(half, _TEACHER_OPTIONS) as writer:
            for row in rows:
                writer.write(row.head + (next(records)[: row.records].tobytes() if len(row.tokens) else b""))
        tokens = sum(row.records for row in rows)
        shard = Shard(rows=len(rows), tokens=tokens, size=os.path.getsize(half), digest=digest_of(half))
        os.replace(half, os.path.join(self.job.folder, name))
        self._mark_done(f"{file}-{number}.json", dataclasses.asdict(shard))
        self._largest = max(self._largest, shard.size)


def _ends(speller: Speller, tokens: np.ndarray, text: bytes) -> np.ndarray | None:
    """Where tokens end in a text that they spell, perhaps after a space; None if they do not."""
    spelled, ends = speller.follow(tokens)
    return ends - (len(spelled) - len(text)) if spelled in (text, b" " + text) else None


def _begin_teacher(folder: str, manifest: TeacherManifest) -> TeacherManifest:
    """The store's plan, from the first worker. Raises UserError if it differs from `manifest`."""
    begun = manifest.begun(folder)
    wanted, found = (json.loads(dataclasses.replace(each, parts=[]).to_json()) for each in (manifest, begun))
    names = sorted((wanted.keys() | found.keys()) - {"digest", "settings", "names"})
    changed = [name for name in names if wanted.get(name) != found.get(name)]
    if changed:
        lines = [
            f"  {n}: the cache has {str(found.get(n))[:500]}, expected {str(wanted.get(n))[:500]}" for n in changed
        ]
        raise UserError(
            f"{folder} holds a different cache:\n" + "\n".join(lines) + "\nGive another --output, or "
            "remove that folder."
        )
    return begun


def _grouped(shards: Iterator[_TokenizedShard]) -> Iterator[list[_TokenizedShard]]:
    """Consecutive shards, in groups of about `_SCORED_TOKENS` tokens."""
    group: list[_TokenizedShard] = []
    size = 0
    for shard in shards:
        group.append(shard)
        size += sum(len(row.tokens) for row in shard[2])
        if size >= _SCORED_TOKENS:
            yield group
            group, size = [], 0
    if group:
        yield group
