"""Tables of all pairs that are too large to keep: made in strips, and again to go backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

STRIP_ELEMENTS = 2**24
"""Entries of a table that are made at a time, 64 MiB of float32."""


def rows_of_strip(columns: int) -> int:
    """How many rows of a table with so many columns are made at a time."""
    return max(1, STRIP_ELEMENTS // columns)


def made_again(function: Callable[..., Tensor], strips: int) -> Callable[..., Tensor]:
    """The function, which keeps nothing to go backward where there is more than one strip."""
    if strips == 1:
        return function
    from torch.utils.checkpoint import checkpoint  # its first call takes seconds

    return partial(checkpoint, function, use_reentrant=False, preserve_rng_state=False)
