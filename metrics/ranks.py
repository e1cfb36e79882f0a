"""From the ranks of a query's matches to its metrics."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from metrics import ties
from metrics.ragged import counted, spread

COUNTS = ("relevant", "rank", "tied", "tied_matches", "undecided")
SCORES = ("RP", "MAP@R", "mARP", "MRR")
"""What `retrieval_per_query` gives each query: int64, which are no metrics, and float64."""


@dataclass(frozen=True)
class Ranks:
    """Where n queries find their matches: CPU tensors, int64.

    The P matches that are listed stand query by query, nearest first: all that may be among the
    query's R nearest, each with those that are exactly as close. Of the T groups of equally close
    images in which there are listed matches and images of other classes (see ties.py) each is named
    by its first match.

    Attributes:
        relevant: (n,) R, the matches that there are.
        offsets: (n + 1,) where each query's matches begin among the listed ones.
        rank: (P,) m + c_m, where c_m images of other classes are strictly closer than match m.
        closer: (n,) c_1, the size of the gallery where R = 0.
        tied: (n,) images of other classes exactly as close as the nearest match.
        tied_matches: (n,) matches exactly as close as the nearest one, itself included.
        first: (T,) the pair that is a group's first match.
        right: (T,) the group's matches. wrong: (T,) its images of other classes.
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
