"""Near duplicates: what the same picture becomes on its way, and pictures that only look alike."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

import dataset
from dataset import alike, facts, findings
from dataset.alike import hashes, near_duplicates, thumbnail
from dataset.check import check
from dataset.showing import as_text

COUNT = 40


def photograph(seed: int, side: int = 320) -> Image.Image:
    """Light and dark areas of all sizes, as photographs have, in colours of its own."""
    rng = np.random.default_rng(seed)
    total = np.zeros((side * 3 // 4, side, 3))
    for cells in (2, 4, 8, 16, 32, 64):
        noise = Image.fromarray((rng.random((cells, cells, 3)) * 255).astype(np.uint8))
        layer = noise.resize((side, side * 3 // 4), Image.Resampling.BICUBIC)
        total += (np.asarray(layer, float) - 128) / cells**0.6
    total = 128 + total * 55 / total.std()
    return Image.fromarray(total.clip(0, 255).astype(np.uint8))


def recompressed(image: Image.Image, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=quality)
    return Image.open(file).convert("RGB")


def cropped(image: Image.Image, share: float) -> Image.Image:
    width, height = image.size
    return image.crop((int(share * width), 0, width, int((1 - share) * height)))


CHANGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "halved": lambda image: image.resize((160, 120), Image.Resampling.BICUBIC),
    "recompressed": lambda image: recompressed(image, 20),
    "cropped": lambda image: cropped(image, 0.05),
    "darker": lambda image: ImageEnhance.Brightness(image).enhance(0.7),
    "less contrast": lambda image: ImageEnhance.Contrast(image).enhance(0.7),
    "all of it": lambda image: recompressed(
        ImageEnhance.Brightness(cropped(image, 0.04).resize((150, 110))).enhance(0.85), 50
    ),
}


def thumbnails(images: list[Image.Image]) -> np.ndarray:
    return np.stack([thumbnail(np.asarray(image)) for image in images])


@pytest.fixture(scope="module")
def photographs() -> list[Image.Image]:
    return [photograph(seed) for seed in range(COUNT)]


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found(change: str, photographs) -> None:
    changed = thumbnails([CHANGES[change](image) for image in photographs])
    pairs = near_duplicates(changed, thumbnails(photographs))
    assert all(pair.first == pair.second for pair in pairs)
    assert len(pairs) >= 0.9 * COUNT, len(pairs)


def test_other_photographs_are_none(photographs) -> None:
    others = thumbnails([photograph(seed) for seed in range(COUNT, 2 * COUNT)])
    assert near_duplicates(others, thumbnails(photographs)) == []


def drawing(colour: tuple[int, int, int], shape: str, side: int = 200) -> Image.Image:
    """A product on white."""
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    box = (50, 40, 150, 170)
    getattr(draw, shape)(box, fill=colour)
    draw.rectangle((80, 80, 120, 110), fill=tuple(255 - c for c in colour))
    return image


def test_products_on_white_that_differ_in_colour_or_shape_are_none() -> None:
    red, blue, green = (200, 40, 40), (40, 60, 200), (40, 170, 60)
    first = thumbnails([drawing(red, "rectangle"), drawing(blue, "ellipse")])
    second = thumbnails([drawing(blue, "rectangle"), drawing(green, "ellipse")])
    assert near_duplicates(first, second) == []
    again = thumbnails([recompressed(drawing(red, "rectangle"), 30)])
    assert [(p.first, p.second) for p in near_duplicates(again, first)] == [(0, 0)]


def test_pictures_that_show_nothing_are_no_duplicates() -> None:
    blank = np.full((3, alike.SIDE, alike.SIDE, 3), 255, np.uint8)
    blank[1, 0, 0] = 250
    assert near_duplicates(blank, blank) == []
    assert near_duplicates(blank[:0], blank) == [] == near_duplicates(blank, blank[:0])
    colours = np.random.default_rng(0).integers(0, 256, (40, 1, 1, 3), np.uint8)
    plain = np.broadcast_to(colours, (40, alike.SIDE, alike.SIDE, 3))
    assert near_duplicates(plain[:20], plain[20:]) == []


def test_the_hash_changes_little_with_the_picture(photographs) -> None:
    one = hashes(thumbnails(photographs))
    changed = hashes(thumbnails([CHANGES["all of it"](image) for image in photographs]))
    assert np.bitwise_count(one ^ changed).max() <= alike.BITS
    different = np.bitwise_count(one[:, None] ^ one[None, :])
    assert 25 < different[~np.eye(COUNT, dtype=bool)].mean() < 38  # of 63


def test_an_older_numpy_finds_the_same(photographs, monkeypatch) -> None:
    sides = thumbnails([CHANGES["cropped"](i) for i in photographs[:8]]), thumbnails(photographs)
    found = near_duplicates(*sides)
    monkeypatch.delattr(np, "bitwise_count", raising=False)
    assert near_duplicates(*sides) == found and len(found) == 8


def test_of_too_many_candidates_the_most_alike_are_looked_at(photographs, monkeypatch) -> None:
    monkeypatch.setattr(alike, "REGISTERED", 3)
    changed = [CHANGES["halved"](photographs[0]), *map(CHANGES["cropped"], photographs[1:4])]
    pairs = near_duplicates(thumbnails(changed), thumbnails(photographs))
    assert len(pairs) == 3 and pairs[0][:2] == (0, 0)


def test_check_notes_them_beside_exact_ones(photographs, tmp_path: Path, monkeypatch) -> None:
    for number, image in enumerate(photographs[:16]):
        folder = tmp_path / ("train" if number < 8 else "eval") / f"class{number // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"{number}.png")
    CHANGES["all of it"](photographs[1]).save(tmp_path / "eval" / "class5" / "again.jpg")
    report = check(f"folder:{tmp_path}")
    (note,) = report.findings
    assert report.status == "clean" and note.kind == "near duplicate across train and test"
    assert note.examples == ["eval/class5/again.jpg ~ train/class0/1.png"]
    assert "size" in as_text(report)
    photographs[2].save(tmp_path / "eval" / "class6" / "same.png")
    kinds = {finding.kind: finding.count for finding in check(f"folder:{tmp_path}").findings}
    assert kinds["exact duplicate across train and test"] == 1
    assert kinds["near duplicate across train and test"] == 1  # not once more among these
    for module in (facts, findings):
        monkeypatch.setattr(module, "MOST_COMPARED", 17)
    many = [finding.sentence() for finding in check(f"folder:{tmp_path}").findings]
    assert "near duplicates are searched among 17 images at most, and there are 18" in many
    examined = facts.examine_all({"train": dataset.load(f"folder:{tmp_path}")}, "")
    assert all(fact.thumbnail is not None for fact in examined.values())
    monkeypatch.setattr(facts, "MOST_COMPARED", 7)  # of so many they would fill the memory
    examined = facts.examine_all({"train": dataset.load(f"folder:{tmp_path}")}, "")
    assert all(fact.thumbnail is None for fact in examined.values())
