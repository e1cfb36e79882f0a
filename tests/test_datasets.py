"""Data sets: every layout is found, the published facts hold, bad data get a sentence."""

from __future__ import annotations

import io
import json
import logging
import pickle
import re
import shutil
import struct
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import official_layouts as layouts
import pytest
from conftest import ROOT, SMALL, run_cli, run_python
from official_layouts import LAYOUTS, class_of, image_of, save_image, write
from PIL import Image
from scipy.io import loadmat, savemat
from small_images import write_drawings

import dataset
from dataset import mat
from dataset.base import BadImageError, DataSet, ImageSet, PathTable, Protocol, decode
from dataset.check import Report, check
from dataset.showing import as_text, run
from utils import InputError

CLASSES, IMAGES = 6, 3
HALF = CLASSES // 2


def shown(images: ImageSet) -> list[tuple[int, int, int]]:
    """(label, class number in the pixels, image number in the pixels) of every image."""
    pixels = [images.read(index) for index in range(len(images))]
    return sorted(
        (int(label), class_of(image), image_of(image))
        for label, image in zip(images.labels, pixels, strict=True)
    )


def expected(classes: range, images: range = range(IMAGES)) -> list[tuple[int, int, int]]:
    """What `shown` gives for these classes, labelled from 0 in their order."""
    return [(label, c, k) for label, c in enumerate(classes) for k in images]


# --- published layouts ----------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "layout"), [pair for pair in LAYOUTS if pair[0] != "inshop"])
def test_layout_is_found_and_split_by_class(name: str, layout: str, tmp_path: Path) -> None:
    write(name, layout, tmp_path, CLASSES, IMAGES)
    train, held_out = (dataset.load(name, tmp_path, split) for split in ("train", "eval"))
    assert shown(train) == expected(range(HALF))
    assert shown(held_out) == expected(range(HALF, CLASSES))
    assert train.labels.dtype == np.int64
    assert train.num_classes == len(set(train.class_names)) == HALF
    assert not set(train.class_names) & set(held_out.class_names)
    assert not set(train.paths) & set(held_out.paths)
    assert (train.name, train.split) == (name, "train")
    assert str(tmp_path) in train.source


@pytest.mark.parametrize("layout", [layout for name, layout in LAYOUTS if name == "inshop"])
def test_inshop_has_queries_and_a_gallery_with_labels_in_common(
    layout: str, tmp_path: Path
) -> None:
    write("inshop", layout, tmp_path, CLASSES, IMAGES)
    parts = {
        split: dataset.load("inshop", tmp_path, split)
        for split in ("train", "query", "gallery", "eval")
    }
    held_out = range(HALF, CLASSES)
    assert shown(parts["train"]) == expected(range(HALF))
    assert shown(parts["query"]) == expected(held_out, range(1))
    assert shown(parts["gallery"]) == expected(held_out, range(1, IMAGES))
    assert shown(parts["eval"]) == expected(held_out)
    assert parts["query"].class_names == parts["gallery"].class_names
    assert list(parts["eval"].paths) == [*parts["query"].paths, *parts["gallery"].paths]


@pytest.mark.parametrize("size", ["small", "medium", "large"])
def test_vid_has_three_held_out_lists(size: str, tmp_path: Path) -> None:
    write("vid", "official", tmp_path, 10, IMAGES)
    images = dataset.load("vid", tmp_path, "eval", size=size)
    assert shown(images) == expected(layouts.vehicles(size, 10))
    # Numbers, not texts, are in order: vehicle 12 is class 5 here.
    assert images.class_names[0] == "12"


def test_vid_lists_are_sorted_by_number_and_the_large_one_is_the_default(tmp_path: Path) -> None:
    write("vid", "official", tmp_path, 10, IMAGES)
    assert dataset.load("vid", tmp_path, "train").class_names == ("7", "8", "9", "10", "11")
    assert len(dataset.load("vid", tmp_path, "eval")) == 5 * IMAGES
    with pytest.raises(InputError, match=r"huge.*large, medium, small"):
        dataset.load("vid", tmp_path, "eval", size="huge")


@pytest.mark.parametrize(
    ("name", "layout", "folder"),
    [
        ("cub", "official", "CUB_200_2011"),
        ("cars", "official", "cars196"),
        ("sop", "official", "Stanford_Online_Products"),
        ("inshop", "official", "Inshop_Clothes"),
        ("vid", "VehicleID", "VehicleID"),
    ],
)
def test_letter_case_of_folders_and_names_and_the_folder_itself_as_root(
    name: str, layout: str, folder: str, tmp_path: Path
) -> None:
    write(name, layout, tmp_path, CLASSES, IMAGES)
    before = dataset.load(name, tmp_path, "train")
    seen, fingerprint = shown(before), before.fingerprint()
    (tmp_path / folder).rename(tmp_path / folder.swapcase())
    after = dataset.load(name.upper(), tmp_path, "train")
    inside = dataset.load(name, tmp_path / folder.swapcase(), "train")
    assert seen == shown(after) == shown(inside)
    assert fingerprint == after.fingerprint()


def test_all_layouts_of_a_class_list_give_the_same_order(tmp_path: Path) -> None:
    orders = []
    for name, layout in LAYOUTS:
        if name == "cub":
            write(name, layout, tmp_path / layout, CLASSES, IMAGES)
            images = dataset.load(name, tmp_path / layout, "train")
            orders.append([Path(path).name for path in images.paths])
    assert orders[0] == orders[1] == orders[2]


def _lower(root: Path) -> None:
    for path in [*root.rglob("*.jpg"), *root.rglob("*.JPG")]:
        path.rename(path.with_suffix({".jpg": ".JPG", ".JPG": ".jpg"}[path.suffix]))


