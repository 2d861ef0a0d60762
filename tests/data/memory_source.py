"""A source in memory, with faults on demand, and a tokenizer with made-up ids, for tests of the data path."""

import dataclasses
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from jaxtrain.errors import TransientError, UserError
from jaxtrain.interfaces import Block, Json


@dataclasses.dataclass(kw_only=True)
class MemorySource:
    """Both config and source. Files are lists of texts, cut into row groups, read in blocks of varying sizes.

    groups: Rows of each row group of each file; by default groups of 7 rows. fault: Called with (file, row) before
    every block; raises the fault to inject. rows_read, opened: What was read, for tests of costs.
    """

    rows: list[list[str]]
    groups: list[list[int]] | None = None
    random_access: bool = True
    block: int = 5
    max_samples: int | None = None
    transforms: tuple[Any, ...] = ()
    fault: Callable[[int, int], None] | None = None
    name: str = "file"

    def resolve(self, identity: Json | None = None) -> "MemorySource":
        if identity not in (None, self.identity):
            raise UserError(f"{identity} is gone")
        return self

    @property
    def identity(self) -> Json:
        return {"kind": "memory", "files": list(self.files)}

    @property
    def files(self) -> list[str]:
        return [f"{self.name}-{index}" for index in range(len(self.rows))]

    def row_groups(self, file: int) -> list[int]:
        assert self.random_access
        if self.groups is not None:
            return self.groups[file]
        count = len(self.rows[file])
        return [min(7, count - first) for first in range(0, count, 7)]

    def open(self, file: int, row: int, stop: int | None = None) -> Iterator[Block]:
        with _lock:
            self.opened = [*self.opened, (file, row)]
        sizes = random.Random(f"{file} {row}")
        rows = self.rows[file]
        while row < len(rows):
            if self.fault is not None:
                self.fault(file, row)
            size = sizes.randint(1, self.block)
            block = rows[row : row + size]
            with _lock:
                self.rows_read += len(block)
            yield {"text": block, "number": list(range(row, row + len(block)))}
            row += len(block)
        if self.fault is not None:
            self.fault(file, row)

    def __post_init__(self) -> None:
        self.opened: list[tuple[int, int]] = []
        self.rows_read = 0


_lock = threading.Lock()


class Flaky:
    """A random transient fault, raised `times` times in all."""

    def __init__(self, seed: int, chance: float, times: int):
        self._random, self._chance, self.left = random.Random(seed), chance, times
        self._lock = threading.Lock()

    def __call__(self, file: int, row: int) -> None:
        with self._lock:
            if self.left and self._random.random() < self._chance:
                self.left -= 1
                raise TransientError(f"file {file}: reset at row {row}")


class Fatal:
    """A file that is missing from a row on."""

    def __init__(self, file: int, row: int):
        self._at = (file, row)

    def __call__(self, file: int, row: int) -> None:
        if file == self._at[0] and row >= self._at[1]:
            raise UserError("the file is gone")


class WordTokenizer:
    """Documents are numbers as words ("17 3 99"); the ids are these numbers plus 2."""

    vocab_size = 1 << 20
    eos_id = 1
    bos_id: int | None = 0
    token_bytes = np.ones(0, np.int32)
    identity: Json = {"kind": "words"}  # noqa: RUF012 - a constant of a test

    def encode_batch(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        ids = [[int(word) + 2 for word in text.split()] for text in texts]
        flat = np.array([token for document in ids for token in document], np.int32)
        return flat, np.array([len(document) for document in ids], np.int64)

    def decode(self, ids: Sequence[int]) -> str:
        return " ".join(str(token - 2) for token in ids)


def documents(count: int, seed: int, longest: int = 9, empty: float = 0.1) -> list[str]:
    """Texts for `WordTokenizer`: random words; some documents are empty, some only spaces (texts without a token)."""
    rng = random.Random(seed)
    found = []
    for _ in range(count):
        kind = rng.random()
        words = [str(rng.randrange(1000)) for _ in range(rng.randint(1, longest))]
        found.append("" if kind < empty else "  " if kind < 1.5 * empty else " ".join(words))
    return found
