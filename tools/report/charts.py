"""The charts of a report as data, with one or several runs on the same axes; charts.js draws them."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal

from jaxtrain.interfaces import Json
from tools.report.reading import RunLog, source_tokens
from tools.report.series import Point

COLORS = 8  # defined in the page's style
_LOG_FROM = 8.0  # ratio of highest to lowest value above which the axis is logarithmic
Form = Literal["short", "percent", "loss"]  # how charts.js writes values


@dataclasses.dataclass(frozen=True)
class Curve:
    """A curve. `color` is an index in the page's style.

    With `steps`, one for each point, points are marked. `errors` are the points' standard errors.
    """

    label: str
    points: Sequence[Point]
    color: int
    steps: Sequence[int] = ()
    errors: Sequence[float] = ()

    def to_json(self) -> Json:
        xs, ys = zip(*self.points, strict=True)
        notes = {"steps": list(self.steps) or None, "errors": list(self.errors) or None}
        return {"label": self.label, "color": self.color, "x": xs, "y": ys, **notes}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """A chart.

    Attributes:
        title: its title.
        curves: what it shows, over tokens; for a stacked chart as JSON.
        bands: the stages: first and last token, number, name.
        last: the last token of its axis.
        zero: whether the axis of values starts at 0.
        log: whether that axis is logarithmic at first; None if it never is.
        form: how values are written.
        wide: whether it takes the page's width.
        stacked: whether the curves are the upper bounds of layers.
        targets: dashed levels: first and last token, value.
    """

    title: str
    curves: Sequence[Json]
    bands: Sequence[tuple[int, int, int, str]]
    last: float
    zero: bool = False
    log: bool | None = None
    form: Form = "short"
    wide: bool = False
    stacked: bool = False
    targets: Sequence[tuple[int, int, float]] = ()


@dataclasses.dataclass(frozen=True)
class Plan:
    """A small chart of one key of metrics.jsonl. `log` allows a logarithmic axis if the values span a wide range."""

    key: str
    title: str
    zero: bool = False
    log: bool = False
    form: Form = "short"


SMALL = (
    Plan("learning_rate", "Learning rate", zero=True),
    Plan("grad_norm", "Gradient norm", log=True),
    Plan("ce_loss", "Cross-entropy (nats per token)"),
    Plan("kd_loss", "Distillation loss (nats per token)"),
    Plan("tokens_per_sec", "Throughput (tokens per second)", zero=True),
    Plan("data_wait", "Fraction of the time that steps waited for data", zero=True, form="percent"),
    Plan("mfu", "Model FLOPs utilization", zero=True, form="percent"),
    Plan("memory_gb", "Peak memory (GB; the fullest device, or the process on CPU)", zero=True),
    Plan("disk_cache_gb", "Disk cache (GB)", zero=True),
)


def run_color(index: int) -> int:
    return index % COLORS


def figure(runs: Sequence[RunLog], title: str, curves: Sequence[Curve], **settings: object) -> Figure:
    """A chart of curves, with the stages of the first run."""
    last = max(run.last["tokens"] for run in runs)
    last = max(last, *(curve.points[-1][0] for curve in curves))
    made = [curve.to_json() for curve in curves]
    return Figure(title=title, curves=made, bands=bands(runs[0]), last=last, **settings)  # type: ignore[arg-type]


def bands(run: RunLog) -> list[tuple[int, int, int, str]]:
    """Returns the stages as bands; empty if there is only one."""
    if len(run.stages) < 2:
        return []
    return [(stage.first_token, stage.last_token, stage.number, run.stage_name(stage.number)) for stage in run.stages]


def same_stages(runs: Sequence[RunLog]) -> bool:
    """Whether the stages of all runs have the same bounds, up to each run's current step."""
    bounds = [[stage.first_token for stage in run.stages] for run in runs]
    return all(a == b for one, other in itertools.pairwise(bounds) for a, b in zip(one, other, strict=False))


def marked(label: str, found: Sequence[tuple[float, float, int]], color: int) -> Curve:
    """A curve of evaluations: (tokens, value, step)."""
    return Curve(label, [(x, y) for x, y, _ in found], color, [step for _, _, step in found])


def loss(runs: Sequence[RunLog]) -> Figure | None:
    """Charts training loss as curves and held-out loss as marks."""
    curves = []
    for index, run in enumerate(runs):
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        if points := run.curves["loss"].points():
            curves.append(Curve(f"{prefix}training", points, run_color(index)))
        if evaluated := run.evaluations["eval_loss"]:
            curves.append(marked(f"{prefix}held out", evaluated, run_color(index)))
    if not curves:
        return None
    values = [y for curve in curves for _, y in curve.points]
    log = None if max(values) <= 0 else min(values) > 0 and max(values) / min(values) > _LOG_FROM
    return figure(runs, "Loss (nats per token)", curves, log=log, form="loss", wide=True)


