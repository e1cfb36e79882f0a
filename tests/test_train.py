"""train.py and evaluate.py as users run them: the run folder, resuming, faults."""

from __future__ import annotations

import csv
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, SMALL, files_in, on_a_terminal, refusal, run_cli, run_python

import options
from training import compiling
from training.describing import describe
from utils import InputError


@pytest.fixture(scope="session")
def run_folder(session_workdir: Path) -> Path:
    """One short AMLoss run on the embedded data."""
    command = [*SMALL, "--loss", "AMLoss", "--max-steps", "6", "--name", "short"]
    done = run_cli("train.py", *command, cwd=session_workdir)
    assert done.returncode == 0, done.stderr
    (session_workdir / "printed.txt").write_text(done.stdout)
    return session_workdir / "logs" / "short"


# --- how soon a run speaks ------------------------------------------------------------------------

HEAVY = "torch._dynamo torch._inductor sympy scipy sklearn torchvision timm wandb page".split()
FIRST_LINE = """
import runpy, sys, terminal

def first_line(text, **more):
    print(*sorted(sys.modules), sep="\\n")
    raise SystemExit

terminal.say = first_line
sys.argv = ["train.py"]
runpy.run_path("train.py", run_name="__main__")
"""


def test_what_the_first_line_does_not_need_is_loaded_after_it():
    loaded = run_python("-c", FIRST_LINE).stdout.split()
    assert {"torch", "training.optim", "net.bn_inception"} <= set(loaded)
    assert not set(HEAVY) & set(loaded)


# --- a run and what it leaves ---------------------------------------------------------------------


