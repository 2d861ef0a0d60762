"""Opens the tokenizer and sources of a run, for the run and for tools that read its stream.

Only process 0 queries the network; it broadcasts the result. If it fails, all processes raise.
"""

import collections
import contextlib
import difflib
import functools
import json
import logging
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
from etils import epath

from jaxtrain.checkpoint import restore
from jaxtrain.checkpoint.workdir import Workdir, write_atomically
from jaxtrain.config import Config
from jaxtrain.data import forgotten as forgotten_lists
from jaxtrain.data import modes, pipeline
from jaxtrain.data import skipped_files as skip_lists
from jaxtrain.data.forgotten import Documents, Forgotten
from jaxtrain.data.io import retry
from jaxtrain.data.io.disk_cache import DiskCache
from jaxtrain.data.modes import OpenedSource
from jaxtrain.data.skipped_files import SkippedFiles
from jaxtrain.data.source_reader import Position, SourceReader
from jaxtrain.data.sources.huggingface import HuggingFaceSource
from jaxtrain.data.stores.record_store import Manifest
from jaxtrain.data.tokenizing import documents_of
from jaxtrain.distributed.consensus import broadcast, broadcast_json, on_process_0
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, Source, Tokenizer
from jaxtrain.plan import Plan
from jaxtrain.tokenizers.training import TrainTokenizer

_FAILED = "process 0 could not prepare the run: see its message"

_ROWS_OF_ESTIMATE = 1000

logger = logging.getLogger("jaxtrain")


def open_all(
    config: Config,
    workdir: Workdir,
    saved: Json | None,
    cache: DiskCache | None,
    fetch: bool,
    is_tool: bool = False,
) -> tuple[Tokenizer, dict[str, OpenedSource]]:
    """Opens the tokenizer, and every source in its mode. All processes must call it.

    Args:
        config: the run's config.
        workdir: the work directory.
        saved: data state of the checkpoint to continue from; None for a new run.
        cache: see `modes.open_sources`.
        fetch: see `modes.open_sources`.
        is_tool: another run may be using the work directory, so it is locked only to train a tokenizer, and files are
            downloaded on first use.
    """
    readers, streams = [], None
    needs_training = isinstance(config.tokenizer, TrainTokenizer) and config.tokenizer.needs_training(workdir.path)
    if bool(broadcast([needs_training])[0]):  # process 0 decides
        streams = resolve(config, saved, cache)
        readers = config.data.build(streams, seed=config.seed)
    made = tokenizer(config, workdir.path, readers, config.plan(), lock=is_tool)
    for reader in readers:
        reader.close()
    opening = functools.partial(
        modes.open_sources,
        config.data,
        made,
        os.fspath(workdir.tokens),
        streams=streams,
        cache=cache,
        fetch=fetch,
        ahead=not is_tool,
    )
    opened = on_process_0(lambda: opening(identities=known_sources(config, saved)), _FAILED)
    if jax.process_count() > 1:
        told = {n: {"source": one.source.identity, "mode": one.mode} for n, one in (opened or {}).items()}
        told = broadcast_json(told)
        opened = opened or opening(identities=told, chosen={name: one["mode"] for name, one in told.items()})
    assert opened is not None
    for name, one in opened.items():
        logger.info("Source %s: %s, %s", name, one.mode, one.why)
    return made, opened


def known_sources(config: Config, saved: Json | None) -> dict[str, Json] | None:
    """Returns what a checkpoint records about the config's sources; None without a checkpoint."""
    if saved is None:
        return None
    return {name: saved["sources"][name] for name in config.data.sources if name in saved["sources"]}


def resolve(config: Config, saved: Json | None, cache: DiskCache | None = None) -> dict[str, Source]:
    """Resolves the sources as streams. If a branch moves meanwhile, all processes still use the same commit.

    Args:
        config: the run's config.
        saved: a checkpoint's data state, to read the same commits; None to look the sources up now.
        cache: the disk cache, if there is one.
    """
    found = on_process_0(lambda: pipeline.resolve(config.data, known_sources(config, saved), cache), _FAILED)
    if jax.process_count() > 1:
        identities = broadcast_json({name: {"source": source.identity} for name, source in (found or {}).items()})
        found = found or pipeline.resolve(config.data, identities, cache)
    assert found is not None
    return found


