"""The search row by row, for classes of many images: a query's similarities to the whole gallery.

What is beyond a query's R nearest images counts for none of its metrics but the rank of its nearest
match. So the R nearest, and a few more, are taken out of the row and put in order; the place of a
match among them is its rank. blocks.py searches for classes of few images.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from threading import Lock, local

import torch
from torch import Tensor
from torch.nn import functional as F

from metrics.images import Pairing, pairwise_cosines, rounding
from metrics.products import inner_products
from metrics.ragged import counted
from metrics.ranks import COUNTS, SCORES, Ranks
from metrics.selection import count_true, largest
from metrics.sharing import Progress, Share, in_threads, workers

KEPT = 2**27  # bytes of a gallery up to which it is kept as it is multiplied with
CHUNK = 2**21  # numbers of a larger one that are converted at once
LISTED = 2**20  # images that are put in order at once, by all threads together
SPARE = 8  # images listed beyond the R nearest, which tell where a tie ends
SCORE_TIE = 1e-10  # scores that are no cosines and differ by less are equal
FEW = 1 / 64  # share of the similarities that is taken again in float64 one by one

Score = Callable[[Tensor], Tensor]
"""Queries (B,), by their places as they were given → (B, G) float64, the larger the nearer."""


def search(
    pairing: Pairing,
    size: int,
    progress: Progress | None,
    share: Share,
    score: Score | None = None,
) -> dict[str, Tensor]:
    """`retrieval_per_query`'s answer, in the order of the queries.

    size: half its square is the number of similarities that are held at once. score: what is
    searched by, if not the cosine.
    """
    rows = _Rows(pairing) if score is None else _ScoredRows(pairing, score)
    queries, gallery = pairing.queries, pairing.gallery
    device = queries.embeddings.device
    found = {name: torch.zeros(len(queries), dtype=torch.int64) for name in COUNTS}
    found |= {name: torch.zeros(len(queries), dtype=torch.float64) for name in SCORES}
    searchable = rows.relevant.nonzero().squeeze(1)
    if len(searchable):
        parts = searchable.split(rows.step(size))[share.number :: share.count]
    else:
        parts = ()
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
        right: whether an image is of the query's class.
        tied: whether it is exactly as close as the one before it.
        depth: how many places are certain; beyond them images may be missing that are as near.
        more_right, more_wrong: images, all as close, which follow those places.
    """

    right: Tensor
    tied: Tensor
    depth: Tensor
    more_right: Tensor
    more_wrong: Tensor

    def __getitem__(self, rows: Tensor) -> _Lists:
        return _Lists(*(values[rows] for values in vars(self).values()))

    @property
    def places(self) -> Tensor:
        """0 .. K - 1, (B, K)."""
        return torch.arange(self.right.shape[1], device=self.right.device).expand_as(self.right)

    def starts(self) -> Tensor:
        """(B, K) the first place of the images that are as close as one."""
        if not self.tied.any():
            return self.places
        return self.places.masked_fill(self.tied, 0).cummax(dim=1).values

    def finds(self) -> Tensor:
        """(B,) whether there is a match."""
        certain = self.places < self.depth[:, None]
        return (self.right & certain).any(dim=1) | (self.more_right > 0)

    def ranks(self, relevant: Tensor, nearest: Tensor) -> Ranks:
        """The ranks of the matches.

        nearest: (3, B) `closer`, `tied` and `tied_matches` of the queries that do not find any.
        """
        starts = self.starts()
        row, place = (self.right & (starts < self.depth[:, None])).nonzero(as_tuple=True)
        listed = row.bincount(minlength=len(relevant))
        if self.tied.any():
            # Matches that are as close as each other come before what else is as close.
            start, width = starts[row, place], starts.shape[1]
            group, right = (row * width + start).unique_consecutive(return_counts=True)
            first = right.cumsum(0) - right
            rank = start + 1 + counted(right)
            every = starts + width * torch.arange(len(starts), device=row.device)[:, None]
            wrong = every.flatten().bincount(minlength=every.numel())[group] - right
        else:
            rank = place + 1
            first = (listed.cumsum(0) - listed)[listed > 0]
            right, wrong = torch.ones_like(first), torch.zeros_like(first)
        owner = row[first]

        offsets = F.pad((listed + self.more_right).cumsum(0), (1, 0))
        cut = self.more_right.nonzero().squeeze(1)
        if len(cut):  # so do those that are not listed
            more, after = self.more_right[cut], offsets[cut] + listed[cut]
            pair = offsets[row] + counted(listed)
            step = counted(more)
            every = torch.empty(int(offsets[-1]), dtype=torch.int64, device=row.device)
            every[pair] = rank
            every[after.repeat_interleave(more) + step] = (
                self.depth[cut].repeat_interleave(more) + step + 1
            )
            rank, first = every, torch.cat([pair[first], after])
            right, wrong = torch.cat([right, more]), torch.cat([wrong, self.more_wrong[cut]])
            owner = torch.cat([owner, cut])

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

    def __init__(self, pairing: Pairing) -> None:
        queries, gallery, begin, end, excluding = pairing
        self.queries, self.gallery, self.begin, self.end, self.excluding = pairing
        self.doubt, self.tie = rounding(queries, gallery)
        self.precise = False
        self.padding = -len(gallery) % 8  # see `count_true`
        self.kept: dict[bool, Tensor] = {}
        self.lock = Lock()
        self.rooms = local()
        self.relevant = end - begin
        if excluding:
            parts = torch.arange(len(queries), device=begin.device).split(256)
            self.relevant = torch.cat([self._mates(rows)[1].sum(dim=1) for rows in parts])
        elif queries is gallery:
            self.relevant = self.relevant - 1

    def step(self, size: int) -> int:
        """How many rows are worked on at once, by each thread; see `search` for the size."""
        rows = size * size // 2 // len(self.gallery)
        listed = LISTED // (int(self.relevant.max()) + SPARE)
        return max(1, min(rows, listed) // workers(self.relevant.device))

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
        values, columns = self._largest(rows, similarities)
        right = self._same_class(rows, columns)
        depth = _depth(values, similarities, 4 * self.doubt)
        follows = F.pad(values[:, :-1] - values[:, 1:] <= 2 * self.doubt, (1, 0))
        row, place = _undecided(right, follows).nonzero(as_tuple=True)
        if len(row) > FEW * similarities.numel():
            return torch.zeros_like(rows, dtype=torch.bool), None
        tied = torch.zeros_like(right)
        exact = self._exact(rows[row], columns[row, place])
        order = _falling_in_runs(exact, ~follows[row, place])
        exact = exact[order]
        right[row, place] = right[row, place][order]
        tied[row, place] = F.pad(exact[:-1] - exact[1:] <= self.tie, (1, 0)) & follows[row, place]

        nothing = torch.zeros_like(rows)
        lists = _Lists(right, tied, depth, nothing, nothing)
        relevant = self.relevant[rows]
        settled = relevant <= depth
        nearest = rows.new_zeros(3, len(rows))
        far = (settled & ~lists.finds()).nonzero().squeeze(1)
        if len(far):
            seen = self._nearest_in_float32(rows[far], similarities[far])
            if seen is None:
                settled[far] = False
            else:
                nearest[:, far] = seen
        return settled, lists[settled].ranks(relevant[settled], nearest[:, settled])

    def _in_float64(self, rows: Tensor) -> Ranks:
        """The ranks of some queries, in float64 throughout."""
        similarities = self._similarities(rows, precise=True)
        values, columns = self._largest(rows, similarities)
        nothing = torch.zeros_like(rows)
        depth = _depth(values, similarities, self.tie)
        tied = F.pad(values[:, :-1] - values[:, 1:] <= self.tie, (1, 0))
        lists = _Lists(self._same_class(rows, columns), tied, depth, nothing, nothing)
        relevant = self.relevant[rows]
        cut = (relevant > depth).nonzero().squeeze(1)
        if len(cut):
            # Images that are as close as the R-th nearest may be missing.
            start = lists.starts()[cut].gather(1, relevant[cut, None] - 1)
            own, all_ = self._as_close(rows[cut], similarities[cut], values[cut].gather(1, start))
            lists.depth = depth.index_copy(0, cut, start.squeeze(1))
            lists.more_right = nothing.index_copy(0, cut, own)
            lists.more_wrong = nothing.index_copy(0, cut, all_ - own)
        nearest = rows.new_zeros(3, len(rows))
        far = (~lists.finds()).nonzero().squeeze(1)
        if len(far):
            nearest[:, far] = self._nearest_in_float64(rows[far], similarities[far])
        return lists.ranks(relevant, nearest)

    # What is read off the rows --------------------------------------------------------------------

    def _largest(self, rows: Tensor, similarities: Tensor) -> tuple[Tensor, Tensor]:
        """The R nearest of each row and a few more: (B, K) values, falling, and columns."""
        count = int(self.relevant[rows].max()) + SPARE
        return largest(similarities, min(count, similarities.shape[1]))

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
        x = self.queries.given(rows) if precise else self.queries.unit(rows)
        found = self._room(len(rows), x.dtype)
        start = 0
        for y in self._parts(precise):
            part = found[:, start : start + len(y)]
            start += len(y)
            if precise:
                torch.mm(x, y.T, out=part)
            else:
                inner_products(x, y, out=part)
        images = found[:, : len(self.gallery)]
        if precise:
            images.mul_(self.queries.inverse[rows, None]).mul_(self.gallery.inverse)
        return self._seen(rows, found)

    def _seen(self, rows: Tensor, found: Tensor) -> Tensor:
        """Similarities with -inf where a query does not see an image, and where there is none."""
        images = found[:, : len(self.gallery)]
        if self.excluding:
            images.masked_fill_(self.queries.groups[rows, None] == self.gallery.groups, -torch.inf)
        elif self.queries is self.gallery:
            images.scatter_(1, rows[:, None], -torch.inf)
        found[:, len(self.gallery) :] = -torch.inf
        return found

    def _room(self, rows: int, dtype: torch.dtype) -> Tensor:
        """(rows, N + padding) that this thread had before: new memory takes as long as a product"""
        width = len(self.gallery) + self.padding
        room = getattr(self.rooms, "room", None)
        if room is None or room.dtype != dtype or len(room) < rows:
            device = self.queries.embeddings.device
            room = self.rooms.room = torch.empty(rows, width, dtype=dtype, device=device)
        return room[:rows]

    def _parts(self, precise: bool) -> Iterator[Tensor]:
        """The gallery as it is multiplied with, in one part if it can be kept."""
        size, d = self.gallery.embeddings.shape
        read = self.gallery.given if precise else self.gallery.unit
        if size * d * (8 if precise else 4) <= KEPT:
            yield self._kept(precise, read)
            return
        step = max(64, CHUNK // d)
        for start in range(0, size, step):
            yield read(slice(start, min(start + step, size)))

    def _kept(self, precise: bool, read: Callable[[slice], Tensor]) -> Tensor:
        with self.lock:
            if precise not in self.kept:
                self.kept.clear()
                everything = read(slice(0, len(self.gallery)))
                self.kept[precise] = F.pad(everything, (0, 0, 0, self.padding))
            return self.kept[precise]


class _ScoredRows(_Rows):
    """Rows of scores that somebody else computes."""

    def __init__(self, pairing: Pairing, score: Score) -> None:
        super().__init__(pairing)
        self.score, self.tie, self.precise = score, SCORE_TIE, True

    def _similarities(self, rows: Tensor, precise: bool) -> Tensor:
        found = self._room(len(rows), torch.float64)
        found[:, : len(self.gallery)] = self.score(self.queries.order[rows])[:, self.gallery.order]
        return self._seen(rows, found)


def _depth(values: Tensor, similarities: Tensor, margin: float) -> Tensor:
    """(B,) how many of the largest (B, K) exceed, by the margin, all that is not listed."""
    if values.shape[1] == similarities.shape[1]:
        return (values > -torch.inf).sum(dim=1)
    return (values > values[:, -1:] + margin).sum(dim=1)


def _undecided(right: Tensor, follows: Tensor) -> Tensor:
    """(B, K) whether float32 leaves it open where an image stands among matches and others.

    follows: whether float32 does not tell an image from the one before it. It tells nothing of the
    order in a run of these; which matters where a run has both sorts, or the nearest match.
    """
    found = torch.zeros_like(right)
    found[:, 1:] = follows[:, 1:] & (right[:, 1:] != right[:, :-1])
    nearest = right.int().argmax(dim=1, keepdim=True)
    found.scatter_(1, nearest, True)
    found &= follows | F.pad(follows[:, 1:], (0, 1))  # not alone
    while True:  # along the runs, which are short
        more = found.clone()
        more[:, :-1] |= found[:, 1:] & follows[:, 1:]
        more[:, 1:] |= found[:, :-1] & follows[:, 1:]
        if torch.equal(more, found):
            return found
        found = more


def _falling_in_runs(values: Tensor, begins: Tensor) -> Tensor:
    """The order (P,) that sorts the numbers of each run, the largest first."""
    order = values.argsort(descending=True)
    return order[begins.cumsum(0)[order].argsort(stable=True)]
