"""Locks that keep other processes out of a file, and end with the process that holds them."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from utils import InputError

logger = logging.getLogger("storage")


class HeldError(InputError):
    """Another process is at work there; the same command may succeed later."""

    status = os.EX_TEMPFAIL


def lock(file: IO | int, what: object, *, wait: bool = False, quiet: bool = False) -> bool:
    """Keeps other processes from an open file until this one closes any descriptor of it, or ends.

    On a file system without locks nobody is kept out, and a warning says so once.

    Args:
        file: open for writing. what: is protected, for the warning. wait: until whoever has the
            lock lets go. quiet: gives no warning.

    Returns:
        False where another process has it.
    """
    # lockf and not flock: processes that read images do not inherit it, so it ends with this one.
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # systems differ in what they call it
        return False
    except OSError as error:
        if not quiet:
            _warn_of_no_locks(str(what), error.strerror)
    return True


@functools.cache
def _warn_of_no_locks(what: str, why: str) -> None:
    logger.warning("nothing keeps other processes out of %s (%s)", what, why)


def open_locked(path: Path, mode: str, what: Path) -> IO | None:
    """Opens and locks the file at `path`; None where another process has the lock.

    Args:
        mode: one for writing. what: is protected, for the warning of `lock`.

    Raises:
        OSError: it cannot be opened.
    """
    while True:
        file = path.open(mode)
        if not lock(file, what):
            file.close()
            return None
        if is_still(path, file):
            return file
        # Whoever had the lock before removed or replaced the file between our two calls.
        file.close()


def is_still(path: Path, file: IO) -> bool:
    """Whether an open file is the one at `path`: another may have taken its place, or none."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Keeps other writers away from the file or folder at `path`, which need not exist yet.

    The lock is a hidden file beside it. A lock on the file itself would end as soon as any reader
    in this process closes it, and would stay with the old file where a new one takes its place.

    Raises:
        HeldError: another process has the lock.
        InputError: the folder cannot be written.
    """
    place = path.with_name(f".{path.name}.lock")
    try:
        file = open_locked(place, "a", path)  # a link's target stays as it is
    except OSError as error:
        raise InputError(
            f"cannot write into {path.parent} ({error.strerror}); choose another folder"
        ) from error
    if file is None:
        raise HeldError(f"another process is changing {path}; wait for its end, or stop it first")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            place.unlink()
        file.close()
