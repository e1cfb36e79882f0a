"""Every flag, once, in named groups, with its default and the method that listens to it.

Reads nothing but the command line, so `--help` and a mistyped flag answer at once. Published
commands are accepted as printed. Flags may stand in a file, one or more a line, `#` starts a
comment: `python train.py @recipes/emoji_amloss.txt --seed 2`; what comes later wins.

To add a method: a group of flags here, each with the `need` that says who reads it; where its
published command has other defaults, a profile in `PROFILES`.
"""

from __future__ import annotations

import argparse
import difflib
import shlex
import sys
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NoReturn

from criteria import PROXY_LR_SCALE, losses_in_words
from flags import (
    BINARY,
    COUNT,
    COUNT_OR_ZERO,
    EPOCHS,
    SHARE,
    SWITCH,
    TRUTH,
    Flag,
    Group,
    Kind,
    Need,
    flag,
    key_value,
    not_negative,
    number,
    one_of,
    positive,
    text,
    whole,
)

# --- who listens ----------------------------------------------------------------------------------


def hierarchy(text: str) -> str:
    """`bot_top` is `none`: the branch of the released code that would tell them apart is dead."""
    return "none" if text == "bot_top" else text


SPHERICAL_LOSSES = ("triplet", "semihtriplet", "n-npair", "ms")


def loss_is(*names: str) -> Need:
    """The flag belongs to these losses."""
    return Need(f"--loss {' or '.join(names)}", lambda args: args.loss in names)


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
PROXY_LOSSES = loss_is("Proxy_Anchor", "AMLoss")
AMLOSS = loss_is("AMLoss")
DISENTANGLED = Need("--disent True", lambda args: args.disent)
SPHERICAL = Need("--sec_wei above 0", lambda args: args.sec_wei > 0)
DIVIDED = Need("divide and conquer (--nb-clusters)", lambda args: args.nb_clusters is not None)
ADAPTIVE = Need("--batch-sampler adaptbalanced", lambda args: args.batch_sampler == "adaptbalanced")
MASKS_SUMMED = Need("--masks-sum-for-full-emb 1", lambda args: args.masks_sum_for_full_emb)
MARGIN_LOSSES = loss_is("MarginLoss", "TripletLoss", "TripletAllLoss", "TripletSemihardLoss")
MINED_LOSSES = loss_is("MarginLoss", "TripletLoss")

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
    "image a vehicle (10 draws); nmi, f1, ami: k-means with one cluster a class"
)
LOSSES_TEXT = f"{losses_in_words()}; or pml:NAME for any loss of pytorch-metric-learning"
MODELS_TEXT = (
    "bn_inception, resnet10, resnet18, resnet34, resnet50, resnet101, resnet152, googlenet"
)
DATASETS_TEXT = "emoji (in the repository), cub, cars, SOP, Inshop, vid, folder:PATH, csv:FILE"
AMP_TEXT = "precision of the network; auto: bf16 where the hardware has it; the rest is float32"

METRIC_NAMES = Kind(str.lower, "NAME", METRICS, nargs="+")

