"""The report as a self-contained HTML page with tables and charts."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

from jaxtrain import cli
from jaxtrain.interfaces import Json
from tools.report import charts, style
from tools.report.charts import Figure
from tools.report.elements import allowed, bar, percent, short, text
from tools.report.reading import LOST, STEPS, RunLog, StageLog
from tools.report.series import number

_NONE = "–"
# Span of `RunLog.time_spent` → label, color.
_SPANS = {
    STEPS: ("steps", 2),
    "data": ("waiting for data", 1),
    "start": ("start", 7),
    "compile": ("compiling", 0),
    "checkpoint": ("checkpoints", 4),
    "evaluation": ("evaluation", 3),
    "samples": ("samples", 3),
    "stage change": ("stage changes", 6),
    LOST: ("lost at restarts", 5),
}
_MAX_DIFFERENCES = 60  # rows per run
_MAX_DOCUMENTS = 5  # of a spike
_FOLDER = pathlib.Path(__file__).parent
# The page runs its own scripts and loads nothing.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def page(runs: Sequence[RunLog]) -> str:
    title = ", ".join(run.name for run in runs)
    several = len(runs) > 1
    figures: list[Figure] = []

    def drawn(figure: Figure) -> str:
        figures.append(figure)
        return _figure(figure, len(figures) - 1)

    body = [
        f"<h1>{text(title)}</h1>",
        f'<p class="lead">{text(" | ".join(_progress(run, several) for run in runs))}</p>',
        _summary(runs),
        "<h2>Curves</h2>",
        _TOOLBAR,
        _legend_of_runs(runs),
    ]
    loss = charts.loss(runs)
    body += [] if loss is None else [drawn(loss)]
    body += [drawn(figure) for run in runs if (figure := charts.by_source(run, several)) is not None]
    body += ['<div class="grid2">', *map(drawn, charts.small(runs)), "</div>"]
    if tasks := charts.tasks(runs):
        body += ["<h2>Benchmarks</h2>", '<div class="grid2">', *map(drawn, tasks), "</div>"]
    mixes = [figure for run in runs if (figure := charts.mix(run, several)) is not None]
    body += ["<h2>Mix</h2>", *map(drawn, mixes)] if mixes else []
    for run in runs:
        if run.spikes.items():
            body += [f"<h2>Spikes{text(f', {run.name}') if several else ''}</h2>", _spikes(run)]
    for run in runs:
        if run.samples.items():
            body += [f"<h2>Samples{text(f', {run.name}') if several else ''}</h2>", _samples(run)]
    for run in runs:
        body += [f"<h2>Stages{text(f', {run.name}') if several else ''}</h2>", _stages(run), _ledger(run)]
    if several:
        body += ["<h2>Differences between the configs</h2>", *(_differences(runs[0], run) for run in runs[1:])]
    body += ["<h2>Configs</h2>", *(_config(run) for run in runs)]
    library = [(_FOLDER / "uplot" / name).read_text() for name in ("uPlot.min.css", "uPlot.iife.min.js")]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        f"<title>{text(title)}: report</title>\n<style>{library[0]}{style.CSS}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f'\n<script type="application/json" id="data">{_data(runs, figures)}</script>\n'
        + f"<script>{library[1]}</script>\n<script>{(_FOLDER / 'charts.js').read_text()}</script>\n</body>\n</html>\n"
    )


_TOOLBAR = (
    '<p class="tools"><label>Smoothing <input id="smoothing" type="range" min="0" max="0.98" step="0.02" value="0">'
    '</label><button id="reset" hidden>Whole run</button><span>Drag over a chart to zoom, double-click for the whole '
    "run, click a name to hide its curve.</span></p><noscript>The curves need JavaScript.</noscript>"
)


def _data(runs: Sequence[RunLog], figures: Sequence[Figure]) -> str:
    """What charts.js draws, as JSON that no name can end or leave."""
    content = {
        "runs": [charts.hover(run) for run in runs],
        "figures": [dataclasses.asdict(figure) for figure in figures],
        "dashes": style.DASHES,
    }
    return allowed(json.dumps(content, ensure_ascii=False).replace("<", "\\u003c"))


def _progress(run: RunLog, with_name: bool) -> str:
    tokens, total = run.last["tokens"], run.total_tokens
    done = f"{tokens:,} of {total:,} tokens ({tokens / total:.1%})" if total else f"{tokens:,} tokens"
    return f"{run.name + ': ' if with_name else ''}step {run.last['step']:,}, {done}"


# The table of runs.


def _summary(runs: Sequence[RunLog]) -> str:
    rows: list[tuple[str, Callable[[RunLog], str]]] = [
        ("Work directory", lambda run: f"<code>{text(run.path)}</code>"),
        ("Model", lambda run: text(_model(run.config))),
        ("Parameters", lambda run: text((run.parameters or _NONE).replace(" parameters", ""))),
        ("Optimizer", lambda run: text(_optimizer(run.config))),
        ("Sources", lambda run: text(", ".join(run.sources))),
        ("Tokens", lambda run: text(_tokens(run))),
        ("Final loss", lambda run: text(_final_loss(run))),
        ("Held out", lambda run: text(_held_out(run))),
        ("Benchmarks", lambda run: text(_tasks(run))),
        ("Fingerprint", lambda run: f"<code>{text(run.last.get('fingerprint', _NONE))}</code>"),
        ("Throughput", lambda run: text(_throughput(run))),
        ("Peak memory", lambda run: text(_peak_memory(run))),
        ("Time", lambda run: text(_time(run))),
        ("Where it went", _where_time_went),
        ("Profiles", _profiles),
        ("Remarks", lambda run: text("; ".join(_remarks(run)) or _NONE)),
    ]
    head = "".join(f"<th>{text(run.name)}</th>" for run in runs)
    lines = [
        "".join([f"<tr><th>{name}</th>", *(f"<td>{cell(run)}</td>" for run in runs), "</tr>"]) for name, cell in rows
    ]
    return (
        f'<div class="table"><table class="runs"><thead><tr><th></th>{head}</tr></thead>{"".join(lines)}</table></div>'
    )


def _kind_of(config: Json) -> str:
    return str(config.get(cli.KIND, "")).rpartition(":")[2]


def _model(config: Json | None) -> str:
    if config is None:
        return _NONE
    model = config["model"]
    # External models may have other fields.
    shown = {"num_layers": "{} layers", "hidden_size": "{} wide", "num_heads": "{} heads", "dtype": "{}"}
    parts = [form.format(model[field]) for field, form in shown.items() if field in model]
    return ", ".join([_kind_of(model), *parts])


def _optimizer(config: Json | None) -> str:
    if config is None:
        return _NONE
    found = config["optimizer"]
    return f"{_kind_of(found)}, learning rate {short(found['learning_rate'])}, {_kind_of(found['schedule'])}"


def _tokens(run: RunLog) -> str:
    sources = (run.last.get("sources") or {}).values()
    unique, documents = (sum(int(number(s.get(key)) or 0) for s in sources) for key in ("unique_tokens", "documents"))
    return f"{run.last['tokens']:,} in {run.last['step']:,} steps; {unique:,} unique, of {documents:,} documents"


def _final_loss(run: RunLog) -> str:
    loss, perplexity = number(run.last.get("loss")), number(run.last.get("perplexity"))
    if loss is None:
        return "not finite"
    return f"{loss:.4f}" + (f" (perplexity {perplexity:,.2f})" if perplexity is not None else "")


def _held_out(run: RunLog) -> str:
    loss, bits = (number(run.evaluation.get(key)) for key in ("eval_loss", "eval_bits_per_byte"))
    if loss is None:
        return _NONE
    found = f"{loss:.4f}" + (f", {bits:.4f} bits per byte" if bits is not None else "")
    found += f" (step {run.evaluation['step']:,})"
    if run.best is not None and run.best[0] != run.evaluation["step"]:
        found += f"; best {run.best[1]:.4f} (step {run.best[0]:,})"
    return found


def _tasks(run: RunLog) -> str:
    """The last results: acc_norm where a benchmark has it, else its first metric."""
    found = []
    for name, result in run.task_results.items():
        metric = "acc_norm" if "acc_norm" in result else next(iter(result))
        value, error = number(result[metric]), number(result.get(f"{metric}_stderr"))
        if value is not None:
            found.append(f"{name} {metric} {value:.4g}" + (f" ± {error:.2g}" if error is not None else ""))
    return "; ".join(found) or _NONE


def _throughput(run: RunLog) -> str:
    rates = [stage.median_rate for stage in run.stages if stage.median_rate]
    if not rates:
        return _NONE
    spread = f"{min(rates):,.0f} to {max(rates):,.0f}, by stage" if len(rates) > 1 else f"{rates[0]:,.0f}"
    mfu = number(run.last.get("mfu"))
    return f"{spread} (tokens/s, median)" + (f", MFU {percent(mfu)}" if mfu is not None else "")


def _peak_memory(run: RunLog) -> str:
    """Peak over all processes of the run: each process starts its own high-water mark."""
    peaks = [peak for _, peak in run.curves["memory_gb"].points()]
    return f"{max(peaks):.2f} GB" if peaks else _NONE


def _duration(seconds: float) -> str:
    for size, form in ((86_400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:,.1f} {form}"
    return f"{seconds:.1f} s"


def _time(run: RunLog) -> str:
    total = number(run.last.get("time"))
    if total is None:
        return _NONE
    restarts = f", {run.restarts} restart{'s' if run.restarts > 1 else ''}" if run.restarts else ""
    return f"{_duration(total)}{restarts}"


def _where_time_went(run: RunLog) -> str:
    spent = run.time_spent()
    total = sum(spent.values())
    if not total:
        return _NONE
    told = {span: f"{_SPANS[span][0]} {seconds / total:.1%}" for span, seconds in spent.items()}
    parts = [
        (f"f{_SPANS[span][1]}", seconds / total, f"{told[span]} ({_duration(seconds)})")
        for span, seconds in spent.items()
    ]
    return bar(parts) + " ".join(_key(f"box f{_SPANS[span][1]}", told[span]) for span in spent)


def _profiles(run: RunLog) -> str:
    """Links to the traces in the work directory, for which docs/watching.md names a viewer."""
    links = [f'<a href="{text(path)}">{text(path.rpartition("/")[2])}</a>' for path in run.profiles]
    return ", ".join(links) or _NONE


def _remarks(run: RunLog) -> list[str]:
    found = []
    skipped = number(run.last.get("skipped"))
    if skipped:
        found.append(f"{skipped:,.0f} updates skipped: gradients not finite, or spikes")
    if run.without_loss:
        found.append(f"{run.without_loss:,} logged losses not finite, the first at step {run.first_without_loss:,}")
    if run.unreadable:
        found.append(f"{run.unreadable:,} lines of metrics.jsonl not readable")
    return found


# Charts.


def _key(kind: str, label: str) -> str:
    """A colored mark, such as "line s0" or "box f0", and its meaning."""
    line = f'<line class="{kind}" x1="1" x2="25" y1="6" y2="6" stroke-width="2"/>'
    box = f'<rect class="{kind}" x="6" y="0" width="14" height="12" rx="2"/>'
    drawn = f'<svg class="key" viewBox="0 0 26 12" aria-hidden="true">{line if kind.startswith("line") else box}</svg>'
    return f'<span class="legend">{drawn}{text(label)}</span>'


def _legend_of_runs(runs: Sequence[RunLog]) -> str:
    if len(runs) == 1:
        return ""
    keys = "".join(_key(f"line s{charts.run_color(index)}", run.name) for index, run in enumerate(runs))
    shaded = len(runs[0].stages) > 1
    note = f" Shaded: the stages of {runs[0].name}." if shaded and not charts.same_stages(runs) else ""
    return f'<figcaption class="runs">{keys}<span class="legend">{text(note)}</span></figcaption>'


def _figure(figure: Figure, number: int) -> str:
    button = "" if figure.log is None else f"<button>{'linear' if figure.log else 'log'}</button>"
    targets = '<span class="legend">Dashed: the targets of the stages.</span>' if figure.targets else ""
    caption = f"<figcaption><h3>{text(figure.title)}</h3>{targets}{button}</figcaption>"
    return f'<figure>{caption}<div class="chart" data-figure="{number}"></div></figure>'


# Samples.


def _spikes(run: RunLog) -> str:
    """Shows each spike with its documents that stand out, at least the one with the highest loss."""
    columns = ("Step", "What was done", "Stand out", "Source", "File", "Row", "Tokens", "Loss", "Gradient norm")
    rows = []
    for spike in run.spikes.items():
        documents, count = spike["documents"], int(number(spike.get("standing_out")) or 0)
        loss, norm = (_decimal(spike.get(name)) for name in ("loss", "grad_norm"))
        cells = (f"{spike['step']:,}", spike.get("done", _NONE), f"{count:,} of {len(documents):,}")
        rows.append(_row((*cells, *[""] * 4, loss, norm), 5, ' class="first"'))
        for document in documents[: min(max(count, 1), _MAX_DOCUMENTS)]:
            shown = (document.get(name, _NONE) for name in ("source", "file", "row", "tokens"))
            loss = _decimal(document["loss"]) if "loss" in document else _NONE
            rows.append(_row(("", "", "", *shown, loss, ""), 5))
    return _table(columns, rows, 5)


def _decimal(value: Any) -> str:
    return "not finite" if (found := number(value)) is None else f"{found:.4f}"


def _samples(run: RunLog) -> str:
    """The last samples of the run, and earlier ones to open."""
    found = []
    for line in reversed(run.samples.items()):
        shown = "\n\n".join(f"{prompt}{continued}" for prompt, continued in line["samples"].items())
        state = "" if found else " open"
        found.append(f"<details{state}><summary>Step {line['step']:,}</summary><pre>{text(shown)}</pre></details>")
    return "".join(found)


# Tables of stages.


def _table(columns: Sequence[str], rows: Sequence[str], words: int) -> str:
    """Formats a table. The first `words` columns contain text, the others numbers."""
    head = _cells("th", columns, words)
    return f'<div class="table"><table><thead><tr>{head}</tr></thead>{"".join(rows)}</table></div>'


def _row(cells: Sequence[object], words: int, kind: str = "") -> str:
    return f"<tr{kind}>{_cells('td', cells, words)}</tr>"


def _cells(tag: str, cells: Sequence[object], words: int) -> str:
    kinds = ("" if index < words else ' class="n"' for index in range(len(cells)))
    return "".join(f"<{tag}{kind}>{text(cell)}</{tag}>" for kind, cell in zip(kinds, cells, strict=True))


def _stages(run: RunLog) -> str:
    columns = ("Stage", "Row length", "Batch", "Steps", "Tokens", "Tokens/s (median)", "Data wait", "Loss at its end")
    rows = []
    for stage in run.stages:
        line, loss = stage.last, number(stage.last.get("loss"))
        cells = (
            _stage_title(run, stage),
            f"{line['seq_len']:,}",
            f"{line['batch_size']:,}",
            f"{stage.first_step:,} to {line['step']:,}",
            f"{stage.last_token - stage.first_token:,}",
            _NONE if stage.median_rate is None else f"{stage.median_rate:,.0f}",
            _NONE if stage.data_wait is None else percent(stage.data_wait),
            "not finite" if loss is None else f"{loss:.4f}",
        )
        rows.append(_row(cells, 1))
    return _table(columns, rows, 1)


def _stage_title(run: RunLog, stage: StageLog) -> str:
    name = run.stage_name(stage.number)
    return name if name == f"stage {stage.number}" else f"{stage.number} {name}"


def _ledger(run: RunLog) -> str:
    """Shows what each stage took from each source, or notes that the log does not record it."""
    columns = ("Stage", "Source", "Target", "Share", "Tokens", "Unique tokens", "Documents", "Epochs")
    rows, unknown = [], False
    for stage in run.stages:
        sources, target = stage.sources, run.targets(stage.number)
        if sources is None:
            unknown = True
            rows.append(_row((_stage_title(run, stage), "not known", *[_NONE] * 6), 2, ' class="first"'))
            continue
        shown = [name for name in sources if sources[name]["tokens"] or (target or {}).get(name)]
        for index, name in enumerate(shown):
            title = "" if index else _stage_title(run, stage)
            wanted = _NONE if target is None or name not in target else f"{target[name]:.2%}"
            rows.append(
                _row((title, name, wanted, *_counts(sources[name], "epochs")), 2, "" if index else ' class="first"')
            )
    if len(run.stages) > 1 or unknown:
        for index, (name, totals) in enumerate((run.last.get("sources") or {}).items()):
            cells = ("" if index else "all", name, _NONE, *_counts(totals, "epoch"))
            rows.append(_row(cells, 2, "" if index else ' class="first"'))
    note = "Epochs: completed by the lane that is furthest behind."
    if unknown:
        note += " Not known: an earlier version logged the stage's end, or a checkpoint in it, without recording this."
    return _table(columns, rows, 2) + f'<p class="note">{text(note)}</p>'


def _counts(totals: Json, epochs: str) -> list[str]:
    share, *counts = (totals[key] for key in ("share", "tokens", "unique_tokens", "documents", epochs))
    return [f"{share:.2%}", *(f"{count:,}" for count in counts)]


# Configs.


def _differences(first: RunLog, other: RunLog) -> str:
    if first.config is None or other.config is None:
        return f'<p class="note">{text(other.name)}: a config.json is missing.</p>'
    found = cli.differences(first.config, other.config)
    rows = [_row((path, _value(old), _value(new)), 3) for path, old, new in found[:_MAX_DIFFERENCES]]
    if len(found) > _MAX_DIFFERENCES:
        rows.append(_row((f"and {len(found) - _MAX_DIFFERENCES:,} more", "", ""), 3))
    if not rows:
        return f'<p class="note">{text(other.name)}: none.</p>'
    return _table(("Field", first.name, other.name), rows, 3)


def _value(value: Any) -> str:
    shown = (
        json.dumps(value, ensure_ascii=False) if isinstance(value, str | int | float | list | dict | None) else "absent"
    )
    return shown if len(shown) <= 200 else f"{shown[:197]}..."


def _config(run: RunLog) -> str:
    if run.config is None:
        return f'<p class="note">{text(run.name)}: no config.json.</p>'
    shown = json.dumps(run.config, indent=2, ensure_ascii=False)
    return f"<details><summary>{text(run.name)}</summary><pre>{text(shown)}</pre></details>"
