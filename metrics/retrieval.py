"""Retrieval and clustering metrics of deep metric learning: exact, and in bounded memory.

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

Ties: where images of the query's class and of others are exactly as close, a metric is its mean
over all orders of these images, computed and not drawn (see ties.py): nothing is right because it
is tied, and a network that tells nothing apart is as good as chance.

Exactly as close: products are taken in float32, and one that lies within float32's rounding bound
of the value it is compared with is taken again in float64, from the embeddings as they were given,
x·y · 1/‖x‖ · 1/‖y‖. Two of these cosines are equal when they differ by no more than rounding can
make equal ones differ, 8·2^-52, and 1.5·d·2^-52 more where the sums over the d numbers are rounded
too; sums of whole numbers (codes, quantised embeddings) are not, below 2^53. So y and 5y are the
same direction where 5y is represented exactly, and the metrics depend neither on the block size,
nor on the device, nor on the order of the images.

Memory: blocks of similarities and counts per image, never N × N. Nothing here knows the rest of
the project, except for clustering.py, where k-means, NMI and F1 are, and ties.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metrics import ties
from metrics.clustering import (
    Array,
    Progress,
    as_numbers,
    full_float32,
    inner_products,
    kmeans,
    nmi_f1,
)

BLOCK_SIZE = {"cpu": 4096, "cuda": 8192}  # gallery images in a block, which has 1/8 as many queries
MAX_BLOCK_SIZE = 8192
MAX_PAIRS = 2**21  # same-class pairs counted at once; with what it takes to count them 200 MiB
MAX_ENTRIES = 2**18  # similarities taken out of a block to be looked at, at once
SHORTEST = 1e-30  # a vector shorter than that counts as zeros
MANY_TIED = 0.01  # share of the queries from which on `about_ties` speaks


class Share(NamedTuple):
    """What one of several processes does of a search; all of them get the whole answer.

    Each is given all the embeddings, and counts some of the blocks. `total` sums a tensor over the
    processes, in each of them.
    """

    number: int
    count: int
    total: Callable[[Tensor], Tensor]


ALONE = Share(0, 1, lambda counts: counts)


def retrieval_metrics(
    embeddings: Array,
    labels: Array,
    gallery: Array | None = None,
    gallery_labels: Array | None = None,
    ks: Sequence[int] = (1, 2, 4, 8),
    *,
    block_size: int | None = None,
    exclude: Array | tuple[Array, Array] | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    share: Share = ALONE,
) -> dict[str, float]:
    """R@K for each K, RP, MAP@R, mARP, MRR, fractions in 0..1, and how many queries they rest on.

    The arguments are those of `retrieval_per_query`; the means are those of `summarise`.
    """
    check_ks(ks, len(embeddings if gallery is None else gallery))
    found = retrieval_per_query(
        embeddings,
        labels,
        gallery,
        gallery_labels,
        block_size=block_size,
        exclude=exclude,
        device=device,
        progress=progress,
        share=share,
    )
    return summarise(found, ks)


def check_ks(ks: Sequence[int], gallery_size: int | None = None) -> None:
    """Raises ValueError unless R@K makes sense for each K, in a gallery of that many images."""
    listed = isinstance(ks, Iterable) and not isinstance(ks, str | bytes)
    if not listed or not all(isinstance(k, Integral) and k is not True for k in ks):
        raise ValueError(f"The Ks of R@K must be a list of whole numbers, got {ks!r}; mend --ks.")
    if min(ks, default=1) < 1:
        raise ValueError(f"K counts neighbours and must be at least 1, got {min(ks)}; mend --ks.")
    if gallery_size and gallery_size < max(ks, default=1):
        raise ValueError(
            f"R@{max(ks)} needs a gallery of {max(ks)} images, this one has {gallery_size}; "
            "lower --ks."
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
) -> dict[str, Tensor]:
    """What retrieval gives each query: CPU tensors of shape (Q,), in the order of the queries.

    embeddings: (Q, d) queries, labels: (Q,) integers. Without `gallery` each query searches among
    all the other embeddings and is left out by its index; else among gallery (G, d).
    exclude: an integer group per image; a query does not see images of its own group. With a
    gallery, a pair (query groups, gallery groups).
    block_size: gallery images in a block (at most 8192); trades memory for speed, not results.
    device: where to compute, default: where the embeddings are. progress: called with 0..1.
    share: this process's part of the work, where several search the same embeddings together.

    Returns
        relevant      R, the same-class images (matches) that the query could find (int64)
        rank          c_1, the other-class images strictly closer than the nearest match; G where
                      R = 0 (int64). The rank of that match if it came first among its ties: whether
                      it is among the K nearest is for `recall_at` to say
        tied          the other-class images exactly as close as the nearest match (int64)
        tied_matches  the matches exactly as close as the nearest one, which is one of them; 0 where
                      R = 0 (int64)
        undecided     whether a metric depends on the order of tied images (int64, 0 or 1)
        RP, MAP@R, mARP, MRR   the query's own share of each mean, expected over the orders of tied
                      images, 0 where R = 0 (float64)

    Extra memory: at most 512 MB beyond the embeddings and a few numbers per image.

    Raises ValueError: nothing to search in, no numbers, lengths or dimensions that differ, NaN or
    infinity, labels that are not integers.
    """
    x, device = _embeddings(embeddings, "embeddings", device)
    groups, gallery_groups = _groups(exclude, gallery is not None)
    if gallery is None:
        if gallery_labels is not None:
            raise ValueError("There are gallery labels but no gallery; give both or neither.")
        groups = torch.arange(len(x)) if groups is None else groups
        queries = images = _Images(x, labels, groups, "embeddings")
    else:
        queries = _Images(x, labels, groups, "embeddings")
        y, _ = _embeddings(gallery, "gallery", device)
        images = _Images(y, gallery_labels, gallery_groups, "gallery")
        if x.shape[1] != y.shape[1]:
            raise ValueError(
                f"The embeddings have {x.shape[1]} dimensions and the gallery's have {y.shape[1]}; "
                "both must come from the same network."
            )
    with full_float32(device):
        size = _size(block_size, device)
        found = _search(queries, images, size, exclude is not None, progress, share)
    back = queries.order.cpu().argsort()
    return {name: values[back] for name, values in found.items()}


def recall_at(per_query: Mapping[str, Tensor], k: int) -> Tensor:
    """The probability that a match is among each query's K nearest, over the orders of tied images.

    per_query: `retrieval_per_query`'s answer. Returns (Q,) float64, 0 or 1 but for queries with
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
    leave it out, and are NaN, undefined, when no query has a match. Counts come along: `queries`,
    `queries_without_match`, and `queries_tied`, whose metrics depend on the order of images that
    are exactly as close: see `about_ties`.
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
    """A sentence where many queries are tied, else ""; numbers: those of `summarise`."""
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
    **options,
) -> dict[str, float]:
    """VehicleID's official protocol: one random image per class is the gallery, the rest query it.

    Returns the mean and the standard deviation over `draws` seeded galleries of each R@K and of
    MRR, which with one match per query is also its mean average precision: `R@1`, `R@1_sd`, ….
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

    embeddings (N, d), labels (N,). Where all classes have one image, or there is one class, NMI and
    AMI are 1 by construction, see `clustering.by_construction`, and in the former case F1 is NaN,
    undefined.
    Memory: one normalised copy of the embeddings beside `kmeans`'s.
    Raises ValueError as `retrieval_metrics` does.
    """
    x, device = _embeddings(embeddings, "embeddings", device)
    images = _Images(x, labels, None, "embeddings")
    k = len(images.labels.unique_consecutive())
    clusters = kmeans(
        images.unit(slice(None)), k, seed, restarts, iterations, progress=progress
    ).labels
    return nmi_f1(images.labels, clusters, ami=ami)


