"""Metrics and k-means: fixtures, hand examples, a plain float64 oracle, and published peers."""

from __future__ import annotations

import functools
import itertools
import math
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import metrics
from metrics import (
    blocks,
    by_construction,
    clustering,
    clustering_metrics,
    comparison,
    nmi_f1,
    one_per_class_gallery,
    products,
    retrieval,
    retrieval_metrics,
    retrieval_per_query,
    rows,
    summarise,
    ties,
)
from metrics.clustering import kmeans
from metrics.selection import count_true, largest
from metrics.verification import count_pairs

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"


def clusters_of(classes, dimension, count, noise, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    x = rng.normal(size=(classes, dimension))[labels] + noise * rng.normal(size=(count, dimension))
    return x.astype(np.float32), labels


def closeness(x, gallery):
    """Integers (Q, G) that compare as the cosines of each row do, in exact arithmetic.

    x·y·|x·y| / ‖y‖² to 700 bits behind the point, the numbers being integers after scaling.
    """
    numbers = [[[Fraction(v) for v in row] for row in part.tolist()] for part in (x, gallery)]
    scale = max(v.denominator for part in numbers for row in part for v in row)
    x, y = (np.array([[int(v * scale) for v in row] for row in part]) for part in numbers)
    x, y = x.astype(object), y.astype(object)
    products, squares = x @ y.T, (y * y).sum(axis=1)
    squares[squares == 0] = 1
    return ((products * np.abs(products)) << 700) // squares


def mean_over_orders(groups, size, ks=()):
    """What a query with `size` matches gets, from its gallery in groups (right, wrong) of tied
    images, nearest first: image by image, the probability of each number of right ones so far."""
    probability, total = np.zeros(size + 2), np.zeros(size + 2)  # total: of precisions, and so far
    probability[0] = 1
    found = {f"R@{k}": 1.0 for k in ks} | {"MRR": 0.0}
    position, before = 0, np.arange(size + 2)
    for right, wrong in groups:
        if probability[0] == 0 and position >= max(size, *ks, 1):
            break
        first = position
        closer = probability.nonzero()[0][0]
        for left in range(right + wrong, 0, -1):
            position += 1
            is_right = np.clip(right - (before - closer), 0, left) / left
            found["MRR"] += probability[0] * is_right[0] / position
            step, gain = probability * is_right, total * is_right
            gain += step * (before + 1) / position
            probability, total = probability - step, total * (1 - is_right)
            probability[1:] += step[:-1]
            total[1:] += gain[:-1]
            if position == size:
                found["RP"] = (probability * before).sum() / size
                found["MAP@R"] = total.sum() / size
                found["mARP"] = (total / np.maximum(before, 1)).sum()
            if position in ks:
                found[f"R@{position}"] = 1 - probability[0]
        if right and wrong and (first < size or closer == 0):
            found["undecided"] = 1
    return found


def oracle(x, labels, gallery=None, gallery_labels=None, exclude=None, ks=()):
    """Each query's values in exact order, one query at a time; R@K come along."""
    leave_one_out = gallery is None
    gallery, gallery_labels = (x, labels) if leave_one_out else (gallery, gallery_labels)
    groups = exclude if isinstance(exclude, tuple) else (exclude, exclude)
    names = ("relevant", "rank", "tied", "tied_matches", "undecided")
    names += ("RP", "MAP@R", "mARP", "MRR", *(f"R@{k}" for k in ks))
    rows = []
    for i, row in enumerate(closeness(x, gallery)):
        seen = np.ones(len(gallery), bool)
        if leave_one_out:
            seen[i] = False
        if exclude is not None:
            seen &= groups[1] != groups[0][i]
        right, wrong = (
            Counter(row[seen & chosen].tolist())
            for chosen in (gallery_labels == labels[i], gallery_labels != labels[i])
        )
        size = right.total()
        if size == 0:
            rows.append({"rank": len(gallery)})
            continue
        nearest = max(right)
        tied = [(right[value], wrong[value]) for value in sorted(right | wrong, reverse=True)]
        found = mean_over_orders(tied, size, ks)
        found |= {"relevant": size, "tied": wrong[nearest], "tied_matches": right[nearest]}
        found["rank"] = sum(count for value, count in wrong.items() if value > nearest)
        rows.append(found)
    return {name: np.array([float(row.get(name, 0)) for row in rows]) for name in names}


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_allclose(found[name].numpy(), values, rtol=0, atol=1e-12, err_msg=name)


# Fixtures and hand examples ----------------------------------------------------------------------


def test_fixture_same_set():
    data = np.load(FIXTURES / "metrics_small_0.npz")
    found = retrieval_metrics(data["embeddings"], data["labels"], ks=data["ks"].tolist())
    for k, recall in zip(data["ks"], data["recall"], strict=True):
        assert found[f"R@{k}"] == pytest.approx(recall, abs=1e-6)
    assert found["RP"] == pytest.approx(float(data["r_precision"]), abs=1e-6)
    assert found["MAP@R"] == pytest.approx(float(data["map_at_r"]), abs=1e-6)
    assert found["mARP"] == pytest.approx(float(data["marp_over_hits"]), abs=1e-6)
    agreement = nmi_f1(data["labels"], data["cluster_labels"])
    assert agreement["NMI"] == pytest.approx(float(data["nmi_arithmetic"]), abs=1e-6)
    assert agreement["F1"] == pytest.approx(float(data["f1_pairwise"]), abs=1e-6)


def test_fixture_query_gallery():
    data = np.load(FIXTURES / "metrics_query_gallery_small_0.npz")
    query = data["query_embeddings"], data["query_labels"]
    gallery = data["gallery_embeddings"], data["gallery_labels"]
    found = retrieval_metrics(*query, *gallery, ks=data["ks"].tolist())
    for k, recall in zip(data["ks"], data["recall"], strict=True):
        assert found[f"R@{k}"] == pytest.approx(recall, abs=1e-6)


def at_angles(*degrees):
    radians = torch.tensor(degrees, dtype=torch.float64).deg2rad()
    return torch.stack([radians.cos(), radians.sin()], dim=1)


def test_hit_miss_hit_with_three_matches():
    gallery = at_angles(10, 20, 30, 90)
    found = retrieval_metrics(
        at_angles(0), torch.tensor([5]), gallery, torch.tensor([5, 7, 5, 5]), ks=(1, 2)
    )
    assert found["R@1"] == 1
    assert found["RP"] == pytest.approx(2 / 3)
    assert found["MAP@R"] == pytest.approx((1 + 2 / 3) / 3)  # 0.5556
    assert found["mARP"] == pytest.approx((1 + 2 / 3) / 2)  # 0.8333


def test_rank_is_the_count_of_closer_images_of_other_classes():
    gallery = at_angles(1, 2, 3, 4, 170)
    found = retrieval_metrics(
        at_angles(0), [1], gallery, torch.tensor([2, 2, 3, 1, 1]), ks=(1, 2, 3, 4)
    )
    assert [found[f"R@{k}"] for k in (1, 2, 3, 4)] == [0, 0, 0, 1]
    assert found["MRR"] == pytest.approx(1 / 4)


def test_images_without_a_match_are_misses_and_are_left_out_of_rp():
    x = at_angles(0, 1, 50, 90)
    found = retrieval_metrics(x, torch.tensor([0, 0, 1, 2]), ks=(1, 4))
    assert found["queries"] == 4
    assert found["queries_without_match"] == 2
    assert found["R@1"] == found["R@4"] == 0.5
    assert found["MRR"] == 0.5
    assert found["RP"] == found["MAP@R"] == found["mARP"] == 1


def test_no_query_with_a_match():
    found = retrieval_metrics(at_angles(0, 1), [0, 1], at_angles(5, 6), [8, 9], ks=(1, 2))
    assert found["queries_without_match"] == 2
    assert found["R@2"] == found["MRR"] == 0  # each is a miss
    assert all(math.isnan(found[name]) for name in ("RP", "MAP@R", "mARP"))  # a mean of nothing


def test_query_class_missing_from_the_gallery_among_others():
    x, labels = clusters_of(12, 8, 200, 0.7)
    gallery, gallery_labels = x[80:], labels[80:]
    kept = ~np.isin(gallery_labels, [0, 5, 11])
    split = x[:80], labels[:80], gallery[kept], gallery_labels[kept]
    assert_same(retrieval_per_query(*split), oracle(*split))


def test_duplicates_do_not_find_themselves():
    x = at_angles(0, 0, 90, 90)
    # Each image's copy is of another class, and both images behind it are as far.
    found = retrieval_metrics(x, torch.tensor([0, 1, 0, 1]), ks=(1, 2, 3))
    assert [found[f"R@{k}"] for k in (1, 2, 3)] == [0, 0.5, 1]
    # And where the copy is of the same class it is a hit.
    assert retrieval_metrics(x, torch.tensor([0, 0, 1, 1]), ks=(1,))["R@1"] == 1


# Ties: the mean over all orders -------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, 0.3])
def test_a_network_that_tells_nothing_apart_is_as_good_as_chance(value):
    labels = torch.arange(1000) % 100
    found = retrieval_metrics(torch.full((1000, 16), value), labels, ks=(1, 10, 999))
    assert found["R@1"] == pytest.approx(9 / 999)
    assert found["R@10"] == pytest.approx(1 - math.comb(990, 10) / math.comb(999, 10))
    assert found["R@999"] == 1
    assert found["RP"] == pytest.approx(9 / 999)
    # The j-th of 9 is right with 9/999, and then so are 8/998 of those before it.
    mean = sum(9 / 999 * (1 + (j - 1) * 8 / 998) / j for j in range(1, 10)) / 9
    assert found["MAP@R"] == pytest.approx(mean)
    first = [math.comb(999 - j, 8) / math.comb(999, 9) for j in range(1, 992)]
    assert found["MRR"] == pytest.approx(sum(p / j for j, p in enumerate(first, 1)))
    assert found["queries_tied"] == 1000
    assert metrics.about_ties(found).startswith("1,000 of 1,000 queries have right and wrong")


def test_four_zeros():
    found = retrieval_metrics(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]), ks=(1, 2, 3))
    assert [found[f"R@{k}"] for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1])
    assert found["RP"] == found["MAP@R"] == found["mARP"] == pytest.approx(1 / 3)
    assert found["MRR"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)


