"""What processes agree on: one makes it for all, or each says what it has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from processes.group import is_group, is_main, local_rank, world
from utils import InputError

T = TypeVar("T")


def from_main(make: Callable[[], T]) -> T:
    """What `make()` returns in the main process, which alone calls it, in all of them."""
    if not is_group():
        return make()
    content = [make() if is_main() else None]
    dist.broadcast_object_list(content, src=0, device=torch.device("cpu"))
    return content[0]


def largest(value: int) -> int:
    """The largest value of any process; all must ask."""
    if not is_group():
        return value
    asked = torch.tensor(value)
    dist.all_reduce(asked, dist.ReduceOp.MAX)
    return int(asked)


def copy_main(tensors: Iterable[Tensor]) -> None:
    """Gives every process the main one's values, in place; the tensors come in the same order."""
    if not is_group():
        return
    with torch.no_grad():
        for tensor in tensors:
            whole = tensor.contiguous()
            dist.broadcast(whole, src=0)
            tensor.copy_(whole)


def in_all(flag: Tensor) -> Tensor:
    """0-d bool, on its device: whether the flag is set in every process."""
    if not is_group():
        return flag
    asked = flag.int()
    dist.all_reduce(asked, dist.ReduceOp.MIN)
    return asked.bool()


def barrier() -> None:
    """Waits for all processes."""
    largest(0)


def check_alike(own: Callable[[], Mapping[str, Any]], advice: str) -> None:
    """Makes sure that all processes have the same; all must ask.

    Args:
        own: gives name → what this process has. advice: what to do where another has other things.

    Raises:
        InputError: in all processes; the sentence names the first thing that differs.
    """
    if not is_group():
        return
    found: list[dict[str, str]] = [{}] * world()
    dist.all_gather_object(found, {name: str(value) for name, value in own().items()})
    for number, others in enumerate(found):
        for name in found[0] | others:
            one, other = found[0].get(name, "none"), others.get(name, "none")
            if one != other:
                raise InputError(
                    f"the processes differ in {name}: it is {one} in process 0 and {other} in "
                    f"process {number}; {advice}"
                )


@contextlib.contextmanager
def main_first() -> Iterator[None]:
    """The first process of each machine goes through the block alone, then the others.

    For what is downloaded once and found by the next. No collective may stand in the block.
    """
    if local_rank() != 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()
