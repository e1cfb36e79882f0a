"""Texts about a page's parts, which build.py puts into HTML."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from page import results
from page.explained import Explained
from page.records import Record, in_brief
from utils import human_seconds


def title(runs: Sequence[Explained]) -> str:
    """The page's title."""
    return runs[0].record.title if len(runs) == 1 else f"{len(runs)} runs"


def lead(runs: Sequence[Explained]) -> str:
    """The line below the title: method, data and network."""
    if len(runs) > 1:
        return ", ".join(dict.fromkeys(run.record.method for run in runs))
    record = runs[0].record
    return f"{record.method} on {record.args.get('dataset')}, {record.args.get('model')}"


def made_by(runs: Sequence[Explained]) -> str:
    """The footer: the program that made the runs."""
    commits = {run.record.environment.get("git_commit") or "?" for run in runs}
    return f"Anchorage, commit {', '.join(commit[:12] for commit in sorted(commits))}"


# --- what was run ---------------------------------------------------------------------------------


def command(record: Record) -> str:
    """The command that started a run; if it was not stored, the flags that were given."""
    kept, args = record.environment.get("command"), record.args
    if kept:
        program, _, words = kept.partition(" ")
        installed = Path(program).name == "anchorage"  # as a command, wherever it lies
        return f"anchorage {words}" if installed else f"python {kept}"
    given = "\n".join(
        f"--{name.replace('_', '-')} {in_brief(args.get(name))}" for name in args.get("given", [])
    )
    return f"# the command was not kept; its flags:\n{given}"


def all_options(record: Record) -> str:
    """One option per line, by name."""
    return "\n".join(f"{k} = {v}" for k, v in sorted(record.args.items()) if k != "given")


def facts(run: Explained) -> list[tuple[str, Any]]:
    """Names and values of facts about a run; empty values are unknown."""
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
    """The copy of the data set, and the treatment of EXIF orientation, if they are unusual."""
    record = run.record
    source = record.environment.get("source") or ""
    as_stored = "EXIF orientation ignored" if record.options.exif == "ignore" else ""
    known = source if source != record.args.get("dataset") else ""
    return ", ".join(filter(None, (known, as_stored)))


def _picked_on(record: Record) -> str | None:
    if len(record.evaluated) == 1:
        return "nothing: evaluated once"
    return record.outcome.get("picked_on")


# --- about the parts ------------------------------------------------------------------------------


def of_curves(runs: Sequence[Explained]) -> str:
    """About the curves."""
    more = "; the runs above switch their lines on and off." if len(runs) > 1 else "."
    return f"Over the epochs. Hover for values{more}"


def of_galleries(runs: Sequence[Explained]) -> str:
    """About the rows of images."""
    shared = [run.shared for run in runs if run.search is not None]
    if shared and all(found is not None and found.unseen for found in shared):
        query = "an image of a class the network was never trained on"
    else:
        query = "an image of the evaluation"
    return f"Each row: {query}, and the ten images it finds most similar, nearest first."


def of_pairs() -> str:
    """About the pairs of images."""
    return (
        "Every two images of the evaluation are compared by their cosine: how far that tells pairs "
        "of one class from pairs of two."
    )


def of_map(runs: Sequence[Explained]) -> str:
    """About the map: how it was made, and what it does not show."""
    by = "t-SNE (scikit-learn)"
    if any(run.map is not None and run.map.get("principal") for run in runs):
        by += ", or else the first principal components,"
    return (
        f"{by} in two dimensions, which tries to keep neighbours together. Distances between "
        "groups, and the directions, mean nothing."
    )


def of_confusions(runs: Sequence[Explained]) -> str:
    """About the confused classes: how the pairs are ranked."""
    words = "Pairs of classes by how many queries of either have an image of the other as their "
    part = results.sampled(runs)
    return f"{words}nearest. " + (f"From {part}." if part else "")
