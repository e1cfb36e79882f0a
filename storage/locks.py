"""Locks that keep other processes out of a file, and are released when their process ends."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from utils import InputError, not_written

logger = logging.getLogger("storage")


class HeldError(InputError):
    """Another process holds the lock; the same command may succeed later."""

    status = os.EX_TEMPFAIL


def lock(file: IO | int, what: object, *, wait: bool = False, quiet: bool = False) -> bool:
    """Locks an open file until this process closes any descriptor of it, or ends.

    On a file system without locks no process is kept out, and a warning says so once.

    Args:
        file: open for writing. what: names in the warning what is protected. wait: whether to wait
            for another process to release the lock. quiet: whether to leave out the warning.

    Returns:
        False if another process has the lock.
    """
    # lockf and not flock: child processes that read images do not inherit the lock.
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # systems differ in which error they report
        return False
    except OSError as error:
        if not quiet:
            _warn_of_no_locks(str(what), error.strerror)
    return True


@functools.cache
def _warn_of_no_locks(what: str, why: str) -> None:
    logger.warning("nothing keeps other processes out of %s (%s)", what, why)


def open_locked(path: Path, mode: str, what: Path) -> IO | None:
    """Opens and locks the file at `path`; None if another process has the lock.

    Args:
        mode: one for writing. what: names in the warning of `lock` what is protected.

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
        # The previous holder of the lock removed or replaced the file between our two calls.
        file.close()


def is_still(path: Path, file: IO) -> bool:
    """Whether an open file is still the one at `path`, neither removed nor replaced."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """Keeps other writers away from the file or folder at `path`, which need not exist yet.

    A hidden file beside it is locked. A lock on the file itself would be released as soon as any
    reader in this process closes it, and would not pass on to a new file that replaces it.

    Raises:
        HeldError: another process has the lock.
        MachineError: the folder cannot be written.
    """
    place = path.with_name(f".{path.name}.lock")
    try:
        file = open_locked(place, "a", path)  # a link's target stays as it is
    except OSError as error:
        raise not_written(path.parent, error, "or choose another folder") from error
    if file is None:
        raise HeldError(f"another process is changing {path}; wait for its end, or stop it first")
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            place.unlink()
        file.close()
