"""A run's files and printed output, as people, scripts and checks rely on them."""

import json
import pathlib
import re
import struct

import numpy as np
import pytest
import tensorboardX.proto.event_pb2 as event_pb2

from jaxtrain.tokenizers.sentencepiece import SentencePiece
from tests.e2e.conftest import WIKI, MakeRun
from tests.e2e.runs import Run

NUMBERS = ("loss", "perplexity", "learning_rate", "grad_norm", "tokens_per_sec", "data_wait", "time")
COUNTS = ("step", "tokens", "stage", "seq_len", "batch_size", "skipped", "skipped_in_a_row")
LINE = re.compile(
    r"Step \d+: Loss=\d+\.\d{4}, PPL=\d+\.\d{2}, Tokens/sec=\d+, LR=\d\.\d{2}e-\d{2} "
    r"\| Stage [1-3]/3 \([\d,]+/14,948 tokens, \d+\.\d%\)"
)


def test_metrics(reference: Run) -> None:
    lines = reference.steps()
    for line in lines:
        assert all(type(line[name]) is int for name in COUNTS)
        assert all(type(line[name]) is float for name in NUMBERS)
        assert line["mfu"] is None  # the peak of a simulated device is unknown
        assert line["disk_cache_gb"] is None
        assert re.fullmatch("[0-9a-f]{16}", line["fingerprint"])
        assert 0 <= line["data_wait"] <= 1
        sources = line["sources"]
        assert sources.keys() == {"web", "wiki", "code"}
        for source in sources.values():
            keys = {"tokens", "unique_tokens", "documents", "epoch", "share", "cut_documents", "padding"}
            assert source.keys() == keys
        assert sum(source["tokens"] for source in sources.values()) == line["tokens"]
        np.testing.assert_allclose(sum(source["share"] for source in sources.values()), 1)
        begun = (0, 16 * 256, 36 * 256)[line["stage"] - 1]
        assert sum(part["tokens"] for part in line["stage_sources"].values()) == line["tokens"] - begun
    assert len({line["fingerprint"] for line in lines}) == len(lines)
    times = [line["time"] for line in lines]
    assert times == sorted(times)
    assert lines[-1]["tokens"] == 14_948  # 100 tokens of the last batch's 512
    np.testing.assert_allclose([line["perplexity"] for line in lines], np.exp([line["loss"] for line in lines]))
    for line in reference.evaluations():
        assert line.keys() >= {"step", "eval_loss", "eval_bits_per_byte"}


def test_console_and_files(reference: Run) -> None:
    printed = [line for line in reference.output.splitlines() if ": Loss=" in line]
    assert len(printed) == len(reference.steps())
    assert all(LINE.fullmatch(line) for line in printed), printed
    log = (reference.workdir / "log.txt").read_text()
    assert all(line in log for line in printed)
    assert "Source web: " in log  # messages before the first step are included
    config = json.loads((reference.workdir / "config.json").read_text())
    assert config["stages"][1]["seq_len"] == 32
    assert config["seed"] == 7
    assert {path.name for path in reference.workdir.iterdir()} == {
        *("cache", "checkpoints", "config.json", "lock", "log.txt", "metrics.jsonl", "programs.json", "tensorboard")
    }
    assert len(reference.checkpoints()) == 3
    assert f"Finished. Step {reference.last_step()} is saved in " in log
    losses = scalars(reference.workdir / "tensorboard", "train/loss")
    assert losses.keys() == {line["step"] for line in reference.steps()}
    np.testing.assert_allclose(list(losses.values()), [line["loss"] for line in reference.steps()], rtol=1e-6)


def scalars(folder: pathlib.Path, tag: str) -> dict[int, float]:
    """Step → value, from TensorBoard's files, whose records are length, checksum, event, checksum."""
    found: dict[int, float] = {}
    for path in sorted(folder.iterdir()):
        data = path.read_bytes()
        while data:
            (length,) = struct.unpack("<Q", data[:8])
            # protobuf creates the class at import time, so pyright cannot see it.
            event = event_pb2.Event.FromString(data[12 : 12 + length])  # pyright: ignore[reportAttributeAccessIssue]
            for value in event.summary.value:
                if value.tag == tag:
                    found[event.step] = value.simple_value
            data = data[12 + length + 4 :]
    return found


def test_a_complete_run_says_so(make_run: MakeRun, reference: Run) -> None:
    run = make_run(copy=reference)()
    assert "complete" in run.output
    assert run.steps() == reference.steps()
    assert run.checkpoints() == reference.checkpoints()


@pytest.mark.slow
def test_the_data_ends_the_run(make_run: MakeRun, tokenizer: pathlib.Path) -> None:
    run = make_run(config="tests/e2e/configs/epoch.py")()
    _, lengths = SentencePiece(path=str(tokenizer)).build("").encode_batch([text for text in WIKI if text])
    (last,) = [line for line in run.steps() if line["step"] == run.last_step()]  # logged although 7 does not divide it
    assert last["sources"]["wiki"]["documents"] == len(lengths)
    assert last["sources"]["wiki"]["unique_tokens"] == (lengths + 1).sum()
    assert run.checkpoints()[-1] == last["step"]
    run()
    assert "complete" in run.output


def test_init_from(make_run: MakeRun, reference: Run) -> None:
    """A new run starts from another's parameters. Its first step, at a rate too small to change fp32, keeps them."""
    run = make_run()
    run(f"--config.init_from={reference.workdir}", "--config.steps=1", "--config.optimizer.learning_rate=1e-30")
    (line,) = run.steps()
    assert line["step"] == 1
    assert line["tokens"] == line["sources"]["web"]["tokens"] + line["sources"]["wiki"]["tokens"] == 256
    mine, theirs = run.state(), reference.state()
    params = [name for name in mine if name.startswith("params")]
    assert params
    for name in params:
        np.testing.assert_array_equal(mine[name], theirs[name])
    # The moments are those of one step, not of the other run's many.
    assert any((mine[name] != theirs[name]).any() for name in mine if name.startswith("opt"))


def test_dry_run(make_run: MakeRun, tmp_path: pathlib.Path) -> None:
    run = make_run(HOME=str(tmp_path / "home"))
    del run.env["HF_HOME"]
    run("--dry_run")
    # The Hub's client stores nothing outside the work directory.
    assert not (tmp_path / "home").exists()
    assert (run.workdir / "cache" / "huggingface").exists()
    for wanted in (
        r"2/3 mixed +17 to 36 +32 +8 ",
        r"48 steps, 14,948 tokens; 100 of the last batch's 512 tokens count",
        r"Parameters: 43,168 \(18,592 without embeddings\)",
        r"Stage 3 \(long\): 4 micro-batches of 2 x 64 tokens: 0\.\d+ GB per device \(state and batch ",
        r"web: [\d,]+ tokens, about [\d,]+ documents .* epochs of 480 documents",
        r"Disk: a checkpoint has 0.518 MB",
    ):
        assert re.search(wanted, run.output), f"{wanted} is not in\n{run.output}"
    assert not run.steps()
    assert not run.checkpoints()
