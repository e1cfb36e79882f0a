"""`folder:` and `csv:`: what people have on their disks is read as they mean it, or refused."""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import time
import unicodedata
import zipfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import refusal, run_python
from official_layouts import class_of, save_image
from PIL import Image

import dataset
import evaluate
import options
from dataset import tree as trees
from dataset.__main__ import main
from dataset.check import Report, check
from dataset.showing import as_text
from evaluation.networks import all_checkpoint_files, found_again, open_checkpoint
from index.sources import photos_of
from options import looking
from options.meaning import changed
from page.records import read
from page.source import open_best
from terminal import columns
from utils import InputError


def photos(folder: Path, classes: str = "ab", images: int = 2, first: int = 0) -> Path:
    """A class folder for each letter, with its pictures; no two pictures are the same."""
    for name in classes:
        for k in range(images):
            save_image(folder / name / f"{k}.jpg", ord(name) - ord("a"), first + k)
    return folder


def names_of(given: str, split: str) -> tuple[str, ...]:
    return dataset.load(given, split=split).class_names


def kinds(report: Report) -> dict[str, int]:
    """How often each kind of finding was made; notes are left out."""
    return {finding.kind: finding.count for finding in report.findings if not finding.note}


def notes(report: Report) -> list[str]:
    return [finding.sentence() for finding in report.findings if finding.note]


# --- folders: which are splits --------------------------------------------------------------------

HELD_OUT = ["val", "Valid", "validation", "TEST", "testing", "dev", "Eval", "evaluation"]


@pytest.mark.parametrize("held_out", HELD_OUT)
@pytest.mark.parametrize("train", ["train", "Training"])
def test_the_usual_names_of_splits(train: str, held_out: str, tmp_path: Path) -> None:
    photos(tmp_path / train, "abc")
    photos(tmp_path / held_out, "de", first=5)
    given = f"folder:{tmp_path}"
    assert names_of(given, "train") == ("a", "b", "c")
    assert names_of(given, "eval") == ("d", "e")
    assert check(given).status == "clean"


@pytest.mark.parametrize(
    ("train", "held_out"),
    [("cars_train", "cars_test"), ("train2017", "val2017"), ("Train Set", "Test Set")],
)
def test_splits_with_something_else_in_their_names(
    train: str, held_out: str, tmp_path: Path
) -> None:
    photos(tmp_path / train, "abc")
    photos(tmp_path / held_out, "de", first=5)
    given = f"folder:{tmp_path}"
    assert names_of(given, "train") == ("a", "b", "c")
    assert names_of(given, "eval") == ("d", "e")


def test_classes_divided_into_splits(tmp_path: Path) -> None:
    for name in "abc":
        for k, split in enumerate(("train", "train", "Test", "Test")):
            save_image(tmp_path / name / split / f"{k}.jpg", ord(name) - ord("a"), k)
    given = f"folder:{tmp_path}"
    train, held_out = (dataset.load(given, split=split) for split in ("train", "eval"))
    assert train.class_names == held_out.class_names == ("a", "b", "c")
    assert [Path(path).parent.name for path in train.paths] == ["train"] * 6
    assert [Path(path).parent.name for path in held_out.paths] == ["Test"] * 6
    assert kinds(check(given)) == {"class in train and in test": 3}
    save_image(tmp_path / "c" / "9.jpg", 2, 9)
    with pytest.raises(InputError, match=r"some classes are divided.*c/9.jpg is in neither"):
        dataset.load(given)


def test_the_same_classes_on_both_sides_are_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos(tmp_path / "train", "abc")
    photos(tmp_path / "val", "bcd", first=5)
    for split in ("train", "eval", "train"):
        dataset.load(f"folder:{tmp_path}", split=split)
    (said,) = [record.getMessage() for record in caplog.records]
    assert "2 of the 3 classes that are evaluated are also trained on (b, c)" in said


@pytest.mark.parametrize(
    ("places", "words"),
    [
        (["train/images/a", "val/images/a"], "one training class (images)"),
        (["train/a", "train/b", "val/c"], "one evaluation class (c)"),
        (["train/a", "val/b", "val/c"], "one training class (a)"),
        (["train", "val"], "train and val hold pictures and no class folders"),
        (["train"], "train holds pictures and no class folders"),
        (["Test", "validation"], "Test and validation hold pictures and no class folders"),
        (["cars_train", "cars_test"], "cars_test and cars_train hold pictures"),
        (["train/a", "train/b"], "train is called like a split and holds folders"),
        (["train/a", "train/b", "Holdout/c"], "train is called like a split"),
        (["test/a", "test/b", "cup/x", "mug/x"], "test is called like a split"),
        (["train/a", "train/b", "val/c", "val/d", "test/e", "test/f"], "has test and val"),
        (["train/a", "train/b", "query/c", "query/d"], "query but no gallery"),
        (["images/train/a", "images/val/a"], "holds one folder with pictures, images"),
        (["photos/a", "photos/b", "photos/c"], "holds one folder with pictures, photos"),
        (["a/train", "a/val", "a/test", "b/train", "b/val", "b/test"], "has test and val"),
        (["x_train/a", "x_val/b", "y_train/a", "y_val/b"], "more than one way"),
    ],
)
def test_layouts_that_would_be_misread_are_refused(
    places: list[str], words: str, tmp_path: Path
) -> None:
    for number, place in enumerate(places):
        for k in range(2):
            save_image(tmp_path / place / f"{number}{k}.jpg", number, k)
    with pytest.raises(InputError) as refused:
        for split in ("train", "eval"):
            dataset.load(f"folder:{tmp_path}", split=split)
    sentence = str(refused.value)
    assert words in sentence and "\n" not in sentence and str(tmp_path) in sentence
    report = check(f"folder:{tmp_path}")
    assert (report.status, report.exit_status) == ("unusable", 2)


def test_classes_called_like_splits_are_classes(tmp_path: Path) -> None:
    """Vehicles: a train is one."""
    for number, name in enumerate(["bus", "car", "plane", "ship", "train", "test tube"]):
        save_image(tmp_path / name / "0.jpg", number, 0)
        save_image(tmp_path / name / "1.jpg", number, 1)
    given = f"folder:{tmp_path}"
    found = {*names_of(given, "train"), *names_of(given, "eval")}
    assert found == {"bus", "car", "plane", "ship", "train", "test tube"}


