"""The cost of an evaluation: our metrics compared with other programs, in one table.

    python benchmarks/evaluation.py                  # SOP's and CUB's shapes, medians of 3
    python benchmarks/evaluation.py --shapes cub --repeats 5
    python benchmarks/evaluation.py --shapes classes       # 10,000 images in few or many classes
    python benchmarks/evaluation.py --shapes quick --repeats 1     # a tenth of SOP: does it run?
    python benchmarks/evaluation.py --ours           # our rows alone, in this process: seconds

Synthetic embeddings (no download): classes on a sphere, with noise of varying size, so that recalls
are like those of a trained network. Every row runs in a process of its own, after a warm-up on a
few images; the rows take turns, so that changes of the machine's speed affect all. In "beside two
busy processes", two processes are in endless loops, like other people's jobs. Memory is the peak
beyond the loaded embeddings: resident memory on a CPU (Linux), allocated memory on a GPU. A row
whose package (pytorch-metric-learning, faiss-cpu) is missing says so.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import door

door.settle_threads(os.environ)  # as every command does, before torch is loaded

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measuring import Memory, apart, heads, line, timed
from devices import device_name
from flags import whole
from metrics import clustering_metrics, nmi_f1, retrieval_metrics
from metrics.clustering import kmeans

ITERATIONS = 20  # of k-means, ours and faiss's


class Shape(NamedTuple):
    """Size and difficulty of a synthetic data set."""

    title: str
    images: int
    classes: int
    noise: float
    ks: tuple[int, ...]
    dimension: int = 512
    rows: tuple[str, ...] = ()  # (): all but those for other shapes


FEW_ROWS = ("ours", "pytorch-metric-learning, faiss-cpu", "plain topk")
CLASSES = {"2": 2, "10": 10, "100": 100, "1,000": 1000, "single": 10_000}


SOP = Shape("SOP", 60_502, 11_316, 1.15, (1, 10, 100, 1000))
CUB = Shape("CUB", 5_924, 100, 2.2, (1, 2, 4, 8, 16, 32))
SHAPES = {
    "all": (SOP, CUB),
    "sop": (SOP,),
    "cub": (CUB,),
    # Few large classes, many small ones, and one for each image.
    "classes": tuple(
        Shape(f"{name} classes", 10_000, classes, 1.5, (1, 10), 64, FEW_ROWS)
        for name, classes in CLASSES.items()
    ),
    "quick": (Shape("SOP / 10", 6_050, 1_132, 1.0, (1, 10, 100, 1000)),),
}


def embeddings_like(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit embeddings (N, d) float32 and labels (N,); if possible, classes have two images or more.

    Class centres form 12 super-classes and 600 groups, in a 64-dimensional subspace; images are
    around their centres, with noise of a size that differs from image to image.
    """
    generator = torch.Generator().manual_seed(seed)
    effective = 64
    spectrum = torch.arange(1, effective + 1).float().pow(-0.25)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, effective, generator=generator) * spectrum

    count, classes, dimension = shape.images, shape.classes, shape.dimension
    least = min(2, count // classes)
    extra = torch.randint(classes, (count - least * classes,), generator=generator)
    labels = torch.arange(classes).repeat_interleave(least + extra.bincount(minlength=classes))
    superclass = torch.arange(classes) * 12 // classes
    group = torch.randint(600, (classes,), generator=generator)
    centres = normal(classes) + 0.6 * normal(12)[superclass] + 0.7 * normal(600)[group]
    size = shape.noise * torch.exp(0.4 * torch.randn(count, 1, generator=generator))
    points = centres[labels] + size * normal(count)
    turn = torch.linalg.qr(torch.randn(dimension, effective, generator=generator))[0]
    points = points @ turn.T + 0.02 * torch.randn(count, dimension, generator=generator)
    return F.normalize(points), labels


# The rows: (embeddings, labels, ks) -> what the row's columns show ------------------------------


def ours(x: Tensor, labels: Tensor, ks: tuple[int, ...]) -> dict[str, float]:
    """R@K for all K, RP, MAP@R, mARP, MRR."""
    return retrieval_metrics(x, labels, ks=ks)


def pytorch_metric_learning(x: Tensor, labels: Tensor, ks: tuple[int, ...]) -> dict[str, float]:
    """R@1, RP and MAP@R by AccuracyCalculator on faiss."""
    import faiss  # noqa: F401  (the calculator needs it)
    from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator

    names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
    calculator = AccuracyCalculator(include=names, k="max_bin_count", device=x.device)
    found = calculator.get_accuracy(x, labels)
    return {"R@1": found[names[0]], "MAP@R": found[names[2]]}


def published(x: Tensor, labels: Tensor, ks: tuple[int, ...]) -> dict[str, float]:
    """R@K as in released evaluators: the top K of full rows, then a loop over the queries."""
    hits = dict.fromkeys(ks, 0)
    for rows, own in zip(x.split(10_000), labels.split(10_000), strict=True):
        nearest = (rows @ x.T).topk(max(ks) + 1).indices[:, 1:]
        for label, found in zip(own.cpu(), labels[nearest].cpu(), strict=True):
            for k in ks:
                hits[k] += label in found[:k]
    return {f"R@{k}": count / len(x) for k, count in hits.items()}


def plain_topk(x: Tensor, labels: Tensor, ks: tuple[int, ...]) -> dict[str, float]:
    """R@1 and MAP@R from the R nearest of full rows, 256 queries at a time."""
    relevant = labels.bincount()[labels] - 1
    most = max(1, int(relevant.max()))
    places = torch.arange(1, most + 1, device=x.device)
    first, precision = 0, 0.0
    for start in range(0, len(x), 256):
        rows = torch.arange(start, min(start + 256, len(x)), device=x.device)
        similarities = x[rows] @ x.T
        similarities[torch.arange(len(rows)), rows] = -torch.inf
        hit = labels[similarities.topk(most).indices] == labels[rows, None]
        first += int(hit[:, 0].sum())
        hit &= places <= relevant[rows, None]
        found = (hit.cumsum(1) / places * hit).sum(1) / relevant[rows].clamp_min(1)
        precision += float(found.sum())
    return {"R@1": first / len(x), "MAP@R": precision / max(1, int((relevant > 0).sum()))}


def ours_alone(x: Tensor, labels: Tensor, ks: tuple[int, ...]) -> dict[str, float]:
    """Ours with one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return ours(x, labels, ks)
    finally:
        torch.set_num_threads(threads)


@contextmanager
def two_busy_processes() -> Iterator[None]:
    """Two processes in endless loops, once they have started."""
    code = "print(flush=True)\nwhile True: pass"
    command = [sys.executable, "-c", code]
    busy = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(2)]
    try:
        for process in busy:
            process.stdout.readline()
        yield
    finally:
        for process in busy:
            process.kill()
            process.communicate()


def one_product(x: Tensor, labels: Tensor, ks: tuple[int, ...]) -> dict[str, float]:
    """One float32 product N × N × d in blocks of rows, nothing else."""
    out = x.new_empty(4096, len(x))
    for rows in x.split(4096):
        torch.mm(rows, x.T, out=out[: len(rows)])
    return {}


def our_kmeans(x: Tensor, labels: Tensor, ks: tuple[int, ...]) -> dict[str, float]:
    """k-means++ and at most 20 iterations."""
    found = kmeans(x, len(labels.unique()), iterations=ITERATIONS)
    return {"inertia": found.inertia, "NMI": nmi_f1(labels, found.labels)["NMI"]}


def faiss_kmeans(x: Tensor, labels: Tensor, ks: tuple[int, ...]) -> dict[str, float]:
    """Random start and 20 iterations, all points used."""
    import faiss

    points, k = x.cpu().numpy(), len(labels.unique())
    found = faiss.Kmeans(x.shape[1], k, niter=ITERATIONS, seed=0, min_points_per_centroid=1)
    found.cp.max_points_per_centroid = len(points)
    found.train(points)
    distances, clusters = found.index.search(points, 1)
    inertia = float(distances.sum(dtype=np.float64))
    return {"inertia": inertia, "NMI": nmi_f1(labels, clusters[:, 0])["NMI"]}


BESIDE = "ours, beside two busy processes"
ALONE = "ours, one thread"
RETRIEVAL: dict[str, Callable] = {
    "ours": ours,
    ALONE: ours_alone,
    BESIDE: ours,
    "pytorch-metric-learning, faiss-cpu": pytorch_metric_learning,
    "published: topk and a loop": published,
    "plain topk": plain_topk,
    "one float32 product": one_product,
}
CLUSTERING: dict[str, Callable] = {"k-means: ours": our_kmeans, "k-means: faiss-cpu": faiss_kmeans}
ROWS = RETRIEVAL | CLUSTERING


# One row, in a process of its own ---------------------------------------------------------------


def run_row(name: str, shape: Shape, device: torch.device) -> dict[str, Any]:
    """Measures one row of a shape's table."""
    x, labels = (tensor.to(device) for tensor in embeddings_like(shape))
    function = ROWS[name]
    few = torch.arange(min(1000, len(x)), device=device)
    try:
        function(x[few], labels[few], (1,))  # starts libraries, threads and kernels
    except ModuleNotFoundError as missing:
        return {"missing": missing.name}
    with two_busy_processes() if name == BESIDE else nullcontext():
        memory, found = Memory(device), {}
        taken = timed(lambda: found.update(function(x, labels, shape.ks)), device)
    return {"seconds": taken, "memory": memory.peak() / 1e6, **found}


def measure(shape: Shape, repeats: int, device: torch.device) -> dict[str, list[dict[str, Any]]]:
    """All rows of a shape in turn, `repeats` times."""
    others = {"plain topk", ALONE, BESIDE} if device.type == "cuda" else {"plain topk"}
    rows = shape.rows or tuple(name for name in ROWS if name not in others)
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in rows}
    for turn in range(repeats):
        for name in rows:
            print(f"{shape.title} {turn + 1}/{repeats}: {name}", file=sys.stderr, flush=True)
            results[name].append(apart(run_row, name, shape, device))
    return results