def _edited(pattern: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def edit(root: Path) -> None:
        for path in root.rglob(pattern):
            path.write_bytes(change(path.read_bytes()))

    return edit


def _nested(name: str) -> Callable[[Path], None]:
    def nest(root: Path) -> None:
        (folder,) = (path for path in root.rglob(name) if path.is_dir())
        folder.rename(root / "away")
        folder.mkdir()
        (root / "away").rename(folder / name)

    return nest


_FROM_WINDOWS = _edited(
    "*.txt", lambda text: b"\xef\xbb\xbf" + text.replace(b"/", b"\\").replace(b"\n", b"\r\n")
)
_WITHOUT_HEADING = _edited("Ebay_*.txt", lambda text: text.split(b"\n", 1)[1])


@pytest.mark.parametrize(
    ("name", "change"),
    [
        *((name, change) for name in ("cub", "sop", "vid") for change in (_lower, _FROM_WINDOWS)),
        *(("inshop", change) for change in (_lower, _FROM_WINDOWS, _nested("img"))),
        ("sop", _WITHOUT_HEADING),
        *(("cub", _nested("CUB_200_2011")), ("vid", _nested("VehicleID_V1.0"))),
        ("cars", _nested("cars196")),
    ],
)
def test_copies_as_people_have_them(
    name: str, change: Callable[[Path], None], tmp_path: Path
) -> None:
    write(name, "official", tmp_path)
    as_published = [dataset.load(name, tmp_path, split) for split in ("train", "eval")]
    shown = [[images.read(index) for index in range(len(images))] for images in as_published]
    change(tmp_path)
    for before, pictures in zip(as_published, shown, strict=True):
        images = dataset.load(name, tmp_path, before.split)
        assert images.labels.tolist() == before.labels.tolist()
        assert images.class_names == before.class_names
        for index, picture in enumerate(pictures):
            assert np.array_equal(images.read(index), picture)


def test_a_full_set_of_classes_is_split_where_the_papers_split_it(tmp_path: Path) -> None:
    for c in range(200):
        save_image(tmp_path / "CUB_200_2011" / "images" / f"{c + 1:03d}.Bird" / "a_1.jpg", 1, 1)
    train, held_out = (dataset.load("cub", tmp_path, split) for split in ("train", "eval"))
    assert (train.class_names[-1], held_out.class_names[0]) == ("100.Bird", "101.Bird")
    assert (train.num_classes, held_out.num_classes) == (100, 100)


def test_files_that_a_mac_leaves_behind_are_no_images(tmp_path: Path) -> None:
    write("cub", "cub200", tmp_path, CLASSES, IMAGES)
    images = tmp_path / "cub200" / "images"
    (images / layouts.bird(0) / "._a_0001_1.jpg").write_bytes(b"x")
    (images / layouts.bird(0) / "Thumbs.db").write_bytes(b"x")
    save_image(images / "__MACOSX" / "a_0001_1.jpg", 0, 0)
    (images / "._001.Black").mkdir()
    assert len(dataset.load("cub", tmp_path, "train")) == HALF * IMAGES


def test_counts_that_are_not_the_published_ones_are_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write("cub", "official", tmp_path, CLASSES, IMAGES)
    with caplog.at_level(logging.WARNING, "dataset"):
        dataset.load("cub", tmp_path, "train")
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "9 images where 5,864 are published" in message
    assert "3 classes where 100 are published" in message


# --- what is refused ------------------------------------------------------------------------------


def test_cub_of_2010_is_recognised_and_named(tmp_path: Path) -> None:
    layouts.write_cub_2010(tmp_path)
    with pytest.raises(InputError, match=r"CUB_200 is the 2010 edition.*get the 2011 edition"):
        dataset.load("cub", tmp_path, "train")
    assert check("cub", tmp_path).status == "unusable"


def test_check_refuses_a_data_root_that_it_does_not_look_into(tmp_path: Path) -> None:
    for name in ("emoji", f"folder:{tmp_path}"):
        done = run_python("-m", "dataset", "check", name, "--data-root", tmp_path)
        assert done.returncode == 2 and done.stdout == ""
        assert f"--data-root has no effect on {name}" in done.stderr


@pytest.mark.parametrize("name", ["cub", "sop"])
def test_the_command_that_fetches_a_data_set_fetches_it_to_its_root(
    name: str, tmp_path: Path
) -> None:
    text = as_text(check(name, tmp_path))
    commands = re.findall(r"python -m dataset download .*", text)
    assert commands == [f"python -m dataset download {name} --data-root {tmp_path}"]


@pytest.mark.parametrize("name", [name for name in dataset.NAMES if name != "emoji"])
def test_missing_data_name_the_folders_and_point_to_check(name: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=rf"{name} was not found.*{tmp_path}") as caught:
        dataset.load(name, tmp_path, "train")
    sentence = str(caught.value)
    (command,) = re.findall("`python -m dataset (.*?)`", sentence)
    assert command == f"check {name} --data-root {tmp_path}"
    assert dataset.find(name).folders[0] in sentence
    with pytest.raises(InputError, match="does not exist"):
        dataset.load(name, tmp_path / "nowhere", "train")


@pytest.mark.parametrize(
    ("name", "layout", "usual", "unusual"),
    [
        ("cub", "official", "CUB_200_2011", "CUB_200_2011 (1)"),
        ("cars", "devkit", "stanford_cars", "stanford cars"),
        ("sop", "official", "Stanford_Online_Products", "products"),
        ("inshop", "official", "Inshop_Clothes", "clothes/Inshop_Clothes"),
    ],
)
def test_a_copy_under_another_name_is_pointed_at(
    name: str, layout: str, usual: str, unusual: str, tmp_path: Path
) -> None:
    write(name, layout, tmp_path, CLASSES, IMAGES)
    (tmp_path / unusual).parent.mkdir(exist_ok=True)
    (tmp_path / usual).rename(tmp_path / unusual)
    with pytest.raises(InputError, match="seems to be in") as caught:
        dataset.load(name, tmp_path, "train")
    root = str(caught.value).split("seems to be in ")[1].split(", so give that folder")[0]
    assert dataset.load(name, root, "train").num_classes == HALF


def test_an_empty_folder_is_not_a_data_set(tmp_path: Path) -> None:
    (tmp_path / "CUB_200_2011" / "images").mkdir(parents=True)
    with pytest.raises(InputError, match=r"CUB_200_2011 holds none of its known layouts"):
        dataset.load("cub", tmp_path, "train")
    (tmp_path / "CUB_200_2011" / "images" / "001.Albatross").mkdir()
    with pytest.raises(InputError, match="0 class"):
        dataset.load("cub", tmp_path, "train")


def test_lists_without_their_images_say_so(tmp_path: Path) -> None:
    write("sop", "official", tmp_path, CLASSES, IMAGES)
    for folder in (tmp_path / "Stanford_Online_Products").glob("*_final"):
        shutil.rmtree(folder)
    with pytest.raises(InputError, match=r"names? images such as bicycle_final.*not in"):
        dataset.load("sop", tmp_path, "train")


def _replace_in(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


LISTS = {
    "cub": ("CUB_200_2011/images.txt", layouts.bird(1)),
    "sop": ("Stanford_Online_Products/Ebay_train.txt", "chair_final"),
    "inshop": ("Inshop_Clothes/Eval/list_eval_partition.txt", "img/MEN"),
    "vid": ("vehicle-id/VehicleID_V1.0/train_test_split/train_list.txt", "0001001"),
}


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("way_out", ["../../secret", "/etc/secret", "a/../../b", "..\\b", "C:/b"])
def test_list_files_cannot_lead_out_of_the_folder(name: str, way_out: str, tmp_path: Path) -> None:
    write(name, "official", tmp_path, CLASSES, IMAGES)
    path, old = LISTS[name]
    _replace_in(tmp_path / path, old, way_out)
    with pytest.raises(InputError, match="leads out of the data set's folder"):
        dataset.load(name, tmp_path, "train")


@pytest.mark.parametrize("name", LISTS)
def test_damaged_list_files_name_the_line(name: str, tmp_path: Path) -> None:
    write(name, "official", tmp_path, CLASSES, IMAGES)
    path = tmp_path / LISTS[name][0]
    _replace_in(path, LISTS[name][1], "two words")
    with pytest.raises(InputError, match=rf"{path.name} line \d+ has \d columns"):
        dataset.load(name, tmp_path, "train")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match=f"{path.name} cannot be read"):
        dataset.load(name, tmp_path, "train")


@pytest.mark.parametrize("name", ["sop", "vid"])
def test_classes_must_be_numbers(name: str, tmp_path: Path) -> None:
    write(name, "official", tmp_path, CLASSES, IMAGES)
    path = tmp_path / LISTS[name][0]
    lines = path.read_text().splitlines()
    lines[-1] = lines[-1].replace(" 9", " nine").replace(" 3 ", " three ")
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=r"in a column of numbers.*(nine|three)"):
        dataset.load(name, tmp_path, "train")