def test_nothing_is_said_of_few_ties():
    labels = torch.arange(300) % 30
    x = torch.randn(300, 16, generator=torch.Generator().manual_seed(0))
    assert metrics.about_ties(retrieval_metrics(x, labels)) == ""
    x[1] = x[2]  # for all others these two are tied
    found = retrieval_metrics(x, labels, ks=(1,))
    assert found["queries_tied"] > 0
    few = {**found, "queries_tied": 2}
    assert metrics.about_ties(few) == ""
    assert metrics.about_ties({}) == ""


def ranked(right, size, ks):
    """The textbook's metrics of one ranking, a list that says what is right."""
    ranks = [rank for rank, is_right in enumerate(right, 1) if is_right]
    hits = [m / rank for m, rank in enumerate(ranks, 1) if rank <= size]
    return {
        "RP": len(hits) / size,
        "MAP@R": sum(hits) / size,
        "mARP": sum(hits) / max(1, len(hits)),
        "MRR": 1 / ranks[0],
        **{f"R@{k}": float(ranks[0] <= k) for k in ks},
    }


def over_all_permutations(x, labels, gallery, gallery_labels, seen, ks):
    """Each query's metrics as the mean over every order in which the gallery may stand."""
    rows = []
    for query, values in enumerate(closeness(x, gallery)):
        images = np.flatnonzero(seen[query]).tolist()
        right = {image: gallery_labels[image] == labels[query] for image in images}
        size = sum(right.values())
        if size == 0:
            rows.append({})
            continue
        rankings = Counter(
            tuple(right[i] for i in sorted(order, key=lambda i: -values[i]))  # a stable sort
            for order in itertools.permutations(images)
        )
        count = math.factorial(len(images))
        total = Counter()
        for ranking, times in rankings.items():
            for name, value in ranked(ranking, size, ks).items():
                total[name] += times * value / count
        rows.append(total)
    names = ("RP", "MAP@R", "mARP", "MRR", *(f"R@{k}" for k in ks))
    return {name: np.array([float(row.get(name, 0)) for row in rows]) for name in names}


def small_sets(seed):
    """Whole numbers with many ties and zeros, labels of which some are alone, and groups."""
    rng = np.random.default_rng(seed)
    dimension, top, classes = rng.integers(1, 4), rng.integers(1, 4), rng.integers(1, 5)
    count = int(rng.integers(3, 8))
    x = rng.integers(-top if seed % 2 else 0, top + 1, (count, dimension))
    dtype = (np.float32, np.int64, np.float64, np.float16)[seed % 4]
    return x.astype(dtype), rng.integers(0, classes, count), rng.integers(0, 3, count)


def with_recall(found, ks):
    return found | {f"R@{k}": metrics.recall_at(found, k) for k in ks}


@pytest.mark.parametrize("seed", range(40))
def test_against_all_permutations_of_the_gallery(seed):
    x, labels, groups = small_sets(seed)
    count, ks = len(x), (1, 2, 3)
    others = ~np.eye(count, dtype=bool)
    apart = others & (groups[:, None] != groups)
    half = count // 2
    split = x[:half], labels[:half], x[half:], labels[half:]
    everything = np.ones((half, count - half), bool)
    for arguments, options, expected in (
        ((x, labels), {}, (x, labels, x, labels, others)),
        ((x, labels), {"exclude": groups}, (x, labels, x, labels, apart)),
        (split, {}, (*split, everything)),
    ):
        found = with_recall(retrieval_per_query(*arguments, **options), ks)
        for name, values in over_all_permutations(*expected, ks).items():
            np.testing.assert_allclose(found[name].numpy(), values, atol=1e-14, err_msg=name)
        means = summarise(found, ks)
        assert all(0 <= means[f"R@{k}"] <= 1 for k in ks)
        assert means["queries_tied"] == int((oracle(*arguments, **options)["undecided"]).sum())


