"""The section about values that a loss learns for each class, such as AMLoss's margins.

Its sentences are computed from the run: relations of a value to other quantities come with rank
correlations and intervals over classes drawn at random, and whether the values have settled is
judged by their movement in the last epochs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch

from criteria.amloss import AMLoss
from metrics.correlation import Correlation, rank_correlation
from page.document import isolated
from page.learned import Learned, Section, short
from page.records import Record

EXTREMES = 12  # classes at each end of a ranking
RANKED = 400  # points of a ranking's curve
FIXED = ("names", "images", "epoch", "step")  # arrays of classes.npz that are not learned
LAST = 0.2  # share of the epochs, at the end, in which movement is measured
AT_REST = 0.1  # of the average pace: values that move more slowly have settled
ALIKE = 1.05  # ratio of the largest to the smallest pull below which they count as equal
WORTH_SAYING = 0.1  # smaller correlations are not mentioned, however sure


def values_by_name(record: Record, history: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The values learned for each class, at the best epoch: arrays (C,) by name."""
    learned = {name: rows for name, rows in history.items() if name not in FIXED and len(rows)}
    return {name: rows[row_of_best(record, history)] for name, rows in learned.items()}


def row_of_best(record: Record, history: dict[str, np.ndarray]) -> int:
    """The row of the history at the best epoch, or else the last one."""
    rows = np.flatnonzero(history["epoch"] == record.best_epoch)
    return int(rows[-1]) if len(rows) else len(history["epoch"]) - 1


def class_values(learned: Learned) -> Iterator[Section]:
    """A section for each learned value: ranked, against other quantities, and over the epochs."""
    history = learned.history
    for name, values in values_by_name(learned.record, history).items():
        row = row_of_best(learned.record, history)
        ended = row == len(history["epoch"]) - 1
        order = np.argsort(values, kind="stable")
        ends = [*order[:EXTREMES].tolist(), *order[::-1][:EXTREMES].tolist()]
        related = [_related(q, values) for q in _quantities(learned)]
        given = [_given_the_others(related, at) for at in range(len(related))]
        moved = movement(history[name][: row + 1], history["epoch"][: row + 1])
        about = ABOUT_VALUES.get(name, lambda learned, values: "")(learned, values)
        spread = _spread(learned, ends)
        yield {
            "kind": "class-values",
            "title": f"The learned {name} of each class",
            "about": " ".join(filter(None, [about, about_movement(moved, name, ended)])),
            "said": [what_goes_with(name, r, g) for r, g in zip(related, given, strict=True)],
            "settled": moved is None or moved.settled,
            "ended": ended,
            "value": name,
            "epoch": int(history["epoch"][row]),
            "classes": len(values),
            "ranked": _ranking(learned, values, order),
            "largest": _extremes(learned, values, order[::-1], spread),
            "smallest": _extremes(learned, values, order, spread),
            "scatters": [
                _scatter(learned, name, r, g) for r, g in zip(related, given, strict=True)
            ],
            "course": _course(learned, name, order),
        }


def in_short(part: Section) -> str:
    """The range of the learned values, whether they have settled, and their strongest relation."""
    low, high, value = part["smallest"][0], part["largest"][0], part["value"]
    ends = [f"{end['value']:.3g} ({isolated(end['name'])})" for end in (low, high)]
    words = f"Learned {value}s go from {ends[0]} to {ends[1]}."
    if not part["settled"]:
        when = "at the end" if part["ended"] else "at the best epoch"
        words += f" They have not settled: the {value}s were still moving {when}."
    sure = [s for s in part["scatters"] if s["low"] > 0 or s["high"] < 0]
    strongest = max(sure, key=lambda s: abs(s["correlation"]), default=None)
    if strongest is None or abs(strongest["correlation"]) < WORTH_SAYING:
        return words
    more = "larger" if strongest["correlation"] > 0 else "smaller"
    return (
        f"{words} They are {more} where {strongest['where']} (rank correlation "
        f"{_interval(strongest)})."
    )


# --- the loss's effect on them --------------------------------------------------------------------


def about_margins(learned: Learned, values: np.ndarray) -> str:
    """What raises and lowers AMLoss's margins, and whether its third term differs among classes."""
    said = (
        "AMLoss wants the cosine between an image and the proxy of its class to exceed a margin, "
        "which each class learns for itself; all start equal. Images that stay below the margin of "
        "their class lower it; the loss's third term raises it, the more the nearer other proxies "
        "are."
    )
    if (proxies := learned.few_proxies) is None:
        return said
    delta = learned.record.options.delta
    pulls = AMLoss.raising(proxies, torch.from_numpy(np.asarray(values)).float(), delta)
    least, most = float(pulls.min()), float(pulls.max())
    ends = dict.fromkeys((f"{least:.4f}", f"{most:.4f}"))
    range_ = " to ".join(ends)
    if most <= ALIKE * least:
        return (
            f"{said} Among these {len(values):,} classes it pulls at all of them alike "
            f"({range_} of its full strength), so it is not what tells their margins apart."
        )
    return f"{said} Among these {len(values):,} classes it pulls {range_} as hard as it can."


