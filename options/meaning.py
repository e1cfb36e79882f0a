"""What options mean: the defaults that depend on others, which flags are read, which clash."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import dataset
import methods
import net
from flags import Flag, Options
from options import suited
from options.declared import EVALUATE_GROUPS, TRAIN_GROUPS, flags_of, train_flags
from options.evaluating import SINGLE_IMAGES
from options.needs import PHOTOGRAPHS, bn_freeze_of, pretrained_of
from options.ranking import ranking_of
from utils import InputError


def changed(args: Options, values: Mapping[str, Any]) -> Options:
    """A copy of the options with some other values."""
    return Options(**{**vars(args), **values})


def as_suited(args: Options) -> Options:
    """The options with settings that suit the user's own images, if these are wanted.

    `chosen` then lists the settings, each with its reason. Missing images are no error yet; they
    are when they are read.

    Raises:
        InputError: the images cannot be used.
    """
    if not suited.wanted(args) or dataset.Choice(args.dataset).is_gone:
        return changed(args, {"defaults": "published", "chosen": []})
    from options import looking  # loads torch, which training needs anyway

    args, explained = suited.choose(args, looking.images_of, looking.this_machine(args))
    return changed(args, {"defaults": "suited", "chosen": explained})


def as_published(args: Options) -> Options:
    """The options with the defaults of the published command of each method that is used.

    If settings were chosen to suit the user's own images, only the flags of methods get these.
    """
    of_methods = {entry.dest for entry in flags_of(methods.groups())}
    for method in methods.METHODS:
        published = {k: v for k, v in method.defaults(args).items() if k not in args.given}
        if args.defaults == "suited":
            published = {k: v for k, v in published.items() if k in of_methods}
        args = changed(args, published)
    return args


def resolved(args: Options) -> Options:
    """The options with the defaults that depend on data set and network filled in.

    These are image size, weights, pooling and the like. Nothing changes the options afterwards.

    Raises:
        InputError: the data set is unknown, or --eval-resize is smaller than the image size.
    """
    protocol, backbone = dataset.protocol(args.dataset), net.find_backbone(args.model)
    usual = backbone.image_size if PHOTOGRAPHS.met(args) else None
    size = args.image_size or usual or protocol.image_size
    if args.eval_resize is not None and args.eval_resize < size:
        raise InputError(
            f"--eval-resize {args.eval_resize} is less than the {size} pixels that are cut out of "
            f"the image; choose at least {size}"
        )
    decided = {
        "image_size": size,
        "pretrained": pretrained_of(args),
        "stem": backbone.default_stem(size),
        "pooling": backbone.poolings[0],
        "bn_freeze": bn_freeze_of(args),
        "bn_momentum": backbone.bn_momentum,
        "augment": protocol.augment,
    }
    return changed(
        args, {name: value for name, value in decided.items() if getattr(args, name, 0) is None}
    )


# --- which flags are read -------------------------------------------------------------------------


def unread(args: Options, entries: Sequence[Flag]) -> list[Flag]:
    """The flags that were given, but have no effect."""
    return [entry for entry in entries if entry.dest in args.given and not entry.is_read(args)]


def useless(entry: Flag) -> str:
    """The sentence about a flag that was given, but has no effect."""
    assert entry.need is not None
    return (
        f"{entry.spellings[0]} has no effect here: it belongs to {entry.need.name}; remove it or "
        "choose that"
    )


def check_read(args: Options) -> None:
    """Raises InputError if a flag of evaluate.py was given that has no effect."""
    for entry in unread(args, flags_of(EVALUATE_GROUPS)):
        raise InputError(useless(entry))


def notices(args: Options) -> list[str]:
    """A sentence for each given flag that has no effect."""
    dead = [entry for entry in train_flags() if entry.dead and entry.dest in args.given]
    return [
        *(f"{entry.spellings[0]} changes nothing here: {entry.help}" for entry in dead),
        *(
            f"{entry.spellings[0]} in the file of flags has no effect: it belongs to "
            f"{entry.need.name}"
            for entry in unread(args, train_flags())
            if entry.need
        ),
    ]


def check_name(args: Options) -> None:
    """Raises InputError if --name cannot be the name of a folder."""
    if args.name and Path(args.name).name in ("", ".."):
        raise InputError(f"--name {args.name} is no name of a folder; give another")


def check_schedule(args: Options) -> None:
    """Raises InputError if flags of the schedule clash, or one that it needs is missing."""
    if args.schedule == "milestones" and not args.milestones:
        raise InputError(
            "--schedule milestones decays at the steps that --milestones names; name them, or use "
            "--schedule constant"
        )
    if args.lr_min and args.lr_floor:
        raise InputError(
            "--lr-min and --lr-floor both say where the cosine ends; leave one of them out"
        )
    for flag, rate in (("--lr", args.lr), ("--lr_p", args.lr_p)):
        if rate is not None and args.lr_min > rate:
            raise InputError(
                f"--lr-min {args.lr_min:g}, the rate at the end of the cosine, is above {flag} "
                f"{rate:g}, the rate at its start; choose at most that, or --lr-floor F, a share "
                "of each rate"
            )


def check_metrics(args: Options, evaluated: Iterable[dataset.DataSet]) -> None:
    """Raises InputError if `--metrics official` was given and no data set has such a protocol."""
    asked = "metrics" in args.given and "official" in args.metrics
    if asked and not any(entry.protocol.sizes for entry in evaluated):
        raise InputError(
            "--metrics official is the protocol of VehicleID (--dataset vid) and of no other data "
            "set; leave it out"
        )


def check_ranking(args: Options) -> None:
    """Raises InputError if post-processing flags make no sense, or clash with other flags."""
    if args.whiten is not None and len(args.dims) > 1:
        raise InputError(
            f"--whiten is fitted to one embedding and --dims names {len(args.dims)}; give one of "
            "them"
        )
    if not ranking_of(args):
        return
    flags = ("query_expansion", "database_augmentation", "rerank")
    asked = next(name for name in flags if getattr(args, name) is not None)
    asked = f"--{asked.replace('_', '-')}"
    for name in ("neighbours", "failures", "query"):
        if getattr(args, name):
            raise InputError(
                f"{asked} changes the retrieval metrics alone, and --{name} would show the "
                "neighbours without it; leave one of them out"
            )
    if "metrics" in args.given and "official" in args.metrics:
        raise InputError(
            f"--metrics official draws galleries of its own, and {asked} is of one gallery; leave "
            "one of them out"
        )


def check_one_checkpoint(args: Options, count: int) -> None:
    """Raises InputError if a flag describes one embedding, but several are evaluated."""
    given = [entry for entry in SINGLE_IMAGES.flags if entry.dest in args.given]
    if count > 1 and given:
        raise InputError(
            f"{given[0].spellings[0]} describes one checkpoint and --resume names {count}; name "
            "one of them"
        )
    if len(args.dims) > 1 and given:
        raise InputError(
            f"{given[0].spellings[0]} describes one embedding and --dims names {len(args.dims)}; "
            "give one of them"
        )


# --- options as others need them ------------------------------------------------------------------


def criterion_arguments(args: Options) -> dict[str, Any]:
    """The keyword arguments that the chosen loss is built with."""
    by_flags = {
        entry.argument: getattr(args, entry.dest)
        for entry in train_flags()
        if entry.argument and entry.need and entry.need.met(args)
    }
    return {**by_flags, **dict(args.loss_args)}


def by_flag(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The stored options of a run, by the names of their flags."""
    return {
        entry.spellings[0].lstrip("-"): stored[entry.dest]
        for entry in train_flags()
        if entry.dest in stored and not entry.dead
    }


def of_all_processes(args: Options) -> dict[str, Any]:
    """Flag → value of all options that processes working together must share."""
    groups = TRAIN_GROUPS if "loss" in args else EVALUATE_GROUPS
    flags = [entry for entry in flags_of(groups) if not entry.local]
    return {entry.spellings[0]: getattr(args, entry.dest) for entry in flags}
