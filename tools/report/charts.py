"""The charts of a report, with one or several runs on the same axes."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from tools.report import svg
from tools.report.reading import RunLog, source_tokens
from tools.report.series import number

COLORS = 8  # defined in the page's style
_LOG_FROM = 8.0  # ratio of highest to lowest value above which the axis is logarithmic


@dataclasses.dataclass(frozen=True)
class Plan:
    """A small chart of one key of metrics.jsonl. `log` allows a logarithmic axis if the values span a wide range."""

    key: str
    title: str
    zero: bool = False
    log: bool = False
    form: svg.Format = svg.short


SMALL = (
    Plan("learning_rate", "Learning rate", zero=True),
    Plan("grad_norm", "Gradient norm", log=True),
    Plan("ce_loss", "Cross-entropy (nats per token)"),
    Plan("kd_loss", "Distillation loss (nats per token)"),
    Plan("tokens_per_sec", "Throughput (tokens per second)", zero=True),
    Plan("data_wait", "Fraction of the time that steps waited for data", zero=True, form=svg.percent),
    Plan("mfu", "Model FLOPs utilization", zero=True, form=svg.percent),
    Plan("memory_gb", "Peak memory (GB; the fullest device, or the process on CPU)", zero=True),
    Plan("disk_cache_gb", "Disk cache (GB)", zero=True),
)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart. `log` is its logarithmic version, if the reader can choose; `starts_log` shows that one first."""

    title: str
    drawing: str
    legend: Sequence[tuple[str, str]] = ()  # (style class, text)
    log: str | None = None
    starts_log: bool = False


def run_color(index: int) -> int:
    return index % COLORS


def frame(runs: Sequence[RunLog], tell: Callable[[RunLog, dict], str]) -> svg.Frame:
    """Returns the frame shared by all charts. `tell` maps a run and its logged line to the tooltip's text."""

    def hover(tokens: float) -> str:
        lines = [f"{tokens:,.0f} tokens"]
        for run in runs:
            found = run.nearest_line(tokens)
            if found is not None:
                stage = f", stage {found['stage']} ({run.stage_name(found['stage'])})" if len(run.stages) > 1 else ""
                lines.append(f"{run.name}: step {found['step']:,}{stage}, {tell(run, found)}")
        return "\n".join(lines)

    return svg.Frame(last_token=max(run.last["tokens"] for run in runs), bands=bands(runs[0]), hover=hover)


def bands(run: RunLog) -> list[svg.Band]:
    """Returns the stages as bands; empty if there is only one."""
    if len(run.stages) < 2:
        return []
    return [
        svg.Band(
            first=stage.first_token,
            last=stage.last_token,
            number=stage.number,
            name=run.stage_name(stage.number),
            note=f"Stage {stage.number} ({run.stage_name(stage.number)}): {stage.first_token:,} to "
            f"{stage.last_token:,} tokens",
        )
        for stage in run.stages
    ]


def same_stages(runs: Sequence[RunLog]) -> bool:
    """Whether the stages of all runs have the same bounds, up to each run's current step."""
    bounds = [[stage.first_token for stage in run.stages] for run in runs]
    return all(a == b for one, other in itertools.pairwise(bounds) for a, b in zip(one, other, strict=False))


def loss(runs: Sequence[RunLog]) -> Figure | None:
    """Charts training loss as curves and held-out loss as marks."""
    curves, legend = [], []
    for index, run in enumerate(runs):
        color = run_color(index)
        points = run.curves["loss"].points()
        prefix = f"{run.name}, " if len(runs) > 1 else ""
        if points:
            curves.append(svg.Curve(f"{prefix}training", points, color))
            legend.append((f"line s{color}", f"{prefix}training"))
        evaluated = run.evaluations["eval_loss"]
        if evaluated:
            notes = [f"{prefix}held out, step {step:,} ({x:,} tokens): {y:.4f}" for x, y, step in evaluated]
            places = [(x, y) for x, y, _ in evaluated]
            curves.append(svg.Curve(f"{prefix}held out", places, color, notes))
            legend.append((f"mark f{color}", f"{prefix}held out"))
    if not curves:
        return None
    shared = frame(runs, lambda run, line: f"loss {_shown(line.get('loss'))}")
    values = [y for curve in curves for _, y in curve.points]
    title = "Loss (nats per token)"
    linear = svg.line_chart(shared, title, curves, size=svg.WIDE)
    if max(values) <= 0:
        return Figure(title, linear, legend)
    log = svg.line_chart(shared, f"{title}, logarithmic", curves, size=svg.WIDE, log=True)
    return Figure(title, linear, legend, log, starts_log=min(values) > 0 and max(values) / min(values) > _LOG_FROM)


