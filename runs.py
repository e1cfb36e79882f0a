"""The run folder: what was asked, where it ran, what came out, and the checkpoints.

Of several processes only the main one writes; in the others the writing functions do nothing.

args.json          every option        environment.json   versions, hardware, data fingerprint
metrics.csv        one row per epoch, and per evaluation inside an epoch, as it happens
results.json       what the best checkpoint reached, when the run has ended
last.pth           all that is needed to continue; step_00001200.pth: older ones (--keep)
base.pth           --peft: the resting weights, which the checkpoints beside it leave out
non_finite.json    where a loss or gradient was not finite: step, terms, rates, images
<dataset>_<model>_best.pth             weights and options of the best evaluation so far
margins.csv        AMLoss: class, learned margin, images
classes.npz        the training classes in their order; what was learned for each, epoch by epoch
checksums.json     of the files above that people read (.csv, .json); .pth and .npz carry their own
whitening.npz      what whitens its embeddings, once that was asked for (evaluate.py --whiten)
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from machine import expanded, home
from processes import main_only
from storage import (
    as_json,
    as_table,
    digest,
    load_arrays,
    load_tensors,
    save_arrays,
    save_tensors,
    write_atomically,
)
from utils import DamagedError, InputError, damage_in_words

logger = logging.getLogger("train")

FORMAT = 1
"""Version of the checkpoints' layout; a newer one is refused with a sentence."""
BASE = "base.pth"
WRITTEN = (
    *("args.json", "environment.json", "metrics.csv", "results.json", "checksums.json", "*.pth"),
    *("non_finite.json", "margins.csv", "classes.npz", "whitening.npz"),
)
LONGEST_PART = 40  # bytes that one word gets of a file's name
LONGEST_COUNT = 15  # digits of an epoch or step
NOT_A_STATE = "it holds weights, and not the state of a training that could go on"


def files_of(folder: str | Path) -> list[Path]:
    """What a run has written into its folder, and nobody else replaces; of another folder none."""
    if not Path(folder, "args.json").is_file():
        return []
    return [file for pattern in WRITTEN for file in Path(folder).glob(pattern)]


