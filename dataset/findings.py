"""Lists what is wrong or unusual in a data set, with one function for each kind of finding.

A *finding* makes results wrong or not comparable; a *note* says what happens to an unusual file.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bars import Bar
from dataset.alike import near_duplicates
from dataset.base import DataSet, ImageSet
from dataset.decoding import LONGEST
from dataset.facts import CONVERSIONS, FAULTS, MISSING, MOST_COMPARED, ROTATION, FileFacts

TRAIN = "train"
READING = "reading"
REMARK = "remark"
_EXAMPLES = 3
_REMARKS = 20
_FEWEST_PIXELS = 4  # a smaller side shows nothing
_AS_STORED = "taken as stored, as the released programs do (--exif ignore)"


@dataclass
class Finding:
    """One kind of finding.

    Attributes:
        kind: what was found. count: how often. meaning: its effect on results, and what to do.
        examples: all files or classes; the table shows a few.
        note: whether it is a note, which does not set the exit status.
    """

    kind: str
    count: int
    meaning: str
    examples: list[str] = field(default_factory=list)
    note: bool = False

    def sentence(self) -> str:
        """The finding as a sentence for the table."""
        if self.kind == READING:
            return self.meaning
        shown = self.examples[: _REMARKS if self.kind == REMARK else _EXAMPLES]
        more = ", ..." if self.count > len(shown) else ""
        text = f"{self.count:,} x {self.kind}: {self.meaning}"
        return f"{text} ({', '.join(shown)}{more})" if shown else text


def beside_published(
    entry: DataSet, root: Path, parts: dict[str, ImageSet], facts: dict[str, FileFacts]
) -> list[Finding]:
    """How a data set differs from the one that papers use."""
    return [
        *_checksum_findings(entry, root),
        *_concern_findings(parts),
        *_size_findings(entry, parts, facts),
        *_count_findings(entry, parts),
    ]


def in_the_images(
    parts: dict[str, ImageSet], facts: dict[str, FileFacts], upright: bool
) -> list[Finding]:
    """What is wrong with the files, with how they are listed, and with the classes.

    Args:
        upright: whether files are turned as their EXIF data say.
    """
    return [
        *_file_findings(facts),
        *_shape_findings(parts, facts),
        *_duplicate_findings(parts, facts),
        *_near_duplicate_notes(parts, facts),
        *_class_findings(parts),
        *_conversion_notes(facts, upright),
    ]


def _checksum_findings(entry: DataSet, root: Path) -> Iterable[Finding]:
    changed = [str(path) for path in entry.changed_files(root)]
    yield from some(
        "file with another checksum than the published one",
        changed,
        "results on it cannot be compared; get it again",
    )


def _concern_findings(parts: dict[str, ImageSet]) -> Iterable[Finding]:
    for concern in dict.fromkeys(part.concern for part in parts.values() if part.concern):
        yield Finding("other pictures than the published ones", 1, concern)


def _size_findings(
    entry: DataSet, parts: dict[str, ImageSet], facts: dict[str, FileFacts]
) -> Iterable[Finding]:
    if entry.longest_side is None or any(part.concern for part in parts.values()):
        return
    large = [fact.name for fact in facts.values() if max(fact.size) > entry.longest_side]
    yield from some(
        f"picture of more than the published {entry.longest_side} pixels",
        large,
        "results on others cannot be compared with papers'; get the published ones",
    )


def _count_findings(entry: DataSet, parts: dict[str, ImageSet]) -> Iterable[Finding]:
    for title, part in parts.items():
        differences = entry.count_differences(title, len(part), part.num_classes)
        if differences:
            meaning = f"{title} has {differences}; results on it cannot be compared with papers'"
            yield Finding("other counts than published", 1, meaning)


def _file_findings(facts: dict[str, FileFacts]) -> Iterable[Finding]:
    for fault, meaning in FAULTS.items():
        found = [fact for fact in facts.values() if fact.fault == fault]
        said = [fact.name if fault == MISSING else f"{fact.name}: {fact.error}" for fact in found]
        yield from some(fault, said, meaning)


OUTSIDE, _BEYOND = "box outside its image", "box beyond its image's edge"
_SMALL = f"picture or box with fewer than {_FEWEST_PIXELS} pixels to a side"
_EXTREME = f"shape more than {LONGEST} times as long as wide"


def _shape_findings(parts: dict[str, ImageSet], facts: dict[str, FileFacts]) -> Iterable[Finding]:
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for part in parts.values():
        boxes = [(-1,) * 4] * len(part) if part.boxes is None else part.boxes.tolist()
        for path, box in zip(part.paths, boxes, strict=True):
            if not facts[path].fault:
                for kind in odd_shapes(facts[path].size, box):
                    found[kind][facts[path].name] = None
    for kind, meaning in (
        (OUTSIDE, "there is nothing to cut out; correct the list"),
        (_SMALL, "hardly anything is in it; of a box, are its numbers pixels?"),
        (_EXTREME, "only the centre is used"),
        (_BEYOND, "it is cut at the edge"),
    ):
        yield from some(kind, list(found[kind]), meaning, note=kind == _BEYOND)


def odd_shapes(size: tuple[int, int], box: Sequence[int]) -> Iterator[str]:
    """What is odd about an image's size, or about its box (x1, y1, x2, y2; -1 if there is none)."""
    width, height = size
    x1, y1, x2, y2 = box
    if x1 >= width or y1 >= height:
        yield OUTSIDE
        return
    if x1 >= 0:
        if x2 > width or y2 > height:
            yield _BEYOND
        width, height = min(x2, width) - x1, min(y2, height) - y1
    if min(width, height) < _FEWEST_PIXELS:
        yield _SMALL
    if max(width, height) > LONGEST * min(width, height):
        yield _EXTREME


