"""Every kind of source through the whole data path, in every scenario: see battery.py."""

import bz2
import dataclasses
import gzip
import io
import json
import lzma
import pathlib
import tarfile
from collections.abc import Callable, Sequence

import numpy as np
import pyarrow as pa
import pytest
import zstandard

from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.data.sources.text_files import TextFiles
from jaxtrain.data.sources.webdataset import WebDataset
from jaxtrain.data.stores import writer
from jaxtrain.data.stores.token_store import TokenManifest, TokenStore
from jaxtrain.interfaces import BATCH_FIELDS, Json, SourceConfig, Transform
from tests.data.sources.battery import SCENARIOS, Battery, ByteTokenizer, FileTexts, Write, assert_batches
from tests.data.sources.tars import COMPRESS, Member, tar
from tests.hub import csv_bytes, jsonl_bytes, parquet_bytes, text_bytes
from tests.tiers import diagonal, nightly_but

Encode = Callable[[list[str]], bytes]


def by_builder(builder: str, suffix: str, encode: Encode, column: str = "text") -> Write:
    """Files for one of the datasets library's builders."""

    def write(folder: pathlib.Path, parts: FileTexts) -> SourceConfig:
        for index, part in enumerate(parts):
            (folder / f"part-{index:03}.{suffix}").write_bytes(encode(list(part)))
        return HuggingFace(name=builder, data_files=(f"{folder}/part-*.{suffix}",), column=column)

    return write


def arrow_bytes(texts: list[str]) -> bytes:
    """Arrow's streaming format, as the datasets library writes it."""
    sink = io.BytesIO()
    table = pa.table({"text": pa.array(texts, pa.string())})
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=7)
    return sink.getvalue()


def json_bytes(texts: list[str]) -> bytes:
    return json.dumps([{"text": text} for text in texts]).encode()


def tar_bytes(texts: list[str]) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as tar:
        for index, text in enumerate(texts):
            member = tarfile.TarInfo(f"{index:05}.txt")
            data = text.encode()
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return sink.getvalue()


def text_lines(folder: pathlib.Path, parts: FileTexts) -> SourceConfig:
    for index, part in enumerate(parts):
        (folder / f"{index:03}.txt").write_bytes(text_bytes(part))
    return TextFiles(patterns=(f"{folder}/*.txt",), document="line")


def shards(suffix: str, kinds: Sequence[str]) -> Write:
    """Tar shards for `WebDataset`; their documents are members of `kinds` in turn, with other members in between.

    An empty file is an archive without members: one with only other members is refused.
    """

    def members(texts: Sequence[str]) -> list[Member]:
        found: list[Member] = [("readme.md", b"no document")] if texts else []
        for index, text in enumerate(texts):
            kind, name = kinds[index % len(kinds)], f"{index:05}"
            if kind == "txt":
                data = text.encode()
            else:
                # Escaped and unescaped, in turn.
                data = json.dumps({"id": index, "text": text}, ensure_ascii=index % 2 == 0).encode()
            if kind == "jsonl" and found[-1][0].endswith(".jsonl") and index % 5:
                found[-1] = (found[-1][0], found[-1][1] + b"\n" + data)  # several documents in one member
            else:
                found += [(f"{name}.cls", b"7"), (f"{name}.{kind}", data)]
        return found

    def write(folder: pathlib.Path, parts: FileTexts) -> SourceConfig:
        for index, part in enumerate(parts):
            (folder / f"shard-{index:03}.{suffix}").write_bytes(COMPRESS[suffix](tar(members(part))))
        return WebDataset(urls=(f"{folder}/shard-{{000..{len(parts) - 1:03}}}.{suffix}",))

    return write


@dataclasses.dataclass(kw_only=True)
class Stored:
    """Reads the token store of `inner`, which is written first. is_cut: Store at most `max_samples` documents."""

    inner: SourceConfig
    folder: pathlib.Path
    is_cut: bool
    max_samples: int | None = None
    transforms: tuple[Transform, ...] = ()

    def resolve(self, identity: Json | None = None) -> TokenStore:
        assert identity is None
        if not TokenManifest.exists(str(self.folder)):
            inner = dataclasses.replace(self.inner, max_samples=self.max_samples if self.is_cut else None)  # type: ignore[type-var]
            job = writer.Job("web", str(self.folder), inner, inner.resolve(), ByteTokenizer(), 10.0)
            for worker in (1, 0):
                writer.write_tokens(job, worker, 2, lambda *_: None)
        return TokenStore(str(self.folder), TokenManifest.load(str(self.folder)))


def stored(write_inner: Write, is_cut: bool) -> Write:
    def write(folder: pathlib.Path, parts: FileTexts) -> SourceConfig:
        return Stored(inner=write_inner(folder, parts), folder=folder / "store", is_cut=is_cut)

    return write


