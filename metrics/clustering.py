"""Seeded k-means in bounded memory, on CPU and GPU.

It starts by greedy k-means++ (Arthur and Vassilvitskii, 2007) in batches: once many centres are
chosen, each round draws several, so that the start takes about as long as one Lloyd iteration even
with 11,316 centres. Its Lloyd iterations skip products that cannot change an assignment.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from metrics.products import Array, as_numbers, full_float32, inner_products
from metrics.sharing import Progress

DRAWN_ALONE = 2**20  # k-means++ draws this / N centres one by one, then several at a time
BLOCK_ELEMENTS = {"cpu": 2**22, "cuda": 2**25}  # floats in one block of scores: 16 and 128 MiB


class Clustering(NamedTuple):
    """What `kmeans` returns."""

    labels: Tensor  # (N,) int64, the nearest centre of each point
    centres: Tensor  # (k, d) float32
    inertia: float  # sum over the points of ‖x - its centre‖²


@torch.no_grad()
def kmeans(
    x: Array,
    k: int,
    seed: int = 0,
    restarts: int = 1,
    iterations: int = 100,
    *,
    start: Tensor | None = None,
    progress: Progress | None = None,
) -> Clustering:
    """Cluster x (N, d) into k clusters: minimise Σ_i min_c ‖x_i - centre_c‖².

    Returns the best of `restarts` runs by inertia. A run stops after `iterations` Lloyd iterations,
    or when no point changes its cluster. A cluster that becomes empty is moved to the point that is
    farthest from its own centre. The same seed on the same device gives the same result.
    `start` (k, d) are initial centres to use instead of drawn ones.
    Runs on the device of x. Memory: besides x and k centres, a block of scores (at most 128 MiB)
    and a few vectors of length N. `progress` is called with the share of the work done, in 0..1.

    Raises ValueError: x not 2-d, empty or not finite, or k, restarts, iterations out of range.
    """
    x = as_numbers(x, "k-means needs points of shape (N, d), made of numbers")
    x = x.float().contiguous()
    _check(x, k, restarts, iterations)
    if start is not None and start.shape != (k, x.shape[1]):
        raise ValueError(f"k-means was given {tuple(start.shape)} centres for {k} clusters.")
    report = progress or (lambda share: None)
    generator = torch.Generator().manual_seed(seed)
    best = None
    with full_float32(x.device):
        for restart in range(restarts):
            drawn = plus_plus(x, k, generator) if start is None else _from_centres(x, start)
            run = _Lloyd(x, *drawn)
            for iteration in range(iterations):
                settled = not run.step()
                report((restart + (iteration + 1) / iterations) / restarts)
                if settled:
                    break
            result = run.result()
            if best is None or result.inertia < best.inertia:
                best = result
    report(1.0)
    return best


def _check(x: Tensor, k: int, restarts: int, iterations: int) -> None:
    if x.ndim != 2 or x.numel() == 0:
        raise ValueError(f"k-means needs points of shape (N, d), got {tuple(x.shape)}.")
    if not 1 <= k <= len(x):
        raise ValueError(f"k-means cannot make {k} clusters of {len(x)} points.")
    if restarts < 1 or iterations < 1:
        raise ValueError(
            f"k-means needs at least one restart and one iteration, got {restarts}, {iterations}."
        )
    if not torch.isfinite(x.sum(dim=1, dtype=torch.float64)).all():
        raise ValueError("k-means got points that are NaN or infinite; check what made them.")


def plus_plus(x: Tensor, k: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Centres (k, d) by k-means++: points drawn in proportion to D², their squared distance to the
    nearest centre so far. Also the points' labels and D² (N,).

    The first DRAWN_ALONE / N are drawn one by one: each is the best of several draws, the one that
    leaves the smallest Σ D². After that, each round draws one centre for every 16 chosen.
    """
    trials = 4 * (2 + int(math.log(k)))  # four times the usual number: it saves restarts
    squares = x.norm(dim=1).square()
    distances = torch.full_like(squares, torch.inf)
    weights = torch.ones(len(x), dtype=torch.float64)
    labels = torch.empty(len(x), dtype=torch.int64, device=x.device)
    chosen: list[Tensor] = []
    count = 0
    while count < k:
        size = 1 if count < DRAWN_ALONE // len(x) else min(max(1, count // 16), k - count)
        tries = min(max(1, trials // size), len(x) // size)
        # Weighted draw without replacement (Efraimidis and Spirakis, 2006), on the CPU so that
        # every device draws the same points.
        keys = weights / torch.empty_like(weights).exponential_(generator=generator)
        draws = keys.topk(tries * size).indices.to(x.device).view(tries, size)
        new, winners = _nearest_drawn(x, squares, draws)
        left = torch.minimum(distances[:, None], new)
        best = int(left.sum(dim=0, dtype=torch.float64).argmin())
        labels = torch.where(new[:, best] < distances, winners[:, best] + count, labels)
        distances = left[:, best]
        weights = distances.double().cpu().index_fill_(0, draws[best].cpu(), 0)
        chosen.append(draws[best])
        count += size
    return x[torch.cat(chosen)], labels, distances


def _from_centres(x: Tensor, centres: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Given centres (k, d), with labels and squared distances as `plus_plus` returns them."""
    centres = centres.to(x)
    scores, labels = _nearest(x, centres, torch.arange(len(x), device=x.device))
    return centres, labels, (x.square().sum(dim=1) - 2 * scores).clamp_min_(0)


def _nearest_drawn(x: Tensor, squares: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance of each point to the nearest point of each draw, and its place in the draw.

    x (N, d), squares (N,) = ‖x‖², draws (tries, size) indices -> two (N, tries).
    """
    centres = x[draws.flatten()]
    distances, winners = [], []
    height = _height(x, len(centres))
    for block, square in zip(x.split(height), squares.split(height), strict=True):
        scores = _scores(block, centres).view(-1, *draws.shape).max(dim=2)
        distances.append((square[:, None] - 2 * scores.values).clamp_min_(0))
        winners.append(scores.indices)
    return torch.cat(distances), torch.cat(winners)


def _scores(x: Tensor, centres: Tensor) -> Tensor:
    """x·c - ‖c‖²/2, (n, k). ‖x - c‖² = ‖x‖² - 2·score: the highest score is the nearest centre."""
    return inner_products(x, centres).sub_(centres.square().sum(dim=1) / 2)


def _height(x: Tensor, width: int) -> int:
    """The number of rows of x in a block of scores against `width` centres."""
    return max(1, BLOCK_ELEMENTS.get(x.device.type, 2**22) // max(width, x.shape[1]))


def _nearest(x: Tensor, centres: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Score and index of the best centre for each of the points x[rows]."""
    found = [_scores(x[part], centres).max(dim=1) for part in rows.split(_height(x, len(centres)))]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


class _Lloyd:
    """Lloyd's iterations from centres (k, d), the points' labels and squared distances (N,)."""

    def __init__(self, x: Tensor, centres: Tensor, labels: Tensor, distances: Tensor) -> None:
        self.x, self.centres, self.labels = x, centres, labels
        self.squares = x.norm(dim=1).square()
        self.scores = (self.squares - distances) / 2

    def step(self) -> bool:
        """Move the centres to their points' means, reassign the points; False if none changed."""
        centres, labels = self.centres, self.labels.clone()
        self.centres = self._means()
        self._assign((self.centres != centres).any(dim=1))
        return not torch.equal(self.labels, labels)

    def result(self) -> Clustering:
        """The current clustering."""
        inertia = self._residuals().sum(dtype=torch.float64)
        return Clustering(self.labels, self.centres, float(inertia))

    def _residuals(self) -> Tensor:
        return (self.squares - 2 * self.scores).clamp_min_(0)

    def _means(self) -> Tensor:
        counts = torch.bincount(self.labels, minlength=len(self.centres))
        # A segment mean adds in a fixed order, unlike index_add_ on a GPU with its atomic adds.
        order = self.labels.argsort(stable=True)
        means = F.embedding_bag(order, self.x, counts.cumsum(0) - counts, mode="mean")
        empty = (counts == 0).nonzero().squeeze(1)
        means[empty] = self.x[self._residuals().topk(len(empty)).indices]
        return means

    def _assign(self, moved: Tensor) -> None:
        """Assign points to their nearest centres, given which centres moved (k,).

        The scores of a centre that did not move are unchanged. So if a point's own score did not
        fall, only a centre that moved can be nearer; other points are compared with all centres.
        """
        touched = moved[self.labels]
        fell = torch.zeros_like(touched)
        for rows in touched.nonzero().squeeze(1).split(_height(self.x, 1)):
            centre = self.centres[self.labels[rows]]
            scores = (self.x[rows] * centre).sum(dim=1) - centre.square().sum(dim=1) / 2
            fell[rows] = scores < self.scores[rows]
            self.scores[rows] = scores
        self._challenge((~fell).nonzero().squeeze(1), moved.nonzero().squeeze(1))
        self._challenge(fell.nonzero().squeeze(1), torch.arange(len(moved), device=moved.device))

    def _challenge(self, rows: Tensor, challengers: Tensor) -> None:
        """Assign the points `rows` to centres among `challengers` that score higher."""
        if len(rows) == 0 or len(challengers) == 0:
            return
        scores, winners = _nearest(self.x, self.centres[challengers], rows)
        won = scores > self.scores[rows]
        self.scores[rows[won]] = scores[won]
        self.labels[rows[won]] = challengers[winners[won]]
