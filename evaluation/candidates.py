"""Evaluated checkpoints side by side: rows of a table, means over seeds, paired tests."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dataset
import options
from evaluation import meanings, tables
from evaluation.embedding import Viewing
from evaluation.measuring import OFFICIAL, Result, rows_of
from evaluation.networks import fingerprint_of
from evaluation.tables import Row
from evaluation.tasks import Task, images_of
from evaluation.whitening import Origin
from metrics import comparison
from metrics.comparison import Test
from utils import InputError

if TYPE_CHECKING:
    import torch

    from evaluation.networks import Opened
    from net import EmbeddingNet


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to evaluate, and later its results.

    Attributes:
        path: its file. label: its name in tables.
        trained: the options of its training; empty for a released file.
        data, viewing, network, weights: see `networks.Opened`. origin: where the network is from.
        tasks: those of `data`; candidates on the same data share them.
        kmeans_restarts: the number of k-means runs, of which the best counts.
        postprocessing: how its embeddings were post-processed, in words.
        results: one per task. replicates: bootstrap replicates, one tensor per task.
    """

    path: str
    label: str
    trained: dict[str, Any]
    data: dataset.Choice
    viewing: Viewing
    network: EmbeddingNet
    tasks: list[Task]
    origin: Origin
    kmeans_restarts: int = 1
    weights: str = ""
    postprocessing: str = ""
    results: list[Result] = field(default_factory=list)
    replicates: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def of(
        cls, opened: Opened, path: str, label: str, tasks: list[Task], kmeans_restarts: int
    ) -> Candidate:
        """The candidate of an opened checkpoint."""
        return cls(
            path,
            label,
            opened.trained,
            opened.data,
            opened.viewing,
            opened.network,
            tasks,
            Origin.of(opened),
            kmeans_restarts,
            opened.weights,
        )

    def scores(self, number: int = 0) -> comparison.Scores:
        """The per-query scores of one result, which a bootstrap resamples."""
        per_query = self.results[number].per_query
        assert per_query is not None
        task = self.tasks[number]
        return comparison.query_scores(per_query, task.ks, task.queries.labels)

    def rows(self) -> list[Row]:
        """One row per result."""
        found = []
        for number, (task, result) in enumerate(zip(self.tasks, self.results, strict=True)):
            intervals = {}
            if self.replicates:
                scores = self.scores(number)
                drawn = self.replicates[number].T, scores.rest_on()
                each = zip(scores.means().items(), *drawn, strict=True)
                intervals = {n: comparison.share_interval(v, *own) for (n, v), *own in each}
            about = {
                "checkpoint": self.path,
                "dataset": self.data.name,
                "images": len(task.queries),
                "classes": task.queries.num_classes,
                "kmeans_restarts": self.kmeans_restarts,
                **({} if task.dims is None else {"dimensions": task.dims}),
                **({"weights": self.weights} if self.weights else {}),
                **({"postprocessing": self.postprocessing} if self.postprocessing else {}),
            }
            found += rows_of(result, self.label, intervals=intervals, about=about)
        return found


def labels_of(paths: Sequence[str]) -> list[str]:
    """A short name for each checkpoint: its run's folder, or as much of its path as is needed.

    Raises:
        InputError: a checkpoint is named twice.
    """
    # Not Path.resolve, which raises RuntimeError for links that lead to each other.
    files = [Path(os.path.realpath(path)) for path in paths]
    if len(set(files)) < len(files):
        raise InputError("--resume names a checkpoint twice; name each once")
    if len(paths) == 1:
        return [""]
    parents, stems = [file.parent.name for file in files], [Path(path).stem for path in paths]
    both = [f"{parent}/{stem}" for parent, stem in zip(parents, stems, strict=True)]
    for labels in (parents, stems, both):
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def fingerprints(candidates: Sequence[Candidate]) -> dict[str, str]:
    """Fingerprints of the networks, and of the images that they are evaluated on."""
    found = {}
    for each in candidates:
        images = images_of(each.tasks)
        prints = " and ".join(part.content_fingerprint() for part in images)
        found[f"the network of {each.path}"] = fingerprint_of(each.network)
        found[f"the images for {each.path}"] = f"{sum(map(len, images)):,} ({prints})"
    return found


def bootstrapped(candidates: Sequence[Candidate], resamples: int, seed: int) -> list[Candidate]:
    """The candidates with bootstrap replicates; those on one data set share the same draws."""
    by_data: dict[int, list[int]] = {}
    for position, candidate in enumerate(candidates):
        by_data.setdefault(id(candidate.tasks), []).append(position)
    found = list(candidates)
    for positions in by_data.values():
        tasks = range(len(candidates[positions[0]].tasks))
        drawn = [
            comparison.replicates([candidates[p].scores(n) for p in positions], resamples, seed)
            for n in tasks
        ]
        for i, p in enumerate(positions):
            found[p] = replace(found[p], replicates=[drawn[n][i] for n in tasks])
    return found


@dataclass(frozen=True)
class Subject:
    """One side of a test: a checkpoint, or all seeds of one configuration.

    Attributes:
        label: its name in tables.
        members: its checkpoints, each with another seed.
    """

    label: str
    members: list[Candidate]

    @property
    def tasks(self) -> list[Task]:
        """The tasks of all members."""
        return self.members[0].tasks

    def rows(self) -> list[list[Row]]:
        """The rows of all members, grouped by task."""
        return [list(parts) for parts in zip(*(one.rows() for one in self.members), strict=True)]

    def of_seeds(self, number: int) -> dict[Any, Mapping[str, float]]:
        """Seed → the numbers of a task."""
        return {one.trained.get("seed"): one.results[number].numbers for one in self.members}

    def means(self, number: int) -> dict[str, float]:
        """The means of the bootstrapped scores, averaged over the members."""
        return comparison.means_over([one.scores(number) for one in self.members])

    def replicates(self, number: int) -> torch.Tensor:
        """(resamples, M): bootstrap replicates, averaged over the members."""
        return sum(one.replicates[number] for one in self.members) / len(self.members)


