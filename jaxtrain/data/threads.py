"""Threads of the data path: pools that never delay the exit of the process, and a prefetcher on top of them."""

import collections
import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

T = TypeVar("T")


class DaemonPool(Executor):
    """Up to `size` daemon threads, started on demand; work runs in the order of submission.

    The interpreter joins ThreadPoolExecutor's threads at exit: a reader waiting out an outage would keep a process that
    was told to stop, and has saved, alive for data.retry_minutes.

    The thread that went idle last works next. What it used is still in the processor's caches, and allocators and
    tokenizers keep memory for each thread: if all threads took turns, each would touch memory of its own.
    """

    def __init__(self, size: int, name: str):
        self._size, self._name = size, name
        self._queued: collections.deque[_Work] = collections.deque()  # while no thread is idle
        self._idle: list[queue.SimpleQueue[_Work | None]] = []  # what each idle thread waits for
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        work = Future[Any](), functools.partial(fn, *args, **kwargs)
        with self._lock:
            if self._closed:
                raise RuntimeError(f"pool {self._name} is shut down")
            if self._idle:
                self._idle.pop().put(work)
            elif len(self._threads) < self._size:
                name = f"{self._name}-{len(self._threads)}"
                self._threads.append(threading.Thread(target=self._run, args=(work,), name=name, daemon=True))
                self._threads[-1].start()
            else:
                self._queued.append(work)
        return work[0]

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Refuses new work; finishes (or cancels) queued work. wait: Whether to wait until all of it is done."""
        with self._lock:
            self._closed = True
            while cancel_futures and self._queued:
                self._queued.popleft()[0].cancel()
            while self._idle:
                self._idle.pop().put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def _run(self, work: "_Work | None") -> None:
        mine: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        while work is not None:
            future, function = work
            if future.set_running_or_notify_cancel():
                try:
                    result = function()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
            # Otherwise the result stays alive until the next work arrives.
            del work, future, function
            work = self._next(mine)

    def _next(self, mine: "queue.SimpleQueue[_Work | None]") -> "_Work | None":
        with self._lock:
            if self._queued:
                return self._queued.popleft()
            if self._closed:
                return None
            self._idle.append(mine)
        return mine.get()


_Work = tuple[Future[Any], Callable[[], Any]]


@dataclasses.dataclass(frozen=True)
class Pools:
    """Threads of this host: `readers` wait for the network, `workers` tokenize. Two pools: workers wait for readers."""

    readers: Executor
    workers: Executor


class Prefetcher(Iterator[T]):
    """An iterator whose next items are made in a pool ahead of time, one after the other, from the first `next` on.

    Items are made until the held ones weigh `enough` by `weigh`; by default that is one item. An error is raised by the
    `next` that would return the failed item, and by every later one.
    """

    def __init__(self, items: Iterator[T], pool: Executor, weigh: Callable[[T], int] = lambda item: 1, enough: int = 1):
        self._items = items
        self._pool = pool
        self._weigh, self._enough = weigh, enough
        self._coming: collections.deque[Future[T | None]] = collections.deque()
        self._held = 0
        self._making = False
        self._lock = threading.Lock()

    def start(self) -> None:
        """Starts to make the first item without waiting for it."""
        with self._lock:
            self._go_on()

    def _go_on(self) -> None:
        if not self._making and self._held < self._enough:
            self._making = True
            self._coming.append(self._pool.submit(self._make))

    def _make(self) -> T | None:
        item = next(self._items, None)
        if item is not None:  # at the end and after an error, nothing is left to make
            with self._lock:
                self._held += self._weigh(item)
                self._making = False
                self._go_on()
        return item

    def __next__(self) -> T:
        self.start()
        item = self._coming[0].result()
        if item is None:
            raise StopIteration
        with self._lock:
            self._coming.popleft()
            self._held -= self._weigh(item)
            self._go_on()
        return item
