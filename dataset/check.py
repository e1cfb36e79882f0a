"""The doctor of data sets: what is there, how it compares with what is published, what is wrong.

Every file is read whole and decoded once. A *finding* makes results wrong or not comparable and
sets the exit status; a *note* says what happens to an unusual file (how it is converted).
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import sys
import textwrap
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

import dataset
from dataset.base import DataSet, ImageSet, has_transparency, reason, to_rgb
from dataset.layouts import NotFoundError
from utils import InputError

CLEAN, FINDINGS, UNUSABLE = 0, 1, 2
_EXAMPLES = 3
_TRAIN = "train"
_GREY_MODES = ("1", "L", "LA", "La")
_TURNED = range(2, 9)  # EXIF orientation 1 is upright
_ORIENTATION, _BITS_PER_SAMPLE = 274, 258  # EXIF and TIFF tags


# --- one file -------------------------------------------------------------------------------------


class FileFacts(NamedTuple):
    """What one image file is: a hash of its bytes, its size, what is unusual, why it fails."""

    digest: bytes = b""
    size: tuple[int, int] = (0, 0)
    traits: tuple[str, ...] = ()
    error: str = ""


# What is unusual about a file → what happens to it (see base.decode).
_CONVERSIONS = {
    "grey": "repeated over the three channels",
    "CMYK": "converted to RGB",
    "16-bit": "reduced to 8 bits, the high byte",
    "palette": "colours looked up",
    "other colour space": "converted to RGB",
    "transparent": "laid on white",
    "EXIF rotation": "turned upright",
    "animated": "the first frame is used",
}


def examine(path: str) -> FileFacts:
    """Reads and decodes one file."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        return FileFacts(error=reason(error))
    digest = hashlib.blake2b(content, digest_size=16).digest()
    if not content:
        return FileFacts(digest, error="the file is empty")
    try:
        with Image.open(io.BytesIO(content)) as image:
            image.load()
            traits = tuple(_traits(image, content))
            height, width, _ = to_rgb(image).shape
    except Exception as error:  # Pillow reports damage through a dozen unrelated types
        return FileFacts(digest, error=reason(error))
    return FileFacts(digest, (width, height), traits)


def _traits(image: Image.Image, content: bytes) -> Iterable[str]:
    if image.mode in _GREY_MODES or image.mode.startswith("I"):
        yield "grey"
    elif image.mode in ("P", "PA"):
        yield "palette"
    elif image.mode == "CMYK":
        yield "CMYK"
    elif image.mode not in ("RGB", "RGBA", "RGBa", "RGBX"):
        yield "other colour space"
    if _bits(image, content) == 16:
        yield "16-bit"
    if has_transparency(image):
        yield "transparent"
    if image.getexif().get(_ORIENTATION) in _TURNED:
        yield "EXIF rotation"
    if getattr(image, "is_animated", False):
        yield "animated"


def _bits(image: Image.Image, content: bytes) -> int:
    """Bits of a sample in the file; Pillow reduces 16-bit colour without saying so."""
    if image.mode.startswith("I"):
        return 16
    if image.format == "PNG":
        return content[24]  # the bit depth in the header that every PNG begins with
    tags = getattr(image, "tag_v2", {})
    return max(np.atleast_1d(tags.get(_BITS_PER_SAMPLE, 8)).tolist())


def examine_pixels(pixels: np.ndarray) -> FileFacts:
    """As `examine`, of an image that lives in memory."""
    digest = hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=16).digest()
    return FileFacts(digest, (pixels.shape[1], pixels.shape[0]))


# --- a data set -----------------------------------------------------------------------------------


@dataclass
class Finding:
    """One kind of thing that was found: how often, where for example, and what it means."""

    kind: str
    count: int
    meaning: str
    examples: list[str] = field(default_factory=list)
    note: bool = False

    def sentence(self) -> str:
        """For the table."""
        text = f"{self.count:,} × {self.kind}: {self.meaning}"
        more = ", …" if self.count > len(self.examples) else ""
        return f"{text} ({', '.join(self.examples)}{more})" if self.examples else text


@dataclass
class SplitCount:
    """A row of the table."""

    split: str
    images: int
    classes: int
    published_images: int | None
    published_classes: int | None


@dataclass
class Report:
    """All that `check` has to say about one data set.

    `status`: "clean", "findings", "unusable" (damaged, or in no known layout) or "absent".
    """

    dataset: str
    status: str = "clean"
    found: str = ""
    problem: str = ""
    origin: str = ""
    tree: str = ""
    splits: list[SplitCount] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    @property
    def exit_status(self) -> int:
        """0 clean, 1 findings, 2 not usable."""
        return {"clean": CLEAN, "findings": FINDINGS}.get(self.status, UNUSABLE)


