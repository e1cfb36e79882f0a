"""Tables of pairs that are too large for memory: computed in strips, and again for the gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

STRIP_ELEMENTS = 2**24
"""Entries of a strip of a table: 64 MiB of float32."""


def rows_per_strip(columns: int) -> int:
    """How many rows of a table with so many columns a strip has."""
    return max(1, STRIP_ELEMENTS // columns)


def recomputed(function: Callable[..., Tensor], strips: int) -> Callable[..., Tensor]:
    """The function, which of several strips is computed once more in the backward pass."""
    if strips == 1:
        return function
    from torch.utils.checkpoint import checkpoint  # its first call takes seconds

    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)


def of_queries(
    function: Callable[..., Tensor], similarity: Tensor, mask: Tensor, most: int, *places: Tensor
) -> Tensor:
    """``function`` of each query (B,), from its rows of two tables (B, R), strip by strip.

    ``function`` takes rows of both tables (n, R), and the indices of the true entries of ``mask``
    there, or None if they are not known; it compares each entry with a whole row. ``most``: the
    largest row sum of the mask. ``places``: the indices of its true entries, (P,) each.
    """
    rows = rows_per_strip(similarity.shape[1] * most)
    strips = [*zip(similarity.split(rows), mask.split(rows), strict=True)]
    known = places if len(strips) == 1 else None
    run = recomputed(function, len(strips))
    return torch.cat([run(*strip, known) for strip in strips])


class Strip(NamedTuple):
    """The similarities of a batch to S consecutive classes.

    ``similarity`` (B, S). ``target`` (B, 1): the column of the image's own class. ``inside``
    (B, 1): False if that class is in another strip, which makes the column meaningless; None if the
    strip has all classes.
    """

    similarity: Tensor
    target: Tensor
    inside: Tensor | None = None

    def own(self, table: Tensor | None = None) -> Tensor:
        """(B,): each image's entry for its own class, 0 if that is in another strip.

        The entries are those of ``similarity``, or of another ``table`` (B, S).
        """
        own = (self.similarity if table is None else table).gather(1, self.target)
        return (own if self.inside is None else own.masked_fill(~self.inside, 0)).squeeze(1)

    def put(self, table: Tensor, own: Tensor | float) -> Tensor:
        """``table`` (B, S) with each image's entry for its own class replaced.

        ``own``: the new entries (B, 1), or one number. The table is changed in place, unless
        autograd still needs its values.
        """
        if self.inside is None:
            return table.scatter_(1, self.target, own)
        own = torch.where(self.inside, own, table.gather(1, self.target))
        scatter = table.scatter if table.requires_grad else table.scatter_
        return scatter(1, self.target, own)


Terms = Callable[[Strip], tuple[Tensor, ...]]
"""A loss's function of a strip."""


def total(parts: Sequence[Tensor]) -> Tensor:
    """The sum over the strips."""
    return parts[0] if len(parts) == 1 else torch.stack(parts).sum(dim=0)
