"""A folder of small generated images, and a few of the embedded drawings.

Loads none of our modules, so that scripts can use it too.
"""

from __future__ import annotations

import json
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


def write_drawings(root: Path, share: int = 10) -> Path:
    """Writes every tenth class of the embedded data as a data set under `root`; returns `root`.

    All of it takes a second to decode, in each process that reads it.
    """
    name = Path("emoji", "emoji_retrieval.npz")
    with np.load(Path(__file__).resolve().parent.parent / "data" / name) as file:
        whole = dict(file)
    meta = json.loads(whole["meta"].tobytes())
    chosen = np.flatnonzero(whole["label"] % share == 0)
    blob, offset = whole["blob"].tobytes(), whole["offset"]
    files = [blob[offset[i] : offset[i + 1]] for i in chosen]
    meta["classes"] = meta["classes"][::share]
    (root / name).parent.mkdir(parents=True)
    np.savez(
        root / name,
        blob=np.frombuffer(b"".join(files), np.uint8),
        offset=np.cumsum([0, *map(len, files)]),
        label=whole["label"][chosen] // share,
        set=whole["set"][chosen],
        meta=np.frombuffer(json.dumps(meta).encode(), np.uint8),
    )
    return root
