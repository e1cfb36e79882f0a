"""`folder:PATH`: the user's own images, with a folder for each class.

There are four arrangements: PATH/<class>/…, of which a share of the classes is held out;
PATH/<split>/<class>/…; PATH/<something>_<split>/<class>/…; and PATH/<class>/<split>/….
Splits may have any of the usual names (own.SPLIT_WORDS). A folder that is called like a split but
fits none of these is refused, because the numbers would be wrong if it counted as a class.
"""

from __future__ import annotations

import logging
import os
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from functools import lru_cache

import numpy as np

from dataset.base import SPLITS, PathTable, reason
from dataset.files import in_class_order, is_file, is_folder
from dataset.foreign import packed_suffixes, what_it_is
from dataset.layouts import by_top_level
from dataset.own import Note, OwnData, Rows, check_one_held_out, numbered, split_in, split_of
from dataset.tree import Tree, tree
from utils import InputError, counted, join_words


class FolderData(OwnData):
    """`folder:PATH`: PATH/<class>/…, or PATH/train/<class>/… and PATH/eval/<class>/…."""

    tree = """PATH/<class>/<image>         a share of the classes is held out
or                           (--eval-classes)
PATH/train/<class>/<image>
PATH/eval/<class>/<image>    (or PATH/query and PATH/gallery)"""

    def rows(self) -> Rows:
        """Every picture below a class folder."""
        if not is_folder(self.path):
            raise InputError(f"{self.given}: {self.path.absolute()} {self._why_none()}")
        return _rows(tree(self.path), self.given)

    def _why_none(self) -> str:
        """Why the path is no folder, and what to do."""
        try:
            os.stat(self.path)  # noqa: PTH116
        except PermissionError as error:
            return f"cannot be read ({reason(error)}); check the permissions"
        except (OSError, ValueError):
            if not os.path.lexists(self.path):
                return "does not exist; check the path"
        if is_file(self.path):
            other = what_it_is(self.path)
            return f"is {other or f'a file; if it is a table of images, name it csv:{self.path}'}"
        return "is not a folder; check the path"


@lru_cache(maxsize=8)
def _rows(found: Tree, given: str) -> Rows:
    return _Arrangement(found, given).rows()


