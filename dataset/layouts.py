"""Published data sets, and how copies of them on disk are recognised.

cub.py, cars.py, sop.py, inshop.py and vid.py each have one `Benchmark`: the folder names and
layouts of copies, the class split, the published counts, and where to get it.
"""

from __future__ import annotations

import itertools
import logging
from abc import abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np

from dataset.base import DataSet, ImageSet, PathTable, check_command
from dataset.files import OnDisk, find, find_all, is_file, is_folder, subfolders, warn_once
from dataset.tree import Tree, tree
from utils import InputError, counted, join_words

counts_logger = logging.getLogger("dataset.counts")


FOLDERS_LOOKED_INTO = 200
"""How many folders of unusual names are searched for a data set that is not where it should be."""


class Listing(NamedTuple):
    """The images of a layout, as its own files list them.

    `names` are relative to `folder`; `labels` (N,) are consecutive from 0, and indices of
    `class_names`.
    """

    folder: Path
    names: Sequence[str]
    labels: np.ndarray
    class_names: tuple[str, ...]


class Layout(NamedTuple):
    """One arrangement of files on disk.

    Attributes:
        title: its name for readers. matches: whether a folder has it, by names alone.
        read: the folder, and arguments from the data set's `list_split` → a `Listing`.
        concern: why results on its pictures cannot be compared with published ones, if they are
            other pictures; else "".
    """

    title: str
    matches: Callable[[Path], bool]
    read: Callable[..., Listing]
    concern: str = ""


class NotFoundError(InputError):
    """There is no copy of the data set under the data root; `detail` says where it was searched."""

    def __init__(self, name: str, root: Path, detail: str) -> None:
        super().__init__(
            f"data set {name} was not found: {detail}; `{check_command(name, root)}` shows where "
            "to get it and how to lay it out"
        )
        self.detail = detail


class Benchmark(DataSet):
    """A published data set in the layouts of its copies.

    Attributes:
        folders: its usual folders under the data root (any letter case).
        layouts: tried in turn on each of these folders, and on the data root itself.
    """

    folders: ClassVar[tuple[str, ...]]
    layouts: ClassVar[tuple[Layout, ...]]

    @abstractmethod
    def list_split(self, layout: Layout, folder: Path, split: str, **options: Any) -> Listing:
        """The images of `split`; raises InputError if the layout's own files are damaged."""

    def load(self, root: Path, split: str, **options: Any) -> ImageSet:
        """The images of `split` under the data root; see `dataset.load`."""
        self.check_split(split)
        layout, folder = self.locate(root)
        listing = self.list_split(layout, folder, split, **options)
        if not len(listing.names):
            raise InputError(
                f"{self.name}: {folder} ({layout.title}) holds no image of split {split}; "
                f"unpack it again, or see `{check_command(self.name, root)}`"
            )
        listing = self._on_disk(listing, root)
        images = ImageSet(
            name=self.name,
            split=split,
            labels=np.asarray(listing.labels, np.int64),
            class_names=listing.class_names,
            paths=PathTable(listing.names, f"{listing.folder}/"),
            source=f"{layout.title} in {folder}",
            concern=layout.concern,
        )
        self._say_concern(images)
        self._compare_counts(images, self.title(split, **options), root)
        return images

    def locate(self, root: Path) -> tuple[Layout, Path]:
        """The layout and the folder of the copy under `root`.

        Raises:
            NotFoundError: there is none; the message names the folders that were searched.
        """
        roots = _data_roots(root)
        for place in roots:
            if found := self._found_in(place):
                return found
        raise NotFoundError(self.name, root, self._search(roots))

    def _usual(self, place: Path) -> list[Path]:
        """The usual folders that are there."""
        return [
            folder
            for name in self.folders
            for outer in find_all(place, name)
            for folder in (outer, *find_all(outer, outer.name))  # unpacked into its own name
        ]

    def _found_in(self, place: Path) -> tuple[Layout, Path] | None:
        for folder in [*self._usual(place), place]:
            for layout in self.layouts:
                if is_folder(folder) and layout.matches(folder):
                    return layout, folder
        return None

    def _search(self, roots: Sequence[Path]) -> str:
        there = [root for root in roots if is_folder(root)]
        folders_there = (root / name for root in there for name in subfolders(root))
        for folder in itertools.islice(folders_there, FOLDERS_LOOKED_INTO):
            if self._found_in(folder):  # "Cars (1)", say
                return f"it seems to be in {folder}, so give that folder as --data-root"
        candidates = [folder for root in roots for folder in self._usual(root)]
        if candidates:
            hold = "hold" if len(candidates) > 1 else "holds"
            what = f"{join_words(candidates, 'and')} {hold} none of its known layouts"
        elif there:
            folders = join_words(self.folders, "or")
            what = f"looked in {join_words(there, 'and')} and for {folders} in it"
        else:
            what = f"the data root {roots[0]} does not exist"
        known = join_words((layout.title for layout in self.layouts), "or")
        return f"{what}; expected {known}"

    def _on_disk(self, listing: Listing, root: Path) -> Listing:
        """The listing with its images' names as spelled on disk, if the lists differ from it.

        Raises:
            InputError: neither the first nor the last image is there.
        """
        if _is_there(listing):
            return listing
        spelled = list(map(OnDisk(str(listing.folder)), listing.names))
        found = listing._replace(names=spelled)
        if not _is_there(found):
            raise InputError(
                f"{self.name}: the lists name images such as {listing.names[0]}, which is not in "
                f"{listing.folder}; unpack the images there, or see "
                f"`{check_command(self.name, root)}`"
            )
        return found

    def _say_concern(self, images: ImageSet) -> None:
        if images.concern:
            warn_once(f"{self.name} ({images.source}): {images.concern}", counts_logger)

    def _compare_counts(self, images: ImageSet, title: str, root: Path) -> None:
        differences = self.count_differences(title, len(images), images.num_classes)
        if differences:
            warn_once(
                f"{self.name} {title} ({images.source}): {differences}; "
                f"`{check_command(self.name, root)}` says more",
                counts_logger,
            )


