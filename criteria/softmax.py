"""Losses that classify an image by its cosines with the proxies of the classes.

Zhai and Wu, Classification is a Strong Baseline for Deep Metric Learning, BMVC 2019 (NormSoftmax).
Teh et al., ProxyNCA++, ECCV 2020.
Deng et al., ArcFace, CVPR 2019, and Sub-center ArcFace, ECCV 2020. Wang et al., CosFace, CVPR 2018.
An et al., Killing Two Birds with One Stone: Efficient and Robust Training of Face Recognition CNNs
by Partial FC, CVPR 2022.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from criteria import checks
from criteria.base import ParameterGroup, check_batch, in_float32, of_labels, written_out
from criteria.proxies import ProxyLoss
from criteria.strips import Strip, total


class Rows(NamedTuple):
    """What a softmax needs from the similarities s_ic of each image, (B,) each; κ is the scale.

    ``own``: s_ic for its own class. ``others``: log Σ_{c≠y_i} e^{κ s_ic}. ``nearest``:
    max_{c≠y_i} κ s_ic, without a gradient. ``sums``: Σ_{c≠y_i} κ s_ic, or None.
    """

    own: Tensor
    others: Tensor
    nearest: Tensor
    sums: Tensor | None = None

    def hits(self, scale: float) -> Tensor:
        """The share of images whose own class is more similar than all others, 0-d."""
        return (self.own.detach() * scale > self.nearest).to(self.own.dtype).mean()


def compare_rows(
    loss: ProxyLoss,
    scale: float,
    embeddings: Tensor,
    labels: Tensor,
    uncertainty: Tensor | None = None,
    classes: Tensor | None = None,
    *,
    sums: bool = False,
) -> Rows:
    """The Rows of a batch, including the ``sums`` if wanted; else as ProxyLoss.by_strips."""

    def terms(strip: Strip) -> tuple[Tensor, ...]:
        return _Rows.apply(*strip, scale, sums)

    own, others, nearest, *more = loss.by_strips(terms, embeddings, labels, uncertainty, classes)
    if len(own) == 1:
        return Rows(*own, *others, *nearest, *(part[0] for part in more))
    return Rows(
        total(own),
        torch.stack(others).logsumexp(dim=0),
        torch.stack(nearest).amax(dim=0),
        *map(total, more),
    )


class _Rows(torch.autograd.Function):
    """The Rows of a Strip, with a single gradient for all of them."""

    @staticmethod
    def forward(
        ctx: Any,
        similarity: Tensor,
        target: Tensor,
        inside: Tensor | None,
        scale: float,
        sums: bool,
    ) -> tuple[Tensor, ...]:
        strip = Strip(similarity, target, inside)
        # Not -∞: an image that has only its own class in this strip would give NaN.
        logits = strip.put(similarity * scale, torch.finfo(similarity.dtype).min)
        nearest = logits.amax(dim=1)
        weights = logits.softmax(dim=1)
        ctx.save_for_backward(weights, target, inside)
        ctx.scale = scale
        ctx.mark_non_differentiable(nearest)
        own = strip.own()
        # The largest weight is e^{nearest - others}, which gives ``others``.
        found = own, nearest - weights.amax(dim=1).log(), nearest
        return (*found, scale * (similarity.sum(dim=1) - own)) if sums else found

    @staticmethod
    @written_out
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weights, target, inside = ctx.saved_tensors
        of_own, of_others, _, *of_sums = grads
        gradient = weights * (ctx.scale * of_others)[:, None]
        for each in of_sums:
            gradient += (ctx.scale * each)[:, None]
        gradient = Strip(gradient, target, inside).put(gradient, of_own[:, None])
        return gradient, None, None, None, None


def cross_entropy(own: Tensor, others: Tensor) -> Tensor:
    """Mean of -log(e^z / (e^z + Σ_c e^{z_c})), 0-d: ``own`` z, ``others`` log Σ_c e^{z_c}, (B,)."""
    return -F.logsigmoid(own - others).mean()


def smoothed_cross_entropy(
    own: Tensor, others: Tensor, sums: Tensor, smoothing: float, classes: int
) -> Tensor:
    """``cross_entropy`` with label smoothing: the target is 1 - ε for the image's class plus ε/C.

    ε is the ``smoothing``, C the number of ``classes``, and ``sums`` (B,) are Σ_c z_c over the
    other classes.
    """
    expected = (1 - smoothing) * own + smoothing / classes * (sums + own)
    return (torch.logaddexp(own, others) - expected).mean()


class NormalisedSoftmaxLoss(ProxyLoss):
    """Normalised softmax: cross-entropy over the cosines with the proxies.

        L = mean_i CE(s_i / T, y_i)

    T ``temperature`` 0.05. With label ``smoothing`` ε, the target is 1 - ε for the image's class
    plus ε/C for every class. The proxies are initialised uniformly in ±1/√d and learn at the
    network's rate. With ``uncertainty`` (B, d), IDML's similarity replaces the cosine. ``terms``:
    accuracy. Raises ValueError like ProxyAnchorLoss.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        temperature: float = 0.05,
        smoothing: float = 0.0,
        *,
        proxy_lr_scale: float = 1.0,
    ) -> None:
        super().__init__(num_classes, embedding_size, proxy_lr_scale)
        checks.positive(temperature=temperature)
        if not 0 <= smoothing < 1:
            raise ValueError(f"smoothing must be at least 0 and below 1, not {smoothing}.")
        self.temperature = temperature
        self.smoothing = smoothing
        nn.init.uniform_(self.proxies, -(embedding_size**-0.5), embedding_size**-0.5)

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor, uncertainty: Tensor | None = None
    ) -> Tensor:
        """The loss, 0-d."""
        labels = check_batch(embeddings, labels, self.embedding_size, self.num_classes)
        scale, smooth = 1 / self.temperature, self.smoothing > 0
        rows = compare_rows(self, scale, embeddings, labels, uncertainty, sums=smooth)
        self._report(accuracy=rows.hits(scale))
        if rows.sums is None:
            return cross_entropy(scale * rows.own, rows.others)
        return smoothed_cross_entropy(
            scale * rows.own, rows.others, rows.sums, self.smoothing, self.num_classes
        )


