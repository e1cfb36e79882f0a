"""What evaluation and training data have in common: class names and files.

Retrieval should be evaluated on classes that were never trained on. If the user's own folders or
tables break that rule, training warns at its start, and so does the page of a run.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import NamedTuple

import numpy as np

from dataset.base import ImageSet
from dataset.statuses import known_statuses

NAMED = 3  # classes that a warning names


class Shared(NamedTuple):
    """What evaluation and training data have in common.

    Attributes:
        classes: names of evaluation classes that are also names of training classes, sorted.
        images: the number of evaluation images that are also training images.
        evaluated_classes, evaluated_images: the numbers of classes and images in the evaluation.
        files_known: whether files could be compared, because all training files are there.
    """

    classes: tuple[str, ...]
    images: int
    evaluated_classes: int
    evaluated_images: int
    files_known: bool

    @property
    def unseen(self) -> bool:
        """Whether it is known that no class and no file of the evaluation was trained on."""
        return self.files_known and not self.classes and not self.images

    def warning(self) -> str:
        """A sentence about what is shared; "" if nothing is known to be."""
        parts = []
        if self.classes:
            count, few = len(self.classes), ", ".join(self.classes[:NAMED])
            have = "have" if count > 1 else "has"
            more = ", …" if count > NAMED else ""
            of = f"{count:,} of the {self.evaluated_classes:,} evaluation classes"
            parts.append(f"{of} {have} the name of a training class ({few}{more})")
        if self.images:
            are = "are training images" if self.images > 1 else "is a training image"
            of = f"{self.images:,} of the {self.evaluated_images:,} evaluation images"
            parts.append(f"{of} {are}")
        if not parts:
            return ""
        meaning = "the numbers are not only about images that the network has never seen"
        if not self.images:
            meaning = "if they are the same classes, the numbers are not about unseen ones"
        return f"{', and '.join(parts)}: {meaning}."


def shared_with_training(train: ImageSet, *evaluation: ImageSet) -> Shared:
    """Compare the training images with those of an evaluation: its queries, and their gallery.

    - Classes are compared by name: two folders called `0` count, whatever is in them.
    - Files are compared by device and inode: links to a file are the same file, copies are not.
      Images in memory are compared by their paths.
    """
    found = shared_names(names_of(train), *evaluation)
    trained = set(_files(train))
    files = (file for part in evaluation for file in _files(part))
    images = sum(file is not None and file in trained for file in files)
    return found._replace(images=images, files_known=None not in trained)


def shared_names(trained: Iterable[str], *evaluation: ImageSet) -> Shared:
    """`shared_with_training`, given only the names of the training classes."""
    names = {name for part in evaluation for name in names_of(part)}
    images = sum(len(part) for part in evaluation)
    return Shared(tuple(sorted(names.intersection(trained))), 0, len(names), images, False)


def names_of(images: ImageSet) -> list[str]:
    """The names of the classes that have an image."""
    return [images.class_names[label] for label in np.unique(images.labels)]


def _files(images: ImageSet) -> Iterator[Hashable]:
    """An identity of each image's file; None if the file is gone."""
    if images.pixels is not None:
        yield from images.paths
        return
    found = known_statuses(images.paths)
    for mode, *file in found[["mode", "device", "inode"]].tolist():
        yield tuple(file) if mode else None
