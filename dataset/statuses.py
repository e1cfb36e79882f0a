"""Questions about files, asked for many at a time.

A network disk takes about a millisecond for an answer, and gives many at once: one after the other,
the 120,000 files of Stanford Online Products would take two minutes at each look.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import ContextVar
from typing import TypeVar

import numpy as np

ASKED_AT_ONCE = 16  # by as many threads; on a local disk they cost nothing
_PART = 32  # files that a thread asks for before it takes others, at most

Asked, Answer = TypeVar("Asked"), TypeVar("Answer")


def answers(
    ask: Callable[[Asked], Answer], of: Sequence[Asked], threads: int = ASKED_AT_ONCE
) -> Iterator[Answer]:
    """`ask(each)` of paths or what stands for them, in their order, by several threads."""
    # In parts, because what waits to be asked takes a kilobyte each.
    size = max(1, min(_PART, len(of) // (4 * threads)))

    def part(start: int) -> list[Answer]:
        return [ask(of[index]) for index in range(start, min(start + size, len(of)))]

    with ThreadPoolExecutor(threads) as pool:
        for found in pool.map(part, range(0, len(of), size)):
            yield from found


STATUS = np.dtype(
    [("mode", "u4"), ("size", "i8"), ("time", "i8"), ("device", "u8"), ("inode", "u8")]
)
"""What a disk says of a file: `st_mode`, bytes, ns of the last change, and what tells it from all
others. One that is not there has the mode 0, and the size and time -1."""

_NOT_THERE = (0, -1, -1, 0, 0)
_Answers = dict[int, tuple[Sequence[str], np.ndarray]]  # by the identity of a list
_known: ContextVar[_Answers | None] = ContextVar("_known", default=None)


def statuses(paths: Sequence[str]) -> np.ndarray:
    """(N,) of `STATUS`: what the disk says of each file now."""
    return np.fromiter(answers(_status, paths), STATUS, len(paths))


@contextlib.contextmanager
def asked_once() -> Iterator[None]:
    """Inside it, `known_statuses` asks for the files of a list once.

    A start wants to know whether its files are there, which of them are the same, which have
    changed since they were found sound, and how large they are; each look at a million files of a
    network disk takes a minute. Other threads ask anew.
    """
    before = _known.set({})
    try:
        yield
    finally:
        _known.reset(before)


def known_statuses(paths: Sequence[str]) -> np.ndarray:
    """As `statuses`; inside `asked_once` as the files were when they were first asked for."""
    if (known := _known.get()) is None:
        return statuses(paths)
    if id(paths) not in known:
        known[id(paths)] = paths, statuses(paths)  # with the list, so that no other has its id
    return known[id(paths)][1]


def _status(path: str) -> tuple[int, ...]:
    try:
        now = os.stat(path)  # noqa: PTH116 (a Path object per image costs more than stat)
    except (OSError, ValueError):
        return _NOT_THERE
    return now.st_mode, now.st_size, now.st_mtime_ns, now.st_dev, now.st_ino
