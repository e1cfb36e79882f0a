"""The table of results: metrics in percent, their intervals, and published numbers."""

from __future__ import annotations

from collections.abc import Sequence

from evaluation import meanings, tables
from page import document
from page.document import as_text, cell, column, named, warnings
from page.explained import Explained
from page.records import Numbers


def table(runs: Sequence[Explained]) -> str:
    """The HTML of the table, with warnings and the meanings of its columns."""
    rows = _rows(runs)
    if not rows:
        return '<p class="note">No evaluation yet.</p>'
    names = tables.columns(rows)
    own = [row for row in rows if not (_is_published(row) or meanings.nothing_to_find(row.numbers))]
    best: Numbers = {}
    if len(own) > 1:
        best = {name: max(row.numbers.get(name, -1.0) for row in own) for name in names}
    first = "run" if len(runs) > 1 else "data"
    head = "".join(f'<th scope="col">{column(name)}</th>' for name in (first, *names))
    lines = (_line(row, names, {} if _is_published(row) else best) for row in rows)
    note = f'<p class="note space">{as_text(meanings.in_words(names))}</p>'
    return f"{document.table(head, lines)}{warnings(_doubts(runs))}{note}"


def _rows(runs: Sequence[Explained]) -> list[tables.Row]:
    """The evaluations of each run, followed by the published numbers of its recipe, once."""
    rows, recipes = [], set()
    for run in runs:
        results, published = run.record.results, run.published
        for title, numbers in results.items():
            label = title
            if len(runs) > 1:
                label = run.record.title + (f", {title}" if len(results) > 1 else "")
            rows.append(tables.Row(title, label, numbers, intervals=run.intervals(title)))
        if published is not None and published.recipe not in recipes:
            recipes.add(published.recipe)
            about = {"published": published.recipe}
            label = f"published: {published.recipe}"
            rows.append(tables.Row("", label, published.numbers, about=about))
    return rows


def _is_published(row: tables.Row) -> bool:
    return "published" in row.about


def _line(row: tables.Row, names: Sequence[str], best: Numbers) -> str:
    """A row of the table, in which numbers that are in `best` are bold."""
    numbers = {} if meanings.nothing_to_find(row.numbers) else row.numbers
    cells = [
        cell(
            numbers.get(name),
            row.intervals.get(name),
            best=name in best and numbers.get(name) == best[name],
        )
        for name in names
    ]
    kind = "published" if _is_published(row) else ""
    return f'<tr class="{kind}"><td>{named(row.label)}</td>{"".join(cells)}</tr>'


def _doubts(runs: Sequence[Explained]) -> list[str]:
    """Warnings about the metrics, each once."""
    said: dict[str, None] = {}
    for run in runs:
        more = [words for n in run.record.results.values() for words in meanings.doubts(n)]
        name = f"{run.record.title}: " if len(runs) > 1 else ""
        said |= dict.fromkeys(name + words for words in [*run.doubts, *more] if words)
    return list(said)


def caption(runs: Sequence[Explained]) -> str:
    """The caption of the table."""
    words = "Of the best checkpoint, in percent."
    shown = [run for run in runs if not meanings.nothing_to_find(run.numbers)]
    if any(run.search is not None for run in shown):
        words += " Below: 95 % intervals over the classes (bootstrap), taking the network as given"
        part = sampled(runs)
        words += f", from {part} and scaled to all." if part else "."
    return words


def sampled(runs: Sequence[Explained]) -> str:
    """The size of the sample of queries in words; "" if all were searched."""
    searches = [run.search for run in runs if run.search is not None]
    return next((search.sampled for search in searches if search.sampled), "")
