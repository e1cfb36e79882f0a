"""The user's own images: `folder:PATH` with a folder a class, or `csv:FILE` with a row an image.

Classes are held out whole. Where the data do not say which, a share of the class names, drawn with
a seed, is held out; the draw depends on the names alone, so it is the same on every machine.
"""

from __future__ import annotations

import csv
import logging
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dataset.base import SPLITS, DataSet, ImageSet, PathTable, Protocol, reason
from dataset.files import find, in_class_order, is_image, join_words, subfolders
from dataset.layouts import list_class_folders
from utils import InputError

logger = logging.getLogger("dataset")

EVAL_CLASSES = 0.5
SEED = 1
_BOX = ("x1", "y1", "x2", "y2")
_DELIMITERS = ",;\t"
_NO_BOX = (-1, -1, -1, -1)


class Row(NamedTuple):
    """One image: its path (relative to the data set's folder, or absolute), class and split."""

    path: str
    label: str
    split: str
    box: tuple[int, int, int, int] = _NO_BOX


@dataclass(frozen=True)
class ClassSplit:
    """Which classes are held out where the data do not say: a share of them, and a seed."""

    eval_classes: float = EVAL_CLASSES
    seed: int = SEED

    def held_out(self, class_names: Sequence[str], where: str) -> set[str]:
        """The class names that are not trained on, at least one and not all.

        Raises:
            InputError: the share is not between 0 and 1, or there are fewer than two classes.
        """
        if not 0.0 < self.eval_classes < 1.0:
            raise InputError(
                f"--eval-classes {self.eval_classes:g} must lie between 0 and 1: it is the share "
                "of the classes that is held out"
            )
        names = in_class_order(set(class_names))
        if len(names) < 2:
            raise InputError(
                f"{where} has {len(names)} class(es), and training and evaluation need one each; "
                "add classes"
            )
        count = min(max(1, round(self.eval_classes * len(names))), len(names) - 1)
        order = np.random.default_rng(self.seed).permutation(len(names))
        return {names[index] for index in order[:count]}


class OwnData(DataSet):
    """What folders and CSV files have in common: rows of path, label and split.

    Args:
        given: the name as the user wrote it, for messages.
        path: the folder or file.
    """

    options = ("eval_classes", "seed")

    def __init__(self, given: str, path: Path) -> None:
        self.given = given
        self.path = path.expanduser()
        self.name = self.path.resolve().stem if self.path.is_file() else self.path.resolve().name
        self.origin = "Your own images; nothing is published about them."

    @property
    def folder(self) -> Path:
        """What relative paths are relative to."""
        return self.path

    def rows(self) -> tuple[list[Row], bool]:
        """All images, and whether their splits are given."""
        raise NotImplementedError

    def split_rows(self, eval_classes: float | None, seed: int) -> list[Row]:
        """All images with a split each.

        Raises:
            InputError: the data cannot be used, or `eval_classes` is given and has no effect.
        """
        rows, given = self.rows()
        if given:
            if eval_classes is not None:
                raise InputError(
                    f"--eval-classes has no effect on {self.given}, which says itself what is "
                    "held out; leave it out"
                )
            return rows
        chooser = ClassSplit(EVAL_CLASSES if eval_classes is None else eval_classes, seed)
        held_out = chooser.held_out([row.label for row in rows], self.given)
        return [row._replace(split="eval" if row.label in held_out else "train") for row in rows]

    @property
    def protocol(self) -> Protocol:  # type: ignore[override]
        """The usual one; with queries and a gallery where the data have them."""
        rows, given = self.rows()
        splits = {row.split for row in rows} if given else set()
        return Protocol(query_gallery="query" in splits)

    def load(
        self,
        root: Path,
        split: str,
        eval_classes: float | None = None,
        seed: int = SEED,
        **options: Any,
    ) -> ImageSet:
        """The images of `split`; see `dataset.load`. The data root plays no part."""
        rows = self.split_rows(eval_classes, seed)
        counts = Counter(row.split for row in rows)
        self._check_splits(counts)
        # Queries and gallery share their labels, whichever of the two is asked for.
        held_out = ("query", "gallery") if counts["query"] else ("eval",)
        side = ("train",) if split == "train" else held_out
        wanted = held_out if split == "eval" else (split,)
        if not any(counts[name] for name in wanted):
            raise InputError(
                f"{self.given} has no split {split!r}; it has {join_words(sorted(counts), 'and')}"
            )
        names = in_class_order({row.label for row in rows if row.split in side})
        return self._image_set([row for row in rows if row.split in wanted], names, split)

    def _check_splits(self, counts: Counter[str]) -> None:
        if bool(counts["query"]) != bool(counts["gallery"]):
            have, lack = ("query", "gallery") if counts["query"] else ("gallery", "query")
            raise InputError(f"{self.given} has a split {have} but no {lack}; add it")
        if counts["query"] and counts["eval"]:
            raise InputError(
                f"{self.given} has eval and also query and gallery; use one or the other"
            )
        if not counts["train"]:
            raise InputError(f"{self.given} has no training images; mark some as split train")

    def _image_set(self, rows: list[Row], class_names: list[str], split: str) -> ImageSet:
        label = {name: index for index, name in enumerate(class_names)}
        # One prefix serves all paths; absolute ones cannot have it.
        absolute = any(Path(row.path).is_absolute() for row in rows)
        prefix = "" if absolute else f"{self.folder}/"
        paths = PathTable(
            (str(self.folder / row.path) if absolute else row.path for row in rows), prefix
        )
        boxes = np.array([row.box for row in rows], np.int32)
        return ImageSet(
            name=self.name,
            split=split,
            labels=np.array([label[row.label] for row in rows], np.int64),
            class_names=tuple(class_names),
            paths=paths,
            boxes=boxes if (boxes >= 0).any() else None,
            source=self.given,
        )