def build(
    config: Config,
    resolved: Mapping[str, Source],
    skipped: SkippedFiles,
    forgotten: Documents,
    scratch: str | None = None,
) -> list[SourceReader]:
    """Splits the sources into units. Process 0 reads the row counts of the files and broadcasts them.

    Raises:
        UserError: a lane gets no document, as far as row counts show. Nothing is compiled yet.
    """

    def cut() -> list[SourceReader]:
        readers = config.data.build(resolved, seed=config.seed, skipped=skipped, forgotten=forgotten, scratch=scratch)
        for reader in readers:
            reader.check_lanes()
        return readers

    readers = on_process_0(cut, _FAILED)
    if jax.process_count() > 1:
        footers = {name: source for name, source in resolved.items() if isinstance(source, HuggingFaceSource)}
        told = broadcast_json({name: source.known_row_groups() for name, source in footers.items()})
        for name, source in footers.items():
            source.learn_row_groups(told[name])
        readers = readers or cut()
    assert readers is not None
    return readers


def skipped(workdir: epath.PathLike, saved: Json | None) -> dict[str, dict[str, int]]:
    """Corrupt files to skip, from the work directory and the checkpoint: source → file → first row not read."""
    found = on_process_0(
        lambda: skip_lists.union(
            skip_lists.load(epath.Path(workdir) / "skips.json"), skip_lists.saved(saved["sources"]) if saved else {}
        ),
        _FAILED,
    )
    found = broadcast_json(found)
    for source, files in found.items():
        for file, row in files.items():
            logger.info("Source %s: corrupt file %s is skipped from row %d on.", source, file, max(row, 0))
    return found


def save_forgotten(workdir: epath.PathLike, found: Forgotten) -> None:
    """Replaces the work directory's list. Call it on process 0."""
    write_atomically(epath.Path(workdir) / forgotten_lists.FILE, json.dumps(found.to_json(), indent=1) + "\n")


def forgotten(config: Config, workdir: epath.PathLike, saved: Json | None, is_run: bool = False) -> Forgotten:
    """Documents to leave out, from the work directory, the checkpoint and `data.forget`.

    Those that are new in `data.forget` are left out from the next step on.

    Args:
        config: the run's config.
        workdir: the work directory.
        saved: the data state of the checkpoint to continue from, if any.
        is_run: whether the list is written to the work directory.
    """
    path, step = epath.Path(workdir) / forgotten_lists.FILE, 1 + (saved["step"] if saved else 0)

    def read() -> Json:
        # What a checkpoint was trained without counts more than the file.
        found = forgotten_lists.from_json((saved or {}).get("forgotten", Forgotten().to_json()), step)
        if path.exists():
            found.learn(forgotten_lists.load(path))
        if config.data.forget:
            asked = forgotten_lists.load(epath.Path(config.data.forget), step)
            unknown = min(asked.documents.keys() - config.data.sources.keys(), default=None)
            if unknown is not None:
                near = difflib.get_close_matches(unknown, config.data.sources) or list(config.data.sources)
                raise UserError(
                    f"data.forget={config.data.forget}: there is no source {unknown!r}; did you mean "
                    f"{' or '.join(near)}?"
                )
            found.learn(asked)
        if is_run and found.documents:
            save_forgotten(workdir, found)
        return found.to_json()

    found = forgotten_lists.from_json(broadcast_json(on_process_0(read, _FAILED)), step)
    for source, files in found.documents.items():
        count = sum(map(len, files.values()))
        logger.info("Source %s: %s document(s) are left out (%s).", source, f"{count:,}", path.name)
    return found


def tokenizer(
    config: Config, workdir: epath.PathLike, readers: Sequence[SourceReader], plan: Plan, *, lock: bool = False
) -> Tokenizer:
    """Builds the config's tokenizer. A TrainTokenizer is first trained on the run's stream if necessary.

    Args:
        config: the run's config.
        workdir: the work directory.
        readers: the sources to train it on.
        plan: the run's plan, which determines the mix.
        lock: take the work directory's lock for the training; otherwise the caller must hold it.
    """
    chosen = config.tokenizer

    def train() -> None:
        if isinstance(chosen, TrainTokenizer) and chosen.needs_training(workdir):
            logger.info("Training a tokenizer on the first %s documents...", f"{chosen.max_samples:,}")
            with Workdir(workdir) if lock else contextlib.nullcontext():
                texts = pipeline.texts(config.data, readers, plan, chosen.max_samples)
                # In a thread, so that the main thread can handle Ctrl-C: the library does not return for minutes.
                ThreadPoolExecutor(1, "jaxtrain-tokenizer").submit(chosen.train, texts, workdir).result()

    if isinstance(chosen, TrainTokenizer):
        on_process_0(train, _FAILED)
    build = functools.partial(chosen.build, os.fspath(workdir))
    return retry.attempt(build, what="tokenizer", deadline=pipeline.PATIENCE_AT_START)


