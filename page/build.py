"""The HTML of one run, or of several: the parts of the page, in order.

Tables and sentences are written here; curves, galleries, confusions, methods and the map are drawn
by page.js from the data, into the elements called `…-here`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evaluation import tables
from evaluation.pictures import Thumbnails
from page import curves
from page.document import as_text, bullets, cell, document, facts, folded, section
from page.explained import Explained
from page.records import Numbers, Record
from page.summary import summary
from utils import human_seconds

PICTURES = 3_400_000  # bytes of thumbnails in the page of one run, so that it stays below 5 MB
PICTURES_MORE = 1_200_000  # for each further run


def thumbnails(runs: int) -> Thumbnails:
    """Room for the pictures of a page of that many runs."""
    return Thumbnails(PICTURES + PICTURES_MORE * (runs - 1))


def build(runs: Sequence[Explained], thumbs: Thumbnails) -> str:
    """The HTML of one run or several."""
    title = runs[0].record.name if len(runs) == 1 else f"{len(runs)} runs"
    methods = any(run.sections for run in runs)
    parts = [
        section("short", "In short", _short(runs)),
        section("results", "Results", result_table(runs), _about_results(runs)),
        section("setup", "What was run", "".join(_setup(run, len(runs) > 1) for run in runs)),
        section("curves", "Curves", _drawn("curves"), _about_curves(runs)),
        _choice(runs),
        section(
            "galleries",
            "Queries and their nearest images",
            _drawn("galleries"),
            "Each row: an image of a class the network was never trained on, and the ten images "
            "it finds most similar, nearest first.",
        ),
        section(
            "confusions", "Which classes it confuses", _drawn("confusions"), _about_confusions(runs)
        ),
        _drawn("methods") if methods else "",
        section(
            "map",
            "Map of the embedding",
            _drawn("map"),
            "t-SNE (scikit-learn) in two dimensions: what is together here is near in the "
            "embedding. Distances between groups, and the directions, mean nothing.",
        ),
    ]
    body = _head(title, runs) + _navigation(methods)
    body += f"<main>{''.join(parts)}</main><footer>{_footer(runs)}</footer>"
    data = {
        "runs": [_run_data(run) for run in runs],
        "groups": curves.groups([run.record for run in runs]),
    }
    return document(title, body, {**data, "images": thumbs.encode()})


def _drawn(name: str) -> str:
    """The element that page.js fills."""
    return f'<div id="{name}-here"></div>'


# --- above all parts ------------------------------------------------------------------------------


def _head(title: str, runs: Sequence[Explained]) -> str:
    switches = _switches(runs) if len(runs) > 1 else ""
    return (
        f'<header id="top"><h1>{as_text(title)}</h1><p class="lead">{as_text(_lead(runs))}</p>'
        f"{switches}</header>"
    )


def _lead(runs: Sequence[Explained]) -> str:
    if len(runs) > 1:
        return ", ".join(dict.fromkeys(run.record.method for run in runs))
    record = runs[0].record
    return f"{record.method} on {record.args.get('dataset')}, {record.args.get('model')}"


def _switches(runs: Sequence[Explained]) -> str:
    """A button for each run that shows and hides its curves."""
    buttons = [
        f'<button class="run" data-toggle="{i}" aria-pressed="true">'
        f'<span class="dot" data-colour="{i}"></span>{as_text(run.record.name)}</button>'
        for i, run in enumerate(runs)
    ]
    return f'<div class="runs">{"".join(buttons)}</div>'


def _navigation(methods: bool) -> str:
    links = [
        *(("short", "In short"), ("results", "Results"), ("setup", "What was run")),
        *(("curves", "Curves"), ("galleries", "Queries"), ("confusions", "Confusions")),
        *((("methods", "Method"),) if methods else ()),
        ("map", "Map"),
    ]
    anchors = "".join(f'<a href="#{name}">{words}</a>' for name, words in links)
    switch = '<span class="end"><button data-theme-switch>light / dark</button></span>'
    return f"<nav><div>{anchors}{switch}</div></nav>"


def _choice(runs: Sequence[Explained]) -> str:
    """Where there are several runs: which of them everything below is of."""
    if len(runs) == 1:
        return ""
    buttons = [
        f'<button data-choose="{i}" aria-pressed="{"true" if i == 0 else "false"}">'
        f"{as_text(run.record.name)}</button>"
        for i, run in enumerate(runs)
    ]
    return (
        '<section id="choose"><h2>One run, looked at closely</h2><p class="about">Everything '
        f'below is of the run that is chosen here.</p><div class="tabs">{"".join(buttons)}</div>'
        "</section>"
    )


def _footer(runs: Sequence[Explained]) -> str:
    commits = {run.record.environment.get("git_commit") or "?" for run in runs}
    return f"Anchorage, commit {as_text(', '.join(c[:12] for c in sorted(commits)))}"


# --- in short -------------------------------------------------------------------------------------


def _short(runs: Sequence[Explained]) -> str:
    if len(runs) == 1:
        return bullets(summary(runs[0]))
    parts = []
    for run in runs:
        first = runs[0] if run is not runs[0] else None
        parts.append(f"<h3>{as_text(run.record.name)}</h3>")
        parts.append(bullets(summary(run, first, alone=False)))
    return "".join(parts)


# --- results --------------------------------------------------------------------------------------


def result_table(runs: Sequence[Explained]) -> str:
    """Metrics in percent with their intervals, and what was published."""
    rows = _result_rows(runs)
    if not rows:
        return '<p class="note">No evaluation yet.</p>'
    names = tables.columns(rows)
    own = [row for row in rows if not _is_published(row)]
    best: Numbers = {}
    if len(own) > 1:
        best = {name: max(row.numbers.get(name, -1.0) for row in own) for name in names}
    head = "".join(f'<th scope="col">{as_text(name)}</th>' for name in ("", *names))
    lines = "".join(_result_line(row, names, {} if _is_published(row) else best) for row in rows)
    meaning = " ".join(meaning.text for meaning in tables.meanings_of(names))
    return (
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
        f'<p class="note space">{as_text(meaning)}</p>'
    )


def _result_rows(runs: Sequence[Explained]) -> list[tables.Row]:
    """The evaluations of each run, followed by what its recipe was published with, once."""
    rows, recipes = [], set()
    for run in runs:
        results, published = run.record.results, run.published
        for title, numbers in results.items():
            label = title
            if len(runs) > 1:
                label = run.record.name + (f", {title}" if len(results) > 1 else "")
            rows.append(tables.Row(title, label, numbers, intervals=run.intervals(title)))
        if published is not None and published.recipe not in recipes:
            recipes.add(published.recipe)
            about = {"published": published.recipe}
            label = f"published: {published.recipe}"
            rows.append(tables.Row("", label, published.numbers, about=about))
    return rows


def _is_published(row: tables.Row) -> bool:
    return "published" in row.about


def _result_line(row: tables.Row, names: Sequence[str], best: Numbers) -> str:
    """A row of the table; `best` are the numbers that are set in bold, where it has them."""
    cells = [
        cell(
            row.numbers.get(name),
            row.intervals.get(name),
            best=name in best and row.numbers.get(name) == best[name],
        )
        for name in names
    ]
    kind = "published" if _is_published(row) else ""
    return f'<tr class="{kind}"><td>{as_text(row.label)}</td>{"".join(cells)}</tr>'


def _about_results(runs: Sequence[Explained]) -> str:
    words = "Of the best checkpoint, in percent."
    if any(run.search is not None for run in runs):
        words += " Below: 95 % intervals over the queries (bootstrap), the network as it is"
        part = _sampled(runs)
        words += f", from {part} and scaled to all." if part else "."
    return words


def _sampled(runs: Sequence[Explained]) -> str:
    """Which part of the queries was searched for, where it was a part."""
    searches = [run.search for run in runs if run.search is not None]
    return next((search.sampled for search in searches if search.sampled), "")


# --- what was run ---------------------------------------------------------------------------------


def _setup(run: Explained, several: bool) -> str:
    record, args = run.record, run.record.args
    given = "\n".join(f"--{name.replace('_', '-')} {args.get(name)}" for name in args["given"])
    kept = record.environment.get("command")
    command = f"python {kept}" if kept else f"# the command was not kept; its flags:\n{given}"
    everything = "\n".join(f"{k} = {v}" for k, v in sorted(args.items()) if k != "given")
    title = f"<h3>{as_text(record.name)}</h3>" if several else ""
    return (
        f'{title}<div class="card">{facts(_facts(run))}<pre>{as_text(command)}</pre>'
        f"{folded('all options', f'<pre>{as_text(everything)}</pre>')}</div>"
    )


def _facts(run: Explained) -> list[tuple[str, Any]]:
    record, args, known = run.record, run.record.args, run.record.environment
    rate = record.images_per_second
    history = record.folder.classes.load()
    trained = ""
    if history:
        trained = f"{int(history['images'].sum()):,} images, {len(history['names']):,} classes"
    return [
        ("method", record.method),
        ("network", f"{args.get('model')}, {args.get('embedding_size')} dimensions"),
        ("data", args.get("dataset")),
        ("trained on", trained),
        ("judged on", run.counts),
        ("best epoch picked on", _picked_on(record)),
        ("batch", f"{args.get('batch_size')} images"),
        ("seed", str(args.get("seed"))),
        ("epochs", str(int(record.rows[-1]["epoch"])) if record.rows else "none finished"),
        ("training time", human_seconds(record.seconds) if record.rows else ""),
        ("speed", f"{rate:,.0f} images/s" if rate else ""),
        ("machine", known.get("device")),
        ("torch", known.get("packages", {}).get("torch")),
        ("commit", (known.get("git_commit") or "")[:12]),
        ("recipe", args.get("recipe")),
        ("folder", str(record.path)),
    ]


def _picked_on(record: Record) -> str | None:
    if len(record.evaluated) == 1:
        return "nothing: evaluated once"
    return record.outcome.get("picked_on")


# --- what page.js draws ---------------------------------------------------------------------------


def _about_curves(runs: Sequence[Explained]) -> str:
    more = "; the runs above switch their lines on and off." if len(runs) > 1 else "."
    return f"Over the epochs. Hover for values{more}"


def _about_confusions(runs: Sequence[Explained]) -> str:
    words = "Pairs of classes by how many queries of either have an image of the other as their "
    part = _sampled(runs)
    return f"{words}nearest. " + (f"From {part}." if part else "")


def _run_data(run: Explained) -> dict[str, Any]:
    return {
        "name": run.record.name,
        **curves.points(run.record),
        "missing": run.missing,
        "galleries": run.galleries,
        "confusions": run.confusions,
        "classes": run.classes,
        "map": run.map,
        "sections": run.sections,
    }
