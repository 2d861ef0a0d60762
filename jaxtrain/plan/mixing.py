"""Which source every row of a batch comes from: exact integers, a pure function of weights, seed and step.

Shapes: S sources, B rows per batch, N rows of a stage so far (batches × B).
"""

import functools
import itertools
import math
import threading
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from jaxtrain.errors import UserError
from jaxtrain.plan import stable_hash

_MAX_DENOMINATOR = 10**6
_CHUNK = 1024  # batches whose counts are computed and cached together
_KEPT_CHUNKS = 4
_KEPT_BATCHES = 32  # 4 MB at 65,536 rows. The lanes of a host need the same few steps at slightly different times.
_arranging = threading.Lock()


def exact_weights(weights: Mapping[str, float]) -> dict[str, Fraction]:
    """Converts weights to exact fractions that sum to 1. A weight means the decimal number as written.

    Denominators are limited to 10**6, so 0.3333333 becomes one third.

    Args:
        weights: Weight of each source by name.

    Returns:
        The exact weight of each source by name.

    Raises:
        UserError: A weight is negative or between 0 and 10**-6, or the sum differs from 1 by more than 10**-6.
    """
    exact = {}
    for name, weight in weights.items():
        if not (math.isfinite(weight) and (weight == 0 or weight >= 1 / _MAX_DENOMINATOR)):
            raise UserError(f"weight {weight} of source {name!r}: a weight is 0, or at least 1e-06 and at most 1")
        exact[name] = Fraction(str(weight)).limit_denominator(_MAX_DENOMINATOR)
    total = sum(exact.values())
    if abs(total - 1) > Fraction(1, _MAX_DENOMINATOR):
        shares = {name: round(float(weight / total), 6) for name, weight in exact.items()} if total else {}
        fix = f"; in the same proportions: {shares}" if total else ""
        raise UserError(f"weights {dict(weights)} sum to {float(total):g}; they must sum to 1{fix}")
    return {name: weight / total for name, weight in exact.items()}