def test_a_cut_partition_file_is_noticed(tmp_path: Path) -> None:
    write("inshop", "official", tmp_path, CLASSES, IMAGES)
    path = tmp_path / LISTS["inshop"][0]
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    with pytest.raises(InputError, match="announces 18 rows and has 17"):
        dataset.load("inshop", tmp_path, "query")


def test_cars_without_labels_for_the_test_images_say_which_file_is_missing(tmp_path: Path) -> None:
    write("cars", "devkit", tmp_path, CLASSES, IMAGES)
    labels = tmp_path / "stanford_cars" / "cars_test_annos_withlabels.mat"
    labels.unlink()
    with pytest.raises(InputError, match="cars_test_annos_withlabels"):
        dataset.load("cars", tmp_path, "train")
    labels.write_bytes(b"no .mat file")
    with pytest.raises(InputError, match=r"withlabels\.mat cannot be read"):
        dataset.load("cars", tmp_path, "train")


@pytest.mark.parametrize(
    "number", ["x", float("nan"), 1e300, -3, 0, 1.5, [1, 2], 1 + 2j, 2**62, {"a": 1}]
)
def test_a_class_of_cars_that_is_no_number_is_named(number: object, tmp_path: Path) -> None:
    write("cars", "official", tmp_path, CLASSES, IMAGES)
    (path,) = tmp_path.rglob("cars_annos.mat")
    content = loadmat(path)
    content["annotations"][0, 3]["class"] = number
    savemat(path, {name: content[name] for name in ("annotations", "class_names")})
    with pytest.raises(InputError, match="instead of the number of a class") as sentence:
        dataset.load("cars", tmp_path, "train")
    assert "holds '1'" not in str(sentence.value)


def test_a_label_file_that_brings_its_reader_down_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write("cars", "official", tmp_path, CLASSES, IMAGES)
    code = "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"
    (tmp_path / "dying.py").write_text(code)
    monkeypatch.setattr(mat, "__file__", str(tmp_path / "dying.py"))
    with pytest.raises(InputError, match=r"cars_annos\.mat cannot be read .*Segmentation fault"):
        dataset.load("cars", tmp_path, "train")


def test_unknown_names_and_splits_get_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no data set 'cup'.*cub"):
        dataset.load("cup", tmp_path)
    with pytest.raises(InputError, match=r"no split 'test'; choose one of train, eval"):
        dataset.load("emoji", tmp_path, "test")
    with pytest.raises(InputError, match="no split 'query'"):
        dataset.load("cub", tmp_path, "query")
    with pytest.raises(InputError, match="eval_classes has no effect on data set cub"):
        dataset.load("cub", tmp_path, eval_classes=0.5)
    with pytest.raises(InputError, match="size has no effect"):
        dataset.load("emoji", tmp_path, size="small")
    with pytest.raises(InputError, match="names no path"):
        dataset.load("folder:", tmp_path)


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("car", "cars"),
        ("CARS196", "cars"),
        ("SOP", "sop"),
        ("Inshop", "inshop"),
        ("in-shop", "inshop"),
        ("CUB", "cub"),
        ("VehicleID", "vid"),
    ],
)
def test_names_of_the_published_commands(alias: str, name: str) -> None:
    assert dataset.find(alias).name == name


def test_protocols_are_the_papers() -> None:
    ks = {name: dataset.protocol(name).ks for name in dataset.NAMES}
    assert ks == {
        "emoji": (1, 2, 4, 8),
        "cub": (1, 2, 4, 8, 16, 32),
        "cars": (1, 2, 4, 8, 16, 32),
        "sop": (1, 10, 100, 1000),
        "inshop": (1, 10, 20, 30, 40, 50),
        "vid": (1, 5),
    }
    assert [name for name in dataset.NAMES if dataset.find(name).query_gallery] == ["inshop"]
    assert dataset.protocol("vid").sizes == ("large", "medium", "small")
    emoji = dataset.protocol("emoji")
    assert (emoji.pretrained, emoji.image_size, emoji.augment) == ("none", 64, "emoji")


# --- the embedded data ----------------------------------------------------------------------------


def test_emoji_counts_folds_and_groups() -> None:
    train, held_out = dataset.load("emoji", ROOT / "data"), dataset.load("emoji", split="eval")
    assert (len(train), train.num_classes) == (4417, 538)
    assert (len(held_out), held_out.num_classes) == (4409, 539)
    assert not set(train.class_names) & set(held_out.class_names)
    assert set(train.labels) == set(range(538))
    fold_of_class = {(label, fold) for label, fold in zip(train.labels, train.folds, strict=True)}
    assert len(fold_of_class) == 538
    assert np.bincount([fold for _, fold in fold_of_class]).tolist() == [150, 131, 129, 128]
    assert held_out.folds is None
    assert train.groups.max() == 8
    # A class has one drawing a set.
    assert len(set(zip(train.labels, train.groups, strict=True))) == len(train)


