import dataclasses
import errno
import json
import logging
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import types
from pathlib import Path

import pytest
from tensorboardX.proto import event_pb2

from jaxtrain.checkpoint.workdir import Workdir
from jaxtrain.errors import UserError
from jaxtrain.metrics import monitor as module
from jaxtrain.metrics import writers
from jaxtrain.metrics.monitor import Goodput, Monitor, MonitorConfig, Run, console_logging
from jaxtrain.plan import StepPlan

REPOSITORY = Path(__file__).parents[2]


def step_of(step: int, tokens_after: int) -> StepPlan:
    return StepPlan(
        step=step,
        stage=3,
        stage_name="",
        seq_len=512,
        batch_size=8,
        overlap_tokens=0,
        stride=512,
        tokens_before=0,
        tokens_after=tokens_after,
        rows_before=0,
        learning_rate=6e-4,
        ce_weight=1.0,
        kd_weight=0.0,
        fit=False,
        masked_from=512 * 8,
    )


RUN = Run(
    start_step=0,
    start_tokens=0,
    total_tokens=1_000_000_000,
    num_stages=10,
    flops_per_token=lambda seq_len: 6e9,
    peak_flops=None,
    log_every=10,
    config={"_kind": "config", "seed": 0},
)
METRICS = {"loss": 4.5421, "grad_norm": 1.0, "fingerprint": "0" * 16, "sources": {"web": {"tokens": 10}}}


