"""Tables of numbers for the screen, for a paper, and for files."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from evaluation import meanings
from metrics.comparison import Difference, Test, few_classes, half_width
from metrics.verification import NAMES as VERIFICATION
from terminal import fitted, paragraph, printable, terminal_width

LOWER_IS_BETTER = ("EER",)


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        task: the name of the task. label: the name of the evaluated network; "" if there is only
            one.
        numbers: metrics in 0..1. deviation: their standard deviation, if several are averaged.
        intervals: 95 % intervals. about: further entries for files.
        repeats: the number of values in a mean, and `repeated` what they are values of.
        members: the labels of the rows that this one averages.
        thresholds: recommended by verification, as a dictionary; empty if there are none.
    """

    task: str
    label: str
    numbers: Mapping[str, float]
    deviation: Mapping[str, float] = field(default_factory=dict)
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict)
    about: Mapping[str, Any] = field(default_factory=dict)
    members: tuple[str, ...] = ()
    repeats: int = 0
    repeated: str = "seeds"
    thresholds: Mapping[str, Any] = field(default_factory=dict)

    @property
    def spread(self) -> dict[str, float]:
        """The numbers behind ±: half of the 95 % interval of each mean."""
        return {name: half_width(value, self.repeats) for name, value in self.deviation.items()}


def without_verification(rows: Iterable[Row]) -> list[Row]:
    """The rows without the columns of verification."""
    return [
        replace(row, numbers={k: v for k, v in row.numbers.items() if k not in VERIFICATION})
        for row in rows
    ]


def columns(rows: Iterable[Row]) -> list[str]:
    """The metrics of all rows: R@K by K, then the others in order of appearance."""
    names = dict.fromkeys(name for row in rows for name in row.numbers)
    shown = [name for name in names if not name.startswith(meanings.HIDDEN)]
    recalls = [name for name in shown if meanings.is_recall(name)]
    recalls.sort(key=lambda name: int(name[2:]))
    return recalls + [name for name in shown if name not in recalls]


# --- the screen -----------------------------------------------------------------------------------


def text(rows: Sequence[Row]) -> str:
    """An aligned table, one line per row; the line below a mean has half of its 95 % interval.

    If a terminal is too narrow for all columns, further columns follow in a table below.
    """
    names = columns(rows)
    lines = []
    for row, title in zip(rows, titles(rows), strict=True):
        lines.append((title, [_number(row.numbers.get(name)) for name in names]))
        if row.deviation:
            spread = row.spread
            lines.append(("±", [_number(spread.get(n)) for n in names]))
    return aligned(names, lines, terminal_width())


def titles(rows: Sequence[Row]) -> list[str]:
    """A distinct title for each row: its label, its task, or both."""
    labels, tasks = ({getattr(row, name) for row in rows} for name in ("label", "task"))
    if len(tasks) == 1 and len(labels) > 1:
        return [row.label for row in rows]
    named = {task: brief(task) for task in tasks}
    if len(set(named.values())) < len(tasks):
        named = {task: task for task in tasks}
    return [f"{row.label}, {named[row.task]}" if row.label else named[row.task] for row in rows]


def brief(task: str) -> str:
    """A task's name, of the user's own images without the folders: folder:/me/photos → photos."""
    return Path(task).name if task.lower().startswith(("folder:", "csv:")) else task


def _number(value: float | None, form: str = ".4f") -> str:
    """Four digits; – for an undefined metric, and nothing for one that was not computed."""
    if value is None:
        return ""
    return format(value, form) if math.isfinite(value) else "–"


def interval_text(rows: Sequence[Row]) -> str:
    """One line per metric, one column per row: the metric and its 95 % interval."""
    names = [name for name in columns(rows) if any(name in row.intervals for row in rows)]
    lines = [(name, [_interval_cell(row, name) for row in rows]) for name in names]
    return aligned(titles(rows), lines, terminal_width())


def _interval_cell(row: Row, name: str) -> str:
    if name not in row.intervals:
        return ""
    low, high = row.intervals[name]
    if not math.isfinite(row.numbers[name]):
        return _number(row.numbers[name])
    return f"{row.numbers[name]:.4f} [{_number(low)}, {_number(high)}]"


def about_spread(rows: Iterable[Row]) -> str:
    """A sentence about what ± means in a table; "" if it has none."""
    repeated = " or ".join(dict.fromkeys(row.repeated for row in rows if row.deviation))
    if not repeated:
        return ""
    return f" ±: half of the 95 % interval of the mean over {repeated} (Student's t)."