def test_eval_is_taken_and_others_are_left_out_with_a_word(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for number, split in enumerate(("train", "eval", "test", "extra")):
        photos(tmp_path / split, "ab" if split == "train" else "cd", first=2 * number)
    assert len(dataset.load(f"folder:{tmp_path}", split="eval")) == 4
    assert "extra and test beside train and eval are left out" in caplog.text


def test_an_evaluation_needs_no_training_part(tmp_path: Path) -> None:
    photos(tmp_path / "one" / "test", "cd")
    photos(tmp_path / "two" / "query", "cd", images=1)
    photos(tmp_path / "two" / "Gallery", "cd", first=5)
    one, two = f"folder:{tmp_path / 'one'}", f"folder:{tmp_path / 'two'}"
    assert names_of(one, "eval") == ("c", "d")
    assert len(dataset.load(two, split="query")) == 2
    assert len(dataset.load(two, split="gallery")) == 4
    assert dataset.find(two).query_gallery and not dataset.find(one).query_gallery
    for given in (one, two):
        report = check(given)
        assert report.status == "clean", report
        assert any("no training images" in note for note in notes(report))
        with pytest.raises(InputError, match=r"has no training images.*can be evaluated"):
            dataset.load(given)


def test_a_table_without_a_training_part(tmp_path: Path) -> None:
    photos(tmp_path, "abcd", images=1)
    rows = ["a/0.jpg,x,query", "b/0.jpg,y,query", "c/0.jpg,x,gallery", "d/0.jpg,y,gallery"]
    given = table(tmp_path, "path,label,split", *rows)
    assert len(dataset.load(given, split="eval")) == 4
    assert check(given).exit_status == 0
    with pytest.raises(InputError, match="no training images"):
        dataset.load(given)


def test_one_class_left_by_ratio_classes_is_refused(tmp_path: Path) -> None:
    photos(tmp_path / "train", "abcd")
    photos(tmp_path / "eval", "efgh", first=5)
    choice = dataset.Choice(f"folder:{tmp_path}", ratio_classes=0.25)
    for split, side in (("train", "training"), ("eval", "evaluation")):
        with pytest.raises(InputError, match=rf"--ratio-classes 0.25 .* leaves one {side} class"):
            choice.load(split)
    assert dataset.Choice(f"folder:{tmp_path}", ratio_classes=0.5).load("eval").num_classes == 2


def test_a_published_data_set_of_one_class_is_refused(tmp_path: Path) -> None:
    for number in (1, 2):
        save_image(tmp_path / "CUB_200_2011" / "images" / f"00{number}.Bird" / "a.jpg", number, 0)
    with pytest.raises(InputError, match=r"cub has one training class \(001.Bird\)"):
        dataset.load("cub", tmp_path)


def test_the_draw_holds_two_classes_out_at_least_and_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = f"folder:{photos(tmp_path, 'abcdefghij')}"
    assert dataset.load(given, split="eval", eval_classes=0.01).num_classes == 2
    assert dataset.load(given, split="train", eval_classes=0.99).num_classes == 2
    assert not caplog.records  # whoever asks for a share knows of it
    dataset.load(given, seed=7)
    assert "5 of its 10 classes are, drawn with seed 7" in caplog.text
    report = check(given)
    assert report.exit_status == 0
    assert any("5 of its 10 classes are, drawn with seed 1" in note for note in notes(report))


# --- folders: every picture is found --------------------------------------------------------------


def test_what_was_trained_on_is_not_held_out_of_a_folder_that_has_grown(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    choice = dataset.Choice(f"folder:{photos(tmp_path, 'abcdefghij', images=1)}", eval_classes=0.3)
    trained, unseen = (set(choice.load(split).class_names) for split in ("train", "eval"))
    knowing = replace(choice, trained=frozenset(trained))
    assert set(knowing.load("eval").class_names) == unseen and not knowing.never_held_out
    photos(tmp_path, "klm", images=1)
    assert trained & set(choice.load("eval").class_names)  # a draw among other names is another one
    assert set(knowing.load("eval").class_names) == {*unseen, *"klm"}
    assert set(knowing.load("train").class_names) == trained
    assert "the 6 of its 13 classes that it was not trained on" in caplog.text
    everything = replace(choice, trained=frozenset("abcdefghijkl"))
    with pytest.raises(InputError, match=r"has 1 class.+ not trained on"):
        everything.load("eval")


def test_a_grown_folder_is_evaluated_on_what_its_run_did_not_train_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = photos(tmp_path / "photos", "abcdefghij")
    flags = "--eval-classes 0.3 --max-steps 1 --batch-size 4"
    run = tiny.run(folder, tmp_path / "logs", "run", flags)
    trained = set(open_checkpoint(run).trained_on.class_names)

    def evaluated(*flags: str) -> set[str]:
        args = options.parse_evaluate(["--resume", str(run), *flags])
        (candidate,) = evaluate.open_candidates(args, all_checkpoint_files(args.resume))
        return set(candidate.tasks[0].queries.class_names)

    assert evaluated() == set("abcdefghij") - trained
    photos(folder, "klm")
    assert evaluated() == set("abcdefghijklm") - trained
    assert set(open_best(read(run), 0).task.queries.class_names) == evaluated()
    assert "name of a training class" not in caplog.text
    shutil.copytree(folder, tmp_path / "others")
    others = evaluated("--dataset", f"folder:{tmp_path / 'others'}", "--eval-classes", "0.3")
    assert others & trained and "have the name of a training class" in caplog.text


def test_folders_behind_links_are_entered_and_circles_are_not(tmp_path: Path) -> None:
    folder = photos(tmp_path / "photos", "abcd")
    photos(tmp_path / "elsewhere", "x")
    (folder / "a" / "more").symlink_to(tmp_path / "elsewhere" / "x")
    (folder / "a" / "home").symlink_to(folder)
    (folder / "b" / "self").symlink_to(folder / "b")
    (folder / "c" / "up").symlink_to(tmp_path)
    (folder / "e").symlink_to(folder / "d")
    (folder / "b" / "gone").symlink_to(tmp_path / "nowhere")
    found = trees.tree(folder)
    assert [name for name in found.pictures if name.startswith("a/")] == [
        "a/0.jpg",
        "a/1.jpg",
        "a/more/0.jpg",
        "a/more/1.jpg",
    ]
    assert [name for name in found.pictures if name.startswith("e/")] == ["e/0.jpg", "e/1.jpg"]
    assert len(found.pictures) == 12
    report = check(f"folder:{folder}")
    assert kinds(report)["remark"] == 4
    (remark,) = (finding for finding in report.findings if finding.kind == "remark")
    assert sum("leads back" in text for text in remark.examples) == 3
    assert sum("is a link to nothing" in text for text in remark.examples) == 1


def test_rarer_formats_are_pictures_too(tmp_path: Path) -> None:
    photos(tmp_path, "abcd")
    pixels = np.full((16, 24, 3), (24, 200, 128), np.uint8)
    for suffix in (".tga", ".TGA", ".pcx", ".sgi", ".pbm", ".dib", ".jp2"):
        Image.fromarray(pixels).convert("1" if suffix == ".pbm" else "RGB").save(
            tmp_path / "a" / f"x{suffix}"
        )
    images = [dataset.load(f"folder:{tmp_path}", split=split) for split in ("train", "eval")]
    names = {Path(path).name for part in images for path in part.paths}
    assert len(names) == 2 + 7
    for part in images:
        for index in range(len(part)):
            assert part.read(index).shape[2] == 3


def test_files_that_are_left_out_are_named(tmp_path: Path) -> None:
    folder = photos(tmp_path, "abcd")
    (folder / "a" / "0.CR2").write_bytes(b"raw")
    (folder / "a" / "notes.txt").write_text("hello")
    (folder / "b" / "noname").write_text("hello")
    (folder / "b" / "Thumbs.db").write_text("hello")
    report = check(f"folder:{folder}")
    (remark,) = (finding for finding in report.findings if finding.kind == "remark")
    assert "1 .cr2 file, not read as pictures, left out" in remark.sentence()
    (note,) = (text for text in notes(report) if "not read as pictures" in text)
    assert "1 .txt" in note and "1 without a suffix" in note and ".db" not in note


def test_a_folder_that_may_not_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = photos(tmp_path, "abcd")
    save_image(folder / "a" / "closed" / "x.jpg", 0, 9)
    scandir = os.scandir

    def refusing(path: str | Path) -> object:
        if str(path).endswith(closed):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(trees.os, "scandir", refusing)
    closed = "a/closed"
    report = check(f"folder:{folder}")
    assert report.exit_status == 1
    said = "".join(as_text(report).split())  # its lines break where the path is long
    assert "a/closedcannotberead(Permissiondenied)" in said
    closed = str(folder)
    (folder / "a" / "2.jpg").touch()  # so that the folder is read anew
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\); check its"):
        dataset.load(f"folder:{folder}")


def test_what_systems_leave_behind_is_no_class(tmp_path: Path) -> None:
    folder = photos(tmp_path, "abcd")
    left = ["@eaDir", "$RECYCLE.BIN", "System Volume Information", "#recycle", "lost+found", ".x"]
    for name in left:
        save_image(folder / name / "0.jpg", 9, 0)
        save_image(folder / "a" / name / "0.jpg", 9, 0)
    given = f"folder:{folder}"
    assert {*names_of(given, "train"), *names_of(given, "eval")} == set("abcd")
    assert len(dataset.load(given)) + len(dataset.load(given, split="eval")) == 8
    assert check(given).exit_status == 0


@pytest.mark.parametrize("kind", ["pipe", "link to a device", "folder in a table"])
def test_what_is_no_file_hangs_nothing(kind: str, tmp_path: Path) -> None:
    folder = photos(tmp_path, "abcd")
    odd = folder / "a" / "odd.jpg"
    if kind == "pipe":
        os.mkfifo(odd)
        why = "a named pipe"
    elif kind == "link to a device":
        odd.symlink_to("/dev/zero")
        why = "a device"
    else:
        odd.mkdir()
        why = "a folder"
    rows = [f"{path.relative_to(folder)},{path.parent.name}" for path in folder.glob("*/*.jpg")]
    for given in (table(folder, "path,label", *rows), f"folder:{folder}"):
        if kind == "folder in a table" and given.startswith("folder:"):
            continue
        report = check(given)
        assert kinds(report) == {"no plain file": 1}
        assert why in next(f.sentence() for f in report.findings if not f.note)
        parts = [dataset.load(given, split=split) for split in ("train", "eval")]
        (where,) = [(part, i) for part in parts for i, p in enumerate(part.paths) if "odd" in p]
        with pytest.raises(dataset.BadImageError, match=f"it is {why}.*, not a file"):
            where[0].read(where[1])
        assert [name for part in parts for name in part.missing()] == [str(odd)]


@pytest.mark.parametrize("name", ["table", "list"])
def test_a_pipe_in_the_place_of_a_list_hangs_nothing(name: str, tmp_path: Path) -> None:
    if name == "table":
        os.mkfifo(tmp_path / "i.csv")
        with pytest.raises(InputError, match=r"i.csv cannot be read \(it is a named pipe"):
            dataset.load(f"csv:{tmp_path / 'i.csv'}")
    else:
        save_image(tmp_path / "CUB_200_2011" / "images" / "001.Bird" / "a.jpg", 0, 0)
        os.mkfifo(tmp_path / "CUB_200_2011" / "images.txt")
        with pytest.raises(InputError, match=r"images.txt cannot be read \(it is a named pipe"):
            dataset.load("cub", tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "loop", "long name", "file", "nothing"])
