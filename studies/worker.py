"""Does a piece of work: a trial, a run with a seed, or the ensembles of a method's seeds."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from page.records import Record, metrics_in
from storage import write_json
from studies import judging
from studies.ledger import Ledger, Work, remove_weights
from studies.places import Place
from studies.trainer import STOPPED, Failed, Stopped, Trainer, Watch, failure, last_words
from utils import our_command


class Worker:
    """Does pieces of work at one place; the caller holds their claims.

    Attributes:
        done: is called after each training, with a sentence about it.
    """

    def __init__(
        self, ledger: Ledger, trainer: Trainer, place: Place, done: Callable[[str], None]
    ) -> None:
        self.ledger, self.trainer, self.place, self.done = ledger, trainer, place, done

    def do(self, work: Work) -> None:
        """Does a piece of work.

        Raises:
            Stopped: the study shall stop.
            InputError: the machine is at fault, so that other work would fail, too.
        """
        {"trial": self._trial, "seed": self._seed, "together": self._together}[work.kind](work)

    def _trial(self, work: Work) -> None:
        """Leaves out each fold in turn and trains on the others, unless the trial is pruned."""
        import optuna

        plan, entrant = self.ledger.plan, work.entrant
        trial = self.ledger.optuna_trial(work)
        study = self.ledger.study(entrant)
        values = self.ledger.trials(entrant)[work.number].values
        for fold in range(plan.folds):
            if f"fold{fold}" in trial.user_attrs:
                continue
            name = f"{work.name}-fold{fold}"
            flags = [*entrant.command(values), *plan.flags_of_fold(fold)]
            watch = Watch(trial, self.ledger, entrant, fold)
            try:
                record = self.trainer.train(work, name, flags, self.place, watch)
                reached = _reached(record, plan.metric)
            except Failed as error:
                trial.set_user_attr("error", str(error))
                study.tell(trial, state=optuna.trial.TrialState.FAIL)
                self.done(f"{work.title}: failed: {error}")
                return
            trial.set_user_attr(f"fold{fold}", reached)
            remove_weights(record.path)
            if watch.pruned:
                study.tell(trial, state=optuna.trial.TrialState.PRUNED)
                self.done(f"{work.title}: stopped early, behind the others")
                return
            if fold < plan.folds - 1:
                about = f"{work.title}, fold {fold + 1} of {plan.folds}"
                self.done(f"{about}: {plan.metric} {reached[plan.metric]:.4f}")
        found = [trial.user_attrs[f"fold{fold}"][plan.metric] for fold in range(plan.folds)]
        mean = sum(found) / len(found)
        study.tell(trial, mean)
        self.done(f"{work.title}: {plan.metric} {mean:.4f} on the folds")

    def _seed(self, work: Work) -> None:
        """Trains on all training classes with the chosen values, and judges the last epoch."""
        ledger, entrant = self.ledger, work.entrant
        chosen = ledger.chosen(entrant)
        assert chosen is not None
        out = ledger.result_file(entrant, work.name)
        flags = [*entrant.command(chosen.values), "--seed", str(work.number)]
        try:
            flags += ["--metrics", "retrieval"]
            record = self.trainer.train(work, work.name, flags, self.place)
            self._judge(work, record.path / "last.pth", out)
        except Failed as error:
            write_json(out, {"error": str(error), "values": dict(chosen.values)})
            self.done(f"{work.title}: failed: {error}")
            return
        found = ledger.result(entrant, work.name) or {}
        about = {"values": dict(chosen.values), "seconds": record.seconds, **_bonus(record)}
        write_json(out, found | about)
        if work.number > 1:  # the first seed keeps its weights, for pages, searches and exports
            remove_weights(record.path)
        metric = ledger.plan.metric
        first = next(iter(found["results"].values()))
        self.done(f"{work.title}: {metric} {first[metric]:.4f} on the test classes")

    def _judge(self, work: Work, checkpoint: Path, out: Path) -> None:
        command = [*our_command("studies.judging"), str(checkpoint)]
        command += [str(out.with_suffix("")), str(self.place.gpu or 0)]
        # In the current folder, to which paths in the run's options are relative.
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=self.place.environment,
            start_new_session=True,
        )
        if done.returncode in STOPPED or self.trainer.stopping.is_set():
            raise Stopped
        if done.returncode:
            raise failure(work, last_words(done.stderr, done.returncode), done.returncode)

    def _together(self, work: Work) -> None:
        """Measures the ensembles of the seeds, and removes their embeddings."""
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


def _reached(record: Record, metric: str) -> dict[str, float]:
    """The metrics of the last evaluation of a fold, with its epoch and the seconds of training.

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
    """R@1 of the best and of the last epoch, which show the gain from picking on test classes."""
    values = [row["R@1"] for row in record.evaluated]
    return {"best R@1": max(values), "last R@1": values[-1], "evaluations": len(values)}
