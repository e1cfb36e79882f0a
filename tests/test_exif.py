"""`--exif ignore` reaches every place that reads a file: a turned copy is then like a plain one.

Two copies of some photographs differ in one thing: in `turned` every file says of itself that it is
to be shown a quarter turn to the right. The released programs do not listen to that.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny
from conftest import refusal, run_cli
from PIL import Image

import dataset.__main__ as data_command
import evaluate
import net.__main__ as net_command
import options
from dataset.check import check
from net import load_run
from page.making import make
from utils import InputError

RIGHT = 6


class Copies(NamedTuple):
    """Two folders with the same pixels in the same files."""

    turned: Path
    plain: Path


@pytest.fixture(scope="module")
def copies(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Copies:
    """The photographs as JPEG files, with orientation 6 and without."""
    root = tmp_path_factory.mktemp("exif")
    exif = Image.Exif()
    exif[0x0112] = RIGHT
    for name, how in (("turned", {"exif": exif}), ("plain", {})):
        for path in sorted(images.glob("*/*/*.png")):
            to = root / name / path.relative_to(images).with_suffix(".jpg")
            to.parent.mkdir(parents=True, exist_ok=True)
            with Image.open(path) as image:
                image.save(to, quality=90, **how)
    return Copies(root / "turned", root / "plain")


@pytest.fixture(scope="module")
def logs(copies: Copies, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of the turned copy, `ignored` (by the real command line) and `applied`, and `plain`."""
    logs = tmp_path_factory.mktemp("logs")
    words = ["--dataset", f"folder:{copies.turned}", *tiny.NETWORK, "--epochs", "2"]
    words += ["--exif", "ignore", "--workers", "2", "--name", "ignored", "--LOG_DIR", str(logs)]
    words.remove("--no-report")
    done = run_cli("train.py", *words, cwd=logs)
    assert done.returncode == 0, done.stderr
    assert "EXIF orientation ignored" in done.stdout
    tiny.run(copies.turned, logs, "applied", "--epochs 2")
    tiny.run(copies.plain, logs, "plain", "--epochs 2")
    return logs


def test_training_sees_the_pixels_as_they_are_stored(logs: Path) -> None:
    weights = {
        name: tiny.saved(logs / name)["model_state_dict"]
        for name in ("ignored", "applied", "plain")
    }
    assert tiny.same(weights["ignored"], weights["plain"])
    assert not tiny.same(weights["applied"], weights["plain"])
    assert tiny.untimed_rows(logs / "ignored") == tiny.untimed_rows(logs / "plain")


def test_so_does_the_cache_and_keeps_the_two_apart(copies: Copies, tmp_path: Path) -> None:
    cached = f"--decode cache --cache-dir {tmp_path / 'cache'} --epochs 1"
    runs = {
        "ignored": (copies.turned, f"{cached} --exif ignore"),
        "applied": (copies.turned, cached),
        "plain": (copies.plain, cached),
    }
    for name, (data, flags) in runs.items():
        tiny.run(data, tmp_path, name, flags)
    assert len(list((tmp_path / "cache").iterdir())) == 3  # one for each run
    weights = {name: tiny.saved(tmp_path / name)["model_state_dict"] for name in runs}
    assert tiny.same(weights["ignored"], weights["plain"])
    assert not tiny.same(weights["applied"], weights["plain"])


def test_so_does_an_evaluation_unless_it_is_told_otherwise(
    copies: Copies, logs: Path, tmp_path: Path
) -> None:
    def embedded(run: str, *flags: str) -> np.ndarray:
        file = tmp_path / f"{run}{len(flags)}.npz"
        words = ("--resume", logs / run, "--export", file, "--workers", "0", *flags)
        query = next((copies.plain if run == "plain" else copies.turned).glob("eval/*/*.jpg"))
        words += ("--query", query, "--out", tmp_path)
        evaluate.main(options.parse_evaluate(list(map(str, words))))
        nearest = (tmp_path / "query.csv").read_text().splitlines()[1]
        assert float(nearest.split(",")[2]) == pytest.approx(1)  # it is one of those evaluated
        return np.load(file)["embeddings"]

    plain = embedded("plain")
    assert np.array_equal(embedded("ignored"), plain)
    assert not np.allclose(embedded("ignored", "--exif", "apply"), plain, atol=1e-3)


