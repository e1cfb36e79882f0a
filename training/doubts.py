"""Warnings about settings that can hardly work, printed before the first step and by --dry-run."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

import options
from flags import Options
from net.choices import ALL_BLOCKS
from options.suited import LEAST_STEPS, instances_in
from training.state import Training
from utils import counted

LOW_RATE = 1e-4  # up to this rate of Adam's, a step changes little
ENOUGH_CLASSES = 5  # in a test set


def doubts(training: Training) -> Iterator[str]:
    """One sentence for each doubt about a run that is about to start."""
    args = options.kept(training.options)
    yield from _too_few_steps(training, args)
    yield from _network_never_trains(training, args)
    yield from _few_pairs(training, args)
    for task in training.data.test:
        if (count := task.queries.num_classes) < ENOUGH_CLASSES:
            yield (
                f"{task.title} is judged on {count} classes, which says little about others; the "
                "more classes there are, the more the numbers mean"
            )


def _too_few_steps(training: Training, args: Options) -> Iterator[str]:
    """A network that starts from scratch needs more steps, or longer ones, than these."""
    steps, rate = len(training.loader), args.lr if args.lr_p is None else args.lr_p
    from_nothing = args.pretrained == "none" and not args.checkpoint
    from_nothing = from_nothing and args.freeze_blocks != ALL_BLOCKS
    short = args.optimizer in ("adamw", "adam") and rate <= LOW_RATE
    if from_nothing and short and steps < LEAST_STEPS:
        total = training.length.total_steps(steps)
        yield (
            f"{counted(steps, 'step')} per epoch, {total:,} in all, at a rate of {rate:g} hardly "
            "move a network that starts from scratch; use --pretrained imagenet, or a smaller "
            "--batch-size, more --epochs and a higher --lr (your own images: --defaults suited)"
        )


def _network_never_trains(training: Training, args: Options) -> Iterator[str]:
    length = training.length
    if not args.warm or args.freeze_blocks == ALL_BLOCKS:
        return
    if args.warm >= length.epochs:
        more = "--steps" if args.steps else "--epochs"
        yield (
            f"--warm {args.warm} of {counted(length.epochs, 'epoch')}: the network itself never "
            f"trains, only its head does; use --warm 0, or more {more}"
        )
    elif args.warm >= length.epochs_begun(len(training.loader)):
        yield (
            f"--max-steps {length.max_steps} ends within --warm {args.warm}: until then only the "
            "head trains, not the network itself; use --warm 0, or more --max-steps"
        )


def _few_pairs(training: Training, args: Options) -> Iterator[str]:
    """A loss on pairs finds few of them in batches drawn without regard to the classes."""
    if not training.objective.needs_pairs or args.IPC or args.nb_clusters is not None:
        return
    sizes = np.bincount(training.data.train.labels)
    images, size = sizes.sum(), args.batch_size
    # The probability that another image of the batch is of the same class.
    alike = (sizes * (sizes - 1)).sum() / (images * (images - 1))
    paired = size * (1 - (1 - alike) ** (size - 1))
    if paired < size / 2:
        each = instances_in(size, len(sizes))
        divided = 4 * max(2, min(size // 4, len(sizes)))
        better = f"--IPC {each}" if each else f"--IPC 4 --batch-size {divided}"
        yield (
            f"--loss {args.loss} learns from pairs, and of a batch of {size} about "
            f"{paired:.0f} images have another of their class in it; use {better}"
        )
