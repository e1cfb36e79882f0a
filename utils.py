"""Helpers for every part: errors of one sentence, close names, numbers in words.

Nothing here loads torch, so that `--help` and a typing error answer at once.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NoReturn

from terminal import as_shell, fitted, say

# --- errors ---------------------------------------------------------------------------------------


STATUS_BY_KIND = "ANCHORAGE_STATUS_BY_KIND"
"""An environment variable, see `InputError`."""


class InputError(Exception):
    """Bad input: a sentence that says what is wrong, where, and what to do.

    A command that ends with it has exit status 2. A program that starts our commands and needs to
    distinguish kinds of errors sets `STATUS_BY_KIND`: then the exit status is `status`, which
    subclasses override.
    """

    status = 2

    def exit_status(self) -> int:
        """The exit status of a command that ends with this error."""
        return self.status if STATUS_BY_KIND in os.environ else InputError.status


class DamagedError(InputError):
    """A file differs from what was written, or is not of the expected kind."""


class MachineError(InputError):
    """The machine lacks what the command needs: space on its disk or memory.

    Limits on open files and processes, and disks that cannot be written, count as well.
    """

    status = 71  # EX_OSERR in sysexits.h


@contextlib.contextmanager
def sentence_errors() -> Iterator[None]:
    """Ends the process after an `InputError`: its sentence on standard error, its exit status."""
    try:
        with full_gpu_in_words(f"the GPU's memory is full; {ROOM_ON_A_GPU}"):
            yield
    except InputError as error:
        end_with(error)
    except (OSError, RuntimeError, MemoryError) as error:
        if (meant := in_words(error)) is None:
            raise
        # Half-initialised objects would each print one more error when they are deleted.
        sys.unraisablehook = lambda _: None
        end_with(meant)


def in_words(error: BaseException) -> InputError | None:
    """An error of the operating system as a sentence for the user; None if it is not known here."""
    number = error.errno if isinstance(error, OSError) else None
    if number == errno.ENAMETOOLONG:
        name = str(error.filename)
        return InputError(
            f"no file can have so long a name: {name[:60]}... ({len(name)} letters); check it"
        )
    if number in (errno.ENOSPC, errno.EDQUOT):
        place = f" under {error.filename}" if error.filename else ""
        return MachineError(
            f"the disk{place} is full ({error.strerror}); free some space, and start again"
        )
    if _is_behind(error, (errno.EMFILE, errno.ENFILE), "Too many open files"):
        return MachineError(
            "this process may not open more files or processes; raise the limit (ulimit -n 4096), "
            "or use fewer --workers"
        )
    if isinstance(error, MemoryError) or _is_behind(error, (errno.ENOMEM,), "allocate memory"):
        return MachineError(
            f"this machine's memory is full ({first_line(error)}); end what else uses it, or use a "
            "smaller batch or fewer --workers"
        )
    if isinstance(error, ImportError) and "failed to map segment" in str(error):
        return MachineError(
            f"a library cannot be loaded ({first_line(error)}): this process may not use so much "
            "memory, or that disk may hold no programs; raise the limit (ulimit -v unlimited), or "
            "install elsewhere"
        )
    if number in _DISK_TROUBLES:
        place = f"{error.filename} cannot" if error.filename else "a file could not"
        return MachineError(
            f"{place} be read or written ({error.strerror}); check the disk and its permissions, "
            "and start again"
        )
    return None


def not_written(path: Path, error: OSError, what_to_do: str) -> MachineError:
    """The error to raise about a file or folder that could not be written.

    Args:
        what_to_do: besides what the machine needs; follows that in the sentence.
    """
    return MachineError(
        f"cannot write {path}: {error.strerror or error}; {_needed(error)} {what_to_do}"
    )


def not_read(what: str, error: OSError) -> MachineError:
    """The error to raise about a file, named by `what`, that could not be opened or read."""
    return MachineError(f"{what} cannot be read ({error.strerror or error}); {_needed(error)}")


def _needed(error: OSError) -> str:
    """What helps against an error of a disk, or of a path."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return "free some space"
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "raise the limit on files (ulimit -n 4096)"
    if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG):
        return "check the path"
    return "check its permissions" if isinstance(error, PermissionError) else "check its disk"


_DISK_TROUBLES = (
    *(errno.EIO, errno.EROFS, errno.ESTALE, errno.EACCES, errno.EPERM),
    *(errno.ETIMEDOUT, errno.ENOTCONN, errno.EHOSTDOWN, errno.ENODEV, errno.ENXIO),
)
"""What a disk says that fails, is taken away or is kept from us; one over a network too."""


ROOM_ON_A_GPU = (
    "end what else uses it (nvidia-smi lists that), or compute on the CPU: CUDA_VISIBLE_DEVICES= "
    "before the command"
)


@contextlib.contextmanager
def full_gpu_in_words(sentence: str) -> Iterator[None]:
    """Replaces the errors of CUDA and its libraries about a full memory by `sentence`.

    Raises:
        MachineError: the GPU's memory is full.
    """
    try:
        yield
    except RuntimeError as error:
        if not is_full_gpu(error):
            raise
        raise MachineError(sentence) from error


def is_full_gpu(error: RuntimeError) -> bool:
    """Whether an error of CUDA or one of its libraries means that the GPU's memory is full."""
    return _FULL_GPU.search(str(error)) is not None


# torch's own error, the driver's (if there is not even room to start), and those of the libraries.
_FULL_GPU = re.compile("CUDA out of memory|CUDA error: out of memory|STATUS_ALLOC_FAILED")