class Mix:
    """The number of rows from each source in a stage's batches, for fixed weights [S] and batch size.

    Row k = 1, 2, ... of source s is released once N > (k-1) / w_s and is due by N >= k / w_s. Every batch takes the B
    released rows with the earliest deadlines k / w_s (ties: the first source). So after every batch each source has the
    floor or the ceiling of its share N w_s, and counts never shrink. A schedule that meets all deadlines exists,
    because splitting each row by weight meets them, so earliest-deadline-first meets them too: rows are unit jobs on B
    machines. (Tijdeman 1980, "The chairman assignment problem"; Baruah et al. 1996, "Proportionate progress", for the
    windows.)

    The counts are periodic: they equal the shares whenever all N w_s are integers. Weights with few decimals have short
    periods. For long periods, counts are computed once, in order, at about 1 microsecond per batch. The cache holds 4
    chunks of 1,024 batches (32 kB × S) and one count for each earlier chunk (1 kB × S for 10,000 batches). Thread-safe.

    Attributes:
        batch_size: B.
        period: Batches after which the counts repeat.
    """

    def __init__(self, weights: Sequence[Fraction], batch_size: int):
        assert sum(weights) == 1
        assert min(weights) >= 0
        self.batch_size = batch_size
        self._denominator = math.lcm(*(weight.denominator for weight in weights))
        self._numerators = [int(weight * self._denominator) for weight in weights]
        self.period = self._denominator // math.gcd(self._denominator, batch_size)  # batches
        # (count + 1) / weight in exact integers: (count + 1) * scale, up to a common factor.
        multiple = math.lcm(*(numerator for numerator in self._numerators if numerator))
        self._scales = [multiple // numerator if numerator else 0 for numerator in self._numerators]
        self._starts = [(0,) * len(weights)]  # counts at the start of each chunk reached so far
        self._chunks: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    def counts_after(self, batches: int) -> np.ndarray:
        """Rows of each source in the stage's first `batches` batches: int64 [S], summing to batches × batch size."""
        assert batches >= 0
        periods, offset = divmod(batches, self.period)
        rows = periods * self.period * self.batch_size
        whole = np.array([rows * numerator // self._denominator for numerator in self._numerators], np.int64)
        return whole + self._chunk(offset // _CHUNK)[offset % _CHUNK]

    def cut(self, batches: int, rows: int) -> list[np.ndarray]:
        """Splits a batch of which only `rows` whole rows and part of the next row are trained on.

        The same rule applies as if the three parts were three batches, so where training ends every source is within
        one row of its share.

        Args:
            batches: Batches of the stage before this one.
            rows: Rows that are trained on in full.

        Returns:
            Rows of each source, int64 [S], in the full rows, in the partial row, and in the remaining rows.
        """
        assert rows < self.batch_size
        first = batches * self.batch_size
        counts = [self.counts_after(batches)]
        for end in (first + rows, first + rows + 1, first + self.batch_size):
            counts.append(np.array(self._advance(counts[-1].tolist(), end), np.int64))
        return [after - before for before, after in itertools.pairwise(counts)]

    def _chunk(self, index: int) -> np.ndarray:
        """Counts after each batch of one chunk, int64 [_CHUNK, S]."""
        with self._lock:
            if index not in self._chunks:
                for earlier in range(len(self._starts) - 1, index):
                    self._starts.append(self._walk(earlier)[-1])
                while len(self._chunks) >= _KEPT_CHUNKS:
                    del self._chunks[next(iter(self._chunks))]
                self._chunks[index] = np.array(self._walk(index)[:-1], np.int64)
            return self._chunks[index]

    def _walk(self, index: int) -> list[tuple[int, ...]]:
        """Applies the rule batch by batch, from the start of chunk `index` to the start of the next one, inclusive."""
        counts = list(self._starts[index])
        table = [tuple(counts)]
        for batches in range(index * _CHUNK + 1, (index + 1) * _CHUNK + 1):
            counts = self._advance(counts, batches * self.batch_size)
            table.append(tuple(counts))
        return table

    def _advance(self, counts: list[int], rows: int) -> list[int]:
        """The rule: counts of each source after `rows` rows, given the counts after fewer rows."""
        counts, left, below_ceiling = [*counts], rows, []
        for source, numerator in enumerate(self._numerators):
            floor, rest = divmod(rows * numerator, self._denominator)
            if counts[source] <= floor:
                counts[source] = floor
                if rest:
                    below_ceiling.append(((floor + 1) * self._scales[source], source))
            left -= counts[source]
        assert 0 <= left <= len(below_ceiling)
        for _, source in sorted(below_ceiling)[:left]:
            counts[source] += 1
        return counts


def arrange(sources: Sequence[int], counts: Sequence[int], seed: int, step: int) -> np.ndarray:
    """Assigns a source to every row of a batch.

    Rows are permuted by (seed, step): a fixed pattern would resonate with the lanes. With two sources at one half each,
    every second lane would never read the first. A batch from a single source is not permuted.

    Args:
        sources: Source indices.
        counts: counts[i] is the number of rows of sources[i].
        seed: The run's seed.
        step: The step, from 1.

    Returns:
        The source of every row: int16 [B], read-only.
    """
    with _arranging:  # lanes that start together compute it once
        return _arranged(tuple(sources), tuple(int(count) for count in counts), seed, step)


@functools.lru_cache(maxsize=_KEPT_BATCHES)
def _arranged(sources: tuple[int, ...], counts: tuple[int, ...], seed: int, step: int) -> np.ndarray:
    rows = np.repeat(np.array(sources, np.int16), counts)
    if max(counts) < len(rows):
        rows = rows[stable_hash.permutation(len(rows), seed, "mix", step)]
    rows.flags.writeable = False
    return rows
