"""Train an embedding network, judge it on classes it never saw, keep everything in a run folder.

    python train.py @recipes/emoji_amloss.txt
    python train.py --dataset cub --model bn_inception --loss AMLoss --batch-size 180 --alphap 48 …

Options → data, network, objective, optimisers → the loop in `Training`. The loop knows no method:
an objective is given what the network says, and parameter groups say how they are trained.
"""

import options

ARGS = options.parse_train() if __name__ == "__main__" else None

import argparse
import logging
import math
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

import dataset
import losses
import net
import optim
import processes
import report
from dataset.base import ImageSet
from dataset.clusters import one_cluster
from dataset.loader import Batch, Loader, train_loader
from dataset.samplers import BatchSampler, make_sampler
from devices import (
    Precision,
    device_name,
    environment,
    pick_device,
    random_states,
    restore_random_states,
    seed_everything,
)
from evaluate import (
    Evaluation,
    Result,
    Viewing,
    data_choice,
    embed,
    evaluate,
    evaluations,
    reading,
    resolve_data_defaults,
    table,
)
from faults import (
    CHECK_EVERY_ON_GPU,
    CollapseWarning,
    Interrupted,
    NonFinite,
    Signals,
    Step,
    Watch,
    memory_in_words,
)
from inspection import Embedded, random_neighbours
from net.shared import share_batches
from routines import DivideAndConquer, Mixup, Routine, View, Warmup, cluster_sampler
from runs import RunFolder, find_run, load_checkpoint, run_name
from tracking import Tracker, wandb_mode
from utils import InputError, human_seconds, sentence_errors

logger = logging.getLogger("train")

# --- data -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """What a run trains on, what picks its best epoch, and what it is judged on."""

    train: ImageSet
    selection: list[Evaluation]
    test: list[Evaluation]

    @property
    def selects_on_test(self) -> bool:
        """The papers' protocol: the best epoch is picked on the test classes."""
        return self.selection is self.test


def prepare_data(args: argparse.Namespace) -> Data:
    """Loads the training split and the evaluations; splits off validation classes when asked.

    Raises:
        InputError: the data are not there, or too few for a batch.
    """
    choice = data_choice(args)
    train = choice.load("train")
    _check_classes(train, args.dataset)
    test = evaluations(choice)
    selection = test
    held_out = _validation_classes(train, args)
    if held_out.any():
        queries = train.select_classes(np.flatnonzero(held_out))
        train = train.select_classes(np.flatnonzero(~held_out))
        selection = [Evaluation.published("validation", queries, None, choice.protocol)]
    if args.batch_size > len(train):
        raise InputError(
            f"--batch-size {args.batch_size} is larger than the {len(train)} training images of "
            f"{args.dataset}; choose at most {len(train)}"
        )
    return Data(train, selection, test)


def _check_classes(train: ImageSet, name: str) -> None:
    counts = np.bincount(train.labels, minlength=train.num_classes)
    if (counts < 2).all():
        raise InputError(
            f"every training class of {name} has a single image, so no image has another that it "
            "could be near to; give the classes two images or more"
        )
    if alone := int((counts == 1).sum()):
        logger.warning(
            "%d of the %d training classes of %s have a single image, which no other of its class "
            "can be near to; the first is %s",
            alone,
            train.num_classes,
            name,
            train.class_names[int(np.argmax(counts == 1))],
        )


def _validation_classes(train: ImageSet, args: argparse.Namespace) -> np.ndarray:
    """(C,) bool: the training classes that are held out to pick the best epoch."""
    held_out = np.zeros(train.num_classes, bool)
    if args.val_fold is not None:
        if train.folds is None or args.val_fold > train.folds.max():
            known = "none" if train.folds is None else f"0 to {train.folds.max()}"
            raise InputError(
                f"--val-fold {args.val_fold}: the folds of {args.dataset} are {known}; "
                "choose one of them or use --val-classes"
            )
        held_out[np.unique(train.labels[train.folds == args.val_fold])] = True
    elif args.val_classes:
        count = max(2, round(args.val_classes * train.num_classes))
        chosen = np.random.default_rng(args.seed).permutation(train.num_classes)[:count]
        held_out[chosen] = True
    return held_out


# --- what is optimised ----------------------------------------------------------------------------


def load_start(network: net.EmbeddingNet, path: str) -> None:
    """Starts the network from all the weights of a checkpoint; masks are left to the run.

    Raises:
        InputError: the file cannot be read, or holds another network.
    """
    net.load_checkpoint(network, load_checkpoint(path), path, masks=False)


