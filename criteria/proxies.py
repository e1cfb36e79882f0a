"""Losses that compare images with one learnable proxy per class.

Kim et al., Proxy Anchor Loss for Deep Metric Learning, CVPR 2020.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from functools import partial
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

import processes
from criteria import LOSSES, PROXY_LR_SCALE, checks, load
from criteria.base import Criterion, ParameterGroup, check_batch, in_float32, written_out
from criteria.similarity import compare
from criteria.strips import Strip, Terms, recomputed, rows_per_strip, total

Batch = tuple[Tensor, Tensor, Tensor | None]
"""Embeddings (B, d), labels (B,), and the uncertainty (B, d) or None."""

FAR = -1e4
"""A similarity so low that the class does not count: e^x underflows to 0."""


def positive_term(
    similarity: Tensor, labels: Tensor, margin: float | Tensor, alpha: float
) -> Tensor:
    """1/|P⁺| Σ_{c∈P⁺} log(1 + Σ_{i: y_i=c} e^{-α(s_ic - m_c)}), P⁺ the classes of the batch.

    ``similarity`` (B, C); ``margin`` one number, or one for each class (C,).
    """
    return pull(Strip(similarity, labels[:, None]).own(), labels, margin, alpha)


def negative_term(similarity: Tensor, labels: Tensor, margin: float, alpha: float) -> Tensor:
    """1/C Σ_c log(1 + Σ_{i: y_i≠c} e^{α(s_ic + δ)}), ``similarity`` (B, C), δ the ``margin``."""
    _, pushes = own_and_push(Strip(similarity, labels[:, None]), margin, alpha)
    return pushes / similarity.shape[1]


def pull(own: Tensor, labels: Tensor, margin: float | Tensor, alpha: float) -> Tensor:
    """``positive_term``, given only the images' similarities to their own classes (B,)."""
    margin = margin[labels] if isinstance(margin, Tensor) else margin
    same = labels[:, None] == labels
    # Every image has the logarithm of its class; the shares make each class count once.
    counted = same.to(own.dtype)
    share = counted.sum(dim=1).reciprocal()
    return (share * _LogOfOwn.apply(-alpha * (own - margin), same, counted)).sum() / share.sum()


class _LogOfOwn(torch.autograd.Function):
    """log(1 + Σ_{j: same_ij} e^{x_j}) for every row i of ``same`` (B, B): x (B,) → (B,).

    ``same`` marks the pairs of images of one class, and ``counted`` is the same mask as numbers.
    The rows of one class are equal, so one exponential per image is enough. The gradient is written
    out, which gives the same bits as autograd with half the operators.
    """

    @staticmethod
    def forward(ctx: Any, exponents: Tensor, same: Tensor, counted: Tensor) -> Tensor:
        top = torch.where(same, exponents, -torch.inf).amax(dim=1).clamp_min(0)
        weights = counted * torch.exp(exponents - top)
        sums = weights.sum(dim=1) + torch.exp(-top)
        ctx.save_for_backward(weights, sums)
        return top + sums.log()

    @staticmethod
    @written_out
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        weights, sums = ctx.saved_tensors
        return ((grad / sums)[:, None] * weights).sum(dim=0), None, None


def own_and_push(strip: Strip, margin: float, alpha: float) -> tuple[Tensor, Tensor]:
    """``Strip.own`` (B,), and Σ_c log(1 + Σ_{i: y_i≠c} e^{α(s_ic + δ)}) over its classes, 0-d."""
    return _OwnAndPush.apply(*strip, margin, alpha)


class _OwnAndPush(torch.autograd.Function):
    """``own_and_push`` with one gradient for both results, of the same bits as autograd's two."""

    @staticmethod
    def forward(
        ctx: Any,
        similarity: Tensor,
        target: Tensor,
        inside: Tensor | None,
        margin: float,
        alpha: float,
    ) -> tuple[Tensor, Tensor]:
        strip = Strip(similarity, target, inside)
        exponents = strip.put((similarity + margin).mul_(alpha), -torch.inf)
        top = exponents.amax(dim=0).clamp_min(0)
        weights = exponents.sub_(top).exp_()
        sums = weights.sum(dim=0) + torch.exp(-top)
        ctx.save_for_backward(weights, sums, target, inside)
        ctx.alpha = alpha
        return strip.own(), (top + sums.log()).sum()

    @staticmethod
    @written_out
    def backward(ctx: Any, of_own: Tensor, of_push: Tensor) -> tuple[Tensor | None, ...]:
        weights, sums, target, inside = ctx.saved_tensors
        gradient = (of_push / sums * weights).mul_(ctx.alpha)
        # The weight of the own class is 0.
        gradient = Strip(gradient, target, inside).put(gradient, of_own[:, None])
        return gradient, None, None, None, None


