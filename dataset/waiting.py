"""Measures the time spent waiting for batches, by the host or by the GPU."""

from __future__ import annotations

import time
from collections import deque

import torch


class Waiting:
    """The waiting time of the host, summed over the batches of an epoch."""

    def __init__(self) -> None:
        self._seconds = self._start = 0.0

    def asked(self) -> None:
        """Call before requesting a batch."""
        self._start = time.perf_counter()

    def given(self) -> None:
        """Call when the batch is there."""
        self._seconds += time.perf_counter() - self._start

    def seconds(self) -> float:
        """The sum so far."""
        return self._seconds


class WaitingOfGPU(Waiting):
    """The idle time of the GPU, from the end of its work until the next batch is there.

    The host runs ahead of the GPU: while the host waits for a batch, the GPU still computes earlier
    steps, and is idle only after these.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._begun: torch.cuda.Event | None = None
        self._unread: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def asked(self) -> None:
        """Call before requesting a batch."""
        self._begun = self._passed()

    def given(self) -> None:
        """Call when the batch is there."""
        self._unread.append((self._begun, self._passed()))
        while self._unread and self._unread[0][1].query():  # the GPU has passed it
            self._read()

    def seconds(self) -> float:
        """The sum so far; waits until the GPU has reached the last batch."""
        while self._unread:
            self._unread[0][1].synchronize()
            self._read()
        return self._seconds

    def _passed(self) -> torch.cuda.Event:
        """An event that records when the GPU reaches the host's current position."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _read(self) -> None:
        start, end = self._unread.popleft()
        self._seconds += start.elapsed_time(end) / 1e3


def waiting_on(device: torch.device) -> Waiting:
    """A new measurement for batches on this device."""
    return WaitingOfGPU(device) if device.type == "cuda" else Waiting()
