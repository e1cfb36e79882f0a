"""Rows of different lengths, concatenated in one vector."""

from __future__ import annotations

import torch
from torch import Tensor


def counted(sizes: Tensor) -> Tensor:
    """The numbers 0 .. size - 1 for each of the sizes (T,), concatenated."""
    index = torch.arange(int(sizes.sum()), device=sizes.device)
    return index - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)


def spread(begin: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers begin .. begin + size - 1 of each of T rows, concatenated.

    Args:
        begin, sizes: (T,).

    Returns:
        (P,) the row of each number, and (P,) the numbers; P is the sum of the sizes.
    """
    row = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    return row, begin[row] + counted(sizes)
