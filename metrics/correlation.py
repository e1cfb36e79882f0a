"""Rank correlations of two quantities over classes, partial ones too, with intervals."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

NORMAL = 1.959964  # 97.5 % quantile of the normal distribution
FEWEST = 4  # pairs: with fewer there is no interval


class Correlation(NamedTuple):
    """A rank correlation with its 95 % interval, over `count` pairs."""

    value: float
    low: float
    high: float
    count: int

    @property
    def is_sure(self) -> bool:
        """Whether the interval excludes 0."""
        return self.low > 0 or self.high < 0


def rank_correlation(x: np.ndarray, y: np.ndarray, *given: np.ndarray) -> Correlation:
    """Spearman's rank correlation of x (n,) and y (n,), with those of `given` (n,) held fixed.

    Held fixed means that the ranks of `given` are regressed out of both, linearly. The interval is
    Fisher's, z ± 1.96 √((1 + r²/2) / (n - 3 - k)), with k given quantities (Bonett and Wright,
    Psychometrika 65, 2000).

    - 0 if one of the two is constant, or determined by `given`.
    - For the interval, 1 and -1, which a few pairs reach by chance, count as half a step less; a
      step is the smallest change of the value for n pairs without ties, 12 / (n (n² - 1)).
    - With fewer than 4 + k pairs the interval is -1 to 1.
    """
    value = _correlation(*_residuals(_ranks(x), _ranks(y), [_ranks(z) for z in given]))
    freedom = len(x) - 3 - len(given)
    if freedom < FEWEST - 3:
        return Correlation(value, -1.0, 1.0, len(x))
    most = 1 - 6 / (len(x) * (len(x) ** 2 - 1))
    r = min(max(value, -most), most)
    z, half = math.atanh(r), NORMAL * math.sqrt((1 + r**2 / 2) / freedom)
    low, high = math.tanh(z - half), math.tanh(z + half)
    return Correlation(value, min(low, value), max(high, value), len(x))


def _ranks(x: np.ndarray) -> np.ndarray:
    """Ranks (n,) from 1, means among equals."""
    from scipy.stats import rankdata

    return rankdata(np.asarray(x, dtype=float))


def _residuals(
    x: np.ndarray, y: np.ndarray, given: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The residuals of x and y after a linear regression on `given`."""
    known = np.stack([np.ones(len(x)), *given], axis=1)
    both = np.stack([x, y], axis=1)
    left = both - known @ np.linalg.lstsq(known, both, rcond=None)[0]
    left[:, np.abs(left).max(axis=0) < 1e-9 * len(x)] = 0.0  # rounding is no variation
    return left[:, 0], left[:, 1]


def _correlation(x: np.ndarray, y: np.ndarray) -> float:
    spread = math.sqrt(float((x @ x) * (y @ y)))
    return float(x @ y) / spread if spread > 0 else 0.0


def pairwise_rank_correlation(
    first: np.ndarray, second: np.ndarray, seed: int = 1, resamples: int = 200
) -> Correlation:
    """Spearman's rank correlation of two symmetric tables (n, n) over their pairs of rows.

    Pairs share rows, so the interval is a bootstrap over the n rows (`count` is n). If a row is
    drawn twice, the pair of it with itself is left out.
    """
    rng = np.random.default_rng(seed)
    count = len(first)

    def over(rows: np.ndarray) -> float:
        i, j = np.triu_indices(len(rows), k=1)
        a, b = rows[i], rows[j]
        a, b = a[a != b], b[a != b]
        if len(a) < 2:
            return 0.0
        return rank_correlation(first[a, b], second[a, b]).value

    drawn = [over(rng.integers(0, count, count)) for _ in range(resamples)]
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Correlation(over(np.arange(count)), float(low), float(high), count)
