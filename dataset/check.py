"""The doctor of data sets: what is there, how it compares with what is published, what is wrong.

Every file is read whole and decoded once. A *finding* makes results wrong or not comparable and
sets the exit status; a *note* says what happens to an unusual file (how it is converted).
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

import dataset
from dataset.alike import near_duplicates, thumbnail
from dataset.base import ROOT, DataSet, ImageSet, root_words
from dataset.decoding import (
    LONGEST,
    UnfitImageError,
    few_bits,
    has_transparency,
    need_file,
    opened,
    orientation,
    reason,
    to_rgb,
)
from dataset.download import SOURCES
from dataset.files import join_words, said_anew
from dataset.inventory import BAD_IMAGES, admitted_bad_images, share_admitting
from dataset.layouts import NotFoundError, counts_logger
from dataset.own import OwnData, classes_logger, notes_logger
from dataset.readable import too_few_left
from dataset.wording import width, wrapped
from machine import cores
from storage import write_atomically
from terminal import as_shell, plain, printable, told
from utils import InputError, counted

CLEAN, FINDINGS, UNUSABLE = 0, 1, 2
_EXAMPLES = 3
_REMARKS = 20
_TRAIN = "train"
_READING = "reading"
_GREY_MODES = ("1", "L", "LA", "La")
_TURNED = range(2, 9)  # EXIF orientation 1 is upright
_BITS_PER_SAMPLE = 258  # a TIFF tag
_MOST_COMPARED = 250_000  # images whose thumbnails are kept: 3 kB each
_FEWEST_PIXELS = 4  # of a side, for something to be seen


# --- one file -------------------------------------------------------------------------------------


class FileFacts(NamedTuple):
    """What one image file is: a hash of its bytes, its size, what is unusual, why it fails.

    `fault` is a key of `_FAULTS`, and empty for a picture that can be used. `name` is what the
    report calls it: its path below the data set's folder, or as a table has it.
    """

    digest: bytes = b""
    size: tuple[int, int] = (0, 0)
    traits: tuple[str, ...] = ()
    fault: str = ""
    error: str = ""
    thumbnail: np.ndarray | None = None
    name: str = ""


_MISSING, _CLOSED, _NO_FILE = "missing file", "file that may not be read", "no plain file"
_UNFIT, _DAMAGED = "picture that cannot be used as it is", "unreadable or truncated file"

# What is wrong with a file → what it means.
_FAULTS = {
    _MISSING: "listed, but not there; put it back, or unpack the archive again",
    _CLOSED: "change its permissions",
    _NO_FILE: "nothing is read from it; remove it",
    _UNFIT: "the file is sound; convert it, or install what reads it",
    _DAMAGED: "get it again",
}

_ROTATION = "EXIF rotation"
_AS_STORED = "taken as stored, as the released programs do (--exif ignore)"

# What is unusual about a file → what happens to it (see decoding.decode).
_CONVERSIONS = {
    "grey": "repeated over the three channels",
    "CMYK": "converted to RGB",
    "16-bit": "reduced to 8 bits, the high byte",
    "32-bit": "reduced to 8 bits, as if it had 16",
    "8 or 12 bits in a deeper": "scaled by the bits that its values need, else it would be black",
    "palette": "colours looked up",
    "other colour space": "converted to RGB",
    "transparent": "laid on white",
    _ROTATION: "turned upright, which the released programs do not do (--exif ignore)",
    "damaged metadata": "its pixels are used as they are, without the metadata",
    "animated": "the first frame is used",
}


def examine(path: str, upright: bool = True) -> FileFacts:
    """Reads and decodes one file, turned as its EXIF data say unless `upright` is False."""
    try:
        need_file(path)
        content = Path(path).read_bytes()
    except (OSError, ValueError) as error:
        return FileFacts(fault=_fault(error), error=reason(error))
    digest = hashlib.blake2b(content, digest_size=16).digest()
    if not content:
        return FileFacts(digest, fault=_DAMAGED, error="the file is empty")
    try:
        with opened(io.BytesIO(content), path) as (image, left_out):
            traits = tuple(_traits(image, content, left_out))
            pixels = to_rgb(image, upright)
    except UnfitImageError as error:
        return FileFacts(digest, fault=_UNFIT, error=reason(error))
    except Exception as error:  # Pillow reports damage through a dozen unrelated types
        return FileFacts(digest, fault=_DAMAGED, error=reason(error))
    height, width, _ = pixels.shape
    return FileFacts(digest, (width, height), traits, thumbnail=thumbnail(pixels))


def _fault(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return _CLOSED
    number = getattr(error, "errno", None)
    if isinstance(error, ValueError) or number in (
        *(errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP),
    ):
        return _MISSING
    return _NO_FILE if number is None else _DAMAGED


def _traits(image: Image.Image, content: bytes, left_out: bool) -> Iterable[str]:
    if image.mode in _GREY_MODES or image.mode.startswith("I"):
        yield "grey"
    elif image.mode in ("P", "PA"):
        yield "palette"
    elif image.mode == "CMYK":
        yield "CMYK"
    elif image.mode not in ("RGB", "RGBA", "RGBa", "RGBX"):
        yield "other colour space"
    if image.mode.startswith("I") and few_bits(image.getextrema()[1]):
        yield "8 or 12 bits in a deeper"
    elif (bits := _bits(image, content)) > 8:
        yield "32-bit" if bits > 16 else "16-bit"
    if has_transparency(image):
        yield "transparent"
    turn, readable = orientation(image)
    if turn in _TURNED:
        yield _ROTATION
    if left_out or not readable:
        yield "damaged metadata"
    if getattr(image, "is_animated", False):
        yield "animated"


def _bits(image: Image.Image, content: bytes) -> int:
    """Bits of a sample in the file; Pillow reduces 16-bit colour without saying so."""
    if image.format == "PNG":
        return content[24]  # the bit depth in the header that every PNG begins with
    tags = getattr(image, "tag_v2", {})
    bits = max(np.atleast_1d(tags.get(_BITS_PER_SAMPLE, 8)).tolist())
    return max(bits, 16) if image.mode.startswith("I") else bits


def examine_pixels(pixels: np.ndarray) -> FileFacts:
    """As `examine`, of an image that lives in memory."""
    digest = hashlib.blake2b(np.ascontiguousarray(pixels), digest_size=16).digest()
    height, width, _ = pixels.shape
    return FileFacts(digest, (width, height), thumbnail=thumbnail(pixels))


# --- a data set -----------------------------------------------------------------------------------


@dataclass
class Finding:
    """One kind of thing that was found: how often, where, and what it means.

    `examples` are all of them; the table shows a few.
    """

    kind: str
    count: int
    meaning: str
    examples: list[str] = field(default_factory=list)
    note: bool = False

    def sentence(self) -> str:
        """For the table."""
        if self.kind == _READING:
            return self.meaning
        shown = self.examples[: _REMARKS if self.kind == "remark" else _EXAMPLES]
        more = ", ..." if self.count > len(shown) else ""
        text = f"{self.count:,} x {self.kind}: {self.meaning}"
        return f"{text} ({', '.join(shown)}{more})" if shown else text


@dataclass
class SplitCount:
    """A row of the table; `outcome` says what becomes of images that cannot be read."""

    split: str
    images: int
    classes: int
    published_images: int | None
    published_classes: int | None
    unreadable: int = 0
    outcome: str = ""


@dataclass
class Report:
    """All that `check` has to say about one data set.

    `status`: "clean", "findings", "unusable" (damaged, or in no known layout) or "absent".
    `commands`: what can be done next, in words, and the command that does it.
    """

    dataset: str
    status: str = "clean"
    found: str = ""
    problem: str = ""
    origin: str = ""
    tree: str = ""
    splits: list[SplitCount] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    commands: dict[str, str] = field(default_factory=dict)

    @property
    def exit_status(self) -> int:
        """0 clean, 1 findings, 2 not usable."""
        return {"clean": CLEAN, "findings": FINDINGS}.get(self.status, UNUSABLE)


def check(name: str, root: str | Path = ROOT, *, exif: str = "apply", **options: Any) -> Report:
    """Examines a data set.

    Args:
        exif: as `--exif` of train.py. options: go to `dataset.load`.

    Raises:
        InputError: there is no data set of this name.
    """
    entry = dataset.find(name)
    report = Report(name)
    remarks = _Remarks()
    try:
        with remarks, told(f"looking for the images of {name}"):
            parts = _load_parts(entry, name, root, exif == "apply", options)
    except NotFoundError as error:
        report.status, report.problem = "absent", f"not found: {error.detail}"
        report.origin, report.tree = entry.origin, entry.tree
        report.commands = _commands_to_get(name, root)
        return report
    except InputError as error:
        report.status, report.problem = "unusable", str(error)
        report.tree = entry.tree
        return report
    source = next(iter(parts.values())).source
    report.found = "" if source == name else source
    facts = _examine_all(parts, name)
    unreadable = {title: _unreadable(part, facts) for title, part in parts.items()}
    hopeless = _hopeless(parts, unreadable)
    report.splits = [
        _split_count(
            title,
            part,
            unreadable[title],
            hopeless.get(part.split, ""),
            entry.published.get(title, (None, None)),
        )
        for title, part in parts.items()
    ]
    report.findings = [
        *_checksum_findings(entry, Path(root)),
        *_concern_findings(parts),
        *_size_findings(entry, parts, facts),
        *_count_findings(entry, parts),
        *_some("remark", remarks.messages, "training goes without them"),
        *_file_findings(facts),
        *_shape_findings(parts, facts),
        *_duplicate_findings(parts, facts),
        *_near_duplicate_notes(parts, facts),
        *_class_findings(parts),
        *_conversion_notes(facts, exif == "apply"),
        *(Finding(_READING, 1, text, note=True) for text in remarks.notes),
    ]
    if any(not finding.note for finding in report.findings):
        report.status = "findings"
    if not hopeless:
        report.commands = _commands_to_go_on(entry, name, root, report.splits, exif, options)
    return report


def _commands_to_get(name: str, root: str | Path) -> dict[str, str]:
    """How to fetch a data set that is not there, where it can be fetched."""
    if dataset.find(name).name not in SOURCES:
        return {}
    words = [name, *root_words(root)]
    return {"get it": f"python -m dataset download {as_shell(*words)}"}


def _commands_to_go_on(
    entry: DataSet,
    name: str,
    root: str | Path,
    splits: Sequence[SplitCount],
    exif: str,
    options: Mapping[str, Any],
) -> dict[str, str]:
    """How to train on a data set as it is."""
    if _TRAIN not in [row.split for row in splits]:
        return {}
    words = ["--dataset", name, *root_words(root)]
    if isinstance(entry, OwnData) and entry.share_held_out() is not None:
        for option, flag in (("eval_classes", "--eval-classes"), ("seed", "--split-seed")):
            words += [flag, str(options[option])] if option in options else []
    words += [] if exif == "apply" else ["--exif", exif]
    shares = [share_admitting(row.unreadable, row.images) for row in splits if _refused(row)]
    words += ["--max-bad-images", f"{max(shares):g}"] if shares else []
    return {"train on it": f"python train.py {as_shell(*words)}"}


def _refused(row: SplitCount) -> bool:
    """Whether a run does not start for the images of a split that cannot be read."""
    return row.unreadable > admitted_bad_images(BAD_IMAGES, row.images)


def _unreadable(part: ImageSet, facts: dict[str, FileFacts]) -> np.ndarray:
    """(N,) bool: which images a run cannot read: their file fails, or their box lies beside it."""
    bad = np.array([facts[path].fault != "" for path in part.paths], bool)
    if part.boxes is not None:
        for index in np.flatnonzero(~bad & (part.boxes[:, 0] >= 0)).tolist():
            bad[index] = _OUTSIDE in _odd_shapes(facts[part.paths[index]].size, part.boxes[index])
    return bad


def _hopeless(
    parts: Mapping[str, ImageSet], unreadable: Mapping[str, np.ndarray]
) -> dict[str, str]:
    """Split → why no run starts, in words, however many unreadable images it admits."""
    found = {}
    for title, part in parts.items():
        bad = unreadable[title]
        left = np.bincount(part.labels[~bad], minlength=part.num_classes)
        emptied = [name for name, count in zip(part.class_names, left, strict=True) if not count]
        if part.split == _TRAIN and bad.any() and emptied:
            found[_TRAIN] = (
                f"of {join_words(emptied[:_EXAMPLES], 'and')} no image is left, so train.py stops "
                "before training: repair or remove what is in that class"
            )
    tested = {title: part for title, part in parts.items() if part.split != _TRAIN}
    left = [part.subset(~unreadable[title]) for title, part in tested.items()]
    if any(unreadable[title].any() for title in tested) and too_few_left(left):
        why = (
            "the classes that are left are too few to be told apart, so train.py stops before "
            "training: repair the images"
        )
        found |= {part.split: why for part in tested.values()}
    return found


def _split_count(
    title: str,
    part: ImageSet,
    bad: np.ndarray,
    hopeless: str,
    published: tuple[int | None, int | None],
) -> SplitCount:
    row = SplitCount(title, len(part), part.num_classes, *published, int(bad.sum()))
    if not row.unreadable:
        return row
    text = f"{row.unreadable:,} of the {row.images:,} images cannot be read"
    if _refused(row):
        admitted = admitted_bad_images(BAD_IMAGES, row.images)
        share = share_admitting(row.unreadable, row.images)
        text += (
            f", and --max-bad-images {BAD_IMAGES:g} admits {admitted}: train.py stops before "
            "training; repair or remove them"
        )
        text += "" if hopeless else f", or do without them (--max-bad-images {share:g})"
    elif hopeless:
        pass
    elif title != _TRAIN:
        text += ": left out of the metrics, and named"
    else:
        text += ": training puts other images of their classes in their place, and names them"
    row.outcome = "; ".join(filter(None, (text, hopeless)))
    return row


class _Remarks(logging.Handler):
    """Collects what `load` would log, so that it stands in the report and nowhere else.

    Attributes:
        messages: what training goes without. notes: how the data were understood. What the report
            finds by itself, such as counts, is in neither.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []
        self.notes: list[str] = []
        self.logger = logging.getLogger("dataset")
        self._anew = said_anew()

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a message that is new."""
        if record.name in (counts_logger.name, classes_logger.name):
            return
        kept = self.notes if record.name == notes_logger.name else self.messages
        message = record.getMessage()
        if message not in kept:
            kept.append(message)

    def __enter__(self) -> _Remarks:
        self._anew.__enter__()
        self.propagate, self.logger.propagate = self.logger.propagate, False
        self.level_of_notes = notes_logger.level
        notes_logger.setLevel(logging.INFO)
        self.logger.addHandler(self)
        return self

    def __exit__(self, *_: object) -> None:
        self.logger.removeHandler(self)
        notes_logger.setLevel(self.level_of_notes)
        self.logger.propagate = self.propagate
        self._anew.__exit__(None, None, None)


def _load_parts(
    entry: DataSet, name: str, root: str | Path, upright: bool, options: dict[str, Any]
) -> dict[str, ImageSet]:
    parts = {
        entry.title(**arguments): dataset.load(name, root, **arguments, **options)
        for arguments in entry.variants()
    }
    return {title: replace(part, upright=upright) for title, part in parts.items()}


def _examine_all(parts: dict[str, ImageSet], name: str) -> dict[str, FileFacts]:
    """Facts of every image, by path; a file that several splits list is read once."""
    jobs: dict[str, Callable[[], FileFacts]] = {}
    names: dict[str, str] = {}
    for part in parts.values():
        names.update(zip(part.paths, part.paths.names(), strict=True))
        for index, path in enumerate(part.paths):
            if part.pixels is None:
                jobs.setdefault(path, partial(examine, path, part.upright))
            else:
                jobs.setdefault(path, lambda pixels=part.pixels[index]: examine_pixels(pixels))
    # Pillow and hashlib release the interpreter, so threads keep all cores busy.
    with ThreadPoolExecutor(cores()) as pool:
        results = pool.map(lambda job: job(), jobs.values())
        with _bar(name, len(jobs)) as bar:
            found = {}
            for path, fact in zip(jobs, results, strict=True):
                found[path] = fact._replace(name=names[path])
                bar.update()
    return found


def _bar(title: str, count: int) -> tqdm:
    """A bar for so many images; nothing off a terminal."""
    return tqdm(total=count, desc=printable(title), unit=" images", disable=None, leave=False)


def _checksum_findings(entry: DataSet, root: Path) -> Iterable[Finding]:
    changed = [str(path) for path in entry.changed_files(root)]
    yield from _some(
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
    yield from _some(
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
    for fault, meaning in _FAULTS.items():
        found = [fact for fact in facts.values() if fact.fault == fault]
        said = [fact.name if fault == _MISSING else f"{fact.name}: {fact.error}" for fact in found]
        yield from _some(fault, said, meaning)


_OUTSIDE, _BEYOND = "box outside its image", "box beyond its image's edge"
_SMALL = f"picture or box with fewer than {_FEWEST_PIXELS} pixels to a side"
_EXTREME = f"shape more than {LONGEST} times as long as wide"


def _shape_findings(parts: dict[str, ImageSet], facts: dict[str, FileFacts]) -> Iterable[Finding]:
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for part in parts.values():
        boxes = [(-1,) * 4] * len(part) if part.boxes is None else part.boxes.tolist()
        for path, box in zip(part.paths, boxes, strict=True):
            if not facts[path].fault:
                for kind in _odd_shapes(facts[path].size, box):
                    found[kind][facts[path].name] = None
    for kind, meaning in (
        (_OUTSIDE, "there is nothing to cut out; mend the list"),
        (_SMALL, "hardly anything is in it; of a box, are its numbers pixels?"),
        (_EXTREME, "only the centre is looked at"),
        (_BEYOND, "it is cut at the edge"),
    ):
        yield from _some(kind, list(found[kind]), meaning, note=kind == _BEYOND)


def _odd_shapes(size: tuple[int, int], box: Sequence[int]) -> Iterator[str]:
    width, height = size
    x1, y1, x2, y2 = box
    if x1 >= width or y1 >= height:
        yield _OUTSIDE
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
    groups = _groups_of_copies(parts, facts)
    across, both, twice, labels, same = ([] for _ in range(5))
    for copies, times in groups:
        trained = [copy for copy in copies if copy.side == _TRAIN]
        tested = [copy for copy in copies if copy.side != _TRAIN]
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
    yield from _some(
        "exact duplicate across train and test",
        across,
        "the test images were trained on; remove one of each",
    )
    yield from _some(
        "image that is a query and in the gallery",
        both,
        "it is its own nearest image, and right; list it once",
    )
    yield from _some("image listed more than once", twice, "it is its own copy; list it once")
    yield from _some("exact duplicate in different classes", labels, "one of the labels is wrong")
    yield from _some(
        "exact duplicate within a class",
        same,
        "retrieving the copy of a query is easy; kept, as the papers do",
        note=True,
    )


def _groups_of_copies(
    parts: dict[str, ImageSet], facts: dict[str, FileFacts]
) -> Iterator[tuple[list[_Copy], int]]:
    """The listings of each image that is listed more than once, and how often in one and the same
    way in one list.

    An image is what a file holds, or what a box cuts out of it. Lists of which a run uses one, such
    as VehicleID's, count as one.
    """
    listed: dict[tuple[bytes, bytes], dict[_Copy, Counter[str]]] = defaultdict(
        lambda: defaultdict(Counter)
    )
    for title, part in parts.items():
        for index, path in enumerate(part.paths):
            digest = facts[path].digest
            if facts[path].fault:  # two damaged files are no copies, one listed twice is
                digest = path.encode("utf-8", "surrogateescape")
            box = b"" if part.boxes is None else part.boxes[index].tobytes()
            copy = _Copy(title.split()[0], facts[path].name, part.class_names[part.labels[index]])
            listed[digest, box][copy][title] += 1
    for copies in listed.values():
        times = max(max(counts.values()) for counts in copies.values())
        if len(copies) > 1 or times > 1:
            yield list(copies), times


def _pairs(copies: Iterable[_Copy], how: str = "in", field: str = "side") -> Iterator[str]:
    """The first of some copies with each of the others.

    Args:
        how, field: say where both are listed, if they are one file: "x.jpg in train and eval".
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
    """Pictures of the evaluation that are in the training once more, changed a little.

    Boxes are left alone: what they cut out of a photograph is not looked at here.
    """
    if any(part.boxes is not None for part in parts.values()):
        return
    trained, tested = (
        {
            facts[path].digest: path
            for title, part in parts.items()
            if (title == _TRAIN) == side
            for path in part.paths
            if facts[path].thumbnail is not None
        }
        for side in (True, False)
    )
    sides = [[d for d in a if d not in b] for a, b in ((tested, trained), (trained, tested))]
    if sum(map(len, sides)) > _MOST_COMPARED:
        words = f"near duplicates are looked for among {_MOST_COMPARED:,} images at most"
        yield Finding(_READING, 1, f"{words}, and there are more", note=True)
        return
    if not all(sides):
        return
    names = [
        [one[digest] for digest in side] for one, side in zip((tested, trained), sides, strict=True)
    ]
    first, second = (np.stack([facts[path].thumbnail for path in side]) for side in names)
    with _bar("near duplicates", len(first)) as bar:
        pairs = near_duplicates(first, second, lambda done: bar.update(done - bar.n))
    yield from _some(
        "near duplicate across train and test",
        [f"{facts[names[0][a]].name} ~ {facts[names[1][b]].name}" for a, b, _ in pairs],
        "the same picture in another size, cut or brightness, or one much like it; look at them, "
        "the most alike first, and remove one of each that is the same",
        note=True,
    )


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
    trained = set(parts[_TRAIN].class_names) if _TRAIN in parts else set()
    tested = {name for title, part in parts.items() if title != _TRAIN for name in part.class_names}
    if _TRAIN not in parts:
        yield Finding(_READING, 1, "there are no training images, only some to evaluate", note=True)
    yield from _some(
        "class in train and in test",
        sorted(trained & tested),
        "the result would not be one on unseen classes",
    )


