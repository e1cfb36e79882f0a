"""Metrics and k-means: fixtures, hand examples, a plain float64 oracle, and published peers."""

from __future__ import annotations

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import metrics
from metrics import (
    clustering,
    clustering_metrics,
    nmi_f1,
    one_per_class_gallery,
    retrieval,
    retrieval_metrics,
    retrieval_per_query,
    summarise,
)
from metrics.clustering import kmeans

ROOT = Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures"


def clusters_of(classes, dimension, count, noise, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    x = rng.normal(size=(classes, dimension))[labels] + noise * rng.normal(size=(count, dimension))
    return x.astype(np.float32), labels


def unit(x):
    """The same float32 unit vectors as the code's, in float64."""
    scale = (1 / np.maximum(np.linalg.norm(x.astype(np.float64), axis=1), 1e-30)).astype(np.float32)
    return (x * scale[:, None]).astype(np.float64)


def oracle(x, labels, gallery=None, gallery_labels=None, exclude=None):
    """Each query's values from its sorted float64 similarities, one query at a time."""
    leave_one_out = gallery is None
    gallery, gallery_labels = (x, labels) if leave_one_out else (gallery, gallery_labels)
    groups = exclude if isinstance(exclude, tuple) else (exclude, exclude)
    similarities = unit(x) @ unit(gallery).T
    rows = []
    for i, row in enumerate(similarities):
        seen = np.ones(len(gallery), bool)
        if leave_one_out:
            seen[i] = False
        if exclude is not None:
            seen &= groups[1] != groups[0][i]
        same = gallery_labels == labels[i]
        positives, negatives = np.sort(row[seen & same])[::-1], row[seen & ~same]
        size = len(positives)
        if size == 0:
            rows.append((0, len(gallery), 0, 0, 0, 0, 0))
            continue
        closer = np.array([(negatives > p + 1e-12).sum() for p in positives])
        ranks = np.arange(1, size + 1) + closer
        hit = ranks <= size
        precision = (np.arange(1, size + 1) / ranks)[hit].sum()
        tied = (np.abs(negatives - positives[0]) <= 1e-12).sum()
        marp = precision / max(1, hit.sum())
        rank = closer[0]
        rows.append((size, rank, tied, hit.mean(), precision / size, marp, 1 / (1 + rank)))
    names = ("relevant", "rank", "tied", "RP", "MAP@R", "mARP", "MRR")
    return dict(zip(names, np.array(rows).T, strict=True))


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
    assert found["R@2"] == found["RP"] == found["MRR"] == 0


def test_query_class_missing_from_the_gallery_among_others():
    x, labels = clusters_of(12, 8, 200, 0.7)
    gallery, gallery_labels = x[80:], labels[80:]
    kept = ~np.isin(gallery_labels, [0, 5, 11])
    split = x[:80], labels[:80], gallery[kept], gallery_labels[kept]
    assert_same(retrieval_per_query(*split), oracle(*split))


def test_duplicates_do_not_find_themselves():
    x = at_angles(0, 0, 90, 90)
    # Each image's copy is of another class, so the nearest match is behind it.
    found = retrieval_metrics(x, torch.tensor([0, 1, 0, 1]), ks=(1, 2))
    assert found["R@1"] == 0
    assert found["R@2"] == 1
    # And where the copy is of the same class it is a hit.
    assert retrieval_metrics(x, torch.tensor([0, 0, 1, 1]), ks=(1,))["R@1"] == 1


def test_a_collapsed_network_is_seen_by_its_ties():
    x = torch.full((60, 16), 0.3)
    found = retrieval_metrics(x, torch.arange(60) % 6, ks=(1,))
    assert found["R@1"] == 1  # ties go to the same class …
    assert found["queries_tied"] == 60  # … and are counted


# The oracle: ties, duplicates, lone images, groups, every block size ------------------------------


def changed(function, x, labels):
    return function(x), labels


CASES = {
    "plain": clusters_of(20, 16, 300, 1.0, seed=1),
    "many ties": changed(np.round, *clusters_of(9, 4, 200, 1.0, seed=2)),
    "lone images": clusters_of(150, 8, 200, 0.5, seed=3),
    "two classes": clusters_of(2, 12, 150, 2.0, seed=4),
    "closer than float32 tells": changed(
        lambda x: 1 + 1e-4 * x, *clusters_of(10, 24, 200, 1.0, seed=5)
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("count", "block_size"), [(60, 5), (300, 40), (300, None)])
def test_against_the_oracle(name, count, block_size):
    x, labels = (values[:count].copy() for values in CASES[name])
    x[10:20] = x[30:40]  # duplicates, of whatever class
    groups = np.random.default_rng(0).integers(0, 4, len(x))
    assert_same(retrieval_per_query(x, labels, block_size=block_size), oracle(x, labels))
    assert_same(
        retrieval_per_query(x, labels, block_size=block_size, exclude=groups),
        oracle(x, labels, exclude=groups),
    )
    half = len(x) // 2
    split = x[:half], labels[:half], x[half:], labels[half:]
    apart = groups[:half], groups[half:]
    assert_same(
        retrieval_per_query(*split, block_size=block_size, exclude=apart),
        oracle(*split, exclude=apart),
    )


def test_in_runs_when_there_are_many_pairs(monkeypatch):
    x, labels = CASES["two classes"]
    monkeypatch.setattr(metrics, "MAX_PAIRS", 700)
    monkeypatch.setattr(metrics, "MAX_ENTRIES", 64)
    assert_same(retrieval_per_query(x, labels, block_size=40), oracle(x, labels))


def test_every_block_size_gives_the_same_numbers():
    x, labels = clusters_of(300, 64, 3000, 1.4, seed=6)
    x[::7] = x[1::7][: len(x[::7])]
    first, *others = (retrieval_per_query(x, labels, block_size=b) for b in (None, 333, 1000, 8192))
    for other in others:
        for name, values in first.items():
            assert torch.equal(values, other[name]), name


def test_the_order_of_the_images_does_not_matter():
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
@pytest.mark.parametrize("count", [2, 3])
def test_a_search_in_shares_gives_each_the_whole_answer(name, count, monkeypatch):
    x, labels = (values.copy() for values in CASES[name])
    x[10:20] = x[30:40]
    groups = np.random.default_rng(0).integers(0, 4, len(x))
    half = len(x) // 2
    split = x[:half], labels[:half], x[half:], labels[half:]
    for arguments, options in (
        ((x, labels), {}),
        ((x, labels), {"exclude": groups}),
        (split, {}),
    ):
        for block_size in (16, None):
            options["block_size"] = block_size
            expected = retrieval_per_query(*arguments, **options)
            for found in Team(count).search(*arguments, **options):
                for key, values in expected.items():
                    assert torch.equal(found[key], values), key


def test_shares_divide_the_products(monkeypatch):
    x, labels = clusters_of(300, 16, 2000, 1.0)
    sizes = []
    product = retrieval.inner_products
    monkeypatch.setattr(
        retrieval, "inner_products", lambda a, b: sizes.append(len(a) * len(b)) or product(a, b)
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


# What goes in -------------------------------------------------------------------------------------


def test_tensors_arrays_and_scale_are_alike():
    x, labels = CASES["plain"]
    first = retrieval_metrics(x, labels)
    assert first == retrieval_metrics(torch.from_numpy(x * 8), torch.from_numpy(labels) + 7)
    half = torch.from_numpy(x).half()
    assert retrieval_metrics(half, labels) == retrieval_metrics(half.float(), labels)
    assert all(type(v) in (float, int) for v in first.values())


def test_zero_embeddings_are_equally_far_from_everything():
    x = torch.cat([at_angles(0, 10, 180), torch.zeros(1, 2)])
    found = retrieval_per_query(x, torch.tensor([0, 0, 1, 1]))
    assert found["rank"].tolist() == [0, 0, 0, 0]
    assert found["tied"].tolist() == [0, 0, 0, 2]


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


def test_progress_rises_to_one():
    x, labels = CASES["plain"]
    for call in (
        lambda p: retrieval_metrics(x, labels, block_size=64, progress=p),
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
        ((X, Y.float()), {}, "integers"),
        ((X, Y), {"ks": (1, 11)}, "lower --ks"),
        ((X, Y, X[:3], Y[:3]), {"ks": (1, 4)}, "lower --ks"),
        ((X, Y), {"ks": (0,)}, "at least 1"),
        ((X, Y), {"block_size": 0}, "block size"),
        ((X, Y), {"exclude": Y[:4]}, "groups"),
        ((X, Y, X, Y), {"exclude": Y}, "pair"),
    ],
)
def test_bad_input(arguments, options, message):
    with pytest.raises(ValueError, match=message) as error:
        retrieval_metrics(*arguments, **options)
    assert "\n" not in str(error.value)


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
    assert (found["NMI"], found["AMI"], found["F1"]) == (pytest.approx(1), pytest.approx(1), 0)
    with pytest.raises(ValueError, match="one of each"):
        nmi_f1(torch.arange(5), torch.arange(4))


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
    start = clustering._plus_plus(x, 60, torch.Generator().manual_seed(0))
    run = clustering._Lloyd(x, *start)
    centres = start[0].double()
    for _ in range(8):
        labels = torch.cdist(x.double(), centres).argmin(dim=1)
        centres = torch.stack([x[labels == c].double().mean(dim=0) for c in range(60)])
        run.step()
        assert torch.allclose(run.centres.double(), centres, atol=1e-5)


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
    sizes = []
    nearest = clustering._nearest_drawn
    monkeypatch.setattr(
        clustering, "_nearest_drawn", lambda *a: sizes.append(a[2].shape[1]) or nearest(*a)
    )
    monkeypatch.setattr(clustering, "DRAWN_ALONE", 20 * len(x))
    start, labels, distances = clustering._plus_plus(x, 400, torch.Generator().manual_seed(0))
    assert sizes[:20] == [1] * 20
    assert max(sizes) > 20
    assert len(start.unique(dim=0)) == sum(sizes) == 400
    exact = torch.cdist(x.double(), start.double()).square()
    assert torch.allclose(distances.double(), exact.min(dim=1).values, atol=1e-4)
    assert torch.equal(labels, exact.argmin(dim=1))
    assert kmeans(x, 400).inertia < 1.1 * one_by_one


def test_empty_clusters_start_again():
    x = torch.tensor([[0.0], [0.0], [0.0], [10.0], [10.1], [20.0]])
    centres = torch.tensor([[0.0], [10.0], [500.0]])
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    run = clustering._Lloyd(x, centres, labels, (x - centres[labels]).square().sum(dim=1))
    while run.step():
        pass
    assert run.labels.tolist() == [0, 0, 0, 1, 1, 2]


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
        return search(queries, query_labels, gallery, gallery_labels, *rest)

    monkeypatch.setattr(retrieval, "retrieval_metrics", spy)
    one_per_class_gallery(x, labels, draws=2)
    assert seen == [(210, list(range(30)))] * 2


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
def test_memory_is_bounded():
    """20,000 images; the whole similarity matrix would be 1,600 MB."""
    command = [sys.executable, "-c", MEMORY, "20000"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert float(result.stdout) < 512


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("setting", ["highest", "high"])
def test_the_gpu_gives_the_same_numbers(setting):
    x, labels = clusters_of(900, 64, 9000, 1.5, seed=14)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        on_gpu = retrieval_per_query(x, labels, device="cuda")
        first, again = (kmeans(torch.from_numpy(x).cuda(), 300) for _ in range(2))
    finally:
        torch.set_float32_matmul_precision(before)
    for name, values in retrieval_per_query(x, labels).items():
        assert torch.equal(values, on_gpu[name]), name
    assert torch.equal(first.labels, again.labels)
    assert first.inertia == pytest.approx(kmeans(x, 300).inertia, rel=0.01)
