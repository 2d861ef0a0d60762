"""What token stores and teacher stores share: ArrayRecords beside a manifest, written by several workers.

The manifest is JSON with a digest of itself, written last: its presence means that the rest is complete. Until then
`FOLDER/work/plan.json` describes the store to be written. The first worker creates it and all others follow it.
"""

import collections
import contextlib
import functools
import hashlib
import importlib
import json
import os
import pathlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

from jaxtrain import cli
from jaxtrain.data.io import retry
from jaxtrain.data.source_reader import describe
from jaxtrain.errors import CorruptError, UserError
from jaxtrain.interfaces import Json, SourceConfig, Tokenizer
from jaxtrain.tokenizers.identity import mismatch

FORMAT = 1
WORK = "work"
_IDLE = 32  # idle open files to keep; up to 1 MB each
_T = TypeVar("_T")


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


def sealed(content: Json) -> str:
    """A manifest's text, with its digest."""
    return json.dumps({"format": FORMAT, "digest": digest_of_json(content), **content})


def unsealed(text: str, where: str, tool: str) -> tuple[Json, str]:
    """Parses what `sealed` wrote.

    Args:
        text: The manifest's text.
        where: Its path, for error messages.
        tool: The tool that writes such manifests, for error messages.

    Returns:
        The content, upgraded to current names, and its digest.

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
        raise UserError(f"{where} is damaged. Remove its folder and write it again with {tool}.")
    return cli.upgrade(content), digest


class Described(Protocol):
    """The part of a manifest that describes what the rows were made from."""

    @property
    def max_samples(self) -> int | None: ...
    @property
    def transforms(self) -> list[Json]: ...
    @property
    def tokenizer(self) -> Json: ...


def differences(
    which: str, made: Described, has: Json, wanted: Json, config: SourceConfig, tokenizer: Tokenizer
) -> list[str]:
    """Compares a store with what `config` reads with `tokenizer`.

    Args:
        which: The store's name in the result.
        made: The store's manifest.
        has: The source identity or settings that the store was made from.
        wanted: The source identity or settings of the run.
        config: The run's source config.
        tokenizer: The run's tokenizer.

    Returns:
        Lines that show both sides of each difference; empty if there is none.
    """
    lines = [
        f"  source {name}: the {which} has {_short(has.get(name))}, expected {_short(wanted.get(name))}"
        for name in sorted(wanted.keys() | has.keys())
        if wanted.get(name) != has.get(name)
    ]
    transforms = [describe(transform) for transform in config.transforms]
    if transforms != made.transforms:
        lines.append(f"  transforms: the {which} has {made.transforms}, the config {transforms}")
    if made.max_samples is not None and (config.max_samples is None or config.max_samples > made.max_samples):
        lines.append(f"  max_samples: the {which} has {made.max_samples}, the config {config.max_samples}")
    if made.tokenizer != tokenizer.identity:
        different = mismatch(made.tokenizer, tokenizer.identity)
        if different is not None:
            lines.append(f"  tokenizer: {different}")
    return lines


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:200] + "..."


def planned(folder: str, manifest: str, parse: Callable[[str, str], _T]) -> _T | None:
    """The manifest of a finished store or the plan of one in progress; None if there is neither.

    Args:
        folder: The store's folder.
        manifest: The manifest's file name.
        parse: (text, path) → the parsed manifest.
    """
    for path in (os.path.join(folder, manifest), os.path.join(folder, WORK, "plan.json")):
        with contextlib.suppress(FileNotFoundError), open(path, encoding="utf-8") as file:
            return parse(file.read(), path)
    return None


def begin(folder: str, plan: str) -> None:
    """Writes the plan unless another worker has written one: all workers use the first plan."""
    work = os.path.join(folder, WORK)
    os.makedirs(work, exist_ok=True)
    path, mine = os.path.join(work, "plan.json"), os.path.join(work, f"plan-{os.getpid()}-{id(plan)}.tmp")
    write_text(mine, plan)
    try:
        os.link(mine, path)  # unlike a rename, it fails if another worker was first
    except FileExistsError:
        pass
    finally:
        os.unlink(mine)


def write_text(path: str, text: str) -> None:
    """Writes a file and flushes it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def remove_half_written(folder: str, ending: str) -> None:
    """Removes what a killed worker left half-written: files with its ending."""
    os.makedirs(folder, exist_ok=True)
    for name in os.listdir(folder):
        if name.endswith(ending):
            # A failed writer of this process may still be cleaning up.
            pathlib.Path(folder, name).unlink(missing_ok=True)
