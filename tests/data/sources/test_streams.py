"""Readers of files without random access: parallel readers, and the content of their blocks."""

import pathlib
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from jaxtrain.data.io.byte_ranges import LocalBytes
from jaxtrain.data.sources import rows
from jaxtrain.data.sources.streams import stream_blocks
from tests.hub import csv_bytes, jsonl_bytes, text_bytes

LANES = 4
ENCODE = {"json": jsonl_bytes, "csv": csv_bytes, "text": text_bytes}


class Together(LocalBytes):
    """A file whose reads finish only when all lanes have started one."""

    barrier = threading.Barrier(LANES, timeout=60)

    def fetch(self, start: int, stop: int) -> bytes:
        self.barrier.wait()
        return super().fetch(start, stop)


@pytest.mark.parametrize("builder", ENCODE)
def test_lanes_open_and_read_files_side_by_side(tmp_path: pathlib.Path, builder: str) -> None:
    texts = [f"document {n}" for n in range(30)]
    (tmp_path / "a").write_bytes(ENCODE[builder](texts))

    def read(_: int) -> list[str]:
        blocks = stream_blocks(Together(str(tmp_path / "a")), "a", 0, "text", (), builder, {})
        return [text for block in blocks for text in block["text"]]

    with ThreadPoolExecutor(LANES) as pool:
        assert list(pool.map(read, range(LANES))) == [texts] * LANES


def test_blocks_are_small_and_come_early(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "CHUNK_CHARACTERS", 10_000)
    texts = ["x" * 100] * 3000 + ["y" * 50_000] * 3
    (tmp_path / "a").write_bytes(jsonl_bytes(texts))
    blocks = stream_blocks(LocalBytes(str(tmp_path / "a")), "a", 150, "text", (), "json", {})
    found = [block["text"] for block in blocks]
    assert [text for block in found for text in block] == texts[150:]
    assert max(map(len, found)) <= rows.BLOCK_ROWS
    assert max(sum(map(len, block)) for block in found) <= 60_000


class Changing(LocalBytes):
    """A file whose first read returns some wrong bytes, as over a faulty connection."""

    reads = 0

    def fetch(self, start: int, stop: int) -> bytes:
        self.reads += 1
        data = super().fetch(start, stop)
        return data.replace(b'"text": "document 20"', b'"text": 12345678901234', 1) if self.reads == 1 else data


def test_a_row_that_a_second_look_finds_right_is_not_the_users_to_change(tmp_path: pathlib.Path) -> None:
    from jaxtrain.data.io import retry

    texts = [f"document {n}" for n in range(30)]
    (tmp_path / "a.jsonl").write_bytes(jsonl_bytes(texts))
    source = Changing(str(tmp_path / "a.jsonl"))
    blocks = retry.retrying(
        lambda row: stream_blocks(source, "a.jsonl", row, "text", (), "json", {}), 0, what="a", deadline=10.0
    )
    assert [text for block in blocks for text in block["text"]] == texts
