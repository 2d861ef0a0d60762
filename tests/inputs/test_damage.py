"""Every format, damaged in every way at every place: the loss is reported, and nothing is lost silently."""

import dataclasses
import gzip
import io
import pathlib
import random
import zipfile
from collections.abc import Callable

import pyarrow as pa
import pytest

from jaxtrain.errors import CorruptError
from tests.data.sources.tars import shard
from tests.inputs.formats import FORMATS, PACK, Format, jsonl, read

# Of many lengths and scripts; without line ends, since text files have none within a document.
_WORDS = ["the", "être", "水", "λόγος", "a,b", '"q"', "🜁", "\\", "NA", "null", "x" * 30]


def texts_of(count: int) -> list[str]:
    rng = random.Random(count)
    return [f"{n} " + " ".join(rng.choices(_WORDS, k=rng.randrange(1, 12))) for n in range(count)]


TEXTS = texts_of(300)


@dataclasses.dataclass(frozen=True)
class Case:
    kind: Format
    path: pathlib.Path
    texts: list[str]
    data: bytes


@pytest.fixture(params=FORMATS)
def case(request: pytest.FixtureRequest, tmp_path: pathlib.Path) -> Case:
    kind = FORMATS[request.param]
    texts = TEXTS if kind.builder else TEXTS[:40]  # tarfile takes 0.1 ms per member
    return Case(kind, tmp_path / f"data.{request.param}", texts, kind.encode(texts))


def test_whole(case: Case) -> None:
    kind, path, data = case.kind, case.path, case.data
    path.write_bytes(data)
    found, error = read(kind.config(path))
    assert error is None
    assert found == case.texts == kind.reference(path)


