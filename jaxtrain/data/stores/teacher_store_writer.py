"""Writing teachers' caches: by several workers side by side, killed at any point, and again from where they stopped.

In `FOLDER/work` lie `plan.json` (a manifest without parts, made by the first worker, kept by all), for each part that
is done its number with `.json`, and for each file whose rows have been counted FILE.rows. A part appears whole or not
at all, and what a worker was at when it was killed is made anew. Who finds that all is done writes the manifest.
"""

import contextlib
import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from typing import Protocol

import numpy as np

from jaxtrain.data.io import retry
from jaxtrain.data.io.exit_guard import gate
from jaxtrain.data.shared_file_reader import regroup
from jaxtrain.data.source_reader import text_of
from jaxtrain.data.stores import record_store, teacher_store
from jaxtrain.data.stores.record_store import WORK, array_records, digest_of, write_text
from jaxtrain.data.stores.teacher_store import MANIFEST, Manifest, Part, part_name
from jaxtrain.data.threads import DaemonPool, Prefetcher
from jaxtrain.data.token_arrays import TokenArrays
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Block, Source, SourceConfig, Tokenizer

# One record a group, since documents are read one by one.
_WRITER = "group_size:1,uncompressed"
_RESERVE = 1 << 28  # bytes of the disk that are left free
_SAMPLED_FILES = 16  # for the estimate
# Parts are scored together up to so many tokens: many files have a document or two, far less than a batch.
_TOGETHER = 200_000


class Score(Protocol):
    """Documents' tokens, int32 [n] each → their records, uint8 [n, W] each."""

    def __call__(self, documents: list[np.ndarray]) -> list[np.ndarray]: ...


@dataclasses.dataclass(frozen=True)
class Job:
    """A source whose cache is to be written. folder: of the cache. manifest: what it will say, without parts."""

    name: str
    folder: str
    config: SourceConfig
    source: Source
    tokenizer: Tokenizer
    manifest: Manifest
    retry_seconds: float


Progress = Callable[[int, int], None]  # (documents, tokens) that were written since the last call
_Tokens = tuple[int, int, list[np.ndarray]]  # file, part, the tokens of each of its rows


def begin(job: Job) -> Manifest:
    """The plan of the cache: that of the first worker. Raises UserError, both sides shown, if it is not this job's."""
    begun = planned(job.folder)
    if begun is None:
        record_store.begin(job.folder, job.manifest.to_json())
        begun = planned(job.folder)
    assert begun is not None
    # Of the Manifest, as JSON has it.
    mine, theirs = (json.loads(dataclasses.replace(each, parts=[]).to_json()) for each in (job.manifest, begun))
    changed = [name for name in mine if mine[name] != theirs[name] and name not in ("digest", "settings", "names")]
    if changed:
        lines = [f"  {name}: the cache has {theirs[name]}, wanted is {mine[name]}" for name in changed]
        raise UserError(
            f"{job.folder} holds another cache, finished or begun:\n" + "\n".join(lines) + "\nGive another --output, "
            "or remove that folder."
        )
    return begun


def planned(folder: str) -> Manifest | None:
    """What was begun or finished there; None for nothing."""
    return record_store.planned(folder, MANIFEST, teacher_store.manifest_from_json)


