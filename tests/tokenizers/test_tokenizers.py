"""One battery for all kinds of tokenizers, against the libraries used directly."""

import copy
import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxtrain.errors import UserError
from jaxtrain.tokenizers.hf import HFTokenizer, HuggingFaceTokenizer
from jaxtrain.tokenizers.identity import ENFORCED, mismatch
from jaxtrain.tokenizers.sentencepiece import SentencePiece, SentencePieceTokenizer
from tests.tokenizers.conftest import KINDS, ROOT, load

SPECIAL_TEXT = "<unk><s></s><pad><|endoftext|><0x0A> </s>"
AWKWARD = [
    "",
    " ",
    "  two before\n\n\tdef f():\r\n        return 1  \n",
    "a ▁ b▁▁ c\u2585\u2047",
    "\0\x1c\u3000\u00a0\u2028",
    "ﬁ e\u0301 Ⅷ \ufeff\ufffd\ue000\U0010ffff",
    "日本語\U0001f469\u200d\U0001f52c",
    SPECIAL_TEXT,
    "jaxtrain!",
]
TEXTS = st.lists(
    st.text() | st.text("ab \n\t▁<>/s|0x") | st.lists(st.sampled_from([*AWKWARD, "    ", "\n", "return"])).map("".join),
    max_size=4,
)


def split(ids: np.ndarray, lengths: np.ndarray) -> list[list[int]]:
    return [part.tolist() for part in np.split(ids, np.cumsum(lengths)[:-1])] if len(lengths) else []


def reference(kind: str, workdirs, json_folder, text: str) -> list[int]:
    """The ids from the library itself, one text at a time."""
    if kind == "byte-fallback json" or kind == "bpe":
        folder = json_folder if kind != "bpe" else workdirs[kind] / "tokenizer"
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer.encode(text, add_special_tokens=False).ids
    model = workdirs[kind] / "tokenizer" / "tokenizer.model"
    return sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(text)


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_the_librarys(kind, workdirs, json_folder, documents):
    tokenizer = load(kind, workdirs, json_folder)
    texts = [*documents[:6], *(text for text in AWKWARD if "▁" not in text and text != SPECIAL_TEXT)]
    ids, lengths = tokenizer.encode_batch(texts)
    assert ids.dtype == np.int32
    assert lengths.dtype == np.int64
    assert len(ids) == lengths.sum()
    assert split(ids, lengths) == [reference(kind, workdirs, json_folder, text) for text in texts]
    assert 0 <= ids.min() <= ids.max() < tokenizer.vocab_size


def test_every_text_round_trips(tokenizer):
    @settings(max_examples=150, deadline=None, derandomize=True)
    @given(TEXTS)
    def check(texts):
        if tokenizer.identity["kind"] == "tokenizer.json" and "ByteLevel" not in str(tokenizer._tokenizer.decoder):
            texts = [text.replace("▁", "_") for text in texts]  # which tokenizer.json itself cannot preserve
        ids, lengths = tokenizer.encode_batch(texts)
        alone = [tokenizer.encode_batch([text])[0].tolist() for text in texts]
        assert split(ids, lengths) == alone
        assert [tokenizer.decode(part) for part in alone] == texts
        spelled = [b"".join(map(tokenizer.spellings.__getitem__, part)) for part in alone]
        assert spelled == [text.encode() for text in texts]
        assert [int(tokenizer.token_bytes[part].sum()) for part in alone] == list(map(len, spelled))

    check()


def test_documents_round_trip(tokenizer, documents):
    ids, lengths = tokenizer.encode_batch(documents)
    assert [tokenizer.decode(part) for part in split(ids, lengths)] == documents
    assert tokenizer.token_bytes.dtype == np.int32
    assert tokenizer.token_bytes.shape == (tokenizer.vocab_size,)
    assert tokenizer.token_bytes[ids].sum() == sum(len(text.encode()) for text in documents)


def test_empty_batch_and_empty_texts(tokenizer):
    ids, lengths = tokenizer.encode_batch([])
    assert (ids.dtype, ids.shape, lengths.dtype, lengths.shape) == (np.int32, (0,), np.int64, (0,))
    ids, lengths = tokenizer.encode_batch(("", ""))
    assert ids.shape == (0,)
    assert lengths.tolist() == [0, 0]
    assert tokenizer.decode([]) == ""


def test_lone_surrogates_become_replacement_characters(tokenizer):
    texts = ["good", "a\ud800b", "\udc00\ud83d\ude00\ud83d"]
    ids, lengths = tokenizer.encode_batch(texts)
    assert [tokenizer.decode(part) for part in split(ids, lengths)] == ["good", "a\ufffdb", "\ufffd\U0001f600\ufffd"]


