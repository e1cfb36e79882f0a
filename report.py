"""A run folder → one HTML page that explains the run; several runs → one page that compares them.

    python report.py logs/demo
    python report.py logs/first logs/second --out both.html
    python report.py --compare logs --grep AMLoss --latex runs.tex

The page needs nothing else and loads nothing. Embeddings are made again from the best checkpoint,
or read from a file of `evaluate.py --export`. Training calls `make` when it ends.
"""

from __future__ import annotations

import options

ARGS = options.parse_report() if __name__ == "__main__" else None

import argparse
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dataset
import net
from dataset.base import ImageSet
from devices import Precision, pick_device
from evaluation import tables
from evaluation.embedding import Embedded, Viewing, embed
from evaluation.files import random_neighbours
from evaluation.networks import open_checkpoint
from evaluation.pictures import Thumbnails, below, class_values_picture, save_picture
from evaluation.tasks import Task, tasks_of
from metrics import comparison
from page import counterpart, findings, methods, overview, records
from page.document import bullets, cell, document, facts, folded, percent, section, text
from page.findings import Search
from page.records import Published, Record
from runs import load_checkpoint
from utils import InputError, human_seconds, sentence_errors, write_atomically

PICTURES = 3_400_000  # bytes of thumbnails in the page of one run, so that it stays below 5 MB
PICTURES_MORE = 1_200_000  # for each further run

# --- what is read ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """The best checkpoint of a run, opened: its network, and the data it is judged on."""

    data: dataset.Choice
    viewing: Viewing
    checkpoint: dict[str, Any]
    network: net.EmbeddingNet
    precision: Precision
    task: Task

    def embed(self, images: ImageSet, *, title: str = "report") -> torch.Tensor:
        """Raw embeddings (n, d), on the CPU."""
        made = embed(self.network, images, self.precision, self.viewing, title=title)
        return made.float().cpu()

    def embed_with_uncertainty(self, images: ImageSet) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Raw embeddings (n, d) and, where the network has that head, uncertainties (n, d)."""
        if "uncertainty" not in self.network.heads:
            return self.embed(images), None
        size = self.network.embedding_size

        def both(batch: torch.Tensor) -> torch.Tensor:
            outputs = self.network(batch)
            return torch.cat([outputs.embedding[:, :size], outputs.uncertainty], dim=1)

        made = embed(
            self.network, images, self.precision, self.viewing, title="report", represent=both
        )
        made = made.float().cpu()
        return made[:, :size], made[:, size:]

    def training_images(self, names: Sequence[str]) -> ImageSet | None:
        """Those that the criterion's classes `names` are of; None where they cannot be told."""
        train = self.data.load("train")
        label_of = {name: label for label, name in enumerate(train.class_names)}
        if len(label_of) < train.num_classes or not all(name in label_of for name in names):
            return None
        return train.select_classes([label_of[name] for name in names])


def open_best(record: Record, gpu_id: int) -> Source:
    """The best checkpoint of a run and its evaluation data.

    Raises:
        InputError: there is no checkpoint yet, or the data are not here.
    """
    path = record.best_checkpoint
    if path is None:
        raise InputError(f"{record.name} has no best checkpoint yet, so nothing was embedded")
    if record.options.no_test:
        raise InputError(f"{record.name} was trained with --no-test: its test classes stay unseen")
    opened = open_checkpoint(path)
    viewing = replace(opened.viewing, workers=record.options.workers)
    task = tasks_of(opened.data)[0]
    precision = Precision("auto", pick_device(gpu_id))
    opened.network.to(precision.device, memory_format=precision.memory_format)
    return Source(opened.data, viewing, opened.content, opened.network, precision, task)


def judge(source: Source, file: str | None = None) -> Embedded:
    """Embeds the evaluation, or takes its embeddings from a file of `evaluate.py --export`."""
    task = source.task
    if file is not None:
        return _exported(task, Path(file))
    embeddings, uncertainty = source.embed_with_uncertainty(task.queries)
    gallery = None if task.gallery is None else source.embed(task.gallery)
    return Embedded(task, embeddings, gallery, uncertainty)


