"""The number of this process among those that train together, and its GPU."""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
from collections.abc import Callable, Iterator
from typing import ParamSpec

import torch
import torch.distributed as dist

P = ParamSpec("P")


def is_group() -> bool:
    """Whether this process has joined others."""
    return not _ALONE.get() and dist.is_available() and dist.is_initialized()


_ALONE = contextvars.ContextVar("alone", default=False)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within this context the process acts as if it were the only one: the others do other work."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def world() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if is_group() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if is_group() else 0


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_group() else 0


def gpu(asked: int) -> int:
    """The number of the GPU that this process uses: `asked`, if there is only one process.

    Otherwise each process has a GPU of its own; if there are too few, processes share them.
    """
    if not is_group():
        return asked
    return local_rank() % max(1, torch.cuda.device_count())


def is_main() -> bool:
    """Whether this is the process that writes files and prints."""
    return rank() == 0


def main_only(function: Callable[P, None]) -> Callable[P, None]:
    """Makes a function do nothing in all processes but the main one."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_main():
            function(*args, **kwargs)

    return wrapper