def test_the_mean_of_many_evaluations_with_ties_broken_at_random():
    rng = np.random.default_rng(3)
    gallery = rng.integers(1, 3, (60, 4)).astype(float)
    x, labels, gallery_labels = gallery[:15] + np.eye(4)[3], np.arange(15) % 5, np.arange(60) % 5
    ks = (1, 4, 20)
    expected = retrieval_metrics(x, labels, gallery, gallery_labels, ks)
    assert expected["queries_tied"] == 15
    unit = gallery / np.linalg.norm(gallery, axis=1, keepdims=True)
    draws = []
    for _ in range(600):
        moved = unit + 1e-5 * rng.normal(size=unit.shape)
        draws.append(retrieval_metrics(x, labels, moved, gallery_labels, ks))
        assert draws[-1]["queries_tied"] == 0
    for name in ("R@1", "R@4", "R@20", "RP", "MAP@R", "mARP", "MRR"):
        values = np.array([draw[name] for draw in draws])
        error = values.std() / math.sqrt(len(values))
        assert abs(values.mean() - expected[name]) < 4 * error + 1e-12, name
        assert abs(values.mean() - expected[name]) < 0.01


@pytest.mark.parametrize("counts", [(300, 41, 5000), (3000, 1000, 100), (1, 1, 20000)])
def test_large_groups_keep_their_digits(counts):
    """Against integers and fractions: the sums over orders of many tied images."""
    closer, right, wrong = counts
    ones = [torch.tensor([value]) for value in counts]
    size = right + wrong
    for k in (1, closer + 1, closer + 50, closer + wrong, closer + wrong + 1):
        drawn = max(0, k - closer)
        exact = 1 - Fraction(math.comb(wrong, drawn), math.comb(size, drawn))
        found = float(ties.recall(*ones, k))
        assert found == pytest.approx(float(exact), rel=1e-12)
    missed, mean = Fraction(1), 0.0
    for j in range(1, wrong + 2):
        mean += float(missed) * right / (size - j + 1) / (closer + j)
        missed = (
            missed * (wrong - j + 1) / (size - j + 1)
            if j < 60
            else float(missed) * (wrong - j + 1) / (size - j + 1)
        )
    assert float(ties.reciprocal_rank(*ones)) == pytest.approx(mean, rel=1e-12)


# What is exactly as close -------------------------------------------------------------------------


def test_a_multiple_is_the_same_direction():
    query, gallery = torch.tensor([[1.0, 1.0]]), torch.tensor([[1.0, 2.0], [5.0, 10.0]])
    for labels in ([0, 1], [1, 0]):
        found = retrieval_metrics(query, [0], gallery, torch.tensor(labels), ks=(1, 2))
        assert (found["R@1"], found["R@2"], found["queries_tied"]) == (0.5, 1, 1)
    gallery = torch.tensor([[1.0, 2.0], [1.0, 2.0], [5.0, 10.0]])
    found = retrieval_metrics(query, [0], gallery, torch.tensor([0, 1, 1]), ks=(1, 2))
    assert (found["R@1"], found["R@2"]) == pytest.approx((1 / 3, 2 / 3))


@functools.cache
def quantised(name):
    """Embeddings of few values, their labels, and what the oracle says of them."""
    rng = np.random.default_rng(5)
    shape, values = {
        "bits": ((150, 12), (0, 1)),
        "small": ((150, 4), range(-3, 4)),
        "signs": ((150, 9), (-1, 1)),
        "bytes": ((150, 3), range(256)),
    }[name]
    x, labels = rng.choice(list(values), shape), rng.integers(0, 12, 150)
    return x, labels, oracle(x, labels)


@pytest.mark.parametrize("name", ["bits", "small", "signs", "bytes"])
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_quantised_embeddings_are_compared_exactly(name, dtype, each_search):
    x, labels, expected = quantised(name)
    rng, x = np.random.default_rng(6), x.astype(dtype)
    assert_same(retrieval_per_query(x, labels, block_size=24), expected)
    assert expected["undecided"].any() or name == "bytes"
    # The same directions, each at another length.
    longer = x * rng.integers(1, 50, (150, 1))
    assert_same(retrieval_per_query(longer.astype(dtype), labels), expected)
    power = x.astype(float) * 2.0 ** rng.integers(-40, 40, (150, 1))
    assert_same(retrieval_per_query(power, labels), expected)


def test_nearly_as_close_is_not_tied(each_search):
    steps = np.arange(10000, 10040)
    gallery = np.stack([steps, steps + 1], axis=1)  # cosines with (1, 1) rise by 2.5e-13 a step
    labels = np.arange(40) % 4
    found = retrieval_per_query(np.array([[1, 1]]), np.array([0]), gallery, labels)
    assert found["undecided"].tolist() == [0]
    assert_same(found, oracle(np.array([[1, 1]]), np.array([0]), gallery, labels))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_float_embeddings_have_no_false_ties_and_no_missed_ones(dtype, each_search):
    x, labels = clusters_of(60, 256, 1500, 3.0, seed=21)
    x = torch.from_numpy(x).to(dtype)
    found = retrieval_per_query(x, labels)
    assert found["undecided"].sum() == found["tied"].sum() == 0
    # A copy of another class beside each image: all matches are tied with their copies.
    both, twice = torch.cat([x, x]), np.concatenate([labels, labels + 60])
    groups = np.concatenate([np.arange(1500)] * 2)
    found = retrieval_per_query(both, twice, exclude=groups)
    searchable = found["relevant"] > 0
    assert torch.equal(found["tied"], searchable.long())
    assert torch.equal(found["tied_matches"], searchable.long())
    # Three times as long: as close, up to rounding in float64.
    both = torch.cat([x.double(), 3 * x.double()])
    again = retrieval_per_query(both, twice, exclude=groups)
    for name, values in found.items():
        assert torch.equal(values, again[name]), name


def test_the_order_of_images_does_not_decide_ties():
    rng = np.random.default_rng(6)
    x, labels = rng.integers(0, 2, (700, 8)).astype(np.float32), rng.integers(0, 20, 700)
    first = retrieval_per_query(x, labels)
    order = rng.permutation(700)
    for block_size in (40, None):
        second = retrieval_per_query(x[order], labels[order], block_size=block_size)
        for name, values in first.items():
            torch.testing.assert_close(values[order], second[name], rtol=0, atol=1e-14)


# The oracle: ties, duplicates, lone images, groups, every block size ------------------------------


def changed(function, x, labels):
    return function(x), labels


CASES = {
    "plain": clusters_of(20, 16, 300, 1.0, seed=1),
    "many ties": changed(np.round, *clusters_of(9, 4, 200, 1.0, seed=2)),
    "lone images": clusters_of(150, 8, 200, 0.5, seed=3),
    "two classes": clusters_of(2, 12, 150, 2.0, seed=4),
    "closer than float32 tells": changed(
        lambda x: 1 + 1e-3 * x, *clusters_of(10, 24, 200, 1.0, seed=5)
    ),
}


def search_with(kind: str, monkeypatch) -> None:
    """From now on one of the two searches is used, whichever would have been chosen."""
    monkeypatch.setattr(retrieval, "rows_are_faster", lambda *_: kind == "rows")
    monkeypatch.setattr(retrieval, "are_crowded", lambda *_: False)


@pytest.fixture(params=["blocks", "rows"])
def each_search(request, monkeypatch):
    """Once with each of the two searches."""
    search_with(request.param, monkeypatch)
    return request.param