class RunFolder:
    """One run's folder.

    `create` makes a new one, never one that exists; `open` finds an old one to continue.
    """

    def __init__(self, path: Path, checkpoint: str = "last.pth") -> None:
        self.path = path
        self.checkpoint = path / checkpoint
        self._held: TextIO | None = None
        self.files = TextFiles(path)
        self.metrics = MetricsTable(path / "metrics.csv")
        self.classes = ClassHistory(path / "classes.npz")
        self.trouble: dict[str, InputError] = {}
        self.images: dict[str, str] | None = None  # fingerprints; in every checkpoint

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
            except FileExistsError as error:
                if not path.parent.is_dir():
                    raise InputError(
                        f"cannot make the run folder {path}: {path.parent} is no folder; choose "
                        "another --LOG_DIR or --name"
                    ) from error
                continue
            except PermissionError:
                return cls._elsewhere(Path(parent), name)
            except OSError as error:
                if error.errno == errno.EROFS:
                    return cls._elsewhere(Path(parent), name)
                raise InputError(
                    f"cannot make the run folder {path}: {error.strerror}; choose another "
                    "--LOG_DIR or --name"
                ) from error
            return cls(path)
        raise InputError(f"{wanted} and 998 folders named after it exist; choose another --name")

    @classmethod
    def _elsewhere(cls, parent: Path, name: str) -> RunFolder:
        """In the user's home: a night's training is worth more than its place."""
        folder = home_logs()
        if folder is None or folder == parent:
            raise InputError(
                f"--LOG_DIR {parent} cannot be written, and "
                + (f"{folder} neither" if folder else "there is no home folder to go to instead")
                + "; choose another --LOG_DIR"
            )
        logger.warning("%s is read-only; the run goes to %s", parent, folder)
        return cls.create(folder, name)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """The folder of an earlier run, or an older checkpoint in it.

        Raises:
            InputError: there is no run with a checkpoint in it.
        """
        path, checkpoint = Path(path), "last.pth"
        if path.suffix == ".pth" and not path.is_dir():
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
        try:
            self._held = (self.path / "args.json").open("r+")
        except OSError as error:
            raise InputError(
                f"the run folder {self.path} cannot be written ({error.strerror}), so the run "
                "cannot go on in it; make it writable, or continue in a copy of it"
            ) from error
        self._lock()
        for left_over in self.path.glob(".*.tmp"):
            with contextlib.suppress(OSError):
                left_over.unlink()

    def _lock(self) -> None:
        assert self._held is not None
        try:
            fcntl.lockf(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"the run in {self.path} is going on in another process; wait for its end, or stop "
                "it first"
            ) from None
        except OSError as error:  # a file system without locks
            logger.warning("nothing keeps other processes out of %s (%s)", self.path, error)

    def begin(
        self,
        args: dict[str, Any],
        environment: dict[str, Any],
        base: dict[str, Any] | None = None,
    ) -> None:
        """Writes what a new run begins with, and holds the folder.

        Args:
            base: the content of base.pth, where there is one.

        Raises:
            InputError: the disk takes no files. Then, and after a Ctrl-C, the folder is gone again.
        """
        try:
            self.write_args(args)
            self.write_environment(environment)
            if base is not None:
                self._write_base(base)
        except BaseException:
            shutil.rmtree(self.path, ignore_errors=True)
            raise
        self.hold()

    @main_only
    def _write_base(self, base: dict[str, Any]) -> None:
        save_tensors(self.path / BASE, {"format": FORMAT, **base})

    @property
    def is_finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "results.json").is_file()

    @main_only
    def write_args(self, args: dict[str, Any]) -> None:
        """Writes args.json."""
        self.files.write("args.json", as_json(args))

    def read_args(self) -> dict[str, Any]:
        """The options the run was started with."""
        args = self._read("args.json")
        if self._held is not None:
            self._lock()  # which goes with any descriptor of the file that this process closes
        return args

    @main_only
    def change_args(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Writes args.json anew where `change` makes others of them; the folder stays held."""
        before = self.read_args()
        if (after := change(before)) != before:
            self.write_args(after)
            self.hold()  # on the new file

    def _read(self, name: str) -> dict[str, Any]:
        """A JSON file of the run, checked against its checksum."""
        path = self.path / name
        with damage_in_words(str(path), "use another copy of it, or start a new run"):
            content = json.loads(self.files.read(name))
            if not isinstance(content, dict):
                raise ValueError(f"it holds a {type(content).__name__}")
        return content

    def read_environment(self) -> dict[str, Any]:
        """Where it ran; empty where that was not written yet."""
        return self._read_if_there("environment.json")

    @property
    def noted_place(self) -> Path | None:
        """Where the run's own images lay when it began; None where that is not known."""
        place = self.read_environment().get("place")
        return Path(place) if isinstance(place, str) else None

    def read_results(self) -> dict[str, Any]:
        """What the best checkpoint reached; empty before the run has ended."""
        return self._read_if_there("results.json")

    def _read_if_there(self, name: str) -> dict[str, Any]:
        return self._read(name) if (self.path / name).is_file() else {}

    def check_data(self, data: str, images: Mapping[str, str]) -> None:
        """Raises InputError when the images are not those that the run began with.

        Args:
            data: of the training images, as runs of an older version kept it alone.
            images: split → fingerprint, of all images that the run looks at.
        """
        kept = self._read("environment.json")
        before, now = kept.get("images"), dict(images)
        if not isinstance(before, dict):  # of an older version
            before, now = {"train": kept.get("data")}, {"train": data}
        changed = [split for split in before if before[split] != now.get(split)]
        if changed or before.keys() != now.keys():
            which = "training" if "train" in changed else "evaluation"
            raise InputError(
                f"the {which} images are not those that the run in {self.path} began with; put "
                "them back (or name their new place: --dataset, --data-root), or start a new run"
            )
        self.images = dict(images)

    @main_only
    def write_environment(self, content: dict[str, Any]) -> None:
        """Writes environment.json."""
        self.images = content.get("images")
        self.files.write("environment.json", as_json(content))

    @main_only
    def write_results(self, content: dict[str, Any]) -> None:
        """Writes results.json: what the best checkpoint reached on the test classes."""
        self.files.write("results.json", as_json(content))

    @main_only
    def forget_results(self) -> None:
        """Removes results.json where a run goes on: its best checkpoint may become another."""
        _remove(self.path / "results.json", "is that of a shorter run")

    @property
    def fault_path(self) -> Path:
        """Where the record of a loss or gradient that was not finite lies."""
        return self.path / "non_finite.json"

    @main_only
    def write_fault(self, record: dict[str, Any]) -> None:
        """Writes non_finite.json; which of nan and inf a term was stays to be read."""
        terms = {name: v if math.isfinite(v) else str(v) for name, v in record["terms"].items()}
        self.files.write(self.fault_path.name, as_json({**record, "terms": terms}))

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
        try:
            older.unlink(missing_ok=True)
            try:
                os.link(last, older)
            except OSError:  # a file system without links
                shutil.copyfile(last, older)
            for path in self._older()[:-keep]:
                path.unlink()
        except OSError as error:
            raise InputError(
                f"cannot keep {older}: {error.strerror}; free some space, or leave --keep out"
            ) from error

    def _older(self) -> list[Path]:
        """The checkpoints of earlier steps that were kept (--keep), in their order."""
        found = self.path.glob("step_*.pth")
        return sorted((path for path in found if _step_of(path) >= 0), key=_step_of)

    def load_last(self, identity: Callable[[dict[str, Any]], dict[str, Any]]) -> dict:
        """last.pth as `save_last` wrote it, or the older one that was asked for.

        Args:
            identity: what the options of one run share, however often it is continued.

        Raises:
            InputError: it holds nothing to continue from, or is another run's.
        """
        state = load_checkpoint(self.checkpoint)
        if "base" in state:
            raise InputError(
                f"--resume-run {self.checkpoint}: {BASE} with the weights that it was trained on "
                "top of is not in its folder; put it back"
            )
        if "clock" not in state:
            raise InputError(
                f"--resume-run {self.checkpoint}: {NOT_A_STATE}; give the run folder {self.path}"
            )
        own, found = identity(self.read_args()), identity(state["args"])
        if self.images and "images" in state:  # then these say which data it is, wherever they lie
            if state["images"] != self.images:
                raise InputError(
                    f"--resume-run {self.checkpoint}: it is a checkpoint of another run, on other "
                    "images; put the run's own one back, or give the folder that it is from"
                )
            own.pop("dataset"), found.pop("dataset")
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

    def forget_after(self, step: int) -> bool:
        """Removes the checkpoints of later steps, where a run goes back to before them.

        Returns:
            Whether the best one was among them.
        """
        for older in self._older():
            if _step_of(older) > step:
                _remove(older, "is of a later step")
        path = self.best_checkpoint()
        if path is None or load_checkpoint(path).get("step", 0) <= step:
            return False
        _remove(path, "is of a later step")
        return True

    @main_only
    def save_best(self, state: dict) -> None:
        """Replaces the best checkpoint, whole or not at all."""
        args = state["args"]
        name = f"{data_name(args['dataset'])}_{_file_name_part(args['model'])}_best.pth"
        # A run of an older version goes on with the name that it has.
        path = self.best_checkpoint() or self.path / name
        save_tensors(path, {"format": FORMAT, **state})

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
        self.files.write(name, as_table(header, rows))


def _step_of(path: Path) -> int:
    """The step of step_<step>.pth; -1 of what somebody has given another name."""
    step = path.stem.removeprefix("step_")
    return int(step) if step.isdecimal() else -1


def _remove(path: Path, why: str) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"{path} {why} and cannot be removed ({error.strerror}); make the run folder writable"
        ) from error


