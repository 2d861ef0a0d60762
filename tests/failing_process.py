"""`python -m tests.failing_process PROCESS:HOW`: one of several processes fails while the others wait for it.

HOW is `error`, `mistake` (a UserError), `stop` (SIGSTOP to itself), `kill` (SIGKILL) or `nothing`. Prints `failed TIME`
just before it fails.
"""

import os
import signal
import sys
import time

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxtrain import cli
from jaxtrain.distributed import processes
from jaxtrain.errors import UserError
from jaxtrain.metrics.monitor import console_logging

_SIGNALS = {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}


def fail(how: str) -> None:
    print(f"failed {time.time()}", flush=True)
    if how == "error":
        raise ValueError("a fault of this host alone")
    if how == "mistake":
        raise UserError("a mistake on this host alone")
    os.kill(os.getpid(), _SIGNALS[how])


def main(flags: cli.Flags) -> int:
    index, _, how = flags.failing.partition(":")
    processes.HEARTBEAT_SECONDS = 10
    processes.join(deterministic=False)
    with console_logging(), processes.failures_announced():
        for step in range(4):
            if step == 2 and jax.process_index() == int(index) and how != "nothing":
                fail(how)
            total = multihost_utils.process_allgather(np.array([step])).sum()
            assert total == step * jax.process_count()
    processes.exit_together()
    print(f"left together {jax.process_index()}", flush=True)
    return 0


if __name__ == "__main__":
    failing = cli.Flag(name="failing", type=str, positional=True, help="which process, and how")
    command = cli.Command(name="x", description="", examples=("x",), flags=(failing,), config="none")
    cli.leave(cli.exit_code(main, command, sys.argv[1:]))
