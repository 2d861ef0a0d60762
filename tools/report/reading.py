"""Reads a work directory's logs in a single pass."""

import difflib
import json
import os
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from tqdm import tqdm

from jaxtrain import cli
from jaxtrain.checkpoint.workdir import Workdir
from jaxtrain.cli.redaction import redact
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json
from jaxtrain.metrics.monitor import SPANS
from tools.report.series import Series, Thinned, number

# Keys in metrics.jsonl that become curves over tokens.
CURVES = (
    *("loss", "ce_loss", "kd_loss", "learning_rate", "grad_norm", "tokens_per_sec", "data_wait", "mfu"),
    *("memory_gb", "disk_cache_gb"),
)
EVALUATED = ("eval_loss", "eval_bits_per_byte")
TASKS = "eval_tasks"
STEPS, LOST = "steps", "lost"
_SPANS = (STEPS, *SPANS, LOST)
_SHAPE = {"stage", "seq_len", "batch_size"}
_PARAMETERS = re.compile(r"Model: ([\d,]+ parameters \([\d,]+ without embeddings(?:, [\d,]+ active)?\))")


class StageLog:
    """The logged lines of one stage. `first_token` and `first_step` follow from the line before its first."""

    def __init__(self, line: Json, first_token: int, steps_before: int):
        self.number: int = line["stage"]
        self.first_token, self.first_step = first_token, steps_before + 1
        self.last: Json = line
        self._rates: Thinned[float] = Thinned(2000)
        self._seconds, self._waited = 0.0, 0.0

    def add(self, line: Json, tokens: int) -> None:
        """Adds a line that covers `tokens` tokens since the previous line."""
        self.last = line
        rate = number(line.get("tokens_per_sec"))
        if rate:
            self._rates.add(rate)
            self._seconds += tokens / rate
            self._waited += tokens / rate * (number(line.get("data_wait")) or 0.0)

    @property
    def last_token(self) -> int:
        return self.last["tokens"]

    @property
    def median_rate(self) -> float | None:
        """Median tokens per second over the logged lines."""
        return statistics.median(rates) if (rates := self._rates.items()) else None

    @property
    def data_wait(self) -> float | None:
        """Fraction of the stage's time spent waiting for data."""
        return self._waited / self._seconds if self._seconds else None

    @property
    def sources(self) -> dict[str, Json] | None:
        """What the stage took from each source; None if the run did not log it."""
        found = self.last.get("stage_sources")
        return found if isinstance(found, dict) else None


