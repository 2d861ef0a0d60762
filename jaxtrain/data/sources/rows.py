"""Rows of a file, parsed one by one, as blocks; and how bad rows are reported."""

import tarfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxtrain.data.io.byte_ranges import Bytes
from jaxtrain.data.io.compression import DamagedError
from jaxtrain.errors import CorruptError, UserError
from jaxtrain.interfaces import Block

BLOCK_ROWS = 512
# Rows are yielded after this much has been parsed, so that damage by a faulty connection is mostly found before.
CHUNK_CHARACTERS = 1 << 20
_CHUNK_ROWS = 1 << 13


class RowError(Exception):
    """A row whose bytes are intact but which cannot become a document."""


def blocks_of(
    rows: Iterator[Mapping[str, Any]],
    source: Bytes,
    columns: Sequence[str],
    *,
    first: int = 0,
    row: int = 0,
    is_sound: Callable[[Exception], bool] = lambda error: True,
) -> Iterator[Block]:
    """Yields blocks of up to 512 rows, of "text" and `columns`.

    Args:
        rows: The file's rows from number `first` on, each with the columns.
        source: The file.
        columns: The columns other than "text".
        first: The number of the first of `rows` in the file.
        row: The number of the first row to yield.
        is_sound: After an error, whether the rows just before it are certain to be intact.

    Raises:
        CorruptError: A row cannot be read. Its number is exact if the rows before it are intact.
        UserError: A row cannot become a document; the message has its number.
    """
    names = tuple(dict.fromkeys(("text", *columns)))
    number, characters = first, 0
    chunk: list[Mapping[str, Any]] = []

    def blocks() -> Iterator[Block]:
        for start in range(max(row - (number - len(chunk)), 0), len(chunk), BLOCK_ROWS):
            some = chunk[start : start + BLOCK_ROWS]
            yield {name: [values[name] for values in some] for name in names}

    try:
        for values in rows:
            chunk.append(values)
            number += 1
            characters += len(values["text"])
            if characters >= CHUNK_CHARACTERS or len(chunk) == _CHUNK_ROWS:
                yield from blocks()
                chunk, characters = [], 0
    except (DamagedError, tarfile.TarError, RowError) as error:
        if not is_sound(error):
            source.refresh()
            raise CorruptError(f"{source.what}: {error}", source.what, number - len(chunk)) from None
        yield from blocks()
        message = f"{source.what}, row {number}: {error}"
        if isinstance(error, RowError):
            raise UserError(message) from None
        source.refresh()
        raise CorruptError(message, source.what, number) from None
    yield from blocks()


def text_of(value: Any, column: str) -> str:
    """The text of a document. Null is a document without text.

    Raises:
        RowError: The value is neither a string nor null.
    """
    if value is None:
        return ""
    if not isinstance(value, str):
        raise RowError(f"column {column!r} holds {kind_of(value)}, not text. Convert it to text, or remove the row.")
    return clean(value)


def clean(value: Any) -> Any:
    """Replaces lone surrogates, which JSON allows ("\\ud83d") and no tokenizer accepts, by U+FFFD."""
    if not isinstance(value, str) or not has_surrogates(value):
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def has_surrogates(text: str) -> bool:
    """Whether the text cannot be encoded as UTF-8."""
    if text.isascii():
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def kind_of(value: Any) -> str:
    """The JSON type of a value, for messages."""
    names = {dict: "an object", list: "a list", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
