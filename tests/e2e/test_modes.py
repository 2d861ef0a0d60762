"""A run that switches between streaming, downloads and token stores at every resume equals one that never does."""

import contextlib
import os
import pathlib
import random
import subprocess
import sys
import time

import pytest

from tests.e2e.conftest import MakeRun
from tests.e2e.runs import PATIENCE, ROOT, STOPPED, Run, assert_equal, documents


def pretokenize(run: Run, *flags: str, code: int | None = 0) -> str:
    """Runs the tool on the run's config and work directory, and returns its output."""
    command = [sys.executable, "-m", "tools.pretokenize", f"--config={run.spec}", f"--workdir={run.workdir}", *flags]
    done = subprocess.run(
        command, cwd=ROOT, env=run.env, capture_output=True, text=True, timeout=PATIENCE, stdin=subprocess.DEVNULL
    )
    assert code in (None, done.returncode), done.stdout + done.stderr
    return done.stdout + done.stderr


def stop_at(run: Run, step: int, *flags: str) -> None:
    run.start(*flags)
    if run.wait_for_step(step):
        run.signal(15)
    assert run.wait() in (0, STOPPED), run.output


@pytest.mark.slow
def test_modes_may_change_at_every_resume(make_run: MakeRun, reference: Run, datasets) -> None:
    run = make_run()
    stop_at(run, 6, "--config.data.mode=stream")
    assert "Source web: stream, as data.mode says" in run.output
    stop_at(run, 12, "--config.data.mode=download")
    assert "Source web: download, as data.mode says" in run.output
    # Reads the commit in the run's checkpoint, wherever the branch is now. Two workers, one after the other.
    said = pretokenize(run, code=2)
    assert "max_samples MUST be specified for streaming datasets!" in said
    run("--config.data.mode=pretokenized", code=2)
    assert "there is no token store" in run.output
    assert "other workers are not" in pretokenize(run, "--all", "--worker=1/2")
    run("--config.data.mode=pretokenized", code=2)
    assert "is not finished: run tools.pretokenize again" in run.output
    assert "Source code: 300 documents" in pretokenize(run, "--all", "--worker=0/2")
    assert "All bytes match their checksums" in pretokenize(run, "--verify")
    asked = datasets.count("/datasets/e2e/")
    stop_at(run, 22, "--config.data.mode=pretokenized")
    assert datasets.count("/datasets/e2e/") == asked
    stop_at(run, 30, "--config.data.mode=stream")
    run("--config.data.mode=auto")
    assert "Source web: pretokenized, its token store" in run.output
    assert "Changed since the checkpoint:   data.mode" in run.output
    assert_equal(run, reference)
    assert run.steps()[-1]["fingerprint"] == reference.steps()[-1]["fingerprint"]


@pytest.mark.slow
def test_a_killed_tool_goes_on(make_run: MakeRun, tmp_path: pathlib.Path) -> None:
    """After SIGKILLs at arbitrary moments, the store equals that of an uninterrupted tool."""
    run = make_run()
    pretokenize(run, "--all", f"--output={tmp_path / 'whole'}")
    command = [sys.executable, "-m", "tools.pretokenize", f"--config={run.spec}", f"--workdir={run.workdir}", "--all"]
    rng = random.Random(0)
    for _ in range(3):
        output = open(os.devnull, "w")  # noqa: SIM115 - closed below
        process = subprocess.Popen(
            [*command, f"--output={tmp_path / 'killed'}"], cwd=ROOT, env=run.env, stdout=output, stderr=output
        )
        deadline, wanted = time.monotonic() + PATIENCE, rng.randint(1, 20)
        while process.poll() is None and time.monotonic() < deadline:
            with contextlib.suppress(FileNotFoundError):
                if sum(1 for path in (tmp_path / "killed").rglob("*") if path.is_file()) >= wanted:
                    break
            time.sleep(0.002)
        process.kill()
        process.wait()
        output.close()
    pretokenize(run, "--all", f"--output={tmp_path / 'killed'}")
    whole, killed = (
        {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "whole", tmp_path / "killed")
    )
    assert whole == killed


@pytest.mark.slow
def test_streaming_leaves_no_data_behind(make_run: MakeRun, reference: Run, tmp_path: pathlib.Path) -> None:
    """No file under the work directory, the Hub's folder or the temporary folder contains bytes of the datasets."""
    (tmp_path / "tmp").mkdir()
    run = make_run("streamed", TMPDIR=str(tmp_path / "tmp"), HF_HOME=str(tmp_path / "hub"))
    stop_at(run, 6)
    marks = [b"PAR1", *(max(documents(n, 120), key=len)[:200].encode() for n in range(4))]
    files = [path for folder in (run.workdir, tmp_path / "tmp", tmp_path / "hub") for path in folder.rglob("*")]
    files = [path for path in files if path.is_file() and "jax" not in path.parts]
    assert files
    assert not [path for path in files if any(mark in path.read_bytes() for mark in marks)]
    assert not (run.workdir / "tokens").exists()
    assert not (run.workdir / "cache" / "data").exists()
