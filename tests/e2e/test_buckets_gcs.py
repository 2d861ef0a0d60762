"""Sources and a work directory in Google Cloud Storage, from an emulator of it (the `buckets` extra)."""

import json
import pathlib
import subprocess
import sys

import pytest

from tests import gcs
from tests.e2e.runs import ROOT, environment
from tests.e2e.test_buckets import CONFIG, data, fingerprints


@pytest.mark.slow
def test_a_run_in_a_bucket_is_the_run_on_a_disk(
    compiled: None, tokenizer: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Resumed there, too: past a save that a kill left unfinished, and past a checkpoint that has lost a file."""
    with gcs.serve("data", "runs") as (there, runs):
        for name, content in data().items():
            there.put(name, content)

        def run(workdir: str, *flags: str) -> str:
            env = environment(runs.env(), XDG_CACHE_HOME=str(tmp_path / "cache"))
            command = [sys.executable, "-m", "jaxtrain.main", f"--config={CONFIG}:gs|{tokenizer}"]
            command += [f"--workdir={workdir}", *flags]
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=540, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            return done.stdout + done.stderr

        run(str(tmp_path / "local"))
        wanted = fingerprints((tmp_path / "local" / "metrics.jsonl").read_bytes())
        assert max(wanted) == 30
        run("gs://runs/a run", "--config.steps=15")
        saved = runs.objects("a run/checkpoints/")
        assert {name.split("/")[2] for name in saved} == {"5", "10", "15"}
        runs.delete(next(name for name in saved if name.startswith("a run/checkpoints/15/params/") and "/d/" in name))
        runs.put("a run/checkpoints/20/params/_METADATA", b"{}")
        output = run("gs://runs/a run")
        assert "Resumed from step 10" in output
        assert "checkpoints/15.corrupt" in output
        found = runs.objects("a run/")
        assert fingerprints(found["a run/metrics.jsonl"]) == wanted
        assert {name.split("/")[2] for name in found if "/checkpoints/" in name} == {"15.corrupt", "20", "25", "30"}
        assert json.loads(found["a run/config.json"])
        assert "a run/lock" not in found
        assert "Nothing to do." in run("gs://runs/a run")
