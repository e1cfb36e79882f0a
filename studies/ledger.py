"""The work of a study that is done, under way and left, shared by all workers through its folder.

    plan.json             the plan that the study was begun with
    trials.log            Optuna's journal: the values that were tried, and their metric
    claims/               a file for each piece of work, locked by the worker that does it
    METHOD/trialNNN-foldK METHOD/seedS      run folders, and their logs beside them
    METHOD/seedS.json .npz                  a run's results on the test classes

A claim is a lock of the operating system, which ends with the worker, however it ends. Then another
worker takes the work over, and continues from the last checkpoint. So any number of processes, on
machines that share the folder, can work on one study.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import statistics
import threading
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from storage import lock, remove_left_over, write_json
from studies.plan import Entrant, Plan, settings_of
from utils import InputError, damage_in_words, not_written

if TYPE_CHECKING:
    import optuna

STARTUP = 4
"""Trials of a method that must be complete before others are compared with them."""


class Work(NamedTuple):
    """A piece of work: a trial, a run with a seed, or the ensembles of a method's seeds.

    `kind` is "trial", "seed" or "together"; `number` is that of the trial, the seed, or the number
    of seeds.
    """

    kind: str
    entrant: Entrant
    number: int

    @property
    def name(self) -> str:
        """The name of its run folder, and the end of its claim's name."""
        forms = {"trial": "trial{:03d}", "seed": "seed{}", "together": "together{}"}
        return forms[self.kind].format(self.number)

    @property
    def title(self) -> str:
        """The method and the name, for messages."""
        return f"{self.entrant.name} {self.name}"


@dataclass(frozen=True)
class Trial:
    """The present state of a trial.

    Attributes:
        state: running, complete, pruned or failed. values: option → value.
        reached: the mean of the metric over the folds; None unless it is complete.
        folds: the numbers of each finished fold. seconds: of training, in these.
        error: the reason why it failed.
    """

    number: int
    state: str
    values: Mapping[str, Any]
    reached: float | None
    folds: tuple[Mapping[str, float], ...]
    seconds: float
    error: str = ""


