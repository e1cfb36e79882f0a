"""Rows that are divided among processes: of batches, of embeddings and of parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from processes.group import is_group, rank, world


def shard(total: int, of: int | None = None) -> slice:
    """The rows, of `total`, that belong to this process, or to process `of`.

    They are contiguous, in the order of the processes; sizes differ by at most one, and may be 0.
    """
    number, count = rank() if of is None else of, world()
    return slice(total * number // count, total * (number + 1) // count)


def gather_rows(rows: Tensor, total: int) -> Tensor:
    """All rows (total, …), in every process, from each one's `shard(total)` of them (n, …).

    The gradient flows back into the process's own rows, and is not summed over processes: every
    process must compute the same function of the result.
    """
    return _GatherRows.apply(rows, total) if is_group() else rows


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, total: int) -> Tensor:
        ctx.own = shard(total)
        # Collectives need equal sizes: smaller shares are padded with one row.
        padded = rows.new_zeros(-(-total // world()), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(world())]
        dist.all_gather(parts, padded)
        shares = [shard(total, of) for of in range(world())]
        return torch.cat([part[: s.stop - s.start] for part, s in zip(parts, shares, strict=True)])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient[ctx.own].contiguous(), None


def from_process(number: int, rows: Tensor, count: int) -> Tensor:
    """The `count` rows of process `number`, in every process, without a gradient."""
    if not is_group():
        return rows
    own = number == rank()
    found = rows.contiguous() if own else rows.new_empty(count, *rows.shape[1:])
    dist.broadcast(found, src=number)
    return found


def sum_over(value: Tensor) -> Tensor:
    """The sum of a tensor over processes; its gradient is summed over them too."""
    return _Sum.apply(value) if is_group() else value


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return _summed(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def part_of_all(value: Tensor) -> Tensor:
    """The same tensor, from which each process computes another part of the loss.

    Its gradient is the sum of those of all parts.
    """
    return with_gradient(value, _summed)


def with_gradient(value: Tensor, of: Callable[[Tensor], Tensor]) -> Tensor:
    """The same tensor, whose gradient is `of` the incoming one if there are several processes."""
    if not is_group() or not value.requires_grad:
        return value
    same = value.view_as(value)
    same.register_hook(of)
    return same


def _summed(value: Tensor) -> Tensor:
    total = value.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total)
    return total


# --- divided parameters ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Share:
    """The rows of a parameter that each process has.

    The parameter consists of units, such as classes, which `shard` divides among the processes.

    Attributes:
        count: units of the whole parameter. rows: of the parameter per unit.
    """

    count: int
    rows: int = 1

    @property
    def own(self) -> slice:
        """This process's units."""
        return shard(self.count)

    @property
    def starts(self) -> list[int]:
        """The first unit of every process, and, at the end, the number of units."""
        return [shard(self.count, of).start for of in range(world())] + [self.count]

    @property
    def counts(self) -> list[int]:
        """The number of units of every process."""
        return [end - start for start, end in pairwise(self.starts)]

    def of(self, whole: Tensor) -> Tensor:
        """This process's rows of the whole (count · rows, …)."""
        own = self.own
        return whole[own.start * self.rows : own.stop * self.rows]

    def whole(self, part: Tensor) -> Tensor:
        """The whole (count · rows, …), in every process, from each one's rows; all must call it."""
        units = part.detach().reshape(-1, self.rows, *part.shape[1:])
        return gather_rows(units, self.count).flatten(0, 1)


def divided(parameter: torch.nn.Parameter, share: Share) -> torch.nn.Parameter:
    """A parameter that consists of this process's share of another one."""
    part = torch.nn.Parameter(share.of(parameter.detach()).clone(), parameter.requires_grad)
    part.share = share
    return part


def share_of(parameter: Tensor) -> Share | None:
    """The share of a divided parameter; None for any other."""
    return getattr(parameter, "share", None)


def whole_size(parameter: Tensor) -> int:
    """The number of elements that the parameter has in all processes together."""
    share = share_of(parameter)
    return parameter.numel() if share is None else share.count * share.rows * parameter[0].numel()
