"""Checks whether a file looks like a whole picture, without decoding it.

Pillow reads its header, and its end is compared with that of its format. A file that was cut short
in a transfer, or filled with zeros because the disk was full, ends differently. A file that does
not look whole may still be sound (cameras write more after a JPEG's end), and one that does may be
damaged in its middle: only decoding tells.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from dataset.decoding import need_file

_TAIL = 64  # bytes


def looks_whole(path: str | os.PathLike[str]) -> bool:
    """Whether Pillow knows the file's header, and the file ends as its format does.

    False for formats without a mark at their end, such as TIFF.
    """
    try:
        need_file(path)
        with Path(path).open("rb") as file:
            with Image.open(file) as image:  # does not close the file
                ends = _ENDS.get(image.format or "")
            return ends is not None and ends(file)
    except Exception:  # Pillow raises a dozen unrelated types for damaged files
        return False


def _tail(file: BinaryIO) -> bytes:
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _TAIL))
    return file.read()


def _jpeg(file: BinaryIO) -> bool:
    """Ends in its marker, which zeros may follow."""
    return _tail(file).rstrip(b"\0").endswith(b"\xff\xd9")


def _png(file: BinaryIO) -> bool:
    return _tail(file).endswith(b"IEND\xaeB`\x82")


def _gif(file: BinaryIO) -> bool:
    return _tail(file).rstrip(b"\0").endswith(b"\0;")  # the end of the last block, and the trailer


def _riff(file: BinaryIO) -> bool:
    """WebP has its length in its header."""
    file.seek(4)
    (length,) = struct.unpack("<I", file.read(4))
    return length + 8 <= file.seek(0, os.SEEK_END)


def _bmp(file: BinaryIO) -> bool:
    file.seek(2)
    (length,) = struct.unpack("<I", file.read(4))
    return 0 < length <= file.seek(0, os.SEEK_END)


def _boxes(file: BinaryIO) -> bool:
    """AVIF and HEIC are consecutive boxes, each of which begins with its length."""
    size, start = file.seek(0, os.SEEK_END), 0
    while start < size:
        file.seek(start)
        head = file.read(16)
        if len(head) < 8:
            return False
        length = struct.unpack(">I", head[:4])[0]
        if length == 1:  # the length has 64 bits
            length = int.from_bytes(head[8:16], "big")
        if length == 0:  # up to the end of the file
            return True
        if length < 8:
            return False
        start += length
    return start == size


_ENDS: dict[str, Callable[[BinaryIO], bool]] = {
    "JPEG": _jpeg,
    "MPO": _jpeg,
    "PNG": _png,
    "GIF": _gif,
    "WEBP": _riff,
    "BMP": _bmp,
    "AVIF": _boxes,
    "HEIF": _boxes,
}
