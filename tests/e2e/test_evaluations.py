"""Evaluations by source and of tasks are the same over processes and meshes, and again from a checkpoint."""

import json
import pathlib
import subprocess
import sys
from typing import Any

import pytest

from tests.e2e.conftest import MakeRun
from tests.e2e.runs import ROOT, Run
from tests.hub import LoopbackHub
from tests.trainer import task_data

pytestmark = pytest.mark.slow

TASKS = ("boolq", "hellaswag", "lambada_openai")
FLAGS = (f"--config.eval.tasks={','.join(TASKS)}", "--config.steps=12")


def evaluated(run: Run) -> dict[int, dict[str, Any]]:
    return {line["step"]: line for line in run.evaluations()}


def assert_close(found: Any, expected: Any) -> None:
    """The same counts, and equal numbers within rounding."""
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        if isinstance(value, dict):
            assert_close(found[key], value)
        elif key in ("tokens", "questions", "acc", "acc_stderr"):
            assert found[key] == value, key
        else:
            assert found[key] == pytest.approx(value, rel=2e-4), key


def test_evaluations_are_the_same_on_any_processes_and_meshes(
    make_run: MakeRun, datasets: LoopbackHub, tmp_path: pathlib.Path
) -> None:
    task_data.fill(datasets)
    alone = make_run("alone")(*FLAGS)
    expected = evaluated(alone)
    assert list(expected) == [10, 12]
    for line in expected.values():
        assert set(line["eval_by_source"]) == {"web", "wiki", "code"}
        assert {name: one["questions"] for name, one in line["eval_tasks"].items()} == dict.fromkeys(TASKS, 12)
    assert len({one["tokens"] for one in expected[12]["eval_by_source"].values()} - {0}) > 1
    assert "boolq acc=" in alone.output
    commit = datasets.repos["dataset", "aps/super_glue"].branches["main"]
    assert f"Task boolq: 12 questions of aps/super_glue@{commit}" in alone.output

    others = [
        make_run("two", processes=2)(*FLAGS),
        make_run("meshed", devices=4)(*FLAGS, "--config.mesh.tensor=2", "--config.mesh.context=2"),
        make_run("eight", devices=8)(*FLAGS),
    ]
    for other in others:
        for step, line in expected.items():
            for key in ("eval_by_source", "eval_tasks"):
                assert_close(evaluated(other)[step][key], line[key])
    assert others[0].output.count("Task boolq:") == 1  # process 0 reads for all

    # The checkpoint and the kept questions give the same, without the Hub.
    command = [sys.executable, "-m", "tools.evaluate", f"--workdir={alone.workdir}", f"--tasks={','.join(TASKS)}"]
    env = {**alone.env, "HF_ENDPOINT": "http://127.0.0.1:9"}
    found = tmp_path / "found.json"
    done = subprocess.run([*command, f"--json={found}"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert_close(json.loads(found.read_text())["tasks"], expected[12]["eval_tasks"])
    assert "Step 12, hellaswag: acc " in done.stdout


def test_tasks_need_no_held_out_documents(make_run: MakeRun, datasets: LoopbackHub) -> None:
    task_data.fill(datasets)
    flags = ("--config.eval.tasks=boolq", "--config.eval.task_limit=5", "--config.data.holdout=0", "--config.steps=3")
    run = make_run()(*flags)
    (line,) = [line for line in run._lines() if "eval_tasks" in line]
    assert line["eval_tasks"]["boolq"]["questions"] == 5
    assert "eval_loss" not in line
