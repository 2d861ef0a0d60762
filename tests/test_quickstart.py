"""The README's first run, exactly as written: a newcomer's four minutes."""

import json
import math
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]


def run(workdir: pathlib.Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "jaxtrain.main", "--config=configs/quickstart.py", f"--workdir={workdir}"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1500)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_quickstart_learns_samples_and_then_says_that_it_is_complete(tmp_path: pathlib.Path):
    first = run(tmp_path / "run")
    assert first.returncode == 0, first.stderr
    text = first.stdout + first.stderr
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[0] < 1.1 * math.log(4096)
    assert losses[-1] < 0.6 * math.log(4096)
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert held_out[-1] < held_out[0]
    assert text.count("Sample: ") == 2
    again = run(tmp_path / "run")
    assert again.returncode == 0, again.stderr
    assert "The run is complete" in again.stdout + again.stderr
