"""Losses and gradients that are not finite, and memory that is full.

A loss or gradient that is not finite is noticed before it can reach a checkpoint, and reported with
everything that helps to find its cause. The sentence about a full GPU names the flags that help.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataset.workers import worker_deaths_in_words
from utils import InputError, full_gpu_in_words

logger = logging.getLogger("train")

CHECK_EVERY_ON_GPU = 50  # steps between two looks at the loss, because each waits for the GPU
MAX_SKIPPED = 100  # steps that --on-nan skip may leave out in a whole run

# --- numbers that are not finite ------------------------------------------------------------------


class NonFinite(InputError):
    """A loss or gradient was NaN or infinite; `record` holds what helps to find out why."""

    def __init__(self, record: dict[str, Any], advice: str) -> None:
        terms = ", ".join(f"{name} {value:.4g}" for name, value in record["terms"].items())
        what = "loss" if record["loss_is_not_finite"] else "gradient"
        super().__init__(
            f"the {what} is not finite at epoch {record['epoch']}, step {record['step']} "
            f"({terms}); {advice}"
        )
        self.record = record


class Step(NamedTuple):
    """What is remembered of a step until its numbers are checked.

    Attributes:
        index: (B,) the images. terms: the loss and its terms, 0-d on the device.
        rates: learning rates by group. finite: 0-d bool, what `Optimisers.step` has returned.
    """

    epoch: int
    step: int
    index: Tensor
    terms: dict[str, Tensor]
    rates: dict[str, float]
    finite: Tensor


class Watch:
    """Checks whether losses and gradients are finite.

    On a CPU it checks after every step. On a GPU each check waits for the device, so it checks
    every `CHECK_EVERY_ON_GPU` steps and before anything is saved, and after every step only if bad
    steps are to be skipped.

    Args:
        policy: "stop" or "skip" (--on-nan). device: of the run.

    Attributes:
        careful: whether a bad step must be noticed before its update.
        skipped: steps left out so far.
    """

    def __init__(self, policy: str, device: torch.device) -> None:
        self.policy = policy
        self.careful = policy == "skip" or device.type == "cpu"
        self.skipped = 0
        self._unseen: deque[Step] = deque(maxlen=CHECK_EVERY_ON_GPU)

    def saw(self, step: Step) -> bool:
        """Takes note of a step; returns False if it is known to be skipped.

        Raises:
            NonFinite: it, or one before it, was not finite.
        """
        self._unseen.append(step)
        if self.careful or len(self._unseen) == CHECK_EVERY_ON_GPU:
            return self.check()
        return True

    def check(self) -> bool:
        """Checks the steps since the last check; returns whether none of them was skipped.

        Raises:
            NonFinite: one was not finite, and the run is to stop.
        """
        if not self._unseen:
            return True
        finite = torch.stack([step.finite for step in self._unseen]).tolist()
        steps = list(self._unseen)
        self._unseen.clear()
        bad = [step for step, good in zip(steps, finite, strict=True) if not good]
        for step in bad:
            self._act(step)
        return not bad

    def _act(self, step: Step) -> None:
        terms = {name: float(value) for name, value in step.terms.items()}
        record = {
            "epoch": step.epoch + 1,
            "step": step.step,
            "terms": terms,
            "loss_is_not_finite": not bool(step.terms["loss"].isfinite()),
            "learning_rates": step.rates,
            "index": step.index.tolist(),
        }
        if self.policy == "stop":
            raise NonFinite(record, "lower --lr or --proxy-lr-scale, or try --amp off")
        self.skipped += 1
        if self.skipped > MAX_SKIPPED:
            raise NonFinite(
                record,
                f"{MAX_SKIPPED} steps were skipped before it; lower --lr or --proxy-lr-scale",
            )
        logger.warning("step %d is skipped: its loss or gradient is not finite", step.step)


# --- memory ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def memory_in_words(batch_size: int, image_size: int) -> Iterator[None]:
    """Turns CUDA's out-of-memory error, and the death of a process that reads images, into words.

    torch raises the error about such a death wherever the program stands, not only where it waits
    for a batch.

    Raises:
        MachineError: the GPU's memory is full, or a process that reads images died.
    """
    full = (
        f"the GPU's memory is full with --batch-size {batch_size} at {image_size} "
        "pixels; give a --micro-batch, lower --batch-size or --image-size, use --amp bf16 or "
        "--cuda-graphs 0, or keep the data off the GPU (--data-device cpu)"
    )
    with worker_deaths_in_words(), full_gpu_in_words(full):
        yield
