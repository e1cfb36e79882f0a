"""A data set and a network so small that train.py's own functions run in a fraction of a second."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import numpy as np
from PIL import Image

import options
import train

NETWORK = (
    "--model resnet10 --width 0.125 --stem small --embedding-size 8 --image-size 32 "
    "--pretrained none --batch-size 12 --workers 0 --wandb disabled --no-report"
).split()

COLOURS = ((60, 60, 60), (200, 200, 200), (200, 60, 60), (60, 60, 200))


def write_images(root: Path, classes: int = 8, images: int = 6, eval_images: int = 3) -> Path:
    """A folder with train/ and eval/. Classes 2g and 2g + 1 are noise around colour g, one of four;
    so the images fall into four clusters of two classes each."""
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


def parse(root: Path, flags: str = "") -> argparse.Namespace:
    """The options of a run on the images under `root`."""
    return options.parse_train(["--dataset", f"folder:{root}", *NETWORK, *flags.split()])


def prepare(root: Path, flags: str = "") -> train.Training:
    """All that a run needs, before its first step."""
    return train.prepare(parse(root, flags))


def run(root: Path, logs: Path, name: str, flags: str = "") -> Path:
    """Trains; returns the run folder."""
    train.main(parse(root, f"{flags} --LOG_DIR {logs} --name {name}"))
    return logs / name


def resume(folder: Path, flags: str) -> None:
    """Continues a run as `train.py --resume-run FOLDER FLAGS` does."""
    train.main(options.parse_train(["--resume-run", str(folder), *flags.split()]))


def metrics_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))
