"""The file of an index: records that are only ever added, each whole or not there.

    bytes 0..63   what the file is, and how far it counts ("the mark"), with a checksum
    records       each begins at a multiple of 64: a head of 32 bytes, JSON, arrays

A writer adds a record behind the end that the mark names, lets the disk take it, and only then
moves the mark: 64 bytes in one sector, the only ones that are ever written anew. Killed before, it
leaves behind the mark what nobody reads and the next writer cuts off. So a reader, at any moment,
sees the records up to a mark and nothing half-written; and a file that ends before its mark, or a
record that differs from its checksum, is damaged, never merely unfinished.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import struct
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dataset.decoding import need_file, reason
from storage import digest, held, write_atomically
from utils import DamagedError, InputError, MachineError

MAGIC, VERSION = b"ANCHORIX", 1
ALIGNMENT = 64
ADVICE = "use another copy of it, or build it again"
_MARK = struct.Struct("<8sIIQQ16s")  # magic, version, 0, where the records end, how many, checksum
_HEAD = struct.Struct("<QQ16s")  # bytes of JSON, bytes of arrays, checksum of the JSON
READINGS = 20  # 10 ms apart, of a mark that is just being written


class Source:
    """A file that stays open as long as somebody reads its records.

    Attributes:
        identity: what tells it from another; the file, and its first record's head, by which it is
            known that another index was copied over it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = _opened(path)
        self.identity = self._identity()

    def _identity(self) -> tuple[int, int, bytes]:
        status = os.fstat(self.number)
        return status.st_dev, status.st_ino, os.pread(self.number, _HEAD.size, ALIGNMENT)

    def check(self, mark: Mark) -> None:
        """Raises DamagedError where records up to a mark are no longer what they were.

        They lie in memory as they lie in the file: to look at what was cut off would end the
        process.
        """
        if self._identity() != self.identity:
            raise DamagedError(
                f"index {self.path} was overwritten while it was read; open it again"
            )
        _check_end(self, mark)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


class Mark(NamedTuple):
    """How far a file counts: where its records end, and how many there are."""

    end: int
    records: int


@dataclass(frozen=True)
class Record:
    """What was added at once.

    Attributes:
        content: plain values. arrays: by name; they lie in the file and are read when looked at.
    """

    content: dict[str, Any]
    arrays: dict[str, np.ndarray]
    _digests: dict[str, str]  # of those that have not been checked yet
    _places: dict[str, int]  # where in the file each array begins
    _source: Source

    def check(self, *names: str) -> None:
        """Compares arrays with their checksums, each once.

        Raises:
            DamagedError: one of them differs.
        """
        for name in names:
            if (expected := self._digests.get(name)) is None:
                continue
            if digest(_bytes_of(self.arrays[name])) != expected:
                raise DamagedError(
                    f"index {self._source.path} is not as it was written (the checksum of some of "
                    f"its {name} differs), so it is damaged; {ADVICE}"
                )
            self._digests.pop(name, None)  # another thread may have checked it meanwhile

    def rows(self, name: str, numbers: np.ndarray) -> np.ndarray:
        """Some rows of an array, read one by one: a look at them would map what lies around."""
        array = self.arrays[name]
        found = np.empty((len(numbers), *array.shape[1:]), array.dtype)
        for row, number in zip(found, numbers.tolist(), strict=True):
            os.preadv(self._source.number, [row], self._places[name] + number * row.nbytes)
        return found


