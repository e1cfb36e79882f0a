"""Reads a run folder: options, environment, metrics, results, and published numbers.

Files that a run has not written yet are simply missing; a folder without args.json is not a run's.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import methods
import options
from evaluation import meanings
from evaluation.thresholds import Thresholds
from flags import Change
from options.files import RECIPES
from options.needs import HELD_OUT
from runs import RunFolder
from utils import InputError, damage_in_words

Numbers = dict[str, float]


@dataclass(frozen=True)
class Record:
    """One run.

    Attributes:
        path: its folder. args, environment, outcome: args.json, environment.json, results.json.
        rows: of metrics.csv, as numbers, without empty cells.
        differs: the options in which it differs from other runs on the page, in words.
    """

    path: Path
    args: dict[str, Any]
    environment: dict[str, Any]
    rows: list[Numbers]
    outcome: dict[str, Any]
    differs: str = ""

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.resolve().name

    @property
    def title(self) -> str:
        """Its name, with the options in which it differs from other runs on the page."""
        return f"{self.name} ({self.differs})" if self.differs else self.name

    @property
    def folder(self) -> RunFolder:
        """The run folder."""
        return RunFolder(self.path)

    @functools.cached_property
    def options(self) -> argparse.Namespace:
        """All options; those that its version did not have yet have the values for older runs."""
        return options.kept(self.args)

    @functools.cached_property
    def configuration(self) -> dict[str, Any]:
        """The options that it shares with runs that differ only in the seed."""
        return options.configuration(self.args)

    @property
    def method(self) -> str:
        """The loss and the methods added to it: `AMLoss + SEC`."""
        return methods.title(self.options)

    @property
    def evaluated(self) -> list[Numbers]:
        """The rows with an evaluation."""
        return [row for row in self.rows if "R@1" in row]

    @property
    def best_epoch(self) -> int | None:
        """The epoch of the best checkpoint."""
        if "best_epoch" in self.outcome:
            return int(self.outcome["best_epoch"])
        return None if self._best is None else int(self._best["epoch"])

    @property
    def _best(self) -> Numbers | None:
        """The row of the best evaluation so far."""
        return max(self.evaluated, key=lambda row: row["R@1"], default=None)

    @property
    def results(self) -> dict[str, Numbers]:
        """The best checkpoint's metrics, by evaluation; from metrics.csv until the run ends."""
        if self.outcome:
            results = self.outcome["results"]
            return {title: _defined(numbers) for title, numbers in results.items()}
        title = str(self.args.get("dataset", "evaluation"))
        title = meanings.VALIDATION if self.holds_out else title
        return {} if self._best is None else {title: metrics_in(self._best)}

    @property
    def holds_out(self) -> bool:
        """Whether its evaluations, except the last, are of training classes that it holds out."""
        return bool(HELD_OUT.met(self.options))

    @property
    def is_of_held_out(self) -> bool:
        """Whether `results` are of held-out classes, not of the test classes."""
        return meanings.VALIDATION in self.results

    @property
    def raw(self) -> Numbers:
        """The metrics of the weights themselves, if `results` are those of their running mean."""
        title = next(iter(self.results), "")
        return self.results.get(title + meanings.RAW, {})

    @property
    def seconds(self) -> float:
        """Training time without evaluations."""
        return self.rows[-1].get("seconds", 0.0) if self.rows else 0.0

    @property
    def images_per_second(self) -> float | None:
        """Median over the epochs."""
        rates = sorted(row["images_per_second"] for row in self.rows if "images_per_second" in row)
        return rates[len(rates) // 2] if rates else None


def read(path: str | Path) -> Record:
    """Reads a run folder.

    Raises:
        InputError: the folder is not a run's, or one of its files is damaged.
    """
    path = Path(path)
    if not path.exists():
        raise InputError(f"run folder {path} does not exist; check the path")
    if not (path / "args.json").is_file():
        raise InputError(f"{path} is not a run folder: there is no args.json; give logs/NAME")
    folder = RunFolder(path)
    args = folder.read_args()
    options.kept(args)  # raises if a value is impossible
    return Record(
        path,
        args,
        _environment(folder),
        [_numbers(row) for row in folder.metrics.rows()],
        _outcome(folder),
    )


def _environment(folder: RunFolder) -> dict[str, Any]:
    found = folder.read_environment()
    with damage_in_words(str(folder.path / "environment.json"), "delete it"):
        _need(found, ("command", "git_commit", "device", "source", "concern"), str)
        _need(found, ("packages",), dict)
    return found


def _outcome(folder: RunFolder) -> dict[str, Any]:
    """results.json: `best_epoch`, `picked_on`, and the metrics by evaluation (`results`).

    If pairs were compared, also their metrics (`verification`) and `thresholds`.
    """
    found = folder.read_results()
    if not found:
        return found
    with damage_in_words(str(folder.path / "results.json"), "delete it"):
        _need(found, ("picked_on",), str)
        _need(found, ("verification", "thresholds"), dict)
        int(found.get("best_epoch", 0))
        for numbers in (*found["results"].values(), *(found.get("verification") or {}).values()):
            _need(numbers, numbers, float | int)
        for kept in (found.get("thresholds") or {}).values():
            Thresholds.of_dict(kept)
    return found


def _need(found: Mapping[str, Any], names: Iterable[str], kind: Any) -> None:
    """Raises ValueError if an entry exists, is not null, and is of another type."""
    for name in names:
        if not isinstance(found.get(name), kind | None):
            raise ValueError(f"its {name} is {str(found[name])[:40]!r}")


def _defined(numbers: Mapping[str, float | None]) -> Numbers:
    """The metrics that are defined: MAP@R, for example, is not if no query has a match."""
    return {k: v for k, v in numbers.items() if v is not None and math.isfinite(v)}


def _numbers(row: dict[str, str]) -> Numbers:
    found = {}
    for name, cell in row.items():
        with contextlib.suppress(ValueError, TypeError):
            value = float(cell)
            if math.isfinite(value):
                found[name] = value
    return found


def metrics_in(row: Numbers) -> Numbers:
    """The metrics of the first evaluation in a row of metrics.csv, and its number of queries."""
    beside = (meanings.OTHER, meanings.HIDDEN)
    names = [name for name in row if meanings.METRIC.fullmatch(name) or name.startswith(beside)]
    return {name: row[name] for name in names}


def differing(runs: Sequence[Record]) -> set[str]:
    """The options, other than the seed, in which these runs differ."""
    first, *others = runs
    names = {name for run in runs for name in run.configuration}
    return {n for n in names if any(_value_in(run, n) != _value_in(first, n) for run in others)}


def apart(record: Record, names: Collection[str]) -> str:
    """The values of differing options in a run: `lr 0.001, epochs 40`."""
    own = record.configuration
    return ", ".join(
        _in_words(name.replace("_", "-"), value)
        for name, value in own.items()
        if name in names and not (name == "lr_p" and value == own["lr"])  # as without the flag
    )


def _value_in(record: Record, name: str) -> Any:
    """An option's value in a run, even if the run does not use the option."""
    return record.configuration.get(name, getattr(record.options, name, None))


def _in_words(name: str, value: Any) -> str:
    return f"no {name}" if value is None else f"{name} {in_brief(value)}"


def in_brief(value: Any) -> str:
    """An option's value as on a command line: `retrieval nmi`, `base=0.5`."""
    if not isinstance(value, list | tuple):
        return str(value)
    words = ("=".join(map(str, v)) if isinstance(v, list | tuple) else str(v) for v in value)
    return " ".join(words)


# --- published numbers ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Published:
    """The published numbers in a recipe, and the flags in which the run differs (`changes`)."""

    recipe: str
    numbers: Numbers
    words: str
    changes: list[str]


def published(record: Record) -> Published | None:
    """The published numbers of a run's recipe, if there are any."""
    path = _recipe_file(record.args.get("recipe"))
    if path is None:
        return None
    words = _published_words(path.read_text(encoding="utf-8"))
    found = re.findall(r"(R@\d+|RP|MAP@R|mARP|NMI|F1) (\d+\.\d+)", words.split("(")[0])
    if not found:
        return None
    numbers = {name: float(value) / 100 for name, value in found}
    return Published(path.stem, numbers, words, _changes(record, path))


def _recipe_file(name: str | None) -> Path | None:
    candidates = [Path(name), RECIPES / Path(name).name] if name else []
    return next((path for path in candidates if path.is_file()), None)


def _published_words(text: str) -> str:
    """The comment that begins with `Published:`, with its continuation lines."""
    lines = iter(text.splitlines())
    parts: list[str] = []
    for line in lines:
        if line.startswith("# Published:"):
            parts.append(line.removeprefix("# Published:"))
        elif parts and line.startswith("#   "):
            parts.append(line.removeprefix("#"))
        elif parts:
            break
    return " ".join(" ".join(parts).split())


def _changes(record: Record, recipe: Path) -> list[str]:
    """The options, of those that have an effect, in which a run differs from its recipe."""
    chosen = options.parsed([f"@{recipe}"])
    if chosen is None:  # a recipe of another version
        return []
    less = (Change.LABEL, Change.NOTHING)
    own, theirs = options.settings(record.args, *less), options.settings(vars(chosen), *less)
    return [
        f"{name.replace('_', '-')} {in_brief(own[name])} "
        f"(recipe: {in_brief(theirs.get(name, 'without it'))})"
        for name in own
        if own[name] != theirs.get(name)
    ]