def _exported(task: Task, path: Path) -> Embedded:
    try:
        with np.load(path, allow_pickle=False) as file:
            content = dict(file)
    except (OSError, ValueError) as error:
        raise InputError(f"--embeddings {path} cannot be read ({error})") from error
    sides = [("", task.queries), ("gallery_", task.gallery)]
    for prefix, images in sides:
        labels = content.get(f"{prefix}labels")
        if images is not None and not np.array_equal(labels, images.labels):
            raise InputError(
                f"--embeddings {path} is not of this run's evaluation ({task.title}): the labels "
                "differ; make it with evaluate.py --export"
            )
    arrays = {name: torch.from_numpy(value) for name, value in content.items() if value.ndim == 2}
    return Embedded(
        task,
        arrays["embeddings"],
        arrays.get("gallery_embeddings"),
        arrays.get("uncertainty"),
        unit=True,
    )


# --- what is found --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Explained:
    """A run with all that the page says of it. Without embeddings `missing` says why."""

    record: Record
    published: Published | None
    search: Search | None = None
    missing: str = ""
    galleries: Sequence[dict] = ()
    confusions: Sequence[dict] = ()
    classes: dict | None = None
    map: dict | None = None
    sections: Sequence[dict] = ()
    counts: str = ""

    def intervals(self, title: str) -> dict[str, list[float]]:
        """95 % intervals of the metrics of an evaluation, where its queries were searched for."""
        if self.search is None or title != self.search.judged.task.title:
            return {}
        return self.search.intervals(self.record.results.get(title, {}))


def explain(
    record: Record, thumbs: Thumbnails, chosen: Sequence[str], seed: int, file: str | None, gpu: int
) -> Explained:
    """Embeds the evaluation of a run, searches, and looks at what there is to see.

    Raises:
        InputError: what was asked for by name is not there.
    """
    try:
        source = open_best(record, gpu)
        judged = judge(source, file)
    except InputError as error:
        if file is not None:
            raise
        return Explained(record, records.published(record), missing=str(error))
    state = record.path / "last.pth"
    history = record.folder.classes.load()
    learned = methods.Learned(
        record=record,
        checkpoint=source.checkpoint,
        state=load_checkpoint(state) if state.is_file() else {},
        history=history,
        judged=judged,
        search=Search(judged, seed),
        train=source.training_images(history["names"].tolist()) if history else None,
        embed=source.embed,
        thumbs=thumbs,
        seed=seed,
    )
    return look(learned, chosen, source.task.describe())


def look(learned: methods.Learned, chosen: Sequence[str], counts: str) -> Explained:
    """All that the embeddings and the checkpoint of a run show; `counts` says of how many images.

    Raises:
        InputError: what was asked for by name is not there.
    """
    search, thumbs, seed = learned.search, learned.thumbs, learned.seed
    return Explained(
        learned.record,
        records.published(learned.record),
        search,
        galleries=findings.galleries(search, chosen, thumbs, seed),
        confusions=findings.confusions(search, thumbs),
        classes=findings.class_scores(search, thumbs),
        sections=methods.sections(learned),
        map=findings.embedding_map(learned.judged, thumbs, seed),
        counts=counts,
    )


# --- what is said ---------------------------------------------------------------------------------


def summary(run: Explained, first: Explained | None = None, *, alone: bool = True) -> list[str]:
    """The run in a few sentences; with `first`, whether it is better than that one.

    Of a run that is `alone` on its page it says whether its method was worth it.
    """
    worth = counterpart.sentence(run.record) if alone else ""
    return [s for s in (*_reached(run), *_against(run, first), worth, *_noticed(run)) if s]


