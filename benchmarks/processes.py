"""Do several processes train like one? The largest difference after five steps, per method.

    python benchmarks/processes.py                 # 1 against 2 and 3, on the CPU
    python benchmarks/processes.py --device cuda   # 1 against 2 that share the GPU, by torchrun
    python benchmarks/processes.py --shard-proxies # the losses whose proxies can be divided
    python benchmarks/processes.py --memory 400000 # a process's memory with so many classes

Five optimisation steps on small pictures (on the CPU with a smaller last batch) by one process, and
by several gloo processes on this machine: losses, weights and buffers of network and criterion are
compared, absolutely below 1 and relatively above. The tests check the same. `--memory` instead runs
two steps of Proxy-Anchor with AdamW (d = 512, 256 images in all) and prints the peak memory that
they add to a process.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import tiny
import together
import torch
from test_processes import METHODS
from test_shares import DIVIDED, LOSSES
from together import five_steps, largest_difference

import losses
import processes
from benchmarks.measuring import heads, line, status

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def forked(images: Path, folder: Path, flags: str, more: str = "") -> list[float]:
    """Differences of two and of three processes, with the flags `more`, on the CPU."""
    alone, found = five_steps(images, flags), []
    for count in (2, 3):
        results = together.run(count, partial(five_steps, images, f"{flags} {more}"), folder)
        found.append(max(largest_difference(alone, result) for result in results))
    return found


def sharing_the_gpu(images: Path, folder: Path, flags: str, more: str = "") -> list[float]:
    """The difference of two processes on one GPU, by command lines of train.py."""
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


def proxies_held(classes: int) -> dict[str, torch.Tensor]:
    """The peak MiB that two steps add to this process, and the seconds of the second step."""
    before = status("VmRSS")
    torch.manual_seed(0)
    objective = losses.compose("Proxy_Anchor", classes, embedding_size=512)
    if processes.world() > 1:
        for part in objective.modules():
            if isinstance(part, losses.ProxyLoss):
                part.divide()
    optimiser = torch.optim.AdamW(objective.parameters(), 1e-3)
    processes.count_once(objective.parameters())
    own = processes.shard(256)
    embeddings = torch.randn(256, 512)[own].requires_grad_()
    labels = torch.randint(classes, (256,))[own]
    for _ in range(2):
        start = time.perf_counter()
        optimiser.zero_grad()
        objective(losses.Embeddings(embeddings), labels).backward()
        processes.sum_gradients(objective.parameters())
        optimiser.step()
    peak = (status("VmHWM") - before) / 2**20  # with the memory for building
    return {"MiB": torch.tensor(peak), "seconds": torch.tensor(time.perf_counter() - start)}


def print_memory(classes: int) -> None:
    """Prints the memory of a process alone, and of one of two with half of the proxies each."""
    print(heads(("processes", "MiB of each", "seconds")), flush=True)
    for count in (1, 2):
        with tempfile.TemporaryDirectory() as name:
            found = together.run(count, partial(proxies_held, classes), Path(name))
        most, slowest = (max(float(one[key]) for one in found) for key in ("MiB", "seconds"))
        print(line((count, f"{most:,.0f}", f"{slowest:.1f}")), flush=True)


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--shard-proxies", action="store_true")
    parser.add_argument("--memory", type=int, metavar="CLASSES")
    args = parser.parse_args()
    if args.memory:
        print_memory(args.memory)
        return
    on_gpu, methods = args.device == "cuda", LOSSES if args.shard_proxies else METHODS
    torch.set_num_threads(1)
    counts = ("2 processes on one GPU",) if on_gpu else ("2 processes", "3 processes")
    print(heads(("method", *counts)), flush=True)
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(len(methods)) as pool:
        images = tiny.write_images(Path(name) / "data")
        places = [Path(name) / str(number) for number in range(len(methods))]
        for place in places:
            place.mkdir()
        # Forking needs a parent without threads; separate programs may run at the same time.
        together_map = pool.map if on_gpu else map
        more = DIVIDED if args.shard_proxies else ""
        ways = partial(sharing_the_gpu if on_gpu else forked, images, more=more)
        for method, found in zip(methods, together_map(ways, places, methods.values())):  # noqa: B905
            print(line((method, *(f"{worst:.1e}" for worst in found))), flush=True)


if __name__ == "__main__":
    main()
