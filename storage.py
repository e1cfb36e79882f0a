"""Files that are whole or not there, and that show their damage when they are read.

Nothing here loads torch before it is needed.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import fcntl
import functools
import hashlib
import io
import json
import logging
import math
import os
import pickle
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import IO, TYPE_CHECKING, BinaryIO

from terminal import printable
from utils import DamagedError, InputError, damage_in_words, first_line, installing

if TYPE_CHECKING:
    import numpy as np
    import torch

logger = logging.getLogger("storage")


def free_space(folder: Path) -> int:
    """Bytes that are free where a folder is, or will be."""
    return shutil.disk_usage(_nearest_that_exists(folder)).free


def can_be_made(folder: Path) -> bool:
    """Whether a folder can be written, or made where it is not there yet."""
    place = _nearest_that_exists(folder)
    return place.is_dir() and os.access(place, os.W_OK)


def _nearest_that_exists(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    folder = Path(folder).absolute()
    return next(place for place in (folder, *folder.parents) if place.exists())


def in_bytes(count: float) -> str:
    """1_530_000_000 → '1.5 GB'."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.{1 if count < 10 * size else 0}f} {unit}"
    return f"{count / 1e3:.0f} kB"


def need_room(folder: Path, needed: float, what: str, advice: str) -> str:
    """How much `what` takes and how much is free, in words.

    Raises:
        InputError: it cannot fit; `advice` is what to do besides freeing some space.
    """
    free = free_space(folder)
    if needed > free:
        raise InputError(
            f"{what} takes about {in_bytes(needed)}, and {folder} has {in_bytes(free)} free; free "
            f"some space, or {advice}"
        )
    return f"about {in_bytes(needed)}, {in_bytes(free)} free"


def write_atomically(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Writes a file whole or not at all: a temporary file beside it, fsync, then rename.

    Args:
        path: the file to make or replace; its folder is created.
        write: is given the open binary file.

    Raises:
        InputError: the folder cannot be written or the disk is full; what was there stays whole.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            dir=path.parent, prefix=f".{path.name}.", suffix=".tmp", delete=False
        ) as file:
            temporary = Path(file.name)
            write(file)
            file.flush()
            os.fsync(file.fileno())
        # NamedTemporaryFile makes private files; results are for everyone the umask admits.
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise InputError(
                f"cannot write {path}: {error.strerror or error}; "
                "free some space or choose another folder (an older copy is unchanged)"
            ) from error
        raise


def write_content(path: Path, content: bytes | str) -> None:
    """Writes a file that holds this, text in UTF-8, atomically."""
    written = content.encode() if isinstance(content, str) else content
    write_atomically(path, lambda file: file.write(written))


def check_outputs(asked: Mapping[str, str | Path | None], kept: Iterable[str | Path] = ()) -> None:
    """Checks, before the work begins, that the files that are asked for can be written.

    Args:
        asked: flag → file; None where the flag is not given.
        kept: files that are read and must stay as they are.

    Raises:
        InputError: one is asked for twice, is one that stays, is a folder, or cannot be written.
    """
    owners: dict[Path, str] = {}
    stay = {Path(file).resolve() for file in kept}
    for flag, path in ((flag, Path(path)) for flag, path in asked.items() if path):
        other = owners.setdefault(path.resolve(), flag)
        if other != flag:
            raise InputError(f"{other} and {flag} both name {path}; name two files")
        if path.resolve() in stay:
            raise InputError(
                f"{flag} would overwrite {path}, which is read here; write it elsewhere"
            )
        if path.is_dir():
            raise InputError(f"{flag}: {path} is a folder; name a file")
        if _is_stream(path):
            raise InputError(
                f"{flag}: {path} is not a regular file, and only those are written; name one"
            )
        try:
            tempfile.TemporaryFile(dir=_nearest_that_exists(path.parent)).close()
        except OSError as error:
            raise InputError(
                f"{flag}: {path} cannot be written ({error.strerror}); choose another folder"
            ) from error


def followed(path: Path) -> Path:
    """Where a link leads; any other path as it is. (A new file would replace the link itself.)"""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _is_stream(path: Path) -> bool:
    """Whether a name stands for a device, a pipe or an open file, and not for a file of its own.

    Writing atomically would replace it by a plain file: /dev/null too, for the whole machine, where
    the user has the right to.
    """
    leads_to_open_file = path.is_symlink() and path.readlink().is_relative_to("/proc")
    return str(path) == "-" or leads_to_open_file or (path.exists() and not path.is_file())


