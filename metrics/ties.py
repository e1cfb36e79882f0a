"""Retrieval metrics with tied images: the mean over all orders of images that are exactly as close.

Gallery images that are exactly as close to a query are tied, and a ranking does not define their
order. If the right ones came first, a network that maps all images to one point would be perfect.
So every order of a group of tied images has the same weight, and a metric is its mean over these
orders (McSherry and Najork, 2008), computed and not sampled: no image is right because it is tied.

A group has t images, g of them right and n wrong, behind a images that are strictly closer, p of
them right. Its order matters if g and n are both above 0, as in all groups here.

    probability that the j-th of the group is right       g / t
    expected right images before it, if it is right       (j - 1) (g - 1) / (t - 1)
    probability that none of the first j is right         S(j) = Π_{i<j} (n - i) / (t - i)
    number of right images among the first j              hypergeometric
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_TERMS = 2**18  # terms of a sum that are held at once: 2 MiB for each tensor


@dataclass(frozen=True)
class TieGroups:
    """Groups of tied images of one or several queries: tensors of shape (T,), int64.

    Attributes:
        right: g, the number of images of the query's class in the group, at least 1.
        wrong: n, that of images of other classes, at least 1.
        closer: a, the number of images before the group.
        closer_right: p, how many of these are right.
        relevant: R of the query.
    """

    right: Tensor
    wrong: Tensor
    closer: Tensor
    closer_right: Tensor
    relevant: Tensor

    def __getitem__(self, chosen: Tensor) -> TieGroups:
        """The groups chosen by a mask or by indices."""
        return TieGroups(*(values[chosen] for values in vars(self).values()))

    def __len__(self) -> int:
        return len(self.right)

    @property
    def size(self) -> Tensor:
        """t, the number of images in the group."""
        return self.right + self.wrong

    @property
    def inside(self) -> Tensor:
        """m, how many of the group's images are among the query's R nearest."""
        return (self.relevant - self.closer).clamp_min(0).minimum(self.size)

    @property
    def cut(self) -> Tensor:
        """Whether only a part of the group is among the R nearest."""
        return (self.inside > 0) & (self.inside < self.size)

    def hits(self) -> Tensor:
        """The expected share of the group's right images among the R nearest: m / t.

        The expected number of hits is g times that.
        """
        return self.inside / self.size.double()

    def precision(self) -> Tensor:
        """What each right image of the group is expected to add to Σ_{j <= R} h_j·prec_j.

        1/t Σ_{j=1..m} (p + 1 + (j - 1)(g - 1)/(t - 1)) / (a + j)
        """
        return self._precisions((self.right - 1) / (self.size - 1).double()) / self.size

    def _precisions(self, company: Tensor) -> Tensor:
        """Σ_{j=1..m} (p + 1 + (j - 1)·company) / (a + j), in closed form.

        company (T,) or (T, H): the expected share of right images before the j-th in the group.
        """
        last = self.closer + self.inside
        harmonic = torch.zeros(int(last.max()) + 1 if len(self) else 1, dtype=torch.float64)
        harmonic[1:] = torch.arange(1, len(harmonic)).double().reciprocal().cumsum(0)
        inverse = harmonic[last] - harmonic[self.closer]  # Σ 1 / (a + j)
        offset = self.inside - (self.closer + 1) * inverse  # Σ (j - 1) / (a + j)
        if company.ndim == 2:
            inverse, offset = inverse[:, None], offset[:, None]
            return (self.closer_right + 1)[:, None] * inverse + company * offset
        return (self.closer_right + 1) * inverse + company * offset

    def precision_over_hits(self, before: Tensor) -> Tensor:
        """The query's expected mARP (T,): Σ_{j <= R} h_j·prec_j over the hits, 0 without a hit.

        For groups that are `cut`. Images before the group do not depend on its order; they have p
        hits, and `before` (T,) is their expected part of the sum. With h hits in the group:

            Σ_h P(h)·(before + h/m Σ_{j=1..m} (p + 1 + (j - 1)(h - 1)/(m - 1)) / (a + j)) / (p + h)
        """
        fewest = (self.inside - self.wrong).clamp_min(0)
        most = self.right.minimum(self.inside)
        found = torch.empty(len(self), dtype=torch.float64)
        for rows, step in _alike(most - fewest + 1):
            some = self[rows]
            hits = fewest[rows, None] + step
            possible = hits <= most[rows, None]
            probability = some._hypergeometric(hits, possible)
            company = (hits - 1) / (some.inside - 1).clamp_min(1).double()[:, None]
            within = hits / some.inside[:, None].double() * some._precisions(company)
            ratio = (before[rows, None] + within) / (some.closer_right[:, None] + hits).clamp_min(1)
            found[rows] = (probability * ratio).sum(dim=1)
        return found

    def _hypergeometric(self, hits: Tensor, possible: Tensor) -> Tensor:
        """P(h of the m images are right), (T, H), for h = `hits` (T, H), consecutive in a row.

        Uses P(h + 1) / P(h) = (g - h)(m - h) / ((h + 1)(n - m + h + 1)), which does not lose digits
        as differences of log-factorials do.
        """
        right, wrong, inside = (x[:, None] for x in (self.right, self.wrong, self.inside))
        up = ((right - hits) * (inside - hits)).clamp_min(1).double().log()
        down = ((hits + 1) * (wrong - inside + hits + 1)).double().log()
        log = (up - down).cumsum(dim=1).roll(1, dims=1)
        log[:, 0] = 0
        return log.masked_fill_(~possible, -torch.inf).softmax(dim=1)


def recall(closer: Tensor, right: Tensor, wrong: Tensor, k: int) -> Tensor:
    """The probability that one of the k nearest is right; all (T,).

    `closer` images, all wrong, are before the first group with a right image, so k - closer of the
    group are among the k nearest: 1 - S(k - closer), summed as Σ_i S(i)·g/(t - i), which does not
    lose digits.
    """
    inside = (k - closer).clamp_min(0).minimum(wrong + 1)
    found = torch.zeros(len(inside), dtype=torch.float64)
    missed = torch.ones_like(found)
    for i in range(int(inside.max()) if len(inside) else 0):
        left = (wrong + right - i).clamp_min(1).double()
        found += missed * (i < inside) * right / left
        missed *= (wrong - i).clamp_min(0) / left
    return found.clamp_max(1).masked_fill(k - closer > wrong, 1)


def reciprocal_rank(closer: Tensor, right: Tensor, wrong: Tensor) -> Tensor:
    """The mean of 1 / (rank of the nearest right image), (T,); the arguments are as in `recall`.

    Σ_j P(j)/(c + j), P(j) = S(j - 1) - S(j), summed by parts:
    1/(c + 1) - Σ_{j=1..n} S(j) / ((c + j)(c + j + 1)).
    """
    kinds, kind = torch.stack([closer, right, wrong]).unique(dim=1, return_inverse=True)
    closer, right, wrong = kinds
    found = 1 / (closer + 1).double()
    for rows, step in _alike(wrong):
        c, g, n = (values[rows, None] for values in (closer, right, wrong))
        missed = ((n - step).clamp_min(0) / (n + g - step).clamp_min(1).double()).cumprod(dim=1)
        j = c + step + 1
        found[rows] -= (missed / (j * (j + 1)).double()).sum(dim=1)
    return found[kind]


def _alike(lengths: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield rows of similar lengths, and 0 .. the longest - 1 of them, so that padding is small."""
    order = lengths.argsort(descending=True)
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        rows = order[start : start + max(1, MAX_TERMS // max(1, longest))]
        yield rows, torch.arange(longest)
        start += len(rows)
