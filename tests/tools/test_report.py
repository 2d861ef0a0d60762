"""tools.report: the page read back with parsers, its points and numbers against the lines that were logged."""

import html.parser
import itertools
import json
import math
import os
import re
from pathlib import Path

import pytest
from etils.epath import backend
from fsspec.implementations.memory import MemoryFileSystem

from jaxtrain import cli
from tools.report import __main__ as report
from tools.report.series import Series, Thinned

WEIGHTS = ({"web": 0.75, "code": 0.25}, {"web": 0.25, "code": 0.75})
STAGES = (("short", 8, 16, 40), ("long & <wide>", 32, 8, 30))  # name, seq_len, batch_size, steps


def config(**more):
    stages = [
        {"name": name, "tokens": seq_len * batch * steps, "weights": weights}
        for (name, seq_len, batch, steps), weights in zip(STAGES, WEIGHTS, strict=True)
    ]
    model = {"_kind": "llama", "num_layers": 2, "hidden_size": 32, "num_heads": 4, "dtype": "float32"}
    optimizer = {"_kind": "adamw", "learning_rate": 3e-3, "schedule": {"_kind": "cosine"}}
    return {"model": model, "optimizer": optimizer, "stages": stages, "total_tokens": None, "steps": None, **more}


def lines(log_every=10):
    """A run of two stages whose loss is 5 - step / 20, and whose shares are the targets."""
    found, tokens, step, given = [], 0, 0, {"web": 0, "code": 0}
    for stage, ((_, seq_len, batch, steps), weights) in enumerate(zip(STAGES, WEIGHTS, strict=True), 1):
        own = {"web": 0, "code": 0}
        for _ in range(steps):
            step, tokens = step + 1, tokens + seq_len * batch
            for name, weight in weights.items():
                own[name] += int(weight * seq_len * batch)
                given[name] += int(weight * seq_len * batch)
            if step != 1 and step % log_every and step != 40:
                continue
            numbers = {"loss": 5 - step / 20, "perplexity": math.exp(5 - step / 20), "learning_rate": step * 1e-5}
            numbers |= {"grad_norm": 1.0, "tokens_per_sec": 1000.0 * stage + step, "data_wait": 0.1 * stage}
            line = {"step": step, "tokens": tokens, "stage": stage, "seq_len": seq_len, "batch_size": batch, **numbers}
            line |= {"mfu": None, "memory_gb": 1.5, "disk_cache_gb": None, "fingerprint": f"{step:016x}", "skipped": 0}
            line["sources"] = {name: counts(number, tokens, "epoch") for name, number in given.items()}
            line["stage_sources"] = {name: counts(number, sum(own.values()), "epochs") for name, number in own.items()}
            line |= {"time": 35 + step / 2, "goodput": step / (70 + step), "seconds": {"start": 17.5, "compile": 17.5}}
            found.append(line)
            if step % 20 == 0:
                found.append({"step": step, "eval_loss": 4 - step / 20, "eval_bits_per_byte": 2.0, "time": float(step)})
    return found