def build_objective(args: argparse.Namespace, num_classes: int) -> losses.Objective:
    """The weighted sum of loss terms that the options ask for.

    Raises:
        InputError: an unknown loss, or arguments it does not take.
    """
    try:
        return losses.compose(
            args.loss,
            num_classes,
            args.embedding_size,
            attach=options.attachments(args),
            l2_norm=bool(args.l2_norm),
            **options.criterion_arguments(args),
        )
    except ValueError as error:
        raise InputError(str(error)) from error


def build_optimisers(
    args: argparse.Namespace,
    network: net.EmbeddingNet,
    objective: losses.Objective,
    steps_per_epoch: int,
    precision: Precision,
) -> optim.Optimisers:
    """Backbone, heads, masks and the criterion's own groups, each with its rate and schedule."""
    total_steps = args.steps or args.epochs * steps_per_epoch
    schedule = {
        "step": lambda: optim.step_decay(args.lr_decay_step, args.lr_decay_gamma),
        "milestones": lambda: optim.milestones(args.milestones, args.lr_decay_gamma),
        "cosine": lambda: optim.cosine(total_steps, None if args.steps else steps_per_epoch),
        "constant": lambda: optim.constant,
    }[args.schedule]()
    groups = network.parameter_groups(
        args.lr if args.lr_p is None else args.lr_p,
        args.lr,
        decay_all=bool(args.decay_vectors),
        decay_biases=bool(args.decay_biases),
    )
    for group in groups:
        if group["name"] == "masks":
            learned = not args.fixed_mask
            group["lr"] = args.lr * args.mask_lr_mult * learned
            group["weight_decay"] = args.weight_decay * args.mask_wd_mult * learned
    return optim.Optimisers(
        [*groups, *objective.parameter_groups(args.lr)],
        optimizer=args.optimizer,
        weight_decay=args.weight_decay,
        schedule=schedule,
        clip=args.clip,
        scaler=precision.scaler,
    )


def build_routines(args: argparse.Namespace, labels: np.ndarray) -> list[Routine]:
    """What the chosen methods do around the steps; `labels` are those of the training images."""
    routines: list[Routine] = []
    if args.warm:
        routines.append(Warmup(args.warm))
    if args.mixup:
        routines.append(Mixup(args.mixup))
    if args.nb_clusters is not None:
        routines.append(DivideAndConquer(args, labels))
    return routines


def build_sampler(args: argparse.Namespace, labels: np.ndarray) -> BatchSampler:
    """Which images make a batch, at first; divide and conquer begins with one cluster.

    Raises:
        InputError: the batch does not suit the data or the images per class.
    """
    if args.nb_clusters is not None:
        return cluster_sampler(args, labels, one_cluster(labels))
    return make_sampler(labels, args.batch_size, instances=args.IPC, seed=args.seed)


def build_architecture(args: argparse.Namespace, heads: tuple[str, ...]) -> net.Architecture:
    """The network that the options ask for, with the heads that the objective needs."""
    described = net.Architecture.entries(vars(args))
    return net.Architecture(**described, heads=heads, head_parts=args.nb_clusters or 1)


def build_masks(args: argparse.Namespace) -> net.EmbeddingMasks | None:
    """Divide and conquer's masks, where it is on."""
    if args.nb_clusters is None:
        return None
    full = args.masks_normalize_before_sum or "sum"
    return net.EmbeddingMasks(
        args.embedding_size,
        learned=not args.fixed_mask,
        relu=bool(args.mask_relu),
        init=args.masking_init,
        full=full if args.masks_sum_for_full_emb else "none",
    )


# --- the loop -------------------------------------------------------------------------------------


@dataclass
class Lap:
    """What happened since the last row of metrics.csv.

    Sums of 0-d tensors stay on the device until they are read.
    """

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    images: int = 0
    seconds: float = 0.0
    waited: float = 0.0

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Adds one step's values."""
        for name, value in values.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value.clone()
            self.counts[name] = self.counts.get(name, 0) + 1

    def summary(self) -> dict[str, float]:
        """Means of all values, images per second, and the share of the time without data."""
        means = {name: float(total) / self.counts[name] for name, total in self.sums.items()}
        seconds = max(self.seconds, 1e-9)
        return {
            **means,
            "images_per_second": self.images / seconds,
            "data_wait": self.waited / seconds,
        }


