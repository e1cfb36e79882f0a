"""Images per second from JPEG files to normalised batches, in one table.

    python benchmarks/data.py                        # 4,000 training images, medians of 3
    python benchmarks/data.py --images 400 --memory-images 3000 --repeats 1      # does it run?

Four ways of feeding a network with 224-pixel random crops of 500×375 photographs (generated, of
CUB's file size, in the folders of CUB-200-2011), one worker per core: (a) the pipeline of the
published codes, (b) `--decode exact`, (c) `--decode cache`, (d) the same with `--data-device cuda`,
if there is a GPU. Each round runs a whole epoch of every way, with the start of its workers, so
that changes of the machine's speed affect all; the table has the medians. The files are in the page
cache, so no disk is measured. Below the table: the time that short epochs of (b) keep a consumer
waiting, with and without reading ahead; the growth of a worker's memory while it reads many images;
and on a GPU, the share of a ResNet-18's training (bf16) that is spent waiting for (d).
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import door

door.settle_threads(os.environ)  # as every command does, before torch is loaded

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

import dataset
import net
from benchmarks.measuring import wait
from dataset.base import ImageSet, PathTable
from dataset.cache import open_cache
from dataset.loader import Loader, eval_loader, train_loader
from dataset.reading import FROM_FILES, Reading
from dataset.samplers import make_sampler
from devices import device_name
from flags import whole
from utils import sentence_errors

SPEC = net.INPUTS["imagenet"]
CLASSES = 200
WIDTH, HEIGHT = 500, 375

# --- the photographs ------------------------------------------------------------------------------


@lru_cache
def canvas(side: int = 1600) -> np.ndarray:
    """(side, side, 3) uint8 noise with the spectrum of photographs, 1/frequency."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side)[None])
    frequency[0, 0] = 1
    spectrum = np.fft.rfft2(rng.standard_normal((3, side, side))) / frequency**1.1
    noise = np.fft.irfft2(spectrum, s=(side, side)).transpose(1, 2, 0)
    return np.clip(127 + 50 * noise / noise.std(), 0, 255).astype(np.uint8)


def write_class(folder: Path, images: int, number: int) -> None:
    """One class folder of JPEG files, each a window of the canvas."""
    name = f"{number + 1:03d}.Class_{number + 1}"
    (folder / name).mkdir(parents=True)
    rng = np.random.default_rng(number)
    for image in range(images):
        top, left = rng.integers(canvas().shape[0] - np.array([HEIGHT, WIDTH]))
        window = Image.fromarray(canvas()[top : top + HEIGHT, left : left + WIDTH])
        window.save(folder / name / f"Photo_{image:04d}_{number}.jpg", quality=90)


def make_photographs(root: Path, training_images: int) -> ImageSet:
    """CUB-200-2011's folders under `root`, with equal numbers of training and test images."""
    folder = root / "CUB_200_2011" / "images"
    with multiprocessing.Pool() as pool:
        pool.map(
            partial(write_class, folder, -(-training_images * 2 // CLASSES)), range(CLASSES), 8
        )
    logging.getLogger("dataset").setLevel(logging.ERROR)  # the counts are not CUB's, and may not be
    return dataset.load("cub", root, "train")


# --- the ways -------------------------------------------------------------------------------------


class PublishedDataset(Dataset):
    """Files and labels in lists; each item is opened with PIL and transformed by torchvision."""

    def __init__(self, images: ImageSet, transform: Callable | None) -> None:
        self.files = list(images.paths)
        self.labels = images.labels.tolist()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        image = Image.open(self.files[index]).convert("RGB")
        return self.transform(image), self.labels[index]


def published(images: ImageSet, args: argparse.Namespace) -> DataLoader:
    """The usual pipeline."""
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(SPEC.size),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize(SPEC.mean, SPEC.std),
        ]
    )
    return DataLoader(
        PublishedDataset(images, transform),
        batch_size=args.batch_size,
        shuffle=True,
        num_workers=args.workers,
        drop_last=True,
        pin_memory=args.device.type == "cuda",
    )


