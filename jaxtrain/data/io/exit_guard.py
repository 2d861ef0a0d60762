"""Keeps threads out of C++ libraries while the interpreter exits.

A daemon thread that returns from C++ into an interpreter being torn down is ended by unwinding its stack. Inside a
callback from pyarrow's C++, that calls std::terminate: SIGABRT, and the exit code is lost (7 exits of 8 with 24 threads
waiting for a read; arrow issue 45214 is similar). So every call into the iterators of pyarrow or datasets goes through
`guarded`, and every call into a tokenizer through `gate`. The exit waits for the threads inside and lets no more in.
"""

import atexit
import contextlib
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")

_PATIENCE = 10.0  # seconds that the exit waits for reads under way


class Gate:
    """Counts the threads inside. Once it is closed, others block forever (they are daemons, or would be joined)."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.inside = 0
        self.closed = False
        self._mine = threading.local()

    def __enter__(self) -> None:
        with self.changed:
            self.changed.wait_for(lambda: not self.closed)
            self.inside += 1
        self._mine.depth = getattr(self._mine, "depth", 0) + 1

    def __exit__(self, *_: object) -> None:
        self._mine.depth -= 1
        with self.changed:
            self.inside -= 1
            self.changed.notify_all()

    @contextlib.contextmanager
    def releasing(self) -> Iterator[None]:
        """For dropping C++ objects that hold Python objects (a half-read file), which calls back into Python.

        A thread that is already inside may enter, and so may the thread that ends the interpreter.
        """
        if getattr(self._mine, "depth", 0) or threading.current_thread() is threading.main_thread():
            yield
        else:
            with self:
                yield

    def close_first(self) -> None:
        """Makes the gate close before all exit handlers registered so far. Call it after importing a client library."""
        atexit.unregister(self.close)
        atexit.register(self.close)

    def check(self) -> None:
        """Raises RuntimeError at exit: a thread inside must leave, and not start another request."""
        if self.closed:
            raise RuntimeError("the process is exiting")

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.wait_for(lambda: self.inside == 0, timeout=_PATIENCE)


gate = Gate()
gate.close_first()


def guarded(items: Generator[T, None, None]) -> Iterator[T]:
    """The same items (none is None), each fetched inside the gate, where the generator is also closed."""
    try:
        while True:
            with gate:
                item = next(items, None)
            if item is None:
                return
            yield item
    finally:
        with gate.releasing():
            items.close()
