"""What retrieval is worth where images are exactly as close: the mean over all their orders.

A ranking is decided up to the order of tied images: gallery images that are exactly as close to
the query as each other. To let the right ones of them go first would make a network that tells
nothing apart perfect. So each order of a group of tied images counts alike, and a metric is its
mean over these orders (McSherry and Najork, 2008), computed and not drawn: an image is never right
because it is tied.

A group has t images, g of them right and n wrong, behind a images that are strictly closer, p of
them right. Its order matters where g and n are both above 0; the groups here are such.

    the j-th of the group is right                        g / t
    right ones before it in the group, if it is           (j - 1) (g - 1) / (t - 1)
    none of its first j is right                          S(j) = Π_{i<j} (n - i) / (t - i)
    h of its first j are right                            hypergeometric
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_TERMS = 2**18  # terms of a sum that are held at once: 2 MiB for each tensor of them


@dataclass(frozen=True)
class TieGroups:
    """Groups of tied images, of one or several queries: tensors of shape (T,), int64.

    Attributes:
        right: g, images of the query's class in the group, at least 1.
        wrong: n, images of other classes in the group, at least 1.
        closer: a, images before the group.
        closer_right: p, how many of them are right.
        relevant: R of the query.
    """

    right: Tensor
    wrong: Tensor
    closer: Tensor
    closer_right: Tensor
    relevant: Tensor

    def __getitem__(self, chosen: Tensor) -> TieGroups:
        """Some of the groups, by a mask or by indices."""
        return TieGroups(*(values[chosen] for values in vars(self).values()))

    def __len__(self) -> int:
        return len(self.right)

    @property
    def size(self) -> Tensor:
        """t, the images of the group."""
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
        """The share of the group, so of its right images too, that is among the R nearest: m / t.

        Expected hits of the group are g times that.
        """
        return self.inside / self.size.double()

    def precision(self) -> Tensor:
        """What each right image of the group is expected to add to Σ_{j <= R} h_j·prec_j.

        1/t Σ_{j=1..m} (p + 1 + (j - 1)(g - 1)/(t - 1)) / (a + j)
        """
        return self._precisions((self.right - 1) / (self.size - 1).double()) / self.size

    def _precisions(self, company: Tensor) -> Tensor:
        """Σ_{j=1..m} (p + 1 + (j - 1)·company) / (a + j), in closed form.

        company (T,) or (T, H): right images expected for each one before the j-th in the group.
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
        """The query's expected mARP, (T,): Σ_{j <= R} h_j·prec_j over the hits, 0 without a hit.

        For groups that are `cut`. What is before the group is independent of its order, and has
        `before` (T,) as its expected part of the sum and p hits. With h hits in the group

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
        """P(h of the m images are right), h = `hits` (T, H) rising by 1 in a row; (T, H).

        By the ratio P(h + 1) / P(h) = (g - h)(m - h) / ((h + 1)(n - m + h + 1)), which does not
        lose digits as differences of log-factorials do.
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
    group come in: 1 - S(k - closer), added up as Σ_i S(i)·g/(t - i), which does not lose digits.
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
    """The mean of 1 / (rank of the nearest right image); arguments as for `recall`, all (T,).

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
    """Rows of similar lengths together, and 0 .. the longest - 1 of them: little is wasted."""
    order = lengths.argsort(descending=True)
    start = 0
    while start < len(order):
        longest = int(lengths[order[start]])
        rows = order[start : start + max(1, MAX_TERMS // max(1, longest))]
        yield rows, torch.arange(longest)
        start += len(rows)