def horizon(
    config: Config, readers: Sequence[SourceReader], tokenizer: Tokenizer, plan: Plan, saved: Json | None
) -> int:
    """Estimates the tokens of a run that only `epochs` ends, for its schedules. All processes must call it.

    The sources' rows are counted, and the tokens of their first documents. The estimate of the first start holds for
    the whole run. Returns the tokens until the last source ends.

    Raises:
        UserError: Nothing says how many rows a source has.
    """
    if saved is not None and "horizon" in saved["plan"]:
        return saved["plan"]["horizon"]
    assert config.epochs is not None
    epochs, last = config.epochs, plan.stages[-1]
    before = plan.source_tokens_before(last.first_step)

    def estimate() -> int:
        rest = 0.0
        for index, reader in enumerate(readers):
            if weight := last.weights.get(reader.name):
                tokens = epochs * _tokens_of_epoch(reader, tokenizer, config) * last.seq_len / last.stride
                rest = max(rest, (tokens - int(before[index])) / float(weight))
        return last.first_token + math.ceil(rest)

    found = broadcast_json({"horizon": on_process_0(estimate, _FAILED)})["horizon"]
    logger.info("The sources have about %s tokens in %d epoch(s): schedules assume that.", f"{found:,}", epochs)
    return found


def _tokens_of_epoch(reader: SourceReader, tokenizer: Tokenizer, config: Config) -> float:
    """Tokens of a source's epoch, from its rows and the tokens of about the first thousand."""
    if reader.most_rows is None:
        raise UserError(
            f"epochs={config.epochs} ends the run, but the number of documents of source {reader.name!r} is "
            f"unknown, which the schedule {type(config.optimizer.schedule).__name__} needs: set total_tokens or steps, "
            f"data.sources.{reader.name}.max_samples, or optimizer.schedule=Constant with warmup_tokens"
        )
    lanes, start = reader.options.num_lanes, Position(0, 0, 0)
    spec = config.data.row_spec(tokenizer, config.epochs)
    reader.register(dict.fromkeys(range(lanes), start))
    turns = collections.deque((lane, reader.windows(lane, start, 1)) for lane in range(lanes))
    rows = tokens = 0
    while turns and rows < _ROWS_OF_ESTIMATE:
        lane, windows = turns.popleft()
        window = next(windows, None)
        if window is None:
            continue
        turns.append((lane, windows))
        rows += window.rows
        # Not from the epoch's start: a first window without a token is no empty lane.
        documents = documents_of(iter((window,)), Position(-1, 0, 0), spec, reader, lane)
        tokens += sum(int(some.lengths.sum()) for some in documents)
    reader.close()
    return tokens / rows * reader.most_rows if turns and rows else tokens


def for_writing(
    config: Config, workdir: str, store: type[Manifest], output: str
) -> tuple[dict[str, Source], Tokenizer]:
    """Opens sources and tokenizer for a tool that writes stores of them.

    Sources are those of the work directory's checkpoint, else of the store that a worker has begun.

    Args:
        config: the run's config.
        workdir: the work directory.
        store: the kind of store.
        output: the folder of the stores.
    """
    begun = {name: store.planned(os.path.join(output, name)) for name in config.data.sources}
    known = {name: {"source": manifest.source} for name, manifest in begun.items() if manifest is not None}
    if restore.is_checkpoint(workdir):
        known |= known_sources(config, restore.load_data(workdir)) or {}
    sources = pipeline.resolve(config.data, known)
    with contextlib.ExitStack() as reading:
        readers = []
        if isinstance(config.tokenizer, TrainTokenizer) and config.tokenizer.needs_training(workdir):
            readers = config.data.build(sources, seed=config.seed)
            for reader in readers:
                reading.callback(reader.close)
        return sources, tokenizer(config, workdir, readers, config.plan(), lock=True)
