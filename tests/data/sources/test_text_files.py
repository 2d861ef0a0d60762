"""Local text files: every row against a naive read, and the identity of a set of files."""

import json
import pathlib
import platform
import sysconfig

import pytest

from jaxtrain.data.sources.text_files import TextFiles
from jaxtrain.errors import UserError
from tests.data.sources.reading import texts

FILES = {
    "a.txt": "one\ntwo\n\nfour é🜁\n".encode(),
    "b/c.txt": b"no end of line",
    "b/empty.txt": b"",
    "latin.txt": "first\nété\nthird\n".encode("latin-1"),
    "windows.txt": b"one\r\ntwo\r\n",
}


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    (tmp_path / "b").mkdir()
    for name, data in FILES.items():
        (tmp_path / name).write_bytes(data)
    return tmp_path


def test_a_file_is_a_document(folder):
    source = TextFiles(patterns=(f"{folder}/**/*.txt",)).resolve()
    assert source.files == [f"{folder}/{name}" for name in sorted(FILES)]
    assert source.random_access
    for file, name in enumerate(sorted(FILES)):
        wanted = "" if name == "latin.txt" else FILES[name].decode()
        assert source.row_groups(file) == [1]
        assert texts(source.open(file, 0)) == [wanted]
        assert texts(source.open(file, 1)) == []
    latin = TextFiles(patterns=(f"{folder}/latin.txt",), encoding="latin-1").resolve()
    assert texts(latin.open(0, 0)) == ["first\nété\nthird\n"]


def test_a_line_is_a_document(folder):
    source = TextFiles(patterns=(f"{folder}/**/*.txt",), document="line").resolve()
    assert not source.random_access
    wanted = {
        "a.txt": ["one", "two", "", "four é🜁"],
        "b/c.txt": ["no end of line"],
        "b/empty.txt": [],
        "latin.txt": ["first", "", "third"],  # a row that cannot be decoded is kept
        "windows.txt": ["one", "two"],
    }
    for file, name in enumerate(sorted(FILES)):
        for row in range(6):
            assert texts(source.open(file, row)) == wanted[name][row:], (name, row)


def test_many_lines_from_any_row(tmp_path):
    lines = [f"line {i} \x0b \x85   " * (i % 4) for i in range(2000)]
    (tmp_path / "a.txt").write_text("".join(line + "\n" for line in lines))
    source = TextFiles(patterns=(f"{tmp_path}/a.txt",), document="line").resolve()
    for row in (0, 1, 511, 512, 513, 1024, 1999, 2000):
        assert texts(source.open(0, row)) == lines[row:]


def test_the_default_is_the_standard_library():
    source = TextFiles().resolve()
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    assert {"abc.py", "argparse.py", "json/decoder.py", "asyncio/tasks.py"} <= set(source.files)
    assert source.files == sorted(source.files)
    skipped = ("test", "tests", "site-packages", "idlelib", "lib2to3", "__pycache__")
    assert not [name for name in source.files if set(name.split("/")) & set(skipped)]
    assert len(source.files) > 300
    assert source.identity["python"] == platform.python_version()
    assert str(root) not in json.dumps(source.identity)
    file = source.files.index("json/decoder.py")
    assert texts(source.open(file, 0)) == [(root / "json/decoder.py").read_text(encoding="utf-8")]
    assert sum(len(text) for i in range(len(source.files)) for text in texts(source.open(i, 0))) > 5e6


def test_identity(folder):
    config = TextFiles(patterns=(f"{folder}/**/*.txt",))
    identity = json.loads(json.dumps(config.resolve().identity))
    assert config.resolve(identity).identity == identity
    (folder / "a.txt").write_text("longer than it was before")
    with pytest.raises(UserError, match="files have changed since the checkpoint"):
        config.resolve(identity)
    (folder / "new.txt").write_text("x")
    (folder / "b/c.txt").unlink()
    with pytest.raises(UserError, match=r"1 added .*new\.txt.*, 1 removed .*c\.txt"):
        config.resolve(identity)
    with pytest.raises(UserError, match="trained on document file, the config has line"):
        TextFiles(patterns=config.patterns, document="line").resolve(identity)
    of_python = TextFiles().resolve().identity
    with pytest.raises(UserError, match=r"trained on the standard library of Python 3\.8\.1, the config has 3\.1"):
        TextFiles().resolve({**of_python, "python": "3.8.1"})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"document": "word"}, "must be 'file' or 'line'"),
        ({"encoding": "utf-9"}, "is unknown to Python"),
        ({"encoding": "utf-16", "document": "line"}, "cannot be split into lines"),
        ({"patterns": ("https://example.org/a.txt",)}, "HuggingFace"),
        ({"max_samples": 0}, "max_samples=0"),
    ],
)
def test_check(fields, message):
    TextFiles().check()
    with pytest.raises(UserError, match=message):
        TextFiles(**fields).check()


def test_no_files(tmp_path):
    with pytest.raises(UserError, match="no file matches"):
        TextFiles(patterns=(f"{tmp_path}/*.txt",)).resolve()


def test_a_file_that_went_away(folder):
    source = TextFiles(patterns=(f"{folder}/a.txt",)).resolve()
    (folder / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt: there is no such file"):
        next(source.open(0, 0))
