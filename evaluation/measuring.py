"""Measures a network on a task."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import metrics
import options
import processes
from dataset.readable import too_few_left
from devices import Precision
from evaluation import meanings, tables
from evaluation.embedding import Viewing, embed_readable, progress_bar
from evaluation.networks import fingerprint_of
from evaluation.postprocessing import Searched, postprocessed
from evaluation.tables import Row
from evaluation.tasks import Task, images_of
from evaluation.thresholds import Thresholds
from evaluation.verifying import in_words, verify
from options.ranking import Ranking
from terminal import fitted, say
from utils import InputError

if TYPE_CHECKING:
    from net import EmbeddingNet

OFFICIAL = "one-image gallery "  # in front of the metrics of VehicleID's official protocol
DRAWS = 10  # random galleries of that protocol


@dataclass(frozen=True)
class Result:
    """The numbers of one task, and the embeddings they were computed from.

    Attributes:
        embeddings: (N, d) of the queries. gallery: (G, d), if the task has one.
        per_query: retrieval metrics of each query (`metrics.retrieval_per_query`), with the second
            R@1 if the task has one; None if retrieval was not computed.
        task: reduced to readable images; None if the numbers were read from a file.
        thresholds: recommended by verification; None if that was not computed, or there are too few
            pairs.
    """

    title: str
    numbers: dict[str, float]
    embeddings: torch.Tensor
    gallery: torch.Tensor | None
    seconds: float
    per_query: dict[str, torch.Tensor] | None = None
    task: Task | None = None
    thresholds: Thresholds | None = None


@dataclass(frozen=True)
class How:
    """What to measure, and how.

    Attributes:
        chosen: which of `options.EVALUATED` to compute.
        seed: for random draws. kmeans_restarts: the number of k-means runs; the best counts.
        block_size: images that the search compares at once; it does not affect the numbers.
        ranking: post-processing before the retrieval metrics; rules out the official protocol.
    """

    chosen: Sequence[str] = options.METRICS
    seed: int = 1
    kmeans_restarts: int = 1
    block_size: int | None = None
    ranking: Ranking | None = None


USUAL = How()


def measure(
    network: EmbeddingNet,
    task: Task,
    precision: Precision,
    viewing: Viewing,
    how: How = USUAL,
) -> Result:
    """Measures a network on one task; the arguments are those of `measure_all`."""
    (result,) = measure_all(network, [task], precision, viewing, how)
    return result


def measure_all(
    network: EmbeddingNet,
    tasks: Sequence[Task],
    precision: Precision,
    viewing: Viewing,
    how: How = USUAL,
) -> list[Result]:
    """Measures tasks that differ only in `Task.dims`; their images are embedded once.

    Images that cannot be read are left out, as many as `viewing` allows. The time for embedding
    is part of the first result.

    Raises:
        InputError: too many images cannot be read, too few classes are left, the embeddings are not
            finite, or K or the neighbours of `how.ranking` exceed the gallery.
    """
    start = time.perf_counter()
    title = tasks[0].name
    queries, x = embed_readable(network, tasks[0].queries, precision, viewing, title=title)
    gallery, y = tasks[0].gallery, None
    if gallery is not None:
        gallery, y = embed_readable(network, gallery, precision, viewing, title=f"{title} gallery")
    results, tasks = [], [task.narrowed(queries, gallery) for task in tasks]
    if tasks[0].left_out and (why := too_few_left(images_of(tasks[:1]))):
        raise InputError(why)
    for task in tasks:
        first = slice(task.dims)
        cut = x[:, first], None if y is None else y[:, first]
        numbers, per_query, thresholds = _numbers(network, task, *cut, how)
        end = time.perf_counter()
        results.append(Result(task.title, numbers, *cut, end - start, per_query, task, thresholds))
        start = end
    return results


def _numbers(
    network: EmbeddingNet,
    task: Task,
    x: torch.Tensor,
    y: torch.Tensor | None,
    how: How,
) -> tuple[dict[str, float], dict[str, torch.Tensor] | None, Thresholds | None]:
    """The numbers of a task with embeddings x of the queries and y of the gallery."""
    numbers, chosen = dict[str, float](), how.chosen
    if task.left_out:
        numbers[meanings.LEFT_OUT] = task.left_out
    per_query = thresholds = None
    try:
        if "retrieval" in chosen:
            per_query = _retrieval(task, x, y, how)
            numbers |= metrics.summarise(per_query, task.ks)
            extra = [name for name in per_query if name.startswith("R@")]
            numbers |= {name: float(per_query[name].mean()) for name in extra}
        if "official" in chosen and task.official and not how.ranking:
            numbers |= _official(task, x, how)
        if {"nmi", "f1", "ami"} & set(chosen):
            cluster = partial(_agreement, task, x, y, how)
            found = processes.from_main(cluster)
            numbers |= {name: value for name, value in found.items() if name.lower() in chosen}
        if "verification" in chosen:
            with progress_bar(f"{task.title} pairs") as bar:
                named = {"seed": how.seed, "network": fingerprint_of(network)}
                found, thresholds = verify(task, x, y, **named, progress=bar, share=_share())
            numbers |= found
    except ValueError as error:
        raise InputError(f"{task.title}: {error}") from error
    return numbers, per_query, thresholds


def _retrieval(
    task: Task, x: torch.Tensor, y: torch.Tensor | None, how: How
) -> dict[str, torch.Tensor]:
    searched = postprocessed(x, y, how.ranking) if how.ranking else None
    search = partial(_searched, task, x, y, searched, block_size=how.block_size, share=_share())
    with progress_bar(f"{task.title} search") as bar:
        found = search(False, progress=bar)
    if task.group_name and all(side.groups is not None for side in images_of([task])):
        with progress_bar(f"{task.title} other {task.group_name}s") as bar:
            others = search(True, progress=bar)
        found[f"R@1 other {task.group_name}s"] = metrics.recall_at(others, 1)
    return found


def _searched(
    task: Task,
    x: torch.Tensor,
    y: torch.Tensor | None,
    searched: Searched | None,
    other_groups: bool,
    **how: Any,
) -> dict[str, torch.Tensor]:
    """Retrieval metrics per query; with `other_groups`, without images of a query's own group."""
    queries, alone = task.queries, task.gallery is None
    gallery = queries if alone else task.gallery
    groups = (queries.groups, gallery.groups) if other_groups else None
    if alone and searched is None:
        own = None if groups is None else queries.groups
        return metrics.retrieval_per_query(x, queries.labels, exclude=own, **how)
    if alone and groups is None:
        groups = (np.arange(len(queries)),) * 2  # no image finds itself
    searched = searched or Searched(x, y)
    return metrics.retrieval_per_query(
        searched.queries,
        queries.labels,
        searched.gallery,
        gallery.labels,
        exclude=groups,
        score=searched.score,
        **how,
    )


