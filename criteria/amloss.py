"""AMLoss: Proxy-Anchor with a learnable margin for each class."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import processes
from criteria import PROXY_LR_SCALE, checks
from criteria.base import ParameterGroup, check_batch, in_float32, unit_rows, written_out
from criteria.proxies import ProxyLoss, own_and_push, pull
from criteria.strips import total
from criteria.timing import FEW, fastest, in_words


class AMLoss(ProxyLoss):
    """Proxy-Anchor with a learnable margin m_c for each class, raised where proxies crowd.

        L = 1/|P⁺| Σ_{c∈P⁺} log(1 + Σ_{i: y_i=c} e^{-αp(s_ic - m_c)})
          + 1/C    Σ_c      log(1 + Σ_{i: y_i≠c} e^{ αn(s_ic + δ₀)})
          + λ/C    Σ_c      log(1 + Σ_{k≠c} e^{p̂_c·p̂_k - m_c + δ})

    All m_c start at δ₀ = ``margin`` 0.1, which stays fixed on the negative side. αp ``alphap`` 32,
    αn ``alphan`` 32, δ ``delta`` 0.1, λ ``lam`` 1; no scale in the last exponent. The ``margins``
    (C,) have an AdamW and a StepLR of their own (``margin_lr``, ``margin_step`` epochs,
    ``margin_gamma``). Called like ProxyAnchorLoss, with the same errors. ``terms``: positive,
    negative, margin (without λ).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.1,
        alphap: float = 32.0,
        alphan: float = 32.0,
        delta: float = 0.1,
        lam: float = 1.0,
        *,
        margin_lr: float = 1e-4,
        margin_step: int = 10,
        margin_gamma: float = 0.5,
        proxy_lr_scale: float = PROXY_LR_SCALE,
    ) -> None:
        super().__init__(num_classes, embedding_size, proxy_lr_scale)
        checks.positive(
            alphap=alphap, alphan=alphan, margin_step=margin_step, margin_gamma=margin_gamma
        )
        checks.whole(margin_step=margin_step)
        checks.not_negative(lam=lam, margin_lr=margin_lr)
        self.margin = margin
        self.alphap = alphap
        self.alphan = alphan
        self.delta = delta
        self.lam = lam
        self.margin_schedule = {"lr": margin_lr, "step": margin_step, "gamma": margin_gamma}
        self.margins = nn.Parameter(torch.full((num_classes,), float(margin)))

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor, uncertainty: Tensor | None = None
    ) -> Tensor:
        """The loss, 0-d."""
        labels = check_batch(embeddings, labels, self.embedding_size, self.num_classes)
        terms = partial(own_and_push, margin=self.margin, alpha=self.alphan)
        own, pushes = self.by_strips(terms, embeddings, labels, uncertainty)
        positive = pull(total(own), labels, self.margins, self.alphap)
        negative = total(pushes) / self.num_classes
        crowding = self._crowding(unit_rows(self.proxies))
        margin = F.softplus(crowding - self.margins + self.delta).mean()
        self._report(positive=positive, negative=negative, margin=margin)
        return positive + negative + self.lam * margin

    def _crowding(self, unit: Tensor) -> Tensor:
        """``ProxyCrowding`` of all classes, (C,), from the unit proxies of this process."""
        if self.share is None:
            return ProxyCrowding.apply(unit)
        own = CrowdingAmongAll.apply(unit, self.num_classes)
        return processes.gather_rows(own, self.num_classes)

    def parameter_groups(self, lr: float) -> list[ParameterGroup]:
        """The proxies, and the margins with the optimiser and the schedule of their own."""
        margins = {"name": "margins", "params": [self.margins], "optimizer": "adamw"}
        return [*super().parameter_groups(lr), margins | self.margin_schedule]

    def class_values(self) -> dict[str, Tensor]:
        """The learned margin of each class."""
        return {"margin": self.margins.detach()}

    @staticmethod
    @torch.no_grad()
    def raising(proxies: Tensor, margins: Tensor, delta: float) -> Tensor:
        """How hard the third term pushes up each margin (C,), from 0 to 1; proxies are (C, d).

        It is -∂/∂m_c of the softplus, 1 / (1 + e^{-(crowding_c - m_c + δ)}), without λ/C. Because
        p̂_c·p̂_k is at least -1, it is near 1 for all classes if there are many.
        """
        return torch.sigmoid(ProxyCrowding.apply(unit_rows(proxies)) - margins + delta)

    def cost(self) -> str:
        """The time of the third term, which compares all proxies with each other in every step."""
        seconds = ProxyCrowding.seconds(unit_rows(self.proxies.detach()).float())
        if self.share is not None:  # both halves of E, for all processes
            seconds *= 2 * processes.world()
        about, count = in_words(seconds), self.num_classes
        if not about:
            return ""
        return (
            f"AMLoss compares the proxies of all {count:,} classes with each other, "
            f"{count * (count - 1) // 2:,} pairs, at every step: {about}; Proxy_Anchor does without"
        )


