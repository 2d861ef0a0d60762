"""Training: the same documents give the same tokenizer, completely or not at all, and none of their text is dropped."""

import dataclasses
import itertools
import json
import logging
import os
import re
import subprocess
import sys
import time

import numpy as np
import pytest

from jaxtrain.errors import UserError
from jaxtrain.tokenizers import files, training
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer
from jaxtrain.tokenizers.training import NotTrainedError, TrainTokenizer
from tests.tokenizers.conftest import ROOT, TRAINED

QUICK = {"unigram": {"vocab_size": 400}, "bpe": {"vocab_size": 300, "kind": "bpe"}}
WRITTEN = {
    "sentencepiece": {"tokenizer.model", "tokenizer.vocab", "tokenizer_config.json", "training.json"},
    "bpe": {"tokenizer.json", "vocab.json", "merges.txt", "tokenizer_config.json", "training.json"},
}


@pytest.mark.parametrize("kind", TRAINED)
def test_what_is_kept(kind, workdirs):
    config = TRAINED[kind]
    folder = workdirs[kind] / "tokenizer"
    assert {path.name for path in folder.iterdir()} == WRITTEN[config.kind]
    assert [path.name for path in workdirs[kind].iterdir()] == ["tokenizer"]
    tokenizer = config.build(workdirs[kind])
    assert tokenizer.vocab_size == config.vocab_size
    record = json.loads((folder / "training.json").read_text())
    assert record["identity"] == tokenizer.identity
    if config.kind == "sentencepiece":
        assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
        assert len((folder / "tokenizer.vocab").read_text().splitlines()) == config.vocab_size
    else:
        assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 0)
        assert json.loads((folder / "vocab.json").read_text())["<|endoftext|>"] == 0


