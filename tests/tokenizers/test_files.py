"""Where tokenizers come from, and which of their tokens end and begin a document."""

import json

import pytest
import tokenizers
from tokenizers import models

from jaxtrain.errors import UserError
from jaxtrain.tokenizers import files
from jaxtrain.tokenizers.hf import HFTokenizer, HuggingFaceTokenizer
from jaxtrain.tokenizers.identity import mismatch
from jaxtrain.tokenizers.sentencepiece import SentencePieceTokenizer
from tests.hub import TOKEN, LoopbackHub

VOCABULARY = {"<|zero|>": 0, "b": 1, "</s>": 2, "<s>": 3, "<|im_end|>": 4, "a": 5}


@pytest.fixture
def tokenizer_json() -> bytes:
    tokenizer = tokenizers.Tokenizer(models.BPE(VOCABULARY, []))
    tokenizer.add_special_tokens(["</s>", "<s>", "<|im_end|>", "<|zero|>"])
    return tokenizer.to_str().encode()


CONFIGS = [
    # (the files, eos, bos)
    ({"tokenizer_config.json": {"eos_token": "</s>", "bos_token": "<s>"}}, 2, 3),
    ({"tokenizer_config.json": {"eos_token": {"content": "<|im_end|>"}, "bos_token": {"content": "<s>"}}}, 4, 3),
    ({"special_tokens_map.json": {"eos_token": "</s>"}}, 2, None),
    ({"special_tokens_map.json": {"eos_token": {"content": "</s>", "lstrip": False}}}, 2, None),
    ({"config.json": {"eos_token_id": 2, "bos_token_id": 3}}, 2, 3),
    ({"config.json": {"eos_token_id": None}, "generation_config.json": {"eos_token_id": [4, 2]}}, 4, None),
    # The tokenizer's own setting comes first, and its null for bos means none, as with Qwen 2.
    (
        {
            "tokenizer_config.json": {"eos_token": "<|im_end|>", "bos_token": None},
            "config.json": {"eos_token_id": 2, "bos_token_id": 3},
        },
        4,
        None,
    ),
    ({"tokenizer_config.json": {"eos_token": None}, "config.json": {"eos_token_id": 2}}, 2, None),
    ({"tokenizer_config.json": {}, "special_tokens_map.json": {}, "config.json": {"eos_token_id": 0}}, 0, None),
]


@pytest.mark.parametrize(("configs", "eos", "bos"), CONFIGS)
def test_special_tokens(configs, eos, bos, tokenizer_json, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json)
    for name, config in configs.items():
        (tmp_path / name).write_text(json.dumps(config))
    for name in (tmp_path, tmp_path / "tokenizer.json"):
        tokenizer = HuggingFaceTokenizer(name=str(name)).build("")
        assert (tokenizer.eos_id, tokenizer.bos_id) == (eos, bos)
        assert (tokenizer.identity["eos_id"], tokenizer.identity["bos_id"]) == (eos, bos)
        assert tokenizer.token_bytes.tolist() == [0, 1, 0, 0, 0, 1]
    # What was found in the model's configs is kept if only the tokenizer is saved.
    tokenizer.save(tmp_path / "saved")
    assert not (tmp_path / "saved" / "config.json").exists()
    again = HuggingFaceTokenizer(name=str(tmp_path / "saved")).build("")
    assert mismatch(tokenizer.identity, again.identity) is None
    chosen = HuggingFaceTokenizer(name=str(tmp_path), eos_token="<s>", bos_token="<|zero|>").build("")
    assert (chosen.eos_id, chosen.bos_id) == (3, 0)
    assert mismatch(tokenizer.identity, chosen.identity) is not None


