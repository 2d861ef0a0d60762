"""Parquet files, readable from any row in constant time: the footer locates the row group, and only that is opened.

The datasets library's reader starts at the beginning of a file, and abandoning it midway hangs or aborts the
interpreter's exit (arrow issue 45214: scanner threads call back into Python). Here nothing is threaded
(`use_threads=False`, no pre-buffering), and `_Plan` chooses the byte ranges to request from the footer.
"""

import array
import collections
import dataclasses
import threading
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jaxtrain.data.io.byte_ranges import Bytes, RangeBuffer, RangeFile
from jaxtrain.data.io.exit_guard import gate, guarded
from jaxtrain.errors import CorruptError, UserError
from jaxtrain.interfaces import Block

_BLOCK_ROWS = 512  # rows per block: the default shuffle window, and small enough for 64 readers
_SMALLEST, _LARGEST = 1 << 18, 1 << 24  # bytes per request: 256 kB to 16 MB, regardless of row size
_FIRST_TAIL = 1 << 18  # bytes of the first footer read; most footers fit, and 256 kB cost less than another round trip
_FOOTERS = 1 << 25  # encoded bytes of footers that a source caches: 32 MB, about 5 times that in memory
_DECRYPT = "Decryption is not supported: write the file without encryption."


class ParquetFiles:
    """The parquet files of one source. Thread-safe: each call to `blocks` opens a reader, and all share the footers."""

    def __init__(self, files: Sequence[Bytes], fetch_rows: int):
        self.files = files
        self.fetch_rows = fetch_rows
        self.lock = threading.Lock()
        self.locks = collections.defaultdict[int, threading.Lock](threading.Lock)
        self.footers: collections.OrderedDict[int, pq.FileMetaData] = collections.OrderedDict()
        self.rows: dict[int, array.array[int]] = {}
        self.tail = _FIRST_TAIL
        # Files that once failed to decode. A batch spans many small groups, so a bad group hides good rows before it.
        self.by_group: set[int] = set()

    def row_groups(self, file: int) -> list[int]:
        """The number of rows in each row group. Raises CorruptError if the footer cannot be read."""
        if file not in self.rows:
            self._readable_footer(file)
        return self.rows[file].tolist()

    def footer(self, file: int) -> pq.FileMetaData:
        """Returns the footer of a file, from the cache if possible."""
        with self.lock:
            if file in self.footers:
                self.footers.move_to_end(file)
                return self.footers[file]
            reading = self.locks[file]
        with reading:
            with self.lock:
                if file in self.footers:
                    return self.footers[file]
            footer = self._read_footer(self.files[file])
            rows = array.array("q", (footer.row_group(group).num_rows for group in range(footer.num_row_groups)))
            with self.lock:
                self.rows[file] = rows
                self.footers[file] = footer
                while len(self.footers) > 1 and sum(each.serialized_size for each in self.footers.values()) > _FOOTERS:
                    self.footers.popitem(last=False)
        return footer

    def schema(self, file: int) -> pa.Schema:
        """The schema of a file. Raises CorruptError if its footer cannot be read."""
        return self._readable_footer(file).schema.to_arrow_schema()

    def _readable_footer(self, file: int) -> pq.FileMetaData:
        try:
            return self.footer(file)
        except (pa.ArrowException, OSError) as error:
            what = self.files[file].what
            self.forget(file)
            raise CorruptError(f"{what} has no readable footer ({error})", what, 0) from None

    def forget(self, file: int) -> None:
        """Drops the cached state of a file that failed to decode: its cached footer may be the bad part."""
        with self.lock:
            self.by_group.add(file)
            self.footers.pop(file, None)
            self.rows.pop(file, None)
        self.files[file].refresh()

    def _read_footer(self, source: Bytes) -> pq.FileMetaData:
        """Reads a footer in one request, or two if it is the longest yet. (A file ends in footer, length, PAR1.)"""
        tail = source.tail(self.tail)
        if tail[-4:] == b"PARE":
            raise UserError(f"{source.what} is encrypted. {_DECRYPT}")
        if len(tail) < 12 or tail[-4:] != b"PAR1":
            raise pa.ArrowInvalid(f"no parquet footer in the last {len(tail)} bytes")
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length > source.size() - 4:
            raise pa.ArrowInvalid(f"a footer of {length} bytes in a file of {source.size()}")
        if length > len(tail):
            self.tail = max(self.tail, length + length // 8)
            tail = source.tail(length)
        with gate:
            return pq.read_metadata(pa.BufferReader(tail))

    def blocks(
        self, file: int, row: int, text: str, columns: Sequence[str], stop: int | None = None
    ) -> Iterator[Block]:
        """Yields blocks of rows, starting at `row`.

        Args:
            file: index of the file.
            row: first row to read.
            text: the column to return as "text".
            columns: further columns to return, under their own names.
            stop: do not read row groups that begin at this row or later.

        Raises:
            TransientError, UserError: from the file's source, unchanged.
            CorruptError: pyarrow cannot decode the file. Its row is the first of the failed batch, or 0 for the
                footer. After one failure the file is read group by group, so that this row does not depend on where
                reading began.
        """
        source = self.files[file]
        decoded = 0  # rows up to the end of the last good batch
        reader: pq.ParquetFile | None = None
        try:
            footer = self.footer(file)
            check_columns(footer.schema.to_arrow_schema(), text, columns, source.what)
            sizes = self.row_groups(file)
            first, skip = _group_of(sizes, row)
            if first == len(sizes) or (stop is not None and row >= stop):
                return
            end = len(sizes) if stop is None else min(_group_of(sizes, stop - 1)[0] + 1, len(sizes))
            groups, decoded = range(first, end), row - skip
            names = list(dict.fromkeys([text, *columns]))
            plan = _Plan(footer, groups, names, self.fetch_rows)
            # With a buffer, pyarrow reads column chunks piecewise: a chunk of a 1M-row group can reach 2 GB.
            with gate:  # the constructor asks the file for its size
                reader = pq.ParquetFile(
                    RangeFile(RangeBuffer(source, plan.end, keep=len(plan.leaves))),
                    metadata=footer,
                    pre_buffer=False,
                    buffer_size=1 << 16,
                    # Applies if the file has page checksums. Without them, a flipped byte often decodes to wrong text.
                    page_checksum_verification=True,
                )
            for batch in guarded(self._batches(reader, groups, names, file in self.by_group)):
                block = to_block(batch.slice(skip), text, columns) if skip < batch.num_rows else None
                decoded += batch.num_rows
                skip = max(skip - batch.num_rows, 0)
                if block is not None:
                    yield block
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            if "decrypt" in str(error).lower():
                raise UserError(f"{source.what} has encrypted columns. {_DECRYPT}") from None
            self.forget(file)
            raise CorruptError(f"{source.what} cannot be decoded ({error})", source.what, decoded) from None
        finally:
            with gate.releasing():
                reader = None

    def _batches(
        self, reader: pq.ParquetFile, groups: Sequence[int], names: list[str], by_group: bool
    ) -> Generator[pa.RecordBatch, None, None]:
        size = min(_BLOCK_ROWS, self.fetch_rows)
        for some in [[group] for group in groups] if by_group else [list(groups)]:
            yield from reader.iter_batches(size, row_groups=some, columns=names, use_threads=False)


def _group_of(groups: Sequence[int], row: int) -> tuple[int, int]:
    """Returns (index of the group with `row`, rows of that group before it); (number of groups, ...) past the end."""
    for index, rows in enumerate(groups):
        if row < rows:
            return index, row
        row -= rows
    return len(groups), row


@dataclasses.dataclass(frozen=True)
class _Chunk:
    start: int
    stop: int
    rows: int


class _Plan:
    """Chooses byte ranges to request: about `fetch_rows` rows of the wanted columns, regardless of group size.

    A much larger chunk (one column of one group) is fetched in pieces. Small chunks that lie close together are fetched
    in one request, gaps included, as long as at most a fifth of the bytes are discarded.
    """

    def __init__(self, footer: pq.FileMetaData, groups: Sequence[int], names: Sequence[str], fetch_rows: int):
        wanted = set(names)
        columns = range(footer.num_columns)
        self.leaves = [i for i in columns if footer.schema.column(i).path.split(".")[0] in wanted]
        self.fetch_rows = fetch_rows
        self.footer = footer
        self.groups = iter(groups)
        self.chunks: list[_Chunk] = []  # in file order, extended as needed

    def _extend(self, stop: int) -> None:
        """Adds the chunks of further groups until one starts past `stop`. (A footer may list 1,000 groups.)"""
        while not self.chunks or self.chunks[-1].start <= stop:
            group = next(self.groups, None)
            if group is None:
                return
            about = self.footer.row_group(group)
            chunks = []
            for leaf in self.leaves:
                chunk = about.column(leaf)
                # Some writers set the dictionary offset to 0 if there is no dictionary.
                start = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
                if about.num_rows:  # chunk offsets of an empty group are meaningless
                    chunks.append(_Chunk(start, start + chunk.total_compressed_size, about.num_rows))
            self.chunks += sorted(chunks, key=lambda chunk: chunk.start)

    def end(self, position: int) -> int:
        """Returns the end of the request that starts at `position`."""
        self._extend(position + _LARGEST)
        index = next((i for i, chunk in enumerate(self.chunks) if chunk.start <= position < chunk.stop), None)
        if index is None:
            return position + _SMALLEST
        chunk = self.chunks[index]
        per_row = (chunk.stop - chunk.start) / chunk.rows
        target = int(min(max(per_row * self.fetch_rows, _SMALLEST), _LARGEST))
        if chunk.stop - position > target + target // 2:
            return position + target
        stop, useful, waste = chunk.stop, chunk.stop - position, 0
        for following in self.chunks[index + 1 :]:
            useful += following.stop - following.start
            waste += following.start - stop
            if following.start < stop or useful > target + target // 8 or waste > useful // 4:
                break
            stop = following.stop
        return stop


def check_columns(schema: pa.Schema, text: str, columns: Sequence[str], what: str) -> None:
    """Checks that the columns exist.

    Args:
        schema: The file's schema.
        text: The text column. A column of nulls is allowed: its documents have no text.
        columns: Further columns.
        what: The file, for messages.

    Raises:
        UserError: A column is missing or duplicated, or the text column has another type.
    """
    for name in dict.fromkeys([text, *columns]):
        if name not in schema.names:
            raise UserError(f"{what} has no column {name!r}. It has {', '.join(map(repr, schema.names))}.")
        if schema.names.count(name) > 1:
            raise UserError(f"{what} has {schema.names.count(name)} columns {name!r}. Rename all but one of them.")
    kind: Any = schema.field(text).type
    if not (_holds_text(kind) or pa.types.is_null(kind)):
        held = ", ".join(repr(field.name) for field in schema if _holds_text(field.type)) or "none"
        raise UserError(f"{what}: column {text!r} holds {kind}, not text. Columns with text: {held}.")


def _holds_text(kind: Any) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def to_block(batch: pa.RecordBatch | pa.Table, text: str, columns: Sequence[str]) -> Block:
    """Converts a batch to lists. A null text becomes "": a document without text keeps its row."""
    block: Block = {name: batch.column(name).to_pylist() for name in columns}
    block["text"] = ["" if document is None else document for document in batch.column(text).to_pylist()]
    return block
