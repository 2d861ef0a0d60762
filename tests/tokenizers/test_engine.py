"""The fast engine gives the ids of `tokenizers`, or does not serve."""

import json
import logging
import pathlib
import sys
import threading
from collections.abc import Callable
from typing import Any

import fastokens
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from jaxtrain.data import tokenizing
from jaxtrain.errors import UserError
from jaxtrain.plan.stable_hash import document_hash
from jaxtrain.tokenizers import engine
from jaxtrain.tokenizers.hf import HFTokenizer, HuggingFaceTokenizer
from jaxtrain.tokenizers.training import TrainTokenizer
from tests.tokenizers.test_special_tokens import END, FORGED, JSON_KINDS, saved

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
EOS = "<|endoftext|>"
STYLES = ("GPT-2", "Llama 3", "Qwen 2", "SmolLM2", "of this package", "Mistral")
# Enough to tell the kinds of characters apart, in the default tier.
FEW = range(0, 0x2100, 3)


def byte_level(use_regex: bool) -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)


def split(regex: str) -> Any:
    return pre_tokenizers.Sequence(
        [pre_tokenizers.Split(tokenizers.Regex(regex), "isolated"), byte_level(use_regex=False)]
    )


@pytest.fixture(scope="session")
def styles(documents, json_folder, workdirs, tmp_path_factory) -> dict[str, str]:
    """A folder with a small tokenizer in the style of each family."""
    made = {"Mistral": str(json_folder), "of this package": str(workdirs["bpe"] / "tokenizer")}
    text = [*documents, "日本語テキスト、中国。 한국어 Привет Καλημέρα नमस्ते cafe\u0301 ² ½ \U0001f600 " * 20]
    for style, pre_tokenizer in {
        "GPT-2": byte_level(use_regex=True),
        "Llama 3": split(LLAMA_3),
        "Qwen 2": split(LLAMA_3.replace("{1,3}", "")),
        "SmolLM2": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level(use_regex=True)]),
    }.items():
        tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=style == "Llama 3"))
        if style == "Qwen 2":
            tokenizer.normalizer = normalizers.NFC()  # pyright: ignore
        tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()  # pyright: ignore
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        trainer = trainers.BpeTrainer(
            vocab_size=700, special_tokens=[EOS, "<|user|>"], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(text, trainer)
        tokenizer.add_tokens(["<think>"])  # not special: it is found in texts
        made[style] = saved(tmp_path_factory.mktemp("style"), tokenizer, {"eos_token": EOS})
    return made


def loaded(folder: str, **options: Any) -> HFTokenizer:
    tokenizer = HuggingFaceTokenizer(name=folder, **options).build("")
    assert isinstance(tokenizer, HFTokenizer)
    return tokenizer


def checked(folder: str, points: Any = FEW, workdir: Any = "") -> HFTokenizer:
    """A tokenizer after the check of few code points."""
    tokenizer = HuggingFaceTokenizer(name=folder).build(str(workdir))
    assert isinstance(tokenizer, HFTokenizer)
    fast = tokenizer._fast
    assert fast is not None
    fast.start(points)
    return tokenizer


def assert_same(tokenizer: HFTokenizer, texts: list[str]) -> None:
    assert tokenizer.reference is not None
    for found, expected in zip(tokenizer.encode_batch(texts), tokenizer.reference(texts), strict=True):
        assert found.dtype == expected.dtype
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("style", STYLES)
def test_same_ids(style, styles, documents, json_folder):
    tokenizer = checked(styles[style])
    plain = loaded(styles[style], engine="tokenizers")
    assert plain.reference is None
    assert tokenizer.identity == plain.identity
    special = [f"{a}{token}{b}" for token in (EOS, "<|user|>", "<think>", "<s>", "</s>") for a in " x" for b in " x"]
    assert_same(tokenizer, [*documents, *engine.HARD_TEXTS, *special, "", "\ud83d lone, \ud83d\ude00 pair"])
    assert tokenizer.eos_id not in tokenizer.encode_batch(special)[0]
    assert_same(tokenizer, [])


@pytest.mark.nightly
@pytest.mark.parametrize("style", STYLES)
def test_all_code_points(style, styles):
    assert_same(
        loaded(styles[style], engine="fastokens"), ["".join(f"é{chr(c)}" for c in engine._valid(range(0x110000)))]
    )


@pytest.mark.parametrize(
    "kind", [kind for kind, tokenizer in JSON_KINDS.items() if isinstance(tokenizer.model, models.BPE)]
)
def test_no_document_forges_its_end(kind, tmp_path):
    tokenizer = checked(saved(tmp_path, JSON_KINDS[kind], {"eos_token": END}), points=range(0x100))
    assert_same(tokenizer, FORGED)
    assert tokenizer.eos_id not in tokenizer.encode_batch(FORGED)[0]


def test_smollm2_in_one_regex(styles, monkeypatch):
    r"""The digits are those of `tokenizers`' Digits, the spaces Unicode's: fastokens' \p{N} and \s are others."""
    spec = json.loads((pathlib.Path(styles["SmolLM2"]) / "tokenizer.json").read_text())
    first, second = engine.candidates(spec["pre_tokenizer"])
    assert second == spec["pre_tokenizer"]
    assert first is not None
    regex = first["pretokenizers"][0]["pattern"]["Regex"]
    assert r"\x{30}-\x{39}" in regex
    assert r"\p{N}" not in regex
    points = [0x0C66, 0x180E, 0x2009, 0x2160, 0x3007, 0x11DE0, 0x11DE9, 0x16FF4]
    texts = [f"a{chr(c)}1234 {chr(c)}{chr(c)}the\n{chr(c)}  {chr(c)}'s 1  2" for c in points]
    monkeypatch.setattr(engine, "check_texts", lambda tokens, points: [texts])
    monkeypatch.setattr(engine, "candidates", lambda pre_tokenizer: [first])
    assert_same(checked(styles["SmolLM2"]), texts)


def test_spaces_spelled_out():
    assert (
        engine._with_spaces(r"a\\s[^\s\]x]+\s\S") == rf"a\\s[^{engine._SPACE}\]x]+[{engine._SPACE}][^{engine._SPACE}]"
    )


@pytest.fixture
def brief(monkeypatch) -> list[int]:
    """Makes the check short. The list grows by one with each."""
    checks: list[int] = []

    def check_texts(tokens: Any, points: Any) -> list[list[str]]:
        checks.append(1)
        return [list(engine.HARD_TEXTS)]

    monkeypatch.setattr(engine, "check_texts", check_texts)
    return checks


class Wrong:
    """fastokens with one character taken for another."""

    def __init__(self, made: Any, wrong: str):
        self._made, self._wrong = made, wrong

    def encode_batch_flat(self, texts: list[str], **options: Any) -> Any:
        return self._made.encode_batch_flat([text.replace(self._wrong, "x") for text in texts], **options)


@pytest.fixture
def plant(monkeypatch) -> Callable[[str], None]:
    """Makes fastokens encode a text wrong."""
    right = fastokens.Tokenizer

    def plant(wrong: str) -> None:
        class Planted:
            @staticmethod
            def from_json_str(text: str) -> Wrong:
                return Wrong(right.from_json_str(text), wrong)

        monkeypatch.setattr(fastokens, "Tokenizer", Planted)

    return plant


@pytest.mark.parametrize("wrong", ["ű", "<|user|>", "\U0001f3fd", "\t\t"])
def test_the_check_finds_a_wrong_engine(wrong, plant, styles, monkeypatch, caplog):
    plant(wrong)
    caplog.set_level(logging.INFO, "jaxtrain")
    tokenizer = checked(styles["GPT-2"])
    assert tokenizer.reference is None
    assert "encoding with tokenizers, since fastokens" in caplog.text
    assert "gives other ids for" in caplog.text
    assert (
        tokenizer.encode_batch([wrong])[0].tolist()
        == loaded(styles["GPT-2"], engine="tokenizers").encode_batch([wrong])[0].tolist()
    )
    monkeypatch.setattr(engine, "check_texts", lambda tokens, points: [[f"a{wrong}b"]])
    with pytest.raises(
        UserError, match=r"engine='fastokens', but fastokens .* gives other ids .* set `engine` to 'auto'"
    ):
        loaded(styles["GPT-2"], engine="fastokens")


def test_what_fastokens_lacks(tmp_path, styles, monkeypatch, caplog):
    caplog.set_level(logging.INFO, "jaxtrain")
    assert checked(saved(tmp_path, JSON_KINDS["Unigram"], {"eos_token": END})).reference is None
    assert "cannot read this tokenizer" in caplog.text
    monkeypatch.setitem(sys.modules, "fastokens", None)
    assert checked(styles["GPT-2"]).reference is None
    assert "fastokens cannot be imported" in caplog.text
    with pytest.raises(UserError, match="cannot be imported"):
        loaded(styles["GPT-2"], engine="fastokens")
    with pytest.raises(ValueError, match="give one of auto, fastokens, tokenizers"):
        HuggingFaceTokenizer(name="x", engine="fast").check()
    with pytest.raises(ValueError, match="give one of auto"):
        TrainTokenizer(engine="").check()


def test_the_result_is_kept_for_the_versions_it_was_found_with(styles, tmp_path, monkeypatch, brief):
    for style, checks in (("GPT-2", 1), ("GPT-2", 1), ("of this package", 3), ("of this package", 3)):
        assert_same(checked(styles[style], workdir=tmp_path), ["a 1 b\u180e2"])
        assert len(brief) == checks  # of this package: as it is, and with spaces spelled out
    for checks, (owner, name, value) in enumerate(
        [
            (engine, "_CHECK", 0),
            (engine.importlib.metadata, "version", lambda name: "9"),
            (tokenizers, "__version__", "9"),
            (engine.platform, "machine", lambda: "pdp11"),
        ],
        4,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, value)
            checked(styles["GPT-2"], workdir=tmp_path)
        assert len(brief) == checks
    checked(styles["GPT-2"], workdir=tmp_path)
    assert len(brief) == 7


def test_a_kept_result_is_used_from_the_first_batch_of_documents_on(styles, tmp_path, brief):
    checked(styles["GPT-2"], workdir=tmp_path)
    tokenizer = HuggingFaceTokenizer(name=styles["GPT-2"]).build(str(tmp_path))
    assert isinstance(tokenizer, HFTokenizer)
    tokenizer.encode_batch(["a prompt"])
    assert tokenizer.reference is None
    tokenizer.encode_batch(["a b " * 13_000])
    assert tokenizer.reference is not None
    assert len(brief) == 1


def test_a_refusal_is_kept_too(styles, tmp_path, monkeypatch, plant):
    plant("ű")
    assert checked(styles["GPT-2"], workdir=tmp_path).reference is None
    monkeypatch.setattr(engine, "check_texts", None)
    assert checked(styles["GPT-2"], workdir=tmp_path).reference is None


@pytest.mark.parametrize("damaged", [b"", b'{"pre_tok', b"[]", b"{}", b"\xff", b'{"refused": null}'])
def test_a_damaged_result_is_found_again(damaged, styles, tmp_path, brief):
    checked(styles["GPT-2"], workdir=tmp_path)
    [kept] = (tmp_path / "cache" / "tokenizers").iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damaged)
    assert checked(styles["GPT-2"], workdir=tmp_path).reference is not None
    assert kept.read_bytes() == whole
    assert len(brief) == 2