class RunLog:
    """A run, from its work directory's files. `add` takes the lines of metrics.jsonl in order.

    Attributes:
        last: line of the last step; empty before the first step.
        by_source: (tokens, held-out loss, step) of each source.
        tasks: (tokens, value, step, standard error) of each (benchmark, metric).
        task_results: the last results of each benchmark.
        evaluation: line of the last evaluation; empty without one.
        best: (step, lowest eval_loss).
        unreadable: number of unreadable lines, such as one truncated by a kill.
        lines: a sample of lines for mix and tooltips, including the last line of every stage.
        samples: the lines with samples, thinned out.
        profiles: folders with traces, below the work directory.
        spikes: the lines of spikes.jsonl, thinned out.
        without_loss: number of logged steps whose loss was not finite.
    """

    def __init__(self, name: str, path: str, config: Json | None = None, parameters: str | None = None):
        self.name, self.path, self.config, self.parameters = name, path, config, parameters
        self.curves = {key: Series() for key in CURVES}
        self.evaluations: dict[str, list[tuple[float, float, int]]] = {key: [] for key in EVALUATED}
        self.by_source: dict[str, list[tuple[float, float, int]]] = {}
        self.tasks: dict[tuple[str, str], list[tuple[float, float, int, float]]] = {}
        self.task_results: dict[str, Json] = {}
        self.lines: Thinned[Json] = Thinned(300)
        self.samples: Thinned[Json] = Thinned(20)
        self.spikes: Thinned[Json] = Thinned(100)
        self.stages: list[StageLog] = []
        self.profiles: list[str] = []
        self.last: Json = {}
        self.evaluation: Json = {}
        self.best: tuple[int, float] | None = None
        self.unreadable, self.without_loss, self.first_without_loss = 0, 0, 0
        self._ended_processes: list[tuple[float, dict[str, float]]] = []
        self._waiting: list[Json] = []  # evaluations whose token counts depend on the next line

    def add(self, line: Json) -> None:
        step, tokens = number(line.get("step")), number(line.get("tokens"))
        if step is not None and any(key in line for key in (*EVALUATED, TASKS)):
            self._add_evaluation({**line, "step": int(step)})
        elif step is not None and isinstance(line.get("samples"), dict):
            self.samples.add({**line, "step": int(step)})
        elif step is None or tokens is None or step <= self.last.get("step", 0) or not _SHAPE.issubset(line):
            self.unreadable += 1
        else:
            self._add_step({**line, "step": int(step), "tokens": int(tokens)})

    def _add_step(self, line: Json) -> None:
        tokens, before = line["tokens"], self.last
        self._place_evaluations(line)
        for key, curve in self.curves.items():
            curve.add(tokens, number(line.get(key)))
        if number(line.get("loss")) is None:
            self.first_without_loss = self.first_without_loss or line["step"]
            self.without_loss += 1
        if not self.stages or self.stages[-1].number != line["stage"]:
            self.lines.pin()
            self.stages.append(StageLog(line, before.get("tokens", 0), before.get("step", 0)))
        self.stages[-1].add(line, tokens - before.get("tokens", 0))
        self.lines.add(line)
        # Each process counts time from zero.
        if before and _start(before) != _start(line):
            self._ended_processes.append(_process_time(before))
        self.last = line

    def _add_evaluation(self, line: Json) -> None:
        loss = number(line.get("eval_loss"))
        if loss is not None or not self.evaluation:
            self.evaluation = line
        if loss is not None and (self.best is None or loss < self.best[1]):
            self.best = (line["step"], loss)
        if line["step"] == self.last.get("step"):
            self._place(line, self.last["tokens"])
        else:
            self._waiting.append(line)

    def _place_evaluations(self, line: Json) -> None:
        """Places waiting evaluations by interpolation: within a stage, every step has equally many tokens."""
        before = self.last or {"step": 0, "tokens": 0}
        for waiting in self._waiting:
            part = (waiting["step"] - before["step"]) / (line["step"] - before["step"])
            self._place(waiting, round(before["tokens"] + part * (line["tokens"] - before["tokens"])))
        self._waiting = []

    def _place(self, line: Json, tokens: int) -> None:
        for key, points in self.evaluations.items():
            if (value := number(line.get(key))) is not None:
                points.append((tokens, value, line["step"]))
        for name, found in (line.get("eval_by_source") or {}).items():
            if (value := number(found.get("loss"))) is not None:
                self.by_source.setdefault(name, []).append((tokens, value, line["step"]))
        for name, found in (line.get(TASKS) or {}).items():
            self.task_results[name] = found
            for metric in found:
                # A metric has a standard error; the number of questions has none.
                if f"{metric}_stderr" in found and (value := number(found[metric])) is not None:
                    error = number(found[f"{metric}_stderr"]) or 0.0
                    self.tasks.setdefault((name, metric), []).append((tokens, value, line["step"], error))

    def finish(self) -> None:
        """Call it after the last line. Places evaluations of steps not logged yet, using the last step's tokens."""
        step_tokens = (number(self.last.get("seq_len")) or 0) * (number(self.last.get("batch_size")) or 0)
        for waiting in self._waiting:
            self._place(waiting, int(self.last["tokens"] + (waiting["step"] - self.last["step"]) * step_tokens))
        self._waiting = []

    @property
    def restarts(self) -> int:
        return len(self._ended_processes)

    def time_spent(self) -> dict[str, float]:
        """Seconds of steps, of each span, and "lost": steps trained again after a kill, which no line records."""
        spent = {STEPS: 0.0}
        for steps, spans in (*self._ended_processes, _process_time(self.last)):
            spent[STEPS] += steps
            for span, seconds in spans.items():
                spent[span] = spent.get(span, 0.0) + seconds
        total = number(self.last.get("time")) or 0.0
        spent[LOST] = max(total - sum(spent.values()), 0.0)
        return {span: seconds for span in _SPANS if (seconds := spent.get(span, 0.0)) > 0.0005 * total}

    @property
    def sources(self) -> list[str]:
        """The sources in the config's order."""
        return list(self.last.get("sources") or {})

    def stage_config(self, stage: int) -> Mapping[str, Any]:
        """The stage's config; empty if unknown."""
        stages = (self.config or {}).get("stages") or []
        return stages[stage - 1] if stage <= len(stages) else {}

    def stage_name(self, stage: int) -> str:
        return str(self.stage_config(stage).get("name", f"stage {stage}"))

    def targets(self, stage: int) -> dict[str, float] | None:
        """Each source's target share of the tokens; None if unknown."""
        found = self.stage_config(stage)
        if not found:
            return None
        if found["weights"] is None:
            return dict.fromkeys(self.sources[:1], 1.0)
        return {name: float(found["weights"].get(name, 0.0)) for name in self.sources}

    @property
    def total_tokens(self) -> int | None:
        """The target number of tokens; None if there is none or `steps` defines it."""
        config = self.config or {}
        for field in ("scale_to", "total_tokens"):
            if config.get(field) is not None:
                return config[field]
        tokens = [stage["tokens"] for stage in config.get("stages") or []]
        return sum(tokens) if tokens and all(tokens) and config.get("steps") is None else None


