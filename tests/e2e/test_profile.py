"""Profiles of running jobs: the steps asked for, with the host's spans by name."""

import pathlib
import signal
import subprocess
import sys

import jax
import pytest

from jaxtrain.metrics.monitor import SPANS
from tests.e2e.conftest import MakeRun
from tests.e2e.runs import ROOT, Run

TRACES = pathlib.PurePath("profile", "plugins", "profile")


def traced(path: pathlib.Path) -> tuple[set[str], list[int]]:
    """(names of the spans, steps) of a trace."""
    spans, steps = set(), set()
    for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
        for event in (event for line in plane.lines for event in line.events):
            if event.name in SPANS:
                spans.add(event.name)
            if event.name == "train":
                steps.add(int(dict(event.stats)["step_num"]))
    return spans, sorted(steps)


@pytest.mark.slow
def test_steps_of_two_processes(make_run: MakeRun) -> None:
    run = make_run(processes=2)("--profile=16:3", "--config.steps=20")
    folder = run.workdir / TRACES / "step_16"
    assert sorted(path.name for path in folder.iterdir()) == ["process_0.xplane.pb", "process_1.xplane.pb"]
    for path in folder.iterdir():
        spans, steps = traced(path)
        assert steps == [16, 17, 18]
        assert spans == {"data", "compile"} or spans == {"data"}  # the second stage begins with step 17
    assert f"Profile from step 16 to 18: {folder / 'process_0.xplane.pb'}" in run.output
    assert not list((run.workdir / "cache").glob("profile-*"))
    report = [sys.executable, "-m", "tools.report", str(run.workdir)]
    subprocess.run(report, cwd=ROOT, env=run.env, check=True, capture_output=True)
    assert "profile/plugins/profile/step_16" in (run.workdir / "report.html").read_text()


@pytest.mark.slow
def test_a_signal_to_a_resumed_run(make_run: MakeRun, stopped: Run, reference: Run) -> None:
    """A resume past the steps of --profile traces nothing; SIGUSR1 traces the next five steps, and changes nothing."""
    run = make_run(copy=stopped).start("--profile=9:3")
    first = stopped.last_step() + 3
    assert run.wait_for_step(first), run.output
    run.signal(signal.SIGUSR1)
    assert run.wait() == 0, run.output
    (folder,) = (run.workdir / TRACES).iterdir()
    step = int(folder.name.removeprefix("step_"))
    assert step > first
    spans, steps = traced(folder / "process_0.xplane.pb")
    assert steps == [*range(step, step + 3)]
    assert {"data", "checkpoint"} <= spans or {"data"} <= spans
    assert run.steps()[-1]["fingerprint"] == reference.steps()[-1]["fingerprint"]