def test_no_text_forges_a_special_token(tokenizer):
    special = [tokenizer.eos_id, *([] if tokenizer.bos_id is None else [tokenizer.bos_id])]
    ids, _ = tokenizer.encode_batch([SPECIAL_TEXT])
    assert not np.isin(special, ids).any()
    assert (tokenizer.token_bytes[special] == 0).all()
    assert tokenizer.decode([*special, *ids.tolist(), *special]) == SPECIAL_TEXT


@pytest.mark.parametrize("text", [" ", "a", "\n", "語", "x "])
def test_long_texts_take_linear_time(tokenizer, text):
    """Seconds for 2 MB; quadratic code would take hours."""
    start = time.monotonic()
    ids, _ = tokenizer.encode_batch([text * (2_000_000 // len(text.encode()))])
    assert time.monotonic() - start < 30
    assert tokenizer.token_bytes[ids].sum() == 2_000_000 // len(text.encode()) * len(text.encode())


def test_threads_change_nothing(workdirs, documents):
    for kind in ("unigram", "sentencepiece-bpe"):
        model = str(workdirs[kind] / "tokenizer" / "tokenizer.model")
        one, three = (SentencePiece(path=model, threads=threads).build("") for threads in (1, 3))
        np.testing.assert_array_equal(one.encode_batch(documents)[0], three.encode_batch(documents)[0])
        assert one.identity == three.identity
    # The thread pool of the tokenizers library is created once per process.
    program = """
import hashlib, os, sys
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer
from tests.tokenizers.conftest import standard_library
tokenizer = HuggingFaceTokenizer(name=sys.argv[1], threads=int(sys.argv[2])).build("")
assert os.environ["RAYON_NUM_THREADS"] == sys.argv[2]
print(hashlib.sha256(tokenizer.encode_batch(standard_library(300_000))[0].tobytes()).hexdigest())
"""
    command = [sys.executable, "-c", program, str(workdirs["bpe"] / "tokenizer")]
    # Another test of this process may have set it.
    environment = {name: value for name, value in os.environ.items() if name != "RAYON_NUM_THREADS"}
    one, three = (subprocess.check_output([*command, threads], cwd=ROOT, env=environment) for threads in ("1", "3"))
    assert one == three


def test_identity(tokenizer):
    identity = tokenizer.identity
    assert json.loads(json.dumps(identity)) == identity
    assert len(identity["hash"]) == 64
    assert mismatch(identity, copy.deepcopy(identity) | {"library": "another", "revision": "f00"}) is None
    for name in ENFORCED:
        text = mismatch(identity, identity | {name: "changed"})
        assert text is not None
        assert f"{name}: was {identity[name]}, is changed" in text


def test_any_changed_byte_of_the_model_changes_the_hash(workdirs, tmp_path):
    path = workdirs["unigram"] / "tokenizer" / "tokenizer.model"
    data = path.read_bytes()
    pieces = sentencepiece.SentencePieceProcessor(model_proto=data).id_to_piece(list(range(600)))
    piece = max((piece for piece in pieces if piece.isascii() and piece.isalpha()), key=len).encode()
    (tmp_path / "other.model").write_bytes(data.replace(piece, piece.swapcase()))
    one = SentencePiece(path=str(path)).build("").identity
    other = SentencePiece(path=str(tmp_path / "other.model")).build("").identity
    text = mismatch(one, other)
    assert text is not None
    assert one["hash"] in text
    assert other["hash"] in text


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tokenizers_load_again(kind, workdirs, json_folder, tmp_path):
    tokenizer = load(kind, workdirs, json_folder)
    tokenizer.save(tmp_path / "export")
    again = HuggingFaceTokenizer(name=str(tmp_path / "export")).build("")
    assert type(again) is type(tokenizer)
    assert again.identity == tokenizer.identity
    np.testing.assert_array_equal(again.token_bytes, tokenizer.token_bytes)


def test_dropout_truncation_and_padding_are_off(workdirs, tmp_path):
    text = "def function(argument): return argument"
    spec = json.loads((workdirs["bpe"] / "tokenizer" / "tokenizer.json").read_text())
    spec["model"]["dropout"] = 0.9
    (tmp_path / "tokenizer.json").write_text(json.dumps(spec))
    tokenizer = HuggingFaceTokenizer(name=str(tmp_path), eos_token="<|endoftext|>").build("")
    plain = HuggingFaceTokenizer(name=str(workdirs["bpe"] / "tokenizer")).build("")
    for _ in range(5):
        assert tokenizer.encode_batch([text])[0].tolist() == plain.encode_batch([text])[0].tolist()


def test_ids_may_have_gaps(tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({"<a>": 0, "b": 9}, []))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = HuggingFaceTokenizer(name=str(tmp_path), eos_token="<a>").build("")
    assert loaded.vocab_size == 10
    assert loaded.token_bytes.tolist() == [0] * 9 + [1]


def test_models_with_their_own_rules_keep_them(documents, tmp_path):
    """Like the first Llama models: a dummy prefix, and no byte fallback. Ids are the library's for all texts."""
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents[0].split("\n")),
        model_prefix=str(tmp_path / "m"),
        model_type="bpe",
        vocab_size=400,
        control_symbols=["<pad>", "<mask>"],
        user_defined_symbols=["<tab>"],
        minloglevel=2,
    )
    tokenizer = SentencePiece(path=str(tmp_path / "m.model")).build("")
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "m.model"))
    ids, lengths = tokenizer.encode_batch(AWKWARD)
    assert split(ids, lengths) == processor.encode(AWKWARD)
    assert tokenizer.token_bytes[:6].tolist() == [0, 0, 0, 0, 0, len("<tab>")]


