"""Miners: they choose the triplets of a batch that a loss is computed on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from criteria import checks
from criteria.arguments import unknown
from criteria.base import (
    References,
    check_batch,
    in_float32,
    of_labels,
    on_host,
    pair_masks,
    unit_others,
    unit_rows,
)

Triplets = tuple[Tensor, Tensor, Tensor]
Choose = Callable[[Tensor, Tensor], Tensor]
"""Distances (B, B) and a mask of the allowed images → the index of one image in each row (B,)."""


class Miner:
    """Chooses triplets: ``miner(embeddings, labels) -> (anchors, positives, negatives)``.

    Takes embeddings (B, d) and labels (B,), measures distances between unit vectors, and returns
    three index tensors of one length, empty if the batch has no triplet. With ``references``,
    positives and negatives are indices into them. There is no gradient. Random choices come from
    torch's global generator. Raises ValueError for an empty batch.
    """

    @torch.no_grad()
    @in_float32
    def __call__(
        self, embeddings: Tensor, labels: Tensor, references: References | None = None
    ) -> Triplets:
        """Indices of anchors, positives and negatives."""
        labels = check_batch(embeddings, labels)
        unit = unit_rows(embeddings)
        masks = of_labels(pair_masks, labels, references)
        return self.choose(unit, unit_others(unit, references), *masks)

    def choose(self, unit: Tensor, others: Tensor, positive: Tensor, negative: Tensor) -> Triplets:
        """The triplets.

        Takes unit vectors (B, d), the unit vectors that they are compared with (R, d), usually the
        same, and the masks of positive and negative pairs (B, R). Whatever depends on the masks
        alone should be computed ``on_host``, from their copies there.
        """
        raise NotImplementedError


def _mining_distances(unit: Tensor, others: Tensor) -> Tensor:
    return (2 - 2 * unit @ others.T).clamp_min(1e-4).sqrt()


def _drawn(weights: Tensor, count: int, replacement: bool = False) -> Tensor:
    """``torch.multinomial``, bit for bit, without its check of the arguments on a GPU's results."""
    if replacement and count > 1:
        return torch.multinomial(weights, count, replacement=True)  # has no such check
    keys = weights / torch.empty_like(weights).exponential_()
    return keys.argmax(dim=1, keepdim=True) if count == 1 else keys.topk(count).indices


class DistanceWeightedMiner(Miner):
    """Negatives drawn uniformly over distance, per anchor as many as the mean number of positives.

        log w_ij = (2 - d)·log D_ij - (d - 3)/2·log(1 - D_ij²/4),  D_ij at least ``cutoff`` 0.5

    The weight w is the inverse density of distances between points on the unit sphere. Negatives at
    ``nonzero_loss_cutoff`` 1.4 or farther, which add nothing to a margin loss, have a weight of
    1e-6. An anchor with as many positives as negatives takes all of them, in index order; with
    more, a random subset; with fewer, it draws them with replacement. The k-th positive is paired
    with the k-th negative in index order, or, if ``in_order`` is False, in the order of drawing.
    """

    def __init__(
        self, cutoff: float = 0.5, nonzero_loss_cutoff: float = 1.4, *, in_order: bool = True
    ) -> None:
        if not 0 < cutoff < nonzero_loss_cutoff:
            raise ValueError(
                f"The cutoff {cutoff} must be above 0 and below the distance "
                f"{nonzero_loss_cutoff} from which negatives cost nothing."
            )
        self.cutoff = cutoff
        self.nonzero_loss_cutoff = nonzero_loss_cutoff
        self.in_order = in_order

    def weights(self, unit: Tensor, others: Tensor, negative: Tensor) -> Tensor:
        """(B, R): the probability of drawing each image as a negative of the row's, up to a factor.

        Takes unit vectors (B, d), those that they are compared with (R, d), and the mask of
        negative pairs; all other pairs have the weight 0.
        """
        size = unit.shape[1]
        distances = _mining_distances(unit, others).clamp_min(self.cutoff)
        # Opposite embeddings have a distance of 2: the logarithm would be that of 0 or less.
        share = (distances.square() / 4).clamp_max(1 - 1e-7)
        log_weights = (2 - size) * distances.log() - (size - 3) / 2 * torch.log1p(-share)
        near = negative & (distances < self.nonzero_loss_cutoff)
        log_weights = log_weights.where(near, torch.zeros_like(log_weights))
        weights = (log_weights - log_weights.amax(dim=1, keepdim=True)).exp() + 1e-9
        weights = weights.masked_fill(distances > self.nonzero_loss_cutoff, 1e-6)
        return weights.masked_fill(~negative, 0)

    def choose(self, unit: Tensor, others: Tensor, positive: Tensor, negative: Tensor) -> Triplets:
        """The triplets; see Miner."""
        draws, anchors = on_host(self._draws, positive, negative)
        if draws == 0 or len(anchors) == 0:
            return anchors[:0], anchors[:0], anchors[:0]
        negatives = _drawn(self.weights(unit, others, negative)[anchors], draws)
        if self.in_order:
            negatives = negatives.sort(dim=1).values
        positives = self._positives(positive[anchors], draws)
        return anchors.repeat_interleave(draws), positives.flatten(), negatives.flatten()

    @staticmethod
    def _draws(positive: Tensor, negative: Tensor) -> tuple[int, Tensor]:
        """The number of negatives per anchor, and the indices of the anchors."""
        mean = int(positive.sum() / len(positive) + 0.5)
        draws = min(max(1, mean), int(negative.sum(dim=1).min()))
        return draws, positive.any(dim=1).nonzero().squeeze(1)

    @staticmethod
    def _positives(positive: Tensor, draws: int) -> Tensor:
        """``draws`` positives for each row of the mask, (A, B) → (A, draws)."""
        repeated = _drawn(positive.float(), draws, replacement=True)
        keys = torch.rand(positive.shape, device=positive.device).masked_fill(~positive, -1)
        subset = keys.topk(draws).indices.sort(dim=1).values
        return torch.where(positive.sum(dim=1, keepdim=True) < draws, repeated, subset)


