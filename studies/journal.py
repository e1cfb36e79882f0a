"""Optuna's journal of a study, which stays readable after the disk was full. Loads Optuna."""

from __future__ import annotations

from pathlib import Path

from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock


def storage_in(journal: Path) -> JournalStorage:
    """Optuna's storage in the file at `journal`, which is made where there is none."""
    return JournalStorage(JournalFileBackend(str(journal), lock_obj=_Lock(journal)))


class _Lock(JournalFileSymlinkLock):
    """The right to write to a journal, which then ends with a whole line.

    A full disk leaves an incomplete last line, whichever worker wrote it. Readers ignore it, but
    the next line would be appended to it, and then nothing could be read.
    """

    def __init__(self, journal: Path) -> None:
        super().__init__(str(journal))
        self._journal = journal

    def acquire(self) -> bool:
        got = super().acquire()
        try:
            _take_off_cut_line(self._journal)
        except BaseException:
            self.release()
            raise
        return got


def _take_off_cut_line(journal: Path) -> None:
    with journal.open("r+b") as file:
        if size := file.seek(0, 2):
            file.seek(size - 1)
            if file.read() != b"\n":
                file.seek(0)
                file.truncate(file.read().rfind(b"\n") + 1)