class ProxyNCAPlusPlusLoss(ProxyLoss):
    """ProxyNCA++: cross-entropy over the squared distances to the proxies.

        L = mean_i CE(-‖x̂_i - p̂‖² / T, y_i),   ‖x̂_i - p̂_c‖² = 2 - 2 s_ic

    T ``temperature`` 1/9. The proxies are initialised from N(0, 1/64). As released, they learn at
    ``proxy_lr_scale`` 100,000 × the network's rate, without weight decay, and with Adam's ε at
    ``proxy_eps`` 1, so that steps are proportional to the gradient. ``terms``: accuracy. Raises
    ValueError like ProxyAnchorLoss.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        temperature: float = 1 / 9,
        *,
        proxy_lr_scale: float = 1e5,
        proxy_eps: float = 1.0,
    ) -> None:
        super().__init__(num_classes, embedding_size, proxy_lr_scale)
        checks.positive(temperature=temperature, proxy_eps=proxy_eps)
        self.temperature = temperature
        self.proxy_eps = proxy_eps
        nn.init.normal_(self.proxies, std=1 / 8)

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor, uncertainty: Tensor | None = None
    ) -> Tensor:
        """The loss, 0-d."""
        labels = check_batch(embeddings, labels, self.embedding_size, self.num_classes)
        scale = 2 / self.temperature  # the constant -2/T cancels in the softmax
        rows = compare_rows(self, scale, embeddings, labels, uncertainty)
        self._report(accuracy=rows.hits(scale))
        return cross_entropy(scale * rows.own, rows.others)

    def parameter_groups(self, lr: float) -> list[ParameterGroup]:
        """The proxies with their own rate and ε, without weight decay."""
        (proxies,) = super().parameter_groups(lr)
        return [proxies | {"weight_decay": 0.0, "eps": self.proxy_eps}]


class MarginSoftmaxLoss(ProxyLoss):
    """Cross-entropy over the cosines, with a margin on the cosine with an image's own class.

        L = mean_i CE(κ·s'_i, y_i),   s'_ic = s_ic for c ≠ y_i,   s_ic = max_k x̂_i·p̂_ck

    κ ``scale``; ``with_margin`` gives s'_ic at c = y_i. Each class has K = ``sub_centers`` proxies,
    of which the nearest counts. With ``sample_rate`` below 1 (PartialFC), every step compares the
    batch with only that share of the classes: the batch's own, and random others. The proxies
    (C·K, d), class by class, are initialised from N(0, 0.01²) and learn at ``proxy_lr_scale`` × the
    network's rate. With ``uncertainty`` (B, d), IDML's similarity replaces the cosine. ``terms``:
    own, the mean similarity to the own class; accuracy. Raises ValueError like ProxyAnchorLoss.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float,
        scale: float,
        *,
        sub_centers: int = 1,
        sample_rate: float = 1.0,
        proxy_lr_scale: float = 1.0,
    ) -> None:
        checks.positive(scale=scale, sub_centers=sub_centers)
        checks.share(sample_rate=sample_rate)
        checks.not_negative(margin=margin)
        checks.whole(sub_centers=sub_centers)
        super().__init__(num_classes, embedding_size, proxy_lr_scale)
        self.margin = margin
        self.scale = scale
        self.per_class = self.sub_centers = int(sub_centers)
        self.sample_rate = sample_rate
        self.proxies = nn.Parameter(torch.empty(num_classes * self.sub_centers, embedding_size))
        nn.init.normal_(self.proxies, std=0.01)

    def with_margin(self, own: Tensor) -> Tensor:
        """s' from the images' similarities s to their own classes, (B,) → (B,)."""
        raise NotImplementedError

    def compared(self, embeddings: Tensor, proxies: Tensor, uncertainty: Tensor | None) -> Tensor:
        """(B, S): the similarity to the nearest of a class's proxies (S·K, d)."""
        similarity = super().compared(embeddings, proxies, uncertainty)
        if self.sub_centers == 1:
            return similarity
        return similarity.unflatten(1, (-1, self.sub_centers)).amax(dim=2)

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor, uncertainty: Tensor | None = None
    ) -> Tensor:
        """The loss, 0-d."""
        labels = check_batch(embeddings, labels, self.embedding_size, self.num_classes)
        classes = None
        if self.sample_rate < 1:
            classes = sampled_classes(labels, self.num_classes, self.sample_rate)
        rows = compare_rows(self, self.scale, embeddings, labels, uncertainty, classes)
        self._report(own=rows.own.detach().mean(), accuracy=rows.hits(self.scale))
        return cross_entropy(self.scale * self.with_margin(rows.own), rows.others)


