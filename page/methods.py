"""What each method learned, made visible: margins, proxies, uncertainty, norms, masks, terms.

A section is a dictionary of plain values that page.js draws by its `kind`; `about` says in words
what is to be seen. A run has the sections that its losses and its network give something for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import methods
from dataset.base import ImageSet
from dataset.clusters import UNUSED
from evaluation.embedding import Embedded
from evaluation.pictures import Thumbnails
from methods.idml import note as note_on_introspection
from page.findings import Search, blocks, histogram
from page.records import Record
from utils import InputError

EXTREMES = 12  # classes, pairs or images at each end of a ranking
RANKED = 400  # points of a ranking's curve
SPREAD_IMAGES, SPREAD_PER_CLASS = 1500, 12
FIXED = ("names", "images", "epoch", "step")  # arrays of classes.npz that are not learned
Section = dict[str, Any]


@dataclass(frozen=True)
class Learned:
    """A run's checkpoints and images, for the sections below.

    `train` are the training images, with their classes numbered as in the criterion; None where
    they are not available. `embed` gives the raw embeddings (n, d) of readable images by the best
    network. `state` is last.pth, `history` classes.npz; either may be empty.
    """

    record: Record
    checkpoint: dict[str, Any]
    state: dict[str, Any]
    history: dict[str, np.ndarray]
    judged: Embedded
    search: Search
    train: ImageSet | None
    embed: Callable[[ImageSet], tuple[ImageSet, torch.Tensor]] | None
    thumbs: Thumbnails
    seed: int

    def criterion(self, name: str) -> torch.Tensor | None:
        """A tensor of the criterion in the best checkpoint, by the last part of its key."""
        content = self.checkpoint.get("criterion_state_dict", {})
        return next((v for k, v in content.items() if k.split(".")[-1] == name), None)

    @cached_property
    def crowding(self) -> torch.Tensor | None:
        """(C,) the cosine of each class's proxy to the nearest other one, where there are two."""
        weights = self.criterion("proxies")
        if weights is None or weights.ndim != 2 or len(weights) < 2:
            return None
        return nearest_proxy(weights)

    def class_name(self, label: int) -> str:
        """Of a training class."""
        names = self.history.get("names")
        return f"class {label}" if names is None else str(names[label])

    def class_images(self, label: int, count: int, *, needed: bool = True) -> list[int]:
        """Thumbnails of the first images of a training class."""
        if self.train is None:
            return []
        own = np.flatnonzero(self.train.labels == label)[:count]
        return [self.thumbs.want(self.train, index, needed=needed) for index in own]


def sections(learned: Learned) -> list[Section]:
    """All that there is to show of a run's method, in order."""
    makers = (class_values, terms_of_disentangling, uncertainty, norms, masks, clusters, proxies)
    return [section for make in makers for section in make(learned)]


# --- AMLoss: one margin per class -----------------------------------------------------------------


