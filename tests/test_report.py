"""report.py: the page of a run, and the table of all runs under a folder."""

from __future__ import annotations

import html.parser
import json
import re
from pathlib import Path

import pytest
import tiny
from conftest import run_cli

EVIL = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short AMLoss runs on images of which one class has a name that wants to be code."""
    folder = tmp_path_factory.mktemp("runs")
    images = tiny.write_images(folder / "data")
    rows = ["path,label,split"]
    for path in sorted(images.rglob("*.png")):
        label = EVIL if path.parent.name == "eval0" else path.parent.name
        rows.append(f"{path},{label},{path.parent.parent.name}")
    (folder / "data.csv").write_text("\n".join(rows))
    for seed in (1, 2):
        flags = ["--loss", "AMLoss", "--epochs", "2", "--warm", "0", "--seed", str(seed)]
        where = ["--LOG_DIR", str(folder / "logs"), "--name", f"run{seed}"]
        command = ["--dataset", f"csv:{folder / 'data.csv'}", *tiny.NETWORK, *flags, *where]
        done = run_cli("train.py", *command, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder / "logs"


def page_of(runs: Path, *which: str) -> str:
    done = run_cli("report.py", *(str(runs / name) for name in which), cwd=runs)
    assert done.returncode == 0, done.stderr
    (path,) = [Path(word) for word in done.stdout.split() if word.endswith(".html")][:1]
    return (runs / path).read_text(encoding="utf-8")


class Tags(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.scripts = 0

    def handle_starttag(self, tag, attributes) -> None:
        self.scripts += tag == "script"
        for name, value in attributes:
            assert name not in ("src", "href") or not (value or "").startswith(("http", "//")), (
                value
            )


def test_the_page_of_a_run_is_whole_and_harmless(runs: Path) -> None:
    page = page_of(runs, "run1")
    assert EVIL not in page and len(page) < 5_000_000
    tags = Tags()
    tags.feed(page)
    assert tags.scripts <= 2
    results = json.loads((runs / "run1" / "results.json").read_text())["results"]
    (numbers,) = results.values()
    assert f"{100 * numbers['R@1']:.1f}" in re.sub(r"<[^>]*>", " ", page)
    for word in ("AMLoss", "resnet10", "margin"):
        assert word in page


def test_several_runs_share_a_page(runs: Path) -> None:
    page = page_of(runs, "run1", "run2")
    assert "run1" in page and "run2" in page


def test_all_runs_under_a_folder_stand_in_a_table(runs: Path, tmp_path: Path) -> None:
    table = tmp_path / "runs.csv"
    done = run_cli("report.py", "--compare", str(runs), "--csv", str(table), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "run1" in done.stdout and "run2" in done.stdout
    assert table.read_text().count("AMLoss") >= 2


def test_a_folder_without_a_run_is_one_sentence(tmp_path: Path) -> None:
    done = run_cli("report.py", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
