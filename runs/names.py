"""What runs and their files are called, and where runs go."""

from __future__ import annotations

import time
from pathlib import Path

from machine import expanded, home

LONGEST_PART = 40  # bytes that one word gets of a file's name


def home_logs() -> Path | None:
    """Where runs go whose --LOG_DIR is read-only; None without a home folder."""
    return None if (folder := home()) is None else folder / "anchorage-logs"


def run_name(dataset: str, model: str, loss: str, remark: str) -> str:
    """`emoji_resnet18_AMLoss_20261121-141502`, and the remark where there is one."""
    parts = [model, loss, *([remark] if remark else []), time.strftime("%Y%m%d-%H%M%S")]
    return "_".join([data_name(dataset), *map(file_name_part, parts)])


def data_name(dataset: str) -> str:
    """What files call a data set: its name, or of one's own images that of the folder or table."""
    kind, colon, place = dataset.partition(":")
    if colon:
        path = Path(expanded(place)).absolute()
        dataset = (path.stem if kind.lower() == "csv" else path.name) or kind
    return file_name_part(dataset)


def file_name_part(text: str) -> str:
    """Letters, digits and a few signs; at most 40 bytes, since a file name has 255 in all."""
    plain = "".join(c if c.isalnum() or c in "-." else "-" for c in text)
    return plain.encode()[:LONGEST_PART].decode(errors="ignore")
