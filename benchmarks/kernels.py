"""Microseconds of the Triton kernels, and of torch, on maps of a batch of 180 images.

    python benchmarks/kernels.py [--images 180] [--repeats 20]

bfloat16, channels-last. Each figure is that of a CUDA graph of five calls, so that the time in
which the host starts them does not count: the median of the repeats, divided by five. Needs a GPU.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
from torch import Tensor

import kernels
from benchmarks.measuring import heads, line
from net import fused
from utils import InputError, sentence_errors

CALLS = 5
DEVICE = torch.device("cuda")


class Case(NamedTuple):
    """What is computed, on maps of which shape, by ours and by torch."""

    what: str
    shape: str
    ours: Callable[[], object]
    torch: Callable[[], object]


def maps(images: int, channels: int, side: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(images, channels, side, side), channels-last."""
    drawn = torch.randn(images, channels, side, side, device=DEVICE)
    return drawn.to(dtype, memory_format=torch.channels_last)


def cases(images: int) -> Iterator[Case]:
    """The kernels at sizes of BN-Inception and ResNet-50 at 224 pixels."""
    for channels, side in ((64, 112), (256, 56), (96, 28), (128, 14), (512, 7)):
        yield from after_convolution(images, channels, side)
    yield max_pool(images, 64, 112, padding=1, ceil_mode=False)
    yield max_pool(images, 192, 56, padding=0, ceil_mode=True)
    small, last = maps(images, 128, 14), maps(images, 2048, 7)
    yield Case(
        "average of 3×3",
        "128 × 14 × 14",
        lambda: fused.average_pool(small),
        lambda: F.avg_pool2d(small, 3, 1, 1),
    )
    yield Case(
        "average + maximum of whole maps",
        "2048 × 7 × 7",
        lambda: fused.pool(last, average=True, maximum=True),
        lambda: F.adaptive_avg_pool2d(last.float(), 1) + F.adaptive_max_pool2d(last.float(), 1),
    )
    pixels, weight = maps(images, 3, 224, torch.float32), maps(64, 3, 7)
    yield Case(
        "first convolution, 7×7",
        "3 × 224 × 224",
        lambda: fused.stem(pixels, weight),
        lambda: F.conv2d(pixels.bfloat16(), weight, None, 2, 3),
    )


def after_convolution(images: int, channels: int, side: int) -> Iterator[Case]:
    """What follows a convolution whose BatchNorm is folded into it, and its backward pass."""
    x, shortcut = maps(images, channels, side), maps(images, channels, side)
    gradient, out = maps(images, channels, side), maps(images, channels, side).relu()
    bias = torch.randn(channels, device=DEVICE)
    half = bias.bfloat16()[:, None, None]
    shape = f"{channels} × {side} × {side}"
    yield Case(
        "bias, ReLU",
        shape,
        lambda: fused.add_bias(x, bias, relu=True),
        lambda: F.relu(x.add_(half), inplace=True),
    )
    yield Case(
        "bias, shortcut, ReLU",
        shape,
        lambda: fused.add_bias(x, bias, shortcut, relu=True),
        lambda: F.relu(x.add_(half) + shortcut, inplace=True),
    )
    yield Case(
        "gradients of ReLU and bias",
        shape,
        lambda: fused.gradients_of_bias(gradient, out, relu=True),
        lambda: torch.ops.aten.threshold_backward(gradient, out, 0).sum((0, 2, 3)),
    )


def max_pool(images: int, channels: int, side: int, padding: int, ceil_mode: bool) -> Case:
    """Maxima of 3×3."""
    x = maps(images, channels, side)
    return Case(
        "maximum of 3×3, stride 2",
        f"{channels} × {side} × {side}",
        lambda: fused.max_pool(x, 2, padding, ceil_mode),
        lambda: F.max_pool2d(x, 3, 2, padding, ceil_mode=ceil_mode),
    )


def microseconds(work: Callable[[], object], repeats: int) -> float:
    """Of one call, without the time in which the host starts it."""
    for _ in range(2):  # compiles
        work()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(CALLS):
            work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1e3 * start.elapsed_time(end) / CALLS)
    return statistics.median(times)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=180)
    parser.add_argument("--repeats", type=int, default=20)
    given = parser.parse_args()
    if not torch.cuda.is_available() or not kernels.usable(DEVICE):
        raise InputError("the kernels need a GPU and Triton; run this where there are both")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n", flush=True)
    print(heads(("", "maps", "ours, µs", "torch, µs", "ratio")), flush=True)
    with torch.no_grad():
        for case in cases(given.images):
            ours, plain = (microseconds(work, given.repeats) for work in (case.ours, case.torch))
            cells = (case.what, case.shape, f"{ours:.1f}", f"{plain:.1f}", f"{plain / ours:.2f} ×")
            print(line(cells), flush=True)


if __name__ == "__main__":
    with sentence_errors():
        main()
