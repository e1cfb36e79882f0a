"""The coverage of 95 % intervals of R@1, and the accuracy of a search's printed error rates.

    python benchmarks/intervals.py              # two tables
    python benchmarks/intervals.py --samples 100

They are simulated, so that the true values are known: classes whose recalls are drawn from a
distribution with a given mean; and clusters of images, judged by other clusters of the same kind.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch

from benchmarks.measuring import heads, line
from evaluation.verifying import recommended
from metrics.comparison import Scores, interval, replicates, share_interval
from metrics.verification import count_pairs

CLASSES = (5, 10, 20, 100)
RESAMPLES = 500
Draw = Callable[[np.random.Generator, int, float], np.ndarray]


def beta(spread: float) -> Draw:
    """Recalls of classes as Beta(spread * mean, spread * (1 - mean)); less spread varies more."""
    return lambda rng, count, mean: rng.beta(spread * mean, spread * (1 - mean), count)


def a_few_bad(rng: np.random.Generator, count: int, mean: float) -> np.ndarray:
    """Recalls of about .3 for some classes, and of 1 for the others."""
    bad = rng.random(count) < (1 - mean) / 0.7
    return np.where(bad, rng.normal(0.3, 0.1, count).clip(0, 1), 1.0)


KINDS: dict[str, Draw] = {
    "Beta(4p, 4 - 4p)": beta(4),
    "Beta(p, 1 - p)": beta(1),
    "a few bad classes": a_few_bad,
}


def held(draw: Draw, truth: float, classes: int, samples: int) -> tuple[float, float]:
    """Shares of the samples in which intervals contain the truth: ours, expanded percentiles."""
    rng, found = np.random.default_rng(0), []
    for seed in range(samples):
        sizes = rng.integers(4, 61, classes)
        right = rng.binomial(sizes, draw(rng, classes, truth))
        columns = (torch.from_numpy(part)[:, None].double() for part in (right, sizes))
        scores = Scores(("R@1",), *columns, torch.arange(classes))
        drawn = replicates([scores], RESAMPLES, seed)[0][:, 0]
        ours = share_interval(scores.means()["R@1"], drawn, classes)
        both = ours, interval(drawn, classes)
        found.append([low - 1e-9 <= truth <= high + 1e-9 for low, high in both])
    return tuple(np.mean(found, axis=0))


def clusters(rng: np.random.Generator, classes: int, images: int) -> np.ndarray:
    """Unit vectors (classes * images, 6) around a centre for each class; clusters overlap."""
    centres = rng.normal(size=(classes, 1, 6))
    vectors = (centres + 0.7 * rng.normal(size=(classes, images, 6))).reshape(-1, 6)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def errors(classes: int, images: int, samples: int) -> Iterator[tuple[float, float]]:
    """For each sample, the share of queries without their class in the index that get "same".

    Yields the share that is printed, and that of other classes in an index of the same size.
    """
    rng, labels = np.random.default_rng(0), np.repeat(np.arange(classes), images)
    for _ in range(samples):
        found = recommended(count_pairs(clusters(rng, classes, images), labels))
        searching = found.in_index((classes - 1) * images)
        wrong = []
        for _ in range(8):
            index, queries = clusters(rng, classes - 1, images), clusters(rng, 100, 3)
            wrong.append(((queries @ index.T).max(axis=1) >= searching.same).mean())
        yield searching.false_same.expected, float(np.mean(wrong))


def main() -> None:
    """Prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--samples", type=int, default=1000)
    args = parser.parse_args()
    print("95 % intervals of R@1 that hold the truth, % (in brackets expanded percentiles)\n")
    print(heads(("recalls of classes", "R@1", *(f"{count} classes" for count in CLASSES))))
    for kind, draw in KINDS.items():
        for truth in (0.7, 0.95, 0.99):
            shares = (held(draw, truth, count, args.samples) for count in CLASSES)
            cells = [f"{100 * ours:.0f} ({100 * other:.0f})" for ours, other in shares]
            print(line([kind, f"{truth:g}", *cells]), flush=True)
    print('\nqueries wrongly called "same" in an index of other classes, %\n')
    print(heads(("classes × images", "printed", "in truth", "ratio")))
    for classes, images in ((5, 40), (10, 20), (20, 10), (60, 6)):
        rates = list(errors(classes, images, max(2, args.samples // 15)))
        printed, true = np.mean(rates, axis=0)
        cells = [f"{100 * printed:.1f}", f"{100 * true:.1f}", f"{true / printed:.2f}"]
        print(line([f"{classes} × {images}", *cells]), flush=True)


if __name__ == "__main__":
    main()
