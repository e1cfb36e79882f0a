"""Helpers of benchmarks: seconds, memory, processes, the results of a run, lines of a table."""

from __future__ import annotations

import csv
import ctypes
import json
import multiprocessing
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

import torch

Found = TypeVar("Found")


def apart(work: Callable[..., Found], *given: object) -> Found:
    """The result of a call in a new process, which starts without this one's memory and threads."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def in_turn(works: dict[str, Callable[[], Found]], repeats: int) -> dict[str, list[Found]]:
    """Name → results. The works take turns, so that changes of the machine's speed affect all."""
    found: dict[str, list[Found]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            found[name].append(work())
    return found


def wait(device: torch.device | str) -> None:
    """Waits until a GPU has done all queued work."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def timed(work: Callable[[], object], device: torch.device | str) -> float:
    """Seconds of a call, with all work that it queues on the device."""
    wait(device)
    start = time.perf_counter()
    work()
    wait(device)
    return time.perf_counter() - start


class Memory:
    """The peak memory from now on: allocated on a GPU, resident on a CPU (Linux).

    Raises:
        OSError, AttributeError: the system does not report it.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.on_gpu = torch.device(device).type == "cuda"
        wait(device)
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        ctypes.CDLL(None).malloc_trim(0)  # freed memory that is kept would be used first, unseen
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts from here
        self.before = status("VmRSS")

    def peak(self) -> int:
        """Bytes at the peak so far, beyond those at the start."""
        now = torch.cuda.max_memory_allocated() if self.on_gpu else status("VmHWM")
        return now - self.before


def status(key: str) -> int:
    """A memory line of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def reached(run: Path) -> dict[str, float]:
    """The metrics in a run's results.json, and its seconds of training."""
    (numbers, *_) = json.loads((run / "results.json").read_text())["results"].values()
    with (run / "metrics.csv").open() as file:
        *_, last = csv.DictReader(file)
    return {**numbers, "seconds": float(last["seconds"])}


def line(cells: Iterable[object]) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(map(str, cells))} |"


def heads(titles: Iterable[str]) -> str:
    """The first two lines of a Markdown table."""
    titles = list(titles)
    return f"{line(titles)}\n|{'---|' * len(titles)}"
