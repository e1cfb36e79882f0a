"""The line that moves on a terminal while a run trains."""

from __future__ import annotations

import torch

import processes
from bars import Bar
from dataset.loader import Batch
from terminal import say
from training.faults import CHECK_EVERY_ON_GPU
from training.state import Training
from utils import human_seconds

WORTH_A_WORD = 30.0  # seconds


def progress_bar(training: Training) -> Bar:
    """A bar over the images of the running epoch; nothing off a terminal."""
    clock, size = training.clock, training.viewing.batch_size
    return Bar(
        " ".join(training.length.place(clock.epoch + 1, clock.step).split()),
        len(training.loader) * size,
        initial=clock.step_in_epoch * size,
        speaks=processes.is_main(),
    )


def show(
    bar: Bar, training: Training, batch: Batch, values: dict[str, torch.Tensor] | None
) -> None:
    """One step on; on a GPU the loss is read only now and then, because reading it waits."""
    on_cpu = training.precision.device.type == "cpu"
    if values is not None and (on_cpu or training.clock.step % CHECK_EVERY_ON_GPU == 0):
        bar.set_postfix(loss=f"{float(values['loss']):.4g}", refresh=False)
    bar.update(len(batch.labels))


def tell_time(bar: Bar, training: Training, seconds: float) -> None:
    """Says once how long the run will take, where that is worth a word.

    Args:
        seconds: of the last step, the wait for its images included.
    """
    estimate, device = training.estimate, training.precision.device
    steps = training.length.steps_left(training.clock, len(training.loader))
    rest = estimate.after(seconds, steps)
    if estimate.waits and device.type == "cuda":
        torch.cuda.synchronize(device)
    if rest is not None and rest > WORTH_A_WORD and processes.is_main():
        bar.clear()
        say(f"about {human_seconds(rest)} of training to go, by the first steps", flush=True)
