"""One training of a study: started or continued, watched, and ended where it falls behind."""

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
from runs import RunFolder
from storage import HeldError
from studies.ledger import Ledger, Work
from studies.places import Place, train_command
from studies.plan import Entrant
from utils import InputError, MachineError

if TYPE_CHECKING:
    import optuna

LOOK = 0.5  # seconds between two looks at a training
WAIT = 5.0  # seconds before looking again at what another process is doing
TRIES = 3  # of a training that is killed from outside
MOST_EPOCHS = 10**6
"""Steps of a trial: epoch e of fold f is reported as step f * MOST_EPOCHS + e."""
STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)
"""Exit statuses of a training that was asked to stop, and has saved where it stands."""
QUIET = "--wandb disabled --no-report --resume auto".split()


class Stopped(Exception):
    """The study is asked to stop; trainings have saved where they stand."""


class Failed(Exception):
    """A training or its evaluation could not be done; the message says why."""


class Trainer:
    """Starts the trainings of a study, each in a process of its own.

    Args:
        stopping: is set when the study is to stop, by whoever notices first.
    """

    def __init__(self, ledger: Ledger, stopping: threading.Event) -> None:
        self.ledger, self.stopping = ledger, stopping

    def train(
        self, work: Work, name: str, flags: Sequence[str], place: Place, watch: Watch | None = None
    ) -> Record:
        """Trains or continues one run, and returns what it left.

        Raises:
            Failed: it cannot be trained; the message says why.
            InputError: this machine, as it is now, cannot train it, so that others would fail too.
            Stopped: the study is to stop.
        """
        folder = self.ledger.folder / work.entrant.folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        flags = [*flags, *QUIET, *place.flags, "--LOG_DIR", str(folder), "--name", name]
        while not _make_room(path, flags):
            self._wait_for_other()
        killed = 0
        while not (path / "results.json").is_file():
            with (folder / f"{name}.log").open("ab") as log:
                begins = log.tell()
                status = self.watched(train_command(flags), log, place, path, watch)
            if status == 0 or (watch is not None and watch.pruned):
                break
            if self.stopping.is_set() or status in STOPPED:
                self.stopping.set()
                raise Stopped
            if status == HeldError.status:  # a training that has outlived its worker
                self._wait_for_other()
                continue
            killed += status < 0
            if status > 0 or killed == TRIES:
                printed = (folder / f"{name}.log").read_bytes()[begins:]
                raise failure(work, last_words(printed.decode(errors="replace"), status), status)
        return read(path)

    def _wait_for_other(self) -> None:
        """Waits before another look at a run that another process is training.

        Raises:
            Stopped: the study is to stop.
        """
        if self.stopping.wait(WAIT):
            raise Stopped

    def watched(
        self, command: list[str], log: IO[bytes], place: Place, path: Path, watch: Watch | None
    ) -> int:
        """Runs a training to its end while `watch` follows its numbers; returns its exit status."""
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


def _make_room(path: Path, flags: Sequence[str]) -> bool:
    """Removes a run folder that this command would not continue: of other values, or just begun.

    Otherwise train.py would make another one beside it, and the numbers in this one would be taken
    for those of the command.

    Returns:
        False where another process is at work in the folder, which then stays.
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
    """Reports the metric of a fold's epochs to the trial, and says when to stop.

    Attributes:
        pruned: whether the trial was below the median of its method's finished trials at an epoch
            of the fold.
    """

    def __init__(self, trial: optuna.Trial, ledger: Ledger, entrant: Entrant, fold: int) -> None:
        self.trial, self.ledger, self.entrant, self.fold = trial, ledger, entrant, fold
        self.plan = ledger.plan
        frozen = trial.study.get_trials(deepcopy=False)[trial.number]
        self.reported = set(frozen.intermediate_values)
        self.pruned = False

    def look(self, path: Path) -> bool:
        """Reports the epochs that are new in metrics.csv; returns whether to stop."""
        try:
            record = read(path)
        except (InputError, OSError):  # not there yet, or just being written
            return False
        has_ended = bool(record.outcome)  # stopping it would spare nothing
        for row in record.evaluated:
            step = self.fold * MOST_EPOCHS + int(row["epoch"])
            if step not in self.reported and self.plan.metric in row:
                self.reported.add(step)
                self.trial.report(row[self.plan.metric], step)
                if self.plan.prune and not has_ended:
                    median = self.ledger.median(self.entrant, step)
                    self.pruned |= median is not None and row[self.plan.metric] < median
        return self.pruned


# --- what a failure means -------------------------------------------------------------------------


def failure(work: Work, words: str, status: int) -> Failed | MachineError:
    """The error to raise for a training, or its evaluation, that ended with these last words.

    `Failed` where its values or flags are to blame. A full disk or memory, and being killed, say
    nothing about them: such an end stops the study, before it uses up all trials.
    """
    if status > 0 and status != MachineError.status:
        return Failed(words)
    killed = ", as where there is too little memory (fewer --jobs need less)" if status < 0 else ""
    return MachineError(
        f"{work.title}: {words}{killed}; the study stops, and does not count that: see to it, "
        "and start the study again"
    )


def last_words(text: str, status: int) -> str:
    """What a program that failed printed last, for a sentence: its error, or its last line."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit status {status}"])[-1]
