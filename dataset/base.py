"""One split of a data set: which images, which classes, and how a file becomes RGB pixels."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, ClassVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from utils import InputError


class BadImageError(OSError):
    """An image file that cannot be turned into pixels; `path` and `reason` say which and why."""

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason

    def __reduce__(self) -> tuple:
        return type(self), (self.path, self.reason)


# --- pixels ---------------------------------------------------------------------------------------


def decode(source: str | os.PathLike[str] | BinaryIO) -> np.ndarray:
    """An image file → (H, W, 3) uint8 RGB, upright.

    The EXIF orientation is applied; grey, palette and CMYK pictures are converted; of 16-bit
    samples the high byte is kept; transparency is laid on white. Animations give their first frame.

    Raises:
        Exception: the file is missing, cut short, or no picture (Pillow has no common type).
    """
    with Image.open(source) as image:
        image.load()
        return to_rgb(image)


def to_rgb(image: Image.Image) -> np.ndarray:
    """A loaded Pillow image → (H, W, 3) uint8 RGB; see `decode`."""
    if image.format not in ("JPEG", "PNG") or image.info.keys() & {"exif", "xmp"}:
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("floating point pixels have no agreed white; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        grey = np.clip(np.asarray(image).astype(np.int64) >> 8, 0, 255).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    if has_transparency(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    if image.mode != "RGB":
        image = image.convert("RGB")
    return np.array(image)


def has_transparency(image: Image.Image) -> bool:
    """Whether a Pillow image carries an alpha channel or a transparent colour."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


# --- the lists ------------------------------------------------------------------------------------


