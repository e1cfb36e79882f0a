"""The images that a run trains on, that pick its best epoch, and that it is judged on."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

import dataset
import processes
from dataset.base import ImageSet
from dataset.overlap import shared_with_training
from dataset.own import LEAST_CLASSES, count_held_out
from evaluation.embedding import Viewing
from evaluation.meanings import VALIDATION, about_matches
from evaluation.tasks import Task, images_of, tasks_of
from utils import InputError

logger = logging.getLogger("train")


@dataclass(frozen=True)
class Data:
    """The images of a run.

    Attributes:
        train: the training images. selection: picks the best epoch. test: what the run is judged
            on; the same list object as `selection` if the test classes pick the best epoch.
        unreadable: how many images cannot be read, as far as is known, by side ("train", "eval").
    """

    train: ImageSet
    selection: list[Task]
    test: list[Task]
    unreadable: dict[str, int] = field(default_factory=dict)

    @property
    def selects_on_test(self) -> bool:
        """Whether the test classes pick the best epoch, as in the papers' protocol."""
        return self.selection is self.test

    @property
    def tasks(self) -> list[Task]:
        """All tasks that are evaluated, each once."""
        return self.test if self.selects_on_test else [*self.selection, *self.test]

    @property
    def judged(self) -> list[ImageSet]:
        """All images that are evaluated, each set once."""
        return images_of(self.tasks)

    def fingerprints(self) -> dict[str, str]:
        """Numbers and contents of the images, which must be the same in all processes."""
        evaluation = " and ".join(images.content_fingerprint() for images in self.judged)
        return {
            "their training images": f"{len(self.train):,} ({self.train.content_fingerprint()})",
            "their evaluation images": f"{sum(map(len, self.judged)):,} ({evaluation})",
        }

    @property
    def picked_on(self) -> str:
        """The classes that pick the best epoch, in words."""
        return "test classes" if self.selects_on_test else "validation classes"


@dataclass(frozen=True)
class HeldOut:
    """Which training classes pick the best epoch: a fold of them, or a random share.

    Attributes:
        share: of the classes, drawn with `seed`. fold: one of `folds` that the classes are dealt
            into, or, if that is 0, one of the data set's own folds.
    """

    share: float = 0.0
    fold: int | None = None
    seed: int = 1
    folds: int = 0

    def of(self, train: ImageSet) -> np.ndarray:
        """(C,) bool: the classes that are held out.

        Raises:
            InputError: the data set has no such fold, or too few classes.
        """
        if self.fold is not None:
            chosen, flag = self._folds_of(train) == self.fold, f"--val-fold {self.fold}"
        elif self.share:
            chosen, flag = self._drawn_from(train), f"--val-classes {self.share:g}"
        else:
            return np.zeros(train.num_classes, bool)
        left = int((~chosen).sum())
        if min(left, len(chosen) - left) < LEAST_CLASSES:
            raise InputError(
                f"{flag} holds out {len(chosen) - left} of the {len(chosen)} training classes of "
                f"{train.name}, and each side needs two; choose another share or fold, or give "
                "more classes"
            )
        return chosen

    def _drawn_from(self, train: ImageSet) -> np.ndarray:
        """(C,) bool: a random share of the classes."""
        count = count_held_out(self.share, train.num_classes)
        order = np.random.default_rng(self.seed).permutation(train.num_classes)
        return np.isin(np.arange(train.num_classes), order[:count])

    def _folds_of(self, train: ImageSet) -> np.ndarray:
        """(C,) the fold of each class."""
        if self.folds:
            if self.fold >= self.folds:
                raise InputError(
                    f"--val-fold {self.fold}: the folds are 0 to {self.folds - 1}; choose one"
                )
            return deal(train.labels, train.num_classes, self.folds)
        if train.folds is None or self.fold > train.folds.max():
            known = "none" if train.folds is None else f"0 to {train.folds.max()}"
            raise InputError(
                f"--val-fold {self.fold}: the folds of {train.name} are {known}; "
                "choose one of them, give --val-folds K as well, or use --val-classes"
            )
        found = np.full(train.num_classes, -1)
        found[train.labels] = train.folds
        return found