def _is_there(listing: Listing) -> bool:
    """Whether the first or the last image of a listing is a file."""
    ends = (listing.names[0], listing.names[-1])
    return any(is_file(listing.folder / name) for name in ends)


_USUAL_ROOTS = ("data", "datasets")


def _data_roots(root: Path) -> list[Path]:
    """The folders that are searched: the data root; for ./data also ./datasets, and vice versa."""
    usual = [Path(name) for name in _USUAL_ROOTS]
    here = [place.absolute() for place in usual]
    if root.absolute() not in here:
        return [root]
    return [root, *(place for place in usual if place.absolute() != root.absolute())]


def has(*relatives: str) -> Callable[[Path], bool]:
    """A test for `Layout.matches`: every one of `relatives` exists, in any letter case."""
    return lambda folder: all(find(folder, relative) is not None for relative in relatives)


# --- listings that several data sets share --------------------------------------------------------


def list_class_folders(folder: Path) -> Listing:
    """Every picture under the sub-folders of `folder`, each of them a class."""
    found = tree(folder)
    for remark in found.remarks:
        warn_once(remark)
    names: list[str] = []
    labels: list[int] = []
    class_names: list[str] = []
    for class_name, pictures in by_top_level(found).items():
        if not pictures:
            warn_once(f"{folder / class_name} holds no picture and is not counted as a class")
            continue
        names.extend(pictures)
        labels.extend([len(class_names)] * len(pictures))
        class_names.append(class_name)
    return Listing(folder, names, np.array(labels, np.int64), tuple(class_names))


def by_top_level(found: Tree) -> dict[str, list[str]]:
    """The pictures in each of the top folders, in class order; others are left out."""
    inside: dict[str, list[str]] = {name: [] for name in found.top_level()}
    for picture in found.pictures:
        name, slash, _ = picture.partition("/")
        if slash:
            inside[name].append(picture)
    return inside


def from_rows(folder: Path, names: Sequence[str], keys: Sequence[Any]) -> Listing:
    """A listing of `names` whose classes are the distinct `keys`, sorted."""
    labels, values = dense(keys)
    return Listing(folder, names, labels, tuple(str(value) for value in values))


def dense(keys: Sequence[Any] | np.ndarray) -> tuple[np.ndarray, list[Any]]:
    """Any sortable keys → labels (N,) int64, consecutive from 0, and the key of each label."""
    values, labels = np.unique(np.asarray(keys), return_inverse=True)
    return labels.astype(np.int64).reshape(-1), values.tolist()


def half_of_classes(listing: Listing, split: str, name: str) -> Listing:
    """The papers' class split: the first half of the classes is for training, the second held out.

    Images are sorted by class and name, so that their order does not depend on the layout.

    Raises:
        InputError: there are fewer than two classes to divide.
    """
    count = len(listing.class_names)
    if count < 2:
        raise InputError(
            f"{name}: {listing.folder} holds {counted(count, 'class')}, and train and eval need "
            "one each; unpack it again"
        )
    low, high = (0, count // 2) if split == "train" else (count // 2, count)
    chosen = np.flatnonzero((listing.labels >= low) & (listing.labels < high)).tolist()
    chosen.sort(key=lambda index: (listing.labels[index], listing.names[index]))
    return listing._replace(
        names=[listing.names[index] for index in chosen],
        labels=listing.labels[chosen] - low,
        class_names=listing.class_names[low:high],
    )


def folder_with(name: str, *candidates: Path | None) -> Path:
    """The first of `candidates` that has the file `name`, or else the first that exists."""
    existing = [folder for folder in candidates if folder is not None]
    return next((folder for folder in existing if is_file(folder / name)), existing[0])
