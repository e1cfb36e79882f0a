"""The losses: tensors in, one scalar out. Knows no network, no data set, no device name.

Notation: batch B, embedding size d, classes C; x_i the raw head output of image i, x̂ = x/‖x‖₂,
y_i its label; p_c the raw proxy of class c, p̂_c at unit length; s_ic = x̂_i·p̂_c.

proxies       ProxyAnchorLoss (Kim et al., Proxy Anchor Loss, CVPR 2020), AMLoss (the same with a
              learnable margin a class), introspective_similarity (Wang et al., Introspective Deep
              Metric Learning), DisentanglingLoss (Park et al., Deep Disentangled Metric Learning,
              AAAI 2025)
pairs         TripletLoss, SemihardTripletLoss, NPairLoss, MultiSimilarityLoss
regularisers  SphericalConstraint, NormPenalty (Zhang et al., Deep Metric Learning with Spherical
              Embedding, NeurIPS 2020)
divide and    MarginLoss, DistanceWeightedMiner (Wu et al., Sampling Matters, ICCV 2017), the other
conquer       miners, mask_orthogonality (Sanakoyeu et al., CVPR 2019 and TPAMI 2021)
library       library_loss: any loss of pytorch-metric-learning
together      build: a loss by its name; compose: a loss by its name with its attachments;
              Objective: a weighted sum of terms over the same Embeddings

Every criterion is called as ``criterion(embeddings, labels)``, says how its parameters are
optimised (``parameter_groups``), and keeps what it saw (``terms``, detached 0-d tensors,
unweighted). All of them compute in float32 whatever the autocast state; float64 stays float64. Bad
input raises a ValueError of one sentence; a label's range is checked on the CPU only, because on an
accelerator the check would wait for the device in every step.

Deviations from the released code: every exponential sits in a log-sum-exp, so alpha up to 128 and
beyond stays finite; AMLoss' proxy-proxy term never holds the (C, C) matrix; a miner never returns
the anchor itself or a same-class image as a negative.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Triplets = tuple[Tensor, Tensor, Tensor]


class Embeddings(NamedTuple):
    """Raw outputs of a network's heads for one batch; nothing is normalised.

    ``embedding`` (B, d) · ``uncertainty`` (B, d), the introspective head · ``specific``, the
    class-specific head of DDML; where it is there, it and ``embedding`` are (B, 2d): the means,
    then the raw spreads.
    """

    embedding: Tensor
    uncertainty: Tensor | None = None
    specific: Tensor | None = None

    @property
    def retrieval(self) -> Tensor:
        """What images are compared by at test time, (B, d): the embedding, or DDML's main mean."""
        return self.embedding if self.specific is None else self.embedding.chunk(2, dim=1)[0]


# ---------------------------------------------------------------- what all of them share


def _float32(value: Any) -> Any:
    if isinstance(value, Embeddings):
        return Embeddings(*map(_float32, value))
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


def in_float32(function: Callable) -> Callable:
    """Run ``function`` outside autocast, its half-precision tensors as float32 (float64 stays)."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        args = tuple(_float32(value) for value in args)
        kwargs = {name: _float32(value) for name, value in kwargs.items()}
        leaves = itertools.chain.from_iterable(
            value if isinstance(value, Embeddings) else (value,)
            for value in itertools.chain(args, kwargs.values())
        )
        device = next((leaf.device.type for leaf in leaves if isinstance(leaf, Tensor)), "cpu")
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)

    return wrapper


class Criterion(nn.Module):
    """A loss: a scalar from a batch, the parameters it learns, and what it saw.

    ``terms`` holds detached 0-d tensors of the latest call; nothing waits for the device until they
    are read. ``unit_length`` is what an Objective feeds it: True unit vectors, False raw ones, None
    whatever the run's l2_norm says (no matter to a loss that normalises by itself).
    """

    unit_length: ClassVar[bool | None] = None

    def __init__(self) -> None:
        super().__init__()
        self.terms: dict[str, Tensor] = {}

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Groups for a torch optimiser, given the network's learning rate; [] if nothing is learnt.

        Each has a "name"; "optimizer", "step" and "gamma" mark a group with an optimiser and a
        StepLR schedule of its own.
        """
        return []

    def class_values(self) -> dict[str, Tensor]:
        """What is learnt for each class, by its name in the singular: (C,), detached."""
        return {}

    def _report(self, **terms: Tensor) -> None:
        self.terms = {name: value.detach() for name, value in terms.items()}


def _check_batch(
    embeddings: Tensor, labels: Tensor, size: int | None = None, classes: int | None = None
) -> Tensor:
    """Raise ValueError for a batch that no loss can use; returns the labels as int64."""
    _check_embeddings(embeddings, size)
    if labels.shape != embeddings.shape[:1]:
        raise ValueError(
            f"{len(embeddings)} embeddings came with labels of shape {tuple(labels.shape)}: "
            "give one label for each embedding."
        )
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(f"Labels must be integers, not {labels.dtype}: convert them with .long().")
    labels = labels.long()
    if classes is not None and labels.device.type == "cpu":
        low, high = labels.aminmax()
        if low < 0 or high >= classes:
            raise ValueError(
                f"Labels run from {low} to {high} but the loss was built for {classes} classes: "
                f"number the training classes 0 to {classes - 1}."
            )
    return labels


def _check_embeddings(embeddings: Tensor, size: int | None = None) -> None:
    if embeddings.ndim != 2:
        raise ValueError(
            f"Embeddings must have the shape (batch, size), not {tuple(embeddings.shape)}."
        )
    if len(embeddings) == 0:
        raise ValueError("The batch is empty: a loss needs at least one image.")
    if size is not None and embeddings.shape[1] != size:
        raise ValueError(
            f"The embeddings have {embeddings.shape[1]} dimensions but the loss was built for "
            f"{size}: use the same embedding size for the network and the loss."
        )


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{name} must be above 0, not {value}.")


