"""Parquet files read from any row in constant time: the row's group is looked up in the footer and opened alone.

Not by the datasets library: its reader starts at the beginning of a file, and leaving it half-read hangs or aborts the
interpreter's exit (arrow issue 45214: threads of the scanner call back into Python). Here nothing is threaded
(`use_threads=False`, no pre-buffering), and which bytes are asked for is decided by `_Plan`, from the footer.
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

_BLOCK_ROWS = 512  # rows of a block: a shuffle window's default, and few enough that 64 readers hold little
_SMALLEST, _LARGEST = 1 << 18, 1 << 24  # bytes of a request: 256 kB to 16 MB, whatever the rows' size
_FIRST_TAIL = 1 << 18  # bytes of the first look at a footer; most fit, and 256 kB cost less than a second round trip
_FOOTERS = 1 << 25  # bytes of footers, as in the files, kept by a source: 32 MB, about 5 times that in memory
_DECRYPT = "Keys are not supported: write the file anew without encryption."


class ParquetFiles:
    """The parquet files of one source. Safe for several threads: each `blocks` is a reader, footers are shared."""

    def __init__(self, files: Sequence[Bytes], fetch_rows: int):
        self.files = files
        self.fetch_rows = fetch_rows
        self.lock = threading.Lock()
        self.locks = collections.defaultdict[int, threading.Lock](threading.Lock)
        self.footers: collections.OrderedDict[int, pq.FileMetaData] = collections.OrderedDict()
        self.rows: dict[int, array.array[int]] = {}
        self.tail = _FIRST_TAIL
        # Files that could not be decoded once. A batch spans many small groups, so a bad one hides good rows before it.
        self.by_group: set[int] = set()

    def row_groups(self, file: int) -> list[int]:
        """Rows of each row group. Raises CorruptError if the footer cannot be read."""
        if file not in self.rows:
            self._readable_footer(file)
        return self.rows[file].tolist()

    def footer(self, file: int) -> pq.FileMetaData:
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
        """The columns of a file. Raises CorruptError if its footer cannot be read."""
        return self._readable_footer(file).schema.to_arrow_schema()

    def _readable_footer(self, file: int) -> pq.FileMetaData:
        try:
            return self.footer(file)
        except (pa.ArrowException, OSError) as error:
            what = self.files[file].what
            self.forget(file)
            raise CorruptError(f"{what} has no readable footer ({error})", what, 0) from None

    def forget(self, file: int) -> None:
        """Drop what is known of a file that could not be decoded: its footer may be what is wrong."""
        with self.lock:
            self.by_group.add(file)
            self.footers.pop(file, None)
            self.rows.pop(file, None)
        self.files[file].refresh()

    def _read_footer(self, source: Bytes) -> pq.FileMetaData:
        """One request, or two if the footer is longer than those before. (A file ends: footer, its length, PAR1.)"""
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
        """Blocks from `row` on. text: the column that becomes "text"; columns: further ones, under their own names.
        stop: row groups that begin there or later are not read.

        Raises TransientError and UserError as they come; anything that pyarrow cannot make sense of becomes a
        CorruptError at the first row of the batch that failed, 0 for the footer. From the second time on a file is read
        group by group, so that this row does not depend on where reading began.
        """
        source = self.files[file]
        decoded = 0  # rows of the file up to the end of the last good batch
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
            # With a buffer pyarrow asks for column chunks piece by piece: a chunk of a 1M-row group can have 2 GB.
            with gate:  # it asks the file for its size
                reader = pq.ParquetFile(
                    RangeFile(RangeBuffer(source, plan.end, keep=len(plan.leaves))),
                    metadata=footer,
                    pre_buffer=False,
                    buffer_size=1 << 16,
                    # Where the file has them. Without, a wrong byte often decompresses to a wrong text.
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
            with gate.letting_go():
                reader = None

    def _batches(
        self, reader: pq.ParquetFile, groups: Sequence[int], names: list[str], by_group: bool
    ) -> Generator[pa.RecordBatch, None, None]:
        size = min(_BLOCK_ROWS, self.fetch_rows)
        for some in [[group] for group in groups] if by_group else [list(groups)]:
            yield from reader.iter_batches(size, row_groups=some, columns=names, use_threads=False)


def _group_of(groups: Sequence[int], row: int) -> tuple[int, int]:
    """(the group that holds `row`, rows of it before `row`); (number of groups, ...) past the end."""
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
    """Which bytes to ask for at once: about `fetch_rows` rows of the wanted columns, however large the groups are.

    A chunk (one column of one group) that is much larger is fetched in pieces; small ones that lie close to each other
    are fetched together with what lies between, as long as at most a fifth of the bytes is thrown away.
    """

    def __init__(self, footer: pq.FileMetaData, groups: Sequence[int], names: Sequence[str], fetch_rows: int):
        wanted = set(names)
        columns = range(footer.num_columns)
        self.leaves = [i for i in columns if footer.schema.column(i).path.split(".")[0] in wanted]
        self.fetch_rows = fetch_rows
        self.footer = footer
        self.groups = iter(groups)
        self.chunks: list[_Chunk] = []  # in the order of the file, as far as they were needed

    def _extend(self, stop: int) -> None:
        """Look up the chunks of further groups, until one starts past `stop`. (A footer may hold 1,000 groups.)"""
        while not self.chunks or self.chunks[-1].start <= stop:
            group = next(self.groups, None)
            if group is None:
                return
            about = self.footer.row_group(group)
            chunks = []
            for leaf in self.leaves:
                chunk = about.column(leaf)
                # Some writers leave a dictionary offset of 0 where there is no dictionary.
                start = min(chunk.data_page_offset, chunk.dictionary_page_offset or chunk.data_page_offset)
                if about.num_rows:  # the offsets of an empty group's chunks mean nothing
                    chunks.append(_Chunk(start, start + chunk.total_compressed_size, about.num_rows))
            self.chunks += sorted(chunks, key=lambda chunk: chunk.start)

    def end(self, position: int) -> int:
        """Where the request that starts at `position` ends."""
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
    """Check that the columns are there.

    Raises:
        UserError: One is missing, or there twice, or the one with the text holds something else. (A column of nulls
            alone has documents without text.)
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
    """A batch as lists; a text that is null becomes "" (a document without text keeps its row)."""
    block: Block = {name: batch.column(name).to_pylist() for name in columns}
    block["text"] = ["" if document is None else document for document in batch.column(text).to_pylist()]
    return block