@dataclass
class Clock:
    """Where a run stands; `begun`: what comes before the first step of the epoch is done."""

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
    begun: bool = False
    best: float = -1.0
    best_epoch: int = 0
    seconds: float = 0.0


def _of_all_processes(outputs: losses.Embeddings, total: int) -> losses.Embeddings:
    """The network's outputs for the whole batch of `total` images, from each process's share."""
    return losses.Embeddings(
        *(None if rows is None else processes.gather_rows(rows, total) for rows in outputs)
    )


class Training:
    """One run: everything that changes while it goes on, and the loop that changes it."""

    def __init__(
        self,
        args: argparse.Namespace,
        data: Data,
        network: net.EmbeddingNet,
        objective: losses.Objective,
        optimisers: optim.Optimisers,
        routines: list[Routine],
        loader: Loader,
        precision: Precision,
    ) -> None:
        self.args = args
        self.data = data
        self.network = network
        self.objective = objective
        self.optimisers = optimisers
        self.routines = routines
        self.loader = loader
        self.precision = precision
        self.clock = Clock()
        self.lap = Lap()
        self.watch = Watch(args.on_nan, precision.device)
        self._batches: Iterator[Batch] | None = None

    # -- one step, and the steps between two looks

    def step(self, batch: Batch) -> dict[str, torch.Tensor] | None:
        """One optimisation step.

        Returns:
            The loss and its terms, detached, on the device; None when the step was skipped.

        Raises:
            NonFinite: the loss or a gradient is not finite.
        """
        buffers = [b.clone() for b in self._buffers()] if self.watch.policy == "skip" else []
        views, context = [View(batch.images, [(1.0, batch.labels)])], {}
        for routine in self.routines:
            batch = routine.prepare(batch)
            views = routine.views(batch, views)
            context |= routine.context()
        loss, terms = 0.0, None
        for images, targets in views:
            with self.precision.autocast():
                outputs = self.network(images, cluster=batch.cluster)
            outputs = _of_all_processes(outputs, len(batch.labels))
            for weight, labels in targets:
                loss = loss + weight * self.objective(outputs, labels, **context)
                terms = terms or self.objective.terms  # those of the images as they are
        clock, values = self.clock, {"loss": loss.detach(), **terms}
        epochs = clock.epoch + clock.step_in_epoch / len(self.loader)
        finite = self.optimisers.step(loss, epochs, clock.step, careful=self.watch.careful)
        clock.step += 1
        clock.step_in_epoch += 1
        rates = self.optimisers.learning_rates()
        seen = Step(clock.epoch, clock.step, batch.index, values, rates, finite)
        if self.watch.saw(seen):
            return values
        for buffer, before in zip(self._buffers(), buffers, strict=True):
            buffer.copy_(before)
        return None

    def _buffers(self) -> list[torch.Tensor]:
        """Running statistics: what a forward changes, and a skipped step must not."""
        return [*self.network.buffers(), *self.objective.buffers()]

    def advance(self, signals: Signals | None = None) -> bool:
        """Trains on, to the next stop or the next pause; whether it is a stop.

        A stop, which has a row of its own, is the end of an epoch, an evaluation by --eval-steps,
        or the run's last step. A pause is a save by --save-every, or a signal.

        Raises:
            NonFinite: a loss or gradient is not finite.
        """
        clock, lap, signals = self.clock, self.lap, signals or Signals()
        batches = self._epoch_batches()
        self.network.train()  # frozen BatchNorms rest: see EmbeddingNet.train in net/network.py
        self.objective.train()
        before, waited = time.perf_counter(), lap.waited - self.loader.wait_seconds
        with self._progress_bar() as bar:
            while not (stop := self._stops_here()):
                batch = self._next(batches, signals)
                if batch is None:
                    break
                values = self.step(batch)
                if values is not None:
                    lap.add(values)
                now = time.perf_counter()
                lap.seconds, clock.seconds = (
                    lap.seconds + now - before,
                    clock.seconds + now - before,
                )
                lap.waited, lap.images = (
                    waited + self.loader.wait_seconds,
                    lap.images + len(batch.labels),
                )
                before = now
                self._show(bar, batch, values)
                if self._pauses_here():
                    stop = self._stops_here()
                    break
        self.watch.check()
        if stop and clock.step_in_epoch >= len(self.loader):
            clock.epoch, clock.step_in_epoch, clock.begun = clock.epoch + 1, 0, False
            self._batches = None
        return stop

    @staticmethod
    def _next(batches: Iterator[Batch], signals: Signals) -> Batch | None:
        """The next batch; None when a signal has come, to this process or another."""
        try:
            batch = next(batches)
        except InputError:
            if signals.requested is None:
                raise
            batch = None  # what read the data has got the signal too
        return None if signals.agreed() is not None else batch

    def _stops_here(self) -> bool:
        clock = self.clock
        if not self.lap.images:
            return False
        ended = clock.step_in_epoch >= len(self.loader)
        return ended or self.finished or self._evaluates_at_this_step()

    def _pauses_here(self) -> bool:
        return bool(self.args.save_every) and self.clock.step % self.args.save_every == 0

    def _show(self, bar: tqdm, batch: Batch, values: dict[str, torch.Tensor] | None) -> None:
        on_cpu = self.precision.device.type == "cpu"
        if values is not None and (on_cpu or self.clock.step % CHECK_EVERY_ON_GPU == 0):
            bar.set_postfix(loss=f"{float(values['loss']):.4g}", refresh=False)
        bar.update(len(batch.labels))

    def _epoch_batches(self) -> Iterator[Batch]:
        """The rest of the running epoch; begins it where it has not begun."""
        if self._batches is None:
            for routine in self.routines:
                begin = routine.resume if self.clock.begun else routine.begin_epoch
                begin(self)
            self.clock.begun = True
            self.loader.set_epoch(self.clock.epoch)
            self.loader.skip(self.clock.step_in_epoch)
            self._batches = iter(self.loader)
        return self._batches

    def _progress_bar(self) -> tqdm:
        clock, args = self.clock, self.args
        return tqdm(
            total=len(self.loader) * args.batch_size,
            initial=clock.step_in_epoch * args.batch_size,
            desc=f"epoch {clock.epoch + 1}/{args.epochs}",
            unit="img",
            leave=False,
            disable=None if processes.is_main() else True,
        )

    def embed_training_images(self, *, pooled: bool) -> torch.Tensor:
        """Training images as evaluation sees them: pooled features (N, F), or embeddings (N, d)."""
        return embed(
            self.network,
            self.data.train,
            self.precision,
            Viewing.of(self.args),
            title="clustering",
            represent=self.network.features if pooled else None,
        )

    @property
    def finished(self) -> bool:
        """All epochs, or all of --steps or --max-steps, are done."""
        clock, args = self.clock, self.args
        # --steps alone decides where it is given: with clusters, epochs differ in length.
        ended = clock.epoch >= args.epochs and not args.steps
        return ended or any(limit and clock.step >= limit for limit in (args.steps, args.max_steps))

    def _evaluates_at_this_step(self) -> bool:
        return bool(self.args.eval_steps) and self.clock.step % self.args.eval_steps == 0

    def evaluation_due(self) -> bool:
        """Every --eval-steps steps, or every --eval-every epochs, and at the end."""
        if self.args.eval_steps:
            return self.finished or self._evaluates_at_this_step()
        ended = self.clock.step_in_epoch == 0
        return self.finished or (ended and self.clock.epoch % self.args.eval_every == 0)

    def evaluate(self, tasks: list[Evaluation], chosen: Sequence[str] = ()) -> list[Result]:
        """Evaluates the network as it is: by what --metrics chooses, or as told here."""
        chosen = chosen or ("retrieval", *self.args.metrics)
        return [
            evaluate(
                self.network,
                task,
                self.precision,
                Viewing.of(self.args),
                seed=self.args.seed,
                chosen=chosen,
            )
            for task in tasks
        ]

    # -- what is kept

    def weights(self, results: list[Result]) -> dict:
        """The content of the best checkpoint: weights, options and what they reached."""
        return {
            "model_state_dict": self.network.state_dict(),
            "criterion_state_dict": self.objective.state_dict(),
            "network": self.network.description(),
            "args": plain_options(self.args),
            "epoch": self.clock.epoch,
            "step": self.clock.step,
            "metrics": {result.title: result.numbers for result in results},
        }

    def state(self) -> dict:
        """The content of last.pth: all that a continued run needs."""
        return {
            "model_state_dict": self.network.state_dict(),
            "criterion_state_dict": self.objective.state_dict(),
            "network": self.network.description(),
            "optimisers": self.optimisers.state_dict(),
            "routines": [routine.state_dict() for routine in self.routines],
            "clock": vars(self.clock).copy(),
            "lap": vars(self.lap).copy(),
            "skipped": self.watch.skipped,
            "random": random_states(),
            "args": plain_options(self.args),
            "environment": environment(self.precision.device),
        }

    def load_state(self, state: dict) -> None:
        """Continues from `state()`."""
        vars(self.clock).update(state["clock"])
        vars(self.lap).update(state["lap"])
        device = self.precision.device
        self.lap.sums = {name: total.to(device) for name, total in self.lap.sums.items()}
        self.watch.skipped = state["skipped"]
        for routine, content in zip(self.routines, state["routines"], strict=True):
            routine.load_state_dict(content, self)
        self.network.load_state_dict(state["model_state_dict"])
        self.objective.load_state_dict(state["criterion_state_dict"])
        self.optimisers.load_state_dict(state["optimisers"])
        restore_random_states(state["random"])


