"""The HTML of one run, or of several: the parts of the page, in order.

Tables and sentences are written here; curves, galleries, confusions, methods and the map are drawn
by page.js from the data, into the elements called `…-here`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evaluation.pictures import Thumbnails
from page import curves, results
from page.document import as_text, bullets, document, facts, folded, section
from page.document import command as as_command
from page.explained import Explained
from page.records import Record
from page.summary import summary
from utils import human_seconds

PICTURES = 4_000_000  # bytes of thumbnails in the page of one run, so that it stays below 5 MB
PICTURES_MORE = 1_200_000  # for each further run


def thumbnails(runs: int) -> Thumbnails:
    """Room for the pictures of a page of that many runs."""
    return Thumbnails(PICTURES + PICTURES_MORE * (runs - 1))


def build(runs: Sequence[Explained], thumbs: Thumbnails) -> str:
    """The HTML of one run or several."""
    title = runs[0].record.title if len(runs) == 1 else f"{len(runs)} runs"
    methods = any(run.sections for run in runs)
    parts = [
        section("short", "In short", _short(runs)),
        section("results", "Results", results.table(runs), results.caption(runs)),
        section("setup", "What was run", "".join(_setup(run, len(runs) > 1) for run in runs)),
        section("curves", "Curves", _drawn("curves"), _about_curves(runs)),
        _choice(runs),
        section(
            "galleries",
            "Queries and their nearest images",
            _drawn("galleries"),
            _about_galleries(runs),
        ),
        section(
            "confusions", "Which classes it confuses", _drawn("confusions"), _about_confusions(runs)
        ),
        section("pairs", "Two images: one class or two", _drawn("pairs"), _about_pairs())
        if any(run.pairs for run in runs)
        else "",
        _drawn("methods") if methods else "",
        section(
            "map",
            "Map of the embedding",
            _drawn("map"),
            _about_map(runs),
        ),
    ]
    body = _head(title, runs) + _navigation(methods)
    body += f"<main>{''.join(parts)}</main><footer>{_footer(runs)}</footer>"
    data = {
        "runs": [_run_data(run) for run in runs],
        "groups": curves.groups([run.record for run in runs]),
    }
    return document(title, body, {**data, "images": thumbs.encode(), "files": thumbs.names()})


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
        f'<span class="dot" data-colour="{i}"></span>{as_text(run.record.title)}</button>'
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
    """Where there are several runs: buttons that say which of them everything below is about."""
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
        parts.append(f"<h3>{as_text(run.record.title)}</h3>")
        parts.append(bullets(summary(run, first, alone=False)))
    return "".join(parts)


# --- what was run ---------------------------------------------------------------------------------


def _setup(run: Explained, several: bool) -> str:
    record, args = run.record, run.record.args
    given = "\n".join(
        f"--{name.replace('_', '-')} {args.get(name)}" for name in args.get("given", [])
    )
    kept = record.environment.get("command")
    command = f"python {kept}" if kept else f"# the command was not kept; its flags:\n{given}"
    everything = "\n".join(f"{k} = {v}" for k, v in sorted(args.items()) if k != "given")
    title = f"<h3>{as_text(record.title)}</h3>" if several else ""
    return (
        f'{title}<div class="card">{facts(_facts(run))}<pre>{as_command(command)}</pre>'
        f"{folded('all options', f'<pre>{as_text(everything)}</pre>')}</div>"
    )


def _facts(run: Explained) -> list[tuple[str, Any]]:
    record, args, known = run.record, run.record.args, run.record.environment
    rate, peft = record.images_per_second, record.options.peft
    history = record.folder.classes.load()
    trained = ""
    if history:
        trained = f"{int(history['images'].sum()):,} images, {len(history['names']):,} classes"
    return [
        ("method", record.method),
        ("network", f"{args.get('model')}, {args.get('embedding_size')} dimensions"),
        ("weights", f"running mean (--ema {args['ema']:g})" if args.get("ema") else ""),
        ("data", args.get("dataset")),
        ("pictures", _pictures(run)),
        ("trained on", trained),
        ("judged on", run.counts),
        ("best epoch picked on", _picked_on(record)),
        ("what trains", f"{peft}, and the network is frozen" if peft != "none" else ""),
        ("batch", _batch(args)),
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


def _batch(args: dict[str, Any]) -> str:
    part = f", {args['micro_batch']} at a time" if args.get("micro_batch") else ""
    return f"{args.get('batch_size')} images{part}"


def _pictures(run: Explained) -> str:
    """Which copy of the data set they are from, and how files are turned, where it is unusual."""
    record = run.record
    source = record.environment.get("source") or ""
    as_stored = "EXIF orientation ignored" if record.options.exif == "ignore" else ""
    known = source if source != record.args.get("dataset") else ""
    return ", ".join(filter(None, (known, as_stored)))


def _picked_on(record: Record) -> str | None:
    if len(record.evaluated) == 1:
        return "nothing: evaluated once"
    return record.outcome.get("picked_on")


# --- what page.js draws ---------------------------------------------------------------------------


def _about_curves(runs: Sequence[Explained]) -> str:
    more = "; the runs above switch their lines on and off." if len(runs) > 1 else "."
    return f"Over the epochs. Hover for values{more}"


def _about_galleries(runs: Sequence[Explained]) -> str:
    shared = [run.shared for run in runs if run.search is not None]
    if shared and all(found is not None and found.unseen for found in shared):
        query = "an image of a class the network was never trained on"
    else:
        query = "an image of the evaluation"
    return f"Each row: {query}, and the ten images it finds most similar, nearest first."


def _about_pairs() -> str:
    return (
        "Every two images of the evaluation are compared by their cosine: how far that tells pairs "
        "of one class from pairs of two."
    )


def _about_map(runs: Sequence[Explained]) -> str:
    by = "t-SNE (scikit-learn)"
    if any(run.map is not None and run.map.get("principal") for run in runs):
        by += ", or else the first principal components,"
    return (
        f"{by} in two dimensions, which tries to keep neighbours together. Distances between "
        "groups, and the directions, mean nothing."
    )


def _about_confusions(runs: Sequence[Explained]) -> str:
    words = "Pairs of classes by how many queries of either have an image of the other as their "
    part = results.sampled(runs)
    return f"{words}nearest. " + (f"From {part}." if part else "")


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
