"""Examines data sets: what is there, how it compares with the published data, and what is wrong.

Every file is read whole and decoded once (`facts`); `findings` lists what is wrong, and `showing`
prints it. Findings set the exit status, notes do not.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

import dataset
from dataset.base import ROOT, DataSet, ImageSet, root_words
from dataset.download import SOURCES
from dataset.facts import FileFacts, examine_all
from dataset.files import said_anew
from dataset.findings import (
    OUTSIDE,
    READING,
    REMARK,
    TRAIN,
    Finding,
    beside_published,
    in_the_images,
    odd_shapes,
    some,
)
from dataset.inventory import BAD_IMAGES, admitted_bad_images, share_admitting
from dataset.layouts import NotFoundError, counts_logger
from dataset.own import OwnData, classes_logger, notes_logger
from dataset.readable import too_few_left
from terminal import as_shell, notice_if_slow
from utils import InputError, join_words, program

CLEAN, FINDINGS, UNUSABLE = 0, 1, 2
_EXAMPLES = 3


@dataclass
class SplitCount:
    """A row of the table; `outcome` says what a run does with images that cannot be read."""

    split: str
    images: int
    classes: int
    published_images: int | None
    published_classes: int | None
    unreadable: int = 0
    outcome: str = ""


@dataclass
class Report:
    """The result of `check` for one data set.

    `status`: "clean", "findings", "unusable" (damaged, or in no known layout) or "absent".
    `commands`: what can be done next, in words → the command that does it.
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
        exif: like `--exif` of train.py. options: passed to `dataset.load`.

    Raises:
        InputError: there is no data set of this name.
    """
    entry, upright = dataset.find(name), exif == "apply"
    report = Report(name)
    try:
        with _logged() as remarks, notice_if_slow(f"looking for the images of {name}"):
            parts = _load_parts(entry, name, root, upright, options)
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
    facts = examine_all(parts, name)
    report.splits, some_run_starts = _count_splits(entry, parts, facts)
    report.findings = [
        *beside_published(entry, Path(root), parts, facts),
        *some(REMARK, remarks.messages, "training goes without them"),
        *in_the_images(parts, facts, upright),
        *(Finding(READING, 1, text, note=True) for text in remarks.notes),
    ]
    if any(not finding.note for finding in report.findings):
        report.status = "findings"
    if some_run_starts:
        report.commands = _commands_to_go_on(entry, name, root, report.splits, exif, options)
    return report


def _commands_to_get(name: str, root: str | Path) -> dict[str, str]:
    """The command that downloads a data set that is not there, if it can be downloaded."""
    if dataset.find(name).name not in SOURCES:
        return {}
    words = [name, *root_words(root)]
    return {"get it": f"{program('dataset')} download {as_shell(*words)}"}


def _commands_to_go_on(
    entry: DataSet,
    name: str,
    root: str | Path,
    splits: Sequence[SplitCount],
    exif: str,
    options: Mapping[str, Any],
) -> dict[str, str]:
    """The command that trains on a data set as it is."""
    if TRAIN not in [row.split for row in splits]:
        return {}
    words = ["--dataset", name, *root_words(root)]
    if isinstance(entry, OwnData) and entry.share_held_out() is not None:
        for option, flag in (("eval_classes", "--eval-classes"), ("seed", "--split-seed")):
            words += [flag, str(options[option])] if option in options else []
    words += [] if exif == "apply" else ["--exif", exif]
    shares = [share_admitting(row.unreadable, row.images) for row in splits if _refused(row)]
    words += ["--max-bad-images", f"{max(shares):g}"] if shares else []
    return {"train on it": f"{program('train')} {as_shell(*words)}"}


def _refused(row: SplitCount) -> bool:
    """Whether a run refuses to start because of unreadable images of a split."""
    return row.unreadable > admitted_bad_images(BAD_IMAGES, row.images)


def _unreadable(part: ImageSet, facts: dict[str, FileFacts]) -> np.ndarray:
    """(N,) bool: images that a run cannot read: their file fails, or their box is outside it."""
    bad = np.array([facts[path].fault != "" for path in part.paths], bool)
    if part.boxes is not None:
        for index in np.flatnonzero(~bad & (part.boxes[:, 0] >= 0)).tolist():
            bad[index] = OUTSIDE in odd_shapes(facts[part.paths[index]].size, part.boxes[index])
    return bad


def _hopeless(
    parts: Mapping[str, ImageSet], unreadable: Mapping[str, np.ndarray]
) -> dict[str, str]:
    """Split → why no run can start, in words, whatever --max-bad-images is."""
    found = {}
    for title, part in parts.items():
        bad = unreadable[title]
        left = np.bincount(part.labels[~bad], minlength=part.num_classes)
        emptied = [name for name, count in zip(part.class_names, left, strict=True) if not count]
        if part.split == TRAIN and bad.any() and emptied:
            found[TRAIN] = (
                f"of {join_words(emptied[:_EXAMPLES], 'and')} no image is left, so a run stops "
                "before training: repair or remove the images of that class"
            )
    tested = {title: part for title, part in parts.items() if part.split != TRAIN}
    left = [part.subset(~unreadable[title]) for title, part in tested.items()]
    if any(unreadable[title].any() for title in tested) and too_few_left(left):
        why = (
            "the classes that are left are too few to be told apart, so a run stops before "
            "training: repair the images"
        )
        found |= {part.split: why for part in tested.values()}
    return found


def _count_splits(
    entry: DataSet, parts: Mapping[str, ImageSet], facts: dict[str, FileFacts]
) -> tuple[list[SplitCount], bool]:
    """The rows of the table, and whether a run can start at all."""
    unreadable = {title: _unreadable(part, facts) for title, part in parts.items()}
    hopeless = _hopeless(parts, unreadable)
    rows = []
    for title, part in parts.items():
        published = entry.published.get(title, (None, None))
        bad = int(unreadable[title].sum())
        row = SplitCount(title, len(part), part.num_classes, *published, bad)
        row.outcome = _outcome(row, hopeless.get(part.split, ""))
        rows.append(row)
    return rows, not hopeless


def _outcome(row: SplitCount, hopeless: str) -> str:
    """What a run does with unreadable images of a split; "" if there are none.

    Args:
        hopeless: why no run can start, in words; "" if it can.
    """
    if not row.unreadable:
        return ""
    text = f"{row.unreadable:,} of the {row.images:,} images cannot be read"
    if _refused(row):
        admitted = admitted_bad_images(BAD_IMAGES, row.images)
        share = share_admitting(row.unreadable, row.images)
        text += (
            f", and --max-bad-images {BAD_IMAGES:g} allows {admitted}: a run stops before "
            "training; repair or remove them"
        )
        text += "" if hopeless else f", or do without them (--max-bad-images {share:g})"
    elif hopeless:
        pass
    elif row.split != TRAIN:
        text += ": left out of the metrics, and named"
    else:
        text += ": training replaces them by other images of their classes, and names them"
    return "; ".join(filter(None, (text, hopeless)))


class _Remarks(logging.Handler):
    """Collects what `load` logs.

    Attributes:
        messages: what training leaves out. notes: how the data were understood. Neither has what
            the report finds by itself, such as counts.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.messages: list[str] = []
        self.notes: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keeps a message that is new."""
        if record.name in (counts_logger.name, classes_logger.name):
            return
        kept = self.notes if record.name == notes_logger.name else self.messages
        message = record.getMessage()
        if message not in kept:
            kept.append(message)


@contextlib.contextmanager
def _logged() -> Iterator[_Remarks]:
    """A context in which log messages of `load` are collected for the report, and not printed."""
    remarks, logger = _Remarks(), logging.getLogger("dataset")
    propagates, level_of_notes = logger.propagate, notes_logger.level
    with said_anew():
        logger.propagate = False
        notes_logger.setLevel(logging.INFO)
        logger.addHandler(remarks)
        try:
            yield remarks
        finally:
            logger.removeHandler(remarks)
            notes_logger.setLevel(level_of_notes)
            logger.propagate = propagates


def _load_parts(
    entry: DataSet, name: str, root: str | Path, upright: bool, options: dict[str, Any]
) -> dict[str, ImageSet]:
    parts = {
        entry.title(**arguments): dataset.load(name, root, **arguments, **options)
        for arguments in entry.variants()
    }
    return {title: replace(part, upright=upright) for title, part in parts.items()}
