"""Zip archives with a checksum, so that damage is noticed when they are read.

.pth and .npz files are zip archives. The checksum is stored as the archive's comment, which all
readers of zip archives ignore, and which is copied with the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from storage.writing import write_atomically
from utils import DamagedError, InputError, not_read

_SEAL = b"checksum blake2b-128 "
_SEAL_LENGTH = len(_SEAL) + 32
_ARCHIVE_BEGIN = b"PK\x03\x04"
_ARCHIVE_END = b"PK\x05\x06"  # 22 bytes, the last two of which are the length of the comment
_LONGEST_TAIL = 22 + 2**16 - 1


def write_archive(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a zip archive atomically, and adds a checksum to it.

    Args:
        write: writes an archive without a comment into an open file.
    """

    def write_sealed(file: BinaryIO) -> None:
        write(file)
        file.seek(-2, os.SEEK_END)
        file.write(_SEAL_LENGTH.to_bytes(2, "little"))
        end = file.tell()
        found = _digest_of(file, end)
        file.seek(end)
        file.write(_SEAL + found)

    write_atomically(path, write_sealed)


def _check(file: BinaryIO, what: str) -> None:
    """Compares an open archive with its checksum, if it has one.

    Args:
        what: names the file in the error.

    Raises:
        DamagedError: its bytes are not those that were written, or its end is missing.
    """
    begins_well = file.read(4) == _ARCHIVE_BEGIN
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _LONGEST_TAIL))
    tail = file.read()
    end = tail.rfind(_ARCHIVE_END)
    comment = int.from_bytes(tail[end + 20 : end + 22], "little") if end >= 0 else 0
    if begins_well and end < 0:
        raise DamagedError(f"{what} cannot be read, because its end is missing; copy it again")
    # If one of these two signs of a checksum is itself damaged, the other remains.
    if _SEAL in tail or comment == _SEAL_LENGTH:
        end = max(0, size - _SEAL_LENGTH)
        if tail[-_SEAL_LENGTH:] != _SEAL + _digest_of(file, end):
            raise DamagedError(
                f"{what} is not as it was written (its checksum differs), so it is damaged; use "
                "another copy of it, or make it again"
            )
    file.seek(0)


def _digest_of(file: BinaryIO, end: int) -> bytes:
    """The checksum `digest` of the first `end` bytes of an open file, in ASCII."""
    found, left = hashlib.blake2b(digest_size=16), end
    file.seek(0)
    while left and (part := file.read(min(left, 2**20))):
        found.update(part)
        left -= len(part)
    return found.hexdigest().encode()


def need_file(path: Path, what: str) -> None:
    """Raises InputError if there is no file at `path`; `what` is in front of it in the sentence."""
    if not path.is_file():
        found = "is a folder; give a file" if path.is_dir() else "does not exist; check the path"
        raise InputError(f"{what} {path} {found}")


@contextlib.contextmanager
def opened(path: Path, what: str) -> Iterator[BinaryIO]:
    """Opens a file whose checksum, if it has one, is right.

    Raises:
        InputError: it is missing, or differs from its checksum.
        MachineError: it cannot be opened.
    """
    path = Path(path)
    need_file(path, what)
    try:
        file = path.open("rb")
    except OSError as error:
        raise not_read(f"{what} {path}", error) from error
    with file:
        _check(file, f"{what} {path}")
        yield file
