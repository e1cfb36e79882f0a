"""The flags of evaluate.py and report.py, in the groups that --help shows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import net
from flags import (
    BINARY,
    COUNT,
    COUNT_OR_ZERO,
    Group,
    Kind,
    a_path,
    any_text,
    flag,
    number,
    one_of,
    whole,
)
from machine import expanded
from options import needs
from options.training import AMP_TEXT, METRIC_NAMES, METRICS, METRICS_TEXT
from utils import program

EVALUATED = (*METRICS, "verification")
"""What evaluate.py can compute; training does the rest of it once, at its end."""
VERIFICATION_TEXT = (
    "; verification: ROC of all pairs of images (TAR at FAR 1e-2, 1e-3, 1e-4, EER, AUC), and the "
    "thresholds it recommends (its columns are printed where it is named here)"
)
EVALUATED_NAMES = METRIC_NAMES._replace(choices=EVALUATED)

# fmt: off
EVALUATION = Group("evaluation", (
    flag("--resume --test_sop_model", None, Kind(expanded, "FILE", nargs="+"),
         "a run folder, a checkpoint of ours or released, or a folder of them (without it, --model "
         "is evaluated as it starts, by its pooled features); several are "
         "compared in one table, and those that differ in the seed alone are averaged"),
    flag("--remark", "", any_text("TEXT"), "a line above the table, and kept in --json"),
    flag("--metrics", EVALUATED, EVALUATED_NAMES, METRICS_TEXT + VERIFICATION_TEXT, shown="all"),
    flag("--batch-size --batch_size", 150, COUNT, "images that are embedded at once",
         shown="the run's; without one 150"),
    flag("--weights", None, one_of(*net.WEIGHTS),
         "for a run that kept a running mean of its weights: the mean (ema) or the weights (raw)",
         shown="ema where there is one", need=needs.RESUMED),
    flag("--ks", None, Kind(whole(1), "K", nargs="+"), "which R@K to report",
         shown="the data set's", need=needs.RETRIEVAL),
    flag("--dims", (), Kind(whole(1), "D", nargs="+"),
         "compare images by the first D dimensions of the embedding, a row for each D; networks "
         "are trained for it with --matryoshka", shown="all of them"),
    flag("--bootstrap", None, Kind(whole(100), "N"),
         "95 % intervals of the retrieval metrics from N resamples of the classes, each with its "
         "queries; with several checkpoints also how each differs from the first (those that "
         "differ in the seed alone are one, and groups of seeds are tested over the seeds)",
         need=needs.RETRIEVAL, shown="off"),
    flag("--kmeans-restarts", 1, COUNT, "k-means runs for NMI, F1 and AMI; the best counts",
         need=needs.CLUSTERING),
    flag("--block-size", None, COUNT,
         "images that the search compares at once: memory against speed, never the numbers",
         need=needs.RETRIEVAL, shown="4096 on a CPU, 8192 on a GPU"),
    flag("--seed", 1, COUNT_OR_ZERO,
         "seed of k-means, --bootstrap, --neighbours, and the intervals of verification"),
    flag("--gpu-id --gpu", 0, Kind(whole(-1), "N"),
         "which GPU; -1: all of them, a process each, as with torchrun", local=True),
    flag("--amp", "auto", one_of("auto", "bf16", "fp16", "off"), AMP_TEXT),
))
FILES = Group("files to write: tables", (
    flag("--json", None, a_path("FILE.json"), "all numbers"),
    flag("--csv", None, a_path("FILE.csv"), "the table"),
    flag("--latex", None, a_path("FILE.tex"),
         "the table for a paper (booktabs), in percent; seeds as mean ± half of its 95 % interval"),
))
POSTPROCESSING = Group("post-processing of the embeddings before they are compared", (
    flag("--whiten", None, Kind(whole(1), "D", nargs="?", const=0),
         "PCA-whitening to D numbers (without D: as many as vary), fitted on the run's training "
         "images and kept beside the checkpoint; for all that is computed and written",
         shown="off"),
    flag("--query-expansion", None, Kind(number(0.0), "K", nargs="+"),
         "each query is moved towards its K nearest images, which count with their cosine to the "
         "power alpha: --query-expansion K [ALPHA]; here and below for the retrieval metrics alone",
         need=needs.RETRIEVAL, shown="off; alpha 3"),
    flag("--database-augmentation", None, Kind(number(0.0), "K", nargs="+"),
         "each image of the gallery is moved towards its K nearest: "
         "--database-augmentation K [ALPHA]", need=needs.RETRIEVAL, shown="off; alpha 3"),
    flag("--rerank", None, Kind(number(0.0), "N", nargs="*"),
         "k-reciprocal re-ranking: --rerank [K1 K2 LAMBDA]", need=needs.RETRIEVAL,
         shown="off; 20 6 0.3"),
))
SINGLE_IMAGES = Group("files to write: single images, for one checkpoint", (
    flag("--per-class", None, a_path("FILE.csv"),
         "retrieval metrics of each class, the worst first",
         need=needs.RETRIEVAL),
    flag("--export", None, a_path("FILE.npz"),
         "unit-length embeddings, labels, paths, and the uncertainty where the network has it"),
    flag("--uncertain", None, a_path("FILE.csv"),
         "IDML: every image's path, class and uncertainty, the most uncertain first"),
    flag("--neighbours", None, a_path("FILE.png"),
         "random queries with their nearest images; --seed chooses the queries"),
    flag("--failures", None, COUNT,
         "the N worst queries, with their nearest images, to failures.csv and failures.png",
         need=needs.RETRIEVAL),
    flag("--query", None, Kind(expanded, "IMAGE", nargs="+"),
         "the evaluated images that are nearest to yours, to query.csv and query.png; only those: "
         "classes that were trained on are not among them"),
    flag("--top", 10, COUNT, "nearest images that --neighbours, --failures and --query show",
         need=needs.PICTURES),
    flag("--out", None, a_path("DIR"), "folder for what --failures and --query write",
         need=needs.OWN_FOLDER, shown="the checkpoint's"),
))
REPORT = Group("the page of one run or several", (
    flag("--out", None, a_path("FILE.html"), "where the page goes",
         shown="report.html in the run's folder, or beside several; with --compare runs.html in "
         "that folder, with --grep TEXT too runs-TEXT.html"),
    flag("--picture", None, a_path("FILE.png"),
         "instead of the page, one picture of one run: random queries with their nearest images, "
         "and what was learned for each class", need=needs.ONE_PAGE),
    flag("--queries", (), Kind(str, "TEXT", nargs="+"),
         "also show the queries whose class or file contains TEXT", need=needs.ONE_PAGE),
    flag("--embeddings", None, a_path("FILE.npz"),
         f"embeddings of one run, made by `{program('evaluate')} --export`, instead of the best "
         "checkpoint's", need=needs.ONE_PAGE),
    flag("--seed", 1, COUNT_OR_ZERO, "seed of the random draws", need=needs.ONE_PAGE),
    flag("--gpu-id --gpu", 0, Kind(whole(0), "N"), "which GPU embeds; the CPU where there is none",
         need=needs.ONE_PAGE),
))
OVERVIEW = Group("all runs under a folder in a table", (
    flag("--compare", None, a_path("DIR"), "one row per run, and one for those that differ in "
         "the seed alone: mean ± half of its 95 % interval"),
    flag("--grep", None, any_text("TEXT"), "only rows that contain TEXT (a regular expression)",
         need=needs.COMPARED),
    flag("--csv", None, a_path("FILE.csv"), "the table", need=needs.COMPARED),
    flag("--latex", None, a_path("FILE.tex"), "the table for a paper (booktabs)",
         need=needs.COMPARED), ))
# fmt: on


NEVER_EVALUATED = ("checkpoint", "head_init", "dropout", "bn_freeze", "bn_momentum")
"""Flags of the network that say how it starts and trains, and nothing of what it is afterwards."""


def as_evaluated(group: Group) -> Group:
    """A group of train.py's flags as evaluate.py has them: those that an evaluation reads."""
    otherwise: dict[str, dict[str, Any]] = {
        "max_bad_images": {
            "help": "share of the images that may be unreadable (at least one; 0 allows none): "
            "they are left out, and each is named"
        },
        "model_args": {"need": None},  # the model itself says that it takes none
        "pretrained": {"need": needs.AS_IT_STARTS},
        # What is evaluated without a checkpoint are the features before the head.
        **{name: {"need": needs.RESUMED} for name in ("embedding_size", "head", "head_norm")},
        "l2_norm": {
            "kind": BINARY._replace(choices=(1,)),
            "help": "published commands may have it: embeddings are always compared at unit length",
        },
    }
    about = {
        "data": "With --resume, the run decides what is not given here, but for --decode, caches "
        "and --workers. The defaults below hold without --resume, and for released checkpoints.",
        "network": "With --resume, the checkpoint decides what is not given here. The defaults "
        "below hold without --resume.",
    }
    flags = tuple(
        replace(entry, **otherwise.get(entry.dest, {}))
        for entry in group.flags
        if entry.dest not in NEVER_EVALUATED
    )
    return Group(group.title, flags, about[group.title])
