"""tools.inspect_stream on a trained run: real checkpoints, in a separate process that exits at once."""

import json
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from jaxtrain import cli
from jaxtrain.data import fingerprint
from jaxtrain.tokenizers.sentencepiece import SentencePiece, SentencePieceTokenizer
from tests.e2e.conftest import WIKI
from tests.e2e.runs import ROOT, TINY, Run, documents, environment
from tests.hub import LoopbackHub


@pytest.fixture
def inspect(datasets: LoopbackHub, tokenizer: pathlib.Path, tmp_path: pathlib.Path):
    def inspect(*flags: str) -> dict:
        path = tmp_path / "answer.json"
        command = [
            sys.executable,
            "-m",
            "tools.inspect_stream",
            f"--config={TINY}:{tokenizer}",
            f"--json={path}",
            *flags,
        ]
        env = environment(datasets.env())
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith("Streaming completed successfully!\n")
        return json.loads(path.read_text())

    return inspect


def text_of(source: str, file: str, row: int) -> str:
    """A document, read from the files themselves."""
    if source == "web":
        return documents(int(file.removeprefix("data/train-").removesuffix(".parquet")), 120)[row]
    return {"wiki": WIKI, "code": documents(20, 300)}[source][row]


def row_of(answer: dict, row: dict, tokenizer: SentencePieceTokenizer) -> dict[str, np.ndarray]:
    """Rebuilds a row with masks and targets from the documents listed, each read from its file and tokenized."""
    fields: dict[str, list[int]] = {name: [] for name in ("tokens", "targets", "segment_ids", "loss_mask")}
    for segment, span in enumerate(row["documents"], 1):
        ids, _ = tokenizer.encode_batch([text_of(row["source"], span["file"], span["row"])])
        document = [*ids.tolist(), tokenizer.eos_id]
        here = range(span["first"], span["end"])
        fields["tokens"] += [document[index] for index in here]
        fields["targets"] += [([*document, 0])[index + 1] for index in here]
        fields["loss_mask"] += [index + 1 < len(document) for index in here]
        fields["segment_ids"] += [segment] * len(here)
    counts = np.arange(answer["seq_len"]) < row["counted"]
    found = {name: np.array(values, np.int32) for name, values in fields.items()}
    return found | {"loss_mask": found["loss_mask"].astype(bool) & counts}


@pytest.mark.slow
def test_a_step_of_a_run_is_traced(reference: Run, inspect, tokenizer: pathlib.Path, tmp_path: pathlib.Path):
    """A checkpoint and the beginning give the same answer, and the listed documents give the logged fingerprint."""
    last = reference.checkpoints()[-1]
    answer = inspect(f"--at_step={last}", f"--workdir={reference.workdir}")
    from_beginning = inspect(f"--at_step={last}", f"--workdir={tmp_path / 'none'}")
    assert answer.pop("from_checkpoint") == reference.checkpoints()[-2]
    assert from_beginning.pop("from_checkpoint") is None
    assert answer == from_beginning
    model = SentencePiece(path=str(tokenizer)).build("")
    rows = [row_of(answer, row, model) for row in answer["rows"]]
    batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    first = cli.load(f"{TINY}:{tokenizer}", []).plan().at(last).rows_before
    numbers = fingerprint.row_numbers(fingerprint.split(first), len(rows))
    logged = {line["step"]: line["fingerprint"] for line in reference.steps()}
    before = np.array([int(logged[last - 1][index : index + 8], 16) for index in (0, 8)], np.uint32)
    assert fingerprint.text(before + fingerprint.of_rows(batch, *numbers)) == logged[last]
