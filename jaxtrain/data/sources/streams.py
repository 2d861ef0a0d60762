"""Files of any format that the datasets library reads, one file at a time, through its streaming iterator.

The library sees each file through a small fsspec file system of ours, so that its bytes come by the same checked,
single-attempt reads as parquet's (ranges.py), wherever they lie, and without names or signatures that it might print.
There is no position to open at: skipping to a row reads everything before it.
"""

import itertools
import re
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import fsspec
import pyarrow as pa

from jaxtrain.data.io import retry
from jaxtrain.data.io.byte_ranges import Bytes, Pieces, RangeFile
from jaxtrain.data.io.exit_guard import gate, guarded
from jaxtrain.data.sources.parquet import check_columns, to_block
from jaxtrain.errors import CorruptError, UserError
from jaxtrain.interfaces import Block, Json

_PIECE = 1 << 22  # bytes of a request: 4 MB, at 200 ms a request 20 MB/s of compressed text for each reader
_KEPT = 3  # the library opens a file two or three times and looks at its first chunk before it reads it
_BLOCK_ROWS = 512

# load_dataset makes progress bars in threads of its own, and tqdm's set-up of those takes the lock of other threads'
# bars away while they use it ("'tqdm' object has no attribute '_lock'", seen with several files opened at once).
_LOADING = threading.Lock()

# What decides how a file is cut and typed; part of a source's identity. Chunks much smaller than the library's 10 MB
# and 10,000 rows, so that a reader holds little and the first documents come early.
BUILDER_KWARGS: dict[str, Json] = {
    "json": {"chunksize": 1 << 20},
    "text": {"chunksize": 1 << 20},
    "csv": {"chunksize": 1000},
}


def stream_blocks(
    source: Bytes, name: str, row: int, text: str, columns: Sequence[str], builder: str, kwargs: Json
) -> Iterator[Block]:
    """Blocks of one file from `row` on. name: its name, for the suffixes that say how it is compressed.

    Raises TransientError and UserError as they come, and CorruptError at the first row that the library did not give,
    wherever reading began.
    """
    pieces = Pieces(source, lambda position: position + _PIECE, _KEPT)
    key = _FILES.add(pieces, name)
    decoded, skip = 0, row
    try:
        for table in _tables(key, text, columns, builder, kwargs):
            if skip == row:
                check_columns(table.schema, text, columns, source.what)
            block = to_block(table.slice(skip), text, columns) if skip < table.num_rows else None
            decoded += table.num_rows
            skip = max(skip - table.num_rows, 0)
            if block is not None:
                yield block
    except Exception as error:
        fault = retry.classify(error, source.what)
        if isinstance(fault, CorruptError):
            source.refresh()
            raise CorruptError(str(fault), source.what, decoded) from None
        if fault is not error:
            raise fault from None
        if "CastError" in type(error).__name__:
            message = f"{source.what}: the rows from {decoded} on have other columns than the first ones"
            raise UserError(f"{message} ({retry.redact(str(error))}).") from None
        raise
    finally:
        _FILES.remove(key)


def _tables(key: str, text: str, columns: Sequence[str], builder: str, kwargs: Json) -> Iterator[pa.Table]:
    import datasets

    extra: Json = {}
    if "features" in kwargs:
        extra["features"] = datasets.Features.from_dict(kwargs["features"])
    if builder == "csv":
        # Else a chunk whose texts are all numbers is read as numbers.
        extra["converters"] = {text: str}
    data_files = {"train": [f"{_FileSystem.protocol}://{key}"]}
    options = {**kwargs, **extra}
    try:
        # Those who wait for the lock are outside the gate: at exit it waits for those inside, and they can be many.
        with _LOADING, gate:
            stream = datasets.load_dataset(builder, data_files=data_files, split="train", streaming=True, **options)
        assert isinstance(stream, datasets.IterableDataset)
        yield from guarded(item for item in stream.with_format("arrow").iter(_BLOCK_ROWS))
    except Exception as error:
        if not _is_empty(error):
            raise


def _is_empty(error: Exception) -> bool:
    """How the library says that a file has no row at all, from which it could tell the columns."""
    # json: the first table of none; csv
    return isinstance(error, StopIteration) or type(error).__name__ == "EmptyDataError"


class _Files:
    """The files that are being read, by the names under which the file system below knows them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pieces: dict[str, Pieces] = {}

    def add(self, pieces: Pieces, name: str) -> str:
        suffixes = "".join(re.findall(r"\.[A-Za-z][A-Za-z0-9]*", name.rsplit("/", 1)[-1])[-2:])
        with self.lock:
            # The lowest free number: the library leaves a lock file, and fsspec an instance, for every name it sees.
            taken = {key.partition("/")[0] for key in list(self.pieces)}
            number = next(n for n in itertools.count() if str(n) not in taken)
            key = f"{number}/file{suffixes}"
            self.pieces[key] = pieces
        return key

    def remove(self, key: str) -> None:
        """Without the lock: the collector may end a suspended reader in a thread that holds it. (`pop` is atomic.)"""
        self.pieces.pop(key)


_FILES = _Files()


class _FileSystem(fsspec.AbstractFileSystem):
    """`jaxtrain://NUMBER/file.SUFFIXES` for the files of `_FILES`."""

    protocol = "jaxtrain"
    cachable = False

    def _open(
        self,
        path: str,
        mode: str = "rb",
        block_size: int | None = None,
        autocommit: bool = True,
        cache_options: Json | None = None,
        **_: Any,
    ) -> Any:
        return RangeFile(_FILES.pieces[self._key(path)])

    def info(self, path: str, **_: Any) -> Json:
        # Without the size, which would cost a request; the files opened know it.
        return {"name": self._key(path), "type": "file", "size": None}

    def glob(self, path: str, maxdepth: int | None = None, **_: Any) -> Json:
        return {self._key(path): {"name": self._key(path), "type": "file"}}

    def _key(self, path: str) -> str:
        return str(self._strip_protocol(path))


fsspec.register_implementation("jaxtrain", _FileSystem, clobber=True)