def values_by_name(record: Record, history: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What was learned for each class by the best epoch: arrays (C,) by name."""
    learned = {name: rows for name, rows in history.items() if name not in FIXED and len(rows)}
    return {name: rows[row_of_best(record, history)] for name, rows in learned.items()}


def row_of_best(record: Record, history: dict[str, np.ndarray]) -> int:
    """The row of the history at the best epoch, or else the last."""
    rows = np.flatnonzero(history["epoch"] == record.best_epoch)
    return int(rows[-1]) if len(rows) else len(history["epoch"]) - 1


def class_values(learned: Learned) -> Iterator[Section]:
    """Each value that classes learn: ranked, beside the class's spread, and over the epochs."""
    history = learned.history
    for name, values in values_by_name(learned.record, history).items():
        row = row_of_best(learned.record, history)
        crowding = None if learned.crowding is None else learned.crowding.numpy()
        order = np.argsort(values, kind="stable")
        ends = [*order[:EXTREMES], *order[-EXTREMES:]]
        spread = class_spread(learned, ends)
        yield {
            "kind": "class-values",
            "title": f"The learned {name} of each class",
            "about": ABOUT_VALUES.get(name, ""),
            "value": name,
            "epoch": int(history["epoch"][row]),
            "classes": len(values),
            "ranked": _ranking(learned, values, order),
            "largest": _extremes(learned, values, order[::-1], spread, crowding),
            "smallest": _extremes(learned, values, order, spread, crowding),
            "scatters": _scatters(learned, name, values, spread, crowding),
            "course": _course(learned, name, order),
        }


ABOUT_VALUES = {
    "margin": (
        "AMLoss wants the cosine between an image and the proxy of its class to exceed a margin, "
        "which each class learns for itself; all start equal. Two pulls move it: proxies that "
        "crowd around the class's own raise it, and images that cannot come that near to "
        "their proxy lower it. A large margin marks a class that is held together because others "
        "are near; a small one a class that stands alone, or is too varied to be held together."
    ),
    "beta": (
        "The margin loss wants images of a class nearer than its boundary β, and others farther "
        "away. A class with a large β is allowed to be spread out."
    ),
}


def _ranking(learned: Learned, values: np.ndarray, order: np.ndarray) -> list[list]:
    """Up to RANKED rows [rank, value, class, thumbnail], spaced evenly along the ranking."""
    ranks = np.unique(np.linspace(0, len(order) - 1, min(RANKED, len(order))).astype(int))
    found = []
    for rank in ranks.tolist():
        label = int(order[rank])
        images = learned.class_images(label, 1, needed=False)
        found.append([rank + 1, _short(values[label]), learned.class_name(label), *images])
    return found


def _extremes(
    learned: Learned,
    values: np.ndarray,
    order: np.ndarray,
    spread: dict[int, float],
    crowding: np.ndarray | None,
) -> list[dict]:
    return [
        {
            "name": learned.class_name(label),
            "value": _short(values[label]),
            "spread": _short(spread.get(label)),
            "nearest": None if crowding is None else _short(crowding[label]),
            "images": learned.class_images(label, 3),
        }
        for label in order[:EXTREMES].tolist()
    ]


def _scatters(
    learned: Learned,
    name: str,
    values: np.ndarray,
    spread: dict[int, float],
    crowding: np.ndarray | None,
) -> list[dict]:
    """The value against the spread of its class, and against the nearest other proxy."""
    found = []
    if len(spread) > 2:
        found.append(_scatter(learned, name, values, spread, "spread of the class's images"))
    if crowding is not None and len(crowding) > 2:
        rng = np.random.default_rng(learned.seed)
        shown = rng.permutation(len(crowding))[:RANKED].tolist()
        nearest = {label: float(crowding[label]) for label in shown}
        found.append(_scatter(learned, name, values, nearest, "cosine to the nearest proxy"))
    return found


def _scatter(
    learned: Learned, name: str, values: np.ndarray, across: dict[int, float], words: str
) -> dict:
    def images(label: int) -> list[int]:
        return learned.class_images(label, 1, needed=False)

    labels = list(across)
    x, y = np.array([across[label] for label in labels]), values[labels]
    return {
        "x": words,
        "y": name,
        "correlation": _short(rank_correlation(x, y)),
        "points": [
            [_short(a), _short(b), learned.class_name(c), *images(c)]
            for a, b, c in zip(x.tolist(), y.tolist(), labels, strict=True)
        ],
    }


def _course(learned: Learned, name: str, order: np.ndarray) -> dict | None:
    """How the values moved: quantiles over the classes, and some classes of both ends."""
    values, epochs = learned.history[name], learned.history["epoch"].tolist()
    if len(values) < 2:
        return None
    levels = (0.0, 0.1, 0.5, 0.9, 1.0)
    return {
        "epochs": epochs,
        "quantiles": [[_short(v) for v in row] for row in np.quantile(values, levels, axis=1)],
        "lines": [
            {"name": learned.class_name(c), "values": [_short(v) for v in values[:, c]]}
            for c in dict.fromkeys([*order[:3].tolist(), *order[-3:].tolist()])
        ],
    }


def class_spread(learned: Learned, first: list) -> dict[int, float]:
    """1 - mean cosine of a class's training images to their mean direction, by class.

    The classes in `first` come first; others are added at random until there are SPREAD_IMAGES
    images, which are embedded anew.
    """
    if learned.train is None or learned.embed is None:
        return {}
    rng = np.random.default_rng(learned.seed)
    others = rng.permutation(learned.train.num_classes).tolist()
    chosen: list[int] = []
    for label in dict.fromkeys([*(int(c) for c in first), *others]):
        if len(chosen) >= SPREAD_IMAGES:
            break
        chosen += np.flatnonzero(learned.train.labels == label)[:SPREAD_PER_CLASS].tolist()
    try:
        images, rows = learned.embed(learned.train.subset(chosen))
    except InputError:  # more images than a few cannot be read (any more)
        return {}
    unit = F.normalize(rows.float().cpu(), dim=1)
    found = {}
    for label, count in zip(*np.unique(images.labels, return_counts=True), strict=True):
        if count > 1:
            mean = unit[torch.from_numpy(images.labels == label)].mean(dim=0)
            found[int(label)] = 1 - float(mean.norm())  # Σ x·m/‖m‖ / n = ‖m‖
    return found


def rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Spearman's rank correlation of two (n,); 0 where one of them is constant."""
    from scipy.stats import rankdata

    a, b = rankdata(x), rankdata(y)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else 0.0


# --- proxies --------------------------------------------------------------------------------------


def nearest_proxy(proxies: torch.Tensor) -> torch.Tensor:
    """(C,) the cosine of each proxy of (C, d) to the nearest other one."""
    unit = F.normalize(proxies.float(), dim=1)
    best = []
    for rows in blocks(len(unit), 1024):
        similarity = unit[rows] @ unit.T
        own = torch.arange(rows.start, rows.stop)
        similarity[own - rows.start, own] = -torch.inf
        best.append(similarity.amax(dim=1))
    return torch.cat(best)


def closest_pairs(
    proxies: torch.Tensor, nearest: torch.Tensor, count: int
) -> list[tuple[int, int, float]]:
    """The pairs of proxies (C, d) with the highest cosine, highest first.

    Args:
        nearest: (C,) the cosines of `nearest_proxy`. A proxy in one of the `count` closest pairs is
            itself among the 2·count whose nearest is nearest, so that only these are compared.
    """
    chosen = nearest.topk(min(2 * count, len(nearest))).indices.sort().values
    unit = F.normalize(proxies[chosen].float(), dim=1)
    rows, columns = torch.triu_indices(len(unit), len(unit), offset=1)
    values, order = (unit @ unit.T)[rows, columns].sort(descending=True)
    pairs = zip(chosen[rows[order]].tolist(), chosen[columns[order]].tolist(), strict=True)
    return [(a, b, value) for (a, b), value in zip(pairs, values.tolist(), strict=True)][:count]


def proxies(learned: Learned) -> Iterator[Section]:
    """The training classes whose proxies are nearest to each other."""
    weights = learned.criterion("proxies")
    nearest = learned.crowding
    if weights is None or nearest is None:
        return
    yield {
        "kind": "pairs",
        "title": "Proxies: which training classes are closest",
        "about": (
            "A proxy is the point that the loss keeps for a class. Two that lie close together are "
            "two classes that the network finds alike. A cosine of 1 is the same direction, 0 a "
            "right angle."
        ),
        "histogram": histogram(nearest.numpy()),
        "histogram_of": "cosine of each proxy to the nearest other",
        "pairs": [
            {
                "names": [learned.class_name(c) for c in (a, b)],
                "value": _short(value),
                "images": [learned.class_images(c, 2) for c in (a, b)],
            }
            for a, b, value in closest_pairs(weights, nearest, EXTREMES)
        ],
    }


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
        "columns": columns,
    }