@pytest.mark.parametrize("form", ["folder", "csv", "data root"])
def test_places_that_are_none_get_a_sentence(kind: str, form: str, tmp_path: Path) -> None:
    place = tmp_path / ("x" * 300 if kind == "long name" else "x")
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "loop":
        place.symlink_to(place)
    elif kind == "file":
        place.write_bytes(b"\xff\xff\0")
    with pytest.raises(InputError) as refused:
        if form == "data root":
            dataset.load("cub", place)
        else:
            dataset.load(f"{form}:{place}")
    assert "x" in str(refused.value) and "\n" not in str(refused.value)


def test_a_pipe_among_the_pictures_does_not_hold_up_the_choice_of_settings(tmp_path: Path) -> None:
    photos(tmp_path, "abcdef")
    os.mkfifo(tmp_path / "a" / "odd.jpg")
    args = Namespace(**options.defaults(options.TRAIN_GROUPS), given=[])
    assert looking.images_of(changed(args, {"dataset": f"folder:{tmp_path}"})).side > 0


def test_places_that_may_not_be_looked_at_are_not_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed, stat = tmp_path / "closed" / "photos", os.stat

    def refusing(path: object, *how: object, **more: object) -> os.stat_result:
        if str(path).startswith(str(closed)):
            raise PermissionError(13, "Permission denied", str(path))
        return stat(path, *how, **more)

    monkeypatch.setattr(os, "stat", refusing)
    assert not dataset.Choice(f"folder:{closed}").is_gone
    for given in (f"folder:{closed}", f"csv:{closed}.csv"):
        told = check(given).problem
        assert "Permission denied" in told and "does not exist" not in told
    assert dataset.Choice(f"folder:{tmp_path}/{'x' * 300}").is_gone
    (tmp_path / "environment.json").write_text(json.dumps({"place": str(closed)}))
    choice = found_again(dataset.Choice(f"folder:{tmp_path}/none"), tmp_path)
    assert choice.place == closed and not choice.is_gone