def by_source(run: RunLog, with_name: bool) -> Figure | None:
    """Charts the held-out loss of each source. None without evaluations by source."""
    if not run.by_source:
        return None
    title = "Held-out loss by source (nats per token)" + (f", {run.name}" if with_name else "")
    curves = []
    for index, (name, found) in enumerate(run.by_source.items()):
        notes = [f"{name}, step {step:,} ({x:,} tokens): {y:.4f}" for x, y, step in found]
        curves.append(svg.Curve(name, [(x, y) for x, y, _ in found], index % COLORS, notes))
    shared = svg.Frame(last_token=run.last["tokens"], bands=bands(run), hover=lambda tokens: "")
    legend = [(f"mark f{curve.color}", curve.label) for curve in curves]
    return Figure(title, svg.line_chart(shared, title, curves, size=svg.WIDE), legend)


def small(runs: Sequence[RunLog]) -> list[Figure]:
    """Returns the small charts that at least one run has values for."""
    return [found for plan in SMALL if (found := _small(runs, plan)) is not None]


def _small(runs: Sequence[RunLog], plan: Plan) -> Figure | None:
    curves = [
        svg.Curve(run.name, points, run_color(index))
        for index, run in enumerate(runs)
        # Without distillation, the loss chart already shows the cross-entropy.
        if (points := run.curves[plan.key].points()) and (plan.key != "ce_loss" or run.curves["kd_loss"].last)
    ]
    if not curves:
        return None
    values = [y for curve in curves for _, y in curve.points if y > 0]
    log = plan.log and len(values) > 1 and max(values) / min(values) > _LOG_FROM
    title = f"{plan.title}, logarithmic" if log else plan.title
    shared = frame(runs, lambda run, line: _told(line, plan))
    return Figure(title, svg.line_chart(shared, title, curves, zero=plan.zero, log=log, form=plan.form))


def _told(line: dict, plan: Plan) -> str:
    value = number(line.get(plan.key))
    return "no value" if value is None else plan.form(value)


def _shown(value: object) -> str:
    found = number(value)
    return "not finite" if found is None else f"{found:.4f}"


def mix(run: RunLog, with_name: bool) -> Figure | None:
    """Charts the share of each source between logged lines, and the stages' targets. None for a single source."""
    names = run.sources
    if len(names) < 2:
        return None
    title = "Mix: share of the tokens by source" + (f", {run.name}" if with_name else "")
    shared = svg.Frame(last_token=run.last["tokens"], bands=bands(run), hover=lambda tokens: "")
    drawing = svg.stack_chart(shared, title, len(names), _spans(run, names), _targets(run, names), (svg.WIDE[0], 260))
    legend = [(f"box f{index % COLORS}", name) for index, name in enumerate(names)]
    return Figure(title, drawing, [*legend, ("line target", "targets of the stages")])


def _spans(run: RunLog, names: Sequence[str]) -> list[svg.Shares]:
    spans, before, tokens = [], dict.fromkeys(names, 0), 0
    for line in run.lines.items():
        now, stage = source_tokens(line), line["stage"]
        parts = [now.get(name, 0) - before.get(name, 0) for name in names]
        if sum(parts) > 0:
            shares, target = [part / sum(parts) for part in parts], run.targets(stage)
            lines = [f"{tokens:,} to {line['tokens']:,} tokens, stage {stage} ({run.stage_name(stage)})"]
            for name, share in zip(names, shares, strict=True):
                wanted = "" if target is None else f" (target {target[name]:.2%})"
                lines.append(f"{name}: {share:.2%}{wanted}")
            spans.append(svg.Shares(tokens, line["tokens"], shares, "\n".join(lines)))
        before, tokens = now, line["tokens"]
    return spans


def _targets(run: RunLog, names: Sequence[str]) -> list[svg.Shares]:
    found = []
    for stage in run.stages:
        target = run.targets(stage.number)
        if target is not None:
            mixed = ", ".join(f"{name} {target[name]:.2%}" for name in names)
            note = f"Target of stage {stage.number} ({run.stage_name(stage.number)}): {mixed}"
            found.append(svg.Shares(stage.first_token, stage.last_token, [target[name] for name in names], note))
    return found
