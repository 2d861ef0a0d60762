"""What a run reads, for the run itself and for the tools that look at its stream: tokenizer and sources."""

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import jax
from etils import epath

from jaxtrain.checkpoint.workdir import Workdir
from jaxtrain.config import Config
from jaxtrain.data import modes, pipeline, skipped_files
from jaxtrain.data.io import retry
from jaxtrain.data.io.disk_cache import DiskCache
from jaxtrain.data.modes import OpenedSource
from jaxtrain.data.source_reader import SourceReader
from jaxtrain.data.sources.huggingface import HuggingFaceSource
from jaxtrain.distributed.consensus import broadcast, broadcast_json
from jaxtrain.errors import FollowedError, TransientError, UserError
from jaxtrain.interfaces import Json, Source, Tokenizer
from jaxtrain.plan import Plan
from jaxtrain.tokenizers.training import TrainTokenizer

logger = logging.getLogger("jaxtrain")


def open_all(
    config: Config,
    workdir: Workdir,
    saved: Json | None,
    cache: DiskCache | None,
    fetch: bool,
    is_tool: bool = False,
) -> tuple[Tokenizer, dict[str, OpenedSource]]:
    """The tokenizer, and every source in its mode. All processes call it; process 0 asks the network and decides.

    saved: the data state of the checkpoint to go on from; None for a new run. cache, fetch: see `modes.open_sources`.
    is_tool: the work directory may be another's, of a run under way: it is locked only to train a tokenizer there, and
    what is downloaded is downloaded as it is read.
    """
    plan, readers = config.plan(), []
    streams: dict[str, Source] | None = None
    if agreed(isinstance(config.tokenizer, TrainTokenizer) and config.tokenizer.needs_training(workdir.path)):
        streams = resolve(config, saved, cache)
        readers = config.data.build(streams, seed=config.seed)
    made = (tokenizer_for_tool if is_tool else tokenizer)(config, workdir.path, readers, plan)
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
    opened = _open_sources(opening, known_sources(config, saved))
    for name, one in opened.items():
        logger.info("Source %s: %s, %s", name, one.mode, one.why)
    return made, opened


def _open_sources(
    opening: Callable[..., dict[str, OpenedSource]], known: Mapping[str, Json] | None
) -> dict[str, OpenedSource]:
    opened: dict[str, OpenedSource] = {}
    failure = None
    if jax.process_index() == 0:
        try:
            opened = opening(identities=known)
        except Exception as error:
            failure = error
    _all_or_none(failure)
    if jax.process_count() > 1:
        told = broadcast_json({n: {"source": one.source.identity, "mode": one.mode} for n, one in opened.items()})
        if not opened:
            chosen = {name: one["mode"] for name, one in told.items()}
            opened = opening(identities=told, chosen=chosen)
    return opened


def known_sources(config: Config, saved: Json | None) -> dict[str, Json] | None:
    """What a checkpoint says of the config's sources."""
    if saved is None:
        return None
    return {name: saved["sources"][name] for name in config.data.sources if name in saved["sources"]}


def resolve(config: Config, saved: Json | None, cache: DiskCache | None = None) -> dict[str, Source]:
    """The sources as streams. Process 0 asks, and tells the others what it found: the same commit of a moving branch.

    saved: a checkpoint's data state, whose commits are read again; None to look the sources up now.
    """
    known = known_sources(config, saved)
    if jax.process_count() == 1:
        return pipeline.resolve(config.data, known, cache)
    found, failure = {}, None
    if jax.process_index() == 0:
        try:
            found = pipeline.resolve(config.data, known, cache)
        except Exception as error:
            failure = error
    _all_or_none(failure)
    identities = broadcast_json({name: {"source": source.identity} for name, source in found.items()})
    return found or pipeline.resolve(config.data, identities, cache)


