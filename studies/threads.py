"""The workers of this process, a thread for each place, until no work is left."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Sequence

from processes import stop_signals
from studies.ledger import Ledger, claim_of
from studies.places import Place
from studies.trainer import WAIT, Stopped, Trainer
from studies.worker import Worker


class Workers:
    """Threads that take work from the ledger and do it.

    Args:
        done: is called after each training, with a sentence about it.
    """

    def __init__(self, ledger: Ledger, where: Sequence[Place], done: Callable[[str], None]) -> None:
        self.ledger = ledger
        self.stopping = threading.Event()
        self.signal = signal.SIGINT  # the one that stops the study
        self.errors: list[BaseException] = []
        trainer = Trainer(ledger, self.stopping)
        self.workers = [Worker(ledger, trainer, place, done) for place in where]

    def run(self) -> None:
        """Works until no work is left.

        Raises:
            Stopped: after a signal to stop, which is then `signal`.
            InputError: a worker cannot continue.
        """
        threads = [threading.Thread(target=self._work, args=(worker,)) for worker in self.workers]
        previous = {number: signal.signal(number, self._stop) for number in stop_signals()}
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        if self.errors:
            raise self.errors[0]
        if self.stopping.is_set():
            raise Stopped

    def _stop(self, number: int, _: object) -> None:
        self.signal = signal.Signals(number)
        self.stopping.set()

    def _work(self, worker: Worker) -> None:
        try:
            while not self.stopping.is_set():
                work = self.ledger.next()
                if work is not None:
                    try:
                        worker.do(work)
                    finally:
                        self.ledger.release(claim_of(work))
                elif self.ledger.is_finished:
                    return
                else:  # others are doing all that is left, and may be interrupted
                    self.stopping.wait(WAIT)
        except Stopped:
            self.stopping.set()
        except BaseException as error:
            self.errors.append(error)
            self.stopping.set()
