"""Reads the files that version 0.1 wrote and reproduces the runs it trained: the goldens in tests/golden/v0_1.

Data is compared bit for bit: fingerprints, ledgers, tokens, restored arrays. Losses are compared within 1e-5: they are
float32 sums whose order XLA chooses, and another processor, version or program may choose another order.
"""

import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import safetensors.numpy

from tests.e2e.runs import Run
from tests.golden.v0_1 import place
from tests.golden.v0_1.place import HERE, STORE, WHOLE_RUNS, Place
from tests.hub import LoopbackHub

MIXED, DISTILLED = str(HERE / "mixed.py"), str(HERE / "distilled.py")
LOSS = 1e-5


def check(run: Run, name: str, after: int = 0) -> None:
    """Compares the steps of a run after a given one with the uninterrupted run of version 0.1."""
    expected = place.load(name)
    _check_lines(run.steps()[after:], expected["steps"][after:])
    evaluations = [line for line in expected["evaluations"] if line["step"] > after]
    now = [line for line in run.evaluations() if line["step"] > after]
    assert [line["step"] for line in now] == [line["step"] for line in evaluations]
    assert [line["eval_loss"] for line in now] == pytest.approx([line["eval_loss"] for line in evaluations], rel=LOSS)


def _check_lines(lines: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]) -> None:
    assert len(lines) == len(expected)
    for line, golden in zip(lines, expected, strict=True):
        exact = {key: line[key] for key in place.EXACT} | {"sources": place.ledger_of(line, golden)}
        assert exact == {key: golden[key] for key in place.EXACT}
        numbers = {key: golden[key] for key in place.NUMBERS if key in golden}
        assert {key: line[key] for key in numbers} == pytest.approx(numbers, rel=LOSS), line["step"]


def check_resumed(at: Place, spec: str, name: str, *flags: str) -> str:
    """Resumes a work directory of version 0.1 and runs it to its end."""
    run = at.read(name)
    (step,) = run.checkpoints()
    expected = place.load(f"{name}_arrays")["checkpoint"]
    assert place.hashes(run.state(step)) == expected
    output = at.train(spec, name, *flags)
    assert f"Resumed from step {step} " in output
    assert len(place.load(name)["steps"]) > step + 5
    check(run, name, after=step)
    return output


def test_a_run_is_resumed(tmp_path: pathlib.Path) -> None:
    """Four kinds of sources, all transforms, two stages, AdamW, held-out evaluation, a tokenizer trained by the run."""
    with LoopbackHub() as hub:
        check_resumed(Place(tmp_path / "place", hub, "mixed"), MIXED, "mixed")


@pytest.mark.slow
def test_a_run_is_resumed_from_a_teachers_cache(tmp_path: pathlib.Path) -> None:
    """Muon, with the cached outputs of the run of the test above as the teacher."""
    with LoopbackHub() as hub:
        at = Place(tmp_path / "place", hub, "distilled", "teacher", "mixed")
        output = check_resumed(at, DISTILLED, "distilled")
        assert "Distilling from the 8 most likely tokens by mixed" in output


@pytest.mark.slow
def test_a_token_store_is_the_stream(tmp_path: pathlib.Path) -> None:
    with LoopbackHub() as hub:
        at = Place(tmp_path / "place", hub, "mixed", "tokens")
        shutil.copytree(at.folder / "mixed" / "tokenizer", at.folder / "new" / "tokenizer")
        at.train(MIXED, "new", *STORE)
        check(at.read("new"), "mixed")
        assert not hub.count("/datasets/golden/web/resolve/")


@pytest.mark.slow
def test_parameters_are_exported(tmp_path: pathlib.Path) -> None:
    """Restored from the config recorded in the checkpoint, without a config file."""
    with LoopbackHub() as hub:
        at = Place(tmp_path / "place", hub, "mixed", "distilled")
    for name in ("mixed", "distilled"):
        at.command("tools.export_hf", f"--workdir={name}", f"--output={name}-hf", "--dtype=float32")
        found = place.hashes(safetensors.numpy.load_file(at.folder / f"{name}-hf" / "model.safetensors"))
        assert found == place.load(f"{name}_arrays")["exported"]


@pytest.mark.slow
def test_a_checkpoint_is_evaluated(tmp_path: pathlib.Path) -> None:
    """With the config recorded in the checkpoint: sources, transforms, tokenizer, stages."""
    expected = place.load("evaluated")["loss"]["all"]
    with LoopbackHub() as hub:
        at = Place(tmp_path / "place", hub, "mixed")
        at.command("tools.evaluate", "--workdir=mixed", "--json=evaluated.json")
    found = json.loads((at.folder / "evaluated.json").read_text())["loss"]["all"]
    assert found["eval_tokens"] == expected["eval_tokens"]
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"], rel=LOSS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in WHOLE_RUNS if name != "teacher"])
def test_whole_runs(name: str, datasets: LoopbackHub, tmp_path: pathlib.Path) -> None:
    """The configs of tests/e2e, and a few steps of the shipped smoke configs."""
    at = Place(tmp_path / "place", datasets, "mixed")
    for one in ("teacher", "student") if name == "student" else (name,):
        check(at.whole(one), one)
