"""The user's own images, as folders (folders.py) or as a table (table.py), and their splits.

Whole classes are held out. If the data do not say which, a share of the class names is drawn with a
seed; the draw depends only on the names, so it is the same on every machine.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset.base import SPLITS, DataSet, ImageSet, PathTable
from dataset.files import composed, in_class_order, is_file, warn_once
from machine import expanded
from utils import InputError, counted, join_words

logger = logging.getLogger("dataset")
notes_logger = logging.getLogger("dataset.notes")  # `check` shows these as notes
classes_logger = logging.getLogger("dataset.classes")  # `check` finds these by itself

EVAL_CLASSES = 0.5  # the default share of held-out classes of `Draw`
SEED = 1
LEAST_CLASSES = 2  # with a single class, every answer is right

# The usual names of the splits; the first name of each is ours.
SPLIT_WORDS = {
    "train": ("train", "training", "trainval"),
    "eval": ("eval", "evaluation", "val", "valid", "validation", "dev", "test", "testing"),
    "query": ("query", "queries", "probe"),
    "gallery": ("gallery", "galleries"),
}
_SPLIT_OF = {word: split for split, words in SPLIT_WORDS.items() for word in words}
_KIND_OF = {
    **dict.fromkeys(("val", "valid", "validation", "dev"), "validation"),
    **dict.fromkeys(("test", "testing"), "test"),
}
_WORD = re.compile(
    f"(?<![a-z])({'|'.join(sorted(_SPLIT_OF, key=len, reverse=True))})(?![a-z])", re.IGNORECASE
)


def split_of(word: str) -> str | None:
    """The split that a word such as "Validation" stands for; None for any other word."""
    return _SPLIT_OF.get(word.strip().lower())


def check_one_held_out(words: Iterable[str], given: str) -> None:
    """Raise InputError if some images are marked as validation and others as test."""
    kinds: dict[str, str] = {}
    for word in sorted(words):
        if split_of(word) == "eval":
            kinds.setdefault(_KIND_OF.get(word.strip().lower(), "eval"), word.strip())
    if len(kinds) > 1:
        raise InputError(
            f"{given} has {join_words(kinds.values(), 'and')}, and only one part can be held out; "
            "keep one of them, and take the other out"
        )


def split_in(name: str) -> tuple[str, str] | None:
    """The split in a name such as "cars_train", and the rest of the name; None if there is none."""
    found = _WORD.search(name)
    if found is None:
        return None
    rest = name[: found.start()] + "*" + name[found.end() :]
    return _SPLIT_OF[found[1].lower()], rest.lower()


class Note(NamedTuple):
    """A sentence about how the data were understood, and its logging level."""

    text: str
    level: int = logging.INFO


@dataclass(frozen=True, eq=False)
class Rows:
    """All images of a data set, in all splits.

    Attributes:
        paths: the files. labels: (N,) int64, class_names[label] is the name of a class.
        splits: (N,) int8, a position in SPLITS; None if the data do not say.
        boxes: see `ImageSet.boxes`.
        remarks: what was left out but may have been meant. notes: how the data were understood.
    """

    paths: PathTable
    labels: np.ndarray
    class_names: tuple[str, ...]
    splits: np.ndarray | None
    boxes: np.ndarray | None = None
    remarks: tuple[str, ...] = ()
    notes: tuple[Note, ...] = ()

    def counts(self) -> dict[str, int]:
        """The number of images of each split; {} if the data do not say."""
        if self.splits is None:
            return {}
        counts = np.bincount(self.splits, minlength=len(SPLITS)).tolist()
        return {split: count for split, count in zip(SPLITS, counts, strict=True) if count}

    def of(self, splits: Iterable[str]) -> np.ndarray:
        """(N,) bool: whether a row belongs to one of these splits."""
        return np.isin(self.splits, [SPLITS.index(split) for split in splits])


def numbered(names: Iterable[str]) -> tuple[np.ndarray, tuple[str, ...]]:
    """A class name for each image → (N,) int64 numbers, and the name of each number.

    Names with the same accents in different forms are one (see `composed`).
    """
    numbers: dict[str, int] = {}
    spelled: dict[str, int] = {}
    labels = []
    for name in names:
        number = spelled.get(name)
        if number is None:
            number = spelled[name] = numbers.setdefault(composed(name), len(numbers))
        labels.append(number)
    return np.array(labels, np.int64), tuple(numbers)


def suited_share(classes: int) -> float:
    """The default share of the user's own classes that a run holds out.

    It is a fifth, and more if there are few classes, so that there is enough to measure.
    """
    return round(min(1 / 3, max(0.2, 10 / classes)), 2)


def count_held_out(share: float, classes: int) -> int:
    """The number of held-out classes for a share of them: at least two."""
    return max(LEAST_CLASSES, round(share * classes))


@dataclass(frozen=True)
class Draw:
    """Decides which classes are held out if the data do not say it themselves.

    Attributes:
        eval_classes: the share of the classes that is drawn; None is `EVAL_CLASSES`.
        seed: the seed of the draw; None is `SEED`.
        trained: classes that a network was trained on. If there are any, nothing is drawn: all
            other classes are held out.
    """

    eval_classes: float | None = None
    seed: int | None = None
    trained: Collection[str] = ()

    @property
    def used_seed(self) -> int:
        """The seed of the draw, or its default."""
        return SEED if self.seed is None else self.seed

    def held_out(self, class_names: Sequence[str], where: str) -> set[str]:
        """The names of the held-out classes, at least two.

        Args:
            where: the name of the data in errors.

        Raises:
            InputError: the share is not between 0 and 1, or there are too few classes.
        """
        if self.trained:
            return self._never_trained(class_names, where)
        share = EVAL_CLASSES if self.eval_classes is None else self.eval_classes
        if not 0.0 < share < 1.0:
            raise InputError(
                f"--eval-classes {share:g} must be between 0 and 1: it is the share "
                "of the classes that is held out"
            )
        names = in_class_order(set(class_names))
        if len(names) < 2 * LEAST_CLASSES:
            raise InputError(
                f"{where} has {counted(len(names), 'class')} ({_some_of(names)}), and training and "
                f"evaluation need {LEAST_CLASSES} each; add classes"
            )
        most = len(names) - LEAST_CLASSES
        count = min(count_held_out(share, len(names)), most)
        order = np.random.default_rng(self.used_seed).permutation(len(names))
        return {names[index] for index in order[:count]}

    def _never_trained(self, class_names: Sequence[str], where: str) -> set[str]:
        held_out = set(class_names).difference(self.trained)
        if len(held_out) < LEAST_CLASSES:
            raise InputError(
                f"{where} has {counted(len(held_out), 'class')} that the network was not "
                f"trained on, and an evaluation needs {LEAST_CLASSES}; add classes, or name other "
                "images (--dataset folder:PATH or csv:FILE)"
            )
        return held_out


class OwnData(DataSet):
    """The common part of folders and tables: rows of path, label and split.

    Args:
        given: the name as the user wrote it, for messages.
        path: the folder or file.
    """

    options = ("eval_classes", "seed", "trained")

    def __init__(self, given: str, path: Path) -> None:
        self.given = given
        self.path = Path(expanded(str(path)))
        resolved = Path(os.path.realpath(self.path))
        self.name = resolved.stem if is_file(self.path) else resolved.name
        self.origin = "Your own images; nothing is published about them."

    @property
    def place(self) -> Path:
        """The folder or file, as an absolute path."""
        return self.path.absolute()

    def lies_under(self, root: Path) -> bool:
        """Never: their name says where they are."""
        return False

    def share_held_out(self) -> float | None:
        """The default share that a run holds out; None if the data say what is held out."""
        rows = self.rows()
        return None if rows.splits is not None else suited_share(len(rows.class_names))

    def rows(self) -> Rows:
        """All images; raises InputError if the data cannot be used."""
        raise NotImplementedError

    def drawn_of(self, trained: Collection[str], draw: Draw) -> set[str]:
        """The classes that a network was trained on, but that this draw would hold out.

        There may be some if classes were added or removed since the training. Raises InputError if
        the data cannot be used.
        """
        rows = self.rows()
        if rows.splits is not None:
            return set()
        return draw.held_out(rows.class_names, self.given).intersection(trained)

    def split_rows(self, draw: Draw) -> Rows:
        """All images with their splits; logs remarks and notes about them.

        Raises:
            InputError: the data cannot be used, or a share of the classes is given although the
                data say themselves what is held out.
        """
        rows = self.rows()
        for remark in rows.remarks:
            warn_once(remark, logger)
        for note in rows.notes:
            warn_once(note.text, notes_logger, note.level)
        if rows.splits is None:
            return self._drawn_and_logged(rows, draw)
        if draw.eval_classes is not None:
            raise InputError(
                f"--eval-classes has no effect on {self.given}, which says itself what is "
                "held out; leave it out"
            )
        if draw.seed is not None:  # no error, so that runs with a stored seed can be continued
            warn_once(
                f"the seed of the draw ({draw.seed}) has no effect on {self.given}, which says "
                "itself what is held out",
                notes_logger,
            )
        self._check_splits(rows.counts())
        self._compare_classes(rows)
        return rows

    def divided(self, draw: Draw) -> Rows:
        """All images with their splits, like `split_rows`, but without logging."""
        rows = self.rows()
        return rows if rows.splits is not None else self._drawn(rows, draw)[0]

    def _drawn_and_logged(self, rows: Rows, draw: Draw) -> Rows:
        """The images with their splits; logs what was drawn."""
        drawn, held_out = self._drawn(rows, draw)
        if draw.trained:
            note = (
                f"{self.given} has changed since the network was trained, and a new draw would "
                f"hold out classes that it was trained on; held out are the {held_out} of its "
                f"{len(rows.class_names)} classes that it was not trained on"
            )
            warn_once(note, notes_logger)
            return drawn
        note = (
            f"{self.given} does not say what is held out: {held_out} of its "
            f"{len(rows.class_names)} classes are, drawn with seed {draw.used_seed}"
        )
        asked = draw.eval_classes is not None
        more = "" if asked else "; --eval-classes sets the share"
        warn_once(note + more, notes_logger, logging.INFO if asked else logging.WARNING)
        return drawn

    def _drawn(self, rows: Rows, draw: Draw) -> tuple[Rows, int]:
        """The images with their splits, and the number of held-out classes."""
        held_out = draw.held_out(rows.class_names, self.given)
        is_held_out = np.array([name in held_out for name in rows.class_names])
        splits = np.where(is_held_out, SPLITS.index("eval"), SPLITS.index("train"))
        splits = splits[rows.labels].astype(np.int8)
        drawn = Rows(rows.paths, rows.labels, rows.class_names, splits, rows.boxes)
        return drawn, len(held_out)

    def _check_splits(self, counts: dict[str, int]) -> None:
        if ("query" in counts) != ("gallery" in counts):
            have, lack = ("query", "gallery") if "query" in counts else ("gallery", "query")
            raise InputError(f"{self.given} has a split {have} but no {lack}; add it")
        if "query" in counts and "eval" in counts:
            raise InputError(
                f"{self.given} has eval and also query and gallery; use one or the other"
            )

    def _compare_classes(self, rows: Rows) -> None:
        train, held_out = (
            set(np.unique(rows.labels[rows.of(splits)]).tolist())
            for splits in (("train",), SPLITS[1:])
        )
        if common := train & held_out:
            names = in_class_order(rows.class_names[label] for label in common)
            warn_once(
                f"{self.given}: {len(common)} of the {len(held_out)} classes that are evaluated "
                f"are also trained on ({_some_of(names)}); the result is not for unseen classes",
                classes_logger,
            )

    @property
    def query_gallery(self) -> bool:  # type: ignore[override]
        """Whether some of the images are marked as queries; reads the data."""
        return "query" in self.rows().counts()

    def variants(self) -> list[dict[str, Any]]:
        """Training, if there are training images, and the splits that are evaluated."""
        counts = self.rows().counts()
        evaluated = ["query", "gallery"] if "query" in counts else ["eval"]
        trained = [] if counts and "train" not in counts else ["train"]
        return [{"split": split} for split in (*trained, *evaluated)]

    def load(
        self,
        root: Path,
        split: str,
        eval_classes: float | None = None,
        seed: int | None = None,
        trained: Collection[str] = (),
        **options: Any,
    ) -> ImageSet:
        """The images of `split`; see `dataset.load`. The data root has no effect.

        Args:
            eval_classes, seed, trained: see `Draw`.
        """
        rows = self.split_rows(Draw(eval_classes, seed, trained))
        counts = rows.counts()
        # Labels are numbered over queries and gallery together, even if only one of them is loaded.
        held_out = ("query", "gallery") if "query" in counts else ("eval",)
        side = ("train",) if split == "train" else held_out
        wanted = held_out if split == "eval" else (split,)
        if not any(name in counts for name in wanted):
            raise InputError(self._no_such_split(split, counts))
        chosen = np.flatnonzero(rows.of(wanted))
        names, labels = _in_order(rows.class_names, rows.labels, rows.of(side))
        boxes = None if rows.boxes is None else rows.boxes[chosen]
        return ImageSet(
            name=self.name,
            split=split,
            labels=labels[chosen],
            class_names=names,
            paths=rows.paths.take(chosen),
            boxes=None if boxes is None or not (boxes >= 0).any() else boxes,
            source=self.given,
            given=self.given,
        )

    def _no_such_split(self, split: str, counts: dict[str, int]) -> str:
        have = join_words(counts, "and")
        if split == "train":
            return (
                f"{self.given} has no training images, only {have}: it can be evaluated; to train "
                "on it, mark some images as train"
            )
        return f"{self.given} has no split {split!r}; it has {have}"


def _in_order(
    names: Sequence[str], labels: np.ndarray, chosen: np.ndarray
) -> tuple[tuple[str, ...], np.ndarray]:
    """The class names of the chosen images in class order, and all labels renumbered by them."""
    present = np.unique(labels[chosen]).tolist()
    number = {names[label]: label for label in present}
    ordered = in_class_order(number)
    renumbered = np.full(len(names), -1, np.int64)
    renumbered[[number[name] for name in ordered]] = np.arange(len(ordered))
    return tuple(ordered), renumbered[labels]


def _some_of(names: Sequence[str]) -> str:
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])
