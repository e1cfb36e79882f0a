"""`csv:FILE`: the user's own images, one row for each.

The columns are path, label, and optionally split and a box. Tables of Open Metric Learning can be
used unchanged: is_query and is_gallery say what a held-out image is for (both: every such image
searches among the others), and x_1, y_1, x_2, y_2 are the box.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dataset.base import SPLITS, PathTable
from dataset.decoding import reason
from dataset.files import OnDisk, is_file, is_folder
from dataset.foreign import ADDRESS, is_address
from dataset.own import Note, OwnData, Rows, check_one_held_out, numbered, split_of
from dataset.spreadsheet import read_rows
from machine import expanded
from utils import InputError, join_words

_BOX = ("x1", "y1", "x2", "y2")
BOX_NAMES = {
    **{name: side for side in _BOX for name in (side, f"{side[0]}_{side[1]}")},
    **{"xmin": "x1", "ymin": "y1", "xmax": "x2", "ymax": "y2"},
    **{"x_min": "x1", "y_min": "y1", "x_max": "x2", "y_max": "y2"},
}
_SPLIT_NAMES = ("split", "set", "subset", "partition", "phase", "evaluation_status")
_FLAGS = ("is_query", "is_gallery")
_KNOWN = {"path", "label", *_FLAGS, *_SPLIT_NAMES, *BOX_NAMES}
_NO_BOX = (-1, -1, -1, -1)
_LARGEST = 2**31 - 1
_SHOWN = 12  # names of columns in a message
_TRUE, _FALSE = ("true", "1", "1.0", "yes"), ("", "false", "0", "0.0", "no", "nan", "none")


class CsvData(OwnData):
    """`csv:FILE`: columns path, label, split (optional), and x1, y1, x2, y2 (optional)."""

    tree = """path,label,split,x1,y1,x2,y2
photos/a 1.jpg,red mug,train,,,,
photos/b.png,blue mug,eval,10,20,210,180
split: train, eval, query or gallery (without the column,
  --eval-classes holds a share out)
