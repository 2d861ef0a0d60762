"""tools.import_hf and tools.export_hf: a Hugging Face model in, a checkpoint, the same model out."""

import shutil

import ml_dtypes
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from jaxtrain import cli, hf
from jaxtrain.checkpoint import restore
from tests.hf.test_hf import GOLDEN
from tools import export_hf, import_hf

WORDS = [f"w{i}" for i in range(35)]


def run(tool, *arguments: str) -> int:
    with pytest.raises(SystemExit) as stopped:
        cli.run(tool.main, tool.COMMAND, list(arguments))
    assert isinstance(stopped.value.code, int)
    return stopped.value.code


@pytest.fixture
def folder(tmp_path):
    """The golden qwen3 (40 rows of vocabulary) with a tokenizer of 36 ids."""
    shutil.copytree(GOLDEN / "qwen3", tmp_path / "theirs")
    vocabulary = {word: i for i, word in enumerate([*WORDS, "<eos>"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(tmp_path / "theirs" / "tokenizer.json"))
    (tmp_path / "theirs" / "tokenizer_config.json").write_text('{"eos_token": "<eos>"}')
    return tmp_path / "theirs"


def test_in_and_out(folder, tmp_path, capsys):
    imported, exported = str(tmp_path / "imported"), tmp_path / "exported"
    assert run(import_hf, str(folder), f"--output={imported}") == 0
    assert restore.is_checkpoint(imported)
    printed = capsys.readouterr().out
    assert "qk_norm=True" in printed
    assert f"init_from='{imported}'" in printed
    shutil.rmtree(folder)
    assert run(export_hf, f"--workdir={imported}", f"--output={exported}", "--dtype=float32") == 0
    assert "Wrote step 0" in capsys.readouterr().out
    config, vocab_size = hf.config(str(exported))
    original, _ = hf.config(str(GOLDEN / "qwen3"))
    assert (config, vocab_size) == (original, 36)
    before, after = load_file(GOLDEN / "qwen3" / "model.safetensors"), load_file(exported / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(after[name], before[name][: len(after[name])], err_msg=name)
    assert (exported / "tokenizer.json").exists()
    assert run(export_hf, f"--workdir={imported}", f"--output={exported}") == 0
    halves = load_file(exported / "model.safetensors")
    np.testing.assert_array_equal(
        halves["lm_head.weight"], before["lm_head.weight"][:36].astype(ml_dtypes.bfloat16), err_msg="rounded once"
    )


def test_refusals(folder, tmp_path, capsys):
    imported = tmp_path / "imported"
    assert run(export_hf, f"--workdir={imported}", f"--output={tmp_path / 'out'}") == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert run(import_hf, str(folder), f"--output={imported}") == 0
    assert run(import_hf, str(folder), f"--output={imported}") == 2
    assert "holds a checkpoint already" in capsys.readouterr().err
    assert run(export_hf, f"--workdir={imported}", f"--output={tmp_path / 'out'}", "--step=7") == 2
    assert "no checkpoint of step 7" in capsys.readouterr().err
    assert run(import_hf, str(tmp_path / "nothing"), f"--output={tmp_path / 'new'}") == 2
    assert "is not a folder" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
