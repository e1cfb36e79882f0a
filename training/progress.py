"""The progress bar of a run on a terminal, and the estimate of how long it will take."""

from __future__ import annotations

import torch

import processes
from bars import Bar
from dataset.loader import Batch
from terminal import say
from training.faults import CHECK_EVERY_ON_GPU
from training.state import Training
from utils import human_seconds

WORTH_A_LINE = 30.0  # seconds


def progress_bar(training: Training) -> Bar:
    """A bar over the images that the run uses in this epoch; invisible if there is no terminal."""
    clock, size, steps = training.clock, training.viewing.batch_size, len(training.loader)
    last = clock.step_in_epoch + training.length.steps_left(clock, steps)
    return Bar(
        " ".join(training.length.place(clock.epoch + 1, clock.step).split()),
        min(steps, last) * size,
        initial=clock.step_in_epoch * size,
        speaks=processes.is_main(),
    )


def show(
    bar: Bar, training: Training, batch: Batch, values: dict[str, torch.Tensor] | None
) -> None:
    """Moves the bar one step; on a GPU it seldom shows the loss, because reading that waits."""
    on_cpu = training.precision.device.type == "cpu"
    if values is not None and (on_cpu or training.clock.step % CHECK_EVERY_ON_GPU == 0):
        bar.set_postfix(loss=f"{float(values['loss']):.4g}", refresh=False)
    bar.update(len(batch.labels))


def print_estimate(bar: Bar, training: Training, seconds: float) -> None:
    """Prints once how long the run will take, if that is more than `WORTH_A_LINE`.

    Args:
        seconds: the last step took, including the wait for its images.
    """
    estimate, device = training.estimate, training.precision.device
    steps = training.length.steps_left(training.clock, len(training.loader))
    rest = estimate.after(seconds, steps)
    if estimate.waits and device.type == "cuda":
        torch.cuda.synchronize(device)
    if rest is not None and rest > WORTH_A_LINE and processes.is_main():
        bar.clear()
        say(f"about {human_seconds(rest)} of training to go, by the first steps", flush=True)