def _reached(run: Explained) -> list[str]:
    record, found = run.record, []
    for title, numbers in list(record.results.items())[:1]:
        value, between = numbers.get("R@1"), run.intervals(title).get("R@1")
        if value is None:
            continue
        sure = f" (95 % interval {percent(between[0])} to {percent(between[1])})" if between else ""
        of = f" ({run.counts}, none of them trained on)" if run.counts else ""
        found.append(
            f"R@1 {percent(value)} %{sure}: for {100 * value:.0f} of 100 queries the nearest image "
            f"is of the right class{of}."
        )
    if run.search is not None:
        relevant = run.search.per_query["relevant"].double()
        gallery = len(run.search.judged.searched[0]) - (run.search.judged.gallery is None)
        chance = float((relevant / max(1, gallery)).mean())
        found.append(f"A random image would be right for {100 * chance:.2g} of 100.")
    if not found:
        found.append("This run has not been evaluated yet.")
    if len(record.evaluated) == 1 and record.outcome:
        found.append(f"Evaluated once, after epoch {record.best_epoch}: no epoch was picked.")
    elif record.best_epoch is not None and record.rows:
        last = int(record.rows[-1]["epoch"])
        tested = record.outcome.get("picked_on") == "test classes"
        found.append(
            f"Best epoch {record.best_epoch} of {last}"
            + (
                ", picked on the test classes themselves, as the papers do: a little optimistic."
                if tested
                else "."
            )
        )
    return found


def _against(run: Explained, first: Explained | None) -> list[str]:
    found = []
    numbers = next(iter(run.record.results.values()), {})
    known = run.published
    if known is not None and "R@1" in known.numbers and "R@1" in numbers:
        apart = 100 * (numbers["R@1"] - known.numbers["R@1"])
        found.append(
            f"The recipe {known.recipe} is published with R@1 {percent(known.numbers['R@1'])} %; "
            f"this run is {abs(apart):.1f} points {'above' if apart >= 0 else 'below'}."
            + (f" It differs from the recipe: {', '.join(known.changes)}." if known.changes else "")
        )
    test = None if first is None else paired(first, run)
    if test is not None:
        low, high = 100 * test.low, 100 * test.high
        sure = "could be chance" if low <= 0 <= high else "more than chance among the queries"
        found.append(
            f"R@1 is {100 * test.difference:+.1f} points against {first.record.name} on the same "
            f"queries (95 % interval {low:+.1f} to {high:+.1f}): {sure}. Other seeds may differ."
        )
    return found


def paired(first: Explained, run: Explained) -> comparison.Difference | None:
    """R@1 of a run against that of the first on the same queries; None where they differ."""
    if first.search is None or run.search is None:
        return None
    a, b = first.search, run.search
    same = a.judged.images.fingerprint() == b.judged.images.fingerprint()
    if not same or not np.array_equal(a.queries, b.queries):
        return None
    made = comparison.paired_differences(a.scores, b.scores, a.replicates, b.replicates)
    return made.get("R@1")


def _noticed(run: Explained) -> list[str]:
    found = []
    if run.confusions:
        pair = run.confusions[0]
        a, b = pair["names"]
        found.append(
            f"Most confused: {a} and {b} ({sum(pair['counts'])} of {sum(pair['sizes'])} queries)."
        )
    if run.classes and run.classes["lowest"]:
        worst = run.classes["lowest"][0]
        right = round(worst["score"] * worst["size"])
    if run.classes and run.classes["lowest"] and right < worst["size"]:
        found.append(f"Found worst: {worst['name']} ({right} of its {worst['size']} queries).")
    for part in run.sections:
        if part["kind"] == "class-values":
            found.append(_about_values(part))
        if part["kind"] == "certainty" and part["quintiles"]:
            sure, unsure = part["quintiles"][0], part["quintiles"][-1]
            found.append(
                f"Of the fifth of the queries it is most certain of it finds {percent(sure)} %, of "
                f"the least certain fifth {percent(unsure)} %."
            )
    return found


def _about_values(part: dict) -> str:
    low, high, value = part["smallest"][0], part["largest"][0], part["value"]
    words = f"Learned {value}s go from {low['value']:.3g} ({low['name']}) to {high['value']:.3g}"
    words += f" ({high['name']})."
    strongest = max(part["scatters"], key=lambda s: abs(s["correlation"]), default=None)
    if strongest is None or abs(strongest["correlation"]) < 0.3:
        return words
    more = "larger" if strongest["correlation"] > 0 else "smaller"
    near = "proxy" in strongest["x"]
    where = "another class's proxy is near" if near else "the images of a class differ most"
    return (
        f"{words} They are {more} where {where} (rank correlation {strongest['correlation']:.2f})."
    )


