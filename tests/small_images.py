"""A folder of small generated images; loads none of our modules, so that scripts can use it too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

COLOURS = ((60, 60, 60), (200, 200, 200), (200, 60, 60), (60, 60, 200))


def write_images(root: Path, classes: int = 8, images: int = 6, eval_images: int = 3) -> Path:
    """Writes train/ and eval/, a folder per class, under `root`; returns `root`.

    Classes 2g and 2g + 1 are noise around colour g, one of four; so the images fall into four
    clusters of two classes each.
    """
    rng = np.random.default_rng(0)
    for split, count in (("train", images), ("eval", eval_images)):
        for c in range(classes):
            colour = np.array(COLOURS[c // 2 % 4]) + (10 if c % 2 else -10)
            (root / split / f"{split}{c}").mkdir(parents=True)
            for k in range(count):
                coarse = colour + rng.normal(0, 30, (5, 5, 3))
                image = Image.fromarray(coarse.clip(0, 255).astype(np.uint8))
                image.resize((40, 36), Image.Resampling.BICUBIC).save(
                    root / split / f"{split}{c}" / f"{k}.png"
                )
    return root