def footnote(rows: Sequence[Row]) -> str:
    """The definitions of the columns, and of ±, in lines."""
    return paragraph(meanings.in_words(columns(rows)) + about_spread(rows))


def difference_text(differences: Mapping[str, Difference], corrected: Mapping[str, float]) -> str:
    """One line per metric: difference, its 95 % interval, p and p corrected."""
    lines = []
    for name, found in differences.items():
        difference, low, high = (_number(value, "+.4f") for value in found[:3])
        cells = [difference, f"[{low}, {high}]", _number(found.p), _number(corrected[name])]
        lines.append((name, cells))
    return aligned(["B - A", "95 % interval", "p", "corrected"], lines, terminal_width())


def about_tests(tests: Sequence[Test], resamples: int | None) -> str:
    """How the tests were made, in sentences."""
    said = []
    counts = {over: [t.count for t in tests if t.over == over] for over in ("seeds", "classes")}
    if counts["seeds"]:
        said.append(f"Tested over {_range(counts['seeds'])} seeds (paired t-test).")
    if counts["classes"]:
        said.append(
            f"Tested over {_range(counts['classes'])} classes (paired bootstrap, {resamples:,} "
            "resamples), the networks as they are: other seeds may differ."
        )
        said += filter(None, [few_classes(tests)])
    said.append("p is two-sided.")
    tasks = Counter(test.task for test in tests)
    if (alike := max(tasks.values())) > 1:
        each = " of each evaluation" if len(tasks) > 1 else ""
        said.append(f"Corrected: for the {alike} tests{each} (Holm).")
    return " ".join(said)


def _range(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low:,}" if low == high else f"{low:,} to {high:,}"