def check(name: str, root: str | Path = "data", **options: Any) -> Report:
    """Examines a data set; `options` go to `dataset.load`.

    Raises:
        InputError: there is no data set of this name.
    """
    entry = dataset.find(name)
    report = Report(name)
    remarks = _Remarks()
    try:
        with remarks:
            parts = _load_parts(entry, Path(root), options)
    except NotFoundError as error:
        report.status, report.problem = "absent", f"not found: {error.detail}"
        report.origin, report.tree = entry.origin, entry.tree
        return report
    except InputError as error:
        report.status, report.problem = "unusable", str(error)
        report.tree = entry.tree
        return report
    report.found = next(iter(parts.values())).source
    report.splits = [
        SplitCount(title, len(part), part.num_classes, *entry.published.get(title, (None, None)))
        for title, part in parts.items()
    ]
    facts = _examine_all(parts, name)
    report.findings = [
        *_checksum_findings(entry, Path(root)),
        *_count_findings(entry, parts),
        *_some("remark", remarks.messages, "training goes without them"),
        *_file_findings(parts, facts),
        *_box_findings(parts, facts),
        *_duplicate_findings(parts, facts),
        *_class_findings(parts),
        *_conversion_notes(facts),
    ]
    if any(not finding.note for finding in report.findings):
        report.status = "findings"
    return report


