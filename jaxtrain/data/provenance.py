"""Where the tokens of a step come from, and the throughput of a stream: the training data path, observed from outside.

Nothing here recomputes a batch. The lanes of all hosts run in this process, and before each step they report which
documents its rows hold.
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
    """Tokens [first, end) of a document within a row. The document's last token is its end-of-document token."""

    file: str
    row: int  # in the file
    first: int
    end: int


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a row of a batch comes from.

    Attributes:
        lane: The lane that read the row.
        source: The source's name.
        spans: The documents in the row, in order.
        counted: How many tokens from the start of the row are trained on; fewer than its length only in the last step.
    """

    lane: int
    source: str
    spans: tuple[DocumentSpan, ...]
    counted: int

    @property
    def tokens(self) -> int:
        """The row's tokens from documents; past the end of the data this is less than its length."""
        return sum(span.end - span.first for span in self.spans)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """What `StreamInspector.measure` read, and how fast.

    Attributes:
        first: The first batch.
        origins: Where the rows of the first batch come from.
        steps: Batches read.
        documents: Documents begun.
        tokens: Unique tokens read.
        first_batch_seconds: Seconds until the first batch.
        tokens_per_second: Throughput after the first batch; overall if the data or the stage has a single one.
        documents_per_second: Likewise.
        sources: Each source's totals, as `ledger.by_source` returns them.
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

    Attributes:
        ended: Whether every source is exhausted for good.
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
        """Starts after step `after`.

        Args:
            readers: One per source, in the plan's order.
            plan: The run's plan.
            rows: How documents become rows.
            threads: The thread pools to read with.
            after: The last step already taken.
            states: The state of each lane after step `after`. Missing lanes start at the beginning of the sources.
        """
        self._readers, self._plan, self._epochs = readers, plan, rows.epochs
        lanes = range(readers[0].options.num_lanes)
        dataset = host_dataset(readers, plan, rows, lanes, threads, after=after, states=states or {})
        self._batches: HostIterator = iter(dataset)
        self._step = after
        self.ended = False  # every source is exhausted for good

    def __enter__(self) -> "StreamInspector":
        return self

    def __exit__(self, *error: object) -> None:
        self._batches.close()

    def next(self) -> StepBatch:
        """The next batch. Raises UserError past the end of the run or of the data."""
        if self.ended:
            raise UserError(f"the data ends with step {self._step:,}, after {self._epochs} epoch(s) of every source")
        batch = next(self._batches)
        self._step, self.ended = batch.step, batch.ended and self._epochs is not None
        return batch

    def go_to(self, step: int, on_step: Callable[[], object] = lambda: None) -> None:
        """Reads on until `step` is the next step, calling `on_step` after each batch."""
        while self._step < step - 1:
            self.next()
            on_step()

    def next_with_origins(self) -> tuple[StepBatch, list[Origin]]:
        """The next batch and the origin of each of its rows. Raises like `next`."""
        at = self._plan.at(self._step + 1)
        found = [] if self.ended else self._batches.addresses()
        batch = self.next()
        return batch, [self._origin(at, row, index, spans) for row, (index, spans) in enumerate(found)]

    def _origin(self, at: StepPlan, row: int, index: int, spans: Sequence[tuple[int, int, int, int]]) -> Origin:
        reader = self._readers[index]
        return Origin(
            lane=row * reader.options.num_lanes // at.batch_size,
            source=reader.name,
            spans=tuple(DocumentSpan(reader.source.files[file], *rest) for file, *rest in spans),
            counted=min(max(at.masked_from - row * at.seq_len, 0), at.seq_len),
        )

    def measure(self, documents: int, last_step: int | None) -> Measurement:
        """Reads until `documents` documents have begun, `last_step` is reached, or the data ends.

        It reads two batches at least, if there are two: the first one waits for sources to open.

        Args:
            documents: Documents to read.
            last_step: The last step to read, or None.

        Returns:
            What was read, and how fast.
        """
        names = self._plan.source_names
        begun = time.perf_counter()
        batch, origins = self.next_with_origins()
        first_batch = batch
        first, start = time.perf_counter(), self._totals(batch)
        now, steps = start, 1
        while (steps < 2 or now["documents"] < documents) and not self.ended and self._step != last_step:
            batch, steps = self.next(), steps + 1
            now = self._totals(batch)
        ended = time.perf_counter()
        # For a single batch only the total time is known, startup included.
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
    """int64 [V, S, F]: this process has all lanes."""
    return np.stack([batch.states[lane] for lane in sorted(batch.states)])
