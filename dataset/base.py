"""One split of a data set: which images, which classes; and what a data set says of itself."""

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
    "ROOT",
    "SPLITS",
    "BadImageError",
    "DataSet",
    "ImageSet",
    "PathTable",
    "Protocol",
    "check_command",
    "decode",
    "reason",
    "root_words",
    "to_rgb",
]

ROOT = "data"
"""The usual data root."""


def root_words(root: str | Path) -> list[str]:
    """What leads a command to a data root; nothing where it is the usual one."""
    return [] if str(root) == ROOT else ["--data-root", str(root)]


def check_command(name: str, root: str | Path = ROOT) -> str:
    """The command that examines the data set of a name under a data root."""
    return f"{program('dataset')} check {as_shell(name, *root_words(root))}"


# --- the lists ------------------------------------------------------------------------------------


class PathTable(Sequence[str]):
    """Many strings in one bytes object, with a prefix in common.

    A list of strings grows in every worker process: reading a Python object counts a reference,
    which writes to its memory page and so copies it. Here a worker reads without writing.
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
        return (self.name(index) for index in range(len(self)))

    def take(self, indices: Sequence[int] | np.ndarray) -> PathTable:
        """The table of the strings at `indices`."""
        indices = np.arange(len(self))[np.asarray(indices, np.int64)]
        ends = self._ends[indices]
        starts = np.where(indices == 0, 0, self._ends[indices - 1])
        table = PathTable((), self.prefix)
        pairs = zip(starts.tolist(), ends.tolist(), strict=True)
        table._fill([self._blob[start:end] for start, end in pairs], self.prefix)
        return table


def _encoded(name: str) -> bytes:
    """The bytes of a file name, also of one that is not UTF-8."""
    return name.encode("utf-8", "surrogateescape")


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
        concern: why results on these pictures cannot be compared with published ones, in words; ""
            where nothing is known against it.
        upright: whether files are turned as their EXIF orientation says (`--exif`).
        root: the data root, where it is not the usual one.
        given: what to call the data set by (`dataset.find`), where that is not its name.
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
        """How many classes `labels` can name."""
        return len(self.class_names)

    @property
    def check_command(self) -> str:
        """The command that examines the data set."""
        return check_command(self.given or self.name, self.root or ROOT)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as (H, W, 3) uint8 RGB, cut to its box (see `decode`).

        Of a picture more than 32 times as long as it is wide, the centre (see `central_part`).

        Raises:
            BadImageError: the file is missing, unreadable or cut short, or of a kind that is not
                taken; or the box lies outside.
        """
        if self.pixels is not None:
            return self.pixels[index]
        path = self.paths[index]
        try:
            image = decode(path, self.upright)
        except MemoryError:
            raise
        except Exception as error:  # Pillow reports damage through a dozen unrelated types
            raise BadImageError(path, reason(error)) from error
        return central_part(image if self.boxes is None else _cut(image, self.boxes[index], path))

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
        the files take part. `content_fingerprint` also looks into the files.
        """
        digest = hashlib.blake2b(digest_size=8)
        digest.update(repr((self.name, self.split, self.class_names)).encode(errors="replace"))
        digest.update(b"\0".join(_encoded(name) for name in self.paths.names()))
        self._add_arrays(digest)
        if self.pixels is None:
            digest.update(_sizes(self.paths))
        return digest.hexdigest()

    def content_fingerprint(self, sample: int = 512) -> str:
        """16 hex digits that change with names, labels, boxes, sizes, or what is in the files.

        Names count from the folder that all files have in common, and neither that folder, nor the
        data set's own name, nor times take part: data that were moved or renamed are the same.

        Args:
            sample: how many files are looked into, spread evenly over the list; of each, the first
                and the last 256 kB. A set with no more files than that is covered whole.
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
        """The paths that lead to no file: nothing, a folder, a named pipe; each once."""
        if self.pixels is not None:
            return []
        modes = known_statuses(self.paths)["mode"]
        absent = np.flatnonzero([not stat.S_ISREG(mode) for mode in modes.tolist()])
        return list(dict.fromkeys(map(self.paths.__getitem__, absent.tolist())))


