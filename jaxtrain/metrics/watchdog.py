"""Ends a process that makes no progress, after dumping the stacks of all threads."""

import faulthandler
import logging
import os
import threading
import time

logger = logging.getLogger("jaxtrain")


class Watchdog:
    """Exits with code 1, so that the launcher restarts, if `beat` is not called for `minutes`."""

    def __init__(self, minutes: float):
        self._minutes = minutes
        self._beat_at = time.monotonic()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def beat(self) -> None:
        """Records progress."""
        self._beat_at = time.monotonic()

    def close(self) -> None:
        """Stops watching."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        limit = 60 * self._minutes
        while not self._stop.wait(min(limit / 10, 10.0)):
            if time.monotonic() - self._beat_at > limit:
                self._end()

    def _end(self) -> None:
        logger.error("No step finished for %g minutes: every thread's stack follows, then exit 1.", self._minutes)
        for handler in logger.handlers:
            # faulthandler writes to the file descriptor directly, in case a Python lock is what hangs.
            stream = getattr(handler, "stream", None)
            if stream is not None:
                faulthandler.dump_traceback(stream, all_threads=True)
        faulthandler.dump_traceback(2, all_threads=True)
        os._exit(1)
