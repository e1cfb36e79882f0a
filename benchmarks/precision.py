"""Does bf16 cost accuracy? The demo's recipe, shortened, in bf16 and in float32, some seeds each.

    python benchmarks/precision.py                    # 5 seeds each, 8 epochs; continues
    python benchmarks/precision.py --seeds 2 --epochs 1
    python benchmarks/precision.py --jobs 5           # so many runs at once, on a GPU

Each run is made by train.py, unless it already has a results.json, and is reported when it ends.
The table has R@1 and MAP@R on the unseen classes (mean ± half of its 95 % interval, and range over
the seeds) and seconds. If --limit cuts some runs off, it has those that ended; exit status 1.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import measuring
from machine import cores
from metrics.comparison import half_width
from utils import sentence_errors

PRECISIONS = {"bf16": "bf16", "float32": "off"}
METRICS = ("R@1", "MAP@R")


def train(
    folder: Path, recipe: str, precision: str, seed: int, epochs: int, end: float
) -> dict[str, float]:
    """The metrics and seconds of a run, which train.py makes if it does not exist yet.

    Raises:
        subprocess.SubprocessError: it failed, or had not ended at `end`, by the monotonic clock.
    """
    run = folder / f"{precision}_{epochs}_{seed}"
    if not (run / "results.json").is_file():
        flags = ["--epochs", str(epochs), "--eval-every", str(epochs), "--seed", str(seed)]
        flags += ["--amp", PRECISIONS[precision], "--wandb", "disabled", "--no-report"]
        where = ["--LOG_DIR", str(folder), "--name", run.name]
        unfinished = (run / "last.pth").is_file()
        command = ["--resume-run", str(run)] if unfinished else [f"@{recipe}", *flags, *where]
        subprocess.run(
            [sys.executable, "train.py", *command],
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=max(0.0, end - time.monotonic()),
        )
    found = measuring.reached(run)
    return {name: found[name] for name in (*METRICS, "seconds")}


def row(precision: str, runs: list[dict[str, float]]) -> str:
    """A line of the table."""
    cells = [precision, str(len(runs))]
    for name in METRICS:
        values = [run[name] for run in runs]
        mean = f"{statistics.mean(values):.4f}"
        if len(values) > 1:
            mean += f" ± {half_width(statistics.stdev(values), len(values)):.3f}"
        cells.append(f"{mean} ({min(values):.4f}–{max(values):.4f})")
    cells.append(f"{statistics.median(run['seconds'] for run in runs):.0f}")
    return measuring.line(cells)


def main() -> None:
    """Trains missing runs, and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipe", default="recipes/emoji_scratch.txt")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--folder", type=Path, default=ROOT / "logs" / "precision")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds for all of it")
    args = parser.parse_args()
    runs: dict[str, list[dict[str, float]]] = {precision: [] for precision in PRECISIONS}
    wanted = [(name, seed) for seed in range(1, args.seeds + 1) for name in PRECISIONS]
    if args.jobs > 1:  # each run gets its share of the cores
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores() // args.jobs)))
    more, failed = (args.epochs, time.monotonic() + args.limit), 0
    with ThreadPoolExecutor(args.jobs) as pool:
        begun = {pool.submit(train, args.folder, args.recipe, *run, *more): run for run in wanted}
        for ended in as_completed(begun):
            precision, seed = begun[ended]
            try:
                found = ended.result()
                runs[precision].append(found)
            except subprocess.TimeoutExpired:
                failed, found = failed + 1, "cut off by --limit"
            except subprocess.CalledProcessError as error:
                failed, found = failed + 1, f"failed, with exit status {error.returncode}"
            print(f"{precision} seed {seed}: {found}", file=sys.stderr, flush=True)
    print(measuring.heads(("precision", "seeds", *METRICS, "seconds of training")))
    for precision, found in runs.items():
        if found:
            print(row(precision, found))
    sys.exit(bool(failed))


if __name__ == "__main__":
    with sentence_errors():
        main()