class _Arrangement:
    """Divides the pictures of a tree into splits and classes."""

    def __init__(self, found: Tree, given: str) -> None:
        self.tree = found
        self.given = given
        self.pictures = by_top_level(found)
        self.filled = {name: pictures for name, pictures in self.pictures.items() if pictures}
        self.deep = {
            name
            for name, pictures in self.filled.items()
            if any(picture.count("/") > 1 for picture in pictures)
        }
        self.remarks = list(found.remarks)

    def rows(self) -> Rows:
        self._check_wrapping()
        splits = self._split_folders()
        classes_first = not splits and self._has_splits_in_classes()
        self._remark_loose(splits)
        if splits:
            table = list(self._by_split(splits))
        elif classes_first:
            table = list(self._by_class())
        else:
            table = list(self._classes_only())
        if not table:
            raise InputError(
                f"{self.given}: {self._what_else()}; expected "
                f"{self.tree.folder.absolute()}/<class>/<image>, or "
                "train/<class>/<image> and eval/<class>/<image>"
            )
        labels, names = numbered(class_name for _, class_name, _ in table)
        numbers = np.array([SPLITS.index(split or "train") for *_, split in table], np.int8)
        return Rows(
            PathTable((path for path, _, _ in table), f"{self.tree.folder}/"),
            labels,
            names,
            numbers if splits or classes_first else None,
            remarks=tuple(self.remarks),
            notes=(*self._notes(), *self._notes_on_depth(table, 2 if splits else 1, classes_first)),
        )

    def _what_else(self) -> str:
        """What the folder has instead of pictures in class folders."""
        if loose := len(self.tree.pictures):
            return f"{counted(loose, 'picture')}, outside any class folder"
        among = f" among {self._other_files()}" if self.tree.others else ""
        packed = join_words(packed_suffixes(self.tree.others), "and")
        return f"no picture found{among}" + (
            f"; take the pictures out of the {packed} files" if packed else ""
        )

    # --- which folders are splits ---

    def _check_wrapping(self) -> None:
        (name, *others) = self.filled or ("",)
        if not others and name in self.deep and split_of(name) is None:
            raise InputError(
                f"{self.given} holds one folder with pictures, {name}, which would be its only "
                f"class; if the classes are in it, name it: folder:{self.tree.folder / name}"
            )

    def _split_folders(self) -> dict[str, str]:
        """Split → the folder with its class folders; {} if there are no splits.

        Raises:
            InputError: folders are called like splits but cannot be used as such.
        """
        named = {name: split for name in self.filled if (split := split_of(name))}
        groups = [named, *self._groups_with_something()]
        found = [group for group in groups if _is_division(group.values())]
        if len(found) > 1:
            names = join_words((name for group in found for name in group), "and")
            raise InputError(
                f"{self.given} is divided in more than one way ({names}); "
                "keep one of them in a folder of its own"
            )
        group = found[0] if found else named
        self._refuse_loose(group)
        group = {name: split for name, split in group.items() if name in self.deep}
        if not group:
            return {}
        chosen = self._one_of_each(group)
        self._check_enough(chosen)
        return chosen

    def _groups_with_something(self) -> list[dict[str, str]]:
        """Folders such as cars_train and cars_test, grouped by the common part of their names."""
        groups: dict[str, dict[str, str]] = defaultdict(dict)
        for name in self.filled:
            found = split_in(name)
            if found is not None and split_of(name) is None:
                groups[found[1]][name] = found[0]
        return list(groups.values())

    def _refuse_loose(self, group: dict[str, str]) -> None:
        """Refuses pictures that are divided into splits but not into classes."""
        nothing_else = group and group.keys() == self.filled.keys()
        if not self.deep & group.keys() and (_is_division(group.values()) or nothing_else):
            hold = "hold" if len(group) > 1 else "holds"
            raise InputError(
                f"{self.given}: {join_words(group, 'and')} {hold} pictures and no class folders, "
                "so nothing says what class they are; expected "
                f"{next(iter(group))}/<class>/<image>, or a table (csv:FILE) that says it"
            )

    def _one_of_each(self, group: dict[str, str]) -> dict[str, str]:
        chosen: dict[str, str] = {}
        for split in SPLITS:
            names = [name for name in group if group[name] == split]
            exact = [name for name in names if name.lower() == split]
            exact.sort(key=lambda name: (name != split, name))
            if split == "eval" and not exact and {"query", "gallery"} <= set(group.values()):
                continue  # such as a test/ with copies of query/ and gallery/
            if len(names) > 1 and not exact:
                raise InputError(
                    f"{self.given} has {join_words(names, 'and')}, and {split} can be only one "
                    f"folder; call that one {split}, the others are left out then"
                )
            if names:
                chosen[split] = (exact or names)[0]
        return chosen

    def _check_enough(self, chosen: dict[str, str]) -> None:
        rest = [name for name in self.pictures if name not in chosen.values()]
        others = [name for name in rest if name in self.filled]
        held_out = chosen.keys() - {"train"}
        alone = "train" not in chosen and not {"query", "gallery"} <= held_out and others
        if not held_out or alone:
            (name, *_) = chosen.values()
            beside = join_words(others[:3], "and") or "nothing"
            raise InputError(
                f"{self.given}: {name} is called like a split and holds folders, and beside it is "
                f"{beside}; the splits are called train, and eval or query and gallery. "
                f"To hold out a share of the classes in it, name it: "
                f"folder:{self.tree.folder}/{name}"
            )
        if rest:
            self.remarks.append(
                f"{self.tree.folder}: {join_words(rest, 'and')} beside "
                f"{join_words(chosen.values(), 'and')} are left out; the splits are train, eval, "
                "query and gallery"
            )

    def _has_splits_in_classes(self) -> bool:
        """Whether every class folder is divided: <class>/train and <class>/test.

        Raises:
            InputError: only some of them are, or some pictures are outside the splits.
        """
        words = {
            picture.split("/")[1]
            for name in self.deep
            for picture in self.pictures[name]
            if picture.count("/") > 1
        }
        if not _is_division({split_of(word) for word in words}):
            return False
        check_one_held_out(words, self.given)
        for name, pictures in self.pictures.items():
            for picture in pictures:
                if split_of(picture.split("/")[1]) is None or picture.count("/") < 2:
                    raise InputError(
                        f"{self.given}: some classes are divided into train and held-out images, "
                        f"and {picture} is in neither; move it, or move {name} elsewhere"
                    )
        return True

    # --- path, class and split of each picture ---

    def _by_split(self, splits: dict[str, str]) -> Iterator[tuple[str, str, str]]:
        for split, folder in splits.items():
            filled = set()
            for picture in self._in_class_order(folder):
                class_name = picture.split("/")[1]
                filled.add(class_name)
                yield picture, class_name, split
            inside = {
                each.split("/")[1] for each in self.tree.folders if each.startswith(f"{folder}/")
            }
            self._remark_empty(inside - filled, f"{folder}/")

    def _in_class_order(self, folder: str) -> list[str]:
        """The pictures in the class folders of a split, class by class."""
        classes: dict[str, list[str]] = defaultdict(list)
        for picture in self.pictures[folder]:
            if picture.count("/") > 1:
                classes[picture.split("/")[1]].append(picture)
        return [picture for name in in_class_order(classes) for picture in classes[name]]

    def _by_class(self) -> Iterator[tuple[str, str, str]]:
        table = [
            (picture, class_name, split_of(picture.split("/")[1]))
            for class_name, pictures in self.pictures.items()
            for picture in pictures
        ]
        return iter(sorted(table, key=lambda row: SPLITS.index(row[2])))

    def _classes_only(self) -> Iterator[tuple[str, str, None]]:
        for class_name, pictures in self.pictures.items():
            yield from ((picture, class_name, None) for picture in pictures)
        self._remark_empty(self.pictures.keys() - self.filled.keys())

    # --- remarks ---

    def _remark_loose(self, splits: dict[str, str]) -> None:
        places = {"": sum("/" not in picture for picture in self.tree.pictures)}
        for folder in splits.values():
            places[folder] = sum(picture.count("/") == 1 for picture in self.pictures[folder])
        for folder, loose in places.items():
            if loose:
                self.remarks.append(
                    f"{self.tree.folder / folder}: {counted(loose, 'picture')} outside any class "
                    "folder, left out"
                )

    def _remark_empty(self, names: Iterable[str], inside: str = "") -> None:
        for name in sorted(names):
            self.remarks.append(
                f"{self.tree.folder}/{inside}{name} holds no picture and is not counted as a class"
            )

    def _notes(self) -> Iterator[Note]:
        if self.tree.others:
            others = self._other_files()
            yield Note(f"{self.tree.folder}: files that are not read as pictures: {others}")

    def _other_files(self) -> str:
        most = sorted(self.tree.others.items(), key=lambda kind: (-kind[1], kind[0]))
        return join_words((f"{count} {kind or 'without a suffix'}" for kind, count in most), "and")

    def _notes_on_depth(
        self, table: list[tuple[str, str, str | None]], depth: int, divided: bool
    ) -> Iterator[Note]:
        """A note if pictures are in folders below class folders, which are `depth` folders down.

        It is a warning if all of them are, and in more folders than there are classes: then the
        lower folders may be the classes that the user means.
        """
        deeper = [row for row in table if row[0].count("/") > depth]
        if divided or not deeper:
            return
        path, class_name, _ = deeper[0]
        text = (
            f"{self.given}: of the {counted(len(table), 'picture')}, {len(deeper):,} in folders "
            f"below a class folder belong to that class, such as {path} to {class_name}"
        )
        classes = len({name for _, name, _ in table})
        lower = len({path.rpartition("/")[0] for path, *_ in table})
        if len(deeper) < len(table) or lower == classes:
            yield Note(text)
            return
        text += (
            f"; if the {lower:,} lower folders are the classes, and not these {classes:,}, move "
            "them up, or list the pictures in a table (csv:FILE)"
        )
        yield Note(text, logging.WARNING)


def _is_division(splits: Collection[str | None]) -> bool:
    """Whether the splits include training and something held out."""
    return "train" in splits and any(split in splits for split in SPLITS[1:])