class NearestNegativeMiner(Miner):
    """The nearest negatives at a distance of ``cutoff`` 0.5 or more ("easypeasy").

    Deterministic. An anchor gets n negatives, where n is the mean number of positives, rounded
    down, and at least 1: the nearest from ``cutoff`` on, and if these are fewer than n, also the
    nearest of those below it. Its k-th positive is paired with its k-th negative, both in index
    order. (Deviation: below the cutoff, the released code takes even the anchor itself and its
    positives as negatives.)

    With ``near`` False, negatives below the cutoff are never taken, and the k-th positive is paired
    with the k-th nearest negative, as in the first versions of this code.
    """

    def __init__(self, cutoff: float = 0.5, *, near: bool = True) -> None:
        checks.not_negative(cutoff=cutoff)
        self.cutoff = cutoff
        self.near = near

    def choose(self, unit: Tensor, others: Tensor, positive: Tensor, negative: Tensor) -> Triplets:
        """The triplets; see Miner."""
        distances = _mining_distances(unit, others)
        allowed = negative if self.near else negative & (distances >= self.cutoff)
        draws, anchors, places = on_host(_places, positive, allowed)
        negatives = self._negatives(distances, allowed, draws)
        positives = _in_index_order(positive)
        return anchors, positives[anchors, places], negatives[anchors, places]

    def _negatives(self, distances: Tensor, allowed: Tensor, draws: int) -> Tensor:
        """(B, draws): each anchor's negatives, followed by other images if fewer are allowed."""
        # Distances of unit vectors are at most 2, so 4 more puts all below the cutoff last.
        ranks = distances + 4 * (distances < self.cutoff)
        nearest = ranks.masked_fill(~allowed, torch.inf).argsort(dim=1, stable=True)[:, :draws]
        if not self.near:
            return nearest
        chosen = torch.zeros_like(allowed).scatter_(1, nearest, True) & allowed
        return _in_index_order(chosen)