def within_and_across(name, count):
    """The first images of a case, with duplicates, as one set and as two; and groups of them."""
    x, labels = (values[:count].copy() for values in CASES[name])
    x[10:20] = x[30:40]  # of whatever class
    groups = np.random.default_rng(0).integers(0, 4, len(x))
    half = len(x) // 2
    return (x, labels), (x[:half], labels[:half], x[half:], labels[half:]), groups


KS = (1, 3, 20)


@functools.cache
def answered(name, count):
    """Arguments and options of searches, each with what the oracle says."""
    whole, split, groups = within_and_across(name, count)
    halves = groups[: len(split[0])], groups[len(split[0]) :]
    cases = (whole, {}), (whole, {"exclude": groups}), (split, {"exclude": halves})
    return [(*case, oracle(*case[0], **case[1], ks=KS)) for case in cases]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("count", "block_size"), [(60, 5), (300, 40), (300, None)])
def test_against_the_oracle(name, count, block_size, each_search):
    for arguments, options, expected in answered(name, count):
        found = retrieval_per_query(*arguments, **options, block_size=block_size)
        assert_same(with_recall(found, KS), expected)


@pytest.mark.parametrize("name", ["two classes", "many ties"])
def test_in_runs_when_there_are_many_pairs(name, monkeypatch):
    x, labels = CASES[name]
    monkeypatch.setattr(blocks, "MAX_PAIRS", 700)
    few = blocks.Scale(columns=8, entries=64, queries=256, cosines=2**22)
    monkeypatch.setattr(blocks, "ON_A_CPU", few)
    monkeypatch.setattr(ties, "MAX_TERMS", 100)
    assert_same(retrieval_per_query(x, labels, block_size=40), oracle(x, labels))


def test_every_block_size_gives_the_same_numbers(each_search, monkeypatch):
    x, labels = clusters_of(300, 64, 3000, 1.4, seed=6)
    x[::7] = x[1::7][: len(x[::7])]
    sizes = None, 333, 1000, 8192
    first, *others = (retrieval_per_query(x, labels, block_size=b) for b in sizes)
    monkeypatch.setattr(blocks, "ON_A_CPU", blocks.ON_A_GPU)
    others += [retrieval_per_query(x, labels, block_size=b) for b in sizes]
    for other in others:
        for name, values in first.items():
            assert torch.equal(values, other[name]), name


Y_LARGE = np.arange(1500) % 5


def with_copies():
    x, labels = clusters_of(6, 32, 1500, 1.5, seed=8)
    x[::5] = x[1::5][: len(x[::5])]
    return x, labels


