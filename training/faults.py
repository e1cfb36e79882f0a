"""What a run does when something goes wrong around it: signals, numbers, memory.

A signal is obeyed after the step that is being done, and a second one at once. A loss or gradient
that is not finite is noticed before it can reach a checkpoint, and told with all there is to find
its cause. A full GPU is told in words of the command line.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections import deque
from collections.abc import Iterator
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

import processes
from dataset.workers import deaths_told
from utils import InputError, full_gpu_in_words

logger = logging.getLogger("train")

T = TypeVar("T")
CHECK_EVERY_ON_GPU = 50  # steps between two looks at the loss: each look waits for the GPU
MAX_SKIPPED = 100  # steps that --on-nan skip leaves out, in a whole run
COLLAPSED = 0.98  # mean cosine between class means from which on a network tells nothing apart
ROUNDING = 1e-6  # difference of unit vectors' components that float32 makes of equal images
FOUND = 10  # R@1 as a multiple of chance from which on it does tell classes apart

# --- signals --------------------------------------------------------------------------------------


class Interrupted(BaseException):
    """A signal ends the run; no `except Exception` may keep it from that."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.name = signal.Signals(number).name
        self.status = 128 + number  # what a shell gives a process that a signal ended


class Signals:
    """While entered, signals that ask a program to stop (`processes.stop_signals`) are requests.

    The first is kept in `requested` until the loop asks (several processes ask together, see
    `agreed`). The second, and any that comes while `at_once` is entered, raises `Interrupted` where
    the program stands.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._at_once = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        for number in processes.stop_signals():
            self._before[number] = signal.signal(number, self._notice)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def agreed(self) -> int | None:
        """What `requested` was in this process, or in any other; all must ask together."""
        found = processes.largest(self.requested or 0) or None
        if found is not None:  # else one may have come meanwhile: it is asked for the next time
            self.requested = found
        return found

    def next_of(self, batches: Iterator[T]) -> T | None:
        """The next batch; None when a signal has come, to this process or another."""
        try:
            batch = next(batches)
        except InputError:
            if self.requested is None:
                raise
            batch = None  # what read the data has got the signal too
        return None if self.agreed() is not None else batch

    def _notice(self, number: int, frame: FrameType | None) -> None:
        # Where a terminal is closed, the shell and the system both say so.
        again = self.requested is not None and number != signal.SIGHUP
        if self._at_once or again:
            raise Interrupted(number)
        self.requested = number
        # A signal to the whole job ends the processes that read data too. torch raises an error
        # about that wherever the program stands, which may be in the middle of an update.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """For work that changes nothing, such as an evaluation: a signal need not wait for it."""
        if self.requested is not None:
            raise Interrupted(self.requested)
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False


# --- numbers that are not finite ------------------------------------------------------------------


class NonFinite(InputError):
    """A loss or gradient was NaN or infinite; `record` has what there is to find out why."""

    def __init__(self, record: dict[str, Any], advice: str) -> None:
        terms = ", ".join(f"{name} {value:.4g}" for name, value in record["terms"].items())
        what = "loss" if record["loss_is_not_finite"] else "gradient"
        super().__init__(
            f"the {what} is not finite at epoch {record['epoch']}, step {record['step']} "
            f"({terms}); {advice}"
        )
        self.record = record


class Step(NamedTuple):
    """What is known of a step until its numbers have been looked at."""

    epoch: int
    step: int
    index: Tensor
    terms: dict[str, Tensor]
    rates: dict[str, float]
    finite: Tensor


class Watch:
    """Looks whether losses and gradients are finite.

    On a CPU after every step; on a GPU, which would have to be waited for, every
    `CHECK_EVERY_ON_GPU` steps and before anything is saved, unless bad steps are to be skipped.

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
        """Notes a step; whether it counts, as far as that is known now.

        Raises:
            NonFinite: it, or one before it, was not finite.
        """
        self._unseen.append(step)
        if self.careful or len(self._unseen) == CHECK_EVERY_ON_GPU:
            return self.check()
        return True

    def check(self) -> bool:
        """Looks at the steps since the last look; False if one was skipped. Raises NonFinite."""
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


