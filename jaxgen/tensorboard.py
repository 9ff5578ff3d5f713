"""TensorBoard event files: scalars and pictures, written without TensorFlow or a package for it.

A file is a row of records, each the length of its content, a checksum of that, the content and a checksum of
it; the content is an `Event` in protocol buffers' wire format (tensorflow/core/util/event.proto and
core/framework/summary.proto give the field numbers below). The packages that write such files import torch
where that is installed, which takes seconds, and write from a thread which dies on a full disk, whereupon the
training loop waits for it for ever.
"""

from __future__ import annotations

import io
import os
import struct
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from jaxgen.workdir import append

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5  # wire types


class EventFile:
    """A new event file in `directory`; events of older files there from `first_step` on are disowned.

    That is what a run needs which goes on from a checkpoint older than its last event. Events reach the file
    at once, in the caller's thread; a disk that refuses raises OSError.
    """

    def __init__(self, directory: Path, first_step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        # TensorBoard reads files in the order of their names.
        path = directory / f"events.out.tfevents.{time.time_ns()}.{os.getpid()}"
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed by close)
        self._write(0, _field(3, b"brain.Event:2"))
        self._write(first_step, _field(7, _field(1, 1)))  # session_log { status: START }

    def _write(self, step: int, content: bytes) -> None:
        event = _tag(1, _FIXED64) + struct.pack("<d", time.time()) + _field(2, step) + content
        length = struct.pack("<Q", len(event))
        append(self._file, length + _checksum(length) + event + _checksum(event))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        self._write(step, _field(5, b"".join(_scalar(name, value) for name, value in values.items())))

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Adds a picture, uint8 [H, W, C] with C of 1 or 3."""
        height, width, channels = image.shape
        buffer = io.BytesIO()
        Image.fromarray(image[..., 0] if channels == 1 else image).save(buffer, format="PNG")
        size = _field(1, height) + _field(2, width) + _field(3, channels)
        picture = _field(4, size + _field(4, buffer.getvalue()))
        self._write(step, _field(5, _field(1, _field(1, name.encode()) + picture)))

    def close(self) -> None:
        self._file.close()


def _scalar(name: str, value: float) -> bytes:
    with np.errstate(over="ignore"):  # what float32 cannot hold is shown as infinite
        single = np.asarray(value).astype("<f4").tobytes()
    return _field(1, _field(1, name.encode()) + _tag(2, _FIXED32) + single)


def _tag(number: int, wire_type: int) -> bytes:
    return _varint(number << 3 | wire_type)


def _field(number: int, value: int | bytes) -> bytes:
    """One field of a message: a whole number >= 0, or bytes, which a string or an inner message are too."""
    if isinstance(value, int):
        return _tag(number, _VARINT) + _varint(value)
    return _tag(number, _BYTES) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first; the top bit says that more follow."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


_CRC_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """The Castagnoli CRC of RFC 3720, appendix B.4."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _CRC_TABLE[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF


def _checksum(data: bytes) -> bytes:
    """The CRC, rotated and shifted as the format wants it, so that a CRC of a CRC is not degenerate."""
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)
