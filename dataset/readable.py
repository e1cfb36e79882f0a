"""Finds unreadable images before a run starts, not after an epoch.

There are three checks, each slower than the one before. For a photograph of 640 x 480 on one core:

    is there a file?                         6 µs    every image, at every start
    does it look like a whole picture?      75 µs    every image, once (see glance.py)
    can it be decoded?                     4.3 ms    images that do not look whole; and every image
                                                     of an evaluation of up to `DECODED_AT_ONCE`,
                                                     once

Sound images are stored with the size and time of their files, so that a later start checks only
files that have changed. `--decode cache` decodes all images anyway, and its cache has the results.
Other damage (in the middle of a training image) is found when the image is read, see loader.py.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from bars import Bar
from dataset.base import ImageSet, why_unreadable
from dataset.files import announcements, warn_once
from dataset.glance import looks_whole
from dataset.inventory import admitted_bad_images, share_admitting
from dataset.kept import VERSION, default_folder, name_of, versions_of
from dataset.own import LEAST_CLASSES
from dataset.reading import FROM_FILES, Reading
from dataset.statuses import ASKED_AT_ONCE
from machine import cores
from storage import load_arrays, save_arrays
from utils import InputError, join_words

logger = logging.getLogger("dataset")

DECODED_AT_ONCE = 20_000  # images of an evaluation: 45 s on two cores
REMEMBERED = 500  # with fewer images, results are not worth storing
_LOOKED_AT, _DECODED = 1, 2  # which checks a sound image has passed
_AT_ONCE = 64  # images per task of a thread
_NAMED = 3

_SIDES = {"train": "training", "eval": "evaluation"}
REPLACED, LEFT_OUT = "other images of its class take its place", "it is left out"


def require_readable(
    train: ImageSet | None,
    evaluated: Iterable[ImageSet],
    max_bad_images: float = 0.0,
    reading: Reading = FROM_FILES,
) -> dict[str, int]:
    """Warn about every unreadable image that is found, and refuse too many.

    Args:
        train: the training images, or None. evaluated: queries, galleries, held-out classes.
        max_bad_images: the share of each of them that may be unreadable (`--max-bad-images`).
        reading: how the run reads files; with `decode="cache"` the cache is made here.

    Returns:
        Their numbers in "train" and in "eval".

    Raises:
        InputError: more images are unreadable, or all images of a training class are, or too few
            evaluation classes are left.
    """
    counts, left = {"train": 0, "eval": 0}, []
    for images in ([] if train is None else [train]) + list(evaluated):
        side = "train" if images is train else "eval"
        bad = unreadable(images, whole=side == "eval", reading=reading)
        counts[side] += len(bad)
        if len(bad) > admitted_bad_images(max_bad_images, len(images)):
            raise InputError(too_many(images, _SIDES[side], bad, max_bad_images))
        if side == "train":
            _need_others(images, bad)
        else:
            left.append(without(images, bad))
        for index, reason in bad.items():
            warn_once(in_words(images.paths[index], reason, side == "train"), logger)
    if counts["eval"] and (why := too_few_left(left)):
        raise InputError(why)
    return counts


def in_words(path: str, reason: str, replaced: bool) -> str:
    """The warning about one unreadable image, and what a run does with it."""
    return f"{path} cannot be read ({reason}); {REPLACED if replaced else LEFT_OUT}"


def too_many(images: ImageSet, side: str, bad: dict[int, str], share: float) -> str:
    """The error for too many unreadable images (index → reason), and what to do."""
    named = [f"{images.paths[index]} ({reason})" for index, reason in list(bad.items())[:_NAMED]]
    named += ["others"] if len(bad) > _NAMED else []
    which = join_words(named, "and")
    allowed = f"{admitted_bad_images(share, len(images)):,}" if share else "none"
    return (
        f"{len(bad):,} of the {len(images):,} {side} images of {images.given or images.name} "
        f"cannot be read, and --max-bad-images {share:g} allows {allowed}: {which}; "
        f"repair or remove them (`{images.check_command} --json FILE` lists all), or do without "
        f"them (--max-bad-images {share_admitting(len(bad), len(images)):g})"
    )


def without(images: ImageSet, bad: Iterable[int]) -> ImageSet:
    """The images without those at these indices."""
    indices = list(bad)
    return images.subset(np.delete(np.arange(len(images)), indices)) if indices else images


def too_few_left(left: Sequence[ImageSet]) -> str:
    """A sentence if too little of an evaluation can be read; "" if it is enough.

    With a single class, every answer is right. Queries count together with the gallery in which
    they search, all other image sets by themselves.
    """
    pair = [images for images in left if images.split in ("query", "gallery")]
    alone = [[images] for images in left if images not in pair]
    for group in [*alone, *([pair] if pair else [])]:
        name, fix = group[0].given or group[0].name, f"{group[0].check_command} --json FILE"
        for images in group:
            if not len(images):
                return (
                    f"no {images.split} image of {name} can be read; repair them (`{fix}` lists "
                    "all)"
                )
        classes = len(np.unique(np.concatenate([images.labels for images in group])))
        if classes < LEAST_CLASSES:
            return (
                f"of the evaluation of {name} the images of {classes} class can be read, and it "
                f"needs {LEAST_CLASSES} classes; repair the others (`{fix}` lists all)"
            )
    return ""


def _need_others(images: ImageSet, bad: dict[int, str]) -> None:
    """Raise InputError for an image that no other image of its class can replace."""
    left = np.bincount(images.labels, minlength=images.num_classes)
    left -= np.bincount(images.labels[list(bad)], minlength=images.num_classes)
    for index, reason in bad.items():
        if left[images.labels[index]] == 0:
            raise InputError(
                f"{images.paths[index]} cannot be read ({reason}) and no other image of its class "
                "can take its place; repair or remove it "
                f"(`{images.check_command} --json FILE` lists all)"
            )


# --- finding them ---------------------------------------------------------------------------------


def unreadable(images: ImageSet, *, whole: bool, reading: Reading = FROM_FILES) -> dict[int, str]:
    """Index → reason of the unreadable images that are found here.

    Args:
        whole: whether to decode all images, unless they are more than `DECODED_AT_ONCE`.
    """
    if images.pixels is not None:
        return {}
    if reading.decode == "cache":
        return _of_cache(images, reading)
    level = _DECODED if whole and len(images) <= DECODED_AT_ONCE else _LOOKED_AT
    with _memory(images) as known:
        unsure = np.flatnonzero(known < level)
        bad = _looked_at(images, unsure, level == _DECODED)
        known[np.setdiff1d(unsure, list(bad))] = level
    return bad


def _of_cache(images: ImageSet, reading: Reading) -> dict[int, str]:
    """The images that the cache could not decode; makes the cache first if necessary."""
    from dataset.cache import open_cache  # loads torch

    cache = open_cache(images, reading.cache_size, reading.cache_dir)
    found = (
        (index, why_unreadable(images, index)) for index in np.flatnonzero(cache.shapes[:, 0] == 0)
    )
    return {int(index): reason for index, reason in found if reason is not None}


def _looked_at(images: ImageSet, indices: np.ndarray, decoded: bool) -> dict[int, str]:
    """Check some images, and return the unreadable ones."""

    def look(part: np.ndarray) -> dict[int, str]:
        found = {}
        for index in part.tolist():
            if decoded or not looks_whole(images.paths[index]):
                reason = why_unreadable(images, index)
                if reason is not None:
                    found[index] = reason
        return found

    if decoded and len(indices) >= REMEMBERED:
        announcements.info("decoding %s evaluation images once, to check them", f"{len(indices):,}")
    parts = [indices[start : start + _AT_ONCE] for start in range(0, len(indices), _AT_ONCE)]
    bad: dict[int, str] = {}
    title = "checking the images" if decoded else "checking the files"
    bar = Bar(title, len(indices), delay=1)
    # Pillow releases the interpreter lock while it decodes, so threads keep all cores busy; the
    # check of a file mostly waits for the disk.
    with ThreadPoolExecutor(cores() if decoded else ASKED_AT_ONCE) as pool, bar:
        for part, found in zip(parts, pool.map(look, parts), strict=True):
            bad |= found
            bar.update(len(part))
    return bad


# --- stored results -------------------------------------------------------------------------------


@contextlib.contextmanager
def _memory(images: ImageSet) -> Iterator[np.ndarray]:
    """(N,) the checks that each image has passed; changes to it are stored for the next start.

    Nothing is stored for few images, without a home folder, or if it cannot be written.
    """
    known = np.zeros(len(images), np.uint8)
    if len(images) < REMEMBERED:
        yield known
        return
    versions = versions_of(images, known=True)
    file, kept = None, {}
    with contextlib.suppress(InputError):
        file = default_folder() / "readable" / f"{name_of(images, 'readable', 2)}.npz"
        kept = _remembered(file)
    known[:] = [kept.get(version, 0) for version in versions.tolist()]
    before = known.copy()
    yield known
    if file is not None and (known != before).any():
        _remember(file, kept, versions, known)


def _remembered(file: Path) -> dict[tuple, int]:
    """Version → the checks it has passed; {} if the file is missing or damaged."""
    with contextlib.suppress(InputError, KeyError):
        parts = load_arrays(file, "what is known of images")
        versions, known = parts["versions"], parts["known"]
        if versions.dtype == VERSION and versions.shape == known.shape == (len(known),):
            return dict(zip(versions.tolist(), known.tolist(), strict=True))
    return {}


def _remember(file: Path, kept: dict[tuple, int], versions: np.ndarray, known: np.ndarray) -> None:
    """Store the checks that these images have passed; entries of other images stay."""
    these = set(versions["who"].tolist())
    found = {version: level for version, level in kept.items() if version[0] not in these}
    levels = zip(versions.tolist(), known.tolist(), strict=True)
    found |= {version: level for version, level in levels if level and version[1] >= 0}
    parts = {
        "versions": np.array(list(found), VERSION),
        "known": np.array(list(found.values()), np.uint8),
    }
    with contextlib.suppress(InputError):
        save_arrays(file, parts, small=True)