LARGE = {
    "six classes": clusters_of(6, 32, 1500, 1.5, seed=8),
    "copies": with_copies(),
    "untrained": (np.random.default_rng(3).normal(size=(1500, 64)).astype(np.float32), Y_LARGE),
    "collapsed, nearly": (1 + 1e-7 * np.random.default_rng(3).normal(size=(1500, 64)), Y_LARGE),
    "codes": changed(np.sign, *clusters_of(12, 16, 1500, 1.0, seed=9)),
    "one value": (np.ones((1500, 8), np.float32), Y_LARGE),
    "uneven classes": (clusters_of(4, 16, 1500, 1.0)[0], np.arange(1500) ** 2 // 140_000),
}


@pytest.mark.parametrize(("name", "threads"), [*((name, 3) for name in LARGE), ("copies", 1)])
def test_both_searches_give_the_same_numbers_to_the_bit(name, threads, monkeypatch):
    """By rows in float32, in float64 and with ties beyond the list; with every thread a block."""
    x, labels = LARGE[name]
    groups = np.arange(len(x)) % 7
    part = slice(0, 400)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for arguments, options in (
            ((x, labels), {}),
            ((x, labels), {"exclude": groups}),
            ((x[part], labels[part], x, labels), {}),
        ):
            found = {}
            for kind in ("blocks", "rows"):
                search_with(kind, monkeypatch)
                found[kind] = retrieval_per_query(*arguments, **options, block_size=700)
            for key, values in found["blocks"].items():
                # Sums over the orders of ties are rounded differently beside longer ones.
                near = 1e-14 if values.is_floating_point() and name == "codes" else 0
                torch.testing.assert_close(found["rows"][key], values, rtol=0, atol=near)
    finally:
        torch.set_num_threads(before)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("name", ["six classes", "copies", "codes"])
def test_a_large_gallery_is_multiplied_with_in_parts(name, monkeypatch):
    """In float32, and in float64: one of 60,000 images and 512 numbers is."""
    search_with("rows", monkeypatch)
    whole = retrieval_per_query(*LARGE[name])
    monkeypatch.setattr(rows, "KEPT", 0)
    monkeypatch.setattr(rows, "CHUNK", 70 * 32)
    for key, values in retrieval_per_query(*LARGE[name]).items():
        torch.testing.assert_close(values, whole[key], rtol=0, atol=1e-14)


def test_which_search_is_chosen(monkeypatch):
    chosen = []
    for module in (blocks, rows):
        search = module.search
        monkeypatch.setattr(
            module, "search", lambda *a, m=module, s=search: chosen.append(m.__name__) or s(*a)
        )
    x = np.random.default_rng(0).normal(size=(600, 64))
    for embeddings, classes in ((x, 100), (x, 10), (np.ones_like(x), 100), (x, 600)):
        retrieval_per_query(embeddings, np.arange(600) % classes)
    by_blocks, by_rows = "metrics.blocks", "metrics.rows"
    assert chosen == [by_blocks, by_rows, by_rows, by_blocks]


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("shape", [(100, 64, 512), (3, 200, 70), (50, 63, 8), (0, 80, 16)])
def test_products_are_float32_whichever_library_makes_them(fast, shape, monkeypatch):
    if not fast:
        monkeypatch.setattr(products, "ONEDNN_PRODUCT", None)
    rows, columns, dimension = shape
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(rows, dimension, generator=generator)
    b = torch.randn(columns, 2 * dimension, generator=generator)[:, ::2]
    expected = (a.double() @ b.double().T).float()
    with products.full_float32(a.device):
        torch.testing.assert_close(products.inner_products(a, b), expected, rtol=0, atol=2e-4)
        out = torch.full((rows, columns + 8), 7.0)
        found = products.inner_products(a, b, out=out[:, :columns])
    assert found.data_ptr() == out.data_ptr() and (out[:, columns:] == 7).all()
    torch.testing.assert_close(out[:, :columns], expected, rtol=0, atol=2e-4)


@pytest.mark.parametrize("share", [0.3, 1.0])
@pytest.mark.parametrize("dim", [0, 1])
def test_counts_of_a_mask_exceed_what_a_byte_holds(share, dim):
    mask = torch.rand(300, 8 * 300, generator=torch.Generator().manual_seed(0)) < share
    assert torch.equal(count_true(mask, dim), mask.sum(dim))


@pytest.mark.parametrize("levels", [3, 2**20])  # in the first case most numbers are tied
@pytest.mark.parametrize("length", [5, 63, 64 * 5, 1003])
def test_the_largest_of_each_row(levels, length):
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(levels, (20, length), generator=generator).float()
    values[values == 0] = -torch.inf
    numbers, columns = largest(values, 5)
    assert torch.equal(numbers, values.topk(5, dim=1).values)
    assert torch.equal(numbers, values.gather(1, columns))
    assert all(len(set(row)) == 5 for row in columns.tolist())


def test_images_of_their_own_are_not_compared(monkeypatch):
    monkeypatch.setattr(blocks, "inner_products", None)
    found = retrieval_per_query(np.eye(50), np.arange(50))
    assert found["rank"].tolist() == [50] * 50


def test_the_order_of_the_images_does_not_matter(each_search):
    x, labels = CASES["many ties"]
    order = np.random.default_rng(0).permutation(len(x))
    first, second = retrieval_per_query(x, labels), retrieval_per_query(x[order], labels[order])
    for name, values in first.items():
        assert torch.equal(values[order], second[name]), name


def test_a_shard_of_the_queries_gives_the_rows_of_the_whole():
    x, labels = CASES["plain"]
    own = torch.arange(len(x))
    shard = slice(40, 110)
    found = retrieval_per_query(x[shard], labels[shard], x, labels, exclude=(own[shard], own))
    for name, values in retrieval_per_query(x, labels).items():
        assert torch.equal(found[name], values[shard]), name


class Team:
    """Threads that sum tensors as processes would."""

    def __init__(self, count):
        self.count, self.barrier, self.slots = count, threading.Barrier(count), [None] * count

    def share(self, number):
        def total(tensor):
            self.slots[number] = tensor
            self.barrier.wait(60)
            result = sum(self.slots[1:], self.slots[0].clone())
            self.barrier.wait(60)
            return result

        return metrics.Share(number, self.count, total)

    def search(self, *arguments, **options):
        with ThreadPoolExecutor(self.count) as pool:
            work = [
                pool.submit(retrieval_per_query, *arguments, **options, share=self.share(number))
                for number in range(self.count)
            ]
            return [each.result(120) for each in work]


@pytest.mark.parametrize("name", CASES)
def test_a_search_in_shares_gives_each_the_whole_answer(name, each_search):
    whole, split, groups = within_and_across(name, 130)
    for arguments, options in ((whole, {}), (whole, {"exclude": groups}), (split, {})):
        for block_size in (40, None):
            options["block_size"] = block_size
            expected = retrieval_per_query(*arguments, **options)
            for found in Team(3).search(*arguments, **options):
                for key, values in expected.items():
                    assert torch.equal(found[key], values), key


def test_shares_divide_the_products(each_search, monkeypatch):
    x, labels = clusters_of(300, 16, 2000, 1.0)
    sizes = []
    where = {"blocks": blocks, "rows": rows}[each_search]
    product = where.inner_products
    monkeypatch.setattr(
        where,
        "inner_products",
        lambda a, b, **k: sizes.append(len(a) * len(b)) or product(a, b, **k),
    )
    work = []
    for number in range(3):
        sizes.clear()
        retrieval_per_query(x, labels, block_size=256, share=metrics.Share(number, 3, lambda t: t))
        work.append(sum(sizes))
    sizes.clear()
    retrieval_per_query(x, labels, block_size=256)
    assert sum(work) == sum(sizes)
    assert max(work) < 1.1 * sum(sizes) / 3


def test_summarise_a_selection_of_queries():
    x, labels = CASES["plain"]
    found = retrieval_per_query(x, labels)
    everything = summarise(found, (1, 4))
    assert everything == retrieval_metrics(x, labels, ks=(1, 4))
    parts = [
        summarise({name: v[labels == c] for name, v in found.items()}, (1,)) for c in set(labels)
    ]
    recall = sum(part["R@1"] * part["queries"] for part in parts) / len(labels)
    assert recall == pytest.approx(everything["R@1"])


@pytest.mark.parametrize("k", [0, -1, 1.5, "1", True, None])
def test_a_k_that_counts_no_neighbours(k):
    found = retrieval_per_query(X, Y)
    for call in (
        lambda: metrics.recall_at(found, k),
        lambda: summarise(found, (1, k)),
        lambda: comparison.query_scores(found, (1, k), Y),
    ):
        with pytest.raises(ValueError, match=r"^The Ks? of R@K ((?!--).)*$"):
            call()


# Metrics of no query ------------------------------------------------------------------------------

RATES = ("RP", "MAP@R", "mARP")


def one_match_in(count):
    """Per-query values of a perfect search in which only the first two queries have a match."""
    x = torch.eye(count)
    x[1] = x[0] + 0.1 * x[1]
    labels = torch.arange(count)
    labels[1] = 0
    return retrieval_per_query(x, labels), labels


def test_a_resample_in_which_no_query_counts_is_left_out():
    found, _ = one_match_in(6)
    scores = comparison.query_scores(found, (1,), torch.arange(6))  # each a class of its own
    (drawn,) = comparison.replicates([scores], 500, seed=0)
    empty = drawn.isnan().any(dim=1)
    assert 0.02 < empty.double().mean() < 0.2  # (4/6)^6 = 0.088
    for column, (name, share) in enumerate(scores.means().items()):
        low, high = comparison.share_interval(share, drawn[:, column], 6)
        if name in RATES:
            assert torch.equal(drawn[:, column].isnan(), empty)
            assert share == high == 1 and low < 1
        else:
            assert not drawn[:, column].isnan().any()
            assert 0 <= low < high <= 1


def test_scores_of_partly_tied_queries_are_those_of_the_summary():
    x = torch.from_numpy(np.round(CASES["many ties"][0]))
    found = retrieval_per_query(x, CASES["many ties"][1])
    assert found["undecided"].sum() > 0
    scores = comparison.query_scores(found, (1, 3), CASES["many ties"][1])
    means, expected = scores.means(), summarise(found, (1, 3))
    assert means == pytest.approx({name: expected[name] for name in means})
    assert set(expected) - set(means) == {"queries", "queries_without_match", "queries_tied"}


def test_a_paired_test_leaves_undefined_resamples_out():
    found, _ = one_match_in(6)
    worse = {name: values.clone() for name, values in found.items()}
    for name in RATES:
        worse[name] = worse[name] / 2
    a, b = (comparison.query_scores(each, (1,), torch.arange(6)) for each in (worse, found))
    drawn = comparison.replicates([a, b], 500, seed=0)
    defined = int((~drawn[0].isnan().any(dim=1)).sum())
    tests = [
        comparison.paired_differences(a.means(), b.means(), *pair, [10**6] * len(a.names))["MAP@R"]
        for pair in (drawn, [each[~drawn[0].isnan().any(dim=1)] for each in drawn])
    ]
    test = tests[0]
    assert (test.difference, test.low, test.high) == (0.5, 0.5, 0.5)
    assert test == tests[1] and test.p == pytest.approx(2 / (1 + defined), rel=1e-4)
    assert defined < 500


def test_metrics_that_no_query_counts_in_are_undefined_everywhere():
    found = retrieval_per_query(torch.eye(5), torch.arange(5))
    scores = comparison.query_scores(found, (1,), torch.arange(5))
    means = scores.means()
    (drawn,) = comparison.replicates([scores], 50, seed=0)
    rest_on = scores.rest_on()
    differences = comparison.paired_differences(means, means, drawn, drawn, rest_on)
    _, _, by_class = comparison.by_class(scores)
    for column, name in enumerate(scores.names):
        undefined = name in RATES
        between = comparison.share_interval(means[name], drawn[:, column], rest_on[column])
        numbers = [means[name], *between, *differences[name]]
        assert [math.isnan(number) for number in numbers] == [undefined] * len(numbers)
        assert bool(by_class[:, column].isnan().all()) == undefined
        if not undefined:
            assert means[name] == 0
    summary = summarise(found, (1,))
    assert {name for name, value in summary.items() if math.isnan(value)} == set(RATES)


def test_what_one_seed_leaves_undefined_has_no_mean():
    runs = [{"R@1": 0.5, "RP": 0.25}, {"R@1": 0.7, "RP": math.nan}, {"R@1": 0.6, "RP": None}]
    means, deviations = comparison.mean_and_deviation(runs)
    assert means["R@1"] == pytest.approx(0.6)
    assert math.isnan(means["RP"])
    assert math.isnan(deviations["RP"])


# What goes in -------------------------------------------------------------------------------------


def test_tensors_arrays_and_scale_are_alike():
    x, labels = CASES["plain"]
    first = retrieval_metrics(x, labels)
    assert first == retrieval_metrics(torch.from_numpy(x * 8), torch.from_numpy(labels) + 7)
    half = torch.from_numpy(x).half()
    assert retrieval_metrics(half, labels) == retrieval_metrics(half.float(), labels)
    assert all(type(v) in (float, int) for v in first.values())


@pytest.mark.parametrize("classes", [3, 30])  # searched row by row, and block by block
@pytest.mark.parametrize("scale", [1e38, 1e100])
def test_lengths_beyond_float32_change_nothing(scale, classes):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 16, generator=generator).double()
    labels = torch.arange(300) % classes
    found = retrieval_metrics(scale * x, labels) | clustering_metrics(scale * x, labels)
    assert found == pytest.approx(retrieval_metrics(x, labels) | clustering_metrics(x, labels))


