"""Threads that the process's end does not wait for."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any


class DaemonPool(Executor):
    """Up to `size` threads, started as they are needed, first come first served.

    ThreadPoolExecutor's threads are joined at the interpreter's exit, whatever they do: a reader that waits out an
    outage would keep a process that was told to stop, and has saved, alive for data.retry_minutes.
    """

    def __init__(self, size: int, name: str):
        self._size, self._name = size, name
        self._work: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._idle = 0  # threads that wait for work, less the work that waits for them
        self._lock = threading.Lock()
        self._closed = False

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._closed:
                raise RuntimeError(f"pool {self._name} is shut down")
            self._work.put((future, lambda: fn(*args, **kwargs)))
            self._idle -= 1
            if self._idle < 0 and len(self._threads) < self._size:
                self._idle += 1
                thread = threading.Thread(target=self._run, name=f"{self._name}-{len(self._threads)}", daemon=True)
                self._threads.append(thread)
                thread.start()
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Let no more work in; what waits is done first, or cancelled. wait: for all of it."""
        with self._lock:
            self._closed = True
            while cancel_futures and not self._work.empty():
                item = self._work.get()
                if item is not None:
                    item[0].cancel()
            for _ in self._threads:
                self._work.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def _run(self) -> None:
        while (item := self._work.get()) is not None:
            future, function = item
            if future.set_running_or_notify_cancel():
                try:
                    result = function()
                except BaseException as error:
                    future.set_exception(error)
                else:
                    future.set_result(result)
                    del result
            # Or what was made stays alive until the next work comes.
            del item, future, function
            with self._lock:
                self._idle += 1
