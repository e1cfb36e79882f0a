"""Decodes image files to RGB pixels, and says why a file cannot be decoded.

Three things can be wrong with a file, and each has its own error message: it is damaged
(`BadImageError`); it is sound but not supported (`UnfitImageError`: a format without a decoder,
numbers without an agreed white, too many pixels); or it is no file (a folder, a named pipe, a
device). Damaged metadata is no error: the pixels are used without it.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
import stat
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

from storage import in_bytes

Source = str | os.PathLike[str] | BinaryIO


class UnfitImageError(ValueError):
    """A sound picture that cannot be used as it is; the message says why and what to do."""


class BadImageError(OSError):
    """An image file that cannot be decoded; `path` and `reason` say which and why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.reason)


def reason(error: BaseException) -> str:
    """The message of an exception about a file, in one line, without the path, never empty."""
    if isinstance(error, UnidentifiedImageError):
        return "no picture, or its beginning is damaged"
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__


# --- files ----------------------------------------------------------------------------------------

_NO_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe (FIFO)",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def need_file(path: str | os.PathLike[str]) -> None:
    """Raise OSError unless `path` is a plain file: reading a named pipe could wait for ever."""
    kind = stat.S_IFMT(os.stat(path).st_mode)  # noqa: PTH116 (a Path object costs more than stat)
    if kind != stat.S_IFREG:
        raise OSError(f"it is {_NO_FILES.get(kind, 'something else')}, not a file")


MOST_BYTES = 2**32
"""The limit for a picture's file, more than any picture with `Image.MAX_IMAGE_PIXELS` needs. Files
that Pillow does not know, or with damaged metadata, are read whole."""


def need_picture(path: str | os.PathLike[str]) -> None:
    """`need_file`, and raise UnfitImageError for a file that is too large to be a picture."""
    need_file(path)
    size = os.stat(path).st_size  # noqa: PTH116
    if size > MOST_BYTES:
        raise UnfitImageError(
            f"its {in_bytes(size)} are more than the limit of {in_bytes(MOST_BYTES)}; save it "
            "smaller, if it is a picture"
        )


# --- formats that Pillow reads with help ----------------------------------------------------------


class _Plugin(NamedTuple):
    """A package that adds a format to Pillow.

    Attributes:
        module: its module. register: the function in it that adds the format; None if importing
            does. itself: the version of Pillow that needs no package, if there is one.
    """

    package: str
    module: str
    register: str | None
    itself: str = ""


_HEIF = _Plugin("pillow-heif", "pillow_heif", "register_heif_opener")
_AVIF = _Plugin("pillow-avif-plugin", "pillow_avif", None, "Pillow 11.3 or newer")
_JXL = _Plugin("pillow-jxl-plugin", "pillow_jxl", None)
_PLUGINS = {"HEIC": _HEIF, "AVIF": _AVIF, "JPEG XL": _JXL}

