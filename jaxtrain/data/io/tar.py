"""Members of tar archives in order, compressed or not. A truncated archive is an error.

Python's tarfile silently ends a stream at a damaged header or a missing end marker, and its compressed modes ignore a
truncated tail. Here all of these raise. Members are only read, never extracted to disk.
"""

import tarfile
from collections.abc import Iterator
from typing import IO, Any

from jaxtrain.data.io.byte_ranges import Bytes, RangeBuffer, RangeFile
from jaxtrain.data.io.compression import DamagedError, Decoded, format_of

_REQUEST = 1 << 22  # bytes per request
_BLOCK = tarfile.BLOCKSIZE


class BrokenError(tarfile.TarError, DamagedError):
    """The archive is malformed. (tarfile's own errors mean the same.)"""


def members(source: Bytes) -> Iterator[tuple[str, IO[bytes]]]:
    """Yields (name, content) of every regular file. Read the content before advancing to the next member, or skip it.

    The magic bytes select the decoder: plain tar, gzip, bzip2, xz, zstd or lz4, including concatenated streams.

    Raises:
        tarfile.TarError, DamagedError: The archive is damaged or truncated. Reads of the content raise these too.
        TransientError, UserError: From `source`, unchanged.
    """
    file = RangeFile(RangeBuffer(source, lambda position: position + _REQUEST, keep=1))
    kind = format_of(file.read(16))
    file.seek(0)
    stream: Any = file if kind is None else Decoded(file, kind)
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Info) as tar:
        while (member := tar.next()) is not None:
            if member.isreg():
                content = tar.extractfile(member)
                assert content is not None
                yield member.name, content
            # tarfile keeps every member: 100 MB for a shard of 100,000 members.
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - typeshed covers only documented names
        _check_end(tar.fileobj)


class _Info(tarfile.TarInfo):
    """Raises at an invalid header, where tarfile would assume the end of the archive."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except _EndOfArchive:
            raise
        except _HeaderError as error:
            raise BrokenError(f"not a complete archive: {error} at byte {tarfile.offset:,} of the tar") from None
        except (ValueError, LookupError, OverflowError) as error:
            raise BrokenError(f"a damaged header at byte {tarfile.offset:,} of the tar ({error})") from None


# Aliases for `_Info.fromtarfile`, whose parameter `tarfile` shadows the module.
_EndOfArchive = tarfile.EOFHeaderError  # pyright: ignore[reportAttributeAccessIssue] - as above
_HeaderError = tarfile.HeaderError


def _check_end(stream: Any) -> None:
    """Checks that at least one more zero block and nothing else follows (POSIX, pax interchange format)."""
    length = 0
    while data := stream.read(1 << 16):
        if data.count(0) != len(data):
            raise BrokenError("there is data after the archive's end (concatenated archives? split them)")
        length += len(data)
    if length < _BLOCK:
        raise BrokenError("the archive's end marker is truncated")
