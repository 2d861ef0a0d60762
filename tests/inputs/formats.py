"""Every file format that a source reads: how documents become a file, and how another library reads them back."""

import bz2
import csv
import dataclasses
import gzip
import importlib
import importlib.util
import io
import json
import lzma
import pathlib
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from jaxtrain.data.sources.huggingface import HuggingFace
from jaxtrain.data.sources.webdataset import WebDataset
from jaxtrain.errors import CorruptError, UserError
from jaxtrain.interfaces import SourceConfig
from tests.data.sources.tars import COMPRESS, shard, tar

Read = Callable[[pathlib.Path], list[str]]


def jsonl(texts: Sequence[str]) -> bytes:
    return "".join(json.dumps({"id": n, "text": text}) + "\n" for n, text in enumerate(texts)).encode()


def json_list(texts: Sequence[str]) -> bytes:
    return json.dumps([{"id": n, "text": text} for n, text in enumerate(texts)], indent=1).encode()


def lines(texts: Sequence[str]) -> bytes:
    return "".join(text + "\n" for text in texts).encode()


def table(texts: Sequence[str]) -> bytes:
    out = io.StringIO()
    csv.writer(out).writerows([("id", "text"), *enumerate(texts)])
    return out.getvalue().encode()


def arrow_stream(texts: Sequence[str]) -> bytes:
    return _arrow(texts, pa.ipc.new_stream)


def arrow_file(texts: Sequence[str]) -> bytes:
    return _arrow(texts, pa.ipc.new_file)


def _arrow(texts: Sequence[str], writer: Callable[..., Any]) -> bytes:
    out, data = io.BytesIO(), pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())})
    with writer(out, data.schema) as to:
        to.write_table(data, max_chunksize=100)
    return out.getvalue()


def parquet(texts: Sequence[str]) -> bytes:
    out, data = io.BytesIO(), pa.table({"id": range(len(texts)), "text": pa.array(texts, pa.string())})
    pq.write_table(data, out, row_group_size=100, write_page_checksum=True)
    return out.getvalue()


def samples(texts: Sequence[str]) -> bytes:
    """The WebDataset layout, as on the Hub."""
    return tar([(f"{n:06}.txt", text.encode()) for n, text in enumerate(texts)])


