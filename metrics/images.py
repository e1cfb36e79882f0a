"""Embeddings in the order of their labels, and their cosines.

Exactly as close: products are taken in float32, and one that lies within float32's rounding bound
of the value it is compared with is taken again in float64, from the embeddings as they were given,
x·y · 1/‖x‖ · 1/‖y‖. Two of these cosines are equal when they differ by no more than rounding can
make equal ones differ, 8·2^-52, and 1.5·d·2^-52 more where the sums over the d numbers are rounded
too; sums of whole numbers (codes, quantised embeddings) are not, below 2^53. So y and 5y are the
same direction where 5y is represented exactly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metrics.products import Array, as_numbers, said_of

SHORTEST = 1e-30  # a vector shorter than that counts as zeros
LONGEST = 1e37  # float32 has all its digits up to there, and of the reciprocal


def embeddings_of(
    values: Array, name: str, device: torch.device | str | None, *, like: Tensor | None = None
) -> tuple[Tensor, torch.device]:
    """Embeddings (N, d) that were given, and where they are computed with.

    Args:
        name: their name in errors. device: default: where they are. like: must have the same d.

    Raises:
        ValueError: they are not numbers of that shape, or there are none.
    """
    x = as_numbers(values, f"The {name} must be numbers, of shape (N, d)")
    if x.ndim != 2 or x.numel() == 0:
        raise ValueError(f"The {name} must be of shape (N, d) and not empty, got {tuple(x.shape)}.")
    if like is not None and like.shape[1] != x.shape[1]:
        raise ValueError(
            f"The embeddings have {like.shape[1]} dimensions and the {name}'s have {x.shape[1]}; "
            "both must come from the same network."
        )
    device = x.device if device is None else torch.device(device)
    if device.type == "mps":  # it has no float64
        device = torch.device("cpu")
    return x.to(device), device


class Images:
    """Embeddings with labels (and groups), in the order of the labels.

    Rows are normalised when they are needed: a normalised copy would double the memory.

    Attributes:
        inverse: (N,) float64, 1 / ‖x‖, 0 for zeros. scale: (N, 1) float32, the same.
        largest: the largest |number| where all are whole numbers, else infinity.
        fits_float32: whether all can be normalised in float32.
    """

    def __init__(self, embeddings: Tensor, labels: Array, groups: Array | None, name: str) -> None:
        self.embeddings = embeddings
        labels = self._integers(labels, f"labels of the {name}")
        self.order = labels.argsort(stable=True)
        self.labels = labels[self.order]
        self.host_labels = self.labels.cpu()
        self.groups = None
        if groups is not None:
            self.groups = self._integers(groups, f"groups of the {name}")[self.order]
        norms = torch.cat([rows.double().norm(dim=1) for rows in embeddings.split(4096)])
        broken = norms.isfinite().logical_not().nonzero()
        if len(broken):
            raise ValueError(
                f"{len(broken)} of the {len(norms)} {name} are NaN or infinite, first number "
                f"{int(broken[0])}; the training may have diverged."
            )
        norms = norms[self.order]
        self.inverse = norms.reciprocal().where(norms >= SHORTEST, 0)
        self.scale = self.inverse.float()[:, None]
        self.fits_float32 = bool((norms <= LONGEST).all())
        self.largest = self._largest()

    def _largest(self) -> float:
        largest = 0.0
        for rows in self.embeddings.split(256):  # seldom goes beyond the first ones
            rows = rows.double()
            if not torch.equal(rows, rows.round()):
                return math.inf
            largest = max(largest, float(rows.abs().max()))
        return largest

    def _integers(self, values: Array, what: str) -> Tensor:
        if values is None:
            raise ValueError(f"{len(self.embeddings)} embeddings but no {what}.")
        demand = f"The {what} must be integers of shape (N,)"
        values = as_numbers(values, demand)
        if values.is_floating_point() or values.ndim != 1:
            raise ValueError(f"{demand}, not {said_of(values)}.")
        if len(values) != len(self.embeddings):
            raise ValueError(f"{len(self.embeddings)} embeddings but {len(values)} {what}.")
        return values.to(self.embeddings.device).long()

    def __len__(self) -> int:
        return len(self.order)

    def unit(self, part: slice) -> Tensor:
        """L2-normalised float32 embeddings (n, d) of a run of images."""
        if not self.fits_float32:
            return self.exact_unit(part).float()
        return self.embeddings[self.order[part]].float() * self.scale[part]

    def exact_unit(self, part: slice) -> Tensor:
        """The same in float64."""
        return self.given(part).mul_(self.inverse[part, None])

    def given(self, part: slice | Tensor) -> Tensor:
        """The original embeddings (n, d) of some images, in float64."""
        return self.embeddings[self.order[part]].double()


class Pairing(NamedTuple):
    """Which queries search in which gallery.

    Attributes:
        begin, end: (Q,) the run of each query's class in the gallery.
        excluding: whether queries ignore the images of their own group.
    """

    queries: Images
    gallery: Images
    begin: Tensor
    end: Tensor
    excluding: bool

    @classmethod
    def of(cls, queries: Images, gallery: Images, excluding: bool) -> Pairing:
        """The classes are looked up among the gallery's labels, which are in order."""
        begin = torch.searchsorted(gallery.labels, queries.labels)
        end = torch.searchsorted(gallery.labels, queries.labels, right=True)
        return cls(queries, gallery, begin, end, excluding)