def ours(images: ImageSet, args: argparse.Namespace, reading: Reading = FROM_FILES) -> Loader:
    """A new loader of ours; starting its workers is part of every measurement."""
    return train_loader(
        images,
        make_sampler(images.labels, args.batch_size),
        augment="crop",
        spec=SPEC,
        device=args.device,
        workers=args.workers,
        seed=0,
        reading=reading,
    )


def images_per_second(batches: Iterable, device: torch.device) -> float:
    """Speed of one epoch; the batches end on the device."""
    start, images = time.perf_counter(), 0
    for pixels, labels, *_ in batches:
        pixels, labels = (each.to(device, non_blocking=True) for each in (pixels, labels))
        images += len(labels)
    wait(device)
    return images / (time.perf_counter() - start)


def measure(images: ImageSet, args: argparse.Namespace, cache_dir: Path) -> dict[str, float]:
    """Median images per second of each way."""
    cache = Reading("cache", cache_dir=cache_dir)
    ways: dict[str, Callable[[], Iterable]] = {
        "(a) PIL + torchvision, as published": lambda: published(images, args),
        "(b) exact": lambda: ours(images, args),
        "(c) cache, CPU": lambda: ours(images, args, cache),
    }
    if args.device.type == "cuda":
        resident = ours(images, args, replace(cache, data_device="cuda"))
        ways["(d) cache, GPU"] = lambda: resident
    speeds: dict[str, list[float]] = {title: [] for title in ways}
    for _ in range(args.repeats):
        for title, make in ways.items():
            speeds[title].append(images_per_second(make(), args.device))
    return {title: statistics.median(values) for title, values in speeds.items()}


def print_table(speeds: dict[str, float]) -> None:
    """Speeds and their ratio to the first."""
    print("| way | images/s | ratio |")
    print("|---|---:|---:|")
    published_speed = next(iter(speeds.values()))
    for title, speed in speeds.items():
        print(f"| {title} | {speed:,.0f} | {speed / published_speed:.2f} |")


# --- memory of a worker ---------------------------------------------------------------------------

READ_AT_ONCE = 20  # images


def many_images(folder: Path, count: int) -> ImageSet:
    """`count` names of one small picture."""
    folder.mkdir()
    first = folder / "0.jpg"
    Image.fromarray(canvas()[:16, :16]).save(first)
    names = [f"a_long_name_as_the_benchmarks_have_them_{number:06d}.jpg" for number in range(count)]
    for name in names:
        os.link(first, folder / name)
    labels = np.arange(count) // 5
    class_names = tuple(map(str, range(labels[-1] + 1)))
    return ImageSet("many", "train", labels, class_names, PathTable(names, f"{folder}{os.sep}"))


def private_megabytes() -> float:
    """The private memory of a worker, in MB: the mean over workers."""
    sizes = []
    for worker in multiprocessing.active_children():
        lines = Path(f"/proc/{worker.pid}/smaps_rollup").read_text().splitlines()
        private = [line.split() for line in lines if line.startswith("Private")]
        sizes.append(sum(int(words[1]) for words in private) / 1024)
    return statistics.mean(sizes)