# The arguments -----------------------------------------------------------------------------------


def _embeddings(
    values: Array, name: str, device: torch.device | str | None
) -> tuple[Tensor, torch.device]:
    x = as_numbers(values, f"The {name} must be numbers, of shape (N, d).")
    if x.ndim != 2 or x.numel() == 0:
        raise ValueError(f"The {name} must be of shape (N, d) and not empty, got {tuple(x.shape)}.")
    device = x.device if device is None else torch.device(device)
    if device.type == "mps":  # it has no float64
        device = torch.device("cpu")
    return x.to(device), device


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


class _Images:
    """Embeddings with labels (and groups), in the order of the labels.

    Rows are normalised when asked for: a normalised copy would double the embeddings' memory.

    Attributes:
        inverse: (N,) float64, 1 / ‖x‖, 0 for zeros. scale: (N, 1) float32, the same.
        largest: the largest |number| where all are whole numbers, else infinity.
    """

    def __init__(self, embeddings: Tensor, labels: Array, groups: Array | None, name: str):
        self.embeddings = embeddings
        labels = self._integers(labels, f"labels of the {name}")
        self.order = labels.argsort(stable=True)
        self.labels = labels[self.order]
        self.host_labels = self.labels.cpu()
        self.groups = None
        if groups is not None:
            self.groups = self._integers(groups, f"groups of the {name}")[self.order]
        norms = torch.cat([rows.double().norm(dim=1) for rows in embeddings.split(4096)])
        broken = norms.isfinite().logical_not().nonzero()
        if len(broken):
            raise ValueError(
                f"{len(broken)} of the {len(norms)} {name} are NaN or infinite, first number "
                f"{int(broken[0])}; the training may have diverged."
            )
        norms = norms[self.order]
        self.inverse = norms.reciprocal().where(norms >= SHORTEST, 0)
        self.scale = self.inverse.float()[:, None]
        self.largest = self._largest()

    def _largest(self) -> float:
        largest = 0.0
        for rows in self.embeddings.split(256):  # seldom goes beyond the first ones
            rows = rows.double()
            if not torch.equal(rows, rows.round()):
                return math.inf
            largest = max(largest, float(rows.abs().max()))
        return largest

    def _integers(self, values: Array, what: str) -> Tensor:
        if values is None:
            raise ValueError(f"{len(self.embeddings)} embeddings but no {what}.")
        demand = f"The {what} must be integers of shape (N,)."
        values = as_numbers(values, demand)
        if values.is_floating_point() or values.ndim != 1:
            raise ValueError(demand)
        if len(values) != len(self.embeddings):
            raise ValueError(f"{len(self.embeddings)} embeddings but {len(values)} {what}.")
        return values.to(self.embeddings.device).long()

    def __len__(self) -> int:
        return len(self.order)

    def unit(self, part: slice) -> Tensor:
        """L2-normalised float32 embeddings (n, d) of a run of images."""
        return self.embeddings[self.order[part]].float() * self.scale[part]

    def given(self, part: slice | Tensor) -> Tensor:
        """The embeddings (n, d) of some images as they were given, in float64."""
        return self.embeddings[self.order[part]].double()


