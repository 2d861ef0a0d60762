"""Decisions every process must make identically: to stop at a step, and whether a time has passed."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain.errors import FollowedError, TransientError, UserError

T = TypeVar("T")

# Ctrl-C in a terminal reaches the whole process group, and a launcher may forward it too: not a second Ctrl-C.
_SAME_REQUEST_SECONDS = 1.0
# Reading process 0's clock is a broadcast, which waits for the steps in flight.
_LOOK_SECONDS = 30.0


class InterruptedWaitError(Exception):
    """A signal asked to stop during a wait inside `StopRequest.interruptible`."""


class StopRequest:
    """Listens for SIGTERM, SIGINT and SIGHUP from the first call of `reached` to `close`. Main thread only.

    One process: Python handlers set a flag. Several: JAX's preemption service catches SIGTERM on any process and makes
    all agree on a step (the highest count of calls that a process has made, plus one). It does not know the other
    signals, which are forwarded to it as a SIGTERM to oneself. That requires `jax.distributed.initialize`.

    Before the first call nothing is worth saving, and the earlier handlers decide (main.py's end the process at once,
    with 75; with several processes SIGTERM waits for the first step, since JAX's service holds the signal). After it,
    the first signal asks for a stop, and a second SIGINT kills the process at once. An ignored SIGHUP (`nohup`) stays
    ignored; otherwise a closed terminal stops the run as SIGTERM does.
    """

    def __init__(self):
        self._several = jax.process_count() > 1
        self._calls = 0
        self._received_at: float | None = None
        self._waiting = False
        self._previous: dict[int, Any] = {}

    def _listen(self) -> None:
        signals = [signal.SIGINT]
        if not self._several:  # a Python handler would replace the preemption service's own
            signals.append(signal.SIGTERM)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signals.append(signal.SIGHUP)
        self._previous = {number: signal.signal(number, self._handle) for number in signals}

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if self._received_at is None:
            # Logging is not safe in a signal handler; and the terminal may be gone.
            with contextlib.suppress(OSError):
                os.write(2, b"\nStopping after this step and saving. Ctrl-C again aborts at once.\n")
            self._received_at = now
            if self._several:
                os.kill(os.getpid(), signal.SIGTERM)
            if self._waiting:
                raise InterruptedWaitError
        elif number == signal.SIGINT and now - self._received_at > _SAME_REQUEST_SECONDS:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)

    def reached(self) -> bool:
        """Whether to save and stop after the step just taken: the same answer on all processes.

        Call it once per step. The service compares counts for equality, starting from 0, so it gets the number of this
        process's calls and not the step: from a resumed step it would never answer yes.
        """
        if self._calls == 0:
            self._listen()
        self._calls += 1
        if self._several:
            return multihost_utils.reached_preemption_sync_point(self._calls)
        return self._received_at is not None

    @contextlib.contextmanager
    def interruptible(self) -> Iterator[None]:
        """For waits that may take minutes and can be abandoned: a signal inside raises InterruptedWaitError.

        Not with several processes, which must all take the same steps: there the wait has to end first.
        """
        self._waiting = not self._several
        try:
            if self._waiting and self._received_at is not None:
                raise InterruptedWaitError
            yield
        finally:
            self._waiting = False

    def close(self) -> None:
        """Restores the former handlers."""
        for number, handler in self._previous.items():
            # None: it was not installed from Python and cannot be restored.
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}


class Timer:
    """Whether `minutes` have passed on process 0's clock: the same answer on all processes, with few broadcasts."""

    def __init__(self, minutes: float | None):
        self._minutes = minutes
        self._calls = self._next_look = self._last_look = 0
        self._last_look_at = time.monotonic()
        self.restart()

    def restart(self) -> None:
        self._started_at = time.monotonic()

    def is_due(self) -> bool:
        """Call it once per step, on every process."""
        if self._minutes is None:
            return False
        self._calls += 1
        if self._calls < self._next_look:
            return False
        now = time.monotonic()
        left = max(self._started_at + 60 * self._minutes - now, 0.0)
        # All agree on the next look as a number of calls, from the time between two calls on process 0.
        rate = (self._calls - self._last_look) / max(now - self._last_look_at, 1e-6)
        skip = min(int(min(left, _LOOK_SECONDS) * rate), 10_000) if jax.process_count() > 1 else 0
        due, skip = (int(x) for x in broadcast([left == 0, skip]))
        self._last_look, self._last_look_at, self._next_look = self._calls, now, self._calls + max(skip, 1)
        return bool(due)


def broadcast(values: list[Any]) -> np.ndarray:
    """Process 0's values on all processes, int32 [n]."""
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(values, np.int32)))


def broadcast_json(value: Any) -> Any:
    """Process 0's JSON value on all processes; the others' is ignored."""
    if jax.process_count() == 1:
        return value
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    mine = data if jax.process_index() == 0 else np.zeros(size, np.uint8)
    return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(mine)).tobytes())


def gather_json(value: Any) -> list[Any]:
    """The JSON values of all processes, in their order."""
    if jax.process_count() == 1:
        return [value]
    data = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.array([len(data)], np.int32))).tolist()
    gathered = np.asarray(multihost_utils.process_allgather(np.pad(data, (0, max(sizes) - len(data)))))
    return [json.loads(row[:size].tobytes()) for row, size in zip(gathered, sizes, strict=True)]


class _ElsewhereUserError(UserError, FollowedError):
    """Process 0 raised a UserError and reports it."""


class _ElsewhereTransientError(TransientError, FollowedError):
    """Process 0 raised an error that a restart may fix."""


def on_process_0(function: Callable[[], T], failed: str) -> T | None:
    """Calls a function on process 0. Returns its result there, None elsewhere. All processes raise if it fails.

    Args:
        function: Raises whatever process 0 reports.
        failed: What the other processes say then.
    """
    result, failure = None, None
    if jax.process_index() == 0:
        try:
            result = function()
        except Exception as error:
            failure = error
    kind = int(broadcast([0 if failure is None else 1 if isinstance(failure, UserError) else 2])[0])
    if kind:
        raise failure or (_ElsewhereUserError if kind == 1 else _ElsewhereTransientError)(failed)
    return result


def any_process(value: bool) -> bool:
    """Whether the value is true on at least one process."""
    if jax.process_count() == 1:
        return value
    return bool(np.any(multihost_utils.process_allgather(np.array([value]))))


def largest(value: int) -> int:
    """The largest value of all processes (int32)."""
    if jax.process_count() == 1:
        return value
    return int(np.max(multihost_utils.process_allgather(np.array([value], np.int32))))
