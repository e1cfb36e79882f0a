"""Data sets by name: `load("cub", "data", "train")` finds its images in any known layout."""

from __future__ import annotations

import importlib
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dataset.base import PER_IMAGE, ROOT, BadImageError, DataSet, ImageSet, PathTable, Protocol
from dataset.files import is_file, is_folder, is_gone
from dataset.folders import FolderData
from dataset.foreign import is_address, what_it_is
from dataset.inventory import fingerprints, require_files
from dataset.own import Draw, OwnData
from dataset.readable import require_readable
from dataset.reading import Reading
from dataset.statuses import asked_once
from dataset.table import CsvData
from dataset.trained_on import TrainedOn
from flags import Options, a_place
from utils import InputError, join_words, nearest_names

__all__ = [
    "NAMES", "BadImageError", "Choice", "DataSet", "ImageSet", "Protocol", "Reading", "TrainedOn",
    "asked_once", "find", "fingerprints", "load", "protocol", "require_files", "require_readable",
    "spelt",
]  # fmt: skip

FILES = (
    "emoji",
    "cub",
    "cars",
    "sop",
    "inshop",
    "vid",
)
"""The files of this folder with a `DATA_SET`; a new data set needs its file and a line here."""

_ALL: tuple[DataSet, ...] = tuple(
    importlib.import_module(f".{name}", __name__).DATA_SET for name in FILES
)
NAMES = tuple(entry.name for entry in _ALL)
_BY_NAME = {alias: entry for entry in _ALL for alias in (entry.name, *entry.aliases)}


def find(name: str) -> DataSet:
    """The data set of a name: one of NAMES in any letter case, `folder:PATH`, or `csv:FILE`.

    Raises:
        InputError: there is no such data set; the message gives the nearest names.
    """
    kind, colon, path = name.partition(":")
    if is_address(path) or is_address(name):
        raise InputError(
            f"--dataset {name} is an address; download and unpack it, and name the folder: "
            "folder:PATH"
        )
    if colon and kind.lower() in ("folder", "csv"):
        if not path:
            raise InputError(f"--dataset {name} names no path; write {kind}:PATH")
        return (FolderData if kind.lower() == "folder" else CsvData)(name, Path(path))
    entry = _BY_NAME.get(re.sub("[-_ ]", "", name.lower()))
    if entry is None:
        if other := what_it_is(name):
            raise InputError(f"{name} is {other}")
        own = f"folder:{name}" if is_folder(name) else f"csv:{name}" if is_file(name) else None
        near = f"did you mean {own}?" if own else nearest_names(name, NAMES)
        raise InputError(
            f"there is no data set {name!r}; {near} (your own images: folder:PATH or csv:FILE)"
        )
    return entry


def spelt(name: str) -> str:
    """A data set's name in standard spelling: `CUB-200` → `cub`, `folder:./own/` → `folder:own`.

    Raises:
        InputError: there is no data set of this name.
    """
    entry, (kind, _, path) = find(name), name.partition(":")
    return f"{kind.lower()}:{a_place(path)}" if isinstance(entry, OwnData) else entry.name


def load(name: str, root: str | Path = ROOT, split: str = "train", **options: Any) -> ImageSet:
    """One split of a data set.

    Args:
        name: see `find`. root: the folder that holds the data sets.
        split: "train" or "eval" (the held-out classes); in data sets with a separate gallery also
            "query" and "gallery", and "eval" is both.
        options: `size` for vid ("small", "medium", "large"); `eval_classes`, `seed` and `trained`
            for the user's own images that do not say what is held out. None is the default.

    Raises:
        InputError: unknown name, split or option; not found, empty or damaged; a single class.
            Counts that differ from the published ones are no error but a warning of the logger
            "dataset.counts".
    """
    entry = find(name)
    given = {option: value for option, value in options.items() if value is not None}
    useless = sorted(set(given) - set(entry.options))
    if useless:
        raise InputError(f"{', '.join(useless)} has no effect on data set {name}; leave it out")
    images = entry.load(Path(root), split, **given)
    _refuse_unsound(images)
    _refuse_one_class(images, name)
    elsewhere = str(root) != ROOT and images.pixels is None and not isinstance(entry, OwnData)
    return replace(images, root=str(root)) if elsewhere else images


def _refuse_unsound(images: ImageSet) -> None:
    """Raise InputError for what a data set of one's own may have got wrong in its `load`."""
    labels, count = images.labels, images.num_classes
    if not isinstance(labels, np.ndarray) or labels.ndim != 1 or labels.dtype.kind not in "iu":
        fault = "its labels are not an array of whole numbers, one for each image"
    elif len(labels) and not 0 <= labels.min() <= labels.max() < count:
        fault = (
            f"its labels run from {labels.min()} to {labels.max()} and it names {count} classes; "
            "number them from 0, in the order of class_names"
        )
    elif not isinstance(images.paths, PathTable):
        fault = f"its paths are a {type(images.paths).__name__}; make them a PathTable"
    elif unlike := _of_other_length(images):
        fault = f"it has {len(labels):,} labels, but {unlike}; each image needs one of each"
    elif images.pixels is not None and not _are_pixels(images.pixels):
        pixels = images.pixels
        fault = f"its pixels are {pixels.dtype} of shape {pixels.shape}, not uint8 (N, H, W, 3)"
    else:
        return
    raise InputError(f"the data set {images.name} ({images.split}) cannot be used: {fault}")


