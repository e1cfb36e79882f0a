"""Shows the report on a data set as a table or as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import dataset
from dataset.check import UNUSABLE, Report, check
from storage import write_content
from terminal import plain, text_width, wrapped
from utils import counted, program


def as_text(report: Report) -> str:
    """The report as text: the problem and what to do, or a table and the findings."""
    return _help(report) if report.problem else _table(report)


def _help(report: Report) -> str:
    named = report.problem.startswith(report.dataset)
    problem = report.problem if named else f"{report.dataset}: {report.problem}"
    lines = [wrapped(plain(problem), "", "  ")]
    if report.origin:
        lines += ["", wrapped(plain(report.origin), "  ", "  ")]
    lines += ["", "  Expected arrangement of files:"]
    lines += [f"    {line}" for line in plain(report.tree).splitlines()]
    return "\n".join([*lines, *_commands(report)])


def _table(report: Report) -> str:
    rows = [("split", "images", "published", "classes", "published")]
    rows += [
        (
            row.split,
            _number(row.images),
            _number(row.published_images),
            _number(row.classes),
            _number(row.published_classes),
        )
        for row in report.splits
    ]
    lines = [wrapped(": ".join(filter(None, (report.dataset, plain(report.found)))), "", "  ")]
    lines += _counts(rows)
    for row in report.splits:
        if row.outcome:
            lines.append(wrapped(row.outcome, f"  {row.split:<7}  ", " " * 11))
    for finding in sorted(report.findings, key=lambda finding: finding.note):
        kind = "note     " if finding.note else "FINDING  "
        lines.append(wrapped(finding.sentence(), f"  {kind}", " " * 11))
    kinds = Counter(finding.note for finding in report.findings)
    found, noted = counted(kinds[False], "finding"), counted(kinds[True], "note")
    lines.append(f"  {report.status}: {found}, {noted}")
    return "\n".join([*lines, *_commands(report)])


def _counts(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The splits as a table, or as sentences if the terminal is too narrow."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if sum(widths) + 3 * len(widths) - 1 > text_width():
        return [wrapped(_count(*row), f"  {split:<7}  ", " " * 11) for split, *row in rows[1:]]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(most) for cell, most in zip(rest, widths[1:], strict=True)]
        lines.append("  " + "   ".join(cells))
    return lines


def _count(images: str, published_images: str, classes: str, published_classes: str) -> str:
    text = f"{images} images, {classes} classes"
    if published_images == published_classes == "-":
        return text
    return f"{text} (published: {published_images} and {published_classes})"


def _commands(report: Report) -> list[str]:
    """The commands, each on a line of its own, however long, so that it can be pasted."""
    lines = []
    for words, command in report.commands.items():
        lines += ["", f"  {words}:", f"  {command}"]
    return lines


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def run(
    names: Sequence[str] | None,
    root: str | Path,
    as_json: bool,
    file: Path | None = None,
    **options: Any,
) -> int:
    """Check `names`, or with None every data set, print the reports, and return the exit status.

    With None, data sets that are not there are listed, but do not count unless nothing is there.

    Args:
        as_json: whether to print JSON, which names every file, instead of the table.
        file: a file to write the JSON to.

    Raises:
        InputError: `file` cannot be written.
    """
    reports = [check(name, root, **options) for name in names or dataset.NAMES]
    there = [report for report in reports if report.status != "absent"]
    looked_at = reports if names else there
    status = max((report.exit_status for report in looked_at), default=UNUSABLE)
    content = {"exit_status": status, "datasets": [asdict(report) for report in reports]}
    # In ASCII, because names on disk may not be valid text in any encoding.
    in_json = json.dumps(content, indent=2)
    if file is not None:
        write_content(file, f"{in_json}\n")
    if as_json:
        print(in_json)
        return status
    print("\n\n".join(as_text(report) for report in looked_at))
    absent = [report.dataset for report in reports if report not in looked_at]
    if absent:
        asked = f"`{program('dataset')} check NAME`"
        more = f"not under {root}: {', '.join(absent)}; {asked} says more"
        print(f"\n{wrapped(more)}")
    return status
