"""Preparation of a command before torch is loaded, and output that survives a closed pipe.

    import door

    if __name__ == "__main__":
        door.enter()

Nothing here is slow to import, so that `--help` and a typing error answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from types import TracebackType

from machine import cores
from terminal import (
    Wait,
    leave_out_remarks,
    say,
    silence_notices,
    speak_to_any_terminal,
)
from utils import InputError, MachineError, end_with, in_words, sentence_errors

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""How OpenMP's threads wait, for any runtime, for GNU's (torch on Linux) and LLVM's (macOS)."""
BRIEFLY = "1000"  # iterations of GNU's loop, some microseconds; its default is 300,000


def enter(*, loads_torch: bool = False) -> None:
    """Prepares this process, and those that it will start, for the command.

    Args:
        loads_torch: whether the command imports torch, which may take seconds; it then calls
            `loaded`.

    Raises:
        SystemExit: with status 2 and a sentence, on Windows.
    """
    with sentence_errors():
        _need_unix()
    _open_closed_streams()
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    speak_to_any_terminal()
    leave_out_remarks()
    settle_threads(os.environ)
    speaks = (os.environ.get("RANK") or "0") == "0"  # only the first of several processes does
    if not speaks:
        silence_notices()
    _end_with_a_word(speaks)
    if loads_torch:
        _loading.append(Wait("loading PyTorch"))
    # torch's C++ would log lost connections with their stack; we report them in sentences.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


_loading: list[Wait] = []


def loaded() -> None:
    """Ends the wait for torch: the command's imports are done."""
    while _loading:
        _loading.pop().over()


def _end_with_a_word(speaks: bool) -> None:
    """Replaces the traceback of an uncaught Ctrl-C by one word, and of known errors by a sentence.

    After Ctrl-C the program still ends by the signal, so that a shell's loop around it ends too.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            if speaks:
                say("interrupted", file=sys.stderr)
        elif meant := in_words(error):  # raised while the command's modules were loaded
            end_with(meant)
        else:
            before(kind, error, trace)

    sys.excepthook = hook


def _need_unix() -> None:
    try:
        import fcntl  # noqa: F401 (needed for the locks of run folders and caches)
    except ImportError:
        raise InputError(
            f"this runs on Linux and macOS, not on {sys.platform}; on Windows use WSL "
            "(`wsl --install`), which is a Linux"
        ) from None


# --- threads --------------------------------------------------------------------------------------


def settle_threads(environment: dict[str, str] | os._Environ[str]) -> None:
    """Sets OpenMP's number of threads and how they wait, in variables that the user has not set.

    OpenMP reads them once, when torch is loaded. By default its threads wait for each other by
    spinning. When other processes need the cores too, a thread spins for one that has no core, and
    two threads are several times slower than one. So they spin only briefly, then sleep. (Without
    any spinning an idle machine would lose a third of its speed.)
    """
    if not any(name in environment for name in WAITING):
        environment |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": BRIEFLY}
    # OpenMP does not know a container's share of the machine.
    if cores() < (os.cpu_count() or 1):
        environment.setdefault("OMP_NUM_THREADS", str(cores()))


# --- output ---------------------------------------------------------------------------------------


class _Lasting(io.FileIO):
    """A raw output stream that discards what cannot be written, so that the program goes on.

    A closed pipe (`… | head`) is silent; other errors, such as a full disk, are reported once.

    Attributes:
        trouble: the first error, unless it was a closed pipe.
    """

    trouble: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            return super().write(content)
        except OSError as error:
            if error.errno != errno.EPIPE and self.trouble is None:
                self.trouble = error
                self._warn(error)
            return len(content)

    def _warn(self, error: OSError) -> None:
        if self.fileno() == 1:
            said = f"warning: what is printed is lost from here on ({error.strerror})\n"
            with contextlib.suppress(OSError):
                os.write(2, said.encode())


def _lasting(stream: io.TextIOBase) -> io.TextIOBase:
    """A stream to the same place whose writes never raise: see `_Lasting`."""
    if not isinstance(stream, io.TextIOWrapper):  # replaced by a program that embeds us, or a test
        return stream
    stream.flush()
    try:
        behind = _Lasting(stream.fileno(), "w", closefd=False)
    except io.UnsupportedOperation:  # likewise, by a stream in memory
        return stream
    return io.TextIOWrapper(
        behind if stream.write_through else io.BufferedWriter(behind),  # python -u
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _open_closed_streams() -> None:
    """Opens /dev/null in the place of standard streams that are closed (`2>&-`).

    Otherwise the next file to be opened would get the stream's number, and `sys.stderr` would be
    None, for which `print` uses standard output.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest free number: this one
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, closefd=False))  # noqa: SIM115


@contextlib.contextmanager
def answering() -> Iterator[None]:
    """For commands that exist for their output: fails if some of it was lost.

    Raises:
        MachineError: not all of the output could be written.
    """
    yield
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper):
        return
    stream.flush()
    behind = getattr(stream.buffer, "raw", stream.buffer)
    if isinstance(behind, _Lasting) and behind.trouble is not None:
        raise MachineError(
            f"not all of the output could be written ({behind.trouble.strerror}); free some space, "
            "or send it elsewhere, and start again"
        )
