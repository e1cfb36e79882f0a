"""A smooth upper bound on 1 - average precision.

Ramzi et al., Optimization of Rank Losses for Image Retrieval, TPAMI 2025 (SupAP, ROADMAP++), after
Robust and Decomposable Average Precision for Image Retrieval, NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from criteria import checks
from criteria.base import Criterion, ParameterGroup, References, check_batch, in_float32, of_labels
from criteria.softmax import NormalisedSoftmaxLoss
from criteria.strips import of_queries


class SupAPLoss(Criterion):
    """SupAP: 1 - average precision, computed from smooth upper bounds of the ranks.

        L_AP = 1 - mean_q 1/|P_q| Σ_{p∈P_q} r⁺_qp / (r⁺_qp + Σ_{n∉P_q} H(s_qn - s_qp))
        H(x) = σ(x/τ) for x ≤ 0,  start + σ(x/τ) for 0 < x ≤ δ,  ρ(x - δ) + offset beyond
        L    = weight · L_AP + (1 - weight) · CE(s_i / T, y_i)

    r⁺_qp is the rank of p among the positives P_q, without a gradient; as released, P_q includes
    the query. τ ``temperature`` 0.01, ρ ``slope`` 100, δ ``delta`` 0.05, ``start`` 0.5, ``offset``
    1.44, ``weight`` 0.9. The second term is a normalised softmax over proxies, T
    ``softmax_temperature`` 0.05. The proxies learn at ``proxy_lr`` 10 whatever the network's rate,
    without weight decay; with ``weight`` 1 there are none. Expects unit vectors (B, d); ranks are
    computed in strips. ``terms``: ap, and softmax. Raises ValueError for an empty batch, and with
    the softmax like ProxyAnchorLoss.
    """

    unit_length = True
    needs_pairs = True
    no_memory = ""

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        weight: float = 0.9,
        temperature: float = 0.01,
        slope: float = 100.0,
        delta: float = 0.05,
        start: float = 0.5,
        offset: float = 1.44,
        *,
        softmax_temperature: float = 0.05,
        proxy_lr: float = 10.0,
    ) -> None:
        super().__init__()
        checks.positive(temperature=temperature, softmax_temperature=softmax_temperature)
        checks.not_negative(slope=slope, delta=delta, start=start, offset=offset, proxy_lr=proxy_lr)
        checks.share(weight=weight)
        self.weight = weight
        self.temperature = temperature
        self.slope = slope
        self.delta = delta
        self.start = start
        self.offset = offset
        self.proxy_lr = proxy_lr
        self.softmax = None
        if weight < 1:
            self.softmax = NormalisedSoftmaxLoss(num_classes, embedding_size, softmax_temperature)

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor, references: References | None = None
    ) -> Tensor:
        """The loss, 0-d."""
        labels = check_batch(embeddings, labels)
        others = embeddings if references is None else references.embeddings
        same = of_labels(_same, labels, references)
        precision = of_queries(self._precision, embeddings @ others.T, *same).mean()
        loss, terms = self.weight * (1 - precision), {"ap": precision}
        if self.softmax is not None:
            terms["softmax"] = self.softmax(embeddings, labels)
            loss = loss + (1 - self.weight) * terms["softmax"]
        self._report(**terms)
        return loss

    def _precision(
        self, similarity: Tensor, same: Tensor, pairs: Sequence[Tensor] | None
    ) -> Tensor:
        """Average precision of n queries: (n,), from their rows of the tables (n, B).

        ``pairs``: the indices of the true entries of ``same``, if they are known.
        """
        queries, positives = pairs or same.nonzero(as_tuple=True)
        gaps = similarity[queries] - similarity[queries, positives][:, None]
        own = same[queries]
        # The positive itself has a gap of 0 and counts, so ranks start at 1.
        rank = ((gaps.detach() >= 0) & own).sum(dim=1)
        wrong = self._step(gaps).masked_fill(own, 0.0).sum(dim=1)
        shares = rank / (rank + wrong)
        sums = shares.new_zeros(len(similarity)).index_add(0, queries, shares)
        return sums / same.sum(dim=1)

    def _step(self, gaps: Tensor) -> Tensor:
        sigmoid = torch.sigmoid(gaps / self.temperature)
        steep = self.slope * (gaps - self.delta) + self.offset
        step = torch.where(gaps > 0, self.start + sigmoid, sigmoid)
        return torch.where(gaps > self.delta, steep, step)

    def parameter_groups(self, lr: float) -> list[ParameterGroup]:
        """The proxies at ``proxy_lr``, without weight decay."""
        if self.softmax is None:
            return []
        (proxies,) = self.softmax.parameter_groups(lr)
        return [proxies | {"lr": self.proxy_lr, "weight_decay": 0.0}]


def _same(labels: Tensor, references: References | None) -> tuple[Tensor, int, Tensor, Tensor]:
    """The mask of pairs of one class, including an image and itself (B, R), its largest row sum,
    and the indices of its true entries, (P,) each."""
    same = labels[:, None] == (labels if references is None else references.labels)
    return same, int(same.sum(dim=1).max()), *same.nonzero(as_tuple=True)
