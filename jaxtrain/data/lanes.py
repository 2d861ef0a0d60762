"""A lane: one of `num_lanes` logical readers. What it yields depends only on the config, never on hosts or devices.

A lane keeps a cursor in every source. For each step the plan assigns each of the lane's rows to a source. The lane cuts
the rows from each source and puts them in place, one whole block of rows per step.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from jaxtrain.data import packing
from jaxtrain.data.fit_packing import FitPacker
from jaxtrain.data.packing import Counts, Cut, Spans, empty_block
from jaxtrain.data.source_reader import Position, SourceReader
from jaxtrain.data.threads import Pools, Prefetcher
from jaxtrain.data.tokenizing import RowSpec, documents_of
from jaxtrain.interfaces import Batch
from jaxtrain.plan import Plan, StepPlan

# Fields of a lane's state in one source, int64: the cursor, the counts of the packer and the ledger, and what version
# 0.1 did not have, such as the last step that drew from the source. A field that is missing in a record is 0.
STATE_FIELDS = (
    *("epoch", "unit", "row", "token", "base", "seen", "documents", "tokens", "unique", "ended"),
    *("cut", "padding", "ahead", "taken", "drawn"),
)
_ENDED = STATE_FIELDS.index("ended")
# A source opens this many steps before the stage that needs it, or this many tokens if that is earlier: 16 short steps
# may take less time than a remote source needs to open (2M tokens are 14 s at 150,000 tokens/s).
_OPEN_AHEAD_STEPS, _OPEN_AHEAD_TOKENS = 16, 1 << 21


def position_of(state: np.ndarray) -> Position:
    """The reading position in a lane's state of one source. state: int64 [STATE_FIELDS]."""
    epoch, unit, row, _, base, *_ = state.tolist()
    return Position(epoch, unit, row, base)


