"""The K nearest images of each query, including all that are exactly as close as the K-th.

Ties are decided as in retrieval, see images.py: float32 products select the pairs that are computed
in float64. The result depends neither on the block size nor on the order of the images: if t images
are as close as the K-th, and only m of them belong to the K, all t are returned with a `share` of
m / t, the mean over all their orders.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from metrics.images import Images, embeddings_of, pairwise_cosines, rounding
from metrics.products import Array, full_float32, inner_products
from metrics.ragged import counted
from metrics.selection import largest

HELD = 2**23  # similarities at once: 32 MiB, and as much again for the selection


class Near(NamedTuple):
    """The neighbours of B queries, nearest first; rows are padded to one width.

    Attributes:
        queries: (B,) indices of the queries.
        index: (B, W) indices into the gallery; -1 as padding.
        cosine: (B, W) float64; -inf as padding.
        before: (B, W) the number of images that are strictly closer than this one.
        share: (B, W) float64: 1, or less if tied with the K-th, see the file's header; 0 as
            padding.
    """

    queries: Tensor
    index: Tensor
    cosine: Tensor
    before: Tensor
    share: Tensor


def as_images(embeddings: Array, name: str = "embeddings") -> Images:
    """Embeddings (N, d) as `Images`, in their order."""
    x, _ = embeddings_of(embeddings, name, None)
    return Images(x, torch.arange(len(x)), None, name)


def check_count(k: int, there: int) -> None:
    """Raise ValueError unless there are enough images for k neighbours."""
    if not 1 <= k <= there:
        raise ValueError(
            f"k = {k} nearest images: an image can find {there}; choose a number from 1 to {there}."
        )


@torch.no_grad()
def nearest(queries: Images, gallery: Images, k: int, own: bool) -> Iterator[Near]:
    """Yield the k nearest gallery images of each query, for some queries at a time.

    Args:
        queries, gallery: made by `as_images`. k: at most as many as a query can find.
        own: whether query i is image i of the gallery, which it must not find.
    """
    bounds = rounding(queries, gallery)
    device = queries.embeddings.device
    everything = gallery.unit(slice(None))
    for rows in torch.arange(len(queries), device=device).split(max(1, HELD // len(gallery))):
        with full_float32(device):
            similarities = inner_products(
                queries.unit(slice(int(rows[0]), int(rows[-1]) + 1)), everything
            )
            if own:
                similarities[torch.arange(len(rows)), rows] = -torch.inf
            least = largest(similarities, k)[0][:, -1:]
            row, column = (similarities >= least - 2 * bounds.doubt).nonzero(as_tuple=True)
            exact = pairwise_cosines(queries, rows[row], gallery, column)
        yield _near(rows, row, column, exact, k, bounds.tie)


def _near(rows: Tensor, row: Tensor, column: Tensor, exact: Tensor, k: int, tie: float) -> Near:
    """The k nearest among the candidates (P,) of each row, and those tied with the k-th."""
    sizes = row.bincount(minlength=len(rows))
    place = counted(sizes)
    cosine = exact.new_full((len(rows), int(sizes.max())), -torch.inf)
    index = column.new_full(cosine.shape, -1)
    cosine[row, place], index[row, place] = exact, column
    cosine, order = cosine.sort(dim=1, descending=True, stable=True)
    index = index.gather(1, order)
    starts = torch.ones_like(cosine, dtype=torch.bool)  # whether it is farther than its predecessor
    starts[:, 1:] = cosine[:, :-1] - cosine[:, 1:] > tie
    number = torch.arange(cosine.shape[1], device=row.device).expand_as(index)
    before = number.masked_fill(~starts, 0).cummax(dim=1).values
    inside = (before < k) & (index >= 0)
    width = int(inside.sum(dim=1).max())
    last = before[:, k - 1 : k]  # images strictly closer than the k-th
    tied = inside & (before == last)
    share = inside.double()
    share = share.where(~tied, (k - last) / tied.sum(dim=1, keepdim=True).double())
    outside = ~inside
    return Near(
        rows,
        index.masked_fill(outside, -1)[:, :width],
        cosine.masked_fill(outside, -torch.inf)[:, :width],
        before[:, :width],
        share.masked_fill(outside, 0)[:, :width],
    )