def test_zero_embeddings_are_equally_far_from_everything():
    x = torch.cat([at_angles(0, 10, 180), torch.zeros(1, 2)])
    found = retrieval_per_query(x, torch.tensor([0, 0, 1, 1]))
    assert found["rank"].tolist() == [0, 0, 0, 0]
    assert found["tied"].tolist() == [0, 0, 0, 2]
    assert metrics.recall_at(found, 1).tolist() == pytest.approx([1, 1, 1, 1 / 3])
    assert found["undecided"].tolist() == [0, 0, 0, 1]
    # So is what is too short to have a direction.
    x[3, 0] = 1e-31
    for name, values in retrieval_per_query(x, torch.tensor([0, 0, 1, 1])).items():
        assert torch.equal(values, found[name]), name


@pytest.mark.parametrize("setting", ["medium", "high"])
def test_the_callers_precision_is_neither_used_nor_changed(setting):
    x, labels = clusters_of(30, 32, 600, 1.2)
    expected = retrieval_metrics(x, labels), clustering_metrics(x, labels)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = retrieval_metrics(x, labels), clustering_metrics(x, labels)
        assert torch.get_float32_matmul_precision() == setting
    finally:
        torch.set_float32_matmul_precision(before)
    assert found == expected


def test_progress_rises_to_one(each_search):
    x, labels = CASES["plain"]
    split = x[::2], labels[::2], x[1::2], labels[1::2]
    for call in (
        lambda p: retrieval_metrics(x, labels, block_size=64, progress=p),
        lambda p: retrieval_metrics(*split, block_size=64, progress=p),
        lambda p: count_pairs(x, labels, block_size=64, progress=p),
        lambda p: count_pairs(*split, block_size=64, progress=p),
        lambda p: clustering_metrics(x, labels, restarts=2, progress=p),
    ):
        shares = []
        call(shares.append)
        assert len(shares) > 2
        assert shares == sorted(shares)
        assert shares[0] < 1 == shares[-1]


X, Y = torch.randn(10, 4, generator=torch.Generator().manual_seed(0)), torch.arange(10) % 3
NAN, INF = X.clone(), X.clone()
NAN[3, 1], INF[9, 0] = torch.nan, -torch.inf


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((NAN, Y), {}, "NaN or infinite"),
        ((INF, Y), {}, "NaN or infinite"),
        ((X, Y, INF, Y), {}, "of the 10 gallery"),
        ((X, Y[:9]), {}, "10 embeddings but 9 labels"),
        ((X, Y, X, Y[:9]), {}, "10 embeddings but 9 labels of the gallery"),
        ((X, Y, X), {}, "no labels of the gallery"),
        ((X, Y, None, Y), {}, "no gallery"),
        ((X, Y, X[:, :3], Y), {}, "4 dimensions and the gallery's have 3"),
        ((X[:0], Y[:0]), {}, "not empty"),
        ((X, Y, X[:0], Y[:0]), {}, "not empty"),
        ((X[:, 0], Y), {}, "shape"),
        ((X, Y.float()), {}, r"integers of shape \(N,\), not float32 of shape \(10,\)"),
        ((X, Y[:, None]), {}, r"integers of shape \(N,\), not int64 of shape \(10, 1\)"),
        ((X, Y), {"ks": (1, 11)}, "choose a smaller K"),
        ((X, Y, X[:3], Y[:3]), {"ks": (1, 4)}, "choose a smaller K"),
        ((X, Y), {"ks": (0,)}, "at least 1"),
        ((X, Y), {"ks": ("1",)}, "whole numbers"),
        ((X, Y), {"ks": "12"}, "whole numbers"),
        ((X, Y), {"ks": 1}, "whole numbers"),
        ((X, Y), {"ks": (1.5,)}, "whole numbers"),
        ((X, Y), {"ks": (None,)}, "whole numbers"),
        ((X, Y), {"ks": (True,)}, "whole numbers"),
        ((X, list("abcabcabca")), {}, "labels of the embeddings must be integers"),
        ((X, np.array(list("abcabcabca"))), {}, "labels of the embeddings must be integers"),
        ((X, [[1], [2, 3]] * 5), {}, "must be integers"),
        ((X, [10**30] * 10), {}, "must be integers"),
        ((X, 3), {}, "must be integers"),
        ((X, Y + 0j), {}, "must be integers"),
        ((X, Y, X, list("abcabcabca")), {}, "labels of the gallery must be integers"),
        ((np.array([["a"] * 4] * 10), Y), {}, "embeddings must be numbers"),
        ((X + 0j, Y), {}, "embeddings must be numbers"),
        ((X, Y), {"block_size": 0}, "block size"),
        ((X, Y), {"exclude": Y[:4]}, "groups"),
        ((X, Y, X, Y), {"exclude": Y}, "pair"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match=message) as error:
        retrieval_metrics(*arguments, **options)
    assert "\n" not in str(error.value)


