"""Starts the processes that read images, and explains it when one of them dies.

They read files and crop pixels, and use neither the GPU nor torch's threads. So on Linux they are
forked from this process, as was the default before Python 3.14. A start method set by the program
is respected; macOS uses "spawn". A process that is not forked has to import torch again, which
takes seconds, so workers live as long as the run, including those of evaluations (see sources.py).
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.util
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

import processes
from terminal import leave_out_remarks
from utils import InputError, MachineError

SOCKET_NAME = 100  # bytes of an address that all systems allow: Linux 107, macOS 103
FOLDER, SOCKET = "/pymp-abcdefgh", "/listener-abcdefgh"  # what multiprocessing adds to TMPDIR
SHORT_FOLDERS = ("/tmp", "/var/tmp", "/dev/shm")
SHARED_MEMORY = Path("/dev/shm")


def item_loader(
    dataset: Dataset, count: int, *, sampler: Iterable | None = None, pin: bool = False
) -> DataLoader:
    """A loader that yields `dataset[item]` for each item of the sampler, in order.

    `count` processes make the items and live on for the next iteration; with 0, this process makes
    them.

    Raises:
        InputError: there is no folder for the sockets of the processes.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=sampler,
        num_workers=count,
        collate_fn=_as_it_is,
        pin_memory=pin,
        persistent_workers=count > 0,
        multiprocessing_context=start_context() if count else None,
        worker_init_fn=_begin,
        # Its own generator, so that reading data does not change torch's random state.
        generator=torch.Generator(),
    )


def _begin(number: int) -> None:
    """Runs first in each worker; those that were not forked have no warning filters yet."""
    processes.ignore_requests(number)
    leave_out_remarks()


def _as_it_is(made: Any) -> Any:
    return made


@contextlib.contextmanager
def worker_deaths_in_words(
    advice: str = "; use fewer --workers or a smaller --batch-size",
) -> Iterator[None]:
    """A context for waiting for workers, in which the death of one raises a sentence with `advice`.

    Raises:
        MachineError: a worker died, or found no shared memory.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise MachineError(
            "a process that reads images died, most often for lack of memory or of shared memory"
            f"{_shared_memory()}{advice} ({str(error).strip().splitlines()[-1]})"
        ) from error


def _shared_memory() -> str:
    """The amount of shared memory, if a process may have died because it is so small."""
    try:
        size = shutil.disk_usage(SHARED_MEMORY).total
    except OSError:
        return ""
    if size >= 2**30:
        return f" ({SHARED_MEMORY})"
    return (
        f" ({SHARED_MEMORY} has {size / 2**20:.0f} MB here; in a container start it with "
        "--shm-size=2g)"
    )


# --- how they are started -------------------------------------------------------------------------


def start_context() -> multiprocessing.context.BaseContext:
    """How workers start: forked on Linux, unless the program has chosen another way."""
    chosen = multiprocessing.get_start_method(allow_none=True)
    if chosen is None and sys.platform == "linux":
        chosen = "fork"
    context = multiprocessing.get_context(chosen)
    if context.get_start_method() == "forkserver":
        context.set_forkserver_preload(["__main__", "torch"])  # loaded once, not by each
    _shorten_addresses()
    return context


def _shorten_addresses() -> None:
    """Make multiprocessing put its sockets where their names are short enough.

    It makes one folder for them, in TMPDIR, when it first needs one. If the name is too long, a
    worker silently fails to send its results, and is waited for without end.
    """
    shared = multiprocessing.process.current_process()._config  # children are given a copy
    folder = shared.get("tempdir") or tempfile.gettempdir() + FOLDER
    if len(os.fsencode(folder + SOCKET)) <= SOCKET_NAME:
        return
    before, tempfile.tempdir = tempfile.gettempdir(), _short_folder()
    try:
        shared.pop("tempdir", None)
        multiprocessing.util.get_temp_dir()
    finally:
        tempfile.tempdir = before


def _short_folder() -> str:
    for folder in SHORT_FOLDERS:
        if os.access(folder, os.W_OK | os.X_OK):
            return folder
    raise InputError(
        f"the name of the folder for temporary files, {tempfile.gettempdir()}, is too long for the "
        "sockets by which processes talk; set TMPDIR to a shorter one, or use --workers 0"
    )
