"""`--worker=I/N`: shares of long work, for processes that know nothing of each other."""

import os

from jaxtrain import cli
from jaxtrain.errors import UserError

WORKER = cli.Flag(
    name="worker",
    type=str | None,
    default=None,
    help="I/N: this is worker I, from 0, of N that share the work out; launch/local.sh sets it, and 0/1 is the default "
    "elsewhere",
)
WORKDIR = cli.Flag(
    name="workdir",
    type=str | None,
    default=None,
    help="the run's work directory, for its checkpoints and its tokenizer, which is trained there if it is the "
    "config's own and not yet made; runs/<config file>[-<arg>] by default",
)


def parse(text: str | None) -> tuple[int, int]:
    """(worker, from 0; workers). None: what launch/local.sh says, or one worker."""
    if text is None:
        return int(os.environ.get("JAX_PROCESS_ID", "0")), int(os.environ.get("JAX_NUM_PROCESSES", "1"))
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise UserError(f"--worker={text}: give I/N with I from 0 to N - 1, for example --worker=0/4")
    return int(first), int(second)
