"""Parquet by row group: against a naive read of the whole file, from every row, and counted in requests and bytes."""

import io
import random
import threading
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxtrain.data.io.byte_ranges import HttpBytes, LocalBytes
from jaxtrain.data.sources.huggingface import HuggingFace, HuggingFaceSource
from jaxtrain.data.sources.parquet import ParquetFiles
from jaxtrain.errors import CorruptError, UserError
from tests.data.sources.reading import documents, texts
from tests.hub import LoopbackHub, parquet_bytes


def write(path, table: pa.Table, groups: list[int]) -> str:
    """A file with row groups of the given sizes."""
    with pq.ParquetWriter(path, table.schema, compression="zstd") as writer:
        start = 0
        for rows in groups:
            writer.write_table(table.slice(start, rows), row_group_size=max(rows, 1))
            start += rows
    return str(path)


LAYOUTS = {
    "one group": [120],
    "even": [30, 30, 30, 30],
    "rows of one": [1] * 120,
    "ragged": [1, 50, 0, 3, 60, 6],
    "empty first and last": [0, 120, 0],
}


@pytest.mark.parametrize("fetch_rows", [1, 7, 1024])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_of_every_layout(tmp_path, layout, fetch_rows):
    wanted: list[str | None] = [*documents(120)]
    wanted[5] = wanted[119] = None
    table = pa.table({"id": [f"{i}" * 20 for i in range(120)], "text": wanted, "score": range(120)})
    path = write(tmp_path / "a.parquet", table, LAYOUTS[layout])
    expected = ["" if text is None else text for text in pq.read_table(path).column("text").to_pylist()]
    files = ParquetFiles([LocalBytes(path)], fetch_rows)
    assert files.row_groups(0) == LAYOUTS[layout]
    for row in range(122):
        assert texts(files.blocks(0, row, "text", ())) == expected[row:], row
    scores = [score for block in files.blocks(0, 17, "text", ("score",)) for score in block["score"]]
    assert scores == list(range(17, 120))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_past_the_stop_are_not_read(tmp_path, layout):
    table = pa.table({"text": documents(120)})
    path = write(tmp_path / "a.parquet", table, LAYOUTS[layout])
    wanted, files = table.column("text").to_pylist(), ParquetFiles([LocalBytes(path)], 7)
    ends = [sum(LAYOUTS[layout][: count + 1]) for count in range(len(LAYOUTS[layout]))]
    for row in (0, 1, 29, 30, 51, 119):
        for stop in (row - 1, row, row + 1, 30, 51, 120, 500):
            end = next((end for end in ends if end >= stop), 120) if row < stop else row
            assert texts(files.blocks(0, row, "text", (), stop)) == wanted[row:end], (row, stop)


@pytest.mark.parametrize("compression", ["none", "snappy", "gzip", "zstd"])
@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())], ids=str)
def test_encodings(tmp_path, compression, kind):
    wanted = documents(3000)
    nested = [{"a": i, "b": [str(i)]} for i in range(3000)]
    table = pa.table({"text": pa.array(wanted).cast(kind), "meta": nested})
    path = str(tmp_path / "a.parquet")
    pq.write_table(table, path, row_group_size=700, compression=compression, data_page_size=4096)
    files = ParquetFiles([LocalBytes(path)], 100)
    for row in (0, 699, 700, 1234, 2999):
        blocks = list(files.blocks(0, row, "text", ("meta",)))
        assert texts(blocks) == wanted[row:]
        assert [meta for block in blocks for meta in block["meta"]] == nested[row:]


def test_an_empty_file_has_no_rows(tmp_path):
    path = write(tmp_path / "a.parquet", pa.table({"text": pa.array([], pa.string())}), [])
    files = ParquetFiles([LocalBytes(path)], 10)
    assert files.row_groups(0) == []
    assert list(files.blocks(0, 0, "text", ())) == []


def test_columns_are_checked(tmp_path):
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"id": [1], "content": ["x"]}), path)
    files = ParquetFiles([LocalBytes(path)], 10)
    with pytest.raises(UserError, match=r"no column 'text'\. It has 'id', 'content'"):
        list(files.blocks(0, 0, "text", ()))
    with pytest.raises(UserError, match=r"column 'id' holds int64, not text\. Columns with text: 'content'"):
        list(files.blocks(0, 0, "id", ()))
    with pytest.raises(UserError, match="no column 'score'"):
        list(files.blocks(0, 0, "content", ("score",)))


def on_hub(hub: LoopbackHub, data: bytes, **options) -> HuggingFaceSource:
    hub.commit("org/web", {"data/train-0.parquet": data})
    return HuggingFace(name="org/web", **options).resolve()


def random_texts(count: int, length: int) -> list[str]:
    """Texts that do not compress: `length` random letters each."""
    rng = random.Random(0)
    return ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=length)) for _ in range(count)]


def test_a_resume_costs_the_same_at_any_depth(hub: LoopbackHub):
    """40 groups of 250 rows of 800 bytes, with a fifth in other columns: the first block after reopening at a row."""
    wanted = random_texts(10_000, 800)
    source = on_hub(hub, parquet_bytes(wanted, 250, id=random_texts(10_000, 160)), fetch_rows=250)
    costs = {}
    for row in (0, 130, 5_000, 9_990):
        fresh = HuggingFace(name="org/web", fetch_rows=250).resolve(source.identity)
        hub.log.clear()
        block = next(fresh.open(0, row))
        assert block["text"] == wanted[row : row + len(block["text"])]
        costs[row] = (hub.count(), hub.bytes())
    requests = {cost[0] for cost in costs.values()}
    sizes = [cost[1] for cost in costs.values()]
    assert requests == {2}, costs  # footer, one group's texts
    assert max(sizes) < 262_144 + 300_000, costs
    assert max(sizes) - min(sizes) < 200_000, costs


