"""Retrieval metrics of deep metric learning: exact, and in bounded memory.

Similarity is the cosine; a vector of zeros, which has no direction, has cosine 0 with everything.
For a query with R other images of its class in the gallery, let c_m be the number of other-class
images that are strictly closer to the query than the m-th nearest same-class image. Without ties
that image has rank m + c_m, and every metric follows from these counts, without sorting a row of
similarities:

    R@K    share of the queries with c_1 < K
    MRR    mean of 1 / (1 + c_1)
    RP     1/R · #{m : m + c_m <= R}
    MAP@R  1/R · Σ_{m : m + c_m <= R} m / (m + c_m)                     (Musgrave et al., 2020)
    mARP   the same sum divided by the hits among the R nearest instead of by R, 0 without a hit
           (as divide and conquer reports it; not comparable with MAP@R)

Ties: if images of the query's class and of others are exactly as close, a metric is its mean over
all orders of these images, computed and not sampled (see ties.py). So no image is right because it
is tied, and a network that maps all images to one point is as good as chance.

Ties are decided in float64, from the original embeddings (images.py), and the metrics depend
neither on the block size, nor on the device, nor on the order of the images.

Memory: blocks of similarities and counts per image, never N × N. Two searches give the same ranks
(ranks.py): blocks.py compares each pair of images once, which is best for small classes; rows.py
sorts the images near each query, which is best for large ones.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from metrics import blocks, rows, ties
from metrics.images import Images, Pairing, are_crowded, embeddings_of
from metrics.products import Array, full_float32
from metrics.rows import Score
from metrics.sharing import ALONE, Progress, Share

BLOCK_SIZE = {"cpu": 4096, "cuda": 8192}  # gallery images in a block, see also blocks.Scale
MAX_BLOCK_SIZE = 8192
MANY_TIED = 0.01  # share of the queries from which on `about_ties` speaks


def retrieval_metrics(
    embeddings: Array,
    labels: Array,
    gallery: Array | None = None,
    gallery_labels: Array | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    **options: Any,
) -> dict[str, float]:
    """R@K for each K, RP, MAP@R, mARP, MRR, fractions in 0..1, and the numbers of queries.

    The other arguments, `options` too, are those of `retrieval_per_query`; the means are those of
    `summarise`.
    """
    check_ks(ks, len(embeddings if gallery is None else gallery))
    return summarise(
        retrieval_per_query(embeddings, labels, gallery, gallery_labels, **options), ks
    )


def check_ks(ks: Sequence[int], gallery_size: int | None = None) -> None:
    """Raises ValueError unless R@K makes sense for each K, in a gallery of that many images."""
    listed = isinstance(ks, Iterable) and not isinstance(ks, str | bytes)
    if not listed or not all(isinstance(k, Integral) and k is not True for k in ks):
        raise ValueError(f"The Ks of R@K must be a list of whole numbers, got {ks!r}.")
    if min(ks, default=1) < 1:
        raise ValueError(f"The K of R@K counts neighbours and must be at least 1, got {min(ks)}.")
    if gallery_size and gallery_size < max(ks, default=1):
        raise ValueError(
            f"R@{max(ks)} needs a gallery of {max(ks)} images, this one has {gallery_size}; "
            "choose a smaller K."
        )


@torch.no_grad()
def retrieval_per_query(
    embeddings: Array,
    labels: Array,
    gallery: Array | None = None,
    gallery_labels: Array | None = None,
    *,
    block_size: int | None = None,
    exclude: Array | tuple[Array, Array] | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    share: Share = ALONE,
    score: Score | None = None,
) -> dict[str, Tensor]:
    """Retrieval metrics of each query: CPU tensors of shape (Q,), in the order of the queries.

    embeddings: (Q, d) queries, labels: (Q,) integers. With a gallery (G, d) queries search in it;
    without, each query searches among all other embeddings.
    exclude: an integer group per image; a query ignores images of its own group. With a gallery, a
    pair (query groups, gallery groups).
    block_size: gallery images in a block (at most 8192); affects memory and speed, not results.
    device: where to compute; by default, where the embeddings are. progress: called with 0..1.
    share: this process's part of the work, if several search the same embeddings together.
    score: a similarity to use instead of the cosine, see `rows.Score`.

    Returns
        relevant      R, the number of same-class images (matches) that the query can find (int64)
        rank          c_1, the number of other-class images strictly closer than the nearest match;
                      G if R = 0 (int64). Ties are not in it: use `recall_at` for R@K
        tied          the number of other-class images exactly as close as the nearest match (int64)
        tied_matches  the number of matches exactly as close as the nearest, which is included; 0 if
                      R = 0 (int64)
        undecided     whether a metric depends on the order of tied images (int64, 0 or 1)
        RP, MAP@R, mARP, MRR   the query's value in each mean, averaged over the orders of tied
                      images; 0 if R = 0 (float64)

    Extra memory: at most 512 MB beyond the embeddings and a few numbers per image.

    Raises ValueError: nothing to search in, no numbers, lengths or dimensions that differ, NaN or
    infinity, labels that are not integers.
    """
    x, device = embeddings_of(embeddings, "embeddings", device)
    groups, gallery_groups = _groups(exclude, gallery is not None)
    if gallery is None:
        if gallery_labels is not None:
            raise ValueError("There are gallery labels but no gallery; give both or neither.")
        groups = torch.arange(len(x)) if groups is None else groups
        queries = images = Images(x, labels, groups, "embeddings")
    else:
        queries = Images(x, labels, groups, "embeddings")
        y, _ = embeddings_of(gallery, "gallery", device, like=x)
        images = Images(y, gallery_labels, gallery_groups, "gallery")
    with full_float32(device):
        pairing = Pairing.of(queries, images, exclude is not None)
        found = _search(pairing, _size(block_size, device), progress, share, score)
    back = queries.order.cpu().argsort()
    return {name: values[back] for name, values in found.items()}


def recall_at(per_query: Mapping[str, Tensor], k: int) -> Tensor:
    """The probability that a match is among each query's K nearest, over the orders of tied images.

    per_query: `retrieval_per_query`'s result. Returns (Q,) float64: 0 or 1, except for queries with
    `tied` images; 0 without a match. Raises ValueError: K is not a whole number above 0.
    """
    check_ks((k,))
    rank, tied = per_query["rank"], per_query["tied"]
    hit = (rank < k) & (per_query["relevant"] > 0)
    found = hit.double()
    open_ = (hit & (tied > 0)).nonzero().squeeze(1)
    found[open_] = ties.recall(rank[open_], per_query["tied_matches"][open_], tied[open_], k)
    return found


def summarise(per_query: Mapping[str, Tensor], ks: Sequence[int]) -> dict[str, float]:
    """Means of `retrieval_per_query`'s values, over all its queries or a selection of them.

    A query without a match (R = 0) counts as a miss in R@K and as 0 in MRR; RP, MAP@R and mARP
    leave it out, and are NaN, undefined, if no query has a match. The counts `queries`,
    `queries_without_match` and `queries_tied` are included; metrics of tied queries depend on the
    order of images that are exactly as close, see `about_ties`.
    """
    check_ks(ks)
    matched = per_query["relevant"] > 0
    metrics = {f"R@{k}": float(recall_at(per_query, k).mean()) for k in ks}
    for name in ("RP", "MAP@R", "mARP"):
        metrics[name] = float(per_query[name].sum() / matched.sum())
    metrics["MRR"] = float(per_query["MRR"].mean())
    metrics["queries"] = len(matched)
    metrics["queries_without_match"] = int((~matched).sum())
    metrics["queries_tied"] = int(per_query["undecided"].sum())
    return metrics


def about_ties(numbers: Mapping[str, float]) -> str:
    """A sentence if many queries are tied, else ""; numbers: those of `summarise`."""
    tied, queries = numbers.get("queries_tied", 0), numbers.get("queries", 0)
    if not tied or tied < MANY_TIED * queries:
        return ""
    return (
        f"{tied:,} of {queries:,} queries have right and wrong images that are exactly as close, "
        "and count with the mean over the orders of these; many such queries mean duplicates, "
        "embeddings of few different values, or a network that has collapsed."
    )


def one_per_class_gallery(
    embeddings: Array,
    labels: Array,
    draws: int = 10,
    seed: int = 0,
    ks: Sequence[int] = (1, 5),
    **options: Any,
) -> dict[str, float]:
    """VehicleID's official protocol: one random image per class is the gallery, the rest query it.

    Returns the mean and the standard deviation over `draws` seeded galleries of each R@K and of
    MRR, which with one match per query is the mean average precision: `R@1`, `R@1_sd`, ….
    `options` go to `retrieval_metrics`. A class of one image has no query.

    Raises ValueError: fewer than one draw, no class of two images, or as `retrieval_metrics`.
    """
    x = torch.as_tensor(embeddings)
    y = torch.as_tensor(labels).cpu()
    classes, inverse = y.unique(return_inverse=True)
    if draws < 1 or len(classes) == len(y):
        raise ValueError(
            "A gallery of one image per class needs at least one draw and a class of two images."
        )
    generator = torch.Generator().manual_seed(seed)
    results = []
    for _ in range(draws):
        drawn = torch.empty(len(classes), dtype=torch.int64)
        shuffled = torch.randperm(len(y), generator=generator)
        drawn[inverse[shuffled]] = shuffled
        rest = (
            torch.ones(len(y), dtype=torch.bool).index_fill_(0, drawn, False).nonzero().squeeze(1)
        )
        parts = x[rest.to(x.device)], y[rest], x[drawn.to(x.device)], y[drawn]
        results.append(retrieval_metrics(*parts, ks, **options))
    metrics = {}
    for name in [*(f"R@{k}" for k in ks), "MRR"]:
        values = torch.tensor([result[name] for result in results], dtype=torch.float64)
        metrics[name] = float(values.mean())
        metrics[f"{name}_sd"] = float(values.std()) if draws > 1 else 0.0
    return metrics


# The arguments -----------------------------------------------------------------------------------


def _groups(
    exclude: Array | tuple[Array, Array] | None, with_gallery: bool
) -> tuple[Array | None, Array | None]:
    if with_gallery and exclude is not None:
        if not isinstance(exclude, tuple) or len(exclude) != 2:
            raise ValueError(
                "With a gallery, exclude must be a pair: the queries' groups and the gallery's."
            )
        return exclude
    return exclude, None


def _size(block_size: int | None, device: torch.device) -> int:
    if block_size is None:
        return BLOCK_SIZE.get(device.type, 4096)
    if block_size < 1:
        raise ValueError(f"The block size must be at least 1, got {block_size}.")
    return min(block_size, MAX_BLOCK_SIZE)


def _search(
    pairing: Pairing, size: int, progress: Progress | None, share: Share, score: Score | None
) -> dict[str, Tensor]:
    """`retrieval_per_query`'s answer, in the order of the queries."""
    queries, gallery, begin, end, _ = pairing
    matches = float((end - begin).double().mean())
    by_rows = score is not None or rows_are_faster(matches, gallery.embeddings.shape[1])
    if by_rows or are_crowded(queries, gallery):
        return rows.search(pairing, size, progress, share, score)
    return blocks.search(pairing, size, progress, share)


def rows_are_faster(matches: float, dimension: int) -> bool:
    """Whether rows.py is faster for this mean number of matches per query.

    It compares all pairs twice, which takes longer with more dimensions, while blocks.py takes
    longer with more matches. Measured for 9 to 5,000 matches and 64 to 512 dimensions
    (benchmarks/evaluation.py).
    """
    return 16 * matches >= dimension + 80
