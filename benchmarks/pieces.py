"""Memory and time of one step with a batch embedded at once and in pieces (--micro-batch).

    python benchmarks/pieces.py
    python benchmarks/pieces.py --device cuda --model resnet50 --image-size 224 --micro-batch 100

Forward, Proxy-Anchor and backward of random images, each batch size in a process of its own. Memory
is the peak beyond that of the process with its network and images. A way that exceeds --limit GiB
is not tried with larger batches.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

import losses
import net
from benchmarks.measuring import Memory, apart, heads, line, timed

CLASSES = 100


def step(args: argparse.Namespace, batch: int, pieces: int) -> tuple[float, float]:
    """The peak memory that one step adds, in GiB, and its seconds."""
    device = torch.device(args.device)
    network = net.build(net.Architecture(args.model, 128, bn_freeze="affine", stem=args.stem))
    network.to(device, memory_format=torch.channels_last)
    objective = losses.compose("Proxy_Anchor", CLASSES, embedding_size=128).to(device)
    images = torch.randn(batch, 3, args.image_size, args.image_size, device=device)
    images = images.contiguous(memory_format=torch.channels_last)
    labels = torch.arange(batch, device=device) % CLASSES
    memory = Memory(device)
    taken = timed(lambda: objective(network(images, pieces=pieces), labels).backward(), device)
    return memory.peak() / 2**30, taken


def main() -> None:
    """Prints a table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--stem", default="small")
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--micro-batch", type=int, default=64)
    parser.add_argument("--batches", type=int, nargs="+", default=[256, 1024, 4096])
    parser.add_argument("--limit", type=float, default=4.0)
    args = parser.parse_args()
    print(heads(("batch", "at once, GiB", "seconds", "in pieces, GiB", "seconds")))
    fits = True
    for batch in args.batches:
        cells = []
        for pieces in (1, -(-batch // args.micro_batch)):
            if pieces == 1 and not fits:
                cells += ["–", "–"]
                continue
            peak, taken = apart(step, args, batch, pieces)
            cells += [f"{peak:.2f}", f"{taken:.1f}"]
            if pieces == 1:
                fits = 4 * peak < args.limit
        print(line((f"{batch:,}", *cells)), flush=True)


if __name__ == "__main__":
    main()
