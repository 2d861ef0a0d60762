"""Processes that stream from a Hub with many reads in flight and exit in different ways, for trainer/test_exits.py.

`python -m tests.exiting_run IDENTITIES WAY...` forks this process once per way, a few at a time, so that imports happen
once. Each fork runs to the end of this module and through the interpreter's own exit, which commands avoid (cli.leave).
Prints a line of JSON for each: {"way", "status" (as returned by os.waitpid), "seconds"}. Set HF_ENDPOINT in the
environment. IDENTITIES is a file with the sources' identities, so that resolving them is quick.
"""

import importlib
import json
import os
import pathlib
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator

from jaxtrain import cli
from jaxtrain.data.pipeline import DataConfig, StepBatch, host_batches, pools, resolve
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.errors import UserError
from jaxtrain.plan import Stage
from tests.data.memory_source import WordTokenizer
from tests.data.runs import plan_of

_PATIENCE = 60.0  # seconds after which a process counts as hanging
_AT_ONCE = 3  # a process spends most of its time waiting for a slow Hub


def config() -> DataConfig:
    """Three sources of different formats, 8 lanes each."""
    names = {"web": "org/web", "code": "org/code", "table": "org/table"}
    sources = {name: HuggingFace(name=at, fetch_rows=20) for name, at in names.items()}
    return DataConfig(sources=dict(sources), num_lanes=8, shuffle_window=16)


def batches() -> Iterator[StepBatch]:
    data = config()
    weights = dict.fromkeys(data.sources, 1 / 3)
    plan = plan_of(data, [Stage(seq_len=32, batch_size=16, weights=weights)], 0, steps=10**6)
    readers = data.build(resolve(data, json.loads(pathlib.Path(sys.argv[1]).read_text())), seed=0)
    rows = data.row_spec(WordTokenizer(), None)
    return host_batches(readers, plan, rows, range(8), pools(data), after=0, states={}, prefetch=2)


def read(way: str) -> int:
    """Reads for a while, then ends as `way` says: returns the exit code or raises."""
    stopped: list[int] = []
    for number in (signal.SIGTERM, signal.SIGINT):
        # The garbage collector's callback would swallow an exception raised here.
        signal.signal(number, lambda number, frame: stopped.append(number))
    seconds = random.uniform(0.0, 0.4)
    if way in ("SIGTERM", "SIGINT"):
        threading.Timer(seconds, os.kill, (os.getpid(), getattr(signal, way))).start()
        seconds = _PATIENCE
    begun, found = time.monotonic(), batches()
    for _ in found:
        if stopped:
            raise SystemExit(75)
        if time.monotonic() - begun > seconds:
            break
    if way == "close":
        found.close()  # pyright: ignore[reportAttributeAccessIssue] (Grain's iterators have it)
    elif way == "exception":
        raise RuntimeError("as told")
    elif way == "mistake":
        raise UserError("as told")
    elif way == "_exit":
        os._exit(0)
    return 0


def run(way: str) -> None:
    cli.run(lambda flags: read(way), cli.Command(name="run", description="", examples=(), flags=(), config="none"), [])


def status_of(pid: int, deadline: float) -> int | None:
    """A child's status, as returned by os.waitpid; None if it did not end in time and was killed."""
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return status
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def main() -> str | None:
    """Returns the way to end in a forked process, and None in the parent once all forks have ended."""
    for module in ("datasets", "huggingface_hub.hf_api", "pandas", "scipy.sparse"):
        importlib.import_module(module)  # reading imports these: 3 s in each fork otherwise
    ways = sys.argv[2:]
    for first in range(0, len(ways), _AT_ONCE):
        children: dict[int, str] = {}
        begun = time.monotonic()
        for way in ways[first : first + _AT_ONCE]:
            pid = os.fork()
            if pid == 0:
                random.seed()
                return way
            children[pid] = way
        for pid, way in children.items():
            ended = {"way": way, "status": status_of(pid, begun + _PATIENCE), "seconds": time.monotonic() - begun}
            print(json.dumps(ended), flush=True)
    return None


if __name__ == "__main__":
    if (chosen := main()) is not None:
        run(chosen)
