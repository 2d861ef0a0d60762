"""Memory of a compiled step on a device, and the fewest micro-batches with which it fits.

Batches depend only on the config. The number of rows per micro-batch depends on a device's memory, and changes results
only by rounding.
"""

import logging
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtrain.cost.hardware import Chip
from jaxtrain.distributed import consensus, processes
from jaxtrain.errors import UserError

# Kept free: the next batches, fragmentation of the allocator.
_RESERVE = 0.08

logger = logging.getLogger("jaxtrain")


def limit(mesh: Mesh, memory_gb: float | None) -> int | None:
    """The most bytes of a device that a step may use. All processes must call it.

    Args:
        memory_gb: the config's limit, in 10^9 bytes; None for the smallest limit that any device of the run reports.

    Returns:
        None if the devices report none (CPU): no limit.
    """
    if memory_gb is not None:
        return round(memory_gb * 1e9)
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    # In MiB, since processes exchange int32.
    known = [stat["bytes_limit"] >> 20 for stat in stats if "bytes_limit" in stat]
    least = -consensus.largest(-min(known, default=0))
    return _usable(least << 20) if least else None


def limit_of_chip(chip: Chip, memory_gb: float | None) -> int:
    """What `limit` would return on chips of this kind, without any present."""
    if memory_gb is not None:
        return round(memory_gb * 1e9)
    given = (os.environ.get(name) for name in processes.SHARE_VARIABLES)
    share = float(next(filter(None, given), processes.GPU_SHARE)) if chip.platform == "gpu" else 1.0
    return _usable(round(chip.memory * share))


def _usable(limit: int) -> int:
    return round(limit * (1 - _RESERVE))


def held(executable: Any) -> int | None:
    """Bytes of a program's arguments and results, which do not depend on the number of micro-batches.

    Returns:
        None if the compiler does not report memory.
    """
    found = executable.memory_analysis()
    if found is None:
        return None
    # Donated arrays are counted on both sides. Not XLA's peak: on CPU that omits what is freed along the way.
    return found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def needed(executable: Any) -> int | None:
    """Bytes that a device needs to run a program; None if the compiler does not report memory."""
    arrays = held(executable)
    return None if arrays is None else arrays + executable.memory_analysis().temp_size_in_bytes


def is_exhausted(error: Exception) -> bool:
    """Whether an error means that memory was too small. On TPUs the compiler raises it, on GPUs the first step."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def used(error: Exception) -> str:
    """What a TPU's compiler reports, as " (it used 24.9G of 15.7G)", or ""."""
    found = re.search(r"Used (\S+) of (\S+) hbm", str(error))
    return f" (it used {found[1]} of {found[2]})" if found else ""


def explained(error: Exception) -> UserError | None:
    """The message for a device's error, if the device ran out of memory."""
    if not is_exhausted(error):
        return None
    return UserError(
        f"a device ran out of memory: {str(error).splitlines()[0]} Set memory_gb below what the last line above "
        "gives for a stage: it is then split into more micro-batches. Other programs on the device count too."
    )


def fewest(counts: Sequence[int], measure: Callable[[int], int | None], most: int) -> int | None:
    """The smallest of `counts` that needs at most `most` bytes; None if none does.

    The first count usually fits. If not, bisection: needs fall as the count grows.

    Args:
        counts: numbers of micro-batches, ascending.
        measure: compiles (expensive) and returns the memory needed, in bytes; None if the compiler ran out of memory.
    """
    low, high, index = -1, len(counts), 0  # counts[low] does not fit, counts[high] does
    while high - low > 1:
        size = measure(counts[index])
        if size is not None and size <= most:
            high = index
        else:
            low = index
        index = (low + high) // 2 if high < len(counts) else (low + high + 1) // 2
    return counts[high] if high < len(counts) else None


class NothingFitsError(Exception):
    """No number of micro-batches fits.

    Attributes:
        needs: what the smallest micro-batches need, as text.
    """

    def __init__(self, needs: str):
        super().__init__(needs)
        self.needs = needs


def fit(counts: Sequence[int], compile: Callable[[int], Any], limit: int | None, extra: int = 0) -> tuple[int, Any]:
    """The number of micro-batches, and its executable, with the fewest micro-batches that fit into a device.

    Args:
        counts: numbers of micro-batches, ascending.
        compile: number of micro-batches → executable.
        limit: bytes of a device; None takes the first count.
        extra: bytes on the device besides the program's arguments, such as optimizer state in evaluations.

    Raises:
        NothingFitsError: if even the last count does not fit.
    """
    if limit is None:
        return counts[0], compile(counts[0])
    tried: dict[int, Any] = {}
    needs = ""

    def measure(count: int) -> int | None:
        nonlocal needs
        try:
            tried[count] = compile(count)
        except jax.errors.JaxRuntimeError as error:
            if not is_exhausted(error):
                raise
            needs = f"more than the compiler could fit{used(error)}"
            return None
        # A compiler that does not report memory cannot be held to a limit.
        size = (needed(tried[count]) or -extra) + extra
        needs = f"{size / 1e9:.3g} GB"
        return size

    count = fewest(counts, measure, limit)
    if count is None:
        raise NothingFitsError(needs)
    return count, tried[count]
