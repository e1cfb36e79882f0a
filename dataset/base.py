"""A split of a data set (`ImageSet`), and the description of a data set (`DataSet`)."""

from __future__ import annotations

import hashlib
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from dataset.decoding import BadImageError, central_part, decode, need_file, reason, to_rgb
from dataset.statuses import answers, known_statuses
from terminal import as_shell
from utils import InputError, counted, program

__all__ = [
    "ROOT", "SPLITS", "BadImageError", "DataSet", "ImageSet", "PathTable", "Protocol",
    "check_command", "decode", "reason", "root_words", "to_rgb",
]  # fmt: skip

ROOT = "data"
"""The default data root."""


def root_words(root: str | Path) -> list[str]:
    """The words that give a command this data root; [] if it is the default."""
    return [] if str(root) == ROOT else ["--data-root", str(root)]


def check_command(name: str, root: str | Path = ROOT) -> str:
    """The command that examines a data set under a data root."""
    return f"{program('dataset')} check {as_shell(name, *root_words(root))}"


# --- image sets -----------------------------------------------------------------------------------


class PathTable(Sequence[str]):
    """Many strings in one bytes object, with a common prefix.

    Worker processes share its memory. They would copy a list of strings bit by bit, because reading
    a Python object changes its reference count, which copies its memory page.
    """

    def __init__(self, strings: Iterable[str], prefix: str = "") -> None:
        self._fill([_encoded(string) for string in strings], prefix)

    def _fill(self, encoded: list[bytes], prefix: str) -> None:
        self.prefix = prefix
        self._blob = b"".join(encoded)
        self._ends = np.cumsum([len(item) for item in encoded], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._ends)

    def name(self, index: int) -> str:
        """The string at `index` without the prefix."""
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        return self._blob[start : int(self._ends[index])].decode("utf-8", "surrogateescape")

    def __getitem__(self, index: int) -> str:  # type: ignore[override]
        return self.prefix + self.name(index)

    def names(self) -> Iterator[str]:
        """Every string without the prefix."""
        start = 0
        for end in self._ends.tolist():
            yield self._blob[start:end].decode("utf-8", "surrogateescape")
            start = end

    def __iter__(self) -> Iterator[str]:
        """Every string; several times faster than one by one."""
        return (self.prefix + name for name in self.names())

    def take(self, indices: Sequence[int] | np.ndarray) -> PathTable:
        """A table of the strings at `indices`."""
        indices = np.arange(len(self))[np.asarray(indices, np.int64)]
        ends = self._ends[indices]
        starts = np.where(indices == 0, 0, self._ends[indices - 1])
        table = PathTable((), self.prefix)
        pairs = zip(starts.tolist(), ends.tolist(), strict=True)
        table._fill([self._blob[start:end] for start, end in pairs], self.prefix)
        return table


def _encoded(name: str) -> bytes:
    """The bytes of a file name, even if it is not UTF-8."""
    return name.encode("utf-8", "surrogateescape")


PER_IMAGE = ("groups", "boxes", "pixels", "folds")
"""The arrays of an ImageSet, besides its labels, that have a row for each image or are None."""


