"""The images that a user names: folders of any depth, tables of paths, single files."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dataset.files import composed, is_file, is_folder, warn_once
from dataset.foreign import ADDRESS, is_address
from dataset.spreadsheet import read_rows
from dataset.table import BOX_NAMES, OnDisk
from dataset.tree import tree
from machine import expanded
from utils import InputError, join_words

logger = logging.getLogger("index")

TABLES = (".csv", ".tsv")
COLUMNS = ("path", "id", "label")


class Photo(NamedTuple):
    """An image file to be added to an index.

    Attributes:
        path: absolute. id: None: it is named after its path. label: what it shows, if known.
    """

    path: str
    id: str | None = None
    label: str | None = None


def _photo(path: str, id: str | None, label: str) -> Photo:
    """A photo whose id and label are composed, so that names that look alike are equal."""
    return Photo(path, composed(id or "") or None, composed(label) or None)


def photos_of(given: Iterable[str | os.PathLike[str]]) -> list[Photo]:
    """All images that some folders, tables (*.csv, *.tsv) and image files name, each file once.

    The label of an image in a folder is the path of its subfolder ("kitchen/mug"), if it is in one.
    A table has a column path (relative to the table's folder, or absolute) and, optionally, id and
    label. If an image is named more than once, its id and label may come from any of these.

    Raises:
        InputError: something does not exist, a table cannot be read, a folder has no picture, or an
            image has two ids.
    """
    found: dict[str, Photo] = {}
    for each in given:
        for photo in _of(os.fspath(each)):
            known = found.setdefault(photo.path, photo)
            if known.id and photo.id and known.id != photo.id:
                raise InputError(
                    f"{photo.path} is given two ids, {known.id} and {photo.id}; give it one"
                )
            found[photo.path] = Photo(photo.path, known.id or photo.id, known.label or photo.label)
    return list(found.values())


def _of(given: str) -> Iterator[Photo]:
    is_table = given.startswith("csv:")
    for prefix in ("folder:", "csv:"):  # as for --dataset
        given = given.removeprefix(prefix)
    if is_address(given):
        raise InputError(f"{given} {ADDRESS}")
    path = absolute(expanded(given))
    if is_folder(path):
        yield from _in_folder(path, given)
    elif not os.path.lexists(path):
        raise InputError(f"{given} does not exist; give folders, image files or tables (.csv)")
    elif is_table or Path(path).suffix.lower() in TABLES:
        yield from _in_table(path, given)
    else:
        yield Photo(path)


def absolute(path: str) -> str:
    """An absolute path, with links unresolved.

    Raises:
        InputError: the path is empty, which would mean the current folder, with all that is in it.
    """
    if not path:
        raise InputError("an empty name is given; leave it out (the current folder is called .)")
    return os.path.abspath(path)  # noqa: PTH100


def _in_folder(folder: str, given: str) -> Iterator[Photo]:
    found = tree(Path(folder))
    for remark in found.remarks:
        warn_once(remark, logger)
    if not found.pictures:
        others = sorted(found.others)
        named = (f"{kind} files" if kind else "files without a suffix" for kind in others)
        kinds = join_words(named, "and")
        raise InputError(
            f"{given} holds no picture, in no folder of it"
            + (f" ({kinds} are not read as pictures)" if kinds else "")
            + "; give the folder that your images are in"
        )
    for picture in found.pictures:
        yield _photo(os.path.join(folder, picture), None, picture.rpartition("/")[0])  # noqa: PTH118


def _in_table(path: str, given: str) -> Iterator[Photo]:
    rows = read_rows(Path(path), given)
    _, heading = next(rows, (0, []))
    names = [name.strip().lower() for name in heading]
    if "path" not in names:
        has = join_words(filter(None, names), "and") or "nothing"
        raise InputError(
            f"{given} has no column path; its first line must name the columns path and, if you "
            f"like, id and label, and it names {has}"
        )
    place = {name: names.index(name) for name in COLUMNS if name in names}
    if boxes := [name for name in names if name in BOX_NAMES]:
        remark = f"{given}: {join_words(boxes, 'and')} are not used; pictures are looked at whole"
        warn_once(remark, logger)
    folder, count = os.path.dirname(path), 0  # noqa: PTH120
    on_disk = OnDisk(folder)
    for line, row in rows:
        values = {n: row[at].strip() if at < len(row) else "" for n, at in place.items()}
        if not values["path"]:
            raise InputError(f"{given} line {line}: the path is empty; fill it in")
        if is_address(values["path"]):
            raise InputError(f"{given} line {line}: {values['path']} {ADDRESS}")
        file = absolute(os.path.join(folder, on_disk(expanded(values["path"]))))  # noqa: PTH118
        if not count and not is_file(file):
            raise InputError(
                f"{given} line {line} names {values['path']}, and {file} does not exist; paths are "
                "relative to the table's folder"
            )
        count += 1
        yield _photo(file, values.get("id") or None, values.get("label", ""))
    if not count:
        raise InputError(f"{given} has no rows below its heading; add images")
