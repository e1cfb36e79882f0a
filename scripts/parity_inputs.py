"""The inputs with which training loops are compared: weights, batches and random draws.

All are functions of names and numbers, so that the fixtures only contain results. Nothing of the
project is imported, so that a released loop can have the same inputs (tests/fixtures/loops).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

EPOCHS = 6
STEPS = 4  # per epoch
CLASSES = 8
IMAGES = 4  # per class
SIDE = 64  # pixels
STARTS = {"criterion.margins": 0.1, "criterion.beta": float(np.float32(1.2)), "masks.0": 1.0}


def weight(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """The initial tensor for a released key of a network or a loss, float64.

    Margins, boundaries and masks have their authors' initial values.
    """
    return np.full(shape, STARTS[key]) if key in STARTS else rebuilt(key, shape)


def rebuilt(key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A weight rebuilt from its key as in the README of the fixtures, to float32's precision."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    if key.endswith("num_batches_tracked"):
        return np.zeros(shape)
    if key.endswith("running_var"):
        values = rng.uniform(0.5, 1.5, shape)
    elif key.endswith(("running_mean", "bias")):
        values = 0.1 * rng.standard_normal(shape)
    elif len(shape) == 1:
        values = rng.uniform(0.5, 1.5, shape)
    else:
        values = rng.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:]))
    return values.astype(np.float32).astype(np.float64)


class Given(NamedTuple):
    """A batch: images (B, 3, S, S) float64, normalised; labels and positions (B,)."""

    images: np.ndarray
    labels: np.ndarray
    index: np.ndarray


def shuffled(epoch: int) -> Iterator[Given]:
    """The batches of an epoch with every image once: eight images each."""
    order = np.random.default_rng([1, epoch]).permutation(CLASSES * IMAGES)
    for step, index in enumerate(np.split(order, STEPS)):
        yield batch(epoch, step, index)


def balanced(instances: int, epoch: int) -> Iterator[Given]:
    """The batches of an epoch, with four classes and `instances` images of each."""
    for step in range(STEPS):
        rng = np.random.default_rng([2, epoch, step])
        classes = rng.permutation(CLASSES)[:4]
        within = np.stack([rng.permutation(IMAGES)[:instances] for _ in classes])
        yield batch(epoch, step, (IMAGES * classes[:, None] + within).ravel())


def batch(epoch: int, step: int, index: np.ndarray) -> Given:
    """Images at these positions: a pattern of their class, with new noise in each step."""
    labels = index // IMAGES
    patterns = np.random.default_rng(3).standard_normal((CLASSES, 3, SIDE, SIDE))
    noise = np.random.default_rng([4, epoch, step]).standard_normal((len(index), 3, SIDE, SIDE))
    return Given(0.5 * patterns[labels] + noise, labels, index)


def seed(epoch: int, step: int) -> int:
    """The seed of random generators before a step."""
    return 1000 * epoch + step


def share(epoch: int, step: int) -> float:
    """The share of an image in its mixture with another one."""
    return float(np.random.default_rng([5, epoch, step]).uniform())
