"""A loss of one's own costs its file and one line: carried out in a copy of the repository."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
import tiny
from conftest import ROOT, run_python

LOSS = '''
from criteria.base import in_float32
from criteria.proxies import ProxyAnchorLoss


class MyLoss(ProxyAnchorLoss):
    """Proxy-Anchor, louder."""

    def __init__(self, *sizes, volume=1.0, **more):
        super().__init__(*sizes, **more)
        self.volume = volume

    @in_float32
    def forward(self, embeddings, labels, uncertainty=None):
        if self.volume < 0:
            rows, size, depth = embeddings.shape
        loss = self.volume * super().forward(embeddings, labels, uncertainty)
        self.terms["loudness"] = loss.detach()
        return loss
'''


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository's code with criteria/mine.py, its line, and a few images."""
    folder = tmp_path_factory.mktemp("copy") / "anchorage"
    code = [path for path in ROOT.iterdir() if path.suffix == ".py"]
    code += [path.parent for path in ROOT.glob("*/__init__.py")]
    for path in code:
        if path.is_dir():
            shutil.copytree(path, folder / path.name)
        else:
            folder.mkdir(exist_ok=True)
            shutil.copy(path, folder)
    (folder / "criteria" / "mine.py").write_text(LOSS)
    names = folder / "criteria" / "__init__.py"
    line = '        "AMLoss": "amloss:AMLoss",\n'
    text = names.read_text(encoding="utf-8")
    assert text.count(line) == 1
    mine = '        "Mine": "mine:MyLoss",\n'
    # What is unfinished must be in the way of nobody else, and so of no test here.
    (folder / "criteria" / "draft.py").write_text("class Draft(\n")
    draft = '        "Draft": "draft:Draft",\n'
    names.write_text(text.replace(line, line + mine + draft), encoding="utf-8")
    tiny.write_images(folder / "images")
    return folder


def train(folder: Path, flags: str) -> subprocess.CompletedProcess[str]:
    return run_python("train.py", *flags.split(), cwd=folder, PYTHONPATH="")


def trained(folder: Path, flags: str) -> subprocess.CompletedProcess[str]:
    small = [word for word in tiny.NETWORK if word != "--no-report"]
    return train(folder, f"--dataset folder:images {' '.join(small)} --max-steps 2 {flags}")


def test_it_trains_with_its_arguments_and_stands_in_the_report(copy: Path) -> None:
    done = trained(copy, "--loss Mine --loss-args volume=2 alpha=16 --name louder")
    assert done.returncode == 0, done.stderr
    header, row = (copy / "logs" / "louder" / "metrics.csv").read_text().splitlines()[:2]
    values = dict(zip(header.split(","), row.split(","), strict=True))
    total = float(values["positive"]) + float(values["negative"])
    assert float(values["loudness"]) == pytest.approx(2 * total, rel=1e-3)
    assert "Mine" in (copy / "logs" / "louder" / "report.html").read_text(encoding="utf-8")


def test_a_fault_in_its_code_is_shown_with_its_line(copy: Path) -> None:
    done = trained(copy, "--loss Mine --loss-args volume=-1 --name faulty")
    assert done.returncode == 1 and "mine.py" in done.stderr
    assert "rows, size, depth = embeddings.shape" in done.stderr
    assert not (copy / "logs" / "faulty").exists()


def test_help_names_it(copy: Path) -> None:
    said = " ".join(train(copy, "--help").stdout.split())
    assert "Proxy_Anchor, AMLoss, Mine, Draft, Proxy_NCA" in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--loss Mnie", "did you mean Mine"),
        ("--loss Mine --loss-args volme=2", "did you mean volume"),
        ("--loss MS --disent True", "combine it with Proxy_Anchor, AMLoss, Mine, NormSoftmax,"),
    ],
)
def test_a_misspelling_and_a_bad_combination_are_answered_with_it(
    copy: Path, flags: str, words: str
) -> None:
    done = trained(copy, flags)
    assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: ")
    assert words in done.stderr
