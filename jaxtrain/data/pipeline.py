"""The path of a document, from its source to the batch of a training step. Only this module joins the stages.

Shapes: N documents, R rows of a lane, T tokens per row, B rows of the batch, S sources. V lanes (`num_lanes`) share
every source; a host runs the lanes whose rows its devices hold.

    step                             what it produces                                 what it remembers
    1 `resolve`                      Source: files, each readable from any row        identity (dataset, commit, files)
    2 `SourceReader`, units.py       units of each lane, permuted for every epoch     nothing: a function of the seed
    3 `SourceReader.windows`         Window: shuffled, filtered texts [N]             Position: epoch, unit, row
    4 `documents_of`, tokenizing.py  Documents: token ids [sum of lengths]            nothing
    5 `Packer.cut`, packing.py       tokens and targets [R, T], written in place;     token in the document, tokens
                                     Cut: where documents end in them                 already seen, counts
    6 `LaneIterator`, lanes.py       the lane's rows from all sources, by the plan    steps 3 and 5, for each source
    7 `HostIterator`                 StepBatch: rows of all lanes of this host,       the step, and its lanes' states
                                     with segment ids, positions, loss mask           int64 [V, S, STATE_FIELDS]
    8 `Feed`, feed.py                the same StepBatch as global arrays [B, T]       nothing

Steps 3 and 4 read ahead in threads (`Prefetcher`), and so does step 7 (`host_batches`). Data read ahead is never part
of the state: a StepBatch carries the states after its own step, and a checkpoint of them resumes exactly there.
"""

import collections
import dataclasses
import difflib
import functools
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any, TypeGuard

import grain
import numpy as np

from jaxtrain.data import packing
from jaxtrain.data.forgotten import Documents
from jaxtrain.data.io import retry
from jaxtrain.data.io.cached_files import CachedBytes
from jaxtrain.data.io.disk_cache import DiskCache
from jaxtrain.data.lanes import STATE_FIELDS, LaneDataset, LaneSchedule, position_of
from jaxtrain.data.packing import Spans, empty_block
from jaxtrain.data.skipped_files import SkippedFiles
from jaxtrain.data.source_reader import Position, ReadOptions, SourceReader, Window
from jaxtrain.data.threads import DaemonPool, Pools
from jaxtrain.data.tokenizing import RowSpec
from jaxtrain.errors import UserError
from jaxtrain.interfaces import CacheableSource, Json, Source, SourceConfig, Tokenizer
from jaxtrain.plan import Plan

# Otherwise Grain adds a note about its own frames to every error, including user errors.
grain.config.update("py_traceback_filtering", "off")

PATIENCE_AT_START = 60.0  # seconds an outage may last: a user is waiting, and a launcher can retry
MODES = ("stream", "download", "pretokenized", "auto")
_DISK_GB = 35.0  # default disk cache: a shard of 1 GB for each of 32 lanes, plus a few prefetched ones
_READERS = 32  # threads per host that wait for the network
_TEXT_LANES = 8  # lanes whose next window is read ahead for a tokenizer's training