def subjects_of(candidates: Sequence[Candidate]) -> list[Subject]:
    """Groups of seeds, and the checkpoints that are in no group, in the order of `candidates`.

    Of several checkpoints of one run, the best joins the group, and the others stay alone.
    """
    ordered = sorted(candidates, key=lambda one: not one.path.endswith("_best.pth"))
    known = [options.configuration(one.trained) if one.trained else {} for one in ordered]
    found = comparison.seeds_of_one(known, [one.trained.get("seed") for one in ordered])
    groups = [[ordered[position] for position in group] for group in found]
    names = [method_name(group[0].trained, len(group)) for group in groups]
    subjects = [
        Subject(name if names.count(name) == 1 else f"{name} ({members[0].label}, …)", members)
        for members, name in zip(groups, names, strict=True)
    ]
    grouped = {id(one) for group in groups for one in group}
    subjects += [Subject(one.label, [one]) for one in candidates if id(one) not in grouped]
    place = {id(one): number for number, one in enumerate(candidates)}
    return sorted(subjects, key=lambda subject: min(place[id(one)] for one in subject.members))


def averages(candidates: Sequence[Candidate]) -> list[Row]:
    """A row with the mean over seeds, for each task of each configuration with several seeds."""
    found = []
    for subject in subjects_of(candidates):
        if len(subject.members) < 2:
            continue
        for parts in subject.rows():
            numbers, deviation = comparison.mean_and_deviation([part.numbers for part in parts])
            deviation = meanings.without_counts(deviation)
            checkpoints = " ".join(member.path for member in subject.members)
            found.append(
                Row(
                    parts[0].task,
                    subject.label,
                    numbers,
                    deviation,
                    about={**parts[0].about, "checkpoint": checkpoints},
                    members=tuple(member.label for member in subject.members),
                    repeats=len(parts),
                )
            )
    return found


def method_name(trained: dict[str, Any], seeds: int) -> str:
    """Loss, model and number of seeds, for the first column of a table."""
    parts = [trained.get("loss"), trained.get("model"), f"{seeds} seeds"]
    return ", ".join(str(part) for part in parts if part)


def paired_tests(candidates: Sequence[Candidate]) -> list[Test]:
    """Tests the first subject (A) against each other one (B) that saw the same queries.

    Checkpoints that differ only in the seed are one subject, and not compared with each other.
    Groups that share two or more seeds are compared over these; others over the classes, if there
    are bootstrap replicates.
    """
    first, *others = subjects_of(candidates)
    found = []
    for number, task in enumerate(first.tasks):
        tests = [
            _test(first, other, number, task.title)
            for other in others
            if other.tasks is first.tasks
        ]
        found += [test for test in tests if test is not None]
    return comparison.corrected(found, lambda test: test.task)


def _test(a: Subject, b: Subject, number: int, task: str) -> Test | None:
    seeds = [subject.of_seeds(number) for subject in (a, b)]
    shared = len(seeds[0].keys() & seeds[1].keys())
    if min(len(a.members), len(b.members), shared) > 1:
        differences = comparison.seed_differences(*map(_shown, seeds))
        return Test(a.label, b.label, task, "seeds", shared, differences)
    if not (a.members[0].replicates and b.members[0].replicates):
        return None
    means = [subject.means(number) for subject in (a, b)]
    drawn = [subject.replicates(number) for subject in (a, b)]
    classes = a.tasks[number].queries.num_classes
    rest_on = a.members[0].scores(number).rest_on()
    differences = comparison.paired_differences(*means, *drawn, rest_on)
    return Test(a.label, b.label, task, "classes", classes, differences)


def _shown(seeds: Mapping[Any, Mapping[str, float]]) -> dict[Any, dict[str, float]]:
    """The metrics of each seed that are tested: all but those of the official protocol."""
    metrics = {seed: meanings.without_counts(numbers) for seed, numbers in seeds.items()}
    return {
        seed: {name: value for name, value in each.items() if not name.startswith(OFFICIAL)}
        for seed, each in metrics.items()
    }


def doubts(candidates: Sequence[Candidate]) -> list[str]:
    """Sentences about the limits of the numbers, each once.

    A sentence that concerns only some of the candidates on its task begins with their labels.
    """
    evaluated = Counter(result.title for one in candidates for result in one.results)
    found: dict[tuple[str, str], list[str]] = {}
    for one in candidates:
        for result in one.results:
            for about in meanings.doubts(result.numbers):
                found.setdefault((result.title, about), []).append(one.label)
    return [
        f"{title if len(labels) == evaluated[title] else ', '.join([*labels, title])}: {about}"
        for (title, about), labels in found.items()
    ]


def caption(candidates: Sequence[Candidate], rows: Sequence[Row]) -> str:
    """A caption for a table, in a sentence or two."""
    tasks = {task.name: task for candidate in candidates for task in candidate.tasks}
    sizes = "; ".join(f"{name}: {task.describe()}" for name, task in tasks.items())
    done = ", ".join(dict.fromkeys(one.postprocessing for one in candidates if one.postprocessing))
    done = f" With {done}." if done else ""
    return f"Retrieval, in percent ({sizes}).{done}{tables.about_spread(rows)}"
