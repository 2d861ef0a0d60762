"""Keeps threads out of pyarrow while the interpreter ends.

A daemon thread that comes back from C++ into an interpreter that is being torn down is ended by unwinding its stack,
and inside a callback from pyarrow's C++ that calls std::terminate: SIGABRT, and the exit code is lost (7 exits of 8
with 24 threads that wait for a read; arrow issue 45214 is of the same kind). So every call into pyarrow's or datasets'
iterators goes through `guarded`, and every call into a tokenizer through `gate`. At exit we wait for the threads that
are inside, and let no further one in.
"""

import atexit
import contextlib
import threading
from collections.abc import Generator, Iterator
from typing import TypeVar

T = TypeVar("T")

_PATIENCE = 10.0  # seconds that the exit waits for reads that are under way


class Gate:
    """Counts the threads inside; once closed, further ones wait for the end (they are daemons, or would be joined)."""

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
    def letting_go(self) -> Iterator[None]:
        """For what gives up objects of C++ that hold Python ones (a half-read file): that calls back, too.

        May be entered by who is inside already, and by the thread that ends the interpreter.
        """
        if getattr(self._mine, "depth", 0) or threading.current_thread() is threading.main_thread():
            yield
        else:
            with self:
                yield

    def be_first(self) -> None:
        """At exit, close before whatever has been registered up to now. Call it after a client library's import."""
        atexit.unregister(self.close)
        atexit.register(self.close)

    def check(self) -> None:
        """Raises RuntimeError at exit: who is inside is not to begin another request, but to come out."""
        if self.closed:
            raise RuntimeError("the process ends")

    def close(self) -> None:
        with self.changed:
            self.closed = True
            self.changed.wait_for(lambda: self.inside == 0, timeout=_PATIENCE)


gate = Gate()
gate.be_first()


def guarded(items: Generator[T, None, None]) -> Iterator[T]:
    """The same items (None is not one of them), each fetched inside the gate, and the generator closed there."""
    try:
        while True:
            with gate:
                item = next(items, None)
            if item is None:
                return
            yield item
    finally:
        with gate.letting_go():
            items.close()
