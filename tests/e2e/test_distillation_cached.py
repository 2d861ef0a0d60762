"""Distillation from a cache written by several workers, one of them killed: exact across kills and meshes."""

import pathlib
import random
import signal
import subprocess
import sys

import pytest

from jaxtrain.tokenizers.training import TrainTokenizer
from tests.e2e.conftest import MakeRun
from tests.e2e.runs import LOCAL, ROOT, STOPPED, Run, assert_equal, documents, environment
from tests.hub import LoopbackHub

DISTILL = "tests/e2e/configs/distill.py"
SAMPLES = [
    f"--config.data.sources.{name}.max_samples={count}" for name, count in (("web", 200), ("wiki", 250), ("code", 250))
]


@pytest.fixture
def other(tmp_path: pathlib.Path) -> tuple[str, ...]:
    """Flags for another tokenizer than the teacher's."""
    config = TrainTokenizer(kind="sentencepiece", model_type="bpe", vocab_size=320, max_samples=100)
    config.train(documents(1, 100), tmp_path / "other", progress=False)
    return (f"--config.tokenizer.path={tmp_path / 'other' / 'tokenizer' / 'tokenizer.model'}",)


def write_cache(
    output: pathlib.Path, datasets: LoopbackHub, tokenizer: pathlib.Path, reference: Run, others: tuple[str, ...]
) -> pathlib.Path:
    """A cache with the reference run as the teacher: two workers, killed once, then three, one of them late."""
    flags = [
        f"--config={DISTILL}:{tokenizer}",
        f"--config.teacher.model={reference.workdir}",
        "--config.teacher.dtype=float32",
        "--max_samples=250",
        "--k=20",
        "--temperatures=1.5,1",
        "--batch_tokens=512",
        f"--output={output}",
        f"--workdir={output.parent / 'work'}",
        *others,
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
    assert ("Caching by the teacher's own tokenizer" in said) == bool(others)
    return output


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("by_text", [False, pytest.param(True, marks=pytest.mark.nightly)])
def test_from_a_cache_killed_and_on_two_processes(
    make_run: MakeRun,
    reference: Run,
    datasets: LoopbackHub,
    tokenizer: pathlib.Path,
    other: tuple[str, ...],
    tmp_path: pathlib.Path,
    by_text: bool,
) -> None:
    others = other if by_text else ()
    cache = write_cache(tmp_path / "cache", datasets, tokenizer, reference, others)
    flags = (f"--config.teacher.cache={cache}", *SAMPLES, *others)
    whole = make_run("whole", config=DISTILL)(*flags)
    lines = whole.steps()
    assert all(0.2 < line["kd_aligned"] < 1 for line in lines) if by_text else "kd_aligned" not in lines[0]
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
        live = (f"--config.teacher.model={reference.workdir}", "--config.teacher.dtype=float32", *SAMPLES, *others)
        run(*live, code=2)
        said = "has a different tokenizer than the run" if by_text else "the teacher was a cache, is the model itself"
        assert said in run.output
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
