"""The run folder: making, finding, locking and continuing one, and the files in it."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from processes import main_only
from runs.checkpoints import BASE, FORMAT, Checkpoint, load_checkpoint
from runs.names import data_name, file_name_part, home_logs
from runs.tables import ClassHistory, MetricsTable, TextFiles, write_file
from storage import (
    HeldError,
    as_json,
    as_table,
    lock,
    open_locked,
    remove_left_over,
    save_tensors,
)
from utils import InputError, MachineError, damage_in_words, not_written

logger = logging.getLogger("train")

WRITTEN = (
    *("args.json", "environment.json", "metrics.csv", "results.json", "checksums.json", "*.pth"),
    *("non_finite.json", "margins.csv", "classes.npz", "whitening*.npz"),
)
BEGUN = ("args.json", "environment.json", "checksums.json", BASE)
"""What a run writes before its first checkpoint."""
NOT_A_STATE = "it holds weights, and not the state of a training that could go on"


def files_of(folder: str | Path) -> list[Path]:
    """The files that a run has written into its folder; [] if the folder is not a run's."""
    if not Path(folder, "args.json").is_file():
        return []
    return [file for pattern in WRITTEN for file in Path(folder).glob(pattern)]


class RunFolder:
    """The folder of a run: `create` makes a new one, and `open` finds an old one to continue."""

    def __init__(self, path: Path, checkpoint: str = "last.pth") -> None:
        self.path = path
        self.checkpoint = path / checkpoint
        self._held: BinaryIO | None = None
        self.files = TextFiles(path)
        self.metrics = MetricsTable(path / "metrics.csv")
        self.classes = ClassHistory(path / "classes.npz")
        self.trouble: dict[str, InputError] = {}
        self.images: dict[str, str] | None = None  # fingerprints; in every checkpoint

    @classmethod
    def create(cls, parent: str | Path, name: str) -> RunFolder:
        """Makes `parent/name`; if that exists, `parent/name-2`, and so on.

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
                        f"cannot make the run folder {path}: {path.parent} is not a folder; choose "
                        "another --LOG_DIR or --name"
                    ) from error
                continue
            except PermissionError:
                return cls._elsewhere(Path(parent), name)
            except OSError as error:
                if error.errno == errno.EROFS:
                    return cls._elsewhere(Path(parent), name)
                raise not_written(path, error, "or choose another --LOG_DIR or --name") from error
            return cls(path)
        raise InputError(f"{wanted} and 998 folders named after it exist; choose another --name")

    @classmethod
    def _elsewhere(cls, parent: Path, name: str) -> RunFolder:
        """Makes the folder in the user's home instead, so that an unattended run is not lost."""
        folder = home_logs()
        if folder is None or folder == parent:
            other = (
                f"neither can {folder}" if folder else "there is no home folder to go to instead"
            )
            raise InputError(
                f"--LOG_DIR {parent} cannot be written, and {other}; choose another --LOG_DIR"
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
        """Locks the folder until this process ends, and removes left-over temporary files.

        Raises:
            HeldError: another process has the lock.
            MachineError: the folder cannot be written.
        """
        self._held = None
        try:  # args.json itself is locked, so that no lock file is left behind
            self._held = open_locked(self.path / "args.json", "r+b", self.path)
        except OSError as error:
            raise MachineError(
                f"the run folder {self.path} cannot be written ({error.strerror}), so the run "
                "cannot go on in it; make it writable, or continue in a copy of it"
            ) from error
        if self._held is None:
            raise self._is_held_elsewhere()
        remove_left_over(self.path)

    def _is_held_elsewhere(self) -> HeldError:
        return HeldError(
            f"the run in {self.path} is going on in another process; wait for its end, or stop it "
            "first"
        )

    def begin(
        self,
        args: dict[str, Any],
        environment: dict[str, Any],
        base: dict[str, Any] | None = None,
    ) -> None:
        """Writes the first files of a new run, or of one that has saved nothing; locks the folder.

        Args:
            base: the content of base.pth, if the run has one.

        Raises:
            HeldError: another process is at work in the folder.
            InputError: the files cannot be written. They are removed then, and after a Ctrl-C.
        """
        if self.path.joinpath("args.json").is_file():
            self.hold()
        try:
            self.write_args(args)
            self.hold()  # a folder without a checkpoint looks like one that a killed run has left
            self.write_environment(environment)
            if base is not None:
                self._write_base(base)
        except HeldError:
            raise
        except BaseException:
            with contextlib.suppress(OSError):
                for name in BEGUN:
                    self.path.joinpath(name).unlink(missing_ok=True)
                self.path.rmdir()
            raise

    @main_only
    def _write_base(self, base: dict[str, Any]) -> None:
        write_file(save_tensors, self.path / BASE, {"format": FORMAT, **base})

    @property
    def has_saved_nothing(self) -> bool:
        """Whether the run ended before its first checkpoint, so that it can only begin anew."""
        return {file.name for file in files_of(self.path)} <= set(BEGUN)

    @property
    def is_finished(self) -> bool:
        """Whether the run has ended."""
        return (self.path / "results.json").is_file()

    @main_only
    def write_args(self, args: dict[str, Any]) -> None:
        """Writes args.json."""
        before = None
        if self._held is not None:  # opening and closing the file would release the lock
            self._held.seek(0)
            before = self._held.read()
        self.files.write("args.json", as_json(args), before)

    def read_args(self) -> dict[str, Any]:
        """The options that the run was started with."""
        args = self._read("args.json")
        # Reading has closed a descriptor of the file, which releases this process's lock on it.
        if self._held is not None and not lock(self._held, self.path):
            raise self._is_held_elsewhere()
        return args

    @main_only
    def change_args(self, change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
        """Replaces args.json if `change` alters the options; the folder remains locked."""
        before = self.read_args()
        if (after := change(before)) != before:
            self.write_args(after)
            self.hold()  # on the new file

    def _read(self, name: str) -> dict[str, Any]:
        """The content of a JSON file of the run, after its checksum was compared."""
        path = self.path / name
        with damage_in_words(str(path), "use another copy of it, or start a new run"):
            content = json.loads(self.files.read(name))
            if not isinstance(content, dict):
                raise ValueError(f"it holds a {type(content).__name__}")
        return content

    def read_environment(self) -> dict[str, Any]:
        """The content of environment.json; {} if it was not written yet."""
        return self._read_if_there("environment.json")

    @property
    def noted_place(self) -> Path | None:
        """The place of the user's own images when the run began; None if it is not known."""
        place = self.read_environment().get("place")
        return Path(place) if isinstance(place, str) else None

    def read_results(self) -> dict[str, Any]:
        """The content of results.json; {} before the run has ended."""
        return self._read_if_there("results.json")

    def _read_if_there(self, name: str) -> dict[str, Any]:
        return self._read(name) if (self.path / name).is_file() else {}

    def check_data(self, data: str, images: Mapping[str, str]) -> None:
        """Raises InputError if the images are not those that the run began with.

        Args:
            data: fingerprint of the training images, the only one in runs of an older version.
            images: split → fingerprint, of all images that the run uses.
        """
        kept = self._read("environment.json")
        before, now = kept.get("images"), dict(images)
        if not isinstance(before, dict):  # written by an older version
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
        """Writes results.json: the best checkpoint's metrics on the test classes."""
        self.files.write("results.json", as_json(content))

    @main_only
    def forget_results(self) -> None:
        """Removes results.json when a run continues, because its best checkpoint may change."""
        _remove(self.path / "results.json", "is that of a shorter run")

    @property
    def fault_path(self) -> Path:
        """The path of the record of a loss or gradient that was not finite."""
        return self.path / "non_finite.json"

    @main_only
    def write_fault(self, record: dict[str, Any]) -> None:
        """Writes non_finite.json, with terms that are not finite as the words "nan" and "inf"."""
        terms = {name: v if math.isfinite(v) else str(v) for name, v in record["terms"].items()}
        self.files.write(self.fault_path.name, as_json({**record, "terms": terms}))

    @contextlib.contextmanager
    def forgiving(self, what: str) -> Iterator[None]:
        """For a write whose failure must not end the run, such as on a full disk: logs the error.

        The error is kept in `trouble[what]` until a later write of the same `what` succeeds.
        """
        try:
            yield
        except InputError as error:
            self.trouble[what] = error
            logger.warning("%s; training goes on", error)
        else:
            self.trouble.pop(what, None)

    @main_only
    def save_last(self, state: Checkpoint, keep: int = 0) -> None:
        """Replaces last.pth, atomically.

        Args:
            state: a checkpoint with `clock`. keep: the number of the latest checkpoints that are
                also kept as step_<step>.pth.
        """
        last = self.path / "last.pth"
        write_file(save_tensors, last, {"format": FORMAT, **state})
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
            raise not_written(older, error, "or leave --keep out") from error

    def _older(self) -> list[Path]:
        """The checkpoints step_<step>.pth (--keep), by step."""
        found = self.path.glob("step_*.pth")
        return sorted((path for path in found if _step_of(path) >= 0), key=_step_of)

    def load_last(self, identity: Callable[[dict[str, Any]], dict[str, Any]]) -> Checkpoint:
        """The content of last.pth, or of the checkpoint that `open` was given.

        Args:
            identity: picks those options that stay the same when a run is continued.

        Raises:
            InputError: it holds no state to continue from, or is another run's.
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
        if self.images and "images" in state:  # these identify the data, in whatever folder
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
        """The newest `*_best.pth`; None before the first evaluation."""
        found = sorted(self.path.glob("*_best.pth"), key=lambda path: path.stat().st_mtime_ns)
        return found[-1] if found else None

    def forget_after(self, step: int) -> None:
        """Removes the checkpoints of steps after `step`, to which the run has gone back."""
        for older in self._older():
            if _step_of(older) > step:
                _remove(older, "is of a later step")
        path = self.best_checkpoint()
        if path is not None and load_checkpoint(path).get("step", 0) > step:
            _remove(path, "is of a later step")

    @main_only
    def save_best(self, state: Checkpoint) -> None:
        """Replaces the best checkpoint, atomically."""
        args = state["args"]
        name = f"{data_name(args['dataset'])}_{file_name_part(args['model'])}_best.pth"
        # Older versions named the file otherwise.
        path = self.best_checkpoint() or self.path / name
        write_file(save_tensors, path, {"format": FORMAT, **state})

    def load_best(self) -> Checkpoint:
        """The content of the best checkpoint.

        Raises:
            InputError: there is none, or it is damaged.
        """
        path = self.best_checkpoint()
        if path is None:
            raise InputError(f"{self.path} has no best checkpoint")
        return load_checkpoint(path)

    @main_only
    def write_table(self, name: str, header: list[str], rows: list[list]) -> None:
        """Replaces a CSV file, atomically."""
        self.files.write(name, as_table(header, rows))


def _step_of(path: Path) -> int:
    """The step of step_<step>.pth; -1 for a file with another name."""
    step = path.stem.removeprefix("step_")
    return int(step) if step.isdecimal() else -1


def _remove(path: Path, why: str) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise MachineError(
            f"{path} {why} and cannot be removed ({error.strerror}); make the run folder writable"
        ) from error


def find_run(
    parent: str | Path,
    name: str | None,
    closeness: Callable[[dict[str, Any]], int],
    *,
    saved: bool = True,
) -> RunFolder | None:
    """The run under `parent` whose options are closest, among those with a checkpoint.

    Of several equally close ones it is the newest. A folder whose options cannot be read, of a
    damaged run or of another program, is skipped with a warning, unless its name is `name`.

    Args:
        name: --name, which may begin with folders (`ablation/first`).
        closeness: of a run's options to those that are looked for; 0 means another run.
        saved: False: to look among the runs that have saved nothing instead.

    Raises:
        InputError: the options of the run `name` cannot be read.
    """
    found = []
    below = Path(name or "").parent
    folders = [Path(folder) / below for folder in (parent, home_logs()) if folder]
    for file in (file for folder in folders for file in folder.glob("*/args.json")):
        run = RunFolder(file.parent)
        try:
            wanted = run.checkpoint.is_file() if saved else run.has_saved_nothing
            if wanted and (close := closeness(run.read_args())):
                newest = run.checkpoint if saved else file
                found.append((close, newest.stat().st_mtime_ns, run))
        except InputError as error:
            if name and run.path.name == Path(name).name:
                raise
            logger.warning("%s is passed over: %s", run.path, error)
    return max(found, key=lambda each: each[:2])[-1] if found else None