def build(
    config: Config, resolved: Mapping[str, Source], given_up: skipped_files.SkippedFiles, scratch: str | None = None
) -> list[SourceReader]:
    """The sources cut into units. Process 0 asks the files how many rows they have, and tells the others."""
    cut = functools.partial(config.data.build, resolved, seed=config.seed, skips=given_up, scratch=scratch)
    if jax.process_count() == 1:
        return cut()
    readers: list[SourceReader] = []
    failure = None
    if jax.process_index() == 0:
        try:
            readers = cut()
        except Exception as error:
            failure = error
    _all_or_none(failure)
    footers = {name: source for name, source in resolved.items() if isinstance(source, HuggingFaceSource)}
    told = broadcast_json({name: source.known_row_groups() for name, source in footers.items()})
    for name, source in footers.items():
        source.learn_row_groups(told[name])
    return readers or cut()


def agreed(yes: bool) -> bool:
    """What process 0 says."""
    return bool(int(broadcast([yes])[0]))


def skipped(workdir: epath.PathLike, saved: Json | None) -> dict[str, dict[str, int]]:
    """What is given up, for all processes alike: what the work directory and the checkpoint say, by process 0.

    Source → file → the first row that is not read.
    """
    found, failure = {}, None
    if jax.process_index() == 0:
        try:
            found = skipped_files.union(
                skipped_files.load(epath.Path(workdir) / "skips.json"),
                skipped_files.saved(saved["sources"]) if saved else {},
            )
        except UserError as error:
            failure = error
    _all_or_none(failure)
    found = broadcast_json(found)
    for source, files in found.items():
        for file, row in files.items():
            logger.info("Source %s: corrupt file %s is skipped from row %d on.", source, file, max(row, 0))
    return found


class _ElsewhereUserError(UserError, FollowedError):
    """Process 0 raises the UserError."""


class _ElsewhereTransientError(TransientError, FollowedError):
    """Process 0 raises what a restart may cure."""


def _all_or_none(failure: Exception | None) -> None:
    """All processes raise if process 0 failed: what the user must change, or what a restart may cure."""
    kind = int(broadcast([0 if failure is None else 1 if isinstance(failure, UserError) else 2])[0])
    if kind:
        text = "process 0 could not prepare the run: see its message"
        raise failure or (_ElsewhereUserError if kind == 1 else _ElsewhereTransientError)(text)


def tokenizer(config: Config, workdir: epath.PathLike, readers: Sequence[SourceReader], plan: Plan) -> Tokenizer:
    """The config's tokenizer; trained on the run's own stream first, by process 0, if that is what it is.

    The caller holds the work directory's lock.
    """
    chosen = config.tokenizer
    if isinstance(chosen, TrainTokenizer):
        failure = None
        if jax.process_index() == 0 and chosen.needs_training(workdir):
            logger.info("Training a tokenizer on the first %s documents...", f"{chosen.max_samples:,}")
            try:
                # In a thread, as it is minutes in a library, in which the main thread would not see Ctrl-C.
                texts = pipeline.texts(config.data, readers, plan, chosen.max_samples)
                ThreadPoolExecutor(1, "jaxtrain-tokenizer").submit(chosen.train, texts, workdir).result()
            except Exception as error:
                failure = error
        _all_or_none(failure)
    build = functools.partial(chosen.build, os.fspath(workdir))
    return retry.attempt(build, what="tokenizer", deadline=pipeline.PATIENCE_AT_START)


def tokenizer_for_tool(
    config: Config, workdir: epath.PathLike, readers: Sequence[SourceReader], plan: Plan
) -> Tokenizer:
    """As `tokenizer`, and takes the lock only where it has to train: a tool may look at a run that is under way."""
    chosen = config.tokenizer
    with contextlib.ExitStack() as held:
        if isinstance(chosen, TrainTokenizer) and chosen.needs_training(workdir):
            workdir = held.enter_context(Workdir(workdir)).path
        return tokenizer(config, workdir, readers, plan)