def counts(tokens, of, epochs):
    share = tokens / max(of, 1)
    return {"tokens": tokens, "unique_tokens": tokens - 1, "documents": tokens // 7, epochs: 2, "share": share}


def write(folder, logged, settings=None):
    folder.mkdir()
    text = logged if isinstance(logged, str) else "".join(json.dumps(line) + "\n" for line in logged)
    (folder / "metrics.jsonl").write_text(text)
    (folder / "config.json").write_text(json.dumps(config() if settings is None else settings))
    (folder / "log.txt").write_text("\nModel: 43,168 parameters (18,592 without embeddings); mesh data=1\nStep 1\n")
    return folder


class Page(html.parser.HTMLParser):
    """charts: What the script draws, by title. tables: Lists of rows of cells. text: All text. tags: All elements."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.tables, self.words = [], [], []
        source = Path(path).read_text()
        self.feed(source)
        (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', source, re.DOTALL)
        self.data = json.loads(data)
        self.charts = {found["title"]: found for found in self.data["figures"]}
        self.text = " ".join(self.words)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            return
        self.words.append(data.strip())
        if self.tags and self.tags[-1][0] in ("td", "th", "code"):
            self.tables[-1][-1][-1] += data.strip()


def make(*arguments):
    with pytest.raises(SystemExit) as stopped:
        cli.run(report.main, report.COMMAND, [str(argument) for argument in arguments])
    return stopped.value.code


def made(folder):
    assert make(folder) == 0
    return folder / "report.html"


@pytest.fixture
def one(tmp_path):
    return Page(made(write(tmp_path / "one", lines())))


def points(curve):
    return list(zip(curve["x"], curve["y"], strict=True))


def test_points_are_the_logged_numbers(one):
    steps = [line for line in lines() if "loss" in line]
    chart = one.charts["Loss (nats per token)"]
    training, held_out = chart["curves"]
    assert (training["label"], held_out["label"]) == ("training", "held out")
    assert points(training) == [(line["tokens"], line["loss"]) for line in steps]
    assert points(held_out) == [(line["tokens"], 4 - line["step"] / 20) for line in steps if line["step"] % 20 == 0]
    assert (training["steps"], held_out["steps"]) == (None, [20, 40, 60])
    assert (chart["log"], chart["last"]) == (False, 12800)
    for title, key in (("Learning rate", "learning_rate"), ("Throughput (tokens per second)", "tokens_per_sec")):
        (curve,) = one.charts[title]["curves"]
        assert points(curve) == [(line["tokens"], line[key]) for line in steps]
        assert one.charts[title]["log"] is None
    assert not {"Disk cache (GB)", "Model FLOPs utilization"} & one.charts.keys()  # there are no values
    (hover,) = one.data["runs"]
    assert hover["names"] == ["short", "long & <wide>"]
    assert (hover["tokens"][-1], hover["steps"][-1], hover["stages"][-1]) == (12800, 70, 2)


def test_every_chart_has_its_place(one):
    places = [int(found["data-figure"]) for _, found in one.tags if "data-figure" in found]
    assert sorted(places) == list(range(len(one.data["figures"])))


def test_stages_are_bands(one):
    for title in ("Loss (nats per token)", "Gradient norm"):
        assert one.charts[title]["bands"] == [[0, 5120, 1, "short"], [5120, 5120 + 7680, 2, "long & <wide>"]]


def test_the_mix_is_stacked_and_its_targets_are_shown(one):
    chart = one.charts["Mix: share of the tokens by source"]
    assert chart["stacked"]
    code, web = chart["curves"]  # the layer below is drawn over the one above
    assert (code["label"], web["label"]) == ("code", "web")
    assert code["y"] == [1.0] * len(code["x"])
    assert web["x"][0] == 0
    for tokens, share, top in zip(web["x"], web["shares"], web["y"], strict=True):
        assert share == top == pytest.approx(0.75 if tokens <= 5120 else 0.25)
    assert code["shares"] == pytest.approx([1 - share for share in web["shares"]])
    assert chart["targets"] == [[0, 5120, 0.75], [5120, 12800, 0.25]]


def test_tables(one):
    summary, stages, ledger = one.tables
    found = {row[0]: row[1] for row in summary}
    assert found["Parameters"] == "43,168 (18,592 without embeddings)"
    assert found["Model"] == "llama, 2 layers, 32 wide, 4 heads, float32"
    assert found["Optimizer"] == "adamw, learning rate 3e-3, cosine"
    assert found["Final loss"] == "1.5000 (perplexity 4.48)"
    assert found["Held out"] == "1.0000, 2.0000 bits per byte (step 60)"
    assert found["Fingerprint"] == f"{70:016x}"
    assert found["Throughput"] == "1,020 to 2,060, by stage (tokens/s, median)"
    assert (found["Time"], found["Peak memory"]) == ("1.2 min", "1.50 GB")
    for told in ("steps 50.0%", "start 25.0%", "compiling 25.0%"):
        assert told in one.text
    assert "step 70, 12,800 of 12,800 tokens (100.0%)" in one.text
    assert stages[1:] == [
        ["1 short", "8", "16", "1 to 40", "5,120", "1,020", "10%", "3.0000"],
        ["2 long & <wide>", "32", "8", "41 to 70", "7,680", "2,060", "20%", "1.5000"],
    ]
    assert ledger[1:] == [
        ["1 short", "web", "75.00%", "75.00%", "3,840", "3,839", "548", "2"],
        ["", "code", "25.00%", "25.00%", "1,280", "1,279", "182", "2"],
        ["2 long & <wide>", "web", "25.00%", "25.00%", "1,920", "1,919", "274", "2"],
        ["", "code", "75.00%", "75.00%", "5,760", "5,759", "822", "2"],
        ["all", "web", "–", "45.00%", "5,760", "5,759", "822", "2"],
        ["", "code", "–", "55.00%", "7,040", "7,039", "1,005", "2"],
    ]


def test_one_page_that_needs_nothing_else(one, tmp_path):
    path = tmp_path / "one" / "report.html"
    source = path.read_text()
    assert not {"link", "img", "iframe", "object", "use", "image"} & {tag for tag, _ in one.tags}
    attributes = [name for _, attributes in one.tags for name in attributes]
    assert not {"src", "href", "xlink:href", "style"} & set(attributes)
    assert not [name for name in attributes if name.startswith("on")]
    library = (Path(report.__file__).parent / "uplot" / "uPlot.iife.min.js").read_text()
    assert source.count(library) == 1
    assert not re.search(r"url\(|@import|://", source.replace(library, ""))
    (policy,) = [found["content"] for _, found in one.tags if "http-equiv" in found]
    assert policy.startswith("default-src 'none'; ")
    assert "prefers-color-scheme:dark" in source
    assert path.stat().st_size < 200_000


def test_several_runs_on_the_same_axes(tmp_path, capsys):
    first = write(tmp_path / "one", lines())
    (tmp_path / "other").mkdir()
    longer = [{**line, "tokens": 2 * line["tokens"]} if "tokens" in line else line for line in lines()]
    second = write(tmp_path / "other" / "one", longer, config(seed=7))
    output = tmp_path / "compared.html"
    assert make(first, second, f"--output={output}") == 0
    assert capsys.readouterr().out.endswith(f"Wrote {output}\n")
    assert not (first / "report.html").exists()
    page = Page(output)
    chart = page.charts["Learning rate"]
    one, other = chart["curves"]
    assert [found["label"] for found in (one, other)] == [f"{tmp_path.name}/one", "other/one"]
    assert [found["color"] for found in (one, other)] == [0, 1]
    assert (one["x"][-1], other["x"][-1], chart["last"]) == (12800, 25600, 25600)
    assert "Shaded: the stages of" in page.text
    assert page.tables[-1] == [["Field", f"{tmp_path.name}/one", "other/one"], ["seed", "absent", "7"]]


def test_a_run_under_way_and_numbers_that_are_none(tmp_path):
    logged = lines()
    logged[2]["loss"] = None
    logged[4]["grad_norm"] = math.nan  # json writes NaN
    text = "".join(json.dumps(line) + "\n" for line in logged[:-2])
    text += 'null\n[1]\n{"step": 65, "tokens": 1}\n{"no": "step"}\n' + json.dumps(logged[-2])[:70]
    settings = config()
    settings["stages"][-1]["tokens"] = None
    folder = write(tmp_path / "one", text, settings)
    (folder / "config.json").write_text(json.dumps(settings))
    page = Page(made(folder))
    steps = [line for line in logged[:-2] if "loss" in line]
    (training, _) = page.charts["Loss (nats per token)"]["curves"]
    assert points(training) == [(line["tokens"], line["loss"]) for line in steps if line["loss"] is not None]
    assert "1 logged losses not finite, the first at step 20" in page.text
    assert "5 lines of metrics.jsonl not readable" in page.text
    assert f"step {steps[-1]['step']}, {steps[-1]['tokens']:,} tokens" in page.text


def test_what_an_earlier_version_did_not_log(tmp_path):
    logged = [{key: value for key, value in line.items() if key != "stage_sources"} for line in lines()]
    folder = write(tmp_path / "one", logged)
    (folder / "config.json").unlink()
    (folder / "log.txt").unlink()
    page = Page(made(folder))
    assert [row[:2] for row in page.tables[2][1:]] == [
        *(["stage 1", "not known"], ["stage 2", "not known"], ["all", "web"], ["", "code"])
    ]


def test_evaluations_between_logged_steps(tmp_path):
    """Their tokens follow from the lines around them."""
    logged = [*lines(), {"step": 72, "eval_loss": 0.5, "eval_bits_per_byte": 2.0}]
    at = next(index for index, line in enumerate(logged) if line["step"] == 50)
    logged.insert(at, {"step": 43, "eval_loss": 1.9, "eval_bits_per_byte": 2.0})
    folder = write(tmp_path / "one", logged)
    _, held_out = Page(made(folder)).charts["Loss (nats per token)"]["curves"]
    found = list(zip(held_out["steps"], points(held_out), strict=True))
    assert found[2] == (43, (5888, 1.9))
    assert found[-1] == (72, (13312, 0.5))


def test_held_out_loss_by_source_and_samples(tmp_path):
    logged = lines()
    for line, loss in ((logged[1], 3.5), (logged[3], 3.25)):
        found = {"web": {"loss": loss, "tokens": 9}, "code": {"loss": loss / 2, "tokens": 9}, "x": {"loss": None}}
        place = logged.index(line) + 1
        logged.insert(place, {"step": line["step"], "eval_loss": loss, "eval_by_source": found})
        logged.insert(place + 1, {"step": line["step"], "samples": {"def ": f"f<{loss}>"}})
    page = Page(made(write(tmp_path / "a", logged)))
    curves = page.charts["Held-out loss by source (nats per token)"]["curves"]
    assert [(curve["label"], curve["y"]) for curve in curves] == [("web", [3.5, 3.25]), ("code", [1.75, 1.625])]
    assert page.text.index("def f<3.25>") < page.text.index("def f<3.5>")  # the newest first, as text
    assert "not readable" not in page.text


def test_benchmarks_have_charts_and_errors(tmp_path):
    logged, other = lines(), lines()
    for line in [line for line in logged if line["step"] in (20, 40) and "loss" in line]:
        results = {"acc": line["step"] / 100, "acc_stderr": 0.04, "questions": 100}
        found = {"quiz": {**results, "acc_norm": 0.5, "acc_norm_stderr": 0.05}, "words": results}
        logged.insert(logged.index(line) + 1, {"step": line["step"], "eval_tasks": found})
    output = tmp_path / "page.html"
    assert make(write(tmp_path / "a", logged), write(tmp_path / "b", other), f"--output={output}") == 0
    page = Page(output)
    assert {"quiz, acc", "quiz, acc_norm", "words, acc"} <= page.charts.keys()
    (curve,) = page.charts["quiz, acc"]["curves"]  # the other run has none
    assert (curve["label"], curve["y"], curve["errors"], curve["steps"]) == ("a", [0.2, 0.4], [0.04, 0.04], [20, 40])
    told = next(row for row in page.tables[0] if row[0] == "Benchmarks")
    assert told[1:] == ["quiz acc_norm 0.5 ± 0.05; words acc 0.4 ± 0.04", "–"]
    assert next(row for row in page.tables[0] if row[0] == "Held out")[1].startswith("1.0000, 2.0000 bits")
    assert "not readable" not in page.text


def test_time_of_several_processes_and_what_was_lost(tmp_path):
    """The second process begins 10 s after the first one's last line: those seconds were trained again."""
    logged = [line for line in lines() if "loss" in line]
    for line in logged:
        second = line["step"] > 40
        line["seconds"] = {"start": 6.0, "compile": 0.0} if second else {"start": 5.0, "compile": 5.0}
        line["time"] = 30.0 + (line["step"] - 40) if second else line["step"] / 2
        line["goodput"] = 1 - 6 / (line["step"] - 40) if second else 1 - 10 / max(line["step"] / 2, 11)
    folder = write(tmp_path / "one", logged)
    page = Page(made(folder))
    # 60 s: processes of 20 and 30 s, with 10 and 24 of them in steps.
    for told in ("steps 56.7%", "start 18.3%", "compiling 8.3%", "lost at restarts 16.7%"):
        assert told in page.text
    assert "1.0 min, 1 restart" in page.text


def test_spikes_are_listed_with_their_documents(tmp_path):
    folder = write(tmp_path / "a", lines())
    named = [{"source": "web", "file": "<b>.parquet", "row": row, "tokens": 40, "loss": 9 - row} for row in range(8)]
    spikes = [
        {"step": 20, "loss": 4.5, "grad_norm": 3.25, "standing_out": 2, "documents": named, "done": "the run goes on"},
        {"step": 30, "loss": None, "grad_norm": None, "standing_out": 0, "documents": []},
        {"step": "x"},
    ]
    (folder / "spikes.jsonl").write_text("".join(json.dumps(spike) + "\n" for spike in spikes))
    page = Page(made(folder))
    (table,) = [table for table in page.tables if table[0][0] == "Step"]
    assert table[1:] == [
        ["20", "the run goes on", "2 of 8", "", "", "", "", "4.5000", "3.2500"],
        ["", "", "", "web", "<b>.parquet", "0", "40", "9.0000", ""],
        ["", "", "", "web", "<b>.parquet", "1", "40", "8.0000", ""],
        ["30", "–", "0 of 0", "", "", "", "", "not finite", "not finite"],
    ]
    assert "1 line" in page.text  # is not readable


def test_hostile_names_are_text(tmp_path):
    bad = '"><script>alert(1)</script>\x00'
    logged = [json.loads(json.dumps(line).replace('"web"', json.dumps(bad))) for line in lines()]
    for line in logged:
        line["fingerprint"] = bad
    settings = json.loads(json.dumps(config(note=bad)).replace('"web"', json.dumps(bad)).replace("short", "</svg>"))
    folder = write(tmp_path / "<img src=x onerror=alert(1)>", logged, settings)
    output = tmp_path / "page.html"
    assert make(folder, f"--output={output}") == 0
    page = Page(output)
    assert "img" not in {tag for tag, _ in page.tags}
    assert [tag for tag, _ in page.tags].count("script") == 3  # the data, the library, the page's own
    assert "<script>" in page.text
    assert "\x00" not in output.read_text()
    assert page.charts["Gradient norm"]["bands"][0][3] == "</svg>"


def test_mistakes(tmp_path, capsys):
    (write(tmp_path / "baseline", lines()) / "empty").mkdir()
    write(tmp_path / "started", '{"step": 1, "tok')
    cases = {
        (): r"WORKDIR is missing",
        (tmp_path / "baselin",): rf"there is no such directory. Did you mean {tmp_path}/baseline\?",
        (tmp_path / "baseline" / "empty",): "holds no metrics.jsonl: either no run has logged a step",
        (tmp_path / "started",): "no step is logged in metrics.jsonl yet",
        (tmp_path / "baseline" / "config.json",): "is a file: give the work directory",
        (tmp_path / "baseline", f"--output={tmp_path}"): "is a directory: give a file",
        (tmp_path / "baseline", f"--output={tmp_path}/no/page.html"): "cannot be written",
        (tmp_path / "baseline", "--output="): "--output= is empty",
    }
    for arguments, message in cases.items():
        assert make(*arguments) == 2
        assert re.search(message, capsys.readouterr().err), arguments
    assert make("--help") == 0
    assert "python -m tools.report runs/quickstart" in capsys.readouterr().out


def test_long_runs_take_bounded_memory_and_keep_their_extremes():
    series, thinned = Series(), Thinned(100)
    for index in range(1, 50_001):
        series.add(index, {17_001: 50.0, 33_457: -50.0}.get(index, math.sin(index / 9000)))
        series.add(index, None)
        thinned.add(index)
        if index in (31, 24_999):
            thinned.pin()
    points = series.points()
    assert len(points) <= 2002
    assert points == sorted(points)
    assert {(1, math.sin(1 / 9000)), (17_001, 50.0), (33_457, -50.0), (50_000, math.sin(50_000 / 9000))} <= {*points}
    gaps = [b[0] - a[0] for a, b in itertools.pairwise(points)]
    assert max(gaps) <= 4 * 50_000 / 1000
    kept = thinned.items()
    assert len(kept) <= 203
    assert {31, 24_999, 50_000} <= {*kept}
    regular = [item for item in kept if item not in (31, 24_999, 50_000)]
    assert len({b - a for a, b in itertools.pairwise(regular)}) == 1


class Remote(MemoryFileSystem):
    store, pseudo_dirs = {}, [""]  # not shared with other file systems in memory

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + os.fspath(path).rpartition("://")[2].strip("/")


def test_a_remote_work_directory(tmp_path, monkeypatch):
    """Through the layer that training uses for buckets, backed by a file system in memory."""
    bucket = Remote()
    monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda self, path: bucket)
    local = write(tmp_path / "one", lines())
    for name in ("metrics.jsonl", "config.json", "log.txt"):
        bucket.pipe_file(f"/bucket/one/{name}", (local / name).read_bytes())
    assert make("gs://bucket/one") == 0
    (tmp_path / "page.html").write_bytes(bucket.cat_file("/bucket/one/report.html"))
    page = Page(tmp_path / "page.html")
    assert page.tables[0][1] == ["Work directory", "gs://bucket/one"]
    assert page.tables[1:] == Page(made(local)).tables[1:]
    assert make("gs://bucket/two") == 2
