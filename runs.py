"""The run folder: what was asked, where it ran, what came out, and the checkpoints.

Of several processes only the main one writes; in the others the writing functions do nothing.

args.json          every option        environment.json   versions, hardware, data fingerprint
metrics.csv        one row per epoch, and per evaluation inside an epoch, as it happens
results.json       what the best checkpoint reached, when the run has ended
last.pth           all that is needed to continue; step_00001200.pth: older ones (--keep)
non_finite.json    where a loss or gradient was not finite: step, terms, rates, images
<dataset>_<model>_best.pth             weights and options of the best evaluation so far
margins.csv        AMLoss: class, learned margin, images
classes.npz        the training classes in their order; what was learned for each, epoch by epoch
report.html        the run, explained (python report.py RUN)
"""

from __future__ import annotations

import contextlib
import csv
import errno
import fcntl
import io
import json
import logging
import math
import os
import shutil
import time
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from processes import main_only
from utils import (
    InputError,
    load_tensors,
    save_tensors,
    write_atomically,
    write_json,
    write_table,
)

logger = logging.getLogger("train")

FORMAT = 1
"""Version of the checkpoints' layout; a newer one is refused with a sentence."""
NOT_A_STATE = "it holds weights, and not the state of a training that could go on"


class RunFolder:
    """One run's folder.

    `create` makes a new one, never one that exists; `open` finds an old one to continue.
    """

    def __init__(self, path: Path, checkpoint: str = "last.pth") -> None:
        self.path = path
        self.checkpoint = path / checkpoint
        self._held: TextIO | None = None
        self.metrics = MetricsTable(path / "metrics.csv")
        self.classes = ClassHistory(path / "classes.npz")
        self.trouble: dict[str, InputError] = {}

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
            except PermissionError:
                return cls._elsewhere(wanted)
            except OSError as error:
                if error.errno == errno.EROFS:
                    return cls._elsewhere(wanted)
                raise InputError(
                    f"cannot make the run folder {path}: {error.strerror}; choose another --LOG_DIR"
                ) from error
            return cls(path)
        raise InputError(f"{wanted} and 998 folders named after it exist; choose another --name")

    @classmethod
    def _elsewhere(cls, wanted: Path) -> RunFolder:
        """In the user's home: a night's training is worth more than its place."""
        home = Path.home() / "anchorage-logs"
        if wanted.parent == home:
            raise InputError(
                f"neither --LOG_DIR nor {home} can be written; choose another --LOG_DIR"
            )
        logger.warning("%s is read-only; the run goes to %s", wanted.parent, home)
        return cls.create(home, wanted.name)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of an earlier run, or an older checkpoint in it.

        Raises:
            InputError: there is no run with a checkpoint in it.
        """
        path, checkpoint = Path(path), "last.pth"
        if path.suffix == ".pth":
            path, checkpoint = path.parent, path.name
        if checkpoint.endswith("_best.pth"):
            raise InputError(
                f"--resume-run {path / checkpoint}: {NOT_A_STATE}; give the run folder {path}"
            )
        for needed in ("args.json", checkpoint):
            if not (path / needed).is_file():
                raise InputError(
                    f"--resume-run {path}: no {needed} there, so no run to continue; "
                    "give the folder of a run that saved at least one checkpoint"
                )
        return cls(path, checkpoint)

    @main_only
    def hold(self) -> None:
        """Keeps other processes out of the folder for as long as this one lives, and tidies it.

        Raises:
            InputError: another one is at work in it.
        """
        # On args.json itself, so that no file is left behind; lockf and not flock: what reads data
        # does not inherit it, so it ends with this process.
        self._held = (self.path / "args.json").open("r+")
        try:
            fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"the run in {self.path} is going on in another process; wait for its end, or stop "
                "it first"
            ) from None
        except OSError as error:  # a file system without locks
            logger.warning("nothing keeps other processes out of %s (%s)", self.path, error)
        for left_over in self.path.glob(".*.tmp"):
            left_over.unlink()

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "results.json").is_file()

    @main_only
    def write_args(self, args: dict[str, Any]) -> None:
        """Writes args.json."""
        write_json(self.path / "args.json", args)

    def read_args(self) -> dict[str, Any]:
        """The options the run was started with."""
        return self._read("args.json")

    def _read(self, name: str) -> dict[str, Any]:
        try:
            return json.loads((self.path / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(
                f"{self.path / name} cannot be read ({error}); start a new run"
            ) from error

    def check_data(self, data: str, images: Mapping[str, str]) -> None:
        """Raises InputError when the images are not those that the run began with.

        Args:
            data: of the training images, as runs of an older version kept it alone.
            images: split → fingerprint, of all images that the run looks at.
        """
        kept = self._read("environment.json")
        before, now = kept.get("images"), dict(images)
        if before is None:  # of an older version
            before, now = {"train": kept.get("data")}, {"train": data}
        changed = [split for split in before if before[split] != now.get(split)]
        if changed or before.keys() != now.keys():
            which = "training" if "train" in changed else "evaluation"
            raise InputError(
                f"the {which} images are not those that the run in {self.path} began with; put "
                "them back, or start a new run"
            )

    @main_only
    def write_environment(self, content: dict[str, Any]) -> None:
        """Writes environment.json."""
        write_json(self.path / "environment.json", content)

    @main_only
    def write_results(self, content: dict[str, Any]) -> None:
        """Writes results.json: what the best checkpoint reached on the test classes."""
        write_json(self.path / "results.json", content)

    @property
    def fault_path(self) -> Path:
        """Where the record of a loss or gradient that was not finite lies."""
        return self.path / "non_finite.json"

    @main_only
    def write_fault(self, record: dict[str, Any]) -> None:
        """Writes non_finite.json; which of nan and inf a term was stays to be read."""
        terms = {name: v if math.isfinite(v) else str(v) for name, v in record["terms"].items()}
        write_json(self.fault_path, {**record, "terms": terms})

    @contextlib.contextmanager
    def forgiving(self, what: str) -> Iterator[None]:
        """Around a write: a disk that is full, or was taken away, is reported and ends no run.

        The failure is kept in `trouble[what]` until a later write of the same thing succeeds.
        """
        try:
            yield
        except InputError as error:
            self.trouble[what] = error
            logger.warning("%s; training goes on", error)
        else:
            self.trouble.pop(what, None)

    @main_only
    def save_last(self, state: dict, keep: int = 0) -> None:
        """Replaces last.pth, whole or not at all.

        Args:
            state: with `clock`. keep: how many checkpoints remain as step_<step>.pth besides.
        """
        last = self.path / "last.pth"
        save_tensors(last, {"format": FORMAT, **state})
        if not keep:
            return
        older = self.path / f"step_{state['clock']['step']:08d}.pth"
        older.unlink(missing_ok=True)
        try:
            os.link(last, older)
        except OSError:  # a file system without links
            shutil.copyfile(last, older)
        for path in sorted(self.path.glob("step_*.pth"))[:-keep]:
            path.unlink()

    def load_last(self, identity: Callable[[dict[str, Any]], dict[str, Any]]) -> dict:
        """last.pth as `save_last` wrote it, or the older one that was asked for.

        Args:
            identity: what the options of one run share, however often it is continued.

        Raises:
            InputError: it holds nothing to continue from, or is another run's.
        """
        state = load_checkpoint(self.checkpoint)
        if "clock" not in state:
            raise InputError(
                f"--resume-run {self.checkpoint}: {NOT_A_STATE}; give the run folder {self.path}"
            )
        own, found = identity(self.read_args()), identity(state["args"])
        for name in sorted(own.keys() | found.keys()):
            if own.get(name) != found.get(name):
                raise InputError(
                    f"--resume-run {self.checkpoint}: it is a checkpoint of another run, whose "
                    f"--{name.replace('_', '-')} is {found.get(name)} and not {own.get(name)}; put "
                    "the run's own one back, or give the folder of the run that it is from"
                )
        return state

    def best_checkpoint(self) -> Path | None:
        """The weights with the best R@1: the run's `*_best.pth`, the newest if there are several.

        None before the first evaluation.
        """
        found = sorted(self.path.glob("*_best.pth"), key=lambda path: path.stat().st_mtime_ns)
        return found[-1] if found else None

    def forget_best_after(self, step: int) -> bool:
        """Removes a best checkpoint of a later step, where a run goes back to before it."""
        path = self.best_checkpoint()
        if path is None or load_checkpoint(path)["step"] <= step:
            return False
        path.unlink()
        return True

    @main_only
    def save_best(self, state: dict) -> None:
        """Replaces the best checkpoint, whole or not at all."""
        args = state["args"]
        name = f"{args['dataset']}_{args['model']}".replace("/", "-").replace(":", "-")
        save_tensors(self.path / f"{name}_best.pth", {"format": FORMAT, **state})

    def load_best(self) -> dict:
        """What `save_best` wrote.

        Raises:
            InputError: it was not written, or is damaged.
        """
        path = self.best_checkpoint()
        if path is None:
            raise InputError(f"{self.path} has no best checkpoint")
        return load_checkpoint(path)

    @main_only
    def write_table(self, name: str, header: list[str], rows: list[list]) -> None:
        """Replaces a CSV file, whole or not at all."""
        write_table(self.path / name, header, rows)


class MetricsTable:
    """metrics.csv: one row per epoch or evaluation, on disk as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._unwritten: list[dict[str, Any]] = []

    @main_only
    def append(self, row: dict[str, float | int]) -> None:
        """Adds a row and waits until it is on disk; a new name in it becomes a new column.

        The file is replaced as a whole, so that no reader, and no kill, meets half a row.

        Raises:
            InputError: the disk takes no more; the row comes with the next one.
        """
        self._unwritten.append({name: _short(value) for name, value in row.items()})
        columns = self._columns()
        columns += [name for row in self._unwritten for name in row if name not in columns]
        self._rewrite(list(dict.fromkeys(columns)), [*self.rows(), *self._unwritten])
        self._unwritten = []

    @main_only
    def keep_before(self, step: int) -> None:
        """Removes the rows from `step` on: they are about to be made again by a continued run."""
        rows = self.rows()
        kept = [row for row in rows if int(row["step"]) < step]
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

    def _rewrite(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomically(self.path, lambda file: file.write(text.getvalue().encode()))


def _short(value: float | int | str) -> str | int:
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else ""
    return value


class ClassHistory:
    """classes.npz: the training classes in the criterion's order, and what was learned for each.

    Arrays: `names` and `images` (C,); `epoch` and `step` (E,), the rows of metrics.csv; and for
    each value that a class learns, such as AMLoss's `margin`, one of shape (E, C).
    """

    most_rows = 200  # 9 MB of margins for the 11,318 classes of SOP; then every second one goes

    def __init__(self, path: Path) -> None:
        self.path = path

    def load(self) -> dict[str, np.ndarray]:
        """All arrays; none where there is no file.

        Raises:
            InputError: the file is damaged.
        """
        if not self.path.is_file():
            return {}
        try:
            with np.load(self.path, allow_pickle=False) as file:
                return dict(file)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"{self.path} is damaged ({error}); delete it") from error

    @main_only
    def append(
        self,
        epoch: int,
        step: int,
        names: Sequence[str],
        images: np.ndarray,
        values: Mapping[str, np.ndarray],
    ) -> None:
        """Adds a row of each of `values` (C,); without any, the classes are written, once."""
        known = self.load()
        if known and not values:
            return
        row = {"epoch": np.int64(epoch), "step": np.int64(step)}
        row |= {name: value.astype(np.float32) for name, value in values.items()}
        rows = {
            name: np.concatenate([known[name], value[None]]) if name in known else value[None]
            for name, value in row.items()
        }
        if len(rows["step"]) > self.most_rows:
            rows = {name: value[::-2][::-1] for name, value in rows.items()}
        self._write({"names": np.array(names, dtype=str), "images": images, **rows})

    @main_only
    def keep_before(self, step: int) -> None:
        """Removes the rows from `step` on: they are about to be made again by a continued run."""
        known = self.load()
        if not known or (known["step"] < step).all():
            return
        kept = known["step"] < step
        fixed = ("names", "images")
        self._write({k: v if k in fixed else v[kept] for k, v in known.items()})

    def _write(self, content: dict[str, np.ndarray]) -> None:
        write_atomically(self.path, lambda file: np.savez_compressed(file, **content))


def find_run(
    parent: str | Path,
    wanted: dict[str, Any],
    identity: Callable[[dict[str, Any]], dict[str, Any]],
) -> RunFolder | None:
    """The newest run under `parent` with a checkpoint whose options have this `identity`."""
    found = []
    for file in Path(parent).glob("*/args.json"):
        run = RunFolder(file.parent)
        last = run.path / "last.pth"
        if last.is_file() and identity(run.read_args()) == wanted:
            found.append((last.stat().st_mtime_ns, run))
    return max(found, key=lambda pair: pair[0])[1] if found else None


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