def test_so_do_load_run_and_what_an_export_asks_for(
    copies: Copies, logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    turned, plain = (sorted(folder.glob("eval/*/*.jpg"))[:3] for folder in copies)
    expected = load_run(logs / "plain")(plain)
    assert np.array_equal(load_run(logs / "ignored")(turned), expected)
    assert np.array_equal(load_run(logs / "ignored")([Image.open(p) for p in turned]), expected)
    assert not np.allclose(load_run(logs / "plain")(turned), expected, atol=1e-3)
    said = {}
    for name in ("ignored", "plain"):
        file = tmp_path / f"{name}.pt"
        net_command.main(["export", str(logs / name), "--torchscript", str(file)])
        said[name] = capsys.readouterr().out
    assert "EXIF data ignored" in said["ignored"] and "EXIF data say" in said["plain"]


def test_so_do_the_pictures_of_the_page(logs: Path) -> None:
    make([logs / "plain"], None)
    pages = {name: (logs / name / "report.html").read_text() for name in ("ignored", "plain")}
    address = r"data:image/webp;base64,[^\"]+"
    shown = {name: re.findall(address, page) for name, page in pages.items()}
    assert shown["ignored"] == shown["plain"] and len(shown["plain"]) > 10
    assert "EXIF orientation ignored" in pages["ignored"]
    assert "EXIF orientation ignored" not in pages["plain"]


def test_check_says_what_happens_to_turned_files(
    copies: Copies, capsys: pytest.CaptureFixture[str]
) -> None:
    notes = {}
    for exif in ("apply", "ignore"):
        report = check(f"folder:{copies.turned}", exif=exif)
        (notes[exif],) = (note for note in report.findings if note.kind == "EXIF rotation file")
        assert notes[exif].count == 72 and notes[exif].note
    assert "turned upright" in notes["apply"].meaning and "as stored" in notes["ignore"].meaning
    data_command.main(["check", f"folder:{copies.turned}", "--exif", "ignore"])
    assert "taken as stored" in " ".join(capsys.readouterr().out.split())


def test_a_box_is_cut_out_of_the_pixels_that_are_seen(copies: Copies, tmp_path: Path) -> None:
    """40 pixels wide as stored, 36 when turned: a box at the right edge tells the two apart."""
    rows = ["path,label,split,x1,y1,x2,y2"]
    for path in sorted(copies.turned.glob("*/*/*.jpg")):
        rows.append(f"{path},{path.parent.name},{path.parent.parent.name},37,0,40,36")
    (tmp_path / "boxes.csv").write_text("\n".join(rows))
    kinds = {
        exif: {finding.kind for finding in check(f"csv:{tmp_path}/boxes.csv", exif=exif).findings}
        for exif in ("apply", "ignore")
    }
    assert "box outside its image" in kinds["apply"]
    assert "box outside its image" not in kinds["ignore"]


def test_a_run_keeps_what_it_was_told(logs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads((logs / "ignored" / "args.json").read_text())["exif"] == "ignore"
    with pytest.raises(InputError, match="--exif cannot change in a continued run"):
        tiny.resume(logs / "ignored", "--exif apply --epochs 3")
    # Drawings in memory have no EXIF data.
    assert "--exif" in refusal(capsys, options.parse_train, ["--exif", "ignore"])


def test_runs_from_before_the_flag_turned_their_pictures(logs: Path) -> None:
    stored = json.loads((logs / "applied" / "args.json").read_text())
    stored.pop("exif")
    assert options.kept(stored).exif == "apply"
