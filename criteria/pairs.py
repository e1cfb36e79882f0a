"""Losses on the pairs and triplets of a batch, as SEC and divide and conquer compute them."""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from criteria import checks
from criteria.base import (
    Criterion,
    ParameterGroup,
    References,
    check_batch,
    in_float32,
    log_one_plus_sum_exp,
    of_labels,
    pair_masks,
    positive_pairs,
    unit_others,
    unit_rows,
)
from criteria.miners import Miner, Triplets, miner_of


def _distances(embeddings: Tensor, squared: bool, references: References | None) -> Tensor:
    """‖x̂_i - x̂_j‖² (B, B), or (B, R) to the references; without ``squared``, the root of it.

    Computed as 2 - 2 x̂_i·x̂_j, as released. In float32 that loses digits if two embeddings are
    nearly equal: the gradient of the root is 0.01 % off at a cosine of 1 - 1e-3, 1 % at 1 - 1e-5,
    and meaningless from 1 - 1e-7 on. But with positives that close, a triplet is active only if its
    negative is as close, in a network that has collapsed. The exact differences of all pairs
    (B, B, d) would cost every other batch memory and time.
    """
    unit = unit_rows(embeddings)
    distances = (2 - 2 * unit @ unit_others(unit, references).T).clamp_min(0)
    return distances if squared else (distances + 1e-8).sqrt()


class TripletLoss(Criterion):
    """Triplet loss over all triplets of the batch, or over mined ones.

        L = mean of [D_ap - D_an + margin]₊ over every (anchor, positive, negative)

    D is the squared distance of unit vectors (``squared=False``: the distance), ``margin`` 1.0, as
    in SEC. The mean includes inactive triplets. With a ``miner`` (a name of MINERS or an object),
    or ``triplets`` given in the call, the mean is over the active ones, as in divide and conquer.
    ``soft`` takes log(1 + e^{D_ap - D_an}) instead of the hinge. ``terms``: active, the share of
    active triplets. Raises ValueError for an empty batch; a batch without triplets gives 0.
    """

    needs_pairs = True
    no_memory = ""

    def __init__(
        self,
        margin: float = 1.0,
        *,
        squared: bool = True,
        soft: bool = False,
        miner: Miner | str | None = None,
        mining: str = "released",
    ) -> None:
        super().__init__()
        checks.not_negative(margin=margin)
        self.margin = margin
        self.squared = squared
        self.soft = soft
        self.miner = miner_of(miner, margin, mining)

    @in_float32
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        triplets: Triplets | None = None,
        references: References | None = None,
    ) -> Tensor:
        """The loss, 0-d, from raw embeddings (B, d) and labels (B,)."""
        labels = check_batch(embeddings, labels)
        if triplets is None and self.miner is not None:
            triplets = self.miner(embeddings, labels, references)
        distances = _distances(embeddings, self.squared, references)
        if triplets is None:
            pairs = of_labels(positive_pairs, labels, references)
            return self._over_all(distances, *pairs, pair_masks(labels, references)[1])
        return self._over_mined(distances, *triplets)

    def _over_all(
        self, distances: Tensor, anchors: Tensor, positives: Tensor, negative: Tensor
    ) -> Tensor:
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

    n is the nearest of the negatives that are farther from the anchor than the positive, or the
    farthest negative if there are none. D is the squared distance of unit vectors
    (``squared=False``: the distance), ``margin`` 0.2; ``soft`` takes log(1 + e^{D_ap - D_an})
    instead of the hinge. ``terms``: active, the share of active pairs. Raises ValueError for an
    empty batch; a batch without triplets gives 0.
    """

    needs_pairs = True
    no_memory = ""

    def __init__(self, margin: float = 0.2, *, squared: bool = True, soft: bool = False) -> None:
        super().__init__()
        checks.not_negative(margin=margin)
        self.margin = margin
        self.squared = squared
        self.soft = soft

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor, references: References | None = None
    ) -> Tensor:
        """The loss, 0-d, from raw embeddings (B, d) and labels (B,)."""
        labels = check_batch(embeddings, labels)
        _, negative = pair_masks(labels, references)
        anchors, positives = of_labels(_pairs_of_triplets, labels, references)
        distances = _distances(embeddings, self.squared, references)
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


def _pairs_of_triplets(labels: Tensor, references: References | None) -> tuple[Tensor, Tensor]:
    """Anchors and positives of the ordered positive pairs whose anchor has a negative."""
    positive, negative = pair_masks(labels, references)
    return (positive & negative.any(dim=1, keepdim=True)).nonzero(as_tuple=True)


class NPairLoss(Criterion):
    """N-pair loss on unit vectors (Sohn, 2016; normalised as in SEC).

        L = mean_c -log softmax_k( (scale·x̂_c)·(scale·x̂⁺_k) )_c

    x_c and x⁺_c are the first and the second image of class c in the batch; classes with one image
    are left out. ``scale`` 5 multiplies both vectors. ``terms``: accuracy, the share of first
    images that are closer to their own second image than to any other. Raises ValueError for an
    empty batch; a batch without a pair gives 0.
    """

    needs_pairs = True
    no_memory = "it uses two images of each class of a batch, and no others"

    def __init__(self, scale: float = 5.0) -> None:
        super().__init__()
        checks.positive(scale=scale)
        self.scale = scale

    @in_float32
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-d, from raw embeddings (B, d) and labels (B,)."""
        labels = check_batch(embeddings, labels)
        first, second = of_labels(_firsts_and_seconds, labels)
        vectors = self.scale * unit_rows(embeddings)
        logits = vectors[first] @ vectors[second].T
        target = torch.arange(len(first), device=labels.device)
        pairs = max(len(first), 1)
        nearest_is_own = (logits >= logits.diagonal()[:, None]).sum(dim=1) == 1
        self._report(accuracy=nearest_is_own.sum() / pairs)
        return F.cross_entropy(logits, target, reduction="sum") / pairs


