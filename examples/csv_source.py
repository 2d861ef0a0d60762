"""A source in one file: a column of CSV files in a folder.

python -m jaxtrain.main --config=examples/csv_source.py:FOLDER
"""

import csv
import dataclasses
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path

from configs import quickstart
from jaxtrain.config import Config
from jaxtrain.errors import CorruptError, UserError
from jaxtrain.interfaces import Block, Json, Transform

ROWS = 256  # of a block


@dataclasses.dataclass(kw_only=True)
class CSVFiles:
    """The rows of a folder's *.csv files, one document each.

    Attributes:
        folder: Where the files are.
        column: The column that holds the text.
        max_samples: Maximum documents to read per epoch; None for all.
        transforms: Applied to each document in order.
    """

    folder: str
    column: str = "text"
    max_samples: int | None = None
    transforms: tuple[Transform, ...] = ()

    def resolve(self, identity: Json | None = None) -> "Resolved":
        names = sorted(path.name for path in Path(self.folder).glob("*.csv"))
        if not names:
            raise UserError(f"folder={self.folder}: there is no *.csv in it")
        sizes = [Path(self.folder, name).stat().st_size for name in names]
        digest = hashlib.sha256(repr((self.column, names, sizes)).encode()).hexdigest()[:16]
        found = Resolved(self.folder, self.column, names, {"kind": "csv", "files": digest})
        if identity is not None and identity["files"] != digest:
            raise UserError(f"folder={self.folder}: its files have changed since the checkpoint; restore them")
        return found


@dataclasses.dataclass
class Resolved:
    """Implements interfaces.Source. Thread-safe: it keeps no open file."""

    folder: str
    column: str
    files: Sequence[str]
    identity: Json
    random_access: bool = False  # reaching a row requires reading all rows before it

    def row_groups(self, file: int) -> list[int]:
        raise NotImplementedError("only random-access files have row groups")

    def open(self, file: int, row: int, stop: int | None = None) -> Iterator[Block]:
        with open(Path(self.folder, self.files[file]), newline="", encoding="utf-8") as lines:
            rows = itertools.islice(csv.DictReader(lines), row, stop)
            for begin in itertools.count(row, ROWS):
                texts = [one.get(self.column) for one in itertools.islice(rows, ROWS)]
                if not texts:
                    return
                if None in texts:
                    bad = begin + texts.index(None)
                    raise CorruptError(f"row {bad} has no column {self.column!r}", self.files[file], bad)
                yield {"text": texts}


def get_config(arg: str = "data") -> Config:
    config = quickstart.get_config()
    return dataclasses.replace(config, data=dataclasses.replace(config.data, sources={"csv": CSVFiles(folder=arg)}))
