"""What a run looks at before it starts: whether its files are there, and whether they are the same.

require_files(train, evaluated)     a missing file is named before training, not after an epoch
fingerprints(train, *evaluated)     kept with a run, and compared when it is continued
"""

from __future__ import annotations

from collections.abc import Iterable

from dataset.base import ImageSet
from utils import InputError, join_words

_NAMED = 3
BAD_IMAGES = 0.01
"""The share of a split that may be unreadable where `--max-bad-images` is not given."""


def admitted_bad_images(share: float, count: int) -> int:
    """How many of so many images may be unreadable: this share, but one at least; 0 admits none."""
    # A share such as 0.29 is a little less than its digits say, and 29 of 100 are meant.
    return max(1, int(share * count + 1e-6)) if share else 0


def share_admitting(bad: int, count: int) -> float:
    """The `--max-bad-images` with which so many of `count` images may be unreadable."""
    return -(-bad * 10_000 // count) / 10_000  # rounded up


def require_files(
    train: ImageSet | None, evaluated: Iterable[ImageSet], max_bad_images: float = 0.0
) -> None:
    """Looks for every file of a run; what is in them is not looked at (see readable.py).

    Args:
        train: the training images, or None where nothing is trained.
        evaluated: queries, galleries, held-out classes.
        max_bad_images: the share of each of them that may be missing (`--max-bad-images`).

    Raises:
        InputError: more files are missing; the sentence counts them and names the first ones.
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
    """What `ImageSet.content_fingerprint` says of each part, by its split.

    Several parts of one split, such as VehicleID's lists, are numbered: "eval", "eval 2", ….
    A run keeps all of it and is continued only where all of it is the same; which entry differs
    says on which side the images changed.
    """
    found: dict[str, str] = {}
    for images in parts:
        name, number = images.split, 2
        while name in found:
            name, number = f"{images.split} {number}", number + 1
        found[name] = images.content_fingerprint()
    return found