def source_tokens(line: Json) -> dict[str, int]:
    """Returns each source's tokens up to a logged step."""
    return {name: int(number(source.get("tokens")) or 0) for name, source in (line.get("sources") or {}).items()}


def _start(line: Json) -> Any:
    spans = line.get("seconds")
    return spans.get("start") if isinstance(spans, dict) else None


def _seconds(line: Json) -> dict[str, float]:
    spans = line.get("seconds")
    return {name: number(value) or 0.0 for name, value in spans.items()} if isinstance(spans, dict) else {}


def _process_time(line: Json) -> tuple[float, dict[str, float]]:
    """Returns seconds of steps and of each span, from a process's last line. Goodput is the share of steps."""
    spans, goodput = _seconds(line), number(line.get("goodput")) or 0.0
    return sum(spans.values()) * goodput / max(1 - goodput, 1e-9), spans


def read(path: str) -> RunLog:
    """Reads a work directory. Raises UserError if it does not exist or no step is logged yet."""
    workdir = Workdir(path)
    if not workdir.metrics.exists():
        raise _nothing_at(path, workdir)
    run = RunLog(workdir.path.name, redact(os.fspath(workdir.path)), _config(workdir), _parameters(workdir))
    for line in _lines(workdir.metrics):
        if line is None:
            run.unreadable += 1
        else:
            run.add(line)
    for line in _lines(workdir.spikes) if workdir.spikes.exists() else ():
        if line is None or number(line.get("step")) is None or not isinstance(line.get("documents"), list):
            run.unreadable += 1
        else:
            run.spikes.add(line)
    if not run.last:
        raise UserError(f"{path}: no step is logged in metrics.jsonl yet. Run this again after the first one.")
    traces = workdir.path / "profile" / "plugins" / "profile"
    if traces.exists():
        run.profiles = sorted(os.fspath(path.relative_to(workdir.path)) for path in traces.iterdir())
    run.finish()
    return run


def tell_apart(runs: Sequence[RunLog]) -> None:
    """Makes the names of runs unique, by adding their parent folders' names or using whole paths."""
    for depth in (1, 2, 3):
        names = ["/".join(run.path.rstrip("/").split("/")[-depth:]) for run in runs]
        if len(set(names)) == len(names):
            break
    else:
        names = [run.path for run in runs]
    for run, name in zip(runs, names, strict=True):
        run.name = name


def _lines(path: epath.Path) -> Iterator[Json | None]:
    """Yields a file's objects, one per line; None for a line that is not an object, such as one being written."""
    size = path.stat().length
    # None shows the bar only on a terminal.
    with (
        path.open("rb") as file,
        tqdm(total=size, desc=path.parent.name, unit="B", unit_scale=True, disable=None, leave=False) as bar,
    ):
        for text in file:
            bar.update(len(text))
            try:
                line = json.loads(text)
            except ValueError:
                line = None
            yield line if isinstance(line, dict) else None


def _config(workdir: Workdir) -> Json | None:
    try:
        return cli.upgrade(json.loads(workdir.config.read_text()))
    except (FileNotFoundError, ValueError):
        return None


def _parameters(workdir: Workdir) -> str | None:
    """Returns the number of parameters, from the beginning of the run's log."""
    if not workdir.log.exists():
        return None
    with workdir.log.open("rb") as file:
        lines = (line.decode(errors="replace") for line in file)
        return next((found[1] for line in lines if (found := _PARAMETERS.search(line))), None)


def _nothing_at(path: str, workdir: Workdir) -> UserError:
    if workdir.path.is_file():
        return UserError(f"{path} is a file: give the work directory that holds metrics.jsonl")
    if workdir.path.exists():
        return UserError(
            f"{path} holds no metrics.jsonl: either no run has logged a step there yet, or it is not a work directory"
        )
    parent = workdir.path.parent
    beside = sorted(one.name for one in parent.iterdir() if one.is_dir()) if parent.exists() else []
    near = difflib.get_close_matches(workdir.path.name, beside)
    hint = f" Did you mean {' or '.join(os.fspath(parent / name) for name in near)}?" if near else ""
    if not near and beside:
        hint = f" {parent} has {', '.join(beside[:10])}{', ...' if len(beside) > 10 else ''}."
    return UserError(f"{path}: there is no such directory.{hint}")
