"""`bench stages`: the cost of a stage change, in a whole run with stages several times longer than a compile."""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence

import jax
from jax.experimental.compilation_cache import compilation_cache

from jaxtrain.checkpoint.checkpointer import CheckpointConfig
from jaxtrain.cli import Command, Flag, Flags
from jaxtrain.config import Config
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json
from jaxtrain.metrics.monitor import MonitorConfig
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.plan import Stage
from jaxtrain.tokenizers.training import TrainTokenizer
from jaxtrain.trainer import loop
from tools.bench import corpus
from tools.bench.common import at_least_one, median, progress, result, short
from tools.bench.range_server import serving

COMMAND = Command(
    name="python -m tools.bench stages",
    description="Trains through stages that change length, batch and mix, with sources over HTTP from this machine, "
    "one of which only the later stages read. Reports for each stage the median step, the steps after the change, the "
    "steps during tracing and compilation of the next stage, and how long they waited for data. The median of the "
    "first steps after a change may exceed the stage's by 50% or 250 ms, whichever is larger. Then repeats the stages "
    "in a second run with the compilation cache of the first.",
    examples=(
        "python -m tools.bench stages",
        "python -m tools.bench stages --seq_lens=8,64,512,2048 --tokens_per_batch=65536 --hidden_size=768",
    ),
    flags=(
        Flag(name="seq_lens", type=tuple[int, ...], default=(16, 64, 256), help="tokens of a row, by stage"),
        Flag(name="tokens_per_batch", type=int, default=1024, help="tokens of a batch"),
        Flag(
            name="steps",
            type=int,
            default=300,
            help="steps of each stage; several times as long as a compilation",
        ),
        Flag(name="hidden_size", type=int, default=64, help="width of the model"),
        Flag(name="num_layers", type=int, default=2, help="layers of the model"),
        Flag(name="vocab_size", type=int, default=1024, help="tokens of the tokenizer"),
        Flag(name="milliseconds", type=int, default=100, help="delay of every response, like that of a distant server"),
        Flag(name="megabytes", type=float, default=12.0, help="millions of characters of all sources"),
        Flag(name="train_megabytes", type=float, default=1.0, help="millions of characters to train the tokenizer on"),
    ),
    config="none",
)
_SOURCES = ("web", "math", "code")
_AFTER = 5  # number of steps counted as after a change
_TRACING = ("/jax/core/compile/jaxpr_trace_duration", "/jax/core/compile/jaxpr_to_mlir_module_duration")
_COMPILING = "/jax/core/compile/backend_compile_duration"
_MISS, _HIT = "/jax/compilation_cache/cache_misses", "/jax/compilation_cache/cache_hits"


def measure(flags: Flags) -> Json:
    at_least_one(tokens_per_batch=flags.tokens_per_batch, steps=flags.steps, milliseconds=flags.milliseconds)
    if len(flags.seq_lens) < 2 or flags.steps < 2 * _AFTER:
        raise UserError(f"give two --seq_lens or more, and --steps of {2 * _AFTER} or more")
    with tempfile.TemporaryDirectory() as folder, serving(folder) as server:
        progress("writing the sources, training the tokenizer")
        paths = corpus.write(folder, flags.megabytes, files=2 * len(_SOURCES), groups=60)
        server.pause = flags.milliseconds / 1000
        urls = [server.url(pathlib.Path(path).name) for path in paths]
        trainer = TrainTokenizer(kind="sentencepiece", vocab_size=flags.vocab_size, sample_mb=flags.train_megabytes)
        trainer.train(corpus.documents(flags.train_megabytes), folder, progress=False)
        listener = _Listener()
        try:
            first = _run(flags, urls, trainer, folder, "first", flags.steps, listener)
            compiled = dict(listener.counts)
            shutil.copytree(f"{folder}/first/cache/jax", f"{folder}/second/cache/jax")
            _run(flags, urls, trainer, folder, "second", 2, listener)
        finally:
            listener.stop()
    again = {name: listener.counts[name] - compiled[name] for name in compiled}
    stages = [_of_stage(number, first, listener) for number in range(1, len(flags.seq_lens) + 1)]
    return result(
        "stages",
        {
            "settings": {flag.name: getattr(flags, flag.name) for flag in COMMAND.flags},
            "stages": stages,
            "changes_within_limit": all(stage["within_limit"] for stage in stages[1:]),
            "programs_compiled": compiled[_MISS],
            "programs_compiled_at_second_start": again[_MISS],
            "programs_read_at_second_start": again[_HIT],
        },
        device=True,
    )


