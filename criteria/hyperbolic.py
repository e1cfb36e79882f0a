"""Cross-entropy over pairs, on the sphere and in the Poincaré ball.

Ermolov et al., Hyperbolic Vision Transformers, CVPR 2022.
"""

from __future__ import annotations

import torch
from torch import Tensor

from criteria import checks
from criteria.base import (
    Criterion,
    check_batch,
    in_float32,
    mean_where,
    of_labels,
    pair_masks,
    unit_rows,
)
from criteria.poincare import ball_distances, to_ball


class PairCrossEntropy(Criterion):
    """Cross-entropy of picking an image's positive among two images of every other class.

        L = 1/N Σ_{(a, p)} -log( e^{s_ap/T} / (Σ_{n∈M_j} e^{s_an/T} + Σ_{n∈M_i, n≠a} e^{s_an/T}) )

    a is the i-th image of its class in the batch, and p another one, the j-th. M_j are the j-th
    images of all classes, including p. N is the number of classes with at least two images. Pairs
    are ordered: a class of m images has m(m - 1) of them. T is ``temperature``; a subclass defines
    s. ``terms``: positive and negative, the mean s of pairs of the same class and of different
    classes. Raises ValueError for an empty batch; a batch without a pair gives 0.
    """

    unit_length = False
    needs_pairs = True
    no_memory = "an image competes with one image per class, and a memory has many of each"

    def __init__(self, temperature: float) -> None:
        super().__init__()
        checks.positive(temperature=temperature)
        self.temperature = temperature

    def similarity(self, embeddings: Tensor) -> Tensor:
        """The similarities s of all pairs, (B, B), from raw embeddings (B, d)."""
        raise NotImplementedError

    @in_float32
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-d."""
        labels = check_batch(embeddings, labels)
        positive, negative = pair_masks(labels)
        place, sizes, anchors, positives = of_labels(_places, labels)
        similarity = self.similarity(embeddings)
        logits = similarity / self.temperature
        # Not -∞: if an image is the only one at its position, the gradient would be 0 · ∞.
        others = logits.diagonal_scatter(torch.full_like(logits[0], -1e9))
        columns = others[:, place.argsort(stable=True)].split(sizes, dim=1)
        sums = torch.stack([column.logsumexp(dim=1) for column in columns], dim=1)
        across, within = sums[anchors, place[positives]], sums[anchors, place[anchors]]
        losses = torch.logaddexp(across, within) - logits[anchors, positives]
        seen = similarity.detach()
        self._report(positive=mean_where(seen, positive), negative=mean_where(seen, negative))
        return losses.sum() / (place == 1).sum().clamp_min(1)


def _places(labels: Tensor, references: None) -> tuple[Tensor, list[int], Tensor, Tensor]:
    """Each image's position within its class (B,), the number of images at each, and the pairs."""
    positive, _ = pair_masks(labels)
    place = positive.tril(-1).sum(dim=1)
    return place, place.bincount().tolist(), *positive.nonzero(as_tuple=True)


class HyperbolicPairLoss(PairCrossEntropy):
    """Hyp: ``PairCrossEntropy`` with s = -d(x, y), the distance of the Poincaré ball.

    T ``temperature`` 0.2, curvature c ``curvature`` 0.1, clipping radius r ``clip`` 2.3 (0: none);
    criteria/poincare.py has the equations.
    """

    def __init__(self, temperature: float = 0.2, curvature: float = 0.1, clip: float = 2.3) -> None:
        super().__init__(temperature)
        checks.positive(curvature=curvature)
        checks.not_negative(clip=clip)
        self.curvature = curvature
        self.clip = clip

    def similarity(self, embeddings: Tensor) -> Tensor:
        """-d(x_i, x_j)."""
        points = to_ball(embeddings, self.curvature, self.clip)
        return -ball_distances(points, points, self.curvature)


class SphericalPairLoss(PairCrossEntropy):
    """Sph: ``PairCrossEntropy`` with the cosine, s = x̂·ŷ. T ``temperature`` 0.1."""

    def __init__(self, temperature: float = 0.1) -> None:
        super().__init__(temperature)

    def similarity(self, embeddings: Tensor) -> Tensor:
        """x̂_i·x̂_j."""
        unit = unit_rows(embeddings)
        return unit @ unit.T
