"""How long a loss takes to compare all its proxies with each other; told before a run if long."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

LONG = 1.0  # seconds a step from which on one is told before training
FEW = 5_000  # proxies, which are compared in no time


def fastest(work: Callable[[], Tensor]) -> float:
    """The seconds that the fastest of three tries takes to give one number, 0-d."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work().item()  # reading it waits for a GPU
        times.append(time.perf_counter() - started)
    return min(times)


def in_words(seconds: float) -> str:
    """How long a step takes; empty where that is not long."""
    if seconds < LONG:
        return ""
    return f"about {float(f'{seconds:.2g}'):,.0f} s per step on this machine, whatever the batch"
