"""Images that cannot be read are known before a run starts: real files of every kind."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
import tiny
from conftest import run_cli
from PIL import Image, features

import report
import train
from dataset import facts, kept, readable, statuses
from dataset.base import ImageSet, PathTable
from dataset.check import check
from dataset.glance import looks_whole
from dataset.inventory import admitted_bad_images, share_admitting
from dataset.kept import versions_of
from dataset.overlap import shared_with_training
from dataset.readable import unreadable
from dataset.reading import Reading
from dataset.showing import as_text
from training import start
from training.state import Training
from utils import InputError

pytestmark = pytest.mark.usefixtures("maps_here")

RNG = np.random.default_rng(0)


def picture(mode: str = "RGB", side: int = 48) -> Image.Image:
    coarse = Image.fromarray(RNG.integers(0, 255, (6, 6, 3), np.uint8))
    return coarse.resize((side, side), Image.Resampling.BICUBIC).convert(mode)


def encoded(kind: str, image: Image.Image | None = None, **how: object) -> bytes:
    file = io.BytesIO()
    (image or picture()).save(file, kind, **how)
    return file.getvalue()


def moving(kind: str) -> bytes:
    return encoded(kind, picture(), save_all=True, append_images=[picture(), picture()])


SOUND: dict[str, Callable[[], bytes]] = {
    "plain.jpg": lambda: encoded("JPEG"),
    "progressive.jpg": lambda: encoded("JPEG", progressive=True),
    "cmyk.jpg": lambda: encoded("JPEG", picture("CMYK")),
    "stereo.mpo": lambda: moving("MPO"),
    "rgb.png": lambda: encoded("PNG"),
    "deep.png": lambda: encoded("PNG", Image.fromarray(RNG.integers(0, 65535, (9, 9), np.uint16))),
    "palette.png": lambda: encoded("PNG", picture("P"), transparency=3),
    "moving.png": lambda: moving("PNG"),
    "moving.gif": lambda: moving("GIF"),
    "still.webp": lambda: encoded("WEBP"),
    "moving.webp": lambda: moving("WEBP"),
    "x.bmp": lambda: encoded("BMP"),
}
if features.check("avif"):
    SOUND["x.avif"] = lambda: encoded("AVIF")
OTHERS = {"x.tif": lambda: encoded("TIFF"), "with more.jpg": lambda: encoded("JPEG") + b"trailer"}


def image_set(folder: Path, labels: list[int] | None = None) -> ImageSet:
    paths = sorted(os.fsdecode(path) for path in folder.iterdir())
    numbers = np.zeros(len(paths), np.int64) if labels is None else np.array(labels)
    return ImageSet("mine", "eval", numbers, ("a", "b"), PathTable(paths), given=f"folder:{folder}")


@pytest.mark.parametrize("name", SOUND)
def test_a_whole_file_looks_whole_and_one_cut_short_does_not(name: str, tmp_path: Path) -> None:
    content, file = SOUND[name](), tmp_path / name
    file.write_bytes(content)
    assert looks_whole(file)
    for length in (len(content) - 3, len(content) // 2, 20, 0):
        file.write_bytes(content[:length])
        assert not looks_whole(file), length
    half = len(content) // 2
    file.write_bytes(content[:half] + bytes(len(content) - half))  # as a full disk leaves it
    assert not looks_whole(file) or name.endswith((".webp", ".bmp", ".avif"))


@pytest.mark.parametrize("whole", [False, True])
def test_what_cannot_be_read_is_found_and_nothing_else(whole: bool, tmp_path: Path) -> None:
    for name, make in (SOUND | OTHERS).items():
        (tmp_path / name).write_bytes(make())
    (tmp_path / os.fsdecode(b"b\xfd.jpg")).write_bytes(encoded("JPEG"))
    bad = {
        "empty.jpg": b"",
        "text.png": b"not a picture",
        "cut.jpg": encoded("JPEG")[:300],
        "cut.tif": encoded("TIFF")[:900],
        "phone.heic": b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99),
        "huge.png": _claiming(100_000, 100_000),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to("/nowhere/x.jpg")
    os.mkfifo(tmp_path / "pipe.jpg")
    images = image_set(tmp_path)
    found = {Path(images.paths[i]).name: why for i, why in unreadable(images, whole=whole).items()}
    assert found.keys() == {*bad, "folder.jpg", "link.jpg", "pipe.jpg"}
    assert found["empty.jpg"] and found["folder.jpg"] == "it is a folder, not a file"
    assert "million pixels, more than the limit of" in found["huge.png"]
    assert "pillow-heif" in found["phone.heic"] or ".heic" in Image.EXTENSION


def _claiming(width: int, height: int) -> bytes:
    """A PNG that says it is of this size."""
    import struct
    import zlib

    content = bytearray(encoded("PNG"))
    content[16:24] = struct.pack(">II", width, height)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    return bytes(content)


def damaged_inside() -> bytes:
    """A PNG that looks whole, and whose pixels are not those that were packed."""
    content = bytearray(encoded("PNG", picture(side=96)))
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


def test_damage_inside_a_file_is_found_by_decoding_it(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(damaged_inside())
    images = image_set(tmp_path)
    assert looks_whole(images.paths[0])
    assert unreadable(images, whole=False) == {} and list(unreadable(images, whole=True)) == [0]
    cached = Reading("cache", 32, tmp_path / "cache")
    assert list(unreadable(image_set(tmp_path), whole=False, reading=cached)) == [0]


def test_a_box_beside_its_picture_is_found(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_bytes(encoded("PNG"))
    images = replace(image_set(tmp_path), boxes=np.array([[500, 0, 510, 9]], np.int32))
    assert "lies outside" in unreadable(images, whole=True)[0]


# --- what is remembered ---------------------------------------------------------------------------


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ImageSet:
    """Twelve images, which count as enough to write down what was found."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(readable, "REMEMBERED", 12)
    (tmp_path / "images").mkdir()
    for number in range(12):
        (tmp_path / "images" / f"{number:02d}.png").write_bytes(encoded("PNG"))
    return image_set(tmp_path / "images")


