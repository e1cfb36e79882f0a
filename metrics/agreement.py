"""Agreement of a clustering with the labels: NMI, F1 of pairs, AMI."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from metrics.clustering import kmeans
from metrics.images import Images, embeddings_of
from metrics.products import Array, as_numbers
from metrics.ragged import spread
from metrics.sharing import Progress


def clustering_metrics(
    embeddings: Array,
    labels: Array,
    seed: int = 0,
    restarts: int = 1,
    *,
    iterations: int = 100,
    ami: bool = False,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> dict[str, float]:
    """NMI and F1 of k-means on the L2-normalised embeddings, k = number of classes.

    embeddings (N, d), labels (N,). If every class has one image, or there is only one class, NMI
    and AMI are 1 by construction, see `by_construction`; in the first case F1 is NaN, undefined.
    Memory: one normalised copy of the embeddings, besides that of `kmeans`.
    Raises ValueError as `retrieval_metrics` does.
    """
    x, device = embeddings_of(embeddings, "embeddings", device)
    images = Images(x, labels, None, "embeddings")
    k = len(images.labels.unique_consecutive())
    clusters = kmeans(
        images.unit(slice(None)), k, seed, restarts, iterations, progress=progress
    ).labels
    return nmi_f1(images.labels, clusters, ami=ami)


def nmi_f1(labels: Array, clusters: Array, *, ami: bool = False) -> dict[str, float]:
    """Agreement of a clustering with the labels, both (N,) integers.

    NMI = 2 I(labels; clusters) / (H(labels) + H(clusters)), 1 when both are one single group.
    F1 = 2PR / (P + R) over pairs of images: P the share of same-cluster pairs that are of one
    class, R the share of same-class pairs that are in one cluster; NaN, undefined, if there are no
    pairs of either kind.
    `ami=True` adds AMI, mutual information adjusted for chance (Vinh et al., 2010, arithmetic).
    `by_construction` says whether NMI and AMI mean anything for these labels.

    Raises ValueError: no labels, lengths that differ, or text.
    """
    labels, clusters = _groups(labels, "labels"), _groups(clusters, "clusters")
    if len(labels) != len(clusters) or len(labels) == 0:
        raise ValueError(
            f"{len(labels)} labels, {len(clusters)} clusters: there must be one of each per image."
        )
    _, row, a = labels.cpu().unique(return_inverse=True, return_counts=True)
    _, column, b = clusters.cpu().unique(return_inverse=True, return_counts=True)
    cells, joint = (row * len(b) + column).unique(return_counts=True)
    share = joint.double() / len(labels)
    by_chance = a[cells // len(b)].double() * b[cells % len(b)] / len(labels) ** 2
    information = float((share * (share / by_chance).log()).sum().clamp_min(0))
    entropy = (_entropy(a) + _entropy(b)) / 2
    pairs = float(_pairs(a) + _pairs(b))
    metrics = {
        "NMI": min(1.0, information / entropy) if entropy > 0 else 1.0,
        "F1": 2 * float(_pairs(joint)) / pairs if pairs > 0 else math.nan,
    }
    if ami:
        chance = _expected_information(a, b)
        room = entropy - chance
        metrics["AMI"] = min(1.0, (information - chance) / room) if room > 1e-12 else 1.0
    return metrics


def by_construction(labels: Array) -> bool:
    """Whether NMI and AMI are 1 for any embeddings, as long as they differ.

    They are if each image is a class of its own, or if there is only one class: then there is only
    one clustering with as many clusters as classes. labels (N,). Raises as `nmi_f1` does.
    """
    labels = _groups(labels, "labels")
    return len(labels.unique()) in (1, len(labels))


def _groups(values: Array, what: str) -> Tensor:
    return as_numbers(values, f"The {what} must be integers of shape (N,)").flatten()


def _entropy(counts: Tensor) -> float:
    p = counts.double() / counts.sum()
    return float(-(p * p.log()).sum())


def _pairs(counts: Tensor) -> Tensor:
    return (counts * (counts - 1)).sum() / 2


def _expected_information(a: Tensor, b: Tensor) -> float:
    """Expected mutual information of random groupings with the group sizes a and b.

    Σ_ij Σ_n P(n | a_i, b_j) · n/N · log(N·n / (a_i·b_j)), n hypergeometric. Equal sizes are
    computed once, which leaves few terms.
    """
    n = int(a.sum())
    (a, times_a), (b, times_b) = (size.unique(return_counts=True) for size in (a, b))
    log_factorial = torch.arange(1, n + 2, dtype=torch.float64).lgamma()
    total = 0.0
    for size, times in zip(a.tolist(), times_a.tolist(), strict=True):
        most = b.clamp_max(size)
        column, shared = spread(torch.ones_like(most), most)
        other = b[column]
        possible = shared >= size + other - n
        column, other, shared = column[possible], other[possible], shared[possible]
        lf = log_factorial
        log_p = (
            lf[size] + lf[other] + lf[n - size] + lf[n - other] - lf[n] - lf[shared]
            - lf[size - shared] - lf[other - shared] - lf[n - size - other + shared]
        )  # fmt: skip
        gain = shared.double() / n * (n * shared.double() / (size * other)).log()
        total += times * float((log_p.exp() * gain * times_b[column]).sum())
    return total
