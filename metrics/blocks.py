"""The search block by block, for classes of few images: each pair of images is compared once.

The cosines of a query's matches are computed first. Then images of other classes are counted
between them, block by block, and no block has to be kept. rows.py searches for large classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate
from threading import Lock
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metrics.images import Images, Pairing, exact_cosines, pairwise_cosines, rounding
from metrics.products import inner_products
from metrics.ranks import Ranks
from metrics.selection import count_true
from metrics.sharing import Progress, Share, in_threads

MAX_PAIRS = 2**21  # same-class pairs counted at once: 200 MiB with everything needed for counting


class Scale(NamedTuple):
    """How much is computed at once: small pieces fit a CPU's cache, and would slow down a GPU.

    Attributes:
        columns: gallery images per query in a block.
        entries: similarities of a block that are placed among the matches at once.
        queries: the most queries whose matches are found at once. Fewer, if their number squared
            times the images of a class exceeds `cosines`.
    """

    columns: int
    entries: int
    queries: int
    cosines: int


ON_A_CPU = Scale(8, 2**18, 256, 2**22)
ON_A_GPU = Scale(4, 2**19, 4096, 2**26)


def scale_of(device: torch.device) -> Scale:
    """How much is computed at once on a device."""
    return ON_A_CPU if device.type == "cpu" else ON_A_GPU


def search(
    pairing: Pairing, size: int, progress: Progress | None, share: Share
) -> dict[str, Tensor]:
    """`retrieval_per_query`'s answer, in the order of the queries.

    size: gallery images in a block.
    """
    queries, gallery, begin, end, _ = pairing
    runs = _runs((end - begin).cpu())
    # Similarity is symmetric: if the counts of all images fit in memory, a block is used for its
    # columns as queries too, and only pairs (i, j) with i < j are computed.
    symmetric = queries is gallery and len(runs) == 1
    bounds = rounding(queries, gallery)
    found: dict[str, Tensor] = {}
    for number, run in enumerate(runs):
        counts = _Counts(*_matches(pairing, run), *bounds)
        done, total = 0, (run.stop - run.start) * len(gallery) / (2 if symmetric else 1)
        total /= share.count
        sides: Iterable[Sides] = ()
        if counts.searchable.any():
            height = max(1, size // scale_of(gallery.order.device).columns)
            sides = cut(gallery, run, (height, size), symmetric, share, gallery.unit, growing=True)
        compare = partial(_compare, counts, pairing, run.start, symmetric)
        for entries in in_threads(compare, sides, queries.embeddings.device):
            done += entries
            if progress:
                progress((number + min(1.0, done / total)) / len(runs))
        counts.buckets, counts.tied = share.total(counts.buckets), share.total(counts.tied)
        for name, values in counts.ranks(len(gallery)).values().items():
            found.setdefault(name, values.new_empty(len(queries)))[run] = values
    if progress:
        progress(1.0)
    return found


def _compare(counts: _Counts, pairing: Pairing, first: int, symmetric: bool, sides: Sides) -> int:
    """Count a block for the queries on its sides; returns how many similarities it had."""
    block = _Block(pairing, sides, symmetric)
    counts.add(block, block.rows, first, along=0)
    if symmetric:
        counts.add(block, block.columns, first, along=1)
    return block.similarities.numel()


def _runs(sizes: Tensor) -> list[slice]:
    """Cut the queries into runs of about MAX_PAIRS same-class pairs; sizes (Q,): pairs of each."""
    number = sizes.cumsum(0) // MAX_PAIRS
    lengths = number.unique_consecutive(return_counts=True)[1].tolist()
    return [slice(stop - n, stop) for n, stop in zip(lengths, accumulate(lengths), strict=True)]


def _matches(pairing: Pairing, run: slice) -> tuple[Tensor, Tensor]:
    """Cosines of the matches (same-class images) of a run of n queries, and offsets of each query.

    Returns the cosines (P + 1,) float64, nearest first within a query, with an extra number at the
    end, and the offsets (n + 1,).
    """
    queries, gallery, begin, end, _ = pairing
    sizes, scale = (end - begin).cpu(), scale_of(begin.device)
    cosines, counts = [], []
    top = run.start
    while top < run.stop:
        widest = max(1, int(sizes[top : min(top + scale.queries, run.stop)].max()))
        together = max(1, min(scale.queries, math.isqrt(scale.cosines // widest)))
        rows = slice(top, min(top + together, run.stop))
        top = rows.stop
        first = min(int(begin[rows.start]), len(gallery) - 1)
        last = max(int(end[rows.stop - 1]), first + 1)
        mate = begin[rows, None] + torch.arange(widest, device=begin.device)
        found = mate < end[rows, None]
        mate = mate.clamp_max(last - 1)
        if queries.groups is not None:
            found &= gallery.groups[mate] != queries.groups[rows, None]
        similarities = exact_cosines(queries, rows, gallery, slice(first, last))
        nearest = similarities.gather(1, mate - first).masked_fill_(~found, -torch.inf)
        nearest = nearest.sort(dim=1, descending=True).values
        cosines.append(nearest[nearest > -torch.inf])
        counts.append(found.sum(dim=1))
    offsets = F.pad(torch.cat(counts).cumsum(0), (1, 0))
    return torch.cat([*cosines, begin.new_full((1,), torch.inf, dtype=torch.float64)]), offsets


class Sides(NamedTuple):
    """The queries and gallery images of a block; unit: its gallery images at unit length (n, d)."""

    rows: slice
    columns: slice
    unit: Tensor


class _Block:
    """Similarities of a run of queries (rows) and a run of gallery images (columns).

    Entries that must not be counted are -inf: pairs of the same class or the same excluded group,
    and, in a symmetric search, those on or below the diagonal of the whole matrix.
    """

    def __init__(self, pairing: Pairing, sides: Sides, symmetric: bool) -> None:
        queries, gallery, *_, excluding = pairing
        self.queries, self.gallery = queries, gallery
        self.rows, self.columns, y = sides
        self.width = len(y)
        # Masks are read eight bytes at a time, see count_true.
        s = inner_products(queries.unit(self.rows), y)
        self.similarities = F.pad(s, (0, -len(y) % 8), value=-torch.inf) if len(y) % 8 else s
        self._doubles: Tensor | None = None
        rows, columns = self.rows, self.columns
        if share_labels(queries, rows, gallery, columns):
            self._hide(queries.labels[rows, None] == gallery.labels[columns])
        if excluding:
            self._hide(queries.groups[rows, None] == gallery.groups[columns])
        if symmetric and columns.start < rows.stop:
            row = torch.arange(rows.start, rows.stop, device=y.device)
            column = torch.arange(columns.start, columns.stop, device=y.device)
            self._hide(row[:, None] >= column)

    def _hide(self, entries: Tensor) -> None:
        self.similarities[:, : self.width].masked_fill_(entries, -torch.inf)

    def exact(self, row: Tensor, column: Tensor) -> Tensor:
        """Float64 cosines of the given pairs."""
        if self._doubles is None and len(row) > len(self.similarities) * self.width // 64:
            self._doubles = exact_cosines(self.queries, self.rows, self.gallery, self.columns)
        if self._doubles is not None:
            return self._doubles[row, column]
        row, column = row + self.rows.start, column + self.columns.start
        return pairwise_cosines(self.queries, row, self.gallery, column)


def cut(
    gallery: Images,
    run: slice,
    sizes: tuple[int, int],
    symmetric: bool,
    share: Share,
    unit: Callable[[slice], Tensor],
    *,
    growing: bool = False,
) -> Iterator[Sides]:
    """This process's blocks of a run of queries and the gallery; each pair once when symmetric.

    Args:
        sizes: queries and gallery images in a block. growing: see `parts`.
        unit: a run of gallery images → (n, d) at unit length.
    """
    # Similarities of each process so far: a block goes to the process that has the fewest.
    given = [0] * share.count
    height, width = sizes
    for part in parts(slice(0, len(gallery)), width, growing=growing):
        y = unit(part)
        seen = slice(0, part.stop) if symmetric else run
        for rows in parts(seen, height, growing=growing):
            columns = slice(max(part.start, rows.start), part.stop) if symmetric else part
            owner = given.index(min(given))
            given[owner] += (rows.stop - rows.start) * (columns.stop - columns.start)
            if owner == share.number:
                yield Sides(rows, columns, y[columns.start - part.start :])


def parts(whole: slice, size: int, *, growing: bool = False) -> Iterator[slice]:
    """Cut a run into parts of `size`; if `growing`, the first are smaller, see `_Counts`."""
    start, step = whole.start, max(1, size // 8 if growing else size)
    while start < whole.stop:
        yield slice(start, min(start + step, whole.stop))
        start, step = start + step, min(size, max(step, start + step - whole.start))


def share_labels(queries: Images, rows: slice, gallery: Images, columns: slice) -> bool:
    """Whether a run of queries and a run of gallery images can have a class in common."""
    a, b = queries.host_labels, gallery.host_labels
    return bool(a[rows.start] <= b[columns.stop - 1] and b[columns.start] <= a[rows.stop - 1])


class _Counts:
    """c_m for each same-class pair of n queries, gathered block by block.

    A query's matches divide the similarities into buckets; bucket m holds the other-class images
    between its matches m - 1 and m, so that c_m is the sum of the buckets up to m. Images above the
    nearest match are counted by comparing whole blocks. Images in the window below it are placed
    one by one. The window ends at the last match that can still be among the query's R nearest, so
    after a few blocks (small ones, if they are growing) it is almost empty.

    An image that is tied with matches goes into the bucket after them, and `tied` counts it at any
    one of them.

    The buckets of several processes add up to those of one: if a process drops a match, its own
    counts alone keep that match out of the R nearest.
    """

    def __init__(self, cosines: Tensor, offsets: Tensor, doubt: float, tie: float) -> None:
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
        self.lock = Lock()  # held while changing what threads share
        self.searchable = self.relevant > 0
        self.above = self._limit(cosines[offsets[:-1]] + self.doubt, slice(None))
        self.below = self._limit(cosines[offsets[1:] - 1] - self.doubt, slice(None))

    def _levelled(self, cosines: Tensor) -> Tensor:
        """The cosines, with those of a query's matches that count as equal set to one number."""
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
        """Count a block for the queries `part`, which are its rows or its columns.

        first: the number of the run's first query. along: 0 for the rows, 1 for the columns.
        """
        part = slice(part.start - first, part.stop - first)
        n = part.stop - part.start
        s = block.similarities
        padding = (0, s.shape[along] - n)
        limits = (F.pad(x[part], padding).unsqueeze(1 - along) for x in (self.above, self.below))
        above, window = (s > limit for limit in limits)
        window ^= above
        nearer = count_true(above, 1 - along)[:n]
        with self.lock:
            self.buckets.index_add_(0, self.offsets[part], nearer)
        words = window.view(torch.int64).flatten().nonzero().squeeze(1)
        at_once = scale_of(words.device).entries // 8
        for some in words.split(at_once) if len(words) else ():
            self._place(block, window, some, part.start, along)
        if len(words) > n:
            with self.lock:
                self._narrow(part)

    def _place(self, block: _Block, window: Tensor, words: Tensor, first: int, along: int) -> None:
        """Put the block's entries in the window into buckets; words: indices of eight entries."""
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
            with self.lock:
                self.tied.index_add_(0, last, tied.long())
        bucket = bucket[bucket < self.offsets[query] + self.useful[query]]
        with self.lock:
            self.buckets.index_add_(0, bucket, torch.ones_like(bucket))

    def _first_farther(self, value: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """Index of the first match in [start, stop) that is farther than the value, or stop."""
        longest = int((stop - start).max()) if len(start) else 0
        for _ in range(longest.bit_length()):
            middle = (start + stop) // 2
            nearer = (self.cosines[middle] >= value) & (start < stop)
            start, stop = torch.where(nearer, middle + 1, start), torch.where(nearer, stop, middle)
        return start

    def _narrow(self, part: slice) -> None:
        """Raise the window's end for some queries, above matches that cannot be R nearest."""
        pairs = slice(*(int(self.host_offsets[i]) for i in (part.start, part.stop)))
        owner = self.owner[pairs]
        hit = self._rank(pairs) <= self.relevant[owner]
        useful = torch.zeros_like(self.useful[part]).index_add_(0, owner - part.start, hit.long())
        self.useful[part] = useful.maximum(self.searchable[part].long())
        last = self.offsets[:-1][part] + self.useful[part] - 1
        self.below[part] = self._limit(self.cosines[last] - self.doubt, part)

    def _rank(self, pairs: slice) -> Tensor:
        """m + c_m of a run of pairs, from what is counted so far."""
        total = F.pad(self.buckets[pairs].cumsum(0), (1, 0))
        first = self.offsets[self.owner[pairs]] - pairs.start
        return total[1:] - total[first] + self.place[pairs]

    def ranks(self, gallery_size: int) -> Ranks:
        """The ranks of the matches, once all blocks are counted."""
        rank = self._rank(slice(0, len(self.owner))).cpu()
        first, right, wrong = self._mixed()
        owner, nearest = self.owner.cpu()[first], self.host_offsets[:-1]
        closer = F.pad(rank, (0, 1))[nearest] - 1
        closer[self.relevant.cpu() == 0] = gallery_size
        tied_matches = (self._first_farther(*self._nearest()) - self.offsets[:-1]).cpu()
        tied = torch.zeros_like(nearest)
        leading = first == nearest[owner]
        tied[owner[leading]] = wrong[leading]
        counted = self.relevant.cpu(), self.host_offsets, rank, closer, tied, tied_matches
        return Ranks(*counted, first, right, wrong)

    def _nearest(self) -> tuple[Tensor, Tensor, Tensor]:
        """The cosine of each query's nearest match, and the begin and end of its matches."""
        start, stop = self.offsets[:-1], self.offsets[1:]
        return self.cosines[start], start, stop

    def _mixed(self) -> tuple[Tensor, Tensor, Tensor]:
        """Groups of equally close matches that are tied with images of other classes.

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
