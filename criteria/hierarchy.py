"""HIER: Proxy-Anchor with a latent hierarchy over the images, learned without labels.

Kim et al., HIER: Metric Learning Beyond Class Labels via Hierarchical Regularization, CVPR 2023.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from criteria import checks
from criteria.base import ParameterGroup, check_batch, in_float32
from criteria.poincare import ball_distances, riemannian, to_ball
from criteria.proxies import ProxyAnchorLoss

Triplets = tuple[Tensor, Tensor, Tensor]

TRIPLETS = 50  # per anchor


class HierLoss(ProxyAnchorLoss):
    """HIER: Proxy-Anchor, and learned ancestors in the Poincaré ball above similar images.

        L    = L_ProxyAnchor + weight · (L_h(images) + L_h(ancestors))
        L_h  = mean over (i, j, k) of [d(i, a) - d(i, b) + δ]₊ + [d(j, a) - d(j, b) + δ]₊
                                    + [d(k, b) - d(k, a) + δ]₊  where a ≠ b, else 0

    i and j are similar, i and k are not (``reciprocal_triplets``). a is the ancestor of i and j,
    drawn from the softmax of -max(d(i, ·), d(j, ·)) / τ over all ancestors, with Gumbel noise and a
    straight-through gradient; b is that of i, j and k, with the maximum over all three. ``weight``
    0.5, δ ``hierarchy_margin`` 0.1, τ ``tau`` 0.1, ``topk`` 20, ``ancestors`` 512; the ball has
    ``curvature`` 0.1 and ``clip`` 2.3; ``margin`` and ``alpha`` are Proxy-Anchor's. As released,
    gradients, also those of Proxy-Anchor, are scaled by the metric of the ball (``riemannian``),
    and the proxies learn at ``proxy_lr_scale`` 10,000 × the network's rate, the ancestors at
    ``ancestor_lr_scale`` 50 ×. Call with raw embeddings. ``terms``: positive, negative, images,
    ancestors. Raises ValueError like ProxyAnchorLoss.
    """

    unit_length = False

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.1,
        alpha: float = 32.0,
        weight: float = 0.5,
        hierarchy_margin: float = 0.1,
        tau: float = 0.1,
        topk: int = 20,
        ancestors: int = 512,
        curvature: float = 0.1,
        clip: float = 2.3,
        *,
        proxy_lr_scale: float = 1e4,
        ancestor_lr_scale: float = 50.0,
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, alpha, proxy_lr_scale=proxy_lr_scale)
        checks.positive(tau=tau, topk=topk, ancestors=ancestors, curvature=curvature, clip=clip)
        checks.not_negative(
            weight=weight, hierarchy_margin=hierarchy_margin, ancestor_lr_scale=ancestor_lr_scale
        )
        checks.whole(topk=topk, ancestors=ancestors)
        self.weight = weight
        self.hierarchy_margin = hierarchy_margin
        self.tau = tau
        self.topk = int(topk)
        self.curvature = curvature
        self.clip = clip
        self.ancestor_lr_scale = ancestor_lr_scale
        start = torch.randn(int(ancestors), embedding_size) * 0.9 * clip / embedding_size**0.5
        self.ancestors = nn.Parameter(start)

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor, uncertainty: Tensor | None = None
    ) -> Tensor:
        """The loss, 0-d."""
        labels = check_batch(embeddings, labels, self.embedding_size, self.num_classes)
        points = riemannian(to_ball(embeddings, self.curvature, self.clip), self.curvature)
        metric = super().forward(points, labels, uncertainty)
        ancestors = to_ball(self.ancestors, self.curvature, self.clip)
        ancestors = riemannian(ancestors, self.curvature)
        with torch.no_grad():
            likeness = torch.exp(-ball_distances(points, points, self.curvature))
            likeness += labels[:, None] == labels  # puts images of the same class first
        images = self._hierarchy(ball_distances(points, ancestors, self.curvature), likeness)
        between = ball_distances(ancestors, ancestors, self.curvature)
        above = self._hierarchy(between, torch.exp(-between.detach()))
        self._report(**self.terms, images=images, ancestors=above)
        return metric + self.weight * (images + above)

    def _hierarchy(self, distances: Tensor, likeness: Tensor) -> Tensor:
        """L_h of n nodes, given their distances to the ancestors (n, A) and likeness (n, n)."""
        i, j, k = reciprocal_triplets(likeness, self.topk)
        if len(i) == 0:
            return distances.sum() * 0
        to_i, to_j, to_k = distances[i], distances[j], distances[k]
        farther = torch.maximum(to_i, to_j)
        of_two = F.gumbel_softmax(-farther / self.tau, hard=True)
        of_three = F.gumbel_softmax(-torch.maximum(to_k, farther) / self.tau, hard=True)
        apart = of_two - of_three
        losses = (
            F.relu((to_i * apart).sum(dim=1) + self.hierarchy_margin)
            + F.relu((to_j * apart).sum(dim=1) + self.hierarchy_margin)
            + F.relu(self.hierarchy_margin - (to_k * apart).sum(dim=1))
        )
        return (losses * (of_two.argmax(dim=1) != of_three.argmax(dim=1))).mean()

    def parameter_groups(self, lr: float) -> list[ParameterGroup]:
        """The proxies and the ancestors, each at a multiple of ``lr`` of their own."""
        ancestors = {"name": "ancestors", "params": [self.ancestors]}
        return [*super().parameter_groups(lr), ancestors | {"lr": self.ancestor_lr_scale * lr}]


def reciprocal_triplets(likeness: Tensor, topk: int) -> Triplets:
    """(i, j, k) such that i and j are among each other's ``topk`` most similar, and i and k not.

    The ``topk`` include the node itself. TRIPLETS are drawn with replacement for every i that has
    at least two such j. As released, k may be i.
    """
    nearest = likeness.topk(min(topk, len(likeness)), dim=1).indices
    near = torch.zeros_like(likeness, dtype=torch.bool).scatter_(1, nearest, True)
    mutual = (near & near.T).fill_diagonal_(False)
    anchors = (mutual.sum(dim=1) > 1).nonzero().squeeze(1)
    if len(anchors) == 0:
        return anchors, anchors, anchors
    alike, unlike = (
        torch.multinomial(mask[anchors].float(), TRIPLETS, replacement=True).flatten()
        for mask in (mutual, ~mutual)
    )
    return anchors.repeat_interleave(TRIPLETS), alike, unlike