def zipped(encode: Callable[[Sequence[str]], bytes], suffix: str) -> Callable[[Sequence[str]], bytes]:
    """Two members, and a third one as macOS adds it."""

    def archive(texts: Sequence[str]) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as to:
            to.writestr(f"__MACOSX/._1.{suffix}", b"no document")
            to.writestr(f"2.{suffix}", encode(texts[len(texts) // 2 :]))
            to.writestr(f"1.{suffix}", encode(texts[: len(texts) // 2]))
        return out.getvalue()

    return archive


def _packed(
    encode: Callable[[Sequence[str]], bytes], pack: Callable[[bytes], bytes]
) -> Callable[[Sequence[str]], bytes]:
    return lambda texts: pack(encode(texts))


# Each with a different decoder than the one under test.
UNPACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": gzip.decompress,
    "bz2": bz2.decompress,
    "xz": lzma.decompress,
    "zst": lambda data: zstandard.ZstdDecompressor().stream_reader(io.BytesIO(data), read_across_frames=True).read(),
}
PACK: dict[str, Callable[[bytes], bytes]] = {
    "gz": lambda data: gzip.compress(data, mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}

if importlib.util.find_spec("lz4"):
    lz4 = importlib.import_module("lz4.frame")
    UNPACK["lz4"] = lambda data: lz4.open(io.BytesIO(data)).read()
    PACK["lz4"] = lz4.compress


def _unpacked(path: pathlib.Path) -> bytes:
    data = path.read_bytes()
    return UNPACK.get(path.suffix[1:], lambda plain: plain)(data)


def _json_reference(path: pathlib.Path) -> list[str]:
    return [
        row["text"]
        for row in pd.read_json(io.BytesIO(_unpacked(path)), lines=True, dtype={"text": str}).to_dict("records")
    ]


def _csv_reference(path: pathlib.Path) -> list[str]:
    return pd.read_csv(io.BytesIO(_unpacked(path)), dtype=str, keep_default_na=False)["text"].tolist()


def _tar_reference(path: pathlib.Path) -> list[str]:
    if path.suffix == ".zst":
        path = path.with_suffix("")
        path.write_bytes(_unpacked(path.with_suffix(".tar.zst")))
    found = []
    with tarfile.open(path) as archive:
        for member in archive:
            content = archive.extractfile(member)
            assert content is not None
            data = content.read()
            if member.name.endswith("json"):
                found.append(json.loads(data)["text"])
            elif member.name.endswith("txt"):
                found.append(data.decode())
    return found


def _zip_reference(path: pathlib.Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return [json.loads(line)["text"] for name in ("1.jsonl", "2.jsonl") for line in archive.open(name)]


@dataclasses.dataclass(frozen=True)
class Format:
    """A kind of file.

    Fields:
        builder: The builder of `HuggingFace` that reads it; "" for `WebDataset`.
        encode: Documents to the file's bytes.
        reference: The file's documents, read by another library.
        ends: Whether the format marks its end, so that a file truncated anywhere is damaged.
        sums: Whether it has checksums, so that every wrong byte in its documents is found.
        column: The column with the text.
    """

    builder: str
    encode: Callable[[Sequence[str]], bytes]
    reference: Read
    ends: bool = True
    sums: bool = True
    column: str = "text"

    def config(self, path: pathlib.Path) -> SourceConfig:
        if not self.builder:
            return WebDataset(urls=(str(path),))
        return HuggingFace(name=self.builder, data_files=(str(path),), column=self.column)


def _text_reference(path: pathlib.Path) -> list[str]:
    return _unpacked(path).decode().splitlines()


FORMATS = {
    "jsonl": Format("json", jsonl, _json_reference, ends=False, sums=False),
    **{
        f"jsonl.{kind}": Format("json", _packed(jsonl, pack), _json_reference)
        for kind, pack in PACK.items()
    },
    "jsonl.zip": Format("json", zipped(jsonl, "jsonl"), _zip_reference),
    "json": Format("json", json_list, lambda path: pd.read_json(path)["text"].tolist(), sums=False),
    "csv": Format("csv", table, _csv_reference, ends=False, sums=False),
    "csv.gz": Format("csv", _packed(table, PACK["gz"]), _csv_reference),
    "csv.zst": Format("csv", _packed(table, PACK["zst"]), _csv_reference),
    "txt": Format("text", lines, _text_reference, ends=False, sums=False),
    "txt.bz2": Format("text", _packed(lines, PACK["bz2"]), _text_reference),
    "txt.zst": Format("text", _packed(lines, PACK["zst"]), _text_reference),
    "stream.arrow": Format(
        "arrow", arrow_stream, lambda path: pa.ipc.open_stream(path.read_bytes()).read_all()["text"].to_pylist(),
        sums=False,
    ),
    "file.arrow": Format(
        "arrow", arrow_file, lambda path: pa.ipc.open_file(path.read_bytes()).read_all()["text"].to_pylist(), sums=False
    ),
    "parquet": Format("parquet", parquet, lambda path: pq.read_table(path)["text"].to_pylist()),
    "samples.tar": Format("webdataset", samples, _tar_reference, sums=False, column="txt"),
    **{
        # The checksum of a compressed tar comes at its end, after the members have been yielded.
        suffix: Format("", _packed(shard, pack), _tar_reference, sums=False)
        for suffix, pack in {**COMPRESS, "tar.xz": lzma.compress}.items()
    },
}  # fmt: skip


def read(config: SourceConfig) -> tuple[list[str], Exception | None]:
    """The documents of the only file of a source, and the error that ended reading, if any."""
    found: list[str] = []
    try:
        source = config.resolve()
        for block in source.open(0, 0):
            found += block["text"]
    except (CorruptError, UserError) as error:
        return found, error
    return found, None
