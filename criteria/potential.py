"""PFML: images and proxies as charges, whose fields weaken with the distance.

Bhatnagar and Ahuja, Potential Field Based Deep Metric Learning, CVPR 2025.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from criteria import PROXY_LR_SCALE
from criteria.base import (
    Criterion,
    check_batch,
    check_not_negative,
    check_positive,
    check_whole,
    in_float32,
    unit_rows,
)
from criteria.strips import made_again, rows_of_strip

LONG = 1.0  # seconds a step from which on one is told before training
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
    with a finite force. The table of all pairs is made strip by strip, and again in the backward
    pass. ``terms``: attraction, repulsion, the two sums over B. Raises ValueError like
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
        classes = torch.arange(self.num_classes, device=labels.device)
        charges = torch.cat([labels, classes.repeat_interleave(self.proxies_per_class)])
        points = unit_rows(torch.cat([embeddings, self.proxies]))
        rows = rows_of_strip(len(points))
        starts = range(0, len(points), rows)
        energy_of = made_again(self._energy, len(starts))
        energies = [energy_of(points, charges, start, rows) for start in starts]
        attraction, repulsion = torch.stack(energies).sum(dim=0) / len(labels)
        self._report(attraction=attraction, repulsion=repulsion)
        return attraction + repulsion

    def _energy(self, points: Tensor, charges: Tensor, start: int, rows: int) -> Tensor:
        """(2,): the attraction and the repulsion that ``rows`` of the points feel."""
        strip = slice(start, start + rows)
        squares = (2 - 2 * points[strip] @ points.T).clamp_min(0)
        same = charges[strip, None] == charges
        # ψ of the square: no root, whose gradient at 0 would be infinite.
        squares = squares + (SOFTENING * self.delta) ** 2
        edge = self.delta**2
        attraction = -(squares.clamp_min(edge) ** (-self.alpha / 2))
        repulsion = squares.clamp_max(edge) ** (-self.alpha / 2) - self.delta**-self.alpha
        itself = torch.zeros_like(same)
        itself[:, strip].fill_diagonal_(True)
        return torch.stack(
            [attraction.masked_fill(~same | itself, 0).sum(), repulsion.masked_fill(same, 0).sum()]
        )

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The proxies, at ``proxy_lr_scale`` × ``lr``."""
        return [{"name": "proxies", "params": [self.proxies], "lr": self.proxy_lr_scale * lr}]

    def cost(self) -> str:
        """All proxies are compared with each other, at every step."""
        count = len(self.proxies)
        rows = rows_of_strip(4 * count)
        if count < 5_000:
            return ""
        charges = torch.arange(count, device=self.proxies.device) // self.proxies_per_class
        times = []
        with torch.no_grad():
            points = unit_rows(self.proxies).float()
            for _ in range(3):
                started = time.perf_counter()
                float(self._energy(points, charges, 0, rows).sum())  # reading it waits for a GPU
                times.append(time.perf_counter() - started)
        seconds = 4 * min(times) * count / rows  # forward twice, and about as much backward
        if seconds < LONG:
            return ""
        return (
            f"PFML compares all {count:,} proxies with each other, at every step: about "
            f"{float(f'{seconds:.2g}'):,.0f} s a step on this machine, whatever the batch; fewer "
            "proxies_per_class cost less"
        )
