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
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from tqdm import tqdm

import dataset
import losses
import net
import optim
import processes
from dataset.base import ImageSet
from dataset.clusters import one_cluster
from dataset.loader import Batch, Loader, train_loader
from dataset.samplers import BatchSampler, make_sampler
from evaluate import (
    Evaluation,
    Result,
    Viewing,
    data_choice,
    embed,
    evaluate,
    evaluations,
    network_options,
    reading,
    resolve_data_defaults,
    table,
)
from net.shared import share_batches
from routines import DivideAndConquer, Mixup, Routine, View, Warmup, cluster_sampler
from runs import RunFolder, load_checkpoint, run_name
from tracking import Tracker, wandb_mode
from utils import (
    InputError,
    Precision,
    device_name,
    environment,
    human_seconds,
    pick_device,
    random_states,
    restore_random_states,
    seed_everything,
    sentence_errors,
)

logger = logging.getLogger("train")

CHECK_EVERY_ON_GPU = 50  # steps between two looks at the loss: each look waits for the GPU

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
    weights = net.canonical(load_checkpoint(path))
    own = {key: value for key, value in weights.items() if not key.startswith("masks.")}
    masks = {key: value for key, value in network.state_dict().items() if key.startswith("masks.")}
    net.load_checkpoint(network, {**own, **masks}, path)


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
        "cosine": lambda: optim.cosine(total_steps),
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


class Averages:
    """Running means of 0-d tensors, kept on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, values: dict[str, torch.Tensor]) -> None:
        """Adds one step's values."""
        for name, value in values.items():
            self._sums[name] = self._sums[name] + value if name in self._sums else value.clone()
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self) -> dict[str, float]:
        """The means so far."""
        return {name: float(total) / self._counts[name] for name, total in self._sums.items()}


@dataclass
class Clock:
    """Where a run stands."""

    epoch: int = 0
    step: int = 0
    step_in_epoch: int = 0
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
        self._batches: Iterator[Batch] | None = None

    # -- one step, and the steps between two looks

    def step(self, batch: Batch) -> dict[str, torch.Tensor]:
        """One optimisation step; returns the loss and its terms, detached, on the device."""
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
        self.optimisers.step(loss, self.clock.epoch, self.clock.step)
        self.clock.step += 1
        self.clock.step_in_epoch += 1
        return {"loss": loss.detach(), **terms}

    def advance(self) -> dict[str, float]:
        """Trains to the next stop and returns the means of its terms, and its speed.

        A stop is the end of an epoch, an evaluation by --eval-steps, or the run's last step.

        Raises:
            InputError: the loss is not finite.
        """
        clock = self.clock
        batches = self._epoch_batches()
        self.network.train()
        self.objective.train()
        check_every = 1 if self.precision.device.type == "cpu" else CHECK_EVERY_ON_GPU
        means, images, start = Averages(), 0, time.perf_counter()
        waited = self.loader.wait_seconds
        with self._progress_bar() as bar:
            while clock.step_in_epoch < len(self.loader):
                batch = next(batches)
                values = self.step(batch)
                means.add(values)
                images += len(batch.labels)
                if clock.step % check_every == 0:
                    bar.set_postfix(loss=f"{self._finite_loss(values):.4g}", refresh=False)
                bar.update(len(batch.labels))
                if self.finished or self._evaluates_at_this_step():
                    break
        self._finite_loss(values)
        elapsed = time.perf_counter() - start
        clock.seconds += elapsed
        if clock.step_in_epoch >= len(self.loader):
            clock.epoch, clock.step_in_epoch, self._batches = clock.epoch + 1, 0, None
        return {
            **means.read(),
            "images_per_second": images / elapsed,
            "data_wait": (self.loader.wait_seconds - waited) / elapsed,
        }

    def _epoch_batches(self) -> Iterator[Batch]:
        """The rest of the running epoch; begins it where it has not begun."""
        if self._batches is None:
            for routine in self.routines:
                begin = routine.resume if self.clock.step_in_epoch else routine.begin_epoch
                begin(self)
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

    def _finite_loss(self, values: dict[str, torch.Tensor]) -> float:
        loss = float(values["loss"])
        if math.isfinite(loss):
            return loss
        terms = ", ".join(f"{name} {float(value):.4g}" for name, value in values.items())
        raise InputError(
            f"the loss is not finite at epoch {self.clock.epoch + 1}, step {self.clock.step} "
            f"({terms}); lower --lr or --proxy-lr-scale, or try --amp off"
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

    def evaluate(self, tasks: list[Evaluation]) -> list[Result]:
        """Evaluates the network as it is."""
        return [
            evaluate(
                self.network,
                task,
                self.precision,
                Viewing.of(self.args),
                seed=self.args.seed,
            )
            for task in tasks
        ]

    # -- what is kept

    def network_options(self) -> dict:
        """What evaluate.py needs to build the same network."""
        chosen = network_options(self.args, self.objective.heads)
        masks = self.network.masks
        if masks is None:
            return chosen
        return {**chosen, "masks_at_test": masks.full, "mask_relu": masks.relu}

    def weights(self, results: list[Result]) -> dict:
        """The content of the best checkpoint: weights, options and what they reached."""
        return {
            "model_state_dict": self.network.state_dict(),
            "criterion_state_dict": self.objective.state_dict(),
            "network": self.network_options(),
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
            "optimisers": self.optimisers.state_dict(),
            "routines": [routine.state_dict() for routine in self.routines],
            "clock": vars(self.clock).copy(),
            "random": random_states(),
            "args": plain_options(self.args),
        }

    def load_state(self, state: dict) -> None:
        """Continues from `state()`."""
        vars(self.clock).update(state["clock"])
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


def fit(training: Training, run: RunFolder, tracker: Tracker) -> None:
    """The whole run: epochs, evaluations, checkpoints, one printed line an epoch."""
    args, clock, data = training.args, training.clock, training.data
    best_name = f"{args.dataset}_{args.model}".replace("/", "-").replace(":", "-")
    while not training.finished:
        epoch = clock.epoch + 1
        row = {"epoch": epoch, **training.advance()}
        row |= {"step": clock.step, "seconds": clock.seconds}
        row |= {f"lr {name}": lr for name, lr in training.optimisers.learning_rates().items()}
        if training.evaluation_due():
            results = training.evaluate(data.selection)
            row["evaluation_seconds"] = sum(result.seconds for result in results)
            row |= _flat(results)
            reached = results[0].numbers["R@1"]
            if reached > clock.best:
                clock.best, clock.best_epoch = reached, epoch
                run.save_best(best_name, training.weights(results))
                _write_learned_values(training, run)
            for name, values in training.objective.class_values().items():
                tracker.log_histogram(f"{name}s", values.cpu().numpy(), clock.step)
        run.metrics.append(row)
        tracker.log(row, clock.step)
        run.save_last({**training.state(), "wandb_id": tracker.run_id})
        print(epoch_line(args, clock, row), flush=True)
    _report(training, run, best_name)


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


def epoch_line(args: argparse.Namespace, clock: Clock, row: dict) -> str:
    """One line of results."""
    parts = [f"epoch {row['epoch']:>3}/{args.epochs}", f"loss {row['loss']:<7.4g}"]
    if "R@1" in row:
        parts += [f"R@1 {row['R@1']:.4f}", f"MAP@R {row['MAP@R']:.4f}"]
        parts += [f"best {clock.best:.4f} (epoch {clock.best_epoch})"]
    parts += [f"{row['images_per_second']:.0f} img/s", f"waiting {row['data_wait']:.0%}"]
    return "  ".join([*parts, human_seconds(clock.seconds)])


def _report(training: Training, run: RunFolder, best_name: str) -> None:
    """The last words of a run: the best checkpoint's numbers, and where everything lies."""
    checkpoint = processes.from_main(lambda: run.load_best(best_name))
    clock, data = training.clock, training.data
    if data.selects_on_test:
        print(f"\nBest epoch {clock.best_epoch} by R@1 on the test classes, as the papers do:")
        results = [
            Result(title, numbers, torch.empty(0), None, 0.0)
            for title, numbers in checkpoint["metrics"].items()
        ]
    else:
        print(
            f"\nEpoch {clock.best_epoch} had the best R@1 on the validation classes "
            f"({clock.best:.4f}). The test classes, looked at once:"
        )
        training.network.load_state_dict(checkpoint["model_state_dict"])
        results = training.evaluate(data.test)
    run.write_results(
        {
            "best_epoch": clock.best_epoch,
            "picked_on": "test classes" if data.selects_on_test else "validation classes",
            "results": {result.title: result.numbers for result in results},
        }
    )
    print(table(results))
    print(f"run folder: {run.path}")
    print(f"evaluate:   python evaluate.py --resume {run.best_path(best_name)}")


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
            **network_options(args, objective.heads),
            pretrained=args.pretrained,
            masks=build_masks(args),
            head_parts=args.nb_clusters or 1,
        )
    if args.checkpoint:
        load_start(network, args.checkpoint)
    network.to(device, memory_format=precision.memory_format)
    if processes.is_group():
        share_batches(network)
        processes.count_once(objective.parameters())
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
    run = RunFolder.open(args.resume_run)
    stored = run.read_args()
    changeable = {"resume_run", "epochs", "max_steps", "eval_every", "workers", "gpu_id", "wandb"}
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


