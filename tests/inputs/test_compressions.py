"""Every compression of every format, in one stream and in several, cut at several places: no loss is silent."""

import io
import pathlib
import zipfile
from collections.abc import Callable

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from jaxtrain.errors import CorruptError
from jaxtrain.interfaces import SourceConfig
from tests.data.sources.tars import shard
from tests.inputs.formats import FORMATS, PACK, UNPACK, read, zipped
from tests.inputs.test_damage import TEXTS

Pack = Callable[[bytes], bytes]


def check_cuts(config: SourceConfig, path: pathlib.Path, data: bytes, texts: list[str], cuts: list[int]) -> None:
    path.write_bytes(data)
    assert read(config) == (texts, None)
    for cut in cuts:
        path.write_bytes(data[:cut])
        found, error = read(config)
        assert isinstance(error, CorruptError), cut
        assert str(path) in str(error), cut
        assert found == texts[: len(found)], cut
        assert error.row <= len(found), cut


def places(data: bytes) -> list[int]:
    """In the header, in the body, in the checksum, before the last byte."""
    size = len(data)
    return [2, 12, size // 3, 2 * size // 3, size - 9, size - 3, size - 1]


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
def test_every_compression(tmp_path: pathlib.Path, suffix: str) -> None:
    kind = FORMATS[suffix]
    for name, pack in PACK.items():
        path, data = tmp_path / f"data.{suffix}.{name}", pack(kind.encode(TEXTS))
        check_cuts(kind.config(path), path, data, TEXTS, places(data))
        assert UNPACK[name](data) == kind.encode(TEXTS)
        if name == "gz":  # what was decoded before the cut is given
            path.write_bytes(data[:-1])
            assert read(kind.config(path))[0] == TEXTS


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "txt"])
def test_zip_archives(tmp_path: pathlib.Path, suffix: str) -> None:
    kind, path = FORMATS[suffix], tmp_path / f"data.{suffix}.zip"
    data = zipped(kind.encode, suffix)(TEXTS)
    check_cuts(kind.config(path), path, data, TEXTS, places(data))
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        assert b"".join(archive.read(f"{n}.{suffix}") for n in (1, 2)) == b"".join(
            kind.encode(part) for part in (TEXTS[:150], TEXTS[150:])
        )