def test_emoji_pixels_and_names_are_those_of_the_archive() -> None:
    images = dataset.load("emoji", ROOT / "data")
    assert images.pixels.shape == (4417, 64, 64, 3)
    assert images.pixels.dtype == np.uint8
    with np.load(ROOT / "data" / "emoji" / "emoji_retrieval.npz") as file:
        start, end = file["offset"][:2]
        blob = io.BytesIO(file["blob"][start:end].tobytes())
    assert np.array_equal(images.read(0), np.asarray(Image.open(blob).convert("RGB")))
    assert images.paths[0] == "emoji/1f600/noto"
    assert images.class_names[images.labels[0]] == "grinning face"
    assert dataset.load("emoji", ROOT / "data") is images  # decoded once


def test_emoji_is_found_without_a_data_root_and_damage_is_named(tmp_path: Path) -> None:
    assert len(dataset.load("emoji", tmp_path / "nowhere")) == 4417
    (tmp_path / "emoji").mkdir()
    (tmp_path / "emoji" / "emoji_retrieval.npz").write_bytes(b"PK no archive")
    with pytest.raises(InputError, match=r"emoji_retrieval\.npz is damaged"):
        dataset.load("emoji", tmp_path)


# --- own images -----------------------------------------------------------------------------------


def photo_folder(root: Path, names: list[str], images: int = 2) -> Path:
    for c, name in enumerate(names):
        for k in range(images):
            save_image(root / name / f"bild {k} ü.jpg", c, k)
    return root


def test_folder_holds_a_share_of_the_classes_out(tmp_path: Path) -> None:
    names = ["rote Tasse", "grüne Tasse", "東京", "a b c", "5", "10", "x", "y"]
    folder = photo_folder(tmp_path / "meine fotos", names)
    given = f"folder:{folder}"
    parts = {
        split: dataset.load(given, split=split, eval_classes=0.25, seed=3)
        for split in ("train", "eval")
    }
    assert (parts["train"].num_classes, parts["eval"].num_classes) == (6, 2)
    held_out = set(parts["eval"].class_names)
    assert held_out | set(parts["train"].class_names) == set(names)
    for part in parts.values():
        for index, label in enumerate(part.labels):
            assert class_of(part.read(index)) == names.index(part.class_names[label])
    assert parts["train"].name == "meine fotos"
    again = dataset.load(given, split="eval", eval_classes=0.25, seed=3)
    assert set(again.class_names) == held_out
    others = [
        set(dataset.load(given, split="eval", eval_classes=0.25, seed=seed).class_names)
        for seed in range(10)
    ]
    assert any(other != held_out for other in others)
    assert dataset.load(given, split="train").num_classes == 4


def test_folder_with_its_own_splits(tmp_path: Path) -> None:
    photo_folder(tmp_path / "Train", ["a", "b", "c"])
    photo_folder(tmp_path / "eval", ["d", "e"])
    given = f"folder:{tmp_path}"
    assert dataset.load(given).class_names == ("a", "b", "c")
    assert dataset.load(given, split="eval").class_names == ("d", "e")
    assert not dataset.find(given).query_gallery
    with pytest.raises(InputError, match="--eval-classes has no effect"):
        dataset.load(given, split="eval", eval_classes=0.5)


def test_folder_with_queries_and_a_gallery(tmp_path: Path) -> None:
    photo_folder(tmp_path / "train", ["a", "b"])
    photo_folder(tmp_path / "query", ["d"])
    photo_folder(tmp_path / "gallery", ["c", "d"])
    given = f"folder:{tmp_path}"
    query, gallery = (dataset.load(given, split=split) for split in ("query", "gallery"))
    assert query.class_names == gallery.class_names == ("c", "d")
    assert query.labels.tolist() == [1, 1]
    assert dataset.find(given).query_gallery
    assert len(dataset.load(given, split="eval")) == 6


def test_number_classes_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    photo_folder(tmp_path / "train", ["10", "9", "100"])
    photo_folder(tmp_path / "eval", ["1"])
    assert dataset.load(f"folder:{tmp_path}").class_names == ("9", "10", "100")


def test_pictures_outside_class_folders_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photo_folder(tmp_path, ["a", "b", "c", "d"])
    save_image(tmp_path / "loose.jpg", 1, 1)
    (tmp_path / "empty").mkdir()
    with caplog.at_level(logging.WARNING, "dataset"):
        assert len(dataset.load(f"folder:{tmp_path}")) == 4
    messages = [record.getMessage() for record in caplog.records]
    assert any("1 picture outside any class folder, left out" in message for message in messages)
    assert any("empty holds no picture" in message for message in messages)


@pytest.mark.parametrize(
    ("classes", "options", "sentence"),
    [
        ([], {}, "no picture found"),
        (["a"], {}, "1 class"),
        (["a", "b", "c"], {}, "3 class.*need 2 each"),
        (["a", "b"], {"eval_classes": 1.0}, "between 0 and 1"),
    ],
)
def test_folders_that_cannot_be_split(
    classes: list[str], options: dict, sentence: str, tmp_path: Path
) -> None:
    photo_folder(tmp_path, classes)
    with pytest.raises(InputError, match=sentence):
        dataset.load(f"folder:{tmp_path}", **options)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        dataset.load(f"folder:{tmp_path / 'nowhere'}")


def write_csv(folder: Path, text: str, **options: str) -> str:
    for c in range(4):
        for k in range(2):
            save_image(folder / "bilder" / f"ü {c}" / f"{k}.jpg", c, k)
    path = folder / "images.csv"
    path.write_text(text, encoding=options.get("encoding", "utf-8"))
    return f"csv:{path}"


def csv_rows(splits: list[str], delimiter: str = ",") -> str:
    heading = delimiter.join(("path", "label", "split"))
    rows = [
        delimiter.join((f"bilder/ü {c}/{k}.jpg", f"class {c}", split))
        for c, split in enumerate(splits)
        for k in range(2)
    ]
    return "\n".join((heading, *rows, ""))


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_csv_of_any_spreadsheet(delimiter: str, encoding: str, tmp_path: Path) -> None:
    rows = csv_rows(["train", "eval", "train", "eval"], delimiter)
    given = write_csv(tmp_path, rows, encoding=encoding)
    train, held_out = (dataset.load(given, split=split) for split in ("train", "eval"))
    assert train.class_names == ("class 0", "class 2")
    assert shown(train) == [(0, 0, 0), (0, 0, 1), (1, 2, 0), (1, 2, 1)]
    assert shown(held_out) == [(0, 1, 0), (0, 1, 1), (1, 3, 0), (1, 3, 1)]
    assert train.name == "images"


