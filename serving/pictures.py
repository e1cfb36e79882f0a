"""Decodes pictures from a browser, and makes JPEGs for it of pictures in the index.

Uploads cannot be trusted. So only formats of photographs are decoded, up to a number of pixels that
fits into memory, and up to a number of scans. The browser never gets a file itself, but a JPEG that
was encoded here.
"""

from __future__ import annotations

import io
import math
import os
import re
import threading
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
from PIL import Image

from dataset.base import decode, reason
from dataset.decoding import UnfitImageError, central_part
from machine import cores
from utils import InputError, MachineError, in_words

MOST_PIXELS = 120_000_000  # a phone's 108 megapixels, 0.4 GB once decoded
MOST_SCANS = 64
"""The most scans of a JPEG, each of which may draw all pixels again; progressive JPEGs have about
10. A scan of 150 bytes takes a quarter of a second, and an upload has room for 200,000."""
_FORMATS = "AVIF BMP GIF HEIF JPEG JXL MPO PNG PPM TIFF WEBP".split()

SIDES = {"thumbnail": 256, "image": 1280}
"""The longer side, in pixels, of pictures for the browser."""

JPEG_QUALITY = 85


def bound_pixels() -> None:
    """Makes Pillow refuse pictures of more than `MOST_PIXELS` in this process."""
    Image.MAX_IMAGE_PIXELS = MOST_PIXELS // 2  # Pillow warns above it, and refuses above twice it


def formats() -> list[str]:
    """Pillow's names of the accepted formats that it can decode on this machine."""
    return [name for name in _FORMATS if name in Image.OPEN]


# --- uploads --------------------------------------------------------------------------------------


class Crop(NamedTuple):
    """A part of a picture: its edges as shares of the width and the height, from the top left."""

    left: float
    top: float
    right: float
    bottom: float

    @classmethod
    def of(cls, text: str) -> Crop:
        """`0.1,0.2,0.9,1` → a crop.

        Raises:
            InputError: it is not four numbers, or not inside the picture, or has no area.
        """
        try:
            numbers = [float(part) for part in text.split(",")]
            crop = cls(*numbers)
        except (TypeError, ValueError):
            raise InputError(
                "crop is not of the form left,top,right,bottom; give four shares from 0 to 1"
            ) from None
        inside = 0 <= crop.left < crop.right <= 1 and 0 <= crop.top < crop.bottom <= 1
        if not inside:  # as are nan and inf
            raise InputError(
                "crop lies outside the picture or has no area; give left < right and top < bottom, "
                "all from 0 to 1"
            )
        return crop

    def cut(self, pixels: np.ndarray) -> np.ndarray:
        """(H, W, 3) → the pixels that the crop touches, at least one."""
        height, width = pixels.shape[:2]
        left, top = math.floor(self.left * width), math.floor(self.top * height)
        right, bottom = math.ceil(self.right * width), math.ceil(self.bottom * height)
        return pixels[top:bottom, left:right]


def query_pixels(source: bytes | str, upright: bool, crop: Crop | None) -> np.ndarray:
    """Decodes a file, or its bytes, to (H, W, 3) uint8 RGB for the network.

    Args:
        upright: whether to apply the EXIF orientation, as the run does. crop: of the picture after
            that.

    Raises:
        InputError: it is not a picture, or its format or size is not accepted.
        MachineError: the disk fails, or the process has too many open files.
    """
    try:
        if isinstance(source, bytes):
            _check_scans(source)
            source = io.BytesIO(source)
        pixels = decode(source, upright, formats())
    except MemoryError:
        raise InputError("the picture needs more memory than there is; save it smaller") from None
    except Exception as error:  # Pillow reports damage through a dozen unrelated types
        if in_words(error):  # of the machine; they would show where the file lies
            raise MachineError(
                f"the picture cannot be read at the moment ({reason(error)}); try again later, and "
                "if that does not help, check the server's disk and its permissions"
            ) from error
        raise InputError(
            f"the picture cannot be read ({reason(error)}); JPEG, PNG, WebP, AVIF, GIF, BMP and "
            "TIFF are accepted"
        ) from error
    return central_part(pixels if crop is None else crop.cut(pixels))


_SCAN = re.compile(rb"\xff\xda\x00(?:\x06\x00|\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)")
"""The beginning of a scan: its marker, the length of its head, and the number of channels."""


def _check_scans(content: bytes) -> None:
    """Raises UnfitImageError for a JPEG with more than `MOST_SCANS`."""
    scans = len(_SCAN.findall(content)) if content.startswith(b"\xff\xd8") else 0
    if scans > MOST_SCANS:
        raise UnfitImageError(
            f"it is drawn in {scans:,} scans, more than the limit of {MOST_SCANS}; save it again"
        )


# --- pictures of the index ------------------------------------------------------------------------


def as_jpeg(pixels: np.ndarray, side: int) -> bytes:
    """Encodes (H, W, 3) as a JPEG whose longer side is at most `side` pixels."""
    image = Image.fromarray(pixels)
    image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return file.getvalue()


class Shown:
    """The pictures of an index as JPEGs; those used last are kept in memory.

    Safe for threads; no more pictures are decoded at once than there are cores.
    """

    MOST_BYTES = 64_000_000

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._size = 0
        self._keeping = threading.Lock()
        self._decoding = threading.BoundedSemaphore(cores())

    @staticmethod
    def stamp(path: str) -> str | None:
        """A text that changes when the file at `path` does; None if there is no file."""
        try:
            found = os.stat(path)  # noqa: PTH116 (file names may be no Unicode)
        except (OSError, ValueError):
            return None
        return f"{found.st_mtime_ns:x}-{found.st_size:x}-{found.st_ino:x}"

    def jpeg(self, path: str, stamp: str, side: int, upright: bool) -> bytes:
        """The picture at `path` as a JPEG, its longer side at most `side` pixels.

        Raises:
            InputError: it cannot be read.
        """
        key = (f"{stamp} {path}", side)
        with self._keeping:
            if (kept := self._kept.get(key)) is not None:
                self._kept.move_to_end(key)
                return kept
        with self._decoding:
            made = as_jpeg(query_pixels(path, upright, None), side)
        with self._keeping:
            if key not in self._kept:
                self._kept[key] = made
                self._size += len(made)
            while self._size > self.MOST_BYTES:
                _, dropped = self._kept.popitem(last=False)
                self._size -= len(dropped)
        return made
