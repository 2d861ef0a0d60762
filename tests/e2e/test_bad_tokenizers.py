"""Commands given unusable tokenizers or Hugging Face models: one message, exit code 2."""

import json
import pathlib
from typing import Any

import pytest
import safetensors.numpy

from tests.e2e.conftest import fill
from tests.e2e.test_bad_input import Command, command  # noqa: F401  (a fixture)
from tests.hub import LoopbackHub
from tests.tokenizers.test_special_tokens import END, EOS, bpe, plain, saved, words

CONFIG = """
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer
from tests.e2e.configs import tiny

def get_config(arg):
    config = tiny.get_config("")
    config.tokenizer = HuggingFaceTokenizer(name=arg)
    return config
"""


@pytest.fixture
def spec(tmp_path: pathlib.Path, hub: LoopbackHub) -> str:
    """A config that takes the tokenizer's folder as its argument."""
    fill(hub)
    (tmp_path / "config.py").write_text(CONFIG)
    return f"{tmp_path / 'config.py'}:{tmp_path / 'tokenizer'}"


@pytest.mark.parametrize(
    ("tokenizer", "config", "name", "words"),
    [
        (plain(), {"eos_token_id": -1}, "config.json", ["eos_token_id -1", "set `eos_token`"]),
        (plain(), {"eos_token_id": []}, "config.json", ["ends a document", "set `eos_token`"]),
        (plain(), {"eos_token_id": "0"}, "config.json", ["eos_token_id '0'"]),
        (plain(), {"eos_token": [END]}, "tokenizer_config.json", ["eos_token ['</s>']"]),
        (plain(added_tokens="left out"), {}, "config.json", ["for example one of its tokens"]),
        (json.loads(words(unknown=END).to_str()), EOS, "tokenizer_config.json", ["also stands for unknown text"]),
        (
            plain(model={"type": "WordLevel", "vocab": {"a": 0, END: 1}, "unk_token": "[UNK]"}, added_tokens=[]),
            EOS,
            "tokenizer_config.json",
            ["cannot encode every text"],
        ),
    ],
)
def test_tokenizers(
    command: Command,  # noqa: F811
    spec: str,
    tmp_path: pathlib.Path,
    tokenizer: Any,
    config: Any,
    name: str,
    words: list[str],
) -> None:
    saved(tmp_path / "tokenizer", tokenizer, config, name)
    command(spec=spec).is_error(2, str(tmp_path / "tokenizer"), *words)


def test_damaged_checkpoints_to_start_from(command: Command, spec: str, tmp_path: pathlib.Path) -> None:  # noqa: F811
    saved(tmp_path / "tokenizer", bpe(), EOS)
    model = tmp_path / "model"
    model.mkdir()
    safetensors.numpy.save_file({}, model / "model.safetensors")
    for text, message in (
        ("", "config.json is truncated or not JSON"),
        ("[]", "not a JSON object"),
        ('{"a": 1}', "model_type"),
    ):
        (model / "config.json").write_text(text)
        command(f"--config.init_from={model}", spec=spec).is_error(2, message, str(model))