# --- the page -------------------------------------------------------------------------------------


def build(runs: Sequence[Explained], thumbs: Thumbnails) -> str:
    """The HTML of one run or several."""
    first, title = runs[0], _title(runs)
    several = len(runs) > 1
    links = [
        *(("short", "In short"), ("results", "Results"), ("setup", "What was run")),
        *(("curves", "Curves"), ("galleries", "Queries"), ("confusions", "Confusions")),
        *((("methods", "Method"),) if any(run.sections for run in runs) else ()),
        ("map", "Map"),
    ]
    short = "".join(
        (f"<h3>{text(run.record.name)}</h3>" if several else "")
        + bullets(summary(run, first if run is not first else None, alone=not several))
        for run in runs
    )
    parts = [
        section("short", "In short", short),
        section("results", "Results", result_table(runs), _about_results(runs)),
        section("setup", "What was run", "".join(_setup(run, several) for run in runs)),
        section(
            "curves",
            "Curves",
            '<div id="curves-here"></div>',
            "Over the epochs. Hover for values"
            + ("; the runs above switch their lines on and off." if several else "."),
        ),
        _of_one_run(runs),
        section(
            "galleries",
            "Queries and their nearest images",
            '<div id="galleries-here"></div>',
            "Each row: an image of a class the network was never trained on, and the ten images "
            "it finds most similar, nearest first.",
        ),
        section(
            "confusions",
            "Which classes it confuses",
            '<div id="confusions-here"></div>',
            "Pairs of classes by how many queries of either have an image of the other as their "
            "nearest. " + _sampled(runs),
        ),
        '<div id="methods-here"></div>' if any(run.sections for run in runs) else "",
        section(
            "map",
            "Map of the embedding",
            '<div id="map-here"></div>',
            "t-SNE (scikit-learn) in two dimensions: what is together here is near in the "
            "embedding. Distances between groups, and the directions, mean nothing.",
        ),
    ]
    nav = "".join(f'<a href="#{name}">{words}</a>' for name, words in links)
    switch = '<span class="end"><button data-theme-switch>light / dark</button></span>'
    body = (
        f'<header id="top"><h1>{text(title)}</h1><p class="lead">{text(_lead(runs))}</p>'
        f"{_switches(runs) if several else ''}</header>"
        f"<nav><div>{nav}{switch}</div></nav><main>{''.join(parts)}</main>"
        f"<footer>{_footer(runs)}</footer>"
    )
    data = {"runs": [_run_data(run) for run in runs], "groups": groups(runs)}
    return document(title, body, {**data, "images": thumbs.encode()})


def _title(runs: Sequence[Explained]) -> str:
    return runs[0].record.name if len(runs) == 1 else f"{len(runs)} runs"


def _lead(runs: Sequence[Explained]) -> str:
    if len(runs) > 1:
        return ", ".join(dict.fromkeys(run.record.method for run in runs))
    record = runs[0].record
    return f"{record.method} on {record.args.get('dataset')}, {record.args.get('model')}"


def _switches(runs: Sequence[Explained]) -> str:
    made = [
        f'<button class="run" data-toggle="{i}" aria-pressed="true">'
        f'<span class="dot" data-colour="{i}"></span>{text(run.record.name)}</button>'
        for i, run in enumerate(runs)
    ]
    return f'<div class="runs">{"".join(made)}</div>'


def _of_one_run(runs: Sequence[Explained]) -> str:
    if len(runs) == 1:
        return ""
    made = [
        f'<button data-choose="{i}" aria-pressed="{"true" if i == 0 else "false"}">'
        f"{text(run.record.name)}</button>"
        for i, run in enumerate(runs)
    ]
    return (
        '<section id="choose"><h2>One run, looked at closely</h2><p class="about">Everything '
        f'below is of the run that is chosen here.</p><div class="tabs">{"".join(made)}</div>'
        "</section>"
    )


