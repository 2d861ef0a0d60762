"""Files of the formats that are read from their beginning: JSON, CSV, text, XML, Arrow; compressed or not.

There is no position to open at: skipping to a row parses everything before it. Nothing is shared between readers, so
lanes open and read their files side by side.
"""

import io
from collections.abc import Iterator, Sequence
from typing import IO, Any

import pyarrow as pa

from jaxtrain.data.io.byte_ranges import Bytes, RangeBuffer, RangeFile
from jaxtrain.data.io.compression import CutShortError, DamagedError, streams
from jaxtrain.data.io.exit_guard import guarded
from jaxtrain.data.sources.csv_rows import csv_rows
from jaxtrain.data.sources.json_rows import json_rows
from jaxtrain.data.sources.parquet import check_columns, to_block
from jaxtrain.data.sources.rows import blocks_of, has_surrogates
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Block, Json

_PIECE = 1 << 22  # bytes of a request: 4 MB, at 200 ms a request 20 MB/s of compressed text for each reader
_KEPT = 2
_READ = 1 << 20
_LOOKED_AT = 1 << 26  # bytes decompressed after an error, to see whether the compressed data is damaged

# Recorded in identities, as by version 0.1, where they decided how the datasets library cut the file.
BUILDER_KWARGS: dict[str, Json] = {"text": {"chunksize": 1 << 20}}

_WITHOUT_CHANGE = ("parquet", "text", "xml", "webdataset")


def reader_version(builder: str, names: Sequence[str]) -> int:
    """The version of the readers of a source's files, for its identity (`interfaces.versioned`)."""
    return 1 if builder in _WITHOUT_CHANGE and not any(map(_is_zstd, names)) else 2


def read_now(identity: Json) -> Json:
    """A source's identity, with the version of the readers that read its files now."""
    if identity.get("kind") != "huggingface":
        return identity
    return {**identity, "reader": reader_version(identity["builder"], identity["files"])}


def distrusted(identity: Json, columns: Sequence[str], is_stored: bool) -> str | None:
    """Why documents that version 0.1 read are not those that this one reads; None if they are.

    Args:
        identity: Of a source of the datasets library's formats.
        columns: What its transforms read besides the text.
        is_stored: Whether the documents were stored. If not, this version reads the files, and stops where 0.1 gave
            something else: at a text that is no string, at the end of a file that was cut.
    """
    builder = identity["builder"]
    if identity.get("reader", 1) >= reader_version(builder, identity["files"]):
        return None
    if builder == "csv":
        return (
            "it took the texts NA, null and nan of CSV files for empty, and in some files another column for the text"
        )
    if builder == "json" and columns:
        return f"it guessed the types of the columns {', '.join(columns)}, which transforms read"
    if is_stored and builder == "arrow":
        return "it took Arrow streams that were cut for whole ones"
    if is_stored and any(map(_is_zstd, identity["files"])):
        return "it took zstd files that were cut for whole ones"
    return None


def _is_zstd(name: str) -> bool:
    return name.endswith((".zst", ".zstd"))


def stream_blocks(
    source: Bytes, name: str, row: int, text: str, columns: Sequence[str], builder: str, kwargs: Json
) -> Iterator[Block]:
    """Blocks of one file from a row on: "text" (the column `text`), and `columns`.

    Args:
        source: The file.
        name: Its name, for the suffix that says how it is compressed.
        row: The first row wanted.
        text: The column with the text.
        columns: Other columns.
        builder: The format: json, csv, text, xml or arrow.
        kwargs: Settings of the datasets library's reader of the format.

    Raises:
        CorruptError: At the first row that cannot be had, wherever reading began.
        UserError: A row or a file that is sound and of which no documents can be made.
        TransientError: As it comes.
    """
    pieces = RangeBuffer(source, lambda position: position + _PIECE, _KEPT)
    opened: list[io.BufferedReader] = []

    def rows() -> Iterator[Json]:
        try:
            if builder == "arrow":
                yield from _arrow_rows(pieces, text, columns, source.what)
                return
            for stream in streams(RangeFile(pieces), name):
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
        """Whether a second look at the bytes before an error finds them the same, or their checksums right."""
        if isinstance(error, CutShortError):
            return True
        if not opened or isinstance(opened[0].raw, RangeFile):
            source.refresh()
            return all(source.fetch(start, start + len(data)) == data for start, data in pieces.held)
        try:
            return all(opened[0].read1(_READ) is not None for _ in range(_LOOKED_AT // _READ))
        except DamagedError:
            return False

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
    # Line ends of every kind become \n. A byte that cannot be decoded becomes half of a surrogate pair, found below.
    file = io.TextIOWrapper(stream, encoding, "surrogateescape" if errors == "strict" else errors)
    by = "document" if builder == "xml" else kwargs.get("sample_by", "line")
    if by == "line":
        found = iter(file) if kwargs.get("keep_linebreaks") else (line.removesuffix("\n") for line in file)
    else:
        found = iter([file.read()]) if by == "document" else _paragraphs(file)
    for document in found:
        if errors == "strict" and has_surrogates(document):
            raise DamagedError(f"holds bytes that are not {encoding}")
        yield {"text": document, only: document}


def _paragraphs(file: IO[str]) -> Iterator[str]:
    rest = ""
    while data := file.read(_READ):
        *whole, rest = (rest + data).split("\n\n")
        yield from filter(None, whole)
    if rest:
        yield rest


class _EndNoticed(RangeFile):
    """A file that knows whether a read found its end."""

    found_end = False

    def read(self, size: int | None = -1) -> bytes:
        data = super().read(size)
        self.found_end |= size is not None and len(data) < size
        return data


def _arrow_rows(buffer: RangeBuffer, text: str, columns: Sequence[str], what: str) -> Iterator[Json]:
    """The rows of an Arrow file, or of a stream, which has to end with its mark.

    The specification lets a stream also end with its file. No writer in use does that, and a file that was cut between
    two batches looks the same.
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
                raise CutShortError("its stream is cut short")
            if file.read(1):
                raise DamagedError("there is more after the end of its stream")
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise DamagedError(f"is not Arrow ({error})") from None
