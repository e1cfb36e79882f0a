"""Makes artificial photographs of products, a folder for each, to try out `folder:`.

    python benchmarks/photos.py photos --products 72 --images 8

A product is a silhouette with a few colours, a pattern and a label. Families of products share the
silhouette, so that some differ only in colours or print. Each photograph shows the product turned,
tilted and cut off a little, on another background, in another light, with noise and blur, as JPEG.
"""

from __future__ import annotations

import argparse
import colorsys
import math
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIDE = 480  # of the canvas a product is drawn on
FAMILY = 4  # products that share a silhouette
PATTERNS = ("plain", "stripes", "bands", "dots", "checks", "halves")
LABELS = ("none", "disc", "plate", "bars", "star")

Colour = tuple[int, int, int]


class Product(NamedTuple):
    """The properties that are the same in all photographs of a product."""

    outline: list[tuple[float, float]]
    colours: list[Colour]
    pattern: str
    pitch: int
    label: str
    label_place: tuple[float, float]
    label_size: float


def product(number: int, seed: int = 0) -> Product:
    """Product `number`, reproducibly."""
    family = np.random.default_rng([seed, 1, number // FAMILY])
    own = np.random.default_rng([seed, 2, number])
    return Product(
        outline=_outline(family),
        colours=[_colour(own) for _ in range(3)],
        pattern=str(own.choice(PATTERNS)),
        pitch=int(own.integers(24, 80)),
        label=str(own.choice(LABELS)),
        label_place=(float(own.uniform(0.35, 0.65)), float(own.uniform(0.35, 0.75))),
        label_size=float(own.uniform(0.12, 0.24)),
    )


def _outline(rng: np.random.Generator) -> list[tuple[float, float]]:
    """A symmetric silhouette, like that of a bottle, or a rounded box."""
    heights = np.linspace(0.06, 0.94, 40)
    if rng.random() < 0.3:  # a box: a superellipse
        power, across = rng.uniform(2.5, 8), rng.uniform(0.25, 0.44)
        half = across * (1 - np.abs(2 * heights - 1) ** power) ** (1 / power)
    else:
        knots = rng.uniform(0.10, 0.42, 5)
        half = np.interp(heights, np.linspace(0.06, 0.94, 5), knots)
        if rng.random() < 0.6:
            half = np.convolve(np.pad(half, 3, mode="edge"), np.ones(7) / 7, mode="valid")
    right = [(0.5 + w, h) for w, h in zip(half, heights, strict=True)]
    left = [(0.5 - w, h) for w, h in zip(half[::-1], heights[::-1], strict=True)]
    return [(x * SIDE, y * SIDE) for x, y in right + left]


def _colour(rng: np.random.Generator) -> Colour:
    rgb = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0.1, 0.95), rng.uniform(0.2, 1.0))
    return tuple(round(255 * value) for value in rgb)


