"""Compressed files as byte streams that detect truncation.

The usual file objects (gzip, zstandard, fsspec's) handle a truncated file differently: some raise, some end silently
at the cut or at an earlier frame. Here a stream ends only where its decoder reports that it is complete.
"""

import bz2
import io
import lzma
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from typing import IO, Any

from jaxtrain.errors import UserError

_INPUT = 1 << 12  # compressed bytes decoded at a time: small, to return all data before damage and to bound memory
_LOOK = 1 << 26  # decoded bytes to look at after an error
_ZSTD_WINDOW = 1 << 31  # required by `zstd --long=31`; the library's default limit is 128 MB

# Suffix → format, as in the datasets library.
_SUFFIXES = {
    "gz": "gzip",
    "gzip": "gzip",
    "tgz": "gzip",
    "bz2": "bzip2",
    "xz": "xz",
    "zst": "zstd",
    "zstd": "zstd",
    "lz4": "lz4",
    "zip": "zip",
}
# Magic bytes of each format. No text starts with them: all but bzip2's contain non-text bytes, and bzip2's are long.
_MAGIC = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bzip2": re.compile(rb"BZh[1-9](1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    # A frame or a skippable frame (RFC 8878, section 3.1).
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", re.DOTALL),
    "lz4": re.compile(rb"\x04\x22\x4d\x18"),
    "zip": re.compile(rb"PK(\x03\x04|\x05\x06|\x07\x08)"),
}
_PADDED = ("gzip", "xz")  # zero padding may follow, as on tapes


class DamagedError(Exception):
    """The bytes violate their format."""


class CutShortError(DamagedError):
    """The file is truncated. All data read before the cut is valid."""


def format_of(head: bytes, name: str = "") -> str | None:
    """Detects the compression of a file from its magic bytes, and checks it against the name.

    Args:
        head: The first 10 bytes or more.
        name: The file's name.

    Returns:
        The format, or None for an uncompressed file.

    Raises:
        DamagedError: The suffix names a compression, but the content is not compressed.
    """
    path = name.split("?")[0] if "://" in name else name
    # Matches x.jsonl.gz and x.jsonl.gz-00000-of-00010.
    suffix = re.split("[_-]", path.rsplit(".", 1)[-1])[0].lower() if "." in path else ""
    found = next((kind for kind, magic in _MAGIC.items() if magic.match(head)), None)
    if (named := _SUFFIXES.get(suffix)) is not None and found is None:
        raise DamagedError(f"it is empty, not a {named} file" if not head else f"it does not begin like a {named} file")
    return found


def streams(file: Any, name: str = "") -> Iterator[io.BufferedReader]:
    """Yields the decoded content of a file: one stream, or one per member of a zip archive.

    Args:
        file: A seekable binary file, positioned at its start.
        name: The file's name; its suffix names the compression.

    Raises:
        DamagedError: The file is damaged. Reads from the streams raise it too.
        UserError: The format needs a password or a package that is not installed.
    """
    kind = format_of(file.read(16), name)
    file.seek(0)
    if kind == "zip":
        yield from _members(file)
    else:
        yield io.BufferedReader(file if kind is None else Decoded(file, kind), _INPUT)


def _members(file: Any) -> Iterator[io.BufferedReader]:
    """Yields zip members in the datasets library's order: a folder's files first, then its subfolders."""

    def order(member: zipfile.ZipInfo) -> list[tuple[bool, str]]:
        *folders, name = member.filename.split("/")
        return [*((True, folder) for folder in folders), (False, name)]

    try:
        archive = zipfile.ZipFile(file)
    except zipfile.BadZipFile as error:
        raise DamagedError(f"it is not a complete zip archive ({error})") from None
    for info in sorted(archive.infolist(), key=order):  # by their entries: two members may have one name
        path = info.filename
        if path.endswith("/") or any(part.startswith((".", "__")) for part in path.split("/")):
            continue
        try:
            member = archive.open(info)
        except zipfile.BadZipFile as error:
            raise DamagedError(f"the zip archive's member {path} is damaged ({error})") from None
        except (NotImplementedError, RuntimeError) as error:  # an unsupported method or a password
            raise UserError(f"the zip archive's member {path} cannot be read: {error}") from None
        yield io.BufferedReader(_Member(member), _INPUT)


