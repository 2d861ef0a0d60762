"""`KILLED_AT=STATE python -m tests.e2e.killed_at FLAGS...`: jaxtrain.main, killed at a state of its first rewind."""

import os
import runpy
import signal
from collections.abc import Callable
from typing import Any

from jaxtrain.trainer import loop, open_data
from jaxtrain.trainer.session import Session

STATES = ("before the list", "after the list", "before the session", "before the state", "before a step")


def killed(function: Callable[..., Any], call: int) -> Callable[..., Any]:
    """The function, which kills the process at its `call`-th call."""
    calls = []

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*args, **kwargs)

    return counted


def after(function: Callable[..., Any]) -> Callable[..., Any]:
    def done(*args: Any, **kwargs: Any) -> None:
        function(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    return done


if __name__ == "__main__":
    match os.environ["KILLED_AT"]:
        case "before the list":
            open_data.save_forgotten = killed(open_data.save_forgotten, 1)
        case "after the list":
            open_data.save_forgotten = after(open_data.save_forgotten)
        case "before the session":
            Session.__init__ = killed(Session.__init__, 2)
        case "before the state":
            Session.train_state = killed(Session.train_state, 2)
        case "before a step":
            loop.Loop.run = killed(loop.Loop.run, 2)
    runpy.run_module("jaxtrain.main", run_name="__main__", alter_sys=True)
