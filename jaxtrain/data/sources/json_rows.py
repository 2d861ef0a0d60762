"""Rows of JSON files: one object per line, objects that span lines, or a list of objects.

Each value is parsed separately, and only its wanted columns count. The datasets library parses a megabyte at a time
into one table, so a value of another type changes or breaks its neighbors: texts become JSON-escaped if one of them is
a number, and a new key in an unused column ends the file.
"""

import codecs
import io
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from jaxtrain.data.io.compression import CutShortError, DamagedError
from jaxtrain.data.sources.rows import RowError, clean, has_surrogates, kind_of, text_of
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json

_READ = 1 << 18  # bytes read at a time
_SPACE = re.compile(r"[ \t\r\n]*")
_ESCAPED_BYTE = re.compile("[\udc80-\udcff]")
# An error this close to the end of the data read so far may be a word, a number or an escape that is not complete.
_LONGEST_WORD = 16
# Columns are searched in the first rows: at most this many rows, or characters.
_LOOKED_AT_ROWS, _LOOKED_AT_CHARACTERS = 512, 1 << 20


def json_rows(stream: io.BufferedReader, text: str, columns: Sequence[str], kwargs: Json, what: str) -> Iterator[Json]:
    """Yields the rows of a JSON file: "text" (the column `text`), and `columns`; missing ones are None.

    Args:
        stream: The decompressed file.
        text: The column with the text.
        columns: Other columns.
        kwargs: Settings of the datasets library's JSON reader. `encoding`, `encoding_errors`, `field` and `features`
            count.
        what: Names the file.

    Raises:
        DamagedError: The bytes are not JSON, or not in the file's encoding.
        RowError: A row is not an object, or its text is not a string.
        UserError: The rows lack one of the columns.
    """
    values = _Values(stream, kwargs.get("encoding") or "utf-8", kwargs.get("encoding_errors"))
    missing = set() if kwargs.get("features") else {text, *columns}
    count = 0
    for value in _records(values, kwargs["field"]) if kwargs.get("field") else values:
        if isinstance(value, str):
            value = {"text": value}  # a list of strings
        if not isinstance(value, dict):
            raise RowError(f"holds {kind_of(value)}, not an object.")
        count += 1
        if missing:
            missing -= value.keys()
            if missing and (count == _LOOKED_AT_ROWS or values.characters > _LOOKED_AT_CHARACTERS):
                raise _no_column(min(missing), value, what)
        row = {name: value.get(name) for name in columns}
        row["text"] = value.get(text)
        if any(isinstance(item, str) and has_surrogates(item) for item in row.values()):
            values.check_bytes([text, *columns])
            row = {name: clean(item) for name, item in row.items()}
        row["text"] = text_of(row["text"], text)
        yield row
    if missing and count:
        raise _no_column(min(missing), value, what)  # pyright: ignore[reportPossiblyUnboundVariable] - count > 0


def _no_column(name: str, row: Json, what: str) -> UserError:
    has = ", ".join(map(repr, list(row)[:20])) or "nothing"
    return UserError(f"{what} has no column {name!r}. Its rows have {has}.")


def _records(values: "_Values", field: str) -> Iterator[Any]:
    """The rows in a field of a file that is one object."""
    for value in values:
        if not isinstance(value, dict) or not isinstance(value.get(field), list):
            raise RowError(f"the file holds no list in its field {field!r}.")
        yield from value[field]


def parsed(data: bytes) -> Any:
    """The only JSON value of some bytes. Integers may have any number of digits.

    Raises:
        ValueError: The bytes are not JSON.
        RecursionError: It nests too deeply for Python.
    """
    try:
        return json.loads(data)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except ValueError:  # an integer of more than 4,300 digits
        return json.loads(data, parse_int=_any_integer)


def _any_integer(digits: str) -> int | float:
    return int(digits) if len(digits) < 4000 else float(digits)


class _Values:
    """The JSON values of a file: the elements of a list if it begins with one, else consecutive values.

    Args:
        stream: The decompressed file.
        encoding: The encoding of its text.
        errors: What to do with bytes that are not in the encoding, as in `open`. None: they are an error in a wanted
            column (`check_bytes`).
    """

    def __init__(self, stream: io.BufferedReader, encoding: str, errors: str | None):
        self._stream = stream
        strict = errors in (None, "strict")
        self._text = codecs.getincrementaldecoder(encoding)("surrogateescape" if strict else errors or "strict")
        self._buffer, self._begin, self._at = "", 0, 0
        self._ended = False
        self.characters = 0  # of the values so far

    def __iter__(self) -> Iterator[Any]:
        self._more()
        self._at += self._buffer.startswith("\ufeff")
        if self._next() != "[":
            while self._next():
                yield self._value()
            return
        self._at += 1
        if self._next() == "]":
            self._at += 1
        else:
            yield self._value()
            while (mark := self._next()) == ",":
                self._at += 1
                self._next()
                yield self._value()
            if mark != "]":
                raise (
                    DamagedError(f"{mark!r} in a list, not , or ]") if mark else CutShortError("a list is not closed")
                )
            self._at += 1
        if self._next():
            raise DamagedError("there is data after the list's end")

    def _more(self) -> None:
        """Reads more, at least as much as is left, so that a value of any length is parsed only a few times."""
        left = self._buffer[self._at :]
        parts, wanted = [left], max(_READ, len(left))
        while wanted > 0 and not self._ended:
            try:
                data = self._stream.read1(wanted)
            except DamagedError:
                if len(parts) == 1:
                    raise
                break  # the data before it is good; the next read raises again
            self._ended = not data
            parts.append(self._text.decode(data, self._ended))
            wanted -= len(data)
        self._buffer, self._at = "".join(parts), 0

    def _next(self) -> str:
        """The next character that is not a space; "" at the end."""
        while True:
            match = _SPACE.match(self._buffer, self._at)
            assert match is not None
            self._at = match.end()
            if self._at < len(self._buffer) or self._ended:
                return self._buffer[self._at : self._at + 1]
            self._more()

    def _value(self) -> Any:
        while True:
            try:
                value, end = _PLAIN.raw_decode(self._buffer, self._at)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._buffer) - _LONGEST_WORD
                if not cut or self._ended:
                    problem = CutShortError if cut and error.pos >= len(self._buffer) else DamagedError
                    raise problem(f"is not JSON ({error.msg})") from None
                self._more()
                continue
            except ValueError:  # an integer of more than 4,300 digits
                value, end = _ANY_INTEGER.raw_decode(self._buffer, self._at)
            except RecursionError:
                raise RowError("nests objects or lists too deeply for Python to parse.") from None
            self.characters += end - self._at
            self._begin, self._at = self._at, end
            return value

    def check_bytes(self, names: Sequence[str]) -> None:
        """Raises DamagedError if these columns of the last value contain bytes that are not in the encoding.

        Such bytes were decoded to lone surrogates. Escapes can also produce those, but are ASCII in the file.
        """
        raw = self._buffer[self._begin : self._at]
        if _ESCAPED_BYTE.search(raw):
            was, now = json.loads(raw), json.loads(_ESCAPED_BYTE.sub("\ufffd", raw))
            for name in names:
                if now != was and (isinstance(was, str) or now.get(name) != was.get(name)):
                    raise DamagedError(f"column {name!r} holds bytes that are not in the file's encoding")


_PLAIN = json.JSONDecoder()
_ANY_INTEGER = json.JSONDecoder(parse_int=_any_integer)