def test_run_folder_holds_all_there_is_to_know(run_folder):
    assert files_in(run_folder) == [
        "args.json",
        "checksums.json",
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
    assert len(rows) == 54 and set(rows[0]) == {"class", "margin", "images"}
    assert len({row["class"] for row in rows}) == 54
    assert sum(int(row["images"]) for row in rows) == 444
    margins = [float(row["margin"]) for row in rows]
    assert margins == sorted(margins) and margins[0] < margins[-1]


def test_output_is_quiet_off_a_terminal_and_says_where_everything_lies(run_folder):
    printed = (run_folder.parent.parent / "printed.txt").read_text()
    assert "\r" not in printed and "it/s" not in printed
    assert sum(line.startswith("epoch ") for line in printed.splitlines()) == 1
    for said in ("444 images", "447 images", "run folder", "evaluate.py --resume", "MAP@R"):
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
    assert exported["embeddings"].shape == (447, 16) and exported["embeddings"].dtype == np.float32
    assert np.linalg.norm(exported["embeddings"], axis=1) == pytest.approx(1, abs=1e-5)
    assert len(set(exported["labels"].tolist())) == 54 and len(exported["paths"]) == 447
    nearest = exported["embeddings"] @ exported["embeddings"].T
    np.fill_diagonal(nearest, -2)
    hits = exported["labels"][nearest.argmax(1)] == exported["labels"]
    assert hits.mean() == pytest.approx(numbers["R@1"], abs=1e-3)


def test_checkpoints_load_without_pickle(run_folder):
    for name in ("last.pth", "emoji_resnet18_best.pth"):
        content = torch.load(run_folder / name, weights_only=True)
        assert "model.embedding.weight" in content["model_state_dict"]


def test_second_run_of_one_name_gets_its_own_folder(images, tmp_path):
    command = ["--dataset", f"folder:{images}", *tiny.NETWORK, "--max-steps", "1", "--name", "run"]
    runs = [tmp_path / "logs" / name for name in ("run", "run-2")]
    before = []
    for run in runs:
        done = run_cli("train.py", *command, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        before.append((run / "metrics.csv").read_bytes())
    assert [(run / "metrics.csv").read_bytes() for run in runs] == before


def test_dry_run_tells_and_writes_nothing(workdir):
    before = files_in(workdir)
    done = run_cli("train.py", *SMALL, "--loss", "AMLoss", "--dry-run", cwd=workdir)
    assert done.returncode == 0, done.stderr
    for said in ("444 images, 54 classes", "13 per epoch", "backbone", "proxies", "margins"):
        assert said in done.stdout
    assert files_in(workdir) == before


def test_resumed_run_ends_with_the_same_weights(images, tmp_path):
    command = ["--dataset", f"folder:{images}", *tiny.NETWORK, "--loss", "AMLoss"]
    command += ["--schedule", "cosine", "--epochs", "2"]
    for words in (
        [*command, "--max-steps", "7", "--name", "whole"],
        [*command, "--max-steps", "3", "--name", "half"],
        ["--resume-run", "logs/half", "--max-steps", "7"],
    ):
        done = run_cli("train.py", *words, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    whole, half = (tiny.saved(tmp_path / "logs" / name) for name in ("whole", "half"))
    for part in ("model_state_dict", "criterion_state_dict"):
        assert tiny.same(whole[part], half[part])
    rows = tiny.metrics_rows(tmp_path / "logs" / "half")
    assert [row["step"] for row in rows] == ["3", "4", "7"]


# --- faults ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--dataset emojis", ["emojis", "did you mean emoji"]),
        ("--dataset cub --pretrained none", ["cub", "data"]),
        ("--model resnet19", ["resnet19", "did you mean resnet18"]),
        ("--loss AMLos", ["AMLos", "did you mean AMLoss"]),
        ("--loss pml:TripletMarginLos", ["TripletMarginLos", "did you mean"]),
        ("--loss pml:CircleLoss --loss-args gama=80", ["CircleLoss", "gama"]),
        ("--loss AMLoss --loss-args alpha=48", ["AMLoss", "did you mean", "alphap", "alphan"]),
        ("--loss-args margin=wide", ["margin", "wide", "0.1"]),
        ("--batch-size 5000", ["5000", "444"]),
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
        ("--pretrained nowhere.pth", "weights file nowhere.pth does not exist"),
        ("--pretrained imagenet", "fit width 1 and stem imagenet only"),
        ("--checkpoint nowhere.pth", "checkpoint nowhere.pth does not exist"),
        ("--model efficientnet_lite0 --width 2 --stem imagenet", "cannot be widened; use width 1"),
        ("--loss-args marjin=1", "did you mean margin?"),
        ("--head none --introspective", "the method needs the heads embedding, uncertainty"),
    ],
)
def test_a_network_or_loss_that_cannot_be_is_refused_before_images_are_looked_for(
    flags, words, tmp_path
):
    """A large table of own images takes half a minute to read; here the images are not there."""
    with pytest.raises(InputError, match=re.escape(words)):
        tiny.prepare(tmp_path / "photos", flags)


def test_an_unknown_network_is_refused_before_settings_are_chosen_to_suit_the_images(
    tmp_path, capsys
):
    (tmp_path / "table.csv").write_text("it names neither paths nor labels\n")
    words = ["--dataset", f"csv:{tmp_path / 'table.csv'}", "--defaults", "suited"]
    said = refusal(capsys, options.parse_train, [*words, "--model", "resnet77"])
    assert "unknown model 'resnet77'" in said
    assert "no column path" in refusal(capsys, options.parse_train, words)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--resume nowhere.pth", ["nowhere.pth", "does not exist"]),
        ("--resume {text.parent}", ["cut.pth", "cannot be read"]),
        ("--resume {best} --model resnet34", ["resnet34"]),
        ("--resume {best} --embedding-size 32", ["16", "32"]),
        ("--resume {text}", ["notes.pth", "cannot be read"]),
        ("--resume {cut}", ["cut.pth", "cannot be read", "its end is missing"]),
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


def test_whoever_waits_for_the_compiler_is_told(monkeypatch, capsys):
    """As long as it takes, and not afterwards."""
    monkeypatch.setattr(compiling, "FIRST", 0.05)
    monkeypatch.setattr(compiling, "EVERY", 0.05)
    monkeypatch.setattr(compiling, "LONG", 0.2)
    compiling.announce()
    compiling.announce()  # a second training in the same process tells nothing twice

    def slow(graph, _):
        time.sleep(0.4)
        return graph.forward

    compiled, start = torch.compile(torch.sin, backend=slow), time.perf_counter()
    compiled(torch.ones(2))
    seconds = time.perf_counter() - start
    told = capsys.readouterr().err.splitlines()
    assert 2 <= len(told) <= seconds / 0.05 + 1
    assert re.fullmatch(r"compiling the network, [\d.]+ s so far", told[0])
    assert "without --compile it starts at once" in told[-1]
    compiled(torch.ones(2))
    time.sleep(0.2)
    assert not capsys.readouterr().err


def test_what_training_and_evaluation_print_fits_eighty_columns(tmp_path):
    images = tiny.write_images(tmp_path / "data")
    flags = ("--dataset", "folder:data", *tiny.NETWORK, "--epochs", "2", "--name", "run")
    trained = on_a_terminal(80, ROOT / "train.py", *flags, cwd=tmp_path)
    evaluated = on_a_terminal(80, ROOT / "evaluate.py", "--resume", "logs/run", cwd=tmp_path)
    assert images.is_dir() and sum(line.startswith("epoch ") for line in trained) == 2
    paths = ("data ", "run folder", "evaluate:", "report:", "search:", " " * 12 + "python ")
    for line in (*trained, *evaluated):
        assert len(line) <= 80 or line.startswith(paths), line
    for name in ("R@1", "MAP@R", "NMI", "AMI"):
        assert any(name in line for line in evaluated)


def test_a_run_by_steps_says_where_it_stands_in_steps(tmp_path, capsys):
    images = tiny.write_images(tmp_path / "data")
    tiny.run(images, tmp_path, "run", "--steps 5 --nb-clusters 2 --mod-epoch 1 --IPC 2")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch ")]
    assert lines and all(re.match(r"epoch +\d+, step \d/5 ", line) for line in lines)


def test_a_row_ends_with_each_epoch_and_each_evaluation_and_the_run(images, tmp_path):
    folder = tiny.run(images, tmp_path, "run", "--steps 7 --eval-steps 3 --warm 0")
    rows = [(row["step"], bool(row["R@1"])) for row in tiny.metrics_rows(folder)]
    assert rows == [("3", True), ("4", False), ("6", True), ("7", True)]


def test_a_continued_run_is_not_made_shorter_than_it_is(tmp_path):
    images = tiny.write_images(tmp_path / "data")
    folder = tiny.run(images, tmp_path, "run", "--epochs 3")
    before = (folder / "metrics.csv").read_bytes()
    for flags, words in (
        ("--epochs 2", "--epochs 2 is less than the 3 epochs that the run has begun"),
        ("--max-steps 5", "--max-steps 5 is less than the 12 steps that the run has done"),
    ):
        with pytest.raises(InputError, match=words):
            tiny.resume(folder, flags)
    assert (folder / "metrics.csv").read_bytes() == before
    tiny.resume(folder, "--epochs 4 --no-report")
    assert len(tiny.metrics_rows(folder)) == 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--epochs 2 --warm 2", "--warm 2 of 2 epochs: the network itself never trains"),
        ("--epochs 2 --warm 2", "use --warm 0, or more --epochs"),
        ("--max-steps 3", "--max-steps 3 ends within --warm 1: until then only the head trains"),
        ("--steps 4 --eval-steps 4", "use --warm 0, or more --steps"),
        ("--epochs 3 --warm 2 --max-steps 9", None),
        ("--epochs 1 --warm 0", None),
    ],
)
def test_a_warm_up_as_long_as_the_run_is_told(flags, words, tmp_path):
    said = describe(tiny.prepare(tiny.write_images(tmp_path / "data"), flags))
    assert (words in said) if words else ("the network itself" not in said)


def test_a_run_that_counts_in_steps_can_be_made_longer(tmp_path):
    images = tiny.write_images(tmp_path / "data")
    flags = "--eval-steps 4 --warm 0"
    folder = tiny.run(images, tmp_path, "run", f"{flags} --steps 5")
    by_epochs = tiny.run(images, tmp_path, "epochs", "--epochs 1")
    for run, asked, words in (
        (folder, "--steps 3", "--steps 3 is less than the 5 steps that the run has done"),
        (folder, "--epochs 9", "--epochs has no effect"),
        (by_epochs, "--steps 9", "in epochs; --epochs MORE"),
    ):
        with pytest.raises(InputError, match=words):
            tiny.resume(run, asked)
    tiny.resume(folder, "--steps 9")
    whole = tiny.run(images, tmp_path, "whole", f"{flags} --steps 9")
    weights = [tiny.saved(run)["model_state_dict"] for run in (folder, whole)]
    assert tiny.same(*weights)
    assert json.loads((folder / "args.json").read_text())["steps"] == 9
