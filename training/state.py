"""One run: everything that changes while it goes on, and what is kept of it."""

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
        options: as args.json and checkpoints keep them; nothing is decided by them here.
        chosen: what evaluations compute, see `options.METRICS`.
        seed: of the evaluations' draws.
        micro_batch: how many images a process embeds at once in a step; None is all it has.
        average: the running mean of the network's weights; None without --ema.
        batches: the rest of the running epoch.
        base: what the weights are that checkpoints leave out, see `net.base`; None: there are none.
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

    # -- where it stands

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return self.clock.epoch

    @property
    def epoch_ended(self) -> bool:
        """Whether all batches of the running epoch are done."""
        return self.clock.step_in_epoch >= len(self.loader)

    @property
    def finished(self) -> bool:
        """Whether the run has its whole length."""
        return self.length.is_over(self.clock)

    @property
    def stops_here(self) -> bool:
        """Whether a row ends here: with the epoch, at an evaluation, or with the run."""
        at_an_end = self.epoch_ended or self.finished or self.length.evaluates_at(self.clock)
        return bool(self.lap.images) and at_an_end

    # -- what a step does with images

    def outputs(self, images: torch.Tensor, batch: Batch) -> losses.Embeddings:
        """The network's outputs for a whole batch, in every process, from each one's `images`."""
        total = len(batch.labels)
        most = math.ceil(total / processes.world())  # images that a process has
        pieces = 1 if self.micro_batch is None else math.ceil(most / self.micro_batch)
        with self.precision.autocast():
            made = self.network(images, cluster=batch.cluster, pieces=pieces)
        return losses.Embeddings(
            *(None if rows is None else processes.gather_rows(rows, total) for rows in made)
        )

    # -- looking at images

    def embed_training_images(self, *, pooled: bool) -> torch.Tensor:
        """Training images as evaluation sees them: pooled features (N, F), or embeddings (N, d)."""
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
        """Evaluates the network as it is: by what --metrics chooses, or as told here.

        Where a running mean of the weights is kept, it comes first, and then the weights themselves
        (`TITLE, raw weights`). Images that cannot be read are taken out of `tasks`.
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
        """What `look` returns, which looks at images and changes nothing.

        A recorded step (net/replay.py) keeps its memory between the steps, and a small GPU may have
        too little left beside it. Then the recording is given up and the look begins anew. Steps
        are not recorded again, because the next look would end that recording too.
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
        self.give_back()  # out here, where the error no longer holds what the first try had
        return look()

    def give_back(self) -> None:
        """Frees what only further steps use of a GPU's memory: recordings, and gradients in it."""
        self.network.record(False)
        self.optimisers.forget_gradients()
        gc.collect()

    # -- what is kept

    def running_statistics(self) -> list[torch.Tensor]:
        """The buffers that a forward pass changes, and that a skipped step must leave alone."""
        return [*self.network.buffers(), *self.objective.buffers()]

    def end_lap(self, epoch: int) -> MetricsRow:
        """Ends the lap and begins a new one; returns the row of what happened in it, in `epoch`."""
        row: MetricsRow = {"epoch": epoch, **self.lap.summary()}
        row |= {"step": self.clock.step, "seconds": self.clock.seconds}
        row |= {f"lr {name}": lr for name, lr in self.optimisers.learning_rates().items()}
        self.lap = Lap()
        return row

    def _network_state(self) -> dict[str, Any]:
        """The network and what is needed to use it, as a checkpoint keeps them.

        Without the network's base where PEFT trains beside one.
        """
        entries = {
            "model_state_dict": self.network.trained_state(),
            "network": self.network.description(),
            "data": TrainedOn.of(self.data.train).as_entry(),
        }
        return entries | ({"base": self.base} if self.base else {})

    def best_checkpoint(self, results: Sequence[Result]) -> Checkpoint:
        """The content of the best checkpoint: weights, options and what they reached."""
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
        """The entries of a checkpoint that hold the running mean, where there is one."""
        return {} if self.average is None else self.average.state()

    def bytes_on_disk(self, kept: int = 0) -> int:
        """What the run's checkpoints take: the best, the last, and `kept` older ones."""
        weights = _bytes(self.network.trained_state())
        mean = 0 if self.average is None else weights
        weights += mean + _bytes(self.objective.state_dict())
        last = weights + self.optimisers.bytes_of_state()
        return _bytes(self.network.base_state()) + weights + last * (1 + kept)

    def load_best(self, checkpoint: Checkpoint) -> None:
        """Puts the weights of a `best_checkpoint` into the network; training is over then."""
        self.network.load_state_dict(checkpoint["model_state_dict"])
        if self.average is not None:
            self.average.load(checkpoint)

    def state(self) -> Checkpoint:
        """The content of last.pth: all that a continued run needs."""
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
            InputError: it is damaged, or not the state of such a training; or the options gave
                another network in the version that began the run.
        """
        with damage_in_words(
            "the last checkpoint", "use an older one (step_N.pth), or start again"
        ):
            self._load_state(state)

    def _load_state(self, state: Checkpoint) -> None:
        for part, name in ((self.clock, "clock"), (self.lap, "lap")):
            stored, own = state[name], vars(part)
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
    """What the weights themselves reached, without what it shares with the mean's result."""
    numbers = without_counts(result.numbers)
    bare = replace(result, embeddings=torch.empty(0), gallery=None, per_query=None)
    return replace(bare, title=result.title + RAW, numbers=numbers)


def alike(stored: Any, own: Any) -> bool:
    """Whether a plain value that was stored can take the place of `own`: kind, size and range.

    Where `own` is an empty dictionary, the stored one may hold any finite numbers.
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
    """Whether it is a finite number, and no count below zero; 0-d tensors are numbers."""
    if isinstance(value, torch.Tensor):
        return value.ndim == 0 and not value.is_complex()
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return math.isfinite(value) and (isinstance(value, float) or 0 <= value < 2**63)