def _check_not_negative(**values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must be 0 or more, not {value}.")


def cosine_similarity(embeddings: Tensor, proxies: Tensor) -> Tensor:
    """s_ic = x̂_i·p̂_c, (B, d) and (C, d) → (B, C).

    The columns of the product are scaled instead of the proxies: with C in the thousands that is
    the smaller matrix.
    """
    return F.normalize(embeddings) @ proxies.T / proxies.norm(dim=1).clamp_min(1e-12)


def log_one_plus_sum_exp(exponents: Tensor, dim: int) -> Tensor:
    """log(1 + Σ e^x) along ``dim``: a log-sum-exp with an appended 0. −∞ leaves an entry out."""
    top = exponents.detach().amax(dim, keepdim=True).clamp_min(0)
    total = (exponents - top).exp_().sum(dim, keepdim=True) + torch.exp(-top)
    return (top + total.log()).squeeze(dim)


# ---------------------------------------------------------------- proxies


def positive_term(
    similarity: Tensor, labels: Tensor, margin: float | Tensor, alpha: float
) -> Tensor:
    """1/|P⁺| Σ_{c∈P⁺} log(1 + Σ_{i: y_i=c} e^{-α(s_ic - m_c)}), P⁺ the classes of the batch.

    ``similarity`` (B, C); ``margin`` one number or one a class (C,).
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


@in_float32
def introspective_similarity(embeddings: Tensor, uncertainty: Tensor, proxies: Tensor) -> Tensor:
    """IDML's similarity, which takes the place of the cosine in a proxy loss.

        s'_ic = 1 - (1 - s_ic)·exp(-(‖u_i‖² + 4) / (5·‖x_i - p_c‖²))

    ``embeddings`` x (B, d) and ``uncertainty`` u (B, d) as the network gives them, ``proxies`` p
    (C, d) raw → (B, C). A proxy's own uncertainty is 0. With both heads at unit length, as
    released, ‖u‖² + 4 is the constant 5 and nothing is learnt about the uncertainty.

    Raises ValueError when the two heads disagree about the batch or the sizes do not fit.
    """
    _check_embeddings(embeddings, proxies.shape[1])
    if uncertainty.shape[:1] != embeddings.shape[:1] or uncertainty.ndim != 2:
        raise ValueError(
            f"The uncertainty has the shape {tuple(uncertainty.shape)} but there are "
            f"{len(embeddings)} embeddings: give one uncertainty vector for each embedding."
        )
    product = embeddings @ proxies.T
    length, proxy_length = embeddings.norm(dim=1, keepdim=True), proxies.norm(dim=1)
    cosine = product / (length * proxy_length).clamp_min(1e-12)
    distance = (length.square() + proxy_length.square() - 2 * product).clamp_min(1e-12)
    spread = uncertainty.square().sum(dim=1, keepdim=True) + 4
    return 1 - (1 - cosine) * torch.exp(-spread / (5 * distance))


class ProxyLoss(Criterion):
    """A criterion that compares images with one learnable proxy p_c a class.

    ``proxies`` (C, d), Kaiming-normal with fan_out, are optimised at ``proxy_lr_scale`` × the
    network's learning rate.
    """

    def __init__(self, num_classes: int, embedding_size: int, proxy_lr_scale: float) -> None:
        super().__init__()
        _check_positive(num_classes=num_classes, embedding_size=embedding_size)
        _check_not_negative(proxy_lr_scale=proxy_lr_scale)
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.proxy_lr_scale = proxy_lr_scale
        self.proxies = nn.Parameter(torch.empty(num_classes, embedding_size))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    @in_float32
    def similarity(self, embeddings: Tensor, uncertainty: Tensor | None = None) -> Tensor:
        """(B, C): the cosine s_ic, or IDML's s'_ic when there is an ``uncertainty``."""
        if uncertainty is None:
            return cosine_similarity(embeddings, self.proxies)
        return introspective_similarity(embeddings, uncertainty, self.proxies)

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
        proxy_lr_scale: float = 100.0,
    ) -> None:
        super().__init__(num_classes, embedding_size, proxy_lr_scale)
        _check_positive(alpha=alpha)
        self.margin = margin
        self.alpha = alpha

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor, uncertainty: Tensor | None = None
    ) -> Tensor:
        """The loss, 0-d."""
        labels = _check_batch(embeddings, labels, self.embedding_size, self.num_classes)
        similarity = self.similarity(embeddings, uncertainty)
        positive = positive_term(similarity, labels, self.margin, self.alpha)
        negative = negative_term(similarity, labels, self.margin, self.alpha)
        self._report(positive=positive, negative=negative)
        return positive + negative


class AMLoss(ProxyLoss):
    """Proxy-Anchor with a learnable margin m_c a class, raised where proxies crowd.

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
        proxy_lr_scale: float = 100.0,
    ) -> None:
        super().__init__(num_classes, embedding_size, proxy_lr_scale)
        _check_positive(
            alphap=alphap, alphan=alphan, margin_step=margin_step, margin_gamma=margin_gamma
        )
        _check_not_negative(lam=lam, margin_lr=margin_lr)
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
        labels = _check_batch(embeddings, labels, self.embedding_size, self.num_classes)
        similarity = self.similarity(embeddings, uncertainty)
        positive = positive_term(similarity, labels, self.margins, self.alphap)
        negative = negative_term(similarity, labels, self.margin, self.alphan)
        crowding = ProxyCrowding.apply(F.normalize(self.proxies))
        margin = F.softplus(crowding - self.margins + self.delta).mean()
        self._report(positive=positive, negative=negative, margin=margin)
        return positive + negative + self.lam * margin

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The proxies, and the margins with the optimiser and the schedule of their own."""
        margins = {"name": "margins", "params": [self.margins], "optimizer": "adamw"}
        return [*super().parameter_groups(lr), margins | self.margin_schedule]

    def class_values(self) -> dict[str, Tensor]:
        """The learned margin of each class."""
        return {"margin": self.margins.detach()}


class ProxyCrowding(torch.autograd.Function):
    """log Σ_{k≠c} e^{p̂_c·p̂_k} of every class c: unit proxies (C, d) → (C,).

    AMLoss' third term is softplus(crowding_c - m_c + δ). The matrix E_ck = e^{p̂_c·p̂_k} takes
    512 MB at C = 11,318, so it is made strip by strip, and again in the backward pass. E is
    symmetric: only its upper half is computed, and with w_c the incoming gradient over the row sum,
    the gradient of p̂_c is Σ_k (w_c + w_k) E_ck p̂_k.
    """

    strip_elements = 2**24  # 64 MiB of float32

    @staticmethod
    def forward(ctx: Any, unit: Tensor) -> Tensor:
        """Row sums of E without its diagonal, as logarithms."""
        sums = unit.new_zeros(len(unit))
        for start, stop, strip in ProxyCrowding._strips(unit):
            sums[start:stop] += strip.sum(dim=1)
            sums[stop:] += strip[:, stop - start :].sum(dim=0)
        ctx.save_for_backward(unit, sums)
        return sums.log()

    @staticmethod
    @torch.autograd.function.once_differentiable
    @in_float32
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        """Gradient of the unit proxies, (C, d)."""
        unit, sums = ctx.saved_tensors
        weight = grad / sums.clamp_min(torch.finfo(sums.dtype).tiny)
        gradient = torch.zeros_like(unit)
        for start, stop, strip in ProxyCrowding._strips(unit):
            strip *= weight[start:stop, None] + weight[start:]
            gradient[start:stop] += strip @ unit[start:]
            gradient[stop:] += strip[:, stop - start :].T @ unit[start:stop]
        return gradient

    @staticmethod
    def _strips(unit: Tensor) -> Iterator[tuple[int, int, Tensor]]:
        """E[start:stop, start:] with a zero diagonal, from top to bottom."""
        rows = max(1, ProxyCrowding.strip_elements // len(unit))
        for start in range(0, len(unit), rows):
            stop = min(start + rows, len(unit))
            strip = (unit[start:stop] @ unit[start:].T).exp_()
            yield start, stop, strip.fill_diagonal_(0)


def _log_softplus(x: Tensor) -> Tensor:
    """log(log(1 + e^x)): x itself, to float32's precision, where softplus would leave its range."""
    low = x <= -20
    return torch.where(low, x, F.softplus(x.masked_fill(low, 0.0)).log())