def test_csv_without_splits_holds_classes_out(tmp_path: Path) -> None:
    rows = [line.rsplit(",", 1)[0] for line in csv_rows(["train"] * 4).splitlines()]
    given = write_csv(tmp_path, "\n".join(rows))
    parts = [dataset.load(given, split=s, eval_classes=0.5) for s in ("train", "eval")]
    assert [part.num_classes for part in parts] == [2, 2]
    assert not set(parts[0].class_names) & set(parts[1].class_names)


def test_csv_with_queries_and_a_gallery_and_number_labels(tmp_path: Path) -> None:
    text = csv_rows(["train", "query", "gallery", "gallery"])
    for c, number in enumerate((3, 10, 10, 9)):
        text = text.replace(f"class {c}", str(number))
    given = write_csv(tmp_path, text)
    query, gallery = (dataset.load(given, split=split) for split in ("query", "gallery"))
    assert query.class_names == gallery.class_names == ("9", "10")
    assert query.labels.tolist() == [1, 1]
    assert gallery.labels.tolist() == [1, 1, 0, 0]
    assert dataset.find(given).query_gallery


def test_csv_boxes_are_cut_out(tmp_path: Path) -> None:
    pixels = np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    text = (
        "path,label,split,x1,y1,x2,y2\n"
        "a.png,a,train,3,4,13,9\na.png,b,train,,,,\na.png,c,train,25,15,99,99\n"
        "a.png,d,train,30,0,40,5\na.png,e,eval,0,0,9,9\na.png,f,eval,1,1,9,9\n"
    )
    (tmp_path / "i.csv").write_text(text)
    images = dataset.load(f"csv:{tmp_path / 'i.csv'}")
    assert images.boxes.tolist()[:2] == [[3, 4, 13, 9], [-1] * 4]
    assert np.array_equal(images.read(0), pixels[4:9, 3:13])
    assert np.array_equal(images.read(1), pixels)
    assert np.array_equal(images.read(2), pixels[15:, 25:])
    with pytest.raises(BadImageError, match="box 30,0,40,5 lies outside its 30x20 pixels"):
        images.read(3)
    assert images.subset([2, 0]).boxes[1].tolist() == [3, 4, 13, 9]
    report = check(f"csv:{tmp_path / 'i.csv'}")
    kinds = {finding.kind: (finding.count, finding.note) for finding in report.findings}
    assert kinds["box outside its image"] == (1, False)
    assert kinds["box beyond its image's edge"] == (1, True)


def test_csv_of_a_system_that_takes_no_heed_of_letter_case(tmp_path: Path) -> None:
    photo_folder(tmp_path / "Photos", ["a", "b", "c", "d"])
    rows = [f"photos/{name}/Bild {k} Ü.JPG,{name}" for name in "abcd" for k in (0, 1)]
    (tmp_path / "t.csv").write_text("path,label\n" + "\n".join(rows))
    images = dataset.load(f"csv:{tmp_path / 't.csv'}", split="train")
    named = ["abcd".index(images.class_names[label]) for label in images.labels]
    assert [class_of(images.read(index)) for index in range(len(images))] == named
    (tmp_path / "Photos" / "a" / "BILD 0 ü.jpg").write_bytes(b"another")
    rows = ["Photos/a/bild 0 ü.jpg,a", "Photos/b/bild 0 ü.jpg,b", *rows[4:]]
    (tmp_path / "t.csv").write_text("path,label\n" + "\n".join(rows))
    entry = dataset.find(f"csv:{tmp_path / 't.csv'}")
    assert [path for path in entry.rows().paths if "/a/" in path] == [
        f"{tmp_path}/Photos/a/bild 0 ü.jpg"
    ]


def test_csv_takes_absolute_paths(tmp_path: Path) -> None:
    save_image(tmp_path / "elsewhere" / "x.jpg", 3, 1)
    save_image(tmp_path / "elsewhere" / "y.jpg", 2, 1)
    absolute = [f"{tmp_path / 'elsewhere' / name}.jpg,{name},eval\n" for name in "xy"]
    given = write_csv(tmp_path / "list", csv_rows(["train"] * 2) + "".join(absolute))
    assert shown(dataset.load(given, split="eval")) == [(0, 3, 1), (1, 2, 1)]
    assert class_of(dataset.load(given).read(3)) == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("path,name\na,b\n", "no column label"),
        ("path,label,split\n", "no rows"),
        ("path,label,split\nbilder/ü 0/0.jpg,a,tset\n", "line 2: split 'tset' is not one of"),
        ("path,label,split\n,a,train\n", "line 2: the path is empty"),
        ("path,label,split\nbilder/ü 0/0.jpg,,train\n", "line 2: the label is empty"),
        ("path,label,split\n../x.jpg,a,train\n", "line 2.*leads out of the file's folder"),
        ("path,label,split\nnone.jpg,a,train\n", "line 2 names none.jpg.*does not exist"),
        ("path,label,split,x1\na,b,train,1\n", "no column y1, x2 and y2"),
        ("path,label,split,x1,y1,x2,y2\na,b,train,1,2,three,4\n", "line 2: the box.*four numbers"),
        ("path,label,split,x1,y1,x2,y2\na,b,train,5,2,5,4\n", "line 2: the box.*x1 < x2"),
        ("path,label,split,x1,y1,x2,y2\na,b,train,1,2,inf,4\n", "line 2: the box.*four numbers"),
        ("path,label,split\nbilder/ü 0/0.jpg,a,eval\n", "no training images"),
        ("path,label,split\nbilder/ü 0/0.jpg,a,query\n", "query but no gallery"),
    ],
)
def test_csv_faults_name_the_line(text: str, sentence: str, tmp_path: Path) -> None:
    given = write_csv(tmp_path, text)
    with pytest.raises(InputError, match=sentence):
        dataset.load(given)


def test_csv_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "i.csv").write_bytes("path,label\nü,ö\n".encode("latin-1"))
    with pytest.raises(InputError, match=r"i\.csv cannot be read.*UTF-8"):
        dataset.load(f"csv:{tmp_path / 'i.csv'}")
    with pytest.raises(InputError, match="cannot be read"):
        dataset.load(f"csv:{tmp_path / 'none.csv'}")


