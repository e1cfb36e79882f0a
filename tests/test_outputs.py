"""What a command reads is never written over: a sentence before any work."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import pytest
from conftest import ROOT, run_python

import evaluate
import options
import report
from evaluation.networks import all_checkpoint_files
from net.__main__ import main as export
from storage import check_outputs, load_arrays, write_atomically
from utils import InputError, MachineError


def evaluated(*words: object) -> None:
    args = options.parse_evaluate([*map(str, words)])
    evaluate.check_files(args, all_checkpoint_files(args.resume))


def reported(*words: object) -> None:
    report.main(options.parse_report([*map(str, words)]))


def exported(*words: object) -> None:
    export(["export", *map(str, words)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """What looks like a run folder, so far as names go."""
    names = "args.json results.json emoji_resnet18_best.pth mine.json e.npz query.png failures.png"
    for name in names.split():
        (tmp_path / name).write_text(name)
    return tmp_path


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (evaluated, "--resume RUN --export RUN/emoji_resnet18_best.pth"),
        (evaluated, "--resume RUN/emoji_resnet18_best.pth --latex RUN/emoji_resnet18_best.pth"),
        (evaluated, "--resume RUN --json RUN/results.json"),
        (evaluated, "--resume RUN --query RUN/mine.json --neighbours RUN/../NAME/mine.json"),
        (evaluated, "--resume RUN --dataset csv:RUN/mine.json --csv RUN/mine.json"),
        (evaluated, "--resume RUN --query RUN/query.png"),
        (evaluated, "--resume RUN --query x.png RUN/failures.png --failures 3"),
        (evaluated, "--resume RUN/emoji_resnet18_best.pth --query RUN/query.png --out RUN/."),
        (reported, "RUN --out RUN/emoji_resnet18_best.pth"),
        (reported, "RUN --embeddings RUN/e.npz --out RUN/e.npz"),
        (exported, "RUN/emoji_resnet18_best.pth --onnx RUN/emoji_resnet18_best.pth"),
        (exported, "RUN --card RUN/results.json"),
    ],
)
def test_what_is_read_is_not_written_over(
    command: Callable[..., None], words: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = words.replace("RUN", str(run)).replace("NAME", run.name)
    try:
        command(*words.split())
    except InputError as error:
        said = str(error)
    except SystemExit as stop:
        assert stop.code == 2
        said = capsys.readouterr().err
    assert "would overwrite" in said and "which is read here" in said
    assert all(file.read_text() == file.name for file in run.iterdir())


def test_two_outputs_are_two_files(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--csv and --latex both name"):
        reported("--compare", run, "--csv", tmp_path / "x", "--latex", tmp_path / "x")


def test_what_a_killed_command_has_left_of_an_output_is_removed(run: Path) -> None:
    left = [run / ".e[1].npz.0a1b2c3d.tmp", run / ".e.npz.0a1b2c3d.tmp"]
    for file in left:
        file.write_bytes(b"half")

    def write(file: BinaryIO) -> None:  # another process, which is not killed
        being_written = {path.name for path in run.glob(".mine.csv.*.tmp")}
        code = "import sys, storage; storage.check_outputs({'--csv': sys.argv[1]})"
        subprocess.run([sys.executable, "-c", code, run / "mine.csv"], cwd=ROOT, check=True)
        assert being_written == {path.name for path in run.glob(".mine.csv.*.tmp")} != set()

    write_atomically(run / "mine.csv", write)
    evaluated("--resume", run / "emoji_resnet18_best.pth", "--export", run / "e[1].npz")
    assert [file.exists() for file in left] == [False, True]


def test_other_files_may_be_replaced(run: Path) -> None:
    evaluated("--resume", run, "--json", run / "mine.json", "--export", run / "e.npz")
    (run / "args.json").unlink()  # no run folder: what lies there is the user's
    evaluated("--resume", run / "emoji_resnet18_best.pth", "--json", run / "results.json")


@pytest.mark.parametrize(
    "command",
    [
        "evaluate.py --resume link",
        "evaluate.py --resume link link",
        "search.py info link",
        "search.py query link a.png",
        "-m net export link --onnx a.onnx",
        "train.py --dataset folder:link --dry-run",
        "train.py --resume-run link",
        "report.py link",
    ],
)
def test_links_that_lead_to_each_other_are_a_sentence(command: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("other")
    (tmp_path / "other").symlink_to("link")
    program, *words = command.split()
    program = ROOT / program if program.endswith(".py") else program
    done = run_python(program, *words, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith("error: ")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "other"]


@pytest.mark.parametrize(
    ("number", "needed"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EMFILE, r"raise the limit on files \(ulimit -n 4096\)"),
        (errno.EROFS, "check its disk"),
        (errno.EACCES, "check its permissions"),
        (errno.ENOTDIR, "check the path"),
    ],
    ids=errno.errorcode.get,
)
def test_what_cannot_be_written_or_read_is_told_with_what_helps(
    number: int, needed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    for name in ("tempfile.TemporaryFile", "storage.writing._locked_temporary"):
        with monkeypatch.context() as patched, pytest.raises(MachineError) as error:
            patched.setattr(name, refused)
            check_outputs({"--json": tmp_path / "a.json"})
            write_atomically(tmp_path / "a.json", bytes)
        error.match(rf"cannot write .*a\.json: {os.strerror(number)}; {needed} or choose another")
    (tmp_path / "a.npz").touch()
    with monkeypatch.context() as patched, pytest.raises(MachineError) as error:
        patched.setattr("pathlib.Path.open", refused)
        load_arrays(tmp_path / "a.npz", "the array")
    error.match(rf"the array .*a\.npz cannot be read \({os.strerror(number)}\); {needed}$")
