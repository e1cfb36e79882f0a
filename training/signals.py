"""Signals that ask a run to stop: obeyed after the step that is going on, a second one at once."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType
from typing import Any, TypeVar

import processes
from utils import InputError

T = TypeVar("T")


class Interrupted(BaseException):
    """A signal ends the run; no `except Exception` may keep it from that."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.status = 128 + number  # what a shell gives a process that a signal ended


class Signals:
    """While entered, signals that ask a program to stop (`processes.stop_signals`) are requests.

    The first is kept in `requested` until the loop asks (several processes ask together, see
    `agreed`). The second, and any that comes while `at_once` is entered, raises `Interrupted` where
    the program stands.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in processes.stop_signals():
            self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> int | None:
        """What `requested` was in this process, or in any other; all must ask together."""
        found = processes.largest(self.requested or 0) or None
        if found is not None:  # else one may have come meanwhile: it is asked for the next time
            self.requested = found
        return found

    def next_of(self, batches: Iterator[T]) -> T | None:
        """The next batch; None when a signal has come, to this process or another."""
        try:
            batch = next(batches)
        except InputError:
            if self.requested is None:
                raise
            batch = None  # what read the data has got the signal too
        return None if self.agreed() is not None else batch

    def _notice(self, number: int, frame: FrameType | None) -> None:
        # Where a terminal is closed, the shell and the system both say so.
        again = self.requested is not None and number != signal.SIGHUP
        if self._at_once or again:
            raise Interrupted(number)
        self.requested = number
        # A signal to the whole job ends the processes that read data too. torch raises an error
        # about that wherever the program stands, which may be in the middle of an update.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """For work that changes nothing, such as an evaluation: a signal need not wait for it."""
        if self.requested is not None:
            raise Interrupted(self.requested)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
