"""Cross-validation over class-disjoint folds: how classes are dealt, and the command."""

from __future__ import annotations

import json
import os
import re
import signal
import time

import numpy as np
import pytest
import tiny
from conftest import ROOT, refusal, run_cli, start_python

import options
import train
from training.data import HeldOut, deal, load
from training.folds import folder_of, train_each
from utils import InputError


@pytest.mark.parametrize("folds", [2, 3, 5])
def test_folds_share_no_class_and_have_about_as_many_images(folds):
    sizes = np.random.default_rng(0).integers(1, 40, 60)
    labels = np.repeat(np.arange(60), sizes)
    found = deal(labels, 60, folds)
    filled = np.bincount(found, weights=sizes)
    assert len(filled) == folds and np.ptp(filled) <= 2
    assert np.ptp(np.bincount(found)) <= 10
    assert (deal(np.random.default_rng(1).permutation(labels), 60, folds) == found).all()


def test_few_classes():
    labels = np.repeat(np.arange(5), 4)
    assert sorted(np.bincount(deal(labels, 5, 2))) == [2, 3]
    for folds in (0, 1, 3, 9):
        with pytest.raises(InputError, match="choose 2 to 2 folds"):
            deal(labels, 5, folds)


def test_each_training_class_is_held_out_once(tmp_path):
    tiny.write_images(tmp_path)
    args = tiny.parse(tmp_path)
    import dataset

    choice, held = dataset.Choice.of(args), []
    for fold in range(3):
        data = load(choice, HeldOut(fold=fold, folds=3), 4)
        (task,) = data.selection
        held += task.queries.class_names
        assert not {*task.queries.class_names} & {*data.train.class_names}
        assert task.queries.num_classes + data.train.num_classes == 8
    assert sorted(held) == sorted(choice.load("train").class_names)


def test_cross_validation_in_one_command(tmp_path, folds_here, monkeypatch):
    tiny.write_images(tmp_path / "photos")
    flags = ["--dataset", "folder:photos", *tiny.NETWORK, "--epochs", "2", "--folds", "2"]
    flags += ["--name", "tried", "--metrics", "retrieval"]
    done = run_cli("train.py", *flags, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "logs" / "tried-folds2"
    content = json.loads((folder / "folds.json").read_text())
    rows = [tiny.metrics_rows(folder / f"fold{fold}")[-1] for fold in (0, 1)]
    for fold, row in zip(content["folds"], rows, strict=True):
        assert fold["R@1"] == pytest.approx(float(row["R@1"]))
    assert content["mean"]["MAP@R"] == pytest.approx(np.mean([float(row["MAP@R"]) for row in rows]))
    results = json.loads((folder / "fold1" / "results.json").read_text())["results"]
    assert list(results) == ["validation"], "the test classes are not looked at"
    # Stopped before the second fold was done, and given again.
    (folder / "folds.json").unlink()
    (folder / "fold1" / "results.json").unlink()
    (folder / "fold1" / "checksums.json").unlink()
    begun = (folder / "fold0" / "metrics.csv").stat().st_mtime_ns
    monkeypatch.chdir(tmp_path)
    assert folds_here(flags)[0] == 0
    assert json.loads((folder / "folds.json").read_text()) == content
    assert (folder / "fold0" / "metrics.csv").stat().st_mtime_ns == begun
    assert len(list(folder.iterdir())) == 4


def test_a_fold_finishes_its_step_when_the_folds_are_stopped(tmp_path):
    tiny.write_images(tmp_path / "photos")
    flags = ["--dataset", "folder:photos", *tiny.NETWORK, "--folds", "2", "--name", "tried"]
    flags += ["--epochs", "4000", "--eval-every", "4000"]
    run = start_python(ROOT / "train.py", *flags, cwd=tmp_path)
    begun, end = tmp_path / "logs" / "tried-folds2" / "fold0" / "metrics.csv", time.time() + 250
    while not begun.is_file() and time.time() < end:
        time.sleep(0.05)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does
    said, errors = run.communicate(timeout=250)
    assert run.returncode == 130 and "Traceback" not in errors
    assert "stopped by SIGINT at step" in said and "the same command goes on there" in said


@pytest.fixture
def folds_here(monkeypatch):
    """The folds of a command, trained in this process: its function is given their words."""

    def train_here(words):
        def run(command, environment):
            own = command[command.index("--val-folds") :]
            train.main(options.parse_train([*words, *own]))
            return 0

        monkeypatch.setattr("training.folds.processes.run", run)
        args = options.parse_train(words)
        return train_each(args, words), folder_of(args)

    return train_here


def test_what_would_run_in_each_fold_is_shown_and_nothing_is_written(tmp_path, folds_here, capsys):
    tiny.write_images(tmp_path)
    words = ["--dataset", f"folder:{tmp_path}", *tiny.NETWORK, "--folds", "2", "--dry-run"]
    status, folder = folds_here([*words, "--LOG_DIR", str(tmp_path / "logs")])
    assert status == 0 and not folder.exists()
    assert capsys.readouterr().out.count("\nnetwork ") == 2


def test_a_fold_that_was_killed_before_its_first_checkpoint_is_begun_anew(tmp_path, folds_here):
    tiny.write_images(tmp_path)
    words = ["--dataset", f"folder:{tmp_path}", *tiny.NETWORK, "--epochs", "1", "--folds", "2"]
    words += ["--metrics", "retrieval", "--LOG_DIR", str(tmp_path / "logs")]
    _, folder = folds_here(words)
    for file in (folder / "fold1").iterdir():
        if file.name not in ("args.json", "environment.json"):
            file.unlink()
    content = (folder / "folds.json").read_bytes()
    assert folds_here(words) == (0, folder)
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == ["fold0", "fold1"]
    assert (folder / "folds.json").read_bytes() == content


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--val-fold 0", "--val-fold 0 holds out 0 of the 4 training classes of emoji"),
        ("--val-fold 1", "--val-fold 1 holds out 4 of the 4 training classes of emoji"),
        ("--val-classes 0.4 --ratio-classes 0.004", "holds out 2 of the 3 training classes"),
    ],
)
def test_held_out_classes_leave_two_on_either_side(flags, words):
    flags = f"--dataset emoji --ratio-classes 0.007 --batch-size 4 {flags}"
    with pytest.raises(InputError, match=words):
        train.prepare(options.parse_train([*tiny.NETWORK, *flags.split()]))


