"""Members of tar archives in order, compressed or not; an archive that is cut short anywhere is an error.

Python's tarfile ends a stream in silence at a damaged header and at a missing end, and its compressed modes pass over
a cut tail; here every one of these raises. Members are read, and never written anywhere.
"""

import tarfile
from collections.abc import Iterator
from typing import IO, Any

from jaxtrain.data.io.byte_ranges import Bytes, RangeBuffer, RangeFile
from jaxtrain.data.io.compression import DamagedError, Decoded, format_of

_PIECE = 1 << 22  # bytes of a request
_BLOCK = tarfile.BLOCKSIZE


class BrokenError(tarfile.TarError, DamagedError):
    """The archive's bytes make no sense. (tarfile's own errors mean the same.)"""


def members(source: Bytes) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, content) of every regular file, the content to be read (or not) before the next one.

    Decoded by what the file begins with: plain tar, gzip, bzip2, xz, zstd or lz4, each of several streams too.

    Raises tarfile.TarError and DamagedError for what is no whole archive (also where a content is read), and
    TransientError and UserError as they come.
    """
    file = RangeFile(RangeBuffer(source, lambda position: position + _PIECE, keep=1))
    kind = format_of(file.read(16))
    file.seek(0)
    stream: Any = file if kind is None else Decoded(file, kind)
    with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Info) as tar:
        while (member := tar.next()) is not None:
            if member.isreg():
                content = tar.extractfile(member)
                assert content is not None
                yield member.name, content
            # It remembers all: 100 MB in a shard of 100,000.
            tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - typeshed has only what is documented
        _check_end(tar.fileobj)


class _Info(tarfile.TarInfo):
    """Where tarfile takes what is no header for the archive's end, this says so."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except _EndOfArchive:
            raise
        except _HeaderError as error:
            raise BrokenError(f"no whole archive: {error} at byte {tarfile.offset:,} of the tar") from None
        except (ValueError, LookupError, OverflowError) as error:
            raise BrokenError(f"a damaged header at byte {tarfile.offset:,} of the tar ({error})") from None


# For where `tarfile` is an archive.
_EndOfArchive = tarfile.EOFHeaderError  # pyright: ignore[reportAttributeAccessIssue] - as above
_HeaderError = tarfile.HeaderError


def _check_end(stream: Any) -> None:
    """After one block of zeros: at least another one, and then nothing else (POSIX, pax interchange format)."""
    length = 0
    while data := stream.read(1 << 16):
        if data.count(0) != len(data):
            raise BrokenError("there is more after the archive's end (archives that were joined? cut them again)")
        length += len(data)
    if length < _BLOCK:
        raise BrokenError("the archive's end mark is cut short")
