"""How sure error rates of pairs are: a bootstrap over the classes.

Pairs that share an image or a class are not independent, so whole classes are drawn, with
replacement. If class c was drawn w_c times, a replicate of the rate is

    of same pairs        Σ_c w_c·n_c(t) / Σ_c w_c·n_c
    of different pairs   Σ_{a≠b} w_a·w_b·n_ab(t) / Σ_{a≠b} w_a·w_b·n_ab

where n is the number of pairs, and n(t) of those that the rate counts. (Two copies of a class are
not a different pair.) If only some of the accepted different pairs are listed, n_ab(t) counts
these, and the numerator is scaled so that it is right with every class drawn once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metrics.comparison import class_draws
from metrics.verification import PairCounts

RESAMPLES = 500


def rate_of_classes(counted: Tensor, every: Tensor, seed: int = 1) -> Tensor:
    """Replicates (RESAMPLES,) of Σ counted / Σ every, both (C,); NaN where nothing was drawn."""
    weights = class_draws(len(every), RESAMPLES, seed)
    return torch.cat([(w @ counted.double()) / (w @ every.double()) for w in weights])


def rate_of_different_pairs(pairs: PairCounts, threshold: int, seed: int = 1) -> Tensor:
    """Replicates (RESAMPLES,) of the share of the different pairs that a threshold accepts.

    All are NaN if it accepts some but none of them is listed.

    Args:
        threshold: an index on the grid of cosines, not below `pairs.listed_from`.
    """
    near = pairs.listed.bin >= threshold
    count = len(pairs.classes)
    key, times = (pairs.listed.a[near] * count + pairs.listed.b[near]).unique(return_counts=True)
    place = torch.stack([key // count, key % count])
    with torch.sparse.check_sparse_tensor_invariants(False):
        accepted = torch.sparse_coo_tensor(place, times.double(), (count, count))
    queries, gallery = pairs.sizes.double()
    listed, all_ = int(near.sum()), int(pairs.different[threshold:].sum())
    stands_for = 1.0 if listed == all_ else all_ / listed if listed else math.nan
    found = []
    for weights in class_draws(count, RESAMPLES, seed):
        hits = (torch.sparse.mm(accepted, weights.T) * weights.T).sum(0)
        every = (weights @ queries) * (weights @ gallery) - weights.square() @ (queries * gallery)
        found.append(stands_for * hits / (every / 2 if pairs.symmetric else every))
    return torch.cat(found)