class _Remarks(logging.Handler):
    """Collects what `load` would warn about, so that it stands in the report and nowhere else.

    Counts are left out: the report has them anyway.
    """

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []
        self.logger = logging.getLogger("dataset")

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a message that is new."""
        message = record.getMessage()
        if record.name != "dataset.counts" and message not in self.messages:
            self.messages.append(message)

    def __enter__(self) -> _Remarks:
        self.propagate, self.logger.propagate = self.logger.propagate, False
        self.logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        self.logger.propagate = self.propagate


def _load_parts(entry: DataSet, root: Path, options: dict[str, Any]) -> dict[str, ImageSet]:
    parts = {}
    for arguments in entry.variants():
        parts[entry.title(**arguments)] = entry.load(root, **arguments, **options)
    return parts


def _examine_all(parts: dict[str, ImageSet], name: str) -> dict[str, FileFacts]:
    """Facts of every image, by path; a file that several splits list is read once."""
    jobs: dict[str, Callable[[], FileFacts]] = {}
    for part in parts.values():
        for index, path in enumerate(part.paths):
            if part.pixels is None:
                jobs.setdefault(path, lambda path=path: examine(path))
            else:
                jobs.setdefault(path, lambda pixels=part.pixels[index]: examine_pixels(pixels))
    # Pillow and hashlib release the interpreter, so threads keep all cores busy.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(lambda job: job(), jobs.values())
        bar = tqdm(
            results, name, len(jobs), unit=" images", disable=not sys.stderr.isatty(), leave=False
        )
        return dict(zip(jobs, bar, strict=True))


def _checksum_findings(entry: DataSet, root: Path) -> Iterable[Finding]:
    changed = [str(path) for path in entry.changed_files(root)]
    yield from _some(
        "file with another checksum than the published one",
        changed,
        "results on it cannot be compared; get it again",
    )


def _count_findings(entry: DataSet, parts: dict[str, ImageSet]) -> Iterable[Finding]:
    for title, part in parts.items():
        differences = entry.count_differences(title, len(part), part.num_classes)
        if differences:
            meaning = f"{title} has {differences}; results on it cannot be compared with papers'"
            yield Finding("other counts than published", 1, meaning)


def _file_findings(parts: dict[str, ImageSet], facts: dict[str, FileFacts]) -> Iterable[Finding]:
    bad = {path: fact.error for path, fact in facts.items() if fact.error}
    missing = [path for path in bad if not Path(path).exists()]
    yield from _some(
        "missing file",
        [_short(path) for path in missing],
        "listed, but not there; unpack the archive again",
    )
    yield from _some(
        "unreadable or truncated file",
        [f"{_short(path)}: {error}" for path, error in bad.items() if path not in set(missing)],
        "training replaces it by another image of its class; get it again",
    )


def _box_findings(parts: dict[str, ImageSet], facts: dict[str, FileFacts]) -> Iterable[Finding]:
    outside, beyond = [], []
    for part in parts.values():
        boxes = () if part.boxes is None else part.boxes
        for path, (x1, y1, x2, y2) in zip(part.paths, boxes, strict=False):
            width, height = facts[path].size
            if facts[path].error or x1 < 0:
                continue
            if x1 >= width or y1 >= height:
                outside.append(_short(path))
            elif x2 > width or y2 > height:
                beyond.append(_short(path))
    yield from _some("box outside its image", outside, "there is nothing to cut out; mend the list")
    yield from _some("box beyond its image's edge", beyond, "it is cut at the edge", note=True)


def _duplicate_findings(
    parts: dict[str, ImageSet], facts: dict[str, FileFacts]
) -> Iterable[Finding]:
    copies: dict[tuple[bytes, bytes], dict[str, tuple[bool, str]]] = defaultdict(dict)
    for title, part in parts.items():
        for index, path in enumerate(part.paths):
            if not facts[path].error:
                box = b"" if part.boxes is None else part.boxes[index].tobytes()
                class_name = part.class_names[part.labels[index]]
                copies[facts[path].digest, box][path] = (title == _TRAIN, class_name)
    groups = [group for group in copies.values() if len(group) > 1]
    across = [group for group in groups if len({train for train, _ in group.values()}) == 2]
    labels = [group for group in groups if len(set(group.values())) > 1 and group not in across]
    same = [group for group in groups if len(set(group.values())) == 1]
    yield from _some(
        "exact duplicate across train and test",
        [_pair(group) for group in across],
        "the test images were trained on; remove one of each",
    )
    yield from _some(
        "exact duplicate in different classes",
        [_pair(group) for group in labels],
        "one of the labels is wrong",
    )
    yield from _some(
        "exact duplicate within a class",
        [_pair(group) for group in same],
        "retrieving the copy of a query is easy; kept, as the papers do",
        note=True,
    )


def _pair(group: dict[str, Any]) -> str:
    return " = ".join(_short(path) for path in list(group)[:2])


def _class_findings(parts: dict[str, ImageSet]) -> Iterable[Finding]:
    query, gallery = parts.get("query"), parts.get("gallery")
    for title, part in parts.items():
        if title in ("query", "gallery"):
            continue
        counts = np.bincount(part.labels, minlength=part.num_classes)
        lonely = [part.class_names[label] for label in np.flatnonzero(counts == 1)]
        train = title == _TRAIN
        meaning = (
            "no pair of it can be formed, only losses with proxies learn from it"
            if train
            else "its query has no right answer: a miss in R@K, left out of RP and MAP@R"
        )
        yield from _some(f"class with one image in {title}", lonely, meaning, note=train)
    if query is not None and gallery is not None:
        absent = np.setdiff1d(query.labels, gallery.labels)
        yield from _some(
            "class of a query without any gallery image",
            [query.class_names[label] for label in absent],
            "its queries have no right answer",
        )
    trained = set(parts[_TRAIN].class_names)
    tested = {name for title, part in parts.items() if title != _TRAIN for name in part.class_names}
    yield from _some(
        "class in train and in test",
        sorted(trained & tested),
        "the result would not be one on unseen classes",
    )


def _conversion_notes(facts: dict[str, FileFacts]) -> Iterable[Finding]:
    for trait, conversion in _CONVERSIONS.items():
        paths = [_short(path) for path, fact in facts.items() if trait in fact.traits]
        yield from _some(f"{trait} file", paths, conversion, note=True)


def _some(kind: str, items: Sequence[str], meaning: str, note: bool = False) -> Iterable[Finding]:
    if items:
        yield Finding(kind, len(items), meaning, list(items[:_EXAMPLES]), note)


def _short(path: str) -> str:
    """The end of a path: enough to recognise the file in a table."""
    return "/".join(Path(path).parts[-2:])


# --- how it is shown ------------------------------------------------------------------------------


def as_text(report: Report) -> str:
    """The report for people: what is wrong in one paragraph, or a table and the findings."""
    return _help(report) if report.problem else _table(report)


def _help(report: Report) -> str:
    text = f"{report.dataset}: {report.problem}"
    if report.origin:
        text += f"\n\n{textwrap.indent(textwrap.fill(report.origin, 96), '  ')}"
    return f"{text}\n\n  Expected arrangement of files:\n{textwrap.indent(report.tree, '    ')}"


def _table(report: Report) -> str:
    rows = [("split", "images", "published", "classes", "published")]
    rows += [
        (
            row.split,
            _number(row.images),
            _number(row.published_images),
            _number(row.classes),
            _number(row.published_classes),
        )
        for row in report.splits
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [f"{report.dataset}: {report.found}"]
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(rest, widths[1:], strict=True)]
        lines.append("  " + "   ".join(cells))
    for finding in sorted(report.findings, key=lambda finding: finding.note):
        lines.append(f"  {'note' if finding.note else 'FINDING'}  {finding.sentence()}")
    kinds = Counter(finding.note for finding in report.findings)
    lines.append(f"  {report.status}: {kinds[False]} finding(s), {kinds[True]} note(s)")
    return "\n".join(lines)


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def run(names: Sequence[str] | None, root: str | Path, as_json: bool, **options: Any) -> int:
    """Checks `names`, or with None every data set, prints, and returns the exit status.

    With None, data sets that are not there are listed and do not count, unless nothing is there.
    """
    reports = [check(name, root, **options) for name in names or dataset.NAMES]
    there = [report for report in reports if report.status != "absent"]
    counted = reports if names else there
    status = max((report.exit_status for report in counted), default=UNUSABLE)
    if as_json:
        content = {"exit_status": status, "datasets": [asdict(report) for report in reports]}
        print(json.dumps(content, indent=2, ensure_ascii=False))
        return status
    print("\n\n".join(as_text(report) for report in counted))
    absent = [report.dataset for report in reports if report not in counted]
    if absent:
        print(f"\nnot under {root}: {', '.join(absent)}; `python -m dataset check NAME` tells more")
    return status