def sampled_classes(labels: Tensor, num_classes: int, rate: float) -> Tensor:
    """The classes of a batch, and random others up to a share ``rate`` of all classes, sorted."""

    def sampled(labels: Tensor, references: None) -> tuple[Tensor]:
        order = torch.rand(num_classes).to(labels.device)  # on the CPU: the same on any device
        order[labels] = 2.0
        count = max(int(rate * num_classes), int((order == 2.0).sum()))
        return (order.topk(count).indices.sort().values,)

    (classes,) = of_labels(sampled, labels)
    return classes


class ArcFaceLoss(MarginSoftmaxLoss):
    """ArcFace: ``MarginSoftmaxLoss`` with a margin on the angle, s' = cos(arccos s + m).

    m ``margin`` 0.5, κ ``scale`` 64. As released, ∂s'/∂s is taken to be 1; with ``exact_gradient``
    it is cos m + sin m · s/√(1 - s²).
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.5,
        scale: float = 64.0,
        *,
        exact_gradient: bool = False,
        **more: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, **more)
        self.exact_gradient = exact_gradient

    def with_margin(self, own: Tensor) -> Tensor:
        """cos(arccos s + m)."""
        cosine = own if self.exact_gradient else own.detach()
        sine = (1 - cosine.square()).clamp_min(1e-12).sqrt()
        moved = cosine * math.cos(self.margin) - sine * math.sin(self.margin)
        return moved if self.exact_gradient else own + (moved - cosine)


class CosFaceLoss(MarginSoftmaxLoss):
    """CosFace: ``MarginSoftmaxLoss`` with a margin on the cosine, s' = s - m.

    m ``margin`` 0.4, κ ``scale`` 64.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: float = 0.4,
        scale: float = 64.0,
        **more: Any,
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, **more)

    def with_margin(self, own: Tensor) -> Tensor:
        """s - m."""
        return own - self.margin
