"""Images per second of our training loop against the plain published way, in one run.

    python benchmarks/training.py [--models bn_inception resnet50] [--batches 20] [--repeats 3]

Both sides train the same network on the same embedded pictures, from the same start, with the same
loss (Proxy-Anchor) and batch size, from stored picture to updated weights. The plain way is what
the published codes do: float32, contiguous memory, each image opened with PIL and transformed by
torchvision, a DataLoader with one worker per core, BatchNorm and convolution as separate modules.
Ours is `train.step` with train.py's defaults. Rounds of the two alternate, so that a change of
the machine's speed hits both; the table has the medians.
"""

from __future__ import annotations

import argparse
import io
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import door

door.settle_threads(os.environ)  # as every command does, before torch is loaded

import torch
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import losses
import net
import options
import train
from benchmarks.plain import modules_one_by_one
from dataset.base import ImageSet
from devices import device_name


class PngFiles(Dataset):
    """The pictures as encoded files, opened and transformed one by one."""

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


def plain_transform(size: int, spec: net.InputSpec) -> transforms.Compose:
    """Random affine and colour on PIL images, then a normalised tensor."""
    steps = [
        transforms.RandomAffine(10, translate=(0.08, 0.08), scale=(0.75, 1.2), fill=255),
        transforms.ColorJitter(0.3, 0.3, 0.3, 0.1),
        transforms.RandomGrayscale(0.3),
        transforms.Resize((size, size)),
        transforms.ToTensor(),
        transforms.Lambda(_BgrScaled(spec)) if spec.color == "BGR" else nn.Identity(),
        transforms.Normalize(spec.mean, spec.std),
    ]
    return transforms.Compose(steps)


class _BgrScaled:
    """Blue first, in 0..255, as BN-Inception's weights want it."""

    def __init__(self, spec: net.InputSpec) -> None:
        self.scale = spec.scale

    def __call__(self, image: torch.Tensor) -> torch.Tensor:
        return image.flip(0) * self.scale


class PlainWay:
    """The published loop."""

    def __init__(self, args: argparse.Namespace, images: ImageSet, device: torch.device) -> None:
        self.network = net.build(
            net.Architecture(
                args.model, args.embedding_size, stem=args.stem, bn_freeze=args.bn_freeze
            )
        )
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
        files = PngFiles(images, plain_transform(args.image_size, self.network.input))
        loader = DataLoader(
            files,
            args.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=torch.get_num_threads(),
            persistent_workers=True,
            pin_memory=device.type == "cuda",
        )
        self.batches = _endless(loader)

    def step(self) -> None:
        """One step, with the network's modules called one by one."""
        images, labels = next(self.batches)
        images, labels = images.to(self.device), labels.to(self.device)
        with modules_one_by_one():
            loss = self.criterion(self.network(images).embedding, labels)
        self.optimiser.zero_grad()
        loss.backward()
        for parameters in (self.network.parameters(), self.criterion.parameters()):
            torch.nn.utils.clip_grad_value_(parameters, 10)
        self.optimiser.step()
        loss.item()


def _endless(loader: DataLoader) -> Iterator:
    while True:
        yield from loader


class OurWay:
    """train.py's loop."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.training = train.prepare(args)
        self.training.network.freeze_backbone(False)
        self.training.network.train()
        self.batches = self._endless()

    def _endless(self) -> Iterator:
        epoch = 0
        while True:
            self.training.loader.set_epoch(epoch)
            yield from self.training.loader
            epoch += 1

    def step(self) -> None:
        """One step; the loss is read, as the progress bar does."""
        float(train.step(self.training, next(self.batches))["loss"])


def seconds(step: Callable[[], None], batches: int, device: torch.device) -> float:
    """Time of so many steps."""
    start = time.perf_counter()
    for _ in range(batches):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(model: str, size: int, batch: int, freeze: str, given: argparse.Namespace) -> list[str]:
    """One row: images/s of both ways and their ratio."""
    command = f"--model {model} --stem {given.stem} --image-size {size} --batch-size {batch} "
    command += f"--bn-freeze {freeze} --pretrained none --warm 0 --wandb disabled"
    command += " --compile" * given.compile
    args = options.parse_train([*command.split(), "--data-root", str(ROOT / "data")])
    ours = OurWay(args)
    device = ours.training.precision.device
    plain = PlainWay(args, ours.training.data.train, device)
    for way in (plain, ours):
        seconds(way.step, 3, device)
    taken: dict[str, list[float]] = {"plain": [], "ours": []}
    for _ in range(given.repeats):
        taken["plain"].append(seconds(plain.step, given.batches, device))
        taken["ours"].append(seconds(ours.step, given.batches, device))
    images = given.batches * batch
    rate = {name: images / statistics.median(times) for name, times in taken.items()}
    norm = {"0": "trained", "1": "frozen"}[freeze]
    cells = [model, f"{size}", f"{batch}", norm, f"{rate['plain']:.0f}", f"{rate['ours']:.0f}"]
    return [*cells, f"{rate['ours'] / rate['plain']:.2f} ×"]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["bn_inception"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64])
    parser.add_argument("--stem", default="imagenet", help="the published first layers")
    parser.add_argument("--batch-size", type=int, default=150)
    parser.add_argument("--bn-freeze", nargs="+", default=["0", "1"], choices=["0", "1"])
    parser.add_argument("--compile", action="store_true", help="ours with --compile")
    parser.add_argument("--batches", type=int, default=6, help="steps a round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median counts")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{device_name(device)}, torch {torch.__version__}\n")
    print("| network | pixels | batch | BatchNorm | plain, images/s | ours, images/s | ratio |")
    print("|---|---|---|---|---|---|---|")
    for model in given.models:
        for size in given.sizes:
            for freeze in given.bn_freeze:
                row = measure(model, size, given.batch_size, freeze, given)
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
