"""The metrics of a query, computed from the ranks of its matches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metrics import ties
from metrics.ragged import counted, spread

COUNTS = ("relevant", "rank", "tied", "tied_matches", "undecided")
"""The entries of `retrieval_per_query` that are no metrics, int64."""
SCORES = ("RP", "MAP@R", "mARP", "MRR")
"""Those that are metrics, float64."""


@dataclass(frozen=True)
class Ranks:
    """The ranks of the matches of n queries: CPU tensors, int64.

    P matches are listed, query by query, nearest first: all that may be among the query's R
    nearest, and all that are exactly as close as one of those. T groups of equally close images
    contain both listed matches and images of other classes (see ties.py).

    Attributes:
        relevant: (n,) R, the number of matches.
        offsets: (n + 1,) where each query's matches begin in the list.
        rank: (P,) m + c_m, where c_m images of other classes are strictly closer than match m.
        closer: (n,) c_1; the size of the gallery where R = 0.
        tied: (n,) the number of images of other classes exactly as close as the nearest match.
        tied_matches: (n,) the number of matches exactly as close as the nearest, which is included.
        first: (T,) the index in the list of each group's first match.
        right: (T,) each group's matches. wrong: (T,) its images of other classes.
    """

    relevant: Tensor
    offsets: Tensor
    rank: Tensor
    closer: Tensor
    tied: Tensor
    tied_matches: Tensor
    first: Tensor
    right: Tensor
    wrong: Tensor

    def values(self) -> dict[str, Tensor]:
        """The queries' values, as `retrieval_per_query` describes them."""
        relevant, rank, sizes = self.relevant, self.rank, self.offsets.diff()
        place = counted(sizes) + 1  # m of each match
        hit = (rank <= relevant.repeat_interleave(sizes)).double()
        precision = place.double().div_(rank).mul_(hit)

        query = torch.searchsorted(self.offsets, self.first, right=True) - 1
        groups = ties.TieGroups(
            self.right, self.wrong, rank[self.first] - 1, place[self.first] - 1, relevant[query]
        )
        group, pair = spread(self.first, self.right)
        hit[pair], precision[pair] = groups.hits()[group], groups.precision()[group]

        hits, total = (
            torch.segment_reduce(values, "sum", offsets=self.offsets, initial=0.0)
            for values in (hit, precision)
        )
        marp = total / hits.clamp_min(1)
        cut = groups.cut.nonzero().squeeze(1)
        before = total[query[cut]] - (self.right * groups.precision())[cut]
        marp[query[cut]] = groups[cut].precision_over_hits(before.clamp_min(0))

        searchable = relevant > 0
        mrr = searchable / (1 + self.closer).double()
        chance = self.tied.nonzero().squeeze(1)
        mrr[chance] = ties.reciprocal_rank(
            self.closer[chance], self.tied_matches[chance], self.tied[chance]
        )
        undecided = (self.tied > 0).long()
        undecided[query[groups.inside > 0]] = 1
        counts = relevant, self.closer, self.tied, self.tied_matches, undecided
        scores = hits / relevant.clamp_min(1), total / relevant.clamp_min(1), marp, mrr
        return dict(zip(COUNTS + SCORES, counts + scores, strict=True))
