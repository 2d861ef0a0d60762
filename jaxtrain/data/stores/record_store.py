"""What token stores and teacher stores share: ArrayRecords beside a manifest, written by several workers.

The manifest is JSON with a digest of itself, written last: its presence means that the rest is complete. Until then
`FOLDER/work/plan.json` describes the store to be written. The first worker creates it and all others follow it.
"""

import collections
import contextlib
import dataclasses
import functools
import hashlib
import importlib
import json
import os
import threading
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Self

from jaxtrain import cli
from jaxtrain.data.io import names, retry
from jaxtrain.data.source_reader import describe
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.errors import CorruptError, UserError
from jaxtrain.interfaces import Json, Source, SourceConfig, Tokenizer
from jaxtrain.tokenizers.identity import mismatch

FORMAT = 1
WORK = "work"
_IDLE = 32  # idle open files to keep; up to 1 MB each
_FREE = ("max_samples", "transforms", "fetch_rows")  # settings; the first two are compared separately


def array_records() -> Any:
    """The library's module, which is compiled and untyped. Imported on demand, since most runs do not need it."""
    return importlib.import_module("array_record.python.array_record_module")


class ArrayRecord:
    """A file of records, opened at its first read. For a single thread."""

    def __init__(self, path: str, records: int, options: str, remedy: str):
        """Names a file without opening it.

        Args:
            path: The file.
            records: The number of records it should have.
            options: ArrayRecord's reader options.
            remedy: What to do if the file is damaged, for the error message.
        """
        self.path, self._records, self._options, self._remedy = path, records, options, remedy
        self._reader: Any = None

    def range(self, first: int, end: int) -> Sequence[bytes]:
        """Records [first, end). Raises CorruptError if the file is damaged."""
        return self._read(first, first, end)

    def some(self, indices: Sequence[int]) -> Sequence[bytes]:
        """The records at `indices`, in that order. Raises CorruptError if the file is damaged."""
        return self._read(indices[0], indices)

    def _read(self, row: int, *wanted: Any) -> Sequence[bytes]:
        """Raises CorruptError if the bytes do not match ArrayRecord's hashes."""
        try:
            if self._reader is None:
                os.stat(self.path)  # raises a more specific error
                self._reader = array_records().ArrayRecordReader(self.path, self._options)
                if self._reader.num_records() != self._records:
                    raise RuntimeError(f"{self._reader.num_records()} records, not {self._records}")
            return self._reader.read(*wanted)
        except OSError as error:
            raise retry.classify(error, self.path) from None
        except (RuntimeError, ValueError, IndexError) as error:
            raise CorruptError(f"{self.path} is damaged ({error}); {self._remedy}", self.path, row) from None

    def close(self) -> None:
        """Closes the file."""
        if self._reader is not None:
            with contextlib.suppress(RuntimeError):  # a damaged file, already reported by the read
                self._reader.close()


class ArrayRecords:
    """Files of records, each open for one thread at a time. Thread-safe.

    A file stays open for a while after use: opening takes 0.7 ms, as long as reading 500,000 tokens, and a lane opens a
    file for each of its units.
    """

    def __init__(self, options: str, remedy: str):
        self._options, self._remedy = options, remedy
        self._idle: collections.deque[ArrayRecord] = collections.deque()
        self._lock = threading.RLock()  # re-entrant: a garbage collection in the holder may close a suspended reader

    @contextlib.contextmanager
    def open(self, path: str, records: int) -> Iterator[ArrayRecord]:
        """A context manager that lends the file at `path`, which should have `records` records."""
        with self._lock:
            file = next((idle for idle in self._idle if idle.path == path), None)
            if file is None:
                file = ArrayRecord(path, records, self._options, self._remedy)
            else:
                self._idle.remove(file)
        is_whole = True
        try:
            yield file
        except Exception:
            is_whole = False
            raise
        finally:
            closed = [] if is_whole else [file]
            with self._lock:
                if is_whole:
                    self._idle.append(file)
                while len(self._idle) > _IDLE:
                    closed.append(self._idle.popleft())
            for each in closed:
                each.close()


