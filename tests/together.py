"""Runs a function in several processes that train together, forked from the test's own.

And what they are compared by: what a few steps of a training have learnt.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
from collections.abc import Callable, Iterator
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch

import dataset.loader
import processes
import train
from dataset.samplers import BatchSampler
from processes.meeting import open_store

HANGS = 100  # seconds after which a process says where it stands, and ends


def run(
    count: int, work: Callable[[], Any], folder: Path, *, local_ranks: bool = True
) -> list[Any]:
    """What `work()` returned in each of `count` processes, as torch.save keeps it.

    Args:
        local_ranks: whether the launcher sets LOCAL_RANK, as torchrun does.
    """
    context = multiprocessing.get_context("fork")  # spares the children torch's long import
    port = context.SimpleQueue()
    children = [
        context.Process(target=_join, args=(number, count, port, work, folder, local_ranks))
        for number in range(count)
    ]
    for child in children:
        child.start()
    # Not before: its thread may just hold a lock of the C library's (of looking up addresses, say),
    # and a child that is forked then waits for that lock for ever.
    store = open_store("127.0.0.1")
    for _ in children:
        port.put(store.port)
    for child in children:
        child.join(HANGS + 10)
    statuses = [child.exitcode for child in children]
    assert statuses == [0] * count, f"the processes ended with {statuses}"
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(count)]


def _join(
    number: int,
    count: int,
    port: SimpleQueue,
    work: Callable[[], Any],
    folder: Path,
    local_ranks: bool,
) -> None:
    faulthandler.dump_traceback_later(HANGS, exit=True)
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count)}
    if local_ranks:
        os.environ["LOCAL_RANK"] = str(number)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.get())}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(1)
    with processes.joined():
        torch.save(work(), folder / f"{number}.pt")


# --- what a few steps have learnt -----------------------------------------------------------------


class Uneven(BatchSampler):
    """Batches of random images, of these sizes."""

    def __init__(self, images: int, sizes: tuple[int, ...]) -> None:
        super().__init__(images, sizes[0])
        self.sizes = sizes

    def __len__(self) -> int:
        return len(self.sizes)

    def draw(self, epoch: int) -> Iterator[tuple[np.ndarray, int | None]]:
        rng = self.generator(epoch)
        for size in self.sizes:
            yield rng.permutation(self.images)[:size], None


def five_steps(images: Path, flags: str, sizes: tuple[int, ...] = (12, 12, 11, 12, 7)) -> dict:
    """Losses and all that was learnt after five steps, the last batch smaller than the others.

    Divide and conquer trains an epoch with two clusters (four batches), then one with four: both
    divisions come from the embeddings of the training images.
    """
    training = tiny.prepare(images, f"--warm 0 --amp off {flags}")
    if torch.Tensor.float is torch.Tensor.double:
        training.network.double()
        training.objective.double()
    if training.options["nb_clusters"] is None:
        training.loader.set_sampler(Uneven(len(training.data.train), sizes))
    else:
        training.clock.epoch = 1
    losses: list[float] = []
    while len(losses) < 5:
        batches = train.rest_of_epoch(training)
        training.network.train()
        for batch in batches:
            losses.append(float(train.step(training, batch)["loss"]))
            if len(losses) == 5:
                break
        clock, training.batches = training.clock, None
        clock.epoch, clock.step_in_epoch, clock.begun = clock.epoch + 1, 0, False
    return {
        "losses": torch.tensor(losses, dtype=torch.float64),
        **{f"network {key}": value for key, value in training.network.state_dict().items()},
        **{f"loss {key}": value for key, value in training.objective.state_dict().items()},
    }


def largest_difference(one: dict, other: dict) -> float:
    """Of all entries: absolute below 1, relative above."""
    assert one.keys() == other.keys()
    differences = (
        (one[key].double() - other[key].double()).abs() / other[key].double().abs().clamp_min(1)
        for key in one
    )
    return max(float(difference.max()) for difference in differences)


def in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets everything be computed in float64."""
    to_network = dataset.loader.to_network
    monkeypatch.setattr(dataset.loader, "to_network", lambda *given: to_network(*given).double())
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
