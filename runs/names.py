"""Names of runs and of their files, and the folder for runs."""

from __future__ import annotations

import time
from pathlib import Path

from machine import expanded, home

LONGEST_PART = 40  # bytes of one word in a file's name


def home_logs() -> Path | None:
    """The folder for runs whose --LOG_DIR is read-only; None without a home folder."""
    return None if (folder := home()) is None else folder / "anchorage-logs"


def run_name(dataset: str, model: str, loss: str, remark: str) -> str:
    """`emoji_resnet18_AMLoss_20261121-141502`; a remark, if there is one, precedes the time."""
    parts = [model, loss, *([remark] if remark else []), time.strftime("%Y%m%d-%H%M%S")]
    return "_".join([data_name(dataset), *map(file_name_part, parts)])


def data_name(dataset: str) -> str:
    """The name of a data set in file names; for user images, that of their folder or table."""
    kind, colon, place = dataset.partition(":")
    if colon:
        path = Path(expanded(place)).absolute()
        dataset = (path.stem if kind.lower() == "csv" else path.name) or kind
    return file_name_part(dataset)


def file_name_part(text: str) -> str:
    """Text reduced to letters, digits, - and .; at most 40 bytes, because file names have 255."""
    plain = "".join(c if c.isalnum() or c in "-." else "-" for c in text)
    return plain.encode()[:LONGEST_PART].decode(errors="ignore")
