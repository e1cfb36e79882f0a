"""The cost of verification and post-processing, compared with retrieval: seconds and memory.

    python benchmarks/verification.py                     # SOP's shape: 60,502 images, 512 numbers
    python benchmarks/verification.py --images 6050 --classes 1132

Synthetic embeddings, each row in a process of its own, once. Memory is the peak beyond the process
with the embeddings loaded (Linux).
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import door

door.settle_threads(os.environ)  # as every command does, before torch is loaded

import torch
from torch import Tensor

import metrics
from benchmarks.measuring import Memory, apart, timed
from evaluation.verifying import recommended
from metrics.expansion import expanded
from metrics.reranking import Reranking
from metrics.verification import count_pairs
from options.ranking import RERANKING


def embeddings(images: int, classes: int, size: int = 512) -> tuple[Tensor, Tensor]:
    """Images around a centre for each class, (N, size) float32, and labels (N,)."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(images) * classes // images
    centres = torch.randn(classes, size, generator=generator)
    return centres[labels] + 1.5 * torch.randn(images, size, generator=generator), labels


def _expanded(x: Tensor, labels: Tensor) -> None:
    own = torch.arange(len(x))
    metrics.retrieval_per_query(expanded(x, None, 5, 3.0), labels, x, labels, exclude=(own, own))


def _reranked(x: Tensor, labels: Tensor) -> None:
    own, score = torch.arange(len(x)), Reranking(x, None, *RERANKING)
    metrics.retrieval_per_query(x, labels, x, labels, exclude=(own, own), score=score)


ROWS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "retrieval": metrics.retrieval_per_query,
    "all pairs": count_pairs,
    "all pairs and thresholds": lambda x, labels: recommended(count_pairs(x, labels)),
    "expansion, retrieval": _expanded,
    "re-ranking, retrieval": _reranked,
}


def measure(row: str, images: int, classes: int) -> str:
    """A line of the table, measured in this process."""
    ROWS[row](*embeddings(600, 100))  # a first call loads modules and kernels
    x, labels = embeddings(images, classes)
    memory = Memory("cpu")
    taken = timed(lambda: ROWS[row](x, labels), "cpu")
    return f"{row:26} {taken:8.1f} s {memory.peak() / 2**20:8.0f} MiB"


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=60_502)
    parser.add_argument("--classes", type=int, default=11_316)
    args = parser.parse_args()
    print(f"{args.images:,} images, {args.classes:,} classes, {torch.get_num_threads()} threads")
    for row in ROWS:
        print(apart(measure, row, args.images, args.classes), flush=True)


if __name__ == "__main__":
    main()