class ProxyLoss(Criterion):
    """A criterion that compares images with one learnable proxy p_c for each class.

    ``proxies`` (C, d) are initialised Kaiming-normal with fan_out and trained at
    ``proxy_lr_scale`` × the network's learning rate. In a subclass with several proxies for each
    class, ``per_class``, they are (C · per_class, d), class by class.
    """

    per_class = 1
    no_memory = "it compares images with proxies, which already represent earlier images"

    def __init__(
        self, num_classes: int, embedding_size: int, proxy_lr_scale: float = PROXY_LR_SCALE
    ) -> None:
        super().__init__()
        checks.positive(num_classes=num_classes, embedding_size=embedding_size)
        checks.not_negative(proxy_lr_scale=proxy_lr_scale)
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.proxy_lr_scale = proxy_lr_scale
        self.proxies = nn.Parameter(torch.empty(num_classes, embedding_size))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")
        self.share: processes.Share | None = None
        self.register_state_dict_post_hook(_with_whole_proxies)
        self.register_load_state_dict_pre_hook(_with_own_proxies)

    def divide(self) -> None:
        """Keep only this process's share of the proxies, those of some of the classes.

        The losses and gradients stay those of a single process. So do state_dicts, but all
        processes have to make or load them together. Raises ValueError for fewer classes than
        processes.
        """
        if self.num_classes < processes.world():
            raise ValueError(
                f"{self.num_classes} classes cannot be divided among {processes.world()} "
                "processes: start fewer."
            )
        self.share = processes.Share(self.num_classes, self.per_class)
        self.proxies = processes.divided(self.proxies, self.share)

    @in_float32
    def similarity(self, embeddings: Tensor, uncertainty: Tensor | None = None) -> Tensor:
        """(B, C): the cosine s_ic, or IDML's s'_ic when there is an ``uncertainty``.

        Makes the whole table at once, of divided proxies too; ``by_strips`` does not.
        """
        if self.share is None:
            return self.compared(embeddings, self.proxies, uncertainty)
        given = [None if x is None else processes.part_of_all(x) for x in (embeddings, uncertainty)]
        own = self.compared(given[0], self.proxies, given[1])
        return processes.gather_rows(own.T, self.num_classes).T

    def compared(self, embeddings: Tensor, proxies: Tensor, uncertainty: Tensor | None) -> Tensor:
        """(B, S): the similarities to S classes, whose ``proxies`` (S · per_class, d) are."""
        return compare(embeddings, proxies, uncertainty)

    def by_strips(
        self,
        terms: Terms,
        embeddings: Tensor,
        labels: Tensor,
        uncertainty: Tensor | None = None,
        classes: Tensor | None = None,
    ) -> list[tuple[Tensor, ...]]:
        """``terms`` of every Strip of the table (B, C): for each term, its values on all strips.

        A small table is one strip. A larger one is never held as a whole: strips are computed one
        by one, and once more in the backward pass. With ``classes`` (sorted), the table has only
        these columns; the classes of the batch have to be among them.
        """
        if classes is not None:
            labels = torch.searchsorted(classes, labels)
        batch = embeddings, labels, uncertainty
        if self.share is not None:
            return self._by_strips_of_all(terms, batch, self.share, classes)
        proxies = self.proxies if classes is None else self._proxies_of(classes)
        most = rows_per_strip(len(embeddings) * self.per_class)
        rows = most * self.per_class
        pieces = proxies.split(rows) if len(proxies) > rows else [proxies]
        starts = range(0, len(pieces) * most, most)
        found = self._of_pieces(terms, batch, pieces, starts)
        return [*zip(*found, strict=True)]

    def _proxies_of(self, classes: Tensor) -> Tensor:
        """The proxies of some of this process's classes."""
        return self.proxies.unflatten(0, (-1, self.per_class))[classes].flatten(0, 1)

    def _of_pieces(
        self,
        terms: Terms,
        batch: Batch,
        pieces: Sequence[Tensor],
        starts: Sequence[int],
        *,
        alone: bool = True,
        absent: bool = False,
    ) -> list[tuple[Tensor, ...]]:
        """``terms`` of each of the ``pieces`` of the proxies, whose first classes are ``starts``.

        ``alone``: no other process has proxies. ``absent``: this process has none of the classes;
        its pieces are placeholders that must not count.
        """
        embeddings, labels, uncertainty = batch
        whole = alone and len(pieces) == 1

        def of_piece(
            embeddings: Tensor, uncertainty: Tensor | None, piece: Tensor, column: Tensor
        ) -> tuple[Tensor, ...]:
            similarity = self.compared(embeddings, piece, uncertainty)
            if whole:
                return terms(Strip(similarity, column))
            if absent:
                everywhere = torch.ones_like(similarity, dtype=torch.bool)
                similarity = similarity.masked_fill(everywhere, FAR)
                column = torch.full_like(column, -1)
            inside = (column >= 0) & (column < similarity.shape[1])
            return terms(Strip(similarity, column.clamp(0, similarity.shape[1] - 1), inside))

        run = recomputed(of_piece, len(pieces))
        columns = labels[:, None]
        return [
            run(embeddings, uncertainty, piece, columns - start if start else columns)
            for piece, start in zip(pieces, starts, strict=True)
        ]

    def _by_strips_of_all(
        self, terms: Terms, batch: Batch, share: processes.Share, classes: Tensor | None
    ) -> list[tuple[Tensor, ...]]:
        """``by_strips`` with proxies divided among processes: the strips of all processes."""
        embeddings, labels, uncertainty = batch
        most = rows_per_strip(len(embeddings) * self.per_class)
        first, proxies, counts, absent = share.own.start, self.proxies, share.counts, False
        if classes is not None:
            known = getattr(classes, "host", classes)  # see of_labels
            bounds = torch.searchsorted(known, torch.tensor(share.starts).to(known)).tolist()
            first, end = bounds[processes.rank() : processes.rank() + 2]
            own, absent = classes[first:end] - share.own.start, first == end
            # A process that has none of the classes takes its first proxy as a placeholder.
            proxies = self._proxies_of(own.new_zeros(1) if absent else own)
            counts = [max(1, end - start) for start, end in pairwise(bounds)]
        # All processes must make equally many strips, none of them empty, to gather them together.
        count = min(math.ceil(max(counts) / most), min(counts))
        units = proxies.unflatten(0, (-1, self.per_class)).tensor_split(count)
        pieces = [unit.flatten(0, 1) for unit in units]
        starts = [*accumulate(map(len, units), initial=first)][:-1]
        given = [None if x is None else processes.part_of_all(x) for x in (embeddings, uncertainty)]
        batch = given[0], labels, given[1]
        found = self._of_pieces(terms, batch, pieces, starts, alone=False, absent=absent)
        total = count * processes.world()
        parts = (torch.stack(part) for part in zip(*found, strict=True))
        return [processes.gather_rows(part, total).unbind() for part in parts]

    def parameter_groups(self, lr: float) -> list[ParameterGroup]:
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
        checks.positive(alpha=alpha)
        self.margin = margin
        self.alpha = alpha

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor, uncertainty: Tensor | None = None
    ) -> Tensor:
        """The loss, 0-d."""
        labels = check_batch(embeddings, labels, self.embedding_size, self.num_classes)
        terms = partial(own_and_push, margin=self.margin, alpha=self.alpha)
        own, pushes = self.by_strips(terms, embeddings, labels, uncertainty)
        positive = pull(total(own), labels, self.margin, self.alpha)
        negative = total(pushes) / self.num_classes
        self._report(positive=positive, negative=negative)
        return positive + negative


def _with_whole_proxies(loss: ProxyLoss, state: dict, prefix: str, metadata: dict) -> None:
    """Put the proxies of all processes into a state_dict."""
    if loss.share is not None:
        state[f"{prefix}proxies"] = loss.share.whole(loss.proxies)


def _with_own_proxies(loss: ProxyLoss, state: dict, prefix: str, *_: Any) -> None:
    """Reduce the proxies in a state_dict that is loaded to this process's share."""
    key = f"{prefix}proxies"
    if loss.share is not None and key in state:
        state[key] = loss.share.of(state[key])


def proxy_losses() -> str:
    """Names of the losses that are ProxyLosses, for messages; without those that do not load."""

    def is_one(place: str) -> bool:
        try:
            make = load(place)
        except Exception:
            return False
        return inspect.isclass(make) and issubclass(make, ProxyLoss)

    return ", ".join(name for name, place in LOSSES.items() if is_one(place))
