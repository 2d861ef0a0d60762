"""A run with experts, killed and resumed on other meshes."""

import numpy as np
import pytest

from tests.e2e.conftest import MakeRun
from tests.e2e.runs import ROOT
from tests.e2e.test_processes import assert_same_data

EXPERTS = str(ROOT / "tests/e2e/configs/experts.py")


@pytest.mark.slow
def test_killed_runs_go_on_on_other_meshes_with_the_same_data(make_run: MakeRun) -> None:
    whole = make_run("whole", config=EXPERTS)()
    for processes, step, mesh in ((2, 7, ("expert=2", "fsdp=2")), (1, 22, ("expert=4", "fsdp=1"))):
        run = make_run("killed", processes, devices=4 // processes, config=EXPERTS)
        run.start(*(f"--config.mesh.{size}" for size in mesh))
        assert run.wait_for_step(step), run.output
        run.kill()
    run = make_run("killed", devices=4, config=EXPERTS)
    run("--config.mesh.expert=2", "--config.mesh.fsdp=1", "--config.mesh.tensor=2")
    assert_same_data(run, whole)
    for name in ("router_balance_loss", "router_entropy", "expert_load_max"):
        mine, theirs = ([line[name] for line in one.steps()] for one in (run, whole))
        np.testing.assert_allclose(mine, theirs, rtol=2e-2)
    assert {line["expert_dropped"] for line in run.steps()} == {0}
    assert "active); mesh" in run.output