class Writer:
    """Worker `worker` (from 0) of `workers`, for one source."""

    def __init__(self, job: Job, worker: int, workers: int):
        self.job, self.worker, self.workers = job, worker, workers
        self.manifest = begin(job)
        self.complete = teacher_store.exists(job.folder)
        self._work = os.path.join(job.folder, WORK)
        self._half = f".worker-{worker}.tmp"
        self._largest = 0
        if self.complete:
            shutil.rmtree(self._work, ignore_errors=True)  # who finished it may have been killed
            return
        record_store.remove_half_written(self._work, self._half)

    @functools.cached_property
    def known_rows(self) -> list[int] | None:
        """Rows that are wanted of each file, up to the last one that has any; None where only reading tells."""
        source, left = self.job.source, self.manifest.max_samples
        if not source.random_access:
            return None
        found: list[int] = []
        while len(found) < len(source.files) and left != 0:
            read = functools.partial(source.row_groups, len(found))
            rows = sum(retry.attempt(read, what=self._what(len(found)), deadline=self.job.retry_seconds))
            found.append(rows if left is None else min(rows, left))
            left = None if left is None else left - found[-1]
        return found

    def sample(self) -> tuple[int, int, int | None]:
        """(documents, tokens) of a few parts, and how many documents there are at most; None where nobody knows."""
        documents = tokens = 0
        for file in range(min(len(self.job.source.files), _SAMPLED_FILES)):
            left = None if self.manifest.max_samples is None else self.manifest.max_samples - documents
            for _, _, found in self._parts(file, 0, left, {0}):
                documents, tokens = documents + len(found), tokens + sum(map(len, found))
            if documents >= self.manifest.part_rows or documents == self.manifest.max_samples:
                break
        known = self.manifest.max_samples if self.known_rows is None else sum(self.known_rows)
        return documents, tokens, known

    def done(self) -> tuple[int, int, int]:
        """(documents, tokens, bytes) of the parts that are written, by all workers."""
        found = [self._about(name) for name in os.listdir(self._work) if name.endswith(".json") and "-" in name]
        return sum(p.rows for p in found), sum(p.tokens for p in found), sum(p.size for p in found)

    def write(self, score: Score, progress: Progress) -> bool:
        """This worker's parts, and the manifest if all are done. Returns whether the cache is complete.

        Raises UserError where the disk gets full, with all finished parts kept; what reading raises.
        """
        pool = DaemonPool(1, "jaxtrain-cache-teacher")
        try:
            for group in Prefetcher(_together(self._mine()), pool):
                self._check_space()
                records = iter(score([document for _, _, tokens in group for document in tokens if len(document)]))
                for file, part, tokens in group:
                    self._part(file, part, tokens, records)
                    progress(len(tokens), sum(map(len, tokens)))
        finally:
            pool.shutdown(wait=False)
        return self._finish()

    def _mine(self) -> Iterator[_Tokens]:
        """The parts of this worker that are not done, tokenized."""
        size, rows = self.manifest.part_rows, self.known_rows
        if rows is not None:
            parts = [(file, part) for file, count in enumerate(rows) for part in range(-(-count // size))]
            # Neighbours to the same worker: a file is opened once, and read on.
            begin, end = (len(parts) * worker // self.workers for worker in (self.worker, self.worker + 1))
            wanted: dict[int, set[int]] = {}
            for file, part in parts[begin:end]:
                wanted.setdefault(file, set()).add(part)
            for file, numbers in wanted.items():
                left = {number for number in numbers if not self._is_done(file, number)}
                if left:
                    yield from self._parts(file, min(left), rows[file], left)
            return
        # Without row numbers every worker reads all text, which costs little beside a teacher.
        limit = self.manifest.max_samples
        for file in range(len(self.job.source.files)):
            if limit == 0:
                return
            count = self._counted(file)
            if count is None or any(not self._is_done(file, part) for part in range(-(-count // size))):
                yield from self._parts(file, 0, limit, None)
                count = self._counted(file)
            assert count is not None
            limit = None if limit is None else limit - count

    def _parts(self, file: int, first: int, limit: int | None, wanted: set[int] | None) -> Iterator[_Tokens]:
        """Parts of a file from number `first` on. limit: rows wanted of the file. wanted: these parts; None: those of
        this worker that are not done, and the file's rows are counted.
        """
        size = self.manifest.part_rows
        stop = limit if wanted is None or limit is None else min(limit, (max(wanted) + 1) * size)
        opening = functools.partial(self.job.source.open, file, stop=stop)
        blocks = retry.retrying(opening, first * size, what=self._what(file), deadline=self.job.retry_seconds)
        rows = 0
        try:
            left = None if stop is None else stop - first * size
            for number, block in enumerate(regroup(blocks, size, left), first):
                rows += len(block["text"])
                mine = (file + number) % self.workers == self.worker and not self._is_done(file, number)
                if number in wanted if wanted is not None else mine:
                    yield file, number, self._tokens(block)
        finally:
            retry.close(blocks)
        if wanted is None:
            path = os.path.join(self._work, f"{file}.rows")
            write_text(path + self._half, str(rows))
            os.replace(path + self._half, path)

    def _tokens(self, block: Block) -> list[np.ndarray]:
        """Of each row, with the special tokens that training adds; none where there is no text."""
        tokenizer, transforms = self.job.tokenizer, self.job.config.transforms
        texts = [text_of(block, row, transforms) for row in range(len(block["text"]))]
        with gate:
            ids, lengths = tokenizer.encode_batch([text for text in texts if text])
        kept = np.flatnonzero(lengths)
        bos_id = tokenizer.bos_id if self.manifest.add_bos else None
        flat, closed = TokenArrays(ids, lengths).closed(kept, tokenizer.eos_id, bos_id)
        found = dict(zip(kept.tolist(), np.split(flat, closed.cumsum()[:-1]), strict=True)) if len(kept) else {}
        numbers = iter(range(len(lengths)))
        nothing = np.empty(0, np.int32)
        return [found.get(next(numbers), nothing) if text else nothing for text in texts]

    def _part(self, file: int, part: int, tokens: list[np.ndarray], records: Iterator[np.ndarray]) -> None:
        path = os.path.join(self._work, part_name(file, part))
        half = path + self._half
        try:
            writer = array_records().ArrayRecordWriter(half, _WRITER)
            for document in tokens:
                writer.write(teacher_store.encode(document, next(records)) if len(document) else b"")
            writer.close()
            about = Part(len(tokens), sum(map(len, tokens)), os.path.getsize(half), digest_of(half))
            os.replace(half, os.path.join(self.job.folder, part_name(file, part)))
            write_text(half, json.dumps(dataclasses.asdict(about)))
            os.replace(half, self._marker(file, part))
        except (OSError, RuntimeError) as error:  # ArrayRecord's are RuntimeErrors
            with contextlib.suppress(OSError):
                os.unlink(half)
            raise self._full(str(error)) from None
        self._largest = max(self._largest, about.size)

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.job.folder).free
        if free < 2 * self._largest + _RESERVE:
            raise self._full(f"{free / 1e9:.2f} GB are free")

    def _full(self, why: str) -> UserError:
        return UserError(
            f"{self.job.folder} cannot take more ({why}). What is written is kept: make room, and give the same "
            "command again to go on; or begin another cache with a smaller --k or --max_samples."
        )

    def _finish(self) -> bool:
        """Write the manifest, if everything is done."""
        counts, left = self.known_rows, self.manifest.max_samples
        if counts is None:
            counts = []
            while len(counts) < len(self.job.source.files) and left != 0:
                count = self._counted(len(counts))
                if count is None:
                    return teacher_store.exists(self.job.folder)
                counts.append(count)
                left = None if left is None else left - count
        size = self.manifest.part_rows
        named = [(file, part) for file, count in enumerate(counts) for part in range(-(-count // size))]
        if not all(self._is_done(*each) for each in named):
            return teacher_store.exists(self.job.folder)
        try:
            parts: list[list[Part]] = [[] for _ in counts]
            for file, part in named:
                parts[file].append(self._about(os.path.basename(self._marker(file, part))))
            path = os.path.join(self._work, MANIFEST + self._half)
            write_text(path, dataclasses.replace(self.manifest, parts=parts).to_json())
            os.replace(path, os.path.join(self.job.folder, MANIFEST))
        except FileNotFoundError:
            if not teacher_store.exists(self.job.folder):
                raise
            # Another worker has finished it, and cleaned up.
        shutil.rmtree(self._work, ignore_errors=True)
        return True

    def _marker(self, file: int, part: int) -> str:
        return os.path.join(self._work, f"{file}-{part}.json")

    def _is_done(self, file: int, part: int) -> bool:
        return os.path.exists(self._marker(file, part))

    def _about(self, name: str) -> Part:
        with open(os.path.join(self._work, name), encoding="utf-8") as file:
            return Part(**json.load(file))

    def _counted(self, file: int) -> int | None:
        with contextlib.suppress(FileNotFoundError), open(os.path.join(self._work, f"{file}.rows")) as counted:
            return int(counted.read())
        return None

    def _what(self, file: int) -> str:
        return f"source {self.job.name!r}, file {self.job.source.files[file]}"


def _together(parts: Iterator[_Tokens]) -> Iterator[list[_Tokens]]:
    """Neighbours, in groups of about `_TOGETHER` tokens."""
    group: list[_Tokens] = []
    size = 0
    for part in parts:
        group.append(part)
        size += sum(map(len, part[2]))
        if size >= _TOGETHER:
            yield group
            group, size = [], 0
    if group:
        yield group
