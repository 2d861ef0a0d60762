"""Part of `bench data`: the three modes (docs/data.md) on one dataset, served over HTTP by this process.

`wait` is the number of seconds from resolving the source to the first batch, including all downloads before it.
"""

import dataclasses
import os
import pathlib
from collections.abc import Sequence

from jaxtrain.data import modes, pipeline
from jaxtrain.data.io.disk_cache import DiskCache
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.stores import writer
from jaxtrain.interfaces import Json, Tokenizer
from jaxtrain.plan import Plan
from tools.bench import stream
from tools.bench.common import Stopwatch, median, progress, ratio
from tools.bench.range_server import serving

_MODES = ("stream", "download", "pretokenized")


def measure(
    paths: Sequence[str], data: DataConfig, plan: Plan, tokenizer: Tokenizer, tokens: int, folder: str, rounds: int
) -> Json:
    """Measures epochs in each mode, in turns.

    Args:
        paths: Parquet files.
        data: The data config.
        plan: The plan of an epoch.
        tokenizer: The tokenizer.
        tokens: Number of tokens in an epoch.
        folder: Folder for caches and stores of the modes.
        rounds: Number of epochs per mode.

    Returns:
        Medians over the rounds.
    """
    root = os.path.dirname(paths[0])
    with serving(root) as server:
        urls = [server.url(pathlib.Path(path).name) for path in paths]
        remote = dataclasses.replace(data, sources=stream.config(urls, num_lanes=data.num_lanes, workers=1).sources)
        writing = Stopwatch()
        _write(remote, tokenizer, f"{folder}/tokens")
        written = writing.spent()
        waits: dict[str, list[float]] = {mode: [] for mode in _MODES}
        cpu: dict[str, list[float]] = {mode: [] for mode in _MODES}
        for number in range(1, rounds + 1):
            for mode in _MODES:
                wait, seconds = _epoch(dataclasses.replace(remote, mode=mode), plan, tokenizer, folder, number)
                waits[mode].append(wait)
                cpu[mode].append(seconds)
            shown = ", ".join(f"{mode} {waits[mode][-1]:.2f} s, then CPU {cpu[mode][-1]:.2f} s" for mode in _MODES)
            progress(f"modes, round {number} of {rounds}: wait {shown}")
    found: Json = {
        mode: {
            "wait_seconds": median(waits[mode]),
            "tokens_per_cpu_second": median([tokens / one for one in cpu[mode]]),
            "times_stream": ratio(cpu["stream"], cpu[mode]),
        }
        for mode in _MODES
    }
    return {**found, "writing_cpu_seconds": round(written.cpu, 2), "store_bytes": _size(f"{folder}/tokens")}


def _write(data: DataConfig, tokenizer: Tokenizer, folder: str) -> None:
    for name, source in pipeline.resolve(data).items():
        job = writer.Job(name, f"{folder}/{name}", data.sources[name], source, tokenizer, retry_seconds=60.0)
        writer.write_tokens(job, 0, 1, lambda documents, tokens: None)


def _epoch(data: DataConfig, plan: Plan, tokenizer: Tokenizer, folder: str, number: int) -> tuple[float, float]:
    """Returns (seconds to the first batch, CPU seconds of the epoch, excluding downloads before it)."""
    wait = Stopwatch()
    cache = DiskCache(f"{folder}/cache-{number}", max_gb=1.0)
    opened = modes.open_sources(data, tokenizer, f"{folder}/tokens", cache=cache)
    watch = Stopwatch()
    first = None
    resolved = {name: one.source for name, one in opened.items()}
    with stream.batches(data, plan, tokenizer, resolved=resolved) as batches:
        for batch in batches:
            first = first or wait.spent().wall
            if batch.ended:
                break
        spent = watch.spent()
    assert first is not None
    return first, spent.cpu


def _size(folder: str) -> int:
    return sum(path.stat().st_size for path in pathlib.Path(folder).rglob("*") if path.is_file())
