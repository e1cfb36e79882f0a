"""Takes what is open in a study piece by piece, trains it and writes what it reached."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

import dataset
import options
from machine import cores
from page.records import Record, metrics_in, read
from runs import HeldError, RunFolder
from storage import write_json
from studies import judging
from studies.ledger import Ledger, Work, claim_of
from studies.plan import Entrant, Plan
from terminal import say
from training.data import deal
from utils import InputError, counted, human_seconds, our_command

if TYPE_CHECKING:
    import optuna

ROOT = Path(__file__).resolve().parent.parent
LOOK = 0.5  # seconds between two looks at a training
WAIT = 5.0  # seconds before looking again where others are at all that is left
TRIES = 3  # of a training that is killed from outside
STOPPED = (130, 143, -signal.SIGINT, -signal.SIGTERM)
"""Exit statuses of a training that was asked to stop, and has saved where it stands."""
NO_ROOM = re.compile(
    "some space|No space left|quota exceeded|memory is full|that reads images died|"
    "allocate memory|MemoryError|not open more files"
)
"""Is in the last words of what this machine had no room for: files, memory, open files."""
QUIET = "--wandb disabled --no-report --resume auto".split()


class Stopped(Exception):
    """The study is asked to stop; trainings have saved where they stand."""


@dataclass
class Place:
    """Where a worker trains: a GPU, or a share of the cores."""

    gpu: int | None = None
    threads: int = 1

    @property
    def words(self) -> list[str]:
        """Flags for train.py."""
        return [] if self.gpu is None else ["--gpu-id", str(self.gpu)]

    @property
    def environment(self) -> dict[str, str]:
        """For a process that trains there."""
        return {**os.environ, "OMP_NUM_THREADS": str(self.threads), "PYTHONUNBUFFERED": "1"}


def places(jobs: int, gpus: Sequence[int] = ()) -> list[Place]:
    """Where `jobs` trainings run at once: on the GPUs in turn, or each on a share of the cores."""
    if gpus:
        return [Place(gpu, max(1, cores() // jobs)) for gpu in (list(gpus) * jobs)[:jobs]]
    return [Place(None, max(1, cores() // jobs)) for _ in range(jobs)]


class Workers:
    """The workers of this process, one thread each.

    Attributes:
        done: called after each training with a sentence about it.
    """

    def __init__(self, ledger: Ledger, where: Sequence[Place], done: Callable[[str], None]) -> None:
        self.ledger, self.where, self.done = ledger, where, done
        self.stopping = threading.Event()
        self.errors: list[BaseException] = []

    def run(self) -> None:
        """Works until nothing is left.

        Raises:
            Stopped: by Ctrl-C or SIGTERM.
            InputError: what a worker cannot go on with.
        """
        threads = [threading.Thread(target=self._work, args=(place,)) for place in self.where]
        previous = {
            number: signal.signal(number, lambda *_: self.stopping.set())
            for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.errors:
            raise self.errors[0]
        if self.stopping.is_set():
            raise Stopped

    def _work(self, place: Place) -> None:
        try:
            while not self.stopping.is_set():
                work = self.ledger.next()
                if work is not None:
                    try:
                        self.do(work, place)
                    finally:
                        self.ledger.release(claim_of(work))
                elif self.ledger.is_finished:
                    return
                else:  # others are at all that is left, and may yet leave it
                    self.stopping.wait(WAIT)
        except Stopped:
            return
        except BaseException as error:
            self.errors.append(error)
            self.stopping.set()

    def do(self, work: Work, place: Place) -> None:
        """Does a piece of work whose claim is held."""
        {"trial": self._trial, "seed": self._seed, "together": self._together}[work.kind](
            work, place
        )

    # -- trials

    def _trial(self, work: Work, place: Place) -> None:
        """Trains without each fold in turn, until all are done or the trial is pruned."""
        import optuna

        plan, entrant = self.ledger.plan, work.entrant
        trial = self.ledger.optuna_trial(work)
        study = self.ledger.study(entrant)
        values = self.ledger.trials(entrant)[work.number].values
        for fold in range(plan.folds):
            if f"fold{fold}" in trial.user_attrs:
                continue
            name = f"{work.name}-fold{fold}"
            words = [*entrant.command(values), *_of_fold(plan, fold)]
            watch = Watch(trial, self.ledger, entrant, fold)
            try:
                record = self.train(work, name, words, place, watch)
                reached = _reached(record, plan.metric)
            except Failed as failure:
                trial.set_user_attr("error", str(failure))
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                self.done(f"{_called(work)}: failed: {failure}")
                return
            trial.set_user_attr(f"fold{fold}", reached)
            _tidy(record.path)
            if watch.pruned:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                self.done(f"{_called(work)}: stopped early, behind the others")
                return
            if fold < plan.folds - 1:
                about = f"{_called(work)}, fold {fold + 1} of {plan.folds}"
                self.done(f"{about}: {plan.metric} {reached[plan.metric]:.4f}")
        found = [trial.user_attrs[f"fold{fold}"][plan.metric] for fold in range(plan.folds)]
        mean = sum(found) / len(found)
        study.tell(trial, mean)
        self.done(f"{_called(work)}: {plan.metric} {mean:.4f} on the folds")

    # -- runs

    def _seed(self, work: Work, place: Place) -> None:
        """Trains on all training classes at the chosen values, and judges the last epoch."""
        ledger, entrant = self.ledger, work.entrant
        chosen = ledger.chosen(entrant)
        assert chosen is not None
        out = ledger.result_file(entrant, work.name)
        words = [*entrant.command(chosen.values), "--seed", str(work.number)]
        try:
            record = self.train(work, work.name, [*words, "--metrics", "retrieval"], place)
            self._judge(work, record.path / "last.pth", out, place)
        except Failed as failure:
            write_json(out, {"error": str(failure), "values": dict(chosen.values)})
            self.done(f"{_called(work)}: failed: {failure}")
            return
        found = ledger.result(entrant, work.name) or {}
        about = {"values": dict(chosen.values), "seconds": record.seconds, **_bonus(record)}
        write_json(out, found | about)
        if work.number > 1:  # of the first seed everything stays possible: pages, searches, exports
            _tidy(record.path)
        metric = ledger.plan.metric
        first = next(iter(found["results"].values()))
        self.done(f"{_called(work)}: {metric} {first[metric]:.4f} on the test classes")

    def _judge(self, work: Work, checkpoint: Path, out: Path, place: Place) -> None:
        command = [*our_command("studies.judging"), str(checkpoint)]
        command += [str(out.with_suffix("")), str(place.gpu or 0)]
        # In this folder, because the paths in a run's options are relative to where it began.
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=place.environment,
            start_new_session=True,
        )
        if done.returncode in STOPPED or self.stopping.is_set():
            raise Stopped
        if done.returncode:
            raise _failure(work, _last_words(done.stderr, done.returncode), done.returncode)

    def _together(self, work: Work, place: Place) -> None:
        """What the seeds reach as ensembles; afterwards their embeddings are no longer needed."""
        entrant, seeds = work.entrant, range(1, work.number + 1)
        files = [self.ledger.result_file(entrant, f"seed{s}").with_suffix(".npz") for s in seeds]
        there = [file for file in files if file.is_file()]
        runs = [judging.load(file) for file in there]
        found = judging.ensembles(runs) if len(runs) > 1 else {}
        content = {"ensembles": found, "seeds": len(there)}
        write_json(self.ledger.result_file(entrant, work.name), content)
        for file in there:
            judging.without_embeddings(file)
        self.done(f"{entrant.name}: its {len(there)} seeds together")

    # -- one training

    def train(
        self, work: Work, name: str, words: Sequence[str], place: Place, watch: Watch | None = None
    ) -> Record:
        """Trains, or goes on with, one run, and returns what it left.

        Raises:
            Failed: it cannot be trained; the message says why.
            InputError: not on this machine as it is now, so that others would fail as well.
            Stopped: the study is to stop.
        """
        folder = self.ledger.folder / work.entrant.folder
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / name
        words = [*words, *QUIET, *place.words, "--LOG_DIR", str(folder), "--name", name]
        command = [sys.executable, str(ROOT / "train.py"), *words]
        while not _make_room(path, words):
            self._wait_for_other()
        killed = 0
        while not (path / "results.json").is_file():
            with (folder / f"{name}.log").open("ab") as log:
                begins = log.tell()
                status = self.watched(command, log, place, path, watch)
            if status == 0 or (watch is not None and watch.pruned):
                break
            if self.stopping.is_set() or status in STOPPED:
                self.stopping.set()
                raise Stopped
            written = (folder / f"{name}.log").read_bytes()[begins:]
            said = _last_words(written.decode(errors="replace"), status)
            if "is going on in another process" in said:
                self._wait_for_other()
                continue
            killed += status < 0
            if status > 0 or killed == TRIES:
                raise _failure(work, said, status)
        return read(path)

    def _wait_for_other(self) -> None:
        """Before another look at a run that is going on: a training whose worker was killed.

        Raises:
            Stopped: the study is to stop.
        """
        if self.stopping.wait(WAIT):
            raise Stopped

    def watched(
        self, command: list[str], log: IO[bytes], place: Place, path: Path, watch: Watch | None
    ) -> int:
        """Runs a training and looks at its numbers; its exit status."""
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


def rehearse(plan: Plan, names: Sequence[str], place: Place) -> None:
    """Prepares the hardest trainings of each of these methods, so that nothing begins in vain.

    Raises:
        InputError: one cannot be trained; the sentence says which and why.
    """
    for one in plan.entrants:
        if one.name not in names:
            continue
        try:
            folds = hardest_folds(one, plan.folds)
        except InputError as error:
            raise InputError(f"{one.name}: {error}") from error
        for fold in folds:
            values = {r.name: r.first for r in one.space}
            words = [*one.command(values), *_of_fold(plan, fold), *place.words, "--dry-run"]
            done = subprocess.run(
                [sys.executable, str(ROOT / "train.py"), *words],
                capture_output=True,
                text=True,
                check=False,
                env=place.environment,
            )
            if done.returncode:
                raise InputError(f"{one.name}: {_last_words(done.stderr, done.returncode)}")


def hardest_folds(entrant: Entrant, folds: int) -> list[int]:
    """The folds without which the fewest images, and the fewest classes, are left to train on.

    Where classes are of very different sizes these are two, since folds have about as many images:
    what fits beside the one may not fit beside the other.

    Raises:
        InputError: there are no such images, or too few classes, or a fold that measures nothing.
    """
    chosen = dataset.Choice.of(options.parse_train(list(entrant.flags)))
    with contextlib.redirect_stderr(io.StringIO()):  # the training says it as well
        train = chosen.load("train")
    of_class = deal(train.labels, train.num_classes, folds)
    sizes = np.bincount(train.labels, minlength=train.num_classes)
    if len(matched := np.unique(of_class[sizes > 1])) < folds:
        raise InputError(
            f"of {folds} folds only {len(matched)} would have two images of one "
            f"class, and nothing can be measured on the others; choose fewer folds"
        )
    images = np.bincount(of_class, weights=sizes, minlength=folds)
    classes = np.bincount(of_class, minlength=folds)
    return sorted({int(images.argmax()), int(classes.argmax())})


def _make_room(path: Path, words: Sequence[str]) -> bool:
    """Removes a run folder that this command would not go on in: of other values, or just begun.

    Otherwise train.py would make another one beside it, and the numbers in this one would be taken
    for those of the command.

    Returns:
        Whether that could be done: False where another process is at work in it.
    """
    if not path.exists():
        return True
    run = RunFolder(path)
    is_run = (path / "args.json").is_file()
    begun = is_run and (run.is_finished or (path / "last.pth").is_file())
    if begun and options.is_of(run.read_args(), options.parse_train(list(words))):
        return True
    if is_run:
        try:
            run.hold()
        except HeldError:
            return False
    shutil.rmtree(path)
    return True


class Failed(Exception):
    """A training or its evaluation could not be done; the message says why."""


def _failure(work: Work, said: str, status: int) -> Exception:
    """What it means that a training, or its evaluation, has ended with these last words.

    `Failed` where its values or flags are to blame. A full disk or memory, and what kills programs,
    say nothing of them: they stop the study before they use up all of its trials.
    """
    if status > 0 and not NO_ROOM.search(said):
        return Failed(said)
    killed = ", as where there is too little memory (fewer --jobs need less)" if status < 0 else ""
    return InputError(
        f"{_called(work)}: {said}{killed}; the study stops, and does not count that: see to it, "
        "and start the study again"
    )


class Watch:
    """Reports the metric of a fold's epochs to the trial, and says when to stop.

    Attributes:
        pruned: whether the trial was below the median of its method's finished trials at an epoch
            of the fold.
    """

    def __init__(self, trial: optuna.Trial, ledger: Ledger, entrant: Entrant, fold: int) -> None:
        self.trial, self.ledger, self.entrant, self.fold = trial, ledger, entrant, fold
        self.plan = ledger.plan
        self.told = set(self._reported())
        self.pruned = False

    def _reported(self) -> list[int]:
        number = self.trial.number
        return list(self.trial.study.get_trials(deepcopy=False)[number].intermediate_values)

    def look(self, path: Path) -> bool:
        """Tells of the epochs that are new in metrics.csv; whether to stop."""
        try:
            record = read(path)
        except (InputError, OSError):  # not there yet, or just being written
            return False
        for row in record.evaluated:
            step = self.fold * MOST_EPOCHS + int(row["epoch"])
            if step not in self.told and self.plan.metric in row:
                self.told.add(step)
                self.trial.report(row[self.plan.metric], step)
                if self.plan.prune and not _is_last(record):
                    median = self.ledger.median(self.entrant, step)
                    self.pruned |= median is not None and row[self.plan.metric] < median
        return self.pruned


MOST_EPOCHS = 10**6


def _is_last(record: Record) -> bool:
    """Whether the run is done, so that stopping it would spare nothing."""
    return bool(record.outcome)


def _of_fold(plan: Plan, fold: int) -> list[str]:
    words = f"--val-folds {plan.folds} --val-fold {fold} --no-test --metrics retrieval --seed 0"
    return words.split()


def _reached(record: Record, metric: str) -> dict[str, float]:
    """The numbers of the last evaluation of a fold, and what it took.

    Raises:
        Failed: the study's metric is not among them.
    """
    last = record.evaluated[-1]
    if metric not in last:
        raise Failed(
            f"{metric} is undefined on a fold without two images of one class; choose fewer folds"
        )
    return {**metrics_in(last), "epoch": last["epoch"], "seconds": record.seconds}


def _bonus(record: Record) -> dict[str, Any]:
    """R@1 of the best and of the last epoch: what picking on the test classes would add."""
    values = [row["R@1"] for row in record.evaluated]
    return {"best R@1": max(values), "last R@1": values[-1], "evaluations": len(values)}


def _tidy(path: Path) -> None:
    """Removes the weights, of which a study has many."""
    for file in path.glob("*.pth"):
        file.unlink()


def _last_words(text: str, status: int) -> str:
    """What a training said at last, for a sentence: its error, or its last line."""
    if status < 0:
        return f"killed by {signal.Signals(-status).name}"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return (errors or lines or [f"exit status {status}"])[-1]


def _called(work: Work) -> str:
    return f"{work.entrant.name} {work.name}"


# --- what is said meanwhile -----------------------------------------------------------------------


class Progress:
    """One line after each training: what it was, and about how long the rest will take."""

    def __init__(self, ledger: Ledger, jobs: int) -> None:
        self.ledger, self.jobs = ledger, jobs
        self.begun = time.monotonic()
        self.first = self.left()
        self._lock = threading.Lock()

    def left(self) -> tuple[int, int]:
        """Trainings that are not done: of folds, and with seeds."""
        plan = self.ledger.plan
        left = [self.ledger.left(one) for one in plan.entrants]
        running = [
            t for one in plan.entrants for t in self.ledger.trials(one) if t.state == "running"
        ]
        folds = plan.folds * sum(trials for trials, _ in left)
        return folds - sum(len(t.folds) for t in running), sum(runs for _, runs in left)

    def say(self, sentence: str) -> None:
        """Prints the sentence with the time that is left."""
        with self._lock:
            left = self.left()
            done = sum(self.first) - sum(left)
            words = sentence
            if done > 0 and sum(left):
                seconds = round((time.monotonic() - self.begun) / done * sum(left))
                trainings = counted(sum(left), "training")
                words += f"; {trainings} left, about {human_seconds(seconds)}"
            say(words, flush=True)
