"""How sure is a number: bootstrap over queries, seeds of one configuration, single classes.

Every retrieval metric is a ratio of sums over the queries, Σ_q w_q·v_q / Σ_q w_q·c_q, where v is
the query's value, c says whether the query counts, and w is how often it was drawn: 1 for the
metric itself, the resample's counts for a bootstrap replicate (Efron, 1979). Where no query counts
the metric is undefined: NaN, in the metric itself, a replicate, a class or a mean over seeds. What
is drawn from replicates leaves out those that are undefined.

An interval takes the queries as a sample and the network as given. What another seed of the
training would give is another question, which only several checkpoints can answer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metrics import recall_at

COVERAGE = 0.95
RATES = ("RP", "MAP@R", "mARP")  # means over the queries that have a match
# What `retrieval_per_query` gives that is no metric.
COUNTS = ("relevant", "rank", "tied", "tied_matches", "undecided")
CHUNK = 2**22  # draws made at once: 64 MiB with the counts they become


class Scores(NamedTuple):
    """What each query contributes to each metric; see the file's header."""

    names: tuple[str, ...]
    values: Tensor  # (Q, M) float64
    counted: Tensor  # (Q, M) float64, 0 or 1

    def means(self) -> dict[str, float]:
        """The metrics, as `metrics.summarise` has them; NaN where no query counts."""
        totals = self.values.sum(0) / self.counted.sum(0)
        return dict(zip(self.names, totals.tolist(), strict=True))


def query_scores(per_query: Mapping[str, Tensor], ks: Sequence[int]) -> Scores:
    """From `metrics.retrieval_per_query`'s answer, to which names of plain means may be added."""
    matched = (per_query["relevant"] > 0).double()
    columns = {f"R@{k}": recall_at(per_query, k) for k in ks}
    columns |= {name: v.double() for name, v in per_query.items() if name not in COUNTS}
    everyone = torch.ones_like(matched)
    counted = [matched if name in RATES else everyone for name in columns]
    return Scores(tuple(columns), torch.stack([*columns.values()], 1), torch.stack(counted, 1))


# Bootstrap ----------------------------------------------------------------------------------------


def replicates(scores: Sequence[Scores], resamples: int, seed: int) -> list[Tensor]:
    """Each metric on `resamples` random draws of Q among the Q queries, with replacement.

    scores: of one or several networks on the same queries; they see the same draws, so that
    replicates can be compared in pairs. Returns a (resamples, M) for each; NaN where no query that
    counts was drawn.

    Raises ValueError: the networks have different numbers of queries.
    """
    sizes = {len(each.values) for each in scores}
    if len(sizes) != 1:
        raise ValueError(f"a paired bootstrap needs the same queries, got {sorted(sizes)} of them.")
    (size,) = sizes
    generator = torch.Generator().manual_seed(seed)
    found: list[list[Tensor]] = [[] for _ in scores]
    one = torch.ones((), dtype=torch.float64)
    for rows in torch.arange(resamples).split(max(1, CHUNK // size)):
        draws = torch.randint(size, (len(rows), size), generator=generator)
        weights = torch.zeros(draws.shape, dtype=torch.float64)
        weights.scatter_add_(1, draws, one.expand(draws.shape))
        for each, parts in zip(scores, found, strict=True):
            parts.append((weights @ each.values) / (weights @ each.counted))
    return [torch.cat(parts) for parts in found]


def interval(values: Tensor) -> list[float]:
    """The middle 95 % of replicates (resamples,): the percentile interval [low, high].

    Over those that are defined; [NaN, NaN] where none is.
    """
    values = values[~values.isnan()]
    if len(values) == 0:
        return [math.nan, math.nan]
    tail = (1 - COVERAGE) / 2
    ends = torch.tensor([tail, 1 - tail], dtype=values.dtype)
    return values.quantile(ends).tolist()


class Difference(NamedTuple):
    """Is B better than A: B - A, its 95 % interval, and p; NaN where the metric is undefined."""

    difference: float
    low: float
    high: float
    p: float


def paired_differences(
    a: Scores, b: Scores, a_replicates: Tensor, b_replicates: Tensor
) -> dict[str, Difference]:
    """A paired bootstrap test of each metric that both have, from `replicates` of the two.

    p = (1 + #{replicates in which B is not better than A}) / (1 + replicates): one-sided, and small
    when B is better. A p above .975 says as much for A. Replicates in which the metric is undefined
    are left out.
    """
    means_a, means_b = a.means(), b.means()
    found = {}
    for name in (name for name in a.names if name in b.names):
        apart = b_replicates[:, b.names.index(name)] - a_replicates[:, a.names.index(name)]
        apart = apart[~apart.isnan()]
        p = (1 + int((apart <= 0).sum())) / (1 + len(apart)) if len(apart) else math.nan
        found[name] = Difference(means_b[name] - means_a[name], *interval(apart), p)
    return found


# Seeds --------------------------------------------------------------------------------------------


def seeds_of_one(configurations: Sequence[Mapping], seeds: Sequence[Any]) -> list[list[int]]:
    """Which of several runs are one configuration with other seeds: lists of two positions or more.

    A seed that comes again in a configuration is left out: two checkpoints of one run, or two runs
    with one seed, say nothing of how much seeds matter. The first of them stands for it.

    configurations: what each run shares with those that differ in the seed alone; a run without any
    (a released file) is alone. seeds: each run's.
    """
    groups: dict[str, dict[Any, int]] = {}
    for position, (configuration, seed) in enumerate(zip(configurations, seeds, strict=True)):
        if configuration:
            key = json.dumps(configuration, sort_keys=True, default=str)
            groups.setdefault(key, {}).setdefault(seed, position)
    return [list(group.values()) for group in groups.values() if len(group) > 1]


def mean_and_deviation(
    runs: Sequence[Mapping[str, float]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Mean and sample standard deviation (n - 1) of each number that all runs have; two or more.

    Both are NaN for a metric that is undefined in one of the runs: NaN, or None where the numbers
    come from a JSON file.
    """
    shared = [name for name in runs[0] if all(name in run for run in runs)]
    numbers = [[math.nan if run[name] is None else run[name] for name in shared] for run in runs]
    table = torch.tensor(numbers, dtype=torch.float64)
    return (
        dict(zip(shared, table.mean(0).tolist(), strict=True)),
        dict(zip(shared, table.std(0).tolist(), strict=True)),
    )


# Classes ------------------------------------------------------------------------------------------


def by_class(scores: Scores, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The metrics of each class that has a query: labels (C,), queries of each (C,), and (C, M).

    A metric that no query of the class counts in is NaN.
    """
    classes, inverse, sizes = labels.unique(return_inverse=True, return_counts=True)
    zeros = torch.zeros(len(classes), len(scores.names), dtype=torch.float64)
    values = zeros.index_add(0, inverse, scores.values)
    return classes, sizes, values / zeros.index_add(0, inverse, scores.counted)