def _of_other_length(images: ImageSet) -> str:
    """What there is more or less of than labels: "12 paths and 11 pixels"; "" if nothing is."""
    values = {name: getattr(images, name) for name in ("paths", *PER_IMAGE)}
    lengths = {name: len(each) for name, each in values.items() if each is not None}
    unlike = (f"{n:,} {name}" for name, n in lengths.items() if n != len(images.labels))
    return join_words(unlike, "and")


def _are_pixels(values: np.ndarray) -> bool:
    return values.dtype == np.uint8 and values.ndim == 4 and values.shape[3] == 3


def _refuse_one_class(images: ImageSet, name: str, why: str = "has") -> None:
    """Raise InputError if there is only one class: no answer could be wrong, nothing be learned."""
    if images.num_classes > 1:
        return
    side = "training" if images.split == "train" else "evaluation"
    what = "there is nothing to tell apart" if side == "training" else "every answer is right"
    raise InputError(
        f"{name} {why} one {side} class ({', '.join(images.class_names)}), so {what}; each side "
        "needs two classes or more"
    )


def protocol(name: str) -> Protocol:
    """How the papers use the data set; raises InputError for an unknown name."""
    return find(name).protocol


@dataclass(frozen=True)
class Choice:
    """The data of a run, as its options choose them; `load` gives a split.

    Attributes:
        name: see `find`. root: the folder that holds the data sets.
        eval_classes, split_seed: the share of the classes of the user's own images that is held
            out, and the seed that draws them; None is the default.
        ratio_classes: the share of the classes of each split that is used, the first ones.
        exif: "apply" turns pictures as their EXIF orientation says, "ignore" takes the pixels as
            they are stored.
        place: where the user's own images are, if the path in `name` does not lead there from the
            current folder.
        trained: names of the classes that a network was trained on. If a draw would hold out some
            of them, because classes were added or removed since, all other classes are held out.
    """

    name: str
    root: str | Path = ROOT
    eval_classes: float | None = None
    split_seed: int | None = None
    ratio_classes: float = 1.0
    exif: str = "apply"
    place: Path | None = None
    trained: frozenset[str] = field(default=frozenset(), compare=False)

    @classmethod
    def of(cls, options: Options) -> Choice:
        """The data that resolved options choose."""
        return cls(
            options.dataset,
            options.data_root,
            options.eval_classes,
            options.split_seed,
            options.ratio_classes,
            options.exif,
        )

    @property
    def protocol(self) -> Protocol:
        """How the papers use the data set; raises InputError for an unknown name."""
        return protocol(self.name)

    @property
    def found_by(self) -> str:
        """The name by which the images are found from the current folder."""
        if self.place is None:
            return self.name
        return f"{self.name.partition(':')[0]}:{self.place}"

    @property
    def is_gone(self) -> bool:
        """Whether these are the user's own images, and their path does not exist."""
        entry = find(self.found_by)
        return isinstance(entry, OwnData) and is_gone(entry.path)

    @property
    def query_gallery(self) -> bool:
        """Whether queries search in a separate gallery.

        Raises:
            InputError: unknown name; the user's own images cannot be used.
        """
        return find(self.found_by).query_gallery

    @property
    def never_held_out(self) -> frozenset[str]:
        """`trained`, if a draw would hold some of them out; otherwise empty.

        Raises:
            InputError: the user's own images cannot be used.
        """
        entry = find(self.found_by)
        if not self.trained or not isinstance(entry, OwnData) or self.is_gone:
            return frozenset()
        drawn = entry.drawn_of(self.trained, Draw(self.eval_classes, self.split_seed))
        return self.trained if drawn else frozenset()

    def of_other_data(self, name: str, root: str | Path) -> Choice:
        """The same choice for other data, such as those of `evaluate.py --dataset`.

        It keeps which classes are held out, unless the other data say that themselves.

        Raises:
            InputError: unknown name; the user's own images cannot be used.
        """
        entry = find(name)
        if isinstance(entry, OwnData) and entry.rows().splits is None:
            return replace(self, name=name, root=root, place=None, trained=frozenset())
        own = {"eval_classes": None, "split_seed": None, "place": None, "trained": frozenset()}
        return replace(self, name=name, root=root, **own)

    def load(self, split: str, **options: Any) -> ImageSet:
        """One split; `options` and errors are those of `load`."""
        own = {"eval_classes": self.eval_classes, "seed": self.split_seed}
        own["trained"] = self.never_held_out or None
        images = load(self.found_by, self.root, split, **own, **options)
        images = replace(images, upright=self.exif == "apply")
        if self.ratio_classes == 1.0:
            return images
        count = math.ceil(self.ratio_classes * images.num_classes)
        images = images.select_classes(range(count))
        _refuse_one_class(
            images, f"--ratio-classes {self.ratio_classes:g} of {self.name}", "leaves"
        )
        return images
