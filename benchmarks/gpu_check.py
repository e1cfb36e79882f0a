"""All GPU tests and benchmarks, in under ten minutes: the program of `make gpu-check`.

    python benchmarks/gpu_check.py [--quick] [--only tests losses] [--out FOLDER]

Each part runs in a process of its own, with a time limit, and its output is printed as it comes.
Parts for which docs/gpu.md has no figures, or old ones, come first. The limits add up to the whole,
so that every part runs. A part that fails does not stop the others; one that hangs prints the
stacks of its threads. FOLDER (logs/gpu-check) contains gpu_check.log, all that was printed, and
gpu_check.json, the status and the output of each part, written after every part. wandb, faiss and
pytorch-metric-learning are not needed: parts that use them are skipped, and named.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple, TextIO

try:
    import torch
except ImportError:
    print(f"error: {sys.executable} has no torch; name one that has: make gpu-check GPU_PYTHON=…")
    raise SystemExit(2) from None

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from storage import write_json
from utils import InputError, sentence_errors

LIMIT, QUICK_LIMIT = 540, 220  # seconds for all parts
LAST_WORDS = 10  # seconds for a part to print its stacks and end after its limit
PACKAGES = ("torchvision", "timm", "sklearn", "faiss", "pytorch_metric_learning", "wandb")


class Part(NamedTuple):
    """Arguments of `python`, and a limit in seconds; those for --quick, if it includes the part."""

    arguments: str
    limit: int
    quick: str | None = None
    quick_limit: int = 0


# Many tests start programs of their own, so only a few of them run at once.
AT_ONCE = "-n 6 --dist worksteal" if importlib.util.find_spec("xdist") else ""
# By name: pytest runs no test at all where it cannot load a file, and others need packages.
TESTS = f"-m pytest tests/test_gpu.py tests/test_kernels.py {AT_ONCE} -vv -rfEs --tb short"
TESTS += " --durations 8 -o faulthandler_timeout=30"
JPEG = "--sizes 224 --batch-size 180 --bn-freeze 1 --data jpeg"
VIT = "timm:vit_small_patch16_224"
PARTS = {
    "tests": Part(TESTS, 155, TESTS, 130),
    # Twice the second network, another one each time, was slower than its profile says.
    "training": Part(
        f"benchmarks/training.py --models bn_inception resnet50 {VIT} {JPEG} --images 1000 "
        "--readings exact cuda --batches 16 --repeats 2 --limit 105",
        110,
    ),
    "profile": Part(
        f"benchmarks/training.py --profile --models bn_inception resnet50 {VIT} {JPEG} "
        "--images 800 --readings cuda --batches 20 --limit 38",
        40,
        f"benchmarks/training.py --profile --models bn_inception {JPEG} --images 800 "
        "--readings cuda --batches 20 --limit 25",
        30,
    ),
    # Small batches, so that each of 16 workers has some.
    "data": Part(
        "benchmarks/data.py --images 1000 --batch-size 30 --memory-images 3000 --repeats 1", 30
    ),
    "kernels": Part("benchmarks/kernels.py", 25),
    "processes": Part("benchmarks/processes.py --device cuda", 40),
    "large": Part(
        "benchmarks/training.py --models resnet50 --sizes 224 --bn-freeze 1 --batch-size 4000 "
        "--alone --more '--loss RecallAtK --IPC 8 --micro-batch 100' --batches 2 --repeats 1 "
        "--limit 25",
        30,
    ),
    "evaluation": Part(
        "benchmarks/evaluation.py --ours --shapes all",
        15,
        "benchmarks/evaluation.py --ours --shapes all --repeats 2",
        25,
    ),
    "losses": Part(
        "benchmarks/losses.py --device cuda --repeats 5",
        25,
        "benchmarks/losses.py --device cuda --repeats 3 --classes 11318 --only Proxy_Anchor AMLoss",
        20,
    ),
    # Ten runs, five at a time; runs that end after the limit are left out of the table.
    "precision": Part("benchmarks/precision.py --jobs 5 --epochs 4 --limit 55", 60),
}


class Paper:
    """Prints to the screen and to gpu_check.log, with the seconds since the start."""

    def __init__(self, file: TextIO) -> None:
        self.file = file
        self.start = time.perf_counter()

    def write(self, line: str = "") -> None:
        """Adds a line."""
        print(line, flush=True)
        print(f"{time.perf_counter() - self.start:6.1f}  {line}", file=self.file, flush=True)


def run(arguments: str, limit: float, paper: Paper) -> dict[str, object]:
    """Runs a part until its end or its limit; returns its status, seconds and output."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *shlex.split(arguments)],
        cwd=ROOT,
        # Its output is not buffered, and an abort prints the stacks.
        env={**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONFAULTHANDLER": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    said: list[str] = []
    reader = threading.Thread(target=_read, args=(process, paper, said), daemon=True)
    reader.start()
    try:
        status = process.wait(limit)
        ended = "passed" if status == 0 else f"FAILED ({status})"
    except subprocess.TimeoutExpired:
        ended = f"FAILED (over {limit:.0f} s)"
        _end(process)
    reader.join(LAST_WORDS)
    seconds = round(time.perf_counter() - start, 1)
    return {"arguments": arguments, "ended": ended, "seconds": seconds, "output": "".join(said)}


def _read(process: subprocess.Popen[str], paper: Paper, said: list[str]) -> None:
    for line in process.stdout:
        said.append(line)
        paper.write(line.rstrip("\n"))


def _end(process: subprocess.Popen[str]) -> None:
    """Ends a part, which prints its stacks, and then all processes that it has started."""
    process.send_signal(signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LAST_WORDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def chosen_parts(only: list[str], quick: bool) -> dict[str, tuple[str, int]]:
    """Name → arguments and limit, of the selected parts."""
    parts = {name: PARTS[name] for name in only}
    if not quick:
        return {name: (part.arguments, part.limit) for name, part in parts.items()}
    return {name: (part.quick, part.quick_limit) for name, part in parts.items() if part.quick}


def about() -> str:
    """The card, the versions, and the packages that are missing."""
    found = {name: importlib.util.find_spec(name) is not None for name in PACKAGES}
    missing = ", ".join(name for name, there in found.items() if not there) or "none"
    return (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"Python {sys.version.split()[0]}, {os.cpu_count()} cores; packages missing: {missing}"
    )


def main() -> None:
    """Runs the parts; exit status 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--quick", action="store_true", help="the short form, under four minutes")
    parser.add_argument(
        "--limit", type=float, help=f"seconds for all (default: {LIMIT}; quick: {QUICK_LIMIT})"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "logs" / "gpu-check")
    given = parser.parse_args()
    if not torch.cuda.is_available():
        raise InputError(f"{sys.executable} sees no CUDA GPU; run this where there is one")
    over = time.monotonic() + (given.limit or (QUICK_LIMIT if given.quick else LIMIT))
    given.out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict] = {}
    with (given.out / "gpu_check.log").open("w") as file:
        paper = Paper(file)
        paper.write(f"{about()}\n")
        for name, (arguments, limit) in chosen_parts(given.only, given.quick).items():
            paper.write(f"## {name}: python {arguments}\n")
            left = over - time.monotonic() - LAST_WORDS
            if left > LAST_WORDS:
                results[name] = run(arguments, min(limit, left), paper)
            else:
                results[name] = {"arguments": arguments, "ended": "not run: no time left"}
            write_json(given.out / "gpu_check.json", {"machine": about(), "parts": results})
            paper.write()
        paper.write("| part | result | seconds |\n|---|---|---|")
        for name, result in results.items():
            paper.write(f"| {name} | {result['ended']} | {result.get('seconds', 0):.0f} |")
    sys.exit(any(result["ended"] != "passed" for result in results.values()))


if __name__ == "__main__":
    with sentence_errors():
        main()