path: relative to the file's folder, or absolute
x1 to y2: a box in pixels, optional"""

    def rows(self) -> Rows:
        """Every row of the file, which is read once per process, unless it changes."""
        if is_folder(self.path):
            raise InputError(
                f"{self.given} is a folder; if its folders are the classes, name it "
                f"folder:{self.path}"
            )
        try:
            status = self.path.stat()
        except OSError as error:
            raise InputError(f"{self.given} cannot be read ({reason(error)})") from error
        stamp = (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
        return _read(self.path.absolute(), self.path, self.given, stamp)


@lru_cache(maxsize=8)
def _read(_absolute: Path, path: Path, given: str, _stamp: tuple[int, ...]) -> Rows:
    """The rows of a file; unused arguments make the cache distinguish other and changed files."""
    return _Table(path, given).read()


class _Columns(NamedTuple):
    """The positions of the columns, from 0; an empty tuple if there are none.

    `splits` are the columns that may say what is held out: "split", or else its synonyms.
    """

    path: int
    label: int
    splits: tuple[int, ...]
    flags: tuple[int, ...]
    box: tuple[int, ...]
    names: tuple[str, ...]

    def used(self, split: int | None) -> set[int]:
        """The positions of the columns that are used, with the split in column `split`."""
        return {self.path, self.label, *self.flags, *self.box} | ({split} - {None})


class _Table:
    """Reads a file; `read` returns its rows."""

    def __init__(self, path: Path, given: str) -> None:
        self.path = path
        self.given = given
        self.folder = path.parent
        self.on_disk = OnDisk(str(self.folder))

    def read(self) -> Rows:
        rows = read_rows(self.path, self.given)
        columns = self._columns(next(rows, (0, []))[1])
        paths: list[str] = []
        labels: list[str] = []
        marks = _Marks()
        boxes: dict[int, tuple[int, ...]] = {}
        first = 0
        for line, row in rows:
            row = self._fitted(row, columns, line)
            path, label = row[columns.path].strip(), row[columns.label].strip()
            if columns.box:
                box = self._box([row[place].strip() for place in columns.box], line)
                if box is not _NO_BOX:
                    boxes[len(paths)] = box
            paths.append(self._checked_path(path, label, line))
            labels.append(label)
            marks.add(row, columns, line)
            first = first or line
        if not paths:
            raise InputError(f"{self.given} has no rows below its heading; add images")
        self._check_presence(paths, first)
        split = self._split_column(marks, columns)
        numbers, names = numbered(labels)
        return Rows(
            self._path_table(paths),
            numbers,
            names,
            self._splits(marks, columns, split),
            _box_array(boxes, len(paths)),
            notes=(*self._notes(columns, split), *self._notes_on_labels(names)),
        )

    # --- lines ---

    def _fitted(self, row: list[str], columns: _Columns, line: int) -> list[str]:
        missing = len(columns.names) - len(row)
        if missing >= 0:
            return row + [""] * missing if missing else row
        if any(map(str.strip, row[missing:])):
            raise self._fault(
                line,
                f"{len(row)} fields, and the heading has {len(columns.names)}; put quotation "
                "marks around fields with a comma in them",
            )
        return row

    def _fault(self, line: int, text: str) -> InputError:
        return InputError(f"{self.given} line {line}: {text}")

    # --- columns ---

    def _columns(self, heading: list[str]) -> _Columns:
        names = [name.strip().lower() for name in heading]
        place = {name: names.index(name) for name in names}
        missing = [name for name in ("path", "label") if name not in place]
        sides = {BOX_NAMES[name]: place[name] for name in names if name in BOX_NAMES}
        if sides:
            missing += [side for side in _BOX if side not in sides]
        flags = tuple(place[name] for name in _FLAGS if name in place)
        if flags:
            missing += [name for name in _FLAGS if name not in place]
        if missing:
            raise InputError(
                f"{self.given} has no column {join_words(missing, 'and')}; {self._of(heading)}"
            )
        splits = [place[name] for name in _SPLIT_NAMES if name in place]
        if "split" in place:
            splits = splits[:1]
        box = tuple(sides[side] for side in _BOX if side in sides)
        twice = [name for name in place if names.count(name) > 1 and name in _KNOWN]
        if twice:
            raise InputError(f"{self.given} has two columns {twice[0]}; rename one of them")
        return _Columns(place["path"], place["label"], tuple(splits), flags, box, tuple(names))

    def _of(self, heading: list[str]) -> str:
        """What the first line must be, and what this one is."""
        if any(is_file(self.folder / name.strip()) for name in heading):
            return "its first line is an image; put the line path,label above it"
        names = [name.strip().lower() for name in heading if name.strip()]
        has = join_words([*names[:_SHOWN], *(["others"] if len(names) > _SHOWN else [])], "and")
        return (
            "its first line must name the columns path and label and, if you like, split, x1, y1, "
            f"x2, y2, separated by commas, semicolons or tabs, and it names {has or 'nothing'}"
        )

    def _notes(self, columns: _Columns, split: int | None) -> Iterator[Note]:
        used = columns.used(split)
        left = [name for place, name in enumerate(columns.names) if name and place not in used]
        if left:
            yield Note(
                f"{self.given}: {join_words(left, 'and')} {'is' if len(left) == 1 else 'are'} not "
                "used; the columns that are: path, label, split, is_query and is_gallery, and "
                "boxes in pixels as x1, y1, x2, y2",
                logging.WARNING,
            )

    def _notes_on_labels(self, names: Collection[str]) -> Iterator[Note]:
        """A warning if labels include both 3 and 3.0, which pandas may make of 3."""
        known = set(names)
        twice = [name for name in names if name.endswith(".0") and name[:-2] in known]
        if twice:
            yield Note(
                f"{self.given}: the labels {twice[0][:-2]} and {twice[0]} are two classes"
                + (f", and {len(twice) - 1:,} others likewise" if len(twice) > 1 else "")
                + "; write them alike if they are one",
                logging.WARNING,
            )

    # --- fields ---

    def _checked_path(self, path: str, label: str, line: int) -> str:
        if not path or not label:
            raise self._fault(line, f"the {'label' if path else 'path'} is empty; fill it in")
        if is_address(path):
            raise self._fault(line, f"{path} {ADDRESS}")
        path = self.on_disk(expanded(path))
        if _has_break(label) or (_has_break(path) and not self.on_disk.is_there(path)):
            raise self._fault(
                line,
                f"the {'label' if _has_break(label) else 'path'} goes on in the next line; close "
                "its quotation marks",
            )
        if ".." in path and ".." in path.split("/"):
            raise self._fault(
                line, f"{path} leads out of the file's folder; write it as an absolute path"
            )
        return path

    def _box(self, texts: list[str], line: int) -> tuple[int, ...]:
        if not any(texts) or all(text.lower() == "nan" for text in texts):
            return _NO_BOX
        shown = ",".join(texts)
        try:
            sides = [float(text) for text in texts]
        except ValueError:
            raise self._fault(line, f"the box {shown} is not four numbers") from None
        if not all(math.isfinite(side) for side in sides):
            raise self._fault(line, f"the box {shown} is not four numbers")
        if sides == [-1.0] * 4:
            return _NO_BOX
        if all(0 <= side <= 1 for side in sides):
            raise self._fault(
                line,
                f"the box {shown} is in shares of the picture's width and height, and boxes are in "
                "pixels; multiply x by the width and y by the height",
            )
        x1, y1, x2, y2 = (round(side) for side in sides)
        if not (0 <= x1 < x2 and 0 <= y1 < y2):
            raise self._fault(line, f"the box {shown} must have 0 <= x1 < x2 and 0 <= y1 < y2")
        if max(x2, y2) > _LARGEST:
            raise self._fault(line, f"the box {shown} is larger than any picture; correct it")
        return x1, y1, x2, y2

    def _check_presence(self, paths: Sequence[str], line: int) -> None:
        first, last = self.folder / paths[0], self.folder / paths[-1]
        if not is_file(first) and not is_file(last):
            raise InputError(
                f"{self.given} line {line} names {paths[0]}, and {first} does not exist; paths are "
                "relative to the file's folder"
            )

    def _path_table(self, paths: list[str]) -> PathTable:
        # One prefix serves all paths; absolute ones cannot have it.
        if not any(map(os.path.isabs, paths)):
            return PathTable(paths, f"{self.folder}/")
        return PathTable(str(self.folder / path) for path in paths)

    # --- splits ---

    def _split_column(self, marks: _Marks, columns: _Columns) -> int | None:
        """The column with the splits; one with another name must contain names of splits."""
        for position, place in enumerate(columns.splits):
            words = {mark.words[position] for mark in marks.first_line}
            if columns.names[place] == "split" or any(map(split_of, words)):
                check_one_held_out(words, self.given)
                return place
        return None

    def _splits(self, marks: _Marks, columns: _Columns, split: int | None) -> np.ndarray | None:
        """(N,) the split of each row; None if the file does not say it."""
        if split is None and not columns.flags:
            return None
        name = "" if split is None else columns.names[split]
        found = []
        for mark, line in marks.first_line.items():
            word = "" if split is None else mark.words[columns.splits.index(split)]
            found.append(SPLITS.index(self._split(name, word, mark.flags, line)))
        return np.array(found, np.int8)[marks.numbers]

    def _split(self, column: str, word: str, flags: Sequence[str], line: int) -> str:
        said = split_of(word)
        if column and said is None:
            raise self._fault(line, f"{column} {word!r} is not one of {', '.join(SPLITS)}")
        if not flags:
            return said
        query, gallery = (self._flag(text, line) for text in flags)
        if not query and not gallery and said in ("train", None):
            return "train"
        found = "eval" if query and gallery else "query" if query else "gallery"
        if not (query or gallery) or said not in ("eval", found, None):
            raise self._fault(
                line,
                f"{column} {word!r} does not fit is_query {flags[0] or 'empty'} and is_gallery "
                f"{flags[1] or 'empty'}; an image that is held out is a query, in the gallery, or "
                "both, and no other is",
            )
        return found

    def _flag(self, text: str, line: int) -> bool:
        if text.lower() not in (*_TRUE, *_FALSE):
            raise self._fault(line, f"{text!r} is neither True nor False")
        return text.lower() in _TRUE


class _Mark(NamedTuple):
    """A row's entries about its split: the words in the split columns, and the two flags."""

    words: tuple[str, ...]
    flags: tuple[str, ...]


class _Marks:
    """The distinct marks of all rows.

    Attributes:
        numbers: the number of each row's mark. first_line: the marks in order → their first lines.
    """

    def __init__(self) -> None:
        self.numbers: list[int] = []
        self.first_line: dict[_Mark, int] = {}
        self._number: dict[tuple[str, ...], int] = {}  # of a row's fields as they are written
        self._place: dict[_Mark, int] = {}

    def add(self, row: list[str], columns: _Columns, line: int) -> None:
        """Add the mark of one row."""
        said = tuple([row[place] for place in (*columns.splits, *columns.flags)])
        number = self._number.get(said)
        if number is None:
            words = tuple(text.strip() for text in said)
            split = len(columns.splits)
            mark = _Mark(words[:split], words[split:])
            self.first_line.setdefault(mark, line)
            number = self._number[said] = self._place.setdefault(mark, len(self._place))
        self.numbers.append(number)


def _has_break(text: str) -> bool:
    return "\n" in text or "\r" in text


def _box_array(boxes: dict[int, tuple[int, ...]], count: int) -> np.ndarray | None:
    if not boxes:
        return None
    array = np.full((count, 4), _NO_BOX, np.int32)
    array[list(boxes)] = list(boxes.values())
    return array
