"""How a process joins those that a launcher started, and how it leaves them."""

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
    """Joins the processes that a launcher started; alone without one.

    Processes other than the main one lose their standard output. An error in one ends all.

    Raises:
        InputError: what the launcher has set makes no sense, or the others do not come, or cannot
            be reached.
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
        barrier()  # nobody leaves while another is at work
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
"""The numbers that this process has had in groups."""


def _connect(place: Place, store: dist.Store, watch: Watch) -> None:
    """Makes one group of the processes, which have met.

    Raises:
        InputError: one cannot be reached.
    """
    hosts = place.exchange(store, "host", host())
    if len({*hosts}) > 1:
        watch.machines = [name.split()[0] for name in hosts]
    # torchrun sets it; under srun, mpirun or a script of one's own it is the same count.
    os.environ.setdefault("LOCAL_RANK", str(hosts[: place.number].count(hosts[place.number])))
    gpus = place.exchange(store, "gpu", _gpu_in_words(int(os.environ["LOCAL_RANK"])))
    # NCCL is the faster one between GPUs, and refuses two processes on one GPU.
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
    """The interface by which others reach this process; "" where that is not known.

    It is the one by which this machine reaches the store's, or the store's machine another.
    """
    ways = place.exchange(store, "way", own_address(place.address))
    towards = place.address
    if hosts[place.number] == hosts[0]:
        elsewhere = (way for at, way in zip(hosts, ways, strict=True) if at != hosts[0] and way)
        towards = next(elsewhere, towards)
    return interface_of(own_address(towards))


def _gpu_in_words(local: int) -> str:
    """What tells the GPU that a process takes from all others, on all machines; "" without one."""
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
    """An error that all processes meet is printed by the main one, whose end ends the others.

    Raises:
        SystemExit: with the error's exit status, where the main process has printed it.
    """
    if isinstance(error, InputError):
        watch.first_to_fail()
        if watch.said_by_main(str(error)):
            raise SystemExit(error.exit_status()) from None


@contextlib.contextmanager
def ended_at_once() -> Iterator[None]:
    """Around a whole program: one that has joined others ends without Python's own end.

    There a thread of torch's that still serves the group or the store takes the process down with
    SIGABRT, now and then on a busy machine, when all work is done.
    """
    status = 0
    try:
        yield
    except SystemExit as stop:
        if not _HAS_JOINED or isinstance(stop.code, str):  # which Python prints as it ends
            raise
        status = stop.code or 0
    if not _HAS_JOINED:
        return
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)
