"""How long batches are waited for: by the host, or by the GPU that computes with them."""

from __future__ import annotations

import time
from collections import deque

import torch


class Waiting:
    """The time between asking for a batch and having it, summed over the batches of an epoch.

    This one goes by the clock.
    """

    def __init__(self) -> None:
        self._seconds = self._start = 0.0

    def asked(self) -> None:
        """Call it before asking for a batch."""
        self._start = time.perf_counter()

    def given(self) -> None:
        """Call it when the batch is there."""
        self._seconds += time.perf_counter() - self._start

    def seconds(self) -> float:
        """The sum so far."""
        return self._seconds


class WaitingOfGPU(Waiting):
    """How long the GPU has nothing to do: from the end of its work until the next batch is there.

    The host runs ahead of a GPU. While the host waits for a batch, the GPU still computes earlier
    steps, and lacks nothing until it has done them.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._begun: torch.cuda.Event | None = None
        self._unread: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def asked(self) -> None:
        """As the clock's."""
        self._begun = self._passed()

    def given(self) -> None:
        """As the clock's."""
        self._unread.append((self._begun, self._passed()))
        while self._unread and self._unread[0][1].query():  # the GPU has passed it
            self._read()

    def seconds(self) -> float:
        """The sum so far; waits until the GPU has come to the last batch."""
        while self._unread:
            self._unread[0][1].synchronize()
            self._read()
        return self._seconds

    def _passed(self) -> torch.cuda.Event:
        """An event that records when the GPU comes to where the host is now."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _read(self) -> None:
        start, end = self._unread.popleft()
        self._seconds += start.elapsed_time(end) / 1e3


def waiting_on(device: torch.device) -> Waiting:
    """A new sum for batches that this device computes with."""
    return WaitingOfGPU(device) if device.type == "cuda" else Waiting()