@pytest.mark.parametrize("suffix", ["csv", "txt"])
def test_several_streams(tmp_path: pathlib.Path, suffix: str) -> None:
    """Cut in a stream, wherever it is. A cut exactly between two leaves a whole file (docs/data.md)."""
    kind, content = FORMATS[suffix], FORMATS[suffix].encode(TEXTS)
    middle = content.index(TEXTS[200].split()[1].encode(), len(content) // 2)  # within a row
    for name, pack in PACK.items():
        path, first = tmp_path / f"data.{suffix}.{name}", pack(content[:middle])
        data = first + pack(content[middle:])
        check_cuts(kind.config(path), path, data, TEXTS, [*places(first), *(len(first) + n for n in (1, 5, 40))])
        assert UNPACK[name](data) == content
        rows = content[: content.index(TEXTS[100].encode())]
        if suffix == "txt":
            path.write_bytes(pack(rows))
            assert read(kind.config(path)) == (TEXTS[:100], None)


@pytest.mark.parametrize("name", ["gz", "xz"])
def test_zero_padding(tmp_path: pathlib.Path, name: str) -> None:
    """As on tapes, after a stream and between two; longer than what is decoded at a time."""
    kind, path, pack = FORMATS["jsonl"], tmp_path / f"data.jsonl.{name}", PACK[name]
    first, second = pack(kind.encode(TEXTS[:200])), pack(kind.encode(TEXTS[200:]))
    for zeros in (4, 512, 12_000):
        data = first + bytes(zeros) + second + bytes(zeros)
        path.write_bytes(data)
        assert read(kind.config(path)) == (TEXTS, None)
        assert name == "xz" or kind.reference(path) == TEXTS  # Python's lzma stops at padding
        path.write_bytes(data + b"x")
        found, error = read(kind.config(path))
        assert isinstance(error, CorruptError)
        assert found == TEXTS[: len(found)]


def test_zstd_with_a_long_window(tmp_path: pathlib.Path) -> None:
    """`zstd --long=28`: the library alone refuses more than 128 MB."""
    kind, path = FORMATS["jsonl"], tmp_path / "data.jsonl.zst"
    settings = zstandard.ZstdCompressionParameters(window_log=28, write_checksum=True, write_content_size=False)
    writer = zstandard.ZstdCompressor(compression_params=settings).compressobj()
    data = writer.compress(kind.encode(TEXTS)) + writer.flush()
    with pytest.raises(zstandard.ZstdError, match="memory"):
        zstandard.ZstdDecompressor().decompressobj().decompress(data)
    check_cuts(kind.config(path), path, data, TEXTS, places(data))


def test_tar_shards_in_several_streams(tmp_path: pathlib.Path) -> None:
    """An archive marks its end, so that even a cut between two streams is found."""
    texts = TEXTS[:40]
    content = shard(texts)
    for name, pack in PACK.items():
        path, first = tmp_path / f"data.tar.{name}", pack(content[: len(content) // 2])
        data = first + pack(content[len(content) // 2 :])
        check_cuts(FORMATS["tar"].config(path), path, data, texts, [*places(first), len(first), *places(data)])


@pytest.mark.parametrize("name", ["", *PACK])
def test_the_end_marker_of_a_tar(tmp_path: pathlib.Path, name: str) -> None:
    """Two blocks of zeros. tarfile fills a record of 20 blocks; other writers stop here."""
    texts, pack = TEXTS[:40], PACK.get(name, bytes)
    content = shard(texts)
    end = -(-len(content.rstrip(b"\0")) // 512) * 512
    path = tmp_path / f"data.tar{name and '.' + name}"
    for blocks in (0, 1, 2):
        path.write_bytes(pack(content[: end + 512 * blocks]))
        found, error = read(FORMATS["tar"].config(path))
        assert found == texts
        assert isinstance(error, CorruptError) == (blocks < 2), blocks
    at = content.index(b"00020.json")
    path.write_bytes(pack(content[:at] + b"x" + content[at + 1 :]))
    found, error = read(FORMATS["tar"].config(path))
    assert found == texts[:20]
    assert f"not a complete archive: bad checksum at byte {at:,} of the tar" in str(error)


@pytest.mark.parametrize("codec", ["none", "snappy", "gzip", "brotli", "zstd", "lz4"])
@pytest.mark.parametrize("checksums", [False, True])
def test_codecs_of_parquet(tmp_path: pathlib.Path, codec: str, checksums: bool) -> None:
    """Its footer is its end. Damage in a page is found by the page's checksum, or by the codec if the bytes say so."""
    path, out, table = tmp_path / "data.parquet", io.BytesIO(), pa.table({"text": TEXTS})
    pq.write_table(table, out, row_group_size=100, compression=codec, write_page_checksum=checksums)
    data, config = out.getvalue(), FORMATS["parquet"].config(path)
    check_cuts(config, path, data, TEXTS, places(data))
    chunk = pq.ParquetFile(io.BytesIO(data)).metadata.row_group(1).column(0)
    at = (chunk.dictionary_page_offset or chunk.data_page_offset) + chunk.total_compressed_size // 2
    path.write_bytes(data[:at] + bytes([data[at] ^ 0x5A]) + data[at + 1 :])
    source = config.resolve()
    error: CorruptError | None = None
    found: list[str] = []
    for _ in range(2):  # the second time group by group
        error, found = None, []
        try:
            for block in source.open(0, 0):
                found += block["text"]
        except CorruptError as damage:
            error = damage
    if checksums:
        assert isinstance(error, CorruptError)
        assert (found, error.row) == (TEXTS[:100], 100)
    else:
        assert isinstance(error, CorruptError) or len(found) == len(TEXTS)


@pytest.mark.parametrize("codec", ["lz4", "zstd"])
@pytest.mark.parametrize("writer", [pa.ipc.new_stream, pa.ipc.new_file])
def test_codecs_of_arrow(tmp_path: pathlib.Path, writer: Callable, codec: str) -> None:
    path, out, table = tmp_path / "data.arrow", io.BytesIO(), pa.table({"text": TEXTS})
    with writer(out, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as to:
        to.write_table(table, max_chunksize=100)
    data = out.getvalue()
    check_cuts(FORMATS["stream.arrow"].config(path), path, data, TEXTS, places(data))
