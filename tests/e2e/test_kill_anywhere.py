"""The promise: a run killed at any moment, any number of times, ends exactly like an uninterrupted run."""

import random
import signal
import time

import numpy as np
import pytest

from tests.e2e.conftest import MakeRun
from tests.e2e.runs import STOPPED, Run, assert_equal
from tests.tiers import nightly_but


def test_the_reference_has_what_it_is_to_show(reference: Run) -> None:
    lines = reference.steps()
    assert [line["step"] for line in lines] == list(range(1, lines[-1]["step"] + 1))
    assert {line["stage"] for line in lines} == {1, 2, 3}
    assert lines[-1]["sources"]["wiki"]["epoch"] >= 1
    assert np.mean([line["loss"] for line in lines[-5:]]) < 0.75 * lines[0]["loss"]
    assert [line["step"] for line in reference.evaluations()] == [10, 20, 30, 40, lines[-1]["step"]]


def kill_at(run: Run, step: int, delay: float) -> None:
    """Restarts the run and kills it `delay` seconds after metrics.jsonl has the step, if it is still running."""
    run.start()
    if run.wait_for_step(step):
        time.sleep(delay)
    run.kill()


@pytest.mark.parametrize(
    ("kills", "seed"), nightly_but([(2, 1)], [(2, 1), (5, 3), (9, 2)], slow=[(5, 3)]), ids=lambda value: str(value)
)
def test_kill_anywhere(make_run: MakeRun, reference: Run, kills: int, seed: int) -> None:
    rng = random.Random(seed)
    run = make_run()
    last = reference.last_step()
    # One kill in each of `kills` equal parts of the run: the first in stage 1, the last in stage 3.
    for part in range(kills):
        step = round(last * (part + rng.random()) / (kills + 0.5))
        kill_at(run, max(step, 1), rng.uniform(0, 0.1))
    run()
    assert_equal(run, reference)


@pytest.mark.slow
def test_kill_during_a_save(make_run: MakeRun, reference: Run) -> None:
    """Every kill falls between the start of a save and its commit, or just after."""
    rng = random.Random(3)
    run = make_run()
    folder = run.workdir / "checkpoints"
    hits = 0
    for _ in range(8):
        run.start()
        began = run.wait_until(lambda: folder.exists() and any("tmp" in path.name for path in folder.iterdir()))
        time.sleep(rng.uniform(0, 0.03))
        run.kill()
        hits += began and any("tmp" in path.name for path in folder.iterdir())
    assert hits >= 3
    run()
    assert_equal(run, reference)


def test_stop_and_go_on(make_run: MakeRun, reference: Run, stopped: Run) -> None:
    step = stopped.last_step()
    assert stopped.checkpoints()[-1] == step < reference.last_step()
    assert stopped.data_state()["step"] == step
    assert f"Stopping at step {step}" in stopped.output
    run = make_run(copy=stopped)()
    assert f"Resumed from step {step}" in run.output
    assert_equal(run, reference)


def test_interrupted_by_ctrl_c(make_run: MakeRun) -> None:
    run = make_run().start()
    assert run.wait_for_step(3), run.output
    run.signal(signal.SIGINT)
    assert run.wait() == STOPPED, run.output
    assert run.checkpoints()[-1] == run.last_step() == run.data_state()["step"]
    assert "Run the same command again to continue." in run.output
    assert "Traceback" not in run.output


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_before_there_is_anything_to_save(make_run: MakeRun, number: signal.Signals) -> None:
    """A signal during imports, source lookups or compilation ends the run at once."""
    run = make_run()
    for seconds in (0.0, 1.0, 2.5):
        run.start()
        assert run.wait_until(run.takes_sigterm)  # not before the interpreter itself has started
        time.sleep(seconds)
        run.signal(number)
        asked = time.monotonic()
        assert run.wait() == STOPPED, run.output
        if not run.checkpoints():
            assert run.output.endswith("Stopped: no step is under way, so there is nothing to save.\n")
            assert time.monotonic() - asked < 10
