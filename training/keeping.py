"""What a run writes and says: checkpoints, rows, learned values, pictures, its last words."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
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
from terminal import as_shell, fitted, say, terminal_width, told
from training.collapse import CollapseWarning
from training.faults import NonFinite
from training.signals import Interrupted
from training.state import Training
from training.tracking import Tracker
from utils import InputError, human_seconds, program

logger = logging.getLogger("train")


class Keeper:
    """Keeps a run in its folder, and tells of it there, on the screen and to the trackers.

    At every stop the checkpoint is written before the evaluation, with the row that the evaluation
    completes. So where an evaluation is interrupted, it is made again, and no training is lost.

    Args:
        kept: how many older checkpoints remain. picture_every: epochs between pictures of
            neighbours; 0 is none.
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
        """Writes last.pth; who continues from it completes the `row` of metrics.csv."""
        state = {**self.training.state(), "row": row, "wandb_id": self.tracker.run_id}
        state["images"] = self.run.images
        with self.run.forgiving("the last checkpoint"):
            self.run.save_last(state, self.kept)

    def complete(self, row: MetricsRow, results: Sequence[Result] | None) -> None:
        """Adds what an evaluation gave, where there was one, then writes and prints the row."""
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
        say(self.line(row), flush=True)

    def _judge(self, epoch: int, results: Sequence[Result]) -> None:
        """Keeps the best checkpoint, and warns of a collapse."""
        training, clock = self.training, self.training.clock
        labels = torch.from_numpy(training.data.selection[0].queries.labels)
        reached = results[0].numbers["R@1"]
        self.collapse.look(results[0].embeddings, labels, reached)
        if reached > clock.best:
            with self.run.forgiving("the best checkpoint"):
                self.run.save_best(training.best_checkpoint(results))
                # Only now: the best checkpoint is the one that was written.
                clock.best, clock.best_epoch = reached, epoch
                self._write_learned_values()

    def _show(self, epoch: int, result: Result) -> None:
        """Histograms and, now and then, a picture for the trackers."""
        training, step = self.training, self.training.clock.step
        for name, values in training.objective.class_values().items():
            self.tracker.log_histogram(f"{name}s", values.cpu().numpy(), step)
        if self.picture_due(epoch):
            draw = partial(_neighbours, result)
            self.tracker.log_picture("neighbours", draw, step)

    def picture_due(self, epoch: int) -> bool:
        """Whether there is to be a picture now: every `picture_every` epochs, and at the end.

        Where there is no evaluation at such an epoch, at the next one.
        """
        every = self.picture_every
        if not every or self.training.finished:
            return bool(every)
        # From the epoch alone, so that a continued run draws what an uninterrupted one does.
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
        """What the criterion has learned for each class at this row, for the report."""
        train = self.training.data.train
        counts = np.bincount(train.labels, minlength=train.num_classes)
        learned = self.training.objective.class_values()
        values = {name: tensor.cpu().numpy() for name, tensor in learned.items()}
        self.run.classes.append(row["epoch"], row["step"], train.class_names, counts, values)

    def line(self, row: MetricsRow) -> str:
        """One line of results; what matters least is left out where a terminal is narrow."""
        clock = self.training.clock
        found = best = ""
        if "R@1" in row:
            found = f"  R@1 {row['R@1']:.4f}"
            found += f"  MAP@R {row['MAP@R']:.4f}" if math.isfinite(row["MAP@R"]) else ""
            found += f"  raw R@1 {row['raw R@1']:.4f}" if "raw R@1" in row else ""
            if clock.best >= 0:  # and could be kept
                found += f"  best {clock.best:.4f}"
                best = f" (epoch {clock.best_epoch})"
        loss = row.get("loss", math.nan)  # of an epoch in which every step was skipped
        begin = f"{self.training.length.place(row['epoch'], row['step'])}  loss {loss:<7.4g}"
        speed = f"  {row['images_per_second']:.0f} img/s"
        waiting, end = f"  waiting {row['data_wait']:.0%}", f"  {human_seconds(clock.seconds)}"
        lines = [
            begin + found + best + speed + waiting + end,
            begin + found + best + speed + end,
            begin + found + best + end,
            begin + found + end,
        ]
        room = terminal_width() or math.inf
        return next((line for line in lines if len(line) <= room), fitted(lines[-1], "  "))

    # -- going wrong, and the end

    def stopped(self, by: Interrupted) -> str:
        """What is said where a signal ended the program: how to have the rest."""
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
        """The fault as a sentence that says where its record, images included, was written."""
        paths = self.training.data.train.paths
        record = {**fault.record, "images": [paths[i] for i in fault.record["index"]]}
        with self.run.forgiving(self.run.fault_path.name):
            self.run.write_fault(record)
            return InputError(f"{fault}; its images are listed in {self.run.fault_path}")
        return fault

    def conclude(self, *, look_at_test: bool = True, page: bool = True) -> None:
        """The last words of a run, and its page.

        Raises:
            InputError: something of the run could not be written to the end.
        """
        self.training.give_back()  # the page is made beside this network
        if processes.from_main(lambda: "the best checkpoint" not in self.run.trouble):
            self._say_results(look_at_test)
            if page:
                self._write_page()
        for error in self.run.trouble.values():
            raise error

    @processes.main_only
    def _write_page(self) -> None:
        """report.html; whatever goes wrong with it, the run has ended well."""
        # Loaded with scipy, which takes half a second: at the end nobody waits for it.
        from page.making import make as page_of_runs

        try:
            with processes.alone(), told("making the report page"):
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
        """The best checkpoint's numbers, and where everything lies."""
        training, run = self.training, self.run
        checkpoint = processes.from_main(run.load_best)
        say(fitted(f"\n{self._picked(look_at_test)}"))
        results, verified = self._final_results(checkpoint, look_at_test)
        run.write_results(
            {
                "best_epoch": training.clock.best_epoch,
                "picked_on": "nothing: evaluated once"
                if self._evaluated_once
                else training.data.picked_on,
                "results": {result.title: result.numbers for result in results},
                **_verification(verified),
            }
        )
        say(table(results))
        print_doubts(results)
        print_thresholds(verified[:1])
        say(f"run folder: {run.path}")
        say(f"evaluate:   {program('evaluate')} --resume {as_shell(run.best_checkpoint())}")
        for line in self._about_search():
            say(line)

    def _final_results(
        self, checkpoint: Checkpoint, look_at_test: bool
    ) -> tuple[list[Result], list[Result]]:
        """What the best checkpoint reaches: all metrics; and the comparison of all pairs.

        Where its own evaluation was on the same classes and computed all metrics, only the pairs
        are left to be compared.
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
        """How one's own images become searchable, as commands to be pasted."""
        data = dataset.find(self.training.options["dataset"])
        if not isinstance(data, OwnData):
            return []
        index = f"{data_name(self.training.options['dataset'])}.index"
        search = program("search")
        build = f"{search} build {as_shell(self.run.path, '--images', data.path)}"
        return [
            f"search:     {build} --index {as_shell(index)}",
            f"            {search} serve {as_shell(index)}",
        ]

    @property
    def _evaluated_once(self) -> bool:
        """Whether there was nothing to pick an epoch from."""
        return sum(bool(row.get("R@1")) for row in self.run.metrics.rows()) == 1

    def _picked(self, look_at_test: bool) -> str:
        """Which epoch the last words are about, and by what it was picked."""
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


def _without_verification(result: Result) -> Result:
    kept = {name: v for name, v in result.numbers.items() if name not in VERIFICATION}
    return replace(result, numbers=kept)


def _verification(results: Sequence[Result]) -> dict[str, Any]:
    """What results.json keeps of the comparison of all pairs, by the results' titles."""
    numbers = {
        result.title: {name: result.numbers[name] for name in VERIFICATION} for result in results
    }
    found = {result.title: result.thresholds.as_dict() for result in results if result.thresholds}
    return {"verification": numbers, "thresholds": found}


def flat(results: Sequence[Result]) -> dict[str, float]:
    """The numbers of all evaluations by name, with the title before the name but for the first one.

    Where a running mean of the weights is evaluated too, the raw weights' names begin with `raw`.
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
