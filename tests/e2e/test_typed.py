"""Runs as people type them: files of their own by pattern, few documents, an epoch as the run's end."""

import gzip
import json
import pathlib
import subprocess
import sys

import pytest

from tests.e2e.conftest import MakeRun
from tests.e2e.runs import ROOT

pytestmark = pytest.mark.slow


def write(folder: pathlib.Path, files: int, rows: int) -> None:
    for number in range(files):
        lines = (json.dumps({"text": f"the document {row} of file {number} says so " * 3}) for row in range(rows))
        (folder / f"part-{number:03d}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))


def test_an_epoch_of_few_documents_in_many_lanes(make_run: MakeRun, tmp_path: pathlib.Path) -> None:
    write(tmp_path, files=3, rows=40)
    name = "--config.data.sources.mine"
    flags = (
        f"{name}=HuggingFace",
        f"{name}.name=json",
        f"{name}.data_files={tmp_path}/part-{{000..002}}.jsonl.gz",
        f"{name}.max_samples=100",
        "--config.data.num_lanes=8",
        "--config.data.shuffle_window=none",
        "--config.data.holdout=0",
        "--config.eval.every_steps=none",
        *("--config.stages[0].weights.web=0", "--config.stages[0].weights.wiki=0"),
        *("--config.stages[0].weights.mine=1", "--config.stages[0].tokens=128"),
        *(f"--config.stages[{stage}].weights.{source}=0" for stage in (1, 2) for source in ("web", "code")),
        *("--config.stages[1].weights.wiki=0", "--config.stages[1].weights.mine=1", "--config.stages[1].tokens=256"),
        "--config.stages[2].weights.mine=1",
        *("--config.stages[0].batch_size=8", "--config.optimizer=Muon", "--config.optimizer.schedule=Linear"),
        *("--config.total_tokens=none", "--config.epochs=1"),
    )
    whole = make_run("whole")(*flags)
    lines = whole.steps()
    assert lines[-1]["sources"]["mine"]["documents"] == 100
    assert "Source mine: 3 files, shared by all lanes in windows of 2 rows" in whole.output
    assert "in 1 epoch(s): schedules assume that" in whole.output
    # The estimate counts every document, so that the rate ends at about 0.
    assert lines[-1]["learning_rate"] < 0.2 * max(line["learning_rate"] for line in lines)
    parts = make_run("parts").start(*flags)
    parts.wait_for_step(len(lines) // 2)
    parts.kill()
    parts(*flags)
    assert [line["fingerprint"] for line in parts.steps()] == [line["fingerprint"] for line in lines]
    assert [line["learning_rate"] for line in parts.steps()] == [line["learning_rate"] for line in lines]
    # A token store counts the same rows and tokens.
    stored = make_run("stored")
    command = [sys.executable, "-m", "tools.pretokenize", f"--config={stored.spec}", f"--workdir={stored.workdir}"]
    subprocess.run([*command, "--all", *flags], cwd=ROOT, env=stored.env, check=True, capture_output=True)
    stored(*flags, "--config.data.mode=pretokenized")
    for name in ("fingerprint", "learning_rate"):
        assert [line[name] for line in stored.steps()] == [line[name] for line in lines]
    parts(*flags, "--config.data.shuffle_window=1", code=2)
    assert "data.shuffle_window  null  ->  1" in parts.output


def test_too_few_documents_are_refused_before_anything_is_compiled(make_run: MakeRun, tmp_path: pathlib.Path) -> None:
    write(tmp_path, files=1, rows=5)
    name = "--config.data.sources.web"
    files = (f"{name}=HuggingFace", f"{name}.name=json", f"{name}.data_files={tmp_path}/part-000.jsonl.gz")
    lanes = ("--config.data.num_lanes=8", "--config.data.shuffle_window=none")
    all_of_them = ("--config.data.holdout=0", "--config.eval.every_steps=none")
    run = make_run()("--dry_run", *files, *lanes, *all_of_them, code=2)
    assert "gets no document" in run.output
    assert "Set data.num_lanes=4, or use a larger source." in run.output
    assert not list((run.workdir / "cache").glob("jax/*"))