class ProxyCrowding(torch.autograd.Function):
    """log Σ_{k≠c} e^{p̂_c·p̂_k} of every class c: unit proxies (C, d) → (C,).

    AMLoss' third term is softplus(crowding_c - m_c + δ). The matrix E_ck = e^{p̂_c·p̂_k} takes
    512 MB at C = 11,318, so it is computed in strips, and again in the backward pass, unless it
    fits into a single strip. E is symmetric, so only its upper half is computed. With w_c the
    incoming gradient divided by the row sum, the gradient of p̂_c is Σ_k (w_c + w_k) E_ck p̂_k.
    """

    strip_elements = 2**24  # 64 MiB of float32

    @staticmethod
    def forward(ctx: Any, unit: Tensor) -> Tensor:
        """The logarithms of the row sums of E without its diagonal, (C,)."""
        if len(unit) ** 2 <= ProxyCrowding.strip_elements:
            _, _, whole = next(ProxyCrowding._strips(unit))
            sums = whole.sum(dim=1)
            ctx.save_for_backward(unit, sums, whole)
            return sums.log()
        sums = unit.new_zeros(len(unit))
        for start, stop, strip in ProxyCrowding._strips(unit):
            sums[start:stop] += strip.sum(dim=1)
            if stop < len(unit):
                sums[stop:] += strip[:, stop - start :].sum(dim=0)
        ctx.save_for_backward(unit, sums)
        return sums.log()

    @staticmethod
    @written_out
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Gradient of the unit proxies, (C, d)."""
        unit, sums, *whole = ctx.saved_tensors
        weight = grad / sums.clamp_min(torch.finfo(sums.dtype).tiny)
        if whole:
            return (weight[:, None] + weight).mul_(*whole) @ unit
        gradient = torch.zeros_like(unit)
        for start, stop, strip in ProxyCrowding._strips(unit):
            weighted = (weight[start:stop, None] + weight[start:]).mul_(strip)
            gradient[start:stop] += weighted @ unit[start:]
            if stop < len(unit):
                gradient[stop:] += weighted[:, stop - start :].T @ unit[start:stop]
        return gradient

    @staticmethod
    @torch.no_grad()
    def seconds(unit: Tensor) -> float:
        """An estimate of the time of forward and backward, from the time of a part of a strip.

        Forward and backward compute the upper half of E twice and multiply it by the proxies
        twice: four products of the same size.
        """
        if len(unit) < FEW:
            return 0.0
        rows = max(1, ProxyCrowding.strip_elements // 4 // len(unit))
        taken = fastest(lambda: (unit[:rows] @ unit.T).exp_().sum())
        return 4 * taken * len(unit) / 2 / rows

    @staticmethod
    def _strips(unit: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """``start``, ``stop`` and E[start:stop, start:] with a zero diagonal, top to bottom."""
        rows = max(1, ProxyCrowding.strip_elements // len(unit))
        for start in range(0, len(unit), rows):
            stop = min(start + rows, len(unit))
            strip = (unit[start:stop] @ unit[start:].T).exp_()
            yield start, stop, strip.fill_diagonal_(0)


class CrowdingAmongAll(torch.autograd.Function):
    """``ProxyCrowding`` for proxies divided among processes: this process's (n, d) → (n,).

    Each process computes the rows of E that belong to its classes. It receives the proxies of the
    other processes one process at a time, and again in the backward pass, so that none holds all.
    """

    @staticmethod
    def forward(ctx: Any, unit: Tensor, classes: int) -> Tensor:
        """The logarithms of the row sums of E without its diagonal, (n,)."""
        sums = unit.new_zeros(len(unit))
        for start, stop, strip, _, _ in CrowdingAmongAll._strips(unit, classes):
            sums[start:stop] += strip.sum(dim=1)
        ctx.save_for_backward(unit, sums)
        ctx.classes = classes
        return sums.log()

    @staticmethod
    @written_out
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Gradient of this process's unit proxies, (n, d)."""
        unit, sums = ctx.saved_tensors
        weight = grad / sums.clamp_min(torch.finfo(sums.dtype).tiny)
        weights = processes.gather_rows(weight, ctx.classes)
        gradient = torch.zeros_like(unit)
        for start, stop, strip, others, whose in CrowdingAmongAll._strips(unit, ctx.classes):
            weighted = (weight[start:stop, None] + weights[whose]).mul_(strip)
            gradient[start:stop] += weighted @ others
        return gradient, None

    @staticmethod
    def _strips(unit: Tensor, classes: int) -> Iterator[tuple[int, int, Tensor, Tensor, slice]]:
        """``start``, ``stop``, E[start:stop, whose] with a zero diagonal, the proxies of the
        classes ``whose``, and ``whose`` itself."""
        for number in range(processes.world()):
            whose = processes.shard(classes, number)
            others = processes.from_process(number, unit, whose.stop - whose.start)
            rows = max(1, ProxyCrowding.strip_elements // len(others))
            for start in range(0, len(unit), rows):
                stop = min(start + rows, len(unit))
                strip = (unit[start:stop] @ others.T).exp_()
                if number == processes.rank():
                    strip[:, start:stop].fill_diagonal_(0)
                yield start, stop, strip, others, whose
