"""Processes watch each other, so that one that fails or falls silent ends the others too.

They give signs of life in the launcher's key-value store, and look there for each other's. Where
the store itself does not answer any more, because its machine is gone, or the network to it, that
is silence too. So nobody is left to wait: a process ends with a sentence within about `SILENCE`
seconds of what happened to another, on whichever machine.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import NoReturn, TypeVar

import torch.distributed as dist

T = TypeVar("T")

BEAT = 3.0  # seconds between two signs of life
SILENCE = 40.0  # seconds without one after which a process counts as dead
LAUNCHER = "ANCHORAGE_LAUNCHER"  # in the environment of processes that `launch` started: its pid


class Gone(Exception):
    """The store does not answer; the message says why."""


class Line:
    """A connection to the store, which may break: a question is answered in time, or not at all.

    torch's own timeouts do not hold for all questions. Where packets are lost, as on a network that
    is cut, the system gives up after a quarter of an hour.
    """

    def __init__(self, store: dist.Store, where: str) -> None:
        self._store = store
        self._where = where
        self._lock = threading.Lock()  # a store is not made for two threads

    def ask(self, question: Callable[[dist.Store], T]) -> T:
        """What `question` gets from the store.

        Raises:
            Gone: the store has ended, or has been silent for `SILENCE` seconds.
        """
        answer: Future[T] = Future()

        def put() -> None:
            try:
                with self._lock:
                    answer.set_result(question(self._store))
            except BaseException as error:  # is raised where the answer is looked at
                answer.set_exception(error)

        threading.Thread(target=put, name="question", daemon=True).start()
        # In parts, of which a time when this process was stopped (SIGSTOP) takes but one.
        if not any(wait([answer], BEAT).done for _ in range(round(SILENCE / BEAT))):
            raise Gone(
                f"the store at {self._where} has not answered for {SILENCE:.0f} s; the machine "
                "that keeps it, or the network to it, is gone"
            )
        try:
            return answer.result()
        except RuntimeError as error:
            raise Gone(
                "the store that the processes share went with the process that kept it"
            ) from error


class Watch(threading.Thread):
    """Gives signs of life and looks for those of the others; without them ends this process.

    Attributes:
        machines: the name of each process's machine, where they are on several.
    """

    def __init__(self, line: Line, number: int, count: int) -> None:
        super().__init__(name="watch", daemon=True)
        self.number = number
        self.count = count
        self.machines: Sequence[str] = ()
        self._line = line
        self._over = threading.Event()
        self._launcher = int(os.environ.get(LAUNCHER, "0"))
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._looked = time.monotonic()

    def run(self) -> None:
        """Beats until `stop`."""
        beats = 0
        while not self._over.wait(BEAT if beats else 0.0):
            woke = time.monotonic()
            if woke - self._looked > 3 * BEAT:  # it was stopped, and maybe the others with it
                self._seen.clear()
            try:
                why = self._what_is_wrong(beats, woke)
            except Gone as gone:
                why = str(gone)
            if why:
                self._end(why)
            # A store that many ask is slow to answer, which is no stop of this process.
            answered = time.monotonic()
            self._looked = answered if answered - woke < SILENCE / 2 else woke
            beats += 1

    def _what_is_wrong(self, beats: int, now: float) -> str:
        if self._launcher and os.getppid() != self._launcher:
            return "the process that started it is gone"
        failed, found = self._line.ask(lambda store: self._exchange(store, beats))
        if failed is not None:
            time.sleep(BEAT)  # this one may be about to fail itself, and to say so better
            return f"{self._named(failed)} failed"
        for other, beat in found.items():
            if other not in self._seen or self._seen[other][0] != beat:
                self._seen[other] = beat, now
            elif now - self._seen[other][1] > SILENCE:
                return f"{self._named(other)} has been silent for {SILENCE:.0f} s"
        return ""

    def _exchange(self, store: dist.Store, beats: int) -> tuple[int | None, dict[int, bytes]]:
        """Gives a sign of life; who has failed, or the last sign of all others that gave one."""
        store.set(f"alive {self.number}", str(beats))
        if store.check(["failed"]):
            return int(store.get("failed")), {}
        keys = {n: f"alive {n}" for n in range(self.count) if n != self.number}
        if keys and not store.check([*keys.values()]):  # one question for all, as a rule
            keys = {number: key for number, key in keys.items() if store.check([key])}
        found = store.multi_get([*keys.values()]) if keys else []
        return None, dict(zip(keys, found, strict=True))

    def _named(self, other: int) -> str:
        place = f" on {self.machines[other]}" if self.machines else ""
        return f"process {other}{place}"

    @contextlib.contextmanager
    def limit(self, seconds: float, why: str) -> Iterator[None]:
        """Ends this process when what is done in here takes longer."""
        timer = threading.Timer(seconds, self._end, [why])
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()

    def _end(self, why: str) -> None:
        if not self._over.is_set():
            print(f"process {self.number} of {self.count} stops: {why}", file=sys.stderr)
            sys.stderr.flush()
            os._exit(1)

    def fail(self, error: BaseException) -> NoReturn:
        """Tells the others and ends this process: with a traceback, unless another failed first."""
        self.stop()
        first = self.first_to_fail()
        if first == self.number or not isinstance(error, RuntimeError):
            traceback.print_exception(error)
        else:
            self._over.clear()
            self._end(f"{self._named(first)} failed" if first >= 0 else "the others are gone")
        sys.stderr.flush()
        os._exit(1)

    def first_to_fail(self) -> int:
        """Who failed first, this process if nobody did before; -1 when that cannot be known."""
        own = str(self.number)
        try:
            return int(self._line.ask(lambda store: store.compare_set("failed", "", own)))
        except Gone:
            return -1

    def said_by_main(self, sentence: str) -> bool:
        """Whether the main process says this, within two seconds; it is what the main one says."""

        def said(store: dist.Store) -> bool:
            if not self.number:
                store.set("said", sentence)
                return False
            end = time.monotonic() + 2
            while not store.check(["said"]) and time.monotonic() < end:
                time.sleep(0.1)
            return store.check(["said"]) and store.get("said").decode() == sentence

        try:
            return self._line.ask(said)
        except Gone:
            return False

    def stop(self) -> None:
        """No more beats; waits for the one that is being given.

        A thread that is inside the store when Python ends would take the process down with SIGABRT.
        """
        self._over.set()
        if threading.current_thread() is not self:
            self.join(timeout=5 * BEAT)  # on a busy machine a beat takes a while
