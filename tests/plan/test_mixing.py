"""Mixing: every source within one row of its share, at any step, in every lane."""

import math
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.errors import UserError
from jaxtrain.plan import mixing


def reference(weights: list[Fraction], batch_size: int, batches: int) -> list[list[int]]:
    """The rule of the design, one row at a time, in fractions: counts after batches 0, 1, ..."""
    counts = [0] * len(weights)
    table = [counts]
    for n in range(1, batches + 1):
        rows = n * batch_size
        counts = [max(count, math.floor(rows * weight)) for count, weight in zip(counts, weights, strict=True)]
        while sum(counts) < rows:
            open_sources = [s for s, weight in enumerate(weights) if counts[s] < math.ceil(rows * weight)]
            counts[min(open_sources, key=lambda s: ((counts[s] + 1) / weights[s], s))] += 1
        table.append(counts)
    return table


@st.composite
def mixes(draw) -> tuple[list[Fraction], int]:
    parts = draw(st.lists(st.integers(0, 1000), min_size=1, max_size=9).filter(any))
    return [Fraction(part, sum(parts)) for part in parts], draw(st.integers(1, 300))


@settings(deadline=None, max_examples=150)
@given(mixes(), st.integers(1, 60))
def test_follows_the_rule(mix, batches):
    weights, batch_size = mix
    table = reference(weights, batch_size, batches)
    fast = mixing.Mix(weights, batch_size)
    assert [fast.counts_after(n).tolist() for n in range(batches + 1)] == table


@settings(deadline=None, max_examples=300)
@given(mixes(), st.integers(0, 3000))
def test_within_one_row_of_the_share(mix, start):
    weights, batch_size = mix
    fast = mixing.Mix(weights, batch_size)
    before = fast.counts_after(start)
    for n in range(start + 1, start + 30):
        counts = fast.counts_after(n)
        assert counts.dtype == np.int64
        assert counts.sum() == n * batch_size
        assert (counts >= before).all()
        for count, weight in zip(counts.tolist(), weights, strict=True):
            assert abs(count - n * batch_size * weight) < 1
        before = counts


@settings(deadline=None, max_examples=300)
@given(mixes(), st.integers(0, 3000), st.floats(0, 1, exclude_max=True), st.floats(0, 1))
def test_a_cut_batch_is_within_one_row_of_the_share(mix, batches, counted, part):
    """If a batch counts for `rows` rows and part of another, shares hold there, not at the batch's end."""
    weights, batch_size = mix
    fast = mixing.Mix(weights, batch_size)
    rows = int(counted * batch_size)
    before = fast.counts_after(batches)
    parts = fast.cut(batches, rows)
    assert [int(counts.sum()) for counts in parts] == [rows, 1, batch_size - rows - 1]
    assert all((counts >= 0).all() for counts in parts)
    whole = batches * batch_size + rows
    for had, first, then, weight in zip(before.tolist(), parts[0].tolist(), parts[1].tolist(), weights, strict=True):
        assert abs(had + first + then * part - (whole + part) * weight) < 1


# A period of 10**15 batches; and one row per batch, so that previous counts always matter.
PARTS = tuple(Fraction(part, prime) for part, prime in ((71, 397), (73, 389), (79, 383), (83, 379), (7, 373), (1, 367)))
UGLY = (*PARTS, 1 - sum(PARTS, Fraction(0)))


@pytest.mark.parametrize(
    ("weights", "batch_size"),
    [((Fraction(19, 20), Fraction(1, 20), Fraction(0)), 64), ((Fraction(1, 3), Fraction(2, 3)), 1), (UGLY, 1)],
)
def test_random_access_equals_sequential(weights, batch_size, monkeypatch):
    monkeypatch.setattr(mixing, "_CHUNK", 16)
    table = reference(list(weights), batch_size, 400)
    fast = mixing.Mix(weights, batch_size)
    for n in np.random.default_rng(0).permutation(401):
        assert fast.counts_after(int(n)).tolist() == table[n]
    assert len(fast._chunks) <= mixing._KEPT_CHUNKS


def test_period():
    fast = mixing.Mix((Fraction(19, 20), Fraction(1, 20)), 64)
    assert fast.period == 5
    assert fast.counts_after(10**15 * 5).tolist() == [304 * 10**15, 16 * 10**15]
    assert (fast.counts_after(10**15 * 5 + 3) - fast.counts_after(10**15 * 5) == fast.counts_after(3)).all()
    # Counts of one period of these do not fit into 64 bits.
    primes = (999_983, 999_979, 999_961, 999_959)
    parts = [Fraction(1, prime) for prime in primes]
    assert mixing.Mix([1 - sum(parts, Fraction(0)), *parts], 8).counts_after(2000).sum() == 16_000


