"""The run folder: what was asked, where it ran, what came out, and the checkpoints.

Of several processes only the main one writes; in the others the writing functions do nothing.

args.json          every option        environment.json   versions, hardware, data fingerprint
metrics.csv        a row an epoch (and one an evaluation inside an epoch), written as it happens
results.json       what the best checkpoint reached, when the run has ended
last.pth           all that is needed to continue
<dataset>_<model>_best.pth             weights and options of the best evaluation so far
margins.csv        AMLoss: class, learned margin, images
"""

from __future__ import annotations

import csv
import io
import json
import os
import time
from pathlib import Path
from typing import Any

from processes import main_only
from utils import (
    InputError,
    load_tensors,
    save_tensors,
    write_atomically,
    write_json,
    write_table,
)

FORMAT = 1
"""Version of the checkpoints' layout; a newer one is refused with a sentence."""


class RunFolder:
    """One run's folder.

    `create` makes a new one, never one that exists; `open` finds an old one to continue.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = MetricsTable(path / "metrics.csv")

    @classmethod
    def create(cls, parent: str | Path, name: str) -> RunFolder:
        """Makes `parent/name`; when that is taken `parent/name-2`, and so on.

        Raises:
            InputError: the folder cannot be made.
        """
        wanted = Path(parent) / name
        for attempt in range(1, 1000):
            path = wanted if attempt == 1 else wanted.with_name(f"{wanted.name}-{attempt}")
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.mkdir()
            except FileExistsError:
                continue
            except OSError as error:
                raise InputError(
                    f"cannot make the run folder {path}: {error.strerror}; choose another --LOG_DIR"
                ) from error
            return cls(path)
        raise InputError(f"{wanted} and 998 folders named after it exist; choose another --name")

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of an earlier run.

        Raises:
            InputError: there is no run with a checkpoint in it.
        """
        path = Path(path)
        for needed in ("args.json", "last.pth"):
            if not (path / needed).is_file():
                raise InputError(
                    f"--resume-run {path}: no {needed} there, so no run to continue; "
                    "give the folder of a run that saved at least one checkpoint"
                )
        return cls(path)

    @main_only
    def write_args(self, args: dict[str, Any]) -> None:
        """Writes args.json."""
        write_json(self.path / "args.json", args)

    def read_args(self) -> dict[str, Any]:
        """The options the run was started with."""
        try:
            return json.loads((self.path / "args.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(
                f"{self.path / 'args.json'} is damaged ({error}); start a new run"
            ) from error

    @main_only
    def write_environment(self, content: dict[str, Any]) -> None:
        """Writes environment.json."""
        write_json(self.path / "environment.json", content)

    @main_only
    def write_results(self, content: dict[str, Any]) -> None:
        """Writes results.json: what the best checkpoint reached on the test classes."""
        write_json(self.path / "results.json", content)

    @main_only
    def save_last(self, state: dict) -> None:
        """Replaces last.pth, whole or not at all."""
        save_tensors(self.path / "last.pth", {"format": FORMAT, **state})

    def load_last(self) -> dict:
        """last.pth as `save_last` wrote it."""
        return load_checkpoint(self.path / "last.pth")

    def best_path(self, name: str) -> Path:
        """Where the best checkpoint lies."""
        return self.path / f"{name}_best.pth"

    @main_only
    def save_best(self, name: str, state: dict) -> None:
        """Replaces `<name>_best.pth`, whole or not at all."""
        save_tensors(self.best_path(name), {"format": FORMAT, **state})

    def load_best(self, name: str) -> dict:
        """What `save_best` wrote."""
        return load_checkpoint(self.best_path(name))

    @main_only
    def write_table(self, name: str, header: list[str], rows: list[list]) -> None:
        """Replaces a CSV file, whole or not at all."""
        write_table(self.path / name, header, rows)


class MetricsTable:
    """metrics.csv: one row an epoch or evaluation, on disk as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @main_only
    def append(self, row: dict[str, float | int]) -> None:
        """Adds a row and waits until it is on disk; a new name in it becomes a new column."""
        columns = self._columns()
        new = [name for name in row if name not in columns]
        if new:
            columns += new
            self._rewrite(columns, self.rows())
        self._add_line([_short(row.get(column, "")) for column in columns])

    @main_only
    def drop_after(self, step: int) -> None:
        """Removes rows later than `step`: they are about to be made again by a continued run."""
        rows = self.rows()
        kept = [row for row in rows if int(row["step"]) <= step]
        if len(kept) == len(rows):
            return
        self._rewrite(self._columns(), kept)

    def rows(self) -> list[dict[str, str]]:
        """All rows, as text."""
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return [row for row in csv.DictReader(file) if row.get("step")]

    def _columns(self) -> list[str]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="", encoding="utf-8") as file:
            return next(csv.reader(file), [])

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, lambda file: file.write(text.getvalue().encode()))

    def _add_line(self, cells: list) -> None:
        with self.path.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file, lineterminator="\n").writerow(cells)
            file.flush()
            os.fsync(file.fileno())


def _short(value: float | int | str) -> str | int:
    return f"{value:.6g}" if isinstance(value, float) else value


def run_name(dataset: str, model: str, loss: str, remark: str) -> str:
    """`emoji_resnet18_AMLoss_20261121-141502`, and the remark where there is one."""
    parts = [dataset, model, loss, *([remark] if remark else []), time.strftime("%Y%m%d-%H%M%S")]
    return "_".join(_file_name_part(part) for part in parts)


def _file_name_part(text: str) -> str:
    return "".join(c if c.isalnum() or c in "-." else "-" for c in text)


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of ours or a released file of weights, as a dictionary.

    Raises:
        InputError: it cannot be read safely, or was written by a newer version.
    """
    content = load_tensors(Path(path))
    if content.get("format", FORMAT) > FORMAT:
        raise InputError(
            f"checkpoint {path} has format {content['format']}, newer than {FORMAT}, which this "
            "version reads; update the code"
        )
    return content