# fmt: off
DATA = Group("data", (
    flag("--dataset --use_dataset", "emoji", text("NAME"), DATASETS_TEXT),
    flag("--data-root --dataset-dir", "data", text("DIR"), "folder that holds the data sets"),
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
    flag("--cache-dir", None, text("DIR"), "where caches are kept", need=CACHED,
         shown="~/.cache/anchorage"),
    flag("--data-device", None, one_of("cpu", "cuda"),
         "cuda: the cache's pixels lie in the GPU's memory and are cut there; cpu keeps pictures "
         "that are in memory anyway off the GPU", shown="cpu for files, the GPU for pictures in "
         "memory"),
    flag("--workers --num-workers", 4, COUNT_OR_ZERO, "processes that read images, for each GPU"),
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
    flag("--model --arch", "bn_inception", text("NAME"), MODELS_TEXT),
    flag("--embedding-size --sz-embedding", 512, COUNT, "dimensions of the embedding"),
    flag("--pretrained", None, text("WHAT"), "imagenet (downloads), none, or a FILE of weights",
         shown="none for emoji, imagenet for photographs"),
    flag("--checkpoint", None, text("FILE"),
         "start from all the weights of a checkpoint, ours or released, with fresh optimisers "
         "(to go on with a run: --resume-run)"),
    flag("--l2-norm", 1, BINARY, "1: the embedding is used at unit length"),
    flag("--pooling --features-pooling", "avg+max", one_of("avg+max", "avg", "max", "grid"),
         "how the last feature map becomes a vector; grid: average of each cell of 4 x 4"),
    flag("--stem", None, one_of("imagenet", "small", "tiny"),
         "first layers: as published (stride 4), stride 2, or stride 1",
         shown="imagenet from 128 pixels on, small below"),
    flag("--width", 1.0, Kind(number(0.0, 4.0, above=True), "X"),
         "channels of a ResNet as a multiple of the published ones"),
    flag("--head-norm", 0, BINARY, "1: a BatchNorm, which is trained, before the heads"),
    flag("--head-init --init-method", "kaiming", text("NAME"),
         "start of the heads. kaiming: normal by fan_out with zero bias; default: PyTorch's own; "
         "xavier_uniform_GAIN, xavier_normal_GAIN, kaiming_normal_fan_in, kaiming_normal_fan_out: "
         "for each cluster's share of the dimensions; trunc_normal; pt_splitted (as default)"),
    flag("--dropout", 0.0, Kind(number(0.0, 0.99), "P"), "on the pooled features"),
    flag("--input-spec", None, one_of("imagenet", "caffe", "spherical", "white"),
         "colour order, scale and mean of the input", shown="what the model's weights want"),
    flag("--bn-freeze --freeze_bn", None, one_of("0", "1", "affine", "statistics"),
         "BatchNorm of the backbone. 0: trained; 1: running statistics fixed, scale and shift "
         "train after the warm-up (as the released code does); affine: all fixed; statistics: "
         "running statistics fixed, scale and shift train",
         shown="1 with pretrained weights, else 0"),
))
LOSS = Group("loss", (
    flag("--loss --use_loss --criterion", "Proxy_Anchor", text("NAME"), LOSSES_TEXT),
    flag("--mrg", 0.1, not_negative("M"), "margin; AMLoss starts every class at it",
         need=PROXY_LOSSES, argument="margin"),
    flag("--alpha", 32.0, positive("A"), "scale of the similarities (NPairsLoss: 1, learned)",
         need=loss_is("Proxy_Anchor", "NPairsLoss"), argument="alpha"),
    flag("--margin", 0.2, not_negative("M"), "margin of the losses on distances",
         need=MARGIN_LOSSES, argument="margin"),
    flag("--sampler", "easypeasy",
         one_of("easypeasy", "distanceweighted", "HPHN", "EPHN", "EPSHN", "RPSHN", "RPHN"),
         "how triplets are mined from a batch", need=MINED_LOSSES, argument="miner"),
    flag("--soft-loss", False, SWITCH, "softplus instead of the hinge",
         need=loss_is("TripletLoss", "TripletSemihardLoss"), argument="soft"),
    flag("--lr-beta", 0.0, not_negative("LR"),
         "above 0 each class learns its own boundary at this rate",
         need=loss_is("MarginLoss"), argument="beta_lr"),
    flag("--lr-alpha", 1.0, not_negative("LR"), "learning rate of --alpha",
         need=loss_is("NPairsLoss"), argument="alpha_lr"),
    flag("--loss-args", (), Kind(key_value, "KEY=VALUE", nargs="+"),
         "arguments of any loss, by the names in its class: margin=0.3 soft=true"),
))
AMLOSS_GROUP = Group("AMLoss: learnable margin of each class", (
    flag("--alphap", 32.0, positive("A"), "scale on the positive side",
         need=AMLOSS, argument="alphap"),
    flag("--alphan", 32.0, positive("A"), "scale on the negative side",
         need=AMLOSS, argument="alphan"),
    flag("--delta", 0.1, Kind(number(), "D"), "offset of the proxy-proxy term",
         need=AMLOSS, argument="delta"),
    flag("--lam", 1.0, not_negative("L"), "weight of the proxy-proxy term",
         need=AMLOSS, argument="lam"),
    flag("--mrg-lr --mrg_lr", 1e-4, not_negative("LR"),
         "learning rate of the margins (AdamW of their own)", need=AMLOSS, argument="margin_lr"),
    flag("--mrg-lr-decay-step", 10, EPOCHS, "epochs between two decays of it",
         need=AMLOSS, argument="margin_step"),
    flag("--mrg-lr-decay-gamma", 0.5, SHARE, "factor of a decay",
         need=AMLOSS, argument="margin_gamma"),
))
DISENTANGLING = Group("DDML: disentangling", (
    flag("--disent", False, TRUTH,
         "True: two heads of twice the width, a class-agnostic and a class-specific term"),
    flag("--al", 1.0, not_negative("W"), "weight of the class-agnostic term",
         need=DISENTANGLED),
    flag("--be", 0.1, not_negative("W"), "weight of the class-specific term",
         need=DISENTANGLED),
    flag("--gam", 1e-5, not_negative("W"), "weight of the split term", need=DISENTANGLED),
))
INTROSPECTION = Group("IDML: introspective similarity", (
    flag("--introspective", None,
         Kind(str, choices=("released", "paper"), nargs="?", const="released"),
         "released: both heads at unit length, as the code does, so that the uncertainty learns "
         "nothing; paper: the uncertainty keeps its length and learns", shown="off"),
    flag("--mixup", None, not_negative("ALPHA"),
         "mix images with Beta(ALPHA, ALPHA) shares in a second forward; 0 is off",
         shown="1 with --introspective, else 0"),
))
SPHERE = Group("SEC: spherical embedding constraint, for any loss", (
    flag("--sec_wei --sec-wei", 0.0, not_negative("W"), "weight of the variance of the norms"),
    flag("--norm_momentum --norm-momentum", 1.0, Kind(number(0.0, 1.0, above=True), "RHO"),
         "share of the batch in the running mean of the norms", need=SPHERICAL),
    flag("--l2reg_wei --l2reg-wei", 0.0, not_negative("W"), "weight of the mean squared norm"),
))
DIVISION = Group("divide and conquer, for any loss", (
    flag("--experiment", None, one_of("margin_loss_resnet50"),
         "the released code's defaults: ResNet-50, MarginLoss, Adam, …"),
    flag("--nb-clusters", None, COUNT, "clusters at the end; each has a mask on the embedding",
         shown="off; 1 with --experiment"),
    flag("--mod-epoch", 2, EPOCHS, "epochs between two divisions", need=DIVIDED),
    flag("--mod-epoch-freeze", 0, Kind(whole(0), "EPOCHS"),
         "epochs at the beginning of each period in which the backbone rests", need=DIVIDED),
    flag("--force-full-embedding-epoch", 10**6, Kind(whole(0), "EPOCH"),
         "from this epoch on no masks: the whole embedding trains", need=DIVIDED, shown="never"),
    flag("--hierarchy-method", "top_bot", Kind(hierarchy, choices=("top_bot", "none")),
         "top_bot: 1, 2, 4, … clusters; none: all from the start (bot_top too, as released)",
         need=DIVIDED),
    flag("--stop-recluster", False, SWITCH,
         "no more division, and no more rest, once there are all clusters", need=DIVIDED),
    flag("--penultimate-for-clusters", 1, BINARY,
         "cluster pooled features (1) or embeddings (0)", need=DIVIDED),
    flag("--clustering-random-state -crs", None, COUNT_OR_ZERO,
         "draws another seed for each k-means", need=DIVIDED, shown="the same each time"),
    flag("--clustering-method", "kmeans",
         Kind(str, "NAME", ("kmeans", "kmeans_adaptive_centroids")),
         "kmeans starts anew at each division, kmeans_adaptive_centroids at the means of the "
         "clusters before", need=DIVIDED),
    flag("--legacy-renumbering", False, SWITCH,
         "apply the Hungarian permutation the wrong way round, as the released code does",
         need=DIVIDED),
    flag("--batch-sampler", "balanced_old",
         one_of("balanced_old", "adaptbalanced", "npairs", "randombatch"),
         "how a batch is drawn from a cluster", need=DIVIDED),
    flag("--small-class-action", "sample_other",
         one_of("sample_other", "duplicate", "smaller_batch"),
         "adaptbalanced, where a class has too few images", need=ADAPTIVE),
    flag("--num-replicas", 1, COUNT, "how often a batch holds each image", need=DIVIDED),
    flag("--fixed-mask", 0, BINARY, "1: binary masks that divide the dimensions", need=DIVIDED),
    flag("--mask-lr-mult", 1.0, not_negative("X"),
         "learning rate of the masks as a multiple of --lr", need=DIVIDED),
    flag("--mask-wd-mult", 0.0, not_negative("X"),
         "weight decay of the masks as a multiple of --weight-decay", need=DIVIDED),
    flag("--mask-relu", 1, BINARY, "masks act through a ReLU", need=DIVIDED),
    flag("--masking-init", "ones", one_of("ones", "normal"), "start of the masks", need=DIVIDED),
    flag("--masking-lambda", 1.0, not_negative("W"),
         "weight of the masks' mean cosine", need=DIVIDED),
    flag("--masks-freeze-one-cluster", 0, BINARY,
         "1: the mask rests while there is one cluster", need=DIVIDED),
    flag("--masks-sum-for-full-emb", 0, BINARY,
         "1: the sum of the masks multiplies the embedding at test time", need=DIVIDED),
    flag("--masks-normalize-before-sum", None, one_of("l1"),
         "scale each mask before that sum", need=MASKS_SUMMED, shown="off"),
))
OPTIMISATION = Group("optimisation", (
    flag("--epochs --epoch --nb-epochs", 60, COUNT, "epochs", need=BY_EPOCHS),
    flag("--steps", None, COUNT, "length of the run in optimisation steps instead of epochs"),
    flag("--optimizer", "adamw", Kind(str.lower, choices=("adamw", "adam", "sgd", "rmsprop")),
         "for everything but the margins of AMLoss"),
    flag("--lr --base-lr", 1e-4, positive("LR"), "learning rate of the network"),
    flag("--lr_p --lr-p", None, not_negative("LR"), "learning rate of the backbone",
         shown="--lr"),
    flag("--proxy-lr-scale", PROXY_LR_SCALE, not_negative("X"),
         "learning rate of the proxies as a multiple of --lr",
         need=PROXY_LOSSES, argument="proxy_lr_scale"),
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
    flag("--warm", 1, COUNT_OR_ZERO, "epochs in which only the heads and the criterion train"),
    flag("--clip", 10.0, not_negative("G"),
         "limit on the absolute value of each gradient entry; 0 is none"),
    flag("--amp", "auto", one_of("auto", "bf16", "fp16", "off"), AMP_TEXT),
    flag("--compile", False, SWITCH,
         "compile the network (torch.compile): minutes at the start, faster steps afterwards"),
))
RUN = Group("run", (
    flag("--LOG_DIR --log-dir", "logs", text("DIR"), "folder that run folders are made in"),
    flag("--name --experiment-id -i", None, text("NAME"), "name of the run and of its folder",
         shown="from data set, model, loss and time"),
    flag("--remark", "", text("TEXT"), "added to the run's name"),
    flag("--seed --random-seed -seed", 1, COUNT_OR_ZERO, "of every random draw of the run"),
    flag("--deterministic", False, SWITCH,
         "the same numbers on every run on a GPU too, at some cost of speed"),
    flag("--gpu-id --gpu --cuda-device", 0, Kind(whole(-1), "N"),
         "which GPU; the CPU is used where there is none; -1: all of them, a process each, as with "
         "torchrun"),
    flag("--eval-every", 1, EPOCHS, "epochs between evaluations", need=EVALUATED_BY_EPOCHS),
    flag("--eval-steps", None, COUNT, "steps between evaluations, instead of --eval-every"),
    flag("--metrics", METRICS, METRIC_NAMES,
         f"{METRICS_TEXT}. At every evaluation; retrieval is always computed (R@1 picks the best "
         "epoch), and the final evaluation computes all", shown="all"),
    flag("--max-steps", None, COUNT, "stop after N optimisation steps, evaluate and save",
         shown="no limit"),
    flag("--save-every", None, COUNT,
         "save last.pth every N steps too, besides every epoch", shown="every epoch only"),
    flag("--keep", 0, COUNT_OR_ZERO, "older checkpoints that remain, as step_N.pth"),
    flag("--on-nan", "stop", one_of("stop", "skip"),
         "what a loss or gradient that is not finite does: stop the run, or skip the step (100 "
         "steps at most)"),
    flag("--resume", None, one_of("auto"),
         "auto: continue the run of this very command in --LOG_DIR if there is one, else start it"),
    flag("--resume-run", None, text("DIR"),
         "continue the run in DIR from its last checkpoint, or from an older one: DIR/step_N.pth"),
    flag("--dry-run", False, SWITCH, "print what would run, and stop"),
    flag("--no-report", False, SWITCH,
         "no report.html at the end (python report.py RUN makes it at any time)"),
    flag("--wandb", None, one_of("online", "offline", "disabled"),
         "where Weights & Biases keeps the run",
         shown="online when a key is configured, else offline"),
    flag("--wandb-project", "anchorage", text("NAME"), "project there"),
    flag("--tensorboard", False, SWITCH,
         "also write TensorBoard's files, into the run folder (needs the package tensorboard)"),
    flag("--wandb-images", 10, COUNT_OR_ZERO,
         "epochs between pictures of random queries and their nearest images, in wandb and "
         "TensorBoard, as evaluations allow; 0 is none", need=TRACKED),
))
NO_EFFECT = Group("accepted because published commands have them; they change nothing", (
    flag("--backend", None, one_of("faiss", "faiss-gpu", "torch+sklearn"),
         "library for k-means; here there is one k-means of our own", need=DIVIDED),
    flag("--lr-gamma", None, text("X"), "never used by the released code; its rates are constant",
         need=DIVIDED),
    flag("--lr-step", None, text("X"), "never used by the released code", need=DIVIDED),
    flag("--emb-lr-mult", None, text("X"), "the released code stops at any value but 1",
         need=DIVIDED),
    flag("--with-l1", False, SWITCH, "never used by the released code", need=DIVIDED),
    flag("--init-clusters", None, text("N"), "never used by the released code",
         need=DIVIDED),
    flag("--reset-learners-fix", None, text("N"), "the released code crashes without it",
         need=DIVIDED),
    flag("--save-model", None, text("N"), "the best and the last checkpoint are always kept",
         need=DIVIDED),
    flag("--save-masks", None, text("N"), "the masks are in both checkpoints",
         need=DIVIDED),
    flag("--is-debug", False, SWITCH, "the mean cosine of the masks is always logged",
         need=DIVIDED),
    flag("--verbose", False, SWITCH, "the released code prints more with it", need=DIVIDED),
    flag("--wandb-enabled", False, SWITCH, "Weights & Biases is on, unless --wandb disabled",
         need=DIVIDED),
))
EVALUATION = Group("evaluation", (
    flag("--resume", None, Kind(str, "FILE", nargs="+"),
         "checkpoint: of ours (knows its own flags) or released; several are compared in one "
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
    flag("--json", None, text("FILE.json"), "all numbers"),
    flag("--csv", None, text("FILE.csv"), "the table"),
    flag("--latex", None, text("FILE.tex"),
         "the table for a paper (booktabs), in percent; seeds as mean and standard deviation"),
))
SINGLE_IMAGES = Group("what evaluation also writes: single images, of one checkpoint", (
    flag("--per-class", None, text("FILE.csv"), "retrieval metrics of each class, the worst first",
         need=RETRIEVAL),
    flag("--export", None, text("FILE.npz"),
         "unit-length embeddings, labels, paths, and the uncertainty where the network has it"),
    flag("--uncertain", None, text("FILE.csv"),
         "IDML: every image's path, class and uncertainty, the most uncertain first"),
    flag("--neighbours", None, text("FILE.png"),
         "random queries with their nearest images; --seed chooses the queries"),
    flag("--failures", None, COUNT,
         "the N worst queries, with their nearest images, to failures.csv and failures.png",
         need=RETRIEVAL),
    flag("--query", None, Kind(str, "IMAGE", nargs="+"),
         "the images of the evaluated set that are nearest to yours, to query.csv and query.png"),
    flag("--top", 10, COUNT, "nearest images that --neighbours, --failures and --query show",
         need=PICTURES),
    flag("--out", None, text("DIR"), "folder for what --failures and --query write",
         need=OWN_FOLDER, shown="the checkpoint's"),
))
REPORT = Group("the page of one run or several", (
    flag("--out", None, text("FILE.html"), "where the page goes",
         shown="report.html in the run's folder, or beside several; with --compare runs.html in "
         "that folder"),
    flag("--picture", None, text("FILE.png"),
         "instead of the page, one picture of one run: random queries with their nearest images, "
         "and what was learned for each class", need=ONE_PAGE),
    flag("--queries", (), Kind(str, "TEXT", nargs="+"),
         "also show the queries whose class or file contains TEXT", need=ONE_PAGE),
    flag("--embeddings", None, text("FILE.npz"),
         "embeddings of one run, made by evaluate.py --export, instead of the best checkpoint's",
         need=ONE_PAGE),
    flag("--seed", 1, COUNT_OR_ZERO, "of what is drawn at random", need=ONE_PAGE),
    flag("--gpu-id --gpu", 0, Kind(whole(0), "N"), "which GPU embeds; the CPU where there is none",
         need=ONE_PAGE),
))
OVERVIEW = Group("all runs under a folder in a table", (
    flag("--compare", None, text("DIR"), "a row a run, and a row for those that differ in the "
         "seed alone: mean ± 95 % interval"),
    flag("--grep", None, text("TEXT"), "only rows that contain TEXT (a regular expression)",
         need=COMPARED),
    flag("--csv", None, text("FILE.csv"), "the table", need=COMPARED),
    flag("--latex", None, text("FILE.tex"), "the table for a paper (booktabs)", need=COMPARED),
))
# fmt: on

TRAIN_GROUPS = (
    *(DATA, SELECTION, NETWORK, LOSS, AMLOSS_GROUP, DISENTANGLING, INTROSPECTION, SPHERE, DIVISION),
    *(OPTIMISATION, RUN, NO_EFFECT),
)
EVALUATE_GROUPS = (EVALUATION, FILES, SINGLE_IMAGES, DATA, NETWORK)
REPORT_GROUPS = (REPORT, OVERVIEW)

# --- profiles: published commands that have defaults of their own ---------------------------------


def _spherical_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """Spherical embeddings: steps instead of epochs, Adam, two learning rates, by data set."""
    data = _benchmark(args.dataset)
    small = data in ("cub", "cars", "emoji")
    constrained = args.sec_wei > 0 or args.l2reg_wei > 0
    lr, lr_p = {
        "cub": (1e-5, 0.5e-5),
        "sop": (2.5e-4, 0.5e-4),
        "inshop": (5e-4, 1e-4),
    }.get(data, (1e-5, 1e-5))
    defaults = {
        "batch_size": 120, "IPC": {"n-npair": 2, "ms": 5}.get(args.loss, 3),
        "optimizer": "adam", "lr": lr, "lr_p": lr_p, "lr_decay_gamma": 0.1,
        "weight_decay": 2.5e-3 if small else 1e-5, "decay_vectors": 0, "decay_biases": 1,
        "schedule": "milestones", "steps": 8000 if small else 12000, "eval_steps": 100,
        "warm": 0, "clip": 0.0, "pooling": "avg", "head_init": "default", "bn_freeze": "affine",
        "head_norm": int(args.loss != "ms" or constrained), "l2_norm": 0,
    }  # fmt: skip
    if data != "emoji":
        defaults |= {"image_size": 227, "augment": "sec"}
    if args.model == "bn_inception" and data != "emoji":
        defaults["input_spec"] = "spherical"
    defaults["eval_steps"] = {"sop": 500, "inshop": 200}.get(data, 100)
    gamma = args.lr_decay_gamma if "lr_decay_gamma" in args.given else 0.1
    defaults["milestones"] = _spherical_milestones(data, args.loss, gamma)
    if "epochs" in args.given:
        del defaults["steps"]
    if "eval_every" in args.given:
        del defaults["eval_steps"]
    if data == "emoji":  # from scratch: what follows from pretraining is left out
        del defaults["bn_freeze"]
    return defaults


def _benchmark(name: str) -> str:
    """cub, cars, sop or inshop in any of their spellings; other names as they are."""
    letters = name.lower().replace("-", "").replace("_", "")
    known = {
        "cub": ("cub", "cub200", "cub2002011"),
        "cars": ("cars", "car", "cars196", "stanfordcars"),
        "sop": ("sop", "stanfordonlineproducts", "onlineproducts"),
        "inshop": ("inshop", "inshopclothes", "inshopclothesretrieval", "deepfashion"),
    }
    return next((data for data, names in known.items() if letters in names), letters)


def _spherical_milestones(dataset: str, loss: str, gamma: float) -> tuple[int, ...]:
    if dataset in ("sop", "inshop"):
        return (6000,)
    if dataset == "cars":
        return (2000,) if gamma == 0.1 else (4000, 6000)
    return (3000, 6000) if loss == "ms" else (5000,)


def _division_defaults(args: argparse.Namespace) -> dict[str, Any]:
    """Divide and conquer's released experiment file."""
    return {
        "model": "resnet50", "loss": "MarginLoss", "nb_clusters": 1, "epochs": 100,
        "optimizer": "adam", "lr": 1e-5, "weight_decay": 1e-3, "batch_size": 128, "IPC": 4,
        "schedule": "constant", "warm": 0, "clip": 0.0, "pooling": "avg", "head_init": "default",
        "dropout": 0.01, "bn_freeze": "statistics", "dataset": "cub",
    }  # fmt: skip


PROFILES: tuple[tuple[Callable[[argparse.Namespace], bool], Callable[..., dict]], ...] = (
    (lambda args: args.loss in SPHERICAL_LOSSES, _spherical_defaults),
    (lambda args: args.experiment is not None, _division_defaults),
    (lambda args: args.loss == "NPairsLoss", lambda args: {"alpha": 1.0}),
)
"""(whether a published family is meant, its defaults); what is given goes over them."""

ATTACHMENTS: dict[str, tuple[Callable[[argparse.Namespace], Any], dict[str, str]]] = {
    "disentangled": (lambda args: args.disent, {"al": "al", "be": "be", "gam": "gam"}),
    "introspective": (lambda args: args.introspective, {"variant": "introspective"}),
    # Its losses without the constraint are logged with the same statistics, at weight 0.
    "sec": (
        lambda args: args.sec_wei > 0 or args.loss in SPHERICAL_LOSSES,
        {"weight": "sec_wei", "momentum": "norm_momentum"},
    ),
    "l2": (lambda args: args.l2reg_wei > 0, {"weight": "l2reg_wei"}),
    "masks": (lambda args: args.nb_clusters is not None, {"weight": "masking_lambda"}),
}
"""What losses.compose attaches to a loss → when, and which options it is built with."""

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
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, n=2, cutoff=0.6)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        parser.error(f"unknown argument {unknown[0]}{hint}")
    args = argparse.Namespace(**{entry.dest: entry.default for entry in entries})
    vars(args).update(vars(given))
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


