"""The results of a study: means over seeds, tests over seeds and classes, cost, sensitivity."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import torch

from metrics import comparison
from metrics.comparison import Test
from studies import judging
from studies.ledger import Ledger, Trial, run_again
from studies.plan import Entrant, Plan
from utils import damage_in_words

RESAMPLES = 2000
FEWEST = 6
"""The fewest trials for a rank correlation of the metric with an option."""


@dataclass(frozen=True)
class Found:
    """The results of one method.

    Attributes:
        trials: all so far. chosen: the best of them, once all have ended.
        seeds: seed → the metrics of the first task. failures: seed → the reason.
        scores: seed → one row per test class. gained: seed → R@1 of the best epoch less the last,
            of runs that were evaluated more than once.
        ensembles: name → metrics of an ensemble of `together` seeds.
        seconds: seed → training time. left: the numbers of trials and of runs that are left.
    """

    entrant: Entrant
    trials: tuple[Trial, ...]
    chosen: Trial | None
    seeds: Mapping[int, Mapping[str, float]]
    failures: Mapping[int, str]
    scores: Mapping[int, comparison.Scores]
    gained: Mapping[int, float]
    ensembles: Mapping[str, Mapping[str, float]]
    together: int
    seconds: Mapping[int, float]
    left: tuple[int, int] = (0, 0)

    @property
    def name(self) -> str:
        """The method's name."""
        return self.entrant.name

    @cached_property
    def mean(self) -> dict[str, float]:
        """Metrics, averaged over the seeds."""
        return self._over_seeds[0]

    @cached_property
    def deviation(self) -> dict[str, float]:
        """Standard deviations over the seeds; {} with one seed."""
        return self._over_seeds[1]

    @cached_property
    def _over_seeds(self) -> tuple[dict[str, float], dict[str, float]]:
        runs = list(self.seeds.values())
        if len(runs) < 2:
            return (dict(runs[0]) if runs else {}), {}
        return comparison.mean_and_deviation(runs)

    def half(self, metric: str) -> float:
        """Half of the 95 % interval of a mean over the seeds; NaN with one seed."""
        return comparison.half_width(self.deviation.get(metric, math.nan), len(self.seeds))

    @property
    def all_trials_failed(self) -> bool:
        """Whether no runs are left because no trial succeeded."""
        return self.chosen is None and not any(self.left)

    @property
    def search_seconds(self) -> float:
        """Training time of its trials."""
        return sum(trial.seconds for trial in self.trials)

    @property
    def bonus(self) -> tuple[float, float]:
        """R@1 of the best epoch less that of the last: mean over the seeds, and ±; or NaN."""
        values = torch.tensor(list(self.gained.values()), dtype=torch.float64)
        if len(values) < 2:
            return (float(values.mean()) if len(values) else math.nan), math.nan
        return float(values.mean()), comparison.half_width(float(values.std()), len(values))

    @property
    def sensitivity(self) -> list[Sensitivity]:
        """How the metric of the trials depends on each searched option."""
        done = [trial for trial in self.trials if trial.reached is not None]
        return [
            _sensitivity(one.name, one.title, done) for one in self.entrant.space if not one.choices
        ]


@dataclass(frozen=True)
class Sensitivity:
    """Rank correlation of an option with the metric, over the `count` complete trials.

    `correlation` and p are NaN with fewer than `FEWEST`, or if the option did not vary.
    """

    title: str
    correlation: float
    p: float
    count: int


def _sensitivity(name: str, title: str, trials: Sequence[Trial]) -> Sensitivity:
    from scipy.stats import spearmanr

    x = [trial.values[name] for trial in trials]
    y = [trial.reached for trial in trials]
    if len(trials) < FEWEST or len(set(x)) < 2 or len(set(y)) < 2:
        return Sensitivity(title, math.nan, math.nan, len(trials))
    found = spearmanr(x, y)
    return Sensitivity(title, float(found.statistic), float(found.pvalue), len(trials))


