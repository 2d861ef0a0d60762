"""Tar shards for tests: archives of any members, with four compressions, in one or several streams."""

import bz2
import gzip
import io
import json
import tarfile
from collections.abc import Callable, Sequence

import zstandard

Member = tuple[str, bytes]

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "tar": lambda data: data,
    "tar.gz": lambda data: gzip.compress(data, 6, mtime=0),
    "tar.bz2": bz2.compress,
    "tar.zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}


def tar(members: Sequence[Member], **options: int) -> bytes:
    """Names ending in "/" are folders. options: Of tarfile, such as its format."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", **options) as archive:  # pyright: ignore[reportCallIssue, reportArgumentType]
        for name, data in members:
            info = tarfile.TarInfo(name.rstrip("/"))
            if name.endswith("/"):
                info.type = tarfile.DIRTYPE
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def shard(texts: Sequence[str], first: int = 0) -> bytes:
    """A .json member for each text, with its number as another key, next to a member that is not a document."""
    members: list[Member] = []
    for number, text in enumerate(texts, first):
        document = {"text": text, "number": number}
        members += [(f"{number:05d}.json", json.dumps(document).encode()), (f"{number:05d}.cls", b"7")]
    return tar(members)