@pytest.fixture
def clock(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def lines_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log(folder, steps, start_step=0, metrics=METRICS, config=None, **run):
    """A run that logs `steps`, each of a million tokens."""
    config = config or MonitorConfig(tensorboard=False, watchdog_minutes=None)
    run = dataclasses.replace(RUN, start_step=start_step, start_tokens=start_step * 10**6, **run)
    with console_logging() as console, config.build(Workdir(folder), run, console) as monitor:
        monitor.begin()
        for step in steps:
            monitor.log_step(step_of(step, step * 10**6), metrics)


def test_the_console_line(clock, tmp_path, capsys):
    with console_logging() as console, Monitor(MonitorConfig(), Workdir(tmp_path), RUN, console) as monitor:
        monitor.begin()
        clock[0] += 30_000_000 / 85_432
        monitor.log_step(step_of(1000, 30_000_000), METRICS)
        for size in (0.0031, 1.2):
            monitor.log_step(step_of(1010, 30_000_010), {**METRICS, "disk_cache_gb": size})
    expected = (
        "Step 1000: Loss=4.5421, PPL=93.89, Tokens/sec=85432, LR=6.00e-04"
        " | Stage 3/10 (30,000,000/1,000,000,000 tokens, 3.0%)\n"
    )
    first, *others = capsys.readouterr().out.splitlines(keepends=True)
    assert first == expected
    assert [line.rpartition(" | ")[2] for line in others[:2]] == ["Cache=3.1 MB\n", "Cache=1.20 GB\n"]
    assert (tmp_path / "log.txt").read_text().startswith(expected)


def test_the_keys_and_shares(clock, tmp_path):
    run = dataclasses.replace(RUN, peak_flops=1e15)
    with console_logging() as console, Monitor(MonitorConfig(), Workdir(tmp_path), run, console) as monitor:
        clock[0] += 20  # imports
        with monitor.span("compile"):
            clock[0] += 10
        monitor.begin()
        with monitor.span("data"):
            clock[0] += 25
        with monitor.span("checkpoint"):
            clock[0] += 7
        clock[0] += 75
        monitor.log_step(step_of(10, 4_000_000), METRICS)
        clock[0] += 50
        monitor.log_step(step_of(20, 5_000_000), METRICS)
        with monitor.span("evaluation"):
            clock[0] += 13
        monitor.log_eval(20, {"eval_loss": 2.0, "eval_bits_per_byte": 1.0})
    first, second, evaluation = lines_of(tmp_path)
    assert first["tokens_per_sec"] == pytest.approx(40_000)
    assert first["mfu"] == pytest.approx(40_000 * 6e9 / 1e15)
    assert first["data_wait"] == pytest.approx(0.25)
    assert first["time"] == pytest.approx(137)
    assert first["goodput"] == pytest.approx(75 / 137)
    seconds = {"start": 20, "compile": 10, "data": 25, "checkpoint": 7, "evaluation": 0}
    seconds |= {"samples": 0, "stage change": 0}
    assert first["seconds"] == pytest.approx(seconds)
    assert second["tokens_per_sec"] == pytest.approx(20_000)
    assert second["data_wait"] == 0
    assert first["perplexity"] == pytest.approx(math.exp(4.5421))
    assert {**METRICS, "step": 10, "tokens": 4_000_000, "stage": 3, "seq_len": 512, "batch_size": 8}.items() <= {
        **first
    }.items()
    assert first["learning_rate"] == 6e-4
    assert first["memory_gb"] > 0.05
    assert evaluation == {"step": 20, "eval_loss": 2.0, "eval_bits_per_byte": 1.0, "time": pytest.approx(200)}
    assert "Goodput: 62.5% of 200 s in steps, start 10.0%, compile 5.0%" in (tmp_path / "log.txt").read_text()


def test_samples(tmp_path, capsys):
    config = MonitorConfig(watchdog_minutes=None)
    with console_logging() as console, config.build(Workdir(tmp_path), RUN, console) as monitor:
        monitor.log_samples(20, {"def ": "f(x):\n    <b>", "Once": " upon"})
    (line,) = lines_of(tmp_path)
    assert line["samples"] == {"def ": "f(x):\n    <b>", "Once": " upon"}
    assert "Sample: Once upon\n" in capsys.readouterr().out
    (event,) = (tmp_path / "tensorboard").iterdir()
    texts = {
        value.tag: value.tensor.string_val[0].decode()
        for value in values_of(event)
        if value.metadata.plugin_data.plugin_name == "text"
    }
    assert texts == {"samples/0/text_summary": "    def f(x):\n        <b>", "samples/1/text_summary": "    Once upon"}


def values_of(path):
    """The values of a TensorBoard file, whose records are length, checksum, event, checksum."""
    data = path.read_bytes()
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        yield from event_pb2.Event.FromString(data[12 : 12 + length]).summary.value  # pyright: ignore[reportAttributeAccessIssue]
        data = data[16 + length :]


def test_nested_spans_count_once(clock):
    goodput = Goodput(clock[0])
    with goodput.span("evaluation"):
        clock[0] += 1
        with goodput.span("compile"):
            clock[0] += 2
        clock[0] += 4
    clock[0] += 8
    assert (goodput.seconds["evaluation"], goodput.seconds["compile"], goodput.steps()) == (5, 2, 8)


def test_perplexity_is_of_the_cross_entropy_and_never_overflows(tmp_path):
    log(tmp_path, [10], metrics={**METRICS, "loss": 3.0, "ce_loss": 1.0})
    log(tmp_path, [20], start_step=10, metrics={**METRICS, "loss": 1e4})
    assert [line["perplexity"] for line in lines_of(tmp_path)] == [pytest.approx(math.e), None]


def test_not_finite_is_null(tmp_path, capsys):
    log(tmp_path, [10], metrics={**METRICS, "loss": math.nan, "grad_norm": math.inf, "sources": {"a": {"x": math.nan}}})
    (line,) = lines_of(tmp_path)
    assert (line["loss"], line["perplexity"], line["grad_norm"], line["sources"]) == (
        None,
        None,
        None,
        {"a": {"x": None}},
    )
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert "Loss=nan, PPL=nan" in capsys.readouterr().out


def test_a_resume_cuts_back_and_time_goes_on(clock, tmp_path):
    log(tmp_path, [10, 20, 30])
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 35, "eval_loss": 1.0, "time": 77.0}\n{"step": 40, "lo')  # truncated by a kill
    clock[0] += 1000
    log(tmp_path, [30, 40], start_step=20)
    lines = lines_of(tmp_path)
    assert [line["step"] for line in lines] == [10, 20, 30, 40]
    assert [line["time"] for line in lines] == [0, 0, 77, 77]
    log(tmp_path, [10])
    assert [line["step"] for line in lines_of(tmp_path)] == [10]


def test_damaged_lines_of_metrics_are_dropped(tmp_path, capsys):
    log(tmp_path, [10, 20])
    whole = (tmp_path / "metrics.jsonl").read_bytes()
    first, second = whole.splitlines(keepends=True)
    damaged = [
        b'{"step": null}\n',
        b'\xff\xfe{"step": 12}\n',
        b"\0" * 40 + b"\n",
        b"[]\n",
        b'{"step": Infinity}\n',
        b'{"st',
    ]
    (tmp_path / "metrics.jsonl").write_bytes(first + b"".join(damaged[:5]) + second + damaged[5])
    log(tmp_path, [], start_step=20)
    assert (tmp_path / "metrics.jsonl").read_bytes() == whole
    assert "6 unreadable line(s)" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["log.txt", "tensorboard", "metrics.jsonl"])
