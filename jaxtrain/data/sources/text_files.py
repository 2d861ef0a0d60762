"""Local text files; by default the source files of Python's standard library.

The default needs no network and exists wherever Python does: a few hundred documents of prose and code, enough for a
quickstart to learn from.
"""

import dataclasses
import hashlib
import itertools
import os
import pathlib
import platform
import sysconfig
from collections.abc import Iterator, Sequence

from jaxtrain.data.io import retry
from jaxtrain.data.io.compression import format_of
from jaxtrain.data.io.locations import expand
from jaxtrain.data.io.names import NAMING, named
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Block, Json, Transform, versioned

_BLOCK_ROWS = 512
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "__pycache__"}


@dataclasses.dataclass(kw_only=True)
class TextFiles:
    """Local text files. Each file, or each line, is one document.

    Attributes:
        patterns: paths or patterns (`*`, `?`, `**`). () for the standard library's `*.py` files, without its tests.
        document: "file" (one document per file) or "line" (one per line, without the line end).
        encoding: of all files. A file or line that cannot be decoded keeps its row, with text "".
        max_samples: read only the first N documents, in file order. None for all.
        transforms: functions on one document, applied in order.
    """

    patterns: tuple[str, ...] = ()
    document: str = "file"
    encoding: str = "utf-8"
    max_samples: int | None = None
    transforms: tuple[Transform, ...] = ()

    def check(self) -> None:
        if self.document not in ("file", "line"):
            raise UserError(f"document={self.document!r} must be 'file' or 'line'.")
        if self.max_samples is not None and self.max_samples < 1:
            raise UserError(f"max_samples={self.max_samples} must be at least 1.")
        if any("://" in pattern for pattern in self.patterns):
            raise UserError("patterns are local paths. For URLs use HuggingFace(name='text', data_files=...).")
        try:
            newline = "\n".encode(self.encoding)
        except LookupError:
            raise UserError(f"encoding={self.encoding!r} is unknown to Python.") from None
        if self.document == "line" and not newline.endswith(b"\n"):
            raise UserError(f"encoding={self.encoding!r} cannot be split into lines; convert the files to utf-8.")
        columns = sorted({name for transform in self.transforms for name in transform.columns} - {"text"})
        if columns:
            raise UserError(f"transforms read the columns {', '.join(columns)}, but text files have only text.")

    def resolve(self, identity: Json | None = None) -> "TextFilesSource":
        """Lists the files, and compares them with a checkpoint's.

        Args:
            identity: the source's identity in a checkpoint; None for a new run.

        Raises:
            UserError: no file matches, or the files differ from the checkpoint's.
        """
        root = pathlib.Path(sysconfig.get_paths()["stdlib"])
        naming = NAMING if identity is None else versioned(identity)["naming"]
        if self.patterns:
            paths = named(expand(self.patterns), naming)
        else:
            paths = {name: str(root / name) for name in _standard_library(root)}
        now = {
            "kind": "text_files",
            "naming": naming,
            "document": self.document,
            "encoding": self.encoding,
            "python": None if self.patterns else platform.python_version(),
            "files": list(paths),
            "digest": _digest(paths),
        }
        if identity is not None and versioned(identity) != versioned(now):
            raise UserError(_difference(identity, now))
        return TextFilesSource(now, list(paths.values()))


class TextFilesSource:
    """A resolved `TextFiles`. Implements interfaces.Source. Thread-safe."""

    def __init__(self, identity: Json, paths: Sequence[str]):
        self.identity = versioned(identity)
        self.files: list[str] = identity["files"]
        self.random_access: bool = identity["document"] == "file"
        self.paths = paths

    def row_groups(self, file: int) -> list[int]:
        """A file is one row."""
        assert self.random_access
        return [1]

    def open(self, file: int, row: int, stop: int | None = None) -> Iterator[Block]:
        with retry.classified(self.paths[file]), open(self.paths[file], "rb") as lines:
            if (kind := format_of(lines.peek(16))) is not None:
                raise UserError(
                    f"{self.paths[file]} is compressed ({kind}), and TextFiles reads plain files. Decompress it, "
                    "or read its lines with HuggingFace(name='text', data_files=...)."
                )
            if self.random_access:
                if row == 0:
                    yield {"text": [self._decode(lines.read())]}
                return
            rest = itertools.islice(lines, row, None)
            while some := list(itertools.islice(rest, _BLOCK_ROWS)):
                yield {"text": [self._decode(line.removesuffix(b"\n").removesuffix(b"\r")) for line in some]}

    def _decode(self, data: bytes) -> str:
        try:
            return data.decode(self.identity["encoding"])
        except UnicodeDecodeError:
            return ""


def _standard_library(root: pathlib.Path) -> list[str]:
    """The standard library's `*.py` files as POSIX paths relative to `root`."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _SKIPPED]
        relative = pathlib.Path(folder).relative_to(root)
        found += [(relative / name).as_posix() for name in files if name.endswith(".py")]
    if not found:
        raise UserError(f"this Python has no library sources in {root}. Give the files to train on in patterns.")
    return sorted(found)


def _digest(paths: dict[str, str]) -> str:
    """A digest of names and sizes. It detects changed, added and removed files without reading them."""
    digest = hashlib.blake2b(digest_size=16)
    for name, path in paths.items():
        digest.update(f"{name}\0{os.path.getsize(path)}\n".encode())
    return digest.hexdigest()


def _difference(old: Json, new: Json) -> str:
    """Describes which files differ from the checkpoint's, for an error message."""
    for key in ("kind", "document", "encoding", "python"):
        if old.get(key) != new[key]:
            what = "the standard library of Python" if key == "python" else key
            return f"text files: the checkpoint was trained on {what} {old.get(key)}, the config has {new[key]}."
    added, removed = (sorted(set(a) - set(b)) for a, b in ((new["files"], old["files"]), (old["files"], new["files"])))
    if added or removed:
        return f"text files: {len(added)} added {added[:3]}, {len(removed)} removed {removed[:3]} since the checkpoint."
    return "text files: files have changed since the checkpoint. Restore them, or start a new run in another --workdir."