def plain_options(args: argparse.Namespace) -> dict:
    """The options as JSON and `weights_only` know them."""
    return {
        name: [list(item) for item in value] if name == "loss_args" else value
        for name, value in vars(args).items()
    }


def best_name(args: argparse.Namespace) -> str:
    """What the best checkpoint's name begins with: `emoji_resnet18`."""
    return f"{args.dataset}_{args.model}".replace("/", "-").replace(":", "-")


class Fit:
    """The whole run: laps, evaluations, checkpoints, one printed line an epoch.

    At every stop the checkpoint is written before the evaluation, with the row that the evaluation
    completes. So an interrupted evaluation is made again, and no training is.
    """

    def __init__(
        self, training: Training, run: RunFolder, tracker: Tracker, signals: Signals
    ) -> None:
        self.training = training
        self.run = run
        self.tracker = tracker
        self.signals = signals
        self.collapse = CollapseWarning()

    def __call__(self, row: dict | None = None) -> None:
        """Trains to the end; `row` is the one that the last checkpoint left to be completed.

        Raises:
            Interrupted: by a signal, after a checkpoint.
            InputError: a loss or gradient is not finite; the last checkpoint could not be written.
        """
        while True:
            if row is not None:
                self._complete(row)
            if self.signals.agreed() is not None:
                raise Interrupted(self.signals.requested)
            if self.training.finished:
                break
            row = self._next_row()
        if processes.from_main(lambda: "the best checkpoint" not in self.run.trouble):
            _report(self.training, self.run)
            if not self.training.args.no_report:
                write_page(self.run, self.training.args.gpu_id)
        for error in self.run.trouble.values():
            raise error

    def _next_row(self) -> dict | None:
        """Trains to the next stop and saves; None at a pause."""
        training, clock = self.training, self.training.clock
        epoch = clock.epoch + 1
        try:
            stopped = training.advance(self.signals)
        except NonFinite as fault:
            raise self._told(fault) from fault
        row = None
        if stopped:
            row = {"epoch": epoch, **training.lap.summary()}
            row |= {"step": clock.step, "seconds": clock.seconds}
            row |= {f"lr {name}": lr for name, lr in training.optimisers.learning_rates().items()}
            training.lap = Lap()
        self.save(row)
        return row

    def save(self, row: dict | None = None) -> None:
        """Writes last.pth; `row` is to be completed by what continues from it."""
        state = {**self.training.state(), "row": row, "wandb_id": self.tracker.run_id}
        with self.run.forgiving("the last checkpoint"):
            self.run.save_last(state, self.training.args.keep)

    def _told(self, fault: NonFinite) -> InputError:
        """The fault as a sentence that says where its record, images included, was written."""
        paths = self.training.data.train.paths
        record = {**fault.record, "images": [paths[i] for i in fault.record["index"]]}
        self.run.write_fault(record)
        return InputError(f"{fault}; its images are listed in {self.run.fault_path}")

    def _complete(self, row: dict) -> None:
        """Evaluates where that is due, keeps the best, and writes and prints the row."""
        training, tracker, clock = self.training, self.tracker, self.training.clock
        if training.evaluation_due():
            self.signals.agreed()  # so that nobody begins alone
            with self.signals.at_once():
                results = training.evaluate(training.data.selection)
            row["evaluation_seconds"] = sum(result.seconds for result in results)
            row |= _flat(results)
            labels = torch.from_numpy(training.data.selection[0].queries.labels)
            reached = results[0].numbers["R@1"]
            self.collapse.look(results[0].embeddings, labels, reached)
            if reached > clock.best:
                clock.best, clock.best_epoch = reached, row["epoch"]
                with self.run.forgiving("the best checkpoint"):
                    self.run.save_best(best_name(training.args), training.weights(results))
                    _write_learned_values(training, self.run)
            for name, values in training.objective.class_values().items():
                tracker.log_histogram(f"{name}s", values.cpu().numpy(), clock.step)
            if self._picture_due(row["epoch"]):
                draw = partial(_neighbours, training.data.selection[0], results[0])
                tracker.log_picture("neighbours", draw, clock.step)
        with self.run.forgiving("metrics.csv"):
            self.run.metrics.append(row)
        with self.run.forgiving("classes.npz"):
            _remember_classes(training, self.run, row)
        tracker.log(row, clock.step)
        print(epoch_line(training.args, clock, row), flush=True)

    def _picture_due(self, epoch: int) -> bool:
        """At the first evaluation after every --wandb-images epochs, and at the end."""
        training, every = self.training, self.training.args.wandb_images
        if not every or training.finished:
            return bool(every)
        # Known without memory, so that a continued run draws what an uninterrupted one does.
        steps = training.args.eval_steps
        gap = math.ceil(steps / len(training.loader)) if steps else training.args.eval_every
        return epoch // every > (epoch - gap) // every