def test_a_file_that_cannot_be_written_is_one_message(tmp_path, name):
    """Root may write any file, so use a folder in place of a file and a file in place of a folder."""
    if name == "tensorboard":
        (tmp_path / name).touch()
    else:
        (tmp_path / name / "x").mkdir(parents=True)
    with pytest.raises(UserError, match=rf"{re.escape(name)}\S* cannot be written: .*change its owner"):
        log(tmp_path, [10], config=MonitorConfig(watchdog_minutes=None))


def test_the_log_takes_any_character_in_any_locale(tmp_path, monkeypatch):
    monkeypatch.setattr("io.text_encoding", lambda given, *_: given or "ascii")  # what `open` uses
    handler = writers.log_file(tmp_path / "log.txt")
    for message in ("Saved in runs/λ水", "Saved in latin-1 \udce9"):
        handler.emit(logging.makeLogRecord({"msg": message, "levelno": logging.INFO}))
    handler.close()
    text = (tmp_path / "log.txt").read_bytes().decode("utf-8")
    assert "runs/λ水\n" in text
    assert "latin-1 \\udce9\n" in text


def test_the_log_keeps_what_came_before(tmp_path):
    log(tmp_path, [10])
    log(tmp_path, [20], start_step=10)
    text = (tmp_path / "log.txt").read_text()
    assert re.findall(r"^Step (\d+):", text, re.MULTILINE) == ["10", "20"]


def test_which_steps_are_due(tmp_path):
    with console_logging() as console, Monitor(MonitorConfig(), Workdir(tmp_path), RUN, console) as monitor:
        due = [step for step in range(1, 31) if monitor.due(step_of(step, step))]
        assert due == [1, 10, 20, 30]
        assert monitor.due(step_of(33, 1_000_000_000))


def test_an_evaluation_on_the_console(tmp_path, capsys):
    found = {"web": {"loss": 2.5, "tokens": 1802.0}, "docs": {"loss": None, "tokens": 0.0}}
    with console_logging() as console, Monitor(MonitorConfig(), Workdir(tmp_path), RUN, console) as monitor:
        monitor.log_eval(20, {"eval_loss": 2.0, "eval_tokens": 1802.0, "eval_by_source": found})
    said = "Step 20: eval_loss=2.0000, eval_tokens=1,802, web=2.5000, docs: no held-out document\n"
    assert said in capsys.readouterr().out


def test_without_a_target(tmp_path, capsys):
    log(tmp_path, [10], total_tokens=None)
    assert "| Stage 3/10 (10,000,000 tokens)\n" in capsys.readouterr().out


