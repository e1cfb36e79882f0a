"""All runs under a folder in one table: on the screen, as HTML, CSV and LaTeX.

Runs that differ only in the seed are also taken together: mean ± half of its 95 % interval, by
Student's t over the seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evaluation import tables
from metrics import comparison
from page import plots, records
from page.document import as_text, document, named, section, warnings
from page.plots import Bar, Point
from page.records import Numbers, Record
from storage import write_atomically, write_table
from terminal import fitted, say, terminal_width, told
from utils import InputError, counted, human_seconds

logger = logging.getLogger("report")

ABOUT = ("method", "network", "data", "differs", "seed", "epoch", "time")
WORDS = ("method", "network", "data", "differs", "seed")  # read from the left
SHOWN = ("R@1", "MAP@R", "NMI")  # on the screen; the files have all metrics


@dataclass(frozen=True)
class Line:
    """A run, or several that differ only in the seed (`members`).

    `best` are the metrics of the best checkpoint on the test classes, `final` those of the last
    evaluation; `deviation` is the standard deviation of `best` over the members. Metrics that mean
    nothing are left out, and `doubt` says why; it also says where they rest on a part of the
    queries.
    """

    name: str
    about: dict[str, str]
    best: dict[str, float]
    final: dict[str, float]
    deviation: dict[str, float] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    sort: dict[str, float] = field(default_factory=dict)
    doubt: str = ""

    @property
    def spread(self) -> dict[str, float]:
        """Half of the 95 % interval of each mean."""
        count = len(self.members)
        return {n: comparison.half_width(value, count) for n, value in self.deviation.items()}

    def matches(self, pattern: re.Pattern[str]) -> bool:
        """Whether the name or anything about it contains the pattern."""
        words = (self.name, *self.about.values(), *self.members)
        return any(pattern.search(word) for word in words)


def compare(args: argparse.Namespace) -> None:
    """Runs `report.py --compare` with parsed options.

    Raises:
        InputError: no runs, no match, a bad pattern, or a file that cannot be written.
    """
    with told(f"reading the runs in {args.compare}"):
        lines = collect(Path(args.compare))
    if args.grep:
        try:
            pattern = re.compile(args.grep, re.IGNORECASE)
        except re.error as error:
            raise InputError(f"--grep {args.grep} is not a regular expression: {error}") from error
        lines = [line for line in lines if line.matches(pattern)]
        if not lines:
            raise InputError(f"--grep {args.grep}: no run under {args.compare} contains that")
    say("\n".join([screen(lines), *(fitted(doubt, "  ") for doubt in doubts(lines))]))
    out = Path(args.out) if args.out else Path(args.compare) / page_name(args.grep)
    content = page(lines, args.compare)
    write_atomically(out, lambda file: file.write(content.encode()))
    say(f"\npage written to {out}")
    if args.csv:
        write_table(Path(args.csv), *csv_table(lines))
        say(f"table written to {args.csv}")
    if args.latex:
        made = tables.latex(rows(lines), caption(lines))
        write_atomically(Path(args.latex), lambda file: file.write(made.encode()))
        say(f"table for a paper written to {args.latex}")


def page_name(grep: str | None) -> str:
    """Of the file: a part of the runs does not take the place of the page of all."""
    part = re.sub(r"[^\w-]+", "_", grep or "").strip("_")[:40]
    return f"runs-{part or 'part'}.html" if grep else "runs.html"


# --- runs -----------------------------------------------------------------------------------------


def run_folders(folder: Path) -> list[Path]:
    """The runs in a folder or below, by name."""
    return [path.parent for path in sorted(folder.rglob("args.json"))]


def collect(folder: Path) -> list[Line]:
    """One line per run under a folder, by name, and then one line per group of seeds.

    A run that cannot be read is named and left out.

    Raises:
        InputError: there is no run that can be read.
    """
    found = []
    for path in run_folders(folder):
        try:
            found.append(records.read(path))
        except InputError as error:
            logger.warning("%s is left out: %s", path, error)
    if not found:
        raise InputError(
            f"{folder} holds no run that can be read (args.json in it or below); give logs"
        )
    differ = _told_apart(found)
    lines = [_line(r, folder, words) for r, words in zip(found, differ, strict=True)]
    # A mean is over runs that have come to their end.
    known = [run.configuration if run.outcome else {} for run in found]
    groups = comparison.seeds_of_one(known, [record.args.get("seed") for record in found])
    return lines + [_group(found[group[0]], [lines[i] for i in group]) for group in groups]


def _told_apart(runs: Sequence[Record]) -> list[str]:
    """For each run, the options that set it apart from others of its method, network and data."""
    alike: dict[tuple, list[Record]] = {}
    for run in runs:
        alike.setdefault(tuple(_settings(run).values()), []).append(run)
    return [records.apart(run, alike[tuple(_settings(run).values())]) for run in runs]


def _line(record: Record, folder: Path, differs: str) -> Line:
    # Beside numbers of the test classes those of held-out ones would be no last evaluation.
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
    doubt = " ".join(tables.doubts(first))
    beside = {f"raw {name}": record.raw[name] for name in ("R@1",) if name in record.raw}
    return Line(name, about, _shown(first) | beside, _shown(final), sort=sort, doubt=doubt)


def _settings(record: Record) -> dict[str, str]:
    args = record.args
    network = f"{args.get('model')}, {args.get('embedding_size')}"
    network += f", {record.options.peft}" if record.options.peft != "none" else ""
    network += ", EMA" if record.options.ema else ""
    data = str(args.get("dataset")) + (f", {tables.VALIDATION}" if record.is_of_held_out else "")
    return {"method": record.method, "network": network, "data": data}


def _shown(numbers: Numbers) -> Numbers:
    if tables.nothing_to_find(numbers):
        return {}
    return {k: v for k, v in numbers.items() if not k.startswith(tables.HIDDEN)}


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


# --- the table ------------------------------------------------------------------------------------


def rows(lines: Sequence[Line]) -> list[tables.Row]:
    """The lines as rows of `tables`, best metrics only."""
    return [
        tables.Row(
            line.about["data"],
            _title(line),
            line.best,
            line.deviation,
            about=line.about,
            repeats=len(line.members),
        )
        for line in lines
        if line.best
    ]


def doubts(lines: Sequence[Line]) -> list[str]:
    """What is to be said beside the table, each sentence once, with the runs that it is about."""
    names: dict[str, list[str]] = {}
    for line in lines:
        if line.doubt:
            names.setdefault(line.doubt, []).append(line.name)
    return [f"{', '.join(runs)}: {doubt}" for doubt, runs in names.items()]


def _title(line: Line) -> str:
    if not line.members:
        return line.name
    return ", ".join(filter(None, (line.about["method"], line.about["differs"], line.name)))


def screen(lines: Sequence[Line]) -> str:
    """An aligned table of what matters most; groups of seeds come last."""
    heads = [*ABOUT, *SHOWN, *(f"{name} at the end" for name in SHOWN[:1])]
    made = []
    for line in lines:
        cells = [line.about[name] for name in ABOUT]
        cells += [_cell(line, name) for name in SHOWN]
        cells.append(_percent(line.final.get(SHOWN[0])))
        made.append((line.name, cells))
    return tables.aligned(heads, made, terminal_width())


def _cell(line: Line, name: str) -> str:
    value = _percent(line.best.get(name))
    return f"{value} ± {100 * line.spread[name]:.1f}" if name in line.spread else value


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def caption(lines: Sequence[Line]) -> str:
    """What the table shows."""
    data = ", ".join(dict.fromkeys(line.about["data"] for line in lines if line.best))
    return f"Best checkpoints on {data}, in percent.{tables.about_spread(rows(lines))}"


def csv_table(lines: Sequence[Line]) -> tuple[list[str], list[list]]:
    """Header and rows: what was run, best metrics, half widths of their intervals, last metrics."""
    names = tables.columns(rows(lines))
    spreads = [name for name in names if any(name in line.spread for line in lines)]
    header = ["run", *ABOUT, *names]
    header += [f"{name} ±" for name in spreads] + [f"{name} at the end" for name in names]
    made = []
    for line in lines:
        parts: list[Any] = [line.name, *(line.about[name] for name in ABOUT)]
        for numbers, wanted in ((line.best, names), (line.spread, spreads), (line.final, names)):
            parts += [f"{numbers[name]:.6g}" if name in numbers else "" for name in wanted]
        made.append(parts)
    return header, made


# --- the page -------------------------------------------------------------------------------------


def page(lines: Sequence[Line], folder: str) -> str:
    """The HTML: a table of the groups and one of the runs; clicking on a column's head sorts it."""
    single = [line for line in lines if not line.members]
    groups = [line for line in lines if line.members]
    parts = []
    if groups:
        about = (
            "Runs that differ only in the seed: mean ± half of its 95 % interval over the seeds."
        )
        content = _table(groups) + "".join(_seeds(groups, single, name) for name in CHARTED)
        parts.append(section("seeds", "Over seeds", content, about))
    if single:
        about = "The best checkpoint of each, in percent; in small print the last evaluation."
        content = _table(single) + warnings(doubts(single))
        parts.append(section("runs", "Runs", content, f"{about} Click on a column's head to sort."))
    if charts := _options(single):
        about = "R@1 against the options in which runs of one method differ; each dot is a run."
        parts.append(section("options", "Options", charts, about))
    counts = [counted(len(single), "run")] if single else []
    counts += [f"{counted(len(groups), 'group')} of seeds"] if groups else []
    links = ['<a href="#seeds">Over seeds</a>'] if groups else []
    links += ['<a href="#runs">Runs</a>'] if single else []
    names = tables.columns(rows(lines))
    meaning = " ".join(m.text for m in tables.meanings_of(names))
    head = (
        f"<header><h1>Runs in {as_text(folder)}</h1>"
        f'<p class="lead">{", ".join(counts)}</p></header>'
        f"<nav><div>{''.join(links)}"
        '<span class="end"><button data-theme-switch>light / dark</button></span></div></nav>'
    )
    note = f'<p class="note">{as_text(meaning)}</p>'
    body = f'{head}<main class="wide">{plots.STYLE}{"".join(parts)}{note}</main>'
    return document(f"Runs in {folder}", body, {})


