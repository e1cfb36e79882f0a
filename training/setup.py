"""From options to the parts of a run: objective, network, optimisers; and what would run."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import losses
import methods
import net
import options
import processes
from dataset.base import ImageSet
from dataset.samplers import BatchSampler
from devices import Precision, device_name
from evaluation.networks import checkpoint_file
from methods import Routine
from methods.base import Options
from net.building import whole
from net.shared import share_batches
from runs import load_checkpoint
from storage import need_room
from training import compiling, optim
from training.clock import Length
from training.doubts import doubts
from utils import InputError, counted

if TYPE_CHECKING:
    from training.data import Data
    from training.state import Training

BATCHES_LOOKED_AT = 100  # for one from which the loss can learn


def build_objective(args: Options, num_classes: int, device: torch.device) -> losses.Objective:
    """The weighted sum of loss terms that the options ask for, the same in all processes.

    Raises:
        InputError: an unknown loss, or arguments it does not take.
    """
    with _loss_errors():
        objective = losses.compose(args.loss, num_classes, **_recipe(args))
    processes.copy_main(objective.state_dict().values())
    if args.shard_proxies:
        _divide_proxies(args, objective)
    objective.to(device)
    processes.count_once(objective.parameters())
    return objective


def _divide_proxies(args: Options, objective: losses.Objective) -> None:
    """Leaves each process its share of the proxies.

    Raises:
        InputError: there is one process, or the loss has no proxies that can be divided.
    """
    if processes.world() == 1:
        raise InputError(
            "--shard-proxies divides the proxies among processes, and there is one, which has them "
            "all; start several (torchrun, or --gpu-id -1), or leave it out"
        )
    if args.amp == "fp16":
        raise InputError(
            "--shard-proxies cannot go with --amp fp16, whose scaling has to see all gradients in "
            "every process; use --amp bf16 or off"
        )
    divisible = [part for part in objective.modules() if isinstance(part, losses.ProxyLoss)]
    if not divisible:
        raise InputError(
            f"--shard-proxies: {args.loss} has no proxies that can be divided among processes; "
            f"losses that have: {losses.proxy_losses()}"
        )
    with _loss_errors():
        for part in divisible:
            part.divide()


def rehearse(
    args: Options, objective: losses.Objective, data: ImageSet, batches: BatchSampler
) -> None:
    """Makes sure that the loss can learn from the batches of a run, before there is a run.

    Raises:
        InputError: there is one class, or no batch has the pairs that the loss needs, or the loss
            fails, is not finite or has no gradient on random embeddings of such a batch.
    """
    if len(np.unique(data.labels)) < 2:
        raise InputError(
            f"all training images are of one class, {data.class_names[data.labels[0]]}, so there "
            "is nothing to tell apart; give the training data two classes or more"
        )
    batch = None
    for index, _ in itertools.islice(batches.draw(0), BATCHES_LOOKED_AT):
        labels = data.labels[index]
        if not objective.needs_pairs or 1 < len(np.unique(labels)) < len(labels):
            batch = labels
            break
    if batch is None:
        raise InputError(
            f"--loss {args.loss} learns from pairs, and no batch of {len(labels)} images has "
            "both two images of one class and images of two classes; choose --IPC 2 or more, and "
            "at least twice as large a --batch-size"
        )
    with _loss_errors():
        losses.try_out(args.loss, torch.from_numpy(batch), **_recipe(args))


def _recipe(args: Options) -> dict[str, Any]:
    """What `losses` is told besides the name of the loss and the classes."""
    return {
        "embedding_size": args.embedding_size,
        "attach": methods.attachments(args),
        "l2_norm": bool(args.l2_norm),
        **options.criterion_arguments(args),
    }


@contextlib.contextmanager
def _loss_errors() -> Iterator[None]:
    """A loss's complaints are about what was asked for on the command line."""
    try:
        yield
    except ValueError as error:
        raise InputError(str(error)) from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        raise InputError(
            "this machine's memory cannot hold what the loss learns; give fewer proxies for each "
            "class (--loss-args), or a smaller --embedding-size"
        ) from error


