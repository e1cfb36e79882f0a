"""One run: everything that changes while it trains, and the checkpoints of it."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, TypeVar

import torch

import losses
import net
import processes
from dataset import TrainedOn
from dataset.loader import Batch, Loader
from devices import Precision, environment, random_states, restore_random_states
from evaluation.embedding import Viewing, embed
from evaluation.meanings import RAW, without_counts
from evaluation.measuring import How, Result, measure
from evaluation.tasks import Task
from methods import Routine
from runs import Checkpoint, MetricsRow
from training.average import Average
from training.clock import Clock, Estimate, Lap, Length
from training.data import Data
from training.faults import Watch
from training.optim import Optimisers
from utils import InputError, damage_in_words, is_full_gpu

logger = logging.getLogger("train")

T = TypeVar("T")


@dataclass
class Training:
    """The parts of a run.

    Attributes:
        options: as args.json and checkpoints keep them. They are only stored here, not read.
        chosen: the metrics that evaluations compute, see `options.METRICS`.
        seed: of the evaluations' random draws.
        micro_batch: how many images a process embeds at once in a step; None is all it has.
        average: the running mean of the network's weights; None without --ema.
        batches: the rest of the current epoch; None between two epochs.
        base: describes the weights that checkpoints leave out, see `net.base`; None if they leave
            out none.
    """

    data: Data
    network: net.EmbeddingNet
    objective: losses.Objective
    optimisers: Optimisers
    routines: list[Routine]
    loader: Loader
    precision: Precision
    viewing: Viewing
    length: Length
    watch: Watch
    options: dict[str, Any]
    chosen: Sequence[str]
    seed: int
    micro_batch: int | None = None
    average: Average | None = None
    clock: Clock = field(default_factory=Clock)
    lap: Lap = field(default_factory=Lap)
    batches: Iterator[Batch] | None = None
    estimate: Estimate = field(default_factory=Estimate)
    base: dict[str, Any] | None = None

    # -- progress

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.clock.epoch

    @property
    def epoch_ended(self) -> bool:
        """Whether all batches of the current epoch are done."""
        return self.clock.step_in_epoch >= len(self.loader)

    @property
    def finished(self) -> bool:
        """Whether the run has reached its full length."""
        return self.length.is_over(self.clock)

    @property
    def stops_here(self) -> bool:
        """Whether a row of metrics.csv ends here: an epoch, an evaluation or the run does."""
        at_an_end = self.epoch_ended or self.finished or self.length.evaluates_at(self.clock)
        return bool(self.lap.images) and at_an_end

    def took(self, seconds: float) -> None:
        """Adds to the seconds of training: of the run, and since the last row of metrics.csv."""
        self.clock.seconds += seconds
        self.lap.seconds += seconds

    # -- a training step

    def outputs(self, images: torch.Tensor, batch: Batch) -> losses.Embeddings:
        """The outputs for the whole batch, gathered from the `images` of each process."""
        total = len(batch.labels)
        most = math.ceil(total / processes.world())  # images of one process
        pieces = 1 if self.micro_batch is None else math.ceil(most / self.micro_batch)
        with self.precision.autocast():
            made = self.network(images, cluster=batch.cluster, pieces=pieces)
        return losses.Embeddings(
            *(None if rows is None else processes.gather_rows(rows, total) for rows in made)
        )

    # -- evaluation

    def embed_training_images(self, *, pooled: bool) -> torch.Tensor:
        """Pooled features (N, F), or embeddings (N, d), of the training images, not augmented."""
        made, _ = self._with_room(
            lambda: embed(
                self.network,
                self.data.train,
                self.precision,
                self.viewing,
                title="clustering",
                represent=self.network.features if pooled else None,
            )
        )
        return made

    def evaluate(self, tasks: list[Task], chosen: Sequence[str] = ()) -> list[Result]:
        """Evaluates the network as it is now.

        If a running mean of the weights is kept, its results come first, followed by those of the
        weights themselves (`TITLE, raw weights`).

        Args:
            tasks: images that turn out not to be readable are taken out of this list's tasks.
            chosen: the metrics to compute; empty means those of --metrics.
        """
        if self.average is None:
            return self._evaluated(tasks, chosen)
        with self.average.in_place():
            results = self._evaluated(tasks, chosen)
        return results + [_of_raw_weights(result) for result in self._evaluated(tasks, chosen)]

    def _evaluated(self, tasks: list[Task], chosen: Sequence[str]) -> list[Result]:
        how = How(chosen or ("retrieval", *self.chosen), self.seed)
        seen = self.precision, self.viewing, how
        results = [self._with_room(partial(measure, self.network, task, *seen)) for task in tasks]
        tasks[:] = [result.task for result in results]
        return results

    def _with_room(self, look: Callable[[], T]) -> T:
        """Returns `look()`, which computes something and changes nothing.

        A recorded step (net/replay.py) keeps its memory between the steps, and a small GPU may have
        too little left beside it. Then the recording is dropped and `look` is called once more.
        Steps are not recorded again, because the next evaluation would end that recording too.
        """
        try:
            return look()
        except RuntimeError as error:
            if not (is_full_gpu(error) and self.network.is_recorded):
                raise
        logger.warning(
            "the GPU has no room for an evaluation beside the recorded training step, so steps are "
            "no longer recorded, and slower for it (as with --cuda-graphs 0)"
        )
        self.give_back()  # outside `except`, whose error would keep the first try's tensors alive
        return look()

    def give_back(self) -> None:
        """Frees the GPU memory that only training steps use: recordings and gradients."""
        self.network.record(False)
        self.optimisers.forget_gradients()
        if self.precision.device.type == "cuda":  # a recording is held by circles of objects
            gc.collect()

    # -- checkpoints

    def running_statistics(self) -> list[torch.Tensor]:
        """Buffers that a forward pass changes and that must be restored when a step is skipped."""
        return [*self.network.buffers(), *self.objective.buffers()]

    def end_lap(self, epoch: int) -> MetricsRow:
        """Ends the lap and begins a new one; returns its row of metrics.csv, numbered `epoch`."""
        row: MetricsRow = {"epoch": epoch, **self.lap.summary()}
        row |= {"step": self.clock.step, "seconds": self.clock.seconds}
        row |= {f"lr {name}": lr for name, lr in self.optimisers.learning_rates().items()}
        self.lap = Lap()
        return row

    def _network_state(self) -> dict[str, Any]:
        """The entries of a checkpoint for the network and whatever is needed to use it.

        With PEFT the network's base is left out.
        """
        entries = {
            "model_state_dict": self.network.trained_state(),
            "network": self.network.description(),
            "data": TrainedOn.of(self.data.train).as_entry(),
        }
        return entries | ({"base": self.base} if self.base else {})

    def best_checkpoint(self, results: Sequence[Result]) -> Checkpoint:
        """The content of the best checkpoint: weights, options and results."""
        return {
            **self._network_state(),
            "criterion_state_dict": self.objective.state_dict(),
            "args": self.options,
            "epoch": self.clock.epoch,
            "step": self.clock.step,
            "metrics": {result.title: result.numbers for result in results},
            **self._mean(),
        }

    def _mean(self) -> dict[str, Any]:
        """The entries of a checkpoint for the running mean; empty without one."""
        return {} if self.average is None else self.average.state()

    def bytes_on_disk(self, kept: int = 0) -> int:
        """Size of all checkpoints of the run: the best, the last, and `kept` older ones."""
        weights = _bytes(self.network.trained_state())
        mean = 0 if self.average is None else weights
        weights += mean + _bytes(self.objective.state_dict())
        last = weights + self.optimisers.bytes_of_state()
        return _bytes(self.network.base_state()) + weights + last * (1 + kept)

    def load_best(self, checkpoint: Checkpoint) -> None:
        """Loads the weights of a `best_checkpoint`, once training is over."""
        self.network.load_state_dict(checkpoint["model_state_dict"])
        if self.average is not None:
            self.average.load(checkpoint)

    def state(self) -> Checkpoint:
        """The content of last.pth: everything that a continued run needs."""
        return {
            **self._network_state(),
            "criterion_state_dict": self.objective.state_dict(),
            "optimisers": self.optimisers.state_dict(),
            "routines": [routine.state_dict() for routine in self.routines],
            "clock": vars(self.clock).copy(),
            "lap": vars(self.lap).copy(),
            "skipped": self.watch.skipped,
            "random": random_states(),
            "args": self.options,
            "environment": environment(self.precision.device),
            **self._mean(),
        }

    def load_state(self, state: Checkpoint) -> None:
        """Continues from `state()`.

        Raises:
            InputError: the state is damaged, or is not that of such a training; or the version that
                began the run built another network from the same options.
        """
        with damage_in_words(
            "the last checkpoint", "use an older one (step_N.pth), or start again"
        ):
            self._load_state(state)

    def _load_state(self, state: Checkpoint) -> None:
        clock = {"begun": state["clock"]["step_in_epoch"] > 0, **state["clock"]}  # once not kept
        for part, name, stored in ((self.clock, "clock", clock), (self.lap, "lap", state["lap"])):
            own = vars(part)
            if not (stored.keys() <= own.keys() and all(alike(stored[k], own[k]) for k in stored)):
                raise ValueError(f"its {name} is not that of a training")
            own.update(stored)
        device = self.precision.device
        self.lap.sums = {name: total.to(device) for name, total in self.lap.sums.items()}
        self.watch.skipped = state["skipped"]
        for routine, content in zip(self.routines, state["routines"], strict=True):
            routine.load_state_dict(content, self)
        self._load_network(state["model_state_dict"])
        self.base = state.get("joined_base")
        if self.average is not None:
            self.average.load(state)
        self.objective.load_state_dict(state["criterion_state_dict"])
        self.optimisers.load_state_dict(state["optimisers"])
        restore_random_states(state["random"])

    def _load_network(self, weights: dict[str, torch.Tensor]) -> None:
        own = {key: value.shape for key, value in self.network.state_dict().items()}
        stored = {key: value.shape for key, value in weights.items()}
        for key in [*stored, *own]:
            if stored.get(key) != own.get(key):
                raise InputError(
                    "this run was begun by a version of the code that built another network from "
                    f"the same options ({key} differs); continue it with that version, or start a "
                    "new run"
                )
        self.network.load_state_dict(weights)


def _bytes(state: Mapping[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def _of_raw_weights(result: Result) -> Result:
    """A result of the raw weights, without what it shares with the result of their mean."""
    numbers = without_counts(result.numbers)
    bare = replace(result, embeddings=torch.empty(0), gallery=None, per_query=None)
    return replace(bare, title=result.title + RAW, numbers=numbers)


def alike(stored: Any, own: Any) -> bool:
    """Whether a stored value can replace `own`: whether its kind, size and range fit.

    If `own` is an empty dictionary, the stored one may hold any finite numbers.
    """
    match own:
        case dict() if not own:
            return isinstance(stored, dict) and all(map(_is_number, stored.values()))
        case dict():
            return isinstance(stored, dict) and all(
                name in stored and alike(stored[name], value) for name, value in own.items()
            )
        case list() | tuple():
            same = isinstance(stored, list | tuple) and len(stored) == len(own)
            return same and all(map(alike, stored, own))
        case bool() | str() | None:
            return type(stored) is type(own)
    return _is_number(stored) and (isinstance(own, float) or isinstance(stored, int))


def _is_number(value: Any) -> bool:
    """Whether it is a finite float, an integer from 0 on, or a 0-d tensor."""
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and not value.is_complex()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and (isinstance(value, float) or 0 <= value < 2**63)
