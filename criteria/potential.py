"""PFML: images and proxies as charges whose fields decay with the distance.

Bhatnagar and Ahuja, Potential Field Based Deep Metric Learning, CVPR 2025.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from criteria import PROXY_LR_SCALE, checks
from criteria.arguments import LARGEST
from criteria.base import Criterion, ParameterGroup, check_batch, in_float32, unit_rows
from criteria.strips import recomputed, rows_per_strip
from criteria.timing import FEW, fastest, in_words

SOFTENING = 0.01  # the smallest distance as a share of δ, so that forces stay finite


class PotentialFieldLoss(Criterion):
    """PFML: the potential energy of the batch's images and all proxies in each other's fields.

        L     = 1/B Σ_i Σ_{j≠i} ψ(r_ij)           i and j over images and proxies
        ψ(r)  = -1/max(r, δ)^α                    for two points of the same class
        ψ(r)  =  1/min(r, δ)^α - 1/δ^α            for points of different classes

    r is the distance of unit vectors. Points of the same class stop attracting each other within δ;
    points of different classes repel each other only within δ. α ``alpha`` 4, δ ``delta`` 0.2; each
    class has M = ``proxies_per_class`` 15 proxies, which learn at ``proxy_lr_scale`` 100 × the
    network's rate. The constant -1/δ^α, which the paper leaves out, keeps the numbers small. r is
    computed as √(r² + (δ/100)²), so that equal points repel each other with a finite force. The
    table of all pairs is searched for those within δ strip by strip. ``terms``: attraction and
    repulsion, the two sums over B. Raises ValueError like ProxyAnchorLoss.
    """

    no_memory = "it compares images with proxies, which already represent earlier images"

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
        checks.positive(
            num_classes=num_classes, alpha=alpha, delta=delta, proxies_per_class=proxies_per_class
        )
        checks.not_negative(proxy_lr_scale=proxy_lr_scale)
        checks.whole(proxies_per_class=proxies_per_class)
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
        """Σ ψ over the pairs of points of the same class, without the table of all pairs."""
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
        """Σ ψ over the pairs of points of different classes that are closer than δ.

        If a strip of the table has few such pairs, only these are computed: the whole strip would
        cost three matrix products and twenty passes over it.
        """
        rows = rows_per_strip(len(points))
        starts = range(0, len(points), rows)
        of_strip = recomputed(self._repelled_in_strip, len(starts))
        of_pairs = recomputed(self._repelled_in_pairs, len(starts))
        energy = points.new_zeros(())
        for start in starts:
            with torch.no_grad():
                near = self._near(self._cosines(points, start, rows), charges, start)
                count = int(near.sum())  # before nonzero: many pairs take more memory than a table
            if count * points.shape[1] > near.numel():
                energy = energy + of_strip(points, charges, start, rows)
            elif count:
                energy = energy + of_pairs(points, near.nonzero() + start)
        return 2 * energy

    @staticmethod
    def _cosines(points: Tensor, start: int, rows: int) -> Tensor:
        """The cosines of ``rows`` points, from ``start`` on, with themselves and all later ones."""
        return points[start : start + rows] @ points[start:].T

    def _near(self, cosines: Tensor, charges: Tensor, start: int) -> Tensor:
        """The mask of the pairs of a strip that repel each other, each pair once."""
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
        """Squared distances, because the gradient of a root would be infinite at 0."""
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
        """The time of comparing all proxies with each other, in every step."""
        count = len(self.proxies)
        rows = rows_per_strip(4 * count)
        if count < FEW:
            return ""
        charges = torch.arange(count, device=self.proxies.device) // self.proxies_per_class
        with torch.no_grad():
            points = unit_rows(self.proxies).float()
            taken = fastest(lambda: self._near(self._cosines(points, 0, rows), charges, 0).sum())
        about = in_words(taken * count / rows / 2)  # every pair is computed once
        if not about:
            return ""
        return (
            f"PFML compares all {count:,} proxies with each other, at every step: {about}; fewer "
            "proxies_per_class cost less"
        )
