"""Rows of different lengths, kept one after the other in one vector."""

from __future__ import annotations

import torch
from torch import Tensor


def counted(sizes: Tensor) -> Tensor:
    """0 .. size - 1 for each of the sizes (T,), one after the other."""
    index = torch.arange(int(sizes.sum()), device=sizes.device)
    return index - (sizes.cumsum(0) - sizes).repeat_interleave(sizes)


def spread(begin: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """The numbers begin .. begin + size - 1 of each run (T,): which run is whose, and the number.

    Both are as long as all runs together, which follow one after the other.
    """
    run = torch.repeat_interleave(torch.arange(len(sizes), device=sizes.device), sizes)
    return run, begin[run] + counted(sizes)
