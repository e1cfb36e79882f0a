"""The training loops that benchmarks/training.py compares: the plain published one, and ours."""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Sampler
from torchvision import transforms

import losses
import net
import train
from benchmarks.data import PublishedDataset
from benchmarks.plain import modules_one_by_one
from dataset.base import ImageSet
from dataset.loader import Batch
from dataset.samplers import BatchSampler, make_sampler
from flags import Options
from training.faults import CHECK_EVERY_ON_GPU

READINGS = {
    "memory": "",  # the embedded pictures, which our loop keeps decoded
    "exact": "--decode exact",
    "cache": "--decode cache --cache-dir {folder}/cache",
    "cuda": "--decode cache --cache-dir {folder}/cache --data-device cuda",
}
"""The source of our loop's pixels → its flags; {folder} is the folder of the data."""


class Way(Protocol):
    """A training loop, from stored picture to updated weights."""

    def begin(self) -> None:
        """Starts the workers, and discards the batches that they have prepared."""

    def step(self) -> None:
        """One step."""

    def waited(self) -> float:
        """Seconds that its steps have waited for data since `begin`."""

    def end(self) -> None:
        """Stops the workers, so that the other loop has the machine for itself."""


class Ran(NamedTuple):
    """Seconds of some steps.

    Attributes:
        seconds: until the last is done. asked: until the host had queued all work of the last.
        waited: for data, in all of them. steps: of each.
    """

    seconds: float
    asked: float
    waited: float
    steps: list[float]


def run(way: Way, batches: int, device: torch.device) -> Ran:
    """Runs `batches` steps; on a GPU a step lasts from the end of the one before it."""
    on_gpu = device.type == "cuda"

    def now() -> torch.cuda.Event | float:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    waited = way.waited()
    start, times = time.perf_counter(), [now()]
    for _ in range(batches):
        way.step()
        times.append(now())
    asked = time.perf_counter() - start
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - start
    steps = [a.elapsed_time(b) / 1e3 if on_gpu else b - a for a, b in pairwise(times)]
    return Ran(seconds, asked, way.waited() - waited, steps)


# --- the published loop ---------------------------------------------------------------------------


class EncodedPictures(PublishedDataset):
    """Encoded files in memory, each of them opened and transformed."""

    def __init__(self, images: ImageSet, transform: Callable) -> None:
        super().__init__(images, transform)
        self.files = [_encoded(picture) for picture in images.pixels]


def _encoded(picture: np.ndarray) -> io.BytesIO:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer


def plain_transform(drawings: bool, size: int, spec: net.InputSpec) -> transforms.Compose:
    """Transforms from a PIL image to a normalised tensor.

    They are affine and colour for drawings, crop and flip for photographs.
    """
    for_drawings = [
        transforms.RandomAffine(10, translate=(0.08, 0.08), scale=(0.75, 1.2), fill=255),
        transforms.ColorJitter(0.3, 0.3, 0.3, 0.1),
        transforms.RandomGrayscale(0.3),
        transforms.Resize((size, size)),
    ]
    for_photographs = [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip()]
    return transforms.Compose(
        [
            *(for_drawings if drawings else for_photographs),
            transforms.ToTensor(),
            transforms.Lambda(_BgrScaled(spec)) if spec.color == "BGR" else nn.Identity(),
            transforms.Normalize(spec.mean, spec.std),
        ]
    )


class _BgrScaled:
    """BGR in 0..255, as BN-Inception's weights need it."""

    def __init__(self, spec: net.InputSpec) -> None:
        self.scale = spec.scale

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image.flip(0) * self.scale


class _ForEver(Sampler):
    """Endless shuffled epochs, so that no round contains the start of an epoch."""

    def __init__(self, images: int) -> None:
        self.images = images

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.images).tolist()


