"""Options and data sets of a run without the folders of the machine that it ran on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

LOCAL = {"LOG_DIR", "name", "data_root", "cache_dir", "gpu_id", "workers", "wandb", "resume"}
LOCAL |= {"resume_run", "wandb_project", "no_report", "dry_run", "tensorboard", "dataset"}
"""Options that say nothing about the model."""


def without_folders(args: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a run without the folders of the machine that it ran on."""
    return {name: _without_folder(name, value) for name, value in args.items()}


def named_by_data(content: Any) -> Any:
    """Values of JSON in which all names of data sets are replaced by `data_in_words`."""
    if isinstance(content, dict):
        return {named_by_data(name): named_by_data(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [named_by_data(value) for value in content]
    return data_in_words(content) if isinstance(content, str) else content


def _without_folder(name: str, value: Any) -> Any:
    if not isinstance(value, str):
        return value
    if name == "dataset":
        return data_in_words(value)
    return Path(value).name if "/" in value and name not in ("model", "remark") else value


def data_in_words(name: str) -> str:
    """`folder:/home/me/photos` → `folder:photos`; other names are unchanged."""
    kind, _, path = name.partition(":")
    return f"{kind}:{Path(path).name}" if kind.lower() in ("folder", "csv") else name