@contextlib.contextmanager
def damage_in_words(what: str, advice: str) -> Iterator[None]:
    """Turns any error that occurs while a file is read into a `DamagedError`.

    Libraries report damage through dozens of unrelated types, and each version through others. A
    disk that fails is another matter: on a better day the file may be read.

    Args:
        what: names the file. advice: what to do about it.

    Raises:
        DamagedError: for every other Exception that is not an `InputError`.
        MachineError: for an error of the operating system.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and (meant := in_words(error)):
            raise meant from error
        raise DamagedError(
            f"{what} is damaged, or not such a file ({first_line(error)}); {advice}"
        ) from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, at most 160 characters; its type if it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:160]


def as_clause(sentence: str) -> str:
    """A sentence of a library as ours stand behind `error: `: without capital and full stop.

    A name at its beginning (`AMLoss`, `CUDA`, `Proxy_Anchor`) stays as it is.
    """
    first, *_ = sentence.split(maxsplit=1) or [""]
    is_word = first[1:].islower() or len(first) == 1
    return (sentence[:1].lower() + sentence[1:] if is_word else sentence).removesuffix(".")


def end_with(error: InputError) -> NoReturn:
    """Ends the process with the sentence of an error, and its exit status."""
    say(fitted(f"error: {error}", "  ", sys.stderr), file=sys.stderr)
    raise SystemExit(error.exit_status()) from None


def _is_behind(error: BaseException | None, numbers: Sequence[int], words: str) -> bool:
    """Whether an error, or one of its causes, is of the system and has one of these numbers.

    Or has these words: torch reports some errors of the system as RuntimeErrors.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in numbers:
            return True
        if words in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


# --- our own modules ------------------------------------------------------------------------------


def our_name(module: str) -> str:
    """The full name of one of our modules, which an installation has inside `anchorage`."""
    return f"{__package__}.{module}" if __package__ else module


def our_command(module: str) -> list[str]:
    """The command that runs one of our modules in a new process; arguments may be appended.

    With `python -m`, a `utils.py` in the current folder would be imported instead of ours.
    """
    return [sys.executable, "-c", _START, str(top_folder()), our_name(module)]


_START = (
    "import runpy, sys; sys.path[:] = [sys.argv.pop(1), *filter(None, sys.path)]; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def top_folder() -> Path:
    """The folder from which `our_name` is imported: the repository, or site-packages."""
    return Path(__file__).resolve().parents[1 if __package__ else 0]


_caller = {"is": "anchorage" if __package__ else ""}
_OF_PACKAGES = {"dataset": "dataset", "export": "net export"}


def called_as(command: str) -> None:
    """Makes `program` name our commands as subcommands of this one, such as `anchorage`."""
    _caller["is"] = command


def program(name: str) -> str:
    """One of our commands as the user would type it here: `python train.py`, `anchorage train`.

    Args:
        name: of the subcommand of `anchorage`: "train", "dataset", "export", ….
    """
    if _caller["is"]:
        return f"{_caller['is']} {name}"
    if name not in _OF_PACKAGES:
        return f"python {as_shell(_nearest(top_folder() / f'{name}.py'))}"
    house = as_shell(_nearest(top_folder()))
    return f"{'' if house == '.' else f'PYTHONPATH={house} '}python -m {_OF_PACKAGES[name]}"


def installing(*packages: str) -> str:
    """The command that installs packages, in the repository with the versions that are tested."""
    versions = top_folder() / "constraints.txt"
    known = f" -c {as_shell(_nearest(versions))}" if versions.is_file() else ""
    return f"pip install {as_shell(*packages)}{known}"


def _nearest(path: Path) -> Path:
    """A path as absolute or relative to the current folder, whichever is shorter."""
    with contextlib.suppress(OSError):  # the current folder may be deleted during a training
        return min(path, Path(os.path.relpath(path)), key=lambda way: len(str(way)))
    return path


# --- names and numbers ----------------------------------------------------------------------------


def close_names(name: str, known: Iterable[str]) -> list[str]:
    """The known names that a misspelt one may stand for, the nearest first."""
    by_folded: dict[str, list[str]] = {}  # names may differ in case alone
    for candidate in sorted(known):
        by_folded.setdefault(candidate.lower(), []).append(candidate)
    close = difflib.get_close_matches(name.lower(), by_folded, n=3, cutoff=0.5)
    return [candidate for folded in close for candidate in by_folded[folded]]


def nearest_names(name: str, known: Iterable[str]) -> str:
    """Words to help with a misspelt name: the nearest known names, or all of them."""
    if close := close_names(name, known := list(known)):
        return f"did you mean {join_words(close, 'or')}?"
    return f"known names: {', '.join(sorted(known, key=str.lower)) or 'none'}"


def join_words(words: Iterable[object], last: str) -> str:
    """["a", "b", "c"], "or" → "a, b or c"."""
    texts: Sequence[str] = [str(word) for word in words]
    return f" {last} ".join(part for part in (", ".join(texts[:-1]), *texts[-1:]) if part)


def first_names(names: Sequence[object], most: int = 3) -> str:
    """The first few of some names: `a, b, c, ...`."""
    return ", ".join([*map(str, names[:most]), *(["..."] if len(names) > most else [])])


def counted(count: int, what: str = "image") -> str:
    """3 → '3 images', 1 → '1 image'; for "class", '3 classes'."""
    plural = "es" if what.endswith("s") else "s"
    return f"{count:,} {what}{'' if count == 1 else plural}"


def plain_number(value: float, digits: int) -> str:
    """A number with `digits` significant digits and without an exponent: 100, not 1e+02."""
    return f"{float(f'{value:.{digits}g}'):.12f}".rstrip("0").rstrip(".")


def human_seconds(seconds: float) -> str:
    """75 → '1 min 15 s'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
