"""The time of a training step: the device's arithmetic, the host, waiting for data."""

from __future__ import annotations

import json
import math
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import train
from benchmarks.loops import OurWay, run
from benchmarks.measuring import timed
from dataset.loader import Batch
from devices import Precision
from training.state import Training

ON_DEVICE = {"kernel", "gpu_memcpy", "gpu_memset"}
"""A trace's categories of a GPU's work; on a CPU they are the operators themselves (`cpu_op`)."""
NAME_LENGTH = 72  # of a kernel in the table; templates have names of several lines
SQUARE = {"cuda": 8192, "cpu": 2048}  # side of the matrices by whose product the peak is measured
WARM_UP = 3
ROUNDS = 3
TOP = 10  # kernels in the table


class Busy(NamedTuple):
    """The work of a device in a trace.

    Attributes:
        seconds: in which at least one kernel ran.
        kernels: name → seconds and number of calls, the longest first. On a CPU the time of an
            operator is without that of the operators that it calls.
    """

    seconds: float
    kernels: dict[str, tuple[float, int]]


class Profile(NamedTuple):
    """A step of `images` images, seconds each.

    Attributes:
        step: a step without the profiler. asked: until the host had queued all of its work.
        waited: by the device, for the next batch.
        ready: a step on a batch that is on the device already; `step` less it is the cost of data.
        bare: forward and backward of the network alone, on such a batch.
        busy: the device's work; None if the profiler recorded none. kernels: see `Busy`, for one
            step. flops: of the bare network. peak: FLOP/s of a large matrix product in the
            network's precision. memory: the peak in bytes (GPU).
    """

    images: int
    step: float
    asked: float
    waited: float
    ready: float
    bare: float
    busy: float | None
    kernels: dict[str, tuple[float, int]]
    flops: float
    peak: float
    memory: int | None


# --- measuring ------------------------------------------------------------------------------------


