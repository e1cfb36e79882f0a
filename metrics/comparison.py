"""How sure a number is: bootstrap over classes, seeds of one configuration, single classes.

Every retrieval metric is a ratio of sums over the queries, Σ_q w_q·v_q / Σ_q w_q·c_q, where v is
the query's value, c says whether the query counts, and w is how often its class was drawn: 1 for
the metric itself, the resample's counts for a bootstrap replicate (Efron, 1979). Where no query
counts, the metric is undefined: NaN, whether for all queries, a replicate, a class or a mean over
seeds. Intervals and tests leave out undefined replicates.

Whole classes are drawn, each with all its queries, because queries of one class tend to be found or
missed together: drawn one by one, as if they were independent, they give intervals that are too
narrow. An interval takes the classes as a sample and the network as given. How much another seed
would change is another question, which only several checkpoints can answer: wherever this project
prints ±, it is half of the 95 % interval of a mean over seeds, by Student's t.

A metric is a share, and near 0 or 1 its replicates vary too little: without a miss they are all 1.
So its interval is Wilson's (Journal of the American Statistical Association 22, 1927): all p under
which the observed metric is likely. It uses Student's t, and the number of independent draws that
would have the metric's variance (as for cluster samples: Korn and Graubard, Survey Methodology 24,
1998):

    |m - p| <= t · √(p (1 - p) / n),   n = m (1 - m) / variance,   or C where replicates are alike

m is the metric, C the classes, t the 97.5 % quantile of Student's t with C - 1 degrees of freedom,
and the variance C / (C - 1) times that of the replicates, which vary less than the metric does over
samples of C classes. If all queries are right, nothing is known about how many images of a class
would be missed together, so each class counts as one draw.

A difference is no share. The ends of its interval are percentiles of its replicates, chosen so that
they give Student's interval of a mean if replicates are normal (Hesterberg's expanded percentiles,
The American Statistician 69, 2015). For the tail probability α, the share of replicates beyond the
lower end is

    Φ(t · √(C / (C - 1))),   t the α-quantile of Student's t with C - 1 degrees of freedom

The p of a paired test follows from the share of replicates beyond 0 by the same formula, so that
test and interval agree. docs/evaluation.md measures how often such intervals contain the truth.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from metrics import recall_at
from metrics.ranks import COUNTS

if TYPE_CHECKING:
    import numpy as np

COVERAGE = 0.95
FEW_CLASSES = 20  # with fewer, statements about other classes are a rough guess
RATES = ("RP", "MAP@R", "mARP")  # means over the queries that have a match
ROUNDING = 1e-9  # replicates that differ by no more are alike
CHUNK = 2**22  # classes drawn at once: 64 MiB with their counts


def few_classes(tests: Iterable[Test]) -> str:
    """A sentence if a test is based on few classes; "" if none is."""
    few = any(test.over == "classes" and test.count < FEW_CLASSES for test in tests)
    return f"With fewer than {FEW_CLASSES} classes that is a rough guess." if few else ""


class Scores(NamedTuple):
    """What each query contributes to each metric; see the file's header."""

    names: tuple[str, ...]
    values: Tensor  # (Q, M) float64
    counted: Tensor  # (Q, M) float64, 0 or 1
    labels: Tensor  # (Q,) the queries' classes

    def means(self) -> dict[str, float]:
        """The metrics, as `metrics.summarise` has them; NaN where no query counts."""
        totals = self.values.sum(0) / self.counted.sum(0)
        return dict(zip(self.names, totals.tolist(), strict=True))

    def rest_on(self) -> list[int]:
        """For each metric, how many classes have a query that counts (M,)."""
        return (self.of_classes()[3] > 0).sum(0).tolist()

    def of_classes(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Classes (C,), their numbers of queries (C,), and sums of values and counts (C, M)."""
        classes, inverse, sizes = self.labels.unique(return_inverse=True, return_counts=True)
        zeros = torch.zeros(len(classes), len(self.names), dtype=torch.float64)
        sums = (zeros.index_add(0, inverse, part) for part in (self.values, self.counted))
        return classes, sizes, *sums


def means_over(scores: Sequence[Scores]) -> dict[str, float]:
    """The metrics, averaged over several networks on the same queries."""
    numbers = [each.means() for each in scores]
    return {name: sum(each[name] for each in numbers) / len(numbers) for name in numbers[0]}


def query_scores(
    per_query: Mapping[str, Tensor], ks: Sequence[int], labels: np.ndarray | Tensor
) -> Scores:
    """The Scores of `metrics.retrieval_per_query`'s result.

    per_query may have other entries too, whose metric is their mean over all queries.
    labels: (Q,) the classes of the queries.
    """
    matched = (per_query["relevant"] > 0).double()
    columns = {f"R@{k}": recall_at(per_query, k) for k in ks}
    columns |= {name: v.double() for name, v in per_query.items() if name not in COUNTS}
    everyone = torch.ones_like(matched)
    counted = [matched if name in RATES else everyone for name in columns]
    parts = torch.stack([*columns.values()], 1), torch.stack(counted, 1)
    return Scores(tuple(columns), *parts, torch.as_tensor(labels).cpu())


# Bootstrap ----------------------------------------------------------------------------------------


def replicates(scores: Sequence[Scores], resamples: int, seed: int) -> list[Tensor]:
    """Each metric on `resamples` random draws of C among the C classes, with replacement.

    scores: of one or several networks on the same queries, for which the same classes are drawn, so
    that replicates can be compared in pairs. Returns (resamples, M) for each network; NaN where no
    query that counts was drawn.

    Raises ValueError: the networks have different queries.
    """
    first = scores[0].labels
    for each in scores[1:]:
        if not torch.equal(each.labels, first):
            raise ValueError(
                "a paired bootstrap needs the same queries in the same order, got "
                f"{sorted({len(s.labels) for s in scores})} of them."
            )
    sums = [each.of_classes()[2:] for each in scores]
    found: list[list[Tensor]] = [[] for _ in scores]
    for weights in class_draws(len(sums[0][0]), resamples, seed):
        for (values, counted), parts in zip(sums, found, strict=True):
            parts.append((weights @ values) / (weights @ counted))
    return [torch.cat(parts) for parts in found]


def class_draws(classes: int, resamples: int, seed: int) -> Iterator[Tensor]:
    """Yield how often each class is drawn, (r, C) float64, for `resamples` draws in total."""
    generator = torch.Generator().manual_seed(seed)
    for rows in torch.arange(resamples).split(max(1, CHUNK // classes)):
        draws = torch.randint(classes, (len(rows), classes), generator=generator)
        weights = torch.zeros(draws.shape, dtype=torch.float64)
        yield weights.scatter_add_(1, draws, weights.new_ones(()).expand(draws.shape))


def share_interval(share: float, values: Tensor, classes: int, alike: int = 0) -> list[float]:
    """The 95 % interval [low, high] of a metric in 0..1; see the file's header.

    [NaN, NaN] where the metric is undefined, no replicate is defined, or there are fewer than two
    classes.

    share: the metric. values: its replicates (resamples,). classes: how many were drawn from.
    alike: how many independent draws to assume if all replicates are alike (0: `classes`).
    """
    from scipy.special import stdtrit

    values = values[~values.isnan()]
    if len(values) == 0 or classes < 2 or math.isnan(share):
        return [math.nan, math.nan]
    binomial = max(0.0, share * (1 - share))
    variance = float(values.var(correction=0)) * classes / (classes - 1)
    draws = binomial / variance if variance > ROUNDING**2 and binomial else alike or classes
    t2 = float(stdtrit(classes - 1, (1 + COVERAGE) / 2)) ** 2
    middle = share + t2 / (2 * draws)
    half = math.sqrt(t2 * (binomial + t2 / (4 * draws)) / draws)
    low, high = ((middle + side) / (1 + t2 / draws) for side in (-half, half))
    return [max(0.0, min(low, share)), min(1.0, max(high, share))]


def interval(values: Tensor, classes: int) -> list[float]:
    """The 95 % interval [low, high] of a difference from its replicates (resamples,).

    See the file's header. Undefined replicates are left out; [NaN, NaN] if none is defined, or
    there are fewer than two classes.

    classes: how many were drawn from.
    """
    from scipy.special import ndtr, stdtrit

    values = values[~values.isnan()]
    if len(values) == 0 or classes < 2:
        return [math.nan, math.nan]
    quantile = stdtrit(classes - 1, (1 - COVERAGE) / 2)
    tail = float(ndtr(quantile * math.sqrt(classes / (classes - 1))))
    ends = torch.tensor([tail, 1 - tail], dtype=values.dtype)
    return values.quantile(ends).tolist()


def _two_sided(share: float, classes: int) -> float:
    """p for a share of replicates beyond 0; `interval` ends at 0 exactly when p is .05."""
    from scipy.special import ndtri, stdtr

    if classes < 2:
        return math.nan
    quantile = ndtri(share) * math.sqrt((classes - 1) / classes)
    return min(1.0, 2 * float(stdtr(classes - 1, quantile)))


class Difference(NamedTuple):
    """B - A, its 95 % interval, and a two-sided p; NaN where the metric is undefined.

    The interval alone is NaN where seeds do not vary, see `_t_test`.
    """

    difference: float
    low: float
    high: float
    p: float


def paired_differences(
    a: Mapping[str, float],
    b: Mapping[str, float],
    a_replicates: Tensor,
    b_replicates: Tensor,
    classes: Sequence[int],
) -> dict[str, Difference]:
    """A paired bootstrap test of each metric, from `replicates` of two networks (or groups).

    p is two-sided, from the share (1 + min(#{B ≤ A}, #{B ≥ A})) / (1 + replicates) beyond 0, see
    the file's header. Replicates in which the metric is undefined are left out.

    a, b: the metrics of the two, named alike, in the order of the columns of their replicates.
    classes: on how many classes each metric is based, see `Scores.rest_on`.
    """
    found = {}
    for column, (name, count) in enumerate(zip(a, classes, strict=True)):
        apart = b_replicates[:, column] - a_replicates[:, column]
        apart = apart[~apart.isnan()]
        fewer = min(int((apart <= 0).sum()), int((apart >= 0).sum()))
        p = _two_sided((1 + fewer) / (1 + len(apart)), count) if len(apart) else math.nan
        found[name] = Difference(b[name] - a[name], *interval(apart, count), p)
    return found


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for their number (Holm, 1979); NaN stays NaN."""
    order = sorted((p, place) for place, p in enumerate(p_values) if not math.isnan(p))
    corrected, highest = list(p_values), 0.0
    for rank, (p, place) in enumerate(order):
        highest = max(highest, min(1.0, p * (len(order) - rank)))
        corrected[place] = highest
    return corrected


def holm_by_metric(tests: Sequence[Mapping[str, Difference]]) -> list[dict[str, float]]:
    """p of each test by metric, each corrected for the number of tests of that metric (`holm`)."""
    corrected: list[dict[str, float]] = [{} for _ in tests]
    for name in dict.fromkeys(name for test in tests for name in test):
        having = [place for place, test in enumerate(tests) if name in test]
        found = holm([tests[place][name].p for place in having])
        for place, p in zip(having, found, strict=True):
            corrected[place][name] = p
    return corrected


@dataclass(frozen=True)
class Test:
    """B less A on one task.

    Attributes:
        over: "seeds", paired t-tests over the `count` seeds that both have, or "classes", a paired
            bootstrap over `count` classes of the means of A and B.
        differences: one per metric, uncorrected. corrected: p of each, for the number of tests.
    """

    a: str
    b: str
    task: str
    over: str
    count: int
    differences: Mapping[str, Difference]
    corrected: Mapping[str, float] = field(default_factory=dict)


def corrected(tests: Sequence[Test], alike: Callable[[Test], object]) -> list[Test]:
    """The tests with p corrected (Holm) for the number of tests that are `alike`, by metric."""
    groups: dict[object, list[int]] = {}
    for place, test in enumerate(tests):
        groups.setdefault(alike(test), []).append(place)
    found = list(tests)
    for places in groups.values():
        p_values = holm_by_metric([tests[place].differences for place in places])
        for place, p in zip(places, p_values, strict=True):
            found[place] = replace(tests[place], corrected=p)
    return found


# Seeds --------------------------------------------------------------------------------------------


def seeds_of_one(configurations: Sequence[Mapping], seeds: Sequence[Any]) -> list[list[int]]:
    """Groups runs that differ only in their seeds: lists of two or more positions.

    If a seed occurs twice in a configuration, only the first run counts: two checkpoints of one
    run, or two runs with one seed, say nothing about how much seeds matter.

    configurations: of each run, what it shares with runs that differ only in the seed; empty for a
    released file, which is in no group. seeds: of each run.
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
    """Mean and sample standard deviation (n - 1) of each number that all of two or more runs have.

    Both are NaN for a metric that is undefined in a run: NaN, or None in numbers from a JSON file.
    """
    shared = [name for name in runs[0] if all(name in run for run in runs)]
    numbers = [[math.nan if run[name] is None else run[name] for name in shared] for run in runs]
    table = torch.tensor(numbers, dtype=torch.float64)
    return (
        dict(zip(shared, table.mean(0).tolist(), strict=True)),
        dict(zip(shared, table.std(0).tolist(), strict=True)),
    )


def half_width(deviation: float, count: int) -> float:
    """Half of the 95 % interval of the mean of `count` values, by Student's t; ± where printed.

    deviation: their sample standard deviation. NaN where there are fewer than two.
    """
    if count < 2:
        return math.nan
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, (1 + COVERAGE) / 2)) * deviation / math.sqrt(count)


def seed_differences(
    a: Mapping[Any, Mapping[str, float]], b: Mapping[Any, Mapping[str, float]]
) -> dict[str, Difference]:
    """Paired t-tests of the metrics of two configurations over the seeds that both have.

    Pairing removes the effect of the draws that two runs with the same seed share.

    a, b: seed → metrics. Returns {} if they share fewer than two seeds.
    """
    shared = [seed for seed in a if seed in b]
    if len(shared) < 2:
        return {}
    found = {}
    for name in (
        name for name in a[shared[0]] if all(name in r[s] for r in (a, b) for s in shared)
    ):
        values = [_number(b[seed][name]) - _number(a[seed][name]) for seed in shared]
        found[name] = _t_test(torch.tensor(values, dtype=torch.float64))
    return found


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _t_test(values: Tensor) -> Difference:
    """Student's t-test of whether the mean of these differences (n,) is 0.

    If all are equal, there is no spread and no interval, and p is that of a sign test, 2 / 2ⁿ. With
    few test images that is not rare: if two methods find 28 or 29 of 30 images, each equally often,
    one in eight studies with two seeds has the same difference of one image for both.
    """
    from scipy.stats import t

    count, mean, deviation = len(values), float(values.mean()), float(values.std())
    if float(values.max() - values.min()) < 1e-9:
        if abs(mean) < 1e-9:
            return Difference(0.0, 0.0, 0.0, 1.0)
        return Difference(mean, math.nan, math.nan, 2.0 ** (1 - count))
    half = half_width(deviation, count)
    p = 2 * float(t.sf(abs(mean) * math.sqrt(count) / deviation, count - 1))
    return Difference(mean, mean - half, mean + half, p)


# Classes ------------------------------------------------------------------------------------------


def by_class(scores: Scores) -> tuple[Tensor, Tensor, Tensor]:
    """The metrics of each class with queries: labels (C,), numbers of queries (C,), and (C, M).

    A metric is NaN if no query of the class counts for it.
    """
    classes, sizes, values, counted = scores.of_classes()
    return classes, sizes, values / counted
