"""The choice of programs in whole runs: on disk before the first step, and the same through kills and changes."""

import dataclasses
import json
import signal
from typing import Any

import numpy as np
import pytest

from jaxtrain.trainer.step import Variant
from tests.e2e.conftest import MakeRun
from tests.e2e.runs import STOPPED, Run, assert_equal

CHANGE = 25  # a step in the middle of the second stage


def give(run: Run, kept: list[dict[str, Any]]) -> Run:
    """Puts choices into an empty work directory."""
    (run.workdir / "programs.json").write_text(json.dumps(kept))
    return run


@pytest.mark.slow
def test_the_change_to_another_program_is_exact(make_run: MakeRun, reference: Run) -> None:
    """Unrolled and recomputed from a step on: killed and resumed before, at and after it, and without the file."""
    later = dataclasses.asdict(Variant(micro_batches=4, remat="full", scan_layers=False, chunk_tokens=16))
    kept = json.loads((reference.workdir / "programs.json").read_text())
    assert len(kept) == 3
    kept = [{**entry, "later": later, "from_step": CHANGE} for entry in kept]
    whole = give(make_run("whole"), kept)()
    fingerprints = [[line["fingerprint"] for line in run.steps()] for run in (whole, reference)]
    assert fingerprints[0] == fingerprints[1]
    losses = [np.asarray([line["loss"] for line in run.steps()]) for run in (whole, reference)]
    np.testing.assert_array_equal(losses[0][: CHANGE - 1], losses[1][: CHANGE - 1])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    assert np.any(losses[0][CHANGE:] != losses[1][CHANGE:])
    assert "remat=full, loss in chunks of 16, layers unrolled" in whole.output
    run = give(make_run(), kept)
    for step in (CHANGE - 10, CHANGE, CHANGE + 8):
        run.start()
        assert run.wait_for_step(step)
        run.kill()
    (run.workdir / "programs.json").unlink()  # checkpoints have its content
    run.start()
    assert run.wait_for_step(CHANGE + 11)
    run.signal(signal.SIGTERM)
    assert run.wait() == STOPPED
    run()
    assert_equal(run, whole)
    assert json.loads((run.workdir / "programs.json").read_text()) == run.data_state()["programs"] == kept


@pytest.mark.slow
def test_the_choice_is_written_before_the_first_step(make_run: MakeRun) -> None:
    run = make_run()
    run.start()
    assert run.wait_until(lambda: (run.workdir / "programs.json").exists())
    assert not run.steps()
    run.kill()
    before = (run.workdir / "programs.json").read_text()
    run("--config.steps=3")
    assert (run.workdir / "programs.json").read_text() == before
