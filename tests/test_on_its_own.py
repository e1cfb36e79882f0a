"""A run, or one checkpoint of it, is all that a network needs: the images may be gone."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, run_cli, run_python
from PIL import Image

import dataset
from net import load_run
from utils import InputError

FLAGS = [*tiny.NETWORK, "--epochs", "1", "--warm", "0", "--keep", "1", "--LOG_DIR", "logs"]


def picture(file: Path) -> Path:
    """A picture that no run was trained on."""
    pixels = np.random.default_rng(1).integers(0, 255, (36, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)
    return file


def a_table(folder: Path, photos: Path) -> None:
    """photos.csv, whose paths lead into the folder `photos`."""
    with (folder / "photos.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "label", "split"])
        for path in sorted(photos.rglob("*.png")):
            split, label, _ = path.relative_to(photos).parts
            writer.writerow([path.relative_to(folder), label, split])


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs on images by a relative path, which are gone; `moved` holds them now."""
    folder = tmp_path_factory.mktemp("studio")
    photos = tiny.write_images(folder / "photos")
    a_table(folder, photos)
    for name, flags in {
        "folder": ["--dataset", "folder:photos"],
        "table": ["--dataset", "csv:photos.csv", "--exif", "ignore"],
        "clusters": ["--dataset", "folder:photos", "--nb-clusters", "2", "--IPC", "2"],
    }.items():
        result = run_cli("train.py", *flags, *FLAGS, "--name", name, cwd=folder)
        assert result.returncode == 0, result.stderr
    (folder / "moved").mkdir()
    for each in ("photos", "photos.csv"):
        shutil.move(folder / each, folder / "moved" / each)
    return folder


@pytest.mark.parametrize("name", ["folder", "table", "clusters"])
def test_a_run_is_loaded_and_exported_without_its_images(
    name: str, studio: Path, tmp_path: Path
) -> None:
    run = studio / "logs" / name
    file = picture(tmp_path / "new.png")
    expected = load_run(run)(file)
    assert expected.shape == (1, 8) and np.isfinite(expected).all()
    for checkpoint in (tiny.best_checkpoint(run), run / "last.pth", *run.glob("step_*.pth")):
        alone = tmp_path / f"alone {checkpoint.stem}" / "any name.pth"
        alone.parent.mkdir()
        shutil.copy(checkpoint, alone)
        np.testing.assert_array_equal(load_run(alone)(file), expected)
    result = run_python("-m", "net", "export", alone, "--torchscript", "x.pt", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "x.pt").is_file()


def test_a_checkpoint_says_what_it_was_trained_on(studio: Path) -> None:
    trained_on = load_run(studio / "logs/folder").model.trained_on
    assert trained_on == dataset.TrainedOn(
        "folder:photos", 48, tuple(f"train{label}" for label in range(8))
    )
    assert load_run(studio / "logs/table").model.upright is False


def test_an_older_checkpoint_does_not_say_it_and_is_loaded(studio: Path, tmp_path: Path) -> None:
    content = torch.load(tiny.best_checkpoint(studio / "logs/folder"), weights_only=True)
    del content["data"]
    torch.save(content, tmp_path / "old.pth")
    old = load_run(tmp_path / "old.pth")
    assert old.model.trained_on is None
    file = picture(tmp_path / "new.png")
    np.testing.assert_array_equal(old(file), load_run(studio / "logs/folder")(file))


@pytest.mark.parametrize("entry", [{"name": "x"}, {"name": 1, "images": 2, "class_names": [3]}])
def test_a_damaged_entry_is_met_in_a_sentence(entry: dict, studio: Path, tmp_path: Path) -> None:
    content = torch.load(tiny.best_checkpoint(studio / "logs/folder"), weights_only=True)
    torch.save({**content, "data": entry}, tmp_path / "damaged.pth")
    with pytest.raises(InputError, match="is damaged"):
        load_run(tmp_path / "damaged.pth")


def test_other_images_are_evaluated_where_the_old_ones_are_gone(studio: Path) -> None:
    run, query = studio / "logs/folder", picture(studio / "query.png")
    moved = ["--dataset", f"folder:{studio / 'moved/photos'}", "--query", query, "--out", studio]
    result = run_cli("evaluate.py", "--resume", run, *moved, cwd=studio)
    assert result.returncode == 0, result.stderr
    assert "searched: the 24 evaluated images of 8 classes" in result.stdout
    assert "search.py build" in result.stdout


@pytest.mark.parametrize(
    "command",
    [("evaluate.py", "--resume", "logs/folder"), ("train.py", "--resume-run", "logs/folder")],
)
def test_what_needs_the_images_says_where_it_looked(command: tuple[str, ...], studio: Path) -> None:
    result = run_cli(*command, cwd=studio)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    for words in ("not there any more", str(studio / "photos"), "--dataset folder:PATH"):
        assert words in result.stderr


def test_a_page_made_with_pictures_is_not_replaced_by_one_without(studio: Path) -> None:
    run = studio / "logs/table"
    (run / "report.html").write_text("made with pictures")
    result = run_cli("report.py", run, cwd=studio)
    assert result.returncode == 2 and "--out FILE" in result.stderr
    assert (run / "report.html").read_text() == "made with pictures"
    result = run_cli("report.py", run, "--out", "bare.html", cwd=studio)
    assert result.returncode == 0, result.stderr
    assert "no pictures" in result.stderr and (studio / "bare.html").stat().st_size > 10_000


def test_a_relative_path_leads_to_the_images_from_any_folder(tmp_path: Path) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    tiny.write_images(home / "photos")
    elsewhere.mkdir()
    run = home / "logs/here"
    begin = ["--dataset", "folder:photos", *FLAGS, "--name", "here"]
    assert run_cli("train.py", *begin, cwd=home).returncode == 0
    judged = run_cli("evaluate.py", "--resume", run, cwd=elsewhere)
    assert judged.returncode == 0, judged.stderr
    assert "folder:photos" in judged.stdout  # by the name that it has in the run
    on = ["--resume-run", run, "--epochs", "2"]
    continued = run_cli("train.py", *on, cwd=elsewhere)
    assert continued.returncode == 0, continued.stderr
    assert [row["epoch"] for row in tiny.metrics_rows(run)] == ["1", "2"]
    again = run_cli("train.py", "--resume-run", run, "--epochs", "3", cwd=home)
    assert again.returncode == 0, again.stderr


def test_drawings_are_seen_whole_without_the_archive(tmp_path: Path) -> None:
    train = dataset.load("emoji", ROOT / "data", "train").subset(range(4))
    assert dataset.TrainedOn.of(train).square == 64
