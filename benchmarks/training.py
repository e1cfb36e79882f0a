"""Images per second of our training loop and of the published one, in one run.

    python benchmarks/training.py [--models bn_inception resnet50] [--batches 20] [--repeats 3]
    python benchmarks/training.py --data jpeg --sizes 224 --bn-freeze 1      # from JPEG files
    python benchmarks/training.py --profile                       # the parts of a step's time
    python benchmarks/training.py --profile --torch-only          # without Triton's kernels
    python benchmarks/training.py --alone --more "--loss RecallAtK --IPC 8 --micro-batch 50"

Both sides train the same network on the same pictures, from the same start, with the same loss
(Proxy-Anchor), batch size and number of workers, from stored picture to updated weights. The plain
way is that of the published codes: float32, contiguous memory, each image opened with PIL and
transformed by torchvision in a DataLoader's workers, BatchNorm and convolution as separate modules.
Ours is `train.step` with train.py's defaults. The pictures are the embedded ones, or, with `--data
jpeg`, generated photographs of 500×375 in files, which ours reads in each way of `--readings`. The
rounds of all ways take turns, so that changes of the machine's speed affect all; the table has the
medians. A round begins with empty queues, because batches that workers have prepared before it
would count as speed. No round contains the start of an epoch, or runs beside workers that still
fill another one's queue. On a GPU, standard error has a line for each round: the median and the
slowest step, as measured by the GPU, the number of replayed steps, and how often memory was
requested from the driver or returned.

Every row is printed when it is ready. If a row fails, it is reported and the others continue; exit
status 1. After --limit seconds the program ends, and prints its stacks.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import gc
import itertools
import os
import statistics
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import door

door.settle_threads(os.environ)  # as every command does, before torch is loaded

import torch

import kernels
import options
from benchmarks.card import card_asked
from benchmarks.data import make_photographs
from benchmarks.loops import READINGS, OurWay, PlainWay, Way, run
from benchmarks.measuring import heads, line
from benchmarks.profiling import as_text, profile_step
from devices import device_name
from machine import cores
from net.replay import Tape
from utils import sentence_errors

NORMS = {"0": "trained", "1": "frozen"}
WARM_UP = 4  # steps of a round that are not timed; on a GPU one of them is recorded
HEADINGS = (
    *("network", "pixels", "batch", "BatchNorm", "data"),
    *("plain, images/s", "ours, images/s", "ratio", "waiting: plain", "ours"),
)
GPU_HEADINGS = ("GiB: plain", "ours")


class Setting(NamedTuple):
    """The settings that both sides share."""

    model: str
    size: int
    batch: int
    freeze: str

    def flags(self, given: argparse.Namespace, reading: str) -> list[str]:
        """train.py's command line for it; `reading` is one of `READINGS`."""
        command = (
            f"--model {self.model} --stem {given.stem} --image-size {self.size} "
            f"--batch-size {self.batch} --bn-freeze {self.freeze} --workers {given.workers} "
            f"--pretrained none --warm 0 --wandb disabled --data-root {given.folder} "
            f"{READINGS[reading].format(folder=given.folder)}"
        )
        command += " --dataset cub" * (given.data == "jpeg") + " --compile" * given.compile
        return [*command.split(), *given.more.split()]

    def cells(self) -> list[str]:
        """The first cells of a row."""
        return [self.model, f"{self.size}", f"{self.batch}", NORMS[self.freeze]]


class Round(NamedTuple):
    """One round of a way.

    Attributes:
        rate: images per second. waiting: the share of the time that it waited for data.
        steps: seconds of each. seen: events that may have made it slow, see `Seen`.
        card: the GPU's clock, power and temperature, see benchmarks/card.py.
    """

    rate: float
    waiting: float
    steps: list[float]
    seen: dict[str, int]
    card: str

    def as_text(self) -> str:
        """The median and the slowest step, and what may have made them slow."""
        middle, slowest = 1e3 * statistics.median(self.steps), 1e3 * max(self.steps)
        seen = [f"{count} {name}" for name, count in self.seen.items() if count]
        seen = ", ".join(seen + [self.card] * bool(self.card))
        return f"{self.rate:,.0f}: {middle:.1f} ms a step, at most {slowest:.1f}; {seen or '-'}"