def test_a_seed_that_is_none_is_refused_by_check(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    check = ["check", f"folder:{photos(tmp_path, 'abcd')}", "--seed", "-1"]
    assert "--seed" in refusal(capsys, main, check)


def test_a_seed_without_effect_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    photos(tmp_path / "train", "ab")
    photos(tmp_path / "eval", "cd")
    assert main(["check", f"folder:{tmp_path}", "--seed", "3"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "the seed of the draw (3) has no effect on" in printed
    assert "--split-seed" not in printed
    photos(tmp_path / "drawn", "abcd")
    assert main(["check", f"folder:{tmp_path}/drawn", "--seed", "3"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "no effect" not in printed and "--split-seed 3" in printed


def test_pictures_in_no_class_folder_are_counted(tmp_path: Path) -> None:
    save_image(tmp_path / "0.jpg", 0, 0)
    with pytest.raises(InputError, match=r"1 picture, outside any class folder"):
        dataset.load(f"folder:{tmp_path}")


def test_labels_of_cars_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    from scipy.io import savemat

    (tmp_path / "cars196" / "car_ims").mkdir(parents=True)
    for value in ("two", float("nan"), 1e30, 1.5):
        rows = [("car_ims/0.jpg", value), ("car_ims/1.jpg", 1)]
        kind = [("relative_im_path", object), ("class", object)]
        savemat(
            tmp_path / "cars196" / "cars_annos.mat", {"annotations": np.array(rows, dtype=kind)}
        )
        with pytest.raises(InputError, match=r"cars_annos.mat holds .* the number of a class"):
            dataset.load("cars", tmp_path)


# --- folders: one walk, one warning ---------------------------------------------------------------


def test_a_folder_is_walked_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = photos(tmp_path, "abcd")
    save_image(folder / "loose.jpg", 5, 5)
    walked = []
    scandir = os.scandir
    monkeypatch.setattr(trees.os, "scandir", lambda path: walked.append(str(path)) or scandir(path))
    given = f"folder:{folder}"
    choice = dataset.Choice(given)
    for _ in range(3):
        assert not choice.query_gallery
        assert len(choice.load("train")) == len(choice.load("eval")) == 4
    # Itself twice: whether it can be read, and what is in it.
    assert sorted(walked) == sorted([str(folder), f"{folder}/", *(f"{folder}/{c}" for c in "abcd")])
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) == 2  # the loose picture, and how the classes were drawn
    save_image(folder / "a" / "9.jpg", 0, 9)
    assert len(choice.load("train")) + len(choice.load("eval")) == 9


def test_a_table_is_read_once_until_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos(tmp_path, "abcd")
    rows = [f"{c}/{k}.jpg,{c}" for c in "abcd" for k in range(2)]
    given = table(tmp_path, "path,label", *rows)
    opened = []
    open_ = Path.open
    monkeypatch.setattr(
        Path, "open", lambda path, *a, **k: opened.append(path.name) or open_(path, *a, **k)
    )
    for split in ("train", "eval", "train"):
        assert not dataset.find(given).query_gallery
        assert len(dataset.load(given, split=split)) == 4
    assert len(opened) == 2  # its first bytes, and all of it
    table(tmp_path, "path,label", *rows[:-1])
    parts = [dataset.load(given, split=split) for split in ("train", "eval")]
    assert sum(map(len, parts)) == 7


# --- tables ---------------------------------------------------------------------------------------


def table(folder: Path, *lines: str, encoding: str = "utf-8", name: str = "images.csv") -> str:
    """Writes a table; its name for `--dataset`."""
    (folder / name).write_bytes(("\n".join(lines) + "\n").encode(encoding))
    return f"csv:{folder / name}"


BOXES = "path,label,split,x1,y1,x2,y2"


@pytest.mark.parametrize(
    ("box", "words"),
    [
        ("0.2,0.1,0.8,0.9", "shares of the picture's width and height"),
        ("0,0,1,1", "shares of the picture's width and height"),
        ("1,2,99999999999,9", "larger than any picture"),
        ("1,2,1e30,9", "larger than any picture"),
        ("1,2,nan,9", "not four numbers"),
        ("3,2,3.4,9", "0 <= x1 < x2"),
        ("1,2,,9", "not four numbers"),
    ],
)
def test_boxes_that_cannot_be_meant_are_refused(box: str, words: str, tmp_path: Path) -> None:
    photos(tmp_path, "abcd")
    given = table(tmp_path, BOXES, "a/0.jpg,a,train,1,1,9,9", f"b/0.jpg,b,train,{box}")
    with pytest.raises(InputError, match=rf"line 3: the box {box}.*{words}"):
        dataset.load(given)


def test_boxes_of_few_pixels_are_a_finding(tmp_path: Path) -> None:
    photos(tmp_path, "abcd")
    rows = [
        f"{c}/{k}.jpg,{c},{s},2,2,12,12"
        for c, s in zip("abcd", "ttee", strict=True)
        for k in (0, 1)
    ]
    rows = [row.replace(",t,", ",train,").replace(",e,", ",eval,") for row in rows]
    rows[0] = "a/0.jpg,a,train,2,2,3,12"
    rows[3] = "b/1.jpg,b,train,5,14,20,18"  # 2 rows of its 16 remain
    report = check(table(tmp_path, BOXES, *rows))
    assert kinds(report) == {"picture or box with fewer than 4 pixels to a side": 2}


@pytest.mark.parametrize(
    "heading", ["x_1,y_1,x_2,y_2", "xmin,ymin,xmax,ymax", "X_Min,Y_Min,X_Max,Y_Max"]
)
def test_boxes_by_other_names(heading: str, tmp_path: Path) -> None:
    photos(tmp_path, "abcd")
    rows = [f"{c}/0.jpg,{c},{'train' if c < 'c' else 'eval'},1,2,9.0,8" for c in "abcd"]
    images = dataset.load(table(tmp_path, f"path,label,split,{heading}", *rows))
    assert images.boxes.tolist() == [[1, 2, 9, 8]] * 2


def test_tables_of_open_metric_learning_are_taken_as_they_are(tmp_path: Path) -> None:
    photos(tmp_path, "abcdef")
    heading = "path,label,split,is_query,is_gallery,x_1,x_2,y_1,y_2,category"
    train = [
        f"{c}/{k}.jpg,{i},train,,,1.0,9.0,2.0,8.0,cup" for i, c in enumerate("ab") for k in (0, 1)
    ]
    both = [
        f"{c}/{k}.jpg,{i},validation,True,True,,,,,mug"
        for i, c in enumerate("cd", 2)
        for k in (0, 1)
    ]
    given = table(tmp_path, heading, *train, *both)
    assert dataset.load(given).class_names == ("0", "1")
    assert dataset.load(given).boxes.tolist()[0] == [1, 2, 9, 8]
    held_out = dataset.load(given, split="eval")
    assert held_out.class_names == ("2", "3") and len(held_out) == 4
    assert not dataset.find(given).query_gallery
    report = check(given)
    assert report.exit_status == 0
    assert any("category is not used" in note for note in notes(report))
    apart = [
        f"{c}/{k}.jpg,{i},validation,{not k},{bool(k)},,,,,mug"
        for i, c in enumerate("cd")
        for k in (0, 1)
    ]
    given = table(tmp_path, heading, *train, *apart)
    assert len(dataset.load(given, split="query")) == len(dataset.load(given, split="gallery")) == 2
    without = [row.replace(",validation,", ",").replace(",train,", ",") for row in (*train, *apart)]
    given = table(tmp_path, heading.replace("split,", ""), *without)
    assert len(dataset.load(given)) == 4 and len(dataset.load(given, split="query")) == 2


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ("c/0.jpg,c,train,True,False", "does not fit is_query True"),
        ("c/0.jpg,c,validation,False,", "does not fit is_query False and is_gallery empty"),
        ("c/0.jpg,c,validation,maybe,False", "'maybe' is neither True nor False"),
        ("c/0.jpg,c,gallery,True,False", "does not fit"),
    ],
)
def test_flags_that_contradict_are_refused(row: str, words: str, tmp_path: Path) -> None:
    photos(tmp_path, "abcd")
    given = table(tmp_path, "path,label,split,is_query,is_gallery", "a/0.jpg,a,train,,", row)
    with pytest.raises(InputError, match=rf"line 3: .*{words}"):
        dataset.load(given)


@pytest.mark.parametrize("name", ["set", "Subset", "partition", "phase"])
def test_a_split_by_another_name(name: str, tmp_path: Path) -> None:
    photos(tmp_path, "abcd")
    rows = [f"{c}/{k}.jpg,{c},{'Training' if c < 'c' else 'Val'}" for c in "abcd" for k in (0, 1)]
    given = table(tmp_path, f"path,label,{name}", *rows)
    assert names_of(given, "train") == ("a", "b")
    assert names_of(given, "eval") == ("c", "d")
    rows[3] = rows[3].replace("Training", "trian")
    with pytest.raises(InputError, match=rf"line 5: {name.lower()} 'trian' is not one of train"):
        dataset.load(table(tmp_path, f"path,label,{name}", *rows))


def test_a_table_with_validation_and_test_rows_is_refused(tmp_path: Path) -> None:
    photos(tmp_path, "abcdef")
    splits = dict(zip("abcdef", ["train"] * 2 + ["val"] * 2 + ["test"] * 2, strict=True))
    rows = [f"{c}/{k}.jpg,{c},{splits[c]}" for c in "abcdef" for k in (0, 1)]
    with pytest.raises(InputError, match="only one part can be held out"):
        dataset.load(table(tmp_path, "path,label,split", *rows))


def test_columns_that_are_not_used_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos(tmp_path, "abcd")
    rows = [f"{c}/{k}.jpg,{c},7,{k},{k},5" for c in "abcd" for k in (0, 1)]
    given = table(tmp_path, "path,label,subset,bbox,image_id,score", *rows)
    dataset.load(given)
    assert "subset, bbox, image_id and score are not used" in caplog.text
    assert "2 of its 4 classes are, drawn with seed 1" in caplog.text
    report = check(given)
    assert report.exit_status == 0
    assert any("subset, bbox, image_id and score are not used" in note for note in notes(report))
    with pytest.raises(InputError, match=r"no column label.*it names path and class"):
        dataset.load(table(tmp_path, "path,class", "a/0.jpg,a"))


def test_a_first_line_that_names_no_columns_is_shown_in_part(tmp_path: Path) -> None:
    photos(tmp_path, "abcd")
    rows = [f"{c}/{k}.jpg,{c}" for c in "abcd" for k in (0, 1)]
    with pytest.raises(InputError, match=r"its first line is an image; put the line path,label"):
        dataset.load(table(tmp_path, *rows))
    with pytest.raises(InputError, match=r"separated by commas.*it names c1, .* c12 and others$"):
        dataset.load(table(tmp_path, ",".join(f"C{k}" for k in range(1, 3000))))
    with pytest.raises(InputError, match=r"line 3: s3://shop/b.jpg is an address"):
        dataset.load(table(tmp_path, "path,label", rows[0], "s3://shop/b.jpg,b"))


def test_a_column_that_might_be_a_split_and_has_many_values_is_read_quickly(tmp_path: Path) -> None:
    photos(tmp_path, "abcd")
    rows = [f"{'abcd'[k % 4]}/{k % 2}.jpg,{'abcd'[k % 4]},set {k}" for k in range(40_000)]
    given = table(tmp_path, "path,label,set", *rows)
    begin = time.process_time()
    assert sum(len(dataset.load(given, split=split)) for split in ("train", "eval")) == 40_000
    assert time.process_time() - begin < 5  # 30 s where each value is compared with all


@pytest.mark.parametrize("split", ["", "train/"])
def test_pictures_below_class_folders_are_said_to_belong_to_the_upper_one(
    split: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    for name in ("mugs", "pots", "pans", "lids"):
        photos(tmp_path / split / name, "ab")
    if split:
        photos(tmp_path / "eval" / "cups", "ab", first=5)
        photos(tmp_path / "eval" / "jars", "ab", first=7)
    given = f"folder:{tmp_path}"
    dataset.load(given)
    (said,) = [each for each in caplog.records if "below a class folder" in each.message]
    folders, classes = (12, 6) if split else (8, 4)
    assert said.levelname == "WARNING"
    assert f"such as {split}lids/a/0.jpg to lids; if the {folders} lower folders" in said.message
    assert f"and not these {classes}, move them up" in said.message
    caplog.clear()
    save_image(tmp_path / split / "mugs" / "0.jpg", 3, 9)
    dataset.load(given)
    (said,) = [each for each in caplog.records if "below a class folder" in each.message]
    assert said.levelname == "INFO" and "move them up" not in said.message
    assert any("below a class" in note for note in notes(check(given)))


def test_a_number_written_in_two_ways_is_said_to_be_two_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos(tmp_path, "abcd")
    rows = [f"{c}/{k}.jpg,{i}{'.0' if k else ''}" for i, c in enumerate("abcd") for k in (0, 1)]
    dataset.load(table(tmp_path, "path,label", *rows))
    assert "the labels 0 and 0.0 are two classes, and 3 others likewise" in caplog.text
    caplog.clear()
    dataset.load(table(tmp_path, "path,label", *rows[1::2], rows[1], name="alike.csv"))
    assert "two classes" not in caplog.text


def other_kinds(folder: Path) -> dict[str, str]:
    """Files that are no tables → what is said of them."""
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive:
        archive.writestr("a/0.jpg", b"")
    shutil.copy(folder / "photos.zip", folder / "photos.xlsx")
    with tarfile.open(folder / "photos.tar", "w") as archive:
        archive.add(folder / "photos.zip", "a/0.jpg")
    with tarfile.open(folder / "photos.tgz", "w:gz") as archive:
        archive.add(folder / "photos.zip", "a/0.jpg")
    (folder / "photos.json").write_text(' [{"path": "a/0.jpg", "label": "a"}]')
    (folder / "photos.parquet").write_bytes(b"PAR1" + bytes(20) + b"PAR1")
    return {
        **dict.fromkeys(("photos.zip", "photos.tar", "photos.tgz"), "an archive; unpack it"),
        "photos.xlsx": "a spreadsheet; save it as CSV",
        "photos.json": "JSON, and images are listed in CSV",
        "photos.parquet": "a Parquet file, and images are listed in CSV",
    }


def test_files_of_other_kinds_are_called_what_they_are(tmp_path: Path) -> None:
    for name, words in other_kinds(tmp_path).items():
        for given in (f"csv:{tmp_path / name}", f"folder:{tmp_path / name}", f"{tmp_path / name}"):
            with pytest.raises(InputError, match=f"{name}( is|: .*{name} is) {words}"):
                dataset.load(given)
    with pytest.raises(InputError, match=r"found among 1 .json, .*out of the .parquet, .tar, .tgz"):
        dataset.load(f"folder:{tmp_path}")
    photos(tmp_path / "photos", "abcd")
    given = table(tmp_path, "path,label", "photos/a/0.jpg,a")
    with pytest.raises(InputError, match=f"is a file; if it is a table of images, name it {given}"):
        dataset.load(given.replace("csv:", "folder:"))
    with pytest.raises(InputError, match=f"are the classes, name it folder:{tmp_path}/photos"):
        dataset.load(f"csv:{tmp_path}/photos")
    for given in ("https://host/photos.zip", "folder:hf://shop/photos", "csv:s3://shop/a.csv"):
        with pytest.raises(InputError, match=f"{given} is an address; download"):
            dataset.load(given)


NOT_CLOSED = "a quotation mark is opened and not closed"


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (['a/0.jpg,"a'], NOT_CLOSED),
        (['"a/0.jpg', 'b/0.jpg",b'], "the path goes on in the next line"),
        (['a/0.jpg,a,"5 inch'], NOT_CLOSED),
        (['a/0.jpg,a,"5 inch', 'b/0.jpg,b,"6 inch'], NOT_CLOSED),
        (['a/0.jpg,a,"5 inch', *["a/0.jpg,a"] * 15_000], NOT_CLOSED),  # too long for one field
    ],
)
def test_a_quotation_mark_that_is_not_closed_swallows_no_rows(
    lines: list[str], said: str, tmp_path: Path
) -> None:
    photos(tmp_path, "abcd")
    rows = [f"{c}/{k}.jpg,{c}" for c in "abcd" for k in range(2)]
    given = table(tmp_path, "path,label,said", rows[-1], "", *lines, *rows)
    with pytest.raises(InputError, match=f"line 4: {said}"):
        dataset.load(given)
    if said == NOT_CLOSED:
        with pytest.raises(InputError, match=f"line 4: {said}"):
            photos_of([given])
    given = table(tmp_path, "path,label,said", *rows[:-1], f'{rows[-1]},"two\nlines, 5"" wide"')
    assert len(dataset.load(given)) == 4  # a break elsewhere is nobody's business


def test_rows_with_more_fields_than_the_heading_are_refused(tmp_path: Path) -> None:
    photos(tmp_path, "abcd")
    given = table(tmp_path, "path,label", "a/0.jpg,a,,", "b/0.jpg,cup, large")
    with pytest.raises(InputError, match="line 3: 3 fields, and the heading has 2"):
        dataset.load(given)
    with pytest.raises(InputError, match="two columns label"):
        dataset.load(table(tmp_path, "path,label,label", "a/0.jpg,a,b"))


@pytest.mark.parametrize(
    ("before", "delimiter", "encoding"),
    [
        ("", ",", "utf-8-sig"),
        ("\n\n", ";", "utf-8"),
        (" \n;;\n", ";", "utf-8-sig"),
        ("sep=;\n", ";", "utf-8"),
        ("sep=|\n", "|", "utf-8-sig"),
        ("", "\t", "utf-16"),
        ("\r\n", ",", "utf-8"),
    ],
)
def test_tables_with_something_before_the_heading(
    before: str, delimiter: str, encoding: str, tmp_path: Path
) -> None:
    photos(tmp_path, "abcd")
    rows = [f"{c}/{k}.jpg,ü{c}" for c in "abcd" for k in (0, 1)]
    rows[3:3] = ["", ","]  # and empty rows in the middle
    text = "\n".join(["path,label", *rows]).replace(",", delimiter)
    (tmp_path / "i.csv").write_bytes((before + text).encode(encoding))
    given = f"csv:{tmp_path / 'i.csv'}"
    parts = [dataset.load(given, split=split) for split in ("train", "eval")]
    assert sum(map(len, parts)) == 8
    assert {name for part in parts for name in part.class_names} == {"üa", "üb", "üc", "üd"}


def test_lists_of_public_data_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    names = [f"00{c}.Bird/{k}.jpg" for c in range(1, 5) for k in range(2)]
    for number, name in enumerate(names):
        save_image(tmp_path / "CUB_200_2011" / "images" / name, number, 0)
    text = "\n".join(f"{number} {name}" for number, name in enumerate(names, 1))
    (tmp_path / "CUB_200_2011" / "images.txt").write_text(text, encoding="utf-8-sig")
    assert len(dataset.load("cub", tmp_path)) == 4


# --- names ----------------------------------------------------------------------------------------


def test_windows_separators_in_some_rows(tmp_path: Path) -> None:
    photos(tmp_path / "bilder", "abcd")
    save_image(tmp_path / "odd\\name.jpg", 0, 9)
    rows = [f"bilder{'/' if k else chr(92)}{c}/{k}.jpg,{c}" for c in "abcd" for k in (0, 1)]
    given = table(tmp_path, "path,label", *rows, "odd\\name.jpg,a")
    parts = [dataset.load(given, split=split) for split in ("train", "eval")]
    assert not [path for part in parts for path in part.missing()]
    assert sum(map(len, parts)) == 9
    with pytest.raises(InputError, match="leads out of the file's folder"):
        dataset.load(table(tmp_path, "path,label", "..\\x.jpg,a"))


def test_a_path_from_the_home_folder_is_meant_as_for_an_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    photos(tmp_path / "home", "abcd")
    rows = [f"~/{c}/{k}.jpg,{c}" for c in "abcd" for k in (0, 1)]
    given = table(tmp_path, "path,label", *rows)
    parts = [dataset.load(given, split=split) for split in ("train", "eval")]
    assert sum(map(len, parts)) == 8 and not [path for part in parts for path in part.missing()]


@pytest.mark.parametrize(("listed", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC")])
def test_accents_put_together_otherwise(listed: str, on_disk: str, tmp_path: Path) -> None:
    def spelled(text: str, form: str) -> str:
        return unicodedata.normalize(form, text)

    for c in range(4):
        for k in range(2):
            save_image(tmp_path / spelled(f"Müll/é{c}/ö{k}.jpg", on_disk), c, k)
    forms = (listed, on_disk)  # of the labels, which are the same class in either
    rows = [
        f"{spelled(f'Müll/é{c}/ö{k}.jpg', listed)},{spelled(f'é{c}', forms[k])}"
        for c in range(4)
        for k in range(2)
    ]
    given = table(tmp_path, "path,label", *rows)
    parts = [dataset.load(given, split=split) for split in ("train", "eval")]
    assert [part.num_classes for part in parts] == [2, 2]
    for part in parts:
        for index, label in enumerate(part.labels):
            assert part.class_names[label] == f"é{class_of(part.read(index))}"


def test_class_folders_that_look_alike_are_one_class(tmp_path: Path) -> None:
    for form in ("NFC", "NFD"):
        for k in range(2):
            save_image(
                tmp_path / "train" / unicodedata.normalize(form, "é") / f"{form}{k}.jpg", 1, k
            )
    photos(tmp_path / "train", "a")
    photos(tmp_path / "eval", "cd", first=5)
    images = dataset.load(f"folder:{tmp_path}")
    assert images.class_names == ("a", "é")
    assert np.bincount(images.labels).tolist() == [2, 4]


def bad_names(tmp_path: Path) -> str:
    """A folder with a class and a file whose names are not UTF-8, and one that obeys nothing."""
    photos(tmp_path, "abc")
    for name in ("b\udcffd", "esc\x1b]0;title\x07", "東京" * 12):
        for k in range(2):
            save_image(tmp_path / name / f"\udce4{k}.jpg", 7, k)
        (tmp_path / name / "empty.jpg").touch()
    return f"folder:{tmp_path}"


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_names_that_are_not_text_are_shown_and_break_nothing(encoding: str, tmp_path: Path) -> None:
    given = bad_names(tmp_path)
    for words in (["check", given], ["check", given, "--json"], ["check", "--help"], ["--help"]):
        done = run_python("-m", "dataset", *words, PYTHONIOENCODING=encoding)
        assert done.returncode == (0 if "--help" in words else 1), done.stderr
        assert done.stderr == ""
        shown = done.stdout
        assert "\x1b" not in shown and "\x07" not in shown
        if "--json" in words:
            (report,) = json.loads(shown)["datasets"]
            (damaged,) = (f for f in report["findings"] if "unreadable" in f["kind"])
            assert any("b\udcffd/empty.jpg" in example for example in damaged["examples"])


def without_commands(text: str) -> list[str]:
    """The lines that are not to be pasted."""
    return [line for line in text.splitlines() if not line.startswith("  python ")]


def test_a_table_of_findings_is_80_columns_wide(tmp_path: Path) -> None:
    given = bad_names(tmp_path / ("long folder " * 8) / ("y" * 120))
    text = as_text(check(given))
    assert "\\xff" in text and "\\x1b]0;title" in text and "東京" in text
    assert max(columns(line) for line in without_commands(text)) <= 80
    for name in (*dataset.NAMES, "folder:nowhere", "csv:nowhere"):
        text = as_text(check(name, tmp_path))
        assert max(columns(line) for line in without_commands(text)) <= 80, name


@pytest.mark.parametrize("order", ["json last", "json first", "no file"])
def test_json_goes_to_a_file(order: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    given = bad_names(tmp_path / "photos")
    file = tmp_path / "out" / "report.json"
    words = {
        "json last": [given, "--json", str(file)],
        "json first": ["--json", str(file), given],
        "no file": ["--json", given],
    }[order]
    assert main(["check", *words]) == 1
    printed = capsys.readouterr().out
    if order == "no file":
        content = json.loads(printed)
    else:
        assert "FINDING" in printed
        content = json.loads(file.read_text())
    (damaged,) = (f for f in content["datasets"][0]["findings"] if "unreadable" in f["kind"])
    assert damaged["count"] == len(damaged["examples"]) == 3  # all of them, not a few


def test_json_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = tmp_path / "photos.csv"
    table.write_text("path,label\na.png,a\n")
    monkeypatch.setattr("dataset.showing.check", None)
    for file, why in ((tmp_path, "is a folder"), (table, "would overwrite")):
        assert why in refusal(capsys, main, ["check", f"csv:{table}", "--json", str(file)])
    assert table.read_text() == "path,label\na.png,a\n"


# --- one image in several rows --------------------------------------------------------------------


def test_check_finds_one_path_in_several_rows(tmp_path: Path) -> None:
    photos(tmp_path, "abcdefgh")
    rows = [f"{c}/{k}.jpg,{c},{'train' if c < 'e' else 'eval'}" for c in "abcdefgh" for k in (0, 1)]
    clean = table(tmp_path, "path,label,split", *rows)
    assert check(clean).status == "clean"
    rows += ["a/0.jpg,e,eval"]  # in train and in eval
    rows += ["b/0.jpg,a,train", "b/0.jpg,c,train"]  # under three labels
    rows += ["f/0.jpg,f,eval"]  # twice
    rows += ["d/1.jpg,c,train", "d/1.jpg,h,eval"]  # everything at once
    report = check(table(tmp_path, "path,label,split", *rows))
    assert kinds(report) == {
        "exact duplicate across train and test": 2,
        "exact duplicate in different classes": 3,
        "image listed more than once": 1,
    }
    said = {finding.kind: finding.examples for finding in report.findings}
    assert said["exact duplicate across train and test"] == [
        "a/0.jpg in train and eval",
        "d/1.jpg in train and eval",
    ]
    assert said["exact duplicate in different classes"][:2] == [
        "b/0.jpg as b and a",
        "b/0.jpg as b and c",
    ]
    assert said["image listed more than once"] == ["f/0.jpg"]


def test_check_names_every_copy_so_that_it_can_be_found(tmp_path: Path) -> None:
    photos(tmp_path / "train", "ab")
    photos(tmp_path / "eval", "cd")
    content = (tmp_path / "train" / "a" / "0.jpg").read_bytes()
    copies = ["train/a/again.jpg", "train/b/9.jpg", "eval/a/0.jpg", "eval/a/1.jpg"]
    for name in copies:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    (tmp_path / "eval" / "c" / "0.jpg").write_bytes(b"")
    said = {finding.kind: finding.examples for finding in check(f"folder:{tmp_path}").findings}
    assert said["exact duplicate across train and test"] == [
        "train/a/0.jpg = eval/a/0.jpg",
        "train/a/0.jpg = eval/a/1.jpg",
    ]
    assert said["exact duplicate in different classes"] == ["train/a/0.jpg = train/b/9.jpg"]
    assert said["exact duplicate within a class"] == [
        "train/a/0.jpg = train/a/again.jpg",
        "eval/a/0.jpg = eval/a/1.jpg",
    ]
    assert said["unreadable or truncated file"] == ["eval/c/0.jpg: the file is empty"]


def test_check_finds_a_query_in_the_gallery(tmp_path: Path) -> None:
    photos(tmp_path, "abcd")
    rows = [f"{c}/{k}.jpg,{c},train" for c in "ab" for k in (0, 1)]
    rows += [
        f"{c}/{k}.jpg,{c},{split}" for c in "cd" for k, split in ((0, "query"), (1, "gallery"))
    ]
    rows += ["c/0.jpg,c,gallery"]
    report = check(table(tmp_path, "path,label,split", *rows))
    assert kinds(report) == {"image that is a query and in the gallery": 1}


def test_boxes_of_one_photograph_are_images_of_their_own(tmp_path: Path) -> None:
    photos(tmp_path, "abcd")
    rows = [
        f"a/0.jpg,{c},{s},{x},0,{x + 5},9"
        for x, (c, s) in enumerate(zip("abcd", "ttee", strict=True))
    ]
    rows += [
        f"b/0.jpg,{c},{s},{x},0,{x + 5},9"
        for x, (c, s) in enumerate(zip("abcd", "ttee", strict=True))
    ]
    rows = [row.replace(",t,", ",train,").replace(",e,", ",eval,") for row in rows]
    assert check(table(tmp_path, BOXES, *rows)).status == "clean"


# --- before a run ---------------------------------------------------------------------------------


def test_all_files_of_a_run_are_looked_for(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    photos(tmp_path / "p", "abcd", images=5)
    rows = [f"p/{c}/{k}.jpg,{c},{'train' if c < 'c' else 'test'}" for c in "abcd" for k in range(5)]
    given = table(tmp_path, "path,label,split", *rows)
    train, held_out = (dataset.load(given, split=split) for split in ("train", "eval"))
    dataset.require_files(train, [held_out])
    dataset.require_files(None, [held_out])
    for k in range(4):
        (tmp_path / "p" / "c" / f"{k}.jpg").unlink()
    with pytest.raises(InputError) as missing:
        dataset.require_files(train, [held_out], max_bad_images=0.3)
    sentence = str(missing.value)
    assert "4 of the 10 evaluation images of csv:" in sentence and "c/0.jpg" in sentence
    assert "others" in sentence and f"check {given} --json" in sentence and "\n" not in sentence
    dataset.require_files(train, [held_out], max_bad_images=0.4)
    assert dataset.require_readable(train, [held_out], 0.4) == {"train": 0, "eval": 4}
    assert caplog.text.count("No such file or directory); it is left out") == 4
    (tmp_path / "p" / "a" / "0.jpg").unlink()
    with pytest.raises(InputError, match="1 of the 10 training images"):
        dataset.require_files(train, [])
    assert dataset.require_readable(train, [], max_bad_images=0.1) == {"train": 1, "eval": 0}
    assert "a/0.jpg cannot be read (No such file or directory); other images" in caplog.text
    dataset.require_files(dataset.load("emoji"), [dataset.load("emoji", split="eval")])


def test_fingerprints_cover_both_sides_and_the_content(tmp_path: Path) -> None:
    def fingerprints() -> dict[str, str]:
        return dataset.fingerprints(*(dataset.load(given, split=s) for s in ("train", "eval")))

    folder = tmp_path / "here"
    photos(folder / "train", "ab")
    photos(folder / "eval", "cd", first=5)
    given = f"folder:{folder}"
    before = fingerprints()
    assert before.keys() == {"train", "eval"} and before == fingerprints()

    changed = folder / "eval" / "c" / "1.jpg"
    content = bytearray(changed.read_bytes())
    content[len(content) // 2] ^= 1  # the same size
    changed.write_bytes(content)
    after = fingerprints()
    assert after["train"] == before["train"] and after["eval"] != before["eval"]

    changed.unlink()
    assert fingerprints()["eval"] not in (before["eval"], after["eval"])
    content[len(content) // 2] ^= 1
    changed.write_bytes(content)
    os.utime(changed, (1, 1))
    folder.rename(tmp_path / "there")
    given = f"folder:{tmp_path / 'there'}"
    assert fingerprints() == before


def test_fingerprints_of_absolute_paths_are_those_of_the_place_they_share(tmp_path: Path) -> None:
    found = []
    for place in ("here", "there"):
        photos(tmp_path / place, "abcd")
        rows = [f"{tmp_path / place / c}/{k}.jpg,{c}" for c in "abcd" for k in (0, 1)]
        given = table(tmp_path / place, "path,label", *rows)
        found.append(dataset.fingerprints(dataset.load(given), dataset.load(given, split="eval")))
    assert found[0] == found[1]


def test_large_files_are_hashed_at_both_ends(tmp_path: Path) -> None:
    photos(tmp_path / "train", "ab")
    photos(tmp_path / "eval", "cd", first=5)
    large = tmp_path / "train" / "a" / "0.jpg"
    found = []
    for places in ((), (0,), (999_999,), (500_000,)):
        content = bytearray(1_000_000)
        for place in places:
            content[place] = 1
        large.write_bytes(content)
        found.append(dataset.load(f"folder:{tmp_path}").content_fingerprint())
    assert len(set(found)) == 3 and found[3] == found[0]  # the middle is not looked at


def test_a_set_larger_than_the_sample_is_looked_into_here_and_there(tmp_path: Path) -> None:
    photos(tmp_path / "train", "ab", images=5)
    photos(tmp_path / "eval", "cd")
    images = dataset.load(f"folder:{tmp_path}")
    before = images.content_fingerprint(sample=2)
    for index in (4, 0):
        file = Path(images.paths[index])
        file.write_bytes(bytes(reversed(file.read_bytes())))
        assert (images.content_fingerprint(sample=2) == before) == (index == 4)


def test_a_choice_put_to_other_data_leaves_out_what_those_say_themselves(tmp_path: Path) -> None:
    drawn = photos(tmp_path / "drawn", "abcdefgh")
    photos(tmp_path / "given" / "train", "ab")
    photos(tmp_path / "given" / "val", "cd", first=5)
    choice = dataset.Choice(f"folder:{drawn}", eval_classes=0.25, split_seed=3)
    other = choice.of_other_data(f"folder:{tmp_path / 'given'}", "elsewhere")
    assert (other.eval_classes, other.split_seed, other.root) == (None, None, "elsewhere")
    assert other.load("eval").num_classes == 2
    held_out = choice.load("eval").class_names
    drawn.rename(tmp_path / "moved")
    moved = choice.of_other_data(f"folder:{tmp_path / 'moved'}", "data")
    assert moved.load("eval").class_names == held_out and len(held_out) == 2
    assert choice.of_other_data("cub", "data").eval_classes is None
    with pytest.raises(InputError, match="no data set 'cup'"):
        choice.of_other_data("cup", "data")


# --- where public data sets are -------------------------------------------------------------------


def test_copies_are_found_in_data_and_in_datasets(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from official_layouts import write

    write("sop", "official", tmp_path / "x", 6, 3)
    (tmp_path / "datasets").mkdir()
    source = tmp_path / "x" / "Stanford_Online_Products"
    source.rename(tmp_path / "datasets" / "Standford_Online_Products")
    monkeypatch.chdir(tmp_path)
    for root in ("data", "datasets", tmp_path / "data", "./data"):
        assert len(dataset.load("sop", root)) == 9
    with pytest.raises(InputError, match="was not found"):
        dataset.load("sop", tmp_path / "elsewhere")
    (tmp_path / "data").mkdir()
    with pytest.raises(InputError, match="looked in data and datasets and for"):
        dataset.load("cub")
    (tmp_path / "datasets").rename(tmp_path / "data" / "inside")
    assert len(dataset.load("sop", "data/inside")) == 9
