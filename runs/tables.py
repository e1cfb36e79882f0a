"""The files of a run that grow as it goes on, and the checksums of its text files."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from processes import main_only
from storage import as_json, as_table, digest, load_arrays, save_arrays, write_content
from utils import DamagedError, MachineError, damage_in_words, not_read

LONGEST_COUNT = 15  # digits of an epoch or step

MetricsRow = dict[str, float | int]
"""A row of metrics.csv: column → number, with `epoch` and `step`."""


def write_file(save: Callable[..., None], path: Path, content: Any, **how: Any) -> None:
    """Writes a file of a run by one of storage's functions, `save(path, content, **how)`.

    Raises:
        MachineError: it cannot be written, or the run's folder is gone: one made anew would lack
            the options.
    """
    if not path.parent.is_dir():
        raise MachineError(
            f"the run folder {path.parent} is not there any more: it was removed or renamed, or "
            "its disk was taken away; put it back"
        )
    save(path, content, **how)


class TextFiles:
    """The text files of a run, whose checksums are kept in checksums.json.

    Before a file is written, the checksums of its present and of its new version are both noted
    there. So whichever version a kill leaves, it does not look damaged.
    """

    NOTES = "checksums.json"
    LOOKS = 3  # attempts to read a file, because a run may replace both files meanwhile

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, content: bytes, before: bytes | None = None) -> None:
        """Replaces a file, atomically.

        Args:
            before: its present content; None: it is read here.

        Raises:
            InputError: it cannot be written.
        """
        path, noted = self.folder / name, self._noted()
        with contextlib.suppress(OSError):
            before = path.read_bytes() if before is None else before
        versions = [version for version in (before, content) if version is not None]
        notes = as_json({**noted, name: [digest(version) for version in versions]})
        write_file(write_content, self.folder / self.NOTES, notes)
        write_file(write_content, path, content)

    def read(self, name: str) -> bytes:
        """The content of a file, which older versions wrote without a checksum.

        Raises:
            MachineError: it cannot be read.
            DamagedError: it is not as it was written.
        """
        path = self.folder / name
        for _ in range(self.LOOKS):
            try:
                content = path.read_bytes()
            except OSError as error:
                raise not_read(str(path), error) from error
            noted = self._noted().get(name)
            if noted is None or digest(content) in noted:
                return content
        raise DamagedError(
            f"{path} is not as the run wrote it (its checksum differs), so it is damaged; use "
            f"another copy of it, or, if you have changed it yourself, delete {self.NOTES} beside "
            "it"
        )

    def _noted(self) -> dict[str, list[str]]:
        path = self.folder / self.NOTES
        if not path.is_file():
            return {}
        with damage_in_words(str(path), "delete it, and the run's files are read unchecked"):
            noted = json.loads(path.read_bytes())
            if not all(isinstance(checksums, list) for checksums in noted.values()):
                raise ValueError("it lists no checksums")
        return noted


class MetricsTable:
    """metrics.csv: one row per epoch or evaluation, written as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = TextFiles(path.parent)
        self._unwritten: list[dict[str, Any]] = []

    @main_only
    def append(self, row: MetricsRow) -> None:
        """Adds a row, and waits until it is on disk; a new name in it becomes a new column.

        The whole file is replaced, so that neither a reader nor a kill finds half a row.

        Raises:
            InputError: the file cannot be written; the row is written with the next one.
        """
        self._unwritten.append({name: _short(value) for name, value in row.items()})
        columns, rows = self._read()
        columns += [name for row in self._unwritten for name in row if name not in columns]
        self._rewrite(list(dict.fromkeys(columns)), [*rows, *self._unwritten])
        self._unwritten = []

    @main_only
    def keep_before(self, step: int) -> None:
        """Removes the rows from `step` on, because a continued run will make them again."""
        columns, rows = self._read()
        kept = [row for row in rows if int(row["step"]) < step]
        if len(kept) < len(rows):
            self._rewrite(columns, kept)

    def rows(self) -> list[dict[str, str]]:
        """All rows, as text; in each, epoch and step are whole numbers.

        Raises:
            InputError: the file is damaged.
        """
        return self._read()[1]

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        """The columns and the rows."""
        if not self.path.is_file():
            return [], []
        advice = "use another copy of it, or delete it and lose its rows"
        with damage_in_words(str(self.path), advice):
            text = self.files.read(self.path.name).decode("utf-8")
            columns, *lines = csv.reader(io.StringIO(text, newline=""), strict=True)
            if len(set(columns)) < len(columns):
                raise ValueError("two of its columns have one name")
            rows = []
            for line, cells in enumerate(lines, 2):
                if len(cells) != len(columns):
                    raise ValueError(f"line {line} has {len(cells)} cells of {len(columns)}")
                row = dict(zip(columns, cells, strict=True))
                if not (row["epoch"].isdecimal() and row["step"].isdecimal()):
                    raise ValueError(f"line {line} has no epoch, or no step")
                if max(len(row["epoch"]), len(row["step"])) > LONGEST_COUNT:
                    raise ValueError(f"line {line} has an epoch or a step that no run can reach")
                rows.append(row)
        return columns, rows

    def _rewrite(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        table = as_table(columns, [[row.get(name, "") for name in columns] for row in rows])
        self.files.write(self.path.name, table)


def _short(value: float | int | str) -> str | int:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return value


class ClassHistory:
    """classes.npz: the training classes in the criterion's order, and the values learned for each.

    Arrays: `names` and `images` (C,), the numbers of images; `epoch` and `step` (E,), as in
    metrics.csv; and an array (E, C) for each value that is learned for every class, such as
    AMLoss's `margin`. In an array of strings each takes as much room as the longest: in the file,
    very long names are the bytes of a JSON list instead.
    """

    most_rows, least_rows = 200, 10  # if there are more, every second one is removed
    most_values = 200 * 11_318  # 9 MB of margins; the file is rewritten in every epoch
    most_letters = 2**22  # 16 MB of an array of strings

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> dict[str, np.ndarray]:
        """All arrays; {} if there is no file.

        Raises:
            InputError: the file is damaged.
        """
        if not self.path.is_file():
            return {}
        content = load_arrays(self.path, "the table of classes")
        with damage_in_words(str(self.path), "delete it, and the run without it is read"):
            if content["names"].dtype == np.uint8:
                names = json.loads(content["names"].tobytes())
                content["names"] = np.array(list(map(str, names)), dtype=object)
            _check_history(content)
        return content

    @main_only
    def append(
        self,
        epoch: int,
        step: int,
        names: Sequence[str],
        images: np.ndarray,
        values: Mapping[str, np.ndarray],
    ) -> None:
        """Adds a row of each of `values` (C,); without values, only writes the classes, once."""
        known = self.load()
        if len(known.get("step", ())) and not values:
            return
        row = {"epoch": np.int64(epoch), "step": np.int64(step)}
        row |= {name: value.astype(np.float32) for name, value in values.items()}
        rows = {
            name: np.concatenate([known[name], value[None]]) if name in known else value[None]
            for name, value in row.items()
        }
        room = max(self.least_rows, self.most_values // max(1, len(names)))
        if len(rows["step"]) > min(self.most_rows, room):
            rows = {name: value[::-2][::-1] for name, value in rows.items()}
        self._write({"names": np.array(names, dtype=object), "images": images, **rows})

    @main_only
    def keep_before(self, step: int) -> None:
        """Removes the rows from `step` on, because a continued run will make them again."""
        known = self.load()
        if not known or (known["step"] < step).all():
            return
        kept = known["step"] < step
        fixed = ("names", "images")
        self._write({k: v if k in fixed else v[kept] for k, v in known.items()})

    def _write(self, content: dict[str, np.ndarray]) -> None:
        content = {**content, "names": self._packed(content["names"])}
        write_file(save_arrays, self.path, content, small=True)

    def _packed(self, names: np.ndarray) -> np.ndarray:
        if len(names) * max(map(len, names), default=0) <= self.most_letters:
            return names.astype(str)
        return np.frombuffer(json.dumps(names.tolist()).encode(), np.uint8)


def _check_history(content: Mapping[str, np.ndarray]) -> None:
    """Raises KeyError or ValueError if arrays are not those of a `ClassHistory`."""
    names, images = content["names"], content["images"]
    fine = names.dtype.kind in "UO" and images.dtype.kind in "iu"
    fine = fine and names.ndim == 1 and names.shape == images.shape and (images >= 0).all()
    rows = {"epoch": content["epoch"], **content}
    del rows["names"], rows["images"]
    for name, array in rows.items():
        row = () if name in ("epoch", "step") else names.shape
        fine = fine and array.shape == (len(content["step"]), *row)
        fine = fine and array.dtype.kind in ("f" if row else "iu")
    if not fine:
        raise ValueError("its arrays do not go together")
