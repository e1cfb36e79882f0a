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
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bars import Bar
from dataset.base import ImageSet, why_unreadable
from dataset.files import announcements, warn_once
from dataset.glance import looks_whole
from dataset.inventory import admitted_bad_images, share_admitting
from dataset.kept import VERSION, default_folder, name_of, versions_of
from dataset.own import LEAST_CLASSES
from dataset.reading import FROM_FILES, Reading
from dataset.statuses import ASKED_AT_ONCE, answers
from machine import cores
from storage import load_arrays, save_arrays
from utils import InputError, join_words

logger = logging.getLogger("dataset")

DECODED_AT_ONCE = 20_000  # images of an evaluation: 45 s on two cores
REMEMBERED = 500  # with fewer images, results are not worth storing
MANY = 100_000  # files: looking at them takes seconds
_LOOKED_AT, _DECODED = 1, 2  # which checks a sound image has passed
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

    def look(index: int) -> str | None:
        whole = not decoded and looks_whole(images.paths[index])
        return None if whole else why_unreadable(images, index)

    _announce(len(indices), images.split, decoded)
    title = "checking the images" if decoded else "checking the files"
    # Pillow releases the interpreter lock while it decodes, so threads keep all cores busy; the
    # check of a file mostly waits for the disk.
    places = indices.tolist()
    reasons = answers(look, places, cores() if decoded else ASKED_AT_ONCE)
    pairs = zip(places, Bar(title, len(places), delay=1, iterable=reasons), strict=True)
    return {index: reason for index, reason in pairs if reason is not None}


def _announce(count: int, split: str, decoded: bool) -> None:
    """Say what takes long, where no progress bar does."""
    which = f"{count:,} {_SIDES['train' if split == 'train' else 'eval']} images"
    if decoded and count >= REMEMBERED:
        announcements.info("decoding %s once, to check them", which)
    elif not decoded and count >= MANY:
        announcements.info("looking at the files of %s once, to check them", which)


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
    file, kept = None, _Kept.nothing()
    with contextlib.suppress(InputError):
        file = default_folder() / "readable" / f"{name_of(images, 'readable', 2)}.npz"
        kept = _remembered(file)
    known[:] = kept.levels(versions)
    before = known.copy()
    yield known
    if file is not None and (known != before).any():
        kept.store(file, versions, known)


class _Kept(NamedTuple):
    """The `versions` (M,) of images, each image once, and the checks `known` (M,) they passed."""

    versions: np.ndarray
    known: np.ndarray

    @classmethod
    def nothing(cls) -> _Kept:
        """Without any image."""
        return cls(np.empty(0, VERSION), np.empty(0, np.uint8))

    def levels(self, versions: np.ndarray) -> np.ndarray:
        """(N,) the checks that each of these versions has passed."""
        if not len(self.known):
            return np.zeros(len(versions), np.uint8)
        order = np.argsort(self.versions["who"])
        stored, known = self.versions[order], self.known[order]
        places = np.searchsorted(stored["who"], versions["who"])
        places = np.minimum(places, len(stored) - 1)
        same = [stored[field][places] == versions[field] for field in VERSION.names]
        return np.where(np.logical_and.reduce(same), known[places], 0)

    def store(self, file: Path, versions: np.ndarray, known: np.ndarray) -> None:
        """Store the checks that these versions have passed; entries of other images stay."""
        others = ~np.isin(self.versions["who"], versions["who"])
        _, first = np.unique(versions["who"], return_index=True)
        first = first[(known[first] > 0) & (versions["size"][first] >= 0)]
        parts = {
            "versions": np.concatenate([self.versions[others], versions[first]]),
            "known": np.concatenate([self.known[others], known[first]]),
        }
        with contextlib.suppress(InputError):
            save_arrays(file, parts, small=True)


def _remembered(file: Path) -> _Kept:
    """What is stored; nothing if the file is missing or damaged."""
    with contextlib.suppress(InputError, KeyError):
        parts = load_arrays(file, "what is known of images")
        versions, known = parts["versions"], parts["known"]
        if versions.dtype == VERSION and versions.shape == known.shape == (len(known),):
            return _Kept(versions, known)
    return _Kept.nothing()
