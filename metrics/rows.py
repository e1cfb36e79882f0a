"""The search row by row, for classes of many images: a query's similarities to the whole gallery.

What is beyond a query's R nearest images counts for none of its metrics but the rank of its nearest
match. So the R nearest, and a few more, are taken out of the row and put in order; the place of a
match among them is its rank. blocks.py searches for classes of few images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Lock

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from metrics.blocks import count_true
from metrics.clustering import Progress, inner_products
from metrics.images import Images, pairwise_cosines, rounding
from metrics.ranks import COUNTS, SCORES, Ranks
from metrics.sharing import Share, in_threads, workers

KEPT = 2**27  # bytes of a gallery up to which it is kept as it is multiplied with
CHUNK = 2**21  # numbers of a larger one that are converted at once
SPARE = 8  # images listed beyond the R nearest, which tell where a tie ends
FEW = 1 / 64  # share of the similarities that is taken again in float64 one by one


def search(
    queries: Images,
    gallery: Images,
    begin: Tensor,
    end: Tensor,
    size: int,
    excluding: bool,
    progress: Progress | None,
    share: Share,
) -> dict[str, Tensor]:
    """`retrieval_per_query`'s answer, in the order of `queries`.

    begin, end (Q,): the run of the query's class in the gallery. size: the side of a square of which
    half are the similarities that are held at once.
    """
    rows = _Rows(queries, gallery, begin, end, excluding)
    device = queries.embeddings.device
    found = {name: torch.zeros(len(queries), dtype=torch.int64) for name in COUNTS}
    found |= {name: torch.zeros(len(queries), dtype=torch.float64) for name in SCORES}
    searchable = rows.relevant.nonzero().squeeze(1)
    at_once = size * size // 2 // max(2, workers(device))  # similarities, for each thread
    step = max(1, at_once // len(gallery))
    parts = searchable.split(step)[share.number :: share.count] if len(searchable) else ()
    for done, answers in enumerate(in_threads(rows.answers, parts, device), 1):
        for part, values in answers:
            for name, column in values.items():
                found[name][part] = column
        if progress:
            progress(done / len(parts))
    for name, values in found.items():
        found[name] = share.total(values.to(device)).cpu()
    found["rank"][rows.relevant.cpu() == 0] = len(gallery)
    return found


@dataclass
class _Lists:
    """What B queries find, nearest first: (B, K) each, and what the lists do not hold: (B,) each.

    Attributes:
        values: the cosines, float64.
        right: whether an image is of the query's class.
        edge: the images that are nearer than that are listed, all of them and in their order.
        more_right, more_wrong: images, all as close, which follow those above the edge.
    """

    values: Tensor
    right: Tensor
    edge: Tensor
    more_right: Tensor
    more_wrong: Tensor

    def __getitem__(self, rows: Tensor) -> _Lists:
        return _Lists(*(values[rows] for values in vars(self).values()))

    def holds(self, relevant: Tensor) -> Tensor:
        """(B,) whether the R nearest are above the edge."""
        return self.values.gather(1, relevant[:, None] - 1).squeeze(1) > self.edge

    def finds(self) -> Tensor:
        """(B,) whether there is a match."""
        above = self.values > self.edge[:, None]
        return (self.right & above).any(dim=1) | (self.more_right > 0)

    def starts(self, tie: float) -> Tensor:
        """(B, K) the first place of those that are as close as an image."""
        place = torch.arange(self.values.shape[1], device=self.values.device)
        tied = self.values[:, :-1] - self.values[:, 1:] <= tie
        if not tied.any():
            return place.expand_as(self.values)
        return (place * ~F.pad(tied, (1, 0))).cummax(dim=1).values

    def ranks(self, relevant: Tensor, tie: float, nearest: Tensor) -> Ranks:
        """The ranks of matches among the R nearest.

        nearest: (3, B) `closer`, `tied` and `tied_matches` of the queries that do not find any.
        """
        starts, width = self.starts(tie), self.values.shape[1]
        above = self.values.gather(1, starts) > self.edge[:, None]
        row, place = (self.right & above).nonzero(as_tuple=True)
        listed = row.bincount(minlength=len(relevant))
        number = _counted(listed)  # of a match in its row, from 0
        offsets = F.pad((listed + self.more_right).cumsum(0), (1, 0))

        # Matches that are as close as each other come before what else is as close.
        start = starts[row, place]
        group, right = (row * width + start).unique_consecutive(return_counts=True)
        head = right.cumsum(0) - right
        wrong_before = start - number[head].repeat_interleave(right)
        size = (torch.arange(len(starts), device=row.device)[:, None] * width + starts)[above]
        wrong = size.bincount(minlength=starts.numel())[group] - right
        pair = offsets[row] + number
        rank = torch.empty(int(offsets[-1]), dtype=torch.int64, device=row.device)
        rank[pair] = wrong_before + number + 1

        # So do those that are not listed.
        cut = self.more_right.nonzero().squeeze(1)
        more, after = self.more_right[cut], offsets[cut] + listed[cut]
        step = _counted(more)
        rank[after.repeat_interleave(more) + step] = (above.sum(dim=1)[cut] + 1).repeat_interleave(
            more
        ) + step

        owner = torch.cat([row[head], cut])
        first, right = torch.cat([pair[head], after]), torch.cat([right, more])
        wrong = torch.cat([wrong, self.more_wrong[cut]])
        leading = first == offsets[owner]
        closer, tied, tied_matches = nearest.clone()
        closer[owner[leading]] = rank[first[leading]] - 1
        tied[owner[leading]] = wrong[leading]
        tied_matches[owner[leading]] = right[leading]
        mixed = wrong > 0
        groups = first[mixed], right[mixed], wrong[mixed]
        found = relevant, offsets, rank, closer, tied, tied_matches, *groups
        return Ranks(*(values.cpu() for values in found))


class _Rows:
    """Rows of similarities: float32, and float64 where that leaves something open.

    Where most are left open, in dense neighbourhoods and among copies, the rows that follow are
    float64 from the start.

    Attributes:
        relevant: (Q,) R of each query.
        precise: whether rows are float64 from the start.
    """

    def __init__(
        self, queries: Images, gallery: Images, begin: Tensor, end: Tensor, excluding: bool
    ):
        self.queries, self.gallery = queries, gallery
        self.begin, self.end = begin, end
        self.excluding = excluding
        self.doubt, self.tie = rounding(queries, gallery)
        self.precise = False
        self.padding = -len(gallery) % 8  # see `count_true`
        self.kept: dict[bool, Tensor] = {}
        self.lock = Lock()
        self.relevant = end - begin
        if excluding:
            parts = torch.arange(len(queries), device=begin.device).split(256)
            self.relevant = torch.cat([self._mates(rows)[1].sum(dim=1) for rows in parts])
        elif queries is gallery:
            self.relevant = self.relevant - 1

    def answers(self, rows: Tensor) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The values of some queries that have matches (B,), in one or two parts."""
        found = []
        if not self.precise:
            settled, ranks = self._in_float32(rows)
            self.precise |= 2 * int(settled.sum()) < len(rows)
            if ranks is not None:
                found.append((rows[settled].cpu(), ranks.values()))
            rows = rows[~settled]
        if len(rows):
            found.append((rows.cpu(), self._in_float64(rows).values()))
        return found

    def _in_float32(self, rows: Tensor) -> tuple[Tensor, Ranks | None]:
        """(B,) the rows that float32 is enough for, and their ranks."""
        similarities = self._similarities(rows, precise=False)
        values, columns, edge = self._largest(rows, similarities, 4 * self.doubt)
        right = self._same_class(rows, columns)
        close = values[:, :-1] - values[:, 1:] <= 2 * self.doubt
        row, place = (F.pad(close, (0, 1)) | F.pad(close, (1, 0))).nonzero(as_tuple=True)
        if len(row) > FEW * similarities.numel():
            return torch.zeros_like(rows, dtype=torch.bool), None
        values = values.double()
        if len(row):
            values[row, place] = self._exact(rows[row], columns[row, place])
            order = _falling(values)
            values, right = values.gather(1, order), right.gather(1, order)
        nothing = torch.zeros_like(rows)
        lists = _Lists(values, right, edge, nothing, nothing)
        relevant = self.relevant[rows]
        settled = lists.holds(relevant)
        nearest = rows.new_zeros(3, len(rows))
        far = (settled & ~lists.finds()).nonzero().squeeze(1)
        if len(far):
            seen = self._nearest_in_float32(rows[far], similarities[far])
            if seen is None:
                settled[far] = False
            else:
                nearest[:, far] = seen
        return settled, lists[settled].ranks(relevant[settled], self.tie, nearest[:, settled])

    def _in_float64(self, rows: Tensor) -> Ranks:
        """The ranks of some queries, in float64 throughout."""
        similarities = self._similarities(rows, precise=True)
        values, columns, edge = self._largest(rows, similarities, self.tie)
        nothing = torch.zeros_like(rows)
        right = self._same_class(rows, columns)
        lists = _Lists(values, right, edge, nothing, nothing.clone())
        relevant = self.relevant[rows]
        beyond = (~lists.holds(relevant)).nonzero().squeeze(1)
        if len(beyond):
            # The group that the R-th nearest is of may go on beyond the list.
            start = lists.starts(self.tie)[beyond].gather(1, relevant[beyond, None] - 1)
            top = values[beyond].gather(1, start)
            lists.edge = edge.index_copy(0, beyond, top.squeeze(1))
            own, everything = self._as_close(rows[beyond], similarities[beyond], top)
            lists.more_right = nothing.index_copy(0, beyond, own)
            lists.more_wrong = nothing.index_copy(0, beyond, everything - own)
        nearest = rows.new_zeros(3, len(rows))
        far = (~lists.finds()).nonzero().squeeze(1)
        if len(far):
            nearest[:, far] = self._nearest_in_float64(rows[far], similarities[far])
        return lists.ranks(relevant, self.tie, nearest)

    # What is read off the rows --------------------------------------------------------------------

    def _largest(
        self, rows: Tensor, similarities: Tensor, margin: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The R nearest of each row and a few more, (B, K) values and columns, and the edge (B,).

        margin: how close to the last one what is not listed can be, and still be nearer.
        """
        count = min(int(self.relevant[rows].max()) + SPARE, similarities.shape[1])
        values, columns = _largest(similarities, count)
        edge = values[:, -1].double() + margin
        if count == similarities.shape[1]:
            edge = torch.full_like(edge, -torch.inf)
        return values, columns, edge

    def _nearest_in_float64(self, rows: Tensor, similarities: Tensor) -> Tensor:
        """(3, B) `closer`, `tied` and `tied_matches` of some queries, see `Ranks`."""
        own = self._own(rows, similarities)
        top = own.amax(dim=1, keepdim=True)
        tied_matches = (own >= top - self.tie).sum(dim=1)
        closer = count_true(similarities > top + self.tie, 1)
        tied = count_true(similarities >= top - self.tie, 1) - closer - tied_matches
        return torch.stack([closer, tied, tied_matches])

    def _nearest_in_float32(self, rows: Tensor, similarities: Tensor) -> Tensor | None:
        """The same from float32; None where too many similarities are open."""
        own = self._own(rows, similarities)
        top = own.amax(dim=1, keepdim=True)
        above = similarities > top + 2 * self.doubt
        near = (similarities >= top - 2 * self.doubt) ^ above
        row, column = near.nonzero(as_tuple=True)
        if len(row) > FEW * similarities.numel():
            return None
        right = self._same_class(rows[row], column)
        value = self._exact(rows[row], column)
        match = value.masked_fill(~right, -torch.inf)
        best = value.new_full((len(rows),), -torch.inf).scatter_reduce(0, row, match, "amax")[row]
        tied = (value - best).abs() <= self.tie

        def count(mask: Tensor) -> Tensor:
            return row[mask].bincount(minlength=len(rows))

        closer = count_true(above, 1) + count(~right & (value > best + self.tie))
        return torch.stack([closer, count(~right & tied), count(right & tied)])

    def _as_close(self, rows: Tensor, similarities: Tensor, top: Tensor) -> tuple[Tensor, Tensor]:
        """The matches and all the images that are as close as (B, 1) float64, by number: (B,)."""

        def as_close(values: Tensor) -> Tensor:
            return (values <= top) & (values >= top - self.tie)

        own = as_close(self._own(rows, similarities)).sum(dim=1)
        return own, count_true(as_close(similarities), 1)

    def _same_class(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Whether images (B, K) or (B,) are of the queries' class."""
        begin, end = self.begin[rows], self.end[rows]
        if columns.ndim == 2:
            begin, end = begin[:, None], end[:, None]
        return (columns >= begin) & (columns < end)

    def _own(self, rows: Tensor, similarities: Tensor) -> Tensor:
        """The similarities to the queries' matches, (B, widest class), -inf where there is none."""
        mates, seen = self._mates(rows)
        return similarities.gather(1, mates).masked_fill_(~seen, -torch.inf)

    def _mates(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The images of the queries' class, (B, widest), and which of them a query sees."""
        begin, end = self.begin[rows, None], self.end[rows, None]
        mates = begin + torch.arange(int((end - begin).max()), device=begin.device)
        seen = mates < end
        mates = mates.clamp_max(len(self.gallery) - 1)
        if self.excluding:
            seen &= self.gallery.groups[mates] != self.queries.groups[rows, None]
        return mates, seen

    def _exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Float64 cosines of pairs; -inf for those that the query does not see."""
        return pairwise_cosines(self.queries, rows, self.gallery, columns)

    # The rows -------------------------------------------------------------------------------------

    def _similarities(self, rows: Tensor, precise: bool) -> Tensor:
        """(B, N + padding); -inf where a query does not see an image, and where there is none."""
        if precise:
            x, scale = self.queries.given(rows), self.queries.inverse[rows, None]
            parts = [(x @ y.T).mul_(scale) for y in self._parts(precise)]
        else:
            x = self.queries.unit(rows)
            parts = [inner_products(x, y) for y in self._parts(precise)]
        found = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
        images = found[:, : len(self.gallery)]
        if precise:
            images *= self.gallery.inverse
        if self.excluding:
            images.masked_fill_(self.queries.groups[rows, None] == self.gallery.groups, -torch.inf)
        elif self.queries is self.gallery:
            images.scatter_(1, rows[:, None], -torch.inf)
        found[:, len(self.gallery) :] = -torch.inf
        return found

    def _parts(self, precise: bool) -> Iterator[Tensor]:
        """The gallery as it is multiplied with, in one part if it can be kept."""
        size, d = self.gallery.embeddings.shape
        read = self.gallery.given if precise else self.gallery.unit
        if size * d * (8 if precise else 4) <= KEPT:
            yield self._kept(precise, read)
            return
        step = max(64, CHUNK // d)
        for start in range(0, size, step):
            stop = min(start + step, size)
            padding = self.padding if stop == size else 0
            yield F.pad(read(slice(start, stop)), (0, 0, 0, padding))

    def _kept(self, precise: bool, read: Callable[[slice], Tensor]) -> Tensor:
        with self.lock:
            if precise not in self.kept:
                self.kept.clear()
                everything = read(slice(0, len(self.gallery)))
                self.kept[precise] = F.pad(everything, (0, 0, 0, self.padding))
            return self.kept[precise]


def _largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The largest numbers of each row (B, N), falling, and where they stand: (B, count) each."""
    if values.device.type != "cpu":
        found = values.topk(count, dim=1)
        return found.values, found.indices
    # numpy's selection takes 1.5 ns for each number, topk between 1.2 (10 of them) and 31 (5,000).
    first = values.shape[1] - count
    columns = np.argpartition(values.numpy(), first, axis=1)[:, first:]
    columns = torch.from_numpy(np.ascontiguousarray(columns))
    found = values.gather(1, columns)
    order = _falling(found)
    return found.gather(1, order), columns.gather(1, order)


def _falling(values: Tensor) -> Tensor:
    """The order of each row (B, K) that puts the largest first."""
    if values.device.type != "cpu":
        return values.argsort(dim=1, descending=True)
    rising = np.argsort(values.numpy(), axis=1)  # a tenth of torch's time
    return torch.from_numpy(np.ascontiguousarray(rising[:, ::-1]))


def _counted(sizes: Tensor) -> Tensor:
    """0 .. size - 1 for each of the sizes (T,), one after the other."""
    index = torch.arange(int(sizes.sum()), device=sizes.device)
    return index - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