def build_network(
    args: Options,
    heads: tuple[str, ...],
    routines: Sequence[Routine],
    precision: Precision,
    *,
    continued: bool = False,
) -> net.EmbeddingNet:
    """The network on its device, with its starting weights, the same in all processes.

    Args:
        continued: whether it is to have the weights of the run's own checkpoint; what it started
            from is then not looked for.

    Raises:
        InputError: options that exclude each other, weights that cannot be had, or images of a size
            that the network cannot take.
    """
    with processes.main_first():  # the others find what it has downloaded
        network = net.build(
            net.Architecture(
                **net.Architecture.entries(vars(args)), heads=heads, **methods.architecture(args)
            ),
            # A checkpoint gives all weights, so that others need not be there.
            pretrained=None if continued or args.checkpoint else args.pretrained,
            masks=methods.masks(args),
        )
    if args.checkpoint and not continued:
        start = checkpoint_file(args.checkpoint)
        begun = net.with_weights(whole(load_checkpoint(start), start))
        net.load_checkpoint(network, begun, start, masks=False)
    network.to(precision.device, memory_format=precision.memory_format)
    network.check_image_size(args.image_size)
    processes.copy_main(network.state_dict().values())
    if processes.is_group():
        share_batches(network)
    if args.grad_checkpointing:
        if args.compile and network.updates_statistics:
            raise InputError(
                "--compile cannot compute BatchNorms that train once more; leave it or "
                "--grad-checkpointing out, or use --bn-freeze 1"
            )
        network.recompute_blocks()
    if args.compile:
        network.compile()
        compiling.tell()
    elif _can_be_recorded(args, precision):
        network.record()
    for routine in routines:
        routine.start(network)
    return network


def _can_be_recorded(args: Options, precision: Precision) -> bool:
    """Whether a step is the same kernels each time, on one GPU."""
    alone = precision.device.type == "cuda" and not processes.is_group()
    return bool(args.cuda_graphs) and alone and not args.grad_checkpointing


def build_optimisers(
    args: Options,
    network: net.EmbeddingNet,
    objective: losses.Objective,
    routines: Sequence[Routine],
    length: Length,
    steps_per_epoch: int,
    precision: Precision,
) -> optim.Optimisers:
    """Backbone, heads, masks and the criterion's own groups, each with its rate and schedule."""
    groups: Sequence[dict] = network.parameter_groups(
        args.lr if args.lr_p is None else args.lr_p,
        args.lr,
        decay_all=bool(args.decay_vectors),
        decay_biases=bool(args.decay_biases),
        layer_decay=args.layer_decay,
    )
    for routine in routines:
        groups = routine.parameter_groups(groups)
    groups = [*groups, *objective.parameter_groups(args.lr)]
    if not any(parameter.requires_grad for group in groups for parameter in group["params"]):
        raise InputError(
            "nothing would train: the backbone is frozen (--freeze-blocks, --warm), and neither a "
            "head nor the loss has parameters; use --head linear, or --warm 0"
        )
    schedule, momentum = build_schedules(args, length, steps_per_epoch)
    return optim.Optimisers(
        groups,
        rule=optim.Rule(args.optimizer, args.adam_eps, args.momentum, bool(args.nesterov)),
        weight_decay=args.weight_decay,
        schedule=schedule,
        least=args.lr_min,
        momentum=momentum,
        warmup=args.lr_warmup or 0,
        clip_norm=args.clip_norm,
        clip=args.clip,
        scaler=precision.scaler,
    )


def build_schedules(
    args: Options, length: Length, steps_per_epoch: int
) -> tuple[optim.Schedule, optim.Schedule | None]:
    """What --schedule does to the rates, and to the momentum where it does something.

    Raises:
        InputError: the cosine would end before the rates have risen.
    """
    total = length.total_steps(steps_per_epoch), None if length.steps else steps_per_epoch
    match args.schedule:
        case "step":
            return optim.step_decay(args.lr_decay_step, args.lr_decay_gamma), None
        case "milestones":
            return optim.milestones(args.milestones, args.lr_decay_gamma), None
        case "cosine":
            ends = args.cosine_epochs and args.cosine_epochs * steps_per_epoch
            rises = optim.rise(total[0], args.lr_warmup)
            if ends and ends <= rises:
                raise InputError(
                    f"--cosine-epochs {args.cosine_epochs} is over after step {ends}, and the "
                    f"rates rise until step {rises}; choose more epochs, or a shorter rise "
                    "(--lr-warmup STEPS)"
                )
            more = {"warmup": args.lr_warmup, "floor": args.lr_floor, "length": ends}
            return optim.cosine(*total, **more), None
        case "onecycle":
            return optim.one_cycle(*total)
    return optim.constant, None


def _about_warmup(training: Training) -> list[str]:
    rising = training.optimisers.warmup
    steps = training.length.total_steps(len(training.loader))
    few = f"--lr-warmup {rising}: the run has {steps} steps, so its rates only rise"
    return [few] if rising >= steps else []


def _about_milestones(training: Training, args: Options) -> list[str]:
    steps = training.length.total_steps(len(training.loader))
    late = [step for step in args.milestones if step >= steps]
    if args.schedule != "milestones" or not late:
        return []
    verb = "lies" if len(late) == 1 else "lie"
    named = ", ".join(map(str, late))
    return [f"--milestones {named} {verb} behind the last of the run's {steps:,} steps"]