def growth(batches: Iterable, length: int) -> float:
    """Megabytes by which a worker grows between the first tenth of an epoch and its end."""
    sizes = []
    for number, _ in enumerate(batches, 1):
        if number in (length // 10, length - 2):
            sizes.append(private_megabytes())
    return sizes[1] - sizes[0]


def print_memory(folder: Path, args: argparse.Namespace) -> None:
    """Growth of a worker that reads every image once: ours, and lists of Python objects."""
    images = many_images(folder / "many", args.memory_images)
    loader = eval_loader(
        images,
        spec=SPEC,
        batch_size=READ_AT_ONCE,
        device=torch.device("cpu"),
        workers=2,
        image_size=16,
    )
    grown = growth(loader, len(loader))
    plain = DataLoader(PublishedDataset(images, transforms.ToTensor()), READ_AT_ONCE, num_workers=2)
    grown_plain = growth(plain, len(plain))
    print(
        f"\nA worker that reads {len(images):,} images grows by {grown:.1f} MB; with paths and "
        f"labels in Python lists by {grown_plain:.1f} MB."
    )


# --- waiting where an epoch begins ----------------------------------------------------------------

EPOCHS, BATCHES = 5, 10


def print_turns(images: ImageSet, args: argparse.Namespace) -> None:
    """Prints how long (b) keeps a consumer waiting, in short epochs, that is half as fast."""
    few = images.subset(np.arange(min(len(images), BATCHES * args.batch_size)))
    pace = 2 * seconds_of(ours(few, args), epochs=2)[0] / len(few)
    waits = []
    for until in (0, EPOCHS + 1):
        loader = ours(few, args)
        loader.read_ahead(until)
        waits.append(seconds_of(loader, EPOCHS + 1, pace)[1])
    print(
        f"\nWhat uses images half as fast as (b) gives them waits for {waits[0] * 1e3:.0f} ms in "
        f"each epoch of {len(few):,} images; where the next epoch is read ahead, as train.py does, "
        f"for {waits[1] * 1e3:.0f} ms."
    )


def seconds_of(loader: Loader, epochs: int, pace: float = 0.0) -> tuple[float, float]:
    """Seconds of an epoch, and those spent waiting: means without the first epoch.

    Args:
        pace: seconds that the consumer needs for each image.
    """
    taken, waited = [], []
    for epoch in range(epochs):
        loader.set_epoch(epoch)
        start = time.perf_counter()
        for batch in loader:
            time.sleep(pace * len(batch.labels))
        taken.append(time.perf_counter() - start)
        waited.append(loader.wait_seconds())
    return statistics.mean(taken[1:]), statistics.mean(waited[1:])


# --- waiting on a GPU -----------------------------------------------------------------------------


def print_waiting(images: ImageSet, args: argparse.Namespace, cache_dir: Path) -> None:
    """Prints the speed of a ResNet-18 that trains on (d), and the share of time spent waiting."""
    network = net.build(net.Architecture("resnet18", 512)).to(
        args.device, memory_format=torch.channels_last
    )
    optimiser = torch.optim.SGD(network.parameters(), lr=1e-4)
    loader = ours(images, args, Reading("cache", cache_dir=cache_dir, data_device="cuda"))
    for epoch in range(2):  # the first one warms up
        wait(args.device)
        loader.set_epoch(epoch)
        start, seen = time.perf_counter(), 0
        for batch in loader:
            with torch.autocast("cuda", torch.bfloat16):
                loss = network(batch.images).embedding.square().mean()
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
            seen += len(batch.labels)
        wait(args.device)
        seconds = time.perf_counter() - start
    print(
        f"\nResNet-18 in bf16 trains on (d) at {seen / seconds:,.0f} images/s and waits for data "
        f"{loader.wait_seconds() / seconds:.1%} of the time."
    )


def main() -> None:
    """Generates the files, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=whole(2), default=4000, help="training images")
    parser.add_argument(
        "--memory-images",
        type=whole(10 * READ_AT_ONCE),
        default=60_000,
        help="for the memory's growth",
    )
    parser.add_argument("--batch-size", type=whole(2), default=120)
    parser.add_argument("--workers", type=whole(0), default=os.cpu_count())
    parser.add_argument("--repeats", type=whole(1), default=3)
    args = parser.parse_args()
    args.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        images = make_photographs(root, args.images)
        start = time.perf_counter()
        cache = open_cache(images, folder=root / "cache")
        built = time.perf_counter() - start
        size = sum(Path(path).stat().st_size for path in images.paths) / len(images) / 1000
        print(
            f"{len(images):,} JPEG files of {WIDTH}×{HEIGHT} ({size:.0f} kB), "
            f"{SPEC.size}-pixel crops, batches of {args.batch_size}, {args.workers} workers, "
            f"{device_name(args.device)}; building the cache ran at {len(cache) / built:,.0f} "
            "images/s\n"
        )
        print_table(measure(images, args, root / "cache"))
        print_turns(images, args)
        print_memory(root, args)
        if args.device.type == "cuda":
            print_waiting(images, args, root / "cache")


if __name__ == "__main__":
    with sentence_errors():
        main()
