"""Verification metrics over all pairs of a task's images, and thresholds recommended by them.

The rule for any two images:

same        from the lowest cosine that at most 1 in 1,000 different pairs reach
different   below the highest cosine that at most 5 in 100 same pairs are below

The rule for results of a query in an index (`Thresholds.in_index`):

same        from the lowest cosine that the nearest image reaches for at most 5 in 100 queries that
            have no image of their class in the index
different   below the highest cosine that the nearest image of the query's class is below for at
            most 5 in 100 queries

If there are too few pairs or queries to measure such a rate, the lowest that can be measured is
used instead: at least 10 of them must be counted. Above 1 in 5 nothing is recommended. If the two
thresholds cross, which leaves nothing unsure, both become the cosine half way between.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

import metrics
from evaluation.tasks import Task
from evaluation.thresholds import WORST, Found, Rate, Thresholds
from metrics import resampling
from metrics.comparison import share_interval
from metrics.verification import (
    PairCounts,
    allowed,
    carries,
    count_pairs,
    edge,
    greatest_missing,
    least_accepting,
    lowest_rate,
)

FALSE_SAME = 1e-3  # share of different pairs that are called "same"
MISSED = 0.05  # share of same pairs, or of right results of a search, that are called "different"
SEARCHED = [5e-1, 3e-1, 2e-1, 1e-1, 5e-2, 3e-2, 2e-2, 1e-2, 5e-3, 3e-3, 2e-3, 1e-3]
"""The error rates at which a search is measured: shares of queries without a right answer that find
an image."""


class Verification(NamedTuple):
    """The metrics, and the thresholds; None if there are too few pairs to recommend any."""

    numbers: dict[str, float]
    thresholds: Thresholds | None


def verify(
    task: Task,
    embeddings: Tensor,
    gallery: Tensor | None,
    *,
    seed: int,
    network: str,
    progress: metrics.Progress | None = None,
    share: metrics.Share = metrics.ALONE,
) -> Verification:
    """Compares all pairs of a task's images.

    Args:
        embeddings: (N, d) of the queries. gallery: (G, d), if the task has one.
        seed: for the bootstrap. network: the fingerprint of the network.

    Raises:
        ValueError: the embeddings are not finite.
    """
    labels = None if task.gallery is None else task.gallery.labels
    pairs = count_pairs(
        embeddings, task.queries.labels, gallery, labels, progress=progress, share=share
    )
    found = recommended(pairs, seed, title=task.title, network=network)
    return Verification(pairs.curve().numbers(), found)


def recommended(
    pairs: PairCounts, seed: int = 1, *, title: str = "", network: str = ""
) -> Thresholds | None:
    """The thresholds that the rule of this file recommends; None if there are too few pairs."""
    same_pairs, different_pairs = int(pairs.same.sum()), int(pairs.different.sum())
    wrong = lowest_rate(different_pairs, FALSE_SAME, WORST)
    missed = lowest_rate(same_pairs, MISSED, WORST)
    found = searched(pairs, seed)
    if wrong is None or missed is None or found is None:
        return None
    same = least_accepting(pairs.different, allowed(different_pairs, wrong))
    different = greatest_missing(pairs.same, allowed(same_pairs, missed))
    if same < different:
        same = different = (same + different + 1) // 2  # >= `same`: lower pairs are not listed
    by_class, every = pairs.same_by_class(same, different), pairs.of_one_class
    above, below = pairs.different[same:].sum(), pairs.different[:different].sum()
    confused, count = float(above) / different_pairs, len(pairs.classes)
    drawn = resampling.rate_of_different_pairs(pairs, same, seed)
    return Thresholds(
        edge(same),
        edge(different),
        false_same=Rate(
            confused, *share_interval(confused, drawn, count, alike=count * (count - 1) // 2)
        ),
        false_different=_rate(every - by_class[1], every, seed),
        found_same=_rate(by_class[0], every, seed),
        found_different=Rate(float(below) / different_pairs),
        title=title,
        images=len(pairs.queries) + (0 if pairs.symmetric else len(pairs.gallery)),
        classes=len(pairs.classes),
        same_pairs=same_pairs,
        different_pairs=different_pairs,
        network=network,
        found=found,
    )


def in_words(title: str, numbers: Mapping[str, float], found: Thresholds | None) -> str:
    """The results of verification in a few lines."""
    if math.isnan(numbers["EER"]):
        return f"{title}, pairs of images: all the same, or all different; nothing to tell apart"
    curve = f"EER {numbers['EER']:.4f}, AUC {numbers['AUC']:.4f}"
    if found is None:
        return f"{title}, pairs of images: {curve}; too few to recommend a threshold"
    searching = found.in_index(0)
    pairs = f"{found.same_pairs:,} same and {found.different_pairs:,} different pairs"
    return "\n".join(
        [
            f"{title}, {pairs}: {curve}",
            "any two images, recommended thresholds [95 % over classes]:",
            *_rule(found, "different pairs", "same pairs"),
            f"a query and what it finds among {searching.index_size:,} images:",
            *_rule(searching, "queries without a match", "queries with one"),
            *([found.doubt] if found.doubt else []),
        ]
    )


def _rule(found: Thresholds, strangers: str, kin: str) -> list[str]:
    """Thresholds and their errors."""
    rates = (found.false_same, found.found_same, found.false_different)
    wrong, right, missed = (rate.percent(" [{}, {}]") for rate in rates)
    return [
        f"  same from       {found.same:6.3f}  wrong for {wrong} of {strangers}",
        f"  {'':15} {'':6}  right for {right} of {kin}",
        f"  different below {found.different:6.3f}  wrong for {missed} of {kin}",
    ]


def _rate(counted: Tensor, every: Tensor, seed: int) -> Rate:
    """The share of the classes' counts (C,), and its interval."""
    drawn = resampling.rate_of_classes(counted, every, seed)
    share = float(counted.double().sum() / every.double().sum())
    return Rate(share, *share_interval(share, drawn, int((every > 0).sum())))


def searched(pairs: PairCounts, seed: int = 1) -> Found | None:
    """What queries find with and without their class in the gallery; None if they are too few.

    Args:
        seed: for the bootstrap over the queries' classes; the gallery stays the same.
    """
    wrong = pairs.nearest_different[pairs.nearest_different >= 0].long()
    right = pairs.nearest_same[pairs.nearest_same >= 0].long()
    missed = lowest_rate(len(right), MISSED, WORST)
    if missed is None or not carries(len(wrong), WORST):
        return None
    different = int(right.sort().values[allowed(len(right), missed)])
    owner = pairs.query_class[pairs.nearest_different >= 0]
    falling = wrong.sort(descending=True).values
    every = owner.bincount(minlength=len(pairs.classes))
    entries, shares = [], []
    for rate in (rate for rate in SEARCHED if carries(len(wrong), rate)):
        place = int(falling[allowed(len(wrong), rate)]) + 1
        hits = owner[wrong >= place].bincount(minlength=len(pairs.classes))
        share = _rate(hits, every, seed)
        entries.append((share.expected, edge(place), share.low, share.high))
        shares.append(float((right >= place).double().mean()))
    low = float((right < different).double().mean())
    others = len(pairs.gallery) - float(pairs.sizes[1][owner].double().mean())
    return Found(round(others), len(wrong), tuple(entries), edge(different), low, tuple(shares))
