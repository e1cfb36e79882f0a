"""From options to the parts of a run: objective, network, loader, optimisers."""

from __future__ import annotations

import contextlib
import itertools
import traceback
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

import losses
import methods
import net
import options
import processes
from criteria.base import ParameterGroup
from dataset.base import ImageSet, InputSpec
from dataset.loader import Loader, train_loader
from dataset.samplers import BatchSampler
from devices import Precision
from evaluation.embedding import Viewing
from evaluation.networks import checkpoint_file
from flags import Options
from methods import Routine
from net.building import check_pretrained, whole
from net.shared import share_batches
from runs import load_checkpoint
from storage import need_file
from training import compiling, optim, schedules
from training.clock import Length
from utils import InputError, as_clause

CLASSES_TRIED = 1000  # by a loss that is built to see whether it can be, before classes are known
BATCHES_LOOKED_AT = 100  # at most, until the loss can learn from one of them


def check(args: Options, *, continued: bool = False) -> None:
    """Checks what can be checked of loss and network before images are looked for.

    Args:
        continued: see `build_network`.

    Raises:
        InputError: the loss does not take such arguments, there is no such network, or the file
            of weights that it starts from is missing.
    """
    with _loss_errors():
        objective = losses.compose(args.loss, CLASSES_TRIED, **_recipe(args))
    architecture = _architecture(args, objective.heads)
    if continued:
        return
    if args.checkpoint:
        need_file(checkpoint_file(args.checkpoint), "checkpoint")
    else:
        check_pretrained(architecture, args.pretrained)


def _architecture(args: Options, heads: tuple[str, ...]) -> net.Architecture:
    own = net.Architecture.entries(vars(args))
    return net.Architecture(**own, heads=heads, **methods.architecture(args))


def build_objective(args: Options, num_classes: int, device: torch.device) -> losses.Objective:
    """The weighted sum of loss terms that the options describe, the same in all processes.

    Raises:
        InputError: the loss is unknown, or does not take such arguments.
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
    """Divides the proxies: each process keeps its share of them.

    Raises:
        InputError: there is only one process, or the loss has no proxies that can be divided.
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
    """Checks, before the run begins, that the loss can learn from its batches.

    Raises:
        InputError: there is only one class, or no batch has the pairs that the loss needs, or the
            loss fails, is not finite or has no gradient on random embeddings for such a batch.
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
    """The arguments of `losses.compose` besides the name of the loss and the classes."""
    return {
        "embedding_size": args.embedding_size,
        "attach": methods.attachments(args),
        "l2_norm": bool(args.l2_norm),
        **options.criterion_arguments(args),
    }


@contextlib.contextmanager
def _loss_errors() -> Iterator[None]:
    """Turns errors of a loss about its arguments, which came from the flags, into InputErrors.

    These are the sentences of `raise` statements. Other ValueErrors, such as those of an unpacking
    in a loss of one's own, are faults in its code: only their tracebacks say where.
    """
    try:
        yield
    except ValueError as error:
        if not (traceback.extract_tb(error.__traceback__)[-1].line or "").startswith("raise "):
            raise
        raise InputError(as_clause(str(error))) from error
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
        continued: whether the weights will come from the run's own checkpoint, so that those it
            started from are not needed.

    Raises:
        InputError: options exclude each other, weights cannot be had, or the network cannot take
            images of this size.
    """
    with processes.main_first():  # the other processes find the files that it has downloaded
        network = net.build(
            _architecture(args, heads),
            # A checkpoint replaces all weights, so that no others need to be there.
            pretrained=None if continued or args.checkpoint else args.pretrained,
            masks=methods.masks(args),
        )
    if args.checkpoint and not continued:
        _start_from(network, args.checkpoint)
    network.to(precision.device, memory_format=precision.memory_format)
    network.check_image_size(args.image_size)
    processes.copy_main(network.state_dict().values())
    if processes.is_group():
        share_batches(network)
    _choose_how_to_compute(network, args, precision)
    for routine in routines:
        routine.start(network)
    return network


def _start_from(network: net.EmbeddingNet, checkpoint: str) -> None:
    """Loads all weights of --checkpoint into the network, except masks."""
    file = checkpoint_file(checkpoint)
    begun = net.with_weights(whole(load_checkpoint(file), file))
    net.load_checkpoint(network, begun, file, masks=False)