class PlainWay:
    """The published loop: float32, contiguous memory, PIL and torchvision, modules one by one."""

    PREFETCHED = 2  # batches for each worker, DataLoader's default

    def __init__(self, args: Options, images: ImageSet, device: torch.device) -> None:
        self.network = net.build(net.Architecture(**net.Architecture.entries(vars(args))))
        self.network.to(device).freeze_backbone(False)
        self.criterion = losses.ProxyAnchorLoss(images.num_classes, args.embedding_size).to(device)
        self.optimiser = torch.optim.AdamW(
            [
                {"params": self.network.parameters(), "lr": args.lr},
                {"params": self.criterion.parameters(), "lr": 100 * args.lr},
            ],
            weight_decay=args.weight_decay,
        )
        self.device = device
        self._waited = 0.0
        drawings = images.pixels is not None
        transform = plain_transform(drawings, args.image_size, self.network.input)
        files = (EncodedPictures if drawings else PublishedDataset)(images, transform)
        self.loader = DataLoader(
            files,
            args.batch_size,
            sampler=_ForEver(len(files)),
            num_workers=args.workers,
            pin_memory=device.type == "cuda",
        )
        self.ahead = self.PREFETCHED * args.workers
        self.batches: Iterator | None = None

    def begin(self) -> None:
        """Starts the workers, and takes what they have made ahead."""
        self.batches = iter(self.loader)
        for _ in range(self.ahead):
            next(self.batches)

    def step(self) -> None:
        """One step, in which the loss is read, as in the published loops."""
        start = time.perf_counter()
        images, labels = next(self.batches)
        self._waited += time.perf_counter() - start
        images, labels = images.to(self.device), labels.to(self.device)
        with modules_one_by_one():
            loss = self.criterion(self.network(images).embedding, labels)
        self.optimiser.zero_grad()
        loss.backward()
        for parameters in (self.network.parameters(), self.criterion.parameters()):
            torch.nn.utils.clip_grad_value_(parameters, 10)
        self.optimiser.step()
        loss.item()

    def waited(self) -> float:
        """The time that the host has waited; its GPU is idle then, because the loss was read."""
        return self._waited

    def end(self) -> None:
        """Stops the workers."""
        self.batches = None


# --- ours -----------------------------------------------------------------------------------------


class _OneEpoch(BatchSampler):
    """All epochs of a sampler as one, which lasts until it is `over`; see `_ForEver`.

    Attributes:
        drawn: the number of the sampler's epochs that were begun.
    """

    def __init__(self, sampler: BatchSampler) -> None:
        super().__init__(sampler.images, sampler.batch_size, sampler.seed)
        self.sampler = sampler
        self.drawn = 0
        self.over = False

    def __len__(self) -> int:
        return len(self.sampler)

    def draw(self, epoch: int) -> Iterator[tuple[np.ndarray, int | None]]:
        """See `BatchSampler.draw`."""
        while True:
            self.drawn += 1
            for batch in self.sampler.draw(self.drawn - 1):
                if self.over:
                    return
                yield batch


class OurWay:
    """train.py's loop."""

    AHEAD = 2  # batches for each worker, as in a DataLoader

    def __init__(self, args: argparse.Namespace) -> None:
        self.training = train.prepare(args)
        self.training.network.freeze_backbone(False)
        self.training.network.train()
        in_memory = self.training.data.train.pixels is not None or args.data_device == "cuda"
        self.ahead = 0 if in_memory else self.AHEAD * args.workers
        self.sampler = _OneEpoch(
            make_sampler(
                self.training.data.train.labels,
                args.batch_size,
                instances=args.IPC,
                repeat=bool(args.IPC_repeat),
                seed=args.seed,
            )
        )
        self.training.loader.set_sampler(self.sampler)
        self.batches: Iterator[Batch] | None = None

    def begin(self) -> None:
        """Starts the workers, and takes what they have made ahead."""
        self.batches = iter(self.training.loader)
        for _ in range(self.ahead):
            next(self.batches)

    def step(self) -> None:
        """One step; the loss is read as often as by the progress bar."""
        batch = next(self.batches)
        loss = train.step(self.training, batch)["loss"]
        on_cpu = self.training.precision.device.type == "cpu"
        if on_cpu or self.training.clock.step % CHECK_EVERY_ON_GPU == 0:
            float(loss)

    def waited(self) -> float:
        """The seconds as in metrics.csv: those of the GPU, if there is one."""
        return self.training.loader.wait_seconds()

    def end(self) -> None:
        """Takes the batches that the workers have begun, after which they have no work."""
        self.sampler.over = True
        for _ in self.batches:
            pass
        self.sampler.over = False
