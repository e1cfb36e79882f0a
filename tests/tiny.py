"""A data set and a network so small that train.py's own functions run in a fraction of a second."""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path
from typing import Any

import torch
from small_images import write_images  # noqa: F401 (others take it from here)

import options
import train
from training.tracking import TIMES

NETWORK = (
    "--model resnet10 --width 0.125 --stem small --embedding-size 8 --image-size 32 "
    "--pretrained none --batch-size 12 --workers 0 --wandb disabled --no-report"
).split()


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


def edit(file: Path, **changes: Any) -> None:
    """Changes entries of a run's JSON file by hand, as somebody may who accepts it unchecked."""
    (file.parent / "checksums.json").unlink(missing_ok=True)
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def metrics_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv."""
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def untimed_rows(folder: Path) -> list[dict[str, str]]:
    """The rows of metrics.csv without what is measured in seconds."""
    return [{k: v for k, v in row.items() if k not in TIMES} for row in metrics_rows(folder)]


def best_checkpoint(folder: Path) -> Path:
    """The file of a run's best checkpoint."""
    (file,) = folder.glob("*_best.pth")
    return file


def saved(folder: Path, what: str = "last") -> dict[str, Any]:
    """The content of a run's `last` or `best` checkpoint."""
    path = best_checkpoint(folder) if what == "best" else folder / "last.pth"
    return torch.load(path, weights_only=True)


def same(first: object, second: object) -> bool:
    """Equality of nested dictionaries and lists of tensors, bit by bit."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first.nan_to_num(), second.nan_to_num())
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second
