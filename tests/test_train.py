"""train.py and evaluate.py as users run them: the run folder, resuming, faults."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import SMALL, files_in, run_cli


@pytest.fixture(scope="session")
def run_folder(session_workdir: Path) -> Path:
    """One short AMLoss run on the embedded data."""
    command = [*SMALL, "--loss", "AMLoss", "--max-steps", "6", "--name", "short"]
    done = run_cli("train.py", *command, cwd=session_workdir)
    assert done.returncode == 0, done.stderr
    (session_workdir / "printed.txt").write_text(done.stdout)
    return session_workdir / "logs" / "short"


# --- a run and what it leaves ---------------------------------------------------------------------


def test_run_folder_holds_all_there_is_to_know(run_folder):
    assert files_in(run_folder) == [
        "args.json",
        "classes.npz",
        "emoji_resnet18_best.pth",
        "environment.json",
        "last.pth",
        "margins.csv",
        "metrics.csv",
        "results.json",
    ]
    args = json.loads((run_folder / "args.json").read_text())
    assert args["loss"] == "AMLoss" and args["max_steps"] == 6
    known = json.loads((run_folder / "environment.json").read_text())
    assert known["packages"]["torch"] and known["device"] and known["data"]
    assert "--loss AMLoss --max-steps 6" in known["command"]


def test_metrics_row_has_losses_rates_speed_and_metrics(run_folder):
    (row,) = tiny.metrics_rows(run_folder)
    assert int(row["step"]) == 6
    for column in ("loss", "positive", "images_per_second", "R@1", "MAP@R", "NMI", "F1"):
        assert np.isfinite(float(row[column])), column
    assert float(row["lr proxies"]) == pytest.approx(100 * float(row["lr backbone"]))


def test_margins_are_listed_by_class(run_folder):
    with (run_folder / "margins.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 538 and set(rows[0]) == {"class", "margin", "images"}
    assert len({row["class"] for row in rows}) > 500
    assert sum(int(row["images"]) for row in rows) == 4417
    margins = [float(row["margin"]) for row in rows]
    assert margins == sorted(margins) and margins[0] < margins[-1]


def test_output_is_quiet_off_a_terminal_and_says_where_everything_lies(run_folder):
    printed = (run_folder.parent.parent / "printed.txt").read_text()
    assert "\r" not in printed and "it/s" not in printed
    assert sum(line.startswith("epoch ") for line in printed.splitlines()) == 1
    for said in ("4,417 images", "4,409 images", "run folder", "python evaluate.py", "MAP@R"):
        assert said in printed


def test_evaluate_needs_only_the_checkpoint_and_repeats_the_numbers(run_folder):
    checkpoint = run_folder / "emoji_resnet18_best.pth"
    work = run_folder.parent.parent
    command = ["--resume", str(checkpoint), "--json", "n.json", "--export", "e.npz"]
    done = run_cli("evaluate.py", *command, cwd=work)
    assert done.returncode == 0, done.stderr
    (numbers,) = json.loads((work / "n.json").read_text())["results"]
    (row,) = tiny.metrics_rows(run_folder)
    for name in ("R@1", "R@8", "MAP@R", "NMI", "R@1 other drawing sets"):
        assert numbers[name] == pytest.approx(float(row[name]), abs=2e-6)
    exported = np.load(work / "e.npz")
    assert exported["embeddings"].shape == (4409, 16) and exported["embeddings"].dtype == np.float32
    assert np.linalg.norm(exported["embeddings"], axis=1) == pytest.approx(1, abs=1e-5)
    assert len(set(exported["labels"].tolist())) == 539 and len(exported["paths"]) == 4409
    nearest = exported["embeddings"] @ exported["embeddings"].T
    np.fill_diagonal(nearest, -2)
    hits = exported["labels"][nearest.argmax(1)] == exported["labels"]
    assert hits.mean() == pytest.approx(numbers["R@1"], abs=1e-3)


def test_checkpoints_load_without_pickle(run_folder):
    for name in ("last.pth", "emoji_resnet18_best.pth"):
        content = torch.load(run_folder / name, weights_only=True)
        assert "model.embedding.weight" in content["model_state_dict"]


def test_second_run_of_one_name_gets_its_own_folder(run_folder):
    before = (run_folder / "metrics.csv").read_bytes()
    command = [*SMALL, "--loss", "AMLoss", "--max-steps", "1", "--name", "short"]
    done = run_cli("train.py", *command, cwd=run_folder.parent.parent)
    assert done.returncode == 0, done.stderr
    assert (run_folder.parent / "short-2" / "metrics.csv").is_file()
    assert (run_folder / "metrics.csv").read_bytes() == before


def test_dry_run_tells_and_writes_nothing(workdir):
    before = files_in(workdir)
    done = run_cli("train.py", *SMALL, "--loss", "AMLoss", "--dry-run", cwd=workdir)
    assert done.returncode == 0, done.stderr
    for said in ("4,417 images, 538 classes", "138 an epoch", "backbone", "proxies", "margins"):
        assert said in done.stdout
    assert files_in(workdir) == before


def test_resumed_run_ends_with_the_same_weights(workdir):
    command = [*SMALL, "--loss", "AMLoss", "--schedule", "cosine", "--epochs", "1"]
    whole = run_cli("train.py", *command, "--max-steps", "6", "--name", "whole", cwd=workdir)
    assert whole.returncode == 0, whole.stderr
    half = run_cli("train.py", *command, "--max-steps", "3", "--name", "half", cwd=workdir)
    assert half.returncode == 0, half.stderr
    rest = ["--resume-run", "logs/half", "--max-steps", "6"]
    resumed = run_cli("train.py", *rest, cwd=workdir)
    assert resumed.returncode == 0, resumed.stderr
    first, second = (
        torch.load(workdir / "logs" / name / "last.pth", weights_only=True)
        for name in ("whole", "half")
    )
    for part in ("model_state_dict", "criterion_state_dict"):
        assert all(torch.equal(first[part][key], second[part][key]) for key in first[part])
    assert [row["step"] for row in tiny.metrics_rows(workdir / "logs" / "half")] == ["3", "6"]


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dataset emojis", ["emojis", "did you mean emoji"]),
        ("--dataset cub", ["cub", "data"]),
        ("--model resnet19", ["resnet19", "did you mean resnet18"]),
        ("--loss AMLos", ["AMLos", "did you mean AMLoss"]),
        ("--loss pml:TripletMarginLos", ["TripletMarginLos", "did you mean"]),
        ("--loss pml:CircleLoss --loss-args gama=80", ["CircleLoss", "gama"]),
        ("--loss AMLoss --loss-args alpha=48", ["AMLoss", "did you mean", "alphap", "alphan"]),
        ("--loss-args margin=wide", ["margin", "wide", "0.1"]),
        ("--batch-size 5000", ["5000", "4417"]),
        ("--IPC 7", ["classes of 7", "32"]),
        ("--val-fold 4", ["--val-fold 4", "0 to 3"]),
        ("--no-test", ["--no-test", "--val-fold"]),
        ("--model bn_inception --width 1 --stem imagenet --image-size 40", ["40 pixels", "32"]),
        ("--pretrained no.pth", ["no.pth", "does not exist"]),
        ("--amp fp16 --gpu-id 0", ["fp16", "GPU"]),
        ("--resume-run nowhere", ["nowhere", "args.json"]),
        ("--proxy-lr-scale 1e38 --lr 10 --max-steps 5", ["not finite", "step", "--lr"]),
    ],
)
def test_bad_input_is_one_sentence_and_status_2(flags, words, workdir):
    done = run_cli("train.py", *SMALL, *flags.split(), "--name", "bad", cwd=workdir)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr
    last = workdir / "logs" / "bad" / "last.pth"
    if last.exists():  # from before the step that went wrong
        state = torch.load(last, weights_only=True)
        assert state["clock"]["step"] == 0
        assert all(value.isfinite().all() for value in state["model_state_dict"].values())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--resume nowhere.pth", ["nowhere.pth", "does not exist"]),
        ("--resume {text.parent}", ["cut.pth", "cannot be read"]),
        ("--resume {best} --model resnet34", ["resnet34"]),
        ("--resume {best} --embedding-size 32", ["16", "32"]),
        ("--resume {text}", ["notes.pth", "cannot be read"]),
        ("--resume {cut}", ["cut.pth", "cannot be read"]),
        ("--resume {best} --ks 5000", ["5000"]),
        ("--resume {best} --json /proc/nowhere/n.json", ["/proc/nowhere"]),
    ],
)
def test_bad_checkpoint_is_one_sentence_and_status_2(flags, words, run_folder, tmp_path):
    best = run_folder / "emoji_resnet18_best.pth"
    text, cut = tmp_path / "notes.pth", tmp_path / "cut.pth"
    text.write_text("these are not weights\n")
    cut.write_bytes(best.read_bytes()[:5000])
    command = flags.format(best=best, text=text, cut=cut, logs=run_folder.parent).split()
    done = run_cli("evaluate.py", *command, cwd=run_folder.parent.parent)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def test_checkpoint_with_code_in_it_is_refused(run_folder, tmp_path):
    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "executed",)

    torch.save({"model_state_dict": {}, "extra": Payload()}, tmp_path / "evil.pth")
    done = run_cli("evaluate.py", "--resume", str(tmp_path / "evil.pth"), cwd=tmp_path)
    assert done.returncode == 2 and "read safely" in done.stderr
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_a_compiled_network_learns_the_same(tmp_path):
    images = tiny.write_images(tmp_path / "data")
    flags = "--epochs 2 --amp off --warm 0"
    weights = []
    for name, more in (("plain", ""), ("compiled", " --compile")):
        folder = tiny.run(images, tmp_path, name, flags + more)
        weights.append(torch.load(folder / "last.pth", weights_only=True)["model_state_dict"])
    assert list(weights[0]) == list(weights[1])
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=1e-3, atol=1e-4)