def about_boundaries(learned: Learned, values: np.ndarray) -> str:
    """The meaning of the margin loss's boundaries."""
    return (
        "The margin loss wants images of a class nearer to each other than its boundary β, and "
        "others farther away, so a larger β asks less of a class's own images."
    )


ABOUT_VALUES: dict[str, Callable[[Learned, np.ndarray], str]] = {
    "margin": about_margins,
    "beta": about_boundaries,
}


# --- whether they have settled --------------------------------------------------------------------


class Movement(NamedTuple):
    """The movement of values in the last epochs.

    Attributes:
        epochs: the number of these epochs. total: of all epochs.
        falling, rising: shares of the classes.
        pace: the speed of the values in these epochs, relative to their average speed.
    """

    epochs: int
    total: int
    falling: float
    rising: float
    pace: float

    @property
    def settled(self) -> bool:
        """Whether they have almost stopped moving."""
        return self.pace < AT_REST


def movement(rows: np.ndarray, epochs: np.ndarray) -> Movement | None:
    """The movement of values (E, C) by epoch; None with fewer than three rows, or without any."""
    if len(rows) < 3:
        return None
    last = int(epochs[-1])
    start = int(np.flatnonzero(epochs[:-1] <= last - LAST * (last - epochs[0]))[-1])
    late, all_ = rows[-1] - rows[start], rows[-1] - rows[0]
    steps, total = last - int(epochs[start]), last - int(epochs[0])
    pace = float(np.abs(all_).mean()) / max(1, total)
    if not pace > 0 or steps < 1:
        return None
    falling, rising = float((late < 0).mean()), float((late > 0).mean())
    return Movement(steps, last, falling, rising, float(np.abs(late).mean()) / steps / pace)


def about_movement(moved: Movement | None, name: str, ended: bool = True) -> str:
    """Whether values have settled, in a sentence.

    Args:
        ended: whether these are the values at the end of training.
    """
    if moved is None:
        return ""
    epochs = f"{moved.total} epochs" if ended else f"the {moved.total} epochs up to the best one"
    span = f"In the last {f'{moved.epochs} ' if moved.epochs > 1 else ''}of {epochs}"
    if moved.settled:
        return f"{span} they moved at {moved.pace:.2f} of their average pace: they have settled."
    share, way = max((moved.falling, "falling"), (moved.rising, "rising"))
    part = "all" if share == 1 else f"{100 * share:.1f} %"
    return (
        f"{span} {part} of them were still {way}, and they moved at {moved.pace:.2f} of "
        f"their average pace: they have not settled, so a {name} shows how fast it has moved "
        "rather than where it would end."
    )


# --- relations to other quantities ----------------------------------------------------------------


class Quantity(NamedTuple):
    """A known quantity of classes.

    Attributes:
        where: the meaning of a larger quantity, for "larger where …". of: label → its value.
    """

    title: str
    where: str
    of: dict[int, float]


class Related(NamedTuple):
    """A quantity x and the learned values y of the same classes, with their rank correlation."""

    quantity: Quantity
    labels: list[int]
    x: np.ndarray
    y: np.ndarray
    correlation: Correlation


def _quantities(learned: Learned) -> list[Quantity]:
    """The quantities that are known of at least three training classes, and are not constant."""
    drawn, proxies = learned.drawn, learned.proxies
    found = [
        Quantity(
            "spread of the class's images",
            "the images of a class differ more",
            {label: 1 - float(mean.norm()) for label, mean in drawn.items()},
        )
    ]
    if learned.crowding is not None:
        nearest = dict(enumerate(learned.crowding.tolist()))
        title = "cosine to the nearest other proxy"
        found.append(Quantity(title, "another class's proxy is nearer", nearest))
    if proxies is not None and drawn and len(next(iter(drawn.values()))) == proxies.shape[1]:
        own = {label: float(mean @ proxies[label]) for label, mean in drawn.items()}
        title = "mean cosine of the images to their own proxy"
        found.append(Quantity(title, "the images of a class lie nearer to their proxy", own))
    sizes = dict(enumerate(learned.history["images"].tolist()))
    found.append(Quantity("training images of the class", "a class has more images", sizes))
    return [q for q in found if len(q.of) > 2 and len(set(q.of.values())) > 1]


def _related(quantity: Quantity, values: np.ndarray) -> Related:
    labels = [label for label in quantity.of if label < len(values)]
    x = np.array([quantity.of[label] for label in labels])
    y = values[labels]
    return Related(quantity, labels, x, y, rank_correlation(x, y))


