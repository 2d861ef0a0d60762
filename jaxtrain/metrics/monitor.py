"""Metrics, timing and the watchdog.

Throughput is trained tokens divided by the time spent in steps, including the wait for data. MFU is the model's FLOPs
(Chowdhery et al. 2022, "PaLM", appendix B, with causal attention halved) divided by the devices' published peak.
"""

import contextlib
import dataclasses
import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from jaxtrain import cli
from jaxtrain.checkpoint.workdir import Workdir
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json
from jaxtrain.metrics.watchdog import Watchdog
from jaxtrain.metrics.writers import Console, JsonLines, Mirror, TensorBoard, Tracker, Writer, finite, log_file
from jaxtrain.plan import StepPlan

SPANS: tuple[str, ...] = ("start", "compile", "data", "checkpoint", "evaluation", "samples", "stage change")

logger = logging.getLogger("jaxtrain")


@dataclasses.dataclass(kw_only=True)
class MonitorConfig:
    """Outputs besides metrics.jsonl, log.txt and the console.

    Attributes:
        tensorboard: Write event files to the work directory's `tensorboard/`.
        trackers: Any of "wandb" and "trackio", which must be installed.
        project: Project name in the trackers.
        watchdog_minutes: Exit with code 1 if no step finishes for this long; None disables it. Must exceed the longest
            compile or evaluation, and data.retry_minutes, after which an outage ends the run and reports its cause.
    """

    tensorboard: bool = True
    trackers: tuple[str, ...] = ()
    project: str = "jaxtrain"
    watchdog_minutes: float | None = 90.0

    def check(self) -> None:
        unknown = set(self.trackers) - {"wandb", "trackio"}
        if unknown:
            raise UserError(f"trackers={self.trackers}: {sorted(unknown)[0]!r} is not one of 'wandb', 'trackio'.")
        if self.watchdog_minutes is not None and not self.watchdog_minutes > 0:
            raise UserError(f"watchdog_minutes={self.watchdog_minutes}: must be above 0, or None for no watchdog.")

    def build(self, workdir: Workdir, run: "Run", console: Console) -> "Monitor":
        return Monitor(self, workdir, run, console)


@dataclasses.dataclass(kw_only=True)
class Run:
    """What the monitor needs to know about a run.

    Attributes:
        start_step: The restored step; 0 for a new run.
        start_tokens: Tokens trained up to start_step.
        total_tokens: Target number of tokens; None without one.
        num_stages: Number of stages in the plan.
        flops_per_token: Training FLOPs per token, by sequence length.
        peak_flops: Published peak FLOP/s, summed over all devices of the run; None if unknown.
        log_every: Log every N steps.
        config: The run's config, for the trackers.
    """

    start_step: int
    start_tokens: int
    total_tokens: int | None
    num_stages: int
    flops_per_token: Callable[[int], float]
    peak_flops: float | None
    log_every: int
    config: Json


@contextlib.contextmanager
def console_logging() -> Iterator[Console]:
    """Prints messages of the logger `jaxtrain`: all on process 0, warnings on the others. Wraps the whole program."""
    console = Console(jax.process_index())
    logger.addHandler(console)
    logger.setLevel(logging.INFO)
    propagate, logger.propagate = logger.propagate, False
    try:
        yield console
    finally:
        logger.removeHandler(console)
        console.close()
        logger.propagate = propagate


