"""No document can forge its end or beginning, for any kind of model; tokenizers that cannot work are refused.

The library's own ids are the reference for all other text.
"""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import models, pre_tokenizers

from jaxtrain.errors import UserError
from jaxtrain.tokenizers.hf import HFTokenizer, HuggingFaceTokenizer
from jaxtrain.tokenizers.identity import mismatch
from jaxtrain.tokenizers.sentencepiece import SentencePieceTokenizer

END = "</s>"
FORGED = [END, f"first {END} second", f"a{END}b", f"\n{END}\n", f"{END}{END} {END}", f"<s>{END}<pad>"]
PLAIN = ["first second", "a b", "words <i>and</i> signs / s >", "語 \x00"]
ALPHABET = sorted({*"".join(PLAIN), *END, *"<pad>"} - {" ", "\n"})
ADDED = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


def bpe(special: bool = True, merges: tuple[tuple[str, str], ...] = (), **options: Any) -> tokenizers.Tokenizer:
    """Bytes, the special tokens, and what the merges make."""
    made = [*sorted(pre_tokenizers.ByteLevel.alphabet()), END, "<s>", *("".join(pair) for pair in merges)]
    vocabulary = {token: id for id, token in enumerate(dict.fromkeys(made))}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocabulary, list(merges), **options))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    tokenizer.add_tokens([tokenizers.AddedToken(token, special=special) for token in (END, "<s>")])
    return tokenizer


def words(added: tuple[str, ...] = (END, "<s>"), unknown: str = "[UNK]") -> tokenizers.Tokenizer:
    vocabulary = {token: id for id, token in enumerate(dict.fromkeys(["first", "a", unknown, END, "<s>", "second"]))}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    tokenizer.add_special_tokens(list(added))
    return tokenizer


def word_pieces() -> tokenizers.Tokenizer:
    vocabulary = {token: id for id, token in enumerate(["[UNK]", END, "<s>", "a", "##b", "first", "second"])}
    tokenizer = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    tokenizer.add_special_tokens([END, "<s>"])
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    pieces = [("<unk>", 0.0), (END, 0.0), ("<s>", 0.0), ("<pad>", 0.0), ("▁first", -3.0), ("▁", -2.5)]
    pieces += [(letter, -5.0 - i / 100) for i, letter in enumerate(ALPHABET)]
    tokenizer = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore
    tokenizer.add_special_tokens([END, "<s>", "<pad>"])
    return tokenizer


JSON_KINDS = {
    "added with special: false": bpe(special=False),
    "merged": bpe(merges=(("<", "/"), ("s", ">"), ("</", "s>"))),
    "whole words of BPE": bpe(ignore_merges=True),
    "WordLevel": words(),
    "WordLevel without added tokens": words(added=()),
    "WordPiece": word_pieces(),
    "Unigram": unigram(),
}


def saved(folder: pathlib.Path, spec: Any, config: Any = None, name: str = "tokenizer_config.json") -> str:
    """A tokenizer's folder. spec: A tokenizer, or the content of tokenizer.json."""
    folder.mkdir(parents=True, exist_ok=True)
    text = spec.to_str() if isinstance(spec, tokenizers.Tokenizer) else json.dumps(spec)
    (folder / "tokenizer.json").write_text(text)
    if config is not None:
        (folder / name).write_text(json.dumps(config))
    return str(folder)


def check_sealed(tokenizer: HFTokenizer | SentencePieceTokenizer) -> None:
    ends = [id for id in (tokenizer.eos_id, tokenizer.bos_id) if id is not None]
    ids, lengths = tokenizer.encode_batch(FORGED)
    assert not np.isin(ids, ends).any()
    assert (lengths > 0).all()
    assert tokenizer.decode(ends) == ""
    assert tokenizer.token_bytes[ends].tolist() == [0] * len(ends)
    assert tokenizer.identity["reader"] == 2
    old = {name: value for name, value in tokenizer.identity.items() if name != "reader"}
    assert "jaxtrain 0.1 found this tokenizer's special tokens inside texts" in str(mismatch(old, tokenizer.identity))
    assert mismatch(tokenizer.identity, tokenizer.identity) is None