def _cosines(queries: _Images, rows: slice, gallery: _Images, columns: slice) -> Tensor:
    """Float64 cosines of a run of queries and a run of gallery images."""
    products = queries.given(rows) @ gallery.given(columns).T
    return products.mul_(queries.inverse[rows, None]).mul_(gallery.inverse[columns])


def _rounding(queries: _Images, gallery: _Images) -> tuple[float, float]:
    """How far from each other rounding can bring, at most

    1. a float32 product of unit vectors and the float64 cosine. Summing d products, in whatever
       order, costs d·2^-24 (1 %: second order), the unit vectors' own rounding 6·2^-24; the rest
       is for the ends of the windows that are compared with.
    2. two float64 cosines that are equal. A product and a norm cost d·2^-53 and d·2^-54, unless
       they are sums of whole numbers, and what is done with them 6·2^-53, for each of the two.
    """
    d = queries.embeddings.shape[1]
    exact = d * max(queries.largest, gallery.largest) ** 2 <= 2**53
    return (1.01 * d + 16) * 2.0**-24, (8 if exact else 1.5 * d + 8) * 2.0**-52


# The search --------------------------------------------------------------------------------------


def _search(
    queries: _Images,
    gallery: _Images,
    size: int,
    excluding: bool,
    progress: Progress | None,
    share: Share,
) -> dict[str, Tensor]:
    """`retrieval_per_query`'s answer, in the order of `queries`."""
    begin = torch.searchsorted(gallery.labels, queries.labels)
    end = torch.searchsorted(gallery.labels, queries.labels, right=True)
    runs = _runs((end - begin).cpu())
    # Similarity is symmetric: where the counts of all images fit in memory, a block serves its
    # columns as queries too, and only pairs (i, j) with i < j are computed.
    symmetric = queries is gallery and len(runs) == 1
    rounding = _rounding(queries, gallery)
    found: dict[str, Tensor] = {}
    for number, run in enumerate(runs):
        counts = _Counts(*_matches(queries, gallery, run, begin, end), *rounding)
        done, total = 0, (run.stop - run.start) * len(gallery) / (2 if symmetric else 1)
        total /= share.count
        for block in _blocks(queries, gallery, run, size, symmetric, excluding, share):
            counts.add(block, block.rows, run.start, along=0)
            if symmetric:
                counts.add(block, block.columns, run.start, along=1)
            done += block.similarities.numel()
            if progress:
                progress((number + min(1.0, done / total)) / len(runs))
        counts.buckets, counts.tied = share.total(counts.buckets), share.total(counts.tied)
        for name, values in counts.outcome(len(gallery)).items():
            found.setdefault(name, values.new_empty(len(queries)))[run] = values
    if progress:
        progress(1.0)
    return found