def test_only_what_has_changed_is_looked_at_again(many, tmp_path, monkeypatch) -> None:
    looked: list[str] = []
    read = ImageSet.read
    monkeypatch.setattr(
        ImageSet, "read", lambda self, i: looked.append(self.paths[i][-6:]) or read(self, i)
    )
    Path(many.paths[3]).write_bytes(b"no picture")
    assert list(unreadable(many, whole=True)) == [3] and len(looked) == 12
    looked.clear()
    assert list(unreadable(many, whole=True)) == [3] and looked == ["03.png"]
    looked.clear()
    os.utime(many.paths[5], (1, 1))
    Path(many.paths[7]).unlink()
    assert list(unreadable(many, whole=True)) == [3, 7]
    assert sorted(looked) == ["03.png", "05.png", "07.png"]
    (file,) = (kept.default_folder() / "readable").iterdir()
    file.write_bytes(file.read_bytes()[:-9])  # damaged: made anew, and no error
    assert list(unreadable(many, whole=True)) == [3, 7]


def test_of_a_list_with_one_image_more_that_one_is_looked_at(many, tmp_path, monkeypatch) -> None:
    Path(many.paths[3]).write_bytes(b"no picture")
    assert list(unreadable(many, whole=True)) == [3]
    (tmp_path / "images" / "05b.png").write_bytes(encoded("PNG"))
    looked: list[str] = []
    read = ImageSet.read
    monkeypatch.setattr(
        ImageSet, "read", lambda self, i: looked.append(self.paths[i][-6:]) or read(self, i)
    )
    more = image_set(tmp_path / "images")
    assert list(unreadable(more, whole=True)) == [3] and looked == ["03.png", "5b.png"]
    looked.clear()
    evaluated = replace(many, split="eval")  # another draw of the held-out classes
    assert list(unreadable(evaluated, whole=True)) == [3] and looked == ["03.png"]


def test_a_glance_does_not_count_as_decoding(many) -> None:
    Path(many.paths[2]).write_bytes(damaged_inside())
    assert unreadable(many, whole=False) == {}
    assert list(unreadable(many, whole=True)) == [2]
    assert unreadable(many, whole=False) == {}


def test_of_many_evaluation_images_not_all_are_decoded(many, monkeypatch) -> None:
    monkeypatch.setattr(readable, "DECODED_AT_ONCE", 11)
    monkeypatch.setattr(ImageSet, "read", lambda *_: pytest.fail("it was decoded"))
    assert unreadable(many, whole=True) == {}


def test_the_same_relative_path_elsewhere_is_another_data_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def named(prefix: str, *names: str) -> str:
        paths = PathTable(names or ("a/0.png", "b/0.png"), prefix)
        images = ImageSet("photos", "train", np.array([0, 1]), ("a", "b"), paths)
        return kept.name_of(images)

    found = {}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        found[name] = [named("photos/"), named("", "photos/a", "photos/b")]
        assert found[name][0] == named(f"{tmp_path}/{name}/photos/")
    assert len({*found["one"], *found["two"]}) == 4


