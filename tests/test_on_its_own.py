"""A run, or one checkpoint of it, is all that a network needs: the images may be gone."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, run_python
from PIL import Image

import dataset
import evaluate
import options
import report
import train
from net import load_run
from net.__main__ import main as export
from utils import InputError

pytestmark = pytest.mark.usefixtures("maps_here")

FLAGS = [*tiny.NETWORK, "--epochs", "1", "--warm", "0", "--keep", "1", "--LOG_DIR", "logs"]


def trained(name: str, *flags: str) -> None:
    """Trains in the folder that this process works in."""
    train.main(options.parse_train([*flags, *FLAGS, "--name", name]))


def evaluated(*flags: object) -> None:
    evaluate.main(options.parse_evaluate(list(map(str, flags))))


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
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        trained("folder", "--dataset", "folder:photos")
        trained("table", "--dataset", "csv:photos.csv", "--exif", "ignore")
        trained("clusters", "--dataset", "folder:photos", "--nb-clusters", "2", "--IPC", "2")
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
    export(["export", str(alone), "--torchscript", str(tmp_path / "x.pt")])
    assert (tmp_path / "x.pt").is_file()


def test_a_loaded_run_says_what_it_is(studio: Path) -> None:
    """As the last line of a notebook's cell shows it."""
    run = studio / "logs/folder"
    shown = repr(load_run(run, device="cpu"))
    assert shown == f"Embedder({tiny.best_checkpoint(run)}: resnet10, 8 numbers each, on cpu)"
    assert "resnet10, 4 numbers" in repr(load_run(run, device="cpu", dims=4))


def test_the_commands_need_one_file_and_no_folder(studio: Path, tmp_path: Path) -> None:
    shutil.copy(tiny.best_checkpoint(studio / "logs/folder"), tmp_path / "shop.pth")
    result = run_python("-m", "net", "export", "shop.pth", "--torchscript", "x.pt", cwd=tmp_path)
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


def test_other_images_are_evaluated_where_the_old_ones_are_gone(
    studio: Path, capsys: pytest.CaptureFixture
) -> None:
    moved = ("--dataset", f"folder:{studio / 'moved/photos'}", "--out", studio)
    query = picture(studio / "mine.png")
    evaluated("--resume", studio / "logs/folder", *moved, "--query", query)
    said = capsys.readouterr().out
    assert "searched: the 24 evaluated images of 8 classes" in said
    assert "search.py build" in said


def test_what_needs_the_images_says_where_it_looked(
    studio: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(studio)
    for command in (
        lambda: evaluated("--resume", "logs/folder"),
        lambda: tiny.resume(Path("logs/folder"), "--epochs 2"),
    ):
        with pytest.raises(InputError) as stop:
            command()
        for words in ("not there any more", str(studio / "photos"), "--dataset folder:PATH"):
            assert words in str(stop.value)


def test_a_page_made_with_pictures_is_not_replaced_by_one_without(
    studio: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, bare = studio / "logs/table", studio / "bare.html"
    (run / "report.html").write_text("made with pictures")
    with pytest.raises(InputError, match="--out FILE"):
        report.main(options.parse_report([str(run)]))
    assert (run / "report.html").read_text() == "made with pictures"
    report.main(options.parse_report([str(run), "--out", str(bare)]))
    assert "no pictures" in caplog.text and bare.stat().st_size > 10_000


def test_a_relative_path_leads_to_the_images_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    tiny.write_images(home / "photos")
    elsewhere.mkdir()
    run = home / "logs/here"
    monkeypatch.chdir(home)
    trained("here", "--dataset", "folder:photos")
    monkeypatch.chdir(elsewhere)
    capsys.readouterr()
    evaluated("--resume", run)
    assert "folder:photos" in capsys.readouterr().out  # by the name that it has in the run
    tiny.resume(run, "--epochs 2")
    monkeypatch.chdir(home)
    tiny.resume(run, "--epochs 3")
    assert [row["epoch"] for row in tiny.metrics_rows(run)] == ["1", "2", "3"]


def test_drawings_are_seen_whole_without_the_archive(tmp_path: Path) -> None:
    train = dataset.load("emoji", ROOT / "data", "train").subset(range(4))
    assert dataset.TrainedOn.of(train).square == 64
