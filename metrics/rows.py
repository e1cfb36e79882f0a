"""The search row by row, for classes of many images: a query's similarities to the whole gallery.

Beyond a query's R nearest images, nothing matters for its metrics except the rank of its nearest
match. So the R nearest, and a few more, are selected from the row and sorted; the position of a
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

KEPT = 2**27  # bytes of a normalised gallery up to which it is kept
CHUNK = 2**21  # numbers of a larger gallery that are normalised at once
LISTED = 2**20  # images that are sorted at once, by all threads together
SPARE = 8  # images listed beyond the R nearest, which show where a tie ends
SCORE_TIE = 1e-10  # `Score`s that differ by less are equal
FEW = 1 / 64  # up to this share, similarities are computed one by one in float64

Score = Callable[[Tensor], Tensor]
"""Indices of queries (B,), in the order given → scores (B, G) float64, larger if more similar."""


def search(
    pairing: Pairing,
    size: int,
    progress: Progress | None,
    share: Share,
    score: Score | None = None,
) -> dict[str, Tensor]:
    """`retrieval_per_query`'s answer, in the order of the queries.

    size: half its square is the number of similarities that are held at once. score: a similarity
    to use instead of the cosine.
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
    """The K nearest images of B queries, nearest first, and counts of images beyond them.

    Attributes:
        right: (B, K) whether the image is of the query's class.
        tied: (B, K) whether it is exactly as close as its predecessor.
        depth: (B,) the number of certain positions; after these, images that are as close may be
            missing.
        more_right, more_wrong: (B,) the numbers of matches and other images, all equally close,
            that come after the certain positions.
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
        """The positions 0 .. K - 1 in each row, (B, K)."""
        return torch.arange(self.right.shape[1], device=self.right.device).expand_as(self.right)

    def starts(self) -> Tensor:
        """(B, K) the first position of the images that are exactly as close as each image."""
        if not self.tied.any():
            return self.places
        return self.places.masked_fill(self.tied, 0).cummax(dim=1).values

    def finds(self) -> Tensor:
        """(B,) whether the query finds a match."""
        certain = self.places < self.depth[:, None]
        return (self.right & certain).any(dim=1) | (self.more_right > 0)

    def ranks(self, relevant: Tensor, nearest: Tensor) -> Ranks:
        """The ranks of the matches.

        nearest: (3, B) `closer`, `tied` and `tied_matches` of the queries that do not find any.
        """
        starts = self.starts()
        row, place = (self.right & (starts < self.depth[:, None])).nonzero(as_tuple=True)
        listed = row.bincount(minlength=len(relevant))
        rank, first, right, wrong = self._groups(starts, row, place, listed)
        owner = row[first]

        offsets = F.pad((listed + self.more_right).cumsum(0), (1, 0))
        cut = self.more_right.nonzero().squeeze(1)
        if len(cut):  # the same for those that are not listed
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

    def _groups(
        self, starts: Tensor, row: Tensor, place: Tensor, listed: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The ranks (P,) of the listed matches, and groups of equally close images among them.

        Of each group its first match, as an index into these, its matches and its other images.
        """
        if not self.tied.any():
            first = (listed.cumsum(0) - listed)[listed > 0]
            return place + 1, first, torch.ones_like(first), torch.zeros_like(first)
        # Among equally close images, matches come first.
        start, width = starts[row, place], starts.shape[1]
        group, right = (row * width + start).unique_consecutive(return_counts=True)
        every = starts + width * torch.arange(len(starts), device=row.device)[:, None]
        wrong = every.flatten().bincount(minlength=every.numel())[group] - right
        return start + 1 + counted(right), right.cumsum(0) - right, right, wrong


