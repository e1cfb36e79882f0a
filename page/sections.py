"""Sections about what each method has learned: margins, proxies, uncertainty, norms, masks, terms.

A section is a dictionary of plain values, which page.js draws according to its `kind`. `about`
explains what is shown; `said` are sentences computed from the run's numbers. A run has the sections
for which its losses and its network provide data.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import methods
from dataset.clusters import UNUSED
from methods.idml import note as note_on_introspection
from metrics.comparison import Scores, interval, replicates
from metrics.correlation import pairwise_rank_correlation
from page.document import percent
from page.findings import RESAMPLES, Search, histogram
from page.learned import Learned, Section, short
from page.records import Record
from page.values import class_values

EXTREMES = 12  # classes, pairs or images at each end of a ranking
AGREE = 0.3  # rank correlation above which two orders are said to agree


def made(learned: Learned) -> list[Section]:
    """All sections of a run, in order."""
    makers = (class_values, terms_of_disentangling, uncertainty, norms, masks, clusters, proxies)
    return [section for make in makers for section in make(learned)]


# --- proxies --------------------------------------------------------------------------------------


def closest_pairs(
    proxies: torch.Tensor, nearest: torch.Tensor, count: int
) -> list[tuple[int, int, float]]:
    """The pairs of proxies (C, d) with the highest cosine, highest first.

    Args:
        nearest: (C,) the cosines of `nearest_proxy`. The proxies in the `count` closest pairs are
            among the 2·count with the highest of these, so only those are compared.
    """
    chosen = nearest.topk(min(2 * count, len(nearest))).indices.sort().values
    unit = F.normalize(proxies[chosen].float(), dim=1)
    rows, columns = torch.triu_indices(len(unit), len(unit), offset=1)
    values, order = (unit @ unit.T)[rows, columns].sort(descending=True)
    pairs = zip(chosen[rows[order]].tolist(), chosen[columns[order]].tolist(), strict=True)
    return [(a, b, value) for (a, b), value in zip(pairs, values.tolist(), strict=True)][:count]


def proxies(learned: Learned) -> Iterator[Section]:
    """The training classes whose proxies are nearest to each other."""
    weights, nearest = learned.proxies, learned.crowding
    if weights is None or nearest is None:
        return
    yield {
        "kind": "pairs",
        "title": "Proxies: which training classes are closest",
        "about": (
            "A proxy is the point that the loss keeps for a class; of several the mean is taken. A "
            "cosine of 1 is the same direction, 0 a right angle."
        ),
        "said": _whether_proxies_are_like_images(learned),
        "histogram": histogram(nearest.numpy()),
        "histogram_of": "cosine of each proxy to the nearest other",
        "pairs": [
            {
                "names": [learned.class_name(c) for c in (a, b)],
                "value": short(value),
                "images": [learned.class_images(c, 2) for c in (a, b)],
            }
            for a, b, value in closest_pairs(weights, nearest, EXTREMES)
        ],
    }


def _whether_proxies_are_like_images(learned: Learned) -> list[str]:
    """Whether classes with close proxies have similar images, judged by classes drawn at random."""
    drawn, proxies = learned.drawn, learned.proxies
    if proxies is None or len(drawn) < 5:
        return []
    means = F.normalize(torch.stack(list(drawn.values())), dim=1)
    if means.shape[1] != proxies.shape[1]:
        return []
    unit = proxies[list(drawn)]
    tables = ((unit @ unit.T).numpy(), (means @ means.T).numpy())
    found = pairwise_rank_correlation(*tables, seed=learned.seed)
    numbers = (
        f"{found.value:.2f}, 95 % interval {found.low:.2f} to {found.high:.2f}, "
        f"{found.count:,} classes drawn at random"
    )
    if found.low > AGREE:
        words = "Classes whose proxies are close have images that the network finds alike"
    elif found.high < AGREE:
        words = "Proxies that are close say little here about which classes have images alike"
    else:
        words = "How far close proxies mean classes with images alike is not clear here"
    return [f"{words} (rank correlation of the cosines of the two {numbers})."]


# --- DDML -----------------------------------------------------------------------------------------


def terms_of_disentangling(learned: Learned) -> Iterator[Section]:
    """DDML's three terms over the epochs."""
    columns = ["agnostic", "specific", "split"]
    if not all(any(name in row for row in learned.record.rows) for name in columns):
        return
    yield {
        "kind": "courses",
        "title": "DDML: the three terms",
        "about": (
            "agnostic: how far the main embedding's class prediction is from knowing nothing "
            "(lower: it tells less about the training classes themselves). specific: how badly the "
            "other head names the training class (lower: it has taken that knowledge over). split: "
            "how much that head's code carries. Each is shown before it is weighted."
        ),
        "said": _courses_in_words(learned.record, columns),
        "columns": columns,
    }


