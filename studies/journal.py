"""Optuna's journal of a study, which survives full disks and killed workers. Loads Optuna."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from utils import not_written


def storage_in(journal: Path, alone: Callable[[], AbstractContextManager]) -> JournalStorage:
    """Optuna's storage in the file at `journal`, which is made where there is none.

    Args:
        alone: a context in which no other worker writes to it.
    """
    return JournalStorage(_Journal(journal, alone))


class _Journal(JournalFileBackend):
    """A journal to which lines are appended under a lock of ours.

    Optuna's lock is a file, which a killed worker leaves to all others: they would wait for it.
    """

    def __init__(self, journal: Path, alone: Callable[[], AbstractContextManager]) -> None:
        super().__init__(str(journal))
        self._journal, self._alone = journal, alone

    def append_logs(self, logs: list[dict[str, Any]]) -> None:
        """Appends entries, each as a line.

        Raises:
            MachineError: the disk is full, or fails.
        """
        lines = "".join(f"{json.dumps(log, separators=(',', ':'))}\n" for log in logs)
        try:
            with self._alone(), self._journal.open("r+b") as file:
                _take_off_cut_line(file)
                file.write(lines.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise not_written(self._journal, error, "and start the study again") from error


def _take_off_cut_line(file: BinaryIO) -> None:
    """Removes an incomplete last line, and goes to the end of the file.

    A full disk leaves one, whichever worker wrote it. Readers ignore it, but the next line would be
    appended to it, and then nothing could be read.
    """
    if size := file.seek(0, os.SEEK_END):
        file.seek(size - 1)
        if file.read() != b"\n":
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
            file.seek(0, os.SEEK_END)