def _check_loss_args(args: argparse.Namespace, entries: list[Flag], parser: _Parser) -> None:
    """One value for an argument of the loss: by its flag or by its own name."""
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
    """The options of train.py. `given` lists those that stood on the command line.

    `recipe` is the first file of flags on it (`@FILE`), or None.

    Raises:
        SystemExit: with status 2 and one sentence for a bad or ineffective flag, 0 for --help.
    """
    about = "Train an embedding network and judge it on classes it never saw."
    args, entries, parser = _parse("python train.py", about, TRAIN_GROUPS, argv)
    for meant, profile in PROFILES:
        if meant(args):
            for name, value in profile(args).items():
                if name not in args.given:
                    setattr(args, name, value)
    if args.mixup is None:
        args.mixup = 1.0 if args.introspective else 0.0
    # A recipe with another loss keeps flags of its own loss: `notices` tells, and the run goes on.
    _check_needs(args, entries, parser, excused=_only_in_files(parser, args, argv))
    _check_loss_args(args, entries, parser)
    return args


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


def notices(args: argparse.Namespace) -> list[str]:
    """A sentence for each given flag that changes nothing."""
    dead = [entry for entry in NO_EFFECT.flags if entry.dest in args.given]
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


def attachments(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """What is attached to the loss, as `losses.compose` wants it."""
    return {
        name: {argument: getattr(args, option) for argument, option in taken.items()}
        for name, (wanted, taken) in ATTACHMENTS.items()
        if wanted(args)
    }
