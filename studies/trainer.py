"""A training of a study: it is started or continued, watched, and stopped if it falls behind."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING

import options
from page.records import Record, read
from processes import stop_signals
from runs import RunFolder
from storage import HeldError
from studies.ledger import Ledger, Work
from studies.places import Place, train_command
from studies.plan import Entrant
from utils import InputError, MachineError

if TYPE_CHECKING:
    import optuna

LOOK = 0.5  # seconds between two looks at a training
WAIT = 5.0  # seconds before another look at the work of another process
TRIES = 3  # attempts at a training that is killed by something else
MOST_EPOCHS = 10**6
"""Epoch e of fold f is reported to Optuna as step f * MOST_EPOCHS + e of the trial."""
STOPPED = {status for number in stop_signals() for status in (128 + number, -number)}
"""Exit statuses of a training that was asked to stop, and has saved a checkpoint."""
QUIET = "--wandb disabled --no-report --resume auto".split()


class Stopped(Exception):
    """The study was asked to stop; its trainings have saved checkpoints."""


class Failed(Exception):
    """A training or its evaluation has failed; the message says why."""


class Trainer:
    """Starts the trainings of a study, each in a process of its own.

    Args:
        stopping: is set when the study shall stop, by the thread that notices first.
    """

    def __init__(self, ledger: Ledger, stopping: threading.Event) -> None:
        self.ledger, self.stopping = ledger, stopping

    def train(
        self, work: Work, name: str, flags: Sequence[str], place: Place, watch: Watch | None = None
    ) -> Record:
        """Trains or continues a run, and returns its record.

        Raises:
            Failed: it cannot be trained; the message says why.
            InputError: the machine is at fault, so that other trainings would fail, too.
            Stopped: the study shall stop.
        """
        folder = self.ledger.folder / work.entrant.folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        flags = [*flags, *QUIET, *place.flags, "--LOG_DIR", str(folder), "--name", name]
        killed = 0
        while True:
            if not _make_room(path, flags):
                self._wait_for_other()
                continue
            if (path / "results.json").is_file():
                return read(path)
            with (folder / f"{name}.log").open("ab") as log:
                begins = log.tell()
                status = self.watched(train_command(flags), log, place, path, watch)
            if watch is not None and watch.pruned:
                return read(path)
            if status == 0:
                _check_place(work, path)
                return read(path)
            if self.stopping.is_set() or status in STOPPED:
                raise Stopped
            if status == HeldError.status:  # its former worker was killed, but the training runs
                self._wait_for_other()
                continue
            killed += status < 0
            if status > 0 or killed == TRIES:
                printed = (folder / f"{name}.log").read_bytes()[begins:]
                raise failure(work, last_words(printed.decode(errors="replace"), status), status)

    def _wait_for_other(self) -> None:
        """Waits before another look at a run that another process is training.

        Raises:
            Stopped: the study shall stop.
        """
        if self.stopping.wait(WAIT):
            raise Stopped

    def watched(
        self, command: list[str], log: IO[bytes], place: Place, path: Path, watch: Watch | None
    ) -> int:
        """Runs a training while `watch` follows its metrics; returns its exit status."""
        # In a session of its own, so that Ctrl-C reaches it once, from here.
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=place.environment, start_new_session=True
        )
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(LOOK)
                if watch is not None and not watch.pruned and watch.look(path):
                    process.terminate()
                if self.stopping.is_set():
                    process.terminate()
                    return process.wait()
        finally:
            if process.poll() is None:
                process.kill()
        if watch is not None and not watch.pruned:
            watch.look(path)
        return process.returncode


def _check_place(work: Work, path: Path) -> None:
    """Raises MachineError if a run went elsewhere, as it does where the disk takes no folder."""
    if not (path / "results.json").is_file():
        raise MachineError(
            f"{work.title}: its run went elsewhere, because {path} could not be made; "
            f"{path}.log says where to: move it back, and start the study again"
        )


def _make_room(path: Path, flags: Sequence[str]) -> bool:
    """Removes a run folder that this command would not continue: with other options, or empty.

    Otherwise train.py would make another folder beside it, and the metrics in this one would be
    taken for those of the command.

    Returns:
        False if another process is training in the folder, which is then not removed.
    """
    if not path.exists():
        return True
    run = RunFolder(path)
    is_run = (path / "args.json").is_file()
    begun = is_run and (run.is_finished or (path / "last.pth").is_file())
    if begun and options.is_of(run.read_args(), options.parse_train(list(flags))):
        return True
    if is_run:
        try:
            run.hold()
        except HeldError:
            return False
    shutil.rmtree(path)
    return True


class Watch:
    """Reports the metric of a fold's epochs to the trial, and decides when to stop it.

    Attributes:
        pruned: whether the trial was below the median of its method's complete trials at an epoch
            of the fold.
    """

    def __init__(self, trial: optuna.Trial, ledger: Ledger, entrant: Entrant, fold: int) -> None:
        self.trial, self.ledger, self.entrant, self.fold = trial, ledger, entrant, fold
        self.plan = ledger.plan
        frozen = trial.study.get_trials(deepcopy=False)[trial.number]
        self.reported = set(frozen.intermediate_values)
        self.pruned = False

    def look(self, path: Path) -> bool:
        """Reports new epochs in metrics.csv; returns whether to stop."""
        try:
            record = read(path)
        except (InputError, OSError):  # not there yet, or just being written
            return False
        has_ended = bool(record.outcome)  # then stopping would save nothing
        for row in record.evaluated:
            step = self.fold * MOST_EPOCHS + int(row["epoch"])
            if step not in self.reported and self.plan.metric in row:
                self.reported.add(step)
                self.trial.report(row[self.plan.metric], step)
                if self.plan.prune and not has_ended:
                    median = self.ledger.median(self.entrant, step)
                    self.pruned |= median is not None and row[self.plan.metric] < median
        return self.pruned


# --- failures -------------------------------------------------------------------------------------


def failure(work: Work, words: str, status: int) -> Failed | MachineError:
    """The error to raise for a training, or its evaluation, that ended with these last words.

    It is `Failed` if the values or flags are at fault. After a full disk or memory, or a kill, it
    stops the study, which would otherwise use up all trials.
    """
    if status > 0 and status != MachineError.status:
        return Failed(words)
    killed = ", perhaps for lack of memory (fewer --jobs need less)" if status < 0 else ""
    return MachineError(
        f"{work.title}: {words}{killed}; the study stops, and does not count that: remove the "
        "cause, and start the study again"
    )


def last_words(text: str, status: int) -> str:
    """The last error that a failed program printed, or its last line, as part of a sentence."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit status {status}"])[-1]
