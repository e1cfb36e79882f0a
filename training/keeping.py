"""Everything a run writes and prints: checkpoints, rows, learned values, pictures, results."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import chain, count
from typing import Any

import numpy as np
import torch
from PIL import Image

import dataset
import processes
from dataset.own import OwnData
from evaluation.embedding import Embedded
from evaluation.files import random_neighbours
from evaluation.meanings import RAW
from evaluation.measuring import Result, print_doubts, print_thresholds, table
from metrics.verification import NAMES as VERIFICATION
from options import EVALUATED, METRICS
from runs import Checkpoint, MetricsRow, RunFolder, data_name
from terminal import as_shell, fitted, notice_if_slow, say, terminal_width
from training.collapse import CollapseWarning
from training.faults import NonFinite
from training.signals import Interrupted
from training.state import Training
from training.tracking import Tracker
from utils import InputError, human_seconds, program

logger = logging.getLogger("train")

LAST = "the last checkpoint"
"""What `RunFolder.trouble` calls it."""


class Keeper:
    """Writes a run into its folder, prints its progress and sends it to the trackers.

    At every stop the checkpoint is written before the evaluation, together with the row that the
    evaluation is to complete. So an interrupted evaluation is repeated, and no training is lost.

    Args:
        kept: how many older checkpoints remain. picture_every: epochs between two pictures of
            neighbours; 0 means no pictures.
    """

    def __init__(
        self,
        training: Training,
        run: RunFolder,
        tracker: Tracker,
        *,
        kept: int = 0,
        picture_every: int = 0,
    ) -> None:
        self.training = training
        self.run = run
        self.tracker = tracker
        self.kept = kept
        self.picture_every = picture_every
        self.collapse = CollapseWarning()

    # -- at every stop

    def save(self, row: MetricsRow | None = None) -> None:
        """Writes last.pth; a run that continues from it completes the `row` of metrics.csv."""
        state = {**self.training.state(), "row": row, "wandb_id": self.tracker.run_id}
        state["images"] = self.run.images
        with self.run.forgiving(LAST):
            self.run.save_last(state, self.kept)

    def save_end(self) -> None:
        """Replaces last.pth by one with the last evaluation's results, for a run that gets longer.

        Where that evaluation could not be kept, it stays: a run that continues repeats it.
        """
        if self._evaluation_is_kept():
            self.save()

    def _evaluation_is_kept(self) -> bool:
        """Whether all is written that an evaluation makes: checkpoint, row, learned values."""
        return processes.from_main(lambda: self.run.trouble.keys() <= {LAST})

    def complete(self, row: MetricsRow, results: Sequence[Result] | None) -> None:
        """Adds the results of an evaluation, if there was one, then writes and prints the row."""
        if row.get("loss") == 0:
            logger.warning(
                "the loss was exactly 0 in every step of epoch %d, so the network learned nothing; "
                "look at the margin of the loss, and at --IPC and --batch-size",
                row["epoch"],
            )
        if results is not None:
            row["evaluation_seconds"] = sum(result.seconds for result in results)
            row |= flat(results)
            self._judge(row["epoch"], results)
            self._show(row["epoch"], results[0])
        with self.run.forgiving("metrics.csv"):
            self.run.metrics.append(row)
        with self.run.forgiving("classes.npz"):
            self._remember_classes(row)
        best = self.training.clock.best
        best = {"best R@1": best} if "R@1" in row and best >= 0 else {}
        self.tracker.log(row | best, self.training.clock.step)
        say(self.progress_line(row), flush=True)

    def _judge(self, epoch: int, results: Sequence[Result]) -> None:
        """Keeps the best checkpoint, and warns of a collapse."""
        training, clock = self.training, self.training.clock
        labels = torch.from_numpy(training.data.selection[0].queries.labels)
        reached = results[0].numbers["R@1"]
        self.collapse.look(results[0].embeddings, labels, reached)
        if reached > clock.best:
            with self.run.forgiving("the best checkpoint"):
                self.run.save_best(training.best_checkpoint(results))
                # Only now, because the best checkpoint is the one that could be written.
                clock.best, clock.best_epoch = reached, epoch
                self._write_learned_values()

    def _show(self, epoch: int, result: Result) -> None:
        """Sends histograms and, now and then, a picture to the trackers."""
        training, step = self.training, self.training.clock.step
        for name, values in training.objective.class_values().items():
            self.tracker.log_histogram(f"{name}s", values.cpu().numpy(), step)
        if self.picture_due(epoch):
            draw = partial(_neighbours, result)
            self.tracker.log_picture("neighbours", draw, step)

    def picture_due(self, epoch: int) -> bool:
        """Whether to send a picture now: every `picture_every` epochs, and at the end.

        If such an epoch has no evaluation, the picture comes with the next one.
        """
        every = self.picture_every
        if not every or self.training.finished:
            return bool(every)
        # Decided by the epoch alone, so that a continued run draws the same pictures.
        gap = self.training.length.epochs_between_evaluations(len(self.training.loader))
        return epoch // every > (epoch - gap) // every

    def _write_learned_values(self) -> None:
        """One CSV for each value the criterion learned per class: margins.csv for AMLoss."""
        train = self.training.data.train
        counts = np.bincount(train.labels, minlength=train.num_classes)
        for name, values in self.training.objective.class_values().items():
            order = torch.argsort(values, stable=True).tolist()
            rows = [
                [train.class_names[c], f"{float(values[c]):.6f}", int(counts[c])] for c in order
            ]
            self.run.write_table(f"{name}s.csv", ["class", name, "images"], rows)

    def _remember_classes(self, row: MetricsRow) -> None:
        """Keeps what the criterion has learned for each class so far, for the report."""
        train = self.training.data.train
        counts = np.bincount(train.labels, minlength=train.num_classes)
        learned = self.training.objective.class_values()
        values = {name: tensor.cpu().numpy() for name, tensor in learned.items()}
        self.run.classes.append(row["epoch"], row["step"], train.class_names, counts, values)

    def progress_line(self, row: MetricsRow) -> str:
        """A row as one line; on a narrow terminal the least important parts are left out."""
        clock = self.training.clock
        found = raw = best = epoch = ""
        if "R@1" in row:
            found = f"  R@1 {row['R@1']:.4f}"
            found += f"  MAP@R {row['MAP@R']:.4f}" if math.isfinite(row["MAP@R"]) else ""
            raw = f"  raw R@1 {row['raw R@1']:.4f}" if "raw R@1" in row else ""
            if clock.best >= 0:  # a best checkpoint could be written
                best, epoch = f"  best {clock.best:.4f}", f" (epoch {clock.best_epoch})"
        loss = row.get("loss", math.nan)  # nan if every step was skipped
        begin = f"{self.training.length.place(row['epoch'], row['step'])}  loss {loss:<7.4g}"
        speed = f"  {row['images_per_second']:.0f} img/s"
        waiting, end = f"  waiting {row['data_wait']:.0%}", f"  {human_seconds(clock.seconds)}"
        parts, room = [begin, found, raw, best, epoch, speed, waiting, end], terminal_width()
        for least in (waiting, speed, epoch, raw):
            if room is not None and len("".join(parts)) > room:
                parts.remove(least)
        return fitted("".join(parts), "  ")

    # -- interruptions, faults and the end

    def stopped(self, by: Interrupted) -> str:
        """What to print when a signal ends the program: how to continue."""
        path = as_shell(self.run.path)
        if self.training.finished and self.run.is_finished:
            return (
                f"stopped by {by.name} when the run had ended; its page is made by:\n"
                f"  {program('report')} {path}"
            )
        return (
            f"stopped by {by.name} at step {self.training.clock.step}; continue with:\n"
            f"  {program('train')} --resume-run {path}"
        )

    def recorded(self, fault: NonFinite) -> InputError:
        """Writes the record of a fault; returns the error whose sentence says where it is."""
        paths = self.training.data.train.paths
        record = {**fault.record, "images": [paths[i] for i in fault.record["index"]]}
        with self.run.forgiving(self.run.fault_path.name):
            self.run.write_fault(record)
            return InputError(f"{fault}; its images are listed in {self.run.fault_path}")
        return fault

    def conclude(self, *, look_at_test: bool = True, page: bool = True) -> None:
        """Prints the results of a run, and writes its page.

        Raises:
            InputError: some file of the run could not be written, even in the end. Unless it is
                an older checkpoint, the run is not finished, and makes up for it if it continues.
        """
        self.training.give_back()  # the page needs memory beside this network
        if processes.from_main(lambda: "the best checkpoint" not in self.run.trouble):
            self._say_results(look_at_test)
            if page:
                self._write_page()
        if not self._evaluation_is_kept():
            path = as_shell(self.run.path)
            say(f"what could not be written is made by:\n  {program('train')} --resume-run {path}")
        for error in self.run.trouble.values():
            raise error

    @processes.main_only
    def _write_page(self) -> None:
        """Writes report.html; an error there is only a warning, because the run is finished."""
        # Imported here, because it loads scipy, which would delay the start by half a second.
        from page.making import make as page_of_runs

        try:
            with processes.alone(), notice_if_slow("making the report page"):
                made = page_of_runs([self.run.path], gpu_id=max(0, self.training.options["gpu_id"]))
                say(f"report:     {made}", flush=True)
        except Exception as error:  # it touches data, network, disk: none may fail a finished run
            logger.warning(
                "no report page (%s); %s %s makes it",
                " ".join(str(error).split()) or type(error).__name__,
                program("report"),
                as_shell(self.run.path),
            )

    def _say_results(self, look_at_test: bool) -> None:
        """Prints and writes the best checkpoint's numbers, and prints where everything lies."""
        training, run = self.training, self.run
        checkpoint = processes.from_main(run.load_best)
        say(fitted(f"\n{self._picked(look_at_test)}"))
        results, verified = self._final_results(checkpoint, look_at_test)
        found = {
            "best_epoch": training.clock.best_epoch,
            "picked_on": "nothing: evaluated once"
            if self._evaluated_once
            else training.data.picked_on,
            "results": {result.title: result.numbers for result in results},
            **_verification(verified),
        }
        if self._evaluation_is_kept():  # this file says that the run is finished
            run.write_results(found)
        say(table(results))
        print_doubts(results)
        print_thresholds(verified[:1])
        say(f"run folder: {run.path}")
        say(f"evaluate:   {program('evaluate')} --resume {as_shell(run.path)}")
        for line in self._about_search():
            say(line)

    def _final_results(
        self, checkpoint: Checkpoint, look_at_test: bool
    ) -> tuple[list[Result], list[Result]]:
        """All metrics of the best checkpoint, and its results for verification.

        If its evaluation during training was on the same classes and computed all metrics, only
        verification is left to be computed.
        """
        training = self.training
        training.load_best(checkpoint)
        judged = training.data.selects_on_test
        judged = judged and set(METRICS) <= {"retrieval", *training.chosen}
        if "metrics" in checkpoint and (judged or not look_at_test):
            kept = checkpoint["metrics"].items()
            results = [Result(title, n, torch.empty(0), None, 0.0) for title, n in kept]
            return results, training.evaluate(training.data.selection, ["verification"])
        verified = training.evaluate(training.data.test, EVALUATED)
        return [_without_verification(result) for result in verified], verified

    def _about_search(self) -> list[str]:
        """Commands to paste that make the user's own images searchable."""
        data = dataset.find(self.training.options["dataset"])
        if not isinstance(data, OwnData):
            return []
        index = _free_index(data_name(self.training.options["dataset"]))
        search = program("search")
        build = f"{search} build {as_shell(self.run.path, '--images', data.path)}"
        return [
            f"search:     {build} --index {as_shell(index)}",
            f"            {search} serve {as_shell(index)}",
        ]

    @property
    def _evaluated_once(self) -> bool:
        """Whether the run was evaluated only once, so that no epoch was picked."""
        return sum(bool(row.get("R@1")) for row in self.run.metrics.rows()) == 1

    def _picked(self, look_at_test: bool) -> str:
        """Which epoch the results are of, and how it was picked."""
        clock = self.training.clock
        if self.training.data.selects_on_test:
            if self._evaluated_once:
                return f"Evaluated once, after epoch {clock.best_epoch}; no epoch was picked:"
            return f"Best epoch {clock.best_epoch} by R@1 on the test classes, as the papers do:"
        last = "The test classes, looked at once:" if look_at_test else "The same classes:"
        return (
            f"Epoch {clock.best_epoch} had the best R@1 on the validation classes "
            f"({clock.best:.4f}). {last}"
        )


