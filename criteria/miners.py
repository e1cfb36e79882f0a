"""Which triplets of a batch a loss is computed on."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from criteria.arguments import unknown
from criteria.base import (
    References,
    check_batch,
    check_not_negative,
    in_float32,
    of_labels,
    on_host,
    pair_masks,
    unit_others,
    unit_rows,
)

Triplets = tuple[Tensor, Tensor, Tensor]
Choose = Callable[[Tensor, Tensor], Tensor]
"""Distances (B, B) and the mask of what is allowed → the index of one image in each row, (B,)."""


class Miner:
    """Chooses triplets: ``miner(embeddings, labels) -> (anchors, positives, negatives)``.

    Takes (B, d) and (B,), measures distances between unit vectors, and returns three index tensors
    of one length, empty when the batch has no triplet. With ``references`` positives and negatives
    are indices of those. No gradient passes. Random choices come from torch's global generator.
    Raises ValueError for an empty batch.
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

        From unit vectors (B, d), those they are compared with (R, d), usually the same, and the
        masks of positive and negative pairs (B, R). What follows from the masks alone is worked out
        ``on_host``, where they have their copies.
        """
        raise NotImplementedError


def _mining_distances(unit: Tensor, others: Tensor) -> Tensor:
    return (2 - 2 * unit @ others.T).clamp_min(1e-4).sqrt()


def _drawn(weights: Tensor, count: int, replacement: bool = False) -> Tensor:
    """The same bits as ``torch.multinomial``, which would wait for a GPU to check its arguments."""
    if replacement and count > 1:
        return torch.multinomial(weights, count, replacement=True)  # this one does not wait
    keys = weights / torch.empty_like(weights).exponential_()
    return keys.argmax(dim=1, keepdim=True) if count == 1 else keys.topk(count).indices


class DistanceWeightedMiner(Miner):
    """Negatives drawn evenly over distance, as many per anchor as the mean of positives.

        log w_ij = (2 - d)·log D_ij - (d - 3)/2·log(1 - D_ij²/4),  D_ij at least ``cutoff`` 0.5

    is the inverse density of distances between points on the unit sphere. Negatives at
    ``nonzero_loss_cutoff`` 1.4 or farther, which cost a margin loss nothing, keep a weight of 1e-6.
    An anchor takes its positives in index order when it has as many as negatives, a random subset
    when it has more, and draws them with replacement when it has fewer. The k-th goes with the k-th
    negative in index order, or with ``in_order`` False with the k-th that was drawn.
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
        """(B, R): how likely each image is drawn as a negative of the row's, up to a factor.

        From unit vectors (B, d), those they are compared with (R, d), and the mask of negative
        pairs, outside which the weights are 0.
        """
        size = unit.shape[1]
        distances = _mining_distances(unit, others).clamp_min(self.cutoff)
        # Opposite embeddings, 2 apart, would have the logarithm of 0, or by rounding of less.
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
        """How many negatives an anchor gets, and the anchors."""
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
    """The negatives nearest to the anchor among those at ``cutoff`` 0.5 or farther ("easypeasy").

    Deterministic. An anchor is given n negatives, n being the mean number of positives, rounded
    down, and at least 1: the nearest from ``cutoff`` on, and where these are fewer, the nearest of
    those before it. Its k-th positive goes with its k-th negative, both in index order.

    (Deviation: among what lies before the cutoff the released code also takes the anchor itself and
    its positives for negatives.) With ``near`` False, negatives before the cutoff are never taken,
    and the k-th positive goes with the k-th nearest negative: what this code did at first.
    """

    def __init__(self, cutoff: float = 0.5, *, near: bool = True) -> None:
        check_not_negative(cutoff=cutoff)
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
        """(B, draws): each anchor's negatives; where fewer are allowed, others come after them."""
        # No two unit vectors are farther apart than 2: 4 more puts all before the cutoff last.
        ranks = distances + 4 * (distances < self.cutoff)
        nearest = ranks.masked_fill(~allowed, torch.inf).argsort(dim=1, stable=True)[:, :draws]
        if not self.near:
            return nearest
        chosen = torch.zeros_like(allowed).scatter_(1, nearest, True) & allowed
        return _in_index_order(chosen)


def _places(positive: Tensor, allowed: Tensor) -> tuple[int, Tensor, Tensor]:
    """How many negatives an anchor may have; each triplet's anchor, and its place among the
    anchor's positives and negatives."""
    draws = max(1, int(positive.sum()) // len(positive))
    pairs = torch.minimum(positive.sum(dim=1), allowed.sum(dim=1)).clamp_max(draws)
    valid = torch.arange(draws, device=pairs.device) < pairs[:, None]
    return draws, *valid.nonzero(as_tuple=True)


def _in_index_order(chosen: Tensor) -> Tensor:
    """(B, B) indices: in each row those that the mask marks, in order, and then all others."""
    return (~chosen).int().argsort(dim=1, stable=True)


class AnchorMiner(Miner):
    """One triplet for each anchor that has a positive and a suitable negative.

    ``positive`` and ``negative`` choose an image in each row of the distances (B, B) from those a
    mask allows: ``nearest``, ``farthest`` or ``at_random``. With ``band`` a negative must be
    semi-hard: D_ap < D_an < D_ap + band.
    """

    def __init__(
        self,
        positive: Choose,
        negative: Choose,
        band: float | None = None,
    ) -> None:
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
    """The images that have a positive and a negative."""
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
"""The β of the margin loss as published, which the released code has for triplets too."""


def _letters(
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
    "HPHN": _letters(farthest, nearest),
    "EPHN": _letters(nearest, nearest),
    "RPHN": _letters(at_random, nearest),
    "EPSHN": _letters(nearest, at_random, semi_hard=True),
    "RPSHN": _letters(at_random, at_random, semi_hard=True),
}
"""Name → (margin of the loss, whether mining is as released, its boundary β) → the miner."""

MINING = ("released", "earlier")
"""How `easypeasy` and `distanceweighted` take and pair: as the released code does, or as runs of
the first versions of this code did."""

TWO_WAYS = ("easypeasy", "distanceweighted")
"""The miners that these are ways of."""


def miner_of(
    given: Miner | str | None, margin: float, mining: str, boundary: float = BOUNDARY
) -> Miner | None:
    """The miner of a loss that was given one: by its name, as an object, or none.

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

    Positive: hard (H, farthest), easy (E, nearest), random (R); negative: hard (HN, nearest),
    semi-hard (SHN, within the margin behind the positive). ``mining`` is one of MINING, for those
    of TWO_WAYS; ``boundary`` is the margin loss's β, beyond which, by the margin, negatives cost it
    nothing. Raises ValueError for an unknown name, or a way of mining that the miner has not.
    """
    if name not in MINERS:
        raise ValueError(unknown("miner", name, MINERS))
    _check_mining(mining, name)
    return MINERS[name](margin, mining == "released", boundary)


def _check_mining(mining: str, miner: str | None) -> None:
    """Raises ValueError for an unknown way of mining, or one that this miner does not have."""
    if mining not in MINING:
        raise ValueError(unknown("way of mining", mining, MINING))
    if mining != MINING[0] and miner not in TWO_WAYS:
        raise ValueError(
            f"mining={mining!r} is a way of the miners {' and '.join(TWO_WAYS)} and of no other: "
            "name one of them as the miner, or leave it out."
        )