class _Copy(NamedTuple):
    """One listing of an image: on which side ("train", "query", "gallery" or "eval")."""

    side: str
    name: str
    class_name: str


def _duplicate_findings(
    parts: dict[str, ImageSet], facts: dict[str, FileFacts]
) -> Iterable[Finding]:
    across, both, twice, labels, same = ([] for _ in range(5))
    for copies, times in _groups_of_copies(parts, facts):
        trained = [copy for copy in copies if copy.side == TRAIN]
        tested = [copy for copy in copies if copy.side != TRAIN]
        answers = {copy.name for copy in copies if copy.side == "gallery"}
        if trained:
            across += dict.fromkeys(_pairs([trained[0], *tested]))
        both += [copy.name for copy in copies if copy.side == "query" and copy.name in answers]
        if times > 1:
            twice.append(copies[0].name)
        for side in (trained, tested):
            classes: dict[str, list[_Copy]] = defaultdict(list)
            for copy in side:
                classes[copy.class_name].append(copy)
            firsts = [inside[0] for inside in classes.values()]
            labels += _pairs(firsts, "as", "class_name") if firsts else []
            for inside in classes.values():
                same += _pairs({copy.name: copy for copy in inside}.values())
    yield from some(
        "exact duplicate across train and test",
        across,
        "the test images were trained on; remove one of each",
    )
    yield from some(
        "image that is a query and in the gallery",
        both,
        "it is its own nearest image, and right; list it once",
    )
    yield from some("image listed more than once", twice, "it is its own copy; list it once")
    yield from some("exact duplicate in different classes", labels, "one of the labels is wrong")
    yield from some(
        "exact duplicate within a class",
        same,
        "retrieving the copy of a query is easy; kept, as the papers do",
        note=True,
    )


def _groups_of_copies(
    parts: dict[str, ImageSet], facts: dict[str, FileFacts]
) -> Iterator[tuple[list[_Copy], int]]:
    """The distinct listings of each image that is listed more than once.

    Also the largest number of times that one of them is in one list. An image is the content of a
    file, or of a box in it. Alternative lists, such as VehicleID's, count as one.
    """
    listed: dict[tuple[bytes, bytes], dict[_Copy, Counter[str]]] = defaultdict(
        lambda: defaultdict(Counter)
    )
    for title, part in parts.items():
        for index, path in enumerate(part.paths):
            digest = facts[path].digest
            if facts[path].fault:  # damaged files are copies only of themselves
                digest = path.encode("utf-8", "surrogateescape")
            box = b"" if part.boxes is None else part.boxes[index].tobytes()
            copy = _Copy(title.split()[0], facts[path].name, part.class_names[part.labels[index]])
            listed[digest, box][copy][title] += 1
    for copies in listed.values():
        times = max(max(counts.values()) for counts in copies.values())
        if len(copies) > 1 or times > 1:
            yield list(copies), times