def test_without_a_place_to_write_nothing_is_remembered(many, tmp_path, monkeypatch) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    Path(many.paths[3]).write_bytes(b"no picture")
    for _ in range(2):
        assert list(unreadable(many, whole=True)) == [3]


# --- a run ----------------------------------------------------------------------------------------


def cut(file: Path) -> Path:
    file.write_bytes(file.read_bytes()[:60])
    return file


@pytest.mark.parametrize("decode", ["exact", "cache"])
@pytest.mark.parametrize("side", ["eval", "train"])
def test_images_are_named_before_a_run_and_left_out_of_it(
    side: str, decode: str, tmp_path: Path
) -> None:
    images = tiny.write_images(tmp_path / "data")
    bad = cut(sorted(images.glob(f"{side}/*/*.png"))[3])
    flags = ["--dataset", f"folder:{images}", *tiny.NETWORK, "--decode", decode]
    flags += ["--cache-dir", tmp_path / "cache"] if decode == "cache" else []
    dry = run_cli("train.py", *flags, "--dry-run", cwd=tmp_path)
    assert dry.returncode == 0 and dry.stderr.count(f"{bad} cannot be read") == 1, dry.stderr
    told = {"train": "1 for training, others take", "eval": "1 for evaluation, left out"}
    assert told[side] in dry.stdout and not (tmp_path / "logs").exists()
    second = cut(sorted(images.glob(f"{side}/*/*.png"))[9])
    refused = run_cli("train.py", *flags, "--epochs", 1, cwd=tmp_path)
    assert refused.returncode == 2 and refused.stderr.count("error:") == 1, refused.stderr
    for word in (bad, second, "--max-bad-images 0.01 allows 1", "check folder:"):
        assert str(word) in refused.stderr
    assert not (tmp_path / "logs").exists() and "epoch" not in refused.stdout
    advised = refused.stderr.rpartition("--max-bad-images ")[2].strip(" )\n")
    admitted = run_cli("train.py", *flags, "--epochs", 2, "--max-bad-images", advised, cwd=tmp_path)
    assert admitted.returncode == 0, admitted.stderr
    assert admitted.stderr.count(f"{second} cannot be read") == 1, admitted.stderr


def test_a_missing_evaluation_image_is_met_like_a_damaged_one(tmp_path: Path) -> None:
    rows = ["path,label,split"]
    shutil.copytree(tiny.write_images(tmp_path / "data"), tmp_path / "d")
    for file in sorted((tmp_path / "d").rglob("*.png")):
        rows.append(f"{file},{file.parent.name},{'train' if '/train/' in str(file) else 'test'}")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    gone = sorted((tmp_path / "d").glob("eval/*/*.png"))
    gone[4].unlink()
    words = ["--dataset", f"csv:{tmp_path / 'list.csv'}", *tiny.NETWORK, "--epochs", 1]
    done = run_cli("train.py", *words, "--name", "run", cwd=tmp_path)
    assert done.returncode == 0 and f"{gone[4]} cannot be read" in done.stderr, done.stderr
    assert "1 image that cannot be read was left out" in done.stdout
    again = run_cli("evaluate.py", "--resume", "logs/run", cwd=tmp_path)
    assert again.returncode == 0 and "left out" in again.stdout, again.stderr
    strict = run_cli("evaluate.py", "--resume", "logs/run", "--max-bad-images", 0, cwd=tmp_path)
    assert strict.returncode == 2 and "is missing" in strict.stderr


def test_a_class_without_any_readable_image_is_told_before_the_run(tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path / "data")
    for file in (images / "train" / "train2").iterdir():
        cut(file)
    with pytest.raises(InputError, match="no other image of its class can take its place"):
        tiny.prepare(images, "--max-bad-images 0.5")


def test_an_evaluation_of_one_class_is_refused(tmp_path: Path) -> None:
    for name in "0123":
        (tmp_path / f"{name}.png").write_bytes(encoded("PNG"))
    images = image_set(tmp_path, [0, 0, 1, 1])
    cut(tmp_path / "2.png")
    assert readable.require_readable(None, [images], 0.5) == {"train": 0, "eval": 1}
    cut(tmp_path / "3.png")
    with pytest.raises(InputError, match="the images of 1 class can be read, and it needs 2"):
        readable.require_readable(None, [images], 0.5)
    # Queries of one class, and a gallery that has others.
    queries, gallery = (replace(images, split=split) for split in ("query", "gallery"))
    whole = replace(gallery.subset([0, 1]), labels=np.array([0, 1]))
    assert readable.require_readable(None, [queries, whole], 0.5)["eval"] == 2
    nothing = gallery.subset([2, 3])
    with pytest.raises(InputError, match="no gallery image of folder:"):
        readable.require_readable(None, [queries, nothing], 1.0)


