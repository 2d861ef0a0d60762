"""Hub datasets in the WebDataset layout: tar members that share a key are the columns of one row.

`0001.txt`, `0001.json` and `0001.cls` are the columns txt, json and cls of row 0001: the key ends at the first dot of
the name, and members of one key are adjacent (https://github.com/webdataset/webdataset, description of the format). The
datasets library is not used: it fails when later rows order their columns differently from the first, and it accepts a
truncated archive as complete.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from jaxtrain.data.io.byte_ranges import Bytes
from jaxtrain.data.io.compression import DamagedError
from jaxtrain.data.io.tar import Archive
from jaxtrain.data.sources.json_rows import parsed
from jaxtrain.data.sources.rows import RowError, blocks_of, clean, kind_of
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Block


def sample_blocks(source: Bytes, row: int, text: str, columns: Sequence[str]) -> Iterator[Block]:
    """Yields blocks of an archive's rows, starting at `row`.

    Args:
        source: The archive.
        row: First row to read.
        text: The column to return as "text".
        columns: Further columns to return; missing ones are None.

    Raises:
        TransientError, UserError: From `source`, unchanged.
        CorruptError: The archive is damaged; its row is the first that cannot be read.
    """
    archive = Archive(source)
    rows = _rows(archive, source.what, row, text, columns)
    return blocks_of(rows, source, columns, first=row, row=row, is_sound=archive.is_sound)


def _rows(archive: Archive, what: str, row: int, text: str, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    for number, sample in enumerate(_samples(archive, row, (text, *columns)), row):
        if number == 0 and text not in sample:
            has = ", ".join(map(repr, sample))
            raise UserError(f"{what} has no column {text!r}. Its first row has {has}.")
        value = sample.get(text)
        if not isinstance(value, str | None):
            raise RowError(
                f"column {text!r} holds {kind_of(value)}, not text. For texts inside .json members use the source "
                "WebDataset, whose column names their key."
            )
        yield {**dict.fromkeys(columns), **sample, "text": clean(value or "")}


def _samples(archive: Archive, skip: int, wanted: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Yields the rows after the first `skip`, which are not read. Unwanted columns have the value None."""
    key: str | None = None
    sample: dict[str, Any] = {}
    for path, content in archive.members():
        folder, _, name = path.rpartition("/")
        stem, dot, column = name.partition(".")
        if not stem or not dot:
            continue  # hidden files and files without a suffix are not columns
        if (found := f"{folder}/{stem}") != key:
            if key is not None:
                if not skip:
                    yield sample
                skip = max(skip - 1, 0)
            key, sample = found, {}
        sample[column.lower()] = None
        if not skip and column.lower() in wanted:
            sample[column.lower()] = _decoded(column.lower(), content.read())
    if key is not None and not skip:
        yield sample


def _decoded(column: str, data: bytes) -> Any:
    """Decodes by suffix, as the webdataset tools do: json is parsed, everything else is text."""
    try:
        return parsed(data) if column.rsplit(".", 1)[-1] == "json" else data.decode()
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"column {column!r} cannot be decoded ({error})") from None
