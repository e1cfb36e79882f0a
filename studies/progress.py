"""Prints the progress of a study."""

from __future__ import annotations

import threading
import time

from studies.ledger import Ledger
from terminal import say
from utils import counted, human_seconds


class Progress:
    """Prints a line after each training, with an estimate of the time that is left."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger
        self.begun = time.monotonic()
        self.first = self.left()
        self._lock = threading.Lock()

    def left(self) -> int:
        """The number of trainings that are left, on folds and with seeds."""
        plan = self.ledger.plan
        open_work = [self.ledger.left(one) for one in plan.entrants]
        folds = plan.folds * sum(trials for trials, _ in open_work)
        done = sum(
            len(trial.folds)
            for one in plan.entrants
            for trial in self.ledger.trials(one)
            if trial.state == "running"
        )
        return folds - done + sum(runs for _, runs in open_work)

    def say(self, sentence: str) -> None:
        """Prints a sentence, followed by the time that is left."""
        with self._lock:
            left = self.left()
            done = self.first - left
            if done > 0 and left:
                seconds = round((time.monotonic() - self.begun) / done * left)
                sentence += f"; {counted(left, 'training')} left, about {human_seconds(seconds)}"
            say(sentence, flush=True)
