"""Summaries of any number of logged lines in bounded memory."""

import math
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Point = tuple[float, float]

_MOST = 2**63
_BUCKETS = 1000  # more than a chart has pixels


def number(value: Any) -> float | None:
    """Returns a finite number from a JSON value; None for anything else."""
    # Compares types: isinstance(value, int | float) takes three times as long, and this runs for every number.
    if type(value) is float:
        return value if math.isfinite(value) else None
    return float(value) if type(value) is int and abs(value) < _MOST else None


class Series:
    """A curve: its first and last point, and the lowest and highest point of up to 1000 equal spans of lines."""

    def __init__(self) -> None:
        self._buckets: list[tuple[Point, Point]] = []  # lowest, highest
        self._each = 1  # points per bucket
        self._count = 0
        self._first: Point | None = None
        self.last: Point | None = None

    def add(self, x: float, y: float | None) -> None:
        """Adds a point. `x` must be larger than all before. Skips a `y` of None."""
        if y is None:
            return
        point = (x, y)
        if self._count % self._each == 0:
            if len(self._buckets) == _BUCKETS:
                pairs = zip(self._buckets[::2], self._buckets[1::2], strict=True)
                self._buckets = [_joined(one, other) for one, other in pairs]
                self._each *= 2
            self._buckets.append((point, point))
        else:
            low, high = self._buckets[-1]
            if y < low[1]:
                self._buckets[-1] = (point, high)
            elif y > high[1]:
                self._buckets[-1] = (low, point)
        self._count += 1
        self._first, self.last = self._first or point, point

    def points(self) -> list[Point]:
        found = {point for bucket in self._buckets for point in bucket}
        return sorted(found | {point for point in (self._first, self.last) if point is not None})


def _joined(one: tuple[Point, Point], other: tuple[Point, Point]) -> tuple[Point, Point]:
    (low, high), (other_low, other_high) = one, other
    return low if low[1] <= other_low[1] else other_low, high if high[1] >= other_high[1] else other_high


class Thinned(Generic[T]):
    """Keeps between `limit` and 2 * `limit` equally spaced items, plus the last one and pinned ones."""

    def __init__(self, limit: int):
        self._limit = limit
        self._every = 1
        self._count = 0
        self._kept: list[tuple[int, T]] = []
        self._pinned: set[int] = set()
        self._last: list[tuple[int, T]] = []

    def add(self, item: T) -> None:
        self._last = [(self._count, item)]
        if self._count % self._every == 0:
            self._kept += self._last
        self._count += 1
        if len(self._kept) > 2 * self._limit + len(self._pinned):
            self._every *= 2
            self._kept = [(at, kept) for at, kept in self._kept if at % self._every == 0 or at in self._pinned]

    def pin(self) -> None:
        """Pins the last item, so that it is kept."""
        self._pinned |= {at for at, _ in self._last}
        if self._kept and self._last and self._kept[-1][0] != self._last[0][0]:
            self._kept += self._last

    def items(self) -> list[T]:
        is_kept = bool(self._kept and self._last and self._kept[-1][0] == self._last[0][0])
        return [item for _, item in (self._kept if is_kept else [*self._kept, *self._last])]
