"""Files of formats that are read from the beginning: JSON, CSV, text, XML, Arrow; compressed or not.

They cannot be opened at a row: skipping to a row parses everything before it. Readers share nothing, so lanes open and
read their files in parallel.
"""

import io
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa

from jaxtrain.data.io.byte_ranges import Bytes, RangeBuffer, RangeFile
from jaxtrain.data.io.compression import CutShortError, DamagedError, rest_is_sound, streams
from jaxtrain.data.io.exit_guard import guarded
from jaxtrain.data.sources.csv_rows import csv_rows
from jaxtrain.data.sources.json_rows import json_rows
from jaxtrain.data.sources.parquet import check_columns, to_block
from jaxtrain.data.sources.rows import blocks_of, has_surrogates
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Block, Json

_REQUEST = 1 << 22  # bytes per request: 4 MB, at 200 ms per request 20 MB/s of compressed text per reader
_KEPT = 2
_READ = 1 << 20

# Recorded in identities, as in version 0.1, where they decided how the datasets library cut the file.
BUILDER_KWARGS: dict[str, Json] = {"text": {"chunksize": 1 << 20}}

_WITHOUT_CHANGE = ("parquet", "text", "xml", "webdataset")


def reader_version(builder: str, names: Sequence[str]) -> int:
    """The version of the readers of a source's files, for its identity (`interfaces.versioned`)."""
    return 1 if builder in _WITHOUT_CHANGE and not any(map(_is_zstd, names)) else 2


def read_now(identity: Json) -> Json:
    """A source's identity, with the current version of its readers."""
    if identity.get("kind") != "huggingface":
        return identity
    return {**identity, "reader": reader_version(identity["builder"], identity["files"])}


def misread_reason(identity: Json, columns: Sequence[str], is_stored: bool) -> str | None:
    """Why version 0.1 read other documents than this version does; None if it did not.

    Args:
        identity: The identity of a source of the datasets library's formats.
        columns: The columns that its transforms read besides the text.
        is_stored: Whether the documents were stored. If not, this version reads the files, and stops where 0.1
            differed: at a text that is not a string, at the end of a truncated file.
    """
    builder = identity["builder"]
    if identity.get("reader", 1) >= reader_version(builder, identity["files"]):
        return None
    if builder == "csv":
        return (
            "it read the texts NA, null and nan of CSV files as empty, and in some files the text from another column"
        )
    if builder == "json" and columns:
        return f"it guessed the types of the columns {', '.join(columns)}, which transforms read"
    if is_stored and builder == "arrow":
        return "it accepted truncated Arrow streams as complete"
    if is_stored and any(map(_is_zstd, identity["files"])):
        return "it accepted truncated zstd files as complete"
    return None


def _is_zstd(name: str) -> bool:
    return name.endswith((".zst", ".zstd"))


def stream_blocks(
    source: Bytes, name: str, row: int, text: str, columns: Sequence[str], builder: str, kwargs: Json
) -> Iterator[Block]:
    """Yields the blocks of a file from a row on: "text" (the column `text`), and `columns`.

    Args:
        source: The file.
        name: Its name, whose suffix names the compression.
        row: The first row to yield.
        text: The column with the text.
        columns: Other columns.
        builder: The format: json, csv, text, xml or arrow.
        kwargs: Settings of the datasets library's reader of the format.

    Raises:
        CorruptError: A row cannot be read. Its number does not depend on where reading began.
        UserError: A row or a file is intact but cannot become documents.
        TransientError: From the source, unchanged.
    """
    ranges = RangeBuffer(source, lambda position: position + _REQUEST, _KEPT)
    opened: list[io.BufferedReader] = []

    def rows() -> Iterator[Json]:
        try:
            if builder == "arrow":
                yield from _arrow_rows(ranges, text, columns, source.what)
                return
            for stream in streams(RangeFile(ranges), name):
                opened[:] = [stream]
                if builder == "json":
                    yield from json_rows(stream, text, columns, kwargs, source.what)
                elif builder == "csv":
                    yield from csv_rows(stream, text, columns, kwargs, source.what)
                else:
                    yield from _text_rows(stream, text, columns, builder, kwargs, source.what)
        except UserError as error:
            raise (error if source.what in str(error) else UserError(f"{source.what}: {error}")) from None

    def is_sound(error: Exception) -> bool:
        """Whether the bytes before an error are the same when read again, or their checksums match."""
        if isinstance(error, CutShortError):
            return True
        if not opened or isinstance(opened[0].raw, RangeFile):
            source.refresh()
            return all(source.fetch(start, start + len(data)) == data for start, data in ranges.held)
        return rest_is_sound(opened[0])

    return blocks_of(rows(), source, columns, row=row, is_sound=is_sound)


