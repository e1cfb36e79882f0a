"""The "divide" of divide and conquer: training images → clusters, every few epochs of a run.

Sanakoyeu et al., "Improving Deep Metric Learning by Divide and Conquer", TPAMI 2021. Images are
clustered, not classes: a class may be in several clusters. Each time, k-means starts from scratch,
and its clusters get the numbers of the earlier ones that they resemble most. While the number of
clusters grows, each is then split in two: cluster c becomes 2c and 2c + 1.

Deviations: the released code applies the permutation from the Hungarian method the wrong way round,
so that with three or more clusters masks do not follow their clusters (`legacy=True` does the
same). Our k-means starts by k-means++ instead of random images. If all trials of a division fail,
the last one is used, as in the released code, but with a warning.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment

from metrics.clustering import kmeans

logger = logging.getLogger("dataset.clusters")

TRIALS = 30
UNUSED = -1


def divide(
    features: torch.Tensor,
    labels: np.ndarray,
    count: int,
    seed: int,
    *,
    previous: np.ndarray | None = None,
    split: bool = False,
    adaptive: bool = False,
    legacy: bool = False,
) -> np.ndarray:
    """Divides the training images.

    Args:
        features: (N, F) unit vectors. labels: (N,) classes.
        count: the number of clusters, before a `split`; with `split`, a power of two.
        seed: the seed of k-means; every further trial adds 1.
        previous: (N,) the previous division, whose numbers are kept.
        split: whether cluster c is finally split into 2c and 2c + 1.
        adaptive: whether k-means starts at the means of `previous`, if it has as many clusters.
        legacy: whether to renumber as the released code does.

    Returns:
        (N,) int64 clusters; -1 for an image that is the only one of its class in its cluster.
    """
    start = _means(features, previous, count) if adaptive and previous is not None else None
    clusters = _accepted_kmeans(features, labels, count, seed, start)
    if previous is not None:
        clusters = renumber(clusters, previous, count, legacy=legacy)
    if split:
        clusters = _halves(features, labels, clusters, count, seed)
    return without_singles(clusters, labels)


def one_cluster(labels: np.ndarray) -> np.ndarray:
    """The division into one cluster, (N,): 0, or -1 for the only image of a class."""
    return without_singles(np.zeros(len(labels), np.int64), labels)


def can_divide(labels: np.ndarray, count: int) -> bool:
    """Whether `count` clusters can each hold two classes with two images each.

    A class of n images serves min(count, n // 2) clusters, and each takes two classes.
    """
    return bool(np.minimum(np.bincount(labels) // 2, count).sum() >= 2 * count)


def _means(features: torch.Tensor, clusters: np.ndarray, count: int) -> torch.Tensor | None:
    """(count, F) means of the clusters; None if one is empty, or there are not `count` of them."""
    sizes = np.bincount(clusters[clusters >= 0], minlength=count)
    if len(sizes) != count or not sizes.all():
        return None
    members = (torch.from_numpy(np.flatnonzero(clusters == c)) for c in range(count))
    return torch.stack([features[rows.to(features.device)].mean(dim=0) for rows in members])


def _accepted_kmeans(
    features: torch.Tensor,
    labels: np.ndarray,
    count: int,
    seed: int,
    start: torch.Tensor | None = None,
) -> np.ndarray:
    """k-means with clusters that can all be trained on; the last trial if none has.

    The first trial starts at the centres `start` (count, F), if they are given.
    """
    if count == 1:
        return np.zeros(len(labels), np.int64)
    for trial in range(TRIALS):
        clusters = kmeans(features, count, seed + trial, start=start).labels.cpu().numpy()
        start = None
        if is_acceptable(clusters, labels, count):
            return clusters
    logger.warning(
        "no k-means of %d trials gave every one of %d clusters two classes with two images; "
        "use fewer --nb-clusters",
        TRIALS,
        count,
    )
    return clusters


def is_acceptable(clusters: np.ndarray, labels: np.ndarray, count: int) -> bool:
    """Whether every cluster has at least two classes with at least two images each."""
    pairs, sizes = np.unique(np.stack([clusters, labels]), axis=1, return_counts=True)
    usable = np.bincount(pairs[0, sizes >= 2], minlength=count)
    return bool((usable[:count] >= 2).all())


def renumber(
    clusters: np.ndarray, previous: np.ndarray, count: int, *, legacy: bool = False
) -> np.ndarray:
    """Give each cluster the number of the previous cluster that it resembles most.

    Minimises the sum of |cluster_i Δ previous_j| over one-to-one assignments (Hungarian method).
    Images that were unused before belong to no previous cluster.

    Args:
        clusters: (N,) numbers 0..count-1. previous: (N,) the same, or -1 for unused images.
    """
    used = previous >= 0
    common = np.zeros((count, count), np.int64)
    np.add.at(common, (clusters[used], previous[used]), 1)
    sizes = np.bincount(clusters, minlength=count)
    earlier = np.bincount(previous[used], minlength=count)
    cost = sizes[:, None] + earlier[None, :] - 2 * common
    now, before = linear_sum_assignment(cost)
    number = np.empty(count, np.int64)
    if legacy:
        number[before] = now
    else:
        number[now] = before
    return number[clusters]


def _halves(
    features: torch.Tensor, labels: np.ndarray, clusters: np.ndarray, count: int, seed: int
) -> np.ndarray:
    """Every cluster split in two by k-means."""
    result = np.empty_like(clusters)
    for cluster in range(count):
        members = np.flatnonzero(clusters == cluster)
        if len(members) < 2:
            result[members] = 2 * cluster
            continue
        part = features[torch.from_numpy(members).to(features.device)]
        result[members] = 2 * cluster + _accepted_kmeans(part, labels[members], 2, seed)
    return result


def without_singles(clusters: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The clusters, with -1 for images that are the only one of their class in their cluster."""
    _, inverse, sizes = np.unique(
        np.stack([clusters, labels]), axis=1, return_inverse=True, return_counts=True
    )
    return np.where(sizes[inverse.reshape(-1)] == 1, UNUSED, clusters)
