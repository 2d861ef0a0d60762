"""`bench resume`: the cost of resuming deep in a parquet stream, and of restoring a checkpoint.

A local server counts requests and bytes. The stream is read once to its end and then resumed at several depths, each
until the first batch arrives, which must be the same as before.
"""

import pathlib
import statistics
import tempfile
import zlib
from collections.abc import Mapping, Sequence

import numpy as np

from jaxtrain.cli import Command, Flag, Flags
from jaxtrain.data.pipeline import DataConfig, StepBatch
from jaxtrain.errors import UserError
from jaxtrain.interfaces import BATCH_FIELDS, Json
from jaxtrain.plan import Plan
from tools.bench import corpus, stream
from tools.bench.common import Stopwatch, at_least_one, median, progress, result, rounds_flag
from tools.bench.range_server import RangeServer, serving

COMMAND = Command(
    name="python -m tools.bench resume",
    description="Requests, bytes and seconds until the first batch when a parquet stream over HTTP is resumed at "
    "several depths, and the time to restore a checkpoint.",
    examples=("python -m tools.bench resume", "python -m tools.bench resume --megabytes=400 --depths=0,0.5,0.99"),
    flags=(
        Flag(name="megabytes", type=float, default=200.0, help="millions of characters in the file"),
        Flag(
            name="depths",
            type=tuple[float, ...],
            default=(0.0, 0.25, 0.5, 0.75, 0.9),
            help="where to resume, as fractions of the epoch",
        ),
        Flag(name="num_lanes", type=int, default=8, help="lanes read in parallel"),
        Flag(name="seq_len", type=int, default=2048, help="tokens of a row"),
        Flag(name="checkpoint_megabytes", type=int, default=128, help="size of the train state that is restored"),
        rounds_flag(3),
    ),
    config="none",
)
_GROUPS_PER_LANE = 8  # default: row groups of 950 rows, typical of web data
_CHARACTERS_PER_TOKEN = 4.0


def measure(flags: Flags) -> Json:
    # Imported here, because it imports Orbax and JAX.
    from tools.bench import checkpoint

    at_least_one(rounds=flags.rounds, num_lanes=flags.num_lanes, checkpoint_megabytes=flags.checkpoint_megabytes)
    with tempfile.TemporaryDirectory() as folder, serving(folder) as server:
        groups = _GROUPS_PER_LANE * flags.num_lanes
        (path,) = corpus.write(folder, flags.megabytes, files=1, groups=groups)
        data = stream.config([server.url(pathlib.Path(path).name)], num_lanes=flags.num_lanes, workers=2)
        plan = stream.endless_plan(data, seq_len=flags.seq_len, batch_size=flags.num_lanes)
        epoch = _Epoch(data, plan, server)
        steps = epoch.read()
        found: Json = {
            "settings": {flag.name: getattr(flags, flag.name) for flag in COMMAND.flags},
            "file_bytes": pathlib.Path(path).stat().st_size,
            "epoch_steps": steps,
            "resumes": [epoch.resumed(after, flags.rounds) for after in depths_in(steps, flags.depths)],
        }
    found["checkpoint"] = checkpoint.measure_size(flags.checkpoint_megabytes, flags.rounds, None)
    return result("resume", found, device=True)


def depths_in(steps: int, depths: Sequence[float]) -> list[int]:
    """Returns the steps after which to resume, in an epoch of `steps`. Raises UserError."""
    for depth in depths:
        if not 0 <= depth < 1:
            raise UserError(f"--depths: {depth} is a fraction of the epoch: give 0 or more, below 1")
    return sorted({int(depth * steps) for depth in depths})


class _Epoch:
    """One epoch of the file, with resumes at any step."""

    def __init__(self, data: DataConfig, plan: Plan, server: RangeServer):
        self._data, self._plan, self._server = data, plan, server
        self._tokenizer = stream.Prepared(_CHARACTERS_PER_TOKEN, 50_000)
        # After each step, from 0: the lanes' positions, and a digest of the next batch.
        self._states: list[Mapping[int, np.ndarray]] = [{}]
        self._following: list[int] = []

    def read(self) -> int:
        """Records every step of the epoch and returns their number."""
        with stream.batches(self._data, self._plan, self._tokenizer) as batches:
            for batch in batches:
                self._following.append(_digest(batch))
                self._states.append(batch.states)
                if batch.ended:
                    break
        return len(self._following)

    def resumed(self, after: int, rounds: int) -> Json:
        """Returns median costs until the batch after step `after` arrives."""
        seconds, requests, size, same = [], [], [], True
        for _ in range(rounds):
            self._server.reset()
            watch = Stopwatch()
            with stream.batches(
                self._data, self._plan, self._tokenizer, after=after, states=self._states[after]
            ) as batches:
                batch = next(batches)
                seconds.append(watch.spent().wall)
            # Counted after all readers have stopped, so it includes reads ahead.
            requests.append(self._server.requests)
            size.append(self._server.bytes)
            same = same and _digest(batch) == self._following[after]
        found: Json = {
            "after_step": after,
            "tokens_before": self._plan.at(after + 1).tokens_before,
            "requests": statistics.median(requests),
            "bytes": statistics.median(size),
            "seconds": median(seconds),
            "same_batch": same,
        }
        progress(f"after step {after}: {found}")
        return found


def _digest(batch: StepBatch) -> int:
    digest = 0
    for name in BATCH_FIELDS:
        digest = zlib.crc32(np.ascontiguousarray(batch.arrays[name]).tobytes(), digest)
    return digest
