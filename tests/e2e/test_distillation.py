"""Distillation on the fly from the reference run's checkpoint, killed and resumed. Wrong teachers are refused."""

import json
import pathlib
import random
import shutil
import signal
import time

import numpy as np
import pytest

from tests.e2e.conftest import MakeRun
from tests.e2e.runs import STOPPED, Run, assert_equal

DISTILL = "tests/e2e/configs/distill.py"


def teacher(model: pathlib.Path) -> tuple[str, str]:
    return f"--config.teacher.model={model}", "--config.teacher.dtype=float32"


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_distillation_ends_as_if_nothing_had_happened(make_run: MakeRun, reference: Run) -> None:
    flags = teacher(reference.workdir)
    whole = make_run("whole", config=DISTILL)(*flags)
    lines = whole.steps()
    assert {line["stage"] for line in lines} == {1, 2, 3}
    assert all(line["ce_loss"] > 0 and line["kd_loss"] > 0 for line in lines)
    # At the last step the weights are 0.1 and 0.5.
    mixed = 0.5 * lines[-1]["kd_loss"] + 0.5 * (0.2 + 0.8 * 50 / 11_000) * lines[-1]["ce_loss"]
    assert lines[-1]["loss"] == pytest.approx(mixed, rel=0.02)
    assert np.mean([line["kd_loss"] for line in lines[-5:]]) < 0.9 * lines[0]["kd_loss"]

    rng = random.Random(1)
    run = make_run("killed", config=DISTILL)
    for part in range(3):
        run.start(*flags)
        if run.wait_for_step(round(whole.last_step() * (part + rng.random()) / 3.5) or 1):
            time.sleep(rng.uniform(0, 0.1))
        run.kill()
    run(*flags)
    assert_equal(run, whole)

    both = make_run("both", processes=2, config=DISTILL)(*flags)
    assert both.steps()[-1]["fingerprint"] == lines[-1]["fingerprint"]
    for name in ("loss", "ce_loss", "kd_loss"):
        assert both.steps()[-1][name] == pytest.approx(lines[-1][name], rel=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_another_teacher_is_refused_at_a_resume_and_a_moved_one_is_not(make_run: MakeRun, reference: Run) -> None:
    run = make_run(config=DISTILL)
    run.start(*teacher(reference.workdir))
    assert run.wait_for_step(2), run.output
    run.signal(signal.SIGTERM)
    assert run.wait() == STOPPED, run.output
    recorded = run.data_state()["teacher"]
    copied = shutil.copytree(reference.workdir / "checkpoints", run.workdir.with_name("moved") / "checkpoints")
    earlier, *_, last = (copied / str(step) for step in reference.checkpoints())
    run(*teacher(earlier), code=2)
    assert f"the teacher has changed; it was {reference.workdir}, is {earlier}" in run.output
    assert f"parameters: was {recorded['parameters']}, is " in run.output
    run(f"--config.teacher.model={last}", code=2)
    assert "dtype: was float32, is bfloat16" in run.output
    run(code=2)
    assert f"the teacher was {reference.workdir}, is none" in run.output
    stopped_at = run.checkpoints()[-1]
    run.start(*teacher(last))
    assert run.wait_for_step(stopped_at + 1), run.output
    run.kill()


@pytest.mark.slow
def test_wrong_teachers_are_refused_before_the_first_step(
    make_run: MakeRun, reference: Run, tmp_path: pathlib.Path
) -> None:
    run = make_run(config=DISTILL)
    run("--config.teacher.model=./nowhere", code=2)
    assert "teacher.model=./nowhere: there is no such folder" in run.output
    empty = tmp_path / "empty"
    empty.mkdir()
    run(*teacher(empty), code=2)
    assert "has no config.json" in run.output
    (empty / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    run(*teacher(empty), code=2)
    assert "model_type='gpt2' is not supported" in run.output
    assert "Traceback" not in run.output
    assert not run.steps()