class TextFiles:
    """The text files of a run, which people open too; their checksums lie in checksums.json.

    There each file has the checksum of the version before and of that after a write, so that a kill
    between the two files leaves nothing that looks damaged.
    """

    NOTES = "checksums.json"
    LOOKS = 3  # where the run goes on, both files may change between two looks

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, name: str, content: bytes) -> None:
        """Replaces a file, whole or not at all.

        Raises:
            InputError: it cannot be written.
        """
        path, noted, before = self.folder / name, self._noted(), []
        with contextlib.suppress(OSError):
            before = [digest(path.read_bytes())]
        notes = as_json({**noted, name: [*before, digest(content)]})
        write_atomically(self.folder / self.NOTES, lambda file: file.write(notes))
        write_atomically(path, lambda file: file.write(content))

    def read(self, name: str) -> bytes:
        """The content of a file; one without a checksum, of an older version, is read as it is.

        Raises:
            InputError: it cannot be read.
            DamagedError: it is not as it was written.
        """
        path = self.folder / name
        for _ in range(self.LOOKS):
            try:
                content = path.read_bytes()
            except OSError as error:
                raise InputError(f"{path} cannot be read ({error.strerror})") from error
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
    """metrics.csv: one row per epoch or evaluation, on disk as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = TextFiles(path.parent)
        self._unwritten: list[dict[str, Any]] = []

    @main_only
    def append(self, row: dict[str, float | int]) -> None:
        """Adds a row and waits until it is on disk; a new name in it becomes a new column.

        The file is replaced as a whole, so that no reader, and no kill, meets half a row.

        Raises:
            InputError: the disk takes no more; the row comes with the next one.
        """
        self._unwritten.append({name: _short(value) for name, value in row.items()})
        columns, rows = self._read()
        columns += [name for row in self._unwritten for name in row if name not in columns]
        self._rewrite(list(dict.fromkeys(columns)), [*rows, *self._unwritten])
        self._unwritten = []

    @main_only
    def keep_before(self, step: int) -> None:
        """Removes the rows from `step` on: they are about to be made again by a continued run."""
        columns, rows = self._read()
        kept = [row for row in rows if int(row["step"]) < step]
        if len(kept) < len(rows):
            self._rewrite(columns, kept)

    def rows(self) -> list[dict[str, str]]:
        """All rows, as text; each has a whole number as its epoch and as its step.

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
        content = load_arrays(self.path, "the table of classes")
        with damage_in_words(str(self.path), "delete it, and the run without it is read"):
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
        save_arrays(self.path, content, small=True)