def is_still(path: Path, file: IO[bytes] | IO[str]) -> bool:
    """Whether an open file is the one at `path`: another may have taken its place, or none."""
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except OSError:
        return False


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


# --- locks ----------------------------------------------------------------------------------------


def lock(file: IO | int, what: object, *, wait: bool = False) -> bool:
    """Keeps other processes from an open file, until this one closes it by any descriptor or ends.

    On a file system without locks it keeps out nobody, which is warned of once.

    Args:
        file: open for writing. what: others are kept out of, for the warning. wait: until whoever
            has it lets go.

    Returns:
        False where another process has it.
    """
    # lockf and not flock: processes that read images do not inherit it, so it ends with this one.
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):  # systems differ in what they call it
        return False
    except OSError as error:
        _warn_of_no_locks(str(what), error.strerror)
    return True


@functools.cache
def _warn_of_no_locks(what: str, why: str) -> None:
    logger.warning("nothing keeps other processes out of %s (%s)", what, why)


# --- text -----------------------------------------------------------------------------------------


def as_json(content: object) -> bytes:
    """Indented JSON; numbers that are not finite become null."""
    text = json.dumps(_plain(content), indent=2, default=str, allow_nan=False)
    return f"{text}\n".encode()


def write_json(path: Path, content: object) -> None:
    """Writes `as_json(content)`, atomically."""
    write_content(path, as_json(content))


def _plain(content: object) -> object:
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def as_table(header: list[str], rows: list[list]) -> bytes:
    """CSV; what a terminal would obey is escaped, and bytes of file names stay as they are."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(map(_cell, header))
    writer.writerows(map(_cell, row) for row in rows)
    return text.getvalue().encode(errors="surrogateescape")


def write_table(path: Path, header: list[str], rows: list[list]) -> None:
    """Writes `as_table(header, rows)`, atomically."""
    write_content(path, as_table(header, rows))


def _cell(value: object) -> object:
    return printable(value, keep_bytes=True) if isinstance(value, str) else value


def decoded(content: bytes) -> str:
    """Text in UTF-8, with or without a byte order mark, or in UTF-16 with one.

    Raises:
        UnicodeDecodeError: it is something else.
    """
    return content.decode(encoding_of(content))


def encoding_of(start: bytes) -> str:
    """Which of these encodings a text has, by its first bytes, two at least."""
    is_utf_16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    return "utf-16" if is_utf_16 else "utf-8-sig"


def digest(content: bytes) -> str:
    """The checksum of a file's bytes, as 32 hexadecimal digits."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()


# --- archives that carry a checksum ---------------------------------------------------------------
# .pth and .npz are zip archives. Their checksum is the archive's comment: all readers of archives
# skip it, and it goes wherever the file is copied.


_SEAL = b"checksum blake2b-128 "
_SEAL_LENGTH = len(_SEAL) + 32
_ARCHIVE_BEGIN = b"PK\x03\x04"
_ARCHIVE_END = b"PK\x05\x06"  # 22 bytes, the last two of which are the length of the comment
_LONGEST_TAIL = 22 + 2**16 - 1


