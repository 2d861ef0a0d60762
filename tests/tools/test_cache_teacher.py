"""tools.cache_teacher: what it refuses, and a cache of two sources that training would read."""

import pathlib
import re
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from jaxtrain import cli
from jaxtrain.checkpoint.checkpointer import CheckpointConfig
from jaxtrain.cost import memory
from jaxtrain.data.stores.teacher_store import TeacherManifest
from jaxtrain.distill.scorer import Scorer
from jaxtrain.distributed import sharding
from jaxtrain.losses.cached import Layout
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.tokenizers.training import TrainTokenizer
from tests.hub import LoopbackHub, jsonl_bytes
from tools.cache_teacher import __main__ as cache_teacher
from tools.cache_teacher import write

CONFIG = """
from jaxtrain.config import Config
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.data.sources.text_files import TextFiles
from jaxtrain.losses.distillation import Distillation
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.plan import Stage
from jaxtrain.distill.teacher import Teacher
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer

def get_config(arg=''):
    return Config(
        model=LlamaConfig(hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1, max_seq_len=8),
        tokenizer=HuggingFaceTokenizer(name={teacher!r}),
        teacher=Teacher(model={teacher!r}, dtype="float32") if arg != "alone" else None,
        distillation=Distillation(temperature=2.0),
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
TEXTS = [f"line {number} of {number * 7}" if number % 5 else "" for number in range(600)]
MODEL = LlamaConfig(
    hidden_size=16, intermediate_size=16, num_layers=1, num_heads=2, num_kv_heads=2, max_seq_len=32, tie_embeddings=True
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A work directory with a tokenizer and a checkpoint."""
    folder = tmp_path_factory.mktemp("teacher")
    tokenizer = TrainTokenizer(kind="bpe", vocab_size=300).train(TEXTS, folder, progress=False)
    tokenizer.save(folder)
    params = MODEL.build(tokenizer.vocab_size, None).init(jax.random.key(0))
    checkpointer = CheckpointConfig().build(folder / "checkpoints")
    data = {"config": {"model": cli.to_json(MODEL)}, "tokenizer": tokenizer.identity}
    checkpointer.save(7, {"params": params}, data)
    checkpointer.close()
    return folder


@pytest.fixture
def config(hub: LoopbackHub, teacher: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
    hub.commit("org/web", {f"{n}.jsonl": jsonl_bytes(TEXTS[n * 300 : (n + 1) * 300]) for n in (0, 1)})
    (tmp_path / "lines.txt").write_text("".join(f"{text}\n" for text in TEXTS[:100]))
    path = tmp_path / "small.py"
    path.write_text(CONFIG.format(lines=str(tmp_path / "lines.txt"), teacher=str(teacher)))
    return path


def run(config: pathlib.Path, *arguments: str, arg: str = "") -> int:
    workdir = f"--workdir={config.parent / 'run'}"
    with pytest.raises(SystemExit) as stopped:
        cli.run(cache_teacher.main, cache_teacher.COMMAND, [f"--config={config}:{arg}", workdir, *arguments])
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


def test_writes_a_cache_of_all_sources(config: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    flags = ("--max_samples=350", "--k=5", "--batch_tokens=64", "--temperatures=2,1")
    assert run(config, *flags, "--worker=1/2") == 0
    out = capsys.readouterr().out
    assert re.search(
        r"Source web: 350 documents of about \d+ tokens \(estimated from the first 256\), 28 bytes each: about", out
    )
    assert "Source web: this worker is done with its documents; other workers are not." in out
    assert run(config, *flags, "--worker=0/2") == 0
    out = capsys.readouterr().out
    folder = tmp_path / "run" / "teacher"
    assert re.search(r"Source web: 350 documents, [\d,]+ tokens, .* the 5 most likely tokens by .* for .* 2, 1\.", out)
    assert f"--config.teacher.cache={folder} --config.distillation.divergence.k=5" in out
    made = TeacherManifest.load(str(folder / "web"))
    assert (made.context, made.stride, made.max_samples, made.layout.k) == (8, 4, 350, 5)
    assert made.teacher["dtype"] == "float32"
    assert [part.rows for part in made.parts[0]] == [256, 44]
    assert run(config, "--verify") == 0
    assert "All bytes match their checksums" in capsys.readouterr().out
    assert run(config, "--max_samples=350", "--k=6", "--batch_tokens=64", "--temperatures=2,1") == 2
    assert "layout: the cache has {'vocab_size': 300, 'k': 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "arg", "message"),
    [
        ([], "", "--max_samples is needed: nothing bounds source 'web'"),
        (["--k=0"], "", "--k=0: give 1 or more"),
        (["--k=301", "--max_samples=9"], "", "--k=301: the vocabulary has 300 tokens"),
        (["--temperatures=1,x"], "", "--temperatures=1,x: give distinct numbers"),
        (["--worker=2/2"], "", "--worker=2/2: give I/N"),
        (["--output=s3://a/b"], "", "a cache is written to a local path"),
        (["--max_samples=9", "--context=33"], "", "--context=33: the teacher sees 32 tokens at most"),
        (["--max_samples=9", "--stride=9"], "", "--stride=9: windows of 8 tokens would skip some"),
        (
            ["--max_samples=9", "--config.memory_gb=0.000001"],
            "",
            "the teacher does not fit: with one row of 8 tokens at a time a device needs",
        ),
        (["--max_samples=9"], "alone", "has no teacher: set --config.teacher.model"),
    ],
)
def test_refusals(config: pathlib.Path, capsys: Any, arguments: list[str], arg: str, message: str) -> None:
    assert run(config, *arguments, arg=arg) == 2
    assert message in capsys.readouterr().err


def test_less_memory_takes_fewer_rows_at_once() -> None:
    model = MODEL.build(300, sharding.MeshConfig(fsdp=2).build(jax.devices()[:2]))
    params = model.init(jax.random.key(0))
    layout = Layout(300, 5, (1.0,))

    def scorer(limit: int | None) -> Scorer:
        return write.make_scorer(model, params, layout, 8, 4, batch_tokens=64, limit=limit)

    whole = scorer(None)
    needed = memory.needed(whole._run)
    assert needed is not None
    assert (whole._rows, scorer(needed)._rows, scorer(needed - 1)._rows) == (16, 16, 8)


def test_too_little_room_is_refused_before_anything_is_computed(
    config: pathlib.Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.cache_teacher.write.shutil.disk_usage", lambda path: SimpleNamespace(free=10_000))
    assert run(config, "--max_samples=350") == 2
    assert "less than 1.5 times as much. Use another disk" in capsys.readouterr().err


def test_the_launcher_says_which_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cli.parse_worker(None) == (0, 1)
    assert cli.parse_worker("3/4") == (3, 4)
    monkeypatch.setenv("JAX_PROCESS_ID", "2")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "8")
    assert cli.parse_worker(None) == (2, 8)
    assert cli.parse_worker("0/1") == (0, 1)