def _given_the_others(related: list[Related], at: int) -> Correlation | None:
    """The partial correlation of one of them, all others held fixed; None without others."""
    if len(related) < 2:
        return None
    shared = sorted(set.intersection(*(set(r.labels) for r in related)))
    if len(shared) < 4 + len(related):
        return None
    columns = [np.array([r.quantity.of[label] for label in shared]) for r in related]
    value_of = dict(zip(related[at].labels, related[at].y.tolist(), strict=True))
    own = np.array([value_of[label] for label in shared])
    others = [column for place, column in enumerate(columns) if place != at]
    return rank_correlation(columns[at], own, *others)


def what_goes_with(name: str, related: Related, given: Correlation | None) -> str:
    """A sentence about the relation of values to a quantity, with its numbers."""
    found, where = related.correlation, related.quantity.where
    numbers = f"rank correlation {found.value:.2f}, 95 % interval {found.low:.2f} to "
    numbers += f"{found.high:.2f}, {found.count:,} classes"
    if not found.is_sure or abs(found.value) < WORTH_SAYING:
        said = (
            f"Where {where}, {name}s are neither larger nor smaller as far as can be seen "
            f"({numbers})"
        )
        if given is not None and given.is_sure and abs(given.value) >= WORTH_SAYING:
            more = "larger" if given.value > 0 else "smaller"
            said += f"; with the other quantities held fixed they are {more} ({given.value:.2f})"
        return f"{said}."
    more = "larger" if found.value > 0 else "smaller"
    said = f"A {name} is {more} where {where} ({numbers})"
    if given is None:
        return f"{said}."
    if not given.is_sure or abs(given.value) < WORTH_SAYING:
        now = "gone" if abs(given.value) < WORTH_SAYING else "no longer sure"
        return f"{said}; with the other quantities held fixed that is {now} ({given.value:.2f})."
    if given.value * found.value < 0:
        return f"{said}; with the others held fixed it is the other way round ({given.value:.2f})."
    return f"{said}; {given.value:.2f} with the other quantities held fixed."


def _interval(scatter: dict) -> str:
    low, high = scatter["low"], scatter["high"]
    return f"{scatter['correlation']:.2f}, 95 % interval {low:.2f} to {high:.2f}"


def _scatter(learned: Learned, name: str, related: Related, given: Correlation | None) -> dict:
    rng = np.random.default_rng(learned.seed)
    shown = rng.permutation(len(related.labels))[:RANKED].tolist()
    return {
        "x": related.quantity.title,
        "y": name,
        "where": related.quantity.where,
        "correlation": short(related.correlation.value),
        "low": short(related.correlation.low),
        "high": short(related.correlation.high),
        "given": None if given is None else short(given.value),
        "points": [
            [
                short(related.x[i]),
                short(related.y[i]),
                learned.class_name(related.labels[i]),
                *learned.class_images(related.labels[i], 1, needed=False),
            ]
            for i in shown
        ],
    }


# --- lists and curves -----------------------------------------------------------------------------


def _ranking(learned: Learned, values: np.ndarray, order: np.ndarray) -> list[list]:
    """Up to RANKED rows [rank, value, class, thumbnail], spaced evenly along the ranking."""
    ranks = np.unique(np.linspace(0, len(order) - 1, min(RANKED, len(order))).astype(int))
    found = []
    for rank in ranks.tolist():
        label = int(order[rank])
        images = learned.class_images(label, 1, needed=False)
        found.append([rank + 1, short(values[label]), learned.class_name(label), *images])
    return found


def _spread(learned: Learned, labels: list[int]) -> dict[int, float]:
    """1 - mean cosine of a class's training images to their mean direction, by class."""
    missing = [label for label in dict.fromkeys(labels) if label not in learned.drawn]
    means = learned.drawn | learned.means(missing)  # Σ x·m/‖m‖ / n = ‖m‖
    return {label: 1 - float(means[label].norm()) for label in labels if label in means}


def _extremes(
    learned: Learned, values: np.ndarray, order: np.ndarray, spread: dict[int, float]
) -> list[dict]:
    crowding = learned.crowding
    return [
        {
            "name": learned.class_name(label),
            "value": short(values[label]),
            "spread": short(spread.get(label)),
            "nearest": None if crowding is None else short(crowding[label]),
            "images": learned.class_images(label, 3),
        }
        for label in order[:EXTREMES].tolist()
    ]


def _course(learned: Learned, name: str, order: np.ndarray) -> dict[str, Any] | None:
    """The values over the epochs: quantiles over the classes, and some classes of both ends."""
    values, epochs = learned.history[name], learned.history["epoch"].tolist()
    if len(values) < 2:
        return None
    levels = (0.0, 0.1, 0.5, 0.9, 1.0)
    return {
        "epochs": epochs,
        "quantiles": [[short(v) for v in row] for row in np.quantile(values, levels, axis=1)],
        "lines": [
            {"name": learned.class_name(c), "values": [short(v) for v in values[:, c]]}
            for c in dict.fromkeys([*order[:3].tolist(), *order[-3:].tolist()])
        ],
    }