def _neighbours(task: Evaluation, result: Result) -> Image.Image:
    """Ten random queries, the same in every epoch, and what is nearest to them."""
    shown = Embedded(task.queries, result.embeddings, task.gallery, result.gallery)
    return random_neighbours(shown, seed=1, top=10)


def _flat(results: list[Result]) -> dict[str, float]:
    """The first evaluation's numbers by name, the others' with their title before it."""
    first, *others = results
    flat = dict(first.numbers)
    for result in others:
        flat |= {f"{result.title} {name}": value for name, value in result.numbers.items()}
    return flat


def _write_learned_values(training: Training, run: RunFolder) -> None:
    """One CSV for each value the criterion learned per class: margins.csv for AMLoss."""
    train = training.data.train
    counts = np.bincount(train.labels, minlength=train.num_classes)
    for name, values in training.objective.class_values().items():
        order = torch.argsort(values, stable=True).tolist()
        rows = [[train.class_names[c], f"{float(values[c]):.6f}", int(counts[c])] for c in order]
        run.write_table(f"{name}s.csv", ["class", name, "images"], rows)


def _remember_classes(training: Training, run: RunFolder, row: dict) -> None:
    """What the criterion has learned for each class at this row, for the report."""
    train = training.data.train
    counts = np.bincount(train.labels, minlength=train.num_classes)
    learned = training.objective.class_values()
    values = {name: tensor.cpu().numpy() for name, tensor in learned.items()}
    run.classes.append(row["epoch"], row["step"], train.class_names, counts, values)


