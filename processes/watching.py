"""Processes watch each other: when one fails or falls silent, the others end too.

Each regularly writes a sign of life (a beat) into the key-value store, and reads those of all
others. A store that no longer answers, because its machine or the network is down, counts as silent
as well. So no process waits for ever: each ends with a message within about `SILENCE` seconds of
another's failure, on whichever machine.
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
LAUNCHER = "ANCHORAGE_LAUNCHER"  # environment variable: the pid of the process that ran `launch`


class Gone(Exception):
    """The store no longer answers; the message says why."""


class Line:
    """A connection to the store with a timeout for every request.

    torch's own timeouts do not cover all requests: when the network is cut, the system gives up
    only after a quarter of an hour.
    """

    def __init__(self, store: dist.Store, where: str) -> None:
        self._store = store
        self._where = where
        self._lock = threading.Lock()  # a store is not made for two threads

    def ask(self, question: Callable[[dist.Store], T]) -> T:
        """The result of `question(store)`.

        Raises:
            Gone: the store has ended, or has not answered for `SILENCE` seconds.
        """
        answer: Future[T] = Future()

        def put() -> None:
            try:
                with self._lock:
                    answer.set_result(question(self._store))
            except BaseException as error:  # raised again by `answer.result()`
                answer.set_exception(error)

        threading.Thread(target=put, name="question", daemon=True).start()
        # In short waits: while this process is stopped (SIGSTOP), only one of them runs out.
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
    """Writes this process's beats and reads those of the others; ends this process without them.

    Attributes:
        machines: the name of each process's machine, if there are several.
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
            # A busy store answers slowly; that does not mean that this process was stopped.
            answered = time.monotonic()
            self._looked = answered if answered - woke < SILENCE / 2 else woke
            beats += 1

    def _what_is_wrong(self, beats: int, now: float) -> str:
        if self._launcher and os.getppid() != self._launcher:
            return "the process that started it is gone"
        failed, found = self._line.ask(lambda store: self._exchange(store, beats))
        if failed is not None:
            time.sleep(BEAT)  # this one may be about to fail itself, with a better message
            return f"{self._named(failed)} failed"
        for other, beat in found.items():
            if other not in self._seen or self._seen[other][0] != beat:
                self._seen[other] = beat, now
            elif now - self._seen[other][1] > SILENCE:
                return f"{self._named(other)} has been silent for {SILENCE:.0f} s"
        return ""

    def _exchange(self, store: dist.Store, beats: int) -> tuple[int | None, dict[int, bytes]]:
        """Writes a beat; returns the failed process, if any, and the others' latest beats."""
        store.set(f"alive {self.number}", str(beats))
        if store.check(["failed"]):
            return int(store.get("failed")), {}
        keys = {n: f"alive {n}" for n in range(self.count) if n != self.number}
        if keys and not store.check([*keys.values()]):  # usually one request is enough
            keys = {number: key for number, key in keys.items() if store.check([key])}
        found = store.multi_get([*keys.values()]) if keys else []
        return None, dict(zip(keys, found, strict=True))

    def _named(self, other: int) -> str:
        place = f" on {self.machines[other]}" if self.machines else ""
        return f"process {other}{place}"

    @contextlib.contextmanager
    def limit(self, seconds: float, why: str) -> Iterator[None]:
        """Ends this process if the block takes longer than `seconds`."""
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
        """Reports the failure and ends this process; prints a traceback if none failed before."""
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
        """The process that failed first, which is this one if none did before; -1 if unknown."""
        own = str(self.number)
        try:
            return int(self._line.ask(lambda store: store.compare_set("failed", "", own)))
        except Gone:
            return -1

    def said_by_main(self, sentence: str) -> bool:
        """Whether the main process reports the same sentence within two seconds.

        In the main process itself: reports the sentence to the others, and returns False.
        """

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
        """Ends the beats, after waiting for one that is under way.

        A thread that uses the store while Python ends would kill the process with SIGABRT.
        """
        self._over.set()
        if threading.current_thread() is not self:
            self.join(timeout=5 * BEAT)  # on a busy machine a beat takes a while