def profile_step(way: OurWay, batches: int) -> Profile:
    """Measures our loop: undisturbed steps and the bare network in turn, then with a profiler.

    It begins and ends the way. The figures are medians of `ROUNDS` rounds of `batches` each.
    """
    training = way.training
    device = training.precision.device
    on_gpu = device.type == "cuda"
    way.begin()
    run(way, WARM_UP, device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    batch = next(way.batches)
    rounds = []
    for _ in range(ROUNDS):
        ran = run(way, batches, device)
        ready = _seconds_of(lambda: train.step(training, batch), batches, device)
        bare = _seconds_of(lambda: forward_backward(training, batch), batches, device)
        each = (ran.seconds / batches, ran.asked / batches, ran.waited / batches)
        rounds.append((*each, ready, bare))
    step, asked, waited, ready, bare = map(statistics.median, zip(*rounds, strict=True))
    memory = torch.cuda.max_memory_allocated(device) if on_gpu else None
    busy = _traced(way, min(batches, 5), device, step)
    way.end()
    return Profile(
        images=len(batch.labels),
        step=step,
        asked=asked,
        waited=waited,
        ready=ready,
        bare=bare,
        busy=None if busy is None else busy.seconds,
        kernels={} if busy is None else busy.kernels,
        flops=flops_of(training, batch),
        peak=peak(training.precision),
        memory=memory,
    )


def forward_backward(training: Training, batch: Batch) -> None:
    """The network alone, with a trivial loss, without optimiser, and without checking gradients."""
    training.network.zero_grad(set_to_none=True)
    with training.precision.autocast():
        embedding = training.network(batch.images).embedding
    embedding.sum().backward()


def flops_of(training: Training, batch: Batch) -> int:
    """Floating-point operations of `forward_backward`: a multiplication and an addition are two.

    torch counts them from the shapes of convolutions, matrix products and attention.
    """
    training.network.zero_grad(set_to_none=True)
    training.network.record(False)  # torch cannot count the operators of a recording
    with FlopCounterMode(display=False) as counter:
        with training.precision.autocast():
            # `forward` itself, so that a compiled network is counted like the plain one.
            embedding = training.network.forward(batch.images).embedding
        embedding.sum().backward()
    return counter.get_total_flops()


def peak(precision: Precision) -> float:
    """FLOP/s of a large square matrix product, the best of some.

    On a GPU, cuDNN's float32 convolutions use TF32 by default, so this product does, too.
    """
    side, device = SQUARE[precision.device.type], precision.device
    one = torch.randn(side, side, device=device, dtype=precision.dtype)
    other = torch.randn(side, side, device=device, dtype=precision.dtype)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        seconds = min(_seconds_of(lambda: one @ other, 3, device) for _ in range(5))
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * side**3 / seconds


def _seconds_of(work: Callable[[], object], times: int, device: torch.device) -> float:
    """Seconds of one call: the mean of `times` calls after a first one."""
    work()
    return timed(lambda: [work() for _ in range(times)], device) / times


def _traced(way: OurWay, batches: int, device: torch.device, step: float) -> Busy | None:
    """The device's work in one step, the mean of `batches`; None if the trace is empty.

    The profiler does not slow down a GPU's kernels. It slows down a CPU's operators, so their times
    are scaled to those of an undisturbed `step`.
    """
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as watched:
        watched_seconds = run(way, batches, device).seconds
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        watched.export_chrome_trace(str(file))
        events = json.loads(file.read_text())["traceEvents"]
    found = busy(events, ON_DEVICE if on_gpu else {"cpu_op"})
    if not found.kernels:
        return None
    share = 1 / batches if on_gpu else step / watched_seconds
    kernels = {
        name: (seconds * share, math.ceil(calls / batches))
        for name, (seconds, calls) in found.kernels.items()
    }
    return Busy(found.seconds * share, kernels)


# --- reading a trace ------------------------------------------------------------------------------


def busy(events: Iterable[dict[str, Any]], categories: set[str]) -> Busy:
    """The work in the events of these categories of a Chrome trace.

    Time in which kernels of several streams overlap is counted once. If an event is within another
    one of its thread, like an operator within the one that calls it, its time is not the other's.
    """
    lines: dict[tuple, list[tuple[float, float, str]]] = {}
    for event in events:
        if event.get("ph") == "X" and event.get("cat") in categories:
            span = (event["ts"] * 1e-6, event["dur"] * 1e-6, event["name"])
            lines.setdefault((event["pid"], event["tid"]), []).append(span)
    own, calls = Counter[str](), Counter[str]()
    for spans in lines.values():
        calls.update(name for _, _, name in spans)
        own.update(_own_times(spans))
    spans = [(start, start + length) for line in lines.values() for start, length, _ in line]
    return Busy(
        length_of_union(spans),
        {name: (seconds, calls[name]) for name, seconds in own.most_common()},
    )


def _own_times(spans: list[tuple[float, float, str]]) -> Counter[str]:
    """Name → seconds of the spans (start, length, name) of a thread, without spans within them."""
    own, open_spans = Counter[str](), list[tuple[float, str]]()
    for start, length, name in sorted(spans, key=lambda span: (span[0], -span[1])):
        while open_spans and open_spans[-1][0] <= start:
            open_spans.pop()
        own[name] += length
        if open_spans:
            own[open_spans[-1][1]] -= length
        open_spans.append((start + length, name))
    return own


def length_of_union(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of spans (start, end)."""
    total, reached = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


# --- printing -------------------------------------------------------------------------------------


def as_text(found: Profile) -> str:
    """The lines that --profile prints."""
    step = found.step

    def line(title: str, seconds: float, remark: str = "") -> str:
        return f"  {title:<34}{1e3 * seconds:>9.1f} ms {seconds / step:>7.1%}  {remark}".rstrip()

    lines = [
        line("a step", step, f"{found.images / step:,.0f} images/s"),
        line(
            "network alone, forward + backward", found.bare, f"a step is {step / found.bare:.2f} ×"
        ),
    ]
    if found.busy is None:
        lines.append("  the profiler saw no kernels, so nothing is said of the device")
    else:
        lines += [
            line("the device computes", min(found.busy, step)),
            line("it is idle, at most", max(0.0, step - found.busy)),
        ]
    lines += [
        line("the device waits for data", found.waited),
        line("a step without making its data", found.ready),
        line("the host asks for a step's work in", found.asked),
    ]
    reached = found.flops / step
    lines.append(
        f"  {found.flops / 1e9:,.0f} GFLOP a step: {reached / 1e12:.2f} TFLOP/s, "
        f"{reached / found.peak:.1%} of a matrix product's {found.peak / 1e12:.2f}"
    )
    if found.memory is not None:
        lines.append(f"  {found.memory / 2**30:.2f} GiB of the GPU's memory at most")
    for name, (seconds, calls) in list(found.kernels.items())[:TOP]:
        short = name if len(name) <= NAME_LENGTH else f"{name[: NAME_LENGTH - 1]}…"
        lines.append(f"  {1e3 * seconds:>9.2f} ms {seconds / step:>6.1%} {calls:>5} × {short}")
    return "\n".join(lines)