CHARTED = ("R@1", "MAP@R")


def _seeds(groups: Sequence[Line], single: Sequence[Line], metric: str) -> str:
    """A chart of the groups: each seed, their mean and its interval."""
    runs = {line.name: line.best for line in single}
    bars = [
        Bar(
            _title(group),
            group.best[metric],
            group.spread[metric],
            [runs[m][metric] for m in group.members if metric in runs.get(m, {})],
        )
        for group in sorted(groups, key=lambda g: -g.best.get(metric, math.nan))
        if metric in group.best
    ]
    return plots.forest(bars, f"{metric}, percent: each seed, their mean and its 95 % interval")


def _options(single: Sequence[Line]) -> str:
    """A chart for each number that differs between runs of one method, network and data."""
    points: dict[tuple[str, ...], list[Point]] = {}
    for line in single:
        kind = tuple(line.about[name] for name in ("method", "network", "data"))
        for words in filter(None, line.about["differs"].split(", ")):
            option, _, value = words.rpartition(" ")
            with contextlib.suppress(ValueError):
                if "R@1" in line.best:
                    point = Point(float(value), line.best["R@1"], about=line.name)
                    points.setdefault((*kind, option), []).append(point)
    charts = []
    for (method, network, data, option), found in points.items():
        values = [point.x for point in found]
        if len(set(values)) > 1:
            log = min(values) > 0 and max(values) >= 10 * min(values)
            charts.append(plots.scatter(found, f"{option}: {method}, {network}, {data}", log=log))
    return f'<div class="charts">{"".join(charts)}</div>' if charts else ""


