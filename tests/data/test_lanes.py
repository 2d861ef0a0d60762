"""Reading ahead: order, persistent errors, threads that never wait in a cycle or keep a process alive."""

import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from jaxtrain.data import lanes
from jaxtrain.data.lanes import LaneSchedule
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.threads import DaemonPool, Prefetcher
from jaxtrain.plan import Stage
from tests.data.memory_source import MemorySource
from tests.data.runs import plan_of


def test_ahead_gives_the_same_items_and_goes_one_ahead():
    made = []

    def items():
        for number in range(5):
            made.append(number)
            yield number

    with ThreadPoolExecutor(2) as pool:
        ahead = Prefetcher(items(), pool)
        assert not made
        ahead.start()
        assert next(ahead) == 0
        assert list(ahead) == [1, 2, 3, 4]
        for _ in range(3):
            with pytest.raises(StopIteration):
                next(ahead)


def test_small_items_do_not_end_the_reading_ahead():
    """Otherwise the latency to the next unit would be hidden only behind the few rows at a unit's end."""
    weights = [10, 1, 10, 10, 2, 3, 4, 10, 1]
    made, taken, most = [], 0, 0

    def items():
        for weight in weights:
            made.append(weight)
            yield weight

    with ThreadPoolExecutor(2) as pool:
        ahead = Prefetcher(items(), pool, lambda weight: weight, 5)
        for number, weight in enumerate(weights):
            assert next(ahead) == weight
            taken += weight
            pool.submit(int).result()  # earlier submissions have begun
            while ahead._making and len(made) < len(weights):
                pool.submit(int).result()
            held = sum(made) - taken
            most = max(most, held)
            assert held >= min(5, sum(weights[number + 1 :])), number
        assert list(ahead) == []
    assert most < 5 + 10


@pytest.mark.parametrize("started", [True, False])
def test_an_error_ahead_stays_an_error(started):
    def items():
        if started:
            yield 1
        raise OSError("gone")

    with ThreadPoolExecutor(1) as pool:
        ahead = Prefetcher(items(), pool)
        if started:
            assert next(ahead) == 1
        for _ in range(3):
            with pytest.raises(OSError, match="gone"):
                next(ahead)


def test_pool_runs_all_work_on_at_most_its_threads():
    pool, most, now, lock = DaemonPool(3, "test"), 0, 0, threading.Lock()

    def work(number):
        nonlocal most, now
        with lock:
            now += 1
            most = max(most, now)
        with lock:
            now -= 1
        if number == 7:
            raise OSError("seven")
        return number

    futures = [pool.submit(work, number) for number in range(200)]
    assert [f.result() for f in futures if f.exception() is None] == [n for n in range(200) if n != 7]
    assert isinstance(futures[7].exception(), OSError)
    assert most <= 3
    assert len(pool._threads) <= 3
    pool.shutdown()
    with pytest.raises(RuntimeError):
        pool.submit(work, 1)
    assert not any(thread.is_alive() for thread in pool._threads)


def test_pool_starts_threads_for_work_that_waits_and_then_uses_few():
    pool = DaemonPool(4, "test")
    both = threading.Barrier(4, timeout=20)
    for future in [pool.submit(both.wait) for _ in range(4)]:
        future.result()
    used = set()
    for _ in range(20):
        while len(pool._idle) < 4:
            time.sleep(0.001)
        used.add(pool.submit(threading.get_ident).result())
    assert len(used) == 1  # the thread that went idle last: else all would touch memory and caches of their own
    pool.shutdown()


OUTAGE = """
import time
from jaxtrain.data.threads import DaemonPool
pool = DaemonPool(2, "test")
pool.submit(time.sleep, 600)
pool.submit(lambda: pool.submit(time.sleep, 600).result())
time.sleep(0.2)
"""


def test_a_process_ends_while_readers_wait():
    assert subprocess.run([sys.executable, "-c", OUTAGE], timeout=60, check=False).returncode == 0


def test_shares_follow_the_plan(monkeypatch):
    monkeypatch.setattr(lanes, "_OPEN_AHEAD_TOKENS", 8 * 16)
    data = DataConfig(sources={name: MemorySource(rows=[["1"]]) for name in ("a", "b", "c")}, num_lanes=2)
    stages = [
        Stage(seq_len=2, batch_size=4, tokens=24, weights={"b": 1.0}),
        Stage(seq_len=4, batch_size=6, tokens=24 * 20, weights={"a": 0.5, "b": 0.5}),
        Stage(seq_len=4, batch_size=6, weights={"c": 1.0}),
    ]
    shares = LaneSchedule(plan_of(data, stages, 0, steps=30), 2)
    first = shares.at(3)
    assert (first.rows, first.only, first.sources_by_lane, first.opened, first.wanted) == (
        2,
        1,
        None,
        (1, 0),
        (1, 0, 2),
    )
    second = shares.at(8)
    assert (second.rows, second.opened, second.wanted) == (3, (0, 1, 2), (0, 1, 2))
    np.testing.assert_array_equal(second.sources_by_lane, shares.plan.sources_of(8).reshape(2, 3))
    assert shares.at(30).opened == shares.at(30).wanted == (2,)
    assert shares.at(30) is shares.at(30)
    # Short steps, many of them, so that there is time to open what the next stages need.
    monkeypatch.setattr(lanes, "_OPEN_AHEAD_TOKENS", 8 * 23)
    assert LaneSchedule(shares.plan, 2).at(3).opened == (1, 0, 2)