def epoch_line(args: argparse.Namespace, clock: Clock, row: dict) -> str:
    """One line of results."""
    parts = [f"epoch {row['epoch']:>3}/{args.epochs}", f"loss {row['loss']:<7.4g}"]
    if "R@1" in row:
        parts += [f"R@1 {row['R@1']:.4f}", f"MAP@R {row['MAP@R']:.4f}"]
        parts += [f"best {clock.best:.4f} (epoch {clock.best_epoch})"]
    parts += [f"{row['images_per_second']:.0f} img/s", f"waiting {row['data_wait']:.0%}"]
    return "  ".join([*parts, human_seconds(clock.seconds)])


def _picked(training: Training, evaluations: int) -> str:
    """Which epoch the last words are about, and by what it was picked."""
    clock = training.clock
    if training.data.selects_on_test:
        if evaluations == 1:
            return f"Evaluated once, after epoch {clock.best_epoch}; no epoch was picked:"
        return f"Best epoch {clock.best_epoch} by R@1 on the test classes, as the papers do:"
    last = "The same classes:" if training.args.no_test else "The test classes, looked at once:"
    return (
        f"Epoch {clock.best_epoch} had the best R@1 on the validation classes "
        f"({clock.best:.4f}). {last}"
    )


def _report(training: Training, run: RunFolder) -> None:
    """The last words of a run: the best checkpoint's numbers, and where everything lies."""
    name = best_name(training.args)
    checkpoint = processes.from_main(partial(run.load_best, name))
    clock, data, args = training.clock, training.data, training.args
    evaluations = sum(bool(row.get("R@1")) for row in run.metrics.rows())
    print(f"\n{_picked(training, evaluations)}")
    judged_before = data.selects_on_test and set(options.METRICS) <= {"retrieval", *args.metrics}
    if judged_before or args.no_test:
        results = [
            Result(title, numbers, torch.empty(0), None, 0.0)
            for title, numbers in checkpoint["metrics"].items()
        ]
    else:
        training.network.load_state_dict(checkpoint["model_state_dict"])
        results = training.evaluate(data.test, options.METRICS)
    run.write_results(
        {
            "best_epoch": clock.best_epoch,
            "picked_on": "test classes" if data.selects_on_test else "validation classes",
            "results": {result.title: result.numbers for result in results},
        }
    )
    print(table(results))
    print(f"run folder: {run.path}")
    print(f"evaluate:   python evaluate.py --resume {run.best_path(name)}")