class Seen:
    """Counts events in this process that make a round slow, or should make it fast."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.replayed = 0
        play = Tape.play

        def counted(tape: Tape, images: torch.Tensor) -> torch.Tensor:
            self.replayed += 1
            return play(tape, images)

        Tape.play = counted

    def counts(self) -> dict[str, int]:
        """Counts since the start: replayed steps, memory from and to the driver, collections."""
        found = {"replayed": self.replayed}
        if self.device.type == "cuda":
            memory = torch.cuda.memory_stats(self.device)
            found["allocated"] = memory.get("num_device_alloc", 0)
            found["freed"] = memory.get("num_device_free", 0)
        return found | {"garbage collections": gc.get_stats()[2]["collections"]}


class Rounds:
    """One way's rounds.

    Attributes:
        rounds: all of them. memory: the peak of GPU memory in bytes, with that which is kept
            between rounds.
    """

    def __init__(self, way: Way, batch: int, held: int) -> None:
        self.way = way
        self.batch = batch
        self.held = held
        self.rounds: list[Round] = []
        self.memory = 0

    @classmethod
    def of(cls, build: Callable[[], Way], batch: int, device: torch.device) -> Rounds:
        """No rounds yet: the way is built, and allocates gradients and moments in a first step."""
        before = _allocated(device)
        way = build()
        way.begin()
        run(way, 1, device)
        way.end()
        return cls(way, batch, _allocated(device) - before)

    def add(self, batches: int, device: torch.device, seen: Seen) -> None:
        """Runs another round."""
        self.way.begin()
        run(self.way, WARM_UP, device)
        before = _allocated(device)
        if before:
            torch.cuda.reset_peak_memory_stats(device)
        counts, card = seen.counts(), card_asked(device)
        ran = run(self.way, batches, device)
        counts = {name: count - counts[name] for name, count in seen.counts().items()}
        if before:
            peak = torch.cuda.max_memory_allocated(device) - before + self.held
            self.memory = max(self.memory, peak)
        self.way.end()
        rate, waiting = batches * self.batch / ran.seconds, ran.waited / ran.seconds
        self.rounds.append(Round(rate, waiting, ran.steps, counts, card()))

    @property
    def rates(self) -> list[float]:
        """Images per second of each round."""
        return [each.rate for each in self.rounds]

    @property
    def waiting(self) -> float:
        """The median share of a round's time that it waited for data."""
        return statistics.median(each.waiting for each in self.rounds)

    @property
    def rate(self) -> float:
        """Median images per second."""
        return statistics.median(self.rates)

    def as_text(self) -> str:
        """The median rate, and the lowest and highest, because a round is short."""
        return f"{self.rate:,.0f} ({min(self.rates):,.0f} to {max(self.rates):,.0f})"


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


# --- a table's rows, a profile --------------------------------------------------------------------


def compare(setting: Setting, given: argparse.Namespace, seen: Seen) -> Iterator[str]:
    """A line of the table for each of our ways to read."""
    device = given.device
    parsed = {name: options.parse_train(setting.flags(given, name)) for name in given.readings}
    sides = {n: Rounds.of(lambda a=a: OurWay(a), setting.batch, device) for n, a in parsed.items()}
    if not given.alone:
        first = given.readings[0]
        images = sides[first].way.training.data.train
        plain = Rounds.of(lambda: PlainWay(parsed[first], images, device), setting.batch, device)
        sides = {"plain": plain, **sides}
    for _ in range(given.repeats):
        for name, side in sides.items():
            side.add(given.batches, device, seen)
            if device.type == "cuda":
                print(f"{setting.model}, {name}: {side.rounds[-1].as_text()}", file=sys.stderr)
    for name in given.readings:
        pair = {"plain": sides.get("plain"), "ours": sides[name]}
        cells = [*setting.cells(), name, *_of_both(pair, Rounds.as_text)]
        cells.append("–" if given.alone else f"{pair['ours'].rate / pair['plain'].rate:.2f} ×")
        cells += _of_both(pair, lambda side: f"{side.waiting:.1%}")
        if device.type == "cuda":
            cells += _of_both(pair, lambda side: f"{side.memory / 2**30:.1f}")
        yield line(cells)