def test_tensorboard_has_the_same_scalars(tmp_path):
    config = MonitorConfig(watchdog_minutes=None)
    log(tmp_path, [10, 20], config=config)
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    for name in (b"train/loss", b"sources/web/tokens", b"speed/tokens_per_sec", b"data/stage", b"seconds/data"):
        assert content.count(name) >= 2
    assert writers._tag("eval_loss") == "eval/loss"
    assert writers._tag("eval_by_source/web/loss") == "eval_by_source/web/loss"
    assert writers.scalars({"a": 1, "b": {"c": 2.0, "d": "x", "e": None}, "f": True}) == {"a": 1, "b/c": 2.0}


def test_trackers(tmp_path, monkeypatch):
    calls = []
    fake = types.SimpleNamespace(
        init=lambda **kwargs: calls.append(kwargs),
        log=lambda values, step: calls.append((step, values["loss"])),
        finish=lambda: calls.append("finish"),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    config = MonitorConfig(tensorboard=False, trackers=("trackio",), project="p", watchdog_minutes=None)
    (tmp_path / "name").mkdir()
    log(tmp_path / "name", [10], config=config)
    assert not (tmp_path / "name/wandb_id.txt").exists()
    # Trackio refuses keys such as _kind.
    assert calls == [{"project": "p", "name": "name", "config": {"seed": 0}, "resume": "allow"}, (10, 4.5421), "finish"]
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        log(tmp_path, [10], config=dataclasses.replace(config, trackers=("wandb",)))


@pytest.mark.parametrize(
    ("name", "attached"), [("wandb", {"base_path": "FOLDER", "policy": "now"}), ("trackio", {"project": "p"})]
)
def test_files_are_attached_and_steps_never_go_back(tmp_path, monkeypatch, name, attached):
    steps, files, names = [], [], set()
    fake = types.SimpleNamespace(
        init=lambda **kwargs: None,
        log=lambda values, step: steps.append(step) or names.update(values),
        save=lambda path, **kwargs: files.append((path, kwargs)),
        finish=lambda: None,
    )
    monkeypatch.setitem(sys.modules, name, fake)
    config = MonitorConfig(tensorboard=False, trackers=(name,), project="p", watchdog_minutes=None)
    log(tmp_path, [10, 20, 30], config=config)
    log(tmp_path, [20, 30, 40], start_step=10, config=config)  # the checkpoint of step 10 was the newest
    assert steps == [10, 20, 30, 30, 40]
    assert ("run_time" if name == "trackio" else "time") in names
    assert [line["step"] for line in lines_of(tmp_path)] == [10, 20, 30, 40]
    with console_logging() as console, config.build(Workdir(tmp_path), RUN, console) as monitor:
        monitor.attach(tmp_path / "config.json")
    wanted = {key: str(tmp_path) if value == "FOLDER" else value for key, value in attached.items()}
    assert files == [(str(tmp_path / "config.json"), wanted)]


def test_a_resume_continues_the_run_of_wandb(tmp_path, monkeypatch):
    ids = []
    fake = types.SimpleNamespace(init=lambda **kwargs: ids.append(kwargs["id"]), log=print, finish=print)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = MonitorConfig(tensorboard=False, trackers=("wandb",), watchdog_minutes=None)
    for folder, start_step in (("a", 0), ("a", 10), ("b", 0)):
        (tmp_path / folder).mkdir(exist_ok=True)
        log(tmp_path / folder, [start_step + 10], start_step=start_step, config=config)
    (tmp_path / "c").mkdir()
    (tmp_path / "c/wandb_id.txt").write_bytes(b"\xff\xfe\0damaged")
    log(tmp_path / "c", [10], config=config)
    assert ids[0] == ids[1] == (tmp_path / "a/wandb_id.txt").read_text().strip()
    assert ids[2] != ids[0]
    assert re.fullmatch("[0-9a-f]{8}", ids[3])
    # The server knows better than metrics.jsonl what it has of a killed process.
    steps, fake.run = [], types.SimpleNamespace(starting_step=21)
    fake.log = lambda values, step: steps.append(step)
    log(tmp_path / "c", [20, 30], start_step=10, config=config)
    log(tmp_path / "c", [20, 30, 40], start_step=10, config=config)
    assert steps == [30, 30, 40]


@pytest.mark.parametrize("fails", ["init", "log", "finish"])
def test_a_tracker_that_raises_does_not_end_the_run(tmp_path, monkeypatch, fails, capsys):
    def fail(*args, **kwargs):
        raise ConnectionError("no route")

    fake = types.SimpleNamespace(**dict.fromkeys(("init", "log", "finish"), lambda *args, **kwargs: None))
    setattr(fake, fails, fail)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    config = MonitorConfig(tensorboard=False, trackers=("wandb",), watchdog_minutes=None)
    log(tmp_path, [10, 20, 30], config=config)
    assert [line["step"] for line in lines_of(tmp_path)] == [10, 20, 30]
    assert capsys.readouterr().out.count(f"wandb.{fails} failed, the run continues: ConnectionError: no route") == 1


@pytest.mark.parametrize("wrong", [{"trackers": ("mlflow",)}, {"watchdog_minutes": 0.0}])
def test_config_is_checked(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        MonitorConfig(**wrong).check()
    MonitorConfig().check()


# Logger and terminal.


def test_other_processes_print_warnings_alone(capsys, monkeypatch):
    monkeypatch.setattr(module.jax, "process_index", lambda: 3)
    with console_logging():
        logging.getLogger("jaxtrain").info("quiet")
        logging.getLogger("jaxtrain").warning("loud")
    assert capsys.readouterr().out == "[process 3] WARNING: loud\n"


def test_the_logger_is_left_as_it_was(tmp_path):
    logger = logging.getLogger("jaxtrain")
    before = (list(logger.handlers), logger.propagate, logger.level)
    log(tmp_path, [10])
    assert (list(logger.handlers), logger.propagate, logger.level) == before


SHOW = """
import sys, time
from jaxtrain.checkpoint.workdir import Workdir
from jaxtrain.metrics.monitor import *
from tests.metrics.test_monitor import RUN, step_of, METRICS
with console_logging() as console, Monitor(MonitorConfig(tensorboard=False), Workdir(sys.argv[1]), RUN, console) as m:
    m.begin()
    for step in range(1, 31):
        time.sleep(0.02)
        m.stepped(step_of(step, step * 10_000_000))
        if m.due(step_of(step, 0)):
            m.log_step(step_of(step, step * 10_000_000), METRICS)
"""
ENVIRONMENT = {**os.environ, "JAX_PLATFORMS": "cpu"}


def test_a_terminal_gets_a_bar_and_a_pipe_does_not(tmp_path):
    command = [sys.executable, "-c", SHOW, str(tmp_path)]
    piped = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY, env=ENVIRONMENT)
    assert "\r" not in piped.stdout
    assert [line.split(":")[0] for line in piped.stdout.splitlines()] == [
        *("Step 1", "Step 10", "Step 20", "Step 30", "Goodput"),
    ]

    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (40, 120))
    with subprocess.Popen(command, stdout=theirs, stderr=theirs, cwd=REPOSITORY, env=ENVIRONMENT) as process:
        os.close(theirs)
        shown = b""
        with open(ours, "rb", buffering=0) as terminal:
            try:
                while part := terminal.read(4096):
                    shown += part
            except OSError:  # Linux reports this when the other end has closed
                pass
        assert process.wait() == 0
    text = shown.decode()
    # The line is above the bar; the bar has the share and the remaining time.
    assert re.search(r"\r *\r?Step 20: Loss=[^\r\n]*tokens, 20\.0%\)\r\n", text), text
    assert re.search(r"\d+%\|.*?/1\.00G \[\d+:\d+<\d+:\d+, .*Loss=4\.5421\]", text), text


