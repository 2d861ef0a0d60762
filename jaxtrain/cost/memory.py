"""What a compiled step takes of a device's memory, and the fewest micro-batches with which that fits.

Batches follow from the config alone; how many rows a device takes at once follows from its memory, and changes results
by rounding only.
"""

import logging
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from jaxtrain.distributed import consensus
from jaxtrain.errors import UserError

# Kept free of what a device says it has: the next batches, an evaluation, gaps between the allocator's blocks.
_RESERVE = 0.08
# A program that the line through two measured ones puts so far above the limit is not compiled to make sure.
_CLEARLY = 1.05

logger = logging.getLogger("jaxtrain")


def limit(mesh: Mesh, memory_gb: float | None) -> int | None:
    """The most bytes that a step may take on a device: `memory_gb`, or the least that any device of the run says.

    None where the devices do not say (CPU): no limit. All processes call it.
    """
    if memory_gb is not None:
        return round(memory_gb * 1e9)
    stats = [device.memory_stats() or {} for device in mesh.local_devices]
    # In MiB, since processes exchange int32.
    known = [stat["bytes_limit"] >> 20 for stat in stats if "bytes_limit" in stat]
    least = -consensus.largest(-min(known, default=0))
    return usable(least << 20) if least else None


def usable(limit: int) -> int:
    """Bytes that a step may take of a device that has `limit` for XLA."""
    return round(limit * (1 - _RESERVE))


def held(executable: Any) -> int | None:
    """Bytes of the arrays that go in and come out: what does not depend on the number of micro-batches."""
    found = executable.memory_analysis()
    if found is None:
        return None
    # What is donated is counted on both sides. Not XLA's peak: on CPU that leaves out what is freed on the way.
    return found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def needed(executable: Any) -> int | None:
    """Bytes that a device must have for it; None where the compiler does not say."""
    arrays = held(executable)
    return None if arrays is None else arrays + executable.memory_analysis().temp_size_in_bytes


def is_exhausted(error: Exception) -> bool:
    """Whether it says that memory did not suffice. A TPU's compiler does, a GPU's first step."""
    return isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error)


def used(error: Exception) -> str:
    """What a TPU's compiler says, as " (used 24.9G of 15.7G)", or ""."""
    found = re.search(r"Used (\S+) of (\S+) hbm", str(error))
    return f" (it used {found[1]} of {found[2]})" if found else ""


def explained(error: Exception) -> UserError | None:
    """What to tell of an error of the devices, if it is that their memory did not suffice."""
    if not is_exhausted(error):
        return None
    return UserError(
        f"a device ran out of memory: {str(error).splitlines()[0]} Set memory_gb to less than what the last stage's "
        "line above says that it needs, so that it is taken in smaller parts. Other programs on a device count too."
    )


def fewest(
    counts: Sequence[int], measure: Callable[[int], int | None], most: int, at_least: Callable[[], int]
) -> int | None:
    """The first of `counts`, ascending, that needs at most `most` bytes; None if even the last needs more.

    measure: compiles, which is dear, and says the bytes, or None where the compiler gave up. Temporaries are nearly
    c + k / count, so the second look goes where the first one's share above `at_least()` (an estimate of all but k) is
    small enough, and further ones by the line through the nearest two.
    """
    low, high, index = -1, len(counts), 0  # counts[low] does not fit, counts[high] does
    known: dict[int, int] = {}
    while True:
        size = measure(counts[index])
        if size is not None:
            known[counts[index]] = size
        if size is not None and size <= most:
            high = index
        else:
            low = index
        if high - low <= 1:
            return counts[high] if high < len(counts) else None
        line = _line(known, most, at_least)
        if line is None:
            index = (low + high + 1) // 2 if high == len(counts) else (low + high) // 2
            continue
        inner = range(low + 1, high)
        fitting = [i for i in inner if line(counts[i]) <= most]
        if not fitting and high < len(counts) and len(known) > 1 and line(counts[high - 1]) > _CLEARLY * most:
            return counts[high]
        index = fitting[0] if fitting else inner[-1]


def _line(known: dict[int, int], most: int, at_least: Callable[[], int]) -> Callable[[int], float] | None:
    """Bytes by count, from the two measured counts whose bytes are nearest to `most`; None without a measurement."""
    if not known:
        return None
    (a, size_a), *others = sorted(known.items(), key=lambda item: abs(item[1] - most))
    if others:
        b, size_b = others[0]
        slope = (size_a - size_b) / (1 / a - 1 / b)
    else:
        slope = max(size_a - at_least(), 0) * a
    return lambda count: size_a + slope * (1 / count - 1 / a)