def _check_history(content: Mapping[str, np.ndarray]) -> None:
    """Raises where arrays are not those of a `ClassHistory`."""
    names, images = content["names"], content["images"]
    fine = names.dtype.kind == "U" and images.dtype.kind in "iu"
    fine = fine and names.ndim == 1 and names.shape == images.shape and (images >= 0).all()
    rows = {"epoch": content["epoch"], **content}
    del rows["names"], rows["images"]
    for name, array in rows.items():
        row = () if name in ("epoch", "step") else names.shape
        fine = fine and array.shape == (len(content["step"]), *row)
        fine = fine and array.dtype.kind in ("f" if row else "iu")
    if not fine:
        raise ValueError("its arrays do not go together")


def home_logs() -> Path | None:
    """Where runs go whose --LOG_DIR is read-only; None without a home folder."""
    return None if (folder := home()) is None else folder / "anchorage-logs"


def find_run(
    parent: str | Path, name: str | None, closeness: Callable[[dict[str, Any]], int]
) -> RunFolder | None:
    """The run under `parent` with a checkpoint whose options are closest; of several the newest.

    A folder whose options cannot be read, of a damaged run or of another program, is named and
    passed over, unless it is called `name`.

    Args:
        name: what runs were to be called, which may begin with folders (`ablation/first`).
        closeness: of a run's options to those that are looked for; 0 is another run.

    Raises:
        InputError: the options of the run of that name cannot be read.
    """
    found = []
    below = Path(name or "").parent
    folders = [Path(folder) / below for folder in (parent, home_logs()) if folder]
    for file in (file for folder in folders for file in folder.glob("*/args.json")):
        run = RunFolder(file.parent)
        last = run.path / "last.pth"
        try:
            if last.is_file() and (close := closeness(run.read_args())):
                found.append((close, last.stat().st_mtime_ns, run))
        except InputError as error:
            if name and run.path.name == Path(name).name:
                raise
            logger.warning("%s is passed over: %s", run.path, error)
    return max(found, key=lambda each: each[:2])[-1] if found else None


