"""XProf traces of chosen steps, in the work directory's `profile/`: by `--profile=STEP:COUNT`, or by SIGUSR1."""

import logging
import os
import pathlib
import shutil
import signal
import tempfile
from collections.abc import Callable

import jax

from jaxtrain.checkpoint.workdir import Workdir

FOLDER = "profile"
_COUNT = 5  # steps after a signal

logger = logging.getLogger("jaxtrain")


class Profiler:
    """Traces steps, each process those that it is asked for. A context manager; main thread only.

    Args:
        workdir: the work directory.
        asked: (first step, number of steps); None for none.
    """

    def __init__(self, workdir: Workdir, asked: tuple[int, int] | None):
        self._workdir, self._asked, self._signalled = workdir, asked, False
        self._first: int | None = None  # of the trace under way
        self._end = 0  # the step before which it ends

    def __enter__(self) -> "Profiler":
        self._previous = signal.signal(signal.SIGUSR1, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGUSR1, self._previous)
        if self._first is not None:
            self._stop()

    def _handle(self, number: int, frame: object) -> None:
        self._signalled = True

    def at(self, step: int, settle: Callable[[], object]) -> None:
        """Call it before each step. settle: waits until the devices have done the steps before."""
        if self._first is not None and step >= self._end:
            settle()
            self._stop()
        if self._first is None and (self._signalled or (self._asked is not None and step == self._asked[0])):
            settle()
            self._signalled = False
            self._first, self._end = step, step + (_COUNT if self._asked is None else self._asked[1])
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # every Python call would be slower, and hide the spans
            self._local = tempfile.mkdtemp(prefix="profile-", dir=os.fspath(self._workdir.cache))
            jax.profiler.start_trace(self._local, profiler_options=options)

    def _stop(self) -> None:
        jax.profiler.stop_trace()
        # The profiler names files by host, and processes may share one.
        folder = self._workdir.path / FOLDER / "plugins" / "profile" / f"step_{self._first}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"process_{jax.process_index()}.xplane.pb"
        (found,) = pathlib.Path(self._local).rglob("*.xplane.pb")
        path.write_bytes(found.read_bytes())
        shutil.rmtree(self._local)
        logger.info("Profile from step %d to %d: %s", self._first, self._end - 1, path)
        self._first = None
