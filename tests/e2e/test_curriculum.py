"""Ten stages, killed at random and exactly at their boundaries: the result equals the uninterrupted run."""

import pathlib
import random
import re
import shutil
import time
from collections.abc import Iterator

import pytest

from tests.e2e.conftest import Once
from tests.e2e.runs import Run, assert_equal
from tests.tiers import nightly_but

CURRICULUM = "tests/e2e/configs/curriculum.py"
# Saves after each step, so that the test can resume from any step.
EVERY_STEP = ("--config.checkpoint.every_steps=1", "--config.checkpoint.keep=3")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def whole(once: Once) -> Run:
    """From start to end, uninterrupted."""
    return once("curriculum", lambda run: run(), config=CURRICULUM)


@pytest.fixture
def run(whole: Run, tmp_path: pathlib.Path) -> Iterator[Run]:
    run = Run(tmp_path / "run", whole.spec, whole.env)
    yield run
    if run.process is not None:
        run.kill()


def boundaries(run: Run) -> list[int]:
    """The last step of each stage but the last."""
    stages = [line["stage"] for line in run.steps()]
    return [step for step, stage in enumerate(stages[:-1], 1) if stages[step] != stage]


def test_the_whole_run_has_what_it_is_to_show(whole: Run) -> None:
    lines = whole.steps()
    assert [line["step"] for line in lines] == list(range(1, lines[-1]["step"] + 1))
    assert [line["stage"] for line in lines] == sorted(line["stage"] for line in lines)
    assert {line["stage"] for line in lines} == set(range(1, 11))
    assert lines[-1]["tokens"] == sum(source["tokens"] for source in lines[-1]["sources"].values()) == 12_000
    # Some are in the middle of an interval of 3 steps, some at its end.
    assert {step % 3 for step in boundaries(whole)} == {0, 1, 2}
    # Evaluation follows the steps that reach a multiple of 3,000 tokens. The last one ends the run.
    reached = [line["step"] for before, line in zip([{"tokens": 0}, *lines], lines, strict=False)
               if line["tokens"] // 3000 > before["tokens"] // 3000]  # fmt: skip
    assert [line["step"] for line in whole.evaluations()] == reached
    assert f"Step {lines[-1]['step']}: Loss=" in whole.output
    assert "| Stage 10/10 (12,000/12,000 tokens, 100.0%)" in whole.output
    assert "| Stage 1/10 (64/12,000 tokens, 0.5%)" in whole.output
    last = lines[-1]
    assert all(source["unique_tokens"] < source["tokens"] for source in last["sources"].values())  # overlap


@pytest.mark.timeout(3600)
def test_killed_at_random(run: Run, whole: Run) -> None:
    rng = random.Random(11)
    last = whole.last_step()
    for part in range(4):
        run.start()
        if run.wait_for_step(max(round(last * (part + rng.random()) / 4.5), 1)):
            time.sleep(rng.uniform(0, 0.1))
        run.kill()
    run()
    assert_equal(run, whole)


@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "stages", nightly_but([slice(1, None, 3)], [slice(1, None, 3), slice(None)]), ids=["some", "all"]
)
def test_killed_at_boundaries(run: Run, whole: Run, stages: slice) -> None:
    """Kills leave the newest checkpoint at a stage's last step.

    At every third boundary also at the step before, and at the next stage's first step.
    """
    ends = boundaries(whole)[stages]
    wanted = sorted({*ends, *(end + offset for end in ends[::3] for offset in (-1, 1))})
    for step in wanted:
        run.start(*EVERY_STEP)
        assert run.wait_until(lambda: step in run.checkpoints()), run.output  # noqa: B023 - waits here
        run.kill()
        for later in run.checkpoints():
            if later > step:  # as if the kill had come earlier
                shutil.rmtree(run.workdir / "checkpoints" / str(later))
        assert run.checkpoints()[-1] == step
    run(*EVERY_STEP)
    assert f"Resumed from step {wanted[-1]} " in run.output
    assert_equal(run, whole)


def test_a_later_stage_is_edited_and_an_earlier_one_is_not(run: Run, whole: Run) -> None:
    """Edits between two runs: an allowed one is logged, another is refused with the stage's number and both values."""
    at = boundaries(whole)[4]  # stage 5 ends here
    run("--config.steps=" + str(at))
    earlier = ("--config.total_tokens=none", "--config.stages[3].tokens=960")
    run(*earlier, code=2)
    assert "stage 4 (Extended Context): last_step was " in run.output
    assert re.search(r"stages\[3\]\.tokens \(stage 4, Extended Context\) +480 +-> +960", run.output)
    run("--config.stages[4].weights.web=0.7", "--config.stages[4].weights.math=0.22", code=2)
    assert (
        "stage 5 (Reasoning Development): weights was code 0.08, math 0.12, web 0.8, is now code 0.08, math 0.22, web "
        "0.7" in run.output
    )
    run(
        "--config.total_tokens=none",
        "--config.stages[5].tokens=2000",
        "--config.stages[5].overlap=0",
        "--config.steps=none",
    )
    assert re.search(r"Changed since the checkpoint: .*stages\[5\]\.tokens \(stage 6, Complex Patterns\)", run.output)
    lines, before = run.steps(), whole.steps()
    assert lines[-1]["tokens"] == 12_800
    assert [line["fingerprint"] for line in lines[:at]] == [line["fingerprint"] for line in before[:at]]
    assert lines[at]["fingerprint"] != before[at]["fingerprint"]