def _firsts_and_seconds(labels: Tensor, references: None) -> tuple[Tensor, Tensor]:
    """Indices of the first and of the second image of every class that has two."""
    same = labels[:, None] == labels
    rank = same.tril(-1).sum(dim=1)
    first = ((rank == 0) & (same.sum(dim=1) > 1)).nonzero().squeeze(1)
    second = (same[first] & (rank == 1)).int().argmax(dim=1)
    return first, second


class MultiSimilarityLoss(Criterion):
    """Multi-similarity loss with its mining (Wang et al., CVPR 2019), with SEC's constants.

        L = 1/B Σ_i { 1/α log(1 + Σ_{p∈P_i} e^{-α(s_ip - λ)})
                    + 1/β log(1 + Σ_{n∈N_i} e^{ β(s_in - λ)}) }

    P_i: positives with s_ip - ε < max_n s_in; N_i: negatives with s_in + ε > min_p s_ip; an image
    adds nothing if one of the sets is empty. A positive with s ≥ 1 - 1e-5 counts as the image
    itself. α ``alpha`` 2, β ``beta`` 40, λ ``base`` 0.5, ε ``epsilon`` 0.1. ``terms``: active, the
    share of images with mined pairs. Raises ValueError for an empty batch.
    """

    needs_pairs = True
    no_memory = ""

    def __init__(
        self, alpha: float = 2.0, beta: float = 40.0, base: float = 0.5, epsilon: float = 0.1
    ) -> None:
        super().__init__()
        checks.positive(alpha=alpha, beta=beta)
        self.alpha = alpha
        self.beta = beta
        self.base = base
        self.epsilon = epsilon

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor, references: References | None = None
    ) -> Tensor:
        """The loss, 0-d, from raw embeddings (B, d) and labels (B,)."""
        labels = check_batch(embeddings, labels)
        unit = unit_rows(embeddings)
        similarity = unit @ unit_others(unit, references).T
        positive, negative = self._mine(similarity.detach(), *pair_masks(labels, references))
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


class SoftmaxPairLoss(Criterion):
    """N-pair loss over all positives, with a learnable inverse temperature a.

        L = mean_i -1/|P_i| Σ_{p∈P_i} log softmax_{j≠i}(a·x̂_i·x̂_j)_p

    Images without a positive are left out. ``alpha`` 1 is the initial value of a, ``alpha_lr`` its
    learning rate; it has no weight decay. Call with embeddings (B, d) and labels (B,). ``terms``:
    alpha. Raises ValueError for an empty batch; a batch without a pair gives 0.
    """

    needs_pairs = True
    no_memory = ""

    def __init__(self, alpha: float = 1.0, *, alpha_lr: float = 1.0) -> None:
        super().__init__()
        checks.positive(alpha=alpha)
        checks.not_negative(alpha_lr=alpha_lr)
        self.alpha_lr = alpha_lr
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor, references: References | None = None
    ) -> Tensor:
        """The loss, 0-d."""
        labels = check_batch(embeddings, labels)
        unit = unit_rows(embeddings)
        positive, negative = pair_masks(labels, references)
        products = self.alpha * unit @ unit_others(unit, references).T
        logits = products.masked_fill(~(positive | negative), -torch.inf)
        (used,) = of_labels(_with_positives, labels, references)
        log_shares = F.log_softmax(logits[used], dim=1).masked_fill(~positive[used], 0)
        losses = -log_shares.sum(dim=1) / positive[used].sum(dim=1)
        self._report(alpha=self.alpha)
        return losses.sum() / max(1, len(used))

    def parameter_groups(self, lr: float) -> list[ParameterGroup]:
        """The inverse temperature at ``alpha_lr``, without weight decay."""
        group = {"name": "alpha", "params": [self.alpha], "lr": self.alpha_lr, "weight_decay": 0.0}
        return [group]


def _with_positives(labels: Tensor, references: References | None) -> tuple[Tensor]:
    """The images that have a positive."""
    return pair_masks(labels, references)[0].any(dim=1).nonzero(as_tuple=True)


# The triplet losses of divide and conquer, on distances that are not squared.
mined_triplet_loss = partial(TripletLoss, margin=0.2, squared=False, miner="easypeasy")
all_triplet_loss = partial(TripletLoss, margin=0.2, squared=False)
semihard_triplet_loss = partial(SemihardTripletLoss, margin=0.2, squared=False)
