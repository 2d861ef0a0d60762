"""tools.evaluate on a trained run: it gives the numbers that the run logged, from its checkpoint alone."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests.e2e.runs import ROOT, Run, environment
from tests.hub import LoopbackHub


@pytest.mark.slow
def test_the_logged_loss_is_found_again(reference: Run, datasets: LoopbackHub, tmp_path: pathlib.Path):
    def evaluate(*flags: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "tools.evaluate", f"--workdir={reference.workdir}", *flags]
        env = environment(datasets.env())
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)

    lines = [json.loads(line) for line in (reference.workdir / "metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line for line in lines if "eval_loss" in line}
    last = max(logged)
    done = evaluate("--by_source", f"--json={tmp_path / 'found.json'}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["step"] == last
    for name in ("eval_loss", "eval_bits_per_byte"):
        assert found["loss"]["all"][name] == logged[last][name]
    by_source = {name: values["eval_loss"] for name, values in found["loss"].items()}
    assert set(by_source) == {"all", "web", "wiki", "code"}
    assert len(set(by_source.values())) == 4
    for name, logged_one in logged[last]["eval_by_source"].items():
        assert {f"eval_{key}": value for key, value in logged_one.items()}.items() <= found["loss"][name].items()
        assert logged_one["tokens"] <= 2048 // 3  # the last tokens of documents have no loss
    assert f"Step {last:,}, wiki: loss {by_source['wiki']:.4f}" in done.stdout

    refused = evaluate("--config.data.holdout=0.5")
    assert refused.returncode == 2
    assert "data.holdout=0.5, and the run kept" in refused.stderr
    assert evaluate("--config.eval.tokns=5").returncode == 2
