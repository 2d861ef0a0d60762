"""Rows of CSV files, by Python's csv module: a field is exactly what the file contains, independent of its neighbors.

The datasets library uses pandas, which treats the words NA, null and nan as missing, guesses types from a thousand
rows at a time, and makes the first column an index if rows have one more field than the header.
"""

import csv
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from jaxtrain.data.io.compression import CutShortError, DamagedError
from jaxtrain.data.sources.rows import RowError, has_surrogates
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json

_LONGEST_FIELD = 1 << 28  # characters; an unclosed quote makes one field of the rest of the file
csv.field_size_limit(max(csv.field_size_limit(), _LONGEST_FIELD))

# Settings of pandas in dataset cards: the supported ones, and those that have no effect here.
_SUPPORTED = {
    *("sep", "delimiter", "header", "names", "column_names", "quotechar", "quoting", "escapechar", "doublequote"),
    *("skipinitialspace", "skiprows", "skip_blank_lines", "nrows", "encoding", "encoding_errors", "on_bad_lines"),
}
_IGNORED = {
    *("index_col", "usecols", "prefix", "mangle_dupe_cols", "engine", "true_values", "false_values", "na_values"),
    *("keep_default_na", "na_filter", "verbose", "thousands", "decimal", "memory_map", "float_precision", "chunksize"),
    *("date_format", "error_bad_lines", "warn_bad_lines", "features"),
}
# What pandas treats as missing, in columns other than the text.
_MISSING = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
}
_INTEGER = re.compile(r"\s*[+-]?[0-9]{1,18}\s*")
_NUMBER = re.compile(r"\s*[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?\s*")
_TRUTH = {"True": True, "TRUE": True, "true": True, "False": False, "FALSE": False, "false": False}


def csv_rows(stream: io.BufferedReader, text: str, columns: Sequence[str], kwargs: Json, what: str) -> Iterator[Json]:
    """Yields the rows of a CSV file: "text" (the column `text`, unchanged), and `columns`.

    Values of `columns` are numbers or booleans if they parse as such, and None if pandas treats them as missing. A row
    shorter than the header lacks its last columns; a longer one is an error, unless its extra fields are empty.

    Args:
        stream: The decompressed file.
        text: The column with the text.
        columns: Other columns.
        kwargs: Settings of `pandas.read_csv`.
        what: Names the file.

    Raises:
        DamagedError: An unclosed quote, or bytes of a wanted column that are not in the file's encoding.
        RowError: More fields than in the header.
        UserError: A column is missing, or a setting is not supported.
    """
    _check(kwargs, what)
    errors = kwargs.get("encoding_errors") or "strict"
    strict = errors == "strict"
    encoding = kwargs.get("encoding") or "utf-8"
    lines = _Lines(
        io.TextIOWrapper(stream, encoding, "surrogateescape" if strict else errors, newline=""), kwargs.get("skiprows")
    )
    rows = _records(lines, kwargs)
    header = _header(rows, kwargs)
    if header is None:
        return
    for name in (text, *columns):
        if name not in header:
            raise UserError(f"{what} has no column {name!r}. It has {', '.join(map(repr, header))}.")
    at, others = header.index(text), {name: header.index(name) for name in columns}
    left = kwargs.get("nrows")
    for row in rows:
        if left is not None:
            if left == 0:
                return
            left -= 1
        if len(row) > len(header) and any(row[len(header) :]):
            if kwargs.get("on_bad_lines", "error") != "error":
                continue
            raise RowError(
                f"has {len(row)} fields, and the header has {len(header)}. Quote texts that contain the separator, "
                "and name all columns in the header."
            )
        found = row[at] if at < len(row) else ""
        fields = {name: row[i] if i < len(row) else "" for name, i in others.items()}
        if strict and any(map(has_surrogates, (found, *fields.values()))):
            raise DamagedError(f"contains bytes that are not {encoding}")
        yield {**{name: _value(field) for name, field in fields.items()}, "text": found}


def _check(kwargs: Json, what: str) -> None:
    separator = kwargs.get("delimiter") or kwargs.get("sep", ",")
    unknown = sorted(key for key in kwargs if key not in _SUPPORTED | _IGNORED)
    if len(separator or "") != 1:
        unknown.append(f"sep={separator!r}")
    if unknown:
        raise UserError(
            f"{what}: the dataset's card sets {', '.join(unknown)} for its CSV files, which is not supported. Try "
            "its parquet files with revision='refs/convert/parquet'."
        )


class _Lines:
    """The lines of a file, and their state that is needed to find rows.

    Args:
        file: The text, with its own line ends.
        skip: The number of lines to skip at the beginning, or the numbers of the lines to skip.
    """

    def __init__(self, file: Iterable[str], skip: int | list[int] | None):
        self._file = file
        self._skip: Any = range(skip) if isinstance(skip, int) else skip or ()
        self.last, self.count, self.ended = "", 0, False

    def __iter__(self) -> Iterator[str]:
        for number, line in enumerate(self._file):
            if number not in self._skip:
                self.last = line.removeprefix("\ufeff") if number == 0 else line
                self.count += 1
                yield self.last
        self.ended = True


def _records(lines: _Lines, kwargs: Json) -> Iterator[list[str]]:
    """All rows, including the header, without blank lines."""
    settings: dict[str, Any] = {
        key: kwargs[key]
        for key in ("quotechar", "quoting", "escapechar", "doublequote", "skipinitialspace")
        if key in kwargs
    }
    reader = csv.reader(lines, delimiter=kwargs.get("delimiter") or kwargs.get("sep", ","), **settings)
    keep_blank, begun = not kwargs.get("skip_blank_lines", True), 0
    try:
        for row in reader:
            if lines.ended:
                raise CutShortError("a quoted field is not closed")
            is_blank = lines.count == begun + 1 and not lines.last.strip(" \t\r\n") and len(row) < 2
            begun = lines.count
            if keep_blank or not is_blank:
                yield row
    except csv.Error as error:
        raise DamagedError(f"is not CSV ({error})") from None


def _header(rows: Iterator[list[str]], kwargs: Json) -> list[str] | None:
    """The names of the columns; None for a file without a row. Consumes the header."""
    names = kwargs.get("names") or kwargs.get("column_names")
    number = kwargs.get("header", "infer")
    if number == "infer":
        number = None if names else 0
    if not isinstance(number, int | None):
        raise UserError(f"CSV files with a header of several lines (header={number!r}) are not supported.")
    if number is None:
        if names:
            return list(names)
        raise UserError("CSV files without a header need names for their columns (column_names).")
    first: list[str] | None = None
    for _ in range(number + 1):
        first = next(rows, None)
    return list(names) if names and first is not None else first


def _value(field: str) -> Any:
    if field in _MISSING:
        return None
    if _INTEGER.fullmatch(field):
        return int(field)
    return float(field) if _NUMBER.fullmatch(field) else _TRUTH.get(field, field)
