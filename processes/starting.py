"""Starting processes on this machine, and passing signals on to them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist

from machine import cores
from processes.watching import LAUNCHER


def wanted(gpu_id: int) -> int:
    """How many processes are to be started: one for each visible GPU, for `--gpu-id -1`.

    1 where there are fewer than two GPUs, and in a process that a launcher has started.
    """
    if gpu_id != -1 or "WORLD_SIZE" in os.environ:
        return 1
    return max(1, torch.cuda.device_count())


def launch(command: Sequence[str], count: int) -> int:
    """Runs `count` processes of a command that calls `joined`, on this machine.

    When one fails the others are ended. Signals to stop are passed on, each once.

    Returns:
        The exit status: 0, or that of the first process that failed.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        LAUNCHER: str(os.getpid()),
    }
    common.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    with _children() as (begin, children, stops):
        for number in range(count):
            begin(command, {**common, "RANK": str(number), "LOCAL_RANK": str(number)})
        return _wait_for(children, stops)


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a command to its end; signals to stop are passed on, each once, and waited for.

    Returns:
        The exit status, as `subprocess` has it.
    """
    with _children() as (begin, children, _):
        begin(command, environment)
        return children[0].wait()


@contextlib.contextmanager
def _children() -> Iterator[tuple[Callable, list[subprocess.Popen], list[int]]]:
    """What begins a process, those that were begun, and the signals that were passed on to them.

    Those that are still there in the end are killed.
    """
    children: list[subprocess.Popen] = []
    stops: list[int] = []

    def pass_on(number: int, frame: object) -> None:
        stops.append(number)
        for child in children:
            child.send_signal(number)

    def begin(command: Sequence[str], environment: Mapping[str, str]) -> None:
        # In a session of its own, so that Ctrl-C reaches a process once, through us.
        children.append(subprocess.Popen(command, env=environment, start_new_session=True))

    before = {number: signal.signal(number, pass_on) for number in stop_signals()}
    try:
        yield begin, children, stops
    finally:
        for child in children:
            child.kill()
            child.wait()
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a program to stop; under nohup a terminal may be closed."""
    stays = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *([] if stays else [signal.SIGHUP])]


def _wait_for(children: list[subprocess.Popen], stops: list[int]) -> int:
    while True:
        statuses = [child.poll() for child in children]
        failed = [number for number, status in enumerate(statuses) if status]
        if all(status is not None for status in statuses) or (failed and not stops):
            break
        time.sleep(0.1)
    if not failed:
        return 0
    # Those that lost the connection to a killed process end by themselves: it comes first.
    first = min(failed, key=lambda number: statuses[number] > 0)
    status = statuses[first]
    if status < 0 and not stops:
        name = signal.Signals(-status).name
        print(
            f"error: process {first} of {len(children)} was ended by {name}; the others were "
            "stopped",
            file=sys.stderr,
        )
    return 128 - status if status < 0 else status


def ignore_terminal(_: int) -> None:
    """For processes that read data: its signals reach them too, and the parent still needs them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
