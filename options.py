"""The flags that belong to no method, and how a command line becomes options.

Reads nothing but the command line, so `--help` and a mistyped flag answer at once. Published
commands are accepted as printed. Flags may stand in a file, one or more per line; `#` starts
a comment: `python train.py @recipes/emoji_amloss.txt --seed 2`; what comes later wins.

The flags of a method stand in methods/. Options are resolved once, when they are parsed
(`resolved`); what a run has kept of them is read back by `kept`.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from typing import Any, NoReturn

import criteria
import dataset
import methods
import net
from flags import (
    BINARY,
    CONTINUED,
    COUNT,
    COUNT_OR_ZERO,
    EPOCHS,
    LABEL,
    NOTHING,
    SEED,
    SHARE,
    SWITCH,
    Change,
    Flag,
    Group,
    Kind,
    Need,
    any_text,
    flag,
    key_value,
    not_negative,
    number,
    one_of,
    positive,
    whole,
)
from utils import InputError, close_names

# --- who listens ----------------------------------------------------------------------------------


def schedule_is(*names: str) -> Need:
    """The flag belongs to these schedules."""
    return Need(f"--schedule {' or '.join(names)}", lambda args: args.schedule in names)


PHOTOGRAPHS = Need("photographs", lambda args: args.dataset.lower() != "emoji")
OWN_DATA = Need(
    "your own images (--dataset folder:PATH or csv:FILE)",
    lambda args: args.dataset.lower().startswith(("folder:", "csv:")),
)
CACHED = Need("--decode cache", lambda args: args.decode == "cache")
BY_EPOCHS = Need("runs without --steps", lambda args: args.steps is None)
EVALUATED_BY_EPOCHS = Need("runs without --eval-steps", lambda args: args.eval_steps is None)
HELD_OUT = Need(
    "--val-classes or --val-fold", lambda args: args.val_classes or args.val_fold is not None
)
NO_FOLD = Need("runs without --val-fold", lambda args: args.val_fold is None)
SOME_DECAY = Need("--decay-vectors 0", lambda args: not args.decay_vectors)

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

# --- the flags ------------------------------------------------------------------------------------

METRICS = ("retrieval", "official", "nmi", "f1", "ami")
"""What an evaluation can compute."""
METRICS_TEXT = (
    "what to compute. retrieval: R@K, RP, MAP@R, mARP, MRR; official: VehicleID's gallery of one "
    "image per vehicle (10 draws); nmi, f1, ami: k-means with one cluster per class"
)
LOSSES_TEXT = f"{criteria.losses_in_words()}; or pml:NAME for any loss of pytorch-metric-learning"
DATASETS_TEXT = f"{', '.join(dataset.NAMES)} (emoji is in the repository), folder:PATH, csv:FILE"
AMP_TEXT = "precision of the network; auto: bf16 where the hardware has it; the rest is float32"

METRIC_NAMES = Kind(str.lower, "NAME", METRICS, nargs="+")

# fmt: off
DATA = Group("data", (
    flag("--dataset --use_dataset", "emoji", any_text("NAME"), DATASETS_TEXT),
    flag("--data-root --dataset-dir", "data", any_text("DIR"), "folder that holds the data sets",
         change=NOTHING),
    flag("--eval-classes", None, Kind(number(0.0, 1.0, above=True), "F"),
         "share of the classes of your own images that is held out", need=OWN_DATA,
         shown="0.5; what the data say themselves comes first"),
    flag("--split-seed", None, COUNT_OR_ZERO, "chooses which classes these are", need=OWN_DATA,
         shown="1"),
    flag("--ratio-classes", 1.0, Kind(number(0.0, 1.0, above=True), "F"),
         "only the first F of the classes of each split, for a quick trial"),
    flag("--image-size --sz-crop", None, Kind(whole(16), "PX"),
         "side of the square the network sees",
         shown="the data set's: 64 for emoji, 224 for photographs"),
    flag("--eval-resize --sz-resize", None, Kind(whole(16), "PX"),
         "evaluation brings the short side of a photograph to this and cuts out the centre",
         need=PHOTOGRAPHS, shown="256 for 224 and 227 pixels, in proportion for others"),
    flag("--eval-zoom", 1.0, Kind(number(0.5, 1.0), "X"),
         "evaluation sees pictures at this size, on white; for drawings (emoji)"),
    flag("--decode", "exact", one_of("exact", "cache"),
         "exact: a file is decoded whenever it is needed; cache: all are decoded once, and their "
         "pixels kept on disk", need=PHOTOGRAPHS),
    flag("--cache-size", 256, Kind(whole(16), "PX"),
         "short side of the images in the cache; 256 gives the evaluation what exact gives it",
         need=CACHED),
    flag("--cache-dir", None, any_text("DIR"), "where caches are kept", need=CACHED,
         shown="~/.cache/anchorage", change=NOTHING),
    flag("--data-device", None, one_of("cpu", "cuda"),
         "cuda: the cache's pixels lie in the GPU's memory and are cut there; cpu keeps pictures "
         "that are in memory anyway off the GPU", shown="cpu for files, the GPU for pictures in "
         "memory", change=NOTHING),
    flag("--workers --num-workers", 4, COUNT_OR_ZERO, "processes that read images, for each GPU",
         change=NOTHING),
    flag("--batch-size --batch_size", 150, Kind(whole(2), "N"),
         "images a step, over all processes"),
))
SELECTION = Group("batches and model selection", (
    flag("--IPC --instances --num-samples-per-class", 0, COUNT_OR_ZERO,
         "images per class: batch/N classes with N images each; 0 shuffles (2 with --nb-clusters)"),
    flag("--augment --album", None,
         Kind(str, "NAME", ("crop", "sec", "emoji", "none", "Geom", "GeomColor", "ColorHeavy")),
         "crop: random resized crop and flip; sec: the same from an image of 256 pixels; emoji: "
         "affine and colour, no flip; Geom, GeomColor, ColorHeavy: crop and flip, then turns, "
         "holes and blur; the same with light and contrast; strong colour and grey",
         shown="the data set's"),
    flag("--max-bad-images", 0.01, Kind(number(0.0, 1.0), "F"),
         "share of the training images that may be unreadable; each is replaced by another of its "
         "class, and named"),
    flag("--val-classes", 0.0, Kind(number(0.0, 0.5), "F"),
         "share of the training classes that picks the best epoch instead of the test classes, "
         "which are then looked at once, at the end; 0 follows the papers' protocol: best epoch on "
         "the test classes", need=NO_FOLD),
    flag("--val-fold", None, COUNT_OR_ZERO,
         "like --val-classes, with the data set's own fold N of classes (emoji: 0 to 3)"),
    flag("--no-test", False, SWITCH,
         "do not look at the test classes at the end either: for a run that only chooses options",
         need=HELD_OUT),
))
NETWORK = Group("network", (
    flag("--model --arch", "bn_inception", any_text("NAME"), ", ".join(net.MODELS)),
    flag("--embedding-size --sz-embedding", 512, COUNT, "dimensions of the embedding"),
    flag("--pretrained", None, any_text("WHAT"), "imagenet (downloads), none, or a FILE of weights",
         shown="none for emoji, imagenet for photographs"),
    flag("--checkpoint", None, any_text("FILE"),
         "start from all the weights of a checkpoint, ours or released, with fresh optimisers "
         "(to go on with a run: --resume-run)"),
    flag("--l2-norm", 1, BINARY, "1: the embedding is used at unit length"),
    flag("--pooling --features-pooling", "avg+max", one_of(*net.POOLINGS),
         "how the last feature map becomes a vector; grid: average of each cell of 4 x 4"),
    flag("--stem", None, one_of(*net.STEMS),
         "first layers: as published (stride 4), stride 2, or stride 1",
         shown="imagenet from 128 pixels on, small below"),
    flag("--width", 1.0, Kind(number(0.0, 4.0, above=True), "X"),
         "channels of a ResNet as a multiple of the published ones"),
    flag("--head-norm", 0, BINARY, "1: a BatchNorm, which is trained, before the heads"),
    flag("--head-init --init-method", "kaiming", any_text("NAME"),
         "start of the heads. kaiming: normal by fan_out with zero bias; default: PyTorch's own; "
         "xavier_uniform_GAIN, xavier_normal_GAIN, kaiming_normal_fan_in, kaiming_normal_fan_out: "
         "for each cluster's share of the dimensions; trunc_normal; pt_splitted (as default)"),
    flag("--dropout", 0.0, Kind(number(0.0, 0.99), "P"), "on the pooled features"),
    flag("--input-spec", None, one_of(*net.INPUTS),
         "colour order, scale and mean of the input", shown="what the model's weights want"),
    flag("--bn-freeze --freeze_bn", None, one_of(*net.BN_FREEZE),
         "BatchNorm of the backbone. 0: trained; 1: running statistics fixed, scale and shift "
         "train after the warm-up (as the released code does); affine: all fixed; statistics: "
         "running statistics fixed, scale and shift train",
         shown="1 with pretrained weights, else 0"),
))
LOSS = Group("loss", (
    flag("--loss --use_loss --criterion", "Proxy_Anchor", any_text("NAME"), LOSSES_TEXT),
    flag("--loss-args", (), Kind(key_value, "KEY=VALUE", nargs="+"),
         "arguments of any loss, by the names in its class: margin=0.3 soft=true; of pml: losses "
         "also distance, reducer, miner by their class: distance=LpDistance(p=1)"),
))
OPTIMISATION = Group("optimisation", (
    flag("--epochs --epoch --nb-epochs", 60, COUNT, "epochs", need=BY_EPOCHS, change=CONTINUED),
    flag("--steps", None, COUNT, "length of the run in optimisation steps instead of epochs"),
    flag("--optimizer", "adamw", Kind(str.lower, choices=("adamw", "adam", "sgd", "rmsprop")),
         "for everything but the margins of AMLoss"),
    flag("--lr --base-lr", 1e-4, positive("LR"), "learning rate of the network"),
    flag("--lr_p --lr-p", None, not_negative("LR"), "learning rate of the backbone",
         shown="--lr"),
    flag("--weight-decay", 1e-4, not_negative("WD"), "for every parameter"),
    flag("--decay-vectors", 1, BINARY,
         "0: no weight decay on biases and BatchNorms of the network"),
    flag("--decay-biases", 0, BINARY, "1: on the biases there is, on the BatchNorms not",
         need=SOME_DECAY),
    flag("--schedule", "step", one_of("step", "milestones", "cosine", "constant"),
         "step: a decay every few epochs; milestones: decays at given steps; cosine: a linear rise "
         "over a tenth of the run, then down to zero"),
    flag("--lr-decay-step", 10, EPOCHS, "epochs between two decays", need=schedule_is("step")),
    flag("--lr-decay-gamma --lr_gamma", 0.5, SHARE, "factor of a decay",
         need=schedule_is("step", "milestones")),
    flag("--milestones", (), Kind(whole(1), "STEP", nargs="+"), "when the rates decay",
         need=schedule_is("milestones")),
    flag("--clip", 10.0, not_negative("G"),
         "limit on the absolute value of each gradient entry; 0 is none"),
    flag("--amp", "auto", one_of("auto", "bf16", "fp16", "off"), AMP_TEXT),
    flag("--compile", False, SWITCH,
         "compile the network (torch.compile): minutes at the start, faster steps afterwards"),
))
RUN = Group("run", (
    flag("--LOG_DIR --log-dir", "logs", any_text("DIR"), "folder that run folders are made in",
         change=LABEL),
    flag("--name --experiment-id -i", None, any_text("NAME"), "name of the run and of its folder",
         shown="from data set, model, loss and time", change=LABEL),
    flag("--remark", "", any_text("TEXT"), "added to the run's name", change=LABEL),
    flag("--seed --random-seed -seed", 1, COUNT_OR_ZERO, "of every random draw of the run",
         change=SEED),
    flag("--deterministic", False, SWITCH,
         "the same numbers on every run on a GPU too, at some cost of speed", change=NOTHING),
    flag("--gpu-id --gpu --cuda-device", 0, Kind(whole(-1), "N"),
         "which GPU; the CPU is used where there is none; -1: all of them, a process each, as with "
         "torchrun", change=NOTHING),
    flag("--eval-every", 1, EPOCHS, "epochs between evaluations", need=EVALUATED_BY_EPOCHS,
         change=CONTINUED),
    flag("--eval-steps", None, COUNT, "steps between evaluations, instead of --eval-every"),
    flag("--metrics", METRICS, METRIC_NAMES,
         f"{METRICS_TEXT}. At every evaluation; retrieval is always computed (R@1 picks the best "
         "epoch), and the final evaluation computes all", shown="all", change=NOTHING),
    flag("--max-steps", None, COUNT, "stop after N optimisation steps, evaluate and save",
         shown="no limit", change=CONTINUED),
    flag("--save-every", None, COUNT,
         "save last.pth every N steps too, besides every epoch", shown="every epoch only",
         change=NOTHING),
    flag("--keep", 0, COUNT_OR_ZERO, "older checkpoints that remain, as step_N.pth",
         change=NOTHING),
    flag("--on-nan", "stop", one_of("stop", "skip"),
         "what a loss or gradient that is not finite does: stop the run, or skip the step (100 "
         "steps at most)", change=CONTINUED),
    flag("--resume", None, one_of("auto"),
         "auto: continue the run of this very command in --LOG_DIR if there is one, else start it",
         change=NOTHING),
    flag("--resume-run", None, any_text("DIR"),
         "continue the run in DIR from its last checkpoint, or from an older one: DIR/step_N.pth",
         change=NOTHING),
    flag("--dry-run", False, SWITCH, "print what would run, and stop", change=NOTHING),
    flag("--no-report", False, SWITCH,
         "no report.html at the end (python report.py RUN makes it at any time)", change=NOTHING),
    flag("--wandb", None, one_of("online", "offline", "disabled"),
         "where Weights & Biases keeps the run",
         shown="online when a key is configured, else offline", change=NOTHING),
    flag("--wandb-project", "anchorage", any_text("NAME"), "project there", change=NOTHING),
    flag("--tensorboard", False, SWITCH,
         "also write TensorBoard's files, into the run folder (needs the package tensorboard)",
         change=NOTHING),
    flag("--wandb-images", 10, COUNT_OR_ZERO,
         "epochs between pictures of random queries and their nearest images, in wandb and "
         "TensorBoard, as evaluations allow; 0 is none", need=TRACKED, change=NOTHING),
))
EVALUATION = Group("evaluation", (
    flag("--resume", None, Kind(str, "FILE", nargs="+"),
         "a run folder, or a checkpoint of ours or released; several are compared in one "
         "table, and those that differ in the seed alone are averaged"),
    flag("--metrics", METRICS, METRIC_NAMES, METRICS_TEXT, shown="all"),
    flag("--ks", None, Kind(whole(1), "K", nargs="+"), "which R@K to report",
         shown="the data set's", need=RETRIEVAL),
    flag("--bootstrap", None, Kind(whole(100), "N"),
         "95 % intervals of the retrieval metrics from N resamples of the queries; with several "
         "checkpoints also whether each is better than the first", need=RETRIEVAL, shown="off"),
    flag("--kmeans-restarts", 1, COUNT, "k-means runs for NMI, F1 and AMI; the best counts",
         need=CLUSTERING),
    flag("--block-size", None, COUNT,
         "images that the search compares at once: memory against speed, never the numbers",
         need=RETRIEVAL, shown="4096 on a CPU, 8192 on a GPU"),
    flag("--seed", 1, COUNT_OR_ZERO, "of k-means, --bootstrap and --neighbours"),
    flag("--gpu-id --gpu", 0, Kind(whole(-1), "N"),
         "which GPU; -1: all of them, a process each, as with torchrun"),
    flag("--amp", "auto", one_of("auto", "bf16", "fp16", "off"), AMP_TEXT),
))
FILES = Group("what evaluation also writes: tables", (
    flag("--json", None, any_text("FILE.json"), "all numbers"),
    flag("--csv", None, any_text("FILE.csv"), "the table"),
    flag("--latex", None, any_text("FILE.tex"),
         "the table for a paper (booktabs), in percent; seeds as mean and standard deviation"),
))
SINGLE_IMAGES = Group("what evaluation also writes: single images, of one checkpoint", (
    flag("--per-class", None, any_text("FILE.csv"),
         "retrieval metrics of each class, the worst first",
         need=RETRIEVAL),
    flag("--export", None, any_text("FILE.npz"),
         "unit-length embeddings, labels, paths, and the uncertainty where the network has it"),
    flag("--uncertain", None, any_text("FILE.csv"),
         "IDML: every image's path, class and uncertainty, the most uncertain first"),
    flag("--neighbours", None, any_text("FILE.png"),
         "random queries with their nearest images; --seed chooses the queries"),
    flag("--failures", None, COUNT,
         "the N worst queries, with their nearest images, to failures.csv and failures.png",
         need=RETRIEVAL),
    flag("--query", None, Kind(str, "IMAGE", nargs="+"),
         "the images of the evaluated set that are nearest to yours, to query.csv and query.png"),
    flag("--top", 10, COUNT, "nearest images that --neighbours, --failures and --query show",
         need=PICTURES),
    flag("--out", None, any_text("DIR"), "folder for what --failures and --query write",
         need=OWN_FOLDER, shown="the checkpoint's"),
))
REPORT = Group("the page of one run or several", (
    flag("--out", None, any_text("FILE.html"), "where the page goes",
         shown="report.html in the run's folder, or beside several; with --compare runs.html in "
         "that folder"),
    flag("--picture", None, any_text("FILE.png"),
         "instead of the page, one picture of one run: random queries with their nearest images, "
         "and what was learned for each class", need=ONE_PAGE),
    flag("--queries", (), Kind(str, "TEXT", nargs="+"),
         "also show the queries whose class or file contains TEXT", need=ONE_PAGE),
    flag("--embeddings", None, any_text("FILE.npz"),
         "embeddings of one run, made by evaluate.py --export, instead of the best checkpoint's",
         need=ONE_PAGE),
    flag("--seed", 1, COUNT_OR_ZERO, "of what is drawn at random", need=ONE_PAGE),
    flag("--gpu-id --gpu", 0, Kind(whole(0), "N"), "which GPU embeds; the CPU where there is none",
         need=ONE_PAGE),
))
OVERVIEW = Group("all runs under a folder in a table", (
    flag("--compare", None, any_text("DIR"), "one row per run, and one for those that differ in "
         "the seed alone: mean ± 95 % interval"),
    flag("--grep", None, any_text("TEXT"), "only rows that contain TEXT (a regular expression)",
         need=COMPARED),
    flag("--csv", None, any_text("FILE.csv"), "the table", need=COMPARED),
    flag("--latex", None, any_text("FILE.tex"), "the table for a paper (booktabs)", need=COMPARED),
))
# fmt: on

TRAIN_GROUPS = (
    *(DATA, SELECTION, NETWORK, LOSS, *methods.groups(), OPTIMISATION, RUN),
    *methods.dead_groups(),
)
EVALUATE_GROUPS = (EVALUATION, FILES, SINGLE_IMAGES, DATA, NETWORK)
REPORT_GROUPS = (REPORT, OVERVIEW)

# --- parsing --------------------------------------------------------------------------------------

_FORMATTER = partial(argparse.HelpFormatter, max_help_position=30, width=100)


class _Parser(argparse.ArgumentParser):
    """argparse with argument files that allow comments, and errors of one sentence."""

    def convert_arg_line_to_args(self, line: str) -> list[str]:
        return shlex.split(line, comments=True)

    def error(self, message: str) -> NoReturn:
        print(f"error: {message[:1].lower()}{message[1:]} (see --help)", file=sys.stderr)
        raise SystemExit(2)


def _help_text(entry: Flag) -> str:
    shown = entry.shown
    if shown is None and entry.kind is not SWITCH and entry.default not in (None, "", ()):
        shown = entry.default
    words = entry.help if shown is None else f"{entry.help} (default: {shown})"
    return words.replace("%", "%%")


def _make_parser(program: str, description: str, groups: Sequence[Group]) -> _Parser:
    parser = _Parser(
        prog=program,
        usage=f"{program} [@FILE] [--flag VALUE] ...",
        description=description,
        formatter_class=_FORMATTER,
        fromfile_prefix_chars="@",
        argument_default=argparse.SUPPRESS,  # so that a given flag can be told from a default
        allow_abbrev=False,
    )
    for group in groups:
        heading = parser.add_argument_group(group.title)
        for entry in group.flags:
            heading.add_argument(*entry.spellings, **_argparse_settings(entry))
    return parser


def _argparse_settings(entry: Flag) -> dict[str, Any]:
    settings: dict[str, Any] = {"dest": entry.dest, "help": _help_text(entry)}
    kind = entry.kind
    if kind is SWITCH:
        return {**settings, "action": "store_true"}
    settings |= {"type": kind.parse, "choices": kind.choices, "metavar": kind.metavar}
    return settings | {"nargs": kind.nargs, "const": kind.const}


def defaults(groups: Sequence[Group]) -> dict[str, Any]:
    """Every option of these groups as it is when nothing is given."""
    return {entry.dest: entry.default for entry in _flags(groups)}


def _flags(groups: Sequence[Group]) -> list[Flag]:
    return [entry for group in groups for entry in group.flags]


def _parse(
    program: str,
    description: str,
    groups: Sequence[Group],
    argv: Sequence[str] | None,
    positional: str | None = None,
) -> tuple[argparse.Namespace, list[Flag], _Parser]:
    parser = _make_parser(program, description, groups)
    if positional:
        parser.add_argument(positional, nargs="*", default=[], metavar="RUN", help="run folders")
    given, unknown = parser.parse_known_args(argv)
    entries = _flags(groups)
    if unknown:
        known = [spelling for entry in entries for spelling in entry.spellings]
        near = close_names(unknown[0].split("=")[0], known)
        hint = f"; did you mean {' or '.join(near[:2])}?" if near else ""
        parser.error(f"unknown argument {unknown[0]}{hint}")
    args = argparse.Namespace(**{**defaults(groups), **vars(given)})
    args.given = sorted(vars(given))
    words = sys.argv[1:] if argv is None else list(argv)
    args.recipe = next((word[1:] for word in words if word.startswith("@")), None)
    return args, entries, parser


def _check_needs(
    args: argparse.Namespace,
    entries: list[Flag],
    parser: _Parser,
    excused: Collection[str] = (),
) -> None:
    for entry in _unread(args, entries):
        if entry.dest not in excused:
            parser.error(
                f"{entry.spellings[0]} has no effect here: it belongs to {entry.need.name}; "
                "remove it or choose that"
            )


def _check_loss(args: argparse.Namespace, entries: list[Flag], parser: _Parser) -> None:
    """The loss exists, and each of its arguments has one value: by its flag or by its own name."""
    try:
        criteria.check_name(args.loss)
    except ValueError as error:
        parser.error(str(error))
    named = dict(args.loss_args)
    for entry in entries:
        if entry.argument in named and entry.dest in args.given and entry.is_read(args):
            parser.error(
                f"{entry.spellings[0]} and --loss-args {entry.argument}={named[entry.argument]} "
                "are the same argument of the loss; leave one of them out"
            )


def _unread(args: argparse.Namespace, entries: Sequence[Flag]) -> list[Flag]:
    """The given flags that nobody listens to."""
    return [entry for entry in entries if entry.dest in args.given and not entry.is_read(args)]


def _only_in_files(
    parser: _Parser, args: argparse.Namespace, argv: Sequence[str] | None
) -> set[str]:
    """The given options that stand in a file of flags and not on the command line itself."""
    words = sys.argv[1:] if argv is None else list(argv)
    typed = [word for word in words if not word.startswith("@")]
    if typed == words:
        return set()
    return set(args.given) - set(vars(parser.parse_known_args(typed)[0]))


def parse_train(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of train.py, resolved; see `resolved`.

    `given` lists those that stood on the command line, `recipe` is the first file of flags on it
    (`@FILE`), or None.

    Raises:
        SystemExit: with status 2 and one sentence for a bad or ineffective flag, 0 for --help.
    """
    about = "Train an embedding network and judge it on classes it never saw."
    args, entries, parser = _parse("python train.py", about, TRAIN_GROUPS, argv)
    try:
        args = _as_published(args)
        # A recipe with another loss keeps flags of its own loss: `notices` tells of them.
        _check_needs(args, entries, parser, excused=_only_in_files(parser, args, argv))
        _check_loss(args, entries, parser)
        return resolved(args)
    except InputError as error:
        parser.error(str(error))