class DisentanglingLoss(Criterion):
    """DDML: keeps what is common to all classes out of a proxy loss's embedding.

    The main head gives [μ | r], the class-specific head [μ' | r'], each (B, 2d); σ is
    softplus(r - 5). One sample of each, z = μ + σ·ε and z' = μ' + σ'·ε', ε standard normal, gives

        agnostic = CE(κ·ẑ·p̂, uniform over the C classes)
        specific = CE(κ·ẑ'·p̂, y)
        split    = mean_i Σ_d [log N(z'; μ', σ'²) - log N(z'; 0, 1)]
        L        = base(μ) + al·agnostic + be·specific + gam·split

    ``base`` is a proxy loss (ProxyAnchorLoss, AMLoss), whose proxies p it uses; κ ``scale`` 23. The
    noise is drawn ε, then ε', each torch.randn of shape (B, d), so that a seed reproduces both.
    ``terms``: the base's, metric, agnostic, specific, split. Raises ValueError for a base without
    proxies, and for the same batches as the base.
    """

    def __init__(
        self,
        base: ProxyLoss,
        al: float = 1.0,
        be: float = 0.1,
        gam: float = 1e-5,
        scale: float = 23.0,
    ) -> None:
        super().__init__()
        if not isinstance(base, ProxyLoss):
            raise ValueError(
                "The disentangling loss compares its samples with class proxies, which "
                f"{type(base).__name__} does not have: give it a proxy loss ({_proxy_losses()})."
            )
        _check_not_negative(al=al, be=be, gam=gam)
        _check_positive(scale=scale)
        self.base = base
        self.al = al
        self.be = be
        self.gam = gam
        self.scale = scale

    @in_float32
    def forward(self, embedding_params: Tensor, specific_params: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-d, from the two heads' outputs (B, 2d) and the labels (B,)."""
        size = 2 * self.base.embedding_size
        labels = _check_batch(embedding_params, labels, size, self.base.num_classes)
        _check_batch(specific_params, labels, size)
        mean, sigma = self._normal(embedding_params)
        specific_mean, specific_sigma = self._normal(specific_params)
        log_sigma = _log_softplus(specific_params.chunk(2, dim=1)[1] - 5)
        noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device)
        specific_noise = torch.randn(mean.shape, dtype=mean.dtype, device=mean.device)
        sample = mean + sigma * noise
        specific_sample = specific_mean + specific_sigma * specific_noise

        metric = self.base(mean, labels)
        uniform = F.log_softmax(self.scale * self.base.similarity(sample), dim=1)
        agnostic = -uniform.mean()
        logits = self.scale * self.base.similarity(specific_sample)
        specific = F.cross_entropy(logits, labels)
        # (z' - μ')/σ' is the noise itself and the constants of the two densities cancel.
        densities = (specific_sample.square() - specific_noise.square()) / 2 - log_sigma
        split = densities.sum(dim=1).mean()

        self._report(metric=metric, agnostic=agnostic, specific=specific, split=split)
        self.terms |= self.base.terms
        return metric + self.al * agnostic + self.be * specific + self.gam * split

    @staticmethod
    def _normal(params: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = params.chunk(2, dim=1)
        return mean, F.softplus(raw - 5)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The base's groups: the disentangling itself learns nothing but the network's heads."""
        return self.base.parameter_groups(lr)

    def class_values(self) -> dict[str, Tensor]:
        """The base's."""
        return self.base.class_values()


# ---------------------------------------------------------------- pairs and triplets


def _distances(embeddings: Tensor, squared: bool) -> Tensor:
    """‖x̂_i - x̂_j‖², or its root, (B, B)."""
    unit = F.normalize(embeddings)
    distances = (2 - 2 * unit @ unit.T).clamp_min(0)
    return distances if squared else (distances + 1e-8).sqrt()


def _pair_masks(labels: Tensor) -> tuple[Tensor, Tensor]:
    """(B, B) each: pairs of two images of one class, pairs of two classes."""
    same = labels[:, None] == labels
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


class TripletLoss(Criterion):
    """Triplet loss over all triplets of the batch, or over mined ones.

        L = mean of [D_ap - D_an + margin]₊ over every (anchor, positive, negative)

    D is the squared distance of unit vectors (``squared=False``: the distance), ``margin`` 1.0, as
    in SEC. The mean counts inactive triplets too. With a ``miner`` (a name of MINERS or an object),
    or ``triplets`` given in the call, the mean is over the active ones, as in divide and conquer.
    ``soft`` takes log(1 + e^{D_ap - D_an}) instead of the hinge. ``terms``: active, the share of
    active triplets. Raises ValueError for an empty batch; one without triplets gives 0.
    """

    def __init__(
        self,
        margin: float = 1.0,
        *,
        squared: bool = True,
        soft: bool = False,
        miner: Miner | str | None = None,
    ) -> None:
        super().__init__()
        _check_not_negative(margin=margin)
        self.margin = margin
        self.squared = squared
        self.soft = soft
        self.miner = build_miner(miner, margin) if isinstance(miner, str) else miner

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor, triplets: Triplets | None = None
    ) -> Tensor:
        """The loss, 0-d, from raw embeddings (B, d) and labels (B,)."""
        labels = _check_batch(embeddings, labels)
        if triplets is None and self.miner is not None:
            triplets = self.miner(embeddings, labels)
        distances = _distances(embeddings, self.squared)
        if triplets is None:
            return self._over_all(distances, labels)
        return self._over_mined(distances, *triplets)

    def _over_all(self, distances: Tensor, labels: Tensor) -> Tensor:
        positive, negative = _pair_masks(labels)
        anchors, positives = positive.nonzero(as_tuple=True)
        valid = negative[anchors]
        losses = _hinge(
            distances[anchors, positives][:, None] - distances[anchors], self.margin, self.soft
        ).masked_fill(~valid, 0)
        triplets = valid.sum().clamp_min(1)
        self._report(active=(losses > 0).sum() / triplets)
        return losses.sum() / triplets

    def _over_mined(
        self, distances: Tensor, anchors: Tensor, positives: Tensor, negatives: Tensor
    ) -> Tensor:
        gaps = distances[anchors, positives] - distances[anchors, negatives]
        losses = _hinge(gaps, self.margin, self.soft)
        active = (losses > 0).sum()
        self._report(active=active / max(len(anchors), 1))
        return losses.sum() / active.clamp_min(1)


def _hinge(gaps: Tensor, margin: float, soft: bool) -> Tensor:
    return F.softplus(gaps) if soft else F.relu(gaps + margin)


