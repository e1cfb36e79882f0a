"""Embeddings in the order of their labels, and their cosines.

What "exactly as close" means: products are computed in float32, and again in float64 if they are
within float32's rounding bound of the value that they are compared with. The float64 cosine is
x·y · 1/‖x‖ · 1/‖y‖, with the embeddings as they were given. Two of these cosines count as equal if
they differ by no more than rounding errors can: 8·2^-52, plus 1.5·d·2^-52 if the sums over the d
numbers are rounded too. (Sums of whole numbers, as of codes or quantised embeddings, are exact
below 2^53.) So y and 5y have the same direction, if 5y is represented exactly.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from metrics.products import Array, as_numbers, said_of

SHORTEST = 1e-30  # a shorter vector counts as zeros
LONGEST = 1e37  # up to here, float32 represents a norm and its reciprocal with all digits


def embeddings_of(
    values: Array, name: str, device: torch.device | str | None, *, like: Tensor | None = None
) -> tuple[Tensor, torch.device]:
    """Given embeddings (N, d) as a tensor on the device for computing, and that device.

    Args:
        name: their name in errors.
        device: where to compute; by default where they are.
        like: other embeddings, which must have the same d.

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
    """Embeddings with labels and optional groups, in the order of the labels.

    Rows are normalised when they are needed: a normalised copy would double the memory.

    Attributes:
        inverse: (N,) float64, 1 / ‖x‖, 0 for zeros. scale: (N, 1) float32, the same.
        largest: the largest absolute value if all entries are whole numbers, else infinity.
        fits_float32: whether all embeddings can be normalised in float32.
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
        for rows in self.embeddings.split(256):  # usually returns in the first part
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
        """L2-normalised embeddings (n, d) of a run of images, float32."""
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
    """Queries and the gallery in which they search.

    Attributes:
        begin, end: (Q,) the gallery images of each query's class are those from begin to end.
        excluding: whether queries ignore images of their own group.
    """

    queries: Images
    gallery: Images
    begin: Tensor
    end: Tensor
    excluding: bool

    @classmethod
    def of(cls, queries: Images, gallery: Images, excluding: bool) -> Pairing:
        """Look up the queries' classes in the gallery, whose labels are sorted."""
        begin = torch.searchsorted(gallery.labels, queries.labels)
        end = torch.searchsorted(gallery.labels, queries.labels, right=True)
        return cls(queries, gallery, begin, end, excluding)


def exact_cosines(queries: Images, rows: slice | Tensor, gallery: Images, columns: slice) -> Tensor:
    """Float64 cosines of some queries and some gallery images."""
    products = queries.given(rows) @ gallery.given(columns).T
    return products.mul_(queries.inverse[rows, None]).mul_(gallery.inverse[columns])


class Rounding(NamedTuple):
    """The largest differences that rounding can cause.

    Attributes:
        doubt: between a float32 product of unit vectors and the float64 cosine. The sum of d
            products, in any order, has an error of up to d·2^-24 (plus 1 % of second order), the
            rounding of the unit vectors adds 6·2^-24, and the rest allows for the rounding of the
            thresholds that products are compared with.
        tie: between two float64 cosines that should be equal. For each of them, product and norm
            have errors of up to d·2^-53 and d·2^-54, unless they are sums of whole numbers, and the
            remaining operations of 6·2^-53.
    """

    doubt: float
    tie: float


def rounding(queries: Images, gallery: Images) -> Rounding:
    """The rounding bounds for two sets of embeddings."""
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
    """Whether many cosines are too close for float32: a collapsed network, or few distinct values.

    Judged by a small sample: more than 1 in 64 pairs of a query's cosines have to be too close.
    """
    rows = torch.linspace(0, len(queries) - 1, 64, device=queries.order.device).long()
    step = max(1, len(gallery) // 256)
    found = exact_cosines(queries, rows, gallery, slice(None, None, step))
    close = found.diff(dim=1).abs() <= 2 * rounding(queries, gallery).doubt
    return 64 * int(close.sum()) > close.numel()
