"""Samples during a run, in its log, metrics and report; a kill or a resume changes none of them."""

import subprocess
import sys

import pytest

from tests.e2e.conftest import MakeRun
from tests.e2e.runs import ROOT, Run

pytestmark = pytest.mark.slow

FLAGS = (
    *("--config.sample_prompts=the first,the second", "--config.sample_every_tokens=4000"),
    *("--config.eval.every_steps=none", "--config.log_every=7"),
)


def samples(run: Run) -> dict[int, dict[str, str]]:
    return {line["step"]: line["samples"] for line in run._lines() if "samples" in line}


def test_samples_of_a_run_that_was_stopped(make_run: MakeRun) -> None:
    whole = make_run("whole")(*FLAGS)
    found = samples(whole)
    # 4,000 tokens are reached in step 16 of 256 tokens each, 8,000 in step 32; the run ends with step 48.
    assert list(found) == [16, 32, 42, 48]
    assert all(list(texts) == ["the first", "the second"] for texts in found.values())
    assert f"Sample: the first{found[48]['the first']}" in whole.output
    parts = make_run("parts")
    parts(*FLAGS, "--config.steps=33")
    parts(*FLAGS)
    assert samples(parts) == {**found, 33: samples(parts)[33]}
    command = [sys.executable, "-m", "tools.report", str(parts.workdir)]
    subprocess.run(command, cwd=ROOT, env=parts.env, check=True, capture_output=True)
    page = (parts.workdir / "report.html").read_text()
    assert page.index("Step 48") < page.index("Step 32") < page.index("Step 16")
