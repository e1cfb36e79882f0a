"""Facts about image files, for `check`: size, what is unusual, and why one cannot be read."""

from __future__ import annotations

import errno
import hashlib
import io
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from bars import Bar
from dataset.alike import thumbnail
from dataset.base import ImageSet
from dataset.decoding import (
    UnfitImageError,
    few_bits,
    has_transparency,
    need_picture,
    opened,
    orientation,
    reason,
    to_rgb,
)
from dataset.statuses import answers
from machine import cores

MOST_COMPARED = 250_000  # images whose thumbnails are kept: 3 kB each
_GREY_MODES = ("1", "L", "LA", "La")
_TURNED = range(2, 9)  # EXIF orientation 1 is upright
_BITS_PER_SAMPLE = 258  # a TIFF tag


class FileFacts(NamedTuple):
    """Facts about one image file.

    Attributes:
        digest: a hash of its bytes. size: width and height in pixels.
        traits: what is unusual about it, keys of `CONVERSIONS`.
        fault: a key of `FAULTS`; "" for a picture that can be used.
        error: the exact error, in words.
        thumbnail: (32, 32, 3) uint8, for the search for near duplicates.
        name: its name in the report: its path below the data set's folder, or as given in a table.
    """

    digest: bytes = b""
    size: tuple[int, int] = (0, 0)
    traits: tuple[str, ...] = ()
    fault: str = ""
    error: str = ""
    thumbnail: np.ndarray | None = None
    name: str = ""


MISSING, _CLOSED, _NO_FILE = "missing file", "file that may not be read", "no plain file"
_UNFIT, _DAMAGED = "picture that cannot be used as it is", "unreadable or truncated file"

_NOTHING_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)

# What is wrong with a file → what it means.
FAULTS = {
    MISSING: "listed, but not there; put it back, or unpack the archive again",
    _CLOSED: "change its permissions",
    _NO_FILE: "nothing is read from it; remove it",
    _UNFIT: "the file is sound; convert it, or install what reads it",
    _DAMAGED: "get it again",
}

ROTATION = "EXIF rotation"

# What is unusual about a file → what happens to it (see decoding.decode).
CONVERSIONS = {
    "grey": "repeated over the three channels",
    "CMYK": "converted to RGB",
    "16-bit": "reduced to 8 bits, the high byte",
    "32-bit": "reduced to 8 bits, as if it had 16",
    "8 or 12 bits in a deeper": "scaled by the bits of its values, or it would be nearly black",
    "palette": "colours looked up",
    "other colour space": "converted to RGB",
    "transparent": "laid on white",
    ROTATION: "turned upright, which the released programs do not do (--exif ignore)",
    "damaged metadata": "its pixels are used as they are, without the metadata",
    "animated": "the first frame is used",
}


def examine(path: str, upright: bool = True) -> FileFacts:
    """Read and decode one file, turned as its EXIF data say unless `upright` is False."""
    try:
        need_picture(path)
        content = Path(path).read_bytes()
    except UnfitImageError as error:
        return FileFacts(fault=_UNFIT, error=reason(error))
    except (OSError, ValueError) as error:
        return FileFacts(fault=_fault(error), error=reason(error))
    digest = hashlib.blake2b(content, digest_size=16).digest()
    if not content:
        return FileFacts(digest, fault=_DAMAGED, error="the file is empty")
    try:
        with opened(io.BytesIO(content), path) as (image, left_out):
            traits = tuple(_traits(image, content, left_out))
            pixels = to_rgb(image, upright)
    except UnfitImageError as error:
        return FileFacts(digest, fault=_UNFIT, error=reason(error))
    except Exception as error:  # Pillow raises a dozen unrelated types for damaged files
        return FileFacts(digest, fault=_DAMAGED, error=reason(error))
    height, width, _ = pixels.shape
    return FileFacts(digest, (width, height), traits, thumbnail=thumbnail(pixels))


def _fault(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return _CLOSED
    number = getattr(error, "errno", None)
    if isinstance(error, ValueError) or number in _NOTHING_THERE:
        return MISSING
    return _NO_FILE if number is None else _DAMAGED


def _traits(image: Image.Image, content: bytes, left_out: bool) -> Iterable[str]:
    if image.mode in _GREY_MODES or image.mode.startswith("I"):
        yield "grey"
    elif image.mode in ("P", "PA"):
        yield "palette"
    elif image.mode == "CMYK":
        yield "CMYK"
    elif image.mode not in ("RGB", "RGBA", "RGBa", "RGBX"):
        yield "other colour space"
    if image.mode.startswith("I") and few_bits(image.getextrema()[1]):
        yield "8 or 12 bits in a deeper"
    elif (bits := _bits(image, content)) > 8:
        yield "32-bit" if bits > 16 else "16-bit"
    if has_transparency(image):
        yield "transparent"
    turn, readable = orientation(image)
    if turn in _TURNED:
        yield ROTATION
    if left_out or not readable:
        yield "damaged metadata"
    if getattr(image, "is_animated", False):
        yield "animated"


def _bits(image: Image.Image, content: bytes) -> int:
    """Bits per sample in the file; Pillow silently reduces 16-bit colours."""
    if image.format == "PNG":
        return content[24]  # the bit depth in the header that every PNG begins with
    tags = getattr(image, "tag_v2", {})
    bits = max(np.atleast_1d(tags.get(_BITS_PER_SAMPLE, 8)).tolist())
    return max(bits, 16) if image.mode.startswith("I") else bits


def examine_pixels(pixels: np.ndarray) -> FileFacts:
    """The facts of an image in memory."""
    digest = hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=16).digest()
    height, width, _ = pixels.shape
    return FileFacts(digest, (width, height), thumbnail=thumbnail(pixels))


def examine_all(parts: dict[str, ImageSet], name: str) -> dict[str, FileFacts]:
    """Facts of every image, by path; a file listed in several splits is read once.

    With more than `MOST_COMPARED` images, thumbnails are not kept.
    """
    jobs: dict[str, Callable[[], FileFacts]] = {}
    names: dict[str, str] = {}
    for part in parts.values():
        names.update(zip(part.paths, part.paths.names(), strict=True))
        for index, path in enumerate(part.paths):
            if part.pixels is None:
                jobs.setdefault(path, partial(examine, path, part.upright))
            else:
                jobs.setdefault(path, lambda pixels=part.pixels[index]: examine_pixels(pixels))
    # Pillow and hashlib release the interpreter lock, so threads keep all cores busy.
    results = answers(lambda job: job(), list(jobs.values()), cores())
    found, few = {}, len(jobs) <= MOST_COMPARED
    with Bar(name, len(jobs)) as bar:
        for path, fact in zip(jobs, results, strict=True):
            thumbnail = fact.thumbnail if few else None
            found[path] = fact._replace(name=names[path], thumbnail=thumbnail)
            bar.update()
    return found
