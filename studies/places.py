"""The places where a study trains, and the command of a training."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from machine import cores
from utils import STATUS_BY_KIND

TRAIN = Path(__file__).resolve().parent.parent / "train.py"


@dataclass
class Place:
    """A GPU, or a share of the cores."""

    gpu: int | None = None
    threads: int = 1

    @property
    def flags(self) -> list[str]:
        """The flags that make train.py compute there."""
        return [] if self.gpu is None else ["--gpu-id", str(self.gpu)]

    @property
    def environment(self) -> dict[str, str]:
        """The environment of a process that computes there."""
        threads = {"OMP_NUM_THREADS": str(self.threads)}
        return {**os.environ, **threads, "PYTHONUNBUFFERED": "1", STATUS_BY_KIND: "1"}


def train_command(flags: Sequence[str]) -> list[str]:
    """The command line of a training."""
    return [sys.executable, str(TRAIN), *flags]


def places(jobs: int, gpus: Sequence[int] = ()) -> list[Place]:
    """A place for each of `jobs` trainings at once: GPUs in turn, or equal shares of the cores."""
    threads = max(1, cores() // jobs)
    if gpus:
        return [Place(gpu, threads) for gpu in (list(gpus) * jobs)[:jobs]]
    return [Place(None, threads) for _ in range(jobs)]
