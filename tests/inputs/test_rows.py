"""Unusual rows: null, not a string, empty, broken; in every format, at the first row, far in, and last."""

import io
import json
import pathlib
import tarfile
from collections.abc import Callable, Sequence
from typing import Any

import datasets
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxtrain.data.sources.csv_rows import csv_rows
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.data.sources.text_files import TextFiles
from jaxtrain.errors import CorruptError, UserError
from tests.data.sources.tars import tar
from tests.inputs.formats import FORMATS, PACK, read

# More than a megabyte of JSON: the datasets library decides by a file's first megabyte.
TEXTS = [f'He said "no {n}".\nSecond line of document {n}. ' + "x" * 900 for n in range(1300)]
FIRST, FAR, LAST = 0, 1200, len(TEXTS) - 1
PLACES = pytest.mark.parametrize("row", [FIRST, FAR, LAST])


class Other:
    """A transform that reads one more column."""

    columns: tuple[str, ...] = ("other",)

    def __call__(self, document: dict[str, Any]) -> dict[str, Any]:
        return document


def rows_of(texts: Sequence[str] = TEXTS) -> list[dict[str, Any]]:
    return [{"text": text, "id": n, "meta": {"score": 1}, "date": "2024-01-01"} for n, text in enumerate(texts)]


def jsonl(rows: Sequence[Any]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def read_json(path: pathlib.Path, data: bytes, column: str = "text") -> tuple[list[str], Exception | None]:
    path.write_bytes(data)
    return read(HuggingFace(name="json", data_files=(str(path),), column=column))


def changed(row: int, text: str) -> list[str]:
    return [*TEXTS[:row], text, *TEXTS[row + 1 :]]


# JSON


@PLACES
@pytest.mark.parametrize(
    ("update", "text"),
    [
        ({"text": None}, ""),
        ({"text": ""}, ""),
        ({"text": "cut emoji \ud83d here"}, "cut emoji \ufffd here"),
        ({"text": "low \udc85 half"}, "low \ufffd half"),
        ({"text": "🜁 whole"}, "🜁 whole"),
        ({"text": "1234"}, "1234"),
        ({"text": '{"a": 1}'}, '{"a": 1}'),
        ({"text": "2024-01-01T00:00:00"}, "2024-01-01T00:00:00"),
    ],
)
def test_json_texts(tmp_path: pathlib.Path, row: int, update: dict[str, Any], text: str) -> None:
    rows = rows_of()
    rows[row].update(update)
    assert read_json(tmp_path / "a.jsonl", jsonl(rows)) == (changed(row, text), None)
    if row == FAR:
        assert read_json(tmp_path / "a.json", json.dumps(rows, indent=1).encode()) == (changed(row, text), None)


@PLACES
@pytest.mark.parametrize(
    "update",
    [
        {"meta": {"score": 0.5}},
        {"meta": {"score": 1, "link": "x"}},
        {"meta": {}},
        {"meta": None},
        {"meta": "a text"},
        {"meta": [1, "a", {}]},
        {"id": 0.5},
        {"id": "five"},
        {"id": 10**30},
        {"id": float("nan")},
        {"date": ""},
        {"date": None},
        {"late": {"a": [1]}},
        {"id": "half \ud83d"},
    ],
)
def test_other_columns_do_not_matter(tmp_path: pathlib.Path, row: int, update: dict[str, Any]) -> None:
    rows = rows_of()
    rows[row].update(update)
    assert read_json(tmp_path / "a.jsonl", jsonl(rows)) == (TEXTS, None)


@PLACES
def test_a_row_without_text(tmp_path: pathlib.Path, row: int) -> None:
    rows = rows_of()
    del rows[row]["text"]
    assert read_json(tmp_path / "a.jsonl", jsonl(rows)) == (changed(row, ""), None)


@PLACES
@pytest.mark.parametrize(
    ("value", "kind"),
    [(123, "a number"), (1.5, "a number"), (True, "a boolean"), (["a"], "a list"), ({"a": "b"}, "an object")],
)
def test_a_json_text_that_is_no_string(tmp_path: pathlib.Path, row: int, value: Any, kind: str) -> None:
    """The user must change it; the message has file and row, and the other rows are unchanged."""
    rows = rows_of()
    rows[row]["text"] = value
    found, error = read_json(tmp_path / "a.jsonl", jsonl(rows))
    assert isinstance(error, UserError)
    assert f"a.jsonl, row {row}: column 'text' holds {kind}" in str(error)
    assert found == TEXTS[: len(found)]


@PLACES
@pytest.mark.parametrize("value", [123, None, ["a"], "a string"])
def test_a_json_row_that_is_no_object(tmp_path: pathlib.Path, row: int, value: Any) -> None:
    rows: list[Any] = rows_of()
    rows[row] = value
    found, error = read_json(tmp_path / "a.json", json.dumps(rows).encode())
    if isinstance(value, str):  # a list of strings is a list of documents
        assert (found, error) == (changed(row, value), None)
    else:
        assert isinstance(error, UserError)
        assert f"a.json, row {row}: " in str(error)


@PLACES
@pytest.mark.parametrize(
    "change",
    [
        lambda line: line.replace(b'"id"', b'id"'),
        lambda line: line[:-20] + b"\n",
        lambda line: line.replace(b"xx", b"x\nx", 1),
        lambda line: b"}" + line,
        lambda line: b"\0" * len(line),
        lambda line: line.replace(b"xx", b"x\xffx", 1),
    ],
)
def test_a_broken_json_row(tmp_path: pathlib.Path, row: int, change: Callable[[bytes], bytes]) -> None:
    lines = jsonl(rows_of()).splitlines(keepends=True)
    lines[row] = change(lines[row])
    found, error = read_json(tmp_path / "a.jsonl", b"".join(lines))
    assert isinstance(error, CorruptError)
    assert error.row == row
    assert f"a.jsonl, row {row}: " in str(error)
    assert found == ([] if row == FIRST else TEXTS[:row])


def test_bytes_of_another_column_need_no_encoding(tmp_path: pathlib.Path) -> None:
    rows = rows_of()
    rows[FAR]["text"] = rows[FAR]["text"] + "\ud83d"
    rows[FAR]["date"] = "latin"
    data = jsonl(rows).replace(b"latin", b"l\xe4tin")
    assert read_json(tmp_path / "a.jsonl", data) == (changed(FAR, TEXTS[FAR] + "\ufffd"), None)


def test_surrogates_in_columns_that_transforms_read(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(jsonl([{"text": "one", "other": "cut \ud83d"}, {"text": "two \ud83d", "other": 2}]))
    source = HuggingFace(name="json", data_files=(str(path),), transforms=(Other(),)).resolve()
    (block,) = source.open(0, 0)
    assert block == {"text": ["one", "two \ufffd"], "other": ["cut \ufffd", 2]}


ROWS = rows_of(["one", "two\n", "three"])
WAYS_TO_WRITE_JSON = {
    "blank lines": b"\n\n" + jsonl(ROWS).replace(b"\n", b"\n \t\n\n"),
    "windows": jsonl(ROWS).replace(b"\n", b"\r\n"),
    "a byte order mark": b"\xef\xbb\xbf" + jsonl(ROWS),
    "no end of line": jsonl(ROWS)[:-1],
    "several in a line": jsonl(ROWS).replace(b"\n", b" "),
    "over several lines": "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "a list": json.dumps(ROWS).encode(),
    "a list over several lines": b"\xef\xbb\xbf \n" + json.dumps(ROWS, indent=2).encode() + b"\n",
    "a key twice": jsonl(ROWS).replace(b'"id": 0', b'"id": 0, "id": "x"'),
    "an integer of 5,000 digits": jsonl(ROWS).replace(b'"id": 1', b'"id": ' + b"1" * 5000),
    "NaN": jsonl(ROWS).replace(b'"id": 1', b'"id": NaN'),
}


@pytest.mark.parametrize("way", WAYS_TO_WRITE_JSON)
def test_ways_to_write_json(tmp_path: pathlib.Path, way: str) -> None:
    assert read_json(tmp_path / "a.json", WAYS_TO_WRITE_JSON[way]) == (["one", "two\n", "three"], None)


def test_json_as_the_datasets_library_reads_it(tmp_path: pathlib.Path) -> None:
    for way in ("blank lines", "several in a line", "over several lines"):
        path = tmp_path / f"{way}.json"
        path.write_bytes(WAYS_TO_WRITE_JSON[way])
        rows: Any = datasets.load_dataset("json", data_files=str(path), split="train", streaming=True)
        assert read_json(path, path.read_bytes()) == ([row["text"] for row in rows], None)


def test_json_of_one_object_or_of_strings(tmp_path: pathlib.Path) -> None:
    assert read_json(tmp_path / "a.json", json.dumps(["one", "two"]).encode()) == (["one", "two"], None)
    assert read_json(tmp_path / "a.json", b"[]") == ([], None)
    assert read_json(tmp_path / "a.json", b" \n ") == ([], None)
    found, error = read_json(tmp_path / "a.json", json.dumps({"data": rows_of(["x"])}).encode())
    assert found == []
    assert isinstance(error, UserError)
    assert "has no column 'text'. Its rows have 'data'" in str(error)
    for end in (b"", b",", b"]]", b"] 5", b", 5"):
        data = json.dumps(rows_of(["one", "two"])).encode()[:-1] + end
        found, error = read_json(tmp_path / "a.json", data)
        assert isinstance(error, CorruptError | UserError), end


def test_long_json_lines(tmp_path: pathlib.Path) -> None:
    """Longer than any buffer, also with a character or an escape across its end."""
    long = ['🜁λ\\"\n' * 400_000, "short", "y" * 3_000_000]
    data = b"".join(json.dumps({"text": text}, ensure_ascii=n > 0).encode() + b"\n" for n, text in enumerate(long))
    assert read_json(tmp_path / "a.jsonl", data) == (long, None)


def test_a_column_that_is_not_there(tmp_path: pathlib.Path) -> None:
    found, error = read_json(tmp_path / "a.jsonl", jsonl(rows_of()), column="content")
    assert found == []
    assert isinstance(error, UserError)
    assert "has no column 'content'. Its rows have 'text', 'id', 'meta', 'date'" in str(error)


# CSV


def read_csv(path: pathlib.Path, data: str | bytes) -> tuple[list[str], Exception | None]:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return read(HuggingFace(name="csv", data_files=(str(path),)))


MANY = [f"document {n}" for n in range(3000)]


@pytest.mark.parametrize(
    ("data", "texts"),
    [
        ("text\nNA\nnull\nnan\nplain\n", ["NA", "null", "nan", "plain"]),
        ("text,id\n1,1\n2.50,2\n007,3\ntrue,4\n", ["1", "2.50", "007", "true"]),
        ("text,source\n" + "".join(f"{text},web,\n" for text in MANY), MANY),
        ("text,id\n" + "".join(f"{text},{'' if n == 1500 else n}\n" for n, text in enumerate(MANY)), MANY),
        ("text,id\n" + "".join(f"{text},{'x' if n == 1500 else n}\n" for n, text in enumerate(MANY)), MANY),
        ("text,id\n" + "".join(f"{'' if n < 2000 else text},1\n" for n, text in enumerate(MANY)),
         ["" if n < 2000 else text for n, text in enumerate(MANY)]),
        ("id,text\n1,one\n2\n3,three\n", ["one", "", "three"]),
        ("\n\ntext,id\n\none,1\n  \n\"\",2\ntwo,3", ["one", "", "two"]),
        ("\ufefftext\r\n\"two\r\nlines\"\r\na \"quoted\" word\r\n\"say \"\"so\"\"\"\r\n",
         ["two\r\nlines", 'a "quoted" word', 'say "so"']),
        ("text\rmac\rtwo\r", ["mac", "two"]),
        ("text,text\nfirst,second\n", ["first"]),
        ("", []),
        ("text,id\n", []),
    ],
)  # fmt: skip
def test_csv_rows(tmp_path: pathlib.Path, data: str, texts: list[str]) -> None:
    path = tmp_path / "a.csv"
    assert read_csv(path, data) == (texts, None)
    if texts and "web,\n" not in data:
        frame = pd.read_csv(path, dtype=str, keep_default_na=False)
        assert frame["text"].tolist() == texts


def test_a_row_of_separators_is_not_blank() -> None:
    data = b"text\tid\none\t1\n\t\n\ntwo\t2\n"
    rows = csv_rows(io.BufferedReader(io.BytesIO(data)), "text", ("id",), {"sep": "\t"}, "x")
    assert list(rows) == [{"text": "one", "id": 1}, {"text": "", "id": None}, {"text": "two", "id": 2}]
    assert len(pd.read_csv(io.BytesIO(data), sep="\t")) == 3


@pytest.mark.parametrize("row", [0, 1, 2999])
def test_a_csv_row_with_more_fields_than_the_header(tmp_path: pathlib.Path, row: int) -> None:
    rows = [f"{text},{n}" for n, text in enumerate(MANY)]
    rows[row] = f"hello, world,{row}"
    found, error = read_csv(tmp_path / "a.csv", "text,id\n" + "\n".join(rows) + "\n")
    assert isinstance(error, UserError)
    assert f"a.csv, row {row}: has 3 fields, and the header has 2" in str(error)
    assert found == MANY[: len(found)]


@pytest.mark.parametrize("row", [0, 1, 2999])
def test_broken_csv(tmp_path: pathlib.Path, row: int) -> None:
    """An unclosed quote; invalid UTF-8, which does not matter in a column that is not read."""
    rows = [f"{text},{n}" for n, text in enumerate(MANY)]
    rows[row] = f'"{rows[row]}'
    found, error = read_csv(tmp_path / "a.csv", "text,id\n" + "\n".join(rows) + "\n")
    assert isinstance(error, CorruptError)
    assert (found, error.row) == (([] if row == 0 else MANY[:row]), row)
    lines = [f"{text},{n}".encode() for n, text in enumerate(MANY)]
    lines[row] = b"\xff" + lines[row]
    found, error = read_csv(tmp_path / "a.csv", b"text,id\n" + b"\n".join(lines))
    assert isinstance(error, CorruptError)
    assert (found, error.row) == (([] if row == 0 else MANY[:row]), row)
    lines[row] = lines[row][1:] + b"\xff"
    assert read_csv(tmp_path / "a.csv", b"text,id\n" + b"\n".join(lines)) == (MANY, None)


def test_csv_columns_that_transforms_read(tmp_path: pathlib.Path) -> None:
    """A value depends only on its own field, whatever the other rows contain."""
    fields = ["1", "2.5", "", "NA", "True", "a word", "007", "-3", "1e3", "infinity"]
    (tmp_path / "a.csv").write_text("text,other\n" + "".join(f"x,{field}\n" for field in fields))
    source = HuggingFace(name="csv", data_files=(str(tmp_path / "a.csv"),), transforms=(Other(),)).resolve()
    found = [value for block in source.open(0, 0) for value in block["other"]]
    assert found == [1, 2.5, None, None, True, "a word", 7, -3, 1000.0, "infinity"]
    assert list(map(type, found[:2])) == [int, float]


# Text


@PLACES
def test_lines_of_text_that_are_not_utf8(tmp_path: pathlib.Path, row: int) -> None:
    lines = [text.replace("\n", " ") for text in TEXTS]
    data = [line.encode() for line in lines]
    data[row] = data[row][:30] + b"\xff\xfe" + data[row][30:]
    path = tmp_path / "a.txt"
    path.write_bytes(b"\n".join(data))
    found, error = read(HuggingFace(name="text", data_files=(str(path),)))
    assert isinstance(error, CorruptError)
    assert (found, error.row) == (([] if row == FIRST else lines[:row]), row)
    # TextFiles keeps the row, as documented.
    found, error = read(TextFiles(patterns=(str(path),), document="line"))
    assert (found, error) == ([*lines[:row], "", *lines[row + 1 :]], None)


@pytest.mark.parametrize("document", ["line", "file"])
def test_text_files_that_are_compressed(tmp_path: pathlib.Path, document: str) -> None:
    """Their bytes are not text, and would become rows without text."""
    (tmp_path / "a.txt").write_bytes(PACK["gz"](b"one\ntwo\n"))
    found, error = read(TextFiles(patterns=(str(tmp_path / "a.txt"),), document=document))
    assert found == []
    assert isinstance(error, UserError)
    assert "is compressed (gzip)" in str(error)


# Tables with types


def frame(kind: str, table: pa.Table) -> bytes:
    out = io.BytesIO()
    if kind == "parquet":
        pq.write_table(table, out)
    else:
        with (pa.ipc.new_stream if kind == "stream" else pa.ipc.new_file)(out, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    return out.getvalue()


def read_table(path: pathlib.Path, kind: str, table: pa.Table) -> tuple[list[str], Exception | None]:
    path.write_bytes(frame(kind, table))
    return read(HuggingFace(name="parquet" if kind == "parquet" else "arrow", data_files=(str(path),)))


KINDS = pytest.mark.parametrize("kind", ["parquet", "stream", "file"])
SMALL = ["one", "", None, "🜁 λόγος", None]


@KINDS
@pytest.mark.parametrize(
    "text",
    [
        pa.array(SMALL),
        pa.array(SMALL, pa.large_string()),
        pa.array(SMALL, pa.string_view()),
        pa.array(SMALL).dictionary_encode(),
        pa.nulls(5),
    ],
)
def test_types_of_text_and_null(tmp_path: pathlib.Path, kind: str, text: pa.Array) -> None:
    wanted = [value or "" for value in text.to_pylist()]
    table = pa.table({"id": [{"a": n} for n in range(5)], "text": text})
    assert read_table(tmp_path / "a", kind, table) == (wanted, None)


@KINDS
@pytest.mark.parametrize(
    ("table", "message"),
    [
        (pa.Table.from_arrays([pa.array(["a"])] * 2, names=["text", "text"]), "has 2 columns 'text'. Rename"),
        (pa.table({"text": [1]}), "column 'text' holds int64, not text. Columns with text: none"),
        (pa.table({"text": [b"a"], "b": ["x"]}), "column 'text' holds binary, not text. Columns with text: 'b'"),
        (pa.table({"text": [["a"]]}), "column 'text' holds list"),
        (pa.table({"content": ["a"]}), "has no column 'text'. It has 'content'"),
    ],
)
def test_tables_without_a_text(tmp_path: pathlib.Path, kind: str, table: pa.Table, message: str) -> None:
    found, error = read_table(tmp_path / "a", kind, table)
    assert found == []
    assert isinstance(error, UserError)
    assert message in str(error)


@KINDS
def test_other_columns_may_have_one_name(tmp_path: pathlib.Path, kind: str) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array([1]), pa.array([2])], names=["text", "n", "n"])
    assert read_table(tmp_path / "a", kind, table) == (["a"], None)


def test_null_typed_files_beside_others(tmp_path: pathlib.Path) -> None:
    (tmp_path / "n0.parquet").write_bytes(frame("parquet", pa.table({"text": ["a"] * 5})))
    (tmp_path / "n1.parquet").write_bytes(frame("parquet", pa.table({"text": pa.nulls(5)})))
    source = HuggingFace(name="parquet", data_files=(str(tmp_path / "*.parquet"),)).resolve()
    assert [text for file in (0, 1) for block in source.open(file, 0) for text in block["text"]] == ["a"] * 5 + [""] * 5


def test_encrypted_parquet(tmp_path: pathlib.Path) -> None:
    """By its magic bytes; and a file with only encrypted columns, made by pyarrow with a one-line key store."""
    import base64

    import pyarrow.parquet.encryption as pe

    class Keys(pe.KmsClient):
        def wrap_key(self, key_bytes: bytes, master_key_identifier: str) -> bytes:
            return base64.b64encode(key_bytes)

        def unwrap_key(self, wrapped_key: bytes, master_key_identifier: str) -> bytes:
            return base64.b64decode(wrapped_key)

    factory, table = pe.CryptoFactory(lambda config: Keys()), pa.table({"text": ["a", "b"], "n": [1, 2]})
    for number, plain in enumerate((False, True)):
        config = pe.EncryptionConfiguration(footer_key="f", column_keys={"c": ["text"]}, plaintext_footer=plain)
        properties = factory.file_encryption_properties(pe.KmsConnectionConfig(), config)
        path = tmp_path / f"{number}.parquet"
        with pq.ParquetWriter(path, table.schema, encryption_properties=properties) as writer:
            writer.write_table(table)
        found, error = read(HuggingFace(name="parquet", data_files=(str(path),)))
        assert found == []
        assert isinstance(error, UserError)
        assert "encrypted" in str(error)


# Tar shards


@pytest.mark.parametrize("suffix", ["tar", "tar.xz", "tar.zst"])
def test_members_of_tars(tmp_path: pathlib.Path, suffix: str) -> None:
    kind, path = FORMATS[suffix], tmp_path / f"a.{suffix}"

    def documents(data: bytes) -> tuple[list[str], Exception | None]:
        packed = tar([("0.json", b'{"text": "zero"}'), ("1.json", data), ("2.txt", b"two")])
        path.write_bytes(
            {"tar": lambda tar: tar, **{f"tar.{name}": pack for name, pack in PACK.items()}}[suffix](packed)
        )
        return read(kind.config(path))

    assert documents(b'{"text": null}') == (["zero", "", "two"], None)
    assert documents(b'{"text": "\\ud83d"}') == (["zero", "\ufffd", "two"], None)
    assert documents(b'{"text": "\xff"}') == (["zero", "", "two"], None)
    assert documents(b'{"text": "one", "n": ' + b"1" * 5000 + b"}") == (["zero", "one", "two"], None)
    found, error = documents(b'{"text": 5}')
    assert isinstance(error, UserError)
    assert f"a.{suffix}, row 1: 'text' of member '1.json' holds a number" in str(error)
    found, error = documents(b'{"text": ')
    assert isinstance(error, CorruptError)
    assert (found, error.row) == (["zero"], 1)


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_in_a_tar_are_named(tmp_path: pathlib.Path, kind: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """GNU tar writes one for each further name of a file. A stream cannot go back to what it links to."""
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, data in (("0.txt", b"zero"), ("1.txt", b""), ("2.txt", b"two")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            if name == "1.txt":
                info.type, info.linkname = kind, "0.txt"
            archive.addfile(info, io.BytesIO(data))
    assert read(FORMATS["tar"].config(tmp_path / "a.tar")) == (["zero", "two"], None)
    assert "a.tar: skipped 1 link(s)" in caplog.text