@pytest.mark.parametrize("kind", JSON_KINDS)
def test_no_document_forges_its_end(kind: str, tmp_path: pathlib.Path) -> None:
    library = JSON_KINDS[kind]
    end = library.token_to_id(END)
    library.encode_special_tokens = True  # what version 0.1 relied on
    assert end in library.encode(END, add_special_tokens=False).ids
    tokenizer = HuggingFaceTokenizer(name=saved(tmp_path, library), eos_token=END, bos_token="<s>").build("")
    check_sealed(tokenizer)
    assert tokenizer.eos_id == end
    for text in PLAIN:
        assert tokenizer.encode_batch([text])[0].tolist() == library.encode(text, add_special_tokens=False).ids, text
    if "BPE" in kind or kind in ("merged", "added with special: false"):
        assert [tokenizer.decode(tokenizer.encode_batch([text])[0]) for text in FORGED] == FORGED


def test_tokenizers_that_need_nothing_keep_their_identity(tmp_path: pathlib.Path) -> None:
    tokenizer = HuggingFaceTokenizer(name=saved(tmp_path, bpe()), eos_token=END).build("")
    assert not np.isin(tokenizer.encode_batch(FORGED)[0], tokenizer.eos_id).any()
    assert "reader" not in tokenizer.identity


@pytest.mark.parametrize("symbols", [{"user_defined_symbols": [END]}, {}], ids=["user-defined", "ordinary piece"])
def test_no_document_forges_its_end_in_sentencepiece(symbols: dict[str, Any], tmp_path: pathlib.Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([f"{letter}{letter} </s> first second" for letter in map(chr, range(33, 127))] * 9),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=True,
        character_coverage=1.0,
        add_dummy_prefix=False,
        eos_id=-1,
        minloglevel=2,
        **symbols,
    )
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    pieces = library.id_to_piece(list(range(library.vocab_size())))
    end = (
        END
        if symbols
        else next(piece for piece in pieces if len(piece) > 1 and library.encode(piece, out_type=str) == [piece])
    )
    assert library.piece_to_id(end) in library.encode(end)
    tokenizer = HuggingFaceTokenizer(name=str(tmp_path / "m.model"), eos_token=end).build("")
    check_sealed(tokenizer)
    text = f"second {end} second"
    assert tokenizer.decode(tokenizer.encode_batch([text])[0]) == text
    assert tokenizer.encode_batch(["aa bb"])[0].tolist() == library.encode("aa bb")
    for wrong in ("<unk>", "<0x0A>"):
        with pytest.raises(UserError, match=f"'{wrong}' stands for text that no other token spells"):
            HuggingFaceTokenizer(name=str(tmp_path / "m.model"), eos_token=wrong).build("")


def plain(**changes: Any) -> dict[str, Any]:
    spec = json.loads(bpe().to_str()) | changes
    return {key: value for key, value in spec.items() if value != "left out"}


