"""The worked examples of docs/extending.md, carried out as they stand there."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
LONGEST = 25  # lines of an example, blank ones apart
BASE = (
    "--embedding-size 16 --epochs 2 --batch-size 60 --workers 0 --amp off --warm 0 "
    "--ratio-classes 0.2 --wandb disabled --LOG_DIR logs --name mine --metrics retrieval"
)
SMALL = "--model resnet10 --width 0.25"


class Example(NamedTuple):
    """What a section of the document adds: a file, one line elsewhere, and a command to use it."""

    title: str
    path: str
    code: str
    register: str
    after: str
    line: str
    flags: str


def examples() -> list[Example]:
    """The sections of the document that have all three blocks."""
    text = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    found = []
    for section in text.split("\n## ")[1:]:
        blocks = dict(re.findall(r"```(python|diff|bash)\n(.*?)```", section, re.S))
        if not blocks:
            continue
        first, _, code = blocks["python"].partition("\n")
        register, after, added = blocks["diff"].rstrip("\n").split("\n")
        assert added.startswith("+")
        command = blocks["bash"].strip()
        assert command.startswith("python train.py ")
        found.append(
            Example(
                section.split("\n")[0],
                first.removeprefix("# "),
                code,
                register,
                after[1:],
                added[1:],
                command.removeprefix("python train.py "),
            )
        )
    return found


EXAMPLES = examples()


def test_the_document_shows_all_four() -> None:
    assert [e.title for e in EXAMPLES] == ["A loss", "A method", "A backbone", "A data set"]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda e: e.title)
def test_an_example_is_short(example: Example) -> None:
    assert len([line for line in example.code.splitlines() if line.strip()]) <= LONGEST


@pytest.fixture(scope="module", params=EXAMPLES, ids=lambda e: e.title)
def copy(request, tmp_path_factory) -> tuple[Example, Path]:
    """A copy of the repository with the file and the line of an example, and nothing else."""
    example = request.param
    folder = tmp_path_factory.mktemp("copy") / "anchorage"
    left_out = shutil.ignore_patterns(
        ".git", ".venv", ".*_cache", "__pycache__", "logs", "wandb", "tests", "benchmarks"
    )
    shutil.copytree(ROOT, folder, ignore=left_out)
    assert not (folder / example.path).exists()
    (folder / example.path).write_text(example.code, encoding="utf-8")
    register = folder / example.register
    lines = register.read_text(encoding="utf-8").split("\n")
    assert lines.count(example.after) == 1, example.after
    lines.insert(lines.index(example.after) + 1, example.line)
    register.write_text("\n".join(lines), encoding="utf-8")
    return example, folder


def run(folder: Path, *words: str, status: int = 0) -> str:
    """What a command prints in the copy."""
    done = subprocess.run(
        [sys.executable, *words], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


@pytest.mark.slow
def test_it_trains_continues_evaluates_reports_and_exports(copy) -> None:
    example, folder = copy
    own = example.flags.split()
    flags = [*BASE.split(), *(() if "--model" in own else SMALL.split()), *own]
    if "--dataset" in own:
        flags[flags.index("0.2")] = "1.0"
    assert "()" not in run(folder, "train.py", *flags, "--max-steps", "2")
    log = folder / "logs" / "mine"
    continued = run(folder, "train.py", "--resume-run", "logs/mine", "--max-steps", "4")
    assert "step 2" in continued
    reached = json.loads((log / "results.json").read_text())["results"]
    (best,) = log.glob("*_best.pth")
    words = "--json numbers.json --workers 0 --amp off --metrics retrieval".split()
    run(folder, "evaluate.py", "--resume", str(best), *words)
    (numbers,) = json.loads((folder / "numbers.json").read_text())["results"]
    assert next(iter(reached.values()))["R@1"] == pytest.approx(numbers["R@1"])
    assert (log / "report.html").is_file()
    assert "mine" in run(folder, "report.py", "--compare", "logs")
    run(folder, "-m", "net", "export", "logs/mine", "--torchscript", "mine.pt", "--card", "card.md")
    assert (folder / "mine.pt").is_file()
    assert "## Citation" in (folder / "card.md").read_text(encoding="utf-8")
    script = "from net import load_run; import numpy as np; from PIL import Image;"
    script += "print(load_run('logs/mine')(Image.new('RGB', (40, 40))).shape)"
    assert "(1, 16)" in run(folder, "-c", script)


@pytest.mark.slow
def test_it_is_in_the_help_and_in_did_you_mean(copy) -> None:
    example, folder = copy
    help_text = run(folder, "train.py", "--help")
    flag, name = example.flags.split()[:2]
    assert (name if flag in ("--loss", "--model", "--dataset") else flag) in help_text
    if flag in ("--loss", "--model", "--dataset"):
        said = run(folder, "train.py", flag, f"{name}x", "--dry-run", status=2)
        assert name in said
    else:
        assert flag in run(folder, "train.py", f"{flag}x", "1", "--dry-run", status=2)