@processes.main_only
def write_page(run: RunFolder, gpu_id: int) -> None:
    """report.html; whatever goes wrong with it, the run has ended well."""
    try:
        with processes.alone():
            print(f"report:     {report.make([run.path], gpu_id=max(0, gpu_id))}", flush=True)
    except Exception as error:  # the page touches data, network, disk: none may fail a finished run
        logger.warning(
            "no report page (%s); python report.py %s makes it",
            " ".join(str(error).split()) or type(error).__name__,
            shlex.quote(str(run.path)),
        )


# --- from options to a run ------------------------------------------------------------------------


def describe(training: Training) -> str:
    """What would run: data counts, parameters, optimiser groups, steps an epoch."""
    args, data = training.args, training.data
    parameters = sum(p.numel() for p in training.network.parameters())
    criterion = sum(p.numel() for p in training.objective.parameters())
    precision = training.precision
    lines = [
        f"data        {args.dataset}: {len(data.train):,} images, "
        f"{data.train.num_classes:,} classes ({data.train.source})",
        *(f"evaluation  {task.title}: {task.describe()}" for task in data.test),
        f"best epoch  {'on the test classes' if data.selects_on_test else 'on validation: '}"
        + ("" if data.selects_on_test else data.selection[0].describe()),
        f"network     {args.model}, {args.image_size} px, stem {args.stem}, "
        f"{parameters:,} parameters, pretrained {args.pretrained}",
        f"loss        {' + '.join([args.loss, *options.attachments(args)])}, "
        f"{criterion:,} parameters",
        *(
            ["            introspective as released: at unit length the uncertainty learns nothing"]
            if args.introspective == "released" and args.l2_norm
            else []
        ),
        f"device      {device_name(precision.device)}, precision {precision.name}"
        + (f", {processes.world()} processes" if processes.world() > 1 else ""),
        f"steps       {len(training.loader)} an epoch of {args.batch_size} images, "
        f"{args.epochs} epochs",
        *(f"optimiser   {line}" for line in training.optimisers.describe()),
        *(f"note        {line}" for line in options.notices(args)),
    ]
    return "\n".join(lines)


def prepare(args: argparse.Namespace) -> Training:
    """Builds everything a run needs, and checks it, before anything is written."""
    device = pick_device(processes.local_rank() if processes.is_group() else args.gpu_id)
    precision = Precision(args.amp, device)
    seed_everything(args.seed, args.deterministic)
    resolve_data_defaults(args)
    data = prepare_data(args)
    objective = build_objective(args, data.train.num_classes).to(device)
    with processes.main_first():  # the others find what it has downloaded
        network = net.build(
            build_architecture(args, objective.heads),
            pretrained=args.pretrained,
            masks=build_masks(args),
        )
    if args.checkpoint:
        load_start(network, args.checkpoint)
    network.to(device, memory_format=precision.memory_format)
    network.check_image_size(args.image_size)
    if processes.is_group():
        share_batches(network)
        processes.count_once(objective.parameters())
    if args.compile:
        network.compile()
    network.freeze_backbone(args.warm > 0)  # so that its end, not a state before, releases it
    routines = build_routines(args, data.train.labels)
    loader = train_loader(
        data.train,
        build_sampler(args, data.train.labels),
        augment=args.augment or dataset.protocol(args.dataset).augment,
        spec=network.input,
        device=device,
        workers=args.workers,
        seed=args.seed,
        image_size=args.image_size,
        max_bad_images=args.max_bad_images,
        **reading(args),
    )
    if args.steps:
        args.epochs = math.ceil(args.steps / len(loader))
    optimisers = build_optimisers(args, network, objective, len(loader), precision)
    return Training(args, data, network, objective, optimisers, routines, loader, precision)


