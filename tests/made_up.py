"""Embeddings that are drawn, for tests of what is computed from them."""

from __future__ import annotations

import numpy as np


def clusters(
    classes: int, images: int, size: int, seed: int = 0, spread: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (N, size) around a centre for each class, and labels (N,), in a random order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(classes), images))
    centres = rng.normal(size=(classes, size))
    return centres[labels] + spread * rng.normal(size=(len(labels), size)), labels
