"""Writing token stores: by several workers side by side, killed at any point, and again from where they stopped.

In `FOLDER/work` lie `plan.json` (a manifest without files, made by the first worker, kept by all others), and for each
file of the source that is done NUMBER.array_record and then NUMBER.json. What is half written has another name and is
begun anew. Who finds that all files are done gives the shards their names, writes the metadata, and last the manifest.
Everything that a finisher does can be done twice, so that several may, and any may be killed.
"""

import dataclasses
import functools
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

import numpy as np

from jaxtrain.data.io import retry
from jaxtrain.data.io.exit_guard import gate
from jaxtrain.data.source_reader import describe, text_of
from jaxtrain.data.sources.streams import read_now
from jaxtrain.data.stores import record_store, token_store
from jaxtrain.data.stores.record_store import WORK, array_records, digest_of, write_text
from jaxtrain.data.stores.token_store import MANIFEST, Manifest, StoredFile
from jaxtrain.data.threads import DaemonPool, Prefetcher
from jaxtrain.data.tokenizing import CHUNK_CHARACTERS
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Block, Source, SourceConfig, Tokenizer, Transform

# Groups of 16: ranges are read at 735 M tokens/s, and single records, as TFDS reads them, at 42. Uncompressed, since
# zstd saves little on ids and writes at 37 M tokens/s instead of 190.
_WRITER = "group_size:16,uncompressed"
_NAME = "tokens"  # the dataset's, in TFDS

Progress = Callable[[int, int], None]  # (documents, tokens) that were written since the last call


@dataclasses.dataclass(frozen=True)
class Job:
    """A source whose store is to be written. folder: of the store."""

    name: str
    folder: str
    config: SourceConfig
    source: Source
    retry_seconds: float

    def manifest(self, tokenizer: Tokenizer) -> Manifest:
        return Manifest(
            source=read_now(self.source.identity),
            settings=token_store.settings_of(self.config),
            names=list(self.source.files),
            random_access=self.source.random_access,
            max_samples=self.config.max_samples,
            transforms=[describe(transform) for transform in self.config.transforms],
            tokenizer=tokenizer.identity,
            vocab_size=tokenizer.vocab_size,
        )


def planned(folder: str) -> Manifest | None:
    """What was begun or finished there; None for nothing."""
    return record_store.planned(folder, MANIFEST, token_store.manifest_from_json)


def write(job: Job, tokenizer: Tokenizer, worker: int, workers: int, progress: Progress) -> bool:
    """Worker `worker` (from 0) of `workers`: writes its files, and finishes the store if all are done.

    Returns whether the store is complete. Raises UserError if another store is there.
    """
    begun = planned(job.folder)
    if begun is None:
        record_store.begin(job.folder, job.manifest(tokenizer).to_json())
        begun = planned(job.folder)
        assert begun is not None
    token_store.check(begun, job.folder, job.config, tokenizer, job.source.identity)
    if token_store.exists(job.folder):
        shutil.rmtree(os.path.join(job.folder, WORK), ignore_errors=True)  # who finished it may have been killed
        return True
    work = _Work(job, begun.max_samples, tokenizer, worker, progress)
    if begun.max_samples is not None and not job.source.random_access:
        # Which file holds the last document, only reading tells.
        return work.in_order(begun.max_samples) if worker == 0 else token_store.exists(job.folder)
    limits = work.limits()
    for number in range(worker, len(limits), workers):
        work.one(number, limits[number])
    return work.finish(len(limits))


