"""From addresses to text: the windows of one lane's share of a source, shuffled, filtered, in order, from any cursor.

A window is `SourceReader.window` consecutive rows of a unit (the last one of a unit may be shorter); its rows are
permuted by a key, so nothing about the shuffle needs to be saved.
"""

import contextlib
import dataclasses
import difflib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxtrain import cli
from jaxtrain.data import units
from jaxtrain.data.forgotten import Rows
from jaxtrain.data.io import retry
from jaxtrain.data.shared_file_reader import SharedFileReader, Want, head, regroup
from jaxtrain.data.skipped_files import FOOTER
from jaxtrain.data.token_arrays import TokenArrays
from jaxtrain.errors import CorruptError, UserError
from jaxtrain.interfaces import Block, Json, Source, SourceConfig, Transform, versioned
from jaxtrain.plan import stable_hash

_FOOTER_READERS = 32
_WINDOW = 512  # rows, unless the source is small
_COUNTED_BYTES = 32_000_000  # files that are read once to count their rows: about a second


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """What decides, besides the source, which documents are read in which order. Part of the identity.

    shuffle_window: None lets the reader choose, see SourceReader.window.
    held_out: Read the held-out documents (evaluation) instead of the others (training).
    """

    seed: int
    num_lanes: int
    shuffle: bool
    shuffle_window: int | None
    holdout: float
    held_out: bool = False


@dataclasses.dataclass(frozen=True, order=True)
class Position:
    """Where a document is: the `unit`-th of the lane's units in this epoch, the `row`-th row in the shuffled order.

    base: Rows of the files before this one (counted only if `max_samples` limits shared files).
    """

    epoch: int
    unit: int
    row: int
    base: int = 0


@dataclasses.dataclass(frozen=True)
class Window:
    """Documents of one window in reading order; `rows` also counts those that were filtered out.

    texts: [N]; empty for a token store, whose `tokens` are the whole window's ids in the file's order.
    positions, file_rows: The cursor's row and the row in the file, int64 [N].
    """

    start: Position
    file: int
    rows: int
    texts: Sequence[str]
    positions: np.ndarray
    file_rows: np.ndarray
    tokens: TokenArrays | None = None
    first: int = 0  # the window's first row in the file


