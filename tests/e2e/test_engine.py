"""Runs whose tokenizer has a fast engine: it may change at a resume, and a wrong one ends the run."""

import json
import pathlib

import pytest

from jaxtrain.tokenizers.training import TrainTokenizer
from tests.e2e.runs import Run, assert_equal, documents, environment

CONFIG = """
import os

import fastokens
import numpy as np

from jaxtrain.checkpoint.checkpointer import CheckpointConfig
from jaxtrain.config import Config
from jaxtrain.data import tokenizing
from jaxtrain.data.pipeline import DataConfig
from jaxtrain.data.sources.text_files import TextFiles
from jaxtrain.model.llama import LlamaConfig
from jaxtrain.optim.adamw import AdamW
from jaxtrain.plan import Stage
from jaxtrain.plan.schedules import Constant
from jaxtrain.tokenizers import engine
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer

engine.FastEngine.start.__defaults__ = (range(0x100),)  # a quick check
right = fastokens.Tokenizer


class Planted:
    def __init__(self, made):
        self.made = made

    @classmethod
    def from_json_str(cls, text):
        return cls(right.from_json_str(text))

    def encode_batch_flat(self, texts, **options):
        # Right in the check, which has no such word.
        return self.made.encode_batch_flat([text.replace("plantedword", "x") for text in texts], **options)


if "PLANTED" in os.environ:
    fastokens.Tokenizer = Planted
    tokenizing._SAMPLED_BELOW = np.uint64(2**63)  # every second document


def get_config(arg):
    return Config(
        model=LlamaConfig(hidden_size=8, intermediate_size=8, num_layers=1, num_heads=1, num_kv_heads=1),
        tokenizer=HuggingFaceTokenizer(name=arg + "/tokenizer"),
        data=DataConfig(sources={"lines": TextFiles(patterns=(arg + "/lines.txt",), document="line")}, num_lanes=2),
        stages=(Stage(seq_len=32, batch_size=4),),
        steps=8,
        optimizer=AdamW(learning_rate=1e-3, schedule=Constant()),
        log_every=1,
        checkpoint=CheckpointConfig(every_steps=4),
    )
"""


@pytest.mark.slow
def test_the_engine_may_change_and_a_wrong_one_is_caught(tmp_path: pathlib.Path, compiled: None) -> None:
    texts = documents(3, 2000, words=6)
    (tmp_path / "lines.txt").write_text("\n".join(f"plantedword {text}" for text in texts))
    # Trained without the word, since the check encodes the vocabulary.
    TrainTokenizer(kind="bpe", vocab_size=300).train(texts, tmp_path, progress=False)
    (tmp_path / "config.py").write_text(CONFIG)
    spec = f"{tmp_path / 'config.py'}:{tmp_path}"

    reference = Run(tmp_path / "reference", spec, environment({}))("--config.tokenizer.engine=tokenizers")
    run = Run(tmp_path / "run", spec, environment({}))
    run("--config.tokenizer.engine=tokenizers", "--config.steps=4")
    run("--config.tokenizer.engine=fastokens")
    assert "encoding with fastokens" in run.output
    assert "Changed since the checkpoint:   tokenizer.engine" in run.output
    assert_equal(run, reference)
    assert json.loads((run.workdir / "config.json").read_text())["tokenizer"]["engine"] == "fastokens"

    wrong = Run(tmp_path / "wrong", spec, environment({}, PLANTED="1"))
    wrong("--config.tokenizer.engine=fastokens", code=2)
    assert "Traceback" not in wrong.output
    assert f"source 'lines', file {tmp_path / 'lines.txt'}, row " in wrong.output
    assert "by the engine" in wrong.output
    wrong("--config.tokenizer.engine=tokenizers")
    assert_equal(wrong, reference)