def _choose_how_to_compute(network: net.EmbeddingNet, args: Options, precision: Precision) -> None:
    """Switches recomputation of blocks, compilation, or recording of steps on, by the options.

    Raises:
        InputError: options that exclude each other.
    """
    if args.grad_checkpointing:
        if args.compile and network.updates_statistics:
            raise InputError(
                "--compile cannot compute BatchNorms that train once more; leave it or "
                "--grad-checkpointing out, or use --bn-freeze 1"
            )
        network.recompute_blocks()
    if args.compile:
        network.compile()
        compiling.announce()
    elif can_be_recorded(args, precision):
        network.record()


def can_be_recorded(args: Options, precision: Precision) -> bool:
    """Whether every step runs the same kernels, on a single GPU."""
    alone = precision.device.type == "cuda" and not processes.is_group()
    return bool(args.cuda_graphs) and alone and not args.grad_checkpointing


def build_loader(
    args: Options,
    images: ImageSet,
    batches: BatchSampler,
    spec: InputSpec,
    viewing: Viewing,
    device: torch.device,
) -> Loader:
    """The loader of the training images in these batches, prepared as `spec` says.

    Raises:
        InputError: the augmentation is unknown, or the pixels do not fit where they should be kept.
    """
    return train_loader(
        images,
        batches,
        augment=args.augment,
        spec=spec,
        device=device,
        workers=args.workers,
        seed=args.seed,
        image_size=args.image_size,
        crop_scale=args.crop_scale,
        max_bad_images=args.max_bad_images,
        reading=viewing.reading,
    )


def trained_groups(
    args: Options,
    network: net.EmbeddingNet,
    objective: losses.Objective,
    routines: Sequence[Routine],
) -> Sequence[ParameterGroup]:
    """Parameter groups of backbone, heads, masks and criterion, each with its learning rate.

    Raises:
        InputError: no parameter would train.
    """
    groups: Sequence[ParameterGroup] = network.parameter_groups(
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
    return groups


def build_optimisers(
    args: Options,
    groups: Sequence[ParameterGroup],
    rates: schedules.Rates,
    scaler: torch.amp.GradScaler | None,
) -> optim.Optimisers:
    """The optimisers of all groups."""
    momentum, nesterov = args.momentum, bool(args.nesterov)
    rule = optim.Rule(args.optimizer, args.adam_eps, momentum, nesterov, args.weight_decay)
    return optim.Optimisers(groups, rule, rates, optim.Clipping(args.clip_norm, args.clip), scaler)


def build_rates(args: Options, length: Length, steps_per_epoch: int) -> schedules.Rates:
    """The schedules of the learning rates and, if --schedule changes it, of the momentum.

    Raises:
        InputError: the cosine would end before the warm-up does.
    """
    schedule, momentum = _schedules(args, length, steps_per_epoch)
    return schedules.Rates(schedule, momentum, args.lr_min, args.lr_warmup or 0)


def _schedules(
    args: Options, length: Length, steps_per_epoch: int
) -> tuple[schedules.Schedule, schedules.Schedule | None]:
    """The schedules of the rates and of the momentum (None: constant); see `build_rates`."""
    total = length.total_steps(steps_per_epoch), None if length.steps else steps_per_epoch
    match args.schedule:
        case "step":
            return schedules.step_decay(args.lr_decay_step, args.lr_decay_gamma), None
        case "milestones":
            return schedules.milestones(args.milestones, args.lr_decay_gamma), None
        case "cosine":
            ends = args.cosine_epochs and args.cosine_epochs * steps_per_epoch
            rises = schedules.rise(total[0], args.lr_warmup)
            if ends and ends <= rises:
                raise InputError(
                    f"--cosine-epochs {args.cosine_epochs} is over after step {ends}, and the "
                    f"rates rise until step {rises}; choose more epochs, or a shorter rise "
                    "(--lr-warmup STEPS)"
                )
            more = {"warmup": args.lr_warmup, "floor": args.lr_floor, "length": ends}
            return schedules.cosine(*total, **more), None
        case "onecycle":
            return schedules.one_cycle(*total)
    return schedules.constant, None