def aligned(
    heads: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]], room: int | None = None
) -> str:
    """Lines of a title and cells under column heads; cells are aligned to the right.

    Args:
        room: the width of the terminal. Columns that do not fit follow below, with the same titles;
            titles that take more than half of it, or leave too little of it for the widest column,
            are on lines of their own.
    """
    heads = [printable(head) for head in heads]
    lines = [(printable(title), [printable(cell) for cell in cells]) for title, cells in lines]
    widths = [
        max(6, len(head), *(len(cells[i]) for _, cells in lines)) for i, head in enumerate(heads)
    ]
    width = max((len(title) for title, _ in lines), default=0)
    printed = [("", heads), *lines]
    if room is not None and width > min(room // 2, room - 1 - max(widths, default=0)):
        return _with_titles_above(printed, widths, room)
    return "\n".join(
        " ".join([title.ljust(width), *(cells[i].rjust(widths[i]) for i in part)])
        for part in _fitting(widths, None if room is None else room - width)
        for title, cells in printed
    )


def _with_titles_above(
    printed: Sequence[tuple[str, Sequence[str]]], widths: Sequence[int], room: int
) -> str:
    lines = []
    for part in _fitting(widths, room):
        for title, cells in printed:
            lines += [fitted(title, "  ")] if title else []
            lines.append("".join(f" {cells[i].rjust(widths[i])}" for i in part))
    return "\n".join(lines)


def _fitting(widths: Sequence[int], room: int | None) -> list[range]:
    """Divides columns of these widths into parts that fit; without a limit there is one part."""
    starts, used = [0], 0
    for column, width in enumerate(widths):
        if room is not None and used and used + 1 + width > room:
            starts.append(column)
            used = 0
        used += 1 + width
    return [range(*ends) for ends in pairwise([*starts, len(widths)])]


# --- files ----------------------------------------------------------------------------------------


def csv_table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: the description of each row, then metrics with spread and interval."""
    about = dict.fromkeys(name for row in rows for name in row.about)
    spreads = {name for row in rows for name in row.deviation}
    intervals = {name for row in rows for name in row.intervals}
    thresholds = any(row.thresholds for row in rows)
    records = []
    for row in rows:
        record = {"label": row.label, "evaluation": row.task}
        record |= {name: str(row.about.get(name, "")) for name in about}
        if thresholds:
            record["same from"] = _short(row.thresholds.get("same"))
            record["different below"] = _short(row.thresholds.get("different"))
        for name in columns(rows):
            record[name] = _short(row.numbers.get(name))
            if name in spreads:
                record[f"{name} sd"] = _short(row.deviation.get(name))
                record[f"{name} ±"] = _short(row.spread.get(name))
            if name in intervals:
                low, high = row.intervals.get(name, (None, None))
                record |= {f"{name} low": _short(low), f"{name} high": _short(high)}
        records.append(record)
    return list(records[0]), [list(record.values()) for record in records]


def _short(value: float | None) -> str:
    return f"{value:.6g}" if value is not None and math.isfinite(value) else ""


def json_content(
    rows: Sequence[Row], tests: Sequence[Test], *, seed: int, bootstrap: int | None
) -> dict[str, Any]:
    """All numbers: one entry per row, and the tests; `bootstrap` counts the resamples."""
    results = []
    for row in rows:
        content = {"title": row.task, **row.about, **row.numbers}
        if row.label:
            content["label"] = row.label
        if row.deviation:
            content["standard_deviation"] = row.deviation
            content["half_width_95"] = row.spread
        if row.intervals:
            content["interval_95"] = row.intervals
        if row.thresholds:
            content["thresholds"] = row.thresholds
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
                "over": test.over,
                test.over: test.count,
                **{
                    name: {**values._asdict(), "p_corrected": test.corrected[name]}
                    for name, values in test.differences.items()
                },
            }
            for test in tests
        ]
    return content


# --- a paper --------------------------------------------------------------------------------------


def latex(rows: Sequence[Row], caption: str, file: str) -> str:
    """A booktabs table in percent, the best of each column bold, with the formulas below it.

    Its label is `tab:` and the name of the `file`, because a paper may have several tables.

    Rows that are averaged by another row are left out. Each task is a part of the table.
    """
    averaged = {(row.task, label) for row in rows for label in row.members}
    rows = [row for row in rows if (row.task, row.label) not in averaged]
    names = columns(rows)
    tasks = list(dict.fromkeys(row.task for row in rows))
    body: list[str] = []
    for task in tasks:
        part = [row for row in rows if row.task == task]
        body.append(r"    \midrule")
        if len(tasks) > 1 and part[0].label:
            body.append(rf"    \multicolumn{{{len(names) + 1}}}{{l}}{{{escaped(task)}}} \\")
        best = _best(part, names)
        for row in part:
            cells = [_percent(row, name, best[name]) for name in names]
            body.append(rf"    {' & '.join([escaped(row.label or task), *cells])} \\")
    lines = [
        "% needs \\usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        rf"  \caption{{{escaped(caption)}}}",
        rf"  \label{{tab:{re.sub('[^A-Za-z0-9]+', '-', Path(file).stem)}}}",
        rf"  \begin{{tabular}}{{l{'r' * len(names)}}}",
        r"    \toprule",
        rf"    {' & '.join(['', *map(escaped, names)])} \\",
        *body,
        r"    \bottomrule",
        r"  \end{tabular}",
        rf"  \par\smallskip\footnotesize {meanings.in_latex(names)}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _best(rows: Sequence[Row], names: Sequence[str]) -> dict[str, str | None]:
    """The best printed value of each column; None if there is nothing to compare."""
    best = {}
    for name in names:
        values = [row.numbers[name] for row in rows if is_known(row, name)]
        choose = min if name in LOWER_IS_BETTER else max
        best[name] = f"{100 * choose(values):.1f}" if len(values) > 1 else None
    return best


def is_known(row: Row, name: str) -> bool:
    """Whether a row has the metric, and it is defined."""
    return math.isfinite(row.numbers.get(name, math.nan))


def _percent(row: Row, name: str, best: str | None) -> str:
    if not is_known(row, name):
        return "--"
    value = f"{100 * row.numbers[name]:.1f}"
    value = rf"\textbf{{{value}}}" if value == best else value
    half = row.spread.get(name)
    return value if half is None else f"{value} $\\pm$ {100 * half:.1f}"


def escaped(words: str) -> str:
    """Plain text as LaTeX prints it."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {c: f"\\{c}" for c in "&%$#_{}"} | {"±": r"$\pm$", "×": r"$\times$"}
    special |= {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", "…": r"\dots{}"}
    # At the beginning of a cell, these would be arguments of the line break before it.
    special |= {"[": "{[}", "]": "{]}", "*": "{*}", "`": r"\`{}"}
    return "".join(special.get(character, character) for character in printable(words))
