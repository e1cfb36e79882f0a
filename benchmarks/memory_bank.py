"""The cost of a memory bank: time and memory of a loss with the last N embeddings.

    python benchmarks/memory_bank.py
    python benchmarks/memory_bank.py --device cuda --sizes 8192 65536

Forward and backward of one batch, four images per class, with a full memory: ours, and
pytorch-metric-learning's CrossBatchMemory with its own loss, if it has one. N = 0 is the batch
alone. Times are medians; memory is the peak that a step adds.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import pytorch_metric_learning.losses as library
import torch
from torch import Tensor

import losses
from benchmarks.losses import duration, peak_mebibytes
from benchmarks.measuring import heads, in_turn, line

PER_CLASS = 4
LOSSES: dict[str, Callable[[], torch.nn.Module] | None] = {
    "Contrastive": lambda: library.ContrastiveLoss(neg_margin=0.5),
    "SupCon": lambda: library.SupConLoss(temperature=0.07),
    "ms": None,
    "semihtriplet": None,
    "MarginLoss": None,
    "RecallAtK": None,
    "SupAP": None,
}


def steps_of(name: str, size: int, args: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """One step of ours, and of the library's, with their memories full."""
    classes = max(args.batch, size) // PER_CLASS
    x = torch.randn(args.batch, args.dim, device=args.device, requires_grad=True)
    options = {"weight": 1.0} if name == "SupAP" else {}
    attach = {"memory": {"size": size}} if size else {}
    objective = losses.compose(name, classes, args.dim, attach, **options).to(args.device)
    peers: dict[str, torch.nn.Module] = {}
    if size and LOSSES[name]:
        peers["library"] = library.CrossBatchMemory(LOSSES[name](), args.dim, size).to(args.device)
    for start in range(0, max(size, 1), args.batch):
        labels = torch.arange(start, start + args.batch, device=args.device) // PER_CLASS % classes
        filler = torch.randn(args.batch, args.dim, device=args.device)
        objective(losses.Embeddings(filler), labels)
        for peer in peers.values():
            peer(filler, labels)
    steps = {"ours": lambda: objective(losses.Embeddings(x), labels)}
    steps |= {kind: lambda peer=peer: peer(x, labels) for kind, peer in peers.items()}
    return steps


def main() -> None:
    """Prints a table, row by row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[0, 1024, 8192, 65536])
    parser.add_argument("--only", nargs="+", choices=LOSSES, default=[*LOSSES])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    print(
        f"torch {torch.__version__}, {args.device}, {args.threads} threads, B = {args.batch}, "
        f"d = {args.dim}\n"
    )
    print(heads(("loss", "N", "ours, ms", "library, ms", "ours, MiB", "library, MiB")))
    for name in args.only:
        for size in args.sizes:
            steps = steps_of(name, size, args)
            memory = {k: peak_mebibytes(step, _nothing, args.device) for k, step in steps.items()}
            works = {k: partial(duration, s, _nothing, args.device) for k, s in steps.items()}
            times = in_turn(works, args.repeats)
            medians = {kind: 1e3 * statistics.median(found) for kind, found in times.items()}
            cells = [name, f"{size:,}"]
            for values, form in ((medians, "{:.1f}"), (memory, "{:.0f}")):
                cells += [
                    form.format(values[k]) if k in values else "–" for k in ("ours", "library")
                ]
            print(line(cells), flush=True)


def _nothing() -> None:
    """Does not clear gradients, whose memory is small."""


if __name__ == "__main__":
    main()
