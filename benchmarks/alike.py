"""The share of changed copies that the search for near duplicates finds, and its time.

    python benchmarks/alike.py FOLDER [--copies 300] [--times 60000]

FOLDER holds photographs, all different, in any arrangement. Prints the shares in docs/data.md.
"""

from __future__ import annotations

import argparse
import io
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageEnhance

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import dataset
from dataset.alike import near_duplicates, thumbnail
from dataset.tree import tree

Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def scaled(share: float) -> Change:
    """Scales an image to this share of its width and height."""

    def change(image: Image.Image, _: np.random.Generator) -> Image.Image:
        size = tuple(max(1, round(side * share)) for side in image.size)
        return image.resize(size, Image.Resampling.BICUBIC)

    return change


def compressed(quality: int) -> Change:
    """Saves an image as JPEG."""

    def change(image: Image.Image, _: np.random.Generator) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return change


def cropped(most: float) -> Change:
    """Crops each side of an image by a random share of up to `most`."""

    def change(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        (width, height), (left, top, right, bottom) = image.size, rng.uniform(0, most, 4)
        box = (left * width, top * height, width - right * width, height - bottom * height)
        return image.crop(tuple(int(side) for side in box))

    return change


def enhanced(kind: type, factor: float) -> Change:
    """Changes an image with one of Pillow's enhancers, of brightness or contrast."""
    return lambda image, _: kind(image).enhance(factor)


def several(*changes: Change) -> Change:
    """Applies several changes in turn."""

    def change(image: Image.Image, rng: np.random.Generator) -> Image.Image:
        for each in changes:
            image = each(image, rng)
        return image

    return change


CHANGES: dict[str, Change] = {
    "half the size": scaled(0.5),
    "a quarter": scaled(0.25),
    "JPEG quality 30": compressed(30),
    "JPEG quality 10": compressed(10),
    "cropped by up to 3 %": cropped(0.03),
    "cropped by up to 5 %": cropped(0.05),
    "cropped by up to 10 %": cropped(0.10),
    "brightness x 0.7": enhanced(ImageEnhance.Brightness, 0.7),
    "brightness x 1.3": enhanced(ImageEnhance.Brightness, 1.3),
    "contrast x 0.7": enhanced(ImageEnhance.Contrast, 0.7),
    "half, quality 50, cropped 5 %, brightness x 1.2": several(
        cropped(0.05), scaled(0.5), enhanced(ImageEnhance.Brightness, 1.2), compressed(50)
    ),
    "made grey": lambda image, _: image.convert("L").convert("RGB"),
    "mirrored": lambda image, _: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
}


def main() -> None:
    """Prints one line per change, the false alarms, and the time."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--copies", type=int, default=300, help="photographs that are changed")
    parser.add_argument("--times", type=int, default=60_000, help="images on each side, timed")
    args = parser.parse_args()
    found = tree(args.folder)
    photographs = [Image.open(found.folder / name).convert("RGB") for name in found.pictures]
    known = np.stack([thumbnail(np.asarray(image)) for image in photographs])
    rng = np.random.default_rng(0)
    for name, change in CHANGES.items():
        changed = [change(image, rng) for image in photographs[: args.copies]]
        pairs = near_duplicates(np.stack([thumbnail(np.asarray(c)) for c in changed]), known)
        right = sum(pair.first == pair.second for pair in pairs)
        print(f"{name:48}{right / len(changed):7.1%} found, {len(pairs) - right} wrong", flush=True)
    half = len(known) // 2
    print(f"different photographs: {len(near_duplicates(known[:half], known[half:]))} of {half}")
    sides = [dataset.load("emoji", split=split).pixels for split in ("eval", "train")]
    emoji = [np.stack([thumbnail(pixels) for pixels in side]) for side in sides]
    print(f"emoji: {len(near_duplicates(*emoji))} of {len(emoji[0]):,}")
    both = parts(photographs, 2 * args.times, rng)
    start = time.perf_counter()
    pairs = near_duplicates(both[: args.times], both[args.times :])
    seconds = time.perf_counter() - start
    print(f"{args.times:,} against {args.times:,} parts of photographs: {seconds:.0f} s")


def parts(photographs: list[Image.Image], count: int, rng: np.random.Generator) -> np.ndarray:
    """Thumbnails of random parts of photographs, half to a quarter of their side."""
    small = [np.asarray(image.resize((160, 160))) for image in photographs]
    made = np.empty((count, 32, 32, 3), np.uint8)
    for number in range(count):
        side = int(rng.integers(40, 81))
        top, left = rng.integers(0, 160 - side, 2)
        where = np.linspace(0, side - 1, 32).astype(int)
        made[number] = small[number % len(small)][top + where][:, left + where]
    return made


if __name__ == "__main__":
    main()
