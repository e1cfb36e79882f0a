"""The training loops that benchmarks/training.py compares: the plain published one, and ours."""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision import transforms

import losses
import net
import train
from benchmarks.data import PublishedDataset
from benchmarks.plain import modules_one_by_one
from dataset.base import ImageSet
from dataset.loader import Batch
from methods.base import Options
from training.faults import CHECK_EVERY_ON_GPU

READINGS = {
    "memory": "",  # the embedded pictures, which ours holds decoded
    "exact": "--decode exact",
    "cache": "--decode cache --cache-dir {folder}/cache",
    "cuda": "--decode cache --cache-dir {folder}/cache --data-device cuda",
}
"""Where ours takes its pixels from, and the flags that say so; {folder} holds the data."""


class Way(Protocol):
    """A training loop, from stored picture to updated weights.

    Attributes:
        waited: seconds that its steps have waited for data.
    """

    waited: float

    def begin(self) -> None:
        """Starts what reads the data; what it has made ahead of time by then is thrown away."""

    def step(self) -> None:
        """One step."""

    def end(self) -> None:
        """Stops what reads the data, so that the other loop has the machine for itself."""


def run(way: Way, batches: int, device: torch.device) -> tuple[float, float]:
    """Seconds of so many steps: until the last is done, and until the last was asked for."""
    way.waited = 0.0
    start = time.perf_counter()
    for _ in range(batches):
        way.step()
    asked = time.perf_counter() - start
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, asked


# --- the published loop ---------------------------------------------------------------------------


class EncodedPictures(Dataset):
    """Pictures in memory as encoded files, opened and transformed one by one."""

    def __init__(self, images: ImageSet, transform: Callable) -> None:
        self.files = [_encoded(picture) for picture in images.pixels]
        self.labels = images.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture = Image.open(io.BytesIO(self.files[index])).convert("RGB")
        return self.transform(picture), self.labels[index]


def _encoded(picture) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def plain_transform(drawings: bool, size: int, spec: net.InputSpec) -> transforms.Compose:
    """What is done to a PIL image: affine and colour to a drawing, crop and flip to a photograph.

    Then it becomes a normalised tensor.
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
    """Blue first, in 0..255, as BN-Inception's weights want it."""

    def __init__(self, spec: net.InputSpec) -> None:
        self.scale = spec.scale

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image.flip(0) * self.scale


class _ForEver(Sampler):
    """Shuffled epochs without end, so that no round meets the start of one."""

    def __init__(self, images: int) -> None:
        self.images = images

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.images).tolist()


class PlainWay:
    """float32, contiguous, a PIL image and torchvision's transforms an item, single modules."""

    PREFETCHED = 2  # batches for each worker, DataLoader's own choice

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
        self.waited = 0.0
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
        """One step; the loss is read, as the published loops do."""
        start = time.perf_counter()
        images, labels = next(self.batches)
        self.waited += time.perf_counter() - start
        images, labels = images.to(self.device), labels.to(self.device)
        with modules_one_by_one():
            loss = self.criterion(self.network(images).embedding, labels)
        self.optimiser.zero_grad()
        loss.backward()
        for parameters in (self.network.parameters(), self.criterion.parameters()):
            torch.nn.utils.clip_grad_value_(parameters, 10)
        self.optimiser.step()
        loss.item()

    def end(self) -> None:
        """Stops the workers."""
        self.batches = None


# --- ours -----------------------------------------------------------------------------------------


class OurWay:
    """train.py's loop."""

    AHEAD = 2  # batches for each worker, see dataset/loader.py

    def __init__(self, args: argparse.Namespace) -> None:
        self.training = train.prepare(args)
        self.training.network.freeze_backbone(False)
        self.training.network.train()
        self.waited = 0.0
        in_memory = self.training.data.train.pixels is not None or args.data_device == "cuda"
        self.ahead = 0 if in_memory else self.AHEAD * args.workers
        self.epoch = 0
        self.batches: Iterator[Batch] | None = None

    def _endless(self) -> Iterator[Batch]:
        while True:
            self.training.loader.set_epoch(self.epoch)
            self.epoch += 1
            yield from self.training.loader

    def begin(self) -> None:
        """Starts an epoch, and takes what the workers have made ahead."""
        self.batches = self._endless()
        for _ in range(self.ahead):
            next(self.batches)

    def step(self) -> None:
        """One step; the loss is read as often as the progress bar reads it."""
        start = time.perf_counter()
        batch = next(self.batches)
        self.waited += time.perf_counter() - start
        loss = train.step(self.training, batch)["loss"]
        on_cpu = self.training.precision.device.type == "cpu"
        if on_cpu or self.training.clock.step % CHECK_EVERY_ON_GPU == 0:
            float(loss)

    def end(self) -> None:
        """Leaves the epoch where it is; the workers have nothing more to do."""
        self.batches.close()
