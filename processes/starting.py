"""Starting processes on this machine, and passing signals on to them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from types import FrameType

import torch

from machine import cores
from processes.meeting import open_store
from processes.watching import LAUNCHER


def wanted(gpu_id: int) -> int:
    """The number of processes to start: with `--gpu-id -1` one for each visible GPU, else 1.

    It is 1 in a process that a launcher has started.
    """
    if gpu_id != -1 or os.environ.get("WORLD_SIZE"):
        return 1
    return max(1, torch.cuda.device_count())


def launch(command: Sequence[str], count: int) -> int:
    """Runs `count` processes of a command that calls `joined`, on this machine.

    When one fails, the others are killed. Signals to stop are passed on, each once.

    Returns:
        The exit status: 0, or that of the first process that failed.
    """
    store = open_store("127.0.0.1")
    common = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(count),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        LAUNCHER: str(os.getpid()),
    }
    common.setdefault("OMP_NUM_THREADS", str(max(1, cores() // count)))
    with Children() as children:
        for number in range(count):
            children.begin(command, {**common, "RANK": str(number), "LOCAL_RANK": str(number)})
        return children.wait()


def run(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Runs a command until it ends; signals to stop are passed on to it, each once.

    Returns:
        The exit status, in `subprocess`'s convention (negative after a signal).
    """
    with Children() as children:
        return children.begin(command, environment).wait()


class Children:
    """Child processes; within its context, signals to stop are passed on to them.

    Those that still run at its end are killed.
    """

    def __init__(self) -> None:
        self._started: list[subprocess.Popen] = []
        self._told_to_stop = False

    def __enter__(self) -> Children:
        self._before = {number: signal.signal(number, self._pass_on) for number in stop_signals()}
        return self

    def __exit__(self, *_: object) -> None:
        for child in self._started:
            child.kill()
            child.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self._told_to_stop = True
        for child in self._started:
            child.send_signal(number)

    def begin(self, command: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen:
        """Starts one, in a session of its own: Ctrl-C then reaches it once, through us."""
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        self._started.append(child)
        return child

    def wait(self) -> int:
        """Waits until all have ended, or until one fails without a signal to stop.

        Returns:
            The exit status, as that of `launch`.
        """
        while True:
            statuses = [child.poll() for child in self._started]
            failed = [number for number, status in enumerate(statuses) if status]
            if None not in statuses or (failed and not self._told_to_stop):
                break
            time.sleep(0.1)
        if not failed:
            return 0
        # The others fail because they lose the connection to a killed process, so it comes first.
        first = min(failed, key=lambda number: statuses[number] > 0)
        status = statuses[first]
        if status < 0 and not self._told_to_stop:
            print(
                f"error: process {first} of {len(statuses)} was ended by "
                f"{signal.Signals(-status).name}; the others were stopped",
                file=sys.stderr,
            )
        return 128 - status if status < 0 else status


ANNOUNCED = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals that clusters send before they end a job (Slurm's `--signal=USR1@60`, Grid Engine)."""


def stop_signals() -> list[signal.Signals]:
    """The signals that ask a program to stop; SIGHUP is not one under nohup."""
    stays = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGINT, signal.SIGTERM, *ANNOUNCED, *([] if stays else [signal.SIGHUP])]


def ignore_requests(_: int) -> None:
    """Makes a process that reads data ignore signals that a terminal or a cluster sends to all.

    Its parent still needs it until it has stopped itself.
    """
    for number in (signal.SIGINT, signal.SIGHUP, *ANNOUNCED):
        signal.signal(number, signal.SIG_IGN)