def run_name(dataset: str, model: str, loss: str, remark: str) -> str:
    """`emoji_resnet18_AMLoss_20261121-141502`, and the remark where there is one."""
    parts = [model, loss, *([remark] if remark else []), time.strftime("%Y%m%d-%H%M%S")]
    return "_".join([data_name(dataset), *map(_file_name_part, parts)])


def data_name(dataset: str) -> str:
    """What files call a data set: its name, or of one's own images that of the folder or table."""
    kind, colon, place = dataset.partition(":")
    if colon:
        path = Path(expanded(place)).absolute()
        dataset = (path.stem if kind.lower() == "csv" else path.name) or kind
    return _file_name_part(dataset)


def _file_name_part(text: str) -> str:
    """Letters, digits and a few signs; at most 40 bytes, since a file name has 255 in all."""
    plain = "".join(c if c.isalnum() or c in "-." else "-" for c in text)
    return plain.encode()[:LONGEST_PART].decode(errors="ignore")


def load_checkpoint(path: str | Path) -> dict:
    """A checkpoint of ours or a released file of weights, as a dictionary.

    One that leaves out its base gets the weights of base.pth beside it, and what it says of them
    goes from `base` to `joined_base`. Where there is no such file, it stays as it is.

    Raises:
        InputError: it cannot be read safely, or was written by a newer version; or base.pth is
            another run's.
    """
    return checked(load_tensors(Path(path)), path)


def checked(content: dict, path: str | Path) -> dict:
    """What `load_tensors` has read from `path`, as `load_checkpoint` gives it.

    Raises:
        InputError: as there.
    """
    advice = "use another copy of it, or another checkpoint"
    with damage_in_words(f"checkpoint {path}", advice):
        for name, kinds in KINDS.items():
            if name in content and not isinstance(content[name], kinds):
                raise ValueError(f"its {name} is a {type(content[name]).__name__}")
        for title, numbers in content.get("metrics", {}).items():
            if not all(isinstance(value, int | float) for value in numbers.values()):
                raise ValueError(f"its metrics of {title} are no numbers")
        row = content.get("row") or {"epoch": 0, "step": 0}
        if not all(isinstance(row[name], int) for name in ("epoch", "step")):
            raise ValueError("its row has no epoch, or no step")
        if not all(isinstance(value, int | float) for value in row.values()):
            raise ValueError("its row has other things than numbers")
        for name, what in (("criterion", "criterion"), ("ema", "running mean")):
            held = content.get(f"{name}_state_dict", {}).values()
            if not all(hasattr(value, "shape") for value in held):
                raise ValueError(f"its {what} has other things than tensors")
    if content.get("format", FORMAT) > FORMAT:
        raise InputError(
            f"checkpoint {path} has format {content['format']}, newer than {FORMAT}, which this "
            "version reads; update the code"
        )
    if "base_state_dict" in content:
        raise InputError(
            f"{path} holds the weights that a run left as they were; give the run folder, or one "
            "of the checkpoints in it"
        )
    beside = Path(path).parent / BASE
    return _joined(content, path, beside) if "base" in content and beside.is_file() else content


def _joined(content: dict, path: str | Path, beside: Path) -> dict:
    """A checkpoint with the weights of its base."""
    base, held = content["base"], load_tensors(beside, "the base")
    if held.get("fingerprint") != base["fingerprint"]:
        raise InputError(f"{beside} is not the base of {path}; put that of its own run there")
    return with_base(content, held["base_state_dict"])


def with_base(content: dict, weights: dict) -> dict:
    """A checkpoint that leaves out its base, with the base's weights; a mean stays what trains."""
    rest = {name: value for name, value in content.items() if name != "base"}
    joined = weights | content["model_state_dict"]
    return {**rest, "model_state_dict": joined, "joined_base": content["base"]}


KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("format", "epoch", "step", "skipped"), int),
    **dict.fromkeys(("model_state_dict", "criterion_state_dict", "network", "args"), dict),
    **dict.fromkeys(("clock", "lap", "random", "environment", "metrics"), dict),
    **dict.fromkeys(("base", "base_state_dict", "data"), dict),
    **{"ema_state_dict": dict, "ema_updates": int},
    "row": (dict, type(None)),
    "wandb_id": (str, type(None)),
}
"""What the entries of a checkpoint are."""
