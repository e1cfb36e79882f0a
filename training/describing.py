"""What would run, in words: the lines with which a run begins, and all that --dry-run says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

import methods
import net
import options
import processes
from devices import device_name
from flags import Options
from storage import need_room
from training.data import Data
from training.doubts import doubts
from training.state import Training
from utils import counted


def describe(training: Training) -> str:
    """Data counts, parameters, steps per epoch, optimiser groups, disk; notes and warnings."""
    args = options.kept(training.options)
    notes = [
        *options.notices(args),
        *_about_warmup(training),
        *_about_milestones(training, args),
        *_about_pieces(training, args.batch_size),
        *_about_norms(training, args),
    ]
    lines = [
        *_about_choice(args.chosen),
        *_about_data(training, args),
        *_about_network(training.network, args),
        *_about_loss(training, args),
        *_about_steps(training, args),
        *(f"optimiser   {line}" for line in training.optimisers.describe()),
        f"disk        {_about_disk(training, args)}",
        *(f"ema         {words}" for words in _about_average(training)),
        *(f"note        {line}" for line in notes),
        *(f"warning     {line}" for line in doubts(training)),
    ]
    return "\n".join(lines)


def _about_data(training: Training, args: Options) -> list[str]:
    data, train = training.data, training.data.train
    source = f" ({train.source})" if train.source not in ("", args.dataset) else ""
    return [
        f"data        {args.dataset}: {len(train):,} images, {train.num_classes:,} classes{source}",
        *([] if train.upright else ["pictures    as stored, EXIF orientation ignored"]),
        *(f"evaluation  {task.title}: {task.describe()}" for task in data.test),
        *_what_is_left_out(data),
        f"best epoch  {_what_picks_it(training)}",
    ]


def _what_picks_it(training: Training) -> str:
    """What the best epoch is picked on."""
    if not training.data.selects_on_test:
        return f"on validation: {training.data.selection[0].describe()}"
    if training.length.evaluates_once(len(training.loader)):
        return "none is picked: evaluated once, at the end"
    return "on the test classes"


def _about_network(network: net.EmbeddingNet, args: Options) -> list[str]:
    parameters = sum(p.numel() for p in network.parameters())
    begun = f"checkpoint {args.checkpoint}" if args.checkpoint else f"pretrained {args.pretrained}"
    return [
        f"network     {args.model}, {args.image_size} px, stem {args.stem}, "
        f"{parameters:,} parameters, {begun}",
        *_what_rests(network),
    ]


def _about_loss(training: Training, args: Options) -> list[str]:
    parameters = sum(map(processes.whole_size, training.objective.parameters()))
    terms = " + ".join([args.loss, *methods.attachments(args)])
    more = [*methods.notes(args), *filter(None, [training.objective.cost()])]
    return [
        f"loss        {terms}, {parameters:,} parameters",
        *(f"            {words}" for words in more),
    ]


def _about_steps(training: Training, args: Options) -> list[str]:
    precision = training.precision
    several = f", {processes.world()} processes" if processes.world() > 1 else ""
    return [
        f"device      {device_name(precision.device)}, precision {precision.name}{several}",
        f"steps       {len(training.loader)} per epoch of {args.batch_size} images each, "
        + counted(training.length.epochs, "epoch"),
    ]


def _about_choice(chosen: Sequence[Sequence[str]]) -> list[str]:
    """What was set to suit the images, and why; the first line says for what."""
    words = [f"{settings}: {why}" if settings else why for settings, why in chosen]
    return [f"{'' if number else 'chosen':<12}{line}" for number, line in enumerate(words)]


def _about_disk(training: Training, args: Options) -> str:
    """How much of the disk the run will take.

    Raises:
        InputError: that much is not free.
    """
    needed = training.bytes_on_disk(args.keep)
    advice = "choose another --LOG_DIR" + (", or a smaller --keep" if args.keep else "")
    room = partial(need_room, Path(args.LOG_DIR), needed, "what the run keeps", advice)
    return f"the run keeps {processes.from_main(room)}"


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


# --- notes ----------------------------------------------------------------------------------------


def _about_warmup(training: Training) -> list[str]:
    rising = training.optimisers.rates.warmup
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