class SemihardTripletLoss(Criterion):
    """Triplet loss with the semi-hard negative of every positive pair (Schroff et al., 2015).

        L = mean over ordered positive pairs of [D_ap - D_an + margin]₊

    n is the nearest negative farther from the anchor than the positive, else the farthest negative.
    D is the squared distance of unit vectors (``squared=False``: the distance), ``margin`` 0.2;
    ``soft`` takes log(1 + e^{D_ap - D_an}). ``terms``: active, the share of active pairs. Raises
    ValueError for an empty batch; one without triplets gives 0.
    """

    def __init__(self, margin: float = 0.2, *, squared: bool = True, soft: bool = False) -> None:
        super().__init__()
        _check_not_negative(margin=margin)
        self.margin = margin
        self.squared = squared
        self.soft = soft

    @in_float32
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-d, from raw embeddings (B, d) and labels (B,)."""
        labels = _check_batch(embeddings, labels)
        positive, negative = _pair_masks(labels)
        anchors, positives = (positive & negative.any(dim=1, keepdim=True)).nonzero(as_tuple=True)
        distances = _distances(embeddings, self.squared)
        to_positive, to_all = distances[anchors, positives], distances[anchors]
        negatives = negative[anchors]
        farther = negatives & (to_all > to_positive[:, None])
        nearest_farther = to_all.masked_fill(~farther, torch.inf).amin(dim=1)
        farthest = to_all.masked_fill(~negatives, -torch.inf).amax(dim=1)
        to_negative = torch.where(farther.any(dim=1), nearest_farther, farthest)
        losses = _hinge(to_positive - to_negative, self.margin, self.soft)
        pairs = max(len(anchors), 1)
        self._report(active=(losses > 0).sum() / pairs)
        return losses.sum() / pairs


class NPairLoss(Criterion):
    """N-pair loss on unit vectors (Sohn, 2016; normalised as in SEC).

        L = mean_c -log softmax_k( (scale·x̂_c)·(scale·x̂⁺_k) )_c

    x_c and x⁺_c are the first and the second image of class c in the batch; classes with one image
    are left out. ``scale`` 5 lengthens both vectors. ``terms``: accuracy, the share of first images
    whose own second image is the nearest. Raises ValueError for an empty batch; one without a pair
    gives 0.
    """

    def __init__(self, scale: float = 5.0) -> None:
        super().__init__()
        _check_positive(scale=scale)
        self.scale = scale

    @in_float32
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-d, from raw embeddings (B, d) and labels (B,)."""
        labels = _check_batch(embeddings, labels)
        first, second = self._pairs(labels)
        vectors = self.scale * F.normalize(embeddings)
        logits = vectors[first] @ vectors[second].T
        target = torch.arange(len(first), device=labels.device)
        pairs = max(len(first), 1)
        nearest_is_own = (logits <= logits.diagonal()[:, None]).all(dim=1)
        self._report(accuracy=nearest_is_own.sum() / pairs)
        return F.cross_entropy(logits, target, reduction="sum") / pairs

    @staticmethod
    def _pairs(labels: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the first and of the second image of every class that has two."""
        same = labels[:, None] == labels
        rank = same.tril(-1).sum(dim=1)
        first = ((rank == 0) & (same.sum(dim=1) > 1)).nonzero().squeeze(1)
        second = (same[first] & (rank == 1)).int().argmax(dim=1)
        return first, second


class MultiSimilarityLoss(Criterion):
    """Multi-similarity loss with its mining (Wang et al., CVPR 2019; constants of SEC).

        L = 1/B Σ_i { 1/α log(1 + Σ_{p∈P_i} e^{-α(s_ip - λ)})
                    + 1/β log(1 + Σ_{n∈N_i} e^{ β(s_in - λ)}) }

    P_i: positives with s_ip - ε < max_n s_in; N_i: negatives with s_in + ε > min_p s_ip; an image
    without either is left out. Pairs with s ≥ 1 - 1e-5 count as the image itself. α ``alpha`` 2, β
    ``beta`` 40, λ ``base`` 0.5, ε ``epsilon`` 0.1. ``terms``: active, the share of images with
    mined pairs. Raises ValueError for an empty batch.
    """

    def __init__(
        self, alpha: float = 2.0, beta: float = 40.0, base: float = 0.5, epsilon: float = 0.1
    ) -> None:
        super().__init__()
        _check_positive(alpha=alpha, beta=beta)
        self.alpha = alpha
        self.beta = beta
        self.base = base
        self.epsilon = epsilon

    @in_float32
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-d, from raw embeddings (B, d) and labels (B,)."""
        labels = _check_batch(embeddings, labels)
        unit = F.normalize(embeddings)
        similarity = unit @ unit.T
        positive, negative = self._mine(similarity.detach(), *_pair_masks(labels))
        used = positive.any(dim=1) & negative.any(dim=1)
        offset = similarity - self.base
        pull = (-self.alpha * offset).masked_fill(~positive, -torch.inf)
        push = (self.beta * offset).masked_fill(~negative, -torch.inf)
        losses = (
            log_one_plus_sum_exp(pull, dim=1) / self.alpha
            + log_one_plus_sum_exp(push, dim=1) / self.beta
        )
        self._report(active=used.float().mean())
        return (losses * used).sum() / len(labels)

    def _mine(
        self, similarity: Tensor, positive: Tensor, negative: Tensor
    ) -> tuple[Tensor, Tensor]:
        positive = positive & (similarity < 1 - 1e-5)
        hardest_negative = similarity.masked_fill(~negative, -torch.inf).amax(dim=1, keepdim=True)
        hardest_positive = similarity.masked_fill(~positive, torch.inf).amin(dim=1, keepdim=True)
        return (
            positive & (similarity - self.epsilon < hardest_negative),
            negative & (similarity + self.epsilon > hardest_positive),
        )


# ---------------------------------------------------------------- regularisers of the norm


class SphericalConstraint(Criterion):
    """SEC: pulls the length of every raw embedding towards their mean.

        L = weight · mean_i (n_i - μ)²,  n_i = ‖x_i‖,  μ ← (1 - ρ)·μ + ρ·mean_i n_i

    μ is a constant for the gradient and the first batch sets it; with ρ ``momentum`` 1 it is the
    batch's own mean. Buffer ``norm_mean`` holds μ (nan before the first batch) and moves in
    training mode only. Call with raw embeddings (B, d). ``terms``: sec (without the weight),
    norm_mean and norm_var of the batch, and with ``labels`` the mean cosines cos_positive and
    cos_negative of its pairs. Raises ValueError for an empty batch.
    """

    unit_length = False

    def __init__(self, weight: float = 1.0, momentum: float = 1.0) -> None:
        super().__init__()
        _check_not_negative(weight=weight)
        if not 0 < momentum <= 1:
            raise ValueError(f"momentum must be above 0 and at most 1, not {momentum}.")
        self.weight = weight
        self.momentum = momentum
        self.register_buffer("norm_mean", torch.tensor(torch.nan))

    @in_float32
    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """The weighted constraint, 0-d."""
        _check_embeddings(embeddings)
        norms = embeddings.norm(dim=1)
        batch = norms.detach()
        mean = self._moved(batch.mean())
        constraint = (norms - mean).square().mean()
        terms = {"sec": constraint, "norm_mean": batch.mean(), "norm_var": batch.var(correction=0)}
        if labels is not None:
            terms |= _pair_cosines(embeddings.detach(), _check_batch(embeddings, labels))
        self._report(**terms)
        return self.weight * constraint

    def _moved(self, batch_mean: Tensor) -> Tensor:
        moved = torch.lerp(self.norm_mean.to(batch_mean), batch_mean, self.momentum)
        moved = torch.where(self.norm_mean.isnan(), batch_mean, moved)
        if self.training:
            self.norm_mean.copy_(moved)
        return moved


def _pair_cosines(embeddings: Tensor, labels: Tensor) -> dict[str, Tensor]:
    unit = F.normalize(embeddings)
    cosines = unit @ unit.T
    masks = zip(("cos_positive", "cos_negative"), _pair_masks(labels), strict=True)
    return {name: (cosines * mask).sum() / mask.sum().clamp_min(1) for name, mask in masks}


class NormPenalty(Criterion):
    """SEC's L2 variant: L = weight · mean_i ‖x_i‖² of raw embeddings (B, d).

    ``terms``: l2 (without the weight). Raises ValueError for an empty batch.
    """

    unit_length = False

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        _check_not_negative(weight=weight)
        self.weight = weight

    @in_float32
    def forward(self, embeddings: Tensor, labels: Tensor | None = None) -> Tensor:
        """The weighted penalty, 0-d; ``labels`` are not used."""
        _check_embeddings(embeddings)
        penalty = embeddings.square().sum(dim=1).mean()
        self._report(l2=penalty)
        return self.weight * penalty


# ---------------------------------------------------------------- divide and conquer


class MarginLoss(Criterion):
    """Margin loss over mined triplets, with a fixed or learnable boundary β.

        L = (Σ [D_ap - β + margin]₊ + Σ [β - D_an + margin]₊ + ν·‖β‖₁) / N
        D_ij = √(‖x_i - x_j‖² + 1e-8)

    N counts the active terms of both sums (1 when there are none). ``beta`` 1.2, ``margin`` 0.2,
    ``nu`` 0. With ``num_classes`` there is one β a class, taken by the anchor's label, else one for
    all. ``beta_lr``: None learns β at the network's rate, 0 keeps it fixed; never with weight
    decay. Expects unit vectors (B, d). ``triplets`` (anchors, positives, negatives) come from the
    call or else from ``miner``, an object or a name of MINERS. ``terms``: positive and negative
    (sums over N), beta (mean). Raises ValueError for an empty batch and, when β is per class, for
    labels outside 0..C-1; a batch without triplets gives 0.
    """

    unit_length = True

    def __init__(
        self,
        beta: float = 1.2,
        margin: float = 0.2,
        nu: float = 0.0,
        num_classes: int | None = None,
        *,
        beta_lr: float | None = None,
        miner: Miner | str = "distanceweighted",
    ) -> None:
        super().__init__()
        _check_positive(beta=beta)
        _check_not_negative(margin=margin, nu=nu, beta_lr=beta_lr or 0.0)
        self.margin = margin
        self.nu = nu
        self.num_classes = num_classes
        self.beta_lr = beta_lr
        self.beta = nn.Parameter(torch.full((num_classes or 1,), float(beta)), beta_lr != 0)
        self.miner = build_miner(miner, margin) if isinstance(miner, str) else miner

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor, triplets: Triplets | None = None
    ) -> Tensor:
        """The loss, 0-d."""
        labels = _check_batch(embeddings, labels, classes=self.num_classes)
        anchors, positives, negatives = triplets or self.miner(embeddings, labels)
        beta = self.beta if self.num_classes is None else self.beta[labels[anchors]]
        to_positive = self._distance(embeddings, anchors, positives)
        to_negative = self._distance(embeddings, anchors, negatives)
        positive = F.relu(to_positive - beta + self.margin)
        negative = F.relu(beta - to_negative + self.margin)
        active = ((positive > 0).sum() + (negative > 0).sum()).clamp_min(1)
        positive, negative = positive.sum() / active, negative.sum() / active
        self._report(positive=positive, negative=negative, beta=self.beta.mean())
        return positive + negative + self.nu * self.beta.abs().sum() / active

    @staticmethod
    def _distance(embeddings: Tensor, left: Tensor, right: Tensor) -> Tensor:
        return ((embeddings[left] - embeddings[right]).square().sum(dim=1) + 1e-8).sqrt()

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """β with its own learning rate and no weight decay; [] when it is fixed."""
        if not self.beta.requires_grad:
            return []
        beta_lr = lr if self.beta_lr is None else self.beta_lr
        return [{"name": "beta", "params": [self.beta], "lr": beta_lr, "weight_decay": 0.0}]

    def class_values(self) -> dict[str, Tensor]:
        """The boundary of each class, when each has its own."""
        return {} if self.num_classes is None else {"beta": self.beta.detach()}


