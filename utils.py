"""What every part of a run needs: clear errors, whole files, times in words.

Nothing here loads torch before it is needed, so that `--help` and a typing error answer at once.
"""

from __future__ import annotations

import contextlib
import csv
import difflib
import io
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO


class InputError(Exception):
    """Bad input: a sentence that says what is wrong, where, and what to do; exit status 2."""


@contextlib.contextmanager
def sentence_errors() -> Iterator[None]:
    """Turns `InputError` into its sentence on standard error and exit status 2."""
    try:
        yield
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def close_names(name: str, known: Iterable[str]) -> list[str]:
    """The known names that a misspelt one may have meant, the nearest first."""
    by_folded: dict[str, list[str]] = {}  # names may differ in case alone
    for candidate in sorted(known):
        by_folded.setdefault(candidate.lower(), []).append(candidate)
    close = difflib.get_close_matches(name.lower(), by_folded, n=3, cutoff=0.5)
    return [candidate for folded in close for candidate in by_folded[folded]]


def nearest_names(name: str, known: Iterable[str]) -> str:
    """What helps after a misspelt name: the nearest known names, or all of them."""
    if close := close_names(name, known := list(known)):
        return f"did you mean {' or '.join(close)}?"
    return f"known names: {', '.join(sorted(known, key=str.lower)) or 'none'}"


# --- files ---------------------------------------------------------------------------------------


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, content: object) -> None:
    """Writes `content` as indented JSON, atomically; numbers that are not finite become null."""
    text = json.dumps(_plain(content), indent=2, default=str, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


def _plain(content: object) -> object:
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_table(path: Path, header: list[str], rows: list[list]) -> None:
    """Writes a CSV file, atomically."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    content = text.getvalue().encode(errors="surrogateescape")  # file names need not be UTF-8
    write_atomically(path, lambda file: file.write(content))


def save_tensors(path: Path, content: dict) -> None:
    """Saves tensors and plain values with torch.save, atomically."""
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

    write_atomically(path, write)


def load_tensors(path: Path, what: str = "checkpoint") -> dict:
    """Loads a file of `save_tensors` or a released .pth; never runs code from it.

    Raises:
        InputError: the file is missing, cut short, no such file at all, or needs pickle to load.
    """
    import torch

    path = Path(path)
    if not path.is_file():
        found = "is a folder; give a file" if path.is_dir() else "does not exist; check the path"
        raise InputError(f"{what} {path} {found}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch reports damage through a dozen unrelated exception types
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise InputError(
            f"{what} {path} cannot be read safely as tensors ({first_line[:160]}); "
            "it is damaged, or not a file of weights: save it again or choose another"
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"{what} {path} holds a {type(content).__name__}, not a dictionary of weights; "
            "choose another file"
        )
    return content


# --- the machine ----------------------------------------------------------------------------------


def cores(root: Path = Path("/")) -> int:
    """How many CPU cores this process may use: those it is bound to, or its container's share.

    Args:
        root: where `proc` and `sys` lie.
    """
    bound = getattr(os, "sched_getaffinity", None)  # macOS has no such thing
    count = len(bound(0)) if bound else os.cpu_count() or 1
    return max(1, min([count, *(math.ceil(share) for share in _cpu_shares(root))]))


def _cpu_shares(root: Path) -> Iterator[float]:
    """The limits, in cores, that Linux's control groups put on this process."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, group = line.split(":", 2)
        above = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        if controllers and "cpu" not in controllers.split(","):
            continue
        # In a container the group's own folder is the root of what is seen.
        for folder in {above, *(above / part for part in _prefixes(group))}:
            with contextlib.suppress(OSError, ValueError, ZeroDivisionError):
                if controllers:
                    quota = int((folder / "cpu.cfs_quota_us").read_text())
                    period = int((folder / "cpu.cfs_period_us").read_text())
                else:
                    quota, period = map(int, (folder / "cpu.max").read_text().split())
                if quota > 0:
                    yield quota / period


def _prefixes(group: str) -> Iterator[Path]:
    """`/a/b` → a, a/b."""
    parts = group.strip("/").split("/")
    return (Path(*parts[: end + 1]) for end in range(len(parts)))


# --- words ----------------------------------------------------------------------------------------


def human_seconds(seconds: float) -> str:
    """75 → '1 min 15 s'."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
