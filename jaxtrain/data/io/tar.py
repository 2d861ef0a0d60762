"""Members of tar archives in order, compressed or not; an archive that is cut short anywhere is an error.

Python's tarfile ends a stream in silence at a damaged header and at a missing end, and its compressed modes pass over
a cut tail; here every one of these raises. Members are read, and never written anywhere.
"""

import bz2
import tarfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from jaxtrain.data.io.byte_ranges import Bytes, Pieces, RangeFile

_PIECE = 1 << 22  # bytes of a request
_INPUT = 1 << 16  # compressed bytes that are decoded at once: bounds what they may become
_BLOCK = tarfile.BLOCKSIZE
_ZSTD_WINDOW = 1 << 31  # what `zstd --long=31` needs; the library's own limit is 128 MB


class BrokenError(tarfile.TarError):
    """The archive's bytes make no sense. (tarfile's own errors mean the same.)"""


def members(source: Bytes) -> Iterator[tuple[str, IO[bytes]]]:
    """(name, content) of every regular file, the content to be read (or not) before the next one.

    Decoded by what the file begins with: plain tar, gzip, bzip2 or zstd, each of several streams too.

    Raises tarfile.TarError for what is no whole archive (also where a content is read), and TransientError and
    UserError as they come.
    """
    file = RangeFile(Pieces(source, lambda position: position + _PIECE, keep=1))
    decoder = _decoder(file.read(4))
    file.seek(0)
    stream: Any = file if decoder is None else _Decoded(file, decoder)
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


def _decoder(magic: bytes) -> Callable[[], Any] | None:
    """What makes a decoder for one stream of a file that begins so; None for a tar."""
    if magic.startswith(b"\x1f\x8b"):
        return lambda: zlib.decompressobj(wbits=31)
    if magic.startswith(b"BZh"):
        return bz2.BZ2Decompressor
    # A frame, or one to be skipped (RFC 8878, section 3.1).
    if magic == b"\x28\xb5\x2f\xfd" or (magic[1:] == b"\x2a\x4d\x18" and magic[0] >> 4 == 5):
        import zstandard

        return lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
    return None


class _Decoded:
    """What the streams of a compressed file hold, one after the other. Raises BrokenError where one is cut short."""

    def __init__(self, file: RangeFile, make: Callable[[], Any]):
        self._file, self._make = file, make
        self._decoder: Any = None
        self._input = b""
        self._decoded, self._at = b"", 0  # what the last input became, and how much of it was given away

    def read(self, size: int) -> bytes:
        """1 to `size` bytes; none at the end."""
        while self._at == len(self._decoded):
            self._input = self._input or self._file.read(_INPUT)
            if not self._input:
                if self._decoder is not None:
                    raise BrokenError("its compressed data is cut short")
                return b""
            self._decode()
        # tarfile copies what it got more than it asked for at each of its reads: 64 kB may become 100 MB.
        data = self._decoded[self._at : self._at + size]
        self._at += len(data)
        return data

    def _decode(self) -> None:
        self._decoder = self._decoder or self._make()
        try:
            self._decoded, self._at = self._decoder.decompress(self._input), 0
        except Exception as error:  # zlib.error, OSError, ZstdError: nothing but decoding is done here
            raise BrokenError(f"its compressed data is damaged ({error})") from None
        self._input = b""
        if self._decoder.eof:
            self._input, self._decoder = self._decoder.unused_data, None
