"""SEC and its L2 variant: regularisers of the embeddings' length, for any loss.

Zhang et al., Deep Metric Learning with Spherical Embedding, NeurIPS 2020.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from criteria import checks
from criteria.base import (
    Criterion,
    Embeddings,
    check_batch,
    check_embeddings,
    in_float32,
    mean_where,
    pair_masks,
    unit_rows,
    written_out,
)
from criteria.objective import Term, raw_retrieval


class SphericalConstraint(Criterion):
    """SEC: pulls the length of every raw embedding towards the mean length.

        L = weight · mean_i (n_i - μ)²,  n_i = ‖x_i‖,  μ ← (1 - ρ)·μ + ρ·mean_i n_i

    μ is a constant for the gradient. It starts as the mean of the first batch; with ρ ``momentum``
    1 it is always the batch's own mean. The buffer ``norm_mean`` holds μ (nan before the first
    batch). It is updated in training mode only, and once per step: a second call in the same step,
    with mixed images, has ``again``. Call with raw embeddings (B, d). ``terms``: sec (without the
    weight), norm_mean and norm_var of the batch, norm_ema (μ), and with ``labels`` the mean cosines
    cos_positive and cos_negative of the batch's pairs. Raises ValueError for an empty batch.
    """

    unit_length = False

    def __init__(self, weight: float = 1.0, momentum: float = 1.0) -> None:
        super().__init__()
        checks.not_negative(weight=weight)
        checks.share(momentum=momentum)
        self.weight = weight
        self.momentum = momentum
        self.register_buffer("norm_mean", torch.tensor(torch.nan))

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor | None = None, again: bool = False
    ) -> Tensor:
        """The weighted constraint, 0-d."""
        check_embeddings(embeddings)
        norms = embeddings.detach().norm(dim=1)
        batch_mean = norms.mean()
        mean = self._updated_mean(batch_mean, store=self.training and not again)
        constraint = _SquaredDeviation.apply(embeddings, norms, mean)
        terms = {"sec": constraint, "norm_mean": batch_mean, "norm_ema": mean}
        terms["norm_var"] = norms.var(correction=0)
        if labels is not None:
            terms |= _pair_cosines(embeddings.detach(), check_batch(embeddings, labels))
        self._report(**terms)
        return constraint if self.weight == 1 else self.weight * constraint

    def _updated_mean(self, batch_mean: Tensor, store: bool) -> Tensor:
        mean = batch_mean
        if self.momentum < 1:
            mean = torch.lerp(self.norm_mean.to(batch_mean), batch_mean, self.momentum)
            mean = torch.where(self.norm_mean.isnan(), batch_mean, mean)
        if store:
            self.norm_mean.copy_(mean)
        return mean


class _SquaredDeviation(torch.autograd.Function):
    """mean_i (n_i - μ)², 0-d, of raw embeddings (B, d), their norms n (B,) and a constant μ.

    The gradient is written out, which gives the same bits as autograd with fewer (B, d) tensors.
    """

    @staticmethod
    def forward(ctx: Any, embeddings: Tensor, norms: Tensor, mean: Tensor) -> Tensor:
        distances = norms - mean
        ctx.save_for_backward(embeddings, norms, distances)
        return distances.square().mean()

    @staticmethod
    @written_out
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        embeddings, norms, distances = ctx.saved_tensors
        of_norms = (2 * distances).mul_(grad / len(norms))
        # A row of zeros has no direction, so its gradient is 0.
        unit = embeddings / norms.masked_fill(norms == 0, 1)[:, None]
        return unit.mul_(of_norms[:, None]), None, None


def _pair_cosines(embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
    unit = unit_rows(embeddings)
    cosines = unit @ unit.T
    masks = zip(("cos_positive", "cos_negative"), pair_masks(labels), strict=True)
    return {name: mean_where(cosines, mask) for name, mask in masks}


class NormPenalty(Criterion):
    """SEC's L2 variant: L = weight · mean_i ‖x_i‖² of raw embeddings (B, d).

    ``terms``: l2 (without the weight). Raises ValueError for an empty batch.
    """

    unit_length = False

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        checks.not_negative(weight=weight)
        self.weight = weight

    @in_float32
    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """The weighted penalty, 0-d; ``labels`` are not used."""
        check_embeddings(embeddings)
        penalty = embeddings.square().sum(dim=1).mean()
        self._report(l2=penalty)
        return self.weight * penalty


def sec(
    name: str, metric: Term, l2_norm: bool, *, weight: float = 1.0, momentum: float = 1.0
) -> dict[str, Term]:
    """Adds the spherical constraint to a loss."""
    return {"sec": Term(SphericalConstraint(weight, momentum), _raw)}


def _raw(
    outputs: Embeddings, labels: Tensor, context: Mapping[str, Any]
) -> tuple[Tensor, Tensor, bool]:
    """The raw retrieval embedding, the labels, and whether this step was called before."""
    return *raw_retrieval(outputs, labels, context), context.get("again", False)


def l2(name: str, metric: Term, l2_norm: bool, *, weight: float = 1.0) -> dict[str, Term]:
    """Adds the penalty on the length to a loss."""
    return {"l2": Term(NormPenalty(weight))}
