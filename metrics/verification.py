"""Verification: are two images of the same class? All pairs of images, counted by their cosines.

A pair is accepted at the threshold t if its cosine is at least t. Of the P same pairs (two images
of one class) and the N different pairs

    TAR(t) = accepted same pairs / P            FAR(t) = accepted different pairs / N
    TAR@f  the largest TAR(t) with FAR(t) <= f                                   (e.g. f = 1e-3)
    EER    where FAR(t) = 1 - TAR(t), interpolated linearly between the two thresholds around it
    AUC    the probability that a same pair is nearer than a different one, a tie counting half

Cosines are computed in float64 and rounded to a grid of step 2^-20, about one in a million: those
that round to the same place are tied, and ties are accepted together. So equal cosines stay equal
despite rounding errors, and the counts depend neither on the block size nor on the order of the
images. For scores on the grid the results equal those of sklearn's roc_curve.

In a single image set every pair of two different images counts once; with queries and a gallery,
every query is paired with every gallery image. Memory: blocks of cosines, 2^21 counters, a few
numbers per image, and a list of up to MOST_LISTED of the nearest different pairs, for the
bootstrap of their error.

A rate can be measured if at least CARRIED pairs make it up: 1e-4 needs 100,000 pairs.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor

from metrics.blocks import Sides, cut, parts, share_labels
from metrics.images import Images, embeddings_of
from metrics.products import Array, full_float32
from metrics.sharing import ALONE, Progress, Share, in_threads

GRID = 2**20  # steps of the grid for a cosine of 1
BINS = 2 * GRID + 1
RATES = (1e-2, 1e-3, 1e-4)  # false accept rates at which TAR is reported
NAMES = ("TAR@1e-2", "TAR@1e-3", "TAR@1e-4", "EER", "AUC")  # the reported metrics
CARRIED = 10  # the fewest accepted pairs (or queries) from which a rate is measured
BLOCK_SIZE = {"cpu": 2048, "cuda": 8192}  # gallery images in a block, which has 1/4 as many queries
LISTED_AT_ONCE = 2**20  # different pairs that are kept before the farther ones are dropped
MOST_LISTED = 2**22  # listed pairs (300 MB at the peak); from 92,000 images on, a random sample
TOGETHER = 64  # images of small classes that are compared at once, to count their same pairs


def bin_of(cosine: float) -> int:
    """The index of a cosine on the grid, 0 for -1."""
    return math.floor(cosine * GRID + GRID + 0.5)


def edge(number: int) -> float:
    """The least cosine at a place on the grid: the threshold that accepts this place and above."""
    return (number - GRID - 0.5) / GRID


class Listed(NamedTuple):
    """The nearest different pairs and their classes: (L,) each, int64."""

    bin: Tensor  # the place of the cosine on the grid
    a: Tensor  # the class of the query, as an index into `PairCounts.classes`
    b: Tensor  # the class of the gallery image


@dataclass(frozen=True)
class PairCounts:
    """The result of `count_pairs`: all pairs by their cosines. CPU tensors, except the images.

    Attributes:
        same, different: (BINS,) int64, the number of pairs at each place on the grid.
        nearest_same, nearest_different: (Q,) int32 in the order of the embeddings, the place on
            the grid of each query's nearest image of its class, and of another; -1 for none.
        listed: all different pairs from `listed_from` on; a random sample of them if they are more
            than `MOST_LISTED`.
        listed_from: a place on the grid.
        classes: (C,) the labels, sorted.
        query_class: (Q,) the class of each query, as an index into `classes`.
        sizes: (2, C) the number of queries, and of gallery images, of each class.
        symmetric: whether a set was paired with itself.
    """

    queries: Images
    gallery: Images
    same: Tensor
    different: Tensor
    nearest_same: Tensor
    nearest_different: Tensor
    listed: Listed
    listed_from: int
    classes: Tensor
    query_class: Tensor
    sizes: Tensor
    symmetric: bool

    def curve(self) -> Curve:
        """The ROC curve."""
        taken = (self.same + self.different).nonzero().squeeze(1).flip(0)
        same, different = (
            torch.nn.functional.pad(counts[taken].cumsum(0), (1, 0))
            for counts in (self.same, self.different)
        )
        return Curve(taken, same, different)

    @property
    def of_one_class(self) -> Tensor:
        """(C,) float64, how many same pairs each class has."""
        return _same_pairs(self.sizes, self.symmetric).double()

    def same_by_class(self, *thresholds: int) -> Tensor:
        """Same pairs of each class at or above places on the grid, (len(thresholds), C) float64.

        All same pairs are compared again, class by class.
        """
        found = torch.zeros(len(thresholds), len(self.classes), dtype=torch.float64)
        with full_float32(self.queries.embeddings.device):
            for labels, bins in self._same():
                for row, threshold in enumerate(thresholds):
                    found[row].index_add_(0, labels, (bins >= threshold).sum(1).double().cpu())
        return found

    def _same(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks with all same pairs: their queries' classes (n,), as indices into `classes`, and
        their places on the grid (n, m), or -1 for a different pair or one counted elsewhere."""
        labels = self.query_class.sort().values
        for rows, columns in self._runs():
            for y_part in parts(columns, BLOCK_SIZE["cpu"]):
                y = self.gallery.exact_unit(y_part)
                for x_part in parts(rows, BLOCK_SIZE["cpu"] // 4):
                    bins = _bins(self.queries, x_part, y)
                    same = self.queries.labels[x_part, None] == self.gallery.labels[y_part]
                    if self.symmetric:
                        same &= _upper(x_part, y_part, bins)
                    yield labels[x_part], bins.where(same, -1)

    def _runs(self) -> Iterator[tuple[slice, slice]]:
        """The queries and gallery images of consecutive classes; no class is divided.

        Small classes are grouped: yielding 100,000 of them singly would take half a minute.
        """
        ends = self.sizes.cumsum(1)
        begins = ends - self.sizes
        first, count = 0, len(self.classes)
        while first < count:
            most = begins[:, first, None] + TOGETHER
            last = int(torch.searchsorted(ends, most, right=True).min())
            last = max(last, first + 1)
            yield tuple(
                slice(int(begin[first]), int(end[last - 1]))
                for begin, end in zip(begins, ends, strict=True)
            )
            first = last


@dataclass(frozen=True)
class Curve:
    """A ROC curve, from the threshold that accepts nothing to the one that accepts all.

    Attributes:
        taken: (T,) the places on the grid that have pairs, descending: the thresholds.
        same, different: (T + 1,) the number of accepted pairs; 0 before the first threshold.
    """

    taken: Tensor
    same: Tensor
    different: Tensor

    @property
    def pairs(self) -> tuple[int, int]:
        """The numbers of same and different pairs, P and N."""
        return int(self.same[-1]), int(self.different[-1])

    @property
    def thresholds(self) -> Tensor:
        """(T + 1,) float64 cosines; infinity accepts nothing."""
        found = (self.taken.double() - GRID - 0.5) / GRID
        return torch.cat([found.new_tensor([math.inf]), found])

    @property
    def rates(self) -> tuple[Tensor, Tensor]:
        """TAR and FAR (T + 1,) float64; NaN without pairs of that kind."""
        return self.same / self.same[-1].double(), self.different / self.different[-1].double()

    def tar_at(self, rate: float) -> float:
        """TAR@rate; NaN with too few different pairs for the rate, or without same pairs."""
        same, different = self.pairs
        if not same or not carries(different, rate):
            return math.nan
        fits = int((self.different <= allowed(different, rate)).sum()) - 1
        return float(self.same[fits]) / same

    def eer(self) -> float:
        """EER; NaN without same or without different pairs."""
        if 0 in self.pairs:
            return math.nan
        tar, far = self.rates
        gap = far - (1 - tar)  # rises from -1 to 1
        after = int((gap < 0).sum())
        before = after - 1
        share = float(gap[before] / (gap[before] - gap[after]))
        return float(far[before]) + share * float(far[after] - far[before])

    def auc(self) -> float:
        """AUC; NaN without same or without different pairs."""
        if 0 in self.pairs:
            return math.nan
        tar, far = self.rates
        return float((far.diff() * (tar[1:] + tar[:-1]) / 2).sum())

    def numbers(self) -> dict[str, float]:
        """The metrics in `NAMES`."""
        values = [*map(self.tar_at, RATES), self.eer(), self.auc()]
        return dict(zip(NAMES, values, strict=True))


def carries(count: int, rate: float) -> bool:
    """Whether there are enough pairs (or queries) to measure a rate."""
    return allowed(count, rate) >= CARRIED


def allowed(count: int, rate: float) -> int:
    """The largest whole number that is at most this share of the count."""
    return math.floor(count * rate * (1 + 1e-12))


def lowest_rate(count: int, wanted: float, most: float) -> float | None:
    """The rate, or the lowest that this many pairs can measure; None if that is above `most`."""
    if carries(count, wanted):
        return wanted
    return rate if count and (rate := CARRIED / count) <= most else None


def least_accepting(counts: Tensor, most: int) -> int:
    """The lowest place on the grid from which on the counts (BINS,) sum to at most `most`."""
    above = counts.flip(0).cumsum(0)
    return BINS - int((above <= most).sum())


def greatest_missing(counts: Tensor, most: int) -> int:
    """The highest place on the grid below which the counts (BINS,) sum to at most `most`."""
    return min(BINS - 1, int((counts.cumsum(0) <= most).sum()))


# --- counting -------------------------------------------------------------------------------------


@torch.no_grad()
def count_pairs(
    embeddings: Array,
    labels: Array,
    gallery: Array | None = None,
    gallery_labels: Array | None = None,
    *,
    listed_rate: float = 1e-3,
    block_size: int | None = None,
    device: torch.device | str | None = None,
    progress: Progress | None = None,
    share: Share = ALONE,
) -> PairCounts:
    """Counts all pairs; the arguments are those of `retrieval_per_query`.

    Args:
        listed_rate: the share of the different pairs, from the nearest on, listed with classes.

    Raises:
        ValueError: as `retrieval_per_query`.
    """
    x, device = embeddings_of(embeddings, "embeddings", device)
    symmetric = gallery is None
    queries = images = Images(x, labels, None, "embeddings")
    if not symmetric:
        y, _ = embeddings_of(gallery, "gallery", device, like=x)
        images = Images(y, gallery_labels, None, "gallery")
    size = min(block_size or BLOCK_SIZE["cuda"], BLOCK_SIZE.get(device.type, 2048))
    counting = _Counting(queries, images, symmetric, listed_rate)
    total, done = sum(counting.pairs) / share.count or 1, 0
    sizes = max(1, size // 4), size
    blocks = cut(images, slice(0, len(queries)), sizes, symmetric, share, images.exact_unit)
    with full_float32(device):
        for number in in_threads(partial(_Counting.add, counting), blocks, device):
            done += number
            if progress:
                progress(min(1.0, done / total))
    return counting.result(share)


def _bins(queries: Images, rows: slice, unit: Tensor) -> Tensor:
    """The places on the grid of all pairs of some queries and gallery images, int32."""
    middle = unit.new_tensor(GRID + 0.5)  # with the 0.5, truncating rounds to the nearest
    return torch.addmm(middle, queries.exact_unit(rows), unit.T, alpha=GRID).to(torch.int32)


def _upper(rows: slice, columns: slice, like: Tensor) -> Tensor:
    """Which entries of a block are above the diagonal of the whole matrix."""
    row = torch.arange(rows.start, rows.stop, device=like.device)
    return row[:, None] < torch.arange(columns.start, columns.stop, device=like.device)


def _same_pairs(sizes: Tensor, symmetric: bool) -> Tensor:
    """(C,) int64, how many same pairs each class has; takes `PairCounts.sizes` and `symmetric`."""
    queries, gallery = sizes
    return queries * (queries - 1) // 2 if symmetric else queries * gallery


class _Counting:
    """Counts blocks, several at once in threads.

    Near different pairs are listed as they are found. Whenever the list has grown long, those that
    can no longer be among the `most` nearest of all are dropped.
    """

    def __init__(self, queries: Images, gallery: Images, symmetric: bool, rate: float) -> None:
        self.queries, self.gallery, self.symmetric = queries, gallery, symmetric
        device = queries.embeddings.device
        self.classes = torch.cat([queries.host_labels, gallery.host_labels]).unique()
        self.query_class, self.gallery_class = (
            torch.searchsorted(self.classes, side.host_labels) for side in (queries, gallery)
        )
        self.sizes = torch.stack(
            [
                kind.bincount(minlength=len(self.classes))
                for kind in (self.query_class, self.gallery_class)
            ]
        )
        different = self.pairs[1]
        self.most = max(CARRIED, allowed(different, rate))
        self.every = max(1, -(-self.most // MOST_LISTED))  # one in `every` of them is listed
        self.same = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.different = torch.zeros_like(self.same)
        self.nearest = torch.full((2, len(queries)), -1, dtype=torch.int32, device=device)
        self.listed: list[Tensor] = []  # (3, L) int32: place on the grid, class, class
        self.floor = 0
        self.lock = Lock()

    @property
    def pairs(self) -> tuple[int, int]:
        """How many same and different pairs there are."""
        count = len(self.queries)
        every = count * (count - 1) // 2 if self.symmetric else count * len(self.gallery)
        same = int(_same_pairs(self.sizes, self.symmetric).sum())
        return same, every - same

    def add(self, block: Sides) -> int:
        """Counts a block; returns how many pairs it had."""
        bins = _bins(self.queries, block.rows, block.unit)
        on_diagonal = self.symmetric and block.columns.start < block.rows.stop
        counted = _upper(block.rows, block.columns, bins) if on_diagonal else None
        same = self._same(block)
        if same is None and counted is None:
            self._count(block, self.different, 1, bins, bins.view(-1))
            return bins.numel()
        if same is None:
            same = torch.zeros_like(bins, dtype=torch.bool)
        different = ~same if counted is None else ~same & counted
        same = same if counted is None else same & counted
        for counts, which, chosen in ((self.same, 0, same), (self.different, 1, different)):
            self._count(block, counts, which, bins.where(chosen, -1), bins[chosen])
        return bins.numel() if counted is None else int(counted.sum())

    def _same(self, block: Sides) -> Tensor | None:
        """Which pairs of a block are same pairs; None if there can be none."""
        rows, columns = block.rows, block.columns
        if not share_labels(self.queries, rows, self.gallery, columns):
            return None
        return self.queries.labels[rows, None] == self.gallery.labels[columns]

    def _count(
        self, block: Sides, counts: Tensor, which: int, bins: Tensor, chosen: Tensor
    ) -> None:
        """Adds pairs of one kind: `chosen` (n,) are the entries of `bins` that are not -1."""
        if not len(chosen):
            return
        found = chosen.bincount(minlength=BINS)
        sides = [(block.rows, bins.amax(dim=1))]
        if self.symmetric:
            sides.append((block.columns, bins.amax(dim=0)))
        near = self._near(block, bins) if which else None
        with self.lock:
            counts += found
            for part, values in sides:
                self.nearest[which, part] = self.nearest[which, part].maximum(values)
            if near is not None:
                self.listed.append(near)
                most = 2 * self.most // self.every + LISTED_AT_ONCE
                if sum(part.shape[1] for part in self.listed) > most:
                    self._drop(self.different)

    def _near(self, block: Sides, bins: Tensor) -> Tensor:
        row, column = (bins >= self.floor).nonzero(as_tuple=True)
        if self.every > 1:
            drawn = _mixed(row + block.rows.start, column + block.columns.start) % self.every == 0
            row, column = row[drawn], column[drawn]
        near = bins[row, column].cpu()
        a = self.query_class[block.rows][row.cpu()]
        b = self.gallery_class[block.columns][column.cpu()]
        return torch.stack([near, a.int(), b.int()])

    def _drop(self, different: Tensor) -> None:
        """Keeps the pairs that can still be among the nearest; later counts only raise `floor`."""
        self.floor = max(self.floor, least_accepting(different, self.most))
        every = torch.cat([*self.listed, torch.empty(3, 0, dtype=torch.int32)], dim=1)
        self.listed = [every[:, every[0] >= self.floor]]

    def result(self, share: Share) -> PairCounts:
        """The counts of all processes together."""
        same, different = share.total(self.same), share.total(self.different)
        self._drop(different)
        listed = _gathered(self.listed[0].long().to(same.device), share).cpu()
        nearest = self._nearest(share)
        back = self.queries.order.cpu().argsort()
        return PairCounts(
            self.queries,
            self.gallery,
            same.cpu(),
            different.cpu(),
            *nearest.cpu()[:, back],
            Listed(*listed),
            self.floor,
            self.classes,
            self.query_class[back],
            self.sizes,
            self.symmetric,
        )

    def _nearest(self, share: Share) -> Tensor:
        """(2, Q) the nearest that any process has found; each process sends a row of its own."""
        every = self.nearest.new_zeros(share.count, *self.nearest.shape)
        every[share.number] = self.nearest
        return share.total(every).amax(dim=0)


def _mixed(a: Tensor, b: Tensor) -> Tensor:
    """Pseudorandom integers (n,) from 0 that depend only on the two positions of each pair.

    So the same pairs are sampled whatever the block size and the process.
    """
    found = a * 0x9E3779B1 + b
    for _ in range(2):  # the steps of the generator SplitMix64, with a constant that int64 can hold
        found = (found ^ (found >> 30 & 0x3FFFFFFFF)) * 0x3F58476D1CE4E5B9
    return found >> 33 & 0x7FFFFFFF


def _gathered(own: Tensor, share: Share) -> Tensor:
    """The lists of all processes joined: (3, L)."""
    sizes = torch.zeros(share.count, dtype=torch.int64, device=own.device)
    sizes[share.number] = own.shape[1]
    ends = share.total(sizes).cumsum(0).tolist()
    every = own.new_zeros(len(own), ends[-1])
    every[:, ends[share.number] - own.shape[1] : ends[share.number]] = own
    return share.total(every)