@dataclass(frozen=True)
class Results:
    """The results of a study so far; methods are in the order of the plan."""

    plan: Plan
    methods: tuple[Found, ...]

    @property
    def with_runs(self) -> list[Found]:
        """The methods that have been judged on the test classes."""
        return [found for found in self.methods if found.seeds]

    @property
    def ranked(self) -> list[Found]:
        """Those of `with_runs` whose mean of the study's metric is defined, the best first."""
        means = {one.name: one.mean.get(self.plan.metric, math.nan) for one in self.with_runs}
        known = [one for one in self.with_runs if not math.isnan(means[one.name])]
        return sorted(known, key=lambda one: -means[one.name])

    @cached_property
    def tests(self) -> list[Test]:
        """Each method against the first one that has runs: over seeds, and over classes."""
        if len(self.with_runs) < 2:
            return []
        first, *others = self.with_runs
        made = [_over_seeds(first, other) for other in others]
        made += _over_classes(first, others)
        return _corrected(made)

    @cached_property
    def asked(self) -> list[Test]:
        """The pairs in the plan's `compare`: second less first, over seeds and over classes."""
        known = {found.name: found for found in self.with_runs}
        pairs = [(known[a], known[b]) for a, b in self.plan.compare if {a, b} <= known.keys()]
        made = [_over_seeds(a, b) for a, b in pairs]
        for a, b in pairs:
            made += _over_classes(a, [b])
        return _corrected(made)

    @cached_property
    def pairs(self) -> list[Test]:
        """Each method against each that ranks below it, over the seeds."""
        pairs = combinations(self.ranked, 2)
        return _corrected(_over_seeds(below, above) for above, below in pairs)

    @cached_property
    def best_against(self) -> list[Test]:
        """The method with the best mean against each other one, over the seeds.

        The best one was selected by the same numbers. So p is corrected for all pairs of methods,
        not only for these.
        """
        return [test for test in self.pairs if test.b == self.ranked[0].name]


def _over_seeds(a: Found, b: Found) -> Test | None:
    found = comparison.seed_differences(a.seeds, b.seeds)
    shared = len(a.seeds.keys() & b.seeds.keys())
    return Test(a.name, b.name, "", "seeds", shared, found) if found else None


def _over_classes(first: Found, others: Sequence[Found]) -> list[Test]:
    """Paired bootstraps over classes, with the same draws for all, and means over the seeds."""
    able = [one for one in (first, *others) if one.scores]
    if first not in able or len(able) < 2:
        return []
    scores = [score for one in able for score in one.scores.values()]
    if len({tuple(score.labels.tolist()) for score in scores}) > 1:
        return []  # some were judged on fewer images, because others could not be read
    drawn = iter(comparison.replicates(scores, RESAMPLES, seed=0))
    replicates = {one.name: _mean([next(drawn) for _ in one.scores]) for one in able}
    means = {one.name: comparison.means_over(list(one.scores.values())) for one in able}
    classes, rest_on, a = len(scores[0].labels), scores[0].rest_on(), first.name
    found = []
    for b in (other.name for other in able[1:]):
        pairs = means[a], means[b], replicates[a], replicates[b]
        differences = comparison.paired_differences(*pairs, rest_on)
        found.append(Test(a, b, "", "classes", classes, differences))
    return found


def _mean(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    return sum(parts[1:], parts[0]) / len(parts)


def _corrected(tests: Iterable[Test | None]) -> list[Test]:
    """The tests that are not None, with p corrected among those over seeds, and over classes."""
    return comparison.corrected([test for test in tests if test], lambda test: test.over)


def collect(ledger: Ledger) -> Results:
    """Reads the results so far."""
    return Results(ledger.plan, tuple(_found(ledger, one) for one in ledger.plan.entrants))


def _found(ledger: Ledger, entrant: Entrant) -> Found:
    numbers: dict[int, dict[str, float]] = {}
    failures: dict[int, str] = {}
    scores, gained, seconds = {}, {}, {}
    for seed in range(1, ledger.plan.seeds + 1):
        result = ledger.result(entrant, f"seed{seed}")
        if result is None or "values" not in result:
            continue
        if "error" in result:
            failures[seed] = result["error"]
            continue
        file = ledger.result_file(entrant, f"seed{seed}")
        with damage_in_words(str(file), run_again(file)):
            first = next(iter(result["results"].values()))
            numbers[seed] = {name: math.nan if v is None else v for name, v in first.items()}
            if result["evaluations"] > 1:
                gained[seed] = result["best R@1"] - result["last R@1"]
            seconds[seed] = result["seconds"]
        scores[seed] = judging.load(file.with_suffix(".npz")).scores
    together, ensembles = _together(ledger, entrant)
    return Found(
        entrant,
        tuple(ledger.trials(entrant)),
        ledger.chosen(entrant),
        numbers,
        failures,
        scores,
        gained,
        ensembles,
        together,
        seconds,
        ledger.left(entrant),
    )


def _together(ledger: Ledger, entrant: Entrant) -> tuple[int, Mapping[str, Mapping[str, float]]]:
    """The number of seeds in the latest ensembles, and the metrics of these.

    Embeddings are deleted after that, so seeds that are added later are not included.
    """
    for seeds in range(ledger.plan.seeds, 1, -1):
        found = ledger.result(entrant, f"together{seeds}") or {}
        if found.get("ensembles"):
            return found.get("seeds", seeds), found["ensembles"]
    return 0, {}