def _of_both(pair: dict[str, Rounds | None], written: Callable[[Rounds], str]) -> list[str]:
    return ["–" if side is None else written(side) for side in pair.values()]


def profiled(setting: Setting, given: argparse.Namespace, seen: Seen) -> Iterator[str]:
    """The text of a profile for each of our ways to read."""
    for name in given.readings:
        found = profile_step(OurWay(options.parse_train(setting.flags(given, name))), given.batches)
        title = ", ".join(
            f"{head} {cell}" for head, cell in zip(HEADINGS, setting.cells(), strict=False)
        )
        yield f"\n{title}, data {name}\n{as_text(found)}"


# --- the command ----------------------------------------------------------------------------------


@contextlib.contextmanager
def data_of(given: argparse.Namespace) -> Iterator[None]:
    """Makes the files for --data, in the folder `given.folder`."""
    if given.data == "emoji":
        given.folder = ROOT / "data"
        yield
        return
    with tempfile.TemporaryDirectory() as folder:
        given.folder = Path(folder)
        make_photographs(given.folder, given.images)
        yield


def parsed_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["bn_inception"])
    parser.add_argument("--sizes", nargs="+", type=int, default=[64])
    parser.add_argument("--stem", default="imagenet", help="the published first layers")
    parser.add_argument("--batch-size", nargs="+", type=int, default=[150])
    parser.add_argument("--bn-freeze", nargs="+", default=["0", "1"], choices=[*NORMS])
    parser.add_argument("--data", default="emoji", choices=["emoji", "jpeg"])
    parser.add_argument("--images", type=int, default=4000, help="photographs to train on")
    parser.add_argument(
        "--readings",
        nargs="+",
        choices=["exact", "cache", "cuda"],
        help="how ours reads the files; all there are",
    )
    parser.add_argument(
        "--workers", type=int, default=cores(), help="of either side; one for each core"
    )
    parser.add_argument("--compile", action="store_true", help="ours with --compile")
    parser.add_argument("--torch-only", action="store_true", help="ours without Triton's kernels")
    parser.add_argument("--alone", action="store_true", help="ours without the plain side")
    parser.add_argument("--more", default="", metavar="FLAGS", help="of train.py, for ours")
    parser.add_argument("--batches", type=int, default=6, help="steps a round")
    parser.add_argument("--repeats", type=int, default=5, help="rounds; the median counts")
    parser.add_argument("--profile", action="store_true", help="where the time of our step goes")
    parser.add_argument("--limit", type=int, default=3600, help="seconds the whole may take")
    given = parser.parse_args()
    given.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = given.device.type == "cuda"
    if given.data == "emoji":
        given.readings = ["memory"]
    else:
        given.readings = given.readings or ["exact", "cache", *(["cuda"] if on_gpu else [])]
    return given


def end_after(seconds: float) -> None:
    """Ends the process with status 1 after `seconds`, and prints its stacks."""

    def end() -> None:
        frame = sys._current_frames()[threading.main_thread().ident]
        sys.stderr.write(f"Timeout after {seconds:g} s:\n{''.join(traceback.format_stack(frame))}")
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    # In case Python itself is stuck; later, because reading other threads' stacks can crash.
    faulthandler.dump_traceback_later(seconds + 30, exit=True)


def main() -> None:
    """Prints the table, or the profiles."""
    given = parsed_arguments()
    end_after(given.limit)
    if given.torch_only:
        kernels.usable = lambda device: False
    device = device_name(given.device)
    print(f"{device}, torch {torch.__version__}, {given.workers} workers\n", flush=True)
    if not given.profile:
        headings = HEADINGS + GPU_HEADINGS * (given.device.type == "cuda")
        print(heads(headings), flush=True)
    failed, seen = False, Seen(given.device)
    with data_of(given):
        for chosen in itertools.product(
            given.models, given.sizes, given.batch_size, given.bn_freeze
        ):
            setting = Setting(*chosen)
            try:
                for row in (profiled if given.profile else compare)(setting, given, seen):
                    print(row, flush=True)
            except (Exception, SystemExit):
                failed = True
                print(f"{' '.join(map(str, chosen))} failed:", file=sys.stderr)
                traceback.print_exc()
    sys.exit(failed)


if __name__ == "__main__":
    with sentence_errors():
        main()
