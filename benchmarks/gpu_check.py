"""Every GPU test and benchmark in one go, in under ten minutes: what `make gpu-check` runs.

    python benchmarks/gpu_check.py [--only tests losses]

Each part runs in a process of its own with a limit of its own and prints its table; one that fails
does not stop the others. The last table says how each ended. Works without wandb and without
pytorch-metric-learning (what needs them is skipped and named).
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

try:
    import torch
except ImportError:
    print(f"error: {sys.executable} has no torch; name one that has: make gpu-check GPU_PYTHON=…")
    raise SystemExit(2) from None

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from utils import InputError, sentence_errors


class Part(NamedTuple):
    """A command of its own: what `python` is given, and its limit in seconds."""

    arguments: str
    limit: int


PARTS = {
    "tests": Part("-m pytest -m gpu -rs", 200),
    "training": Part(
        "benchmarks/training.py --models bn_inception resnet50 --sizes 64 224 --bn-freeze 1 "
        "--batches 10 --repeats 3",
        130,
    ),
    "data": Part("benchmarks/data.py --images 2000 --memory-images 3000 --repeats 2", 90),
    "losses": Part("benchmarks/losses.py --device cuda --repeats 5", 60),
    "evaluation": Part("benchmarks/evaluation.py --shapes all", 110),
}


def run(part: Part) -> tuple[str, float]:
    """How a part ended, in a word, and its seconds; its output goes to the screen."""
    start = time.perf_counter()
    try:
        done = subprocess.run(
            [sys.executable, *part.arguments.split()], cwd=ROOT, timeout=part.limit
        )
        ended = "passed" if done.returncode == 0 else f"FAILED ({done.returncode})"
    except subprocess.TimeoutExpired:
        ended = f"FAILED (over {part.limit} s)"
    return ended, time.perf_counter() - start


def main() -> None:
    """Runs the parts; exit status 1 when one failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    chosen = parser.parse_args().only
    if not torch.cuda.is_available():
        raise InputError(f"{sys.executable} sees no CUDA GPU; run this where there is one")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n", flush=True)
    rows = []
    for name in chosen:
        print(f"## {name}: python {PARTS[name].arguments}\n", flush=True)
        rows.append((name, *run(PARTS[name])))
        print(flush=True)
    print("| part | result | seconds |\n|---|---|---|")
    for name, ended, seconds in rows:
        print(f"| {name} | {ended} | {seconds:.0f} |")
    sys.exit(any(ended != "passed" for _, ended, _ in rows))


if __name__ == "__main__":
    with sentence_errors():
        main()
