"""tools.pretokenize: a config in, token stores out, which training would read."""

import pathlib
import re

import pytest

from jaxtrain import cli
from jaxtrain.data import modes, pipeline
from jaxtrain.data.stores.token_store import TokenManifest
from tests.hub import LoopbackHub, jsonl_bytes
from tools.pretokenize import __main__ as pretokenize

CONFIG = """
from jaxtrain.config import Config
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.data.sources.text_files import TextFiles
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.plan import Stage
from jaxtrain.tokenizers.training import TrainTokenizer

def get_config(arg=''):
    return Config(
        model=LlamaConfig(hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, max_seq_len=8),
        tokenizer=TrainTokenizer(kind="bpe", vocab_size=300, max_samples=20),
        data=DataConfig(
            sources={{
                "lines": TextFiles(patterns=({lines!r},), document="line"),
                "web": HuggingFace(name="org/web"),
            }},
            num_lanes=2,
        ),
        stages=(Stage(seq_len=8, batch_size=2, weights={{"lines": 0.5, "web": 0.5}}),),
        steps=3,
    )
"""
TEXTS = [f"line {number} of {number * 7}" if number % 5 else "" for number in range(1200)]


@pytest.fixture
def config(hub: LoopbackHub, tmp_path: pathlib.Path) -> pathlib.Path:
    hub.commit("org/web", {f"{n}.jsonl": jsonl_bytes(TEXTS[n * 600 : (n + 1) * 600]) for n in (0, 1)})
    (tmp_path / "lines.txt").write_text("".join(f"{text}\n" for text in TEXTS))
    path = tmp_path / "small.py"
    path.write_text(CONFIG.format(lines=str(tmp_path / "lines.txt")))
    return path


def run(config: pathlib.Path, *arguments: str) -> int:
    workdir = f"--workdir={config.parent / 'run'}"
    with pytest.raises(SystemExit) as stopped:
        cli.run(pretokenize.main, pretokenize.COMMAND, [f"--config={config}", workdir, *arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_writes_what_training_reads(config, tmp_path, capsys):
    """The tokenizer is trained where the run would train it; --verify finds a changed byte."""
    assert run(config, "--all", "--worker=0/2") == 0
    assert "Source web: this worker is done with its files; other workers are not." in capsys.readouterr().out
    assert run(config, "--all", "--worker=1/2") == 0
    assert "Source web: 1,200 documents" in capsys.readouterr().out
    assert run(config, "--verify") == 0
    loaded = cli.load(str(config), ["--config.data.mode=pretokenized"])
    tokenizer = loaded.tokenizer.build(tmp_path / "run")
    opened = modes.open_sources(loaded.data, tokenizer, str(tmp_path / "run" / "tokens"))
    streams = pipeline.resolve(loaded.data)
    for name, one in opened.items():
        texts = [text for file in range(len(one.source.files)) for text in texts_of(one.source, file, tokenizer)]
        assert texts == TEXTS
        assert one.source.identity == streams[name].identity
    shard = next((tmp_path / "run" / "tokens" / "web").glob("*.array_record-*"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    assert run(config, "--verify") == 2
    assert "does not match its checksum" in capsys.readouterr().err


def texts_of(source, file, tokenizer) -> list[str]:
    found = []
    for block in source.open(file, 0):
        packed = block["text"]
        for start, length in zip(packed.starts, packed.lengths, strict=False):
            found.append(tokenizer.decode(packed.ids[start : start + length]))
    return found


def test_goes_on_with_the_commit_that_was_begun(config, hub: LoopbackHub, tmp_path):
    assert run(config, "--all", "--worker=0/2") == 0
    hub.commit("org/web", {f"{n}.jsonl": jsonl_bytes(["other texts"] * 9) for n in (0, 1, 2)})
    assert run(config, "--all", "--worker=1/2") == 0
    files = TokenManifest.load(str(tmp_path / "run" / "tokens" / "web")).files
    assert [file.rows for file in files] == [600, 600]


def test_max_samples_bounds_it(config, tmp_path, capsys):
    # Which file holds the last document of JSON lines is known only by reading: the first worker writes everything.
    flag = "--config.data.sources.web.max_samples=700"
    for worker in (1, 0):
        assert run(config, flag, f"--worker={worker}/2", f"--output={tmp_path / 'out'}") == 0
    said = capsys.readouterr().out
    assert (
        "Source web: worker 0 works alone: which files hold the first 700 documents is known only after reading them"
        in said
    )
    assert "Source web: 700 documents" in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], r"max_samples MUST be specified for streaming datasets! Nothing bounds source 'web' \(org/web\)"),
        (["--all", "--worker=2/2"], "--worker=2/2: give I/N with I from 0 to N - 1"),
        (["--all", "--worker=1"], "give I/N"),
        (["--all", "--output=gs://bucket/tokens"], "give a local path"),
        (["--all", "--output="], "--output= is empty"),
        (["--verify"], "there is no token store"),
    ],
)
def test_refusals(config, tmp_path, capsys, arguments, said):
    assert run(config, *arguments) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "run" / "tokens").exists()