class SourceReader:
    """One source as the lanes of this host read it: partitioned into units, shuffled, filtered, window by window.

    Thread-safe. `register` all lanes, then iterate over `windows(lane, start, epochs)` of each.

    Attributes:
        window: Rows that are permuted together.
        forgets_from: The steps from which documents are forgotten.
        most_rows: Rows of an epoch at most, with those that filters drop; None if only reading shows.
    """

    def __init__(
        self,
        name: str,
        config: SourceConfig,
        source: Source,
        options: ReadOptions,
        *,
        retry_seconds: float,
        skipped: Mapping[str, int] | None = None,
        forgotten: Mapping[str, Mapping[int, int]] | None = None,
        scratch: str | None = None,
    ):
        """Partitions the source, which may read footers.

        Args:
            retry_seconds: How long an outage may last.
            skipped: File → the first row to skip, see skipped_files.py.
            forgotten: File → row → the first step without it, see forgotten.py.
            scratch: See SharedFileReader.

        Raises:
            UserError: The source has no rows, or all of its rows are skipped, or it lacks a file of `forgotten`.
            CorruptError, TransientError: A footer cannot be read.
        """
        self.name = name
        self.source = source
        self.options = options
        self.skipped = dict(skipped or {})
        self._forgotten = {file: Rows(steps) for file, steps in (forgotten or {}).items()}
        self.forgets_from = frozenset(step for steps in (forgotten or {}).values() for step in steps.values())
        unknown = self._forgotten.keys() - set(source.files)
        if unknown:
            near = difflib.get_close_matches(min(unknown), source.files) or source.files[:3]
            raise UserError(
                f"source {name!r}: a document of {min(unknown)} is to be forgotten, and there is no such file; did you "
                f"mean {' or '.join(near)}?"
            )
        self._max_samples = config.max_samples
        self._transforms = config.transforms
        self._retry_seconds = retry_seconds
        self.partition = units.partition(source, options.num_lanes, config.max_samples, self._row_groups)
        if not self.partition.units:
            raise UserError(f"source {name!r} has no rows. Check its name, split and files.")
        if all(self._end(unit.file) <= unit.first for unit in self.partition.units):
            raise UserError(f"source {name!r}: all of its rows are in corrupt files that are skipped.")
        self._chooses_window = options.shuffle_window is None
        counts = self._counts() if self._chooses_window else [unit.rows for unit in self.partition.units]
        self._row_counts: list[int | None] = counts
        total = None if None in counts else sum(count or 0 for count in counts)
        limit = self.partition.limit
        self.most_rows = limit if total is None else total if limit is None else min(total, limit)
        self.window = options.shuffle_window or self._choose_window(self.partition, counts, options.num_lanes)
        self._shared: SharedFileReader | None = None
        if self.partition.shared:
            self._shared = SharedFileReader(self._open, self.window, options.num_lanes, scratch)

    @property
    def identity(self) -> Json:
        """What must not change for a resume to read the same documents in the same order."""
        transforms = [describe(transform) for transform in self._transforms]
        return {
            "source": versioned(self.source.identity),
            "units": units.RULE,
            "max_samples": self._max_samples,
            "transforms": transforms,
            "skips": self.skipped,
            **({"shuffle_window": self.window} if self._chooses_window else {}),
        }

    @property
    def summary(self) -> str:
        """For the log."""
        cut = (
            "shared by all lanes"
            if self.partition.shared
            else f"{len(self.partition.units):,} units divided among the lanes"
        )
        if self._chooses_window and self.window != _WINDOW:
            cut += f" in windows of {self.window} rows"
        return f"{self.name}: {len(self.source.files):,} files, {cut}"

    @property
    def rows(self) -> int | None:
        """Rows per epoch, including those that filters drop; None if it is known only by reading."""
        counts = [unit.rows for unit in self.partition.units]
        return None if None in counts else sum(count for count in counts if count is not None)

    def register(self, starts: Mapping[int, Position]) -> None:
        """Announces the lanes that will read and where each starts. Call it before any of them reads."""
        if self._shared is not None:
            self._shared.register({lane: self._want(lane, start) for lane, start in starts.items()})

    def close(self) -> None:
        """Frees what is kept for lanes. Further reads open the files again."""
        if self._shared is not None:
            self._shared.close()

    def _want(self, lane: int, start: Position) -> Want:
        assert self._shared is not None
        # A cursor is in one of the lane's own windows, or at a unit's start, before the lane's first window.
        window = self._own_window(lane, start.unit, start.row // self.window)
        return Want((start.epoch, start.unit), window)

    def _own_window(self, lane: int, unit: int, window: int) -> int:
        """The lane's first window of a shared file from number `window` on."""
        assert self._shared is not None
        first, lanes = self._shared.first_window(lane, unit), self.options.num_lanes
        return first + -(-max(window - first, 0) // lanes) * lanes

    def windows(self, lane: int, start: Position, epochs: int | None, step: int = 0) -> Iterator[Window]:
        """The lane's windows from the one that holds `start` on, epoch after epoch; without an end if `epochs` is None.

        Documents that are forgotten from `step` or an earlier step on are left out, as if a filter dropped them.

        Raises UserError if the lane has no document in the first epoch. For held-out documents, which may be so few, it
        ends instead. A later epoch without any may be chance (another shuffle): the lane continues with the next.
        """
        while epochs is None or start.epoch < epochs:
            first, anything = start == Position(0, 0, 0), False
            for window in self._epoch(lane, start):
                window = self._without_forgotten(window, step)
                anything |= len(window.positions) > 0
                yield window
            if first and not anything:
                # Texts without a token count here, since the tokenizer comes later: see tokenizing.documents_of.
                self.refuse(lane)
                return
            start = Position(start.epoch + 1, 0, 0)

    def _without_forgotten(self, window: Window, step: int) -> Window:
        rows = self._forgotten.get(self.source.files[window.file])
        if rows is None:
            return window
        kept = np.flatnonzero(rows.steps(window.file_rows) > step)
        texts = [window.texts[index] for index in kept.tolist()] if window.tokens is None else ()
        return dataclasses.replace(
            window, texts=texts, positions=window.positions[kept], file_rows=window.file_rows[kept]
        )

    def forgets(self, after: int, step: int) -> Callable[[np.ndarray, np.ndarray], np.ndarray] | None:
        """A function (files, rows in them) → which are forgotten from a later step than `after`, up to `step`.

        None if no document is.
        """
        if not any(after < first <= step for first in self.forgets_from):
            return None

        def forgets(files: np.ndarray, rows: np.ndarray) -> np.ndarray:
            found = np.zeros(len(files), bool)
            for file in np.unique(files):
                here, forgotten = files == file, self._forgotten.get(self.source.files[int(file)])
                if forgotten is not None:
                    steps = forgotten.steps(rows[here])
                    found[here] = (after < steps) & (steps <= step)
            return found

        return forgets

    def check_lanes(self) -> None:
        """Raises UserError if row counts show that a lane gets no document in the first epoch, without reading any."""
        idle = self._idle_lane(self.partition, self._row_counts, self.options.num_lanes, self.window)
        if idle is not None:
            self.refuse(idle)

    def refuse(self, lane: int) -> None:
        """For a lane without a document in the first epoch: raises UserError, unless it reads held-out documents."""
        if not self.options.held_out:
            raise UserError(self._nothing(lane))

    def _nothing(self, lane: int) -> str:
        options, shared = self.options, self.partition.shared
        shares = f"windows of {self.window} rows" if shared else f"{len(self.partition.units)} units"
        counts: list[int | None] = [unit.rows for unit in self.partition.units]
        if self._shared is not None:
            counts = [self._rows(number, unit) for number, unit in enumerate(self.partition.units)]
        # What transforms drop shows only in reading: give each lane twice as much.
        drops = 2 if self._transforms else 1
        fixes = [f"data.num_lanes={lanes}" for lanes in self._lanes_that_work(counts, drops)]
        if shared and not self._chooses_window:
            smaller = self._choose_window(self.partition, counts, options.num_lanes)
            if smaller < self.window and self._idle_lane(self.partition, counts, options.num_lanes, smaller) is None:
                fixes.append("data.shuffle_window=none")
        fix = f"Set {' or '.join(fixes)}, or use" if fixes else "Use"
        return (
            f"source {self.name!r}: lane {lane} of data.num_lanes={options.num_lanes} gets no document in the first "
            f"epoch ({shares} are divided among the lanes, and filters and holdout={options.holdout} may drop "
            f"documents). {fix} a larger source."
        )

    def _lanes_that_work(self, counts: Sequence[int | None], drops: int) -> list[int]:
        """The most lanes, of those that divide every batch as the present number does, that all get a document."""
        now = self.options.num_lanes
        for lanes in (number for number in range(now - 1, 0, -1) if now % number == 0):
            cut = units.partition(self.source, lanes, self._max_samples, self._row_groups)
            found = counts if cut.shared == self.partition.shared else [unit.rows for unit in cut.units]
            window = self._choose_window(cut, found, lanes) if self._chooses_window else self.window
            if self._idle_lane(cut, found, lanes, window) is None:
                return [max(lanes // drops, 1)]
        return []

    def _counts(self) -> list[int | None]:
        """Rows of each unit. Small shared files without footers are counted by reading them; None for others.

        What is small follows from the identity, which token stores have too: every mode counts the same.
        """
        cut, stamps = self.partition, self.source.identity.get("stamps", {})
        sizes = [stamps.get(name, {}).get("size", math.inf) for name in self.source.files]
        if cut.shared and cut.units[0].rows is None and sum(sizes) <= _COUNTED_BYTES:
            with contextlib.suppress(CorruptError):
                return [self._count(unit.file) for unit in cut.units]
        return [unit.rows for unit in cut.units]

    def _count(self, file: int) -> int:
        """Rows of a whole file, also of what is skipped: a window that is chosen by them never changes."""
        open_at = functools.partial(self.source.open, file)
        blocks = retry.retrying(open_at, 0, what=self._what(file), deadline=self._retry_seconds)
        return sum(len(block["text"]) for block in blocks)

    def _choose_window(self, cut: units.Partition, counts: Sequence[int | None], num_lanes: int) -> int:
        """_WINDOW rows; of a source too small for that, a quarter of a lane's share of the rows.

        Version 0.1 always took _WINDOW: what ran there is read in the same order.
        """
        rows = cut.limit if None in counts else sum(count or 0 for count in counts)
        if not cut.shared or rows is None:
            return _WINDOW
        rows = min(rows, cut.limit or rows)
        if None in counts:
            # At most max_samples rows: too few for any cut into that many files?
            is_small = len(cut.units) + rows // _WINDOW < num_lanes
        else:
            is_small = self._idle_lane(cut, counts, num_lanes, _WINDOW) is not None
        return 1 << max(rows // (4 * num_lanes), 1).bit_length() - 1 if is_small else _WINDOW

    def _idle_lane(self, cut: units.Partition, counts: Sequence[int | None], num_lanes: int, window: int) -> int | None:
        """See units.idle_lane; in the first epoch, without skips, which may come to a run that has long begun."""
        options = self.options

        def keeps(unit: int, row: int, count: int) -> bool:
            name = self.source.files[cut.units[unit].file]
            first = cut.units[unit].first + row
            for start in range(first, first + count, _WINDOW):
                rows = np.arange(start, min(start + _WINDOW, first + count))
                if not (options.holdout and stable_hash.is_held_out(self.name, name, rows, options.holdout).all()):
                    return True
            return False

        shuffle = options.shuffle and cut.limit is None
        order = _cached_order(len(cut.units), options.seed, self.name, 0, shuffle)
        return units.idle_lane(cut, counts, order.tolist(), num_lanes, window, keeps)

    def _rows(self, number: int, unit: units.Unit) -> int:
        """Rows of a shared file, counted up to one window per lane."""
        assert self._shared is not None
        enough = self.options.num_lanes * self.window
        return unit.rows if unit.rows is not None else self._shared.rows((0, number), unit.file, enough)

    def _epoch(self, lane: int, start: Position) -> Iterator[Window]:
        """The lane's windows of epoch `start.epoch` from the one that holds `start`, to the epoch's end."""
        # The first max_samples rows are the same in every epoch only if files come in the order of the listing.
        shuffle = self.options.shuffle and self.partition.limit is None
        order = _cached_order(len(self.partition.units), self.options.seed, self.name, start.epoch, shuffle)
        if self._shared is None:
            order = units.share(order, lane, self.options.num_lanes)
        base, size = start.base, self.window
        for position in range(start.unit, len(order)):
            unit = self.partition.units[order[position]]
            first = start.row // size if position == start.unit else 0
            if self._shared is None:
                windows = self._unit_windows(unit, first)
            else:
                windows = self._shared_windows(lane, (start.epoch, position), unit, first, base)
            for window, block in windows:
                yield self._window(Position(start.epoch, position, window * size, base), unit, block)
            if self._shared is not None and self.partition.limit is not None:
                base += self._shared.rows((start.epoch, position), unit.file, self.partition.limit - base)
                if base == self.partition.limit:
                    return

    def _row_groups(self, files: Sequence[int]) -> list[list[int]]:
        """Row groups of several files, whose footers are read in parallel."""

        def one(file: int) -> list[int]:
            if self._end(file) == FOOTER:
                return []
            read = functools.partial(self.source.row_groups, file)
            try:
                return retry.attempt(read, what=self._what(file), deadline=self._retry_seconds)
            except CorruptError as error:
                raise self._corrupt(error, file, FOOTER) from None

        with ThreadPoolExecutor(_FOOTER_READERS, "jaxtrain-footers") as executor:
            return list(executor.map(one, files))

    def _what(self, file: int) -> str:
        return f"source {self.name!r}, file {self.source.files[file]}"

    def _end(self, file: int) -> float:
        """The first row of a file to skip; infinite for most files."""
        return self.skipped.get(self.source.files[file], math.inf)

    def _corrupt(self, error: CorruptError, file: int, row: int) -> CorruptError:
        name = self.source.files[file]
        rest = "this file" if row <= 0 else f"its rows from {row:,} on"
        return CorruptError(
            f"source {self.name!r}, file {name}: {error}. Repair or replace the file, or set data.on_corrupt=skip to "
            f"continue without {rest}.",
            name,
            row,
            self.name,
        )

    def _open(self, file: int, row: int, stop: int | None = None) -> Iterator[Block]:
        """Blocks from `row` to the end of the file or the first skipped row. Rows from `stop` on are not needed."""
        end = self._end(file)
        if row >= end:
            return
        open_at = functools.partial(self.source.open, file, stop=stop)
        blocks = retry.retrying(open_at, row, what=self._what(file), deadline=self._retry_seconds)
        try:
            for block in blocks:
                count = len(block["text"])
                yield block if row + count <= end else head(block, int(end) - row)
                row += count
                if row >= end:
                    return
        except CorruptError as error:
            raise self._corrupt(error, file, error.row) from None
        finally:
            retry.close(blocks)

    def _unit_windows(self, unit: units.Unit, window: int) -> Iterator[tuple[int, Block]]:
        """The unit's windows from number `window` on."""
        first = window * self.window
        left = None if unit.rows is None else unit.rows - first
        if left is None or left > 0:
            stop = None if left is None else unit.first + first + left
            blocks = self._open(unit.file, unit.first + first, stop)
            yield from enumerate(regroup(blocks, self.window, left), window)

    def _shared_windows(
        self, lane: int, file: tuple[int, int], unit: units.Unit, window: int, base: int
    ) -> Iterator[tuple[int, Block]]:
        """The lane's windows of a file, from number `window` on. file: (epoch, position in its order)."""
        assert self._shared is not None
        size, lanes = self.window, self.options.num_lanes
        limit = unit.rows if self.partition.limit is None else self.partition.limit - base
        window = self._own_window(lane, file[1], window)
        while limit is None or window * size < limit:
            block = self._shared.get(file, unit.file, lane, window)
            if block is None:
                return
            yield window, block if limit is None else head(block, limit - window * size)
            window += lanes

    def _window(self, start: Position, unit: units.Unit, block: Block) -> Window:
        name, options = self.source.files[unit.file], self.options
        count = len(block["text"])
        first = unit.first + start.row
        planned = self._planned(start, unit) if first + count == self._end(unit.file) else count
        permuted = units.row_order(
            planned,
            seed=options.seed,
            source=self.name,
            epoch=start.epoch,
            file=name,
            first=first,
            shuffle=options.shuffle,
        )
        if options.holdout:
            held = stable_hash.is_held_out(self.name, name, first + permuted, options.holdout)
            kept = np.flatnonzero(held == options.held_out)
        else:
            kept = np.arange(0 if options.held_out else planned)
        kept = kept[permuted[kept] < count]
        tokens = block["text"]
        if isinstance(tokens, TokenArrays):
            where = kept[tokens.lengths[permuted[kept]] > 0]
            return Window(start, unit.file, count, (), start.row + where, first + permuted[where], tokens, first)
        texts, where = self._documents(block, permuted, kept)
        return Window(start, unit.file, count, texts, start.row + where, first + permuted[where])

    def _planned(self, start: Position, unit: units.Unit) -> int:
        """Rows of a window, including skipped ones: the others keep their order, so that cursors stay valid."""
        planned = self.window
        if unit.rows is not None:
            planned = min(planned, unit.rows - start.row)
        if self.partition.limit is not None:
            planned = min(planned, self.partition.limit - start.base - start.row)
        return planned

    def _documents(self, block: Block, permuted: np.ndarray, kept: np.ndarray) -> tuple[list[str], np.ndarray]:
        """Texts of the rows `kept` of the permuted order, and which of those rows have a non-empty text."""
        column = block["text"]
        if not self._transforms:
            found = [column[row] for row in permuted[kept].tolist()]
            if not all(found):
                kept = kept[np.array([bool(text) for text in found])]
                found = [text for text in found if text]
            return found, kept
        texts, where = [], []
        for index in kept.tolist():
            text = text_of(block, int(permuted[index]), self._transforms)
            if text:
                texts.append(text)
                where.append(index)
        return texts, np.array(where, np.int64)


def text_of(block: Block, row: int, transforms: Sequence[Transform]) -> str:
    """A row's text after the transforms; "" if one of them drops it."""
    if not transforms:
        return block["text"][row]
    document: dict[str, Any] | None = {name: values[row] for name, values in block.items()}
    for transform in transforms:
        document = transform(document)
        if document is None:
            return ""
    return document["text"]


@functools.lru_cache(maxsize=64)
def _cached_order(num_units: int, seed: int, source: str, epoch: int, shuffle: bool) -> np.ndarray:
    return units.order(num_units, seed=seed, source=source, epoch=epoch, shuffle=shuffle)


def describe(transform: Transform) -> Json:
    """A transform's kind and settings, for the identity."""
    settings = {name: repr(value) for name, value in sorted(vars(transform).items())}
    return cli.sealed({cli.KIND: cli.kind_of(type(transform)), **settings})
