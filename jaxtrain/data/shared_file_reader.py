"""One reader per file and host, whose windows feed all lanes of the host: for sources with few units.

A reader only moves forward. It keeps windows that other lanes of this host still need, and spills them to an unnamed
temporary file in `scratch` above a memory limit. What a lane reads never depends on what is kept: a window that is
neither kept nor ahead is read again.
"""

import contextlib
import dataclasses
import math
import os
import pickle
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import IO

from jaxtrain.data.token_arrays import TokenArrays
from jaxtrain.data.units import interleave_step
from jaxtrain.interfaces import Block

_IN_MEMORY_BYTES = 64 << 20  # of text or tokens kept for each open file
_OPEN_FILES = 4  # lanes near a file's end still read it while others are in the next files

File = tuple[int, int]  # (epoch, position in the epoch's order)


@dataclasses.dataclass(frozen=True)
class Want:
    """A lane's position: it needs `window` of `file` next, and is done with all earlier files."""

    file: File
    window: int


class SharedFileReader:
    """The windows of a source's files for the lanes of this host. Thread-safe.

    Args:
        open_at: (file number, row) → blocks from there on.
        size: Rows per window.
        lanes: The number of lanes of the run.
        scratch: Folder for spilled windows; None for the system's.
    """

    def __init__(
        self, open_at: Callable[[int, int], Iterator[Block]], size: int, lanes: int, scratch: str | None = None
    ):
        self.open_at, self.size, self.scratch = open_at, size, scratch
        self._lanes, self._step = lanes, interleave_step(lanes)
        self._wants: dict[int, Want] = {}
        self._readers: dict[File, _Reader] = {}
        # By file number, once known. Most lanes have no window in a file of fewer than `lanes` windows, and would open
        # it only to find that out.
        self._rows: dict[int, int] = {}
        # Re-entrant, as the readers' are: the collector may call `close` in a thread that holds it.
        self._lock = threading.RLock()

    def first_window(self, lane: int, position: int) -> int:
        """The lane's first window of the `position`-th file of an epoch; later ones are `lanes` apart."""
        return (lane - position * self._step) % self._lanes

    def register(self, wants: Mapping[int, Want]) -> None:
        """Announces the lanes that will read and where each starts. Call it before reading: it decides what is kept."""
        with self._lock:
            self._wants = dict(wants)

    def get(self, file: File, number: int, lane: int, window: int) -> Block | None:
        """Returns one of the lane's windows; None past the file's end. number: the file's number in the listing."""
        block = None
        if window * self.size < self._rows.get(number, math.inf):
            reader = self._reader(file, number)
            block = reader.get(window)
            self._learn(number, reader)
        with self._lock:
            if lane in self._wants:
                self._wants[lane] = Want(file, window + self._lanes)
        return block

    def rows(self, file: File, number: int, limit: int) -> int:
        """The number of the file's rows, at most `limit`."""
        if number in self._rows:
            return min(self._rows[number], limit)
        reader = self._reader(file, number)
        rows = reader.count(limit)
        self._learn(number, reader)
        return rows

    def close(self) -> None:
        """Drops all windows and keeps no more. A lane that continues to read opens its file again."""
        with self._lock:
            self._wants = {}
            readers = list(self._readers.values())
            self._readers.clear()
        for reader in readers:
            reader.close()

    def _learn(self, number: int, reader: "_Reader") -> None:
        if reader.rows is not None:
            self._rows[number] = reader.rows

    def _reader(self, file: File, number: int) -> "_Reader":
        evicted = []
        with self._lock:
            reader = self._readers.pop(file, None)
            if reader is None:
                reader = _Reader(self, file, number)
                while len(self._readers) >= _OPEN_FILES:
                    evicted.append(self._readers.pop(next(iter(self._readers))))
            self._readers[file] = reader
        for other in evicted:
            other.close()
        return reader

    def is_wanted(self, file: File, window: int) -> bool:
        """Whether a lane of this host still needs the window."""
        return self.wanted(file).get((window + file[1] * self._step) % self._lanes, math.inf) <= window

    def wanted(self, file: File) -> dict[int, int]:
        """The first window of the file that each lane still needs; lanes that are past the file need none."""
        with self._lock:
            return {
                lane: want.window if want.file == file else self.first_window(lane, file[1])
                for lane, want in self._wants.items()
                if want.file <= file
            }


