"""Whether a network has collapsed: it gives all classes nearly the same embedding."""

from __future__ import annotations

import logging

import torch
import torch.nn.functional as F
from torch import Tensor

logger = logging.getLogger("train")

COLLAPSED = 0.98  # mean cosine between class means above which classes look all alike
ROUNDING = 1e-6  # components of unit vectors of equal images differ by this much in float32
FOUND = 10  # with R@1 above this multiple of chance, a network does tell classes apart


class CollapseWarning:
    """Warns once when a network gives all classes the same embedding."""

    def __init__(self) -> None:
        self.said = False
        self._before: float | None = None

    def look(self, embeddings: Tensor, labels: Tensor, recall: float) -> None:
        """Looks at embeddings (N, d), labels (N,) and R@1 of an evaluation.

        Embeddings that are all zero, or all the same, have collapsed whatever R@1 is. Directions
        that lie close together are common at the beginning. They count as a collapse only if R@1 is
        not far above chance, and has not risen since the evaluation before.
        """
        before, self._before = self._before, recall
        if self.said:
            return
        seen = without_difference(embeddings)
        rises = before is None or recall > before
        if not seen and not rises and recall <= FOUND * chance(labels):
            cosine = class_mean_cosine(embeddings, labels)
            if cosine > COLLAPSED:
                seen = (
                    f"the mean cosine between classes is {cosine:.3f}, so it gives all of them "
                    "nearly the same embedding"
                )
        if seen:
            self.said = True
            logger.warning(
                "the network has collapsed: %s; lower --lr, or give a pair loss more classes per "
                "batch (--IPC)",
                seen,
            )


def chance(labels: Tensor) -> float:
    """R@1 of random embeddings: the share of pairs (N,) that are of one class."""
    counts = torch.bincount(labels).double()
    pairs = max(1, len(labels) * (len(labels) - 1))
    return float((counts * (counts - 1)).sum() / pairs)


def without_difference(embeddings: Tensor) -> str:
    """Says how embeddings (N, d) make all images look alike; "" if they do not."""
    if not embeddings.any():
        return "all embeddings are zero"
    first = directions(embeddings[:1])
    same = all(  # seldom goes beyond the first part
        (directions(part) - first).abs().max() <= ROUNDING for part in embeddings.split(1024)
    )
    return "all embeddings point the same way" if same and len(embeddings) > 1 else ""


def directions(embeddings: Tensor) -> Tensor:
    """Unit vectors (N, d + 1) of embeddings (N, d); the last entry is 1 for a row of zeros."""
    largest = embeddings.abs().amax(dim=1, keepdim=True)
    zeros = (largest == 0).to(embeddings)
    return torch.cat([F.normalize(embeddings / (largest + zeros)), zeros], dim=1)


def class_mean_cosine(embeddings: Tensor, labels: Tensor) -> float:
    """Mean cosine between the mean directions of two different classes; 0 for one class."""
    classes, inverse = labels.to(embeddings.device).unique(return_inverse=True)
    if len(classes) < 2:
        return 0.0
    units = directions(embeddings)
    sums = units.new_zeros(len(classes), units.shape[1])
    means = F.normalize(sums.index_add(0, inverse, units))
    total, own = means.sum(dim=0).square().sum(), means.square().sum()
    return float((total - own) / (len(classes) * (len(classes) - 1)))
