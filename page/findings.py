"""Details of an evaluation: neighbours, confused classes, R@1 of each class, intervals.

All are computed from the embeddings of the first evaluation of a data set. If there are more
queries than can be searched in seconds, a random sample of them is used, and the page says so; the
gallery is always the whole one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

import metrics
from dataset.base import ImageSet
from dataset.files import folded
from evaluation.embedding import Embedded
from evaluation.measuring import worst_queries
from evaluation.pictures import random_queries
from metrics import comparison
from page.thumbnails import Thumbnails
from utils import InputError

MOST_COMPARISONS = 180_000_000  # queries times gallery: 3,000 queries of SOP, all of CUB
TOP = 10
RESAMPLES = 1000
SHOWN_QUERIES = 8  # in each group
SHOWN_PAIRS = 12
MOST_CHOSEN = 24


class Search:
    """A random sample of the queries (or all, if they are few) and their nearest images.

    Attributes:
        queries: (Q,) their places among the images, ascending.
        per_query: their `metrics.retrieval_per_query`.
        found, cosines: (Q, 10) places in the gallery, nearest first, and their cosines.
        scores: their metrics for the bootstrap. replicates: (1000, M) resampled means.
    """

    def __init__(self, judged: Embedded, seed: int = 1) -> None:
        total = len(judged.images)
        self.judged = judged
        rng = np.random.default_rng(seed)
        gallery_images, gallery = judged.searched
        chosen = rng.permutation(total)[: max(1, MOST_COMPARISONS // len(gallery))]
        self.queries = np.sort(chosen)
        own = None
        if judged.gallery is None:  # an image must not find itself
            places = torch.arange(total)
            own = (places[torch.from_numpy(self.queries)], places)
        try:
            self.per_query = metrics.retrieval_per_query(
                judged.embeddings[torch.from_numpy(self.queries)],
                judged.images.labels[self.queries],
                gallery,
                gallery_images.labels,
                exclude=own,
            )
        except ValueError as error:
            raise InputError(f"{judged.task.title}: {error}") from error
        self.found, self.cosines = judged.nearest(self.queries, TOP)
        labels = judged.images.labels
        self.scores = comparison.query_scores(self.per_query, judged.task.ks, labels[self.queries])
        (drawn,) = comparison.replicates([self.scores], RESAMPLES, seed)
        means = torch.tensor(list(self.scores.means().values()), dtype=drawn.dtype)
        # Means over a part of the classes vary more than those over all.
        share = len(np.unique(labels[self.queries])) / len(np.unique(labels))
        self.replicates = means + (drawn - means) * math.sqrt(share)

    @property
    def sampled(self) -> str:
        """The size of the sample in words; "" if all queries were searched."""
        total = len(self.judged.images)
        if len(self.queries) == total:
            return ""
        return f"{len(self.queries):,} of the {total:,} queries, drawn at random"

    def intervals(self, numbers: Mapping[str, float]) -> dict[str, list[float]]:
        """95 % intervals over the classes, of metrics that rest on two classes or more."""
        found = {}
        columns = zip(self.scores.names, self.replicates.T, self.scores.rest_on(), strict=True)
        for name, values, classes in columns:
            if name in numbers and classes > 1:
                found[name] = comparison.share_interval(numbers[name], values, classes)
        return found


# --- galleries ------------------------------------------------------------------------------------


def galleries(search: Search, chosen: Sequence[str], thumbs: Thumbnails, seed: int) -> list[dict]:
    """Groups of queries with their ten nearest images: chosen, random, best and worst.

    Raises:
        InputError: nothing among the images has one of the names in `chosen`.
    """
    judged = search.judged
    best = best_queries(search, seed)
    worst = one_per_class(search, worst_queries(search.per_query))
    groups = []
    if chosen:
        words = f"The queries whose class or file contains {' or '.join(chosen)}."
        groups.append(("Chosen", words, named_queries(judged.images, chosen)))
    random = random_queries(judged.images.labels, SHOWN_QUERIES, seed)
    words = "One image from each of a few random classes, whatever the result."
    groups.append(("Random", words, random))
    part = f" Among {search.sampled}." if search.sampled else ""
    words = f"The queries with the highest MAP@R, one per class.{part}"
    groups.append(("Best", words, best))
    candidates = len(judged.searched[0]) - (judged.gallery is None)
    words = (
        "The queries whose nearest image of the right class is farthest down the list of "
        f"{candidates:,}, one per class.{part}"
    )
    groups.append(("Worst", words, worst))
    return [
        {"title": title, "about": about, "rows": _rows(search, queries, thumbs)}
        for title, about, queries in groups
        if len(queries)
    ]


def best_queries(search: Search, seed: int) -> np.ndarray:
    """Queries of the highest MAP@R, of different classes; of equal ones larger classes first."""
    precision, relevant = (search.per_query[name].numpy() for name in ("MAP@R", "relevant"))
    luck = np.random.default_rng(seed).random(len(precision))
    order = np.lexsort([luck, -relevant, -precision])
    order = order[(relevant[order] > 0) & (precision[order] > 0)]
    return one_per_class(search, order)


def one_per_class(search: Search, order: np.ndarray) -> np.ndarray:
    """The first `SHOWN_QUERIES` of ordered queries, one per class, as places among the images."""
    labels = search.judged.images.labels[search.queries[order]]
    _, first = np.unique(labels, return_index=True)
    return search.queries[order[np.sort(first)[:SHOWN_QUERIES]]]


def named_queries(images: ImageSet, words: Sequence[str]) -> np.ndarray:
    """The first images whose class name or path contains one of the words.

    Raises:
        InputError: no image matches one of the words.
    """
    found: list[int] = []
    for word in words:
        wanted = folded(word)
        classes = np.array([wanted in folded(name) for name in images.class_names])
        hits = [
            i
            for i in range(len(images))
            if classes[images.labels[i]] or wanted in folded(images.paths[i])
        ]
        if not hits:
            raise InputError(
                f"--queries {word}: no class and no file of the evaluation contains that; "
                f"a class is called {images.class_names[int(images.labels[0])]}"
            )
        found += hits[: max(1, MOST_CHOSEN // len(words))]
    return np.array(sorted(set(found)))


def _rows(search: Search, queries: np.ndarray, thumbs: Thumbnails) -> list[dict]:
    found, cosines = search.judged.nearest(queries, TOP)
    images, gallery = search.judged.images, search.judged.searched[0]
    rows = []
    for query, places, values in zip(queries, found, cosines, strict=True):
        label = images.labels[query]
        cells = [
            {
                "image": thumbs.want(gallery, place, large=True),
                "name": gallery.class_names[gallery.labels[place]],
                "cosine": round(float(value), 3),
                "right": bool(gallery.labels[place] == label),
            }
            for place, value in zip(places, values, strict=True)
        ]
        row = {"image": thumbs.want(images, query, large=True), "name": images.class_names[label]}
        rows.append({**row, "found": cells, "rank": _rank(search, int(query))})
    return rows


def _rank(search: Search, query: int) -> int | None:
    """The rank, from 1, of the nearest image of a query's class.

    None if there is no such image, or if the query is not in the sample.
    """
    place = int(np.searchsorted(search.queries, query))
    if place == len(search.queries) or search.queries[place] != query:
        return None
    if not search.per_query["relevant"][place]:
        return None
    return int(search.per_query["rank"][place]) + 1


# --- classes --------------------------------------------------------------------------------------


def confusions(search: Search, thumbs: Thumbnails) -> list[dict]:
    """The pairs of classes that are most often confused, with examples.

    A query confuses its class with another if its nearest image is of that one.

    A query with a right image exactly as near as its nearest one is not counted.
    """
    images, gallery = search.judged.images, search.judged.searched[0]
    labels = images.labels[search.queries]
    first = gallery.labels[search.found[:, 0]]
    sizes = np.bincount(labels, minlength=images.num_classes)
    pairs: dict[tuple[int, int], list[int]] = defaultdict(list)
    missed = search.per_query["rank"].numpy() > 0
    for row in np.flatnonzero((labels != first) & missed).tolist():
        pairs[tuple(sorted((int(labels[row]), int(first[row]))))].append(row)

    def weight(pair: tuple[int, int]) -> tuple[float, float]:
        count = len(pairs[pair])
        return count, count / max(1, sizes[pair[0]] + sizes[pair[1]])

    found = []
    for a, b in sorted(pairs, key=weight, reverse=True)[:SHOWN_PAIRS]:
        rows = pairs[a, b]
        rows.sort(key=lambda row: -float(search.cosines[row, 0]))
        examples = [
            {
                "query": thumbs.want(images, search.queries[row], large=True),
                "found": thumbs.want(gallery, search.found[row, 0], large=True),
                "of": images.class_names[labels[row]],
                "as": images.class_names[first[row]],
                "cosine": round(float(search.cosines[row, 0]), 3),
            }
            for row in rows[:3]
        ]
        names = [images.class_names[label] for label in (a, b)]
        counts = [int((labels[rows] == label).sum()) for label in (a, b)]
        totals = [int(sizes[label]) for label in (a, b)]
        found.append({"names": names, "counts": counts, "sizes": totals, "examples": examples})
    return found


def class_scores(search: Search, thumbs: Thumbnails, seed: int) -> dict[str, Any]:
    """A histogram of R@1 over the classes, and the classes with the lowest (below 1).

    Equal ones are ordered by MAP@R, and then at random: in the order of the data set, similar
    classes would follow each other.
    """
    images = search.judged.images
    classes, sizes, values = comparison.by_class(search.scores)
    names = search.scores.names
    recall = values[:, names.index("R@1")].numpy() if "R@1" in names else np.zeros(0)
    precision = values[:, names.index("MAP@R")].nan_to_num(0).numpy()
    bins = np.minimum((recall * 10 + 1e-9).astype(int), 9)
    enough = np.flatnonzero(sizes.numpy() >= 2)
    luck = np.random.default_rng(seed).random(len(sizes))
    wrong = enough[recall[enough] < 1] if len(recall) else enough[:0]
    lowest = []
    for c in wrong[np.lexsort([luck[wrong], precision[wrong], recall[wrong]])][:SHOWN_PAIRS]:
        label = int(classes[c])
        own = np.flatnonzero(images.labels == label)[:3]
        lowest.append(
            {
                "name": images.class_names[label],
                "score": round(float(recall[c]), 4),
                "size": int(sizes[c]),
                "images": [thumbs.want(images, index) for index in own],
            }
        )
    return {
        "histogram": np.bincount(bins, minlength=10).tolist() if len(recall) else [],
        "lowest": lowest,
        "count": len(enough),
        "never": int((recall[enough] == 0).sum()) if len(recall) else 0,
    }


# --- numbers --------------------------------------------------------------------------------------


def histogram(values: np.ndarray, bins: int = 40) -> dict[str, list[float]]:
    """Counts and edges of a histogram; a single bin if all values are equal."""
    low, high = float(values.min()), float(values.max())
    if not high > low:
        return {"counts": [len(values)], "edges": [low - 0.5, low + 0.5]}
    counts, edges = np.histogram(values, bins=bins)
    return {"counts": counts.tolist(), "edges": [float(f"{e:.5g}") for e in edges]}