def test_one_core_gives_the_same_tokenizers(workdirs, tmp_path):
    program = """
import os, sys
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from tests.tokenizers.conftest import TRAINED, standard_library
for kind, config in TRAINED.items():
    print(config.train(standard_library(300_000), f"{sys.argv[1]}/{kind}", progress=False).identity["hash"])
"""
    environment = {**os.environ, "RAYON_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    output = subprocess.check_output(command, cwd=ROOT, env=environment, text=True)
    assert output.split() == [TRAINED[kind].build(workdirs[kind]).identity["hash"] for kind in TRAINED]


@pytest.mark.parametrize("kind", QUICK)
def test_documents_are_counted_and_no_more_are_read(kind, documents, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="jaxtrain")
    stream = iter(itertools.cycle(documents))
    TrainTokenizer(max_samples=7, **QUICK[kind]).train(stream, tmp_path)
    assert next(stream) == documents[7 % len(documents)]
    assert "Collected 7 samples for tokenizer..." in caplog.messages
    assert f"Tokenizer trained and saved to {tmp_path / 'tokenizer'}" in caplog.messages


@pytest.mark.parametrize("kind", QUICK)
def test_errors_of_the_stream_pass_through(kind, tmp_path):
    def broken():
        yield "some text"
        raise ConnectionResetError("the stream broke")

    with pytest.raises(ConnectionResetError, match="the stream broke"):
        TrainTokenizer(**QUICK[kind]).train(broken(), tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="no documents"):
        TrainTokenizer(**QUICK[kind]).train([], tmp_path)


def test_a_kill_leaves_no_half_tokenizer(documents, tmp_path, monkeypatch):
    """Stops after each number of written files, on a file system and on an object store; then continues."""
    config = TrainTokenizer(**QUICK["bpe"])
    write = files.write
    for count, local in itertools.product(range(5), (True, False)):
        workdir = tmp_path / f"{count} {local}"

        def stopping_write(content, folder, count=count):
            write({"tokenizer.vocab": b"stale"} | dict(itertools.islice(content.items(), count)), folder)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(files, "is_local", lambda folder, local=local: local)
            patch.setattr(files, "write", stopping_write)
            with pytest.raises(KeyboardInterrupt):
                config.train(documents[:2], workdir)
            assert config.needs_training(workdir)
            with pytest.raises(NotTrainedError, match="holds no tokenizer yet"):
                config.build(workdir)
            patch.setattr(files, "write", write)
            config.train(documents[:2], workdir)
        assert not config.needs_training(workdir)
        assert [path.name for path in workdir.iterdir()] == ["tokenizer"]
        if local:
            assert {path.name for path in (workdir / "tokenizer").iterdir()} == WRITTEN["bpe"]


def test_other_settings_are_refused(workdirs):
    with pytest.raises(UserError, match=r"max_samples: 1000000 there, 5 in the config\n  vocab_size: 1000 there, 900"):
        TrainTokenizer(vocab_size=900, max_samples=5, kind="bpe").build(workdirs["bpe"])
    assert TrainTokenizer(vocab_size=1000, kind="bpe", threads=1, model_type="bpe").build(workdirs["bpe"])


@pytest.mark.parametrize("kind", TRAINED)
def test_special_tokens_have_fixed_ids_and_no_text_gives_them(kind, documents, tmp_path):
    special = ("<|user|>", "<|assistant|>", "a,b")
    config = dataclasses.replace(TRAINED[kind], special_tokens=special)
    tokenizer = config.train([*documents[:3], "<|user|> a,b " * 500], tmp_path)
    first = tokenizer.eos_id + 1
    assert first == (1 if kind == "bpe" else 3)
    listing = (tmp_path / "tokenizer" / ("vocab.json" if kind == "bpe" else "tokenizer.vocab")).read_text()
    for id, token in enumerate(special, first):
        if kind == "bpe":
            assert json.loads(listing)[token] == id
        else:
            assert listing.splitlines()[id].split("\t")[0] == token
        text = f"x{token} {token}"
        ids, _ = tokenizer.encode_batch([text])
        assert id not in ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode([id]) == ""
        assert tokenizer.token_bytes[id] == 0
    with pytest.raises(UserError, match=r"special_tokens: \['<\|user\|>', .* there, None in the config"):
        TRAINED[kind].build(tmp_path)
    with pytest.raises(ValueError, match=r"vocab_size=302: .*give 303 or more"):
        TrainTokenizer(vocab_size=302, special_tokens=special).check()


def test_the_round_trip_is_checked(documents, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="jaxtrain")
    TrainTokenizer(**QUICK["bpe"]).train([*documents[:3], "\ud800"], tmp_path / "bpe")
    assert "Round trip: all 4 sample documents decode to their exact text." in caplog.messages
    lossy = TrainTokenizer(vocab_size=200, byte_fallback=False, character_coverage=0.98)
    lossy.train([documents[0], "only letters", f"{documents[1]} and 語 that is lost"], tmp_path / "lossy")
    (said,) = (message for message in caplog.messages if "do not decode to their text" in message)
    found = re.search(
        r"Round trip: (\d) of 3 .* In document (\d), from character (\d+), '(.*)' became '(.*)'\. byte_f", said
    )
    assert found, said
    assert int(found[1]) >= 1
    assert found[4][0] != found[5][0]
    place = int(found[3])
    text = [documents[0], "only letters", f"{documents[1]} and 語 that is lost"][int(found[2])]
    assert repr(text[place : place + 20]) == f"'{found[4]}'"


def test_progress_without_a_terminal_is_a_line_for_each_tenth(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO, logger="jaxtrain")
    monkeypatch.setattr(training, "_LOGGED_DOCUMENTS", 2)
    TrainTokenizer(max_samples=40, **QUICK["bpe"]).train(["some text"] * 9, tmp_path)
    lines = [message for message in caplog.messages if message.startswith("Tokenizer: ")]
    assert lines == ["Tokenizer: 4 of 40 documents", "Tokenizer: 8 of 40 documents"]


def test_a_tokenizer_is_not_overwritten(documents, workdirs, tmp_path):
    with pytest.raises(UserError, match="already holds a tokenizer"):
        TRAINED["bpe"].train(documents, workdirs["bpe"])
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(UserError, match="not an empty folder"):
        training.train(TRAINED["bpe"], documents, tmp_path)
    (tmp_path / "empty").mkdir()
    training.train(TrainTokenizer(**QUICK["bpe"]), documents[:1], tmp_path / "empty")
    assert HuggingFaceTokenizer(name=str(tmp_path / "empty")).build("").eos_id == 0


@pytest.mark.parametrize("model_type", ["unigram", "bpe"])
def test_long_lines_are_learned_from(model_type, tmp_path):
    """The library alone drops lines of more than 4,192 bytes."""
    lines = "zyxwvu " * 3000
    config = TrainTokenizer(vocab_size=300, model_type=model_type)
    tokenizer = config.train([lines, "\n" + lines.replace(" ", "\n")], tmp_path)
    assert len(tokenizer.encode_batch([" zyxwvu"])[0]) == 1


def test_few_documents_give_fewer_tokens(tmp_path, caplog):
    for number, config in enumerate(TRAINED.values()):
        tokenizer = config.train(["hello world", "\0 ▁▅ \ud800"], tmp_path / str(number))
        assert tokenizer.vocab_size < 300
        assert (
            f"Requested {config.vocab_size} tokens, but the documents yield only {tokenizer.vocab_size}."
            in caplog.messages
        )
        assert tokenizer.decode(tokenizer.encode_batch(["world ▁▅"])[0]) == "world ▁▅"


def test_too_small_a_vocabulary(tmp_path):
    letters = "".join(map(chr, range(0x4E00, 0x5000)))
    with pytest.raises(UserError, match="vocab_size=300: sentencepiece cannot train that"):
        TrainTokenizer(vocab_size=300, character_coverage=1.0).train([letters], tmp_path)
    assert not (tmp_path / "tokenizer").exists()


def test_without_byte_fallback(documents, tmp_path):
    tokenizer = TrainTokenizer(vocab_size=200, byte_fallback=False).train(documents[:1], tmp_path)
    ids, _ = tokenizer.encode_batch(["return 語"])
    assert ids[-1] == 0
    assert tokenizer.token_bytes[ids].sum() == len("return ")


@pytest.mark.parametrize(
    "text", ["x" * 20_000, "語" * 7_000, "ab \n" * 5_000, "\n" * 9_000, " " * 9_000, "é\n" * 3_000, ""]
)
def test_pieces_are_the_whole_document(text):
    pieces = list(training._pieces([text, "next"]))
    assert b"".join(pieces) == (text + "next").encode()
    assert all(0 < len(piece) <= training._PIECE_BYTES for piece in pieces)
    assert all(piece.decode() for piece in pieces)
    if "\n" in text:
        # The library strips line ends at the end of its input: few pieces may have them there.
        assert sum(piece.endswith(b"\n") for piece in pieces) <= 2 or text.strip() == ""


def test_fair_sample():
    pieces = [f"{i}".encode() for i in range(1000)]
    assert training._fair_sample(pieces[:50], 50) == pieces[:50]
    sample = training._fair_sample(pieces, 50)
    assert sample == training._fair_sample(iter(pieces), 50)
    assert len(set(sample)) == 50
    # Chances are equal: each of 10,000 places in 200 blocks of 50, against the expected 1,000 of 10,000 kept.
    kept = np.array([int(piece) for piece in training._fair_sample((f"{i}".encode() for i in range(10_000)), 1000)])
    counts = np.histogram(kept, bins=10, range=(0, 10_000))[0]
    assert np.abs(counts - 100).max() < 40


def test_memory_is_bounded_by_the_sample(tmp_path):
    """100 MB of text pass through a sample of 1 MB; reading takes no other memory."""
    document = "a few words and a line\n" * 2000
    start = time.monotonic()
    sample = training._fair_sample(training._pieces(itertools.repeat(document, 2000)), 250)
    assert time.monotonic() - start < 30
    assert sum(map(len, sample)) <= 250 * training._PIECE_BYTES


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "wordpiece"},
        {"model_type": "char"},
        {"vocab_size": 256},
        {"vocab_size": 2**32},
        {"max_samples": 0},
        {"character_coverage": 0.0},
        {"character_coverage": 1.5},
        {"sample_mb": 0.0},
        {"threads": 0},
        {"special_tokens": ("</s>",)},
        {"special_tokens": ("<0x41>",)},
        {"special_tokens": ("a b",)},
        {"special_tokens": ("",)},
        {"special_tokens": ("<a>", "<a>")},
    ],
)
def test_check(wrong):
    with pytest.raises(ValueError, match=re.escape(f"{next(iter(wrong))}={next(iter(wrong.values()))!r}: ") + ".*give"):
        TrainTokenizer(**wrong).check()
    TrainTokenizer().check()