def continued_options(args: argparse.Namespace) -> tuple[argparse.Namespace, RunFolder]:
    """The options of the run in --resume-run, under those that were given now.

    Raises:
        InputError: a flag that would change what the run is.
    """
    run = processes.from_main(partial(RunFolder.open, args.resume_run))
    stored = processes.from_main(run.read_args)
    changeable = {"resume_run", "epochs", "max_steps", "eval_every", "workers", "gpu_id", "wandb"}
    changeable |= {"metrics", "save_every", "keep", "on_nan", "cache_dir", "no_report"}
    changeable |= {"tensorboard", "wandb_images"}
    changed = [name for name in args.given if name not in changeable]
    if changed:
        raise InputError(
            f"--{changed[0].replace('_', '-')} cannot change in a continued run; leave it out, "
            "or start a new run"
        )
    merged = {**vars(args), **stored, **{name: getattr(args, name) for name in args.given}}
    merged["loss_args"] = [tuple(item) for item in merged["loss_args"]]
    if "max_steps" not in args.given:
        merged["max_steps"] = None
    return argparse.Namespace(**merged), run


def open_run(args: argparse.Namespace, training: Training) -> RunFolder:
    """A new run folder with what was asked and where it runs."""
    name = args.name or run_name(args.dataset, args.model, args.loss, args.remark)
    run = processes.from_main(partial(RunFolder.create, args.LOG_DIR, name))
    run.write_args(plain_options(args))
    run.write_environment(
        {**environment(training.precision.device), "data": training.data.train.fingerprint()}
    )
    return run


def continue_run(run: RunFolder, training: Training) -> dict:
    """Puts the run's last checkpoint into `training`; returns the checkpoint."""
    processes.from_main(partial(run.check_data, training.data.train.fingerprint()))
    state = processes.from_main(run.load_last)
    training.load_state(state)
    forget = partial(run.forget_best_after, training.clock.step, best_name(training.args))
    if processes.from_main(forget):
        training.clock.best = -1.0  # the next evaluation is the best one there is
    unfinished = state["row"] is not None
    run.metrics.keep_before(training.clock.step + (not unfinished))
    run.classes.keep_before(training.clock.step + (not unfinished))
    print(f"continuing after epoch {training.clock.epoch}, step {training.clock.step}")
    return state


def main(args: argparse.Namespace) -> None:
    """Runs train.py with parsed options."""
    # What is worth a warning while a run is built is the same in all processes.
    level = logging.WARNING if processes.is_main() else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    run = None
    if args.resume_run:
        args, run = continued_options(args)
    with memory_in_words(args):
        training = prepare(args)
    if args.dry_run:
        print(describe(training))
        return
    if args.resume == "auto":
        run = processes.from_main(partial(find_run, args.LOG_DIR, plain_options(args)))
        if processes.from_main(lambda: run is not None and run.is_finished):
            print(f"this run is finished: {run.path}")
            return
    print(describe(training), flush=True)
    logging.getLogger().setLevel(logging.WARNING)
    if run is None:
        run, state = open_run(args, training), {"row": None, "wandb_id": None}
        run.hold()
    else:
        run.hold()
        state = continue_run(run, training)
    tracker = Tracker(
        wandb_mode(args.wandb) if processes.is_main() else "disabled",
        tensorboard=args.tensorboard and processes.is_main(),
        project=args.wandb_project,
        name=run.path.name,
        folder=run.path,
        config=plain_options(args),
        run_id=state["wandb_id"],
        continued_at=training.clock.step + (state["row"] is None) if training.clock.step else None,
    )
    print(f"run folder  {run.path}\n{tracker.describe()}\n", flush=True)
    try:
        with Signals() as signals, memory_in_words(args):
            fit = Fit(training, run, tracker, signals)
            fit.save(state["row"])  # so that there is something to continue from the start
            fit(state["row"])
    except Interrupted as interrupted:
        print(
            f"\nstopped by {interrupted.name} at step {training.clock.step}; continue with:\n"
            f"  python train.py --resume-run {shlex.quote(str(run.path))}",
            flush=True,
        )
        raise SystemExit(interrupted.status) from None
    finally:
        tracker.finish()


if __name__ == "__main__":
    with sentence_errors():
        if (count := processes.wanted(ARGS.gpu_id)) > 1:
            sys.exit(processes.launch([sys.executable, *sys.orig_argv[1:]], count))
        with processes.joined():
            main(ARGS)