@dataclass(frozen=True, eq=False, repr=False)
class ImageSet:
    """One split of one data set.

    Attributes:
        name: the data set ("cub"); split: "train", "eval", "query" or "gallery".
        labels: (N,) int64, consecutive from 0; class_names[label] is the name of a class.
        paths: paths[i] is the file of image i; in memory, a name such as "emoji/1f600/noto".
        groups: (N,) int64 or None; a query's own group can be left out of the gallery.
        boxes: (N, 4) int32 x1, y1, x2, y2 (x2 and y2 exclusive; -1 for no box) or None.
        pixels: (N, H, W, 3) uint8 RGB if the set is in memory, otherwise None.
        folds: (N,) int64 class-disjoint fold of each training image, or None.
        source: which layout was found and where, in words.
        concern: why results on these pictures cannot be compared with published ones, in words; ""
            if there is no such reason.
        upright: whether files are turned as their EXIF orientation says (`--exif`).
        root: the data root, if it is not the default.
        given: the name by which `dataset.find` finds the data set, if it is not `name`.
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
    given: str = ""
    root: str = ""
    concern: str = ""
    upright: bool = True

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        counts = f"{len(self):,} images of {self.num_classes:,} classes"
        return f"ImageSet({self.name} {self.split}: {counts}, {self.source})"

    @property
    def num_classes(self) -> int:
        """The number of classes, including those without images."""
        return len(self.class_names)

    @property
    def check_command(self) -> str:
        """The command that examines the data set."""
        return check_command(self.given or self.name, self.root or ROOT)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as (H, W, 3) uint8 RGB, cut to its box (see `decode`).

        Of a very long picture, only the centre (see `central_part`).

        Raises:
            BadImageError: the file is missing, unreadable, cut short, or of an unsupported kind; or
                the box is outside the picture.
        """
        if self.pixels is not None:
            return self.pixels[index]
        path = self.paths[index]
        try:
            image = decode(path, self.upright)
        except MemoryError:
            raise
        except Exception as error:  # Pillow raises a dozen unrelated types for damaged files
            raise BadImageError(path, reason(error)) from error
        return central_part(image if self.boxes is None else _cut(image, self.boxes[index], path))

    def subset(self, indices: Sequence[int] | np.ndarray) -> ImageSet:
        """The images at `indices`, in that order; labels and class names do not change."""
        indices = np.asarray(indices)
        indices = np.flatnonzero(indices) if indices.dtype == bool else indices.astype(np.int64)
        parts = {
            field: None if getattr(self, field) is None else getattr(self, field)[indices]
            for field in PER_IMAGE
        }
        return replace(self, labels=self.labels[indices], paths=self.paths.take(indices), **parts)

    def select_classes(self, classes: Sequence[int] | np.ndarray) -> ImageSet:
        """The images of `classes`, which are renumbered from 0 in this order."""
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

        They do not depend on the data root or on file times, so they are the same on every machine
        with the same data. `content_fingerprint` also reads the files.
        """
        digest = hashlib.blake2b(digest_size=8)
        digest.update(repr((self.name, self.split, self.class_names)).encode(errors="replace"))
        digest.update(b"\0".join(_encoded(name) for name in self.paths.names()))
        self._add_arrays(digest)
        if self.pixels is None:
            digest.update(_sizes(self.paths))
        return digest.hexdigest()

    def content_fingerprint(self, sample: int = 512) -> str:
        """16 hex digits that change with names, labels, boxes, sizes, or the contents of files.

        Names are relative to the folder that contains all files. That folder, the data set's own
        name and file times do not count, so data that were moved or renamed stay the same.

        Args:
            sample: how many files are read, spread evenly over the list; the first and the last
                256 kB of each. In a set with no more files, all are read.
        """
        digest = hashlib.blake2b(digest_size=8)
        digest.update(repr((self.split, self.class_names)).encode(errors="surrogateescape"))
        digest.update(b"\0".join(_encoded(name) for name in _below_common_folder(self.paths)))
        self._add_arrays(digest)
        if self.pixels is None:
            digest.update(_sizes(self.paths))
            count = min(sample, len(self))
            looked_into = np.linspace(0, len(self) - 1, count).round().astype(int)
            for content in answers(_content_digest, self.paths.take(looked_into)):
                digest.update(content)
        return digest.hexdigest()

    def _add_arrays(self, digest: hashlib.blake2b) -> None:
        for array in (self.labels, self.groups, self.boxes, self.pixels):
            if array is not None:
                digest.update(np.ascontiguousarray(array))

    def missing(self) -> list[str]:
        """The paths that are no files (missing, a folder, a named pipe), each once."""
        if self.pixels is not None:
            return []
        modes = known_statuses(self.paths)["mode"]
        absent = np.flatnonzero([not stat.S_ISREG(mode) for mode in modes.tolist()])
        return list(dict.fromkeys(map(self.paths.__getitem__, absent.tolist())))


def _below_common_folder(paths: PathTable) -> Iterator[str]:
    """`paths.names()`, with absolute paths relative to their common folder."""
    if paths.prefix or not all(os.path.isabs(name) for name in paths.names()):  # noqa: PTH117
        return paths.names()
    folder = os.path.commonpath([os.path.dirname(name) for name in paths.names()])  # noqa: PTH120
    return (name[len(folder) :].lstrip(os.sep) for name in paths.names())


def _sizes(paths: PathTable) -> np.ndarray:
    """(N,) the sizes of the files in bytes, -1 for missing ones."""
    return np.ascontiguousarray(known_statuses(paths)["size"])


def _content_digest(path: str, part: int = 1 << 18) -> bytes:
    """A hash of the beginning and the end of a file; zeros if it cannot be read."""
    digest = hashlib.blake2b(digest_size=8)
    try:
        need_file(path)
        with Path(path).open("rb") as file:
            digest.update(file.read(part))
            size = os.fstat(file.fileno()).st_size
            if size > part:
                file.seek(max(part, size - part))
                digest.update(file.read(part))
    except (OSError, ValueError):
        return bytes(8)
    return digest.digest()


def _cut(image: np.ndarray, box: np.ndarray, path: str) -> np.ndarray:
    x1, y1, x2, y2 = (int(side) for side in box)
    if x1 < 0:
        return image
    part = image[y1:y2, x1:x2]
    if part.size == 0:
        size = f"{image.shape[1]}x{image.shape[0]}"
        raise BadImageError(path, f"the box {x1},{y1},{x2},{y2} lies outside its {size} pixels")
    return part


# --- data sets ------------------------------------------------------------------------------------

SPLITS = ("train", "eval", "query", "gallery")


@dataclass(frozen=True)
class Protocol:
    """How the papers use a data set: what they report, and what the network's input is.

    Attributes:
        ks: the K of the reported R@K.
        pretrained: the default of `--pretrained`. image_size: side of the network's input, pixels.
        augment: the training augmentation that suits the pictures.
        group_name: what a group in `ImageSet.groups` is, or None.
        sizes: names of the alternative "eval" lists (`load(..., size=...)`), largest first.
    """

    ks: tuple[int, ...] = (1, 2, 4, 8)
    pretrained: str = "imagenet"
    image_size: int = 224
    augment: str = "crop"
    group_name: str | None = None
    sizes: tuple[str, ...] = ()


@dataclass(frozen=True)
class InputSpec:
    """The input that a backbone expects.

    An image with channels in the order `color` and values in 0..`scale` is normalised by
    (image - mean) / std; `mean` and `std` are in the order of `color`. At test time its short side
    is resized to `resize` pixels, and the central square of `size` pixels is cut out. All resizing
    is antialiased, bilinear or `cubic`.
    """

    color: str = "RGB"
    scale: float = 1.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    size: int = 224
    resize: int = 256
    cubic: bool = False


class DataSet(ABC):
    """A data set that can be loaded by its name.

    Attributes:
        protocol: how the papers use it; known without reading the images.
        query_gallery: whether queries search in a separate gallery (splits "query" and "gallery");
            otherwise every image of "eval" searches among the others.
        options: the names of options of `load`, besides the split.
        published: (images, classes) of each split, by its `title`; None for unknown numbers.
        longest_side: that of the published pictures, in pixels; None if it varies.
        origin: where to get it and under which licence, in a few sentences.
        tree: the recommended arrangement of its files, as text.
    """

    name: str
    aliases: ClassVar[tuple[str, ...]] = ()
    protocol: Protocol = Protocol()
    query_gallery: bool = False
    options: ClassVar[tuple[str, ...]] = ()
    published: ClassVar[Mapping[str, tuple[int | None, int | None]]] = {}
    longest_side: ClassVar[int | None] = None
    origin: str = ""
    tree: str = ""

    @abstractmethod
    def load(self, root: Path, split: str, **options: Any) -> ImageSet:
        """The images of `split` under the data root; see `dataset.load`."""

    def title(self, split: str, **options: Any) -> str:
        """The name of a split in tables, with the option that chooses one of several lists."""
        return split

    @property
    def place(self) -> Path | None:
        """The absolute path of the user's own images; None for data sets under the data root."""
        return None

    def lies_under(self, root: Path) -> bool:
        """Whether the data set is searched under a data root, even if it is not there."""
        return True

    def variants(self) -> list[dict[str, Any]]:
        """The arguments of `load` for every part of an evaluation, training first."""
        evaluated = ("query", "gallery") if self.query_gallery else ("eval",)
        return [{"split": split} for split in ("train", *evaluated)]

    def changed_files(self, root: Path) -> list[Path]:
        """Files whose checksum differs from the published one."""
        return []

    def check_split(self, split: str) -> None:
        """Raise InputError unless the data set has a split of this name."""
        known = SPLITS if self.query_gallery else SPLITS[:2]
        if split not in known:
            raise InputError(
                f"{self.name} has no split {split!r}; choose one of {', '.join(known)}"
            )

    def count_differences(self, title: str, images: int, classes: int) -> str:
        """How counts differ from the published ones, in words; "" if they do not."""
        expected = self.published.get(title, (None, None))
        found = (images, classes)
        parts = [
            f"{counted(have, what)} where {want:,} are published"
            for have, want, what in zip(found, expected, ("image", "class"), strict=True)
            if want is not None and have != want
        ]
        return " and ".join(parts)


def why_unreadable(images: ImageSet, index: int) -> str | None:
    """Why an image cannot be read; None if it can."""
    try:
        images.read(index)
    except BadImageError as error:
        return error.reason
    return None
