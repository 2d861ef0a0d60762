"""Assigns the cases of a large matrix to test tiers (described in CONTRIBUTING.md)."""

from collections.abc import Iterable
from typing import Any

import pytest


def diagonal(*axes: Iterable[Any]) -> list[tuple[Any, ...]]:
    """The fewest combinations that contain every value of every axis."""
    lists = [list(axis) for axis in axes]
    return [tuple(axis[i % len(axis)] for axis in lists) for i in range(max(map(len, lists)))]


def nightly_but(few: Iterable[Any], cases: Iterable[Any], slow: Iterable[Any] = ()) -> list[Any]:
    """The cases as test parameters: `few` stay in the test's own tier, `slow` are slow, all others nightly."""
    few, slow = list(few), list(slow)

    def param(case: Any) -> Any:
        marks = () if case in few else pytest.mark.slow if case in slow else pytest.mark.nightly
        return pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=marks)

    return [param(case) for case in cases]
