"""A run in words: the lines that are printed at its start, which are all that --dry-run prints."""

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
from terminal import fitted
from training.data import Data
from training.doubts import doubts
from training.state import Training
from utils import counted

MARGIN = 12  # columns of the labels, such as `data`, on the left


def describe(training: Training) -> str:
    """Data counts, parameters, steps per epoch, optimiser groups, disk; notes and warnings.

    The lines fit the terminal.
    """
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
        *(_line("optimiser", group) for group in training.optimisers.describe()),
        _line("disk", _about_disk(training, args)),
        *_about_average(training),
        *(_line("note", note) for note in notes),
        *(_line("warning", doubt) for doubt in doubts(training)),
    ]
    return fitted("\n".join(lines), " " * MARGIN)


def _line(label: str, words: str) -> str:
    """A line with its label; an empty label continues the line above."""
    return f"{label:<{MARGIN}}{words}"


def _about_data(training: Training, args: Options) -> list[str]:
    data, train = training.data, training.data.train
    source = f" ({train.source})" if train.source not in ("", args.dataset) else ""
    return [
        _line(
            "data",
            f"{args.dataset}: {len(train):,} images, {train.num_classes:,} classes{source}",
        ),
        *([] if train.upright else [_line("pictures", "as stored, EXIF orientation ignored")]),
        *(_line("evaluation", f"{task.title}: {task.describe()}") for task in data.test),
        *_what_is_left_out(data),
        _line("best epoch", _what_picks_it(training)),
    ]


def _what_picks_it(training: Training) -> str:
    """How the best epoch is picked."""
    if not training.data.selects_on_test:
        return f"on validation: {training.data.selection[0].describe()}"
    if training.length.evaluates_once(len(training.loader)):
        return "none is picked: evaluated once, at the end"
    return "on the test classes"


def _about_network(network: net.EmbeddingNet, args: Options) -> list[str]:
    parameters = sum(p.numel() for p in network.parameters())
    begun = f"checkpoint {args.checkpoint}" if args.checkpoint else f"pretrained {args.pretrained}"
    words = (
        f"{args.model}, {args.image_size} px, stem {args.stem}, {parameters:,} parameters, {begun}"
    )
    return [_line("network", words), *_about_frozen(network)]


def _about_loss(training: Training, args: Options) -> list[str]:
    parameters = sum(map(processes.whole_size, training.objective.parameters()))
    terms = " + ".join([args.loss, *methods.attachments(args)])
    more = [*methods.notes(args), *filter(None, [training.objective.cost()])]
    return [
        _line("loss", f"{terms}, {parameters:,} parameters"),
        *(_line("", words) for words in more),
    ]


def _about_steps(training: Training, args: Options) -> list[str]:
    precision = training.precision
    several = f", {processes.world()} processes" if processes.world() > 1 else ""
    per_epoch = f"{len(training.loader)} per epoch of {args.batch_size} images each"
    return [
        _line("device", f"{device_name(precision.device)}, precision {precision.name}{several}"),
        _line("steps", f"{per_epoch}, {counted(training.length.epochs, 'epoch')}"),
    ]


def _about_choice(chosen: Sequence[Sequence[str]]) -> list[str]:
    """The settings chosen to suit the images, and why; the first line says for which images."""
    words = [f"{settings}: {why}" if settings else why for settings, why in chosen]
    return [_line("" if number else "chosen", line) for number, line in enumerate(words)]


def _about_disk(training: Training, args: Options) -> str:
    """How much disk space the run will take.

    Raises:
        MachineError: that much is not free.
    """
    needed = training.bytes_on_disk(args.keep)
    advice = "choose another --LOG_DIR" + (", or a smaller --keep" if args.keep else "")
    room = partial(need_room, Path(args.LOG_DIR), needed, "what the run keeps", advice)
    return f"the run keeps {processes.from_main(room)}"


def _what_is_left_out(data: Data) -> list[str]:
    """A line about images that cannot be read, if there are any."""
    train, judged = (data.unreadable.get(side, 0) for side in ("train", "eval"))
    parts = [f"{train:,} for training, others take their place"] if train else []
    parts += [f"{judged:,} for evaluation, left out"] if judged else []
    return [_line("unreadable", "; ".join(parts))] if parts else []


def _about_frozen(network: net.EmbeddingNet) -> list[str]:
    """A line about how much of the network trains, if that is not all of it."""
    if not network.is_partly_frozen:
        return []
    trained, total = network.counts()
    return [_line("", f"{trained:,} of them train ({trained / total:.2%})")]


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
    """A note that flags about BatchNorms change nothing in a network without any."""
    given = [name for name in ("bn_freeze", "bn_momentum") if name in args.given]
    if not given or training.network.has_batch_norms:
        return []
    named = " and ".join(f"--{name.replace('_', '-')}" for name in given)
    verb = "changes" if len(given) == 1 else "change"
    return [f"{named} {verb} nothing: {args.model} has no BatchNorm"]


def _about_average(training: Training) -> list[str]:
    average = training.average
    if average is None:
        return []
    return [_line("ema", f"{average.decay:g}: a mean of the weights picks the best epoch")]
