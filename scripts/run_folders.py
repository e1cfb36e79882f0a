"""Compares two run folders: weights bit by bit, numbers as they are written."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from training.tracking import TIMES

LEARNED = ("model_state_dict", "criterion_state_dict", "ema_state_dict")


def run_contents(run: Path) -> dict[str, Any]:
    """The contents of a run folder by file, without times and paths."""
    (best,) = run.glob("*_best.pth")
    return {
        "last.pth": _learned(run / "last.pth", "clock"),
        best.name: _learned(best, "epoch", "step", "metrics"),
        "metrics.csv": _rows(run / "metrics.csv"),
        "results.json": json.loads((run / "results.json").read_text()),
    }


def _learned(path: Path, *others: str) -> dict[str, Any]:
    stored = torch.load(path, weights_only=True)
    content = {key: stored[key] for key in (*LEARNED, *others) if key in stored}
    if "clock" in content:
        content["clock"] = {k: v for k, v in content["clock"].items() if k != "seconds"}
    return content


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k not in TIMES} for row in rows]


def difference(before: Any, now: Any, where: str = "") -> str:
    """The first difference between two nested values in words; "" if they are equal."""
    if isinstance(before, torch.Tensor) and isinstance(now, torch.Tensor):
        return _tensor_difference(before, now, where)
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        if list(before) != list(now):
            gone, added = [k for k in before if k not in now], [k for k in now if k not in before]
            words = f"gone {gone}, added {added}" if gone or added else "in another order"
            return f"{where}: {words}"
        pairs = [(f"{where} {key}".strip(), before[key], now[key]) for key in before]
    elif isinstance(before, list) and isinstance(now, list):
        if len(before) != len(now):
            return f"{where}: {len(before)} entries, now {len(now)}"
        pairs = [(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(before, now, strict=True))]
    else:
        return "" if repr(before) == repr(now) else f"{where}: {before!r}, now {now!r}"
    found = (difference(first, second, place) for place, first, second in pairs)
    return next(filter(None, found), "")


def _tensor_difference(before: torch.Tensor, now: torch.Tensor, where: str) -> str:
    kinds = [(str(tensor.dtype), tuple(tensor.shape)) for tensor in (before, now)]
    if kinds[0] != kinds[1]:
        return f"{where}: {kinds[0]}, now {kinds[1]}"
    as_bytes = (tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (before, now))
    if torch.equal(*as_bytes):
        return ""
    largest = (before.double() - now.double()).abs().max()
    return f"{where}: differs by up to {float(largest):.2g}"
