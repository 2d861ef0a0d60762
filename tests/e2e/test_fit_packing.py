"""Rows of whole documents in a whole run: killed and stopped in every stage, on one process and on two."""

import json
import pathlib
import signal
import subprocess
import sys

import pytest

from tests.e2e.conftest import MakeRun
from tests.e2e.runs import ROOT, STOPPED, Run, environment
from tests.hub import LoopbackHub

FIT = "tests/e2e/configs/fit.py"


@pytest.mark.slow
def test_killed_stopped_and_on_two_processes(
    make_run: MakeRun, reference: Run, datasets: LoopbackHub, tmp_path: pathlib.Path
) -> None:
    whole = make_run("whole", config=FIT)()
    last = whole.steps()[-1]
    assert sum(source["tokens"] + source["padding"] for source in last["sources"].values()) == last["tokens"]
    cut, as_usual = (
        sum(source["cut_documents"] for source in run.steps()[-1]["sources"].values()) for run in (whole, reference)
    )
    assert 0 < cut < 0.9 * as_usual
    run = make_run(config=FIT)
    for step in (7, 25):
        run.start()
        assert run.wait_for_step(step), run.output
        run.kill()
    two = make_run(processes=2, config=FIT)
    two.start()
    assert two.wait_for_step(40), two.output
    two.signal(signal.SIGTERM)
    assert two.wait() == STOPPED, two.output
    run()
    # Two processes sum in another order.
    for key in ("fingerprint", "tokens", "sources", "stage_sources"):
        assert [line[key] for line in run.steps()] == [line[key] for line in whole.steps()]
    assert run.data_state()["lanes"] == whole.data_state()["lanes"]
    # The rows of a step are the same from the beginning and from a checkpoint.
    found = []
    for number, workdir in enumerate((whole.workdir, tmp_path / "none")):
        path = tmp_path / f"{number}.json"
        command = [sys.executable, "-m", "tools.inspect_stream", f"--config={run.spec}", "--at_step=43"]
        command += [f"--json={path}", f"--workdir={workdir}"]
        done = subprocess.run(command, cwd=ROOT, env=environment(datasets.env()), capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(json.loads(path.read_text()))
    assert found[0]["from_checkpoint"]
    assert found[0]["rows"] == found[1]["rows"]