def _below_common_folder(paths: PathTable) -> Iterator[str]:
    """The paths as `paths.names()`, absolute ones from the folder that they have in common."""
    if paths.prefix or not all(os.path.isabs(name) for name in paths.names()):  # noqa: PTH117
        return paths.names()
    folder = os.path.commonpath([os.path.dirname(name) for name in paths.names()])  # noqa: PTH120
    return (name[len(folder) :].lstrip(os.sep) for name in paths.names())


def _sizes(paths: PathTable) -> np.ndarray:
    """(N,) the files' sizes in bytes, -1 for one that is missing."""
    return np.ascontiguousarray(known_statuses(paths)["size"])


def _content_digest(path: str, part: int = 1 << 18) -> bytes:
    """A hash of the beginning and the end of a file; zeros where it cannot be read."""
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


# --- what a data set says about itself ------------------------------------------------------------

SPLITS = ("train", "eval", "query", "gallery")


@dataclass(frozen=True)
class Protocol:
    """How the papers use a data set: what is reported, what goes into the network.

    Attributes:
        ks: the K of the reported R@K.
        pretrained: the default of `--pretrained`. image_size: side of the network's input, pixels.
        augment: the training augmentation that suits the pictures.
        group_name: what `ImageSet.groups` stands for, or None.
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
    """What a backbone wants to be fed.

    An image, channels in the order `color`, values in 0..`scale`, is normalised by
    (image - mean) / std; `mean` and `std` are in the order of `color`. At test time its short side
    is brought to `resize` pixels and its centre, `size` pixels square, is cut out. All resizing is
    antialiased, bilinear or `cubic`.
    """

    color: str = "RGB"
    scale: float = 1.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    size: int = 224
    resize: int = 256
    cubic: bool = False


class DataSet(ABC):
    """One entry of the list of data sets.

    Attributes:
        protocol: how the papers use it; known without looking at the images.
        query_gallery: queries search in a gallery of their own (splits "query" and "gallery");
            otherwise every image of "eval" searches among the others.
        options: what `load` takes beside the split.
        published: (images, classes) of each split, keyed by `title`; None where nobody says.
        longest_side: of the published pictures, in pixels; None where they vary.
        origin: where to get it and under which licence, in a few sentences.
        tree: the arrangement of files to aim at, as text.
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
        """What a split is called in tables: its name, and which of several where there are."""
        return split

    @property
    def place(self) -> Path | None:
        """Where the user's own images lie, as an absolute path; None for what the root holds."""
        return None

    def lies_under(self, root: Path) -> bool:
        """Whether a data root is where it is looked for; a root that has none of it counts too."""
        return True

    def variants(self) -> list[dict[str, Any]]:
        """The arguments of `load` for every part of an evaluation, training first."""
        evaluated = ("query", "gallery") if self.query_gallery else ("eval",)
        return [{"split": split} for split in ("train", *evaluated)]

    def changed_files(self, root: Path) -> list[Path]:
        """Files whose published checksum is known and not theirs."""
        return []

    def check_split(self, split: str) -> None:
        """Raises InputError unless the data set has a split of this name."""
        known = SPLITS if self.query_gallery else SPLITS[:2]
        if split not in known:
            raise InputError(
                f"{self.name} has no split {split!r}; choose one of {', '.join(known)}"
            )

    def count_differences(self, title: str, images: int, classes: int) -> str:
        """How counts differ from the published ones, in words; empty when they do not."""
        expected = self.published.get(title, (None, None))
        found = (images, classes)
        parts = [
            f"{counted(have, what)} where {want:,} are published"
            for have, want, what in zip(found, expected, ("image", "class"), strict=True)
            if want is not None and have != want
        ]
        return " and ".join(parts)


def why_unreadable(images: ImageSet, index: int) -> str | None:
    """Why an image cannot be read; None where it can."""
    try:
        images.read(index)
    except BadImageError as error:
        return error.reason
    return None