class Ledger:
    """The folder of a study, as described at the head of this file."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.folder = plan.folder
        self._held: dict[str, int] = {}  # claim → its open file
        self._lock = threading.Lock()
        self._storage: Any = None
        self._studies: dict[str, optuna.Study] = {}

    # -- beginning

    def look(self) -> list[str]:
        """Compares the plan with the folder's; returns the methods that should be rehearsed.

        These are new ones, and ones whose settings were chosen by another machine, perhaps, so that
        this one may lack weights for them.

        Raises:
            InputError: the folder is that of another study.
        """
        if (self.folder / "args.json").exists():
            raise InputError(f"{self.folder} is a run; give the study another name")
        kept = self.kept_plan()
        known: dict[str, Any] = {}
        if kept is not None:
            _check_same(kept, self.plan, self.folder)
            self._check_budget(kept["trials"])
            known = kept["methods"]
        entrants = []
        for one in self.plan.entrants:
            if one.name in known:  # an older version may have stored no settings
                settings = known[one.name].get("settings", [])
            else:
                settings = one.settings or settings_of(one, self.plan.folds)
            entrants.append(one.settled(settings))
        self.plan = replace(self.plan, entrants=tuple(entrants))
        return [one.name for one in entrants if one.name not in known or one.settings]

    def begin(self) -> None:
        """Makes the folder, or adds to that of the same study.

        Raises:
            InputError: it is that of another study, or cannot be made.
        """
        try:
            (self.folder / "claims").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise not_written(self.folder, error, "or choose another folder for it") from error
        with self.claimed("plan", wait=True):
            self.look()  # another process may have begun it meanwhile
            content = self.plan.identity | {"trials": self.plan.trials}
            known = (self.kept_plan() or {"methods": {}})["methods"]
            content["methods"] = known | content["methods"]  # a method left out now may come back
            write_json(self.folder / "plan.json", content)
            for folder in (self.folder, *(self.folder / one.folder for one in self.plan.entrants)):
                remove_left_over(folder)
            self._try_again()
            self._remove_spare_weights()

    def _try_again(self) -> None:
        """Deletes the results of failed runs, so that they are tried again."""
        for entrant in self.plan.entrants:
            for seed in range(1, self.plan.seeds + 1):
                if "error" in (self.result(entrant, f"seed{seed}") or {}):
                    self.result_file(entrant, f"seed{seed}").unlink()

    def _remove_spare_weights(self) -> None:
        """Removes the weights that killed workers have left after they had judged them."""
        for entrant in self.plan.entrants:
            seeds = range(2, self.plan.seeds + 1)
            judged = [f"seed{seed}" for seed in seeds if self.is_judged(entrant, seed)]
            for trial in self.trials(entrant):
                name = Work("trial", entrant, trial.number).name
                judged += [f"{name}-fold{fold}" for fold in range(len(trial.folds))]
            for name in judged:
                remove_weights(self.folder / entrant.folder / name)

    def _check_budget(self, trials: int) -> None:
        """Raises InputError if the plan has a number of trials that would be unfair.

        If it were lower than that of some method, the others would have fewer to choose from. If it
        were higher, after runs were judged on the test classes, settings could be chosen by these.
        """
        done = {one.name: len(self.trials(one)) for one in self.plan.entrants}
        most = max(done, key=done.__getitem__)
        if done[most] > self.plan.trials:
            raise InputError(
                f"{self.folder} has {done[most]} trials of {most} already, and all methods get as "
                f"many; give trials = {done[most]} or more, or this study another name"
            )
        results = self.folder.glob("*/seed*.json")
        begun = any("values" in (_content(file, run_again(file)) or {}) for file in results)
        if begun and trials != self.plan.trials:
            raise InputError(
                f"{self.folder} had {trials} trials per method, and its runs were judged on the "
                f"test classes; {self.plan.trials} trials could choose other settings and look at "
                "them again: give this study another name"
            )

    def kept_plan(self) -> dict[str, Any] | None:
        """The plan that the study was begun with; None for a new study.

        Raises:
            DamagedError: it cannot be read.
        """
        path, advice = self.folder / "plan.json", "put a copy back, or give the study another name"
        kept = _content(path, advice)
        if kept is not None:
            with damage_in_words(str(path), advice):
                _ = kept["folds"], kept["metric"], kept["trials"]
                _ = [(known["flags"], known["space"]) for known in kept["methods"].values()]
        return kept

    def path(self, work: Work) -> Path:
        """Its run folder, or the beginning of the names of its folders."""
        return self.folder / work.entrant.folder / work.name

    # -- claims

    @contextlib.contextmanager
    def claimed(self, name: str, *, wait: bool = False) -> Iterator[bool]:
        """Holds a claim within the `with`; yields False if another worker has it."""
        got = self._take(name, wait)
        try:
            yield got
        finally:
            if got:
                self.release(name)

    def _take(self, name: str, wait: bool = False) -> bool:
        """Takes a claim; False if another process, or another thread of this one, has it."""
        # Asked again and again, because of two processes with several threads each, which wait for
        # two claims, the system would say that they wait for each other.
        while not self._is_taken(name):
            if not wait:
                return False
            threading.Event().wait(0.05)
        return True

    def _is_taken(self, name: str) -> bool:
        with self._lock:
            if name in self._held:
                return False
            file = os.open(self.folder / "claims" / name, os.O_RDWR | os.O_CREAT, 0o666)
            self._held[name] = file
        if lock(file, self.folder):
            return True
        self.release(name)
        return False

    def release(self, name: str) -> None:
        """Releases a claim."""
        with self._lock:
            os.close(self._held.pop(name))

    def next(self) -> Work | None:
        """Claims the most urgent piece of work that nobody does; None if there is none now.

        The order: interrupted trials, new trials of the method with the fewest, runs seed by seed,
        ensembles. The claim is held until it is released by name (`claim_of`).
        """
        with self.claimed("next", wait=True):
            for work in self._open():
                if self._take(claim_of(work)):
                    # Another worker may have finished it just before.
                    if self._is_open(work):
                        if work.kind == "trial":
                            self._draw(work)  # now, to use all finished trials
                        return work
                    self.release(claim_of(work))
        return None

    def _open(self) -> Iterator[Work]:
        trials = {one.name: self.trials(one) for one in self.plan.entrants}
        for one in self.plan.entrants:
            for trial in trials[one.name]:
                if trial.state == "running":
                    yield Work("trial", one, trial.number)
        for one in sorted(self.plan.entrants, key=lambda one: len(trials[one.name])):
            if len(trials[one.name]) < self.plan.trials:
                yield Work("trial", one, len(trials[one.name]))
        for seed in range(1, self.plan.seeds + 1):
            for one in self.plan.entrants:
                if self._chosen(trials[one.name]) and not self.is_judged(one, seed):
                    yield Work("seed", one, seed)
        for one in self.plan.entrants:
            if all(self.is_judged(one, seed) for seed in range(1, self.plan.seeds + 1)):
                together = Work("together", one, self.plan.seeds)
                if self._is_open(together):
                    yield together

    def _is_open(self, work: Work) -> bool:
        if work.kind == "trial":
            trials = self.trials(work.entrant)
            return work.number >= len(trials) or trials[work.number].state == "running"
        if work.kind == "seed":
            return not self.is_judged(work.entrant, work.number)
        return not self.result_file(work.entrant, work.name).is_file()

    # -- trials

    def study(self, entrant: Entrant) -> optuna.Study:
        """Optuna's study of one method.

        Raises:
            DamagedError: the journal cannot be read.
        """
        if entrant.name not in self._studies:
            journal = self.folder / "trials.log"
            advice = "put a copy back, or give the study another name"
            with damage_in_words(str(journal), advice):
                self._studies[entrant.name] = self._opened(entrant.name, journal)
        return self._studies[entrant.name]

    def _opened(self, name: str, journal: Path) -> optuna.Study:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.ERROR)
        logging.getLogger("optuna").setLevel(logging.ERROR)
        if self._storage is None:
            from studies.journal import storage_in

            self._storage = storage_in(journal, partial(self.claimed, "journal", wait=True))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the journal is experimental
            if name in optuna.get_all_study_names(self._storage):
                return optuna.load_study(study_name=name, storage=self._storage)
            return optuna.create_study(
                study_name=name, storage=self._storage, direction="maximize", load_if_exists=True
            )

    def _draw(self, work: Work) -> None:
        """Draws the values of a trial: the first has the given ones, the next random, then TPE's.

        A trial that was interrupted before it had all values gets the others.
        """
        import optuna

        space, study = work.entrant.space, self.study(work.entrant)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Before TPE begins there are two trials for each searched value. The seed depends on
            # the trial, so that processes do not draw the same random values.
            study.sampler = optuna.samplers.TPESampler(
                seed=work.number, n_startup_trials=max(STARTUP, 2 * len(space)), constant_liar=True
            )
            known = study.get_trials(deepcopy=False)
            if not known:
                study.enqueue_trial({one.name: one.first for one in space})
            begun = work.number < len(known) and known[work.number].state.name == "RUNNING"
            trial = self.optuna_trial(work) if begun else study.ask()
            for one in space:
                one.draw(trial)

    def optuna_trial(self, work: Work) -> optuna.Trial:
        """Optuna's trial, to report metrics to."""
        import optuna

        study = self.study(work.entrant)
        frozen = study.get_trials(deepcopy=False)[work.number]
        return optuna.Trial(study, frozen._trial_id)

    def trials(self, entrant: Entrant) -> list[Trial]:
        """All trials of a method."""
        found = []
        for frozen in self.study(entrant).get_trials(deepcopy=False):
            attributes = frozen.user_attrs
            names = (f"fold{number}" for number in range(self.plan.folds))
            folds = [attributes[name] for name in names if name in attributes]
            states = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}
            found.append(
                Trial(
                    frozen.number,
                    states.get(frozen.state.name, "running"),
                    {
                        r.name: r.rounded(frozen.params[r.name])
                        for r in entrant.space
                        if r.name in frozen.params  # all, once it has been drawn
                    },
                    frozen.value if frozen.state.name == "COMPLETE" else None,
                    tuple(folds),
                    sum(fold.get("seconds", 0.0) for fold in folds),
                    attributes.get("error", ""),
                )
            )
        return found

    def median(self, entrant: Entrant, step: int) -> float | None:
        """The median of what complete trials reported at a step; None if fewer than `STARTUP`."""
        import optuna

        finished = self.study(entrant).get_trials(
            deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,)
        )
        values = [t.intermediate_values.get(step, math.nan) for t in finished]
        values = [value for value in values if not math.isnan(value)]
        return statistics.median(values) if len(values) >= STARTUP else None

    def _chosen(self, trials: list[Trial]) -> Trial | None:
        """The best trial, once all have ended; of equal ones the first."""
        if len(trials) < self.plan.trials or any(t.state == "running" for t in trials):
            return None
        complete = [t for t in trials if t.reached is not None]
        return max(complete, key=lambda t: t.reached, default=None)

    def chosen(self, entrant: Entrant) -> Trial | None:
        """The best trial of a method, once all have ended; None before, and if all failed."""
        return self._chosen(self.trials(entrant))

    def left(self, entrant: Entrant) -> tuple[int, int]:
        """The numbers of trials and of runs of a method that are left; 0 if all trials failed."""
        trials = self.trials(entrant)
        ended = sum(trial.state != "running" for trial in trials)
        if ended == self.plan.trials and not self._chosen(trials):
            return 0, 0
        seeds = range(1, self.plan.seeds + 1)
        runs = sum(not self.is_judged(entrant, seed) for seed in seeds)
        return self.plan.trials - ended, runs

    # -- runs

    def result_file(self, entrant: Entrant, name: str) -> Path:
        """The file with the results of a run, or of the ensembles."""
        return self.folder / entrant.folder / f"{name}.json"

    def is_judged(self, entrant: Entrant, seed: int) -> bool:
        """Whether the run with this seed is done, or has failed."""
        return "values" in (self.result(entrant, f"seed{seed}") or {})

    def result(self, entrant: Entrant, name: str) -> dict[str, Any] | None:
        """The content of `result_file`; None if it does not exist yet.

        Raises:
            DamagedError: it cannot be read.
        """
        path = self.result_file(entrant, name)
        return _content(path, run_again(path))

    @property
    def is_finished(self) -> bool:
        """Whether all work is done."""
        return next(self._open(), None) is None


