"""The columns of metrics.csv as curves: groups of charts, and the points of each run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from evaluation import meanings, tables
from page.records import Numbers, Record

NOT_DRAWN = ("epoch", "step", "seconds", meanings.HIDDEN)
MAIN_METRICS = ("R@1", "MAP@R", "NMI")
TITLES = {"margin": "proxy-proxy term"}  # of AMLoss; the margins have a section of their own
SPEED = ("images_per_second", "data_wait", "evaluation_seconds")


def groups(runs: Sequence[Record]) -> list[dict[str, Any]]:
    """The columns of metrics.csv, sorted into groups of charts."""
    columns = dict.fromkeys(name for run in runs for row in run.rows for name in row)
    shown = [name for name in columns if not name.startswith(NOT_DRAWN)]
    measured = [name for name in shown if meanings.is_metric(name)]
    rates = [name for name in shown if name.startswith("lr ")]
    speed = [name for name in shown if name in SPEED]
    loss = [name for name in shown if name not in {*measured, *rates, *speed}]
    measured = tables.columns([tables.Row("", "", dict.fromkeys(measured, 0.0))])
    main = [name for name in measured if name.removeprefix(meanings.BESIDE) in MAIN_METRICS]
    more = [name for name in measured if name not in main]
    raw = {
        name: f"{name.replace(meanings.BESIDE, '')}{meanings.RAW}, %"
        for name in measured
        if meanings.BESIDE in name
    }
    return [
        {"title": "Metrics", "columns": main, "percent": True, "titles": raw},
        {"title": "Loss and its terms", "columns": loss, "titles": TITLES},
        {"title": "More metrics", "columns": more, "percent": True, "titles": raw, "folded": True},
        {"title": "Learning rates", "columns": rates, "log": True, "folded": True},
        {"title": "Speed", "columns": speed, "folded": True},
    ]


def points(run: Record) -> dict[str, Any]:
    """All columns of a run, and the x-coordinates for each choice of axis."""
    rows = [_drawn(row) for row in run.rows]
    columns = dict.fromkeys(name for row in rows for name in row)
    return {
        "across": {
            "epoch": _epochs(rows),
            "step": [int(row["step"]) for row in rows],
            "minutes": [round(row.get("seconds", 0.0) / 60, 3) for row in rows],
        },
        "columns": {name: [row.get(name) for row in rows] for name in columns},
    }


def _drawn(row: Numbers) -> Numbers:
    """A row without its metrics if no query had anything to find."""
    if not meanings.nothing_to_find(row):
        return row
    return {name: value for name, value in row.items() if not meanings.is_metric(name)}


def _epochs(rows: Sequence[Numbers]) -> list[float]:
    """The epoch of each row; with several rows per epoch, a fraction by their steps."""
    epochs = [int(row["epoch"]) for row in rows]
    if len(set(epochs)) == len(epochs):
        return epochs
    per_epoch = max(1.0, rows[-1]["step"] / max(1, math.ceil(epochs[-1])))
    return [round(row["step"] / per_epoch, 3) for row in rows]