def _pairs(copies: Iterable[_Copy], how: str = "in", field: str = "side") -> Iterator[str]:
    """The first of the copies paired with each of the others, in words.

    Args:
        how, field: say where both are listed if they are the same file: "x.jpg in train and eval".
    """
    first, *others = copies
    for other in others:
        if other.name != first.name:
            yield f"{first.name} = {other.name}"
        else:
            yield f"{first.name} {how} {getattr(first, field)} and {getattr(other, field)}"


def _near_duplicate_notes(
    parts: dict[str, ImageSet], facts: dict[str, FileFacts]
) -> Iterable[Finding]:
    """Evaluation pictures that are, slightly changed, also training pictures.

    Not for data with boxes, because thumbnails are of whole photographs.
    """
    if any(part.boxes is not None for part in parts.values()):
        return
    if len(facts) > MOST_COMPARED:
        words = f"near duplicates are searched among {MOST_COMPARED:,} images at most"
        yield Finding(READING, 1, f"{words}, and there are {len(facts):,}", note=True)
        return
    tested, trained = _facts_of_sides(parts, facts)
    copies = tested.keys() & trained.keys()  # exact duplicates are another finding
    first, second = (
        [fact for digest, fact in side.items() if digest not in copies]
        for side in (tested, trained)
    )
    if not (first and second):
        return
    thumbnails = (np.stack([fact.thumbnail for fact in side]) for side in (first, second))
    with Bar("near duplicates", len(first)) as bar:
        pairs = near_duplicates(*thumbnails, lambda done: bar.update(done - bar.n))
    yield from some(
        "near duplicate across train and test",
        [f"{first[pair.first].name} ~ {second[pair.second].name}" for pair in pairs],
        "the same picture in another size, crop or brightness, or a very similar one; compare them "
        "(the most similar are first), and remove one of each that is the same",
        note=True,
    )


def _facts_of_sides(
    parts: dict[str, ImageSet], facts: dict[str, FileFacts]
) -> tuple[dict[bytes, FileFacts], dict[bytes, FileFacts]]:
    """Digest → facts of the files with thumbnails, of the evaluation and of the training."""
    tested: dict[bytes, FileFacts] = {}
    trained: dict[bytes, FileFacts] = {}
    for title, part in parts.items():
        side = trained if title == TRAIN else tested
        found = (facts[path] for path in part.paths)
        side |= {fact.digest: fact for fact in found if fact.thumbnail is not None}
    return tested, trained


def _class_findings(parts: dict[str, ImageSet]) -> Iterable[Finding]:
    query, gallery = parts.get("query"), parts.get("gallery")
    for title, part in parts.items():
        if title in ("query", "gallery"):
            continue
        counts = np.bincount(part.labels, minlength=part.num_classes)
        lonely = [part.class_names[label] for label in np.flatnonzero(counts == 1)]
        train = title == TRAIN
        meaning = (
            "no pair of it can be formed, only losses with proxies learn from it"
            if train
            else "its query has no right answer: a miss in R@K, left out of RP and MAP@R"
        )
        yield from some(f"class with one image in {title}", lonely, meaning, note=train)
    if query is not None and gallery is not None:
        absent = np.setdiff1d(query.labels, gallery.labels)
        yield from some(
            "class of a query without any gallery image",
            [query.class_names[label] for label in absent],
            "its queries have no right answer",
        )
    trained = set(parts[TRAIN].class_names) if TRAIN in parts else set()
    tested = {name for title, part in parts.items() if title != TRAIN for name in part.class_names}
    if TRAIN not in parts:
        yield Finding(READING, 1, "there are no training images, only some to evaluate", note=True)
    yield from some(
        "class in train and in test",
        sorted(trained & tested),
        "the result would not be one on unseen classes",
    )


def _conversion_notes(facts: dict[str, FileFacts], upright: bool) -> Iterable[Finding]:
    as_stored = {} if upright else {ROTATION: _AS_STORED}
    for trait, conversion in (CONVERSIONS | as_stored).items():
        names = [fact.name for fact in facts.values() if trait in fact.traits]
        yield from some(f"{trait} file", names, conversion, note=True)


def some(kind: str, items: Sequence[str], meaning: str, note: bool = False) -> Iterable[Finding]:
    """A finding of all `items`, if there are any."""
    if items:
        yield Finding(kind, len(items), meaning, list(items), note)
