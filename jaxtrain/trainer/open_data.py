"""What a run reads, for the run itself and for tools that look at its stream: tokenizer and sources.

Process 0 alone asks the network and tells the others what it found; if it fails, all processes raise.
"""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import jax
from etils import epath

from jaxtrain.checkpoint import restore
from jaxtrain.checkpoint.workdir import Workdir
from jaxtrain.config import Config
from jaxtrain.data import modes, pipeline
from jaxtrain.data import skipped_files as skip_lists
from jaxtrain.data.io import retry
from jaxtrain.data.io.disk_cache import DiskCache
from jaxtrain.data.modes import OpenedSource
from jaxtrain.data.skipped_files import SkippedFiles
from jaxtrain.data.source_reader import SourceReader
from jaxtrain.data.sources.huggingface import HuggingFaceSource
from jaxtrain.distributed.consensus import broadcast, broadcast_json
from jaxtrain.errors import FollowedError, TransientError, UserError
from jaxtrain.interfaces import Json, Source, Tokenizer
from jaxtrain.plan import Plan
from jaxtrain.tokenizers.training import TrainTokenizer

T = TypeVar("T")

logger = logging.getLogger("jaxtrain")


def open_all(
    config: Config,
    workdir: Workdir,
    saved: Json | None,
    cache: DiskCache | None,
    fetch: bool,
    is_tool: bool = False,
) -> tuple[Tokenizer, dict[str, OpenedSource]]:
    """The tokenizer, and every source in its mode. All processes call it.

    Args:
        saved: the data state of the checkpoint to continue from; None for a new run.
        cache, fetch: see `modes.open_sources`.
        is_tool: another run may be using the work directory: it is locked only to train a tokenizer there, and files
            are downloaded when they are first read.
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
    opened = _on_process_0(lambda: opening(identities=known_sources(config, saved)))
    if jax.process_count() > 1:
        told = {n: {"source": one.source.identity, "mode": one.mode} for n, one in (opened or {}).items()}
        told = broadcast_json(told)
        opened = opened or opening(identities=told, chosen={name: one["mode"] for name, one in told.items()})
    assert opened is not None
    for name, one in opened.items():
        logger.info("Source %s: %s, %s", name, one.mode, one.why)
    return made, opened


def known_sources(config: Config, saved: Json | None) -> dict[str, Json] | None:
    """What a checkpoint records of the config's sources."""
    if saved is None:
        return None
    return {name: saved["sources"][name] for name in config.data.sources if name in saved["sources"]}


def resolve(config: Config, saved: Json | None, cache: DiskCache | None = None) -> dict[str, Source]:
    """The sources as streams: on all processes the same commit of a moving branch.

    Args:
        saved: a checkpoint's data state, whose commits are read again; None to look the sources up now.
    """
    found = _on_process_0(lambda: pipeline.resolve(config.data, known_sources(config, saved), cache))
    if jax.process_count() > 1:
        identities = broadcast_json({name: {"source": source.identity} for name, source in (found or {}).items()})
        found = found or pipeline.resolve(config.data, identities, cache)
    assert found is not None
    return found


def build(
    config: Config, resolved: Mapping[str, Source], skips: SkippedFiles, scratch: str | None = None
) -> list[SourceReader]:
    """The sources cut into units. Process 0 asks the files how many rows they have, and tells the others."""
    cut = functools.partial(config.data.build, resolved, seed=config.seed, skips=skips, scratch=scratch)
    readers = _on_process_0(cut)
    if jax.process_count() > 1:
        footers = {name: source for name, source in resolved.items() if isinstance(source, HuggingFaceSource)}
        told = broadcast_json({name: source.known_row_groups() for name, source in footers.items()})
        for name, source in footers.items():
            source.learn_row_groups(told[name])
        readers = readers or cut()
    assert readers is not None
    return readers


def skipped(workdir: epath.PathLike, saved: Json | None) -> dict[str, dict[str, int]]:
    """Corrupt files to skip, by work directory and checkpoint: source → file → the first row that is not read."""
    found = _on_process_0(
        lambda: skip_lists.union(
            skip_lists.load(epath.Path(workdir) / "skips.json"), skip_lists.saved(saved["sources"]) if saved else {}
        )
    )
    found = broadcast_json(found)
    for source, files in found.items():
        for file, row in files.items():
            logger.info("Source %s: corrupt file %s is skipped from row %d on.", source, file, max(row, 0))
    return found


class _ElsewhereUserError(UserError, FollowedError):
    """Process 0 raises the UserError."""


class _ElsewhereTransientError(TransientError, FollowedError):
    """Process 0 raises an error that a restart may cure."""


def _on_process_0(function: Callable[[], T]) -> T | None:
    """Calls it on process 0 and returns the result there, None elsewhere. All processes raise if it fails."""
    result, failure = None, None
    if jax.process_index() == 0:
        try:
            result = function()
        except Exception as error:
            failure = error
    kind = int(broadcast([0 if failure is None else 1 if isinstance(failure, UserError) else 2])[0])
    if kind:
        text = "process 0 could not prepare the run: see its message"
        raise failure or (_ElsewhereUserError if kind == 1 else _ElsewhereTransientError)(text)
    return result


def tokenizer(
    config: Config, workdir: epath.PathLike, readers: Sequence[SourceReader], plan: Plan, *, lock: bool = False
) -> Tokenizer:
    """The config's tokenizer. A TrainTokenizer that is not yet made is trained on the run's own stream first.

    Args:
        readers: the sources to train it on.
        lock: take the work directory's lock for the training; without it the caller holds the lock.
    """
    chosen = config.tokenizer

    def train() -> None:
        if isinstance(chosen, TrainTokenizer) and chosen.needs_training(workdir):
            logger.info("Training a tokenizer on the first %s documents...", f"{chosen.max_samples:,}")
            with Workdir(workdir) if lock else contextlib.nullcontext():
                texts = pipeline.texts(config.data, readers, plan, chosen.max_samples)
                # In a thread: the main thread must see Ctrl-C, and the library does not return for minutes.
                ThreadPoolExecutor(1, "jaxtrain-tokenizer").submit(chosen.train, texts, workdir).result()

    if isinstance(chosen, TrainTokenizer):
        _on_process_0(train)
    build = functools.partial(chosen.build, os.fspath(workdir))
    return retry.attempt(build, what="tokenizer", deadline=pipeline.PATIENCE_AT_START)


def for_writing(config: Config, workdir: str, begun: Mapping[str, Json]) -> tuple[dict[str, Source], Tokenizer]:
    """Sources and tokenizer for a tool that writes a store of them.

    Args:
        begun: identities of sources that a worker has already recorded; a checkpoint in the work directory comes first.
    """
    known: dict[str, Json] = {name: {"source": source} for name, source in begun.items()}
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