def _text_rows(
    stream: io.BufferedReader, text: str, columns: Sequence[str], builder: str, kwargs: Json, what: str
) -> Iterator[Json]:
    """The documents of a text file: its lines, its paragraphs (cut at blank lines), or the whole; of XML, the whole."""
    only = "xml" if builder == "xml" else "text"
    for name in (text, *columns):
        if name != only:
            raise UserError(f"{what} has no column {name!r}. It has {only!r}.")
    errors, encoding = kwargs.get("encoding_errors") or "strict", kwargs.get("encoding") or "utf-8"
    # All line ends become \n. A byte that cannot be decoded becomes a lone surrogate, which is found below.
    file = io.TextIOWrapper(stream, encoding, "surrogateescape" if errors == "strict" else errors)
    by = "document" if builder == "xml" else kwargs.get("sample_by", "line")
    if by == "line":
        found = iter(file) if kwargs.get("keep_linebreaks") else (line.removesuffix("\n") for line in file)
    else:
        found = iter([file.read()]) if by == "document" else _paragraphs(file)
    for document in found:
        if errors == "strict" and has_surrogates(document):
            raise DamagedError(f"contains bytes that are not {encoding}")
        yield {"text": document, only: document}


def _paragraphs(file: IO[str]) -> Iterator[str]:
    rest = ""
    while data := file.read(_READ):
        *whole, rest = (rest + data).split("\n\n")
        yield from filter(None, whole)
    if rest:
        yield rest


class _EndNoticed(RangeFile):
    """A file that records whether a read has reached its end."""

    found_end = False

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.found_end |= size is not None and len(data) < size
        return data


def _arrow_rows(buffer: RangeBuffer, text: str, columns: Sequence[str], what: str) -> Iterator[Json]:
    """The rows of an Arrow file, or of a stream, which must end with its end marker.

    The specification also lets a stream end with its file. No common writer does that, and a file truncated between two
    batches looks the same.
    """
    for batch in guarded(_batches(_EndNoticed(buffer), text, columns, what)):
        block = to_block(batch, text, columns)
        names = list(block)
        for values in zip(*block.values(), strict=True):
            yield dict(zip(names, values, strict=True))


def _batches(file: _EndNoticed, text: str, columns: Sequence[str], what: str) -> Any:
    names = list(dict.fromkeys((text, *columns)))
    is_file = file.read(6) == b"ARROW1"
    file.seek(0)
    file.found_end = False
    try:
        reader: Any = pa.ipc.open_file(file) if is_file else pa.ipc.open_stream(file)
        check_columns(reader.schema, text, columns, what)
        wanted = pa.ipc.IpcReadOptions(included_fields=[reader.schema.get_field_index(name) for name in names])
        if is_file:
            reader = pa.ipc.open_file(file, options=wanted)
            batches = (reader.get_batch(number) for number in range(reader.num_record_batches))
        else:
            file.seek(0)
            batches = pa.ipc.open_stream(file, options=wanted)
        for batch in batches:
            batch.validate(full=True)
            yield batch
        if not is_file:
            if file.found_end:
                raise CutShortError("its stream is truncated")
            if file.read(1):
                raise DamagedError("there is data after the end of its stream")
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedError(f"is not Arrow ({error})") from None
