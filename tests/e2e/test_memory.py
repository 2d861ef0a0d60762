"""Runs with less memory split the same batches into smaller micro-batches, or report at once what cannot fit."""

import re
import shutil

import numpy as np
import pytest

from tests.e2e.conftest import MakeRun
from tests.e2e.runs import COMPILED, Run
from tests.hub import LoopbackHub
from tests.trainer import task_data


@pytest.mark.slow
def test_what_cannot_fit_ends_the_run_before_it_begins(make_run: MakeRun) -> None:
    run = make_run()
    run("--config.memory_gb=0.0001", code=2)
    assert "Stage 3 (long) does not fit: even with one row of 64 tokens at a time a device needs 0.00" in run.output
    assert "may use 0.0001 GB" in run.output
    assert not run.steps()
    assert not run.checkpoints()


@pytest.mark.slow
def test_an_evaluation_that_cannot_fit_ends_the_run_before_it_begins(make_run: MakeRun) -> None:
    """Every stage fits. The first evaluation would only come with step 10."""
    run = make_run()
    run("--config.model.max_seq_len=8192", "--config.eval.seq_len=8192", "--config.memory_gb=0.005", code=2)
    assert "Evaluation does not fit: even with one row of 8,192 tokens at a time a device needs 0.0" in run.output
    assert "Stage 3 (long): " in run.output  # it fits
    assert not run.steps()
    assert not run.checkpoints()


@pytest.mark.nightly
def test_a_dry_run_names_every_stage_that_does_not_fit(make_run: MakeRun, datasets: LoopbackHub) -> None:
    task_data.fill(datasets)
    run = make_run()
    run("--dry_run", "--config.memory_gb=0.0001", "--config.eval.tasks=boolq", code=2)
    assert "The program of eval.tasks does not fit" in run.output
    for stage in ("1 (short)", "2 (mixed)", "3 (long)"):
        assert f"Stage {stage} does not fit" in run.output


@pytest.mark.slow
def test_less_memory_trains_on_the_same_batches(make_run: MakeRun, reference: Run) -> None:
    needs = [float(text) for text in re.findall(r"Stage \d.* tokens: (\S+) GB per device", reference.output)]
    assert len(needs) == 3
    limit = (min(needs[:2]) + max(needs[:2])) / 2
    run = make_run()
    run(f"--config.memory_gb={limit!r}", "--config.steps=30")
    parts = re.findall(r"Stage \d \(\w+\): (\d+) micro-batches", run.output)
    whole = re.findall(r"Stage \d \(\w+\): (\d+) micro-batches", reference.output)
    assert len(parts) == 2  # none of the 30 steps is in the third stage
    assert sum(map(int, parts)) > sum(map(int, whole[:2]))
    mine, theirs = run.steps(), reference.steps()[:30]
    assert [line["fingerprint"] for line in mine] == [line["fingerprint"] for line in theirs]
    np.testing.assert_allclose([x["loss"] for x in mine], [x["loss"] for x in theirs], rtol=1e-4)


@pytest.mark.nightly
def test_a_restart_compiles_nothing(make_run: MakeRun, stopped: Run) -> None:
    """Every stage's program comes from the work directory's cache, even after the directory has moved."""
    first, run = make_run("first"), make_run(copy=stopped)
    for each in (first, run):
        del each.env[COMPILED]
    first()
    cache = run.workdir / "cache" / "jax"
    shutil.copytree(first.workdir / "cache" / "jax", cache)
    cached = {path.name for path in cache.glob("jit_step-*-cache")}
    assert len(cached) >= 3
    run()
    assert run.last_step() == 48
    assert {path.name for path in cache.glob("jit_step-*-cache")} == cached