def test_several_threads(monkeypatch):
    monkeypatch.setattr(mixing, "_CHUNK", 16)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    expected = np.array(reference(list(UGLY), 1, 1000))
    fast = mixing.Mix(UGLY, 1)

    barrier = threading.Barrier(8)

    def wrong(offset: int) -> list[int]:
        barrier.wait()  # all request chunks that no thread has computed
        return [n for n in range(999 - offset, 0, -97) if (fast.counts_after(n) != expected[n]).any()]

    try:
        with ThreadPoolExecutor(8) as pool:
            assert not any(pool.map(wrong, range(8)))
        assert np.array_equal(fast._starts, expected[: 16 * len(fast._starts) : 16])  # each found once
    finally:
        sys.setswitchinterval(interval)


def test_arranged_rows():
    rows = mixing.arrange([4, 0, 2], [5, 0, 11], seed=1, step=7)
    assert rows.dtype == np.int16
    assert np.bincount(rows, minlength=5).tolist() == [0, 0, 11, 0, 5]
    assert mixing.arrange([4, 0, 2], [5, 0, 11], seed=1, step=7) is rows  # lanes of a host share it
    with pytest.raises(ValueError, match="read-only"):
        rows[0] = 1
    for seed, step in [(1, 8), (2, 7)]:
        assert (mixing.arrange([4, 0, 2], [5, 0, 11], seed, step) != rows).any()
    assert mixing.arrange([3], [4], seed=1, step=7).tolist() == [3] * 4


def test_golden_arrangement():
    """The order is part of every checkpoint: it must be the same in every version, and on every machine."""
    assert "".join(map(str, mixing.arrange([0, 1, 2], [8, 5, 3], seed=5, step=3))) == "0121001110020200"


@pytest.mark.parametrize("num_lanes", [2, 4, 8])
def test_no_resonance_with_lanes(num_lanes):
    """Two sources at one half each: every lane draws both equally (unpermuted, lanes would read only one of them)."""
    batch_size, steps = 16, 1000
    mix = mixing.Mix((Fraction(1, 2), Fraction(1, 2)), batch_size)
    drawn = np.zeros(num_lanes)
    for step in range(1, steps + 1):
        counts = mix.counts_after(step) - mix.counts_after(step - 1)
        drawn += mixing.arrange([0, 1], counts.tolist(), seed=0, step=step).reshape(num_lanes, -1).sum(1)
    rows = steps * batch_size // num_lanes
    assert np.abs(drawn - rows / 2).max() < 4 * math.sqrt(rows / 4)  # 4 standard deviations of fair draws


def test_lanes_draw_in_proportion():
    weights, num_lanes, batch_size, steps = (Fraction(7, 10), Fraction(1, 4), Fraction(1, 20)), 64, 128, 1500
    mix = mixing.Mix(weights, batch_size)
    drawn = np.zeros((num_lanes, 3))
    for step in range(1, steps + 1):
        counts = mix.counts_after(step) - mix.counts_after(step - 1)
        rows = mixing.arrange([0, 1, 2], counts.tolist(), seed=3, step=step).reshape(num_lanes, -1)
        drawn += (rows[:, :, None] == np.arange(3)).sum(1)
    shares = np.array([float(weight) for weight in weights])
    rows = steps * batch_size // num_lanes
    assert (np.abs(drawn - rows * shares) < 4.5 * np.sqrt(rows * shares * (1 - shares))).all()


def test_exact_weights():
    assert mixing.exact_weights({"a": 0.95, "b": 0.05}) == {"a": Fraction(19, 20), "b": Fraction(1, 20)}
    assert set(mixing.exact_weights({"a": 0.3333333, "b": 0.3333333, "c": 0.3333333}).values()) == {Fraction(1, 3)}
    assert mixing.exact_weights({"a": 0.333333, "b": 0.666666}) == {"a": Fraction(1, 3), "b": Fraction(2, 3)}
    assert mixing.exact_weights({"a": 1, "b": 0}) == {"a": 1, "b": 0}


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"a": 0.5, "b": 0.4}, "sum to 0.9.*'a': 0.555556, 'b': 0.444444"),
        ({"a": 0.0}, "sum to 0; they must sum to 1$"),
        ({"a": 1.5, "b": -0.5}, "weight -0.5 of source 'b'"),
        ({"a": math.nan}, "weight nan of source 'a'"),
        ({"a": 1.0, "b": 1e-7}, "weight 1e-07 of source 'b'"),
    ],
)
def test_wrong_weights(weights, said):
    with pytest.raises(UserError, match=said):
        mixing.exact_weights(weights)
