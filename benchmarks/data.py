"""Images per second from JPEG files to normalised batches, in one table.

    python benchmarks/data.py                        # 4,000 training images, medians of 3
    python benchmarks/data.py --images 400 --memory-images 2000 --repeats 1      # does it run?

Four ways of feeding a network with 224-pixel random crops of 500×375 photographs (generated, in the
folders of CUB-200-2011), a worker a core: (a) the pipeline as the published codes write it, (b)
`--decode exact`, (c) `--decode cache`, (d) the same with `--data-device cuda`, where there is a GPU.
Each round runs a whole epoch of every way, workers' start included, so that a drift of the machine
meets all of them; the table has the medians. The files are read once before, so the disk does not
count. Below the table: what a worker's memory grows by while it reads many images, and on a GPU
what share of a ResNet-18's training (bf16) is spent waiting for (d).
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import dataset
import net
from dataset.base import ImageSet, PathTable
from dataset.cache import open_cache
from dataset.loader import Loader, eval_loader, train_loader
from dataset.samplers import make_sampler
from utils import device_name

SPEC = net.INPUTS["imagenet"]
CLASSES = 200

# --- the photographs ------------------------------------------------------------------------------


def make_photographs(folder: Path, images: int) -> None:
    """As many training images, and as many of the held-out classes, as in CUB-200-2011's folders.

    Each is a window of a canvas whose spectrum falls as 1/frequency, as that of photographs does;
    a file has about 50 kB.
    """
    canvas = _canvas(1600)
    work = [(folder, name, min(100, 2 * images - name * 100)) for name in range(-(-images // 50))]
    with multiprocessing.Pool(initializer=_share_canvas, initargs=(canvas,)) as pool:
        pool.map(_write_files, [(folder, first, 2 * images) for first, *_ in _starts(work)])


def _starts(work: list) -> list:
    return [(number * 100, *rest) for number, (*rest,) in enumerate(work)]