@pytest.mark.parametrize(
    ("configs", "eos_token", "message"),
    [
        ({}, None, r"names the token that ends a document; set `eos_token`, for example '<.zero.>' or '</s>' or '<s>'"),
        ({"config.json": {"vocab_size": 5}}, None, "set `eos_token`"),
        ({"config.json": {"eos_token_id": 6}}, None, "eos_token_id 6 is not among the 6 ids; set `eos_token`"),
        ({}, "<eos>", "eos_token='<eos>' is not in its vocabulary"),
        (
            {"tokenizer_config.json": {"eos_token": "<eos>"}},
            None,
            "tokenizer_config.json's eos_token '<eos>' is not in",
        ),
    ],
)
def test_no_end_of_document(configs, eos_token, message, tokenizer_json, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer_json)
    for name, config in configs.items():
        (tmp_path / name).write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        HuggingFaceTokenizer(name=str(tmp_path), eos_token=eos_token).build("")


def test_names_that_lead_nowhere(tmp_path):
    with pytest.raises(UserError, match=r"name='\./absent': no such folder or file"):
        HuggingFaceTokenizer(name="./absent").build("")
    with pytest.raises(UserError, match=r"neither tokenizer.json nor tokenizer.model"):
        HuggingFaceTokenizer(name=str(tmp_path)).build("")
    with pytest.raises(UserError, match="neither a local folder or file nor a Hub id"):
        HuggingFaceTokenizer(name="not an//id").build("")
    with pytest.raises(ValueError, match="name=''"):
        HuggingFaceTokenizer(name="").check()
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config.json is not JSON"):
        files.read(files.epath.Path(tmp_path)).json("tokenizer_config.json")


def test_hub(hub: LoopbackHub, tokenizer_json):
    config = json.dumps({"eos_token": "</s>"}).encode()
    content = {"tokenizer.json": tokenizer_json, "tokenizer_config.json": config, "model.safetensors": b"weights"}
    first = hub.commit("org/model", content, repo_type="model")
    tokenizer = HuggingFaceTokenizer(name="org/model").build("")
    assert isinstance(tokenizer, HFTokenizer)
    assert tokenizer.identity["revision"] == first
    assert tokenizer.decode(tokenizer.encode_batch(["ab"])[0]) == "a b"
    assert hub.count("safetensors", "GET") == 0
    # The branch moves. Another file next to the tokenizer changes nothing; another end-of-document token does.
    second = hub.commit("org/model", {**content, "README.md": b"."}, repo_type="model")
    moved = HuggingFaceTokenizer(name="org/model").build("")
    assert moved.identity["revision"] == second
    assert mismatch(tokenizer.identity, moved.identity) is None
    hub.commit("org/model", {**content, "tokenizer_config.json": config.replace(b"</s>", b"<s>")}, repo_type="model")
    changed = HuggingFaceTokenizer(name="org/model").build("")
    text = mismatch(tokenizer.identity, changed.identity)
    assert text is not None
    assert "eos_id: was 2, is 3" in text
    assert f"(revision: was {first}" in text
    pinned = HuggingFaceTokenizer(name="org/model", revision=first).build("")
    assert pinned.identity == tokenizer.identity


def test_hub_sentencepiece(hub: LoopbackHub, workdirs):
    folder = workdirs["unigram"] / "tokenizer"
    content = {name: (folder / name).read_bytes() for name in ("tokenizer.model", "tokenizer_config.json")}
    hub.commit("org/pieces", content, repo_type="model")
    tokenizer = HuggingFaceTokenizer(name="org/pieces").build("")
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.eos_id == 2


def test_hub_refusals(hub: LoopbackHub, tokenizer_json, monkeypatch):
    hub.commit("org/there", {"tokenizer.json": tokenizer_json}, repo_type="model")
    with pytest.raises(UserError, match="neither a local folder or file nor a Hub repository"):
        HuggingFaceTokenizer(name="org/absent").build("")
    with pytest.raises(UserError, match="no revision='v9'"):
        HuggingFaceTokenizer(name="org/there", revision="v9").build("")
    hub.access("org/there", "gated", repo_type="model")
    with pytest.raises(UserError, match="is gated: accept its terms"):
        HuggingFaceTokenizer(name="org/there", eos_token="</s>").build("")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert HuggingFaceTokenizer(name="org/there", eos_token="</s>").build("").eos_id == 2