# --- pixels ---------------------------------------------------------------------------------------


def gradient(height: int = 6, width: int = 10) -> np.ndarray:
    return np.arange(height * width, dtype=np.uint8).reshape(height, width) * 4


def deep_colour_png(pixels: np.ndarray) -> bytes:
    """A PNG of (H, W, 3) uint16 colours, which Pillow reads and cannot write."""
    height, width, _ = pixels.shape
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(lines)),
        (b"IEND", b""),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def test_unusual_files_become_rgb(tmp_path: Path) -> None:
    grey = gradient()
    triple = np.repeat(grey[:, :, None], 3, axis=2)
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 256 + 77).save(tmp_path / "deep.png")
    Image.fromarray(grey.astype(np.uint16) * 256 + 77).save(tmp_path / "deep.tif")
    Image.fromarray(triple).convert("P", palette=Image.Palette.ADAPTIVE).save(tmp_path / "p.png")
    Image.fromarray(grey).convert("1", dither=Image.Dither.NONE).save(tmp_path / "bw.png")
    (tmp_path / "colour.png").write_bytes(deep_colour_png(triple.astype(np.uint16) * 256 + 77))
    for name in ("grey.png", "deep.png", "deep.tif", "colour.png", "p.png"):
        assert np.array_equal(decode(tmp_path / name), triple), name
    assert set(np.unique(decode(tmp_path / "bw.png"))) == {0, 255}
    Image.new("CMYK", (8, 8), (255, 0, 0, 0)).save(tmp_path / "cmyk.jpg", quality=100)
    red, green, blue = decode(tmp_path / "cmyk.jpg").reshape(-1, 3).mean(0)
    assert red < 10 and green > 245 and blue > 245


def test_transparency_is_laid_on_white(tmp_path: Path) -> None:
    half = np.zeros((4, 4, 4), np.uint8)
    half[:, :2] = (10, 20, 30, 255)
    Image.fromarray(half).save(tmp_path / "rgba.png")
    pixels = decode(tmp_path / "rgba.png")
    assert pixels[0, 0].tolist() == [10, 20, 30]
    assert pixels[0, 3].tolist() == [255, 255, 255]
    Image.fromarray(half).convert("LA").save(tmp_path / "la.png")
    assert decode(tmp_path / "la.png")[0, 3].tolist() == [255, 255, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int, tmp_path: Path) -> None:
    upright = np.zeros((16, 32, 3), np.uint8)
    upright[:8, :16] = 255  # the upper left quarter
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.transpose(1, 0, 2),
        6: np.rot90(upright),
        7: upright[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(upright, -1),
    }[orientation]
    exif = Image.Exif()
    exif[274] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored))
    image.save(tmp_path / "a.jpg", quality=100, subsampling=0, exif=exif)
    pixels = decode(tmp_path / "a.jpg")
    assert pixels.shape == upright.shape
    assert np.abs(pixels.astype(int) - upright).mean() < 8


def test_bad_files_are_named_with_a_reason(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    content = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2])
    (tmp_path / "text.jpg").write_text("no picture")
    (tmp_path / "empty.jpg").touch()
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    names = ["whole.jpg", "cut.jpg", "text.jpg", "empty.jpg", "float.tif", "gone.jpg"]
    images = image_set(names, f"{tmp_path}/")
    assert images.read(0).shape == (64, 64, 3)
    reasons = ["truncated", "no picture", "no picture", "floating point", "No such file"]
    for index, why in enumerate(reasons, 1):
        with pytest.raises(BadImageError, match=why) as caught:
            images.read(index)
        assert caught.value.path == f"{tmp_path}/{names[index]}"
        assert str(caught.value).count(str(tmp_path)) == 1
        assert pickle.loads(pickle.dumps(caught.value)).reason == caught.value.reason


# --- the lists ------------------------------------------------------------------------------------


def image_set(names: list[str], prefix: str = "", **parts: np.ndarray) -> ImageSet:
    labels = np.arange(len(names)) % 3
    return ImageSet("x", "train", labels, ("a", "b", "c"), PathTable(names, prefix), **parts)


def test_path_table_holds_any_name_in_one_object() -> None:
    names = ["a/ü 1.jpg", "", "b\udcff.jpg", "東京.png"]
    table = PathTable(names, "/root/")
    assert list(table) == [f"/root/{name}" for name in names]
    assert table[-1] == "/root/東京.png"
    assert list(table.take(np.array([3, 0]))) == ["/root/東京.png", "/root/a/ü 1.jpg"]
    with pytest.raises(IndexError):
        table[4]
    large = PathTable(f"class/{index:06d}.jpg" for index in range(20_000))
    assert len(pickle.dumps(large)) < 20_000 * (16 + 8) + 1000


def test_subset_keeps_labels_and_select_classes_renumbers() -> None:
    names = [f"{index}.jpg" for index in range(9)]
    groups, folds = np.arange(9), np.arange(9) % 2
    images = image_set(names, groups=groups, folds=folds)
    part = images.subset([4, 1, 5])
    assert part.labels.tolist() == [1, 1, 2]
    assert part.class_names == images.class_names
    assert part.groups.tolist() == [4, 1, 5]
    assert list(images.subset(images.labels == 2).paths) == ["2.jpg", "5.jpg", "8.jpg"]
    assert len(images.subset([])) == 0
    chosen = images.select_classes([2, 0])
    assert chosen.class_names == ("c", "a")
    assert chosen.labels.tolist() == [1, 0, 1, 0, 1, 0]
    assert list(chosen.paths) == ["0.jpg", "2.jpg", "3.jpg", "5.jpg", "6.jpg", "8.jpg"]
    assert chosen.folds.tolist() == [0, 0, 1, 1, 0, 0]


def test_fingerprint_changes_with_the_data_and_not_with_the_place(tmp_path: Path) -> None:
    for place in ("here", "there"):
        write("cub", "official", tmp_path / place, CLASSES, IMAGES)
    here, there = (dataset.load("cub", tmp_path / place) for place in ("here", "there"))
    assert here.fingerprint() == there.fingerprint()
    assert here.fingerprint() != dataset.load("cub", tmp_path / "here", "eval").fingerprint()
    assert here.fingerprint() != here.subset(np.arange(len(here))[::-1]).fingerprint()
    with Path(there.paths[0]).open("ab") as file:
        file.write(b"more")
    assert here.fingerprint() != there.fingerprint()
    pixels = np.zeros((3, 2, 2, 3), np.uint8)
    before = image_set(["a", "b", "c"], pixels=pixels).fingerprint()
    pixels[1, 0, 0] = 1
    assert image_set(["a", "b", "c"], pixels=pixels).fingerprint() != before