def _cuts(data: bytes, count: int) -> list[int]:
    """Just before the end, where formats have their end markers, and anywhere."""
    size, rng = len(data), random.Random(0)
    near = [size - left for left in (1, 2, 4, 8, 9, 20, 60, 512, 600, 1024, 1025) if left < size]
    return [*near, 1, 5, size // 2, *(rng.randrange(1, size) for _ in range(count))]


def check_cut(case: Case, cut: int) -> None:
    kind, path, texts = case.kind, case.path, case.texts
    path.write_bytes(case.data[:cut])
    found, error = read(kind.config(path))
    assert found == texts[: len(found)] or not kind.ends, cut
    if error is None and path.suffix == ".tar":
        assert found == texts  # of the zeros that fill the last record, two blocks are the end marker
    elif kind.ends:
        assert isinstance(error, CorruptError), (cut, error, len(found))
        assert str(path) in str(error)
        assert error.row <= len(found), cut
    elif error is None:
        # Whole lines, and perhaps the beginning of another, which looks like a whole one.
        assert found[:-1] == texts[: len(found) - 1], cut
        assert not found or texts[len(found) - 1].startswith(found[-1]), cut


def test_cut(case: Case) -> None:
    for cut in _cuts(case.data, 6):
        check_cut(case, cut)


@pytest.mark.slow
def test_cut_anywhere(case: Case) -> None:
    for cut in _cuts(case.data, 150):
        check_cut(case, cut)


def check_wrong_bytes(case: Case, at: int) -> None:
    kind, path, texts, data = case.kind, case.path, case.texts, case.data
    path.write_bytes(data[:at] + bytes(byte ^ 0x5A for byte in data[at : at + 12]) + data[at + 12 :])
    found, error = read(kind.config(path))
    if error is None:
        # Not in a document: in a timestamp, a name, padding, another column.
        assert not kind.sums or found == texts, at
        assert len(found) >= len(texts) - 1 or not kind.ends, at
    else:
        assert str(path) in str(error)
        wrong = sum(text != right for text, right in zip(found, texts, strict=False))
        assert wrong == 0 or not kind.sums, at


def test_wrong_bytes(case: Case) -> None:
    for part in (0.02, 0.35, 0.6, 0.97):
        check_wrong_bytes(case, int(part * len(case.data)))


@pytest.mark.slow
def test_wrong_bytes_anywhere(case: Case) -> None:
    rng = random.Random(1)
    for _ in range(60):
        check_wrong_bytes(case, rng.randrange(len(case.data)))


EMPTY_IS_WHOLE = ("jsonl", "json", "csv", "txt")  # a file without rows


def test_empty(case: Case, request: pytest.FixtureRequest) -> None:
    kind, path = case.kind, case.path
    path.write_bytes(b"")
    found, error = read(kind.config(path))
    assert found == []
    if path.name.removeprefix("data.") in EMPTY_IS_WHOLE:
        assert error is None
    else:
        assert isinstance(error, CorruptError)
        assert str(path) in str(error)


def test_something_after_the_end(case: Case) -> None:
    kind, path, data = case.kind, case.path, case.data
    path.write_bytes(data + b"\xff\x00something else")
    found, error = read(kind.config(path))
    if path.name.endswith((".csv", ".zip", "file.arrow")):
        # A CSV row without text; the other formats are read from their end, where their index is.
        assert found == case.texts or error is not None or found == [*case.texts, ""]
    else:
        assert isinstance(error, CorruptError)
        assert found == case.texts[: len(found)]


# Concatenated compressed streams, as from `cat a.gz b.gz`, are all read; a truncated one is an error.
@pytest.mark.parametrize("suffix", PACK)
def test_joined_streams(tmp_path: pathlib.Path, suffix: str) -> None:
    kind, path, pack = FORMATS[f"jsonl.{suffix}"], tmp_path / f"data.jsonl.{suffix}", PACK[suffix]
    first, second = pack(jsonl(TEXTS[:200])), pack(jsonl(TEXTS[200:]))
    path.write_bytes(first + second)
    assert read(kind.config(path)) == (TEXTS, None)
    assert kind.reference(path) == TEXTS
    for cut in (1, 3, 10, len(second) // 2, len(second) - 1):
        path.write_bytes(first + second[:cut])
        found, error = read(kind.config(path))
        assert isinstance(error, CorruptError), cut
        assert found == TEXTS[: len(found)]
        assert error.row == len(found) >= 200, cut


def test_an_arrow_stream_cut_between_batches(tmp_path: pathlib.Path) -> None:
    """Arrow's specification allows a stream to end like this; no writer does it."""
    path, out = tmp_path / "data.arrow", io.BytesIO()
    table = pa.table({"text": TEXTS})
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table.slice(0, 100))
        boundary = out.tell()
        writer.write_table(table.slice(100))
    path.write_bytes(out.getvalue()[:boundary])
    kind = FORMATS["stream.arrow"]
    assert kind.reference(path) == TEXTS[:100]
    found, error = read(kind.config(path))
    assert isinstance(error, CorruptError)
    assert (found, error.row) == (TEXTS[:100], 100)


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda data: b"plain text\n" * 9, "a.jsonl.gz"),
        (lambda data: PACK["zst"](data), "a.jsonl.gz.jsonl.xz"[:10] + ".bz2"),
        (lambda data: b"\0" * 100, "a.txt.zst"),
    ],
)
def test_a_name_that_promises_another_format(
    tmp_path: pathlib.Path, change: Callable[[bytes], bytes], name: str
) -> None:
    """The content decides between two compressions; a file in neither is damaged."""
    path = tmp_path / name
    data = change(jsonl(TEXTS))
    path.write_bytes(data)
    found, error = read(FORMATS["jsonl" if "jsonl" in name else "txt"].config(path))
    if data[:4] == b"\x28\xb5\x2f\xfd":
        assert (found, error) == (TEXTS, None)
    else:
        assert isinstance(error, CorruptError)
        assert "does not begin like" in str(error)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_wrong_byte_in_a_zip_archive(tmp_path: pathlib.Path, method: int) -> None:
    """Each method has a decoder with errors of its own."""
    path, out = tmp_path / "data.jsonl.zip", io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        archive.writestr("a.jsonl", jsonl(TEXTS))
    kind, data = FORMATS["jsonl.zip"], out.getvalue()
    path.write_bytes(data)
    assert read(kind.config(path)) == (TEXTS, None)
    for at in range(40, len(data) - 150, len(data) // 7):
        path.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
        found, error = read(kind.config(path))
        assert isinstance(error, CorruptError), at
        assert found == TEXTS[: len(found)]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "tar.gz"])
def test_wrong_documents_before_one_that_is_broken(tmp_path: pathlib.Path, suffix: str) -> None:
    """The checksum comes far after both, and none of them is given."""
    kind, path, texts = FORMATS[suffix], tmp_path / f"data.{suffix}", [f"document {n:04}" for n in range(900)]
    right = jsonl([text + " " * 900 for text in texts]) if "jsonl" in suffix else shard(texts)
    wrong = right.replace(b"document 0010", b"doCument 0010").replace(b'"document 0020', b"xdocument 0020")
    path.write_bytes(gzip.compress(wrong, 0)[:-8] + gzip.compress(right, 0)[-8:])
    found, error = read(kind.config(path))
    assert isinstance(error, CorruptError)
    assert (found, error.row) == ([], 0)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_members_of_one_name_in_a_zip_archive(tmp_path: pathlib.Path) -> None:
    """As an appended archive has them. Each is read once."""
    path = tmp_path / "data.jsonl.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.jsonl", jsonl(TEXTS[:5]))
        archive.writestr("a.jsonl", jsonl(TEXTS[5:9]))
    assert read(FORMATS["jsonl.zip"].config(path)) == (TEXTS[:9], None)
