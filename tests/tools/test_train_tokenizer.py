"""tools.train_tokenizer: the config's own stream in, a folder that loads out."""

import dataclasses
import json

import pytest

from jaxtrain import cli
from jaxtrain.checkpoint.workdir import Workdir
from jaxtrain.data import pipeline
from jaxtrain.tokenizers import training
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer
from tools import train_tokenizer

WRITTEN = {
    "sentencepiece": {"tokenizer.model", "tokenizer.vocab", "tokenizer_config.json", "training.json"},
    "bpe": {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "training.json"},
}


def run(*arguments: str) -> int:
    given = ["--config=configs/quickstart.py", *arguments]
    return cli.exit_code(train_tokenizer.main, train_tokenizer.COMMAND, given)


@pytest.fixture(autouse=True)
def repository_root(request, monkeypatch):
    monkeypatch.chdir(request.config.rootpath)


@pytest.mark.parametrize("kind", WRITTEN)
def test_trains_on_the_configs_stream(kind, tmp_path, capsys):
    output = tmp_path / "made"
    assert run(f"--kind={kind}", "--vocab_size=700", "--max_samples=20", f"--output={output}") == 0
    assert {path.name for path in output.iterdir()} == WRITTEN[kind]
    out = capsys.readouterr().out
    assert "Collected 20 samples for tokenizer...\n" in out
    assert f"({kind}); --kind=" in out
    assert "writes tokenizer.json, vocab.json and merges.txt." in out or kind == "bpe"
    tokenizer = HuggingFaceTokenizer(name=str(output)).build("")
    assert tokenizer.vocab_size == 700
    # The same from the stream itself, with the config's values for flags that are not set.
    config = cli.load("configs/quickstart.py", [])
    readers = config.data.build(pipeline.resolve(config.data), seed=config.seed)
    documents = list(pipeline.texts(config.data, readers, config.plan(), 20))
    settings = json.loads((output / "training.json").read_text())["settings"]
    expected = training.TrainTokenizer(**settings)
    direct = training.train(expected, documents, tmp_path / "direct", progress=False)
    assert direct.identity == tokenizer.identity


def test_into_the_work_directory_for_the_run(tmp_path, capsys):
    """The folder where the run looks for it, if the config has the same settings."""
    settings = ("--vocab_size=500", "--max_samples=9", "--model_type=bpe", "--special_tokens=<|user|>,<|tool|>")
    assert run(f"--workdir={tmp_path / 'run'}", *settings) == 0
    out = capsys.readouterr().out
    assert f"Tokenizer trained and saved to {tmp_path / 'run' / 'tokenizer'}\n" in out
    assert "Round trip: all 9 sample documents decode to their exact text.\n" in out
    config = cli.load("configs/quickstart.py", [])
    wanted = {"vocab_size": 500, "max_samples": 9, "model_type": "bpe", "special_tokens": ("<|user|>", "<|tool|>")}
    chosen = dataclasses.replace(config.tokenizer, **wanted)
    assert not chosen.needs_training(tmp_path / "run")
    assert chosen.build(tmp_path / "run").vocab_size == 500
    assert run(f"--workdir={tmp_path / 'run'}", *settings) == 2
    assert "already holds a tokenizer" in capsys.readouterr().err
    with Workdir(tmp_path / "busy"):
        assert run(f"--workdir={tmp_path / 'busy'}", *settings) == 2
    assert "is in use by another run" in capsys.readouterr().err
    assert not (tmp_path / "busy" / "tokenizer").exists()


def test_refusals_come_before_any_reading(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pipeline, "resolve", None)
    (tmp_path / "occupied").mkdir()
    (tmp_path / "occupied" / "thesis.txt").touch()
    assert run(f"--output={tmp_path / 'occupied'}") == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert run("--vocab_size=20", f"--output={tmp_path / 'made'}") == 2
    assert "vocab_size=20" in capsys.readouterr().err
    assert run("--kind=wordpiece", f"--output={tmp_path / 'made'}") == 2
    assert not (tmp_path / "made").exists()
