"""Are several processes the same as one? The largest difference after five steps, per method.

    python benchmarks/processes.py                 # 1 against 2 and 3, on the CPU
    python benchmarks/processes.py --device cuda   # 1 against 2 that share the GPU, by torchrun
    python benchmarks/processes.py --shard-proxies # the losses whose proxies can be divided

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
from test_shares import DIVIDED, LOSSES

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def forked(images: Path, folder: Path, flags: str, more: str = "") -> list[float]:
    """Differences of two and of three processes, which have `more` flags, on the CPU."""
    alone, found = five_steps(images, flags), []
    for count in (2, 3):
        results = together.run(count, partial(five_steps, images, f"{flags} {more}"), folder)
        found.append(max(largest_difference(alone, result) for result in results))
    return found


def sharing_the_gpu(images: Path, folder: Path, flags: str, more: str = "") -> list[float]:
    """The difference of two processes on one GPU: train.py's own command lines."""
    words = [*tiny.NETWORK, "--dataset", f"folder:{images}", "--warm", "0", "--amp", "off"]
    words += [*flags.split(), "--max-steps", "5", "--LOG_DIR", str(folder)]
    states = []
    for name, launcher in (("one", ()), ("two", TORCHRUN)):
        own = [*words, *(more.split() if launcher else ())]
        command = [sys.executable, *launcher, "train.py", *own, "--name", name]
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
    parser.add_argument("--shard-proxies", action="store_true")
    args = parser.parse_args()
    on_gpu, methods = args.device == "cuda", LOSSES if args.shard_proxies else METHODS
    torch.set_num_threads(1)
    heads = ("2 processes on one GPU",) if on_gpu else ("2 processes", "3 processes")
    print(f"| method | {' | '.join(heads)} |\n|{'---|' * (1 + len(heads))}", flush=True)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(len(methods)) as pool:
        images = tiny.write_images(Path(name) / "data")
        places = [Path(name) / str(number) for number in range(len(methods))]
        for place in places:
            place.mkdir()
        # Forked processes want a quiet parent; programs of their own may run side by side.
        together_map = pool.map if on_gpu else map
        more = DIVIDED if args.shard_proxies else ""
        ways = partial(sharing_the_gpu if on_gpu else forked, images, more=more)
        for method, found in zip(methods, together_map(ways, places, methods.values())):  # noqa: B905
            print(f"| {method} | {' | '.join(f'{worst:.1e}' for worst in found)} |", flush=True)


if __name__ == "__main__":
    main()