_SUFFIXES = {
    **dict.fromkeys((".heic", ".heif", ".heics", ".heifs", ".hif"), "HEIC"),
    **dict.fromkeys((".avif", ".avifs"), "AVIF"),
    ".jxl": "JPEG XL",
    ".svg": "SVG",
}
_BRANDS = {
    **dict.fromkeys((b"avif", b"avis"), "AVIF"),
    **dict.fromkeys((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1"), "HEIC"),
}


_PROGRAMS = {"EPS"}
"""Pillow's names of formats for which it starts another program (Ghostscript) that executes the
file. Any file may have such a format, whatever its name."""


def _own_formats() -> list[str]:
    """The formats that Pillow decodes without another program, in the order of its attempts."""
    return [name for name in Image.ID if name not in _PROGRAMS]


def _has_decoder(known: str) -> bool:
    return any(_SUFFIXES.get(suffix) == known for suffix in Image.EXTENSION)


def _register_plugins() -> None:
    """Add the formats that Pillow lacks and an installed plugin has."""
    Image.init()
    for known, plugin in _PLUGINS.items():
        if _has_decoder(known):
            continue
        with contextlib.suppress(ImportError, AttributeError):
            module = importlib.import_module(plugin.module)
            if plugin.register is not None:
                getattr(module, plugin.register)()


_register_plugins()


def _format_of(head: bytes, name: str) -> str | None:
    """The format of a file that Pillow does not know, by its first bytes or by its name."""
    if head[4:8] == b"ftyp":
        size = struct.unpack(">I", head[:4])[0]
        brands = {head[start : start + 4] for start in (8, *range(16, min(size, len(head)), 4))}
        return next((known for brand, known in _BRANDS.items() if brand in brands), None)
    if head.startswith((b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")):
        return "JPEG XL"
    if b"<svg" in head:
        return "SVG"
    if head.startswith((b"%!PS", b"\xc5\xd0\xd3\xc6")):
        return "PostScript"
    return _SUFFIXES.get(Path(name).suffix.lower())


def _check_support(content: bytes, name: str) -> None:
    """Raise UnfitImageError if Pillow lacks a decoder for the format of this file."""
    known = _format_of(content[:512], name)
    if not content or known is None or _has_decoder(known):
        return
    if known not in _PLUGINS:
        raise UnfitImageError(f"{known} pictures have no pixels; save it as PNG")
    package, itself = _PLUGINS[known].package, _PLUGINS[known].itself
    install = f"`pip install {package}`"
    if itself:
        package, install = (
            f"{itself}, or {package}",
            f"`pip install --upgrade pillow`, or {install}",
        )
    raise UnfitImageError(f"{known} pictures need {package}; {install}, or save it as JPEG or PNG")


# --- pixels ---------------------------------------------------------------------------------------

_ORIENTATION = 0x0112
_EXIF_KEYS = {"exif", "xmp", "Raw profile type exif", "XML:com.adobe.xmp"}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(
    source: Source, upright: bool = True, formats: Sequence[str] | None = None
) -> np.ndarray:
    """An image file → (H, W, 3) uint8 RGB.

    The EXIF orientation is applied if it can be read (not with `upright` False). Grey, palette and
    CMYK pictures are converted. 16-bit samples are reduced to their high byte, 12 bits in 16 to
    their high bits (see `few_bits`). Transparency is laid on white. Of an animation, the first
    frame is used. docs/data.md lists differences from the loaders of published code. No other
    program is started for a picture.

    Args:
        formats: Pillow's names of the accepted formats; None is all that it decodes by itself.

    Raises:
        UnfitImageError: the picture is sound but not supported.
        Exception: the file is missing, cut short, or no picture (Pillow has no common type).
    """
    with opened(source, formats=formats) as (image, _):
        return to_rgb(image, upright)


@contextlib.contextmanager
def opened(
    source: Source, name: str = "", formats: Sequence[str] | None = None
) -> Iterator[tuple[Image.Image, bool]]:
    """A loaded Pillow image, and whether its metadata had to be left out; raises as `decode`.

    `name` is the file's name, if `source` is its content.
    """
    image, left_out = _load(source, name, formats)
    with image:
        yield image, left_out


def _load(source: Source, name: str, formats: Sequence[str] | None) -> tuple[Image.Image, bool]:
    content = None
    if hasattr(source, "read"):
        source.seek(0)
        content = source.read()
    else:
        need_picture(source)
        name = os.fsdecode(source)
    try:
        # A copy, because Pillow closes a source that it cannot read.
        return _attempt(source if content is None else io.BytesIO(content), formats), False
    except (UnfitImageError, MemoryError):
        raise
    except Image.DecompressionBombError as error:
        raise UnfitImageError(_too_large(str(error))) from error
    except Exception as error:  # Pillow raises a dozen unrelated types for damaged files
        if getattr(error, "errno", None):
            raise
        content = Path(source).read_bytes() if content is None else content
        bare = without_metadata(content)
        if bare is not None:
            with contextlib.suppress(Exception):
                return _attempt(io.BytesIO(bare), formats), True
        if isinstance(error, UnidentifiedImageError):
            _check_support(content, name)
        raise


def _attempt(source: Source, formats: Sequence[str] | None) -> Image.Image:
    image = Image.open(source, formats=_own_formats() if formats is None else formats)
    try:
        # Before loading: Pillow reduces samples to 8 bits, and then no longer knows the original.
        samples = {str(tile[3]) for tile in getattr(image, "tile", ())}
        image.load()
        for kind in samples & _TO_8_BITS.keys():
            _scale_transparency(image, _TO_8_BITS[kind])
        halved = any(";16" in kind for kind in samples)
        if halved and len(image.getbands()) > 1 and _brightest(image) < 16:
            raise UnfitImageError(
                "16-bit colours whose values need no more than 12 bits would be black; save it "
                "with 8 bits, or with values up to 65535"
            )
    except BaseException:
        image.close()
        raise
    return image


_TO_8_BITS: dict[str, Callable[[int], int]] = {
    "L;2": lambda value: 85 * value,
    "L;4": lambda value: 17 * value,
    "RGB;16B": lambda value: value >> 8,
}
"""Pillow's name of a PNG's sample format → how Pillow converts samples to 8 bits."""


def _scale_transparency(image: Image.Image, to_8_bits: Callable[[int], int]) -> None:
    """Convert a transparent colour like the pixels, which Pillow does not do itself."""
    colour = image.info.get("transparency")
    if isinstance(colour, tuple):
        image.info["transparency"] = tuple(map(to_8_bits, colour))
    elif isinstance(colour, int):
        image.info["transparency"] = to_8_bits(colour)


def _brightest(image: Image.Image) -> int:
    """The largest value of any channel but transparency."""
    colours = [band for band in image.getbands() if band not in "Aa"]
    return max(image.getchannel(band).getextrema()[1] for band in colours)


def _too_large(text: str) -> str:
    numbers = [int(number) for number in re.findall("[0-9]+", text)]
    millions = (f"{number / 1e6:.0f} million" for number in numbers[:2])
    return f"{' pixels, more than the limit of '.join(millions)}; save it smaller"


def to_rgb(image: Image.Image, upright: bool = True) -> np.ndarray:
    """A loaded Pillow image → (H, W, 3) uint8 RGB; see `decode`."""
    turn = _UPRIGHT.get(orientation(image)[0]) if upright else None
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "F":
        raise UnfitImageError(
            "floating point pixels have no agreed white; save it with 8 or 16 bits"
        )
    if image.mode.startswith("I"):
        values = np.asarray(image)
        grey = _eight_bits(values)
        if (transparent := image.info.get("transparency")) is not None:
            grey[values == transparent] = 255
        return np.repeat(grey[:, :, None], 3, axis=2)
    if has_transparency(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.array(image)


LONGEST = 32


def central_part(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) → its centre, if one side is more than `LONGEST` times the other; else unchanged.

    Networks take squares, and no random crop is that narrow. Resizing the short side of a picture
    of 3000 x 1 to 256 pixels would make the long one 768,000 pixels and take gigabytes.
    """
    height, width = pixels.shape[:2]
    most = LONGEST * min(height, width)
    top, left = max(0, height - most) // 2, max(0, width - most) // 2
    return pixels[top : top + most, left : left + most]


def orientation(image: Image.Image) -> tuple[int, bool]:
    """The EXIF orientation (1, upright, if there is none), and whether it could be read."""
    if image.format in ("JPEG", "PNG") and not image.info.keys() & _EXIF_KEYS:
        return 1, True
    try:
        return int(image.getexif().get(_ORIENTATION, 1)), True
    except Exception:  # Pillow raises a dozen unrelated types for damaged files
        return 1, False


def has_transparency(image: Image.Image) -> bool:
    """Whether a Pillow image has an alpha channel or a transparent colour."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _eight_bits(values: np.ndarray) -> np.ndarray:
    """(H, W) integers of more than 8 bits → uint8.

    Raises:
        UnfitImageError: they are negative, or need more than 16 bits.
    """
    low, high = int(values.min()), int(values.max())
    if low < 0 or high > 65535:
        raise UnfitImageError(
            f"values from {low} to {high} have no agreed black and white; save it with 8 or 16 bits"
        )
    return (values.astype(np.int64) >> (few_bits(high) or 16) - 8).astype(np.uint8)


def few_bits(highest: int) -> int | None:
    """8 or 12, if no value of a picture with more bits needs more bits than that; else None.

    Cameras with 12 bits, and programs with values up to 255, write files with 16 or 32 bits, in
    which their white is nearly black.
    """
    return next((bits for bits in (8, 12) if highest < 2**bits), None)


# --- damaged metadata -----------------------------------------------------------------------------

_PNG = b"\x89PNG\r\n\x1a\n"
_PNG_PIXELS = (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND")


def without_metadata(content: bytes) -> bytes | None:
    """A PNG or JPEG file without its comments, profiles and camera data; None for other files."""
    if content.startswith(_PNG):
        return _PNG + b"".join(chunk for kind, chunk in _png_chunks(content) if kind in _PNG_PIXELS)
    if content.startswith(b"\xff\xd8"):
        return _jpeg_without_metadata(content)
    return None


def _png_chunks(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    start = len(_PNG)
    while start + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[start : start + 8])
        yield kind, content[start : start + 12 + length]
        start += 12 + length


def _jpeg_without_metadata(content: bytes) -> bytes:
    kept, start = [content[:2]], 2
    while start + 4 <= len(content) and content[start] == 0xFF:
        marker, length = struct.unpack(">xBH", content[start : start + 4])
        if marker == 0xDA:  # the pixels
            break
        # APP0 (JFIF) and APP14 (Adobe) say what the channels mean.
        if marker in (0xE0, 0xEE) or not (0xE0 <= marker <= 0xEF or marker == 0xFE):
            kept.append(content[start : start + 2 + length])
        start += 2 + length
    return b"".join(kept) + content[start:]
