"""Each stage's use of each source is the same wherever the run was killed and resumed, on any number of processes."""

import json
import shutil

import pytest
from etils import epath

from jaxtrain.checkpoint import integrity
from tests.e2e.conftest import MakeRun, Once
from tests.e2e.runs import Run, assert_equal
from tests.tiers import nightly_but

KEEP_ALL = ("--config.checkpoint.every_steps=1", "--config.checkpoint.keep=100")
FLAGS = (*KEEP_ALL, "--config.log_every=7")
ENDS = (16, 36, 48)  # last steps of the stages of configs/tiny.py
COUNTS = ("tokens", "unique_tokens", "documents")


def cut_back(run: Run, step: int) -> Run:
    """Keeps only the checkpoints up to a step, as if the run had been killed just after it."""
    for later in run.checkpoints():
        if later > step:
            shutil.rmtree(run.workdir / "checkpoints" / str(later))
    return run


def forget_stage_ends(run: Run) -> None:
    """Turns the newest checkpoint into one of a version without `stage_ends`."""
    folder = run.workdir / "checkpoints" / str(run.checkpoints()[-1])
    path = folder / "data" / "metadata"
    data = json.loads(path.read_text())
    del data["stage_ends"]
    path.write_text(json.dumps(data))
    (folder / "files.json").unlink()
    integrity.write(epath.Path(folder), 1, skip="_CHECKPOINT_METADATA")


@pytest.fixture(scope="module")
def whole(once: Once) -> Run:
    """Uninterrupted, with a checkpoint at every step."""
    return once("ledger", lambda run: run(*FLAGS))


@pytest.mark.slow
def test_what_is_logged_and_saved_of_each_stage(whole: Run) -> None:
    lines = {line["step"]: line for line in whole.steps()}
    assert list(lines) == sorted({1, *range(7, 49, 7), *ENDS})
    ends = [lines[step]["stage_sources"] for step in ENDS]
    assert [sum(source["tokens"] for source in end.values()) for end in ends] == [16 * 256, 20 * 256, 11 * 512 + 100]
    assert ends[0]["code"] == {"tokens": 0, "unique_tokens": 0, "documents": 0, "epochs": 0, "share": 0.0}
    for name, total in lines[48]["sources"].items():
        assert [sum(end[name][key] for end in ends) for key in COUNTS] == [total[key] for key in COUNTS]
    saved = whole.data_state()["stage_ends"]
    assert [(end["stage"], end["name"], end["step"]) for end in saved] == [
        *((1, "short", 16), (2, "mixed", 36), (3, "long", 48))
    ]
    for end in saved:
        logged = lines[end["step"]]["sources"]
        rest = ("share", "cut_documents", "padding")  # not recorded
        assert logged == {
            name: {**totals, **{key: logged[name][key] for key in rest}} for name, totals in end["sources"].items()
        }


RESUMES = [(15, 1), (16, 1), (17, 2), (35, 1), (36, 2), (37, 1)]


@pytest.mark.slow
@pytest.mark.parametrize(("step", "processes"), nightly_but([(16, 1), (36, 2)], RESUMES))
def test_the_same_after_a_resume_at_around_and_between_boundaries(
    make_run: MakeRun, whole: Run, step: int, processes: int
) -> None:
    run = cut_back(make_run(copy=whole, processes=processes), step)
    run(*FLAGS)
    for key in ("step", "fingerprint", "sources", "stage_sources"):
        assert [line[key] for line in run.steps()] == [line[key] for line in whole.steps()]
    assert run.data_state()["stage_ends"] == whole.data_state()["stage_ends"]
    if processes == 1:  # several processes sum in another order
        assert_equal(run, whole)


@pytest.mark.slow
def test_a_checkpoint_of_an_earlier_version(make_run: MakeRun, reference: Run, whole: Run) -> None:
    """The run resumes. The current stage's numbers are unknown, the next stage's are known."""
    for step in (20, 36):
        run = cut_back(make_run(f"old-{step}", copy=whole), step)
        forget_stage_ends(run)
        run(*KEEP_ALL)
        resumed = [line for line in run.steps() if line["step"] > step]
        for mine, theirs in zip(resumed, reference.steps()[step:], strict=True):
            assert mine["sources"] == theirs["sources"]
            assert mine["stage_sources"] == (theirs["stage_sources"] if theirs["stage"] == 3 else None)
        assert [end["step"] for end in run.data_state()["stage_ends"]] == [36, 48]