class Frame:
    """As a table of pandas: numpy makes an array of it, and an index is the name of a column."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array

    def __len__(self):
        return len(self.array)

    def __getitem__(self, name):
        raise KeyError(name)


def test_arrays_are_read_as_others_keep_them(recwarn):
    """Back to front, of another machine, read-only, as a table, or as a list of rows."""
    x, labels = clusters_of(6, 8, 60, 1.0, seed=3)
    expected = retrieval_metrics(x, labels)
    kept = x.copy()
    kept.flags.writeable = False
    back_to_front = np.ascontiguousarray(x[::-1])[::-1], np.ascontiguousarray(labels[::-1])[::-1]
    foreign = x.astype(x.dtype.newbyteorder(">")), labels.astype(">i8")
    rows = list(torch.from_numpy(x)), list(torch.from_numpy(labels))
    for given in (back_to_front, foreign, (kept, labels), (Frame(x), Frame(labels)), rows):
        assert retrieval_metrics(*given) == expected
    assert kmeans(back_to_front[0], 3).inertia == kmeans(x, 3).inertia
    assert not recwarn.list


# Peers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gallery", [False, True])
def test_pytorch_metric_learning(gallery):
    peer = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    pytest.importorskip("faiss")
    calculator = peer.AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        device=torch.device("cpu"),
    )
    x, labels = clusters_of(40, 32, 700, 1.3, seed=7)
    x, labels = F.normalize(torch.from_numpy(x)), torch.from_numpy(labels)
    arguments = (x[:200], labels[:200], x[200:], labels[200:]) if gallery else (x, labels)
    theirs = calculator.get_accuracy(*arguments)
    ours = retrieval_metrics(*arguments, ks=(1,))
    assert ours["R@1"] == pytest.approx(theirs["precision_at_1"], abs=1e-6)
    assert ours["RP"] == pytest.approx(theirs["r_precision"], abs=1e-6)
    assert ours["MAP@R"] == pytest.approx(theirs["mean_average_precision_at_r"], abs=1e-6)


def ours_like_the_calculator(query, query_labels, reference=None, reference_labels=None):
    """What a user of AccuracyCalculator puts in its place: the same arguments and names."""
    found = retrieval_metrics(query, query_labels, reference, reference_labels, ks=(1,))
    names = {"precision_at_1": "R@1", "r_precision": "RP", "mean_average_precision_at_r": "MAP@R"}
    clusters = kmeans(query, len(query_labels.unique())).labels
    agreement = nmi_f1(query_labels, clusters, ami=True)
    return {theirs: found[ours] for theirs, ours in names.items()} | {
        name: agreement[name] for name in ("NMI", "AMI")
    }


@pytest.mark.parametrize("case", ["same set", "gallery", "lone images", "gallery lacks a class"])
def test_replacing_the_accuracy_calculator_changes_no_number(case):
    peer = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    pytest.importorskip("faiss")
    calculator = peer.AccuracyCalculator(
        include=(*("precision_at_1", "r_precision", "mean_average_precision_at_r"), "NMI", "AMI"),
        k="max_bin_count",
        device=torch.device("cpu"),
        kmeans_func=lambda x, count: kmeans(x, count).labels,  # theirs draws other clusters
    )
    x, labels = clusters_of(40, 32, 600, 1.3, seed=15)
    x, labels = F.normalize(torch.from_numpy(x)), torch.from_numpy(labels)
    if case == "lone images":
        labels[:7] = torch.arange(100, 107)
    arguments = (x, labels)
    if case.startswith("gallery"):
        kept = labels[200:] != 3 if "lacks" in case else slice(None)
        arguments = (x[:200], labels[:200], x[200:][kept], labels[200:][kept])
    theirs = calculator.get_accuracy(*arguments)
    ours = ours_like_the_calculator(*arguments)
    if case in ("lone images", "gallery lacks a class"):
        # Theirs leaves queries without a match out of precision@1 too; ours counts a miss.
        found = retrieval_per_query(*arguments)
        matched = found["relevant"] > 0
        assert 0 < int(matched.sum()) < len(matched)
        chosen = {name: values[matched] for name, values in found.items()}
        ours["precision_at_1"] = summarise(chosen, (1,))["R@1"]
    assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("sizes", [(7, 7), (60, 9), (1, 5), (1, 1), (300, 300)])
def test_scikit_learn_agreement(sizes):
    peer = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(8)
    labels, clusters = (rng.integers(0, size, 300) for size in sizes)
    clusters = np.where(rng.random(300) < 0.5, labels % sizes[1], clusters)
    found = nmi_f1(labels, clusters + 1000, ami=True)
    assert found["NMI"] == pytest.approx(peer.normalized_mutual_info_score(labels, clusters))
    assert found["AMI"] == pytest.approx(peer.adjusted_mutual_info_score(labels, clusters))
    (_, fp), (fn, tp) = peer.pair_confusion_matrix(labels, clusters)
    assert found["F1"] == pytest.approx(2 * tp / (2 * tp + fp + fn))


def test_agreement_of_nothing_but_lone_images():
    found = nmi_f1(torch.arange(5), torch.arange(5), ami=True)
    assert (found["NMI"], found["AMI"]) == (pytest.approx(1), pytest.approx(1))
    assert math.isnan(found["F1"])  # there is no pair to be right about
    assert nmi_f1(torch.arange(4), torch.tensor([0, 0, 1, 2]))["F1"] == 0  # a pair that is wrong
    with pytest.raises(ValueError, match="one of each"):
        nmi_f1(torch.arange(5), torch.arange(4))


@pytest.mark.parametrize("count", [10, 13, 50])
def test_agreement_is_never_above_one(count):
    """1.0000000000000002 by rounding, for 10 images in 6 classes."""
    for classes in range(2, count):
        labels = torch.arange(count) % classes
        found = nmi_f1(labels, labels, ami=True).values()
        assert min(found) > 1 - 1e-12
        assert max(found) <= 1


def test_agreement_that_says_nothing():
    for labels in (np.arange(8), np.zeros(8, int)):  # nobody's match; one class
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
        assert clustering_metrics(x, labels)["NMI"] == pytest.approx(1)
        assert by_construction(labels)
    assert not by_construction([0, 0, 1])


def test_text_for_labels_of_a_clustering():
    with pytest.raises(ValueError, match="labels must be integers"):
        nmi_f1(list("ab"), [0, 1])
    with pytest.raises(ValueError, match="clusters must be integers"):
        nmi_f1([0, 1], list("ab"))
    with pytest.raises(ValueError, match="made of numbers"):
        kmeans(np.array([["a", "b"]]), 1)


# k-means ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "noise"), [(10, 0.3), (30, 1.2), (100, 0.8)])
def test_inertia_is_scikit_learns(k, noise):
    peer = pytest.importorskip("sklearn.cluster")
    x, _ = clusters_of(k, 32, 1500, noise, seed=k)
    x = F.normalize(torch.from_numpy(x))
    ours = kmeans(x, k, restarts=3).inertia
    theirs = peer.KMeans(k, n_init=3, random_state=0).fit(x.numpy()).inertia_
    assert ours <= 1.01 * theirs


def test_kmeans_answer_is_consistent():
    x, _ = clusters_of(40, 16, 1000, 1.0, seed=9)
    x = torch.from_numpy(x)
    labels, centres, inertia = kmeans(x, 40)
    distances = torch.cdist(x.double(), centres.double()).square()
    nearest = distances.min(dim=1)
    assert torch.allclose(
        distances.gather(1, labels[:, None]).squeeze(1), nearest.values, rtol=1e-5
    )
    assert inertia == pytest.approx(float(nearest.values.sum()), rel=1e-5)
    means = torch.stack([x[labels == c].mean(dim=0) for c in range(40)])  # converged
    assert torch.allclose(means, centres, atol=1e-4)


def test_skipped_products_change_nothing():
    """Lloyd's shortcut against plain iterations from the same start."""
    x, _ = clusters_of(30, 8, 800, 1.5, seed=10)
    x = torch.from_numpy(x)
    start, _, _ = clustering.plus_plus(x, 60, torch.Generator().manual_seed(0))
    centres = start.double()
    for iterations in range(1, 9):
        labels = torch.cdist(x.double(), centres).argmin(dim=1)
        centres = torch.stack([x[labels == c].double().mean(dim=0) for c in range(60)])
        found = kmeans(x, 60, iterations=iterations, start=start)
        assert torch.allclose(found.centres.double(), centres, atol=1e-5)