EOS = {"eos_token": END}
PIECES = {"vocab": {"a": 0, END: 1}, "continuing_subword_prefix": "##", "max_input_chars_per_word": 100}
REFUSED = [
    # (tokenizer.json, a config, its name, the message)
    (plain(), {"eos_token_id": -1}, "config.json", r"eos_token_id -1 is not among the \d+ ids; set `eos_token`"),
    (plain(), {"eos_token_id": [-1, 2]}, "generation_config.json", "eos_token_id -1 is not among"),
    (plain(), {"eos_token_id": "0"}, "config.json", "eos_token_id '0' is not among"),
    (plain(), {"eos_token_id": True}, "config.json", "eos_token_id True is not among"),
    (plain(), {"eos_token_id": 1.0}, "config.json", r"eos_token_id 1\.0 is not among"),
    (plain(), {"eos_token_id": {"id": 1}}, "config.json", "eos_token_id .* is not among"),
    (plain(), {"eos_token_id": []}, "config.json", "no file there names the token that ends a document"),
    (plain(), {"eos_token": [END]}, "tokenizer_config.json", r"eos_token \['</s>'\] is not in its vocabulary"),
    (plain(), {"eos_token": {"special": True}}, "tokenizer_config.json", "eos_token None is not in its vocabulary|set"),
    (plain(), {"eos_token": 7}, "tokenizer_config.json", "eos_token 7 is not in its vocabulary"),
    (plain(), EOS | {"bos_token": ["<s>"]}, "tokenizer_config.json", r"bos_token \['<s>'\] is not in"),
    (plain(), [], "tokenizer_config.json", "tokenizer_config.json is not a JSON object"),
    (plain(), "x", "config.json", "config.json is not a JSON object"),
    (plain(added_tokens="left out"), None, "", "no file there names the token .*, for example one of its tokens"),
    ([], EOS, "tokenizer_config.json", "tokenizer.json cannot be loaded"),
    (plain(model="left out"), EOS, "tokenizer_config.json", "tokenizer.json cannot be loaded"),
    (plain(model={"type": "BPE", "vocab": {}, "merges": []}, added_tokens=[]), EOS, "tokenizer_config.json", "not in"),
    (
        plain(model={"type": "WordLevel", "vocab": {"a": 0, END: 1}, "unk_token": "[UNK]"}, added_tokens=[]),
        EOS,
        "tokenizer_config.json",
        "it cannot encode every text .*unknown token",
    ),
    (
        plain(model={"type": "WordPiece", "unk_token": "[UNK]", **PIECES}, added_tokens=[]),
        EOS,
        "tokenizer_config.json",
        "it cannot encode every text",
    ),
    (
        plain(model={"type": "Unigram", "vocab": [["a", -1.0], [END, 0.0]], "unk_id": None}, added_tokens=[]),
        EOS,
        "tokenizer_config.json",
        "it cannot encode every text",
    ),
    (json.loads(words(unknown=END).to_str()), EOS, "tokenizer_config.json", "'</s>' also stands for unknown text"),
    (plain(), {"eos_token": "a"}, "tokenizer_config.json", "'a' is ordinary text that no other token can spell"),
]


@pytest.mark.parametrize(("spec", "config", "name", "message"), REFUSED)
def test_what_cannot_work_is_one_message(
    spec: Any, config: Any, name: str, message: str, tmp_path: pathlib.Path
) -> None:
    with pytest.raises(UserError, match=message):
        HuggingFaceTokenizer(name=saved(tmp_path, spec, config, name)).build("")


def test_what_files_may_leave_out(tmp_path: pathlib.Path) -> None:
    whole = HuggingFaceTokenizer(name=saved(tmp_path / "whole", plain(), EOS)).build("")
    text = "def f():\n\treturn  'é語'"
    for part in ("decoder", "post_processor", "normalizer", "truncation", "padding", "added_tokens", "version"):
        bare = HuggingFaceTokenizer(name=saved(tmp_path / part, plain(**{part: "left out"}), EOS)).build("")
        assert bare.encode_batch([text])[0].tolist() == whole.encode_batch([text])[0].tolist()
        assert bare.decode(bare.encode_batch([text])[0]) == text
        assert bare.token_bytes[bare.encode_batch([text])[0]].sum() == len(text.encode())


def test_an_unknown_token_that_byte_level_models_never_give_may_end_documents(tmp_path: pathlib.Path) -> None:
    """As in GPT-2."""
    folder = saved(tmp_path, bpe(unk_token=END), EOS)
    assert HuggingFaceTokenizer(name=folder).build("").eos_id == bpe().token_to_id(END)
