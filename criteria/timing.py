"""How long a loss takes to compare all its proxies with each other, to warn before a slow run."""

from __future__ import annotations

import time
from collections.abc import Callable

from torch import Tensor

LONG = 1.0  # seconds per step from which the user is warned before training
FEW = 5_000  # fewer proxies than this take so little time that it is not measured


def fastest(work: Callable[[], Tensor]) -> float:
    """Seconds taken by the fastest of three calls of ``work``, which returns one number, 0-d."""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        work().item()  # .item() waits for a GPU to finish
        times.append(time.perf_counter() - started)
    return min(times)


def in_words(seconds: float) -> str:
    """A description of the time per step; "" if it is not LONG."""
    if seconds < LONG:
        return ""
    return f"about {float(f'{seconds:.2g}'):,.0f} s per step on this machine, whatever the batch"
