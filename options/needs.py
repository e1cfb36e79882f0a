"""The conditions under which flags have an effect (`Flag.need`)."""

from __future__ import annotations

from pathlib import Path

import dataset
import net
from flags import Need, Options


def schedule_is(*names: str) -> Need:
    """The flag has an effect with these schedules."""
    return Need(f"--schedule {' or '.join(names)}", lambda args: args.schedule in names)


NO_RISE = Need(
    "--schedule step, milestones, cosine or constant", lambda args: args.schedule != "onecycle"
)
ADAM = Need("--optimizer adamw or adam", lambda args: args.optimizer in ("adamw", "adam"))
MOMENTUM = Need(
    "--optimizer sgd or rmsprop, without --schedule onecycle, which has a momentum of its own",
    lambda args: args.optimizer in ("sgd", "rmsprop") and args.schedule != "onecycle",
)
BLOCKS_TRAIN = Need(
    "a backbone that trains (not --freeze-blocks all)",
    lambda args: args.freeze_blocks != net.ALL_BLOCKS,
)
SGD = Need(
    "--optimizer sgd with a --momentum above 0",
    lambda args: args.optimizer == "sgd" and args.momentum > 0,
)
NOT_COMPILED = Need("runs without --compile", lambda args: not args.compile)
PHOTOGRAPHS = Need("photographs", lambda args: args.dataset.lower() != "emoji")
OWN_DATA = Need(
    "your own images (--dataset folder:PATH or csv:FILE)",
    lambda args: args.dataset.lower().startswith(("folder:", "csv:")),
)
UNDER_A_ROOT = Need(
    "data sets that lie under it, not to your own images, nor to emoji, which is part of the "
    "program",
    lambda args: dataset.find(args.dataset).lies_under(Path(args.data_root)),
)
CROPPED = Need(
    "--augment crop, sec, Geom, GeomColor or ColorHeavy",
    lambda args: (args.augment or dataset.protocol(args.dataset).augment) not in ("none", "emoji"),
)
OF_TIMM = Need(
    "models of timm (--model timm:NAME)", lambda args: args.model.lower().startswith(net.TIMM)
)
NEW_HEADS = Need(
    "heads that start anew (--head linear or training, without --checkpoint)",
    lambda args: args.head != "none" and not args.checkpoint,
)
CACHED = Need("--decode cache", lambda args: args.decode == "cache")
BY_EPOCHS = Need("runs without --steps", lambda args: args.steps is None)
EVALUATED_BY_EPOCHS = Need("runs without --eval-steps", lambda args: args.eval_steps is None)
FOLDED = Need("--val-fold", lambda args: args.val_fold is not None)
NOT_FOLDED = Need(
    "runs without --val-fold and --val-classes",
    lambda args: not args.folds or (args.val_fold is None and not args.val_classes),
)
HELD_OUT = Need(
    "--val-classes or --val-fold", lambda args: args.val_classes or args.val_fold is not None
)
NO_FOLD = Need("runs without --val-fold", lambda args: args.val_fold is None)
BY_CLASS = Need(
    "batches that are drawn by class (not --batch-sampler randombatch)",
    lambda args: args.nb_clusters is None or args.batch_sampler != "randombatch",
)
BALANCED = Need("--IPC, without --nb-clusters", lambda args: args.IPC and args.nb_clusters is None)
SOME_DECAY = Need("--decay-vectors 0", lambda args: not args.decay_vectors)
NORMS_TRAIN = Need(
    "a backbone that trains, with --bn-freeze 0",
    lambda args: BLOCKS_TRAIN.met(args) and (args.bn_freeze or bn_freeze_of(args)) == "0",
)

RETRIEVAL = Need("--metrics with retrieval in it", lambda args: "retrieval" in args.metrics)
CLUSTERING = Need(
    "--metrics with nmi, f1 or ami in it", lambda args: {"nmi", "f1", "ami"} & set(args.metrics)
)
PICTURES = Need(
    "--neighbours, --failures or --query",
    lambda args: args.neighbours or args.failures or args.query,
)
TRACKED = Need("wandb or --tensorboard", lambda args: args.wandb != "disabled" or args.tensorboard)
ONE_PAGE = Need("the page of runs (without --compare)", lambda args: not args.compare)
COMPARED = Need("--compare", lambda args: args.compare)
OWN_FOLDER = Need("--failures or --query", lambda args: args.failures or args.query)
RESUMED = Need("the evaluation of a checkpoint (--resume)", lambda args: args.resume)
AS_IT_STARTS = Need(
    "a network that is evaluated as it starts (--model without --resume)",
    lambda args: not args.resume,
)


def pretrained_of(args: Options) -> str:
    """The value of --pretrained: as given, or else the data set's default."""
    if args.pretrained is not None:
        return args.pretrained
    return dataset.protocol(args.dataset).pretrained


def bn_freeze_of(args: Options) -> str:
    """The default of --bn-freeze."""
    return "0" if pretrained_of(args) == "none" else "1"
