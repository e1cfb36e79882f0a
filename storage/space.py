"""Free space on a disk, and whether it is enough."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from utils import MachineError


def free_space(folder: Path) -> int:
    """Free bytes on the disk of a folder, which need not exist yet."""
    return shutil.disk_usage(nearest_that_exists(folder)).free


def can_be_made(folder: Path) -> bool:
    """Whether a folder can be written to, or made if it does not exist yet."""
    place = nearest_that_exists(folder)
    return place.is_dir() and os.access(place, os.W_OK)


def nearest_that_exists(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = Path(folder).absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def in_bytes(count: float) -> str:
    """1_530_000_000 → '1.5 GB'."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.{1 if count < 10 * size else 0}f} {unit}"
    return f"{count / 1e3:.0f} kB"


def need_room(folder: Path, needed: float, what: str, advice: str) -> str:
    """Checks that there is room for `what`, and says how much it takes and how much is free.

    Raises:
        MachineError: it does not fit; `advice` says what to do other than free some space.
    """
    free = free_space(folder)
    if needed > free:
        raise MachineError(
            f"{what} takes about {in_bytes(needed)}, and {folder} has {in_bytes(free)} free; free "
            f"some space, or {advice}"
        )
    return f"about {in_bytes(needed)}, {in_bytes(free)} free"