# --- reading --------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """What was read of a file.

    Attributes:
        mark: how far it counted. source: the file; another one may take its place.
        records: those that were read. anew: whether they are all, and not the new ones alone.
    """

    mark: Mark
    source: Source
    records: list[Record]
    anew: bool


def read(path: Path, since: Reading | None = None) -> Reading:
    """The records of the file at `path`; with `since`, only those that were added after it.

    Their JSON is compared with its checksum; arrays are when they are asked to (`check`).

    Raises:
        InputError: there is no such file, it is no index, or one of a newer version.
        DamagedError: it is not as it was written.
    """
    source = Source(path)
    mark = _mark_of(source)
    anew = (
        since is None
        or since.source.identity != source.identity
        or since.mark.end > mark.end  # an older copy was written over it
    )
    source = source if anew else since.source
    with os.fdopen(os.dup(source.number), "rb") as file:
        # As a plain array: each piece cut from a memmap costs a microsecond more.
        content = np.asarray(np.memmap(file, mode="r", shape=(mark.end,)))
    start = Mark(ALIGNMENT, 0) if anew else since.mark
    records = list(_records(content, start.end, source))
    if start.records + len(records) != mark.records:
        raise _misshapen(path)
    return Reading(mark, source, records, anew)


def read_mark(path: Path) -> tuple[Mark, tuple[int, int, bytes]]:
    """How far the file at `path` counts just now, and which file it is; raises as `read`."""
    source = Source(path)
    return _mark_of(source), source.identity


def _opened(path: Path) -> int:
    if path.is_dir():
        raise InputError(f"{path} is a folder, not an index; give the file that `build` wrote")
    try:
        need_file(path)
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise InputError(
            f"index {path} does not exist; check the path, or make it with `build`"
        ) from None
    except OSError as error:
        raise InputError(
            f"index {path} cannot be read ({reason(error)}); check the path and its permissions"
        ) from error


def _mark_of(source: Source) -> Mark:
    path = source.path
    for _ in range(READINGS):
        first = os.pread(source.number, _MARK.size, 0)
        if not first.startswith(MAGIC):
            raise InputError(f"{path} is not an index of ours; give the file that `build` wrote")
        if len(first) == _MARK.size:
            _, version, _, end, records, checksum = _MARK.unpack(first)
            if checksum == _short_digest(first[: -len(checksum)]):
                if version > VERSION:
                    raise InputError(
                        f"index {path} was written by a newer version of this program (format "
                        f"{version}, and this one reads {VERSION}); update, or build it again"
                    )
                mark = Mark(end, records)
                _check_end(source, mark)
                return mark
        time.sleep(0.01)
    raise DamagedError(f"the beginning of index {path} is damaged; {ADVICE}")


def _check_end(source: Source, mark: Mark) -> None:
    """Raises DamagedError where a file ends before its mark."""
    if (size := os.fstat(source.number).st_size) < mark.end:
        raise DamagedError(
            f"index {source.path} has {size:,} of its {mark.end:,} bytes: its end is missing; copy "
            "it again"
        )


def _records(content: np.ndarray, at: int, source: Source) -> Iterator[Record]:
    while at < len(content):
        record, at = _record(content, at, source)
        yield record
    if at != len(content):
        raise _misshapen(source.path)


def _record(content: np.ndarray, at: int, source: Source) -> tuple[Record, int]:
    """The record that begins at a place of the file, and where it ends."""
    path = source.path
    if at + _HEAD.size > len(content):
        raise _misshapen(path)
    text_size, data_size, checksum = _HEAD.unpack(content[at : at + _HEAD.size].tobytes())
    start = at + _HEAD.size
    data = at + _padded(_HEAD.size + text_size)
    end = data + data_size
    if end > len(content):
        raise _misshapen(path)
    text = content[start : start + text_size].tobytes()
    if _short_digest(text) != checksum:
        raise _misshapen(path)
    values = json.loads(text)
    arrays, digests, places = {}, {}, {}
    for name, (kind, shape, offset, array_digest) in values.pop("arrays").items():
        kind = np.dtype(kind)
        place = data + offset
        size = int(np.prod(shape)) * kind.itemsize
        arrays[name] = content[place : place + size].view(kind).reshape(shape)
        digests[name], places[name] = array_digest, place
    return Record(values, arrays, digests, places, source), end


def _misshapen(path: Path) -> DamagedError:
    return DamagedError(f"a record of index {path} is not as it was written; {ADVICE}")


# --- writing --------------------------------------------------------------------------------------


class Writer:
    """The one process that may change an index; `writing` makes it."""

    def __init__(self, path: Path, file: BinaryIO, mark: Mark) -> None:
        self.path = path
        self.mark = mark
        self._file = file

    def add(self, content: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Adds a record; when this returns, the disk has it.

        Raises:
            MachineError: the disk is full; the index is as it was.
        """
        try:
            end = self._write_record(content, arrays)
            os.fsync(self._file.fileno())
            self._write_mark(Mark(end, self.mark.records + 1))
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(self.mark.end)
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise MachineError(
                f"cannot write {self.path}: {error.strerror or error}; "
                + ("free some space" if full else "see to its disk")
                + " and run the same command again (what it held before is unharmed)"
            ) from error

    def _write_record(self, content: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> int:
        """Writes behind the mark, where nobody reads yet; returns where the record ends."""
        described, parts, size = {}, [], 0
        for name, array in arrays.items():
            part = _bytes_of(array)
            described[name] = [array.dtype.str, array.shape, size, digest(part)]
            parts.append((size, part))
            size = _padded(size + part.nbytes)
        text = json.dumps({**content, "arrays": described}).encode()
        start = self.mark.end
        data = start + _padded(_HEAD.size + len(text))
        self._write(start, _HEAD.pack(len(text), size, _short_digest(text)) + text)
        for offset, part in parts:
            self._write(data + offset, part)
        self._file.truncate(data + size)
        return data + size

    def _write(self, at: int, content: bytes | np.ndarray) -> None:
        self._file.seek(at)
        left = memoryview(content)
        while left:  # one call takes at most 2 GB
            left = left[self._file.write(left) :]

    def _write_mark(self, mark: Mark) -> None:
        self._write(0, packed(mark))
        os.fsync(self._file.fileno())
        self.mark = mark


def packed(mark: Mark, version: int = VERSION) -> bytes:
    """The first bytes of a file that counts up to `mark`."""
    body = _MARK.pack(MAGIC, version, 0, mark.end, mark.records, bytes(16))[:-16]
    return body + _short_digest(body)


def create(path: Path, like: Path | None = None) -> None:
    """Writes an index without records, atomically, in place of an unfinished one.

    Args:
        like: see `write_atomically`.

    Raises:
        InputError: it cannot be written there, or what stands there is none of ours.
    """
    if path.exists() and not _is_ours(path):
        raise InputError(
            f"{path} is in the way of an index that is being made, and is not one; move it away"
        )
    first = packed(Mark(ALIGNMENT, 0)).ljust(ALIGNMENT, b"\0")
    write_atomically(path, lambda file: file.write(first), like)


def _is_ours(path: Path) -> bool:
    """Whether a file is an index or a graph, damaged or not."""
    try:
        read_mark(path)
    except DamagedError:
        return True
    except InputError:
        return False
    return True


def part_of(path: Path) -> Path:
    """The file in which an index or a graph grows until it is complete."""
    return path.with_name(f"{path.name}.part")


@contextlib.contextmanager
def writing_anew(path: Path) -> Iterator[Writer]:
    """Writes an index or a graph from its first record on; it is there once that has ended.

    Raises:
        InputError: as `create`.
    """
    part = part_of(path)
    create(part, like=path)
    try:
        with writing(part) as writer:
            yield writer
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)  # a disk that is full needs the room
        raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Writer]:
    """The right to change the index at `path`; what a killed writer has left is cut off.

    Raises:
        InputError: another process has it, or the file cannot be written.
    """
    with held(path):
        mark, _ = read_mark(path)
        try:
            # Unbuffered: what was written is at once the system's, whatever becomes of us.
            file = path.open("r+b", buffering=0)
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}; make it writable") from error
        with file:
            if path.stat().st_size > mark.end:
                file.truncate(mark.end)
            yield Writer(path, file, mark)


# --- bytes ----------------------------------------------------------------------------------------


def _bytes_of(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _padded(size: int) -> int:
    return -(-size // ALIGNMENT) * ALIGNMENT


def _short_digest(content: bytes) -> bytes:
    return bytes.fromhex(digest(content))
