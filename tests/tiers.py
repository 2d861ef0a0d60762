"""Which cases of a large matrix belong to which tier (CONTRIBUTING.md has the tiers)."""

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def diagonal(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """As few combinations as have every value of every axis."""
    lists = [list(axis) for axis in axes]
    return [tuple(axis[i % len(axis)] for axis in lists) for i in range(max(map(len, lists)))]


def nightly_but(few: Collection[Any], cases: Iterable[Any]) -> list[Any]:
    """The cases as parameters, all of them nightly but a few."""
    return [case if case in few else as_nightly(case) for case in cases]


def as_nightly(case: Any) -> Any:
    return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=pytest.mark.nightly)
