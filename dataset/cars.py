"""Cars196 (Stanford Cars): 16,185 photographs of 196 models of cars.

Classes 1 to 98 are for training, 99 to 196 are held out. The official split into cars_train and
cars_test is for classification and is not used, so both folders are read. Nor are bounding boxes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from dataset import mat
from dataset.base import Protocol
from dataset.decoding import need_file, reason
from dataset.files import find, need, safe_name, subfolders
from dataset.layouts import Benchmark, Layout, Listing, half_of_classes, has, list_class_folders
from utils import InputError

_TRAIN_LISTS = (
    "devkit/cars_train_annos.mat",
    "cars_train_annos.mat",
    "car_devkit/devkit/cars_train_annos.mat",
)
_TEST_LISTS = (
    "cars_test_annos_withlabels.mat",
    "devkit/cars_test_annos_withlabels.mat",
    "car_devkit/devkit/cars_test_annos_withlabels.mat",
    "cars_test_annos_withlabels (1).mat",
)
_CLASS_LISTS = ("devkit/cars_meta.mat", "cars_meta.mat", "car_devkit/devkit/cars_meta.mat")
_KAGGLE = ("car_data/car_data", "car_data", ".")


def _read_mat(path: Path) -> dict[str, Any]:
    try:
        need_file(path)
        return mat.read(path)
    except (OSError, ValueError, mat.MatError) as error:
        raise InputError(
            f"{path} cannot be read ({reason(error)}); get it again from its source"
        ) from error


def _annotations(path: Path, name_field: str) -> tuple[list[str], np.ndarray]:
    """Image names and class numbers (from 1) in the struct array `annotations` of a .mat file."""
    rows = _read_mat(path).get("annotations")
    if not isinstance(rows, dict) or not {name_field, "class"} <= rows.keys():
        raise InputError(
            f"{path} has no annotations with {name_field} and class; it is not the labelled list, "
            "get that from its source"
        )
    return [str(name) for name in rows[name_field]], _class_numbers(rows["class"], path)


def _class_numbers(values: list[Any], path: Path) -> np.ndarray:
    """(N,) int64; raises InputError if a class is no whole number from 1 on."""
    numbers = np.array([_number(value) for value in values], np.float64)
    bad = ~((numbers == np.rint(numbers)) & (numbers >= 1) & (numbers < 2**53))
    if bad.any():
        raise InputError(
            f"{path} holds {str(values[bad.argmax()])[:40]!r} instead of the number of a class; "
            "get it again from its source"
        )
    return numbers.astype(np.int64)


def _number(value: Any) -> float:
    """An entry of a list as a number; NaN if it is none."""
    try:
        return float(value) if isinstance(value, int | float | str) else math.nan
    except (OverflowError, ValueError):
        return math.nan


def _listing(folder: Path, names: list[str], numbers: np.ndarray, titles: Iterable[Any]) -> Listing:
    present, labels = np.unique(numbers, return_inverse=True)
    titles = [titles] if isinstance(titles, str) else [str(title) for title in titles]
    known = [titles[n - 1] if 0 < n <= len(titles) else str(n) for n in present]
    return Listing(folder, names, labels.astype(np.int64), tuple(known))


def _read_annos(folder: Path) -> Listing:
    path, images = need(folder, "cars_annos.mat"), need(folder, "car_ims")
    names, numbers = _annotations(path, "relative_im_path")
    names = [safe_name(name, path).removeprefix("car_ims/") for name in names]
    return _listing(images, names, numbers, _read_mat(path).get("class_names", ()))


def _read_devkit(folder: Path) -> Listing:
    names: list[str] = []
    numbers = []
    for images_name, lists in (("cars_train", _TRAIN_LISTS), ("cars_test", _TEST_LISTS)):
        path = find(folder, *lists)
        images = find(folder, f"{images_name}/{images_name}", images_name)
        if path is None or images is None:
            missing = lists[0] if path is None else images_name
            raise InputError(
                f"cars: {folder} has no {missing}; the class split needs the training and the test "
                "images, both with labels, so add it (the test labels are a file of their own)"
            )
        inside = images.relative_to(folder).as_posix()
        listed, classes = _annotations(path, "fname")
        names.extend(f"{inside}/{safe_name(name, path)}" for name in listed)
        numbers.append(classes)
    meta = find(folder, *_CLASS_LISTS)
    titles = () if meta is None else _read_mat(meta).get("class_names", ())
    return _listing(folder, names, np.concatenate(numbers), titles)


def _kaggle_home(folder: Path) -> Path | None:
    for inner in _KAGGLE:
        home = find(folder, inner)
        # Any data set may have "train" and "test", so one of the folders must be named after cars.
        named = inner != "." or folder.name.lower() == "car_data"
        if named and home is not None and _has_train_and_test(home):
            return home
    return None


def _has_train_and_test(home: Path) -> bool:
    sides = [find(home, side) for side in ("train", "test")]
    return all(side is not None and subfolders(side) for side in sides)


def _read_kaggle(folder: Path) -> Listing:
    home = _kaggle_home(folder) or folder
    sides = [need(home, side) for side in ("train", "test")]
    listings = [(side.name, list_class_folders(side)) for side in sides]
    titles = sorted({title for _, listing in listings for title in listing.class_names})
    number = {title: index + 1 for index, title in enumerate(titles)}
    names, numbers = [], []
    for side, listing in listings:
        names.extend(f"{side}/{name}" for name in listing.names)
        numbers.extend(number[listing.class_names[label]] for label in listing.labels)
    return _listing(home, names, np.array(numbers, np.int64), titles)


def _has_class_folders(folder: Path) -> bool:
    images = find(folder, "images")
    # Any data set may have "images", so the folder must be named after cars.
    named = "car" in folder.name.lower()
    return named and images is not None and bool(subfolders(images))


def _read_class_folders(folder: Path) -> Listing:
    return list_class_folders(need(folder, "images"))


def _has_devkit(folder: Path) -> bool:
    return find(folder, *_TRAIN_LISTS) is not None and has("cars_train")(folder)


class Cars(Benchmark):
    """Cars196 with its .mat lists, or as class folders."""

    name = "cars"
    aliases = ("car", "cars196", "stanfordcars")
    protocol = Protocol(ks=(1, 2, 4, 8, 16, 32))
    folders = ("cars196", "cars", "car", "stanford_cars", "stanford-cars", "cars_196", "car_data")
    layouts = (
        Layout("cars_annos.mat with car_ims/", has("cars_annos.mat", "car_ims"), _read_annos),
        Layout("devkit with cars_train/ and cars_test/", _has_devkit, _read_devkit),
        Layout(
            "car_data/{train,test}/<class>/",
            lambda folder: _kaggle_home(folder) is not None,
            _read_kaggle,
        ),
        Layout("images/<class>/", _has_class_folders, _read_class_folders),
    )
    published = MappingProxyType({"train": (8054, 98), "eval": (8131, 98)})
    origin = (
        "The original page of Cars196 (ai.stanford.edu/~jkrause/cars) has been gone for years and "
        "no public link with a published checksum is known, so there is nothing to download from "
        "here. Copies with class folders are on Kaggle (for instance "
        "jutrera/stanford-car-dataset-by-classes-folder; a free account may be asked for). The "
        "photographs are for non-commercial research."
    )
    tree = """cars196/
  cars_annos.mat
  car_ims/000001.jpg …
or, with class folders,
car_data/car_data/
  train/AM General Hummer SUV 2000/00163.jpg …
  test/AM General Hummer SUV 2000/…"""

    def list_split(self, layout: Layout, folder: Path, split: str, **options: Any) -> Listing:
        """The images of the first or the second half of the classes."""
        return half_of_classes(layout.read(folder), split, self.name)


DATA_SET = Cars()
