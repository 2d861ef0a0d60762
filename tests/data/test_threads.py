"""DaemonPool: order, reuse of threads, shutdown."""

import threading
import time

import pytest

from jaxtrain.data.threads import DaemonPool


def test_the_thread_that_went_idle_last_works_next():
    """Else every thread of the pool would touch memory and caches of its own."""
    pool, gate = DaemonPool(4, "test"), threading.Barrier(5)
    all_at_work = [pool.submit(gate.wait) for _ in range(4)]
    gate.wait()
    for future in all_at_work:
        future.result()
    used = set()
    for _ in range(20):
        while len(pool._idle) < 4:
            time.sleep(0.001)
        used.add(pool.submit(threading.get_ident).result())
    assert len(used) == 1
    pool.shutdown()


def test_work_runs_in_the_order_of_submission_and_a_shutdown_finishes_it():
    pool, done = DaemonPool(1, "test"), []
    for number in range(50):
        pool.submit(done.append, number)
    pool.shutdown()
    assert done == list(range(50))
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(print)


def test_a_shutdown_may_cancel_what_is_queued():
    pool, begun, gate = DaemonPool(1, "test"), threading.Event(), threading.Event()
    running = pool.submit(lambda: begun.set() or gate.wait())
    begun.wait()
    queued = pool.submit(print)
    pool.shutdown(wait=False, cancel_futures=True)
    gate.set()
    assert running.result() and queued.cancelled()
