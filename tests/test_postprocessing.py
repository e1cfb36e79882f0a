"""What is done to embeddings before they are searched, against plain loops over the definitions."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import metrics
from metrics.expansion import expanded
from metrics.neighbours import as_images, nearest
from metrics.reranking import Reranking

pytestmark = pytest.mark.usefixtures("one_thread")


def clusters(
    classes: int, images: int, size: int, seed: int = 0, spread: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings around a centre for each class, and labels, in a random order."""
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.repeat(np.arange(classes), images))
    centres = rng.normal(size=(classes, size))
    x = centres[labels] + spread * rng.normal(size=(len(labels), size))
    return x.astype(np.float32), labels


def unit(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


# --- neighbours, expansion and augmentation -------------------------------------------------------


def expanded_by_loops(
    x: np.ndarray, gallery: np.ndarray | None, k: int, alpha: float
) -> np.ndarray:
    queries, images = unit(x), unit(x if gallery is None else gallery)
    found = []
    for number, query in enumerate(queries):
        others = [
            (float(query @ image), image)
            for place, image in enumerate(images)
            if gallery is not None or place != number
        ]
        others.sort(key=lambda pair: -pair[0])
        total = query + sum(max(cosine, 0.0) ** alpha * image for cosine, image in others[:k])
        found.append(total / np.linalg.norm(total))
    return np.stack(found)


@pytest.mark.parametrize("alpha", [0.0, 3.0])
@pytest.mark.parametrize("apart", [False, True])
def test_expansion_is_its_definition(alpha: float, apart: bool) -> None:
    x, _ = clusters(6, 5, 8)
    gallery = clusters(6, 7, 8, seed=1)[0] if apart else None
    ours = expanded(x, gallery, 4, alpha).numpy()
    np.testing.assert_allclose(ours, expanded_by_loops(x, gallery, 4, alpha), atol=1e-6)


def test_tied_neighbours_count_with_the_mean_over_their_orders() -> None:
    query = np.array([[1.0, 0.0]])
    gallery = np.array([[1.0, 1.0], [3.0, 3.0], [1.0, -1.0], [-1.0, 0.0]])  # three as close
    means = [
        expanded_unnormalised(query[0], unit(gallery[list(chosen)]))
        for chosen in [(0, 1), (0, 2), (1, 2)]
    ]
    mean = np.mean(means, axis=0)
    ours = expanded(query, gallery, 2, alpha=0.0).numpy()[0]
    np.testing.assert_allclose(ours, mean / np.linalg.norm(mean), atol=1e-6)


def expanded_unnormalised(query: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    return query + neighbours.sum(axis=0)


def test_neighbours_do_not_depend_on_the_order_nor_on_the_parts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, _ = clusters(10, 6, 4, seed=3)
    x[7] = x[8] = x[9] = 2 * x[3]  # exactly as close to everything
    order = np.random.default_rng(0).permutation(len(x))
    whole = expanded(x, None, 5).numpy()
    monkeypatch.setattr("metrics.neighbours.HELD", 7 * len(x))
    shuffled = expanded(x[order], None, 5).numpy()
    np.testing.assert_allclose(shuffled, whole[order], atol=1e-6)


def test_neighbours_are_those_of_float64() -> None:
    """Cosines that float32 does not tell apart are put in order by float64."""
    rng = np.random.default_rng(0)
    base = rng.normal(size=64)
    gallery = base + 1e-9 * rng.normal(size=(50, 64))
    query = rng.normal(size=(3, 64))
    images = as_images(gallery, "gallery")
    (near,) = nearest(as_images(query), images, 10)
    expected = np.argsort(-(unit(query) @ unit(gallery).T), axis=1)[:, :10]
    assert (np.sort(near.index.numpy(), axis=1) == np.sort(expected, axis=1)).mean() > 0.9


@pytest.mark.parametrize("k", [0, 30, 31])
def test_too_many_neighbours_are_refused(k: int) -> None:
    x, _ = clusters(6, 5, 8)
    with pytest.raises(ValueError, match="choose a number from 1 to 29"):
        expanded(x, None, k)


# --- re-ranking -----------------------------------------------------------------------------------


def reranked_by_loops(
    x: np.ndarray, gallery: np.ndarray | None, k1: int, k2: int, balance: float
) -> np.ndarray:
    """(Q, G) minus the distances of the header of metrics/reranking.py, image by image."""
    images = unit(x if gallery is None else np.concatenate([x, gallery]))
    first, count = (0 if gallery is None else len(x)), len(images)
    cosine = images @ images.T

    def near(p: int, k: int) -> set[int]:
        closer = {
            g: sum(cosine[p, o] > cosine[p, g] + 1e-12 for o in range(count) if o != p)
            for g in range(count)
            if g != p
        }
        return {p} | {g for g, number in closer.items() if number < k}

    neighbours = {k: [near(p, k) for p in range(count)] for k in {k1, round(k1 / 2), k2 - 1}}

    def mutual(p: int, k: int) -> set[int]:
        return {g for g in neighbours[k][p] if p in neighbours[k][g]}

    vectors = np.zeros((count, count))
    for p in range(count):
        wide = set(mutual(p, k1))
        for q in mutual(p, k1):
            half = mutual(q, round(k1 / 2))
            if 3 * len(half & mutual(p, k1)) >= 2 * len(half):
                wide |= half
        for g in wide:
            vectors[p, g] = math.exp(-(1 - cosine[p, g]))
        vectors[p] /= vectors[p].sum()
    smooth = np.stack([vectors[sorted(neighbours[k2 - 1][p])].mean(axis=0) for p in range(count)])
    found = np.zeros((len(x), count - first))
    for p in range(len(x)):
        for g in range(first, count):
            least = np.minimum(smooth[p], smooth[g]).sum()
            jaccard = 1 - least / np.maximum(smooth[p], smooth[g]).sum()
            found[p, g - first] = -((1 - balance) * jaccard + balance * (1 - cosine[p, g]))
    return found


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(("k1", "k2", "balance"), [(6, 3, 0.3), (5, 1, 0.0), (8, 4, 0.7)])
def test_reranking_is_its_definition(apart: bool, k1: int, k2: int, balance: float) -> None:
    x, _ = clusters(4, 5, 6, spread=0.7)
    x[3] = x[11]
    gallery = clusters(4, 6, 6, seed=1, spread=0.7)[0] if apart else None
    ours = Reranking(x, gallery, k1, k2, balance)(torch.arange(len(x))).numpy()
    expected = reranked_by_loops(x, gallery, k1, k2, balance)
    np.testing.assert_allclose(ours, expected, atol=1e-12)


def test_reranking_by_distance_alone_is_the_plain_search() -> None:
    x, labels = clusters(12, 6, 8)
    own = np.arange(len(x))
    plain = metrics.retrieval_per_query(x, labels)
    score = Reranking(x, None, 10, 4, balance=1.0)
    ours = metrics.retrieval_per_query(x, labels, x, labels, exclude=(own, own), score=score)
    for name, values in plain.items():
        torch.testing.assert_close(ours[name], values, rtol=0, atol=1e-12)


def test_reranking_helps_where_neighbourhoods_tell_more_than_distances() -> None:
    x, labels = clusters(20, 12, 16, spread=1.2)
    own = np.arange(len(x))
    plain = metrics.retrieval_metrics(x, labels)["MAP@R"]
    found = metrics.retrieval_per_query(
        x, labels, x, labels, exclude=(own, own), score=Reranking(x)
    )
    assert metrics.summarise(found, [1])["MAP@R"] > plain + 0.05


def test_reranking_embeddings_that_are_all_the_same_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("metrics.reranking.MOST_LINKS", 1000)
    with pytest.raises(ValueError, match="exactly the same"):
        Reranking(np.ones((50, 4)), None, 5, 2)


# --- searching by a score -------------------------------------------------------------------------


@pytest.mark.parametrize("apart", [False, True])
def test_a_search_by_scores_has_the_metrics_of_these_scores(apart: bool) -> None:
    """Cosines of whole numbers, with many ties, given as scores: the same answer."""
    rng = np.random.default_rng(0)
    x, labels = rng.integers(-2, 3, size=(60, 4)).astype(np.float32), rng.integers(0, 5, 60)
    y, others = (x[40:], labels[40:]) if apart else (x, labels)
    queries, theirs = (x[:40], labels[:40]) if apart else (x, labels)
    groups = (np.arange(40), np.full(20, -1)) if apart else (np.arange(60), np.arange(60))
    lengths = [np.linalg.norm(side.astype(np.float64), axis=1).clip(1e-9) for side in (queries, y)]
    cosines = torch.from_numpy((queries @ y.T).astype(np.float64) / np.outer(*lengths))
    plain = metrics.retrieval_per_query(queries, theirs, y, others, exclude=groups)
    ours = metrics.retrieval_per_query(
        queries, theirs, y, others, exclude=groups, score=lambda rows: cosines[rows]
    )
    for name, values in plain.items():
        torch.testing.assert_close(ours[name], values, rtol=0, atol=1e-12)