def _free_index(name: str) -> str:
    """A name for an index that no file in the current folder has; `build` overwrites none."""
    names = chain([name], (f"{name}-{number}" for number in count(2)))
    return next(index for each in names if not os.path.lexists(index := f"{each}.index"))


def _without_verification(result: Result) -> Result:
    kept = {name: v for name, v in result.numbers.items() if name not in VERIFICATION}
    return replace(result, numbers=kept)


def _verification(results: Sequence[Result]) -> dict[str, Any]:
    """The entries of results.json for verification, by the results' titles."""
    numbers = {
        result.title: {name: result.numbers[name] for name in VERIFICATION} for result in results
    }
    found = {result.title: result.thresholds.as_dict() for result in results if result.thresholds}
    return {"verification": numbers, "thresholds": found}


def flat(results: Sequence[Result]) -> dict[str, float]:
    """The numbers of all evaluations by name; names of all but the first begin with its title.

    If a running mean of the weights is evaluated too, the raw weights' names begin with `raw`.
    """
    found: dict[str, float] = {}
    for result in results:
        title, raw, _ = result.title.partition(RAW)
        words = [*([title] if title != results[0].title else []), *(["raw"] if raw else [])]
        found |= {" ".join([*words, name]): value for name, value in result.numbers.items()}
    return found


def _neighbours(result: Result) -> Image.Image:
    """Ten random queries, the same in every epoch, and what is nearest to them."""
    shown = Embedded(result.task, result.embeddings, result.gallery)
    return random_neighbours(shown, seed=1, top=10)
