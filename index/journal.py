"""The file of an index: a sequence of records, to which records are only ever appended.

    bytes 0..63   "the mark": the kind of file, the end of its records, and a checksum
    records       each begins at a multiple of 64: a head of 32 bytes, JSON, arrays

A writer appends a record after the end that the mark names, waits until it is on disk, and only
then moves the mark: 64 bytes in one sector, the only ones that are ever overwritten. If it is
killed before that, the bytes after the mark are ignored by readers and removed by the next writer.
So a reader never sees half a record; and a file that ends before its mark, or a record that differs
from its checksum, is damaged, never merely unfinished.
"""

from __future__ import annotations

import contextlib
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
from storage import digest, held, remove_left_over, write_atomically
from utils import DamagedError, InputError, not_read, not_written

MAGIC, VERSION = b"ANCHORIX", 1
ALIGNMENT = 64
ADVICE = "use another copy of it, or build it again"
AGAIN = "and run the same command again (what it held before is unharmed)"
_MARK = struct.Struct("<8sIIQQ16s")  # magic, version, 0, end and number of the records, checksum
_HEAD = struct.Struct("<QQ16s")  # bytes of JSON, bytes of arrays, checksum of the JSON
READINGS = 20  # attempts, 10 ms apart, to read a mark that is just being written


class Source:
    """An open file, which is closed when none of its records is used any more.

    Attributes:
        identity: of the file, with the head of its first record, which changes if another index is
            copied over it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.number = _opened(path)
        self.identity = self._identity()

    def _identity(self) -> tuple[int, int, bytes]:
        status = os.fstat(self.number)
        return status.st_dev, status.st_ino, os.pread(self.number, _HEAD.size, ALIGNMENT)

    def check(self, mark: Mark) -> None:
        """Raises DamagedError if the records up to a mark were overwritten or cut off.

        They are mapped into memory: reading a part that was cut off would kill the process.
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
    """The end of a file's records, and their number."""

    end: int
    records: int


@dataclass(frozen=True)
class Record:
    """Values and arrays that were added together.

    Attributes:
        content: values of JSON. arrays: by name; they are mapped from the file into memory.
    """

    content: dict[str, Any]
    arrays: dict[str, np.ndarray]
    _digests: dict[str, str]  # checksums of arrays that have not been checked yet
    _places: dict[str, int]  # the place in the file at which each array begins
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
        """Some rows of an array, read one by one: through the mapping, whole pages would be."""
        array = self.arrays[name]
        found = np.empty((len(numbers), *array.shape[1:]), array.dtype)
        for row, number in zip(found, numbers.tolist(), strict=True):
            os.preadv(self._source.number, [row], self._places[name] + number * row.nbytes)
        return found


# --- reading --------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """The result of reading a file.

    Attributes:
        mark: its mark. source: the file, which another one may replace later.
        records: those that were read. anew: whether they are all records, or only the new ones.
    """

    mark: Mark
    source: Source
    records: list[Record]
    anew: bool


def read(path: Path, since: Reading | None = None) -> Reading:
    """Reads the records of the file at `path`; with `since`, only those that were added after it.

    Their JSON is compared with its checksum; arrays are compared by `Record.check`.

    Raises:
        InputError: the file does not exist, is not an index, or a newer version wrote it.
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
        # As a plain array, because slices of a memmap take a microsecond longer.
        content = np.asarray(np.memmap(file, mode="r", shape=(mark.end,)))
    start = Mark(ALIGNMENT, 0) if anew else since.mark
    records = list(_records(content, start.end, source))
    if start.records + len(records) != mark.records:
        raise _misshapen(path)
    return Reading(mark, source, records, anew)


def read_mark(path: Path) -> tuple[Mark, tuple[int, int, bytes]]:
    """The present mark of the file at `path`, and the file's identity; raises as `read`."""
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
        if error.errno:
            raise not_read(f"index {path}", error) from error
        raise InputError(f"index {path} cannot be read ({reason(error)}); give a file") from error


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
    """Raises DamagedError if a file ends before its mark."""
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
    """The record that begins at a place of the file, and its end."""
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
    """Appends records to an index, whose lock is held by `writing`."""

    def __init__(self, path: Path, file: BinaryIO, mark: Mark) -> None:
        self.path = path
        self.mark = mark
        self._file = file

    def add(self, content: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
        """Appends a record; when this returns, it is on disk.

        Raises:
            MachineError: it cannot be written; the index is unchanged.
        """
        marked = False
        try:
            end = self._write_record(content, arrays)
            os.fsync(self._file.fileno())
            marked = True
            self._write_mark(Mark(end, self.mark.records + 1))
        except OSError as error:
            with contextlib.suppress(OSError):
                if marked:  # the mark may have arrived, although the disk says that it failed
                    self._write_mark(self.mark)
                self._file.truncate(self.mark.end)  # last: no mark may count what is gone
            raise not_written(self.path, error, AGAIN) from error

    def _write_record(self, content: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> int:
        """Writes a record after the mark, where nobody reads yet; returns its end."""
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
    """The first bytes of a file with this mark."""
    body = _MARK.pack(MAGIC, version, 0, mark.end, mark.records, bytes(16))[:-16]
    return body + _short_digest(body)


def create(path: Path, like: Path | None = None) -> None:
    """Writes an index without records, atomically; it may replace an unfinished one.

    Args:
        like: see `write_atomically`.

    Raises:
        InputError: it cannot be written there, or another kind of file is there.
    """
    if path.exists() and not _is_ours(path):
        raise InputError(
            f"{path} is in the way of an index that is being made, and is not one; move it away"
        )
    remove_left_over(path.parent, path.name)
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
    """The file to which an index or a graph is written until it is complete."""
    return path.with_name(f"{path.name}.part")


@contextlib.contextmanager
def writing_anew(path: Path) -> Iterator[Writer]:
    """A writer for a new index or graph, which replaces the one at `path` when the block ends.

    Raises:
        InputError: as `create`.
    """
    part = part_of(path)
    create(part, like=path)
    try:
        with writing(part) as writer:
            yield writer
        put_in_place(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)  # a disk that is full needs the room
        raise


def put_in_place(part: Path, path: Path) -> None:
    """Lets a file that is complete take the place of the index or graph at `path`.

    Raises:
        MachineError: the disk does not; both are as they were.
    """
    try:
        part.replace(path)
    except OSError as error:
        raise not_written(path, error, AGAIN) from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[Writer]:
    """Locks the index at `path` for a writer, and cuts off what a killed writer has left.

    Raises:
        InputError: another process has the lock, or the file cannot be written.
    """
    with held(path):
        mark, _ = read_mark(path)
        try:
            # Unbuffered, so that nothing is left to be written later, by the interpreter.
            file = path.open("r+b", buffering=0)
        except OSError as error:
            raise not_written(path, error, "or make it writable") from error
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
