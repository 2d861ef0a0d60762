"""Shared by the benchmarks: interleaved measurements, medians, and a description of the machine."""

import contextlib
import dataclasses
import importlib.metadata
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from jaxtrain.cli import Flag
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json
from jaxtrain.tokenizers.sentencepiece import available_cores

_LOAD_BEFORE = os.getloadavg()[0]  # average over the minute before this process
_PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "pyarrow",
    "sentencepiece",
    "tokenizers",
    "fastokens",
    "huggingface-hub",
    "torch",
)


def progress(message: str) -> None:
    """Prints a progress line to stderr. stdout has only the result."""
    print(message, file=sys.stderr, flush=True)


def rounds_flag(default: int) -> Flag:
    return Flag(name="rounds", type=int, default=default, help="interleaved rounds of measurements")


def at_least_one(**values: int) -> None:
    """Raises UserError if a value is below 1."""
    for name, value in values.items():
        if value < 1:
            raise UserError(f"--{name}={value}: give 1 or more")


@dataclasses.dataclass(frozen=True)
class Spent:
    """Elapsed seconds, and CPU seconds of all threads of this process."""

    wall: float
    cpu: float


class Stopwatch:
    """Starts when it is created."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def spent(self) -> Spent:
        return Spent(time.perf_counter() - self._wall, time.process_time() - self._cpu)


def in_turns(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[Spent]]:
    """Runs all functions in turns, `rounds` times, so that other load affects them equally. Returns their times."""
    spent: dict[str, list[Spent]] = {name: [] for name in runs}
    for number in range(1, rounds + 1):
        for name, run in runs.items():
            watch = Stopwatch()
            run()
            spent[name].append(watch.spent())
        last = ((name, spent[name][-1]) for name in runs)
        shown = ", ".join(f"{name} {one.wall:.4g} s (CPU {one.cpu:.4g})" for name, one in last)
        progress(f"round {number} of {rounds}: {shown}")
    return spent


def walls(spent: Sequence[Spent]) -> list[float]:
    return [one.wall for one in spent]


def cpus(spent: Sequence[Spent]) -> list[float]:
    return [one.cpu for one in spent]


@contextlib.contextmanager
def one_core() -> Iterator[bool]:
    """Pins threads started inside the context to one core. Yields whether the system supports pinning."""
    if not hasattr(os, "sched_setaffinity"):
        yield False
        return
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield True
    finally:
        os.sched_setaffinity(0, cores)


def median(values: Sequence[float]) -> float:
    """Returns the median, to four significant digits."""
    return short(statistics.median(values))


def ratio(these: Sequence[float], those: Sequence[float]) -> float:
    """Returns the median of the per-round ratios, which cancels varying load."""
    return median([a / b for a, b in zip(these, those, strict=True)])


def short(value: float) -> float:
    return float(f"{value:.4g}")


def result(benchmark: str, numbers: Json, *, device: bool) -> Json:
    """Returns the JSON object to print.

    Args:
        benchmark: Name of the benchmark.
        numbers: Its results.
        device: Whether to describe JAX's devices.
    """
    return {"benchmark": benchmark, **numbers, "versions": versions(), "machine": _machine(device)}


def versions() -> Json:
    """Returns versions of Python and of the relevant packages; null for one that is not installed."""
    found: Json = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _machine(device: bool) -> Json:
    about: Json = {
        "system": platform.system(),
        "processor": platform.machine(),
        "cores": available_cores(),
        # Above 0, other programs compete. CPU seconds on one core hardly change, elapsed seconds do.
        "load_before": short(_LOAD_BEFORE),
    }
    return about | {"device": device_name(), "devices": _devices()} if device else about


def device_name() -> str:
    return str(_jax().devices()[0].device_kind)


def _devices() -> int:
    return int(_jax().device_count())


def _jax() -> Any:
    import jax

    return jax