def _courses_in_words(record: Record, columns: list[str]) -> list[str]:
    """A sentence with the first and the last value of each column."""
    ends = []
    for name in columns:
        values = [row[name] for row in record.rows if name in row]
        if len(values) > 1:
            ends.append(f"{name} from {values[0]:.4g} to {values[-1]:.4g}")
    epochs = f"From the first of {int(record.rows[-1]['epoch'])} epochs to the last: "
    return [epochs + ", ".join(ends) + "."] if ends else []


# --- IDML -----------------------------------------------------------------------------------------


def uncertainty(learned: Learned) -> Iterator[Section]:
    """The images about which an introspective network is most and least certain."""
    raw = learned.judged.uncertainty
    if raw is None:
        return
    lengths = raw.float().norm(dim=1).numpy()
    order = np.argsort(lengths, kind="stable")
    scores, fifths = learned.search.scores, _fifths(learned.search, lengths)
    images = learned.judged.images
    released = note_on_introspection(learned.record.options) != ""

    def shown(places: np.ndarray) -> list[dict]:
        return [
            {
                "image": learned.thumbs.want(images, place),
                "name": images.class_names[images.labels[place]],
                "value": short(lengths[place]),
            }
            for place in places
        ]

    yield {
        "kind": "certainty",
        "title": "IDML: the most and the least certain images",
        "about": (
            "Beside its embedding each image has an uncertainty, whose length is shown here; where "
            "it is long, differences to other images count less."
        )
        + (
            " In the released variant both heads are brought to unit length, so this head is "
            "hardly trained, and the order says little; --introspective paper trains it."
            if released
            else ""
        ),
        "least": shown(order[::-1][: 2 * EXTREMES]),
        "said": whether_it_knows(scores, fifths, learned.seed),
        "most": shown(order[: 2 * EXTREMES]),
        "histogram": histogram(lengths),
        "quintiles": [
            short(scores.values[part, scores.names.index("R@1")].mean()) for part in fifths
        ],
    }


def _fifths(search: Search, lengths: np.ndarray) -> list[np.ndarray]:
    """The queries in each fifth of certainty, the most certain first; [] if nothing can be said."""
    matched = search.per_query["relevant"] > 0
    if "R@1" not in search.scores.names or len(search.queries) < 5 or not matched.any():
        return []
    return np.array_split(np.argsort(lengths[search.queries], kind="stable"), 5)


def whether_it_knows(scores: Scores, fifths: list[np.ndarray], seed: int = 1) -> list[str]:
    """A sentence on whether the network errs more if it is less certain, by R@1 of the fifths.

    The interval is over the classes.
    """
    if not fifths:
        return []
    ends = torch.zeros(len(scores.labels), 2, dtype=torch.float64)
    ends[fifths[0], 0] = ends[fifths[-1], 1] = 1
    hits = scores.values[:, scores.names.index("R@1")][:, None] * ends
    both = Scores(("sure", "unsure"), hits, ends, scores.labels)
    classes = min(both.rest_on())
    if classes < 2:  # no conclusion about others
        return []
    sure, unsure = both.means().values()
    (drawn,) = replicates([both], RESAMPLES, seed)
    apart, (low, high) = sure - unsure, interval(drawn[:, 0] - drawn[:, 1], classes)
    numbers = (
        f"R@1 of the surest fifth of the queries is {percent(sure)} %, of the least sure fifth "
        f"{percent(unsure)} %: {100 * apart:+.1f} points, 95 % interval over the classes "
        f"{100 * low:+.1f} to {100 * high:+.1f}"
    )
    if low > 0:
        return [f"It errs more where it is less certain ({numbers})."]
    if high < 0:
        return [f"It errs less where it says that it is less certain ({numbers})."]
    return [f"As far as can be seen, its certainty does not tell where it errs ({numbers})."]


# --- SEC ------------------------------------------------------------------------------------------


def norms(learned: Learned) -> Iterator[Section]:
    """Lengths of the raw embeddings, which SEC makes equal."""
    attached = methods.attachments(learned.record.options)
    if not {"sec", "l2"} & set(attached) or learned.judged.unit:
        return
    lengths = learned.judged.embeddings.float().norm(dim=1).cpu().numpy()
    mean, deviation = float(lengths.mean()), float(lengths.std())
    yield {
        "kind": "norms",
        "title": "SEC: the length of the embeddings",
        "about": (
            "Only directions are compared, but a loss on directions moves long embeddings less "
            "than short ones. SEC therefore pulls all lengths towards their mean: the narrower "
            "this histogram, the more alike all images are trained." + _what_pulls(learned.record)
        ),
        "said": _deviations(learned.record, mean, deviation),
        "histogram": histogram(lengths),
        "columns": ["norm_mean", "norm_ema", "norm_var", "sec", "l2"],
    }


