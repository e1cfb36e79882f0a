"""Values that all processes share: one makes them for all, or they combine or compare theirs."""

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
    """Calls `make()` in the main process alone, and returns its result in all of them."""
    if not is_group():
        return make()
    content = [make() if is_main() else None]
    dist.broadcast_object_list(content, src=0, device=torch.device("cpu"))
    return content[0]


def largest(value: int) -> int:
    """The largest of all processes' values; all must call it."""
    if not is_group():
        return value
    found = torch.tensor(value)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


def copy_main(tensors: Iterable[Tensor]) -> None:
    """Copies the main process's values into the tensors of all others, which have its order."""
    if not is_group():
        return
    with torch.no_grad():
        for tensor in tensors:
            whole = tensor.contiguous()
            dist.broadcast(whole, src=0)
            tensor.copy_(whole)


def in_all(flag: Tensor) -> Tensor:
    """Whether a 0-d bool is True in every process; on its device."""
    if not is_group():
        return flag
    lowest = flag.int()
    dist.all_reduce(lowest, dist.ReduceOp.MIN)
    return lowest.bool()


def barrier() -> None:
    """Waits for all processes."""
    largest(0)


def check_alike(own: Callable[[], Mapping[str, Any]], advice: str) -> None:
    """Makes sure that all processes have the same values; all must call it.

    Args:
        own: returns this process's values by name. advice: what to do if they differ.

    Raises:
        InputError: in all processes, if they differ; it names the first value that does.
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
    """The first process of each machine runs the block alone, then the others do.

    It downloads files, for example, which the others then find. The block must not contain
    collectives.
    """
    if local_rank() != 0:
        barrier()
    yield
    if local_rank() == 0:
        barrier()