@dataclasses.dataclass(kw_only=True)
class DataConfig:
    """Where documents come from and how they become rows.

    Attributes:
        sources: The sources by name. A name is part of its documents' identities: it keys shuffling and holdout.
        num_lanes: Logical readers. Fixed for a run; divides every batch size; ideally a multiple of the number of
            hosts.
        mode: "stream": read from the source while training, keep nothing on disk. "download": fetch the files first.
            "pretokenized": read the token store. "auto": choose by what is available, see data/modes.py. All modes
            yield the same batches, and the mode may change at a resume.
        token_store: Folder with a token store for each source (tools.pretokenize); "" for `tokens` in the work
            directory.
        ram_cache_gb: Memory per host for blocks read from token stores, for runs of many epochs.
        max_disk_gb: The most that the disk cache may hold (1e9 bytes), for downloads and tar shards. None: 35. 0: no
            cache; files are read in ranges from where they are.
        shuffle: Permute units each epoch and rows within windows. False keeps the files' order.
        shuffle_window: Rows that are permuted together. None: 512, or fewer in a source that is too small for its
            lanes.
        holdout: Fraction of the documents, in [0, 1), held out of training for evaluation.
        document_mask: Attention does not cross documents, and a document's last token has no loss.
        add_bos: Begin each document with the tokenizer's beginning-of-document token.
        workers: Tokenizing threads per host. None: 4, or 8 if all data comes from token stores.
        prefetch: Batches prepared ahead per host. None: 2, or 4 if all data comes from token stores.
        forget: A file with documents that are not trained on, see data/forgotten.py; "" for none. They are left out
            from the first step after the start (or resume) that finds them in the file.
        retry_minutes: How long an outage of a source may last before the run stops (exit code 1).
        on_corrupt: What happens when a file cannot be decoded. "stop" ends the run (exit code 1). "skip" skips the
            file's rows from the first bad one on for good, records this in skips.json, and exits with code 75 to be
            restarted.
    """

    sources: dict[str, SourceConfig]
    num_lanes: int = 8
    mode: str = "stream"
    token_store: str = ""
    ram_cache_gb: float = 0.0
    max_disk_gb: float | None = None
    shuffle: bool = True
    shuffle_window: int | None = None
    holdout: float = 0.0
    document_mask: bool = True
    add_bos: bool = False
    workers: int | None = None
    prefetch: int | None = None
    forget: str = ""
    retry_minutes: float = 60.0
    on_corrupt: str = "stop"

    def check(self) -> None:
        """Raises UserError if a value is out of range."""
        if not self.sources:
            raise UserError("sources={}: give at least one, for example {'code': TextFiles()}")
        for name, least in (("num_lanes", 1), ("shuffle_window", 1), ("workers", 1), ("prefetch", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise UserError(f"{name}={value}: give {least} or more")
        if self.mode not in MODES:
            near = difflib.get_close_matches(self.mode, MODES) or MODES
            raise UserError(f"mode={self.mode!r} is not known; did you mean {' or '.join(map(repr, near))}?")
        if self.ram_cache_gb < 0:
            raise UserError(f"ram_cache_gb={self.ram_cache_gb}: give 0 or more")
        if "://" in self.token_store:
            raise UserError(f"token_store={self.token_store!r}: token stores are read from local paths")
        if not 0 <= self.holdout < 1:
            raise UserError(f"holdout={self.holdout} is a fraction of the documents: give 0 or more, below 1")
        if self.max_disk_gb is not None and self.max_disk_gb < 0:
            raise UserError(f"max_disk_gb={self.max_disk_gb}: give 0 (no cache) or more, or none for {_DISK_GB:g}")
        if self.retry_minutes <= 0:
            raise UserError(f"retry_minutes={self.retry_minutes} must be above 0")
        if self.on_corrupt not in ("stop", "skip"):
            raise UserError(f"on_corrupt={self.on_corrupt!r}: give 'stop', or 'skip' to continue without corrupt files")
        for name in self.sources:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise UserError(f"sources: {name!r} appears in logs and overrides; use letters, digits, - and _")

    def threads(self, stored: bool = False) -> tuple[int, int]:
        """(workers, prefetch). stored: whether all sources are read from token stores."""
        workers, prefetch = (8, 4) if stored else (4, 2)
        return self.workers or workers, self.prefetch or prefetch

    def read_options(self, seed: int, held_out: bool = False) -> ReadOptions:
        """The options of the source readers."""
        return ReadOptions(seed, self.num_lanes, self.shuffle, self.shuffle_window, self.holdout, held_out)

    def row_spec(self, tokenizer: Tokenizer, epochs: int | None) -> RowSpec:
        """How documents become rows. Raises UserError if add_bos is on and the tokenizer has no such token."""
        if self.add_bos and tokenizer.bos_id is None:
            raise UserError("data.add_bos=true, but the tokenizer has no beginning-of-document token: set it to false")
        return RowSpec(tokenizer, self.add_bos, self.document_mask, epochs)

    def build(
        self,
        resolved: Mapping[str, Source],
        *,
        seed: int,
        held_out: bool = False,
        skipped: SkippedFiles | None = None,
        forgotten: Documents | None = None,
        scratch: str | None = None,
    ) -> list[SourceReader]:
        """Divides the sources into units for all lanes.

        Args:
            resolved: The resolved sources by name.
            seed: The run's seed.
            held_out: Whether to read the held-out documents instead of the training documents.
            skipped: Corrupt files to skip, if any.
            forgotten: Documents to leave out, if any.
            scratch: Folder for data that slow lanes have not yet consumed, if it does not fit into memory. None: the
                system's folder for temporary files.

        Returns:
            One reader per source, in the order of `self.sources`.
        """
        options, seconds = self.read_options(seed, held_out), 60 * self.retry_minutes
        return [
            SourceReader(
                name,
                config,
                resolved[name],
                options,
                retry_seconds=seconds,
                skipped=(skipped or {}).get(name),
                forgotten=(forgotten or {}).get(name),
                scratch=scratch,
            )
            for name, config in self.sources.items()
        ]

    def cache(self, directory: str) -> DiskCache | None:
        """The disk cache in `directory`, for the sources that use one; None if `max_disk_gb` is 0."""
        return DiskCache(directory, self.disk_gb) if self.disk_gb else None

    @property
    def disk_gb(self) -> float:
        """The most that the disk cache may hold, in 1e9 bytes."""
        return _DISK_GB if self.max_disk_gb is None else self.max_disk_gb


def pools(config: DataConfig, stored: bool = False) -> Pools:
    """This host's thread pools. stored: whether all sources are read from token stores."""
    workers, _ = config.threads(stored)
    return Pools(DaemonPool(_READERS, "jaxtrain-read"), DaemonPool(workers, "jaxtrain-tokenize"))


@dataclasses.dataclass(frozen=True)
class StepBatch:
    """The data of one step, and this host's lane states after it.

    Attributes:
        step: The step, from 1.
        arrays: `BATCH_FIELDS`, plus `RECORDS` with a cached teacher. NumPy [rows of this host's lanes, T], lane by
            lane; after `Feed`, global jax.Arrays [B, T].
        states: Lane → int64 [S, STATE_FIELDS], after the step.
        ended: Whether no lane of this host has a token left for any later step.
        documents: The documents in each of this host's rows, whole or in part, padding counted as one: int64,
            descending.
    """

    step: int
    arrays: Mapping[str, Any]
    states: dict[int, np.ndarray]
    ended: bool
    documents: np.ndarray


class HostDataset(grain.IterDataset):
    """The batches of some lanes, from step `after` + 1 on. Built by `host_dataset`."""

    def __init__(self, lanes: Sequence[LaneDataset], after: int, states: Mapping[int, np.ndarray]):
        super().__init__()
        self.lanes, self.after, self.states = lanes, after, states

    def __iter__(self) -> "HostIterator":
        return HostIterator(self)


class HostIterator(grain.DatasetIterator):
    """An iterator of StepBatch that joins the lanes.

    Its state is {"step": the last step taken, "lanes": int64 [lanes of this host, S, STATE_FIELDS]}. After a step has
    failed, every further `next` raises the same error, because some lanes have taken that step and others have not.
    """

    def __init__(self, dataset: HostDataset):
        super().__init__()
        self._lanes = [lane.__iter__() for lane in dataset.lanes]
        self._numbers = [lane.lane for lane in dataset.lanes]
        self._readers = dataset.lanes[0].readers
        self._width = dataset.lanes[0].rows.width
        self._forgets_from = dataset.lanes[0].forgets_from
        empty = np.zeros((len(self._readers), len(STATE_FIELDS)), np.int64)
        states = [dataset.states.get(number, empty) for number in self._numbers]
        self.set_state({"step": dataset.after, "lanes": np.array(states, np.int64)})

    def get_state(self) -> dict[str, Any]:
        """The iterator's state, see the class."""
        return {"step": self._step, "lanes": self._states}

    def set_state(self, state: dict[str, Any]) -> None:
        """Moves the iterator to a state that `get_state` returned."""
        self._step, self._states = state["step"], state["lanes"]
        for lane, sources in zip(self._lanes, self._states, strict=True):
            lane.set_state({"step": self._step, "sources": sources})
        self._started = False
        self._failed: Exception | None = None

    def addresses(self) -> list[tuple[int, Spans]]:
        """The source and the documents of each row of the next step. Reads what `next` would read."""
        self._start()
        return [row for lane in self._lanes for row in lane.addresses()]

    def close(self) -> None:
        """Closes the source readers."""
        super().close()
        for reader in self._readers:
            reader.close()

    def __next__(self) -> StepBatch:
        if self._failed is not None:
            raise self._failed
        try:
            return self._next()
        except Exception as error:
            self._failed = error
            raise

    def _start(self) -> None:
        """Registers all lanes before any of them reads, and lets all of them read before any waits for data.

        Does nothing if the lanes read already and no document is forgotten from this step on.
        """
        if self._started and self._step + 1 not in self._forgets_from:
            return
        for index, reader in enumerate(self._readers):
            starts = map(position_of, self._states[:, index])
            reader.register(dict(zip(self._numbers, starts, strict=True)))
        for lane in self._lanes:
            lane.open()
        for lane in self._lanes:
            lane.start()
        self._started = True

    def _next(self) -> StepBatch:
        self._start()
        rows, seq_len = self._lanes[0].shape()
        block = empty_block(rows * len(self._lanes), seq_len, self._width)
        cuts, ended = [], True
        for number, lane in enumerate(self._lanes):
            place = slice(number * rows, (number + 1) * rows)
            cut, lane_ended = lane.write({name: field[place] for name, field in block.items()})
            cuts.append(cut)
            ended &= lane_ended
        batch = packing.finish(block, cuts)
        self._step += 1
        self._states = np.array([lane.states for lane in self._lanes])
        documents = 1 + np.count_nonzero(np.diff(batch["segment_ids"], axis=1), axis=1)
        states = dict(zip(self._numbers, self._states, strict=True))
        return StepBatch(self._step, batch, states, ended, -np.sort(-documents))


def host_dataset(
    readers: Sequence[SourceReader],
    plan: Plan,
    rows: RowSpec,
    lanes: Sequence[int],
    threads: Pools,
    *,
    after: int,
    states: Mapping[int, np.ndarray],
) -> HostDataset:
    """The batches of `lanes` from step `after` + 1 on, as a Grain dataset without prefetching.

    Args:
        readers: One per source, in the plan's order.
        plan: The run's plan.
        rows: How documents become rows.
        lanes: The lanes that this host reads, ascending.
        threads: This host's thread pools.
        after: The last step already taken.
        states: Lane → its state after step `after`, int64 [S, STATE_FIELDS]. Missing lanes start at the beginning.
    """
    names = tuple(reader.name for reader in readers)
    assert names == plan.source_names, f"readers of {names} for a plan of {plan.source_names}"
    shares = LaneSchedule(plan, readers[0].options.num_lanes)
    return HostDataset([LaneDataset(lane, shares, readers, rows, threads) for lane in lanes], after, states)


def host_batches(
    readers: Sequence[SourceReader],
    plan: Plan,
    rows: RowSpec,
    lanes: Sequence[int],
    threads: Pools,
    *,
    after: int,
    states: Mapping[int, np.ndarray],
    prefetch: int,
) -> grain.DatasetIterator:
    """An iterator of StepBatch over `host_dataset`. Call `close` to stop before the end.

    Args:
        prefetch: Batches to prepare ahead, in a thread.
        readers, plan, rows, lanes, threads, after, states: As in `host_dataset`.
    """
    dataset: grain.IterDataset = host_dataset(readers, plan, rows, lanes, threads, after=after, states=states)
    return iter(grain.experimental.ThreadPrefetchIterDataset(dataset, prefetch_buffer_size=prefetch))


def resolve(
    config: DataConfig, identities: Mapping[str, Json] | None = None, cache: DiskCache | None = None
) -> dict[str, Source]:
    """Resolves all sources in parallel.

    Args:
        config: The data config.
        identities: Source identities from a checkpoint, by name. These sources resolve to exactly what the checkpoint
            read.
        cache: The disk cache for sources that use one. Without it they read byte ranges.

    Returns:
        The resolved sources by name.

    Raises:
        UserError: A source does not exist or cannot be read. The message starts with its name.
        TransientError: An outage outlasted PATIENCE_AT_START or retry_minutes, whichever is shorter.
    """
    deadline = min(60 * config.retry_minutes, PATIENCE_AT_START)

    def one(name: str) -> Source:
        known = (identities or {}).get(name)
        look_up = functools.partial(config.sources[name].resolve, known and known["source"])
        try:
            source = retry.attempt(look_up, what=f"source {name!r}", deadline=deadline)
            return _through(cache, source, 60 * config.retry_minutes) if cache and wants_cache(source) else source
        except UserError as error:
            raise UserError(f"source {name!r}: {error}") from error

    with ThreadPoolExecutor(8, "jaxtrain-resolve") as executor:
        return dict(zip(config.sources, executor.map(one, config.sources), strict=True))


def wants_cache(source: Source) -> TypeGuard[CacheableSource]:
    """Whether a source reads through the disk cache if there is one."""
    return isinstance(source, CacheableSource) and source.needs_cache


def _through(cache: DiskCache, source: CacheableSource, retry_seconds: float) -> Source:
    for file, size in zip(source.files, source.file_bytes or (), strict=False):
        cache.check(file, size)
    return source.through(lambda file, key: CachedBytes(file, key, cache, retry_seconds))


def texts(config: DataConfig, readers: Sequence[SourceReader], plan: Plan, max_samples: int) -> Iterator[str]:
    """The first `max_samples` documents in the plan's mix, to train a tokenizer on.

    Without a tokenizer there are no token counts, so the mix counts characters: the next document comes from the source
    that lags furthest behind its share of the whole run. At most `_TEXT_LANES` windows per source are in memory.

    Args:
        config: The data config.
        readers: One per source, in the plan's order.
        plan: The run's plan, which gives each source's share.
        max_samples: The most documents to yield.

    Yields:
        The text of each document.
    """
    shares = _shares(plan)
    pool = DaemonPool(_TEXT_LANES, "jaxtrain-texts")
    streams = {reader.name: _round_robin(reader, pool) for reader in readers if shares[reader.name]}
    drawn = dict.fromkeys(streams, 0)
    try:
        while streams and max_samples:
            name = min(streams, key=lambda name: (drawn[name] / shares[name], name))
            text = next(streams[name], None)
            if text is None:
                del streams[name]
                continue
            drawn[name] += len(text)
            max_samples -= 1
            yield text
    finally:
        pool.shutdown(wait=False)
        for reader in readers:
            reader.close()


def _shares(plan: Plan) -> dict[str, float]:
    """Each source's share of the run's tokens, by the plan."""
    if plan.last_step is None:
        stage = plan.stages[-1]
        return {name: float(stage.weights.get(name, 0)) for name in plan.source_names}
    tokens = plan.source_tokens_before(plan.last_step + 1)
    return dict(zip(plan.source_names, (tokens / tokens.sum()).tolist(), strict=True))


def _round_robin(reader: SourceReader, pool: Executor) -> Iterator[str]:
    """One epoch of a source, one window per lane in turn, while the next lanes' windows are being read."""
    lanes = range(reader.options.num_lanes)
    reader.register(dict.fromkeys(lanes, Position(0, 0, 0)))
    turns = collections.deque(reader.windows(lane, Position(0, 0, 0), 1) for lane in lanes)
    coming: collections.deque[tuple[Iterator[Window], Future[Window | None]]] = collections.deque()
    while turns or coming:
        while turns and len(coming) < _TEXT_LANES:
            windows = turns.popleft()
            coming.append((windows, pool.submit(next, windows, None)))
        windows, future = coming.popleft()
        window = future.result()
        if window is not None:
            turns.append(windows)
            yield from window.texts
