"""Rank correlations, partial ones, and their intervals."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from scipy import stats

from metrics.correlation import pairwise_rank_correlation, rank_correlation

RNG = np.random.default_rng(0)
X, Z = RNG.normal(size=(2, 80))
Y = X + Z + RNG.normal(size=80)


def test_it_is_spearmans():
    for x, y in ((X, Y), (X, -(X**3)), (np.round(X), np.round(Y))):  # ties included
        assert rank_correlation(x, y).value == pytest.approx(stats.spearmanr(x, y).statistic)
    assert rank_correlation(X, np.ones(80)).value == 0


def test_what_is_held_fixed_is_taken_out():
    r_xy, r_xz, r_yz = (stats.spearmanr(a, b).statistic for a, b in ((X, Y), (X, Z), (Y, Z)))
    expected = (r_xy - r_xz * r_yz) / np.sqrt((1 - r_xz**2) * (1 - r_yz**2))
    assert rank_correlation(X, Y, Z).value == pytest.approx(expected)
    assert rank_correlation(X, Y, X).value == 0  # told by it altogether


def test_the_interval_holds_the_truth_about_nineteen_times_in_twenty():
    rng = np.random.default_rng(1)
    truth = 6 / np.pi * np.arcsin(0.6 / 2)  # Spearman's of two normals that correlate by .6
    inside = 0
    for _ in range(300):
        x = rng.normal(size=60)
        found = rank_correlation(x, 0.6 * x + 0.8 * rng.normal(size=60))
        inside += found.low <= truth <= found.high
    assert 0.91 <= inside / 300 <= 0.99


def test_few_pairs_say_nothing():
    found = rank_correlation(np.arange(3.0), np.arange(3.0))
    assert (found.low, found.high, found.count) == (-1, 1, 3) and not found.is_sure
    assert rank_correlation(np.arange(9.0), np.arange(9.0)).is_sure


@pytest.mark.parametrize("count", [4, 5, 6])
def test_few_pairs_in_order_by_chance_are_seldom_sure(count):
    """Over all orders, of which 8 % of those of four pairs are perfect."""
    orders = itertools.permutations(range(count))
    found = [rank_correlation(np.arange(count), np.array(order)) for order in orders]
    assert np.mean([each.is_sure for each in found]) <= 0.06
    best = max(found)
    assert best.value == pytest.approx(1) and best.low < 0.8
    assert all(each.low <= each.value <= each.high for each in found)


def test_tables_are_compared_pair_by_pair_and_drawn_row_by_row():
    points = RNG.normal(size=(30, 4))
    near = points @ points.T
    noisy = (points + 0.5 * RNG.normal(size=points.shape)) @ points.T
    noisy = noisy + noisy.T
    i, j = np.triu_indices(30, 1)
    found = pairwise_rank_correlation(near, noisy)
    assert found.value == pytest.approx(stats.spearmanr(near[i, j], noisy[i, j]).statistic)
    assert found.low < found.value < found.high and found.count == 30
    other = RNG.normal(size=(30, 30))
    assert not pairwise_rank_correlation(near, other + other.T).is_sure
