"""What an export specifies for its users: where text stops, how it is sampled, and what begins it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from jaxtrain import hf
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer
from tests.hf.test_hf import GOLDEN, ONE_DEVICE, in_float32

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_end|>"]
WORDS = ["first", "half", "second"]
TEXT = "first half second"


def chat_model(tmp_path: Path, adds_bos: bool, **configs: Any) -> Path:
    """A chat model's files around its weights; the tokenizer adds BOS and EOS, or neither."""
    tokenizer = tokenizers.Tokenizer(
        models.WordLevel({token: i for i, token in enumerate([*SPECIAL, *WORDS])}, "<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    tokenizer.decoder = decoders.Fuse()  # pyright: ignore
    tokenizer.add_special_tokens(SPECIAL)
    if adds_bos:
        template = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", [("<s>", 1), ("</s>", 2)])
        tokenizer.post_processor = processors.Sequence([processors.ByteLevel(), template])  # pyright: ignore
    folder = tmp_path / "chat"
    folder.mkdir(parents=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    files = {
        "tokenizer_config": {"eos_token": "<|im_end|>", "bos_token": "<s>", "tokenizer_class": "LlamaTokenizer"},
        "config": {"model_type": "llama", "eos_token_id": 3, "bos_token_id": 1},
        "generation_config": {"eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6, "top_p": 0.9},
    }
    for name, content in (files | configs).items():
        if content is not None:
            (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def sentencepiece_model(tmp_path: Path) -> Path:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 9),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=28,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return tmp_path / "m.model"


def exported(source: Path, tmp_path: Path, add_bos: bool = False, name: str = "out") -> Path:
    tokenizer = HuggingFaceTokenizer(name=str(source)).build("")
    model = in_float32(GOLDEN / "llama2")
    params = hf.load(str(GOLDEN / "llama2"), model, ONE_DEVICE)
    hf.export(params, model, str(tmp_path / name), tokenizer=tokenizer, add_bos=add_bos)
    return tmp_path / name


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / f"{name}.json").read_text())


GENERATION = {"eos_token_id": [2, 3], "do_sample": True, "temperature": 0.6, "top_p": 0.9}


@pytest.mark.parametrize(
    ("configs", "expected"),
    [
        ({}, GENERATION | {"bos_token_id": 1}),
        # Older models keep these in config.json.
        (
            {"generation_config": None, "config": GENERATION | {"pad_token_id": 0, "hidden_size": 16}},
            GENERATION | {"bos_token_id": 1, "pad_token_id": 0},
        ),
        ({"generation_config": {"eos_token_id": 2}}, {"bos_token_id": 1, "eos_token_id": [3, 2]}),
        ({"generation_config": {"eos_token_id": 3}}, {"bos_token_id": 1, "eos_token_id": 3}),
        ({"generation_config": {"eos_token_id": [99, -1, 3, "2"]}}, {"bos_token_id": 1, "eos_token_id": 3}),
        ({"generation_config": None, "config": None}, {"bos_token_id": 1, "eos_token_id": 3}),
    ],
)
def test_stop_tokens_and_sampling_are_kept(configs, expected, tmp_path):
    out = exported(chat_model(tmp_path, True, **configs), tmp_path)
    assert read(out, "generation_config") == expected
    assert read(out, "config")["eos_token_id"] == expected["eos_token_id"]
    assert read(out, "config")["bos_token_id"] == 1
    # And from a work directory with only the tokenizer saved.
    HuggingFaceTokenizer(name=str(tmp_path / "chat")).build("").save(tmp_path / "kept")
    again = exported(tmp_path / "kept", tmp_path, name="again")
    assert read(again, "generation_config") == expected


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("adds_bos", [False, True])
def test_the_tokenizer_begins_texts_as_training_did(adds_bos, add_bos, tmp_path):
    source = chat_model(tmp_path, adds_bos)
    out = exported(source, tmp_path, add_bos)
    ours, theirs = (tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")) for folder in (source, out))
    ids = HuggingFaceTokenizer(name=str(source)).build("").encode_batch([TEXT])[0].tolist()
    assert theirs.encode(TEXT).ids == [1] * add_bos + ids
    assert theirs.encode(TEXT, TEXT).ids == ([1] * add_bos + ids) * 2
    assert theirs.encode(TEXT, add_special_tokens=False).ids == ours.encode(TEXT, add_special_tokens=False).ids == ids
    config = read(out, "tokenizer_config")
    assert (config["add_bos_token"], config["add_eos_token"]) == (add_bos, False)
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    if not adds_bos and not add_bos:
        assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_dropout_is_not_exported(tmp_path):
    source = chat_model(tmp_path, False)
    spec = read(source, "tokenizer")
    spec["model"] = {"type": "BPE", "dropout": 0.9, "vocab": spec["model"]["vocab"], "merges": []}
    (source / "tokenizer.json").write_text(json.dumps(spec))
    assert read(exported(source, tmp_path), "tokenizer")["model"]["dropout"] is None


@pytest.mark.parametrize("add_bos", [False, True])
def test_sentencepiece(add_bos, tmp_path):
    out = exported(sentencepiece_model(tmp_path), tmp_path, add_bos)
    config = read(out, "tokenizer_config")
    assert (config["add_bos_token"], config["add_eos_token"]) == (add_bos, False)
    before, after = (HuggingFaceTokenizer(name=str(path)).build("") for path in (tmp_path / "m.model", out))
    np.testing.assert_array_equal(before.encode_batch([TEXT])[0], after.encode_batch([TEXT])[0])


def test_a_tokenizer_that_transformers_would_replace_is_reported(tmp_path, caplog):
    model = in_float32(GOLDEN / "qwen2")
    params = hf.load(str(GOLDEN / "qwen2"), model, ONE_DEVICE)
    for kind, told in (("LlamaTokenizer", 1), ("Qwen2Tokenizer", 1)):
        config = {"eos_token": "</s>", "tokenizer_class": kind}
        source = chat_model(tmp_path / kind, False, tokenizer_config=config)
        tokenizer = HuggingFaceTokenizer(name=str(source)).build("")
        hf.export(params, model, str(tmp_path / "out"), tokenizer=tokenizer)
        assert caplog.text.count("AutoTokenizer applies the rules of Qwen2Tokenizer to every qwen2 model") == told
