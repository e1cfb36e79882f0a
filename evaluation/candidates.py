"""Evaluated checkpoints side by side: rows of a table, means over seeds, paired tests.

A candidate has what evaluate.py made of it; here are numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dataset
import options
from evaluation.embedding import Viewing
from evaluation.measuring import Result, rows_of
from evaluation.tables import HIDDEN, Row
from evaluation.tasks import Task
from metrics import comparison
from utils import InputError

if TYPE_CHECKING:
    import torch

    from net import EmbeddingNet


@dataclass(frozen=True)
class Candidate:
    """A checkpoint that is to be evaluated, and afterwards what it reached.

    Attributes:
        path: its file. label: what tables call it.
        trained: the options of its training; empty for a released file.
        data, viewing, network: see `networks.Opened`.
        tasks: of `data`; candidates on the same data share them.
        kmeans_restarts: how often k-means starts.
        weights: see `networks.Opened`.
        results: one per task. replicates: a bootstrap for each of them.
    """

    path: str
    label: str
    trained: dict[str, Any]
    data: dataset.Choice
    viewing: Viewing
    network: EmbeddingNet
    tasks: list[Task]
    kmeans_restarts: int = 1
    weights: str = ""
    results: list[Result] = field(default_factory=list)
    replicates: list[torch.Tensor] = field(default_factory=list)

    def scores(self, number: int = 0) -> comparison.Scores:
        """The bootstrap's view of one result."""
        per_query = self.results[number].per_query
        assert per_query is not None
        return comparison.query_scores(per_query, self.tasks[number].ks)

    def rows(self) -> list[Row]:
        """One row per result."""
        found = []
        for number, (task, result) in enumerate(zip(self.tasks, self.results, strict=True)):
            intervals = {}
            if self.replicates:
                names = self.scores(number).names
                columns = zip(names, self.replicates[number].T, strict=True)
                intervals = {name: comparison.interval(values) for name, values in columns}
            about = {
                "checkpoint": self.path,
                "dataset": self.data.name,
                "images": len(task.queries),
                "classes": task.queries.num_classes,
                "kmeans_restarts": self.kmeans_restarts,
                **({} if task.dims is None else {"dimensions": task.dims}),
                **({"weights": self.weights} if self.weights else {}),
            }
            found += rows_of(result, self.label, intervals=intervals, about=about)
        return found


def labels_of(paths: Sequence[str]) -> list[str]:
    """A short name for each checkpoint: its run's folder, or as much as tells them apart.

    Raises:
        InputError: a checkpoint is named twice.
    """
    files = [Path(path) for path in paths]
    if len({file.resolve() for file in files}) < len(files):
        raise InputError("--resume names a checkpoint twice; name each once")
    if len(files) == 1:
        return [""]
    for shorten in (
        lambda file: file.resolve().parent.name,
        lambda file: file.stem,
        lambda file: f"{file.resolve().parent.name}/{file.stem}",
    ):
        labels = [shorten(file) for file in files]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def bootstrapped(candidates: Sequence[Candidate], resamples: int, seed: int) -> list[Candidate]:
    """The candidates with their bootstraps; those of one data set see the same draws."""
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


def averages(candidates: Sequence[Candidate]) -> list[Row]:
    """One row for each task of each configuration that several of the checkpoints are seeds of."""
    # Of several checkpoints of one run the best one stands for it.
    ordered = sorted(candidates, key=lambda one: not one.path.endswith("_best.pth"))
    known = [options.configuration(one.trained) if one.trained else {} for one in ordered]
    groups = comparison.seeds_of_one(known, [one.trained.get("seed") for one in ordered])
    groups = [[ordered[position] for position in group] for group in groups]
    names = [method_name(group[0].trained, len(group)) for group in groups]
    found = []
    for members, name in zip(groups, names, strict=True):
        label = name if names.count(name) == 1 else f"{name} ({members[0].label}, …)"
        for parts in zip(*(member.rows() for member in members), strict=True):
            numbers, spread = comparison.mean_and_deviation([part.numbers for part in parts])
            spread = {name: value for name, value in spread.items() if not name.startswith(HIDDEN)}
            about = {**parts[0].about, "checkpoint": " ".join(member.path for member in members)}
            labels = tuple(member.label for member in members)
            found.append(Row(parts[0].task, label, numbers, spread, about=about, members=labels))
    return found


def method_name(trained: dict[str, Any], seeds: int) -> str:
    """What was trained, for the first column of a table."""
    parts = [trained.get("loss"), trained.get("model"), f"{seeds} seeds"]
    return ", ".join(str(part) for part in parts if part)


@dataclass(frozen=True)
class Test:
    """Whether B is better than A on one task."""

    a: str
    b: str
    task: str
    differences: dict[str, comparison.Difference]


def paired_tests(candidates: Sequence[Candidate]) -> list[Test]:
    """The first checkpoint (A) against each other one (B) that saw the same queries."""
    first, *others = candidates
    found = []
    for other in others:
        if other.tasks is not first.tasks:
            continue
        for number, task in enumerate(first.tasks):
            differences = comparison.paired_differences(
                first.scores(number),
                other.scores(number),
                first.replicates[number],
                other.replicates[number],
            )
            found.append(Test(first.label, other.label, task.title, differences))
    return found


def caption(candidates: Sequence[Candidate], rows: Sequence[Row]) -> str:
    """What a table shows, in a sentence or two."""
    tasks = {task.name: task for candidate in candidates for task in candidate.tasks}
    sizes = "; ".join(f"{name}: {task.describe()}" for name, task in tasks.items())
    spread = " Mean ± standard deviation." if any(row.spread for row in rows) else ""
    return f"Retrieval of unseen classes, in percent ({sizes}).{spread}"


def json_content(
    rows: Sequence[Row], tests: Sequence[Test], *, seed: int, bootstrap: int | None
) -> dict[str, Any]:
    """All numbers: one entry per row, and the tests; `bootstrap` counts the resamples."""
    results = []
    for row in rows:
        content = {"title": row.task, **row.about, **row.numbers}
        if row.label:
            content["label"] = row.label
        if row.spread:
            content["standard_deviation"] = row.spread
        if row.intervals:
            content["interval_95"] = row.intervals
        if row.members:
            content["mean_of"] = row.members
        results.append(content)
    content = {"results": results, "seed": seed}
    if bootstrap:
        content["bootstrap_resamples"] = bootstrap
    if tests:
        content["paired_tests"] = [
            {
                "a": test.a,
                "b": test.b,
                "title": test.task,
                **{name: values._asdict() for name, values in test.differences.items()},
            }
            for test in tests
        ]
    return content
