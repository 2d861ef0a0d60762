"""`--worker=I/N`: shares of long work, for processes that know nothing of each other."""

import os

from jaxtrain.interfaces import UserError


def parse(text: str | None) -> tuple[int, int]:
    """(worker, from 0; workers). None: what launch/local.sh says, or one worker."""
    if text is None:
        return int(os.environ.get("JAX_PROCESS_ID", "0")), int(os.environ.get("JAX_NUM_PROCESSES", "1"))
    first, slash, second = text.partition("/")
    if not (slash and first.isdecimal() and second.isdecimal() and int(first) < int(second)):
        raise UserError(f"--worker={text}: give I/N with I from 0 to N - 1, for example --worker=0/4")
    return int(first), int(second)