def test_refuses_files_that_are_no_tokenizers(tmp_path):
    (tmp_path / "x.model").write_bytes(b"not a model")
    (tmp_path / "x.json").write_text(
        '{"version": "1.0", "added_tokens": [], "decoder": null, "model": {"type": "New"}}'
    )
    with pytest.raises(UserError, match=r"x\.model: not a sentencepiece model"):
        SentencePiece(path=str(tmp_path / "x.model")).build("")
    with pytest.raises(UserError, match="no such file"):
        SentencePiece(path=str(tmp_path / "absent.model")).build("")
    with pytest.raises(UserError, match="cannot be loaded by tokenizers"):
        HuggingFaceTokenizer(name=str(tmp_path / "x.json")).build("")
    with pytest.raises(ValueError, match="threads=0"):
        SentencePiece(path="x", threads=0).check()


def test_sentencepiece_without_an_end_token(documents, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(documents[0].split("\n")),
        model_prefix=str(tmp_path / "m"),
        vocab_size=150,
        eos_id=-1,
        minloglevel=2,
    )
    with pytest.raises(UserError, match="set `eos_token`"):
        SentencePiece(path=str(tmp_path / "m.model")).build("")
    tokenizer = HuggingFaceTokenizer(name=str(tmp_path / "m.model"), eos_token="<s>").build("")
    assert isinstance(tokenizer, SentencePieceTokenizer)
    assert tokenizer.eos_id == 1


@pytest.mark.parity
@pytest.mark.parametrize("kind", KINDS)
def test_transformers_loads_what_was_saved(kind, workdirs, json_folder, documents, tmp_path):
    transformers = pytest.importorskip("transformers")
    tokenizer = load(kind, workdirs, json_folder)
    tokenizer.save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.eos_token_id == tokenizer.eos_id
    assert theirs.bos_token_id == tokenizer.bos_id
    assert len(theirs) == tokenizer.vocab_size
    for text in [*documents, *(text for text in AWKWARD if "▁" not in text and text != SPECIAL_TEXT)]:
        ids = tokenizer.encode_batch([text])[0].tolist()
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        if kind == "unigram" and ids != expected:
            # The libraries break ties between equally probable segmentations differently.
            assert len(ids) == len(expected)
            assert sum(a != b for a, b in zip(ids, expected, strict=True)) < 0.01 * len(ids) + 3
        else:
            assert ids == expected
        assert theirs.decode(ids) == text


def test_tokenizer_json_is_preferred(workdirs, json_folder, tmp_path):
    for source in (workdirs["unigram"] / "tokenizer" / "tokenizer.model", *json_folder.iterdir()):
        (tmp_path / source.name).write_bytes(source.read_bytes())
    assert isinstance(HuggingFaceTokenizer(name=str(tmp_path)).build(""), HFTokenizer)


def test_a_declared_vocabulary_that_the_files_do_not_have_is_told(workdirs, caplog):
    folder = str(workdirs["bpe"] / "tokenizer")
    size = HuggingFaceTokenizer(name=folder).build("").vocab_size
    HuggingFaceTokenizer(name=folder, vocab_size=size).build("")
    assert not caplog.records
    HuggingFaceTokenizer(name=folder, vocab_size=size + 1).build("")
    assert f"tokenizer.vocab_size={size + 1}, but {folder} has {size} ids" in caplog.text
