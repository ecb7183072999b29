"""TensorBoard event files, written by hand: numbers and pictures by step.

The file is a row of records, each (length, checksum, bytes, checksum), the bytes a protocol buffer message Event; format
from TensorFlow's tfrecord documentation and tensorflow/core/util/event.proto, framework/summary.proto.
"""

import os
import socket
import struct
import time
from pathlib import Path

_POLYNOMIAL = 0x82F63B78  # CRC-32C (Castagnoli), reversed
_VARINT, _DOUBLE, _BYTES, _FLOAT = 0, 1, 2, 5  # wire types


class EventWriter:
    """Appends to a file of its own in `folder`; what is written is on disk after `flush`."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "ab")
        self._write(_field(1, _DOUBLE, time.time()) + _field(3, _BYTES, b"brain.Event:2"))

    def scalar(self, tag: str, step: int, value: float) -> None:
        self._summary(step, _field(1, _BYTES, tag.encode()) + _field(2, _FLOAT, value))

    def image(self, tag: str, step: int, png: bytes, *, width: int, height: int) -> None:
        picture = (
            _field(1, _VARINT, height) + _field(2, _VARINT, width) + _field(3, _VARINT, 3) + _field(4, _BYTES, png)
        )
        self._summary(step, _field(1, _BYTES, tag.encode()) + _field(4, _BYTES, picture))

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.close()

    def _summary(self, step: int, value: bytes) -> None:
        summary = _field(1, _BYTES, value)
        self._write(_field(1, _DOUBLE, time.time()) + _field(2, _VARINT, step) + _field(5, _BYTES, summary))

    def _write(self, event: bytes) -> None:
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked(length) + event + _masked(event))


def crc32c(data: bytes) -> int:
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


def _masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _field(number: int, wire: int, value) -> bytes:
    """One field of a protocol buffer message."""
    key = _varint(number << 3 | wire)
    if wire == _VARINT:
        return key + _varint(value)
    if wire == _BYTES:
        return key + _varint(len(value)) + value
    return key + struct.pack("<d" if wire == _DOUBLE else "<f", value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def _row(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (_POLYNOMIAL if byte & 1 else 0)
    return byte


_TABLE = [_row(byte) for byte in range(256)]