class SoftmaxPairLoss(Criterion):
    """N-pair loss over all positives, with a learnable inverse temperature a.

        L = mean_i -1/|P_i| Σ_{p∈P_i} log softmax_{j≠i}(a·x̂_i·x̂_j)_p

    Images without a positive are left out. ``alpha`` 1 is where a starts, ``alpha_lr`` its own
    learning rate, without weight decay. Call with embeddings (B, d) and labels (B,). ``terms``:
    alpha. Raises ValueError for an empty batch; one without a pair gives 0.
    """

    def __init__(self, alpha: float = 1.0, *, alpha_lr: float = 1.0) -> None:
        super().__init__()
        _check_positive(alpha=alpha)
        _check_not_negative(alpha_lr=alpha_lr)
        self.alpha_lr = alpha_lr
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    @in_float32
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-d."""
        labels = _check_batch(embeddings, labels)
        unit = F.normalize(embeddings)
        positive, negative = _pair_masks(labels)
        logits = (self.alpha * unit @ unit.T).masked_fill(~(positive | negative), -torch.inf)
        used = positive.any(dim=1)
        log_shares = F.log_softmax(logits[used], dim=1).masked_fill(~positive[used], 0)
        losses = -log_shares.sum(dim=1) / positive[used].sum(dim=1)
        self._report(alpha=self.alpha)
        return losses.sum() / used.sum().clamp_min(1)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The inverse temperature at ``alpha_lr``, without weight decay."""
        group = {"name": "alpha", "params": [self.alpha], "lr": self.alpha_lr, "weight_decay": 0.0}
        return [group]


class Miner:
    """Chooses triplets: ``miner(embeddings, labels) -> (anchors, positives, negatives)``.

    Takes (B, d) and (B,), measures distances between unit vectors, and returns three index tensors
    of one length, empty when the batch has no triplet. No gradient passes. Random choices come from
    torch's global generator. Raises ValueError for an empty batch.
    """

    @torch.no_grad()
    @in_float32
    def __call__(self, embeddings: Tensor, labels: Tensor) -> Triplets:
        """Indices of anchors, positives and negatives."""
        labels = _check_batch(embeddings, labels)
        return self.choose(F.normalize(embeddings), *_pair_masks(labels))

    def choose(self, unit: Tensor, positive: Tensor, negative: Tensor) -> Triplets:
        """The triplets, from unit vectors (B, d) and the masks of positive and negative pairs."""
        raise NotImplementedError


def _mining_distances(unit: Tensor) -> Tensor:
    return (2 - 2 * unit @ unit.T).clamp_min(1e-4).sqrt()


def _triplets(valid: Tensor, positives: Tensor, negatives: Tensor) -> Triplets:
    """Triplets of the marked places; all three arguments (B, M), row i of anchor i."""
    anchors = valid.nonzero(as_tuple=True)[0]
    return anchors, positives[valid], negatives[valid]


class DistanceWeightedMiner(Miner):
    """Negatives drawn evenly over distance, as many an anchor as it has positives on average.

        log w_ij = (2 - d)·log D_ij - (d - 3)/2·log(1 - D_ij²/4),  D_ij at least ``cutoff`` 0.5

    is the inverse density of distances between points on the unit sphere. Negatives at
    ``nonzero_loss_cutoff`` 1.4 or farther, which cost a margin loss nothing, keep a weight of 1e-6.
    An anchor takes its positives in index order when it has as many as negatives, a random subset
    when it has more, and draws them with replacement when it has fewer.
    """

    def __init__(self, cutoff: float = 0.5, nonzero_loss_cutoff: float = 1.4) -> None:
        if not 0 < cutoff < nonzero_loss_cutoff:
            raise ValueError(
                f"The cutoff {cutoff} must be above 0 and below the distance "
                f"{nonzero_loss_cutoff} from which negatives cost nothing."
            )
        self.cutoff = cutoff
        self.nonzero_loss_cutoff = nonzero_loss_cutoff

    @torch.no_grad()
    @in_float32
    def probabilities(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """(B, B): row i holds how likely each image is drawn as a negative of i, and sums to 1.

        A row is all 0 where the batch has one class only.
        """
        labels = _check_batch(embeddings, labels)
        weights = self._weights(F.normalize(embeddings), _pair_masks(labels)[1])
        return weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-12)

    def _weights(self, unit: Tensor, negative: Tensor) -> Tensor:
        size = unit.shape[1]
        distances = _mining_distances(unit).clamp_min(self.cutoff)
        log_weights = (2 - size) * distances.log() - (size - 3) / 2 * torch.log1p(
            -distances.square() / 4
        )
        near = negative & (distances < self.nonzero_loss_cutoff)
        log_weights = log_weights.where(near, torch.zeros_like(log_weights))
        weights = (log_weights - log_weights.amax(dim=1, keepdim=True)).exp() + 1e-9
        weights = weights.masked_fill(distances > self.nonzero_loss_cutoff, 1e-6)
        return weights.masked_fill(~negative, 0)

    def choose(self, unit: Tensor, positive: Tensor, negative: Tensor) -> Triplets:
        """The triplets, from unit vectors (B, d) and the masks of positive and negative pairs."""
        draws = min(max(1, int(positive.sum() / len(unit) + 0.5)), int(negative.sum(dim=1).min()))
        anchors = positive.any(dim=1).nonzero().squeeze(1)
        if draws == 0 or len(anchors) == 0:
            return anchors[:0], anchors[:0], anchors[:0]
        negatives = torch.multinomial(self._weights(unit, negative)[anchors], draws)
        positives = self._positives(positive[anchors], draws)
        return anchors.repeat_interleave(draws), positives.flatten(), negatives.flatten()

    @staticmethod
    def _positives(positive: Tensor, draws: int) -> Tensor:
        """``draws`` positives for each row of the mask, (A, B) → (A, draws)."""
        repeated = torch.multinomial(positive.float(), draws, replacement=True)
        keys = torch.rand(positive.shape, device=positive.device).masked_fill(~positive, -1)
        subset = keys.topk(draws).indices.sort(dim=1).values
        return torch.where(positive.sum(dim=1, keepdim=True) < draws, repeated, subset)


