"""Divides a search among processes and threads, and reports its progress."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

Progress = Callable[[float], None]
"""A function that is called with the share of the work done, in 0..1."""

MAX_WORKERS = 4  # each holds its own blocks, so this bounds the memory of a search

Item = TypeVar("Item")
Result = TypeVar("Result")


class Share(NamedTuple):
    """The part of a search that one of several processes does; all of them get the whole result.

    Each process has all embeddings and counts some of the blocks: it is process `number` of
    `count`. `total` sums a tensor over all processes and returns the sum to each of them.
    """

    number: int
    count: int
    total: Callable[[Tensor], Tensor]


ALONE = Share(0, 1, lambda counts: counts)


def workers(device: torch.device) -> int:
    """The number of blocks that are computed at once."""
    return min(torch.get_num_threads(), MAX_WORKERS) if device.type == "cpu" else 1


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], device: torch.device
) -> Iterator[Result]:
    """Yield work(item) for each item, in order; on a CPU several are computed at once.

    Blocks of similarities are independent. Threads that each compute a block wait for each other
    only at the end. Threads that share every operation wait after each one, which takes most of the
    time if other programs use a core.
    """
    count = workers(device)
    if count == 1:
        yield from map(work, items)
        return
    threads = torch.get_num_threads()

    def one(item: Item) -> Result:
        torch.set_num_threads(threads // count)  # of this thread
        with torch.no_grad():
            return work(item)

    torch.set_num_threads(1)  # of the thread that makes the items
    try:
        with ThreadPoolExecutor(count, "search") as pool:
            waiting: deque[Future[Result]] = deque()
            for item in items:
                waiting.append(pool.submit(one, item))
                if len(waiting) > 2 * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
    finally:
        torch.set_num_threads(threads)