def _table(lines: Sequence[Line]) -> str:
    names = tables.columns(rows(lines))
    heads = "".join(
        f'<th data-sort scope="col"{_aligned(name)}>{as_text(name)}</th>'
        for name in ("run", *ABOUT, *names)
    )
    body = "".join(_html_row(line, names) for line in lines)
    return (
        '<div class="card scroll"><table class="sortable">'
        f"<thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _html_row(line: Line, names: Sequence[str]) -> str:
    cells = [f"<td>{named(line.name)}{_members(line)}</td>"]
    for name in ABOUT:
        key = line.sort.get(name)
        value = f' data-value="{key:.6g}"' if key is not None else ""
        cells.append(f"<td{value}{_aligned(name)}>{as_text(line.about[name])}</td>")
    for name in names:
        if name not in line.best:
            cells.append('<td data-value=""></td>')
            continue
        last = line.final.get(name)
        small = ""
        if last is not None and not line.members:
            small = f'<span class="between">{_percent(last)}</span>'
        cells.append(
            f'<td data-value="{line.best[name]:.6g}">{as_text(_cell(line, name))}{small}</td>'
        )
    return f"<tr>{''.join(cells)}</tr>"


def _aligned(column: str) -> str:
    return ' class="words"' if column in WORDS else ""


def _members(line: Line) -> str:
    return (
        f'<span class="between">{as_text(", ".join(line.members))}</span>' if line.members else ""
    )