def _share() -> metrics.Share:
    return metrics.Share(processes.rank(), processes.world(), processes.sum_over)


def _official(task: Task, x: torch.Tensor, how: How) -> dict[str, float]:
    ks = [k for k in task.ks if k <= len(set(task.queries.labels.tolist()))]
    found = metrics.one_per_class_gallery(
        x, task.queries.labels, DRAWS, how.seed, ks, block_size=how.block_size, share=_share()
    )
    return {OFFICIAL + name: value for name, value in found.items()}


def _agreement(task: Task, x: torch.Tensor, y: torch.Tensor | None, how: How) -> dict[str, float]:
    labels = torch.from_numpy(task.queries.labels)
    if task.gallery is not None and y is not None:
        x = torch.cat([x, y])
        labels = torch.cat([labels, torch.from_numpy(task.gallery.labels)])
    with progress_bar(f"{task.title} k-means") as bar:
        return metrics.clustering_metrics(
            x,
            labels,
            seed=how.seed,
            restarts=how.kmeans_restarts,
            ami="ami" in how.chosen,
            progress=bar,
        )


# --- reporting ------------------------------------------------------------------------------------


def rows_of(result: Result, label: str = "", **more: Any) -> list[Row]:
    """A result as a row of a table, with another row for the official protocol if computed.

    Args:
        more: other fields of `Row`.
    """
    official = {
        name.removeprefix(OFFICIAL): value
        for name, value in result.numbers.items()
        if name.startswith(OFFICIAL)
    }
    plain = {name: v for name, v in result.numbers.items() if not name.startswith(OFFICIAL)}
    thresholds = result.thresholds.as_dict() if result.thresholds else {}
    rows = [Row(result.title, label, plain, thresholds=thresholds, **more)]
    if official:
        means = {name: value for name, value in official.items() if not name.endswith("_sd")}
        deviation = {name: official[f"{name}_sd"] for name in means}
        title = f"{result.title}, one image per class as gallery ({DRAWS} draws)"
        about = more.get("about", {})
        rows.append(
            Row(title, label, means, deviation, about=about, repeats=DRAWS, repeated="draws")
        )
    return rows


def table(results: Sequence[Result]) -> str:
    """The numbers as an aligned table, one row per result."""
    return tables.text([row for result in results for row in rows_of(result)])


def print_doubts(results: Sequence[Result]) -> None:
    """Prints sentences about the limits of the numbers."""
    for result in results:
        for about in meanings.doubts(result.numbers):
            say(fitted(f"{result.title}: {about}", "  "))


def print_thresholds(results: Sequence[Result], label: str = "") -> None:
    """Prints the thresholds that verification recommends, with their error rates."""
    for result in results:
        if "EER" in result.numbers:
            title = ", ".join(filter(None, (label, tables.brief(result.title))))
            words = in_words(title, result.numbers, result.thresholds)
            say(fitted(f"\n{words}", " " * 4))


def worst_queries(per_query: Mapping[str, torch.Tensor]) -> np.ndarray:
    """The queries whose nearest image is wrong, the worst first.

    A query is worse if its first right image is ranked lower; among equals, if its MAP@R is lower.
    Queries without an image to find are left out.
    """
    reciprocal, precision = (per_query[name].numpy() for name in ("MRR", "MAP@R"))
    missed = metrics.recall_at(per_query, 1).numpy() < 1
    failed = np.flatnonzero((per_query["relevant"].numpy() > 0) & missed)
    return failed[np.lexsort((precision[failed], reciprocal[failed]))]
