"""Checks before a run starts: whether its files exist, and whether they are the same as before.

require_files(train, evaluated)     names missing files before training, not after an epoch
fingerprints(train, *evaluated)     stored with a run, and compared when it is continued
"""

from __future__ import annotations

from collections.abc import Iterable

from dataset.base import ImageSet
from utils import InputError, join_words

_NAMED = 3
BAD_IMAGES = 0.01
"""The default of `--max-bad-images`: the share of a split that may be unreadable."""


def admitted_bad_images(share: float, count: int) -> int:
    """How many of `count` images may be unreadable: this share, but at least one; 0 allows none."""
    # As a float, 0.29 is slightly less than its digits say; it should allow 29 of 100.
    return max(1, int(share * count + 1e-6)) if share else 0


def share_admitting(bad: int, count: int) -> float:
    """The `--max-bad-images` that allows `bad` of `count` images to be unreadable."""
    return -(-bad * 10_000 // count) / 10_000  # rounded up


def require_files(
    train: ImageSet | None, evaluated: Iterable[ImageSet], max_bad_images: float = 0.0
) -> None:
    """Check that all files of a run exist; readable.py checks their contents.

    Args:
        train: the training images, or None if nothing is trained.
        evaluated: queries, galleries, held-out classes.
        max_bad_images: the share of each of them that may be missing (`--max-bad-images`).

    Raises:
        InputError: more files are missing; the message counts them and names the first ones.
    """
    sides = [(images, "evaluation") for images in evaluated]
    for images, side in [*sides, *([] if train is None else [(train, "training")])]:
        missing = images.missing()
        if len(missing) > admitted_bad_images(max_bad_images, len(images)):
            raise InputError(_sentence(images, missing, side))


def _sentence(images: ImageSet, missing: list[str], side: str) -> str:
    more = ["others"] if len(missing) > _NAMED else []
    named = join_words([*missing[:_NAMED], *more], "and")
    are = "is" if len(missing) == 1 else "are"
    return (
        f"{len(missing):,} of the {len(images):,} {side} images of {images.given or images.name} "
        f"{are} missing (there is no regular file): {named}; put them back, or take them out of "
        f"the data (`{images.check_command} --json FILE` lists all)"
    )


def fingerprints(*parts: ImageSet) -> dict[str, str]:
    """`ImageSet.content_fingerprint` of each part, by its split.

    Several parts of one split, such as VehicleID's lists, are numbered: "eval", "eval 2", ….
    A run stores them and is continued only if all are the same; the entry that differs shows which
    images have changed.
    """
    found: dict[str, str] = {}
    for images in parts:
        name, number = images.split, 2
        while name in found:
            name, number = f"{images.split} {number}", number + 1
        found[name] = images.content_fingerprint()
    return found
