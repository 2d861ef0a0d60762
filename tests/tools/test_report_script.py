"""The report's scripts run: charts are drawn, and cursor, zoom, smoothing and logarithmic axes do what they say."""

import json
import re
from pathlib import Path
from typing import Any

import py_mini_racer
import pytest

from tests.tools import test_report as reports

BROWSER = Path(__file__).with_name("browser.js").read_text()


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """Evaluates JavaScript after the scripts of a page with two runs, and returns its JSON."""
    tasks = {"boolq": {"acc": 0.5, "acc_stderr": 0.1, "questions": 12}}
    held_out = {
        "step": 40,
        "eval_loss": 2.0,
        "eval_by_source": {"web": {"loss": 2.5, "bits_per_byte": 1.0, "tokens": 8}},
    }
    first = reports.write(tmp_path / "first", [*reports.lines(), {**held_out, "eval_tasks": tasks, "time": 71.0}])
    second = reports.write(tmp_path / "second", reports.lines(log_every=5))
    assert reports.make(first, second, f"--output={tmp_path / 'both.html'}") == 0
    page = (tmp_path / "both.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    scripts = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    browser = py_mini_racer.MiniRacer()
    browser.eval(f"const DATA = {json.dumps(data)};\n{BROWSER}")
    for script in scripts:
        browser.eval(script)
    return lambda code: json.loads(str(browser.eval(f"JSON.stringify((() => {{ {code} }})())")))


def test_every_chart_is_drawn(run: Any) -> None:
    curves = run("return page.figures.map(f => f.curves.length)")
    assert len(curves) == 10
    assert run("return charts.map(c => c.plot.series.length - 1)") == curves
    shown = run("return charts.map(c => [c.plot.scales.x.min, c.plot.scales.x.max, c.plot.scales.y.min])")
    for figure, (low, high, least) in zip(run("return page.figures"), shown, strict=True):
        assert (low, high) == (0, figure["last"])
        assert least <= min(min(curve["y"]) for curve in figure["curves"])


def test_the_cursor_shows_the_values(run: Any) -> None:
    legend = """
        const text = node => node.textContent;
        charts[0].plot.setCursor({ left: 300, top: 50 });
        return charts[0].plot.root.childNodes.at(-1).childNodes.flatMap(part => part.childNodes.map(text));
    """
    assert run(legend) == [
        "Value7,680 tokens · first: step 50, stage 2 (long & <wide>) · second: step 50, stage 2 (long & <wide>)",
        "first, training2.5000",
        "first, held out2.0000 (step 40)",
        "second, training2.5000",
        "second, held out2.0000 (step 40)",
    ]


def test_a_drag_zooms_all_charts(run: Any) -> None:
    ranges = "return charts.map(c => [c.plot.scales.x.min, c.plot.scales.x.max]).concat([byId.reset.hidden])"
    run("charts[3].plot.setSelect({ left: 100, top: 0, width: 200, height: 9 }); return 1")
    *zoomed, hidden = run(ranges)
    assert not hidden
    assert zoomed.count(zoomed[0]) == len(zoomed)
    assert 0 < zoomed[0][0] < zoomed[0][1] < 12_800
    run("byId.reset.onclick(); return 1")
    *whole, hidden = run(ranges)
    assert hidden
    assert whole[0] == [0, 12_800]


def test_smoothing_adds_a_curve_and_keeps_the_raw_one(run: Any) -> None:
    run("byId.smoothing.oninput({ target: { value: '0.5' } }); return 1")
    raw, smooth = run("return [charts[2].plot.data[1], charts[2].plot.data[2]].map(y => y.filter(v => v != null))")
    assert raw == run("return page.figures[2].curves[0].y")
    # An exponential moving average, corrected for its start.
    mean = weight = 0.0
    for value, found in zip(raw, smooth, strict=True):
        mean, weight = (mean + value) / 2, (weight + 1) / 2
        assert found == pytest.approx(mean / weight)
    assert run("return charts.map(c => c.plot.series.length - 1)")[0] == 6  # held-out losses are not smoothed


def test_a_logarithmic_axis(run: Any) -> None:
    button = "const button = charts[0].node.parentElement.querySelector('button'); "
    labels = run(f"{button} button.onclick(); return [charts[0].plot.scales.y.distr, button.textContent]")
    assert labels == [3, "linear"]
    assert run("return charts[0].plot.scales.y.min > 0")
    assert run(f"{button} button.onclick(); return charts[0].plot.scales.y.distr") == 1