def digest_of(path: str) -> str:
    """The digest of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, functools.partial(hashlib.blake2b, digest_size=16)).hexdigest()


def digest_of_json(content: Json) -> str:
    """The digest of a JSON value."""
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """A file of a store.

    Attributes:
        rows: Rows stored.
        tokens: Tokens stored.
        size: Its bytes.
        digest: The digest of its content.
    """

    rows: int
    tokens: int
    size: int
    digest: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
    """What a store holds and what it was made from. Each kind of store derives its own.

    Attributes:
        source: The identity of the resolved source.
        settings: The settings of its config (`settings_of`).
        names: The names of its files.
        max_samples: The store holds this many first rows; None for all.
        transforms: The descriptions of the transforms, in order.
        tokenizer: The tokenizer's identity.
        digest: The digest of the text it was parsed from, perhaps by an earlier version; None otherwise.
    """

    FILE: ClassVar[str]  # the manifest's file name
    STORE: ClassVar[str]  # what messages call a store
    TOOL: ClassVar[str]  # what writes it
    INSTEAD: ClassVar[str]  # what a run can do without it

    source: Json
    settings: Json
    names: list[str]
    max_samples: int | None
    transforms: list[Json]
    tokenizer: Json
    # Not compared: the text may come from an earlier version.
    digest: str | None = dataclasses.field(default=None, compare=False)

    @classmethod
    def of(cls, source: Source, config: SourceConfig, tokenizer: Tokenizer, **others: Any) -> Self:
        """The manifest of a store to be written, without its shards.

        Args:
            source: The resolved source.
            config: Its config.
            tokenizer: The run's tokenizer.
            others: The fields of this kind of store.
        """
        return cls(
            source=source.identity,
            settings=settings_of(config),
            names=list(source.files),
            max_samples=config.max_samples,
            transforms=[describe(transform) for transform in config.transforms],
            tokenizer=tokenizer.identity,
            **others,
        )

    @classmethod
    def from_content(cls, content: Json) -> Self:
        """The manifest with this content, in current names."""
        raise NotImplementedError

    def shards(self) -> Iterator[tuple[str, Shard]]:
        """(file name, shard) of every shard."""
        raise NotImplementedError

    def total(self, field: str) -> int:
        """The sum of a shard's field ("rows", "tokens" or "size") over all shards."""
        return sum(getattr(shard, field) for _, shard in self.shards())

    def content(self) -> Json:
        """The manifest as JSON, without its digest."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "digest"}

    def to_json(self) -> str:
        """The manifest's text, with its digest."""
        content = self.content()
        return json.dumps({"format": FORMAT, "digest": digest_of_json(content), **content})

    @classmethod
    def from_json(cls, text: str, where: str) -> Self:
        """Parses a manifest of this version or an earlier one.

        Args:
            text: What `to_json` returned.
            where: Its path, for error messages.

        Raises:
            UserError: The manifest is damaged or has another format.
        """
        content: Json = {}
        try:
            content = json.loads(text)
            found, digest = content.pop("format"), content.pop("digest")
        except (ValueError, KeyError):
            found, digest = FORMAT, None
        if found != FORMAT:
            raise UserError(f"{where} has format {found}, this version reads {FORMAT}: use the version that wrote it.")
        if digest is None or digest != digest_of_json(content):
            raise UserError(f"{where} is damaged. Remove its folder and write it again with {cls.TOOL}.")
        return cls.from_content({**cli.upgrade(content), "digest": digest})

    @classmethod
    def exists(cls, folder: str) -> bool:
        """Whether the folder holds a complete store."""
        return os.path.exists(os.path.join(folder, cls.FILE))

    @classmethod
    def planned(cls, folder: str) -> Self | None:
        """The manifest of a finished store or the plan of one in progress; None if there is neither."""
        for path in (os.path.join(folder, cls.FILE), os.path.join(folder, WORK, "plan.json")):
            with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
                return cls.from_json(file.read(), path)
        return None

    def begun(self, folder: str) -> Self:
        """The store's plan: the first worker's, which all workers use. Writes this one if there is none yet."""
        found = self.planned(folder)
        if found is None:
            work = os.path.join(folder, WORK)
            os.makedirs(work, exist_ok=True)
            mine = os.path.join(work, f"plan-{os.getpid()}-{id(self)}.tmp")
            write_text(mine, self.to_json())
            # Unlike a rename, a link fails if another worker was first.
            with contextlib.suppress(FileExistsError):
                os.link(mine, os.path.join(work, "plan.json"))
            os.unlink(mine)
            found = self.planned(folder)
            assert found is not None
        return found

    @classmethod
    def load(cls, folder: str) -> Self:
        """The manifest of a complete store. Raises UserError if the store or one of its shards is missing."""
        path = os.path.join(folder, cls.FILE)
        try:
            with open(path, encoding="utf-8") as file:
                manifest = cls.from_json(file.read(), path)
        except FileNotFoundError:
            raise UserError(
                f"the {cls.STORE} {folder} is not finished: run {cls.TOOL} again to continue where it stopped."
                if os.path.isdir(folder)
                else f"there is no {cls.STORE} {folder}. Write one with {cls.TOOL}, or {cls.INSTEAD}."
            ) from None
        sizes = {entry.name: entry.stat().st_size for entry in os.scandir(folder)}
        for name, shard in manifest.shards():
            if sizes.get(name) != shard.size:
                has = f"has {sizes[name]:,} bytes, not {shard.size:,}" if name in sizes else "is missing"
                raise UserError(f"{cls.STORE} {folder}: {name} {has}. Remove the folder and write it again.")
        return manifest

    @classmethod
    def verify(cls, folder: str) -> Self:
        """Like `load`, but also reads every shard and compares its digest."""
        manifest = cls.load(folder)
        for name, shard in manifest.shards():
            if digest_of(os.path.join(folder, name)) != shard.digest:
                raise UserError(
                    f"{cls.STORE} {folder}: {name} does not match its checksum. Remove the folder and write it again."
                )
        return manifest

    def differences(self, has: Json, wanted: Json, config: SourceConfig, tokenizer: Tokenizer | None) -> list[str]:
        """Compares the store with what `config` reads with `tokenizer`.

        Args:
            has: The source identity or settings that the store was made from.
            wanted: The source identity or settings of the run.
            config: The run's source config.
            tokenizer: The run's tokenizer; None if the store serves any.

        Returns:
            Lines that show both sides of each difference; empty if there is none.
        """
        which = self.STORE.split()[-1]
        lines = [
            f"  source {name}: the {which} has {_short(has.get(name))}, expected {_short(wanted.get(name))}"
            for name in sorted(wanted.keys() | has.keys())
            if wanted.get(name) != has.get(name)
        ]
        transforms = [describe(transform) for transform in config.transforms]
        if transforms != self.transforms:
            lines.append(f"  transforms: the {which} has {self.transforms}, the config {transforms}")
        if self.max_samples is not None and (config.max_samples is None or config.max_samples > self.max_samples):
            lines.append(f"  max_samples: the {which} has {self.max_samples}, the config {config.max_samples}")
        if tokenizer is not None and self.tokenizer != tokenizer.identity:
            different = mismatch(self.tokenizer, tokenizer.identity)
            lines += [f"  tokenizer: {different}"] if different else []
        return lines + names.inexact(self.source)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "..."


def settings_of(config: SourceConfig) -> Json:
    """The settings of a source's config that determine which documents it has, without credentials."""
    full = config.full_name() if isinstance(config, HuggingFace) else config
    assert dataclasses.is_dataclass(full)
    said = {field.name: getattr(full, field.name) for field in dataclasses.fields(full) if field.name not in _FREE}
    return {cli.KIND: cli.kind_of(type(full)), **{name: repr(_public(name, value)) for name, value in said.items()}}


def _public(name: str, value: Any) -> Any:
    return tuple(_public(name, item) for item in value) if isinstance(value, tuple) else cli.public(name, value)


def write_text(path: str, text: str) -> None:
    """Writes a file and flushes it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
