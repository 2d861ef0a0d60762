"""TensorBoard event files, written without TensorFlow, tensorboardX or protobuf.

A file is a series of records, each a protocol buffer of type Event. The formats are in TensorFlow's sources:
core/lib/io/record_writer.h (a record), core/util/event.proto, core/framework/summary.proto and tensor.proto.

Libraries import torch, boto3 and Google's clients where those are installed: half of the imports of a start.
"""

import pathlib
import socket
import struct
import time
from collections.abc import Mapping

_LARGEST = 3.4e38  # in 32 bits
_DT_STRING = 7
_SESSION_START = 1


class EventFile:
    """A new event file in a folder, unbuffered: `write` raises OSError if the disk is full.

    Args:
        folder: An existing folder on a local disk.
        step: The first step to come. Events of other files from it on, of a run before a restart, are hidden.
    """

    def __init__(self, folder: pathlib.Path, step: int):
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._file = open(folder / name, "ab", buffering=0)  # noqa: SIM115
        self._write(0, _field(3, b"brain.Event:2"))
        self._write(step, _field(7, _field(1, _SESSION_START)))

    def write(self, step: int, scalars: Mapping[str, float], texts: Mapping[str, str]) -> None:
        """Writes values by tag. Texts are Markdown."""
        values = [_field(1, tag.encode()) + _field(2, number) for tag, number in scalars.items()]
        for tag, text in texts.items():
            shape = _field(2, _field(2, _field(1, 1)))
            tensor = _field(1, _DT_STRING) + shape + _field(8, text.encode())
            metadata = _field(1, _field(1, b"text"))
            values.append(_field(1, f"{tag}/text_summary".encode()) + _field(9, metadata) + _field(8, tensor))
        self._write(step, _field(5, b"".join(_field(1, value) for value in values)))

    def close(self) -> None:
        self._file.close()

    def _write(self, step: int, what: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + _field(2, step) + what  # field 1: a double
        length = struct.pack("<Q", len(event))
        # One call per record, so that readers of the file see whole ones.
        self._file.write(length + _masked_checksum(length) + event + _masked_checksum(event))


def _field(number: int, value: bytes | int | float) -> bytes:
    """A field of a protocol buffer: a non-negative integer, a 32-bit float, or bytes (also a string or a message)."""
    if isinstance(value, bytes):
        return _varint(number << 3 | 2) + _varint(len(value)) + value
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 5) + struct.pack("<f", max(-_LARGEST, min(value, _LARGEST)))


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes((*found, value))


def _crc32c_table() -> list[int]:
    table = list(range(256))
    for _ in range(8):
        table = [entry >> 1 ^ (0x82F63B78 if entry & 1 else 0) for entry in table]
    return table


_TABLE = _crc32c_table()


def _masked_checksum(data: bytes) -> bytes:
    """CRC-32C, rotated and offset as TFRecord files have it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF)
