"""Runs as lines of a table: settings, metrics, and means over seeds.

Runs that differ only in the seed are also averaged: mean ± half of its 95 % interval, by Student's
t over the seeds.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from dataset.files import composed
from evaluation import meanings, tables
from metrics import comparison
from page import records
from page.records import Numbers, Record
from utils import InputError, human_seconds

logger = logging.getLogger("report")

ABOUT = ("method", "network", "data", "differs", "seed", "epoch", "time")


@dataclass(frozen=True)
class Line:
    """A run, or several that differ only in the seed.

    Attributes:
        about: column (see `ABOUT`) → text. sort: column → the number that it is sorted by.
        best: the meaningful metrics of the best checkpoint on the test classes.
        final: those of the last evaluation.
        deviation: the standard deviations of `best` over the members.
        members: the names of the runs that are averaged; () for a single run.
        doubt: a warning about the metrics; "" if there is none.
    """

    name: str
    about: dict[str, str]
    best: dict[str, float]
    final: dict[str, float]
    deviation: dict[str, float] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    sort: dict[str, float] = field(default_factory=dict)
    doubt: str = ""

    @cached_property
    def spread(self) -> dict[str, float]:
        """Half of the 95 % interval of each mean."""
        count = len(self.members)
        return {n: comparison.half_width(value, count) for n, value in self.deviation.items()}

    def matches(self, pattern: re.Pattern[str]) -> bool:
        """Whether the name or anything about it, `composed`, contains the pattern."""
        words = (self.name, *self.about.values(), *self.members)
        return any(pattern.search(composed(word)) for word in words)


# --- runs -----------------------------------------------------------------------------------------


def run_folders(folder: Path) -> list[Path]:
    """The run folders under a folder, by name."""
    return [path.parent for path in sorted(folder.rglob("args.json"))]


def collect(folder: Path) -> list[Line]:
    """One line per run under a folder, by name, and then one line per group of seeds.

    A run that cannot be read is left out, with a warning.

    Raises:
        InputError: no run can be read.
    """
    found = []
    for path in run_folders(folder):
        try:
            found.append(records.read(path))
        except InputError as error:
            logger.warning("%s is left out: %s", path, error)
    if not found:
        raise InputError(
            f"{folder} holds no run that can be read: no args.json in it or below; give the folder "
            "that the runs are in, such as logs"
        )
    differ = _told_apart(found)
    lines = [_line(r, folder, words) for r, words in zip(found, differ, strict=True)]
    # Only runs that have ended are averaged.
    known = [run.configuration if run.outcome else {} for run in found]
    groups = comparison.seeds_of_one(known, [record.args.get("seed") for record in found])
    return lines + [_group(found[group[0]], [lines[i] for i in group]) for group in groups]


def _told_apart(runs: Sequence[Record]) -> list[str]:
    """For each run, the options in which it differs from others of its method, network and data."""
    kinds = [tuple(_settings(run).values()) for run in runs]
    alike: dict[tuple, list[Record]] = {}
    for kind, run in zip(kinds, runs, strict=True):
        alike.setdefault(kind, []).append(run)
    differing = {kind: records.differing(group) for kind, group in alike.items()}
    return [records.apart(run, differing[kind]) for kind, run in zip(kinds, runs, strict=True)]


def _line(record: Record, folder: Path, differs: str) -> Line:
    # Metrics of held-out classes cannot be shown beside those of the test classes.
    alike = record.is_of_held_out or not record.holds_out
    final = records.metrics_in(record.evaluated[-1]) if record.evaluated and alike else {}
    last = int(record.rows[-1]["epoch"]) if record.rows else 0
    best = record.best_epoch
    where = "–" if best is None else f"{best} of {last}"
    about = {
        **_settings(record),
        "differs": differs,
        "seed": str(record.args.get("seed", "")),
        "epoch": where + ("" if record.outcome else ", unfinished"),
        "time": human_seconds(record.seconds),
    }
    first = next(iter(record.results.values()), {})
    sort = {"epoch": float(best or 0), "time": record.seconds}
    name = str(record.path.relative_to(folder)) if record.path != folder else record.name
    doubt = " ".join(meanings.doubts(first))
    beside = {meanings.BESIDE + n: record.raw[n] for n in ("R@1",) if n in record.raw}
    return Line(name, about, _shown(first) | beside, _shown(final), sort=sort, doubt=doubt)


def _settings(record: Record) -> dict[str, str]:
    args = record.args
    network = f"{args.get('model')}, {args.get('embedding_size')}"
    network += f", {record.options.peft}" if record.options.peft != "none" else ""
    network += ", EMA" if record.options.ema else ""
    data = str(args.get("dataset")) + (f", {meanings.VALIDATION}" if record.is_of_held_out else "")
    return {"method": record.method, "network": network, "data": data}


def _shown(numbers: Numbers) -> Numbers:
    if meanings.nothing_to_find(numbers):
        return {}
    return meanings.without_counts(numbers)


def _group(first: Record, lines: Sequence[Line]) -> Line:
    """The mean of two or more finished runs, of which `first` is one."""
    best, deviation = comparison.mean_and_deviation([line.best for line in lines])
    final: dict[str, float] = {}
    ended = [line.final for line in lines if line.final]
    if len(ended) > 1:
        final, _ = comparison.mean_and_deviation(ended)
    seconds = sum(line.sort["time"] for line in lines) / len(lines)
    about = {
        **_settings(first),
        "differs": lines[0].about["differs"],
        "seed": ", ".join(line.about["seed"] for line in lines),
        "epoch": "",
        "time": human_seconds(seconds),
    }
    name = f"mean of {len(lines)} seeds"
    labels = tuple(line.name for line in lines)
    return Line(name, about, best, final, deviation, labels, {"time": seconds})


# --- in words -------------------------------------------------------------------------------------


def rows(lines: Sequence[Line]) -> list[tables.Row]:
    """The lines as rows of `tables`, best metrics only."""
    return [
        tables.Row(
            line.about["data"],
            title(line),
            line.best,
            line.deviation,
            about=line.about,
            repeats=len(line.members),
        )
        for line in lines
        if line.best
    ]


def doubts(lines: Sequence[Line]) -> list[str]:
    """The warnings about the metrics, each once, after the names of the runs that it is about."""
    names: dict[str, list[str]] = {}
    for line in lines:
        if line.doubt:
            names.setdefault(line.doubt, []).append(line.name)
    return [f"{', '.join(runs)}: {doubt}" for doubt, runs in names.items()]


def title(line: Line) -> str:
    """The name of a line where its other columns are not shown."""
    if not line.members:
        return line.name
    return ", ".join(filter(None, (line.about["method"], line.about["differs"], line.name)))


def cell(line: Line, name: str) -> str:
    """A metric of a line in percent, with ± if it is a mean over seeds."""
    value = in_percent(line.best.get(name))
    return f"{value} ± {100 * line.spread[name]:.1f}" if name in line.spread else value


def in_percent(value: float | None) -> str:
    """A percentage with one decimal; "" for None."""
    return "" if value is None else f"{100 * value:.1f}"