class PathTable(Sequence[str]):
    """Many strings in one bytes object, with a prefix in common.

    A list of strings grows in every worker process: reading a Python object counts a reference,
    which writes to its memory page and so copies it. Here a worker reads without writing.
    """

    def __init__(self, strings: Iterable[str], prefix: str = "") -> None:
        encoded = [os.fsencode(string) for string in strings]
        self.prefix = prefix
        self._blob = b"".join(encoded)
        self._ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> str:
        """The string at `index` without the prefix."""
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._blob[start : int(self._ends[index])])

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return self.prefix + self.name(index)

    def names(self) -> Iterator[str]:
        """Every string without the prefix."""
        return (self.name(index) for index in range(len(self)))

    def take(self, indices: Iterable[int]) -> PathTable:
        """The table of the strings at `indices`."""
        return PathTable((self.name(int(index)) for index in indices), self.prefix)


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """One split of one data set.

    Attributes:
        name: the data set ("cub"); split: "train", "eval", "query" or "gallery".
        labels: (N,) int64, dense from 0; class_names[label] names a class.
        paths: paths[i] is the file of image i, or a name such as "emoji/1f600/noto" in memory.
        groups: (N,) int64 or None; a query's own group can be left out of the gallery.
        boxes: (N, 4) int32 x1, y1, x2, y2 (x2 and y2 exclusive; -1 where there is none) or None.
        pixels: (N, H, W, 3) uint8 RGB when the set lives in memory, else None.
        folds: (N,) int64 class-disjoint fold of each training image, or None.
        source: which layout was found and where, in words.
    """

    name: str
    split: str
    labels: np.ndarray
    class_names: tuple[str, ...]
    paths: PathTable
    groups: np.ndarray | None = None
    boxes: np.ndarray | None = None
    pixels: np.ndarray | None = None
    folds: np.ndarray | None = None
    source: str = ""

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        counts = f"{len(self):,} images of {self.num_classes:,} classes"
        return f"ImageSet({self.name} {self.split}: {counts}, {self.source})"

    @property
    def num_classes(self) -> int:
        """How many classes `labels` can name."""
        return len(self.class_names)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as (H, W, 3) uint8 RGB, upright, cut to its box (see `decode`).

        Raises:
            BadImageError: the file is missing, unreadable or cut short, or the box lies outside.
        """
        if self.pixels is not None:
            return self.pixels[index]
        path = self.paths[index]
        try:
            image = decode(path)
        except MemoryError:
            raise
        except Exception as error:  # Pillow reports damage through a dozen unrelated types
            raise BadImageError(path, reason(error)) from error
        return image if self.boxes is None else _cut(image, self.boxes[index], path)

    def subset(self, indices: Sequence[int] | np.ndarray) -> ImageSet:
        """The images at `indices`, in that order, with labels and class names as they are."""
        indices = np.asarray(indices)
        indices = np.flatnonzero(indices) if indices.dtype == bool else indices.astype(np.int64)
        parts = {
            field: None if getattr(self, field) is None else getattr(self, field)[indices]
            for field in ("groups", "boxes", "pixels", "folds")
        }
        return replace(self, labels=self.labels[indices], paths=self.paths.take(indices), **parts)

    def select_classes(self, classes: Sequence[int] | np.ndarray) -> ImageSet:
        """The images of `classes`, which are renumbered from 0 in the order given."""
        classes = np.asarray(classes, dtype=np.int64)
        renumbered = np.full(self.num_classes, -1, np.int64)
        renumbered[classes] = np.arange(len(classes))
        chosen = self.subset(np.flatnonzero(renumbered[self.labels] >= 0))
        return replace(
            chosen,
            labels=renumbered[chosen.labels],
            class_names=tuple(self.class_names[label] for label in classes),
        )

    def fingerprint(self) -> str:
        """16 hex digits that change with the images' names, labels, boxes, sizes or pixels.

        The same on every machine that holds the same data: neither the data root nor the times of
        the files take part.
        """
        digest = hashlib.blake2b(digest_size=8)
        digest.update(repr((self.name, self.split, self.class_names)).encode(errors="replace"))
        digest.update(b"\0".join(os.fsencode(name) for name in self.paths.names()))
        for array in (self.labels, self.groups, self.boxes, self.pixels):
            if array is not None:
                digest.update(np.ascontiguousarray(array))
        if self.pixels is None:
            digest.update(np.array([_size(path) for path in self.paths], np.int64))
        return digest.hexdigest()


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 (a Path object per image costs more than stat)
    except OSError:
        return -1


def reason(error: BaseException) -> str:
    """What an exception says about a file, on one line, without the path, and never empty."""
    if isinstance(error, UnidentifiedImageError):
        return "no picture, or its beginning is damaged"
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split()) or type(error).__name__


def _cut(image: np.ndarray, box: np.ndarray, path: str) -> np.ndarray:
    x1, y1, x2, y2 = (int(side) for side in box)
    if x1 < 0:
        return image
    part = image[y1:y2, x1:x2]
    if part.size == 0:
        size = f"{image.shape[1]}x{image.shape[0]}"
        raise BadImageError(path, f"the box {x1},{y1},{x2},{y2} lies outside its {size} pixels")
    return part


# --- what a data set says about itself ------------------------------------------------------------

SPLITS = ("train", "eval", "query", "gallery")


@dataclass(frozen=True)
class Protocol:
    """How the papers use a data set: what is reported, what goes into the network.

    Attributes:
        ks: the K of the reported R@K.
        query_gallery: queries search in a gallery of their own (splits "query" and "gallery");
            otherwise every image of "eval" searches among the others.
        pretrained: the default of `--pretrained`. image_size: side of the network's input, pixels.
        augment: the training augmentation that suits the pictures.
        group_name: what `ImageSet.groups` stands for, or None.
        sizes: names of the alternative "eval" lists (`load(..., size=...)`), largest first.
    """

    ks: tuple[int, ...] = (1, 2, 4, 8)
    query_gallery: bool = False
    pretrained: str = "imagenet"
    image_size: int = 224
    augment: str = "crop"
    group_name: str | None = None
    sizes: tuple[str, ...] = ()


class DataSet(ABC):
    """One entry of the list of data sets.

    Attributes:
        options: what `load` takes beside the split.
        published: (images, classes) of each split, keyed by `title`; None where nobody says.
        origin: where to get it and under which licence, in a few sentences.
        tree: the arrangement of files to aim at, as text.
    """

    name: str
    aliases: ClassVar[tuple[str, ...]] = ()
    protocol: Protocol = Protocol()
    options: ClassVar[tuple[str, ...]] = ()
    published: ClassVar[Mapping[str, tuple[int | None, int | None]]] = {}
    origin: str = ""
    tree: str = ""

    @abstractmethod
    def load(self, root: Path, split: str, **options: Any) -> ImageSet:
        """The images of `split` under the data root; see `dataset.load`."""

    def title(self, split: str, **options: Any) -> str:
        """What a split is called in tables: its name, and which of several where there are."""
        return split

    def variants(self) -> list[dict[str, Any]]:
        """The arguments of `load` for every part of an evaluation, training first."""
        evaluated = ("query", "gallery") if self.protocol.query_gallery else ("eval",)
        return [{"split": split} for split in ("train", *evaluated)]

    def changed_files(self, root: Path) -> list[Path]:
        """Files whose published checksum is known and not theirs."""
        return []

    def check_split(self, split: str) -> None:
        """Raises InputError unless the data set has a split of this name."""
        known = SPLITS if self.protocol.query_gallery else SPLITS[:2]
        if split not in known:
            raise InputError(
                f"{self.name} has no split {split!r}; choose one of {', '.join(known)}"
            )

    def count_differences(self, title: str, images: int, classes: int) -> str:
        """How counts differ from the published ones, in words; empty when they do not."""
        expected = self.published.get(title, (None, None))
        found = (images, classes)
        parts = [
            f"{have:,} {what} where {want:,} are published"
            for have, want, what in zip(found, expected, ("images", "classes"), strict=True)
            if want is not None and have != want
        ]
        return " and ".join(parts)
