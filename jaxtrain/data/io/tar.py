"""Members of tar archives in order, compressed or not. A truncated archive is an error.

Python's tarfile silently ends a stream at a damaged header or a missing end marker, and its compressed modes ignore a
truncated tail. Here all of these raise. Members are only read, never extracted to disk.
"""

import logging
import tarfile
from collections.abc import Iterator
from typing import IO, Any

from jaxtrain.data.io.byte_ranges import Bytes, RangeBuffer, RangeFile
from jaxtrain.data.io.compression import CutShortError, DamagedError, Decoded, format_of, rest_is_sound

_REQUEST = 1 << 22  # bytes per request
_BLOCK = tarfile.BLOCKSIZE

logger = logging.getLogger("jaxtrain")


class BrokenError(tarfile.TarError, DamagedError):
    """The archive is malformed. (tarfile's own errors mean the same.)"""


class Archive:
    """A tar archive, compressed or not.

    Args:
        source: Its bytes.
    """

    def __init__(self, source: Bytes):
        self._file = RangeFile(RangeBuffer(source, lambda position: position + _REQUEST, keep=1))
        self._decoded: Decoded | None = None
        self._what = source.what

    def is_sound(self, error: Exception) -> bool:
        """Whether what was read before an error is right, by the checksums of the compression."""
        return self._decoded is None or isinstance(error, CutShortError) or rest_is_sound(self._decoded)

    def members(self) -> Iterator[tuple[str, IO[bytes]]]:
        """Yields (name, content) of every regular file, once. Read the content before advancing, or skip it.

        The magic bytes select the decoder: plain tar, gzip, bzip2, xz, zstd or lz4, including concatenated streams.

        Raises:
            tarfile.TarError, DamagedError: The archive is damaged or truncated. Reads of the content raise these too.
            TransientError, UserError: From the source, unchanged.
        """
        kind = format_of(self._file.read(16))
        self._file.seek(0)
        self._decoded = None if kind is None else Decoded(self._file, kind)
        stream: Any = self._decoded or self._file
        links = 0
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_Info) as tar:
            while (member := tar.next()) is not None:
                if member.isreg():
                    content = tar.extractfile(member)
                    assert content is not None
                    yield member.name, content
                elif member.issym() or member.islnk():
                    links += 1
                # tarfile keeps every member: 100 MB for a shard of 100,000 members.
                tar.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - typeshed covers only documented names
            _check_end(tar.fileobj)
        if links:
            # Their content may be in another place of the archive, which was read already.
            logger.warning("%s: skipped %d link(s). Archive files, not links to them.", self._what, links)


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