def drawn(thing: Product) -> Image.Image:
    """The product on a transparent background: RGBA, SIDE pixels square."""
    surface = Image.new("RGB", (SIDE, SIDE), thing.colours[0])
    draw = ImageDraw.Draw(surface)
    second, step = thing.colours[1], thing.pitch
    for place in range(0, SIDE, 2 * step):
        match thing.pattern:
            case "stripes":
                draw.rectangle((place, 0, place + step, SIDE), fill=second)
            case "bands":
                draw.rectangle((0, place, SIDE, place + step), fill=second)
            case "dots" | "checks":
                shape = draw.ellipse if thing.pattern == "dots" else draw.rectangle
                for other in range(0, SIDE, 2 * step):
                    shape((place, other, place + step, other + step), fill=second)
    if thing.pattern == "halves":
        draw.rectangle((0, SIDE // 2, SIDE, SIDE), fill=second)
    _label(draw, thing)
    mask = Image.new("L", (SIDE, SIDE))
    ImageDraw.Draw(mask).polygon(thing.outline, fill=255)
    # Darker towards the edges, as round things are.
    distance = np.abs(np.linspace(-1, 1, SIDE))[None, :]
    shade = 1 - 0.45 * distance**2
    pixels = (np.asarray(surface) * shade[..., None]).astype(np.uint8)
    made = Image.fromarray(pixels).convert("RGBA")
    made.putalpha(mask)
    return made


def _label(draw: ImageDraw.ImageDraw, thing: Product) -> None:
    x, y = (SIDE * place for place in thing.label_place)
    size, fill = SIDE * thing.label_size, thing.colours[2]
    match thing.label:
        case "disc":
            draw.ellipse((x - size / 2, y - size / 2, x + size / 2, y + size / 2), fill=fill)
        case "plate":
            draw.rectangle((x - size, y - size / 2, x + size, y + size / 2), fill=fill)
        case "bars":
            for row in range(3):
                top = y + (row - 1) * size / 2
                draw.rectangle((x - size, top, x + size * (1 - row / 3), top + size / 5), fill=fill)
        case "star":
            turns = [math.pi * k / 5 for k in range(10)]
            reach = [size * (0.7 if k % 2 == 0 else 0.3) for k in range(10)]
            points = zip(turns, reach, strict=True)
            draw.polygon([(x + r * math.sin(t), y - r * math.cos(t)) for t, r in points], fill=fill)


# --- the photograph -------------------------------------------------------------------------------


def photograph(thing: Product, rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A picture of the product, `size` is (width, height)."""
    width, height = size
    scene = _background(rng, size)
    side = round(min(size) * rng.uniform(0.5, 1.05))
    shown = drawn(thing).resize((side, side), Image.Resampling.BILINEAR)
    shown = shown.transform(
        (side, side), Image.Transform.QUAD, _tilted(rng, side), Image.Resampling.BILINEAR
    )
    shown = shown.rotate(rng.normal(0, 14), Image.Resampling.BILINEAR, expand=True)
    x = round(width / 2 - shown.width / 2 + rng.normal(0, 0.09) * width)
    y = round(height / 2 - shown.height / 2 + rng.normal(0, 0.07) * height)
    shadow = Image.new("RGBA", shown.size, (0, 0, 0, 0))
    shadow.putalpha(shown.getchannel("A").point(lambda value: value // 3))
    scene.paste(shadow, (x + side // 16, y + side // 20), shadow)
    scene.paste(shown, (x, y), shown)
    if rng.random() < 0.25:  # something stands in front
        _clutter(ImageDraw.Draw(scene), rng, size, 1, 0.12)
    return _lit(scene, rng)


def _tilted(rng: np.random.Generator, side: int) -> tuple[float, ...]:
    corners = [(0, 0), (0, side), (side, side), (side, 0)]
    return tuple(v + rng.normal(0, 0.05) * side for corner in corners for v in corner)


def _background(rng: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A gradient or a texture, and often other things."""
    width, height = size
    first, second = (np.array(_colour(rng), np.float32) for _ in range(2))
    if rng.random() < 0.3:
        first = second = np.full(3, rng.uniform(200, 255), np.float32)  # a studio's white
    cells = int(rng.integers(2, 24))
    coarse = rng.random((cells, cells, 1)) * 0.8
    pixels = first + (second - first) * coarse + rng.normal(0, 12, (cells, cells, 3))
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    scene = image.resize((width, height), Image.Resampling.BICUBIC)
    if rng.random() < 0.6:
        _clutter(ImageDraw.Draw(scene), rng, size, int(rng.integers(1, 7)), 0.3)
    return scene.filter(ImageFilter.GaussianBlur(rng.uniform(0, 5)))


def _clutter(
    draw: ImageDraw.ImageDraw,
    rng: np.random.Generator,
    size: tuple[int, int],
    count: int,
    most: float,
) -> None:
    width, height = size
    for _ in range(count):
        w, h = rng.uniform(0.05, most, 2) * min(size)
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x - w, y - h, x + w, y + h), fill=_colour(rng))


def _lit(scene: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The scene in another light: brightness from one side to the other, warmth, blur, noise."""
    pixels = np.asarray(scene, np.float32) / 255
    height, width = pixels.shape[:2]
    across = np.linspace(-1, 1, width)[None, :] * rng.normal(0, 0.15)
    down = np.linspace(-1, 1, height)[:, None] * rng.normal(0, 0.15)
    light = rng.uniform(0.6, 1.15) * (1 + across + down)
    warmth = 1 + rng.normal(0, 0.07) * np.array([1, 0, -1])
    pixels = (pixels * light[..., None] * warmth).clip(0, 1) ** rng.uniform(0.8, 1.25)
    pixels += rng.normal(0, rng.uniform(0.005, 0.03), pixels.shape)
    made = Image.fromarray((pixels.clip(0, 1) * 255).astype(np.uint8))
    return made.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.8)))


# --- files ----------------------------------------------------------------------------------------


def _write(job: tuple[int, int], root: Path, size: tuple[int, int], seed: int) -> None:
    number, count = job
    folder = root / f"product {number:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    for view in range(count):
        rng = np.random.default_rng([seed, 3, number, view])
        image = photograph(product(number, seed), rng, size)
        image.save(folder / f"IMG_{view:04d}.jpg", quality=int(rng.integers(75, 95)))


def write(
    root: Path,
    counts: list[int],
    size: tuple[int, int] = (800, 600),
    seed: int = 0,
    workers: int = 1,
) -> Path:
    """Writes `counts[i]` photographs of product i, a folder each, under `root`; returns it."""
    job = partial(_write, root=root, size=size, seed=seed)
    if workers > 1:
        with ProcessPoolExecutor(workers) as pool:
            list(pool.map(job, enumerate(counts)))
    else:
        for each in enumerate(counts):
            job(each)
    return root


def counts_of(products: int, images: int, uneven: bool, seed: int = 0) -> list[int]:
    """The number of photographs of each product: equal, or few for most and many for some."""
    if not uneven:
        return [images] * products
    share = np.random.default_rng([seed, 4]).lognormal(0, 0.6, products)
    return np.maximum(2, np.round(share / share.sum() * images * products)).astype(int).tolist()


def main() -> None:
    """Writes the folders that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("root", type=Path)
    parser.add_argument("--products", type=int, default=72)
    parser.add_argument("--images", type=int, default=8, help="of each product")
    parser.add_argument("--uneven", action="store_true", help="of some more, of others fewer")
    parser.add_argument("--size", type=int, nargs=2, default=(800, 600), metavar=("W", "H"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    counts = counts_of(args.products, args.images, args.uneven, args.seed)
    write(args.root, counts, tuple(args.size), args.seed, args.workers)
    print(f"{sum(counts)} photographs of {len(counts)} products in {args.root}")


if __name__ == "__main__":
    main()