def _about_pieces(training: Training, batch: int) -> list[str]:
    norms = (m for m in training.network.modules() if isinstance(m, torch.nn.BatchNorm2d))
    size = training.micro_batch
    if size is None or size >= batch or not any(norm.training for norm in norms):
        return []
    return [f"--micro-batch {size}: a BatchNorm that trains sees {size} images at a time"]


def _about_norms(training: Training, args: Options) -> list[str]:
    """Flags of BatchNorms that a network without any was given."""
    given = [name for name in ("bn_freeze", "bn_momentum") if name in args.given]
    if not given or training.network.has_batch_norms:
        return []
    named = " and ".join(f"--{name.replace('_', '-')}" for name in given)
    verb = "changes" if len(given) == 1 else "change"
    return [f"{named} {verb} nothing: {args.model} has no BatchNorm"]


def _about_average(training: Training) -> list[str]:
    average = training.average
    return [f"{average.decay:g}: a mean of the weights picks the best epoch"] if average else []


def describe(training: Training) -> str:
    """What would run: data counts, parameters, optimiser groups, steps per epoch."""
    args = options.kept(training.options)
    data, loader, precision = training.data, training.loader, training.precision
    parameters = sum(p.numel() for p in training.network.parameters())
    criterion = sum(map(processes.whole_size, training.objective.parameters()))
    on = "on the test classes"
    if not data.selects_on_test:
        on = f"on validation: {data.selection[0].describe()}"
    elif training.length.evaluates_once(len(loader)):
        on = "none is picked: evaluated once, at the end"
    lines = [
        *_about_choice(args.chosen),
        f"data        {args.dataset}: {len(data.train):,} images, "
        f"{data.train.num_classes:,} classes"
        + (f" ({data.train.source})" if data.train.source not in ("", args.dataset) else ""),
        *([] if data.train.upright else ["pictures    as stored, EXIF orientation ignored"]),
        *(f"evaluation  {task.title}: {task.describe()}" for task in data.test),
        *_what_is_left_out(data),
        f"best epoch  {on}",
        f"network     {args.model}, {args.image_size} px, stem {args.stem}, "
        f"{parameters:,} parameters, "
        + (f"checkpoint {args.checkpoint}" if args.checkpoint else f"pretrained {args.pretrained}"),
        *_what_rests(training.network),
        f"loss        {' + '.join([args.loss, *methods.attachments(args)])}, "
        f"{criterion:,} parameters",
        *(f"            {words}" for words in methods.notes(args)),
        *(f"            {words}" for words in filter(None, [training.objective.cost()])),
        f"device      {device_name(precision.device)}, precision {precision.name}"
        + (f", {processes.world()} processes" if processes.world() > 1 else ""),
        f"steps       {len(loader)} per epoch of {args.batch_size} images each, "
        + counted(training.length.epochs, "epoch"),
        *(f"optimiser   {line}" for line in training.optimisers.describe()),
        f"disk        {_about_disk(training)}",
        *(f"ema         {words}" for words in _about_average(training)),
        *(
            f"note        {line}"
            for line in [
                *options.notices(args),
                *_about_warmup(training),
                *_about_milestones(training, args),
                *_about_pieces(training, args.batch_size),
                *_about_norms(training, args),
            ]
        ),
        *(f"warning     {line}" for line in doubts(training)),
    ]
    return "\n".join(lines)


def _about_choice(chosen: Sequence[Sequence[str]]) -> list[str]:
    """What was set to suit the images, and why; the first line says for what."""
    words = [f"{settings}: {why}" if settings else why for settings, why in chosen]
    return [f"{'' if number else 'chosen':<12}{line}" for number, line in enumerate(words)]


def _about_disk(training: Training) -> str:
    """How much of the disk the run will take.

    Raises:
        InputError: that much is not free.
    """
    args = options.kept(training.options)
    needed = training.bytes_on_disk(args.keep)
    advice = "choose another --LOG_DIR" + (", or a smaller --keep" if args.keep else "")
    return f"the run keeps {need_room(Path(args.LOG_DIR), needed, 'what the run keeps', advice)}"


def _what_is_left_out(data: Data) -> list[str]:
    """A line about the images that are known not to be readable."""
    train, judged = (data.unreadable.get(side, 0) for side in ("train", "eval"))
    parts = [f"{train:,} for training, others take their place"] if train else []
    parts += [f"{judged:,} for evaluation, left out"] if judged else []
    return [f"unreadable  {'; '.join(parts)}"] if parts else []


def _what_rests(network: net.EmbeddingNet) -> list[str]:
    """A line about what trains of the network, where that is not all of it."""
    if not network.rests_in_part:
        return []
    trained, total = network.counts()
    return [f"            {trained:,} of them train ({trained / total:.2%})"]