def _as_published(args: argparse.Namespace) -> argparse.Namespace:
    """With the defaults that the published command of a method has, where it is meant."""
    for method in methods.METHODS:
        own = method.defaults(args)
        args = _changed(args, {k: v for k, v in own.items() if k not in args.given})
    return args


def _changed(args: argparse.Namespace, values: Mapping[str, Any]) -> argparse.Namespace:
    return argparse.Namespace(**{**vars(args), **values})


def parse_evaluate(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of evaluate.py; see `parse_train`."""
    about = "Evaluate a checkpoint on the classes it never saw."
    args, _, parser = _parse("python evaluate.py", about, EVALUATE_GROUPS, argv)
    if not args.resume:
        print("error: --resume FILE is needed: the checkpoint to evaluate", file=sys.stderr)
        raise SystemExit(2)
    # Who listens to the other groups depends on the checkpoint, which is not read yet.
    _check_needs(args, _flags((EVALUATION, FILES, SINGLE_IMAGES)), parser)
    _check_one_checkpoint(args, parser)
    return args


def _check_one_checkpoint(args: argparse.Namespace, parser: _Parser) -> None:
    given = [entry for entry in SINGLE_IMAGES.flags if entry.dest in args.given]
    if len(args.resume) > 1 and given:
        parser.error(
            f"{given[0].spellings[0]} describes one checkpoint and --resume names "
            f"{len(args.resume)}; leave one of them"
        )


def parse_report(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of report.py; `runs` are the folders. See `parse_train`."""
    about = "One HTML page that explains a run, or compares several; or all runs in a table."
    args, entries, parser = _parse("python report.py", about, REPORT_GROUPS, argv, "runs")
    _check_needs(args, entries, parser)
    if bool(args.runs) == bool(args.compare):
        parser.error("name the run folders, such as logs/NAME, or give --compare DIR")
    if args.embeddings and len(args.runs) > 1:
        parser.error("--embeddings are those of one run; name one")
    if args.picture and len(args.runs) > 1:
        parser.error("--picture is of one run; name one")
    return args


# --- what the options say -------------------------------------------------------------------------


def resolved(args: argparse.Namespace) -> argparse.Namespace:
    """The options with what the data set decides: image size, weights, stem, BatchNorm, views.

    Nothing changes them afterwards.

    Raises:
        InputError: an unknown data set, or evaluation is to cut more out of an image than it has.
    """
    protocol = dataset.protocol(args.dataset)
    size = protocol.image_size if args.image_size is None else args.image_size
    if args.eval_resize is not None and args.eval_resize < size:
        raise InputError(
            f"--eval-resize {args.eval_resize} is less than the {size} pixels that are cut out of "
            f"the image; choose at least {size}"
        )
    pretrained = protocol.pretrained if args.pretrained is None else args.pretrained
    decided = {
        "image_size": size,
        "pretrained": pretrained,
        "stem": net.find_backbone(args.model).default_stem(size),
        "bn_freeze": "0" if pretrained == "none" else "1",
        "augment": protocol.augment,
    }
    return _changed(
        args, {name: value for name, value in decided.items() if getattr(args, name, 0) is None}
    )


def notices(args: argparse.Namespace) -> list[str]:
    """A sentence for each given flag that changes nothing."""
    dead = [entry for entry in train_flags() if entry.dead and entry.dest in args.given]
    return [
        *(f"{entry.spellings[0]} changes nothing here: {entry.help}" for entry in dead),
        *(
            f"{entry.spellings[0]} in the file of flags has no effect: it belongs to "
            f"{entry.need.name}"
            for entry in _unread(args, train_flags())
            if entry.need
        ),
    ]


def train_flags() -> list[Flag]:
    """Every flag of train.py."""
    return _flags(TRAIN_GROUPS)


def criterion_arguments(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments that the chosen loss is built with."""
    listening = {
        entry.argument: getattr(args, entry.dest)
        for entry in train_flags()
        if entry.argument and entry.need and entry.need.met(args)
    }
    return {**listening, **dict(args.loss_args)}


# --- options that a run has kept ------------------------------------------------------------------


def plain(args: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON and `weights_only` know them."""
    return {
        name: [list(item) for item in value] if name == "loss_args" else value
        for name, value in vars(args).items()
    }


def kept(stored: Mapping[str, Any]) -> argparse.Namespace:
    """Options that a run has kept; those that its version did not have are at their defaults."""
    unknown_then = {**defaults(TRAIN_GROUPS), "given": [], "recipe": None}
    args = argparse.Namespace(**{**unknown_then, **stored})
    args.loss_args = tuple(tuple(item) for item in args.loss_args)
    # A run of another version may name a data set or a model that there is not here.
    with contextlib.suppress(InputError):
        args = resolved(args)
    return args


def parsed(words: Sequence[str]) -> argparse.Namespace | None:
    """The options that words of train.py's command line ask for; None if it refuses them."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return parse_train(words)
    except SystemExit:  # a file of flags that is gone or older, or flags that do not go together
        return None


def settings(stored: Mapping[str, Any], *less: Change) -> dict[str, Any]:
    """The options that make a training what it is, without those that nobody listens to.

    Args:
        stored: as a run keeps them. less: the kinds of flags that are left out as well.
    """
    args = kept(stored)
    return {
        entry.dest: _hashable(getattr(args, entry.dest))
        for entry in train_flags()
        if entry.change not in less and entry.is_read(args)
    }


def _hashable(value: Any) -> Any:
    return tuple(map(_hashable, value)) if isinstance(value, list | tuple) else value


def configuration(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What runs share that differ in the seed alone."""
    return settings(stored, Change.SEED, Change.LABEL, Change.NOTHING)


def same_training(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What all starts of one run share, the continued ones too."""
    return settings(stored, Change.CONTINUED, Change.LABEL, Change.NOTHING)


def same_command(stored: Mapping[str, Any]) -> dict[str, Any]:
    """What two starts of one run share, for `--resume auto`."""
    # It is looked for in --LOG_DIR, which may itself have been moved.
    return {k: v for k, v in settings(stored, Change.NOTHING).items() if k != "LOG_DIR"}


def continued(args: argparse.Namespace, stored: Mapping[str, Any]) -> argparse.Namespace:
    """The options `stored` of the run that is continued, under those that are given now.

    Raises:
        InputError: a flag would change what the run is.
    """
    before = kept(stored)
    given = {name: getattr(args, name) for name in args.given}
    for entry in train_flags():
        name = entry.dest
        fixed = entry.change not in (Change.CONTINUED, Change.NOTHING)
        if name in given and fixed and _hashable(given[name]) != _hashable(getattr(before, name)):
            raise InputError(
                f"{entry.spellings[0]} cannot change in a continued run; leave it out, or start a "
                "new run"
            )
    # How far a start goes is its own business.
    return _changed(before, {"max_steps": None, "resume": None, "dry_run": args.dry_run, **given})