class FolderData(OwnData):
    """`folder:PATH`: PATH/<class>/…, or PATH/train/<class>/… beside PATH/eval/<class>/…."""

    tree = """PATH/<class>/<image>            a share of the classes is held out (--eval-classes)
or
PATH/train/<class>/<image>
PATH/eval/<class>/<image>       (or PATH/query and PATH/gallery)"""

    def rows(self) -> tuple[list[Row], bool]:
        """Every picture below a class folder."""
        if not self.path.is_dir():
            what = "is no folder" if self.path.exists() else "does not exist"
            raise InputError(f"{self.given}: {self.path.resolve()} {what}; check the path")
        parts = {split: _subfolder(self.path, split) for split in SPLITS}
        given = parts["train"] is not None and any(parts[split] for split in SPLITS[1:])
        if given:
            rows = [
                row
                for split, folder in parts.items()
                if folder is not None
                for row in self._rows_in(folder, f"{folder.name}/", split)
            ]
            known = {folder.name for folder in parts.values() if folder is not None}
            self._warn_of_rest(self.path, known)
        else:
            rows = self._rows_in(self.path, "", "")
        if not rows:
            raise InputError(
                f"{self.given}: no picture found; expected {self.path.resolve()}/<class>/<image>, "
                "or train/<class>/<image> and eval/<class>/<image>"
            )
        return rows, given

    def _rows_in(self, folder: Path, inside: str, split: str) -> list[Row]:
        loose = sum(is_image(entry.name) for entry in folder.iterdir() if entry.is_file())
        if loose:
            logger.warning(
                "%s: %d picture(s) lie in no class folder and are left out", folder, loose
            )
        listing = list_class_folders(folder)
        return [
            Row(inside + name, listing.class_names[label], split)
            for name, label in zip(listing.names, listing.labels, strict=True)
        ]

    def _warn_of_rest(self, folder: Path, known: set[str]) -> None:
        rest = [name for name in subfolders(folder) if name not in known]
        if rest:
            logger.warning(
                "%s: %s beside train are left out; the splits are train, eval, query and gallery",
                folder,
                join_words(rest, "and"),
            )


