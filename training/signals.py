"""Signals that ask a run to stop: obeyed after the current step, and a second one at once."""

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
    """A signal ends the run. Not an Exception, so that no `except Exception` catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.status = 128 + number  # as a shell reports a process that a signal has ended


class Signals:
    """Inside the `with`, signals to stop (`processes.stop_signals`) are requests to the loop.

    The first signal is kept in `requested` until the loop asks for it; processes that train
    together ask together, see `agreed`. A second signal, and any signal inside `at_once`, raises
    `Interrupted` wherever the program stands.
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
        """The signal that this process or any other has received; all must ask together."""
        found = processes.largest(self.requested or 0) or None
        if found is not None:  # if None, a signal may have come meanwhile, and is seen next time
            self.requested = found
        return found

    def next_of(self, batches: Iterator[T]) -> T | None:
        """The next batch; None when a signal has come, to this process or another."""
        try:
            batch = next(batches)
        except InputError:
            if self.requested is None:
                raise
            batch = None  # the processes that read data got the signal too
        return None if self.agreed() is not None else batch

    def _notice(self, number: int, frame: FrameType | None) -> None:
        # When a terminal is closed, both the shell and the system send SIGHUP.
        again = self.requested is not None and number != signal.SIGHUP
        # A signal to the whole job ends the processes that read data too. torch would raise an
        # error about that wherever the program stands, perhaps in the middle of an update, or in
        # place of `Interrupted`.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        if self._at_once or again:
            raise Interrupted(number)
        self.requested = number

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Around work that changes nothing, such as an evaluation: signals end it immediately."""
        if self.requested is not None:
            raise Interrupted(self.requested)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