def deal(labels: np.ndarray, classes: int, folds: int) -> np.ndarray:
    """(C,) the fold of each class, dealt so that all folds have about as many images.

    Classes are dealt from the largest to the smallest, each to the fold with the fewest images so
    far. Classes of equal size come in a random order, which is the same in every run.

    Raises:
        InputError: a fold would have fewer than two classes, or nothing would be left to train on.
    """
    if folds < 2 or classes < 2 * folds:
        raise InputError(
            f"{folds} folds of {classes} training classes: each needs two classes or more, so "
            f"choose 2 to {classes // 2} folds"
            if classes >= 4
            else f"{classes} training classes are too few to hold a fold of them out"
        )
    sizes = np.bincount(labels, minlength=classes)
    order = np.random.default_rng(0).permutation(classes)
    order = order[np.argsort(-sizes[order], kind="stable")]
    found, filled = np.zeros(classes, np.int64), np.zeros((folds, 2), np.int64)
    for label in order:
        fold = min(range(folds), key=lambda k: tuple(filled[k]))  # images, then classes
        found[label] = fold
        filled[fold] += sizes[label], 1
    return found


def load(
    choice: dataset.Choice, held_out: HeldOut, batch_size: int, max_bad_images: float = 0.0
) -> Data:
    """The training split and the evaluations, with validation classes split off if asked for.

    Args:
        max_bad_images: the fraction of each split whose files may be missing.

    Raises:
        InputError: the data or some of their files are missing, or they are too few for a batch.
    """
    train = choice.load("train")
    _check_classes(train, choice.name)
    test = tasks_of(choice)
    selection = test
    chosen = held_out.of(train)
    if chosen.any():
        queries = train.select_classes(np.flatnonzero(chosen))
        train = train.select_classes(np.flatnonzero(~chosen))
        selection = [Task.published(VALIDATION, queries, None, choice.protocol)]
    if batch_size > len(train):
        raise InputError(
            f"--batch-size {batch_size} is larger than the {len(train):,} training images of "
            f"{choice.name}; choose at most {len(train)}"
        )
    data = Data(train, selection, test)
    processes.check_alike(data.fingerprints, "give all of them the same files")
    dataset.require_files(train, data.judged, max_bad_images)
    _warn_of_evaluation(data)
    return data


def look_through(data: Data, viewing: Viewing) -> Data:
    """Looks for images that cannot be read, names each in a warning and counts them in the data.

    With `--decode cache` the caches are made here.

    Raises:
        InputError: there are more of them than `--max-bad-images` admits.
    """
    look = partial(
        dataset.require_readable, data.train, data.judged, viewing.max_bad_images, viewing.reading
    )
    return replace(data, unreadable=processes.from_main(look))


def _warn_of_evaluation(data: Data) -> None:
    """Warns of what makes the numbers mean less than they seem to."""
    if shared := shared_with_training(data.train, *data.judged).warning():
        logger.warning("%s", shared)
    for task in data.tasks:
        count = {"queries": len(task.queries), "queries_without_match": task.without_match}
        if about := about_matches(count):
            logger.warning("%s: %s", task.title, about)


def _check_classes(train: ImageSet, name: str) -> None:
    counts = np.bincount(train.labels, minlength=train.num_classes)
    if (counts < 2).all():
        raise InputError(
            f"every training class of {name} has a single image, so no image has another that it "
            "could be near to; give the classes two images or more"
        )
    if alone := int((counts == 1).sum()):
        logger.warning(
            "%s of the %s training classes of %s have a single image, which no other of its class "
            "can be near to; the first is %s",
            f"{alone:,}",
            f"{train.num_classes:,}",
            name,
            train.class_names[int(np.argmax(counts == 1))],
        )