def result_table(runs: Sequence[Explained]) -> str:
    """Metrics in percent with their intervals, and what was published."""
    rows: list[tuple[str, dict, dict, str]] = []
    for run in runs:
        for title, numbers in run.record.results.items():
            name = run.record.name if len(runs) > 1 else title
            if len(runs) > 1 and len(run.record.results) > 1:
                name += f", {title}"
            rows.append((name, numbers, run.intervals(title), ""))
        if run.published is not None:
            name = f"published: {run.published.recipe}"
            if name not in [row[0] for row in rows]:
                rows.append((name, run.published.numbers, {}, "published"))
    if not rows:
        return '<p class="note">No evaluation yet.</p>'
    names = tables.columns([tables.Row(row[0], "", row[1]) for row in rows])
    own = [row for row in rows if not row[3]]
    best = {name: max((row[1].get(name, -1.0) for row in own), default=-1) for name in names}
    head = "".join(f'<th data-sort scope="col">{text(name)}</th>' for name in ("", *names))
    lines = []
    for title, numbers, between, kind in rows:
        cells = [
            cell(
                numbers.get(name),
                between.get(name),
                best=len(own) > 1 and not kind and numbers.get(name) == best[name],
            )
            for name in names
        ]
        lines.append(f'<tr class="{kind}"><td>{text(title)}</td>{"".join(cells)}</tr>')
    meaning = " ".join(m.text for m in tables.meanings_of(names))
    return (
        f'<div class="card scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
        f'<p class="note space">{text(meaning)}</p>'
    ).replace(" data-sort", "")


def _about_results(runs: Sequence[Explained]) -> str:
    words = "Of the best checkpoint, in percent."
    searches = [run.search for run in runs if run.search is not None]
    if searches:
        words += " Below: 95 % intervals over the queries (bootstrap), the network as it is"
        part = next((search.sampled for search in searches if search.sampled), "")
        words += f", from {part} and scaled to all." if part else "."
    return words


def _sampled(runs: Sequence[Explained]) -> str:
    part = next((run.search.sampled for run in runs if run.search and run.search.sampled), "")
    return f"From {part}." if part else ""


def _setup(run: Explained, several: bool) -> str:
    record, args, known = run.record, run.record.args, run.record.environment
    packages = known.get("packages", {})
    rate = record.images_per_second
    history = record.folder.classes.load()
    trained = (
        f"{int(history['images'].sum()):,} images, {len(history['names']):,} classes"
        if history
        else ""
    )
    listed = facts(
        [
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
            ("torch", packages.get("torch")),
            ("commit", (known.get("git_commit") or "")[:12]),
            ("recipe", args.get("recipe")),
            ("folder", str(record.path)),
        ]
    )
    given = "\n".join(f"--{name.replace('_', '-')} {args.get(name)}" for name in args["given"])
    kept = known.get("command")
    command = f"python {kept}" if kept else f"# the command was not kept; its flags:\n{given}"
    everything = "\n".join(f"{k} = {v}" for k, v in sorted(args.items()) if k != "given")
    title = f"<h3>{text(record.name)}</h3>" if several else ""
    return (
        f'{title}<div class="card">{listed}<pre>{text(command)}</pre>'
        f"{folded('all options', f'<pre>{text(everything)}</pre>')}</div>"
    )


def _picked_on(record: Record) -> str | None:
    if len(record.evaluated) == 1:
        return "nothing: evaluated once"
    return record.outcome.get("picked_on")


def _footer(runs: Sequence[Explained]) -> str:
    commits = {run.record.environment.get("git_commit") or "?" for run in runs}
    return f"Anchorage, commit {text(', '.join(c[:12] for c in sorted(commits)))}"


NOT_DRAWN = ("epoch", "step", "seconds", tables.HIDDEN)
MAIN_METRICS = ("R@1", "MAP@R", "NMI")
SPEED = ("images_per_second", "data_wait", "evaluation_seconds")