class CsvData(OwnData):
    """`csv:FILE`: columns path, label, split (optional), and x1, y1, x2, y2 (optional)."""

    tree = """path,label,split,x1,y1,x2,y2
photos/a 1.jpg,red mug,train,,,,
photos/b.png,blue mug,eval,10,20,210,180
split: train, eval, query or gallery (without the column, --eval-classes holds a share out)
path: relative to the file's folder, or absolute; x1…y2: a box in pixels, optional"""

    @property
    def folder(self) -> Path:
        """Paths are relative to the file's folder."""
        return self.path.parent

    def rows(self) -> tuple[list[Row], bool]:
        """Every row of the file."""
        try:
            with self.path.open(encoding="utf-8-sig", newline="") as file:
                header = file.readline()
                file.seek(0)
                reader = csv.DictReader(file, delimiter=_delimiter(header), skipinitialspace=True)
                columns = [(name or "").strip().lower() for name in reader.fieldnames or ()]
                self._check_columns(columns)
                reader.fieldnames = columns
                rows = [self._row(entry, reader.line_num) for entry in reader]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            raise InputError(
                f"{self.given} cannot be read ({reason(error)}); it must be a CSV file in UTF-8"
            ) from error
        if not rows:
            raise InputError(f"{self.given} has no rows below its heading; add images")
        first = self.folder / rows[0].path
        if not first.is_file() and not (self.folder / rows[-1].path).is_file():
            raise InputError(
                f"{self.given} line 2 names {rows[0].path}, and {first} does not exist; paths are "
                "relative to the file's folder"
            )
        return rows, "split" in columns

    def _check_columns(self, columns: list[str]) -> None:
        missing = [name for name in ("path", "label") if name not in columns]
        boxes = [name for name in _BOX if name in columns]
        if boxes and len(boxes) < len(_BOX):
            missing += [name for name in _BOX if name not in columns]
        if missing:
            raise InputError(
                f"{self.given} has no column {join_words(missing, 'and')}; its first line must "
                "name the columns path, label, split and, if you like, x1, y1, x2, y2"
            )

    def _row(self, entry: dict[str, str], line: int) -> Row:
        def fault(text: str) -> InputError:
            return InputError(f"{self.given} line {line}: {text}")

        path, label = (entry.get("path") or "").strip(), (entry.get("label") or "").strip()
        if not path or not label:
            raise fault(f"the {'label' if path else 'path'} is empty; fill it in")
        if ".." in Path(path).parts:
            raise fault(f"{path} leads out of the file's folder; write it as an absolute path")
        split = (entry.get("split") or "").strip().lower()
        if "split" in entry and split not in SPLITS:
            raise fault(f"split {split!r} is not one of {', '.join(SPLITS)}")
        return Row(path, label, split, self._box(entry, fault))

    @staticmethod
    def _box(entry: dict[str, str], fault: Any) -> tuple[int, int, int, int]:
        texts = [(entry.get(side) or "").strip() for side in _BOX]
        if not any(texts):
            return _NO_BOX
        try:
            sides = [float(text) for text in texts]
        except ValueError:
            raise fault(f"the box {','.join(texts)} is not four numbers") from None
        if not all(math.isfinite(side) for side in sides):
            raise fault(f"the box {','.join(texts)} is not four numbers")
        if sides == [-1.0] * 4:
            return _NO_BOX
        x1, y1, x2, y2 = (round(side) for side in sides)
        if not (0 <= x1 < x2 and 0 <= y1 < y2):
            raise fault(f"the box {','.join(texts)} must have 0 <= x1 < x2 and 0 <= y1 < y2")
        return x1, y1, x2, y2


def _delimiter(header: str) -> str:
    """The character that parts the heading: spreadsheets of many countries write ";"."""
    return max(_DELIMITERS, key=header.count)


def _subfolder(folder: Path, name: str) -> Path | None:
    found = find(folder, name)
    return found if found is not None and found.is_dir() else None