SOURCES: dict[str, Write] = {
    "parquet": by_builder("parquet", "parquet", lambda texts: parquet_bytes(texts, 7)),
    "json": by_builder("json", "json", json_bytes),
    "jsonl": by_builder("json", "jsonl", jsonl_bytes),
    "jsonl.gz": by_builder("json", "jsonl.gz", lambda texts: gzip.compress(jsonl_bytes(texts))),
    "jsonl.zst": by_builder("json", "jsonl.zst", lambda texts: zstandard.compress(jsonl_bytes(texts))),
    "jsonl.bz2": by_builder("json", "jsonl.bz2", lambda texts: bz2.compress(jsonl_bytes(texts))),
    "jsonl.xz": by_builder("json", "jsonl.xz", lambda texts: lzma.compress(jsonl_bytes(texts))),
    "arrow": by_builder("arrow", "arrow", arrow_bytes),
    "csv": by_builder("csv", "csv", lambda texts: csv_bytes(texts, id=range(len(texts)))),
    "text": by_builder("text", "txt", text_bytes),
    "webdataset": by_builder("webdataset", "tar", tar_bytes, column="txt"),
    "TextFiles": text_lines,
    "WebDataset.tar.json": shards("tar", ["json"]),
    "WebDataset.tar.jsonl": shards("tar", ["jsonl"]),
    "WebDataset.tar.txt": shards("tar", ["txt"]),
    "WebDataset.tar.gz": shards("tar.gz", ["json", "jsonl", "jsonl", "txt"]),
    "WebDataset.tar.bz2": shards("tar.bz2", ["txt", "jsonl"]),
    "WebDataset.tar.zst": shards("tar.zst", ["jsonl", "jsonl", "json"]),
}
# A store has no files of its own: it replaces a source, with units (parquet) and without, and its cases are those of
# that source. It has no shard for an empty file, and a record without tokens for an empty document. Only a max_samples
# used when writing decides what the store holds; others decide how much of it is read.
STORES: dict[str, Write] = {
    "TokenStore.parquet": stored(SOURCES["parquet"], is_cut=True),
    "TokenStore.tar": stored(SOURCES["WebDataset.tar.gz"], is_cut=True),
    "TokenStore.whole": stored(SOURCES["jsonl"], is_cut=False),
}
KINDS = {**SOURCES, **STORES}
# (kind, scenario) → why the case does not exist.
LINES = "a document is a line"
EXCEPT = {
    ("text", "line_ends"): LINES,
    ("TextFiles", "line_ends"): LINES,
}
CASES = [(kind, scenario) for kind in KINDS for scenario in SCENARIOS if (kind, scenario) not in EXCEPT]
# Every kind and every scenario in the slow tier; the rest of the product is nightly.
FEW = diagonal(KINDS, SCENARIOS)
MOST = nightly_but(FEW, CASES)


def _store_marks(case: tuple[str, str]) -> list[pytest.MarkDecorator]:
    """Stores are written with TFDS, whose import takes 2 s."""
    if case[0] not in STORES:
        return []
    return [pytest.mark.slow if case in FEW else pytest.mark.nightly]


FAST = [pytest.param(*case, marks=_store_marks(case), id="-".join(case)) for case in CASES]


@pytest.fixture
def battery(tmp_path: pathlib.Path, kind: str, scenario: str) -> Battery:
    return Battery(KINDS[kind], SCENARIOS[scenario], tmp_path)


@pytest.mark.parametrize(("kind", "scenario"), FAST)
def test_batches_are_those_of_the_slow_version(battery: Battery) -> None:
    wanted = battery.wanted()
    whole = battery.run()
    assert_batches(whole, wanted)
    # A checkpoint in the middle, and lanes on separate hosts.
    middle = whole[len(whole) // 2]
    assert_batches(battery.run(middle.step, middle.states), wanted[middle.step :])


@pytest.mark.parametrize(("kind", "scenario"), FAST)
def test_an_epoch_has_every_document_once(battery: Battery) -> None:
    limit = battery.scenario.max_samples
    rows = [(file, row) for file, part in enumerate(battery.scenario.parts) for row in range(len(part))][:limit]
    assert battery.documents() == [(file, row) for file, row in rows if battery.scenario.parts[file][row]]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scenario"), MOST)
def test_from_every_state(battery: Battery) -> None:
    whole = battery.run()
    for batch in whole:
        # Batches and states are equal for two steps, so everything that follows is equal too.
        again = battery.run(batch.step, batch.states, most=2)
        following = whole[batch.step : batch.step + 2]
        assert_batches(again, [dict(each.arrays) for each in following])
        for a, b in zip(again, following, strict=True):
            assert all(np.array_equal(a.states[lane], state) for lane, state in b.states.items())


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "scenario"), MOST)
def test_on_2_4_and_8_hosts(tmp_path: pathlib.Path, kind: str, scenario: str) -> None:
    """Each host reads only its lanes."""
    given = SCENARIOS[scenario]
    if given.lanes < 8:
        # More files, since a lane without any document is refused.
        given = dataclasses.replace(given, lanes=8, parts=[*given.parts] * 4)
    battery = Battery(KINDS[kind], given, tmp_path)
    whole = battery.run()
    for hosts in (2, 4, 8):
        each = 8 // hosts
        parts = [battery.run(lanes=range(first, first + each)) for first in range(0, 8, each)]
        for index, batch in enumerate(whole):
            for name in BATCH_FIELDS:
                rows = [part[index].arrays[name] if index < len(part) else np.zeros_like(batch.arrays[name][:each])
                        for part in parts]  # fmt: skip
                np.testing.assert_array_equal(np.concatenate(rows), batch.arrays[name])