def groups(runs: Sequence[Explained]) -> list[dict]:
    """The columns of metrics.csv, sorted into groups of charts."""
    columns = dict.fromkeys(name for run in runs for row in run.record.rows for name in row)
    shown = [name for name in columns if not name.startswith(NOT_DRAWN)]
    measured = [name for name in shown if records.is_metric(name)]
    rates = [name for name in shown if name.startswith("lr ")]
    speed = [name for name in shown if name in SPEED]
    loss = [name for name in shown if name not in {*measured, *rates, *speed}]
    measured = tables.columns([tables.Row("", "", dict.fromkeys(measured, 0.0))])
    more = [name for name in measured if name not in MAIN_METRICS]
    main = [name for name in measured if name in MAIN_METRICS]
    return [
        {"title": "Metrics", "columns": main, "percent": True},
        {"title": "Loss and its terms", "columns": loss},
        {"title": "More metrics", "columns": more, "percent": True, "folded": True},
        {"title": "Learning rates", "columns": rates, "log": True, "folded": True},
        {"title": "Speed", "columns": speed, "folded": True},
    ]


def _run_data(run: Explained) -> dict[str, Any]:
    rows = run.record.rows
    columns = dict.fromkeys(name for row in rows for name in row)
    return {
        "name": run.record.name,
        "across": {
            "epoch": _epochs(rows),
            "step": [int(row["step"]) for row in rows],
            "minutes": [round(row.get("seconds", 0.0) / 60, 3) for row in rows],
        },
        "columns": {name: [row.get(name) for row in rows] for name in columns},
        "missing": run.missing,
        "galleries": run.galleries,
        "confusions": run.confusions,
        "classes": run.classes,
        "map": run.map,
        "sections": run.sections,
    }


def _epochs(rows: Sequence[dict[str, float]]) -> list[float]:
    """Where each row stands in epochs; with several rows an epoch, by their share of the steps."""
    epochs = [int(row["epoch"]) for row in rows]
    if len(set(epochs)) == len(epochs):
        return epochs
    per_epoch = max(1.0, rows[-1]["step"] / max(1, math.ceil(epochs[-1])))
    return [round(row["step"] / per_epoch, 3) for row in rows]


# --- the command ----------------------------------------------------------------------------------


def make(
    paths: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    queries: Sequence[str] = (),
    embeddings: str | None = None,
    seed: int = 1,
    gpu_id: int = 0,
) -> Path:
    """Writes the page of one run, or of several; returns where.

    Raises:
        InputError: a folder is no run's, what was asked for is not there, or the disk is full.
    """
    runs = [records.read(path) for path in paths]
    thumbs = Thumbnails(PICTURES + PICTURES_MORE * (len(runs) - 1))
    found = [explain(run, thumbs, queries, seed, embeddings, gpu_id) for run in runs]
    if out is None:
        out = (runs[0].path if len(runs) == 1 else runs[0].path.resolve().parent) / "report.html"
    content = build(found, thumbs)
    write_atomically(Path(out), lambda file: file.write(content.encode()))
    return Path(out)


def draw(path: str | Path, out: str | Path, *, seed: int = 1, gpu_id: int = 0) -> Path:
    """Writes a picture of a run: random queries, and the values learned for each class.

    Raises:
        InputError: the folder is no run's, it has no checkpoint, its data are not here, or the
            picture cannot be written.
    """
    record = records.read(path)
    source = open_best(record, gpu_id)
    parts = [random_neighbours(judge(source), seed, top=10)]
    history = record.folder.classes.load()
    train = source.training_images(history["names"].tolist()) if history else None
    if train is not None:
        learned = methods.values_by_name(record, history)
        parts += [class_values_picture(name, values, train) for name, values in learned.items()]
    save_picture(below(parts), Path(out))
    return Path(out)


def main(args: argparse.Namespace) -> None:
    """Runs report.py with parsed options."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    if args.compare:
        overview.compare(args)
        return
    if args.picture:
        out = draw(args.runs[0], args.picture, seed=args.seed, gpu_id=args.gpu_id)
        print(f"picture written to {out}")
        return
    out = make(
        args.runs,
        args.out,
        queries=args.queries,
        embeddings=args.embeddings,
        seed=args.seed,
        gpu_id=args.gpu_id,
    )
    print(f"report written to {out} ({out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    with sentence_errors():
        main(ARGS)
