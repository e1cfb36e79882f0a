"""Runs a function in several processes that train together, forked from the test's own."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.queues import SimpleQueue
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import processes

HANGS = 100  # seconds after which a process says where it stands, and ends


def run(
    count: int, work: Callable[[], Any], folder: Path, *, local_ranks: bool = True
) -> list[Any]:
    """What `work()` returned in each of `count` processes, as torch.save keeps it.

    Args:
        local_ranks: whether the launcher sets LOCAL_RANK, as torchrun does.
    """
    context = multiprocessing.get_context("fork")  # spares the children torch's long import
    port = context.SimpleQueue()
    children = [
        context.Process(target=_join, args=(number, count, port, work, folder, local_ranks))
        for number in range(count)
    ]
    for child in children:
        child.start()
    # Not before: its thread may just hold a lock of the C library's (of looking up addresses, say),
    # and a child that is forked then waits for that lock for ever.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for _ in children:
        port.put(store.port)
    for child in children:
        child.join(HANGS + 10)
    statuses = [child.exitcode for child in children]
    assert statuses == [0] * count, f"the processes ended with {statuses}"
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(count)]


def _join(
    number: int,
    count: int,
    port: SimpleQueue,
    work: Callable[[], Any],
    folder: Path,
    local_ranks: bool,
) -> None:
    faulthandler.dump_traceback_later(HANGS, exit=True)
    os.environ |= {"RANK": str(number), "WORLD_SIZE": str(count)}
    if local_ranks:
        os.environ["LOCAL_RANK"] = str(number)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port.get())}
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    torch.set_num_threads(1)
    with processes.joined():
        torch.save(work(), folder / f"{number}.pt")
