"""Reads the statuses of many files, in parallel where the disk makes one wait.

A network disk takes about a millisecond per request, but answers many at once. One by one, the
120,000 files of Stanford Online Products would take two minutes each time. A disk of this machine
answers in a microsecond; threads then only wait for each other, and take more than twice as long.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TypeVar

import numpy as np

ASKED_AT_ONCE = 16  # threads
_PART = 32  # the most files per task of a thread
_WAITS = 2e-4  # seconds per file: threads are worth it
_IN_A_ROW = 3  # parts that took so long; a single one may have waited for another program

Asked, Answer = TypeVar("Asked"), TypeVar("Answer")


def answers(
    ask: Callable[[Asked], Answer], of: Sequence[Asked], threads: int = ASKED_AT_ONCE
) -> Iterator[Answer]:
    """`ask(each)` for every item, such as a path, in order.

    It is asked here as long as answers come at once, and by several threads as soon as they do not.
    """
    # In parts, because every waiting task takes a kilobyte.
    size = max(1, min(_PART, len(of) // (4 * threads)))

    def part(start: int) -> list[Answer]:
        return [ask(of[index]) for index in range(start, min(start + size, len(of)))]

    start = waited = 0
    while start < len(of) and waited < _IN_A_ROW:
        begun = time.perf_counter()
        found = part(start)
        waited = waited + 1 if time.perf_counter() - begun > _WAITS * len(found) else 0
        start += size
        yield from found
    if start < len(of):
        with ThreadPoolExecutor(threads) as pool:
            for found in pool.map(part, range(start, len(of), size)):
                yield from found


STATUS = np.dtype(
    [("mode", "u4"), ("size", "i8"), ("time", "i8"), ("device", "u8"), ("inode", "u8")]
)
"""The status of a file: `st_mode`, bytes, ns of the last change, and its identity. A missing file
has mode 0, and size and time -1."""

_NOT_THERE = (0, -1, -1, 0, 0)
_Answers = dict[int, tuple[Sequence[str], np.ndarray]]  # by the identity of a list
_known: ContextVar[_Answers | None] = ContextVar("_known", default=None)


def statuses(paths: Sequence[str]) -> np.ndarray:
    """(N,) of `STATUS`: the current status of each file."""
    return np.fromiter(answers(_status, paths), STATUS, len(paths))


@contextlib.contextmanager
def asked_once() -> Iterator[None]:
    """A context in which `known_statuses` reads the files of a list only once.

    The start of a run checks whether its files exist, which of them are the same, which have
    changed since they were found sound, and how large they are. Each time, a million files on a
    network disk would take a minute. Other threads read anew.
    """
    before = _known.set({})
    try:
        yield
    finally:
        _known.reset(before)


def known_statuses(paths: Sequence[str]) -> np.ndarray:
    """`statuses`; inside `asked_once`, those of the first call for this list."""
    if (known := _known.get()) is None:
        return statuses(paths)
    if id(paths) not in known:
        known[id(paths)] = paths, statuses(paths)  # keeps the list, so that its id stays unique
    return known[id(paths)][1]


def _status(path: str) -> tuple[int, ...]:
    try:
        now = os.stat(path)  # noqa: PTH116 (a Path object per image costs more than stat)
    except (OSError, ValueError):
        return _NOT_THERE
    return now.st_mode, now.st_size, time_of(now), now.st_dev, now.st_ino


def time_of(status: os.stat_result) -> int:
    """ns of a file's last change, modulo 2⁶⁴ as an int64: a broken clock may be past 2262."""
    return (status.st_mtime_ns + 2**63) % 2**64 - 2**63