class Goodput:
    """Splits wall time into named spans; the rest is steps. Main thread only. Nested spans count once.

    Attributes:
        seconds: Seconds so far, by span.
    """

    def __init__(self, started_at: float):
        self._started_at = started_at
        self._open: list[str] = []
        self._since = started_at
        self.seconds = dict.fromkeys(SPANS, 0.0)

    def _charge(self) -> None:
        now = time.monotonic()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self._since = now

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Counts the time inside the context as `name`."""
        self._charge()
        self._open.append(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()

    def end_of_start(self) -> None:
        """Counts all time outside spans so far as "start"."""
        self.seconds["start"] += self.steps()

    def elapsed(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._started_at

    def steps(self) -> float:
        """Seconds outside all spans."""
        return self.elapsed() - sum(self.seconds.values())

    def summary(self) -> str:
        """One line with the share of each span."""
        elapsed = max(self.elapsed(), 1e-9)
        parts = [f"{100 * self.steps() / elapsed:.1f}% of {elapsed:,.0f} s in steps"]
        parts += [f"{name} {100 * spent / elapsed:.1f}%" for name, spent in self.seconds.items() if spent > 0]
        return "Goodput: " + ", ".join(parts)


class Monitor:
    """Writes metrics and tracks time. A context manager; the loop calls `span`, `stepped`, and `log_step` when `due`.

    All processes create one and call the same methods; only process 0 writes. Creating it removes the lines of
    metrics.jsonl for steps after `run.start_step`.

    Raises:
        UserError: A file cannot be written.
    """

    def __init__(self, config: MonitorConfig, workdir: Workdir, run: Run, console: Console):
        self._run = run
        self._console = console
        self._goodput = Goodput(console.started_at)
        self._peak_flops = run.peak_flops
        self._seconds_before = 0.0
        self._begun = False
        self._writers: list[Writer] = []
        self._open_files = contextlib.ExitStack()
        if jax.process_index() == 0:
            try:
                with self._open_files:
                    self._open(config, workdir)
                    self._open_files = self._open_files.pop_all()  # all went well: keep them open
            except OSError as error:
                raise UserError(
                    f"{error.filename or workdir.path} cannot be written: {error.strerror or error}. It may belong to "
                    "another user: change its owner, move it away, or give another --workdir."
                ) from error
        self._watchdog = None if config.watchdog_minutes is None else Watchdog(config.watchdog_minutes)
        self._mark(run.start_tokens)

    def _open(self, config: MonitorConfig, workdir: Workdir) -> None:
        mirror = Mirror(workdir)
        self._open_files.callback(mirror.close)
        folder = self._folder = mirror.folder
        self._spikes = folder / workdir.spikes.name
        file = log_file(folder / workdir.log.name)
        for record in self._console.before_log_file or ():
            file.handle(record)
        self._console.before_log_file = None
        logger.addHandler(file)
        self._open_files.callback(file.close)
        self._open_files.callback(logger.removeHandler, file)
        lines = JsonLines(folder / workdir.metrics.name, self._run.start_step)
        self._seconds_before = lines.seconds
        self._add(lines)
        if config.tensorboard:
            self._add(TensorBoard(folder / workdir.tensorboard.name, self._run.start_step))
        for tracker in config.trackers:
            self._add(Tracker(tracker, config.project, workdir, self._run.config, lines.last_step))

    def _add(self, writer: Writer) -> None:
        self._writers.append(writer)
        self._open_files.callback(writer.close)

    def __enter__(self) -> "Monitor":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def _mark(self, tokens: int) -> None:
        self._logged_tokens = tokens
        self._logged_steps = self._goodput.steps()
        self._logged_data = self._goodput.seconds["data"]

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Counts the time inside the context as `name`, one of SPANS, instead of as steps."""
        self._beat()
        with self._goodput.span(name), jax.profiler.TraceAnnotation(name):
            yield
        self._beat()

    def _beat(self) -> None:
        if self._watchdog is not None:
            self._watchdog.beat()

    def begin(self) -> None:
        """Ends the startup time. Call it just before the first step."""
        self._begun = True
        self._goodput.end_of_start()
        self._mark(self._run.start_tokens)
        self._console.start_bar(self._run.start_tokens, self._run.total_tokens)
        self._beat()

    def stepped(self, at: StepPlan) -> None:
        """Records a step. Call it after dispatching the step."""
        self._beat()
        self._console.advance(at.tokens_after)

    def due(self, at: StepPlan) -> bool:
        """Whether this step is logged: the first, every `log_every`-th, and the last."""
        return at.step == 1 or at.step % self._run.log_every == 0 or at.tokens_after == self._run.total_tokens

    def log_step(self, at: StepPlan, metrics: Mapping[str, Any]) -> None:
        """Writes a step to all writers and prints its line.

        Args:
            at: The step.
            metrics: Python numbers: `loss` in nats per token; `ce_loss` if perplexity is not exp(loss); and any other
                values for metrics.jsonl (`grad_norm`, `fingerprint`, `sources`, ...).
        """
        if jax.process_index() != 0:
            return
        data = self._goodput.seconds["data"] - self._logged_data
        seconds = self._goodput.steps() - self._logged_steps + data
        tokens_per_sec = (at.tokens_after - self._logged_tokens) / max(seconds, 1e-9)
        flops = tokens_per_sec * self._run.flops_per_token(at.seq_len)
        self._mark(at.tokens_after)
        loss = float(metrics["loss"])
        values = {
            "tokens": at.tokens_after,
            "loss": loss,
            "perplexity": perplexity(float(metrics.get("ce_loss", loss))),
            "learning_rate": at.learning_rate,
            "tokens_per_sec": tokens_per_sec,
            "mfu": flops / self._peak_flops if self._peak_flops else None,
            "stage": at.stage,
            "seq_len": at.seq_len,
            "batch_size": at.batch_size,
            "data_wait": data / max(seconds, 1e-9),
            "time": self._seconds_before + self._goodput.elapsed(),
            "goodput": self._goodput.steps() / max(self._goodput.elapsed(), 1e-9),
            "seconds": dict(self._goodput.seconds),
            "memory_gb": peak_memory_gb(),
            **metrics,
        }
        self._write(at.step, values)
        self._console.advance(at.tokens_after, loss)
        done = f"{at.tokens_after:,} tokens"
        if (total := self._run.total_tokens) is not None:
            done = f"{at.tokens_after:,}/{total:,} tokens, {100 * at.tokens_after / total:.1f}%"
        cache = values.get("disk_cache_gb")
        used = "" if cache is None else f" | Cache={cli.size(1e9 * cache)}"
        logger.info(
            f"Step {at.step}: Loss={loss:.4f}, PPL={values['perplexity']:.2f}, Tokens/sec={tokens_per_sec:.0f}, "
            f"LR={at.learning_rate:.2e} | Stage {at.stage}/{self._run.num_stages} ({done}){used}"
        )

    def log_eval(self, step: int, values: Mapping[str, Any]) -> None:
        """Writes a separate line: `eval_loss` (nats per token), `eval_bits_per_byte`; by source and tasks, too."""
        if jax.process_index() != 0:
            return
        self._write(step, {**values, "time": self._seconds_before + self._goodput.elapsed()})
        by_source, tasks = values.get("eval_by_source", {}), values.get("eval_tasks", {})
        numbers = {name: value for name, value in values.items() if not isinstance(value, Mapping)}
        shown = [f"{name}={value:,.{0 if name == 'eval_tokens' else 4}f}" for name, value in numbers.items()]
        losses = {name: found["loss"] for name, found in by_source.items()}
        shown += [
            f"{name}: no held-out document" if loss is None else f"{name}={loss:.4f}" for name, loss in losses.items()
        ]
        for name, found in tasks.items():
            errors = {key: found.get(f"{key}_stderr") for key in found}
            shown += [
                f"{name} {key}={found[key]:.4f}±{error:.4f}" for key, error in errors.items() if error is not None
            ]
        logger.info("Step %d: %s", step, ", ".join(shown))

    def log_samples(self, step: int, texts: Mapping[str, str]) -> None:
        """Writes a separate line with `samples`, the continuation of each prompt."""
        if jax.process_index() != 0:
            return
        self._write(step, {"samples": dict(texts), "time": self._seconds_before + self._goodput.elapsed()})
        for prompt, text in texts.items():
            logger.info("Sample: %s%s", prompt, text)

    def log_spike(self, step: int, spike: Json) -> None:
        """Adds a line to spikes.jsonl, which a rewind does not cut."""
        if jax.process_index() == 0:
            with self._writing(step), open(self._spikes, "a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **finite(spike)}, allow_nan=False) + "\n")

    def _write(self, step: int, values: Json) -> None:
        for writer in self._writers:
            with self._writing(step):
                writer.write(step, finite(values))

    @contextlib.contextmanager
    def _writing(self, step: int) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"the metrics of step {step} cannot be written to {self._folder}: {error}. Free some space and "
                "run the same command again: it resumes from the newest checkpoint."
            ) from error

    def attach(self, path: epath.Path) -> None:
        """Adds a file of a local work directory to the run in the trackers."""
        for writer in self._writers:
            if isinstance(writer, Tracker) and "://" not in str(path):
                writer.attach(path)

    def close(self) -> None:
        """Reports where the time went, stops the watchdog and closes all files."""
        if self._watchdog is not None:
            self._watchdog.close()
            self._watchdog = None
        self._console.stop_bar()
        if self._begun and jax.process_index() == 0:
            logger.info(self._goodput.summary())
        self._begun = False
        self._open_files.close()


def perplexity(loss: float) -> float:
    """Returns exp(loss), or infinity if float64 overflows."""
    return math.exp(loss) if not loss > 700 else math.inf


def peak_memory_gb() -> float:
    """Returns peak memory in GB (10^9 bytes): the highest of the local devices, or the process's on CPU."""
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    peaks = [stat["peak_bytes_in_use"] for stat in stats if "peak_bytes_in_use" in stat]
    if peaks:
        return max(peaks) / 1e9
    # ru_maxrss is in kilobytes on Linux, in bytes on macOS.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