class _Member(io.RawIOBase):
    """A member of a zip archive. Reading to its end verifies its checksum."""

    def __init__(self, member: IO[bytes]):
        self._member = member
        self._failed: DamagedError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = b""
        try:
            data = data if self._failed else self._member.read(len(buffer))
        except (zipfile.BadZipFile, zlib.error, EOFError, lzma.LZMAError, OSError) as error:  # OSError: bzip2's
            self._failed = DamagedError(f"a member of the zip archive is damaged ({error})")
        if self._failed:
            raise self._failed
        buffer[: len(data)] = data
        return len(data)


class Decoded(io.RawIOBase):
    """The concatenated content of all compressed streams in a file.

    Args:
        file: The compressed file, positioned at its start.
        kind: The format, as returned by `format_of`.
    """

    def __init__(self, file: Any, kind: str):
        self._file, self._kind = file, kind
        self._make = _maker(kind)
        self._decoder: Any = None
        self._streams = 0  # complete streams so far
        self._input = b""
        self._decoded, self._at = b"", 0  # the last decoded chunk, and the read position in it
        self._failed: DamagedError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def read(self, size: int = -1) -> bytes:
        """Returns 1 to `size` bytes, or none at the end. After a DamagedError, every further read raises it again."""
        if self._failed is not None:
            raise self._failed
        try:
            while self._at == len(self._decoded):
                self._input = self._input or self._file.read(_INPUT)
                if not self._input:
                    if self._decoder is not None:
                        raise CutShortError("its compressed data is truncated")
                    return b""
                if self._decoder is None and self._streams and self._kind in _PADDED:
                    self._input = self._input.lstrip(b"\0")
                if self._input:
                    self._decode()
        except DamagedError as error:
            self._failed = error
            raise
        # Return at most `size` bytes: readers copy any excess on each read, and 64 kB may decompress to 100 MB.
        data = self._decoded[self._at :] if size < 0 else self._decoded[self._at : self._at + size]
        self._at += len(data)
        return data

    def _decode(self) -> None:
        self._decoder = self._decoder or self._make()
        try:
            self._decoded, self._at = self._decoder.decompress(self._input), 0
        except Exception as error:  # zlib.error, OSError, ZstdError, ...: only decoding can raise here
            raise DamagedError(f"its compressed data is damaged ({error})") from None
        self._input = b""
        if self._decoder.eof:
            self._input, self._decoder = self._decoder.unused_data, None
            self._streams += 1


def rest_is_sound(stream: Any) -> bool:
    """Whether a compressed stream goes on without damage for 64 MB. If not, what was read may be wrong, too."""
    left = _LOOK
    try:
        while left > 0 and (data := stream.read(_INPUT)):
            left -= len(data)
    except DamagedError:
        return False
    return True


def _maker(kind: str) -> Callable[[], Any]:
    """Returns a factory of decoders, each for one stream of the format."""
    if kind == "gzip":
        return lambda: zlib.decompressobj(wbits=31)
    if kind == "bzip2":
        return bz2.BZ2Decompressor
    if kind == "xz":
        return lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ)
    if kind == "zstd":
        import zstandard

        return lambda: zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
    if kind == "lz4":
        try:
            import lz4.frame  # pyright: ignore[reportMissingImports] - not among the requirements
        except ImportError:
            raise UserError("it is compressed with lz4, which needs a package: pip install lz4") from None
        return lz4.frame.LZ4FrameDecompressor
    raise UserError(f"it is compressed with {kind}, which cannot be read as a stream. Decompress it.")
