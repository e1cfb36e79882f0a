"""The K nearest images of each query, with those that are exactly as close as the K-th.

What is exactly as close is decided as retrieval does, see images.py: float32 products choose who
is looked at in float64. So the answer depends neither on the block size nor on the order of the
images: where t images are as close as the K-th and m of them would fit, all t are given, and
`share` says m / t, the mean over all their orders.
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

HELD = 2**23  # similarities at once: 32 MiB, and as much again for what is made of them


class Near(NamedTuple):
    """What some queries (B,) find, nearest first; the rows are filled up to one width.

    Attributes:
        queries: (B,) their places.
        index: (B, W) places in the gallery; -1 where a row is filled up.
        cosine: (B, W) float64, -inf there.
        before: (B, W) how many images are strictly closer than this one.
        share: (B, W) float64, see the file's header: 1 but for those tied with the K-th; 0 there.
    """

    queries: Tensor
    index: Tensor
    cosine: Tensor
    before: Tensor
    share: Tensor


def as_images(embeddings: Array, name: str = "embeddings") -> Images:
    """Embeddings (N, d) in the order in which they are given."""
    x, _ = embeddings_of(embeddings, name, None)
    return Images(x, torch.arange(len(x)), None, name)


def check_count(k: int, there: int) -> None:
    """Raises ValueError unless an image can have k neighbours among those that are there."""
    if not 1 <= k <= there:
        raise ValueError(
            f"{k} nearest images were asked for, and an image can find {there}; choose a number "
            f"from 1 to {there}."
        )


@torch.no_grad()
def nearest(queries: Images, gallery: Images, k: int, own: bool) -> Iterator[Near]:
    """The k nearest gallery images, part by part.

    Args:
        queries, gallery: of `as_images`. k: at most as many as a query can find.
        own: whether query i is image i of the gallery, which it does not find.
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
    starts = torch.ones_like(cosine, dtype=torch.bool)  # whether it is farther than the one before
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