def print_ours(shape: Shape, repeats: int, device: torch.device) -> None:
    """Prints a line for each part of an evaluation: its seconds, and the memory that it adds."""
    x, labels = (tensor.to(device) for tensor in embeddings_like(shape))
    few = slice(1000)
    ours(x[few], labels[few], (1,))  # starts libraries, threads and kernels
    what: dict[str, Callable[[], dict[str, float]]] = {
        "retrieval": lambda: ours(x, labels, shape.ks),
        "k-means, NMI and F1": lambda: clustering_metrics(x, labels),
        "one float32 product": lambda: one_product(x, labels, shape.ks),
    }
    for name, compute in what.items():
        taken, peak = [], 0.0
        for _ in range(repeats):
            memory = Memory(device)
            taken.append(timed(compute, device))
            peak = memory.peak() / 1e6
        print(
            f"{shape.title} {name}: {statistics.median(taken):.3f} s ({min(taken):.3f} to "
            f"{max(taken):.3f}), {peak:.0f} MB",
            flush=True,
        )


# The table --------------------------------------------------------------------------------------


COLUMNS = (
    *("", "seconds (min to max)", "÷ ours", "memory, MB", "÷ ours"),
    *("R@1", "MAP@R", "inertia", "NMI"),
)


def table(shape: Shape, results: dict[str, list[dict[str, Any]]], device: torch.device) -> str:
    """Markdown: medians and ratios to our row, and recalls."""
    lines = [
        f"### {shape.title}: {shape.images:,} × {shape.dimension}, {shape.classes:,} classes, "
        f"{device.type}",
        "",
        heads(COLUMNS),
    ]
    for name, runs in results.items():
        if "missing" in runs[0]:
            lines.append(line((name, f"needs {runs[0]['missing']}", *[""] * 7)))
            continue
        reference = results["ours" if name in RETRIEVAL else "k-means: ours"]
        taken, memory = (median(runs, key) for key in ("seconds", "memory"))
        spread = f"{min(r['seconds'] for r in runs):.2f} to {max(r['seconds'] for r in runs):.2f}"
        cells = [
            f"{taken:.2f} ({spread})",
            f"{taken / median(reference, 'seconds'):.2f}",
            f"{memory:.0f}",
            f"{memory / max(1.0, median(reference, 'memory')):.2f}",
        ]
        for key, digits in (("R@1", 4), ("MAP@R", 4), ("inertia", 1), ("NMI", 4)):
            cells.append(f"{runs[0][key]:.{digits}f}" if key in runs[0] else "")
        lines.append(line((name, *cells)))
    recalls = ", ".join(f"R@{k} {results['ours'][0][f'R@{k}']:.4f}" for k in shape.ks)
    lines += ["", f"Our row's recalls: {recalls}."]
    return "\n".join(lines)


def median(runs: list[dict[str, Any]], key: str) -> float:
    """Median of a column over the repeats."""
    return statistics.median(run[key] for run in runs)


def main() -> None:
    """Runs the rows and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=SHAPES, default="all")
    parser.add_argument("--repeats", type=whole(1), default=3, help="of each row; medians count")
    parser.add_argument("--ours", action="store_true", help="our rows alone, without peers")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    args = parser.parse_args()
    found = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(found if args.device == "auto" else args.device)
    print(f"{device_name(device)}; torch {torch.__version__}; Python {platform.python_version()}")
    for shape in SHAPES[args.shapes]:
        if args.ours:
            print_ours(shape, args.repeats, device)
            continue
        results = measure(shape, args.repeats, device)
        print(f"\n{table(shape, results, device)}", flush=True)


if __name__ == "__main__":
    main()