def by_source(run: RunLog, with_name: bool) -> Figure | None:
    """Charts the held-out loss of each source. None without evaluations by source."""
    if not run.by_source:
        return None
    title = "Held-out loss by source (nats per token)" + (f", {run.name}" if with_name else "")
    curves = [marked(name, found, index % COLORS) for index, (name, found) in enumerate(run.by_source.items())]
    return figure([run], title, curves, form="loss", wide=True)


def tasks(runs: Sequence[RunLog]) -> list[Figure]:
    """Charts each metric of each benchmark, all runs together."""
    keys = dict.fromkeys(key for run in runs for key in run.tasks)
    found = []
    for name, metric in keys:
        named = ((index, run.name, run.tasks.get((name, metric))) for index, run in enumerate(runs))
        curves = [
            dataclasses.replace(
                marked(label, [point[:3] for point in points], run_color(index)), errors=[point[3] for point in points]
            )
            for index, label, points in named
            if points
        ]
        form = "short" if metric == "perplexity" else "percent"
        found.append(figure(runs, f"{name}, {metric}", curves, form=form))
    return found


def small(runs: Sequence[RunLog]) -> list[Figure]:
    """Returns the small charts that at least one run has values for."""
    return [found for plan in SMALL if (found := _small(runs, plan)) is not None]


def _small(runs: Sequence[RunLog], plan: Plan) -> Figure | None:
    curves = [
        Curve(run.name, points, run_color(index))
        for index, run in enumerate(runs)
        # Without distillation, the loss chart already shows the cross-entropy.
        if (points := run.curves[plan.key].points()) and (plan.key != "ce_loss" or run.curves["kd_loss"].last)
    ]
    if not curves:
        return None
    values = [y for curve in curves for _, y in curve.points if y > 0]
    log = len(values) > 1 and max(values) / min(values) > _LOG_FROM if plan.log else None
    return figure(runs, plan.title, curves, zero=plan.zero, log=log, form=plan.form)


def mix(run: RunLog, with_name: bool) -> Figure | None:
    """Charts the share of each source between logged lines, and the stages' targets. None for a single source."""
    names = run.sources
    if len(names) < 2:
        return None
    title = "Mix: share of the tokens by source" + (f", {run.name}" if with_name else "")
    ends, shares = _shares(run, names)
    tops = [list(itertools.accumulate(span)) for span in shares]
    # The highest layer first: those below it are drawn over it.
    curves = [
        {
            "label": name,
            "color": index % COLORS,
            "x": [0, *ends],
            "y": [top[index] for top in (tops[:1] + tops)],
            "shares": [span[index] for span in (shares[:1] + shares)],
            "steps": None,
        }
        for index, name in reversed(list(enumerate(names)))
    ]
    return Figure(
        title=title,
        curves=curves,
        bands=bands(run),
        last=run.last["tokens"],
        form="percent",
        wide=True,
        stacked=True,
        targets=_targets(run, names),
    )


def _shares(run: RunLog, names: Sequence[str]) -> tuple[list[int], list[list[float]]]:
    """The last token of each span between logged lines, and the sources' shares in it."""
    ends, shares, before = [], [], dict.fromkeys(names, 0)
    for line in run.lines.items():
        now = source_tokens(line)
        parts = [now.get(name, 0) - before.get(name, 0) for name in names]
        if sum(parts) > 0:
            ends.append(line["tokens"])
            shares.append([part / sum(parts) for part in parts])
        before = now
    return ends, shares


def _targets(run: RunLog, names: Sequence[str]) -> list[tuple[int, int, float]]:
    found = []
    for stage in run.stages:
        target = run.targets(stage.number)
        if target is not None:
            tops = (round(top, 6) for top in itertools.accumulate(target[name] for name in names))
            found += [(stage.first_token, stage.last_token, top) for top in sorted({*tops}) if 0 < top < 1]
    return found


def hover(run: RunLog) -> Json:
    """What the cursor says about a run: steps and stages by tokens, and the stages' names."""
    lines = run.lines.items()
    keys = ("tokens", "step", "stage")
    tokens, steps, stages = ([line[key] for line in lines] for key in keys)
    most = max(stages, default=0)
    names = [run.stage_name(number) for number in range(1, most + 1)]
    return {"name": run.name, "tokens": tokens, "steps": steps, "stages": stages, "names": names}
