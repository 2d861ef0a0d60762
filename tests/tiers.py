"""Which cases of a large matrix belong to which tier (CONTRIBUTING.md has the tiers)."""

from collections.abc import Iterable
from typing import Any

import pytest


def diagonal(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """As few combinations as have every value of every axis."""
    lists = [list(axis) for axis in axes]
    return [tuple(axis[i % len(axis)] for axis in lists) for i in range(max(map(len, lists)))]


def nightly_but(few: Iterable[Any], cases: Iterable[Any], slow: Iterable[Any] = ()) -> list[Any]:
    """The cases as parameters of a test: a few stay in the test's own tier, some are slow, all others nightly."""
    few, slow = list(few), list(slow)

    def param(case: Any) -> Any:
        marks = () if case in few else pytest.mark.slow if case in slow else pytest.mark.nightly
        return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks)

    return [param(case) for case in cases]
