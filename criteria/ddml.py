"""DDML: keeps out of the embedding what all classes have in common.

Park et al., Deep Disentangled Metric Learning, AAAI 2025.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from criteria import checks
from criteria.base import Criterion, Embeddings, check_batch, in_float32, unit_rows
from criteria.objective import Term
from criteria.proxies import ProxyLoss, proxy_losses
from criteria.softmax import compare_rows, cross_entropy, smoothed_cross_entropy


def log_softplus(x: Tensor) -> Tensor:
    """log(log(1 + e^x)); for x ≤ -20 it is x to float32's precision, and softplus may underflow."""
    low = x <= -20
    return torch.where(low, x, F.softplus(x.masked_fill(low, 0.0)).log())


class DisentanglingLoss(Criterion):
    """DDML: keeps what all classes have in common out of a proxy loss's embedding.

    The main head outputs [μ | r], and the class-specific head, which takes its output, [μ' | r'],
    each (B, 2d); σ is softplus(r - 5). This class does not normalise them. With --l2-norm 1
    ``compose`` first divides each by its length over all 2d entries, so that r lies in [-1, 1] and
    σ is about .0067. One sample of each, z = μ + σ·ε and z' = μ' + σ'·ε', ε standard normal, gives

        agnostic = CE(κ·ẑ·p̂, uniform over the C classes)
        specific = CE(κ·ẑ'·p̂, y)
        split    = mean_i Σ_d [log N(z'; μ', σ'²) - log N(z'; 0, 1)]
        L        = base(μ) + al·agnostic + be·specific + gam·split

    ``base`` is a proxy loss (ProxyAnchorLoss, AMLoss) and p are its proxies; κ ``scale`` 23. First
    ε is drawn, then ε', each by torch.randn with shape (B, d), so that a seed reproduces both.
    ``terms``: those of the base, metric, agnostic, specific, split. Raises ValueError for a base
    without proxies, and for the same batches as the base.
    """

    no_memory = ProxyLoss.no_memory

    def __init__(
        self,
        base: ProxyLoss,
        al: float = 0.0,
        be: float = 0.0,
        gam: float = 0.0,
        scale: float = 23.0,
    ) -> None:
        super().__init__()
        if not isinstance(base, ProxyLoss):
            raise ValueError(
                "The disentangling loss compares its samples with class proxies, which "
                f"{type(base).__name__} does not have: give it a proxy loss ({proxy_losses()})."
            )
        checks.not_negative(al=al, be=be, gam=gam)
        checks.positive(scale=scale)
        self.base = base
        self.al = al
        self.be = be
        self.gam = gam
        self.scale = scale

    @in_float32
    def forward(self, embedding_params: Tensor, specific_params: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-d, from the two heads' outputs (B, 2d) and the labels (B,)."""
        size = 2 * self.base.embedding_size
        labels = check_batch(embedding_params, labels, size, self.base.num_classes)
        check_batch(specific_params, labels, size)
        mean, sigma = self._normal(embedding_params)
        specific_mean, specific_sigma = self._normal(specific_params)
        log_sigma = log_softplus(specific_params.chunk(2, dim=1)[1] - 5)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device)
        specific_noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device)
        sample = mean + sigma * noise
        specific_sample = specific_mean + specific_sigma * specific_noise

        metric = self.base(mean, labels)
        agnostic, specific = self._classified(sample, specific_sample, labels)
        # (z' - μ')/σ' is the noise itself, and the constants of the two densities cancel.
        densities = (specific_sample.square() - specific_noise.square()) / 2 - log_sigma
        split = densities.sum(dim=1).mean()

        self._report(metric=metric, agnostic=agnostic, specific=specific, split=split)
        self.terms |= self.base.terms
        return metric + self.al * agnostic + self.be * specific + self.gam * split

    def _classified(
        self, sample: Tensor, specific: Tensor, labels: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The agnostic and the specific term, 0-d, from the two samples (B, d)."""
        samples, count = torch.cat([sample, specific]), len(labels)
        rows = compare_rows(self.base, self.scale, samples, labels.repeat(2), sums=True)
        own = self.scale * rows.own
        agnostic = smoothed_cross_entropy(
            own[:count], rows.others[:count], rows.sums[:count], 1.0, self.base.num_classes
        )
        return agnostic, cross_entropy(own[count:], rows.others[count:])

    @staticmethod
    def _normal(params: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = params.chunk(2, dim=1)
        return mean, F.softplus(raw - 5)


def disentangled(
    name: str,
    metric: Term,
    l2_norm: bool,
    *,
    al: float = 0.0,
    be: float = 0.0,
    gam: float = 0.0,
    scale: float = 23.0,
) -> dict[str, Term]:
    """DDML around a proxy loss; with ``l2_norm``, both heads are brought to unit length.

    Raises ValueError if the loss is no ProxyLoss, or has the introspective similarity.
    """
    if not isinstance(metric.criterion, ProxyLoss):
        raise ValueError(
            f"Disentangling compares samples of the heads with class proxies, which {name} does "
            f"not have: combine it with {proxy_losses()}."
        )
    if "uncertainty" in metric.heads:
        raise ValueError(
            "The introspective and the disentangled loss cannot be combined: one reads the "
            "embedding head as a vector, the other as a mean and a spread."
        )
    criterion = DisentanglingLoss(metric.criterion, al, be, gam, scale)
    inputs = partial(_both_heads, l2_norm)
    return {"metric": Term(criterion, inputs, heads=("embedding", "specific"))}


def _both_heads(
    unit: bool, outputs: Embeddings, labels: Tensor, context: Mapping[str, Any]
) -> tuple[Any, ...]:
    heads = (outputs.embedding, outputs.specific)
    return *(map(unit_rows, heads) if unit else heads), labels