HANG = """
import sys, threading
from jaxtrain.checkpoint.workdir import Workdir
from jaxtrain.metrics.monitor import *
from tests.metrics.test_monitor import RUN
def stuck_here():
    threading.Event().wait()
config = MonitorConfig(tensorboard=False, watchdog_minutes=0.01)
with console_logging() as console, Monitor(config, Workdir(sys.argv[1]), RUN, console) as m:
    m.begin()
    stuck_here()
"""


def test_the_watchdog_says_where_threads_stand_and_exits(tmp_path):
    command = [sys.executable, "-c", HANG, str(tmp_path)]
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=REPOSITORY, env=ENVIRONMENT, timeout=60
    )
    assert process.returncode == 1
    for text in (process.stderr, (tmp_path / "log.txt").read_text()):
        assert "in stuck_here" in text
    assert "No step finished for 0.01 minutes" in (tmp_path / "log.txt").read_text()


# Remote work directories.


def test_remote_files_are_uploaded_and_continued(tmp_path, monkeypatch):
    remote, uploads = tmp_path / "bucket", []
    remote.mkdir()

    def as_remote():
        workdir = Workdir(remote)
        workdir.is_local, workdir.cache = False, module.Workdir(tmp_path / "cache").path
        return workdir

    monkeypatch.setattr(writers, "_UPLOAD_SECONDS", 0.05)
    upload = writers.Mirror._upload
    monkeypatch.setattr(writers.Mirror, "_upload", lambda self: (upload(self), uploads.append(1)))
    config = MonitorConfig(tensorboard=True, watchdog_minutes=None)
    with console_logging() as console, config.build(as_remote(), RUN, console) as monitor:
        monitor.log_step(step_of(10, 10), METRICS)
        seen = len(uploads)
        while len(uploads) < seen + 2:
            module.time.sleep(0.01)
        assert [line["step"] for line in lines_of(remote)] == [10]
        monitor.log_step(step_of(20, 20), METRICS)
    assert [line["step"] for line in lines_of(remote)] == [10, 20]
    assert list((remote / "tensorboard").iterdir())
    # Another machine continues from the files in the bucket, with bytes that are not UTF-8.
    for name in ("metrics.jsonl", "log.txt"):
        (remote / name).write_bytes((remote / name).read_bytes() + b"\xff\xfe\n")
    module.Workdir(tmp_path / "cache").path.rmtree()
    run = dataclasses.replace(RUN, start_step=10)
    with console_logging() as console, config.build(as_remote(), run, console) as monitor:
        monitor.log_step(step_of(30, 30), METRICS)
    assert [line["step"] for line in lines_of(remote)] == [10, 30]
    assert len(re.findall("^Step", (remote / "log.txt").read_text(errors="replace"), re.MULTILINE)) == 3


class FullFile:
    """Accepts `room` bytes."""

    def __init__(self, room: int):
        self.room = room

    def write(self, data: bytes) -> None:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        pass

    close = flush


@pytest.mark.parametrize("writer", [0, 1])
def test_a_full_disk_ends_the_run_with_a_message(tmp_path, writer):
    """Neither a traceback nor a hang."""
    with console_logging() as console, Monitor(MonitorConfig(), Workdir(tmp_path), RUN, console) as monitor:
        monitor.begin()
        monitor.log_step(step_of(1, 100), METRICS)
        lines, events = monitor._writers
        if writer == 0:
            lines.close()
            lines._file = FullFile(100)  # type: ignore[attr-defined]
        else:
            events.close()
            events._events._file = FullFile(100)  # type: ignore[attr-defined]
        with pytest.raises(UserError, match=r"the metrics of step 2 cannot be written to .*No space left"):
            monitor.log_step(step_of(2, 200), METRICS)
