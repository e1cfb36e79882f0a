"""Tells the user that torch.compile is at work, which itself prints nothing for minutes.

A network becomes dozens of kernels. On a CPU each is a file for the C++ compiler, which compiles as
many at a time as there are cores: first those of the forward pass, then those of the backward pass,
and later others for the evaluation. Compiled kernels are kept on disk, so that the next start
continues where an interrupted one stopped.
"""

from __future__ import annotations

import functools
import itertools
import sys
import threading
import time

import processes
from terminal import say
from utils import human_seconds

FIRST, EVERY = 5.0, 30.0  # seconds until the first message, and between two messages
LONG = 600.0  # seconds after which the message gives advice


class _Announcer:
    """Prints how long a compilation has been going on, from a thread of its own."""

    def __init__(self) -> None:
        self._ended = threading.Event()

    def begin(self, _: object) -> None:
        """Called when torch begins to compile something."""
        self._ended = threading.Event()
        threading.Thread(target=self._announce, args=(self._ended,), daemon=True).start()

    def end(self, _: object) -> None:
        """Called when that has ended, or failed."""
        self._ended.set()

    def _announce(self, ended: threading.Event) -> None:
        start = time.perf_counter()
        for pause in itertools.chain((FIRST,), itertools.repeat(EVERY)):
            if ended.wait(pause):
                return
            say(_words(time.perf_counter() - start), file=sys.stderr, flush=True)


def _words(seconds: float) -> str:
    said = f"compiling the network, {human_seconds(seconds)} so far"
    if seconds < LONG:
        return said
    return (
        f"{said}; what is compiled is kept, so a run that is stopped now starts faster next time, "
        "and without --compile it starts at once"
    )


@functools.cache  # once per process
def announce() -> None:
    """From now on the main process prints a message when torch compiles for some seconds."""
    from torch._dynamo import callback  # loads the compiler, which only --compile needs

    if processes.is_main():
        announcer = _Announcer()
        callback.on_compile_start(announcer.begin)
        callback.on_compile_end(announcer.end)
