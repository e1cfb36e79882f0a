"""The embedded data set: a class is an emoji, and its images are drawings from nine open sets.

data/emoji/README.md describes it. The class split does not divide Unicode subgroups; the training
classes have four class-disjoint folds; `groups` is the drawing set. A class has one drawing per
set, so a neighbour from the query's own set is never right.
"""

from __future__ import annotations

import hashlib
import io
import json
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from dataset.base import DataSet, ImageSet, PathTable, Protocol
from dataset.decoding import need_file, reason
from dataset.files import find
from machine import cores
from utils import InputError, damage_in_words

FILE = "emoji/emoji_retrieval.npz"
SHA256 = "00eafcbd783dc01bd6ae7ebc3c0fb5e8f158cadfb5cba435cf58d8c75ae08e83"
AT_ONCE = 64  # images that a thread decodes per task; with one each, tasks would take longer
_REPOSITORY_DATA = Path(__file__).resolve().parent.parent / "data"


class _Archive(NamedTuple):
    """The content of the file: concatenated lossless WebP files, and what each of them shows."""

    blob: memoryview
    offset: np.ndarray
    label: np.ndarray
    set: np.ndarray
    meta: dict[str, Any]

    def decode(self, index: int) -> np.ndarray:
        """Image `index` as (size, size, 3) uint8 RGB."""
        start, end = self.offset[index : index + 2]
        with Image.open(io.BytesIO(self.blob[start:end])) as image:
            return np.asarray(image.convert("RGB"))


def archive_path(root: Path) -> Path:
    """The path of the file: under the data root, or else in the repository.

    Raises:
        InputError: it is in neither.
    """
    for folder in (root, _REPOSITORY_DATA):
        path = find(folder, FILE)
        if path is not None:
            return path
    raise InputError(
        f"data set emoji was not found: {FILE} is neither in {root} nor in {_REPOSITORY_DATA}; "
        "it is part of the repository, so check that out again"
    )


def _open(path: Path) -> _Archive:
    try:
        need_file(path)
        with np.load(path) as file:
            return _Archive(
                memoryview(file["blob"].tobytes()),
                file["offset"],
                file["label"].astype(np.int64),
                file["set"].astype(np.int64),
                json.loads(file["meta"].tobytes()),
            )
    except Exception as error:  # a damaged file fails in zip, in NumPy or in JSON
        raise InputError(
            f"{path} is damaged ({reason(error)}); check it out of the repository again"
        ) from error


@lru_cache(maxsize=2)
def _load(path: Path, modified: int, split: str) -> ImageSet:
    with damage_in_words(str(path), "check it out of the repository again"):
        return _images_of(_open(path), path, split)


def _images_of(archive: _Archive, path: Path, split: str) -> ImageSet:
    classes = archive.meta["classes"]
    chosen_classes = [
        i for i, entry in enumerate(classes) if bool(entry["test"]) != (split == "train")
    ]
    new_label = np.full(len(classes), -1, np.int64)
    new_label[chosen_classes] = np.arange(len(chosen_classes))
    chosen = np.flatnonzero(new_label[archive.label] >= 0)
    labels = archive.label[chosen]
    folds = np.array([entry["fold"] for entry in classes], np.int64)[labels]
    sets = [entry["name"] for entry in archive.meta["sets"]]
    return ImageSet(
        name="emoji",
        split=split,
        labels=new_label[labels],
        class_names=tuple(classes[i]["name"] for i in chosen_classes),
        paths=PathTable(
            f"emoji/{classes[archive.label[i]]['code']}/{sets[archive.set[i]]}" for i in chosen
        ),
        groups=archive.set[chosen],
        pixels=_decode_all(archive, chosen, path),
        folds=folds if split == "train" else None,
        source=str(path),
    )


def _decode_all(archive: _Archive, chosen: np.ndarray, path: Path) -> np.ndarray:
    size = archive.meta["size"]
    pixels = np.empty((len(chosen), size, size, 3), np.uint8)

    def decode(first: int) -> None:
        for position in range(first, min(first + AT_ONCE, len(chosen))):
            pixels[position] = archive.decode(chosen[position])

    try:
        # Pillow releases the interpreter while it decodes.
        with ThreadPoolExecutor(cores()) as pool:
            for _ in pool.map(decode, range(0, len(chosen), AT_ONCE)):
                pass
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path} is damaged ({reason(error)}); check it out of the repository again"
        ) from error
    return pixels


class Emoji(DataSet):
    """Cross-vendor emoji retrieval; decoded once per process, about 54 MB per split."""

    name = "emoji"
    protocol = Protocol(pretrained="none", image_size=64, augment="emoji", group_name="drawing set")
    published = MappingProxyType({"train": (4417, 538), "eval": (4409, 539)})
    origin = "It is part of the repository (data/emoji, licences in data/emoji/LICENSES.md)."
    tree = "data/emoji/emoji_retrieval.npz"

    def load(self, root: Path, split: str, **options: Any) -> ImageSet:
        """The images of `split`; see `dataset.load`."""
        self.check_split(split)
        path = archive_path(root)
        return _load(path, path.stat().st_mtime_ns, split)

    def lies_under(self, root: Path) -> bool:
        """Whether the root has a copy; without one, that of the repository is read."""
        return find(root, FILE) is not None

    def changed_files(self, root: Path) -> list[Path]:
        """The archive, unless it is the published one."""
        path = archive_path(root)
        return [] if hashlib.sha256(path.read_bytes()).hexdigest() == SHA256 else [path]


DATA_SET = Emoji()
