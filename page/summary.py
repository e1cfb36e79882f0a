"""A summary of a run in a few sentences, for the top of its page."""

from __future__ import annotations

from typing import Any

import numpy as np

from evaluation import meanings
from metrics import comparison
from page import counterpart, values
from page.document import against, isolated, of_100, percent
from page.explained import Explained
from utils import plain_number


def summary(run: Explained, first: Explained | None = None, *, alone: bool = True) -> list[str]:
    """A few sentences about a run; with `first`, one of them compares the two.

    Warnings about the metrics come first; if no query had anything to find, the metrics are left
    out. For a run that is `alone` on its page, a sentence says whether its method was worth it.
    """
    if meanings.nothing_to_find(run.numbers):
        return [*_unfinished(run), *run.doubts, *_learned(run)]
    worth = counterpart.sentence(run.record) if alone else ""
    return [
        *_unfinished(run),
        *run.doubts,
        *_reached(run),
        *_picked(run),
        *_averaged(run),
        *_against_published(run),
        *_against(run, first),
        *([worth] if worth else []),
        *_noticed(run),
        *_learned(run),
    ]


# --- its results ----------------------------------------------------------------------------------


def _unfinished(run: Explained) -> list[str]:
    record = run.record
    if record.outcome:
        return []
    options = record.options
    unit, whole = ("step", options.steps) if options.steps else ("epoch", options.epochs)
    done = int(record.rows[-1][unit]) if record.rows else 0
    return [f"Not finished: {done:,} of {whole:,} {unit}s are done; all below may change."]


def _reached(run: Explained) -> list[str]:
    said = []
    for title, numbers in list(run.record.results.items())[:1]:
        recall, interval = numbers.get("R@1"), run.intervals(title).get("R@1")
        if recall is None:
            continue
        sure = ""
        if interval is not None:
            sure = f" (95 % interval {percent(interval[0])} to {percent(interval[1])})"
        of = f" ({run.counts})" if run.counts else ""
        said.append(
            f"R@1 {percent(recall)} %{sure}: for {of_100(recall)} queries the nearest image is of "
            f"the right class{of}.{_unseen(run)}"
        )
    if run.search is not None:
        relevant = run.search.per_query["relevant"].double()
        gallery = len(run.search.judged.searched[0]) - (run.search.judged.gallery is None)
        chance = float((relevant / max(1, gallery)).mean())
        said.append(f"A random image would be right for {plain_number(100 * chance, 2)} of 100.")
    return said or ["This run has not been evaluated yet."]


def _unseen(run: Explained) -> str:
    if run.shared is None or not run.shared.unseen:
        return ""
    count = run.shared.evaluated_classes
    none = f"None of its {count:,} classes was" if count > 1 else "Its one class was not"
    return f" {none} trained on."


def _picked(run: Explained) -> list[str]:
    """The epoch of the metrics, and how it was chosen."""
    record = run.record
    if len(record.evaluated) == 1 and record.outcome:
        return [f"Evaluated once, after epoch {record.best_epoch}: no epoch was picked."]
    if record.best_epoch is None or not record.rows:
        return []
    last = int(record.rows[-1]["epoch"])
    said = f"Best epoch {record.best_epoch} of {last}"
    if record.outcome.get("picked_on") != "test classes":
        return [f"{said}."]
    end = record.evaluated[-1]
    beside = (
        f"the last evaluation, after epoch {int(end['epoch'])}, has R@1 {percent(end['R@1'])} %"
    )
    if int(end["epoch"]) == record.best_epoch:
        beside = "it is also the last one evaluated"
    return [f"{said}, picked by R@1 on the test classes themselves; {beside}."]


def _averaged(run: Explained) -> list[str]:
    """The gain from the running mean of the weights, if there is one."""
    raw, mean = run.record.raw.get("R@1"), run.numbers.get("R@1")
    if raw is None or mean is None:
        return []
    return [
        f"The numbers are those of the running mean of the weights (--ema "
        f"{run.record.options.ema:g}): R@1 is {against(mean, raw)} that of the weights themselves "
        "at the same step."
    ]


# --- comparisons ----------------------------------------------------------------------------------


def _against_published(run: Explained) -> list[str]:
    numbers, known = run.numbers, run.published
    if known is None or "R@1" not in known.numbers or "R@1" not in numbers:
        return []
    apart = against(numbers["R@1"], known.numbers["R@1"])
    changes = f" It differs from the recipe: {', '.join(known.changes)}." if known.changes else ""
    return [
        f"The recipe {known.recipe} is published with R@1 {percent(known.numbers['R@1'])} %; "
        f"this run is {apart} that.{changes}"
    ]


def _against(run: Explained, first: Explained | None) -> list[str]:
    test = None if first is None else paired(first, run)
    if test is None:
        return []
    low, high = 100 * test.low, 100 * test.high
    sure = "could be chance" if low <= 0 <= high else "more than chance among the classes"
    return [
        f"R@1 is {100 * test.difference:+.1f} points against {first.record.title} on the same "
        f"queries (95 % interval {low:+.1f} to {high:+.1f}): {sure}. Other seeds may differ."
    ]


def paired(first: Explained, run: Explained) -> comparison.Difference | None:
    """The difference of a run's R@1 from that of the first, on the same queries.

    None if the queries differ, or are all of one class, which allows no conclusion about others.
    """
    if first.search is None or run.search is None:
        return None
    a, b = first.search, run.search
    same = a.judged.images.fingerprint() == b.judged.images.fingerprint()
    if not same or not np.array_equal(a.queries, b.queries) or len(a.scores.labels.unique()) < 2:
        return None
    made = comparison.paired_differences(
        a.scores.means(), b.scores.means(), a.replicates, b.replicates, a.scores.rest_on()
    )
    return made.get("R@1")


# --- classes and methods --------------------------------------------------------------------------


def _noticed(run: Explained) -> list[str]:
    """The most confused pair of classes, and the class that is found worst."""
    said = []
    if run.confusions:
        pair = run.confusions[0]
        a, b = map(isolated, pair["names"])
        said.append(
            f"Most confused: {a} and {b} ({sum(pair['counts'])} of {sum(pair['sizes'])} queries)."
        )
    if run.classes:
        said += found_worst(run.classes)
    return said


def found_worst(classes: dict[str, Any]) -> list[str]:
    """The class with the lowest R@1, or the number of those with 0; [] if all have 1."""
    if not classes["lowest"]:
        return []
    worst, never = classes["lowest"][0], classes["never"]
    name, right = isolated(worst["name"]), round(worst["score"] * worst["size"])
    if right or never < 2:
        return [
            f"Found worst: {name} (the nearest image is right for {right} of its {worst['size']} "
            "queries)."
        ]
    return [
        f"Of {classes['count']:,} classes with two queries or more {never:,} have no query whose "
        f"nearest image is right, {name} among them."
    ]


def _learned(run: Explained) -> list[str]:
    """The main findings in the sections of the methods."""
    said = []
    for part in run.sections:
        if part["kind"] == "class-values":
            said.append(values.in_short(part))
        if part["kind"] == "certainty":
            said += part["said"]
    return said
