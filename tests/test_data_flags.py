"""The data flags of train.py and evaluate.py, on the user's own images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import refusal, run_cli
from small_images import write_drawings

import evaluate
import options
from dataset.reading import Reading
from evaluation.networks import open_checkpoint
from utils import InputError


def command(data: str, logs: Path, *more: str) -> list[str]:
    return ["--dataset", data, *tiny.NETWORK, "--LOG_DIR", str(logs), "--name", "run", *more]


def test_a_folder_of_ones_own_photos_trains_and_evaluates(images: Path, tmp_path: Path) -> None:
    photos = f"folder:{images / 'train'}"
    held_out = ["--eval-classes", "0.25", "--split-seed", "3"]
    done = run_cli("train.py", *command(photos, tmp_path, "--epochs", "1", *held_out), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "36 images, 6 classes" in done.stdout and "12 images, 2 classes" in done.stdout
    best = tiny.best_checkpoint(tmp_path / "run")
    again = run_cli(
        *("evaluate.py", "--resume", best, "--json", "n.json", "--workers", "0"), cwd=tmp_path
    )
    assert again.returncode == 0, again.stderr
    (numbers,) = json.loads((tmp_path / "n.json").read_text())["results"]
    assert numbers["images"] == 12 and numbers["classes"] == 2
    choice = open_checkpoint(best).data
    assert (choice.eval_classes, choice.split_seed) == (0.25, 3)
    trained, unseen = (set(choice.load(split).class_names) for split in ("train", "eval"))
    assert not trained & unseen
    assert trained | unseen == {folder.name for folder in (images / "train").iterdir()}


def test_a_csv_of_ones_own_photos_trains(images: Path, tmp_path: Path) -> None:
    rows = ["path,label,split"]
    for path in sorted(images.rglob("*.png")):
        rows.append(f"{path},{path.parent.name},{path.parent.parent.name}")
    (tmp_path / "my photos.csv").write_text("\n".join(rows))
    data = f"csv:{tmp_path / 'my photos.csv'}"
    done = run_cli("train.py", *command(data, tmp_path, "--epochs", "1"), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "48 images, 8 classes" in done.stdout and "24 images, 8 classes" in done.stdout


@pytest.mark.parametrize("device", [[], ["--data-device", "cpu"]])
def test_the_cache_gives_evaluation_the_numbers_of_the_files(
    images: Path, tmp_path: Path, device: list[str]
) -> None:
    flags = f"--epochs 1 --decode cache --cache-dir {tmp_path / 'cache'} --cache-size 37"
    logs = tmp_path / "logs"
    training = tiny.prepare(images, f"{flags} {' '.join(device)}")
    cached = training.evaluate(training.data.test)
    training.viewing = replace(training.viewing, reading=Reading("exact"))
    exact = training.evaluate(training.data.test)
    # 32 pixels are cut from images whose short side is 32·256/224 ≈ 37.
    assert torch.equal(cached[0].embeddings, exact[0].embeddings)
    tiny.run(images, logs, "run", flags)
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the splits share it


def test_an_evaluation_of_files_says_where_its_run_saw_pixels_resized_twice(
    images: Path, tmp_path: Path
) -> None:
    cache = ["--decode", "cache", "--cache-dir", str(tmp_path)]
    for size, otherwise in ((64, True), (37, False)):
        run = tiny.run(
            images, tmp_path, f"from-{size}", f"--epochs 1 {' '.join(cache)} --cache-size {size}"
        )
        for more in ([], [*cache, "--cache-size", str(size)]):
            done = run_cli("evaluate.py", "--resume", run, "--workers", "0", *more, cwd=tmp_path)
            assert done.returncode == 0, done.stderr
            told = f"which were brought to {size} pixels first" in done.stderr
            assert told is (otherwise and not more)


def test_training_from_the_cache_is_the_same_with_any_number_of_workers(
    images: Path, tmp_path: Path
) -> None:
    flags = f"--decode cache --cache-dir {tmp_path} --cache-size 37"
    batches = []
    for workers in (0, 2):
        loader = tiny.prepare(images, f"{flags} --workers {workers}").loader
        loader.set_epoch(1)
        batches.append(list(loader))
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one.images, other.images) and torch.equal(one.index, other.index)


def cut_short(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:60])


def test_bad_images_are_replaced_up_to_the_allowed_share(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    images = tiny.write_images(tmp_path / "data")
    cut_short(images / "train" / "train3" / "2.png")
    folder = tiny.run(images, tmp_path, "run", "--epochs 2")  # of few images one may be bad
    assert len(tiny.metrics_rows(folder)) == 2
    named = [record.message for record in caplog.records if "2.png" in record.message]
    assert len(named) == 1 and "other images of its class take its place" in named[0]
    with pytest.raises(InputError, match=r"1 of the 48 .* cannot be read.*2\.png"):
        tiny.run(images, tmp_path, "none", "--epochs 2 --max-bad-images 0")
    cut_short(images / "train" / "train1" / "2.png")
    with pytest.raises(InputError, match=r"2 of the 48 .*--max-bad-images 0\.01 allows 1:"):
        tiny.run(images, tmp_path, "stopped", "--epochs 2")


def test_an_unreadable_image_of_the_training_set_is_nothing_to_an_evaluation(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    images = tiny.write_images(tmp_path / "data")
    cut_short(sorted(images.glob("train/*/*.png"))[3])
    run = tiny.run(images, tmp_path, "run", "--epochs 1 --max-bad-images 0.05")
    evaluate.run(options.parse_evaluate(["--resume", str(run), "--max-bad-images", "0"]))
    assert "left out of the evaluation" not in capsys.readouterr().out
    (numbers,) = json.loads((run / "results.json").read_text())["results"].values()
    assert "queries_left_out" not in numbers


def test_an_unreadable_image_stops_neither_a_run_nor_its_page(tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path / "data")
    bad = {side: sorted(images.glob(f"{side}/*/*.png"))[3] for side in ("train", "eval")}
    for file in bad.values():
        cut_short(file)
    whole = len(sorted(images.glob("eval/*/*.png")))
    flags = ("--epochs", "2", "--loss", "AMLoss", "--max-bad-images", "0.05")
    words = command(f"folder:{images}", tmp_path, *flags)
    words.remove("--no-report")
    done = run_cli("train.py", *words, cwd=tmp_path)
    said = done.stdout + done.stderr
    named = [said.count(f"{bad[side]} cannot be read") for side in ("train", "eval")]
    assert done.returncode == 0 and named == [2, 1], said
    results = json.loads((tmp_path / "run" / "results.json").read_text())["results"]
    (numbers,) = results.values()
    assert numbers["queries"] == whole - 1
    assert numbers["queries_left_out"] == 1
    beside = "1 image that cannot be read was left out of the evaluation"
    assert beside in done.stdout
    assert beside in (tmp_path / "run" / "report.html").read_text()
    export = tmp_path / "embeddings.npz"
    asked = ("--export", export, "--neighbours", tmp_path / "n.png", "--failures", "3")
    again = run_cli("evaluate.py", "--resume", tmp_path / "run", *asked, cwd=tmp_path)
    assert again.returncode == 0 and beside in again.stdout, again.stderr
    assert f"{whole - 1} images" in again.stdout
    assert len(np.load(export)["embeddings"]) == whole - 1
    page = run_cli("report.py", tmp_path / "run", "--embeddings", export, cwd=tmp_path)
    assert page.returncode == 0, page.stderr
    strict = run_cli(
        "evaluate.py", "--resume", tmp_path / "run", "--max-bad-images", "0", cwd=tmp_path
    )
    assert strict.returncode == 2


@pytest.mark.parametrize("damaged", [0, 3])
def test_two_checkpoints_are_compared_on_the_images_that_can_be_read(
    tmp_path: Path, damaged: int
) -> None:
    images = tiny.write_images(tmp_path / "data")
    for seed in (1, 2):
        tiny.run(images, tmp_path, f"seed{seed}", f"--epochs 1 --seed {seed}")
    for file in sorted(images.glob("eval/*/*.png"))[:damaged]:
        cut_short(file)
    runs = [tmp_path / "seed1", tmp_path / "seed2"]
    asked = ("--bootstrap", "100", "--max-bad-images", "0.2", "--json", tmp_path / "n.json")
    done = run_cli("evaluate.py", "--resume", *runs, *asked, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "n.json").read_text())["results"]
    assert {row["queries"] for row in rows} == {24 - damaged}
    assert ("left out of the evaluation" in done.stdout) == bool(damaged)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dataset emoji --decode cache", ["--decode", "photographs"]),
        ("--dataset cub --cache-size 200", ["--cache-size", "--decode cache"]),
        ("--dataset cub --eval-classes 0.3", ["--eval-classes", "your own images"]),
        ("--data-root elsewhere", ["--data-root has no effect", "nor to emoji"]),
        ("--dataset folder:x --data-root .", ["--data-root has no effect", "your own images"]),
        ("--dataset folder:x --split-seed -1", ["--split-seed", "below"]),
        ("--dataset folder:x --eval-classes 1.5", ["--eval-classes", "out of range"]),
    ],
)
def test_data_flags_without_effect_are_refused(
    flags: str, words: list[str], capsys: pytest.CaptureFixture
) -> None:
    said = refusal(capsys, options.parse_train, flags.split())
    assert all(word in said for word in words)


def test_the_data_device_needs_a_gpu_or_says_so(images: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this is what happens without a GPU")
    with pytest.raises(InputError, match="--data-device cuda needs a GPU"):
        tiny.prepare(images, "--decode cache --data-device cuda")


def test_every_log_line_says_how_fast_and_how_much_is_waiting(images: Path, tmp_path: Path) -> None:
    done = run_cli(
        "train.py", *command(f"folder:{images}", tmp_path, "--epochs", "2"), cwd=tmp_path
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 2 and all("img/s" in line and "waiting " in line for line in lines)
    waits = [float(row["data_wait"]) for row in tiny.metrics_rows(tmp_path / "run")]
    assert all(np.isfinite(wait) and 0 <= wait <= 1 for wait in waits)


def test_a_checkpoint_is_evaluated_on_other_images_than_its_own(
    images: Path, tmp_path: Path
) -> None:
    photos = f"folder:{images / 'train'}"
    split = f"--dataset {photos} --eval-classes 0.25 --split-seed 3"
    run = tiny.run(images, tmp_path, "run", f"--epochs 1 {split}")
    rows = [f"{p},{p.parent.name}" for p in sorted((images / "eval").rglob("*.png"))]
    table = tmp_path / "other.csv"

    def evaluated(lines: list[str], *more: object) -> str:
        table.write_text("\n".join(lines))
        asked = ("--resume", run, "--dataset", f"csv:{table}", *more)
        done = run_cli("evaluate.py", *asked, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    marked = ["path,label,split", *(f"{row},eval" for row in rows)]
    assert "24 images, 8 classes" in evaluated(marked)  # the data say what is held out
    unmarked = ["path,label", *rows]
    assert "6 images, 2 classes" in evaluated(unmarked)  # the run's share of the classes
    assert "12 images, 4 classes" in evaluated(unmarked, "--eval-classes", "0.5")
    write_drawings(tmp_path / "data")
    asked = ("--resume", run, "--dataset", "emoji", "--data-root", "data", "--metrics", "retrieval")
    emoji = run_cli("evaluate.py", *asked, cwd=tmp_path)
    assert emoji.returncode == 0 and "emoji" in emoji.stdout, emoji.stderr
    refused = run_cli("evaluate.py", *asked, "--eval-classes", "0.5", cwd=tmp_path)
    assert refused.returncode == 2 and "--eval-classes has no effect" in refused.stderr
