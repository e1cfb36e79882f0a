"""Joining the group of processes that a launcher started, and leaving it."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist

from machine import host
from processes.addresses import INTERFACE, interface_of, own_address
from processes.agreements import barrier
from processes.group import is_main
from processes.meeting import PATIENCE, Place, longest_wait
from processes.watching import Line, Watch
from utils import InputError, first_line


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the processes that a launcher started; without a launcher it does nothing.

    Only the main process keeps its standard output. An error in one process ends all of them.

    Raises:
        InputError: the launcher's environment variables make no sense, or the other processes do
            not come, or cannot be reached.
    """
    place = Place.of(os.environ)
    if place is None:
        yield
        return
    _HAS_JOINED.append(place.number)
    store = place.store()
    place.meet(store)
    line = Line(dist.PrefixStore("watch", place.another()), place.words)
    watch = Watch(line, place.number, place.count)
    watch.start()
    try:
        _connect(place, store, watch)
        with _stdout_of_main():
            yield
        barrier()  # no process leaves while another is still working
    except (InputError, SystemExit, KeyboardInterrupt) as error:
        watch.stop()
        _say_once(watch, error)
        raise
    except BaseException as error:
        watch.fail(error)
    watch.stop()
    place.leave(store)
    dist.destroy_process_group()


_HAS_JOINED: list[int] = []
"""This process's number in each group that it has joined."""


def _connect(place: Place, store: dist.Store, watch: Watch) -> None:
    """Forms torch's process group of the processes, which have met.

    Raises:
        InputError: one cannot be reached.
    """
    hosts = place.exchange(store, "host", host())
    if len({*hosts}) > 1:
        watch.machines = [name.split()[0] for name in hosts]
    # torchrun sets it; srun, mpirun and users' own scripts may not.
    os.environ.setdefault("LOCAL_RANK", str(hosts[: place.number].count(hosts[place.number])))
    gpus = place.exchange(store, "gpu", _gpu_in_words(int(os.environ["LOCAL_RANK"])))
    # NCCL is faster between GPUs, but refuses two processes on one GPU.
    nccl = all(gpus) and len({*gpus}) == place.count
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    if name := _interface(place, hosts, store):
        os.environ.setdefault(INTERFACE, name)
    unreached = (
        f"process {place.number} has met the others at {place.words}, and cannot connect to them "
        f"through {os.environ.get(INTERFACE, 'its network')}"
    )
    advice = (
        "let the machines reach each other on all ports, or name another interface: "
        f"{INTERFACE}=NAME in the environment"
    )
    group = {"rank": place.number, "world_size": place.count, "timeout": PATIENCE}
    try:
        with watch.limit(longest_wait(os.environ), f"{unreached}; {advice}"):
            dist.init_process_group(backend, store=store, **group)
    except RuntimeError as error:
        raise InputError(f"{unreached} ({first_line(error)}); {advice}") from error


def _interface(place: Place, hosts: Sequence[str], store: dist.Store) -> str:
    """The network interface by which others reach this process; "" if it is not known.

    It is the one on this machine's route to the store; on the store's own machine, the one on the
    route to any other machine.
    """
    found = place.exchange(store, "way", own_address(place.address))
    towards = place.address
    if hosts[place.number] == hosts[0]:
        elsewhere = (own for at, own in zip(hosts, found, strict=True) if at != hosts[0] and own)
        towards = next(elsewhere, towards)
    return interface_of(own_address(towards))


def _gpu_in_words(local: int) -> str:
    """A name that this process's GPU has alone among those of all machines; "" without a GPU."""
    if not (torch.cuda.is_available() and dist.is_nccl_available()):
        return ""
    found = torch.cuda.get_device_properties(local % torch.cuda.device_count())
    return f"{host()} {found.pci_domain_id}:{found.pci_bus_id}:{found.pci_device_id}"


@contextlib.contextmanager
def _stdout_of_main() -> Iterator[None]:
    if is_main():
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # noqa: PTH123
        yield


def _say_once(watch: Watch, error: BaseException) -> None:
    """Lets the main process alone print an error that all processes have.

    Raises:
        SystemExit: with the error's exit status, if the main process prints the same error.
    """
    if isinstance(error, InputError):
        watch.first_to_fail()
        if watch.said_by_main(str(error)):
            raise SystemExit(error.exit_status()) from None


@contextlib.contextmanager
def ended_at_once() -> Iterator[None]:
    """Ends a program that has joined others without the clean-up of Python's interpreter.

    During that, a thread of torch that still serves the group or the store occasionally kills the
    process with SIGABRT, on a busy machine, after all work is done.
    """
    status = 0
    try:
        yield
    except SystemExit as stop:
        if not _HAS_JOINED or isinstance(stop.code, str):  # Python prints a text as it ends
            raise
        status = stop.code or 0
    if not _HAS_JOINED:
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