def test_evaluate_judges_nothing_by_one_class(tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path / "data", classes=4, images=3, eval_images=1)
    training = tiny.prepare(images, "--batch-size 4 --max-bad-images 1")
    for number in range(3):
        cut(images / "eval" / f"eval{number}" / "0.png")
    with pytest.raises(InputError, match="the images of 1 class can be read"):
        training.evaluate(training.data.test)


# --- what check says ------------------------------------------------------------------------------


def test_check_says_what_becomes_of_each_split_and_its_command_works(tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path / "my photos")
    cut(images / "train" / "train2" / "1.png")
    told = check(f"folder:{images}")
    by_split = {row.split: row for row in told.splits}
    assert "replaces them by other images of their classes" in by_split["train"].outcome
    assert (by_split["eval"].unreadable, by_split["eval"].outcome) == (0, "")
    for number in range(3):
        cut(images / "eval" / "eval1" / f"{number}.png")
    found = check(f"folder:{images}", exif="ignore")
    by_split = {row.split: row for row in found.splits}
    assert by_split["eval"].unreadable == 3
    assert "a run stops before training" in by_split["eval"].outcome
    command = found.commands["train on it"]
    assert f"'folder:{images}'" in command and f"  {command}" in as_text(found).splitlines()
    assert command.endswith("--exif ignore --max-bad-images 0.125")
    shown = subprocess.run(
        ["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True, text=True
    )
    _, _, *words = shown.stdout.split("\0")[:-1]  # as a shell hands them to `python train.py`
    done = run_cli("train.py", *words, *tiny.NETWORK, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0 and "3 for evaluation, left out" in done.stdout, done.stderr
    for file in (images / "train" / "train2").iterdir():
        cut(file)
    found = check(f"folder:{images}")
    (train, _) = found.splits
    assert "of train2 no image is left, so a run stops before training" in train.outcome
    assert not found.commands and "do without them" not in train.outcome


def test_check_names_no_command_where_too_few_classes_are_left(tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path / "data", classes=2, images=2, eval_images=1)
    assert check(f"folder:{images}").commands
    cut(images / "eval" / "eval0" / "0.png")
    found = check(f"folder:{images}")
    assert not found.commands and "too few to be told apart" in found.splits[1].outcome


def test_check_counts_a_box_beside_its_picture_as_unreadable(tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path / "data", classes=2, images=3)
    rows = ["path,label,split,x1,y1,x2,y2"]
    for file in sorted(images.glob("*/*/*.png")):
        beside = "0" if file.name != "1.png" else "500"
        rows.append(f"{file},{file.parent.name},{file.parts[-3]},{beside},0,510,9")
    (tmp_path / "list.csv").write_text("\n".join(rows))
    found = check(f"csv:{tmp_path / 'list.csv'}")
    assert [row.unreadable for row in found.splits] == [2, 2]
    assert found.commands["train on it"].endswith("--max-bad-images 0.3334")


def test_the_advised_share_admits_what_it_is_advised_for() -> None:
    for count in range(1, 130):
        for bad in range(1, count + 1):
            advised = float(f"{share_admitting(bad, count):g}")
            assert bad <= admitted_bad_images(advised, count) <= bad + 1
    assert admitted_bad_images(0.29, 100) == 29


def test_check_names_the_data_root_in_its_commands(tmp_path: Path) -> None:
    root = tmp_path / "a b"
    root.mkdir()
    (command,) = check("cub", root).commands.values()
    assert command == f"python -m dataset download cub --data-root '{root}'"
    images = image_set(root)
    assert replace(images, root=str(root)).check_command.endswith(f"--data-root '{root}'")


# --- the page -------------------------------------------------------------------------------------


def test_the_page_is_made_of_what_can_still_be_read(tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path / "data")
    run = tiny.run(images, tmp_path, "run", "--epochs 1 --loss AMLoss")
    for file in [*(images / "train" / "train2").iterdir(), *(images / "eval" / "eval1").iterdir()]:
        cut(file)
    (images / "eval" / "eval4" / "1.png").unlink()
    page = report.make([run]).read_text()
    assert "4 images that were evaluated cannot be read any more" in page
    assert "The learned margin of each class" in page and '"missing":""' in page
    for file in images.glob("*/*/*.png"):
        cut(file)
    page = report.make([run]).read_text()
    assert "no images of the evaluation" in page and "can be read any more" in page
    shutil.rmtree(images)
    assert '"missing":""' not in report.make([run]).read_text()


def test_a_disk_that_answers_slowly_is_asked_for_many_files_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(640):
        (tmp_path / f"{number}.jpg").write_bytes(b"x" * (number + 1))
    names = [f"{number}.jpg" for number in range(640)]
    labels = np.arange(640) % 2
    images = ImageSet("own", "train", labels, ("a", "b"), PathTable(names, f"{tmp_path}/"))
    ask, asked, together = os.stat, [], []

    def slow(path: str, **more: object) -> os.stat_result:
        asked.append(path)
        together.append(len(asked))
        time.sleep(0.005)
        asked.remove(path)
        return ask(path, **more)

    monkeypatch.setattr(os, "stat", slow)
    for look in (
        images.missing,
        images.fingerprint,
        images.content_fingerprint,
        lambda: versions_of(images),
        lambda: shared_with_training(images, images.subset([3])),
    ):
        together.clear()
        found = look()
        assert max(together) > 4
    assert found.images == 1
    assert versions_of(images)["size"].tolist() == list(range(1, 641))


def test_a_disk_that_answers_at_once_is_asked_without_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They only waited for each other, and took more than twice as long."""
    monkeypatch.setattr(statuses, "ThreadPoolExecutor", lambda _: pytest.fail("threads"))
    monkeypatch.setattr(statuses, "_WAITS", 1.0)  # seconds: nothing on this disk takes so long
    for number in range(640):
        (tmp_path / f"{number}.jpg").write_bytes(b"x" * (number + 1))
    names = [f"{number}.jpg" for number in range(640)]
    found = statuses.statuses(PathTable(names, f"{tmp_path}/"))
    assert found["size"].tolist() == list(range(1, 641))


def test_a_file_of_a_broken_clock_has_a_time(tmp_path: Path) -> None:
    file, found = tmp_path / "a.jpg", []
    file.touch()
    for seconds in (-(10**9), 10**10, 12 * 10**9):  # after the year 2262 int64 has too few bits
        os.utime(file, ns=(0, seconds * 10**9))
        found.append(statuses.statuses([str(file)])["time"].item())
    assert found[0] == -(10**18) and len(set(found)) == 3


def test_a_first_look_at_very_many_files_is_told(
    many: ImageSet, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(readable, "MANY", len(many))
    told = f"looking at the files of {len(many):,} evaluation images once, to check them"
    for expected in ([told], []):
        caplog.clear()
        unreadable(many, whole=False)
        assert [record.message for record in caplog.records] == expected


def test_a_start_asks_once_for_each_file_and_a_look_of_its_own_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it trains, and for the fingerprints that the run keeps: not five times.

    Each time who opens the file, for a first look or for what it holds, asks once more.
    """
    images = tiny.write_images(tmp_path / "images")
    ask, asked = os.stat, Counter()

    def noted(path: str | Path, **more: object) -> os.stat_result:
        asked[str(path)] += 1
        return ask(path, **more)

    monkeypatch.setattr(os, "stat", noted)
    begun: list[Training] = []

    def stop(args: object, run: object, training: Training, state: object) -> NoReturn:
        begun.append(training)
        raise SystemExit

    monkeypatch.setattr(start, "open_tracker", stop)
    with pytest.raises(SystemExit):
        train.main(tiny.parse(images, f"--LOG_DIR {tmp_path} --name run"))
    first = begun[0].data.train
    assert {asked[path] for path in first.paths} == {1 + 2}
    assert first.missing() == []  # outside the start: asked for as it is now
    Path(first.paths[0]).unlink()
    assert first.missing() == [first.paths[0]]
    with statuses.asked_once():
        assert first.missing() == [first.paths[0]]
        Path(first.paths[1]).unlink()
        assert versions_of(first, known=True)["size"][1] > 0
        assert versions_of(first)["size"].tolist()[:2] == [-1, -1]


def test_what_waits_to_be_examined_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A future takes a kilobyte: a million of them, one for each file, took over a gigabyte."""
    put, submitted = ThreadPoolExecutor.submit, []

    def noted(pool: ThreadPoolExecutor, *work: object) -> object:
        submitted.append(1)
        return put(pool, *work)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", noted)
    monkeypatch.setattr(facts, "examine", lambda path, upright: facts.FileFacts(path.encode()))
    paths = PathTable((f"{number}.jpg" for number in range(3000)), "photos/")
    images = ImageSet("own", "train", np.arange(3000) % 2, ("a", "b"), paths)
    found = facts.examine_all({"train": images}, "")
    assert [fact.digest.decode() for fact in found.values()] == list(found) == list(paths)
    assert len(submitted) < 200