def test_reading_on_wastes_little(hub: LoopbackHub):
    wanted = random_texts(8_000, 800)
    data = parquet_bytes(wanted, 200, id=random_texts(8_000, 160))
    source = on_hub(hub, data, fetch_rows=1000)
    hub.log.clear()
    assert texts(source.open(0, 0)) == wanted
    assert hub.count() == 8, [request.range for request in hub.log]  # 1,000 rows a request; the footer is known
    assert hub.bytes() < 1.02 * len(data)
    # If there is much between the wanted chunks, they are fetched separately.
    source = on_hub(hub, parquet_bytes(wanted[:2000], 500, id=random_texts(2000, 800)), fetch_rows=10_000)
    hub.log.clear()
    assert texts(source.open(0, 0)) == wanted[:2000]
    assert hub.count() == 4
    assert hub.bytes() < 0.55 * len(parquet_bytes(wanted[:2000], 500, id=random_texts(2000, 800)))


def test_a_giant_group_is_read_in_pieces(hub: LoopbackHub):
    wanted = random_texts(6_000, 1000)
    source = on_hub(hub, parquet_bytes(wanted), fetch_rows=500)
    hub.log.clear()
    blocks = source.open(0, 0)
    next(blocks)
    first = hub.bytes()
    assert texts(blocks) == wanted[500:]
    assert first < 0.5 * hub.bytes()
    assert max(request.sent for request in hub.log) < 1.5e6
    assert 10 <= hub.count() <= 14


def test_a_long_footer_takes_two_requests_once(hub: LoopbackHub):
    columns = {f"column_{i:02d}": range(1500) for i in range(20)}
    data = parquet_bytes(documents(1500), 1, **columns)
    length = int.from_bytes(data[-8:-4], "little")
    assert length > 262_144
    hub.commit("org/wide", {f"data/train-{i}.parquet": data for i in range(3)})
    source = HuggingFace(name="org/wide").resolve()
    hub.log.clear()
    for file in (0, 1, 2):
        assert source.row_groups(file) == [1] * 1500
    assert [request.range for request in hub.log] == [f"bytes=-{length + 8 + (length + 8) // 8}"] * 2


def test_threads_share_footers(hub: LoopbackHub):
    wanted = documents(2000)
    source = on_hub(hub, parquet_bytes(wanted, 100))
    source = HuggingFace(name="org/web").resolve(source.identity)
    hub.log.clear()
    results: dict[int, bool] = {}

    def work(row: int) -> None:
        results[row] = all(texts(source.open(0, row)) == wanted[row:] for _ in range(5))

    threads = [threading.Thread(target=work, args=(row,)) for row in range(0, 1600, 100)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(results.values()) == [True] * 16
    assert sum(request.range.startswith("bytes=-") for request in hub.log if request.range) == 1


def test_what_cannot_be_decoded_is_named_and_forgotten(hub: LoopbackHub):
    wanted = random_texts(400, 500)
    source = on_hub(hub, parquet_bytes(wanted, 100), fetch_rows=100)
    hub.fault("train-0", "corrupt", count=1)
    with pytest.raises(CorruptError) as caught:
        texts(source.open(0, 350))
    assert (caught.value.row, caught.value.file) == (300, "data/train-0.parquet of org/web")  # its group's first
    hub.log.clear()
    assert texts(source.open(0, 0)) == wanted
    assert (hub.requests("train-0")[0].range or "").startswith("bytes=-")  # the footer was fetched again
    for data in (
        b"",
        b"PAR1",
        b"x" * 100,
        parquet_bytes(wanted)[:-1],
        b"PAR1" + b"\xff" * 50 + b"\xff\xff\xff\x00PAR1",
    ):
        hub.commit("org/web", {"data/train-0.parquet": data})
        files = ParquetFiles([HttpBytes(f"{hub.endpoint}/datasets/org/web/resolve/main/data/train-0.parquet")], 10)
        with pytest.raises(CorruptError):
            next(files.blocks(0, 0, "text", ()))
        with pytest.raises(CorruptError):
            files.schema(0)


def test_a_wrong_letter_is_noticed_where_pages_have_checksums(tmp_path):
    path = tmp_path / "a.parquet"
    options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_page_checksum": True}
    pq.write_table(pa.table({"text": ["abcd" * 9, "right"]}), path, **options)
    path.write_bytes(path.read_bytes().replace(b"right", b"wrong"))
    with pytest.raises(CorruptError, match="CRC"):
        next(ParquetFiles([LocalBytes(str(path))], 50).blocks(0, 0, "text", ()))


def test_corrupt_pages_in_the_middle(tmp_path):
    """The rows before a bad group are yielded, and the error names the first row that was not."""
    sink = io.BytesIO()
    wanted = random_texts(400, 500)
    pq.write_table(pa.table({"text": wanted}), sink, row_group_size=100)
    data = bytearray(sink.getvalue())
    at = pq.ParquetFile(sink).metadata.row_group(2).column(0).data_page_offset
    data[at : at + 300] = b"\xff" * 300
    path = tmp_path / "a.parquet"
    path.write_bytes(data)
    got: list[str] = []
    blocks = ParquetFiles([LocalBytes(str(path))], 50).blocks(0, 0, "text", ())
    with pytest.raises(CorruptError) as caught:
        got.extend(text for block in blocks for text in block["text"])
    assert got == wanted[:200]
    assert caught.value.row == 200