def test_kmeans_is_deterministic_in_its_seed():
    x, _ = clusters_of(20, 8, 500, 1.5, seed=11)
    first, again, other = (kmeans(x, 25, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first.labels, again.labels)
    assert torch.equal(first.centres, again.centres)
    assert not torch.equal(first.labels, other.labels)
    assert kmeans(x, 25, seed=3, restarts=5).inertia <= first.inertia


def test_start_with_many_centres_a_round(monkeypatch):
    """As at SOP's size, after few that are drawn one by one."""
    x, _ = clusters_of(150, 16, 2000, 0.5, seed=12)
    x = torch.from_numpy(x)
    one_by_one = kmeans(x, 400).inertia
    alone, _, _ = clustering.plus_plus(x, 400, torch.Generator().manual_seed(0))
    monkeypatch.setattr(clustering, "DRAWN_ALONE", 20 * len(x))
    start, labels, distances = clustering.plus_plus(x, 400, torch.Generator().manual_seed(0))
    assert torch.equal(start[:20], alone[:20]) and not torch.equal(start, alone)
    assert len(start.unique(dim=0)) == 400
    exact = torch.cdist(x.double(), start.double()).square()
    assert torch.allclose(distances.double(), exact.min(dim=1).values, atol=1e-4)
    assert torch.equal(labels, exact.argmin(dim=1))
    assert kmeans(x, 400).inertia < 1.1 * one_by_one


def test_empty_clusters_start_again():
    x = torch.tensor([[0.0], [0.0], [0.0], [10.0], [10.1], [20.0]])
    centres = torch.tensor([[0.0], [10.0], [500.0]])
    assert kmeans(x, 3, start=centres).labels.tolist() == [0, 0, 0, 1, 1, 2]


def test_more_clusters_than_distinct_points():
    x = torch.tensor([[0.0, 1.0], [5.0, 5.0]]).repeat(10, 1)
    result = kmeans(x, 6)
    assert result.inertia == pytest.approx(0, abs=1e-4)
    assert len(result.labels.unique()) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X, 0), "0 clusters of 10"),
        ((X, 11), "11 clusters of 10"),
        ((X[0], 1), "shape"),
        ((X[:0], 1), "shape"),
        ((NAN, 2), "NaN"),
        ((INF, 2), "NaN"),
        ((X, 2, 0, 0), "restart"),
    ],
)
def test_bad_kmeans_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        kmeans(*arguments)


def test_clustering_metrics_of_separate_classes():
    x, labels = clusters_of(12, 16, 300, 0.05)
    assert clustering_metrics(100 * x, labels) == pytest.approx({"NMI": 1, "F1": 1})
    with pytest.raises(ValueError, match="NaN"):
        clustering_metrics(NAN, Y)


# VehicleID's protocol -----------------------------------------------------------------------------


def test_one_image_per_class_is_the_gallery():
    x, labels = clusters_of(30, 8, 240, 0.8, seed=13)
    found = one_per_class_gallery(x, labels, ks=(1, 5), draws=4, seed=1)
    assert found == one_per_class_gallery(x, labels, ks=(1, 5), draws=4, seed=1)
    assert found != one_per_class_gallery(x, labels, ks=(1, 5), draws=4, seed=2)
    assert set(found) == {"R@1", "R@1_sd", "R@5", "R@5_sd", "MRR", "MRR_sd"}
    assert 0 < found["R@1"] < found["MRR"] < found["R@5"] < 1
    assert found["R@1_sd"] > 0


def test_the_gallery_holds_one_image_of_each_class(monkeypatch):
    x, labels = clusters_of(30, 8, 240, 0.8, seed=13)
    seen = []
    search = retrieval.retrieval_metrics

    def spy(queries, query_labels, gallery, gallery_labels, *rest):
        seen.append((len(queries), sorted(gallery_labels.tolist())))
        assert len({tuple(row) for row in torch.cat([queries, gallery]).tolist()}) == 240
        results.append(search(queries, query_labels, gallery, gallery_labels, *rest)["R@1"])
        return search(queries, query_labels, gallery, gallery_labels, *rest)

    results = []
    monkeypatch.setattr(retrieval, "retrieval_metrics", spy)
    found = one_per_class_gallery(x, labels, draws=2)
    assert seen == [(210, list(range(30)))] * 2
    assert found["R@1"] == pytest.approx(np.mean(results))
    assert found["R@1_sd"] == pytest.approx(np.std(results, ddof=1)) and results[0] != results[1]
    one_per_class_gallery(x, labels)
    assert len(seen) == 2 + 10, "VehicleID's protocol draws ten galleries"


def test_a_collapsed_network_is_as_good_as_chance_in_a_gallery_of_one_image_per_class():
    found = one_per_class_gallery(torch.zeros(200, 8), torch.arange(200) % 20, ks=(1, 5), draws=2)
    assert found["R@1"] == pytest.approx(1 / 20)
    assert found["R@5"] == pytest.approx(5 / 20)
    assert found["MRR"] == pytest.approx(sum(1 / rank for rank in range(1, 21)) / 20)
    assert found["R@1_sd"] == 0


def test_one_per_class_needs_a_query():
    with pytest.raises(ValueError, match="two images"):
        one_per_class_gallery(X, torch.arange(10), ks=(1,))


# Memory and devices -------------------------------------------------------------------------------


MEMORY = """
import sys
import torch
import metrics
n = int(sys.argv[1])
labels = torch.cat([torch.arange(n // 2) // 5, n + torch.arange(n // 2) // 50])
if sys.argv[2] == "large":
    labels = torch.arange(n) // 2_000
x = torch.randn(n, 128)
metrics.retrieval_metrics(x[:2000], labels[:2000])
def status(name):
    line = next(l for l in open("/proc/self/status") if l.startswith(name))
    return int(line.split()[1]) / 1024
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # forget the peak so far
before = status("VmRSS")
metrics.retrieval_metrics(x, labels)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads Linux's /proc")
@pytest.mark.parametrize(("images", "classes"), [("16000", "small"), ("10000", "large")])
def test_memory_is_bounded(images, classes):
    """The whole similarity matrix would be 1,000 MB; in float64, with its order, 1,600."""
    command = [sys.executable, "-c", MEMORY, images, classes]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 512
