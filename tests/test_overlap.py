"""dataset/overlap.py: what an evaluation shares with the training, and the sentence about it."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import run_python

from dataset.base import ImageSet, PathTable
from dataset.overlap import Shared, shared_names, shared_with_training


def image_set(split: str, rows: list[tuple[str, str]], *, memory: bool = False) -> ImageSet:
    """Images by (path, class); on the disk, or in memory."""
    names = sorted({name for _, name in rows})
    labels = np.array([names.index(name) for _, name in rows])
    pixels = np.zeros((len(rows), 2, 2, 3), np.uint8) if memory else None
    paths = PathTable(path for path, _ in rows)
    return ImageSet("x", split, labels, tuple(names), paths, pixels=pixels)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(b"a picture")
    return path


def linked(path: Path, copy) -> str:
    other = path.with_name("b.png")
    copy(path, other)
    return str(other)


def test_classes_and_images_of_their_own_are_unseen(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for path in paths:
        path.write_bytes(b"the same in all of them")
    train = image_set("train", [(str(path), "seen") for path in paths[:2]])
    evaluation = image_set("eval", [(str(path), "new") for path in paths[2:]])
    found = shared_with_training(train, evaluation)
    assert found == Shared((), 0, 1, 2, True) and found.unseen and found.warning() == ""


@pytest.mark.parametrize(
    ("path_of", "shared"),
    [
        (str, 1),
        (lambda path: f"{path.parent}/./{path.name}", 1),
        (lambda path: linked(path, lambda a, b: b.symlink_to(a)), 1),
        (lambda path: linked(path, os.link), 1),
        (lambda path: linked(path, shutil.copyfile), 0),
    ],
    ids=["path", "spelling", "symlink", "hard link", "copy"],
)
def test_a_file_is_the_same_by_whatever_path(photo, path_of, shared):
    train = image_set("train", [(str(photo), "seen")])
    found = shared_with_training(train, image_set("eval", [(path_of(photo), "new")]))
    assert found.images == shared and found.unseen == (shared == 0)


def test_images_in_memory_are_known_by_name():
    train = image_set("train", [("emoji/1/noto", "a"), ("emoji/2/noto", "b")], memory=True)
    evaluation = image_set("eval", [("emoji/2/noto", "c"), ("emoji/3/noto", "d")], memory=True)
    assert shared_with_training(train, evaluation) == Shared((), 1, 2, 2, True)


def test_queries_and_gallery_count_together(photo):
    train = image_set("train", [(str(photo), "a")])
    query, gallery = image_set("query", [("q.png", "a")]), image_set("gallery", [(str(photo), "b")])
    assert shared_with_training(train, query, gallery) == Shared(("a",), 1, 2, 2, True)


def test_a_class_without_images_is_not_evaluated():
    evaluation = image_set("eval", [("1.png", "a"), ("2.png", "b")]).subset([1])
    assert shared_names(["a", "c"], evaluation) == Shared((), 0, 1, 1, False)


def test_training_images_that_are_gone_are_not_unseen(photo, tmp_path):
    train = image_set("train", [(str(photo), "a"), (str(tmp_path / "gone.png"), "a")])
    evaluation = image_set("eval", [(str(tmp_path / "gone, too.png"), "b")])
    found = shared_with_training(train, evaluation)
    assert not found.unseen and found.images == 0 and found.warning() == ""


@pytest.mark.parametrize(
    ("shared", "words"),
    [
        (
            Shared(tuple("abcd"), 12, 539, 4409, True),
            "4 of the 539 evaluation classes have the name of a training class (a, b, c, …), and "
            "12 of the 4,409 evaluation images are training images: the numbers are not only about "
            "images that the network has never seen.",
        ),
        (
            Shared(("a",), 0, 9, 20, False),
            "1 of the 9 evaluation classes has the name of a training class (a): if they are the "
            "same classes, the numbers are not about unseen ones.",
        ),
        (
            Shared((), 1, 9, 20, True),
            "1 of the 20 evaluation images is a training image: the numbers are not only about "
            "images that the network has never seen.",
        ),
    ],
)
def test_what_is_shared_is_said_in_a_sentence(shared, words):
    assert shared.warning() == words and not shared.unseen


def test_the_comparison_needs_no_torch():
    check = "import dataset.overlap, sys; sys.exit('torch' in sys.modules)"
    assert run_python("-c", check).returncode == 0