def _places(positive: Tensor, allowed: Tensor) -> tuple[int, Tensor, Tensor]:
    """The largest number of negatives per anchor; for each triplet, the anchor, and the position k
    of its positive and negative among those of the anchor."""
    draws = max(1, int(positive.sum()) // len(positive))
    pairs = torch.minimum(positive.sum(dim=1), allowed.sum(dim=1)).clamp_max(draws)
    valid = torch.arange(draws, device=pairs.device) < pairs[:, None]
    return draws, *valid.nonzero(as_tuple=True)


def _in_index_order(chosen: Tensor) -> Tensor:
    """(B, B) indices: in each row those marked by the mask, in order, and then all others."""
    return (~chosen).int().argsort(dim=1, stable=True)


class AnchorMiner(Miner):
    """One triplet for each anchor that has a positive and a suitable negative.

    ``positive`` and ``negative`` choose an image in each row of the distances (B, B) from those
    that a mask allows: ``nearest``, ``farthest`` or ``at_random``. With ``band``, negatives must be
    semi-hard: D_ap < D_an < D_ap + band.
    """

    def __init__(self, positive: Choose, negative: Choose, band: float | None = None) -> None:
        self.positive = positive
        self.negative = negative
        self.band = band

    def choose(self, unit: Tensor, others: Tensor, positive: Tensor, negative: Tensor) -> Triplets:
        """The triplets; see Miner."""
        distances = _mining_distances(unit, others)
        positives = self.positive(distances, positive)[:, None]
        if self.band is not None:
            to_positive = distances.gather(1, positives)
            negative = negative & (distances > to_positive) & (distances < to_positive + self.band)
        negatives = self.negative(distances, negative)
        (anchors,) = on_host(_with_both, positive, negative)
        return anchors, positives[anchors, 0], negatives[anchors]


def _with_both(positive: Tensor, negative: Tensor) -> tuple[Tensor]:
    """Indices of the images that have a positive and a negative."""
    return (positive.any(dim=1) & negative.any(dim=1)).nonzero(as_tuple=True)


def nearest(distances: Tensor, allowed: Tensor) -> Tensor:
    """Index of the nearest allowed image of each row, (B, B) and its mask → (B,)."""
    return distances.masked_fill(~allowed, torch.inf).argmin(dim=1)


def farthest(distances: Tensor, allowed: Tensor) -> Tensor:
    """Index of the farthest allowed image of each row, (B, B) and its mask → (B,)."""
    return distances.masked_fill(~allowed, -torch.inf).argmax(dim=1)


def at_random(distances: Tensor, allowed: Tensor) -> Tensor:
    """Index of a random allowed image of each row, (B, B) and its mask → (B,)."""
    return torch.rand_like(distances).masked_fill(~allowed, -1).argmax(dim=1)


BOUNDARY = 1.2
"""The published β of the margin loss, which the released code uses for triplet losses too."""


def _anchor_miner(
    positive: Choose, negative: Choose, semi_hard: bool = False
) -> Callable[[float, bool, float], Miner]:
    def make(margin: float, released: bool, boundary: float) -> Miner:
        return AnchorMiner(positive, negative, band=margin if semi_hard else None)

    return make


MINERS: dict[str, Callable[[float, bool, float], Miner]] = {
    "distanceweighted": lambda margin, released, boundary: DistanceWeightedMiner(
        nonzero_loss_cutoff=boundary + margin, in_order=released
    ),
    "easypeasy": lambda margin, released, boundary: NearestNegativeMiner(near=released),
    "HPHN": _anchor_miner(farthest, nearest),
    "EPHN": _anchor_miner(nearest, nearest),
    "RPHN": _anchor_miner(at_random, nearest),
    "EPSHN": _anchor_miner(nearest, at_random, semi_hard=True),
    "RPSHN": _anchor_miner(at_random, at_random, semi_hard=True),
}
"""Name → a function of the loss's margin, whether mining is as released, and the loss's boundary β
that makes the miner."""

MINING = ("released", "earlier")
"""How some miners choose and pair images: as the released code does, or as the first versions of
this code did."""

TWO_WAYS = ("easypeasy", "distanceweighted")
"""The miners that have both ways of mining."""


def miner_of(
    given: Miner | str | None, margin: float, mining: str, boundary: float = BOUNDARY
) -> Miner | None:
    """A loss's miner, given by its name or as an object; None for none.

    Raises ValueError like ``build_miner``.
    """
    if given is None or callable(given):
        _check_mining(mining, None)
        return given
    return build_miner(str(given), margin, mining, boundary)


def build_miner(
    name: str, margin: float = 0.2, mining: str = "released", boundary: float = BOUNDARY
) -> Miner:
    """The miner of MINERS called ``name``, for a loss with this margin.

    In the names, the positive is hard (HP, the farthest), easy (EP, the nearest) or random (RP),
    and the negative hard (HN, the nearest) or semi-hard (SHN, farther than the positive by less
    than the margin). ``mining`` is one of MINING; only the miners of TWO_WAYS have a choice.
    ``boundary`` is the margin loss's β: negatives farther away than β + margin add nothing to it.
    Raises ValueError for an unknown name, or a way of mining that the miner does not have.
    """
    if name not in MINERS:
        raise ValueError(unknown("miner", name, MINERS))
    _check_mining(mining, name)
    return MINERS[name](margin, mining == "released", boundary)


def _check_mining(mining: str, miner: str | None) -> None:
    """Raise ValueError for an unknown way of mining, or one that this miner does not have."""
    if mining not in MINING:
        raise ValueError(unknown("way of mining", mining, MINING))
    if mining != MINING[0] and miner not in TWO_WAYS:
        raise ValueError(
            f"mining={mining!r} is for the miners {' and '.join(TWO_WAYS)} only: "
            "name one of them as the miner, or leave it out."
        )
