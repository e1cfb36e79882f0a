"""Runs that are killed repeatedly: do they end with the same weights as undisturbed ones?

    python benchmarks/kills.py                   # 5 methods, 5 kills each; continues if stopped
    python benchmarks/kills.py --methods AMLoss --kills 2

For each method, one run is undisturbed, and another is killed with SIGKILL several times, at random
moments, during a save and during an evaluation, and started again with the same command and
--resume auto. At the end the weights of network and criterion, and their running mean, must be
equal bit for bit, and metrics.csv equal except for timings. The pictures are small noise, and the
network is small.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import random
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "tests")]

import torch
from run_folders import difference, run_contents
from small_images import write_images

from benchmarks.measuring import heads, line
from utils import sentence_errors

SMALL = (
    "--model resnet10 --width 0.25 --stem small --embedding-size 16 --image-size 32 --workers 2 "
    "--pretrained none --batch-size 16 --wandb disabled --save-every 3 --resume auto --name run"
).split()
METHODS = {
    "Proxy-Anchor": "--loss Proxy_Anchor --epochs 12",
    "AMLoss": "--loss AMLoss --epochs 12 --mrg-lr 1e-2",
    "SEC": "--use_loss semihtriplet --instances 4 --sec_wei 1 --norm_momentum 0.3 --steps 144 "
    "--eval-steps 10",
    "IDML": "--loss Proxy_Anchor --introspective paper --epochs 12",
    "divide and conquer": "--loss MarginLoss --sampler distanceweighted --nb-clusters 4 "
    "--mod-epoch 3 --mod-epoch-freeze 1 --epochs 12 --IPC 2 --warm 0",
    "running mean": "--loss AMLoss --epochs 12 --ema 0.99 --clip-norm 1 --layer-decay 0.8 "
    "--schedule onecycle",
}
PREPARING = 0.5  # seconds between the imports and the first step
PHASES = {
    "save_tensors": "a save",
    "evaluate": "an evaluation",
    "divide_anew": "a division",
    "step": "a step",
    "advance": "between two steps",
    "prepare": "the start",
}
WHERE = "KILLED_WHILE"  # environment variable of the child: the file for the phase of its end
MOMENT = "KILLED_AT"  # "time 3.2", "save 4" or "evaluation 2"


# --- the run that is killed -----------------------------------------------------------------------


def die() -> None:
    """Writes what the main thread is doing, and kills this process with SIGKILL."""
    frame = sys._current_frames()[threading.main_thread().ident]
    names = [entry.name for entry in traceback.extract_stack(frame)]
    phase = next((said for name, said in PHASES.items() if name in names), "the start")
    Path(os.environ[WHERE]).write_text(phase)
    os.kill(os.getpid(), signal.SIGKILL)


def die_at(moment: str) -> None:
    """Arranges that this process is killed at a moment."""
    kind, _, number = moment.partition(" ")
    if kind == "time":
        timer = threading.Timer(float(number), die)
        timer.daemon = True
        timer.start()
    elif kind == "save":
        _die_in_call(torch, "save", int(number), half_written=True)
    else:
        from evaluation import measuring

        _die_in_call(measuring, "embed_readable", int(number))


def _die_in_call(module: Any, name: str, number: int, half_written: bool = False) -> None:
    function, left = getattr(module, name), [number]

    def deadly(*args: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0]:
            return function(*args, **more)
        if half_written:
            args[1].write(os.urandom(5000))
            args[1].flush()
        die()

    setattr(module, name, deadly)


def child(arguments: list[str]) -> None:
    """Runs train.py in a process that is killed at its moment."""
    import options

    args = options.parse_train(arguments)
    import train

    if MOMENT in os.environ:
        die_at(os.environ[MOMENT])
    with sentence_errors():
        train.main(args)


# --- the experiment -------------------------------------------------------------------------------


def start(command: list[str], folder: Path, moment: str | None = None) -> tuple[bool, str]:
    """Runs until the end or the kill; returns whether it ended, and what it was doing."""
    where = folder / "where.txt"
    where.unlink(missing_ok=True)
    extra = {WHERE: str(where)} | ({MOMENT: moment} if moment else {})
    done = subprocess.run(
        [sys.executable, __file__, "--child", *command, "--LOG_DIR", str(folder)],
        env={**os.environ, **extra},
        capture_output=True,
        text=True,
    )
    if done.returncode == -signal.SIGKILL and where.is_file():
        return False, where.read_text()
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}\n{done.stderr}")
    return True, ""


def training_seconds(folder: Path) -> float:
    """The seconds that the run trained and evaluated."""
    with (folder / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return float(rows[-1]["seconds"]) + sum(float(r["evaluation_seconds"] or 0) for r in rows)


def experiment(name: str, data: Path, folder: Path, kills: int, seed: int) -> dict[str, Any]:
    """Trains with one method, undisturbed and killed, and compares the two runs."""
    command = ["--dataset", f"folder:{data}", *SMALL, *METHODS[name].split()]
    start(command, folder / "whole")
    seconds = training_seconds(folder / "whole")
    draw, phases = random.Random(seed), []
    for kill in range(kills):
        moment = f"time {draw.uniform(0.1, 0.5) * seconds + PREPARING:.2f}"
        if kill % 3 == 1:
            moment = f"save {draw.randint(2, 5)}"
        elif kill % 3 == 2:
            moment = f"evaluation {draw.randint(1, 2)}"
        ended, phase = start(command, folder / "killed", moment)
        if ended:
            break
        phases.append(phase)
    start(command, folder / "killed")
    whole, killed = (run_contents(folder / part / "run") for part in ("whole", "killed"))
    return {
        "method": name,
        "kills": len(phases),
        "during": phases,
        "weights": not difference(whole["last.pth"], killed["last.pth"]),
        "rows": whole["metrics.csv"] == killed["metrics.csv"],
        "count": len(whole["metrics.csv"]),
    }


def table(results: list[dict[str, Any]]) -> str:
    """One line per method."""
    lines = [heads(("method", "kills", "killed during", "weights", "rows of metrics.csv"))]
    for result in results:
        phases = [f"{result['during'].count(p)} × {p}" for p in sorted(set(result["during"]))]
        weights = "equal bit for bit" if result["weights"] else "DIFFERENT"
        rows = f"{result['count']}, the same" if result["rows"] else "DIFFERENT"
        lines.append(line((result["method"], result["kills"], ", ".join(phases), weights, rows)))
    total = sum(result["kills"] for result in results)
    return "\n".join([*lines, f"\n{total} kills in all."])


def main() -> None:
    """Runs missing experiments, and prints the table; exit status 1 if a run is different."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--kills", type=int, default=5, help="of each method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, default=ROOT / "logs" / "kills")
    args = parser.parse_args()
    data, results = args.folder / "data", []
    if not data.is_dir():
        write_images(data, images=24, eval_images=12)
    for name in args.methods:
        folder = args.folder / f"{name.replace(' ', '-')}_{args.kills}_{args.seed}"
        found = folder / "result.json"
        if not found.is_file():
            for part in ("whole", "killed"):
                (folder / part).mkdir(parents=True, exist_ok=True)
            found.write_text(json.dumps(experiment(name, data, folder, args.kills, args.seed)))
        results.append(json.loads(found.read_text()))
        print(results[-1], file=sys.stderr, flush=True)
    print(table(results))
    sys.exit(not all(result["weights"] and result["rows"] for result in results))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(sys.argv[2:])
    else:
        main()