def run_again(path: Path) -> str:
    """Advice for a damaged file of results: `seedS.json` or `.npz`, or `togetherN.json`.

    The weights of most runs were deleted, so they must be trained again to be judged again.
    """
    run = path.with_suffix("")
    folder = f" and the folder {run}" if run.is_dir() else ""
    return f"delete it{folder}, and start the study again"


def _content(path: Path, advice: str) -> dict[str, Any] | None:
    """The entries of a JSON file; None if it does not exist."""
    if not path.is_file():
        return None
    with damage_in_words(str(path), advice):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("it has no entries")
        return content


def remove_weights(run: Path) -> None:
    """Removes a run's checkpoints, because a study has many runs."""
    for file in run.glob("*.pth"):
        file.unlink(missing_ok=True)  # another worker may remove them just now


def claim_of(work: Work) -> str:
    """The name of a piece of work's claim."""
    return f"{work.entrant.folder}-{work.name}"


def _check_same(kept: Mapping[str, Any], plan: Plan, folder: Path) -> None:
    new = plan.identity
    for entry in ("folds", "metric"):
        if kept[entry] != new[entry]:
            raise InputError(
                f"{folder} is a study with {entry} = {kept[entry]}, and this one has {new[entry]}; "
                "give this one another name, or put it back"
            )
    for name, known in kept["methods"].items():
        same = ("flags", "space")
        if name in new["methods"] and any(new["methods"][name][e] != known[e] for e in same):
            raise InputError(
                f"{folder} is a study in which {name} has other flags or another search; give this "
                f"one another name, or the method (it had: {' '.join(known['flags'])}; "
                f"{'; '.join(known['space'])})"
            )
