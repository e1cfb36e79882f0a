"""How processes that train together find each other: the launcher's environment, and a store.

The store is torch's key-value store, a server on one port, run by the launcher or by process 0.
After `WORD` seconds a message names the processes that are still missing; after $ANCHORAGE_WAIT
seconds (by default `LONGEST_WAIT`) waiting ends with an error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from processes import watching
from processes.addresses import listener
from processes.watching import Gone, Line
from utils import InputError

WORD = 30.0  # seconds until a message names the processes that are missing
LONGEST_WAIT = 600.0  # seconds
WAIT = "ANCHORAGE_WAIT"  # environment variable that replaces LONGEST_WAIT
ANSWER = 60.0  # seconds within which a store must answer
TRIES = 3  # attempts to connect to a store that drops connections
PATIENCE = timedelta(hours=2)  # for one collective: the others may be clustering or decoding


@dataclass(frozen=True)
class Place:
    """The number of a process among those that a launcher started, and the address where they meet.

    Attributes:
        number: of this process, from 0. count: of all processes. address, port: of the store.
        attempt: how often the launcher has restarted all of them.
        keeps: whether this process runs the store.
    """

    number: int
    count: int
    address: str
    port: int
    attempt: int
    keeps: bool

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Place | None:
        """From the environment variables that a launcher sets; None if they are unset or empty.

        Raises:
            InputError: some of them are missing, or are not numbers in their range.
        """
        given = [name for name in ("RANK", "WORLD_SIZE") if environment.get(name)]
        if not given:
            return None
        wanted = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        if missing := [name for name in wanted if not environment.get(name)]:
            raise InputError(
                f"the environment has {' and '.join(given)}, as for one of several processes, but "
                f"no {' and no '.join(missing)}; start them with torchrun, or unset "
                f"{' and '.join(given)} to have one process"
            )

        def whole(name: str, least: int, most: int) -> int:
            text = environment.get(name, "0")
            if not (text.isdecimal() and least <= int(text) <= most):
                raise InputError(
                    f"{name} is {text!r} in the environment and has to be a whole number from "
                    f"{least} to {most}; torchrun sets it for each process"
                )
            return int(text)

        count = whole("WORLD_SIZE", 1, 1 << 20)
        number = whole("RANK", 0, count - 1)
        whole("LOCAL_RANK", 0, count - 1)
        port, attempt = whole("MASTER_PORT", 1, 65535), whole("TORCHELASTIC_RESTART_COUNT", 0, 999)
        keeps = number == 0 and environment.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        return cls(number, count, environment["MASTER_ADDR"], port, attempt, keeps)

    @property
    def words(self) -> str:
        """The address of the store in words."""
        return f"{self.address}, port {self.port}"

    def store(self) -> dist.Store:
        """A connection to the store, which this process starts first if it runs it.

        Raises:
            InputError: it cannot be started here, or is not started elsewhere in time.
        """
        if not self.keeps:
            self._wait(self._closed, "start it, on the machine that MASTER_ADDR names")
        return self._connected(opens=self.keeps)

    def another(self) -> dist.Store:
        """A further connection to the store, once `store` has returned.

        Raises:
            InputError: the store has ended.
        """
        return self._connected(opens=False)

    def _connected(self, opens: bool) -> dist.Store:
        for attempt in range(TRIES):
            opened = self._opened(opens)
            if isinstance(opened, dist.Store):
                return dist.PrefixStore(f"attempt {self.attempt}", opened)
            # No answer is no reason to try again: a store accepts one connection after another,
            # and may be waiting for a name server (see `open_store`).
            if opens or opened is None:
                break
            if attempt + 1 < TRIES:  # many connections at once may make a store drop one
                time.sleep(0.5)
        why = "what listens there is not a store"
        if isinstance(opened, OSError):
            why = f"that port cannot be used ({opened.strerror})"
            if opened.errno == errno.EADDRINUSE:
                why = "another program uses that port"
        raise InputError(
            f"the processes cannot meet at {self.words}: {why}; choose a free MASTER_PORT "
            "(torchrun: --master-port)"
        )

    def _opened(self, opens: bool) -> dist.Store | OSError | RuntimeError | None:
        """The store, or the error if it could not be opened, or None if nothing answers."""
        opened: list[dist.Store | OSError | RuntimeError] = []

        def connect() -> None:
            # The store's own machine may be unable to reach MASTER_ADDR, or may not resolve it.
            address = "127.0.0.1" if self.keeps else self.address
            try:
                opened.append(
                    open_store(self.address, self.port) if opens else _reached(address, self.port)
                )
            except (OSError, RuntimeError) as error:
                opened.append(error)

        # In a thread, because the port may be that of another program, which never answers.
        thread = threading.Thread(target=connect, daemon=True)
        thread.start()
        thread.join(ANSWER)
        return opened[0] if opened else None

    def _closed(self) -> str:
        """The process that has not started the store yet, in words; "" once it is started."""
        try:
            socket.create_connection((self.address, self.port), timeout=5).close()
        except OSError as error:
            return f"process 0 at {self.words} ({error.strerror or error})"
        return ""

    def meet(self, store: dist.Store) -> None:
        """Waits until all processes are there.

        Raises:
            InputError: one does not come in time, two have the same number, they disagree about
                their count, or the store has ended.
        """
        try:
            self._meet(Line(store, self.words))
        except Gone as gone:
            raise InputError(
                f"process {self.number} stops: {gone}; see what process 0 says"
            ) from gone

    def _meet(self, line: Line) -> None:
        if line.ask(lambda store: store.add(f"here {self.number}", 1)) > 1:
            raise InputError(
                f"two processes with RANK={self.number} came to {self.words}; each needs a number "
                "of its own, and each job a MASTER_PORT of its own"
            )
        line.ask(lambda store: store.set(f"count {self.number}", str(self.count)))
        numbers = range(self.count)

        def missing() -> str:
            absent = line.ask(lambda store: [n for n in numbers if not store.check([f"count {n}"])])
            return f"process {', '.join(map(str, absent))} of {self.count}" if absent else ""

        self._wait(missing, "start all of them")
        counts = line.ask(lambda store: [int(store.get(f"count {n}")) for n in numbers])
        for other, count in enumerate(counts):
            if count != self.count:
                raise InputError(
                    f"process {self.number} was started with WORLD_SIZE={self.count} and process "
                    f"{other} with WORLD_SIZE={count}; start all with the same"
                )

    def exchange(self, store: dist.Store, what: str, own: str) -> list[str]:
        """Shares a value with the others, and returns those of all processes; all must call it."""
        store.set(f"{what} {self.number}", own)
        return [store.get(f"{what} {other}").decode() for other in range(self.count)]

    def leave(self, store: dist.Store) -> None:
        """Uses the store for the last time; called by a process that has ended its watch.

        The process that runs the store waits until all others have called this, because those that
        still watch would take the end of the store for a failure.
        """
        with contextlib.suppress(RuntimeError):  # some are gone already, in whatever way
            if self.keeps:
                others = [f"left {number}" for number in range(1, self.count)]
                store.wait(others, timedelta(seconds=watching.SILENCE))
            else:
                store.set(f"left {self.number}", "")

    def _wait(self, missing: Callable[[], str], advice: str) -> None:
        """Waits until `missing`, which names the missing processes in words, returns ""."""
        limit, begun, said = longest_wait(os.environ), time.monotonic(), False
        while whom := missing():
            waited = time.monotonic() - begun
            if waited > limit:
                raise InputError(
                    f"process {self.number} has waited {waited:.0f} s for {whom}; {advice}, "
                    f"or set {WAIT}=SECONDS to wait longer"
                )
            if waited > WORD and not said:
                print(f"process {self.number} waits for {whom}", file=sys.stderr, flush=True)
                said = True
            time.sleep(0.2)


def open_store(address: str, port: int = 0) -> dist.TCPStore:
    """Starts a store in this process, for others that reach its machine by `address`.

    torch looks up the name of each client for its log, and the store serves nobody meanwhile. By
    default it listens with IPv6, where a client on the same machine has the address
    ::ffff:127.0.0.1. No /etc/hosts has that, so a name server is asked, and if it does not answer,
    the C library waits 5 s and asks again, for each process anew. So we open the socket ourselves.

    Args:
        port: 0 takes any free one.

    Raises:
        OSError: the port is in use.
    """
    listening = listener(address, port)
    port = listening.getsockname()[1]
    return _reached("127.0.0.1", port, is_master=True, master_listen_fd=listening.detach())


def _reached(address: str, port: int, **keeping: Any) -> dist.TCPStore:
    """A connection to a store, or, with `keeping`, a new store; RuntimeError if that fails."""
    answer = timedelta(seconds=ANSWER)  # torch's own attempts end after it
    store = dist.TCPStore(address, port, wait_for_workers=False, timeout=answer, **keeping)
    store.set_timeout(PATIENCE)
    return store


def longest_wait(environment: Mapping[str, str]) -> float:
    """Seconds to wait for other processes; raises InputError if the variable is not a number."""
    text = environment.get(WAIT, "")
    try:
        seconds = float(text or LONGEST_WAIT)
    except ValueError:
        seconds = -1.0
    if not seconds >= 0:
        raise InputError(
            f"{WAIT} is {text!r} and has to be a number of seconds; unset or correct it"
        )
    return seconds
