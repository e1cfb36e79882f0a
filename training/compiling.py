"""Tells the user that torch.compile is at work, which itself says nothing for minutes.

A network becomes dozens of kernels. On a CPU each is a file for the C++ compiler, which compiles as
many at a time as there are cores: first those of the forward pass, then those of the backward pass,
and later others for the evaluation. What is compiled is kept, so that a start which was interrupted
goes on where it stood.
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

FIRST, EVERY = 5.0, 30.0  # seconds until the first word, and between two
LONG = 600.0  # seconds from which on there is advice


class _Teller:
    """Says how long a compilation has been going on, from a thread of its own."""

    def __init__(self) -> None:
        self._ended = threading.Event()

    def begin(self, _: object) -> None:
        """torch begins to compile something."""
        self._ended = threading.Event()
        threading.Thread(target=self._tell, args=(self._ended,), daemon=True).start()

    def end(self, _: object) -> None:
        """It has done so, or failed."""
        self._ended.set()

    def _tell(self, ended: threading.Event) -> None:
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


@functools.cache  # once for a process
def tell() -> None:
    """From now on the main process speaks whenever torch compiles for more than a few seconds."""
    from torch._dynamo import callback  # with the compiler, which is loaded for --compile alone

    if processes.is_main():
        teller = _Teller()
        callback.on_compile_start(teller.begin)
        callback.on_compile_end(teller.end)