class _Rows:
    """Rows of similarities in float32, or in float64 if float32 does not decide the order.

    If float32 fails for most rows, because of dense neighbourhoods or copies, all later rows are
    computed in float64 at once.

    Attributes:
        relevant: (Q,) R of each query.
        precise: whether rows are now computed in float64 at once.
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
        """The number of rows that each thread processes at once; see `search` for the size."""
        rows = size * size // 2 // len(self.gallery)
        listed = LISTED // (int(self.relevant.max()) + SPARE)
        return max(1, min(rows, listed) // workers(self.relevant.device))

    def answers(self, rows: Tensor) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """The values of queries (B,) that have matches: one or two pairs (queries, values)."""
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
        """(B,) whether float32 is enough for a row, and the ranks of those rows."""
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
        """The ranks of queries, all in float64."""
        similarities = self._similarities(rows, precise=True)
        values, columns = self._largest(rows, similarities)
        nothing = torch.zeros_like(rows)
        depth = _depth(values, similarities, self.tie)
        tied = F.pad(values[:, :-1] - values[:, 1:] <= self.tie, (1, 0))
        lists = _Lists(self._same_class(rows, columns), tied, depth, nothing, nothing)
        relevant = self.relevant[rows]
        cut = (relevant > depth).nonzero().squeeze(1)
        if len(cut):
            # Images as close as the R-th nearest may be missing from the list.
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

    # Reading the rows -----------------------------------------------------------------------------

    def _largest(self, rows: Tensor, similarities: Tensor) -> tuple[Tensor, Tensor]:
        """The R nearest of each row and a few more: (B, K) values, decreasing, and columns."""
        count = int(self.relevant[rows].max()) + SPARE
        return largest(similarities, min(count, similarities.shape[1]))

    def _nearest_in_float64(self, rows: Tensor, similarities: Tensor) -> Tensor:
        """(3, B) `closer`, `tied` and `tied_matches` of queries, see `Ranks`."""
        own = self._own(rows, similarities)
        top = own.amax(dim=1, keepdim=True)
        tied_matches = (own >= top - self.tie).sum(dim=1)
        closer = count_true(similarities > top + self.tie, 1)
        tied = count_true(similarities >= top - self.tie, 1) - closer - tied_matches
        return torch.stack([closer, tied, tied_matches])

    def _nearest_in_float32(self, rows: Tensor, similarities: Tensor) -> Tensor | None:
        """The same from float32; None if that leaves too many similarities undecided."""
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
        """The numbers of matches and of all images that are as close as `top` (B, 1): (B,) each."""

        def as_close(values: Tensor) -> Tensor:
            return (values <= top) & (values >= top - self.tie)

        own = as_close(self._own(rows, similarities)).sum(dim=1)
        return own, count_true(as_close(similarities), 1)

    def _same_class(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Whether the images `columns`, (B, K) or (B,), are of the queries' classes."""
        begin, end = self.begin[rows], self.end[rows]
        if columns.ndim == 2:
            begin, end = begin[:, None], end[:, None]
        return (columns >= begin) & (columns < end)

    def _own(self, rows: Tensor, similarities: Tensor) -> Tensor:
        """The similarities to the queries' matches, (B, largest class), -inf as padding."""
        mates, seen = self._mates(rows)
        return similarities.gather(1, mates).masked_fill_(~seen, -torch.inf)

    def _mates(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The images of the queries' classes, (B, largest), and whether the query sees them."""
        begin, end = self.begin[rows, None], self.end[rows, None]
        mates = begin + torch.arange(int((end - begin).max()), device=begin.device)
        seen = mates < end
        mates = mates.clamp_max(len(self.gallery) - 1)
        if self.excluding:
            seen &= self.gallery.groups[mates] != self.queries.groups[rows, None]
        return mates, seen

    def _exact(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Float64 cosines of pairs."""
        return pairwise_cosines(self.queries, rows, self.gallery, columns)

    # The rows -------------------------------------------------------------------------------------

    def _similarities(self, rows: Tensor, precise: bool) -> Tensor:
        """(B, N + padding); -inf for images that a query does not see, and for padding."""
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
        """The similarities, with -inf for images that a query does not see, and for padding."""
        images = found[:, : len(self.gallery)]
        if self.excluding:
            images.masked_fill_(self.queries.groups[rows, None] == self.gallery.groups, -torch.inf)
        elif self.queries is self.gallery:
            images.scatter_(1, rows[:, None], -torch.inf)
        found[:, len(self.gallery) :] = -torch.inf
        return found

    def _room(self, rows: int, dtype: torch.dtype) -> Tensor:
        """A (rows, N + padding) buffer of this thread; allocating anew is as slow as a product."""
        width = len(self.gallery) + self.padding
        room = getattr(self.rooms, "room", None)
        if room is None or room.dtype != dtype or len(room) < rows:
            device = self.queries.embeddings.device
            room = self.rooms.room = torch.empty(rows, width, dtype=dtype, device=device)
        return room[:rows]

    def _parts(self, precise: bool) -> Iterator[Tensor]:
        """The gallery as factors of products, in one part if it can be kept."""
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
    """Rows of given scores instead of cosines."""

    def __init__(self, pairing: Pairing, score: Score) -> None:
        super().__init__(pairing)
        self.score, self.tie, self.precise = score, SCORE_TIE, True

    def _similarities(self, rows: Tensor, precise: bool) -> Tensor:
        found = self._room(len(rows), torch.float64)
        found[:, : len(self.gallery)] = self.score(self.queries.order[rows])[:, self.gallery.order]
        return self._seen(rows, found)


def _depth(values: Tensor, similarities: Tensor, margin: float) -> Tensor:
    """(B,) how many of the largest values (B, K) exceed all that are not listed by the margin."""
    if values.shape[1] == similarities.shape[1]:
        return (values > -torch.inf).sum(dim=1)
    return (values > values[:, -1:] + margin).sum(dim=1)


def _undecided(right: Tensor, follows: Tensor) -> Tensor:
    """(B, K) whether float32 cannot decide the position of an image, and it matters.

    follows: whether float32 cannot tell an image from its predecessor. Within a run of such images
    the order is unknown; it matters if the run has both matches and other images, or the nearest
    match.
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
    """The order (P,) that sorts the numbers within each run, largest first."""
    order = values.argsort(descending=True)
    return order[begins.cumsum(0)[order].argsort(stable=True)]
