"""Rows of different lengths, kept one after the other in one vector."""

from __future__ import annotations

import torch
from torch import Tensor


def counted(sizes: Tensor) -> Tensor:
    """0 .. size - 1 for each of the sizes (T,), one after the other."""
    index = torch.arange(int(sizes.sum()), device=sizes.device)
    return index - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)


def spread(begin: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """All numbers begin .. begin + size - 1, of each of T rows, one row after the other.

    Args:
        begin, sizes: (T,).

    Returns:
        (P,) which row a number is of, and (P,) the number; P is the sum of the sizes.
    """
    row = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    return row, begin[row] + counted(sizes)
