"""PFML: images and proxies as charges, whose fields weaken with the distance.

Bhatnagar and Ahuja, Potential Field Based Deep Metric Learning, CVPR 2025.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from criteria import PROXY_LR_SCALE
from criteria.arguments import LARGEST
from criteria.base import (
    Criterion,
    ParameterGroup,
    check_batch,
    check_not_negative,
    check_positive,
    check_whole,
    in_float32,
    unit_rows,
)
from criteria.strips import made_again, rows_of_strip
from criteria.timing import FEW, fastest, in_words

SOFTENING = 0.01  # of δ: a distance never counts as less, so that forces stay finite


class PotentialFieldLoss(Criterion):
    """PFML: the energy of all images of the batch and all proxies in the field of all others.

        L     = 1/B Σ_i Σ_{j≠i} ψ(r_ij)           i and j over images and proxies
        ψ(r)  = -1/max(r, δ)^α                    for two points of one class
        ψ(r)  =  1/min(r, δ)^α - 1/δ^α            for two points of two classes

    r is the distance of unit vectors: within δ nothing more is attracted, beyond it nothing is
    repelled. α ``alpha`` 4, δ ``delta`` 0.2, ``proxies_per_class`` M 15 proxies for each class, at
    ``proxy_lr_scale`` 100 × the network's rate. The constant -1/δ^α, which the paper leaves out,
    keeps the numbers small; r is √(r² + (δ/100)²), so that two points in one place repel each other
    with a finite force. All pairs of two classes are looked at, strip by strip, for those within δ,
    which alone push. ``terms``: attraction, repulsion, the two sums over B. Raises ValueError like
    ProxyAnchorLoss.
    """

    no_memory = "it compares images with proxies, which stand for earlier images already"

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        alpha: float = 4.0,
        delta: float = 0.2,
        proxies_per_class: int = 15,
        *,
        proxy_lr_scale: float = PROXY_LR_SCALE,
    ) -> None:
        super().__init__()
        check_positive(
            num_classes=num_classes, alpha=alpha, delta=delta, proxies_per_class=proxies_per_class
        )
        check_not_negative(proxy_lr_scale=proxy_lr_scale)
        check_whole(proxies_per_class=proxies_per_class)
        if delta > 2:
            raise ValueError(
                f"delta must be at most 2, the largest distance of unit vectors, not {delta}."
            )
        if -alpha * math.log(SOFTENING * delta) > math.log(LARGEST):
            raise ValueError(
                f"With alpha {alpha} and delta {delta} two images in one place have an energy that "
                "float32 cannot hold: choose a smaller alpha or a larger delta."
            )
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.alpha = alpha
        self.delta = delta
        self.proxies_per_class = int(proxies_per_class)
        self.proxy_lr_scale = proxy_lr_scale
        self.proxies = nn.Parameter(
            torch.randn(num_classes * self.proxies_per_class, embedding_size)
        )

    @in_float32
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-d."""
        labels = check_batch(embeddings, labels, self.embedding_size, self.num_classes)
        images, proxies = unit_rows(embeddings), unit_rows(self.proxies)
        attraction = self._attraction(images, proxies, labels) / len(labels)
        classes = torch.arange(self.num_classes, device=labels.device)
        charges = torch.cat([labels, classes.repeat_interleave(self.proxies_per_class)])
        repulsion = self._repulsion(torch.cat([images, proxies]), charges) / len(labels)
        self._report(attraction=attraction, repulsion=repulsion)
        return attraction + repulsion

    def _attraction(self, images: Tensor, proxies: Tensor, labels: Tensor) -> Tensor:
        """Σ ψ over all pairs of one class; the only pairs that are looked at for it."""
        of_class = proxies.unflatten(0, (-1, self.proxies_per_class))  # (C, M, d)
        among_images = self._attracted(images @ images.T)
        same = (labels[:, None] == labels).fill_diagonal_(False)
        towards = self._attracted(of_class[labels] @ images[:, :, None])
        among_proxies = self._attracted(of_class @ of_class.transpose(1, 2))
        itself = torch.eye(self.proxies_per_class, dtype=torch.bool, device=labels.device)
        return (
            among_images.masked_fill(~same, 0).sum()
            + 2 * towards.sum()
            + among_proxies.masked_fill(itself, 0).sum()
        )

    def _repulsion(self, points: Tensor, charges: Tensor) -> Tensor:
        """Σ ψ over the pairs of two classes that are nearer than δ.

        In a strip of the table where they are few they are computed one by one, for the table of
        what pushes nothing would cost three products and twenty passes.
        """
        rows = rows_of_strip(len(points))
        starts = range(0, len(points), rows)
        of_strip = made_again(self._repelled_in_strip, len(starts))
        of_pairs = made_again(self._repelled_in_pairs, len(starts))
        energy = points.new_zeros(())
        for start in starts:
            with torch.no_grad():
                near = self._near(self._cosines(points, start, rows), charges, start)
                count = int(near.sum())  # first: a list of many pairs is longer than the table
            if count * points.shape[1] > near.numel():
                energy = energy + of_strip(points, charges, start, rows)
            elif count:
                energy = energy + of_pairs(points, near.nonzero() + start)
        return 2 * energy

    @staticmethod
    def _cosines(points: Tensor, start: int, rows: int) -> Tensor:
        """Those of some of the points with themselves and with all later ones."""
        return points[start : start + rows] @ points[start:].T

    def _near(self, cosines: Tensor, charges: Tensor, start: int) -> Tensor:
        """Which pairs of a strip repel each other, each pair once."""
        same = charges[start : start + len(cosines), None] == charges[start:]
        near = (self._squares(cosines) < self.delta**2) & ~same
        return near.triu_(1)

    def _repelled_in_strip(self, points: Tensor, charges: Tensor, start: int, rows: int) -> Tensor:
        cosines = self._cosines(points, start, rows)
        far = ~self._near(cosines.detach(), charges, start)
        return self._repelled(cosines).masked_fill(far, 0).sum()

    def _repelled_in_pairs(self, points: Tensor, pairs: Tensor) -> Tensor:
        first, second = points[pairs.T]
        return self._repelled((first * second).sum(dim=1)).sum()

    def _squares(self, cosines: Tensor) -> Tensor:
        """The squared distances: no roots, whose gradient at 0 would be infinite."""
        return (2 - 2 * cosines).clamp_min(0) + (SOFTENING * self.delta) ** 2

    def _attracted(self, cosines: Tensor) -> Tensor:
        return -(self._squares(cosines).clamp_min(self.delta**2) ** (-self.alpha / 2))

    def _repelled(self, cosines: Tensor) -> Tensor:
        near = self._squares(cosines).clamp_max(self.delta**2) ** (-self.alpha / 2)
        return near - self.delta**-self.alpha

    def parameter_groups(self, lr: float) -> list[ParameterGroup]:
        """The proxies, at ``proxy_lr_scale`` × ``lr``."""
        return [{"name": "proxies", "params": [self.proxies], "lr": self.proxy_lr_scale * lr}]

    def cost(self) -> str:
        """All proxies are compared with each other, at every step."""
        count = len(self.proxies)
        rows = rows_of_strip(4 * count)
        if count < FEW:
            return ""
        charges = torch.arange(count, device=self.proxies.device) // self.proxies_per_class
        with torch.no_grad():
            points = unit_rows(self.proxies).float()
            taken = fastest(lambda: self._near(self._cosines(points, 0, rows), charges, 0).sum())
        about = in_words(taken * count / rows / 2)  # every pair is looked at once
        if not about:
            return ""
        return (
            f"PFML compares all {count:,} proxies with each other, at every step: {about}; fewer "
            "proxies_per_class cost less"
        )
