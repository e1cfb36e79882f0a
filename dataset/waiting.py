"""How long batches are waited for: by the host, or by the GPU that computes with them."""

from __future__ import annotations

import time
from collections import deque
from typing import Protocol

import torch


class Waiting(Protocol):
    """The time between asking for a batch and having it, summed over the batches of an epoch."""

    def asked(self) -> None:
        """A batch is asked for."""

    def given(self) -> None:
        """It is there."""

    def seconds(self) -> float:
        """What all of them took together."""


def waiting_on(device: torch.device) -> Waiting:
    """A new sum for batches that this device computes with."""
    return OfGPU(device) if device.type == "cuda" else OfHost()


class OfHost:
    """By the clock."""

    def __init__(self) -> None:
        self._seconds = self._start = 0.0

    def asked(self) -> None:
        """See `Waiting`."""
        self._start = time.perf_counter()

    def given(self) -> None:
        """See `Waiting`."""
        self._seconds += time.perf_counter() - self._start

    def seconds(self) -> float:
        """See `Waiting`."""
        return self._seconds


class OfGPU:
    """By the GPU: from when it has done all its work until the next batch is there.

    The host runs ahead of a GPU. While the host waits for a batch, the GPU still computes earlier
    steps, and lacks nothing until it has done them.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._seconds = 0.0
        self._start: torch.cuda.Event | None = None
        self._unread: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()

    def asked(self) -> None:
        """See `Waiting`."""
        self._start = self._passed()

    def given(self) -> None:
        """See `Waiting`."""
        self._unread.append((self._start, self._passed()))
        while self._unread and self._unread[0][1].query():  # passed: it need not be kept
            self._read()

    def seconds(self) -> float:
        """See `Waiting`; waits until the GPU is where the last batch was there."""
        while self._unread:
            self._unread[0][1].synchronize()
            self._read()
        return self._seconds

    def _passed(self) -> torch.cuda.Event:
        """Tells when the GPU comes to where the host is now."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def _read(self) -> None:
        start, end = self._unread.popleft()
        self._seconds += start.elapsed_time(end) / 1e3
