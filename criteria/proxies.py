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
from criteria.strips import Strip, Terms, made_again, rows_of_strip, total


def positive_term(
    similarity: Tensor, labels: Tensor, margin: float | Tensor, alpha: float
) -> Tensor:
    """1/|P⁺| Σ_{c∈P⁺} log(1 + Σ_{i: y_i=c} e^{-α(s_ic - m_c)}), P⁺ the classes of the batch.

    ``similarity`` (B, C); ``margin`` one number, or one for each class (C,).
    """
    return pull(Strip(similarity, labels[:, None]).own(), labels, margin, alpha)


def negative_term(similarity: Tensor, labels: Tensor, margin: float, alpha: float) -> Tensor:
    """1/C Σ_c log(1 + Σ_{i: y_i≠c} e^{α(s_ic + δ)}), ``similarity`` (B, C), δ the ``margin``."""
    return push(Strip(similarity, labels[:, None]), margin, alpha) / similarity.shape[1]


def pull(own: Tensor, labels: Tensor, margin: float | Tensor, alpha: float) -> Tensor:
    """``positive_term`` of the similarities of the images to their own classes, (B,)."""
    margin = margin[labels] if isinstance(margin, Tensor) else margin
    same = labels[:, None] == labels
    exponents = torch.where(same, -alpha * (own - margin), -torch.inf)
    # Every image carries its class's logarithm; its share makes a class count once.
    share = same.sum(dim=1, dtype=own.dtype).reciprocal()
    return (share * log_one_plus_sum_exp(exponents, dim=1)).sum() / share.sum()


def push(strip: Strip, margin: float, alpha: float) -> Tensor:
    """Σ_c log(1 + Σ_{i: y_i≠c} e^{α(s_ic + δ)}) over the classes of a strip, 0-d."""
    exponents = strip.put((strip.similarity + margin).mul_(alpha), -torch.inf)
    return log_one_plus_sum_exp(exponents, dim=0).sum()


class ProxyLoss(Criterion):
    """A criterion that compares images with one learnable proxy p_c for each class.

    ``proxies`` (C, d), Kaiming-normal with fan_out, are optimised at ``proxy_lr_scale`` × the
    network's learning rate. ``per_class``: how many proxies a class has, class by class.
    """

    per_class = 1

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
        return self.compared(embeddings, self.proxies, uncertainty)

    def compared(self, embeddings: Tensor, proxies: Tensor, uncertainty: Tensor | None) -> Tensor:
        """(B, S): the similarities to the S classes that the ``proxies`` belong to."""
        return compare(embeddings, proxies, uncertainty)

    def by_strips(
        self,
        terms: Terms,
        embeddings: Tensor,
        labels: Tensor,
        uncertainty: Tensor | None = None,
        proxies: Tensor | None = None,
    ) -> list[tuple[Tensor, ...]]:
        """``terms`` of every Strip of the table (B, C): one list for each of the terms.

        A small table is one strip. Of a larger one nothing is kept: a strip is made, and again to
        go backward. ``labels`` number the classes of the ``proxies``, by default all there are.
        """
        proxies = self.proxies if proxies is None else proxies
        classes = rows_of_strip(len(embeddings) * self.per_class)
        rows = classes * self.per_class
        pieces = proxies.split(rows) if len(proxies) > rows else [proxies]

        def of_piece(
            embeddings: Tensor, uncertainty: Tensor | None, piece: Tensor, column: Tensor
        ) -> tuple[Tensor, ...]:
            similarity = self.compared(embeddings, piece, uncertainty)
            if len(pieces) == 1:
                return terms(Strip(similarity, column))
            inside = (column >= 0) & (column < similarity.shape[1])
            return terms(Strip(similarity, column.clamp(0, similarity.shape[1] - 1), inside))

        run = made_again(of_piece, len(pieces))
        columns = labels[:, None]
        found = [
            run(embeddings, uncertainty, piece, columns - k * classes if k else columns)
            for k, piece in enumerate(pieces)
        ]
        return [*zip(*found, strict=True)]

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
        own, pushes = self.by_strips(self._terms, embeddings, labels, uncertainty)
        positive = pull(total(own), labels, self.margin, self.alpha)
        negative = total(pushes) / self.num_classes
        self._report(positive=positive, negative=negative)
        return positive + negative

    def _terms(self, strip: Strip) -> tuple[Tensor, Tensor]:
        return strip.own(), push(strip, self.margin, self.alpha)


def proxy_losses() -> str:
    """Names of the losses that compare images with proxies of our own, for messages."""
    made = {name: load(place) for name, place in LOSSES.items()}
    own = (name for name, make in made.items() if inspect.isclass(make))
    return ", ".join(name for name in own if issubclass(made[name], ProxyLoss))