def exact_cosines(queries: Images, rows: slice | Tensor, gallery: Images, columns: slice) -> Tensor:
    """Float64 cosines of some queries and a run of gallery images."""
    products = queries.given(rows) @ gallery.given(columns).T
    return products.mul_(queries.inverse[rows, None]).mul_(gallery.inverse[columns])


class Rounding(NamedTuple):
    """The largest differences that rounding can cause.

    Attributes:
        doubt: a float32 product of unit vectors and the float64 cosine. Summing d products, in
            whatever order, costs d·2^-24 (1 %: second order), the unit vectors' own rounding
            6·2^-24; the rest is for the ends of the windows that are compared with.
        tie: two float64 cosines that are equal. A product and a norm cost d·2^-53 and d·2^-54,
            unless they are sums of whole numbers, and what is done with them 6·2^-53, for each of
            the two.
    """

    doubt: float
    tie: float


def rounding(queries: Images, gallery: Images) -> Rounding:
    """The bounds for two sets of embeddings."""
    d = queries.embeddings.shape[1]
    exact = d * max(queries.largest, gallery.largest) ** 2 <= 2**53
    return Rounding((1.01 * d + 16) * 2.0**-24, (8 if exact else 1.5 * d + 8) * 2.0**-52)


def pairwise_cosines(queries: Images, row: Tensor, gallery: Images, column: Tensor) -> Tensor:
    """Float64 cosines of pairs: query row[i] and gallery image column[i]; (P,) each."""
    step = max(1, 2**21 // queries.embeddings.shape[1])
    found = []
    for i, j in zip(row.split(step), column.split(step), strict=True):
        products = (queries.given(i) * gallery.given(j)).sum(dim=1)
        found.append(products * queries.inverse[i] * gallery.inverse[j])
    return torch.cat(found)


def are_crowded(queries: Images, gallery: Images) -> bool:
    """Whether float32 cannot order many images: a collapsed network, or few different values.

    That is so if the cosines of more than 1 of 64 pairs, in a small sample, are too close.
    """
    rows = torch.linspace(0, len(queries) - 1, 64, device=queries.order.device).long()
    step = max(1, len(gallery) // 256)
    found = queries.given(rows) @ gallery.given(slice(0, None, step)).T
    found = found * queries.inverse[rows, None] * gallery.inverse[::step]
    close = found.diff(dim=1).abs() <= 2 * rounding(queries, gallery).doubt
    return 64 * int(close.sum()) > close.numel()
