"""The HTML of one run, or of several: the parts of the page, in order.

The texts come from about.py and summary.py. Curves, galleries, confusions, methods and the map are
drawn by page.js from the data, into the elements with the id `…-here`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from page import about, curves, results
from page.document import Part, as_text, bullets, document, facts, folded, navigation
from page.document import command as as_command
from page.explained import Explained
from page.summary import summary
from page.thumbnails import Thumbnails

PICTURES = 4_000_000  # bytes of thumbnails for one run, so that its page is below 5 MB
PICTURES_MORE = 1_200_000  # for each further run
WITHOUT_SCRIPT = (
    '<noscript><p class="warning">Curves, galleries, the map and what was learned are left out: '
    "they are drawn by JavaScript, which is off.</p></noscript>"
)


def thumbnails(runs: int) -> Thumbnails:
    """Thumbnails for a page of that many runs, with their budget."""
    return Thumbnails(PICTURES + PICTURES_MORE * (runs - 1))


def build(runs: Sequence[Explained], thumbs: Thumbnails) -> str:
    """The HTML of one run or several."""
    title, parts = about.title(runs), _parts(runs)
    content = "".join(part.html() for part in parts)
    footer = as_text(about.made_by(runs))
    body = _head(title, runs) + navigation(parts)
    body += f"<main>{content}</main><footer>{footer}</footer>"
    data = {
        "runs": [_run_data(run) for run in runs],
        "groups": curves.groups([run.record for run in runs]),
    }
    return document(title, body, {**data, "images": thumbs.encode(), "files": thumbs.names()})


def _parts(runs: Sequence[Explained]) -> list[Part]:
    """The parts, in order."""
    setup = "".join(_setup(run, len(runs) > 1) for run in runs)
    parts = [
        Part("short", "In short", _short(runs)),
        Part("results", "Results", results.table(runs), results.caption(runs)),
        Part("setup", "What was run", setup),
        _drawn("curves", "Curves", about.of_curves(runs)),
        Part("choose", "", _choice(runs), link=""),
        _drawn(
            "galleries", "Queries and their nearest images", about.of_galleries(runs), "Queries"
        ),
        _drawn("confusions", "Which classes it confuses", about.of_confusions(runs), "Confusions"),
    ]
    if any(run.pairs for run in runs):
        parts.append(_drawn("pairs", "Two images: one class or two", about.of_pairs(), "Pairs"))
    if any(run.sections for run in runs):
        parts.append(Part("methods-here", "", _place("methods"), link="Method"))
    return [*parts, _drawn("map", "Map of the embedding", about.of_map(runs), "Map")]


def _drawn(anchor: str, title: str, words: str, link: str | None = None) -> Part:
    """A part that page.js draws."""
    return Part(anchor, title, _place(anchor), words, link)


def _place(name: str) -> str:
    """The element that page.js fills."""
    return f'<div id="{name}-here"></div>'


# --- the head of the page -------------------------------------------------------------------------


def _head(title: str, runs: Sequence[Explained]) -> str:
    switches = _switches(runs) if len(runs) > 1 else ""
    return (
        f'<header id="top"><h1>{as_text(title)}</h1><p class="lead">{as_text(about.lead(runs))}</p>'
        f"{switches}{WITHOUT_SCRIPT}</header>"
    )


def _switches(runs: Sequence[Explained]) -> str:
    """A button for each run that shows and hides its curves."""
    buttons = [
        f'<button class="run" data-toggle="{i}" aria-pressed="true">'
        f'<svg class="stroke" viewBox="0 0 20 8" aria-hidden="true" data-run="{i}"></svg>'
        f"{as_text(run.record.title)}</button>"
        for i, run in enumerate(runs)
    ]
    return f'<div class="runs">{"".join(buttons)}</div>'


def _choice(runs: Sequence[Explained]) -> str:
    """For several runs: buttons that choose the run that everything below is about."""
    if len(runs) == 1:
        return ""
    buttons = [
        f'<button data-choose="{i}" aria-pressed="{"true" if i == 0 else "false"}">'
        f"{as_text(run.record.title)}</button>"
        for i, run in enumerate(runs)
    ]
    return (
        '<section id="choose"><h2>One run, looked at closely</h2><p class="about">Everything '
        f'below is about the run chosen here.</p><div class="tabs">{"".join(buttons)}</div>'
        "</section>"
    )


# --- in short -------------------------------------------------------------------------------------


def _short(runs: Sequence[Explained]) -> str:
    if len(runs) == 1:
        return bullets(summary(runs[0]))
    parts = []
    for run in runs:
        first = runs[0] if run is not runs[0] else None
        parts.append(f"<h3>{as_text(run.record.title)}</h3>")
        parts.append(bullets(summary(run, first, alone=False)))
    return "".join(parts)


# --- what was run ---------------------------------------------------------------------------------


def _setup(run: Explained, several: bool) -> str:
    record = run.record
    title = f"<h3>{as_text(record.title)}</h3>" if several else ""
    options = folded("all options", f"<pre>{as_text(about.all_options(record))}</pre>")
    return (
        f'{title}<div class="card">{facts(about.facts(run))}'
        f"<pre>{as_command(about.command(record))}</pre>{options}</div>"
    )


# --- the data of page.js --------------------------------------------------------------------------


def _run_data(run: Explained) -> dict[str, Any]:
    return {
        "name": run.record.title,
        **curves.points(run.record),
        "missing": run.missing,
        "doubts": run.doubts,
        "galleries": run.galleries,
        "confusions": run.confusions,
        "classes": run.classes,
        "map": run.map,
        "sections": run.sections,
        "pairs": run.pairs,
    }
