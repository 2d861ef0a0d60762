"""`python -m tests.failing_run FLAGS...`: jaxtrain.main with one process that fails when it requests a step's batch.

Set FAIL=PROCESS:HOW:STEP in the environment. HOW is `error`, `mistake` (a UserError), `stop` (SIGSTOP to itself) or
`kill` (SIGKILL). Writes the time of the failure to $FAILED_AT.
"""

import os
import pathlib
import signal
import time

from jaxtrain import cli, main
from jaxtrain.data.feed import Feed
from jaxtrain.data.pipeline import StepBatch
from jaxtrain.errors import UserError
from tests.e2e import one_compiler

process, how, step = os.environ["FAIL"].split(":")
ask = Feed.__next__


def fail() -> None:
    pathlib.Path(os.environ["FAILED_AT"]).write_text(str(time.time()))
    if how == "error":
        raise ValueError("a fault of this host alone")
    if how == "mistake":
        raise UserError("a mistake on this host alone")
    os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[how])


def next_batch(self: Feed) -> StepBatch:
    batch = ask(self)
    if os.environ["JAX_PROCESS_ID"] == process and batch.step == int(step):
        fail()
    return batch


if __name__ == "__main__":
    one_compiler.share()
    Feed.__next__ = next_batch
    cli.leave(main.exit_code())