# --- check ----------------------------------------------------------------------------------------


def findings(report: Report) -> dict[str, tuple[int, bool]]:
    return {finding.kind: (finding.count, finding.note) for finding in report.findings}


def clean_folder(root: Path) -> Path:
    photo_folder(root / "train", ["a", "b", "c"])
    for c, name in enumerate(["d", "e", "f"], 3):
        for k in range(2):
            save_image(root / "eval" / name / f"{k}.jpg", c, k)
    return root


def test_check_of_sound_data_is_clean(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = clean_folder(tmp_path)
    assert run([f"folder:{folder}"], tmp_path, as_json=False) == 0
    printed = capsys.readouterr().out
    assert "clean: 0 findings, 0 notes" in printed
    assert "train" in printed and "eval" in printed


def test_check_finds_what_is_wrong(tmp_path: Path) -> None:
    folder = clean_folder(tmp_path)
    shutil.copy(folder / "train" / "a" / "bild 0 ü.jpg", folder / "eval" / "d" / "copy.jpg")
    shutil.copy(folder / "train" / "b" / "bild 0 ü.jpg", folder / "train" / "c" / "copy.jpg")
    shutil.copy(folder / "eval" / "f" / "0.jpg", folder / "eval" / "f" / "again.jpg")
    content = (folder / "train" / "a" / "bild 1 ü.jpg").read_bytes()
    (folder / "train" / "a" / "cut.jpg").write_bytes(content[: len(content) * 3 // 5])
    save_image(folder / "eval" / "alone" / "0.jpg", 9, 9)
    save_image(folder / "train" / "single" / "0.jpg", 9, 8)
    save_image(folder / "eval" / "a" / "8.jpg", 9, 6)
    save_image(folder / "eval" / "a" / "9.jpg", 9, 7)
    save_image(folder / "eval" / "loose.jpg", 9, 5)
    (folder / "eval" / "e" / "phone.jxl").write_bytes(b"not for Pillow")
    report = check(f"folder:{folder}")
    assert findings(report) == {
        "unreadable or truncated file": (1, False),
        "picture that cannot be used as it is": (1, False),
        "remark": (1, False),
        "exact duplicate across train and test": (1, False),
        "exact duplicate in different classes": (1, False),
        "exact duplicate within a class": (1, True),
        "class with one image in train": (1, True),
        "class with one image in eval": (1, False),
        "class in train and in test": (1, False),
    }
    assert (report.status, report.exit_status) == ("findings", 1)
    across = next(finding for finding in report.findings if "across" in finding.kind)
    assert across.examples == ["train/a/bild 0 ü.jpg = eval/d/copy.jpg"]


def test_check_says_how_unusual_files_are_converted(tmp_path: Path) -> None:
    folder = clean_folder(tmp_path)
    place = folder / "train" / "a"
    grey = gradient()
    Image.fromarray(grey).save(place / "grey.png")
    Image.fromarray(grey.astype(np.uint16) * 256).save(place / "deep.png")
    triple = np.repeat(grey[:, :, None], 3, axis=2)
    (place / "colour.png").write_bytes(deep_colour_png(triple.astype(np.uint16) * 256))
    Image.fromarray(grey).convert("P").save(place / "palette.png")
    Image.new("CMYK", (8, 8)).save(place / "cmyk.jpg")
    Image.new("RGBA", (8, 8)).save(place / "alpha.png")
    exif = Image.Exif()
    exif[274] = 6
    Image.new("RGB", (8, 4), "red").save(place / "turned.jpg", exif=exif)
    report = check(f"folder:{folder}")
    assert findings(report) == {
        "grey file": (2, True),
        "16-bit file": (2, True),
        "palette file": (1, True),
        "CMYK file": (1, True),
        "transparent file": (1, True),
        "EXIF rotation file": (1, True),
    }
    assert report.exit_status == 0
    assert all(finding.meaning for finding in report.findings)


def test_check_compares_with_the_published_counts(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    write("vid", "official", tmp_path, 10, IMAGES)
    (tmp_path / "vehicle-id" / "VehicleID_V1.0" / "image" / "0000001.jpg").unlink()
    assert run(["vid"], tmp_path, as_json=True) == 1
    content = json.loads(capsys.readouterr().out)
    (report,) = content["datasets"]
    assert content["exit_status"] == 1
    assert [row["split"] for row in report["splits"]] == [
        "train",
        "eval large",
        "eval medium",
        "eval small",
    ]
    outcome = report["splits"][0].pop("outcome")
    assert outcome.startswith("1 of the 15 images cannot be read: training replaces them by other")
    assert report["splits"][0] == {
        "split": "train",
        "images": 15,
        "classes": 5,
        "published_images": 113346,
        "published_classes": 13164,
        "unreadable": 1,
    }
    kinds = [finding["kind"] for finding in report["findings"]]
    assert kinds.count("other counts than published") == 4
    assert kinds.count("missing file") == 1
    assert "image/ with train_test_split/" in report["found"]


def test_check_finds_queries_without_an_answer(tmp_path: Path) -> None:
    write("inshop", "official", tmp_path, CLASSES, 2)
    path = tmp_path / LISTS["inshop"][0]
    lines = path.read_text().splitlines(keepends=True)
    lines = [line.replace("gallery", "query") if "02_1_front" in line else line for line in lines]
    only = next(index for index, line in enumerate(lines) if "query" in line)
    lines[only] = lines[only].replace("query", "gallery")
    path.write_text("".join(lines))
    kinds = findings(check("inshop", tmp_path))
    assert kinds["class of a query without any gallery image"] == (2, False)


def test_check_of_nothing_says_where_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    assert run(["cub"], tmp_path, as_json=False) == 2
    printed = capsys.readouterr().out
    assert "not found" in printed
    assert "data.caltech.edu" in printed
    assert "001.Black_footed_Albatross/" in printed
    assert "non-commercial" in printed
    for name in ("cars", "sop", "inshop", "vid"):
        assert check(name, tmp_path).status == "absent"
        assert dataset.find(name).origin and dataset.find(name).tree


def test_check_all_counts_what_is_there(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert run(None, tmp_path, as_json=False) == 0
    printed = capsys.readouterr().out
    assert "4,417" in printed
    absent = f"notunder{tmp_path}:cub,cars,sop,inshop,vid"
    assert absent in "".join(printed.split())  # the lines are as narrow as a terminal
    layouts.write_cub_2010(tmp_path)
    write_drawings(tmp_path)  # looked at sooner than all of them
    assert run(None, tmp_path, as_json=False) == 2
    assert "2010edition" in "".join(capsys.readouterr().out.split())


def test_check_notices_another_emoji_archive(tmp_path: Path) -> None:
    with np.load(ROOT / "data" / "emoji" / "emoji_retrieval.npz") as file:
        content = dict(file)
    (tmp_path / "emoji").mkdir()
    np.savez(tmp_path / "emoji" / "emoji_retrieval.npz", **content, more=np.zeros(1))
    kinds = findings(check("emoji", tmp_path))
    near = kinds.pop("near duplicate across train and test")  # a note
    assert near[1] and near[0] < 44  # of 4,409, hence 1 %: faces that differ in the mouth
    assert kinds == {"file with another checksum than the published one": (1, False)}


def test_command_line(tmp_path: Path) -> None:
    folder = clean_folder(tmp_path)
    (folder / "eval" / "d" / "bad.jpg").write_text("no picture")

    def call(*words: str) -> subprocess.CompletedProcess[str]:
        return run_python("-m", "dataset", *words)

    done = call("check", f"folder:{folder}", "--json")
    assert done.returncode == 1
    assert json.loads(done.stdout)["datasets"][0]["status"] == "findings"
    assert done.stderr == ""
    done = call("download", "cars", "--data-root", str(tmp_path))
    assert done.returncode == 2
    assert done.stderr.startswith("error: cars cannot be downloaded")
    assert len(done.stderr.splitlines()) == 1


# --- the same names, other pictures ---------------------------------------------------------------


@pytest.mark.parametrize("layout", ["highres", "highres in Img"])
def test_check_finds_the_pictures_of_inshop_that_papers_do_not_use(
    layout: str, tmp_path: Path
) -> None:
    write("inshop", layout, tmp_path, CLASSES, IMAGES)
    done = run_python("-m", "dataset", "check", "Inshop", "--data-root", tmp_path)
    said = " ".join(done.stdout.split())
    assert done.returncode == 1
    assert "FINDING 1 x other pictures than the published ones" in said
    assert "img_highres" in said and "put img next to it" in said


def test_inshop_uses_img_where_both_are_there(tmp_path: Path) -> None:
    write("inshop", "highres", tmp_path, CLASSES, IMAGES)
    write("inshop", "flat", tmp_path, CLASSES, IMAGES)
    images = dataset.load("inshop", tmp_path, "query")
    assert "/img/" in images.paths[0] and not images.concern
    report = check("inshop", tmp_path)
    assert "other pictures than the published ones" not in findings(report)
    (note,) = (found for found in report.findings if "both there" in found.meaning)
    assert note.note and "img is used" in note.meaning


def test_check_finds_large_pictures_that_are_called_img(tmp_path: Path) -> None:
    write("inshop", "official", tmp_path, CLASSES, IMAGES)
    kind = "picture of more than the published 256 pixels"
    assert kind not in findings(check("inshop", tmp_path))
    for path in list((tmp_path / "Inshop_Clothes" / "Img" / "img").rglob("*.jpg"))[:2]:
        Image.new("RGB", (300, 400)).save(path)
    assert findings(check("inshop", tmp_path))[kind] == (2, False)


def test_a_run_says_which_pictures_of_inshop_it_used(tmp_path: Path) -> None:
    write("inshop", "highres", tmp_path, CLASSES, IMAGES)
    flags = [*SMALL, "--dataset", "Inshop", "--data-root", tmp_path, "--image-size", "32"]
    flags += ["--pretrained", "none", "--batch-size", "4", "--epochs", "1"]
    flags += ["--metrics", "retrieval", "--LOG_DIR", tmp_path, "--name", "run"]
    flags.remove("--no-report")
    done = run_cli("train.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "with img_highres/ in" in done.stdout.splitlines()[0]
    assert "R@1 has been seen to differ" in done.stderr
    kept = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert "with img_highres/ in" in kept["source"] and "R@1 has been seen" in kept["concern"]
    page = (tmp_path / "run" / "report.html").read_text().replace("<wbr>", "")
    assert "About the pictures of Inshop: these are the pictures of img_highres" in page
    assert kept["source"] in page


# --- a data set of one's own ----------------------------------------------------------------------


class Own(DataSet):
    """What docs/extending.md shows: four images in memory; `wrong` is what it has got wrong."""

    name = "own"
    protocol = Protocol()

    def __init__(self, **wrong: Any) -> None:
        self.wrong = wrong

    def load(self, root: Path, split: str, **options: Any) -> ImageSet:
        self.check_split(split)
        parts = {
            "labels": np.array([0, 0, 1, 1]),
            "class_names": ("a", "b"),
            "paths": PathTable(f"own/{index}" for index in range(4)),
            "pixels": np.zeros((4, 8, 8, 3), np.uint8),
        }
        return ImageSet(self.name, split, **parts | self.wrong)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"labels": np.array([1, 1, 2, 2])}, "labels run from 1 to 2 and it names 2 classes"),
        ({"labels": np.array([-1, 0, 0, 1])}, "labels run from -1 to 1"),
        ({"labels": np.array([0.0, 0, 1, 1])}, "not an array of whole numbers"),
        ({"labels": [0, 0, 1, 1]}, "not an array of whole numbers"),
        ({"labels": np.array([0, 0, 1])}, "3 labels, but 4 paths and 4 pixels"),
        ({"paths": ["a", "b", "c", "d"]}, "paths are a list; make them a PathTable"),
        ({"pixels": np.zeros((4, 8, 8, 3), np.float32)}, "float32 of shape"),
        ({"pixels": np.zeros((4, 3, 8, 8), np.uint8)}, r"not uint8 \(N, H, W, 3\)"),
        ({"folds": np.zeros(2, np.int64)}, "but 2 folds"),
    ],
)
def test_what_a_data_set_of_ones_own_gets_wrong_is_said(
    wrong: dict, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dataset._BY_NAME, "own", Own())
    assert dataset.load("own").num_classes == 2
    monkeypatch.setitem(dataset._BY_NAME, "own", Own(**wrong))
    with pytest.raises(InputError, match=rf"data set own \(train\) cannot be used: .*{said}"):
        dataset.load("own")