class SourceLane:
    """One lane in one source from a step on: reads ahead, packs, and reports its state.

    Attributes:
        packer: Cuts the source's documents into rows.
        step: The first step it reads for.
    """

    def __init__(self, reader: SourceReader, lane: int, rows: RowSpec, pools: Pools, state: np.ndarray, step: int):
        _, _, _, token, _, seen, documents, tokens, unique, _, cut, padding, ahead, taken, drawn = state.tolist()
        start, self.step = position_of(state), step
        # A state that counts documents counts those that have been forgotten since: the packer removes them.
        forgets = reader.forgets(drawn, step) if token or seen or ahead or taken else None
        without = step if forgets is None else drawn
        # The last window of a unit may hold only a few rows, too few to hide the latency of opening the next unit.
        half = -(-reader.window // 2)
        windows = Prefetcher(
            reader.windows(lane, start, rows.epochs, without), pools.readers, lambda window: window.rows, half
        )
        self._documents = Prefetcher(documents_of(windows, start, rows, reader, lane), pools.workers)
        end = None if rows.epochs is None else Position(rows.epochs, 0, 0)
        counts, skipped = Counts(documents, tokens, unique, cut, padding), bool(reader.skipped)
        self.packer = FitPacker(
            self._documents, start, token, seen, counts, end, skipped, rows.width, ahead, taken, forgets
        )
        windows.start()

    def start(self) -> None:
        """Starts tokenizing without waiting. Workers block on windows, so start all readers first."""
        self._documents.start()


@dataclasses.dataclass(frozen=True)
class LaneStep:
    """One step, for all lanes. Sources are indices into the plan's sources.

    Attributes:
        at: The plan of the step.
        rows: R, rows per lane.
        only: The only source, if `sources_by_lane` is None.
        sources_by_lane: The source of every row, [V, R], or None if all rows come from `only`.
        opened: Sources that must be open by now.
        wanted: Sources of this and all later stages.
    """

    at: StepPlan
    rows: int
    only: int
    sources_by_lane: np.ndarray | None
    opened: tuple[int, ...]
    wanted: tuple[int, ...]


class LaneSchedule:
    """The plan's steps, divided among lanes. Computed once for all lanes of the host that take the same step."""

    def __init__(self, plan: Plan, num_lanes: int):
        self.plan = plan
        self.num_lanes = num_lanes
        self._latest: LaneStep | None = None
        self._by_stages: dict[tuple[int, int], tuple[int, ...]] = {}

    def at(self, step: int) -> LaneStep:
        """A step from 1 to the plan's last step."""
        if self._latest is None or self._latest.at.step != step:
            self._latest = self._make(step)
        return self._latest

    def _make(self, step: int) -> LaneStep:
        plan, at = self.plan, self.plan.at(step)
        ahead = step + max(_OPEN_AHEAD_STEPS, _OPEN_AHEAD_TOKENS // (at.batch_size * at.seq_len))
        last = plan.stage_of(ahead if plan.last_step is None else min(ahead, plan.last_step))
        rows, now = at.batch_size // self.num_lanes, self._sources(at.stage, at.stage)
        return LaneStep(
            at=at,
            rows=rows,
            only=now[0],
            sources_by_lane=None if len(now) == 1 else plan.sources_of(step).reshape(self.num_lanes, rows),
            opened=self._sources(at.stage, last),
            wanted=self._sources(at.stage, len(plan.stages)),
        )

    def _sources(self, first: int, last: int) -> tuple[int, ...]:
        """The sources of stages `first` to `last`, from 1, that have steps, in the order to open them."""
        if (first, last) not in self._by_stages:
            stages = [stage for stage in self.plan.stages[first - 1 : last] if stage.has_steps]
            names = dict.fromkeys(name for stage in stages for name in stage.weights)
            self._by_stages[first, last] = tuple(self.plan.source_names.index(name) for name in names)
        return self._by_stages[first, last]


class LaneDataset(grain.IterDataset):
    """A lane as a Grain dataset. Each element is the lane's block of rows for one step.

    Attributes:
        lane: The lane's number, from 0.
        shares: The lanes' steps, shared by the lanes of this host.
        readers: One per source, in the plan's order, shared by the lanes of this host.
        rows: How documents become rows.
        pools: The thread pools to read with.
        forgets_from: The steps from which documents of any source are forgotten.
    """

    def __init__(self, lane: int, shares: LaneSchedule, readers: Sequence[SourceReader], rows: RowSpec, pools: Pools):
        super().__init__()
        self.lane, self.shares = lane, shares
        self.readers, self.rows, self.pools = readers, rows, pools
        self.forgets_from = frozenset[int]().union(*(reader.forgets_from for reader in readers))

    def __iter__(self) -> "LaneIterator":
        return LaneIterator(self)


class LaneIterator(grain.DatasetIterator):
    """Yields dicts with `BATCH_FIELDS`, [R, T], and `ended`: whether no token remains for any later step.

    The state is the lane's: {"step": the last step yielded, "sources": int64 [S, STATE_FIELDS]}.
    """

    def __init__(self, dataset: LaneDataset):
        super().__init__()
        self._dataset = dataset
        self._step = 0
        self._states = np.zeros((len(dataset.readers), len(STATE_FIELDS)), np.int64)
        self._sources: dict[int, SourceLane] = {}

    @property
    def states(self) -> np.ndarray:
        """The lane's state in each source, int64 [S, STATE_FIELDS]. The next step overwrites it in place."""
        return self._states

    def get_state(self) -> dict[str, Any]:
        """The iterator's state, see the class."""
        return {"step": self._step, "sources": self._states.copy()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves the iterator to a state that `get_state` returned."""
        self._step = state["step"]
        self._states = np.array(state["sources"], np.int64)
        self._sources = {}

    def open(self) -> None:
        """Starts reading, without waiting, what the next step needs and what the steps soon after it need first."""
        shares, step = self._dataset.shares, self._step + 1
        if step in self._dataset.forgets_from:
            # What has been read ahead has the documents that are forgotten from this step on.
            for index, source in list(self._sources.items()):
                if source.step < step and step in self._dataset.readers[index].forgets_from:
                    del self._sources[index]
        if shares.plan.last_step is None or self._step < shares.plan.last_step:
            for index in shares.at(self._step + 1).opened:
                self._source(index)

    def start(self) -> None:
        """Starts tokenizing in every open source."""
        for source in self._sources.values():
            source.start()

    def shape(self) -> tuple[int, int]:
        """(R, T) of the next step's block. Raises StopIteration past the last step."""
        shares = self._dataset.shares
        if shares.plan.last_step is not None and self._step >= shares.plan.last_step:
            raise StopIteration
        share = shares.at(self._step + 1)
        return share.rows, share.at.seq_len

    def __next__(self) -> dict[str, Any]:
        block = empty_block(*self.shape(), self._dataset.rows.width)
        cut, ended = self.write(block)
        return {**packing.finish(block, [cut]), "ended": ended}

    def write(self, block: Batch) -> tuple[Cut, bool]:
        """Like `next`, but writes the rows in place.

        Args:
            block: Contiguous arrays of `shape()`, as `packing.empty_block` makes them.

        Returns:
            The cut that `packing.finish` needs, and `ended`.
        """
        self.open()
        self._step += 1
        share, lane = self._dataset.shares.at(self._step), self._dataset.lane
        at = share.at
        counted_R = _counted(at, lane * share.rows, share.rows)
        if share.sources_by_lane is None:
            cut = self._cut(share.only, at, counted_R, block)
        else:
            cut = self._mixed(share.sources_by_lane[lane], at, counted_R, block)
        if counted_R is not None:
            cut = dataclasses.replace(cut, counted=counted_R)
        return cut, all(self._states[index, _ENDED] for index in share.wanted)

    def addresses(self) -> list[tuple[int, Spans]]:
        """The source and the documents of each of this lane's rows of the next step. Reads what `next` would read."""
        shares, lane = self._dataset.shares, self._dataset.lane
        self.open()
        share = shares.at(self._step + 1)
        at = share.at
        sources_R = [share.only] * share.rows if share.sources_by_lane is None else share.sources_by_lane[lane].tolist()
        found = {
            index: iter(self._source(index).packer.addresses(sources_R.count(index), at.seq_len, at.stride, at.fit))
            for index in dict.fromkeys(sources_R)
        }
        return [(index, next(found[index])) for index in sources_R]

    def _cut(self, index: int, at: StepPlan, counted_R: np.ndarray | None, block: Batch) -> Cut:
        source = self._source(index)
        cut = source.packer.cut(block, at.stride, self._dataset.rows.document_mask, counted_R, at.fit)
        self._states[index] = [*source.packer.state, self._step]
        return cut

    def _mixed(self, sources_R: np.ndarray, at: StepPlan, counted_R: np.ndarray | None, block: Batch) -> Cut:
        """Writes rows of several sources to their positions in the block."""
        counts = np.bincount(sources_R).tolist()
        if counts[-1] == len(sources_R):
            return self._cut(len(counts) - 1, at, counted_R, block)
        parts = []
        for index, rows in enumerate(counts):
            if rows:
                place_R = np.flatnonzero(sources_R == index)
                part = {name: np.empty_like(field[:rows]) for name, field in block.items()}
                cut = self._cut(index, at, None if counted_R is None else counted_R[place_R], part)
                for name, field in part.items():
                    block[name][place_R] = field
                parts.append((cut, place_R))
        return packing.spread(parts, len(sources_R), at.seq_len)

    def _source(self, index: int) -> SourceLane:
        if index not in self._sources:
            data = self._dataset
            self._sources[index] = SourceLane(
                data.readers[index], data.lane, data.rows, data.pools, self._states[index], self._step + 1
            )
        return self._sources[index]


def _counted(at: StepPlan, first_row: int, rows: int) -> np.ndarray | None:
    """How many tokens of each of a lane's rows are trained on; None: all. Only the run's last batch is cut."""
    if at.masked_from == at.batch_size * at.seq_len:
        return None
    return np.clip(at.masked_from - (first_row + np.arange(rows)) * at.seq_len, 0, at.seq_len)