# --- collapse -------------------------------------------------------------------------------------


class CollapseWarning:
    """Says once, in plain words, that a network gives all classes the same embedding."""

    def __init__(self) -> None:
        self.said = False
        self._before: float | None = None

    def look(self, embeddings: Tensor, labels: Tensor, recall: float) -> None:
        """Embeddings (N, d), labels (N,) and R@1 of an evaluation.

        Embeddings that are all zero, or all the same, have collapsed whatever R@1 is. Directions
        that lie close together are common at the beginning, and harmless while they find far more
        than chance would, or more than they did before: they are no collapse in the first
        evaluation, nor while R@1 rises.
        """
        before, self._before = self._before, recall
        if self.said:
            return
        seen = without_difference(embeddings)
        rises = before is None or recall > before
        if not seen and not rises and recall <= FOUND * chance(labels):
            cosine = class_mean_cosine(embeddings, labels)
            if cosine > COLLAPSED:
                seen = (
                    f"the mean cosine between classes is {cosine:.3f}, so it gives all of them "
                    "nearly the same embedding"
                )
        if seen:
            self.said = True
            logger.warning(
                "the network has collapsed: %s; lower --lr, or give a pair loss more classes per "
                "batch (--IPC)",
                seen,
            )


def chance(labels: Tensor) -> float:
    """R@1 of random embeddings: the share of pairs (N,) that are of one class."""
    counts = torch.bincount(labels).double()
    pairs = max(1, len(labels) * (len(labels) - 1))
    return float((counts * (counts - 1)).sum() / pairs)


def without_difference(embeddings: Tensor) -> str:
    """What is wrong with embeddings (N, d) that tell no image from another; "" if they do."""
    if not embeddings.any():
        return "all embeddings are zero"
    first = directions(embeddings[:1])
    same = all(  # seldom goes beyond the first part
        (directions(part) - first).abs().max() <= ROUNDING for part in embeddings.split(1024)
    )
    return "all embeddings point the same way" if same and len(embeddings) > 1 else ""


def directions(embeddings: Tensor) -> Tensor:
    """Embeddings (N, d) at unit length, (N, d + 1); zeros, which have no direction, share one."""
    largest = embeddings.abs().amax(dim=1, keepdim=True)
    zeros = (largest == 0).to(embeddings)
    return torch.cat([F.normalize(embeddings / (largest + zeros)), zeros], dim=1)


def class_mean_cosine(embeddings: Tensor, labels: Tensor) -> float:
    """Mean cosine between the mean directions of two different classes; 0 for one class."""
    classes, inverse = labels.to(embeddings.device).unique(return_inverse=True)
    if len(classes) < 2:
        return 0.0
    units = directions(embeddings)
    sums = units.new_zeros(len(classes), units.shape[1])
    means = F.normalize(sums.index_add(0, inverse, units))
    total, own = means.sum(dim=0).square().sum(), means.square().sum()
    return float((total - own) / (len(classes) * (len(classes) - 1)))


# --- memory ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def memory_in_words(batch_size: int, image_size: int) -> Iterator[None]:
    """Turns CUDA's out-of-memory error, and the death of what reads images, into a sentence.

    torch tells of such a death wherever the program stands, not only where a batch is asked for.

    Raises:
        InputError: the GPU's memory is full, or a process that reads images died.
    """
    full = (
        f"the GPU's memory is full with --batch-size {batch_size} at {image_size} "
        "pixels; give a --micro-batch, lower --batch-size or --image-size, use --amp bf16 or "
        "--cuda-graphs 0, or keep the data off the GPU (--data-device cpu)"
    )
    with deaths_told(), full_gpu_in_words(full):
        yield