def _runs(sizes: Tensor) -> list[slice]:
    """Cut the queries into runs of about MAX_PAIRS same-class pairs; sizes (Q,) pairs of each."""
    number = sizes.cumsum(0) // MAX_PAIRS
    lengths = number.unique_consecutive(return_counts=True)[1].tolist()
    return [slice(stop - n, stop) for n, stop in zip(lengths, accumulate(lengths), strict=True)]


def _matches(
    queries: _Images, gallery: _Images, run: slice, begin: Tensor, end: Tensor
) -> tuple[Tensor, Tensor]:
    """Cosines of the queries' same-class images, and where each query's begin.

    Returns (P + 1,) float64, nearest first inside a query, with a last number that belongs to none,
    and offsets (n + 1,). begin, end (Q,): the run of the query's class in the gallery.
    """
    sizes = (end - begin).cpu()
    cosines, counts = [], []
    top = run.start
    while top < run.stop:
        widest = max(1, int(sizes[top : min(top + 256, run.stop)].max()))
        rows = slice(top, min(top + max(1, min(256, math.isqrt(2**22 // widest))), run.stop))
        top = rows.stop
        first = min(int(begin[rows.start]), len(gallery) - 1)
        last = max(int(end[rows.stop - 1]), first + 1)
        mate = begin[rows, None] + torch.arange(widest, device=begin.device)
        found = mate < end[rows, None]
        mate = mate.clamp_max(last - 1)
        if queries.groups is not None:
            found &= gallery.groups[mate] != queries.groups[rows, None]
        similarities = _cosines(queries, rows, gallery, slice(first, last))
        nearest = similarities.gather(1, mate - first).masked_fill_(~found, -torch.inf)
        nearest = nearest.sort(dim=1, descending=True).values
        cosines.append(nearest[nearest > -torch.inf])
        counts.append(found.sum(dim=1))
    offsets = F.pad(torch.cat(counts).cumsum(0), (1, 0))
    return torch.cat([*cosines, begin.new_full((1,), torch.inf, dtype=torch.float64)]), offsets


class _Block:
    """Similarities of a run of queries (rows) and a run of gallery images (columns).

    Entries that must not be counted are -inf: those of one class, of one excluded group, and, when
    a block serves both its sides, those on or below the diagonal of the whole matrix.
    """

    def __init__(self, queries: _Images, rows: slice, gallery: _Images, columns: slice, y: Tensor):
        self.queries, self.rows = queries, rows
        self.gallery, self.columns = gallery, columns
        self.width = len(y)
        # Masks are read eight bytes at a time, see _count_true.
        s = inner_products(queries.unit(rows), y)
        self.similarities = F.pad(s, (0, -len(y) % 8), value=-torch.inf) if len(y) % 8 else s
        self._doubles: Tensor | None = None

    def hide(self, entries: Tensor) -> None:
        """Leave out the entries where the mask (rows, columns) is true."""
        self.similarities[:, : self.width].masked_fill_(entries, -torch.inf)

    def exact(self, row: Tensor, column: Tensor) -> Tensor:
        """Float64 cosines of the given pairs."""
        if self._doubles is None and len(row) > len(self.similarities) * self.width // 64:
            self._doubles = _cosines(self.queries, self.rows, self.gallery, self.columns)
        if self._doubles is not None:
            return self._doubles[row, column]
        step = max(1, 2**21 // self.queries.embeddings.shape[1])
        pairs = zip(row.split(step), column.split(step), strict=True)
        return torch.cat([self._pairs(i, j) for i, j in pairs])

    def _pairs(self, row: Tensor, column: Tensor) -> Tensor:
        row, column = row + self.rows.start, column + self.columns.start
        products = (self.queries.given(row) * self.gallery.given(column)).sum(dim=1)
        return products * self.queries.inverse[row] * self.gallery.inverse[column]


def _blocks(
    queries: _Images,
    gallery: _Images,
    run: slice,
    size: int,
    symmetric: bool,
    excluding: bool,
    share: Share,
) -> Iterator[_Block]:
    """A share of the blocks of a run of queries and the gallery; each pair once when symmetric."""
    given = [0] * share.count  # similarities, to each process: a block goes to who has fewest
    for part in _growing(slice(0, len(gallery)), size):
        y = gallery.unit(part)
        seen = slice(0, part.stop) if symmetric else run
        for rows in _growing(seen, max(1, size // 8)):
            columns = slice(max(part.start, rows.start), part.stop) if symmetric else part
            owner = given.index(min(given))
            given[owner] += (rows.stop - rows.start) * (columns.stop - columns.start)
            if owner != share.number:
                continue
            block = _Block(queries, rows, gallery, columns, y[columns.start - part.start :])
            if _share_labels(queries, rows, gallery, columns):
                block.hide(queries.labels[rows, None] == gallery.labels[columns])
            if excluding:
                block.hide(queries.groups[rows, None] == gallery.groups[columns])
            if symmetric and columns.start < rows.stop:
                row = torch.arange(rows.start, rows.stop, device=y.device)
                column = torch.arange(columns.start, columns.stop, device=y.device)
                block.hide(row[:, None] >= column)
            yield block


def _growing(whole: slice, size: int) -> Iterator[slice]:
    """Cut a run into parts of `size`, the first ones smaller: they narrow the windows cheaply."""
    start, step = whole.start, max(1, size // 8)
    while start < whole.stop:
        yield slice(start, min(start + step, whole.stop))
        start, step = start + step, min(size, max(step, start + step - whole.start))


def _share_labels(queries: _Images, rows: slice, gallery: _Images, columns: slice) -> bool:
    a, b = queries.host_labels, gallery.host_labels
    return bool(a[rows.start] <= b[columns.stop - 1] and b[columns.start] <= a[rows.stop - 1])


class _Counts:
    """c_m for each same-class pair of n queries, gathered block by block.

    A query's matches cut the similarities into buckets; bucket m holds the other-class images
    between its matches m - 1 and m, so that c_m is the sum of the buckets up to m. What lies above
    the nearest match is counted by comparing whole blocks. What lies in the window below it is
    taken out and placed one by one. The window ends at the last match that can still be among the
    query's R nearest, so it soon holds next to nothing.

    An image that is tied with matches goes into the bucket after them; `tied` counts it too, at one
    of them, whichever.

    The buckets of several processes add up to those of one: a match that one of them has given up
    has too many images before it in that process's counts alone.
    """

    def __init__(self, cosines: Tensor, offsets: Tensor, doubt: float, tie: float):
        self.doubt, self.tie = doubt, tie
        self.offsets = offsets
        self.host_offsets = offsets.cpu()
        self.relevant = offsets.diff()
        query = torch.arange(len(self.relevant), device=offsets.device)
        self.owner = torch.repeat_interleave(query, self.relevant)  # (P,) the pair's query
        pair = torch.arange(len(self.owner), device=offsets.device)
        self.place = pair - offsets[self.owner] + 1  # (P,) m
        self.cosines = cosines = self._levelled(cosines)
        self.buckets = torch.zeros_like(cosines, dtype=torch.int64)
        self.tied = torch.zeros_like(self.buckets)
        self.useful = self.relevant.clone()
        self.searchable = self.relevant > 0
        self.above = self._limit(cosines[offsets[:-1]] + self.doubt, slice(None))
        self.below = self._limit(cosines[offsets[1:] - 1] - self.doubt, slice(None))

    def _levelled(self, cosines: Tensor) -> Tensor:
        """The cosines, where those of a query's matches that are equal are made the same number."""
        values = cosines[:-1]
        lower = values[:-1] - values[1:] > self.tie
        lower |= self.owner[:-1] != self.owner[1:]
        if lower.all():
            return cosines
        first = F.pad(lower, (1, 0), value=True)
        level = values[first][first.cumsum(0) - 1]
        return torch.cat([level, cosines[-1:]])

    def _limit(self, values: Tensor, part: slice) -> Tensor:
        return values.masked_fill(~self.searchable[part], torch.inf).float()

    def add(self, block: _Block, part: slice, first: int, along: int) -> None:
        """Count a block for the queries `part` (less `first`), which lie along one of its sides."""
        part = slice(part.start - first, part.stop - first)
        n = part.stop - part.start
        s = block.similarities
        padding = (0, s.shape[along] - n)
        limits = (F.pad(x[part], padding).unsqueeze(1 - along) for x in (self.above, self.below))
        above, window = (s > limit for limit in limits)
        window ^= above
        self.buckets.index_add_(0, self.offsets[part], _count_true(above, 1 - along)[:n])
        words = window.view(torch.int64).flatten().nonzero().squeeze(1)
        for some in words.split(MAX_ENTRIES // 8) if len(words) else ():
            self._place(block, window, some, part.start, along)
        if len(words) > n:
            self._narrow(part)

    def _place(self, block: _Block, window: Tensor, words: Tensor, first: int, along: int) -> None:
        """Put the block's entries in the window into their buckets; words: eight entries each."""
        entry = words[:, None] * 8 + torch.arange(8, device=words.device)
        entry = entry[window.view(-1, 8)[words]]
        row, column = entry // window.shape[1], entry % window.shape[1]
        query = (row, column)[along] + first
        value = block.similarities.view(-1)[entry].double()
        start = self.offsets[query]
        stop = start + self.useful[query]
        bucket = self._first_farther(value, start, stop)
        gap = torch.minimum(
            (self.cosines[torch.maximum(bucket - 1, start)] - value).abs(),
            (self.cosines[torch.minimum(bucket, stop - 1)] - value).abs(),
        )
        close = (gap <= self.doubt).nonzero().squeeze(1)
        if len(close):
            value, start, stop = block.exact(row[close], column[close]), start[close], stop[close]
            bucket[close] = self._first_farther(value - self.tie, start, stop)
            last = torch.maximum(bucket[close] - 1, start)
            tied = (value - self.cosines[last]).abs() <= self.tie
            self.tied.index_add_(0, last, tied.long())
        bucket = bucket[bucket < self.offsets[query] + self.useful[query]]
        self.buckets.index_add_(0, bucket, torch.ones_like(bucket))

    def _first_farther(self, value: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """Index of the first match in [start, stop) that is farther than the value, else stop."""
        longest = int((stop - start).max()) if len(start) else 0
        for _ in range(longest.bit_length()):
            middle = (start + stop) // 2
            nearer = (self.cosines[middle] >= value) & (start < stop)
            start, stop = torch.where(nearer, middle + 1, start), torch.where(nearer, stop, middle)
        return start

    def _narrow(self, part: slice) -> None:
        """Raise the window's end for some queries: matches that c_m keeps out of the R nearest."""
        pairs = slice(*(int(self.host_offsets[i]) for i in (part.start, part.stop)))
        owner = self.owner[pairs]
        hit = self._rank(pairs) <= self.relevant[owner]
        useful = torch.zeros_like(self.useful[part]).index_add_(0, owner - part.start, hit.long())
        self.useful[part] = useful.maximum(self.searchable[part].long())
        last = self.offsets[:-1][part] + self.useful[part] - 1
        self.below[part] = self._limit(self.cosines[last] - self.doubt, part)

    def _rank(self, pairs: slice) -> Tensor:
        """m + c_m for a run of pairs, as far as counted."""
        total = F.pad(self.buckets[pairs].cumsum(0), (1, 0))
        first = self.offsets[self.owner[pairs]] - pairs.start
        return total[1:] - total[first] + self.place[pairs]

    def outcome(self, gallery_size: int) -> dict[str, Tensor]:
        """The queries' values, as `retrieval_per_query` describes them."""
        relevant, owner = self.relevant.cpu(), self.owner.cpu()
        rank, place = self._rank(slice(0, len(owner))).cpu(), self.place.cpu()
        hit = (rank <= relevant[owner]).double()
        precision = hit * place / rank

        first, right, wrong = self._mixed()
        query = owner[first]
        groups = ties.TieGroups(right, wrong, rank[first] - 1, place[first] - 1, relevant[query])
        pair, group = _spread(first, right)
        hit[pair], precision[pair] = groups.hits()[group], groups.precision()[group]

        zeros = torch.zeros(len(relevant), dtype=torch.float64)
        hits = zeros.index_add(0, owner, hit)
        total = zeros.index_add(0, owner, precision)
        marp = total / hits.clamp_min(1)
        cut = groups.cut.nonzero().squeeze(1)
        before = total[query[cut]] - (right * groups.precision())[cut]
        marp[query[cut]] = groups[cut].precision_over_hits(before.clamp_min(0))

        searchable = relevant > 0
        nearest = self.host_offsets[:-1]
        closer = torch.where(searchable, F.pad(rank, (0, 1))[nearest] - 1, gallery_size)
        tied_matches = (self._first_farther(*self._nearest()) - self.offsets[:-1]).cpu()
        tied = torch.zeros_like(relevant)
        leading = first == nearest[query]
        tied[query[leading]] = wrong[leading]
        mrr = searchable / (1 + closer).double()
        chance = query[leading]
        mrr[chance] = ties.reciprocal_rank(closer[chance], tied_matches[chance], tied[chance])
        undecided = (tied > 0).long()
        undecided[query[groups.inside > 0]] = 1
        return {
            "relevant": relevant,
            "rank": closer,
            "tied": tied,
            "tied_matches": tied_matches,
            "undecided": undecided,
            "RP": hits / relevant.clamp_min(1),
            "MAP@R": total / relevant.clamp_min(1),
            "mARP": marp,
            "MRR": mrr,
        }

    def _nearest(self) -> tuple[Tensor, Tensor, Tensor]:
        """The cosine of each query's nearest match, and where its matches begin and end."""
        start, stop = self.offsets[:-1], self.offsets[1:]
        return self.cosines[start], start, stop

    def _mixed(self) -> tuple[Tensor, Tensor, Tensor]:
        """The groups of equally close matches that images of other classes are tied with.

        Returns each group's first pair, its matches, and the images of other classes: (T,) each.
        """
        pair = self.tied[:-1].nonzero().squeeze(1)
        value, owner = self.cosines[pair], self.owner[pair]
        above = torch.nextafter(value, torch.full_like(value, torch.inf))
        first = self._first_farther(above, self.offsets[owner], pair + 1)
        right = self._first_farther(value, pair, self.offsets[owner + 1]) - first
        group, number = first.unique(return_inverse=True)
        wrong = torch.zeros_like(group).index_add_(0, number, self.tied[pair])
        right = torch.empty_like(group).index_copy_(0, number, right)
        return group.cpu(), right.cpu(), wrong.cpu()


def _spread(first: Tensor, length: Tensor) -> tuple[Tensor, Tensor]:
    """The indices of runs that begin at `first` (T,), and which run each belongs to."""
    run = torch.repeat_interleave(torch.arange(len(first)), length)
    step = torch.arange(len(run)) - (length.cumsum(0) - length)[run]
    return first[run] + step, run


def _count_true(mask: Tensor, dim: int) -> Tensor:
    """Count the true entries of a mask (rows, columns) along a dimension; columns divisible by 8.

    Eight bytes are added at a time, as one int64; a byte of the sum holds 255 of them. On a CPU
    that is twenty times as fast as mask.sum(dim).
    """
    words = mask.view(torch.int64)
    sums = torch.stack([part.sum(dim) for part in words.split(255, dim)]).view(torch.uint8)
    return sums.sum(0) if dim == 0 else sums.view(len(sums), -1, 8).sum((0, 2))
