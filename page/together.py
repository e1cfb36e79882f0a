"""The HTML of many runs: tables of groups of seeds and of runs, and charts of differing options.

page.js sorts a table when the head of a column is clicked.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

from evaluation import meanings, tables
from page import plots
from page.document import (
    Part,
    as_text,
    breakable,
    column,
    document,
    named,
    navigation,
    table,
    warnings,
)
from page.lines import ABOUT, Line, cell, doubts, in_percent, rows, title
from page.plots import Bar, Point
from utils import counted

WORDS = ("method", "network", "data", "differs", "seed")  # columns that are aligned to the left
CHARTED = ("R@1", "MAP@R")


def page(lines: Sequence[Line], folder: str) -> str:
    """The page's HTML: a table of the groups of seeds, and one of the runs."""
    single = [line for line in lines if not line.members]
    groups = [line for line in lines if line.members]
    counts = [counted(len(single), "run")] if single else []
    counts += [f"{counted(len(groups), 'group')} of seeds"] if groups else []
    parts = _parts(groups, single)
    head = (
        f"<header><h1>Runs in {as_text(folder)}</h1>"
        f'<p class="lead">{", ".join(counts)}</p></header>'
        f"{navigation(parts)}"
    )
    meaning = meanings.in_words(tables.columns(rows(lines)))
    note = f'<p class="note">{as_text(meaning)}</p>'
    sections = "".join(part.html() for part in parts)
    body = f'{head}<main class="wide">{plots.STYLE}{sections}{note}</main>'
    return document(f"Runs in {folder}", body, {})


def _parts(groups: Sequence[Line], single: Sequence[Line]) -> list[Part]:
    """The parts that have content."""
    parts = []
    if groups:
        charts = "".join(_seeds(groups, single, name) for name in CHARTED)
        content = f'{_table(groups)}<div class="charts wide space">{charts}</div>'
        about = (
            "Runs that differ only in the seed: mean ± half of its 95 % interval over the seeds."
        )
        parts.append(Part("seeds", "Over seeds", content, about))
    if single:
        about = (
            "The best checkpoint of each, in percent; in small print the last evaluation. Click on "
            "a column's head to sort."
        )
        parts.append(Part("runs", "Runs", _table(single) + warnings(doubts(single)), about))
    if charts := _options(single):
        about = "R@1 against the options in which runs of one method differ; each dot is a run."
        parts.append(Part("options", "Options", charts, about))
    return parts


def _seeds(groups: Sequence[Line], single: Sequence[Line], metric: str) -> str:
    """A chart of the groups: each seed, their mean and its interval."""
    runs = {line.name: line.best for line in single}
    bars = [
        Bar(
            title(group),
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
        f'<th data-sort scope="col"{_aligned(name)}>{column(name)}</th>'
        for name in ("run", *ABOUT, *names)
    )
    return table(heads, (_html_row(line, names) for line in lines), "sortable")


def _html_row(line: Line, names: Sequence[str]) -> str:
    members = as_text(", ".join(line.members))
    members = f'<span class="between">{members}</span>' if members else ""
    cells = [f"<td>{named(line.name)}{members}</td>"]
    for name in ABOUT:
        key = line.sort.get(name)
        value = f' data-value="{key:.6g}"' if key is not None else ""
        words = breakable(line.about[name])
        content = f"<span>{words}</span>" if name in WORDS else words
        cells.append(f"<td{value}{_aligned(name)}>{content}</td>")
    for name in names:
        if name not in line.best:
            cells.append('<td data-value=""></td>')
            continue
        last = line.final.get(name)
        small = ""
        if last is not None and not line.members:
            small = f'<span class="between">{in_percent(last)}</span>'
        cells.append(
            f'<td data-value="{line.best[name]:.6g}">{as_text(cell(line, name))}{small}</td>'
        )
    return f"<tr>{''.join(cells)}</tr>"


def _aligned(column: str) -> str:
    return ' class="words"' if column in WORDS else ""
