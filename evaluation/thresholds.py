"""Two cosines that turn a similarity into a verdict: "same", "unsure" or "different".

    thresholds = load_run("logs/demo").thresholds
    thresholds.verdict(0.83)                         # of any two images
    thresholds.in_index(10_000).verdict(0.83)        # of an image and one it found among 10,000

Pairs of images and results of a query need different thresholds. A cosine that one in 1,000
different pairs reaches is reached by nearly every query in an index of 10,000 images of other
classes, because the nearest of so many is very near. `Thresholds` are for pairs; `in_index` gives
those for results of a query.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from evaluation.networks import checkpoint_file, fingerprint_of, open_checkpoint
from metrics.comparison import FEW_CLASSES
from runs import RunFolder
from utils import counted, damage_in_words, plain_number

if TYPE_CHECKING:
    from net import EmbeddingNet

FALSE_FOUND = 0.05  # share of queries without a right answer that may get "same", see `in_index`
WORST = 0.2  # thresholds with a higher error rate are not recommended
TOLERANCE = 1e-9  # for rounding errors of rates

Verdict = Literal["same", "unsure", "different"]


class Rate(NamedTuple):
    """An expected rate and its 95 % interval; NaN if there is none."""

    expected: float
    low: float = math.nan
    high: float = math.nan

    @classmethod
    def of_dict(cls, content: Mapping[str, Any]) -> Rate:
        """From JSON; null becomes NaN."""
        return cls(*(_number(content[name]) for name in cls._fields))

    def percent(self, interval: str = "") -> str:
        """The rate in percent; the ends of its interval, if known, are put into `interval`."""
        text = f"{plain_number(100 * self.expected, 2)} %"
        if math.isnan(self.low):
            return text
        return text + interval.format(*(plain_number(100 * end, 2) for end in self[1:]))


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


@dataclass(frozen=True)
class Found:
    """What queries found in an index, with and without images of their own class.

    Attributes:
        images: the mean number of images that a query searched, without those of its class.
        queries: the number of queries.
        same: (rate, cosine, low, high), by decreasing rate: the share of the queries that find an
            image of another class at or above this cosine, and the 95 % interval of the share.
        different: a cosine. For the share `missed` of the queries that have an image of their class
            in the index, the nearest of these is below it.
        missed: see `different`.
        right: for each entry of `same`, the share of those queries whose nearest image of their
            class is at or above its cosine.
    """

    images: int
    queries: int
    same: tuple[tuple[float, float, float, float], ...]
    different: float
    missed: float
    right: tuple[float, ...]


@dataclass(frozen=True)
class Thresholds:
    """Cosines from `same` on mean "same", those below `different` "different", others "unsure".

    Attributes:
        same, different: cosines, `different` <= `same`; `same` is inf if nothing is called "same".
        false_same: the share of different pairs that are called "same".
        false_different: the share of same pairs that are called "different".
        found_same, found_different: the shares of same pairs called "same", and of different pairs
            called "different".
        title: the data they were measured on; images, classes, same_pairs, different_pairs: the
            sizes of these data.
        network: the fingerprint of the network they belong to, see `networks.fingerprint_of`.
        index_size: None if the shares are of pairs; otherwise they are of queries in an index of
            this many images.
        found: the measurements that `in_index` uses; None if no search was measured.
    """

    same: float
    different: float
    false_same: Rate
    false_different: Rate
    found_same: Rate
    found_different: Rate
    title: str = ""
    images: int = 0
    classes: int = 0
    same_pairs: int = 0
    different_pairs: int = 0
    network: str = ""
    index_size: int | None = None
    found: Found | None = None

    def verdict(self, cosine: float) -> Verdict:
        """The verdict on two images with this cosine; "unsure" if it is NaN."""
        if cosine >= self.same:
            return "same"
        return "different" if cosine < self.different else "unsure"

    @property
    def doubt(self) -> str:
        """A sentence if the error rates are based on few classes; "" if not, or if unknown."""
        if not 0 < self.classes < FEW_CLASSES:
            return ""
        return (
            f"Measured on {counted(self.classes, 'class')} alone, these errors are a "
            "rough guess, and probably too low."
        )

    def in_index(self, size: int) -> Thresholds:
        """The thresholds for results of a query among `size` images.

        `same` is wrong for 5 in 100 queries that have no image of their class in the index, and
        `different` for the share `found.missed` of those that have one. If G images of other
        classes were measured, an index of G' images has the rate 1 - (1 - rate)^(G'/G), as if it
        were searched in parts; a smaller index counts as the measured one. If too few queries were
        measured for such a low rate, the lowest that can be measured takes its place, and
        `false_same` is that rate; if even that is above 1 in 5, `same` is inf.

        If the two cosines cross, so that nothing would be unsure, both become their mean. The rates
        are then bounds, from the nearest measurements on the safe side: `same` is wrong for at most
        `false_same`, and right for at least `found_same`.

        Raises:
            ValueError: no search was measured.
        """
        if self.found is None:
            raise ValueError("these thresholds were measured on pairs alone")
        found, size = self.found, max(size, self.found.images)
        parts = size / found.images
        rates = [
            Rate(*(1 - (1 - rate) ** parts for rate in (expected, low, high)))
            for expected, _, low, high in found.same
        ]
        cosines = [cosine for _, cosine, *_ in found.same]
        fitting = (i for i, rate in enumerate(rates) if rate.expected <= FALSE_FOUND + TOLERANCE)
        place = next(fitting, len(rates) - 1)
        same, different, right = cosines[place], found.different, found.right[place]
        false_same = rates[place]
        if false_same.expected > WORST + TOLERANCE:
            same, right, false_same = math.inf, 0.0, Rate(0.0)
        elif same < different:
            same = different = (same + different) / 2
            false_same = rates[max(i for i, cosine in enumerate(cosines) if cosine <= same)]
            right = 1 - found.missed
        return replace(
            self,
            same=same,
            different=different,
            false_same=false_same,
            false_different=Rate(found.missed),
            found_same=Rate(right),
            found_different=Rate(math.nan),
            index_size=size,
        )

    def as_dict(self) -> dict[str, Any]:
        """As values for JSON."""
        content: dict[str, Any] = dict(vars(self))
        for name, value in content.items():
            if isinstance(value, Rate):
                content[name] = value._asdict()
        if self.found is not None:
            content["found"] = dict(vars(self.found))
        return content

    @classmethod
    def of_dict(cls, content: Mapping[str, Any]) -> Thresholds:
        """From the values of `as_dict`; unknown entries, of a newer version, are ignored.

        Raises:
            KeyError, TypeError, ValueError: they are not such values.
        """
        known = {name: content[name] for name in cls.__dataclass_fields__ if name in content}
        known["same"] = math.inf if content["same"] is None else float(content["same"])
        known["different"] = float(content["different"])
        for name in RATES:
            known[name] = Rate.of_dict(content[name])
        if (found := content.get("found")) is not None:
            known["found"] = replace(
                Found(**{name: found[name] for name in Found.__dataclass_fields__}),
                same=tuple(tuple(map(_number, entry)) for entry in found["same"]),
                right=tuple(map(float, found["right"])),
            )
        return cls(**known)


RATES = ("false_same", "false_different", "found_same", "found_different")


def thresholds_of(path: str | Path, network: EmbeddingNet | None = None) -> Thresholds | None:
    """The thresholds that a run measured for the network of its folder, or of a checkpoint in it.

    None if it measured none, or only for other weights than these: those of another checkpoint,
    say, or the raw ones of a run that kept a running mean.

    Args:
        network: the network at `path`, if it is already open.

    Raises:
        InputError: there is no network at `path`, or results.json is damaged.
    """
    folder = Path(checkpoint_file(path)).parent
    kept = RunFolder(folder).read_results().get("thresholds")
    if not kept:
        return None
    with damage_in_words(str(folder / "results.json"), "use another copy of it"):
        known: Sequence[Thresholds] = [Thresholds.of_dict(entry) for entry in kept.values()]
    own = fingerprint_of(network or open_checkpoint(path).network)
    return next((each for each in known if each.network == own), None)
