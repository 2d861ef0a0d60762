"""Implements `--dry_run`: compiles the whole run, reads one batch and prints a report, without training."""

import logging
import math
import os
import shutil
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from jaxtrain import cli
from jaxtrain.checkpoint.workdir import Workdir
from jaxtrain.data import ledger, pipeline
from jaxtrain.data.io.disk_cache import DiskCache
from jaxtrain.errors import UserError
from jaxtrain.interfaces import CacheableSource
from jaxtrain.trainer import state
from jaxtrain.trainer.session import Session

logger = logging.getLogger("jaxtrain")


def describe(session: Session, workdir: Workdir) -> None:
    """Prints plan, parameters, memory, disk and data.

    Raises:
        UserError: a stage does not fit in a device's memory, or checkpoints and caches do not fit on the disk.
    """
    model = session.components.model
    logger.info(session.plan.table())
    logger.info(f"\nParameters: {model.num_params:,} ({model.num_params_non_embedding:,} without embeddings)")
    mesh = dict(session.components.mesh.shape)
    logger.info(f"Mesh: {mesh} on {jax.device_count()} x {jax.devices()[0].device_kind}")
    _describe_data(session)  # before the compiler's minutes: a source may be unreadable, or too small for its lanes
    _describe_memory(session)
    _describe_disk(session, workdir)


def _describe_memory(session: Session) -> None:
    """Compiles every stage, the evaluation and the tasks. Raises UserError listing all that do not fit."""
    logger.info("\nMemory of each device, by the compiler's analysis:")
    compiles: list[Callable[[], Any]] = [
        lambda s=shape: session.programs.last_program(*s) for shape in session.programs.shapes
    ]
    if session.eval_plan is not None:
        compiles.append(session.programs.evaluation)
    if session.config.eval.tasks:
        session.add_tasks()
        compiles.append(session.programs.tasks)
    misfits: dict[str, None] = {}
    for compile in compiles:
        try:
            compile()
        except UserError as error:
            misfits[str(error)] = None
    if misfits:
        raise UserError("\n".join(misfits))


def _describe_disk(session: Session, workdir: Workdir) -> None:
    config, components, cache = session.config.checkpoint, session.components, session.cache
    arrays = jax.tree.leaves(state.abstract(components.model, components.optimizer, components.mesh))
    size = sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in arrays)
    kept = config.most_at_once(session.plan.last_step)
    logger.info(f"\nDisk: a checkpoint has {cli.size(size)}, at most {kept} at once: {cli.size(size * kept)}")
    growth = 0
    if cache is not None:
        most, used = _cache_bytes(session, cache), cache.used_bytes()
        growth = max(most - used, 0)
        logger.info(f"  disk cache: at most {cli.size(most)}, {cli.size(used)} used ({cache.directory})")
        if not workdir.is_local:
            _check_free(session.scratch, growth, "the disk cache needs", "data.max_disk_gb")
    if workdir.is_local:
        what = "the checkpoints need" if cache is None else "checkpoints and disk cache need"
        fields = "checkpoint.keep" if cache is None else "checkpoint.keep or data.max_disk_gb"
        _check_free(os.fspath(workdir.path), size * kept + growth, what, fields)


def _check_free(folder: str, needed: int, what: str, fields: str) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder} has {cli.size(free)} free, {what} {cli.size(needed)}: lower {fields}, or give a --workdir on a "
            "larger disk"
        )


def _cache_bytes(session: Session, cache: DiskCache) -> int:
    """Maximum size of the disk cache in bytes: its limit, or the size of all files if smaller."""
    total = 0
    for name, source in session.sources.items():
        if session.modes[name] == "download" or pipeline.wants_cache(source):
            assert isinstance(source, CacheableSource)
            if source.file_bytes is None:
                return cache.limit
            total += sum(source.file_bytes)
    return min(total, cache.limit)


def _describe_data(session: Session) -> None:
    """Reads one batch, to check that every source is reachable and to measure documents."""
    plan, names = session.plan, session.plan.source_names
    if session.is_complete:
        logger.info(f"\nThe run is complete: step {session.start_step:,}. No batch is left to read.")
        return
    batch = next(session.feed)
    totals = ledger.by_source(session.gather(batch), names)
    tokens = None if plan.last_step is None else plan.source_tokens_before(plan.last_step + 1)
    logger.info(f"\nData ({session.config.data.mode}), one batch read:")
    for index, name in enumerate(names):
        if tokens is None:
            logger.info(f"  {name}: until the data ends")
            continue
        line, now = f"  {name}: {int(tokens[index]):,} tokens", totals[name]
        if now["documents"]:
            length = now["unique_tokens"] / now["documents"]
            documents = int(tokens[index]) / length
            line += f", about {documents:,.0f} documents (by the first {now['documents']:,}, of {length:,.0f} tokens)"
            rows = session.readers[index].rows
            if rows is not None:
                line += f", {documents / max(rows, 1):,.2f} epochs of {rows:,} documents"
        logger.info(line)