def main(args: argparse.Namespace) -> None:
    """Runs train.py with parsed options."""
    # What is worth a warning while a run is built is the same in all processes.
    level = logging.WARNING if processes.is_main() else logging.ERROR
    logging.basicConfig(level=level, format="%(levelname)s: %(message)s")
    run = None
    if args.resume_run:
        args, run = continued_options(args)
    training = prepare(args)
    if args.dry_run:
        print(describe(training))
        return
    print(describe(training), flush=True)
    logging.getLogger().setLevel(logging.WARNING)
    wandb_id = None
    if run is None:
        name = args.name or run_name(args.dataset, args.model, args.loss, args.remark)
        run = processes.from_main(partial(RunFolder.create, args.LOG_DIR, name))
        run.write_args(plain_options(args))
        run.write_environment(
            {**environment(training.precision.device), "data": training.data.train.fingerprint()}
        )
    else:
        state = processes.from_main(run.load_last)
        training.load_state(state)
        run.metrics.drop_after(training.clock.step)
        wandb_id = state.get("wandb_id")
        print(f"continuing after epoch {training.clock.epoch}, step {training.clock.step}")
    tracker = Tracker(
        wandb_mode(args.wandb) if processes.is_main() else "disabled",
        project=args.wandb_project,
        name=run.path.name,
        folder=run.path,
        config=plain_options(args),
        run_id=wandb_id,
    )
    print(f"run folder  {run.path}\nwandb       {tracker.status}\n", flush=True)
    fit(training, run, tracker)
    tracker.finish()


if __name__ == "__main__":
    with sentence_errors():
        if (count := processes.wanted(ARGS.gpu_id)) > 1:
            sys.exit(processes.launch([sys.executable, *sys.orig_argv[1:]], count))
        with processes.joined():
            main(ARGS)
