"""Distillation from a cache written by several workers, one of them killed: exact across kills and meshes."""

import pathlib
import random
import signal
import subprocess
import sys

import pytest

from tests.e2e.conftest import MakeRun
from tests.e2e.runs import LOCAL, ROOT, STOPPED, Run, assert_equal, environment
from tests.hub import LoopbackHub

DISTILL = "tests/e2e/configs/distill.py"
SAMPLES = [
    f"--config.data.sources.{name}.max_samples={count}" for name, count in (("web", 200), ("wiki", 250), ("code", 250))
]


@pytest.fixture
def cache(datasets: LoopbackHub, tokenizer: pathlib.Path, reference: Run, tmp_path: pathlib.Path) -> pathlib.Path:
    """A cache with the reference run as the teacher: two workers, killed once, then three, one of them late."""
    output = tmp_path / "cache"
    flags = [
        f"--config={DISTILL}:{tokenizer}",
        f"--config.teacher.model={reference.workdir}",
        "--config.teacher.dtype=float32",
        "--max_samples=250",
        "--k=20",
        "--temperatures=1.5,1",
        "--batch_tokens=512",
        f"--output={output}",
        f"--workdir={tmp_path / 'work'}",
    ]
    command = [sys.executable, "-m", "tools.cache_teacher", *flags]
    settings = environment(datasets.env())
    started = subprocess.Popen([str(LOCAL), "2", *command], cwd=ROOT, env=settings, start_new_session=True)
    while started.poll() is None and not list(output.glob("*/*.array_record")):
        pass
    subprocess.run(["pkill", "-KILL", "-s", str(started.pid)], check=False)
    started.wait()
    said = ""
    for more in ("--worker=2/3", "--worker=0/3", "--worker=1/3", "--verify"):
        done = subprocess.run([*command, more], cwd=ROOT, env=settings, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        said += done.stdout
    assert "Train from it with --config.teacher.cache=" in said
    assert said.count("All bytes match their checksums.") == 3
    return output


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_from_a_cache_killed_and_on_two_processes(make_run: MakeRun, reference: Run, cache: pathlib.Path) -> None:
    flags = (f"--config.teacher.cache={cache}", *SAMPLES)
    whole = make_run("whole", config=DISTILL)(*flags)
    lines = whole.steps()
    assert lines[-1]["kd_loss"] < 0.9 * lines[0]["kd_loss"]
    rng = random.Random(1)
    run = make_run("killed", config=DISTILL)
    for part in range(2):
        run.start(*flags)
        run.wait_for_step(round(whole.last_step() * (part + rng.random()) / 2.5) or 1)
        run.kill()
    run.start(*flags)
    if run.wait_for_step(run.last_step() + 2):
        run.signal(signal.SIGTERM)
        assert run.wait() == STOPPED, run.output
        live = (f"--config.teacher.model={reference.workdir}", "--config.teacher.dtype=float32", *SAMPLES)
        run(*live, code=2)
        assert "the teacher was a cache, is the model itself" in run.output
        run(*flags)
    assert_equal(run, whole)
    both = make_run("both", processes=2, config=DISTILL)(*flags)
    assert both.steps()[-1]["fingerprint"] == lines[-1]["fingerprint"]
    assert both.steps()[-1]["loss"] == pytest.approx(lines[-1]["loss"], rel=1e-4)

    refused = make_run("refused", config=DISTILL)
    refused(*flags, "--config.distillation.divergence.k=19", code=2)
    assert "(--config.distillation.divergence.k= changes only k)" in refused.output
    (cache / "wiki" / "cache.json").unlink()
    refused(*flags, code=2)
    assert "is not finished: run tools.cache_teacher again" in refused.output
