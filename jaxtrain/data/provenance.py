"""Where the tokens of a step come from, and what a stream gives: the data path of training, watched from outside.

Nothing here works a batch out a second time. The lanes of all hosts run in this process, and before they take a step
they are asked which documents its rows hold.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jaxtrain.data import ledger
from jaxtrain.data.pipeline import HostIterator, StepBatch, host_dataset
from jaxtrain.data.source_reader import SourceReader
from jaxtrain.data.threads import Pools
from jaxtrain.data.tokenizing import RowSpec
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json
from jaxtrain.plan import Plan, StepPlan


@dataclasses.dataclass(frozen=True)
class DocumentSpan:
    """Tokens [first, end) of a document, in a row; its last token is the one that ends the document."""

    file: str
    row: int  # in the file
    first: int
    end: int


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a row of a batch comes from. `counted`: its first so many tokens are trained on; fewer at the run's end."""

    lane: int
    source: str
    pieces: tuple[DocumentSpan, ...]
    counted: int

    @property
    def tokens(self) -> int:
        """Those of documents; past the end of the data a row has fewer than its length."""
        return sum(piece.end - piece.first for piece in self.pieces)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What was read: seconds until the first batch was there, and tokens and documents a second after it.

    sources: as `ledger.by_source`. first, origins: the first batch, and where its rows come from.
    """

    first: StepBatch
    origins: list[Origin]
    steps: int
    documents: int
    tokens: int
    first_batch_seconds: float
    tokens_per_second: float
    documents_per_second: float
    sources: dict[str, Json]


class StreamInspector:
    """The batches of the whole run from step `after` + 1 on, in one process.

    states: where each lane stood after step `after`; those missing start at the beginning of the sources.
    """

    def __init__(
        self,
        readers: Sequence[SourceReader],
        plan: Plan,
        rows: RowSpec,
        threads: Pools,
        *,
        after: int = 0,
        states: Mapping[int, np.ndarray] | None = None,
    ):
        self._readers, self._plan, self._epochs = readers, plan, rows.epochs
        lanes = range(readers[0].options.num_lanes)
        dataset = host_dataset(readers, plan, rows, lanes, threads, after=after, states=states or {})
        self._batches: HostIterator = iter(dataset)
        self._step = after
        self.ended = False  # no source has another token, nor will have

    def __enter__(self) -> "StreamInspector":
        return self

    def __exit__(self, *error: object) -> None:
        self._batches.close()

    def next(self) -> StepBatch:
        """Raises UserError past the end of the run."""
        if self.ended:
            raise UserError(f"the data ends with step {self._step:,}, after {self._epochs} epoch(s) of every source")
        batch = next(self._batches)
        self._step, self.ended = batch.step, batch.ended and self._epochs is not None
        return batch

    def go_to(self, step: int, on_step: Callable[[], object] = lambda: None) -> None:
        """Read on until `step` is the next one. on_step: called after each."""
        while self._step < step - 1:
            self.next()
            on_step()

    def next_with_origins(self) -> tuple[StepBatch, list[Origin]]:
        """The next batch, and where each of its rows comes from. Raises as `next`."""
        at = self._plan.at(self._step + 1)
        found = [] if self.ended else self._batches.addresses()
        batch = self.next()
        return batch, [self._origin(at, row, index, pieces) for row, (index, pieces) in enumerate(found)]

    def _origin(self, at: StepPlan, row: int, index: int, pieces: Sequence[tuple[int, int, int, int]]) -> Origin:
        reader = self._readers[index]
        return Origin(
            lane=row * reader.options.num_lanes // at.batch_size,
            source=reader.name,
            pieces=tuple(DocumentSpan(reader.source.files[file], *rest) for file, *rest in pieces),
            counted=min(max(at.masked_from - row * at.seq_len, 0), at.seq_len),
        )

    def measure(self, documents: int, last_step: int | None) -> Measurement:
        """Read until so many documents have begun, to the end of `last_step` or of the data, one batch at least."""
        names = self._plan.source_names
        begun = time.perf_counter()
        batch, origins = self.next_with_origins()
        first_batch = batch
        first, start = time.perf_counter(), self._totals(batch)
        now, steps = start, 1
        while now["documents"] < documents and not self.ended and self._step != last_step:
            batch, steps = self.next(), steps + 1
            now = self._totals(batch)
        ended = time.perf_counter()
        # A single batch has only the whole time, with what it took to begin.
        since, before = (first, start) if steps > 1 else (begun, dict.fromkeys(now, 0))
        seconds = max(ended - since, 1e-9)
        return Measurement(
            first=first_batch,
            origins=origins,
            steps=steps,
            documents=now["documents"],
            tokens=now["unique_tokens"],
            first_batch_seconds=first - begun,
            tokens_per_second=(now["tokens"] - before["tokens"]) / seconds,
            documents_per_second=(now["documents"] - before["documents"]) / seconds,
            sources=ledger.by_source(_stacked(batch), names),
        )

    def _totals(self, batch: StepBatch) -> dict[str, int]:
        sources = ledger.by_source(_stacked(batch), self._plan.source_names).values()
        return {key: sum(given[key] for given in sources) for key in ("documents", "tokens", "unique_tokens")}


def _stacked(batch: StepBatch) -> np.ndarray:
    """int64 [V, S, F]: here one process has all lanes."""
    return np.stack([batch.states[lane] for lane in sorted(batch.states)])
