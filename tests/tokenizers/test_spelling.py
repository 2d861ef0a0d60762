"""Tokens followed byte by byte, and the outcomes that two vocabularies share."""

import itertools
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from jaxtrain.errors import UserError
from jaxtrain.tokenizers.engine import HARD_TEXTS
from jaxtrain.tokenizers.hf import HuggingFaceTokenizer
from jaxtrain.tokenizers.spelling import Speller, cells, predicts
from tests.data.memory_source import WordTokenizer


def test_each_kind_can_be_followed(tokenizer: Any) -> None:
    speller = Speller(tokenizer, "the run's")
    is_json = "ByteLevel" not in str(getattr(tokenizer, "_tokenizer", "ByteLevel"))
    assert speller.lossless == (not is_json)  # tokenizer.json with byte fallback turns "▁" into a space
    for text in HARD_TEXTS[1:]:
        spelled, ends = speller.follow(tokenizer.encode_batch([text])[0])
        assert spelled == text.encode()
        assert ends[-1] == len(spelled)
        assert (np.diff(ends) > 0).all()


def changed(folder: pathlib.Path, to: pathlib.Path, normalizer: Any) -> Any:
    spec = json.loads((folder / "tokenizer.json").read_text())
    (to / "tokenizer.json").write_text(json.dumps(spec | {"normalizer": normalizer}))
    (to / "tokenizer_config.json").write_bytes((folder / "tokenizer_config.json").read_bytes())
    return HuggingFaceTokenizer(name=str(to)).build("")


def test_tokenizers_that_change_the_text(
    workdirs: dict[str, pathlib.Path], json_folder: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    bpe = workdirs["bpe"] / "tokenizer"
    with pytest.raises(UserError, match="the teacher's tokenizer changes ordinary text"):
        Speller(changed(bpe, tmp_path, {"type": "Lowercase"}), "the teacher's")
    with pytest.raises(UserError, match="the run's tokenizer, a WordTokenizer, does not have `spellings`"):
        Speller(WordTokenizer(), "the run's")
    assert not Speller(changed(bpe, tmp_path, {"type": "NFC"}), "the run's").lossless
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    prepend = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]}
    prefixed = changed(json_folder, tmp_path, prepend)
    assert Speller(prefixed, "the run's").follow(prefixed.encode_batch(["def f"])[0])[0] == b" def f"


def test_what_predicts_the_bytes_after_its_end() -> None:
    # BOS, a token, one without bytes, a token, EOS.
    np.testing.assert_array_equal(predicts(np.array([0, 2, 2, 5, 5])), [True, False, True, True, False])


def test_cells(monkeypatch: pytest.MonkeyPatch) -> None:
    theirs = [b"", b"a", b"t", b"th", b"the", b"thermo", b"x", b"<", b""]
    ours = [b"t", b"a", b"", b"the", b"thermodynamics", b"theory", b"a", b"y"]
    found = cells(theirs, 0, ours, 2)
    assert found is not None
    of_theirs, members, starts = found
    # "th" is said by "t"; the last "a" is the one that occurs; no token here begins like "x" or "<".
    assert of_theirs.tolist() == [2, 6, 0, 0, 3, 3, -1, -1, -1]
    groups = [members[a:b].tolist() for a, b in itertools.pairwise(starts)]
    assert groups == [[0], [], [2], [3, 4, 5], [], [], [1, 6], []]
    monkeypatch.setattr("jaxtrain.tokenizers.spelling.MEMBERS", 2)
    assert cells(theirs, 0, ours, 2)[0].tolist() == [2, 6, 0, 0, -1, -1, -1, -1, -1]  # pyright: ignore
    assert cells(theirs, 0, list(theirs), 0) is None
    again = cells(theirs, 0, [*theirs, b"more"], 0)  # "more" has no cell
    assert again is not None
    assert again[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, -1]
    assert again[1].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