class _Work:
    """One worker's share of a source."""

    def __init__(self, job: Job, max_samples: int | None, tokenizer: Tokenizer, worker: int, progress: Progress):
        self.job, self.max_samples, self.tokenizer, self.progress = job, max_samples, tokenizer, progress
        self.folder = os.path.join(job.folder, WORK)
        self.half = f".worker-{worker}.tmp"
        self.dtype = token_store.dtype_of(tokenizer.vocab_size)
        record_store.remove_half_written(self.folder, self.half)

    def limits(self) -> list[int | None]:
        """How many rows of each file are wanted, for the files up to the last one that has any; None for all."""
        source, left = self.job.source, self.max_samples
        if left is None:
            return [None] * len(source.files)
        found: list[int | None] = []
        while left and len(found) < len(source.files):
            found.append(min(sum(self._row_groups(len(found)) or []), left))
            left -= found[-1] or 0
        return found

    def in_order(self, max_samples: int) -> bool:
        left, number = max_samples, 0
        while left and number < len(self.job.source.files):
            left -= self.one(number, left).rows
            number += 1
        return self.finish(number)

    def one(self, number: int, limit: int | None) -> StoredFile:
        """Write file `number`, if that is not done. limit: of its rows."""
        done = os.path.join(self.folder, f"{number}.json")
        if not os.path.exists(done):
            shard = os.path.join(self.folder, f"{number}.array_record")
            try:
                rows, tokens = self._shard(number, limit, shard + self.half)
            except (OSError, RuntimeError) as error:  # ArrayRecord's are RuntimeErrors
                if "No space left" not in str(error):
                    raise
                os.unlink(shard + self.half)
                raise UserError(
                    f"{self.job.folder} cannot take more ({error}). Files that are done are kept: make room, and give "
                    "the same command again to go on."
                ) from None
            groups = self._row_groups(number)
            assert groups is None or limit is not None or rows == sum(groups), f"{self._what(number)}: {rows} rows"
            size, digest = os.path.getsize(shard + self.half), digest_of(shard + self.half)
            os.replace(shard + self.half, shard)
            about = StoredFile(rows, tokens, groups, None, size, digest)
            write_text(done + self.half, json.dumps(dataclasses.asdict(about)))
            os.replace(done + self.half, done)
        with open(done, encoding="utf-8") as file:
            return StoredFile(**json.load(file))

    def _shard(self, number: int, limit: int | None, path: str) -> tuple[int, int]:
        """Writes one record a row; returns (rows, tokens)."""
        rows = tokens = reported = 0
        writer = array_records().ArrayRecordWriter(path, _WRITER)
        pool = DaemonPool(1, "jaxtrain-pretokenize")
        try:
            for block in Prefetcher(self._blocks(number, limit), pool):
                for ids in _encoded(block, self.job.config.transforms, self.tokenizer, self.dtype):
                    writer.write(token_store.encode(ids))
                    tokens += len(ids)
                rows += len(block["text"])
                self.progress(len(block["text"]), tokens - reported)
                reported = tokens
        finally:
            pool.shutdown(wait=False)
            writer.close()
        return rows, tokens

    def _blocks(self, number: int, limit: int | None) -> Iterator[Block]:
        """The file's rows, in blocks small enough that a few of them may wait."""
        opening = functools.partial(self.job.source.open, number)
        what, left = self._what(number), limit
        for block in retry.retrying(opening, 0, what=what, deadline=self.job.retry_seconds):
            if left is not None:
                block = {name: values[:left] for name, values in block.items()}
                left -= len(block["text"])
            if block["text"]:
                yield block
            if left == 0:
                return

    def _row_groups(self, number: int) -> list[int] | None:
        if not self.job.source.random_access:
            return None
        read = functools.partial(self.job.source.row_groups, number)
        return retry.attempt(read, what=self._what(number), deadline=self.job.retry_seconds)

    def _what(self, number: int) -> str:
        return f"source {self.job.name!r}, file {self.job.source.files[number]}"

    def finish(self, count: int) -> bool:
        """Complete the store if its first `count` files are done, which are all that it has."""
        folder = self.job.folder
        done = [os.path.join(self.folder, f"{number}.json") for number in range(count)]
        if not all(map(os.path.exists, done)):
            return token_store.exists(folder)
        try:
            files = [StoredFile(**json.loads(_read_text(path))) for path in done]
            begun = planned(folder)
            assert begun is not None
            shards = [number for number, file in enumerate(files) if file.rows]
            if not shards:
                raise UserError(f"source {self.job.name!r} has no rows at all. Look at its name, split and files.")
            for place, number in enumerate(shards):
                name = f"{_NAME}-train.array_record-{place:05d}-of-{len(shards):05d}"
                files[number] = dataclasses.replace(files[number], shard=name)
                _move(os.path.join(self.folder, f"{number}.array_record"), os.path.join(folder, name))
            with tempfile.TemporaryDirectory(dir=self.folder) as mine:
                _write_metadata(mine, [files[number] for number in shards], self.dtype)
                for name in os.listdir(mine):
                    os.replace(os.path.join(mine, name), os.path.join(folder, name))
                write_text(os.path.join(mine, MANIFEST), dataclasses.replace(begun, files=files).to_json())
                os.replace(os.path.join(mine, MANIFEST), os.path.join(folder, MANIFEST))
        except FileNotFoundError:
            if not token_store.exists(folder):
                raise
            # Another worker has finished it, and cleaned up.
        shutil.rmtree(self.folder, ignore_errors=True)
        return True


def _encoded(
    block: Block, transforms: tuple[Transform, ...], tokenizer: Tokenizer, dtype: np.dtype
) -> Iterator[np.ndarray]:
    """The ids of each row, none for what has no text or is dropped."""
    texts = [text_of(block, row, transforms) for row in range(len(block["text"]))]
    sizes = itertools.accumulate(map(len, texts))
    for _, group in itertools.groupby(zip(texts, sizes, strict=True), lambda item: item[1] // CHUNK_CHARACTERS):
        chunk = [text for text, _ in group]
        with gate:
            ids, lengths = tokenizer.encode_batch([text for text in chunk if text])
        # `np.split` takes 1.5 microseconds a piece, a slice 0.2.
        ids, ends = ids.astype(dtype), lengths.cumsum()
        pieces = iter(map(slice, (ends - lengths).tolist(), ends.tolist()))
        yield from (ids[next(pieces)] if text else ids[:0] for text in chunk)


def _move(source: str, target: str) -> None:
    try:
        os.rename(source, target)
    except FileNotFoundError:
        if not os.path.exists(target):
            raise


def _write_metadata(folder: str, files: list[StoredFile], dtype: np.dtype) -> None:
    """What TFDS wants to know. It is imported here alone: that takes 2 s."""
    import tensorflow_datasets as tfds

    tokens = tfds.features.Tensor(shape=(None,), dtype=dtype.newbyteorder("=").type, encoding="bytes")
    features = tfds.features.FeaturesDict({"tokens": tokens})
    lengths, size = [file.rows for file in files], sum(file.size for file in files)
    # It goes by the names of the shards, which are elsewhere.
    names = [os.path.join(folder, str(file.shard)) for file in files]
    for name in names:
        open(name, "w").close()
    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=features,
        split_infos=[tfds.core.SplitInfo(name="train", shard_lengths=lengths, num_bytes=size)],
        check_data=False,
    )
    for name in names:
        os.unlink(name)


def _read_text(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()
