"""Are several processes the same as one? The largest difference after five steps, per method.

    python benchmarks/processes.py                 # 1 against 2 and 3, on the CPU
    python benchmarks/processes.py --device cuda   # 1 against 2 that share the GPU, by torchrun

Five optimisation steps on small pictures (on the CPU with a last batch smaller than the others) by
one process, and by several gloo processes on this machine: losses, weights and buffers of network
and criterion are compared, absolutely below 1 and relatively above. What the tests check, as a
table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny
import together
import torch
from test_processes import METHODS, five_steps, largest_difference

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def forked(images: Path, folder: Path, flags: str) -> list[float]:
    """Differences of two and of three processes, on the CPU."""
    steps = partial(five_steps, images, flags)
    alone, found = steps(), []
    for count in (2, 3):
        results = together.run(count, steps, folder)
        found.append(max(largest_difference(alone, result) for result in results))
    return found


def sharing_the_gpu(images: Path, folder: Path, flags: str) -> list[float]:
    """The difference of two processes on one GPU: train.py's own command lines."""
    words = [*tiny.NETWORK, "--dataset", f"folder:{images}", "--warm", "0", "--amp", "off"]
    words += [*flags.split(), "--max-steps", "5", "--LOG_DIR", str(folder)]
    states = []
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        command = [sys.executable, *launcher, "train.py", *words, "--name", name]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=100)
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        kept = torch.load(folder / name / "last.pth", weights_only=True, map_location="cpu")
        states.append(kept["model_state_dict"])
    return [largest_difference(*states)]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    on_gpu = parser.parse_args().device == "cuda"
    torch.set_num_threads(1)
    heads = ("2 processes on one GPU",) if on_gpu else ("2 processes", "3 processes")
    print(f"| method | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}", flush=True)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(len(METHODS)) as pool:
        images = tiny.write_images(Path(name) / "data")
        places = [Path(name) / str(number) for number in range(len(METHODS))]
        for place in places:
            place.mkdir()
        # Forked processes want a quiet parent; programs of their own may run side by side.
        together_map = pool.map if on_gpu else map
        ways = partial(sharing_the_gpu if on_gpu else forked, images)
        for method, found in zip(METHODS, together_map(ways, places, METHODS.values())):  # noqa: B905
            print(f"| {method} | {' | '.join(f'{worst:.1e}' for worst in found)} |", flush=True)


if __name__ == "__main__":
    main()