def test_folds_of_another_command_are_not_taken_over(tmp_path, monkeypatch):
    tiny.write_images(tmp_path)
    words = ["--dataset", f"folder:{tmp_path}", *tiny.NETWORK, "--epochs", "1", "--folds", "2"]
    words += ["--metrics", "retrieval", "--LOG_DIR", str(tmp_path / "logs"), "--name", "tried"]
    trained = []

    def call(command, environment):
        trained.append(command[-1])
        return 5

    monkeypatch.setattr("training.folds.processes.run", call)
    args = options.parse_train(words)
    first = ["--val-folds", "2", "--folds", "0", "--val-fold", "0", "--no-test", "--resume", "auto"]
    first += ["--LOG_DIR", str(folder_of(args)), "--name", "fold0"]
    train.main(options.parse_train([*words, *first]))
    assert train_each(args, words) == 5 and trained == ["fold1"], "the first one is done"
    for other in (["--lr", "3e-2"], ["--seed", "7"], ["--epochs", "2"]):
        other = [*words, *other]
        with pytest.raises(InputError, match="fold0 is of a command with other flags"):
            train_each(options.parse_train(other), other)
    assert trained == ["fold1"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--folds 3 --val-fold 1", "--val-fold"),
        ("--folds 3 --val-classes 0.2", "--val-classes"),
        ("--val-folds 3", "--val-fold"),
        ("--folds 3 --resume-run logs/run", "leave one of them out"),
    ],
)
def test_what_does_not_go_together(flags, words, capsys):
    assert words in refusal(capsys, options.parse_train, flags.split())


def test_folds_under_torchrun_are_refused_once(tmp_path):
    tiny.write_images(tmp_path / "photos")
    flags = ["--dataset", "folder:photos", *tiny.NETWORK, "--folds", "2"]
    for rank, said in (("0", "start it without torchrun"), ("1", "")):
        done = run_cli("train.py", *flags, cwd=tmp_path, RANK=rank, WORLD_SIZE="2")
        assert done.returncode == 2 and said in done.stderr
    assert not done.stderr and not (tmp_path / "logs").exists()


def test_folds_that_cannot_be_dealt_are_refused_before_training(tmp_path):
    tiny.write_images(tmp_path / "photos", classes=3)
    flags = ["--dataset", "folder:photos", *tiny.NETWORK, "--folds", "2"]
    done = run_cli("train.py", *flags, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("error: 3 training classes are too few")
    assert not list(tmp_path.glob("logs/*/*/args.json"))


@pytest.mark.parametrize(
    ("flags", "picked", "last_words"),
    [
        ("--epochs 2 --eval-every 2", "nothing: evaluated once", "no epoch was picked"),
        ("--epochs 2", "test classes", r"Best epoch [12] by R@1 on the test classes"),
        (
            "--epochs 2 --val-classes 0.3",
            "validation classes",
            r"Epoch [12] had the best R@1 on the validation classes \([.\d]+\). The test classes",
        ),
        (
            "--epochs 2 --val-classes 0.3 --no-test",
            "validation classes",
            r"Epoch [12] had the best R@1 on the validation classes \([.\d]+\). The same classes",
        ),
    ],
)
def test_what_the_epoch_was_picked_on_is_kept_and_said(flags, picked, last_words, tmp_path, capsys):
    tiny.write_images(tmp_path)
    folder = tiny.run(tmp_path, tmp_path / "logs", "run", flags)
    results = json.loads((folder / "results.json").read_text())
    assert results["picked_on"] == picked
    assert re.search(last_words, " ".join(capsys.readouterr().out.split()))
    (row,) = (r for r in tiny.metrics_rows(folder) if r["epoch"] == str(results["best_epoch"]))
    (numbers,) = results["results"].values()
    # On the test classes it is measured at the end, unless they are what it was picked on.
    assert row["R@1"] == f"{numbers['R@1']:.6g}" or "The test classes" in last_words
    assert float(row["evaluation_seconds"]) > 0