class _Listener(logging.Handler):
    """Records when stages were traced and compiled and when steps were logged (time.monotonic)."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.counts = {_MISS: 0, _HIT: 0}
        self.spans: dict[str, list[tuple[float, float]]] = {"tracing": [], "compiling": []}
        self.lines: list[float] = []
        jax.monitoring.register_event_listener(self._counted)
        jax.monitoring.register_event_duration_secs_listener(self._timed)

    def stop(self) -> None:
        jax.monitoring.unregister_event_listener(self._counted)
        jax.monitoring.unregister_event_duration_listener(self._timed)

    def _counted(self, event: str, **_: object) -> None:
        if event in self.counts:
            self.counts[event] += 1

    def _timed(self, event: str, duration_secs: float, **_: object) -> None:
        kind = "tracing" if event in _TRACING else "compiling" if event == _COMPILING else None
        if kind is not None and threading.current_thread().name.startswith("jaxtrain-compile"):
            now = time.monotonic()
            self.spans[kind].append((now - duration_secs, now))

    def emit(self, record: logging.LogRecord) -> None:
        if ": Loss=" in record.getMessage():
            self.lines.append(time.monotonic())


@dataclasses.dataclass(frozen=True)
class _Step:
    """A logged step: when its metrics arrived, how long after the previous ones, and how much of that was waiting."""

    stage: int
    seq_len: int
    batch_size: int
    end: float
    seconds: float
    data: float
    compile: float


def _run(
    flags: Flags,
    urls: Sequence[str],
    trainer: TrainTokenizer,
    folder: str,
    name: str,
    steps: int,
    listener: _Listener,
) -> list[_Step]:
    workdir = pathlib.Path(folder) / name
    workdir.mkdir(exist_ok=True)
    shutil.copytree(f"{folder}/tokenizer", workdir / "tokenizer")
    listener.lines = []
    with _quiet(listener):
        code = loop.run(_config(flags, urls, trainer, steps), os.fspath(workdir), dry_run=False)
    if code:
        raise UserError("the run was stopped: there is nothing to report")
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [
        _Step(
            now["stage"],
            now["seq_len"],
            now["batch_size"],
            end,
            now["time"] - before["time"],
            now["seconds"]["data"] - before["seconds"]["data"],
            now["seconds"]["compile"] - before["seconds"]["compile"],
        )
        for before, now, end in zip(lines, lines[1:], listener.lines[1:], strict=False)
    ]


@contextlib.contextmanager
def _quiet(listener: _Listener) -> Iterator[None]:
    """Sends the run's output to stderr, and afterwards restores JAX's settings, including the compilation cache."""
    names = (
        *("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"),
        *("jax_persistent_cache_min_entry_size_bytes", "jax_persistent_cache_enable_xla_caches"),
    )
    before = {name: getattr(jax.config, name) for name in names}
    logger = logging.getLogger("jaxtrain")
    logger.addHandler(listener)
    compilation_cache.reset_cache()  # an open cache keeps its folder
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.removeHandler(listener)
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def _config(flags: Flags, urls: Sequence[str], trainer: TrainTokenizer, steps: int) -> Config:
    """Stages with ever longer and fewer rows and different mixes. `code` joins in the second half."""
    stages = []
    for number, seq_len in enumerate(flags.seq_lens):
        late = number >= len(flags.seq_lens) / 2
        code = 0.1 + 0.05 * number if late else 0.0
        math = 0.05 + 0.02 * number
        rows = max(flags.tokens_per_batch // seq_len // 8 * 8, 8)
        weights = {"web": 1 - code - math, "math": math, "code": code}
        stages.append(
            Stage(
                name=f"rows of {seq_len}",
                seq_len=seq_len,
                batch_size=rows,
                tokens=steps * rows * seq_len,
                weights={name: round(weight, 2) for name, weight in weights.items()},
                overlap=0.5,
            )
        )
    files = {name: tuple(urls[index :: len(_SOURCES)]) for index, name in enumerate(_SOURCES)}
    config = Config(
        model=LlamaConfig(
            hidden_size=flags.hidden_size,
            intermediate_size=flags.hidden_size * 8 // 3,
            num_layers=flags.num_layers,
            num_heads=max(flags.hidden_size // 64, 1),
            num_kv_heads=max(flags.hidden_size // 64, 1),
            max_seq_len=max(flags.seq_lens),
            tie_embeddings=True,
            dtype="bfloat16" if jax.default_backend() == "gpu" else "float32",
        ),
        tokenizer=trainer,
        data=DataConfig(
            sources={name: HuggingFace(name="parquet", data_files=found) for name, found in files.items()},
            num_lanes=8,
            shuffle_window=16,
        ),
        stages=tuple(stages),
        checkpoint=CheckpointConfig(every_steps=10**6),
        monitor=MonitorConfig(tensorboard=False, watchdog_minutes=None),
        log_every=1,
    )
    config.check()
    return config


def _of_stage(number: int, steps: Sequence[_Step], listener: _Listener) -> Json:
    here = [step for step in steps if step.stage == number]
    # The metrics of the last step before a change are fetched after the first step of the new stage is dispatched, so
    # its seconds include that step's wait.
    before = [step for step in steps if step.stage == number - 1][-1:]
    after, usual = [*before, *here][:_AFTER], statistics.median(step.seconds for step in here)
    limit = max(1.5 * usual, usual + 0.25)
    found: Json = {
        "seq_len": here[0].seq_len,
        "batch_size": here[0].batch_size,
        "median_step_seconds": short(usual),
        "median_after_change_seconds": median([step.seconds for step in after]),
        "largest_after_change_seconds": short(max(step.seconds for step in after)),
        "limit_seconds": short(limit),
        "within_limit": statistics.median(step.seconds for step in after) <= limit,
        "largest_step_seconds": short(max(step.seconds for step in here)),
        "waited_for_compile_seconds": short(sum(step.compile for step in after)),
        "data_wait_share": _waiting(here),
        "data_wait_share_after_change": _waiting(after),
    }
    return found | {f"while_{kind}": _during(here, spans) for kind, spans in listener.spans.items()}


def _waiting(steps: Sequence[_Step]) -> float:
    return short(sum(step.data for step in steps) / sum(step.seconds for step in steps))


def _during(steps: Sequence[_Step], spans: Sequence[tuple[float, float]]) -> Mapping[str, float] | None:
    """Steps in flight during the spans: count, median and maximum seconds."""
    met = [
        step.seconds
        for step in steps
        if any(begin < step.end and end > step.end - step.seconds for begin, end in spans)
    ]
    return {"steps": len(met), "median_seconds": median(met), "largest_seconds": short(max(met))} if met else None
