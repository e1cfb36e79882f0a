"""Which of several processes this one is; alone, it is the only one."""

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
    """What follows is done by this process without the others, which do not take part in it."""
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if is_group() else 1


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if is_group() else 0


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_group() else 0


def gpu(asked: int) -> int:
    """The number of the GPU that this process takes: the one `asked` for, where it is alone.

    Of several processes each takes its own; where there are fewer GPUs, they share them.
    """
    if not is_group():
        return asked
    return local_rank() % max(1, torch.cuda.device_count())


def is_main() -> bool:
    """Whether this is the process that writes files and speaks."""
    return rank() == 0


def main_only(function: Callable[P, None]) -> Callable[P, None]:
    """Makes a function do nothing in all processes but the main one."""

    @functools.wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        if is_main():
            function(*args, **kwargs)

    return wrapper