def _conversion_notes(facts: dict[str, FileFacts], upright: bool) -> Iterable[Finding]:
    as_stored = {} if upright else {_ROTATION: _AS_STORED}
    for trait, conversion in (_CONVERSIONS | as_stored).items():
        names = [fact.name for fact in facts.values() if trait in fact.traits]
        yield from _some(f"{trait} file", names, conversion, note=True)


def _some(kind: str, items: Sequence[str], meaning: str, note: bool = False) -> Iterable[Finding]:
    if items:
        yield Finding(kind, len(items), meaning, list(items), note)


# --- how it is shown ------------------------------------------------------------------------------


def as_text(report: Report) -> str:
    """The report for people: what is wrong in one paragraph, or a table and the findings."""
    return _help(report) if report.problem else _table(report)


def _help(report: Report) -> str:
    named = report.problem.startswith(report.dataset)
    problem = report.problem if named else f"{report.dataset}: {report.problem}"
    lines = [wrapped(plain(problem), "", "  ")]
    if report.origin:
        lines += ["", wrapped(plain(report.origin), "  ", "  ")]
    lines += ["", "  Expected arrangement of files:"]
    lines += [f"    {line}" for line in plain(report.tree).splitlines()]
    return "\n".join([*lines, *_commands(report)])


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
    lines = [wrapped(": ".join(filter(None, (report.dataset, plain(report.found)))), "", "  ")]
    lines += _counts(rows)
    for row in report.splits:
        if row.outcome:
            lines.append(wrapped(row.outcome, f"  {row.split:<7}  ", " " * 11))
    for finding in sorted(report.findings, key=lambda finding: finding.note):
        kind = "note     " if finding.note else "FINDING  "
        lines.append(wrapped(finding.sentence(), f"  {kind}", " " * 11))
    kinds = Counter(finding.note for finding in report.findings)
    found, noted = counted(kinds[False], "finding"), counted(kinds[True], "note")
    lines.append(f"  {report.status}: {found}, {noted}")
    return "\n".join([*lines, *_commands(report)])


