"""Losses that compare images with one learnable proxy per class.

Kim et al., Proxy Anchor Loss for Deep Metric Learning, CVPR 2020.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from criteria import LOSSES, PROXY_LR_SCALE, load
from criteria.base import (
    Criterion,
    check_batch,
    check_not_negative,
    check_positive,
    in_float32,
    log_one_plus_sum_exp,
)
from criteria.similarity import compare


def positive_term(
    similarity: Tensor, labels: Tensor, margin: float | Tensor, alpha: float
) -> Tensor:
    """1/|P⁺| Σ_{c∈P⁺} log(1 + Σ_{i: y_i=c} e^{-α(s_ic - m_c)}), P⁺ the classes of the batch.

    ``similarity`` (B, C); ``margin`` one number, or one for each class (C,).
    """
    own = similarity.gather(1, labels[:, None]).squeeze(1)
    margin = margin[labels] if isinstance(margin, Tensor) else margin
    same = labels[:, None] == labels
    exponents = (-alpha * (own - margin)).expand_as(same).masked_fill(~same, -torch.inf)
    # Every image carries its class's logarithm; its share makes a class count once.
    share = 1 / same.sum(dim=1, dtype=similarity.dtype)
    return (share * log_one_plus_sum_exp(exponents, dim=1)).sum() / share.sum()


def negative_term(similarity: Tensor, labels: Tensor, margin: float, alpha: float) -> Tensor:
    """1/C Σ_c log(1 + Σ_{i: y_i≠c} e^{α(s_ic + δ)}), ``similarity`` (B, C), δ the ``margin``."""
    exponents = (similarity + margin).mul_(alpha).scatter_(1, labels[:, None], -torch.inf)
    return log_one_plus_sum_exp(exponents, dim=0).mean()


class ProxyLoss(Criterion):
    """A criterion that compares images with one learnable proxy p_c for each class.

    ``proxies`` (C, d), Kaiming-normal with fan_out, are optimised at ``proxy_lr_scale`` × the
    network's learning rate.
    """

    def __init__(
        self, num_classes: int, embedding_size: int, proxy_lr_scale: float = PROXY_LR_SCALE
    ) -> None:
        super().__init__()
        check_positive(num_classes=num_classes, embedding_size=embedding_size)
        check_not_negative(proxy_lr_scale=proxy_lr_scale)
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.proxy_lr_scale = proxy_lr_scale
        self.proxies = nn.Parameter(torch.empty(num_classes, embedding_size))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    @in_float32
    def similarity(self, embeddings: Tensor, uncertainty: Tensor | None = None) -> Tensor:
        """(B, C): the cosine s_ic, or IDML's s'_ic when there is an ``uncertainty``."""
        return compare(embeddings, self.proxies, uncertainty)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The proxies, at ``proxy_lr_scale`` × ``lr``."""
        return [{"name": "proxies", "params": [self.proxies], "lr": self.proxy_lr_scale * lr}]


class ProxyAnchorLoss(ProxyLoss):
    """Proxy-Anchor: every proxy is an anchor that pulls its class and pushes the rest of the batch.

        L = 1/|P⁺| Σ_{c∈P⁺} log(1 + Σ_{i: y_i=c} e^{-α(s_ic - δ)})
          + 1/C    Σ_c      log(1 + Σ_{i: y_i≠c} e^{ α(s_ic + δ)})

    δ ``margin`` 0.1, α ``alpha`` 32. Call with embeddings (B, d) and labels (B,) in 0..C-1; with
    ``uncertainty`` (B, d) IDML's similarity takes the cosine's place. ``terms``: positive,
    negative. Raises ValueError for labels outside 0..C-1, another embedding size or an empty batch.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.1,
        alpha: float = 32.0,
        *,
        proxy_lr_scale: float = PROXY_LR_SCALE,
    ) -> None:
        super().__init__(num_classes, embedding_size, proxy_lr_scale)
        check_positive(alpha=alpha)
        self.margin = margin
        self.alpha = alpha

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor, uncertainty: Tensor | None = None
    ) -> Tensor:
        """The loss, 0-d."""
        labels = check_batch(embeddings, labels, self.embedding_size, self.num_classes)
        similarity = self.similarity(embeddings, uncertainty)
        positive = positive_term(similarity, labels, self.margin, self.alpha)
        negative = negative_term(similarity, labels, self.margin, self.alpha)
        self._report(positive=positive, negative=negative)
        return positive + negative


def proxy_losses() -> str:
    """Names of the losses that compare images with proxies of our own, for messages."""
    made = {name: load(place) for name, place in LOSSES.items()}
    own = (name for name, make in made.items() if inspect.isclass(make))
    return ", ".join(name for name in own if issubclass(made[name], ProxyLoss))
