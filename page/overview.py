"""All runs under a folder in one table: on the screen, as a page, CSV and LaTeX."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dataset.files import composed
from evaluation import tables
from page.lines import ABOUT, Line, cell, collect, doubts, in_percent, rows
from page.together import page
from storage import write_content, write_table
from terminal import fitted, notice_if_slow, say, terminal_width
from utils import InputError

SHOWN = ("R@1", "MAP@R", "NMI")  # on the screen; the files have all metrics


def compare(args: argparse.Namespace) -> None:
    """Runs `report.py --compare` with parsed options.

    Raises:
        InputError: no runs, no match, a bad pattern, or a file that cannot be written.
    """
    with notice_if_slow(f"reading the runs in {args.compare}"):
        lines = collect(Path(args.compare))
    if args.grep:
        try:
            pattern = re.compile(composed(args.grep), re.IGNORECASE)
        except re.error as error:
            raise InputError(f"--grep {args.grep} is not a regular expression: {error}") from error
        lines = [line for line in lines if line.matches(pattern)]
        if not lines:
            raise InputError(f"--grep {args.grep}: no run under {args.compare} contains that")
    say("\n".join([screen(lines), *(fitted(doubt, "  ") for doubt in doubts(lines))]))
    out = Path(args.out) if args.out else Path(args.compare) / page_name(args.grep)
    write_content(out, page(lines, args.compare))
    say(f"\npage written to {out}")
    if args.csv:
        write_table(Path(args.csv), *csv_table(lines))
        say(f"table written to {args.csv}")
    if args.latex:
        write_content(Path(args.latex), tables.latex(rows(lines), caption(lines), args.latex))
        say(f"table for a paper written to {args.latex}")


def page_name(grep: str | None) -> str:
    """The name of the page's file, which is another one if --grep selects a part of the runs."""
    part = re.sub(r"[^\w-]+", "_", grep or "").strip("_")[:40]
    return f"runs-{part or 'part'}.html" if grep else "runs.html"


def screen(lines: Sequence[Line]) -> str:
    """An aligned table of the settings and some metrics; groups of seeds come last."""
    heads = [*ABOUT, *SHOWN, *(f"{name} at the end" for name in SHOWN[:1])]
    made = []
    for line in lines:
        cells = [line.about[name] for name in ABOUT]
        cells += [cell(line, name) for name in SHOWN]
        cells.append(in_percent(line.final.get(SHOWN[0])))
        made.append((line.name, cells))
    return tables.aligned(heads, made, terminal_width())


def csv_table(lines: Sequence[Line]) -> tuple[list[str], list[list]]:
    """Header and rows: settings, best metrics, half widths of their intervals, last metrics."""
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


def caption(lines: Sequence[Line]) -> str:
    """The caption of the table for a paper."""
    data = ", ".join(dict.fromkeys(line.about["data"] for line in lines if line.best))
    return f"Best checkpoints on {data}, in percent.{tables.about_spread(rows(lines))}"
