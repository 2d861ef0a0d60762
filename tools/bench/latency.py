"""`bench latency`: how much network latency the data path hides by reading ahead.

The same epoch is read over HTTP from this machine, in turns without and with a delay before every response. Throughput
is measured from the first batch on, as a run sees it. The wait for the first batch is reported separately.
"""

import dataclasses
import pathlib
import tempfile

from jaxtrain.cli import Command, Flag, Flags
from jaxtrain.data.lanes import STATE_FIELDS
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, Tokenizer
from jaxtrain.plan import Plan
from jaxtrain.tokenizers.training import TrainTokenizer
from tools.bench import corpus, stream
from tools.bench.common import Stopwatch, at_least_one, median, progress, ratio, result, rounds_flag
from tools.bench.range_server import RangeServer, serving

COMMAND = Command(
    name="python -m tools.bench latency",
    description="The data path's tokens/s from parquet files over HTTP, with a sentencepiece tokenizer, without and "
    "with a delay before every response, and the number of responses.",
    examples=("python -m tools.bench latency", "python -m tools.bench latency --milliseconds=500 --num_lanes=64"),
    flags=(
        Flag(name="milliseconds", type=int, default=200, help="delay of every response"),
        Flag(name="megabytes", type=float, default=96.0, help="millions of characters of the epoch"),
        Flag(name="vocab_size", type=int, default=32_000, help="tokens of the tokenizer"),
        Flag(name="train_megabytes", type=float, default=8.0, help="millions of characters to train the tokenizer on"),
        Flag(name="seq_len", type=int, default=2048, help="tokens of a row"),
        Flag(name="num_lanes", type=int, default=8, help="lanes read in parallel; rows of a batch"),
        Flag(name="workers", type=int, default=2, help="threads that tokenize"),
        rounds_flag(3),
    ),
    config="none",
)
_FILES = 4
_GROUPS_PER_LANE = 8


@dataclasses.dataclass(frozen=True)
class _Epoch:
    first_batch_seconds: float
    tokens_per_second: float  # after the first batch
    requests: int


def measure(flags: Flags) -> Json:
    at_least_one(rounds=flags.rounds, num_lanes=flags.num_lanes, milliseconds=flags.milliseconds)
    with tempfile.TemporaryDirectory() as folder, serving(folder) as server:
        groups = _GROUPS_PER_LANE * flags.num_lanes
        paths = corpus.write(folder, flags.megabytes, files=_FILES, groups=groups)
        urls = [server.url(pathlib.Path(path).name) for path in paths]
        data = stream.config(urls, num_lanes=flags.num_lanes, workers=flags.workers)
        plan = stream.endless_plan(data, seq_len=flags.seq_len, batch_size=flags.num_lanes)
        tokenizer = _tokenizer(flags, f"{folder}/tokenizer")
        near: list[_Epoch] = []
        far: list[_Epoch] = []
        for number in range(1, flags.rounds + 1):
            for pause, found in ((0.0, near), (flags.milliseconds / 1000, far)):
                server.pause = pause
                found.append(_epoch(data, plan, tokenizer, server))
            progress(
                f"round {number} of {flags.rounds}: {near[-1].tokens_per_second:,.0f} tokens/s; with the delay "
                f"{far[-1].tokens_per_second:,.0f}"
            )
    rates = [[epoch.tokens_per_second for epoch in found] for found in (near, far)]
    numbers: Json = {
        "settings": {flag.name: getattr(flags, flag.name) for flag in COMMAND.flags},
        "tokens_per_second": median(rates[0]),
        "tokens_per_second_with_pause": median(rates[1]),
        "throughput_kept": ratio(rates[1], rates[0]),
        "first_batch_seconds": median([epoch.first_batch_seconds for epoch in near]),
        "first_batch_seconds_with_pause": median([epoch.first_batch_seconds for epoch in far]),
        "requests": far[0].requests,
    }
    return result("latency", numbers, device=False)


def _tokenizer(flags: Flags, workdir: str) -> Tokenizer:
    trainer = TrainTokenizer(kind="sentencepiece", vocab_size=flags.vocab_size, sample_mb=flags.train_megabytes)
    trainer.check()
    trainer.train(corpus.documents(flags.train_megabytes), workdir, progress=False)
    return trainer.build(workdir)


def _epoch(data: DataConfig, plan: Plan, tokenizer: Tokenizer, server: RangeServer) -> _Epoch:
    server.reset()
    watch, first, counted, last = Stopwatch(), None, 0, 0
    with stream.batches(data, plan, tokenizer) as batches:
        for batch in batches:
            last = sum(int(state[:, STATE_FIELDS.index("tokens")].sum()) for state in batch.states.values())
            if first is None:
                first, counted = watch.spent().wall, last
            if batch.ended:
                break
        seconds = watch.spent().wall
    if first is None or last == counted:
        raise UserError("the epoch ends with its first batch: give more --megabytes")
    return _Epoch(first, (last - counted) / (seconds - first), server.requests)