def _what_pulls(record: Record) -> str:
    """A sentence about the lengths in a run without SEC; "" with SEC."""
    if record.options.sec_wei > 0:
        return ""
    if record.options.l2reg_wei > 0:
        return " This run pulls them towards 0 instead (--l2reg_wei)."
    return " This run has no constraint; it is shown for comparison."


def _deviations(record: Record, mean: float, deviation: float) -> list[str]:
    """Sentences about the relative deviation of lengths: in the evaluation, and in training."""
    said = [
        f"Evaluation images: {mean:.3g} ± {deviation:.2g}, a relative deviation of "
        f"{100 * deviation / max(mean, 1e-12):.1f} %."
    ]
    course = [
        (int(row["epoch"]), math.sqrt(row["norm_var"]) / row["norm_mean"])
        for row in record.rows
        if row.get("norm_mean", 0) > 0 and row.get("norm_var", -1) >= 0
    ]
    if len(course) > 1:
        (first, before), (last, after) = course[0], course[-1]
        said.append(
            f"In training batches the relative deviation was {100 * before:.1f} % in epoch {first} "
            f"and {100 * after:.1f} % in epoch {last}."
        )
    return said


# --- divide and conquer ---------------------------------------------------------------------------


def masks(learned: Learned) -> Iterator[Section]:
    """The dimensions of the embedding that each cluster trains."""
    weight = learned.checkpoint["model_state_dict"].get("masks.weight")
    if weight is None:
        return
    shown = weight.float()
    if learned.record.options.mask_relu:
        shown = shown.relu()
    most = float(shown.abs().max()) or 1.0
    unit = F.normalize(shown, dim=1)
    cosines = (unit @ unit.T).tolist()
    yield {
        "kind": "masks",
        "title": "Divide and conquer: the masks",
        "about": (
            "Each cluster of training images trains the embedding through its own mask: a row, "
            "with a column for each dimension. Dark cells are dimensions that the cluster hardly "
            "trains."
        ),
        "said": _overlap(unit @ unit.T),
        "most": short(most),
        "rows": (shown / most * 99).round().int().tolist(),
        "cosines": [[short(value) for value in row] for row in cosines],
    }


def _overlap(cosines: torch.Tensor) -> list[str]:
    """A sentence about the overlap of masks, from their cosines (K, K)."""
    count = len(cosines)
    if count < 2:
        return []
    rows, columns = torch.triu_indices(count, count, offset=1)
    values = cosines[rows, columns]
    return [
        f"The cosine of two masks is {float(values.mean()):.2f} on average and "
        f"{float(values.max()):.2f} at most: 0 would be no dimension in common, 1 the same ones."
    ]


def clusters(learned: Learned) -> Iterator[Section]:
    """The latest division of the training images: sizes, and the classes of each cluster."""
    states = learned.state.get("routines", [])
    divided = next((state["clusters"] for state in states if "clusters" in state), None)
    if divided is None:
        return
    of_image = np.asarray(divided)
    train = learned.train
    if train is not None and len(train) != len(of_image):
        train = None
    found = []
    used = of_image[of_image != UNUSED]
    for cluster, size in zip(*np.unique(used, return_counts=True), strict=True):
        entry: dict[str, Any] = {"cluster": int(cluster), "size": int(size), "classes": []}
        if train is not None:
            own = np.flatnonzero(of_image == cluster)
            labels, counts = np.unique(train.labels[own], return_counts=True)
            entry["class_count"] = len(labels)
            for place in np.argsort(-counts, kind="stable")[:EXTREMES]:
                label = labels[place]
                image = own[train.labels[own] == label][0]
                entry["classes"].append(
                    {
                        "name": train.class_names[label],
                        "size": int(counts[place]),
                        "images": [learned.thumbs.want(train, image)],
                    }
                )
        found.append(entry)
    alone = len(of_image) - len(used)
    left_out = f" {alone:,} images, alone of their class in a cluster, sat out." if alone else ""
    yield {
        "kind": "clusters",
        "title": "Divide and conquer: the clusters",
        "about": (
            f"How the training images were divided in the last epoch: {len(found)} clusters. "
            "A batch comes from one of them. Shown are the classes with the most images in each."
            + left_out
        ),
        "clusters": found,
    }