def _counts(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """The splits as a table; one below the other where the terminal is too narrow for it."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    if sum(widths) + 3 * len(widths) - 1 > width():
        return [wrapped(_count(*row), f"  {split:<7}  ", " " * 11) for split, *row in rows[1:]]
    lines = []
    for first, *rest in rows:
        cells = [first.ljust(widths[0])]
        cells += [cell.rjust(most) for cell, most in zip(rest, widths[1:], strict=True)]
        lines.append("  " + "   ".join(cells))
    return lines


def _count(images: str, published_images: str, classes: str, published_classes: str) -> str:
    text = f"{images} images, {classes} classes"
    if published_images == published_classes == "-":
        return text
    return f"{text} (published: {published_images} and {published_classes})"


def _commands(report: Report) -> list[str]:
    """Each on a line of its own, however long, so that it can be pasted."""
    lines = []
    for words, command in report.commands.items():
        lines += ["", f"  {words}:", f"  {command}"]
    return lines


def _number(value: int | None) -> str:
    return "-" if value is None else f"{value:,}"


def run(
    names: Sequence[str] | None,
    root: str | Path,
    as_json: bool,
    file: Path | None = None,
    **options: Any,
) -> int:
    """Checks `names`, or with None every data set, prints, and returns the exit status.

    With None, data sets that are not there are listed and do not count, unless nothing is there.

    Args:
        as_json: prints JSON, which names every file, instead of the table. file: where that goes,
            beside the table.

    Raises:
        InputError: `file` cannot be written.
    """
    reports = [check(name, root, **options) for name in names or dataset.NAMES]
    there = [report for report in reports if report.status != "absent"]
    looked_at = reports if names else there
    status = max((report.exit_status for report in looked_at), default=UNUSABLE)
    content = {"exit_status": status, "datasets": [asdict(report) for report in reports]}
    # In ASCII, since a name on disk need be no text in any encoding.
    as_text_ = json.dumps(content, indent=2)
    if file is not None:
        write_atomically(file, lambda stream: stream.write(f"{as_text_}\n".encode()))
    if as_json:
        print(as_text_)
        return status
    print("\n\n".join(as_text(report) for report in looked_at))
    absent = [report.dataset for report in reports if report not in looked_at]
    if absent:
        more = f"not under {root}: {', '.join(absent)}; `python -m dataset check NAME` tells more"
        print(f"\n{wrapped(more)}")
    return status
