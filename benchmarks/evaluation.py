"""The cost of an evaluation: our metrics compared with other programs, in one table.

    python benchmarks/evaluation.py                  # SOP's and CUB's shapes, medians of 3
    python benchmarks/evaluation.py --shapes cub --repeats 5
    python benchmarks/evaluation.py --shapes classes       # 10,000 images in few or many classes
    python benchmarks/evaluation.py --shapes more-classes  # 60,000 images: an hour
    python benchmarks/evaluation.py --quick          # a tenth of SOP, once: does it run?
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
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import door

door.settle_threads(os.environ)  # as every command does, before torch is loaded

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.measuring import Memory, heads, line, timed
from devices import device_name
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
    judged: bool = False  # whether it has to meet the bars
    dimension: int = 512
    rows: tuple[str, ...] = ()  # (): all but those for other shapes


FEW_ROWS = ("ours", "pytorch-metric-learning, faiss-cpu", "plain topk")
CLASSES = {"2": 2, "10": 10, "100": 100, "1,000": 1000, "single": 0}


def in_classes(images: int) -> dict[str, Shape]:
    """Images of 64 dimensions in few large classes, in many small ones, and in one class each."""
    return {
        f"{images // 1000}k-{name}": Shape(
            f"{name} classes", images, classes or images, 1.5, (1, 10), True, 64, FEW_ROWS
        )
        for name, classes in CLASSES.items()
    }


SHAPES = {
    "sop": Shape("SOP", 60_502, 11_316, 1.15, (1, 10, 100, 1000), judged=True),
    "cub": Shape("CUB", 5_924, 100, 2.2, (1, 2, 4, 8, 16, 32)),
    "quick": Shape("SOP / 10", 6_050, 1_132, 1.0, (1, 10, 100, 1000)),
    **in_classes(10_000),
    **in_classes(60_000),
}
GROUPS = {
    "sop": ["sop"],
    "cub": ["cub"],
    "all": ["sop", "cub"],
    "classes": list(in_classes(10_000)),
    "more-classes": list(in_classes(60_000)),
    "quick": ["quick"],
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


def run_row(name: str, data: Path, ks: tuple[int, ...], device: torch.device) -> dict:
    """Measure one row on saved embeddings."""
    with np.load(data) as file:
        x, labels = (torch.from_numpy(file[key]).to(device) for key in ("x", "labels"))
    function = ROWS[name]
    few = torch.arange(min(1000, len(x)), device=device)
    try:
        function(x[few], labels[few], (1,))  # starts libraries, threads and kernels
    except ModuleNotFoundError as missing:
        return {"missing": missing.name}
    with two_busy_processes() if name == BESIDE else nullcontext():
        memory, found = Memory(device), {}
        taken = timed(lambda: found.update(function(x, labels, ks)), device)
    return {"seconds": taken, "memory": memory.peak() / 1e6, **found}


def measure(shape: Shape, repeats: int, device: str) -> dict[str, list[dict]]:
    """All rows of a shape in turn, `repeats` times."""
    others = {"plain topk", ALONE, BESIDE} if device == "cuda" else {"plain topk"}
    rows = shape.rows or tuple(name for name in ROWS if name not in others)
    results: dict[str, list[dict]] = {name: [] for name in rows}
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "embeddings.npz"
        x, labels = embeddings_like(shape)
        np.savez(data, x=x.numpy(), labels=labels.numpy())
        for turn in range(repeats):
            for name in rows:
                print(f"{shape.title} {turn + 1}/{repeats}: {name}", file=sys.stderr, flush=True)
                command = [sys.executable, __file__, "--row", name, "--data", str(data)]
                command += ["--device", device, "--ks", *map(str, shape.ks)]
                answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                results[name].append(json.loads(answer.stdout.splitlines()[-1]))
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


def table(shape: Shape, results: dict[str, list[dict]], device: str) -> str:
    """Markdown: medians and ratios to our row, recalls, and the bars with their verdicts."""
    lines = [
        f"### {shape.title}: {shape.images:,} × {shape.dimension}, {shape.classes:,} classes, "
        f"{device}",
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
    if shape.rows:
        lines += ["", str(bar_of_classes(results))]
    elif shape.judged:
        lines += ["", *map(str, bars(results, device))]
    return "\n".join(lines)


class Bar(NamedTuple):
    """A figure that must not exceed a limit."""

    words: str
    figure: float
    limit: float

    def __str__(self) -> str:
        verdict = "pass" if self.figure <= self.limit else "fail"
        return f"- {self.words}: {self.figure:.2f}, at most {self.limit:.2f}: {verdict}"


def bars(results: dict[str, list[dict]], device: str) -> list[Bar]:
    """The bars that our rows must meet; those whose package is missing are left out."""
    known = {name: runs for name, runs in results.items() if "missing" not in runs[0]}

    def ratio(key: str, ours: str, other: str) -> float:
        return median(known[ours], key) / max(1e-9, median(known[other], key))

    found = []
    if device == "cpu":
        beside = ratio("seconds", BESIDE, ALONE)
        found.append(Bar("ours beside two busy processes ÷ ours of one thread", beside, 2))
    if device == "cuda":
        found.append(Bar("seconds of our retrieval", median(known["ours"], "seconds"), 1.5))
        found.append(Bar("seconds of our k-means", median(known["k-means: ours"], "seconds"), 10))
    else:
        floor = ratio("seconds", "ours", "one float32 product")
        found.append(Bar("our retrieval ÷ one product, seconds", floor, 1.0))
        if (peer := "pytorch-metric-learning, faiss-cpu") in known:
            words = "our retrieval ÷ pytorch-metric-learning"
            found.append(Bar(f"{words}, seconds", ratio("seconds", "ours", peer), 0.75))
            found.append(Bar(f"{words}, memory", ratio("memory", "ours", peer), 1 / 3))
    if (peer := "k-means: faiss-cpu") in known:
        apart = ratio("inertia", "k-means: ours", peer)
        found.append(Bar("our k-means ÷ faiss-cpu, inertia", apart, 1.01))
    return found


def bar_of_classes(results: dict[str, list[dict]]) -> Bar:
    """The bar that ours is no slower than the fastest peer."""
    known = {
        name: median(runs, "seconds") for name, runs in results.items() if "missing" not in runs[0]
    }
    ours = known.pop("ours")
    return Bar("our retrieval ÷ the fastest peer, seconds", ours / min(known.values()), 1.0)


def median(runs: list[dict], key: str) -> float:
    """Median of a column over the repeats."""
    return statistics.median(run[key] for run in runs)


def main() -> None:
    """Run the rows and print the table, or (--row) run one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", choices=[*GROUPS], default="all")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each row; medians count")
    parser.add_argument("--quick", action="store_true", help="a tenth of SOP, once")
    parser.add_argument("--ours", action="store_true", help="our rows alone, without peers")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ks", type=int, nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.repeats < 1:
        parser.error("--repeats must be at least 1")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.row:
        print(json.dumps(run_row(args.row, args.data, tuple(args.ks), torch.device(args.device))))
        return
    chosen = GROUPS["quick" if args.quick else args.shapes]
    machine = device_name(torch.device(args.device))
    print(f"{machine}; torch {torch.__version__}; Python {platform.python_version()}")
    for key in chosen:
        if args.ours:
            print_ours(SHAPES[key], args.repeats, torch.device(args.device))
            continue
        results = measure(SHAPES[key], 1 if args.quick else args.repeats, args.device)
        print(f"\n{table(SHAPES[key], results, args.device)}", flush=True)


if __name__ == "__main__":
    main()