# --- IDML -----------------------------------------------------------------------------------------


def uncertainty(learned: Learned) -> Iterator[Section]:
    """The images that an introspective network is most and least sure of."""
    raw = learned.judged.uncertainty
    if raw is None:
        return
    lengths = raw.float().norm(dim=1).numpy()
    order = np.argsort(lengths, kind="stable")
    images = learned.judged.images
    released = note_on_introspection(learned.record.options) != ""

    def shown(places: np.ndarray) -> list[dict]:
        return [
            {
                "image": learned.thumbs.want(images, place),
                "name": images.class_names[images.labels[place]],
                "value": _short(lengths[place]),
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
        "most": shown(order[: 2 * EXTREMES]),
        "histogram": histogram(lengths),
        "quintiles": _recall_by_quintile(learned.search, lengths),
    }


def _recall_by_quintile(search: Search, lengths: np.ndarray) -> list[float]:
    """R@1 of each fifth of the queries, the most certain first: is it unsure where it errs?"""
    matched = search.per_query["relevant"] > 0
    if "R@1" not in search.scores.names or len(search.queries) < 5 or not matched.any():
        return []
    hits = search.scores.values[:, search.scores.names.index("R@1")].numpy()
    fifths = np.array_split(hits[np.argsort(lengths[search.queries], kind="stable")], 5)
    return [_short(part.mean()) for part in fifths]


# --- SEC ------------------------------------------------------------------------------------------


def norms(learned: Learned) -> Iterator[Section]:
    """Lengths of the raw embeddings, which SEC makes equal."""
    attached = methods.attachments(learned.record.options)
    if not {"sec", "l2"} & set(attached) or learned.judged.unit:
        return
    lengths = learned.judged.embeddings.float().norm(dim=1).cpu().numpy()
    mean, deviation = float(lengths.mean()), float(lengths.std())
    constrained = learned.record.args.get("sec_wei", 0) > 0
    yield {
        "kind": "norms",
        "title": "SEC: the length of the embeddings",
        "about": (
            "Only directions are compared, but a loss on directions moves long embeddings less "
            "than short ones. SEC therefore pulls all lengths towards their mean: the narrower "
            "this histogram, the more alike all images are trained. "
            + ("" if constrained else "This run has no constraint; it is shown for comparison. ")
            + f"Evaluation images: {mean:.3g} ± {deviation:.2g}, a relative deviation of "
            f"{deviation / max(mean, 1e-12):.1%}."
        ),
        "histogram": histogram(lengths),
        "columns": ["norm_mean", "norm_ema", "norm_var", "sec", "l2"],
    }


# --- divide and conquer ---------------------------------------------------------------------------


def masks(learned: Learned) -> Iterator[Section]:
    """Which dimensions of the embedding each cluster trains."""
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
            "with a column for each dimension. Dark cells are dimensions that the cluster does not "
            "train. Masks that overlap little divide the work; the cosines say how much they do."
        ),
        "most": _short(most),
        "rows": (shown / most * 99).round().int().tolist(),
        "cosines": [[_short(value) for value in row] for row in cosines],
    }


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
            "A batch comes from one of them, so that the hard comparisons are made among images "
            "that look alike. Shown are the classes with the most images in each." + left_out
        ),
        "clusters": found,
    }


def _short(value: Any) -> float | None:
    return None if value is None else float(f"{float(value):.4g}")