def write_archive(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """As `write_atomically`, for a zip archive, which is given its checksum.

    Args:
        write: writes an archive without a comment.
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


def check_archive(file: BinaryIO, what: str) -> None:
    """Compares an open archive with its checksum; one without a checksum is left as it is.

    Args:
        what: the file, in the error.

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
    # One of its two traces remains, whichever byte is damaged.
    if _SEAL in tail or comment == _SEAL_LENGTH:
        end = max(0, size - _SEAL_LENGTH)
        if tail[-_SEAL_LENGTH:] != _SEAL + _digest_of(file, end):
            raise DamagedError(
                f"{what} is not as it was written (its checksum differs), so it is damaged; use "
                "another copy of it, or make it again"
            )
    file.seek(0)


def _digest_of(file: BinaryIO, end: int) -> bytes:
    """As `digest`, of the first `end` bytes of an open file."""
    found, left = hashlib.blake2b(digest_size=16), end
    file.seek(0)
    while left and (part := file.read(min(left, 2**20))):
        found.update(part)
        left -= len(part)
    return found.hexdigest().encode()


@contextlib.contextmanager
def _opened(path: Path, what: str) -> Iterator[BinaryIO]:
    """A file, once its checksum has been looked at.

    Raises:
        InputError: it is missing, cannot be opened, or differs from its checksum.
    """
    path = Path(path)
    if not path.is_file():
        found = "is a folder; give a file" if path.is_dir() else "does not exist; check the path"
        raise InputError(f"{what} {path} {found}")
    try:
        file = path.open("rb")
    except OSError as error:
        raise InputError(
            f"{what} {path} cannot be read ({error.strerror}); check its permissions"
        ) from error
    with file:
        check_archive(file, f"{what} {path}")
        yield file


# --- tensors --------------------------------------------------------------------------------------


def save_tensors(path: Path, content: dict) -> None:
    """Saves tensors and plain values with torch.save, atomically and with a checksum."""
    import torch

    def write(file: BinaryIO) -> None:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            # torch trips over its own unfinished archive after the disk has refused to take more.
            cause = error.__context__
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise (cause or error) from None

    write_archive(path, write)


def load_tensors(path: Path, what: str = "checkpoint") -> dict:
    """Loads a file of `save_tensors`, a released .pth or .safetensors; never runs code from it.

    Raises:
        InputError: the file is missing, differs from its checksum, is no such file at all, or needs
            pickle to load.
    """
    import torch

    with _opened(path, what) as file:
        try:
            if Path(path).suffix == ".safetensors":
                return _load_safetensors(Path(path))
            content = torch.load(file, map_location="cpu", weights_only=True)
        except InputError:
            raise
        except Exception as error:  # torch reports damage through a dozen unrelated types
            # What it says of a pickle is how to run the code in it.
            is_pickle = isinstance(error, pickle.UnpicklingError)
            why = "it holds something else" if is_pickle else first_line(error)
            raise DamagedError(
                f"{what} {path} cannot be read safely as tensors ({why}); "
                "it is damaged, or not a file of weights: save it again or choose another"
            ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{what} {path} holds a {type(content).__name__}, not a dictionary of weights; "
            "choose another file"
        )
    return content


# --- safetensors ----------------------------------------------------------------------------------
# Tensors and words, and no code. Files of ours keep what is no tensor as JSON among the words.

_NOTE = "anchorage"


def save_safetensors(path: Path, tensors: dict[str, torch.Tensor], note: dict) -> None:
    """Writes the weights of a checkpoint as .safetensors, atomically.

    Args:
        tensors: become its `model_state_dict`. note: the other entries, which JSON can hold.

    Raises:
        InputError: the file cannot be written, or the package is missing.
    """
    save = _safetensors(path).torch.save
    # A copy each: the format knows no two tensors that share their memory.
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    write_content(path, save(own, {"format": "pt", _NOTE: as_json(note).decode()}))


def _load_safetensors(path: Path) -> dict:
    """The tensors of a file; of one of ours as a checkpoint, with what it says beside them."""
    with _safetensors(path).safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        note = (file.metadata() or {}).get(_NOTE)
    return tensors if note is None else {**json.loads(note), "model_state_dict": tensors}


def _safetensors(path: Path) -> ModuleType:
    try:
        import safetensors.torch
    except ImportError as error:
        raise InputError(
            f"{path} needs the package safetensors, which is not installed here; "
            f"{installing('safetensors')}"
        ) from error
    return safetensors


# --- arrays ---------------------------------------------------------------------------------------


def save_arrays(path: Path, content: dict[str, np.ndarray], *, small: bool = False) -> None:
    """Saves arrays as .npz, atomically and with a checksum; `small` compresses them."""
    import numpy as np

    save = np.savez_compressed if small else np.savez
    write_archive(path, lambda file: save(file, **content))


def load_arrays(path: Path, what: str) -> dict[str, np.ndarray]:
    """All arrays of a .npz file; never runs code from it.

    Raises:
        InputError: the file is missing, differs from its checksum, or is none of arrays.
    """
    import numpy as np

    advice = "use another copy of it, or make it again"
    with _opened(path, what) as file, damage_in_words(f"{what} {path}", advice):
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                _check_size(archive, member)
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)


def _check_size(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> None:
    """Raises ValueError where an array claims to be larger than its file: before it gets memory."""
    from numpy.lib import format as npy

    with archive.open(member) as file:
        read = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
        shape, _, kind = read[npy.read_magic(file)](file)
        claimed = file.tell() + math.prod(shape) * kind.itemsize
    # No packing makes more than 1,032 bytes of one.
    if claimed != member.file_size or claimed > 1100 * member.compress_size + 1024:
        raise ValueError(f"{member.filename} claims to be of shape {shape}, and is not")
