"""What every command does first, before torch is loaded, and how it takes the loss of its output.

    import door

    if __name__ == "__main__":
        door.enter()

Nothing here is heavy, so that `--help` and a typing error answer at once.
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
from utils import InputError, MachineError, sentence_errors

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""How OpenMP's threads wait: for any runtime, for GNU's (torch on Linux), LLVM's (macOS)."""
BRIEFLY = "1000"  # rounds of GNU's loop, some microseconds; its own choice is 300,000


def enter(*, loads_torch: bool = False) -> None:
    """Prepares this process, and all that it will start, for the command.

    Args:
        loads_torch: the command does, which may take seconds; it calls `loaded` then.

    Raises:
        SystemExit: with status 2 and a sentence, on a system that the commands do not run on.
    """
    with sentence_errors():
        _need_unix()
    _open_closed_streams()
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    speak_to_any_terminal()
    leave_out_remarks()
    settle_threads(os.environ)
    speaks = (os.environ.get("RANK") or "0") == "0"  # of several processes one
    if not speaks:
        silence_notices()
    _end_with_a_word(speaks)
    if loads_torch:
        _loading.append(Wait("loading PyTorch"))
    # What torch's C++ says of lost connections, with its stack, is said in sentences here.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")


_loading: list[Wait] = []


def loaded() -> None:
    """What a command needs is there: the user need no longer be told what the command waits for."""
    while _loading:
        _loading.pop().over()


def _end_with_a_word(speaks: bool) -> None:
    """Makes Ctrl-C end the program, where nothing else obeys it, without a traceback.

    The status stays that of a program which a signal has ended, so that loops of a shell end too.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if not issubclass(kind, KeyboardInterrupt):
            before(kind, error, trace)
        elif speaks:
            say("interrupted", file=sys.stderr)

    sys.excepthook = hook


def _need_unix() -> None:
    try:
        import fcntl  # noqa: F401 (it holds a run folder and a cache against other processes)
    except ImportError:
        raise InputError(
            f"this runs on Linux and macOS, not on {sys.platform}; on Windows use WSL "
            "(`wsl --install`), which is a Linux"
        ) from None


# --- threads --------------------------------------------------------------------------------------


def settle_threads(environment: dict[str, str] | os._Environ[str]) -> None:
    """Says in the environment how many threads there are and how they wait, unless the user has.

    OpenMP reads it once, when torch is loaded. Its threads wait for each other by spinning. Where
    other processes want the cores too, a thread spins for one that was not given a core, and two
    threads are several times slower than one. They spin only briefly here, then sleep. (Not at all
    would cost a third of the speed on an idle machine.)
    """
    if not any(name in environment for name in WAITING):
        environment |= {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": BRIEFLY}
    # A container's share of the machine, which OpenMP does not know.
    if cores() < (os.cpu_count() or 1):
        environment.setdefault("OMP_NUM_THREADS", str(cores()))


# --- output ---------------------------------------------------------------------------------------


class _Lasting(io.FileIO):
    """What is behind a stream; what it cannot take is lost, and the program goes on.

    A reader that has seen enough (`… | head`) goes away in silence. A full disk is reported, once.

    Attributes:
        trouble: why something was lost, unless a reader went away.
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
    """The same stream, which raises no error when its reader is gone or the disk under it full."""
    if not isinstance(stream, io.TextIOWrapper):  # replaced by what embeds Python, such as a test
        return stream
    stream.flush()
    try:
        behind = _Lasting(stream.fileno(), "w", closefd=False)
    except io.UnsupportedOperation:  # replaced likewise, by one that keeps what is written
        return stream
    return io.TextIOWrapper(
        behind if stream.write_through else io.BufferedWriter(behind),  # python -u
        encoding=stream.encoding,
        errors=stream.errors,
        line_buffering=stream.line_buffering,
        write_through=stream.write_through,
    )


def _open_closed_streams() -> None:
    """Where a standard stream is closed (`2>&-`), what goes there is lost, as in /dev/null.

    Else the next file opened would take its place, and Python has no stream to ask whether it is a
    terminal; `print` would take standard output for it.
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
    """Around a command whose output is what it is for.

    Raises:
        MachineError: not all of it could be written.
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