def test_a_folder_that_cannot_be_written(styles, tmp_path, caplog, brief):
    (tmp_path / "cache").write_text("a file")
    assert checked(styles["GPT-2"], workdir=tmp_path).reference is not None
    assert "its result cannot be kept" in caplog.text


def test_the_check_runs_in_the_background_once_there_is_much_to_encode(styles, monkeypatch, documents, brief):
    monkeypatch.setattr(engine, "_WORTH_IT", sum(map(len, documents)) + 1)
    tokenizer = loaded(styles["GPT-2"])
    expected = tokenizer.encode_batch(documents)
    assert "jaxtrain-check" not in [thread.name for thread in threading.enumerate()]
    assert tokenizer.reference is None
    np.testing.assert_array_equal(tokenizer.encode_batch(documents)[0], expected[0])
    for thread in threading.enumerate():
        if thread.name == "jaxtrain-check":
            thread.join()
    assert tokenizer.reference is not None
    np.testing.assert_array_equal(tokenizer.encode_batch(documents)[0], expected[0])


def test_the_running_sample(styles, brief):
    """A document whose address is drawn is encoded by both; others are not."""
    tokenizer = checked(styles["GPT-2"])
    drawn = np.flatnonzero(document_hash("s", "f", np.arange(40_000)) < np.uint64(2**64 // tokenizing.SAMPLED))
    assert 8 < len(drawn) < 40
    fast = tokenizer._fast
    assert fast is not None
    right = fast.encode
    assert right is not None
    fast.encode = lambda texts: right([text.replace("ű", "x") for text in texts])
    rows = np.array([drawn[0] - 1, drawn[0], drawn[0] + 1])
    ids, lengths = tokenizing.encode(tokenizer, ["ű", "fine", "űű"], "s", "f", rows)
    assert len(ids) == lengths.sum()
    expected = (
        rf"source 's', file f, row {drawn[0]}: .*From token 1 on: \[\d+\] by the engine, \[\d+, \d+\] by the library"
    )
    with pytest.raises(UserError, match=expected + r".*--config.tokenizer.engine=tokenizers"):
        tokenizing.encode(tokenizer, ["a", "aű", "b"], "s", "f", rows)
    fast.encode = lambda texts: right([text[:-1] for text in texts])
    with pytest.raises(UserError, match=r"From token \d+ on: \[.*\] by the engine, \[.*\] by the library"):
        tokenizing.encode(tokenizer, ["a", "ab", "b"], "s", "f", rows)
