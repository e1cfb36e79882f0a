"""Atomic writing of files, and the check, before any work, that they can be written."""

from __future__ import annotations

import contextlib
import glob
import os
import secrets
import stat
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from storage.locks import is_still, lock
from storage.space import nearest_that_exists
from utils import InputError, MachineError, not_written


def write_atomically(
    path: Path, write: Callable[[BinaryIO], None], like: Path | None = None
) -> None:
    """Writes a file whole or not at all: a temporary file beside it, fsync, then rename.

    The permissions of a file that is replaced are kept; a new file has those of the umask.

    Args:
        path: the file to make or replace; its folder is created.
        write: writes the content into the open binary file.
        like: the file whose permissions to keep, if this one will replace it later; None: `path`.

    Raises:
        MachineError: the folder cannot be written or the disk is full; an older file is unchanged.
    """
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked_temporary(path) as file:
            temporary = Path(file.name)
            _keep_mode(like or path, file)
            write(file)
            file.flush()
            os.fsync(file.fileno())
            temporary.replace(path)
    except BaseException as error:
        if temporary is not None:
            with contextlib.suppress(OSError):  # the disk may take nothing at all any more
                temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            what_to_do = "or choose another folder (an older copy is unchanged)"
            raise not_written(path, error, what_to_do) from error
        raise


def _locked_temporary(path: Path) -> BinaryIO:
    """A new file beside `path`; while it is open, `remove_left_over` does not remove it."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        file = temporary.open("x+b")
        if lock(file, path, quiet=True) and is_still(temporary, file):
            return file
        file.close()  # `remove_left_over` came between the two calls


def _keep_mode(before: Path, file: BinaryIO) -> None:
    """Gives a new file the permissions of another, if there is one; its owner may always write."""
    with contextlib.suppress(FileNotFoundError):
        wanted = before.stat().st_mode & 0o777 | stat.S_IRUSR | stat.S_IWUSR
        # Some file systems have no permissions, and fail when they are set.
        if wanted != stat.S_IMODE(os.fstat(file.fileno()).st_mode):
            os.fchmod(file.fileno(), wanted)


def remove_left_over(folder: Path, name: str | None = None) -> None:
    """Removes the temporary files of killed processes; those still in use are locked, and stay.

    Args:
        name: the file that they were to become; None: any file in the folder.
    """
    for path in folder.glob(f".{'*' if name is None else glob.escape(name)}.*.tmp"):
        with contextlib.suppress(OSError), path.open("r+b") as file:
            if lock(file, path, quiet=True):
                path.unlink()


def write_content(path: Path, content: bytes | str) -> None:
    """Writes bytes, or text in UTF-8, to a file, atomically."""
    written = content.encode() if isinstance(content, str) else content
    write_atomically(path, lambda file: file.write(written))


def check_outputs(asked: Mapping[str, str | Path | None], kept: Iterable[str | Path] = ()) -> None:
    """Checks, before the work begins, that the files that flags name can be written.

    What killed commands have left of the same files is removed.

    Args:
        asked: flag → file; None if the flag is not given.
        kept: files that are read, and must not be overwritten.

    Raises:
        InputError: two flags name one file, or a file is one of `kept`, or is a folder.
        MachineError: a file cannot be written.
    """
    # Not Path.resolve, which raises RuntimeError for links that lead to each other.
    owners: dict[str, str] = {}
    stay = {os.path.realpath(file) for file in kept}
    for flag, path in ((flag, Path(path)) for flag, path in asked.items() if path):
        real = os.path.realpath(path)
        other = owners.setdefault(real, flag)
        if other != flag:
            raise InputError(f"{other} and {flag} both name {path}; name two files")
        if real in stay:
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
            tempfile.TemporaryFile(dir=nearest_that_exists(path.parent)).close()
        except OSError as error:
            said = not_written(path, error, "or choose another folder")
            raise MachineError(f"{flag}: {said}") from error
        remove_left_over(path.parent, path.name)


def followed(path: Path) -> Path:
    """The target of a symbolic link, because writing would replace the link; else the path."""
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def _is_stream(path: Path) -> bool:
    """Whether a path is that of a device, a pipe or an open file, rather than of a regular file.

    Atomic writing would replace it with a regular file: root would lose /dev/null.
    """
    leads_to_open_file = path.is_symlink() and path.readlink().is_relative_to("/proc")
    return str(path) == "-" or leads_to_open_file or (path.exists() and not path.is_file())