class NearestNegativeMiner(Miner):
    """The negatives nearest to the anchor among those at ``cutoff`` 0.5 or farther ("easypeasy").

    Deterministic: the k-th positive of an anchor, in index order, goes with its k-th nearest
    negative, for as many as it has positives, and at most as many as anchors have on average.
    """

    def __init__(self, cutoff: float = 0.5) -> None:
        _check_not_negative(cutoff=cutoff)
        self.cutoff = cutoff

    def choose(self, unit: Tensor, positive: Tensor, negative: Tensor) -> Triplets:
        """The triplets, from unit vectors (B, d) and the masks of positive and negative pairs."""
        draws = max(1, int(positive.sum()) // len(unit))
        distances = _mining_distances(unit)
        allowed = negative & (distances >= self.cutoff)
        nearest = distances.masked_fill(~allowed, torch.inf).argsort(dim=1, stable=True)
        in_order = (~positive).int().argsort(dim=1, stable=True)
        pairs = torch.minimum(positive.sum(dim=1), allowed.sum(dim=1)).clamp_max(draws)
        valid = torch.arange(draws, device=unit.device) < pairs[:, None]
        return _triplets(valid, in_order[:, :draws], nearest[:, :draws])


class AnchorMiner(Miner):
    """One triplet for each anchor that has a positive and a suitable negative.

    ``positive`` and ``negative`` choose an image in each row of the distances (B, B) from those a
    mask allows: ``nearest``, ``farthest`` or ``at_random``. With ``band`` a negative must be
    semi-hard: D_ap < D_an < D_ap + band.
    """

    def __init__(
        self,
        positive: Callable[[Tensor, Tensor], Tensor],
        negative: Callable[[Tensor, Tensor], Tensor],
        band: float | None = None,
    ) -> None:
        self.positive = positive
        self.negative = negative
        self.band = band

    def choose(self, unit: Tensor, positive: Tensor, negative: Tensor) -> Triplets:
        """The triplets, from unit vectors (B, d) and the masks of positive and negative pairs."""
        distances = _mining_distances(unit)
        positives = self.positive(distances, positive)[:, None]
        if self.band is not None:
            to_positive = distances.gather(1, positives)
            negative = negative & (distances > to_positive) & (distances < to_positive + self.band)
        negatives = self.negative(distances, negative)[:, None]
        valid = positive.any(dim=1) & negative.any(dim=1)
        return _triplets(valid[:, None], positives, negatives)


def nearest(distances: Tensor, allowed: Tensor) -> Tensor:
    """Index of the nearest allowed image of each row, (B, B) and its mask → (B,)."""
    return distances.masked_fill(~allowed, torch.inf).argmin(dim=1)


def farthest(distances: Tensor, allowed: Tensor) -> Tensor:
    """Index of the farthest allowed image of each row, (B, B) and its mask → (B,)."""
    return distances.masked_fill(~allowed, -torch.inf).argmax(dim=1)


def at_random(distances: Tensor, allowed: Tensor) -> Tensor:
    """Index of a random allowed image of each row, (B, B) and its mask → (B,)."""
    return torch.rand_like(distances).masked_fill(~allowed, -1).argmax(dim=1)


MINERS: dict[str, Callable[[float], Miner]] = {
    "distanceweighted": lambda margin: DistanceWeightedMiner(nonzero_loss_cutoff=1.2 + margin),
    "easypeasy": lambda margin: NearestNegativeMiner(),
    "HPHN": lambda margin: AnchorMiner(farthest, nearest),
    "EPHN": lambda margin: AnchorMiner(nearest, nearest),
    "RPHN": lambda margin: AnchorMiner(at_random, nearest),
    "EPSHN": lambda margin: AnchorMiner(nearest, at_random, band=margin),
    "RPSHN": lambda margin: AnchorMiner(at_random, at_random, band=margin),
}


def build_miner(name: str, margin: float = 0.2) -> Miner:
    """The miner of MINERS called ``name``, for a loss with this margin.

    Positive: hard (H, farthest), easy (E, nearest), random (R); negative: hard (HN, nearest),
    semi-hard (SHN, within the margin behind the positive). Raises ValueError for an unknown name.
    """
    if name not in MINERS:
        raise ValueError(_unknown("miner", name, MINERS))
    return MINERS[name](margin)


@in_float32
def mask_orthogonality(masks: Tensor) -> Tensor:
    """Mean cosine between the rectified masks of different learners, (K, d) → 0-d.

        R = 1/(K(K-1)) Σ_{i≠j} cos(relu m_i, relu m_j)

    0 for one mask; a mask with no positive entry has cosine 0 with all others. Raises ValueError
    when ``masks`` is not a matrix.
    """
    if masks.ndim != 2:
        raise ValueError(f"Masks must have the shape (learners, size), not {tuple(masks.shape)}.")
    unit = F.normalize(F.relu(masks), eps=1e-8)
    gram = unit @ unit.T
    return (gram.sum() - gram.trace()) / max(1, len(masks) * (len(masks) - 1))


class MaskOrthogonality(Criterion):
    """``mask_orthogonality`` as a term of an Objective. ``terms``: masks."""

    def forward(self, masks: Tensor) -> Tensor:
        """The regulariser of masks (K, d), 0-d."""
        loss = mask_orthogonality(masks)
        self._report(masks=loss)
        return loss


# ---------------------------------------------------------------- pytorch-metric-learning


class LibraryLoss(Criterion):
    """A loss of pytorch-metric-learning (and a miner) as a criterion.

    The library casts its proxies to the type of the embeddings, in place; it is handed float32
    only, so they keep theirs. Matrices it learns count as proxies (100 × the learning rate),
    vectors do not and get no weight decay. ``num_classes`` and ``embedding_size`` are those the
    loss was built with, if any, and checked. ``terms`` stays empty.
    """

    def __init__(
        self,
        loss: nn.Module,
        miner: nn.Module | None = None,
        *,
        num_classes: int | None = None,
        embedding_size: int | None = None,
    ) -> None:
        super().__init__()
        self.loss = loss
        self.miner = miner
        self.num_classes = num_classes
        self.embedding_size = embedding_size

    @in_float32
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-d, from embeddings (B, d) and labels (B,)."""
        labels = _check_batch(embeddings, labels, self.embedding_size, self.num_classes)
        embeddings = embeddings.float()
        mined = None if self.miner is None else self.miner(embeddings, labels)
        return self.loss(embeddings, labels, mined)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Matrices at 100 × ``lr`` as proxies, the rest at ``lr`` without weight decay."""
        parameters = list(self.loss.parameters())
        proxies = [parameter for parameter in parameters if parameter.ndim > 1]
        others = [parameter for parameter in parameters if parameter.ndim <= 1]
        groups = [
            {"name": "proxies", "params": proxies, "lr": 100 * lr},
            {"name": "library", "params": others, "lr": lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]


def _library(kind: str, name: str) -> type[nn.Module]:
    """The class ``name`` of pytorch_metric_learning's losses or miners."""
    try:
        module = importlib.import_module(f"pytorch_metric_learning.{kind}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name} comes from pytorch-metric-learning, which is not installed: "
            "run pip install pytorch-metric-learning."
        ) from error
    classes = dict(inspect.getmembers(module, inspect.isclass))
    if name not in classes:
        raise ValueError(_unknown(f"class of pytorch_metric_learning.{kind}", name, classes))
    return classes[name]


def _library_options(loss: type[nn.Module]) -> frozenset[str]:
    """Names of all keyword arguments that the class and its bases take."""
    constructors = [vars(base)["__init__"] for base in loss.__mro__ if "__init__" in vars(base)]
    parameters = [
        parameter
        for constructor in constructors
        if constructor is not nn.Module.__init__ and constructor is not object.__init__
        for parameter in list(inspect.signature(constructor).parameters.values())[1:]
    ]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(parameter.name for parameter in parameters if parameter.kind in named)


SIZES = frozenset({"num_classes", "embedding_size"})
LibraryPart = tuple[str, Mapping[str, Any]]  # a class name and its arguments


def _library_part(kind: str, part: LibraryPart) -> nn.Module:
    name, arguments = part
    return _library(kind, name)(**arguments)


def library_loss(
    name: str,
    num_classes: int,
    embedding_size: int,
    *,
    miner: LibraryPart | None = None,
    distance: LibraryPart | None = None,
    **arguments: Any,
) -> LibraryLoss:
    """Any loss of pytorch-metric-learning by its class name, e.g. "CircleLoss", with its arguments.

    ``num_classes`` and ``embedding_size`` reach it when it takes them; ``miner`` and ``distance``
    are a class name of the library and its arguments. Raises ValueError when the library is
    missing, has no such loss, or the loss does not take the arguments.
    """
    loss = _library("losses", name)
    options = _library_options(loss)
    _check_options(f"pml:{name}", arguments, options)
    sizes = {"num_classes": num_classes, "embedding_size": embedding_size}
    sizes = {key: size for key, size in sizes.items() if key in options}
    try:
        if distance is not None:
            arguments["distance"] = _library_part("distances", distance)
        built = loss(**sizes, **arguments)
        chosen = None if miner is None else _library_part("miners", miner)
    except (TypeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"pml:{name} cannot be built with these arguments: {error}.") from error
    return LibraryLoss(built, chosen, **sizes)


class LibraryEntry(NamedTuple):
    """A loss of the library with the constants of a published command."""

    name: str
    arguments: Mapping[str, Any] = {}
    miner: LibraryPart | None = None

    def __call__(self, num_classes: int, embedding_size: int, **options: Any) -> LibraryLoss:
        """The loss; an option that its miner shares (a margin) goes to both."""
        miner = self.miner
        if miner is not None:
            shared = {key: value for key, value in options.items() if key in miner[1]}
            miner = (miner[0], {**miner[1], **shared})
        arguments = {**self.arguments, **options}
        return library_loss(self.name, num_classes, embedding_size, miner=miner, **arguments)

    def options(self) -> frozenset[str]:
        """Names of the arguments that may be given."""
        return _library_options(_library("losses", self.name)) - SIZES


# ---------------------------------------------------------------- by name


def _margin_loss(
    num_classes: int,
    *,
    beta: float = 1.2,
    margin: float = 0.2,
    nu: float = 0.0,
    beta_lr: float = 0.0,
    miner: str = "distanceweighted",
) -> MarginLoss:
    """Divide and conquer's: one fixed β, or with ``beta_lr`` a learnable one a class."""
    classes = num_classes if beta_lr else None
    return MarginLoss(beta, margin, nu, classes, beta_lr=beta_lr, miner=miner)


CRITERIA: dict[str, Callable[..., Criterion]] = {
    # Proxy-Anchor's and AMLoss' commands, --loss
    "Proxy_Anchor": ProxyAnchorLoss,
    "AMLoss": AMLoss,
    "Proxy_NCA": LibraryEntry("ProxyNCALoss", {"softmax_scale": 32.0}),
    "MS": LibraryEntry(
        "MultiSimilarityLoss",
        {"alpha": 2.0, "beta": 50.0, "base": 0.5},
        miner=("MultiSimilarityMiner", {"epsilon": 0.1}),
    ),
    "Contrastive": LibraryEntry("ContrastiveLoss", {"neg_margin": 0.5}),
    "Triplet": LibraryEntry(
        "TripletMarginLoss",
        {"margin": 0.1},
        miner=("TripletMarginMiner", {"margin": 0.1, "type_of_triplets": "semihard"}),
    ),
    "NPair": LibraryEntry(
        "NPairsLoss",
        {"distance": ("DotProductSimilarity", {"normalize_embeddings": False})},
    ),
    "SoftTriple": LibraryEntry("SoftTripleLoss"),
    "Circle": LibraryEntry("CircleLoss", {"m": 0.4, "gamma": 80.0}),
    "Margin": LibraryEntry("MarginLoss", {"learn_beta": True}),
    # SEC's command, --use_loss
    "triplet": TripletLoss,
    "semihtriplet": SemihardTripletLoss,
    "n-npair": NPairLoss,
    "ms": MultiSimilarityLoss,
    # divide and conquer's command, --criterion
    "MarginLoss": _margin_loss,
    "TripletLoss": functools.partial(TripletLoss, margin=0.2, squared=False, miner="easypeasy"),
    "TripletAllLoss": functools.partial(TripletLoss, margin=0.2, squared=False),
    "TripletSemihardLoss": functools.partial(SemihardTripletLoss, margin=0.2, squared=False),
    "NPairsLoss": SoftmaxPairLoss,
}


def build(name: str, num_classes: int, embedding_size: int, **options: Any) -> Criterion:
    """The criterion called ``name`` in CRITERIA, or any library loss as ``pml:NAME``.

    ``options`` are arguments of its class; what is not given keeps the published value of that
    loss, so pass only what somebody asked for. Raises ValueError for an unknown name or option,
    with the nearest ones, and for a value the loss cannot use.
    """
    make = _entry(name)
    _check_options(name, options, options_of(name))
    taken = inspect.signature(make).parameters
    sizes = {"num_classes": num_classes, "embedding_size": embedding_size}
    return make(**{key: size for key, size in sizes.items() if key in taken}, **options)


def options_of(name: str) -> frozenset[str]:
    """Names of the options that ``build(name, ...)`` takes; ValueError for an unknown name."""
    make = _entry(name)
    if isinstance(make, LibraryEntry):
        return make.options()
    return frozenset(inspect.signature(make).parameters) - SIZES


def _entry(name: str) -> Callable[..., Criterion]:
    if name.startswith("pml:"):
        return LibraryEntry(name.removeprefix("pml:"))
    if name not in CRITERIA:
        raise ValueError(_unknown("loss", name, [*CRITERIA, "pml:NAME"]))
    return CRITERIA[name]


def _keywords(make: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(make).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]


def _check_options(name: str, given: Iterable[str], known: Iterable[str]) -> None:
    for option in given:
        if option not in known:
            raise ValueError(_unknown(f"option of {name}", option, known))


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    known = sorted(known)
    lower = {candidate.lower() for candidate in known}
    close = difflib.get_close_matches(name.lower(), lower, n=3, cutoff=0.5)
    if close:
        names = " or ".join(candidate for candidate in known if candidate.lower() in close)
        return f"There is no {what} called {name!r}: did you mean {names}?"
    return f"There is no {what} called {name!r}: there is {', '.join(known) or 'none'}."


def _proxy_losses() -> str:
    """Names of the losses that compare images with proxies of our own, for messages."""
    own = (name for name, make in CRITERIA.items() if inspect.isclass(make))
    return ", ".join(name for name in own if issubclass(CRITERIA[name], ProxyLoss))


# ---------------------------------------------------------------- sums of terms

Inputs = Callable[[Embeddings, Tensor, Mapping[str, Any]], tuple[Any, ...] | None]


def _retrieval(outputs: Embeddings, labels: Tensor, context: Mapping[str, Any]) -> tuple[Any, ...]:
    return outputs.retrieval, labels


def _unit_retrieval(
    outputs: Embeddings, labels: Tensor, context: Mapping[str, Any]
) -> tuple[Any, ...]:
    return F.normalize(outputs.retrieval), labels


class Term(nn.Module):
    """One summand of an Objective: weight · criterion(*inputs(outputs, labels, context)).

    ``inputs`` takes from the network's outputs, the labels and the step's context what the
    criterion is called with, by default the retrieval embedding (raw, unless the criterion's
    ``unit_length`` says otherwise) and the labels; None leaves the term out of this step. ``heads``
    are the fields of Embeddings it needs.
    """

    def __init__(
        self,
        criterion: Criterion,
        inputs: Inputs | None = None,
        heads: tuple[str, ...] = ("embedding",),
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.criterion = criterion
        self.inputs = inputs or (_unit_retrieval if criterion.unit_length else _retrieval)
        self.heads = heads
        self.weight = weight

    def forward(
        self, outputs: Embeddings, labels: Tensor, context: Mapping[str, Any]
    ) -> Tensor | None:
        """The weighted loss, 0-d, or None when the step has nothing for it."""
        for head in self.heads:
            if getattr(outputs, head) is None:
                raise ValueError(
                    f"{type(self.criterion).__name__} needs the network's {head} head: "
                    f"build the network with the heads {', '.join(self.heads)}."
                )
        inputs = self.inputs(outputs, labels, context)
        return None if inputs is None else self.weight * self.criterion(*inputs)


class Objective(Criterion):
    """A weighted sum of named terms over the same Embeddings: ``objective(outputs, labels)``.

    What a step knows besides comes as keywords, e.g. ``masks=`` (K, d), or None in divide and
    conquer's full phase. ``terms`` collects those of all criteria, with the term's name in front
    where two agree, and ``heads`` says which outputs the network must have.
    """

    def __init__(self, terms: Mapping[str, Term]) -> None:
        super().__init__()
        if not terms:
            raise ValueError("An objective needs at least one term.")
        self.parts = nn.ModuleDict(terms)

    @property
    def heads(self) -> tuple[str, ...]:
        """Fields of Embeddings that the network must fill, in the order of Embeddings."""
        needed = {head for part in self.parts.values() for head in part.heads}
        return tuple(head for head in Embeddings._fields if head in needed)

    @in_float32
    def forward(self, outputs: Embeddings, labels: Tensor, **context: Any) -> Tensor:
        """The sum, 0-d. Raises ValueError when a head is missing, and what its terms raise."""
        losses, terms = [], {}
        for name, part in self.parts.items():
            loss = part(outputs, labels, context)
            if loss is None:
                continue
            losses.append(loss)
            for key, value in part.criterion.terms.items():
                terms[f"{name}/{key}" if key in terms else key] = value
        self.terms = terms
        return torch.stack(losses).sum()

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The groups of all terms."""
        parts = self.parts.values()
        return [group for part in parts for group in part.criterion.parameter_groups(lr)]

    def class_values(self) -> dict[str, Tensor]:
        """What the terms learn for each class."""
        parts = self.parts.values()
        return {
            name: values for part in parts for name, values in part.criterion.class_values().items()
        }


def _introspective(
    name: str, metric: Term, l2_norm: bool, *, variant: str = "released"
) -> dict[str, Term]:
    """IDML's similarity in place of the cosine; "paper" leaves the uncertainty at its length."""
    if not isinstance(metric.criterion, ProxyLoss):
        raise ValueError(
            "The introspective similarity replaces the cosine between an image and a proxy, which "
            f"{name} does not compute here: combine it with {_proxy_losses()}."
        )
    if variant not in ("released", "paper"):
        raise ValueError(_unknown("introspective variant", variant, ["released", "paper"]))

    def inputs(outputs: Embeddings, labels: Tensor, context: Mapping[str, Any]) -> tuple[Any, ...]:
        embedding, uncertainty = outputs.embedding, outputs.uncertainty
        if l2_norm:
            embedding = F.normalize(embedding)
        if l2_norm and variant == "released":
            uncertainty = F.normalize(uncertainty)
        return embedding, labels, uncertainty

    return {"metric": Term(metric.criterion, inputs, heads=("embedding", "uncertainty"))}


def _disentangled(
    name: str,
    metric: Term,
    l2_norm: bool,
    *,
    al: float = 1.0,
    be: float = 0.1,
    gam: float = 1e-5,
    scale: float = 23.0,
) -> dict[str, Term]:
    """DDML around a proxy loss."""
    if not isinstance(metric.criterion, ProxyLoss):
        raise ValueError(
            f"Disentangling compares samples of the heads with class proxies, which {name} does "
            f"not offer: combine it with {_proxy_losses()}."
        )
    if "uncertainty" in metric.heads:
        raise ValueError(
            "The introspective and the disentangled loss cannot be combined: one reads the "
            "embedding head as a vector, the other as a mean and a spread."
        )

    def inputs(outputs: Embeddings, labels: Tensor, context: Mapping[str, Any]) -> tuple[Any, ...]:
        return outputs.embedding, outputs.specific, labels

    criterion = DisentanglingLoss(metric.criterion, al, be, gam, scale)
    return {"metric": Term(criterion, inputs, heads=("embedding", "specific"))}


def _sec(
    name: str, metric: Term, l2_norm: bool, *, weight: float = 1.0, momentum: float = 1.0
) -> dict[str, Term]:
    return {"sec": Term(SphericalConstraint(weight, momentum))}


def _l2(name: str, metric: Term, l2_norm: bool, *, weight: float = 1.0) -> dict[str, Term]:
    return {"l2": Term(NormPenalty(weight))}


def _masks(name: str, metric: Term, l2_norm: bool, *, weight: float = 1.0) -> dict[str, Term]:
    def inputs(outputs: Embeddings, labels: Tensor, context: Mapping[str, Any]) -> Any:
        return None if context.get("masks") is None else (context["masks"],)

    _check_not_negative(weight=weight)
    return {"masks": Term(MaskOrthogonality(), inputs, weight=weight)}


# What can be attached to a loss, in the order in which it is done.
ATTACHMENTS: dict[str, Callable[..., dict[str, Term]]] = {
    "introspective": _introspective,
    "disentangled": _disentangled,
    "sec": _sec,
    "l2": _l2,
    "masks": _masks,
}


def compose(
    name: str,
    num_classes: int,
    embedding_size: int,
    attach: Mapping[str, Mapping[str, Any]] | None = None,
    l2_norm: bool = True,
    **options: Any,
) -> Objective:
    """The loss ``name`` with what is attached to it, as one Objective.

    ``options`` go to ``build``. ``attach`` maps names of ATTACHMENTS to their options:

        introspective  variant ("released" or "paper")        Proxy_Anchor and AMLoss only
        disentangled   al, be, gam, scale                     Proxy_Anchor and AMLoss only
        sec            weight, momentum                       any loss; raw lengths
        l2             weight                                 any loss; raw lengths
        masks          weight                                 any loss; needs masks= in the call

    ``l2_norm`` gives a loss that does not normalise by itself, and IDML, unit vectors. Raises
    ValueError for unknown names and for a combination that makes no sense.
    """
    attach = attach or {}
    for attachment in attach:
        if attachment not in ATTACHMENTS:
            raise ValueError(_unknown("attachment", attachment, ATTACHMENTS))
    criterion = build(name, num_classes, embedding_size, **options)
    unit = l2_norm if criterion.unit_length is None else criterion.unit_length
    terms = {"metric": Term(criterion, _unit_retrieval if unit else _retrieval)}
    for attachment, make in ATTACHMENTS.items():
        if attachment in attach:
            _check_options(attachment, attach[attachment], _keywords(make))
            terms.update(make(name, terms["metric"], l2_norm, **attach[attachment]))
    return Objective(terms)