class _Reader:
    """Reads a file forward in windows, and keeps the windows that a lane still needs."""

    def __init__(self, shared: SharedFileReader, file: File, number: int):
        self.rows: int | None = None  # the file's, once its end has been seen
        self._shared, self._file, self._number, self._size = shared, file, number, shared.size
        self._windows: Iterator[Block] | None = None
        self._next = 0  # the window that `_windows` yields next
        self._reached = 0  # a lower bound of the file's rows
        self._kept: dict[int, Block | tuple[int, int]] = {}  # in memory, or (offset, bytes) in the spill
        self._bytes = 0  # in memory
        self._spill: IO[bytes] | None = None
        self._closed = False  # a thread may still read from it, but finds nothing kept
        self._lock = threading.RLock()

    def get(self, window: int) -> Block | None:
        with self._reading():
            if window in self._kept:
                return self._take(window)
            if self.rows is not None and window * self._size >= self.rows:
                return None
            if self._windows is None or window < self._next:
                wanted = self._shared.wanted(self._file).values()
                self._start(min([window, *(first for first in wanted if first not in self._kept)]))
            while True:
                block = self._advance()
                if block is None or self._next == window + 1:
                    return block
                self._keep(self._next - 1, block)

    def count(self, limit: int) -> int:
        """The number of the file's rows, at most `limit`."""
        with self._reading():
            if self._windows is None or self._next * self._size > self._reached:
                self._start(self._reached // self._size)
            while self.rows is None and self._reached < limit:
                block = self._advance()
                if block is not None:
                    self._keep(self._next - 1, block)
            return limit if self.rows is None else min(self.rows, limit)

    def close(self) -> None:
        """Does not wait for a thread that reads: it may be in an outage, or never run again at exit. It will clear."""
        self._closed = True
        if self._lock.acquire(blocking=False):
            try:
                self._clear()
            finally:
                self._lock.release()

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock:
            try:
                yield
            finally:
                if self._closed:
                    self._clear()

    def _clear(self) -> None:
        self._windows = None
        self._kept.clear()
        if self._spill is not None:
            self._spill.close()
            self._spill = None

    def _start(self, window: int) -> None:
        self._windows = regroup(self._shared.open_at(self._number, window * self._size), self._size)
        self._next = window

    def _advance(self) -> Block | None:
        if self._windows is None:
            self._start(self._next)
        assert self._windows is not None
        try:
            block = next(self._windows, None)
        except BaseException:
            self._windows = None  # a generator that has raised looks exhausted
            raise
        count = 0 if block is None else len(block["text"])
        begin = self._next * self._size
        # A read that starts past the end does not show where the end is.
        if block is not None or begin <= self._reached:
            self._reached = max(self._reached, begin + count)
            if count < self._size:
                self.rows = self._reached
        self._next += block is not None
        return block

    def _keep(self, window: int, block: Block) -> None:
        if self._closed or window in self._kept or not self._shared.is_wanted(self._file, window):
            return
        size = _size(block)
        if self._bytes + size <= _IN_MEMORY_BYTES:
            self._kept[window] = block
            self._bytes += size
            return
        if self._spill is None:
            folder = self._shared.scratch
            self._spill = tempfile.TemporaryFile(prefix="windows-", dir=folder)  # noqa: SIM115 - see `close`
        data = pickle.dumps(block)
        self._kept[window] = (self._spill.seek(0, os.SEEK_END), len(data))
        self._spill.write(data)

    def _take(self, window: int) -> Block:
        kept = self._kept.pop(window)
        if isinstance(kept, dict):
            self._bytes -= _size(kept)
            return kept
        assert self._spill is not None
        self._spill.seek(kept[0])
        block = pickle.loads(self._spill.read(kept[1]))  # written above: no other process can open the file
        if all(isinstance(other, dict) for other in self._kept.values()):
            self._spill.truncate(0)
        return block


def _size(block: Block) -> int:
    texts = block["text"]
    return texts.nbytes if isinstance(texts, TokenArrays) else sum(map(len, texts))


def regroup(blocks: Iterator[Block], size: int, limit: int | None = None) -> Iterator[Block]:
    """The same rows in blocks of `size` (the last may be shorter), to the end or for `limit` rows."""
    held: Block = {}
    for block in blocks:
        count = len(block["text"])
        if limit is not None:
            block, limit = (head(block, limit) if count > limit else block), limit - min(count, limit)
        held = {name: held[name] + values for name, values in block.items()} if held else dict(block)
        if len(held["text"]) >= size:
            whole = len(held["text"]) // size * size
            for first in range(0, whole, size):
                yield {name: values[first : first + size] for name, values in held.items()}
            held = {name: values[whole:] for name, values in held.items()}
        if limit == 0:
            break
    if held and held["text"]:
        yield held


def head(block: Block, count: int) -> Block:
    """The first `count` rows."""
    return {name: values[:count] for name, values in block.items()}
