"""Runs and stores of version 0.1 continue if its readers were right, and are refused otherwise."""

import dataclasses
import json
import pathlib
from typing import Any

import pytest

from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.data.stores import token_store, writer
from jaxtrain.data.stores.token_store import TokenManifest
from jaxtrain.data.transforms import AtLeast, MinLength, Template
from jaxtrain.errors import UserError
from jaxtrain.interfaces import Json, Transform
from tests.data.sources.battery import ByteTokenizer
from tests.inputs.formats import FORMATS

TEXTS = [f"document {n}" for n in range(50)]
TOKENIZER = ByteTokenizer()


def source_of(folder: pathlib.Path, suffix: str, texts: list[str], *transforms: Transform) -> HuggingFace:
    (folder / f"data.{suffix}").write_bytes(FORMATS[suffix].encode(texts))
    return HuggingFace(
        name=FORMATS[suffix].builder, data_files=(str(folder / f"data.{suffix}"),), transforms=transforms
    )


def of_0_1(identity: Json) -> Json:
    return json.loads(json.dumps({**identity, "reader": 1}))


@pytest.mark.parametrize(
    ("suffix", "version"),
    [("jsonl", 2), ("csv", 2), ("stream.arrow", 2), ("txt.zst", 2), ("txt", 1), ("txt.bz2", 1), ("parquet", 1)],
)
def test_the_readers_version_is_recorded(tmp_path: pathlib.Path, suffix: str, version: int) -> None:
    assert source_of(tmp_path, suffix, TEXTS).resolve().identity["reader"] == version


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.zst", "stream.arrow", "txt", "txt.zst", "parquet"])
def test_a_run_of_0_1_goes_on(tmp_path: pathlib.Path, suffix: str) -> None:
    config = source_of(tmp_path, suffix, TEXTS)
    identity = of_0_1(config.resolve().identity)
    again = config.resolve(identity)
    assert again.identity == identity
    assert [text for block in again.open(0, 7) for text in block["text"]] == TEXTS[7:]


def test_a_run_of_0_1_that_cannot_go_on(tmp_path: pathlib.Path) -> None:
    table = source_of(tmp_path, "csv", TEXTS)
    with pytest.raises(UserError, match=r"read by version 0\.1; it read the texts NA, null and nan"):
        table.resolve(of_0_1(table.resolve().identity))
    rows = source_of(tmp_path, "jsonl", TEXTS, AtLeast(column="id", value=3))
    with pytest.raises(UserError, match="it guessed the types of the columns id, which transforms read"):
        rows.resolve(of_0_1(rows.resolve().identity))


def store(folder: pathlib.Path, config: HuggingFace, **identity: Any) -> token_store.TokenManifest:
    """The manifest of a store, with a different identity than it was written with."""
    job = writer.Job("web", str(folder / "store"), config, config.resolve(), TOKENIZER, 10.0)
    writer.write_tokens(job, 0, 1, lambda *_: None)
    manifest = TokenManifest.load(str(folder / "store"))
    return dataclasses.replace(manifest, source={**manifest.source, **identity})


def check(folder: pathlib.Path, config: HuggingFace, manifest: token_store.TokenManifest) -> None:
    token_store.check(manifest, str(folder / "store"), config, TOKENIZER, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suffix", "reason"),
    [
        ("csv", "read the texts NA"),
        ("stream.arrow", "accepted truncated Arrow streams"),
        ("txt.zst", "accepted truncated zstd files"),
        ("jsonl.zst", "accepted truncated zstd files"),
        ("jsonl.gz", None),
        ("txt.bz2", None),
        ("parquet", None),
    ],
)
def test_stores_by_format(tmp_path: pathlib.Path, suffix: str, reason: str | None) -> None:
    config = source_of(tmp_path, suffix, TEXTS, MinLength(characters=2))
    check(tmp_path, config, store(tmp_path, config))
    old = store(tmp_path, config, reader=1)
    if reason is None:
        check(tmp_path, config, old)
    else:
        with pytest.raises(UserError, match=f"version 0.1 read its files; it {reason}"):
            check(tmp_path, config, old)


@pytest.mark.parametrize(
    ("ends", "is_refused"),
    [
        ([json.dumps(text) for text in TEXTS], True),
        ([json.dumps('He said "no".\nThen\t"yes".')], True),
        ([json.dumps("text"), "", "123", "null", '{"a": 1}'], True),  # what was no text comes as it is
        (["plain"], False),
        (['"Who is there?"', "a plain one at the end"], False),
        (['"To be," he said, "or not to be"'], False),
        (['{"a": "every text of the file is JSON"}'], False),
        (["123", ""], False),
    ],
)
def test_a_store_of_json_whose_texts_became_json(tmp_path: pathlib.Path, ends: list[str], is_refused: bool) -> None:
    """As 0.1 wrote them, from the block with a text that is a number to the end of the file."""
    config = source_of(tmp_path, "jsonl", [*TEXTS[:5], *ends])
    manifest = store(tmp_path, config)
    check(tmp_path, config, manifest)
    old = dataclasses.replace(manifest, source={**manifest.source, "reader": 1})
    if is_refused:
        with pytest.raises(
            UserError, match=r"a text in .*data\.jsonl that is not a string turned later texts into JSON"
        ):
            check(tmp_path, config, old)
    else:
        check(tmp_path, config, old)


@pytest.mark.slow
def test_a_store_of_json_by_a_tokenizer_without_quotes(tmp_path: pathlib.Path) -> None:
    class WithoutQuotes(ByteTokenizer):
        def decode(self, ids: Any) -> str:
            return super().decode(ids).replace('"', "")

    config = source_of(tmp_path, "jsonl", TEXTS)
    old = store(tmp_path, config, reader=1)
    check(tmp_path, config, old)
    with pytest.raises(UserError, match="the tokenizer hides whether one did"):
        token_store.check(old, str(tmp_path / "store"), config, WithoutQuotes(), None)


@pytest.mark.slow
def test_a_store_of_json_behind_a_template(tmp_path: pathlib.Path) -> None:
    config = source_of(tmp_path, "jsonl", TEXTS, Template(template="Q: {text}"))
    check(tmp_path, config, store(tmp_path, config))
    with pytest.raises(UserError, match="transforms hide whether one did"):
        check(tmp_path, config, store(tmp_path, config, reader=1))
