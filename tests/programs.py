"""Starts our commands in processes of their own, without waiting for torch each time.

Importing torch and torchvision takes a core three seconds, and the tests start some two hundred
commands. So one process imports them, once, and forks for each command. All that is ours is
imported in the fork, which then is what a shell would have started: with its own arguments, folder,
environment, streams and exit status. Two things are not: what Python and torch read from the
environment at their own start is the first process's (see `STARTS`), and memory is not tidied up at
the end. Tests of limits, of how a command begins and of the installed one start their own Python.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, NoReturn

SECONDS = 300
"""After which a command is taken to hang."""
STARTS = ("PYTHON", "LC_", "LANG", "OMP_", "LD_")
"""Variables that are read before a command is: one that was changed wants a Python of its own."""
FOLLOWED = ("PYTHONPATH", "PYTHONIOENCODING")
"""Those of them that a fork can do as they say."""
FIRST = {name: value for name, value in os.environ.items() if name not in FOLLOWED}
"""The environment that the process which forks has: this one's, when the tests began."""


class Program:
    """A command that runs; what the tests use of `subprocess.Popen`, which is its pattern.

    Attributes:
        stdout: what it prints, as a file to read from, unless it was given another place.
        returncode: -N where signal N ended it; None while nobody has waited for its end.
    """

    def __init__(self, told: IO[str], stdout: IO[str] | None, stderr: IO[str] | None) -> None:
        self._told = told
        self.pid = int(told.readline())
        self.stdout, self.stderr = stdout, stderr
        self.returncode: int | None = None

    def wait(self, timeout: float | None = None) -> int:
        """Its status, when it has ended."""
        if self.returncode is None:
            if not select.select([self._told], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("the command", timeout)
            self.returncode = int(self._told.readline())
            self._told.close()
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str | None, str | None]:
        """All that it prints from now on, when it has ended."""
        said: dict[str, str] = {}

        def read(name: str, file: IO[str]) -> None:
            with file:
                said[name] = file.read()

        files = [(name, getattr(self, name)) for name in ("stdout", "stderr")]
        readers = [
            threading.Thread(target=read, args=each, daemon=True) for each in files if each[1]
        ]
        for reader in readers:
            reader.start()
        self.wait(timeout)
        for reader in readers:
            reader.join()
        return said.get("stdout"), said.get("stderr")

    def send_signal(self, number: int) -> None:
        """Nothing happens where it has ended and somebody has waited for that."""
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)


def start(
    arguments: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    **streams: int | IO,
) -> Program | subprocess.Popen[str]:
    """Starts `python ARGUMENTS` in a session of its own, so that no Ctrl-C of others is for it.

    Args:
        streams: where `stdin`, `stdout` and `stderr` go, as `subprocess.Popen` takes them; both
            outputs can be read from here unless they are named.
    """
    if _suits(arguments, environment):
        return _forked(arguments, cwd, environment, **streams)
    return subprocess.Popen(
        [sys.executable, *arguments],
        cwd=cwd,
        env=environment,
        text=True,
        start_new_session=True,
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams},
    )


def run(
    arguments: Sequence[str], cwd: Path, environment: Mapping[str, str]
) -> subprocess.CompletedProcess[str]:
    """What `python ARGUMENTS` printed, and its status."""
    encoding = environment.get("PYTHONIOENCODING")
    if not _suits(arguments, environment):
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            encoding=encoding,
            timeout=SECONDS,
        )
    written = functools.partial(tempfile.TemporaryFile, "w+", encoding=encoding)
    with written() as out, written() as err:
        program = _forked(arguments, cwd, environment, stdout=out, stderr=err, session=False)
        status = program.wait()
        said = [(file.seek(0), file.read())[1] for file in (out, err)]
    return subprocess.CompletedProcess([sys.executable, *arguments], status, *said)


def _forked(
    arguments: Sequence[str],
    cwd: Path,
    environment: Mapping[str, str],
    *,
    stdin: int | IO = subprocess.DEVNULL,
    stdout: int | IO = subprocess.PIPE,
    stderr: int | IO = subprocess.PIPE,
    session: bool = True,
) -> Program:
    """Starts a command by a fork; a signal (SIGALRM) ends it when it takes over `SECONDS`.

    Args:
        stdin: an open file, as `stdout` and `stderr` may be; a terminal becomes the command's own.
        session: whether it is alone in a session.
    """
    order = [list(arguments), str(cwd), dict(environment), session]
    places = (stdin, stdout, stderr, subprocess.PIPE)
    with contextlib.ExitStack() as theirs:
        files, (_, out, err, told) = zip(*(_ends(each, theirs) for each in places), strict=True)
        socket.send_fds(_server(), [json.dumps(order).encode()], files)
    return Program(told, out, err)


def _ends(place: int | IO, theirs: contextlib.ExitStack) -> tuple[int, IO[str] | None]:
    """The file that a command gets, and the one that is read here; what closes the former."""
    if place == subprocess.DEVNULL:
        return theirs.enter_context(Path(os.devnull).open("r+")).fileno(), None
    if place == subprocess.PIPE:
        read, written = os.pipe()
        theirs.callback(os.close, written)
        return written, os.fdopen(read)
    return place if isinstance(place, int) else place.fileno(), None


def _suits(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether a fork runs `python ARGUMENTS` as a Python of its own would."""
    # Elsewhere a fork of what has loaded torch may crash.
    if sys.platform != "linux" or not (arguments[0] == "-m" or arguments[0].endswith(".py")):
        return False
    return _at_start(environment) == _at_start(FIRST)


def _at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {n: v for n, v in environment.items() if n.startswith(STARTS) and n not in FOLLOWED}


@functools.cache
def _server() -> socket.socket:
    """Where the process that forks takes orders, until this one ends."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    # What a command says itself before it loads torch (door.enter).
    environment = {"TORCH_CPP_LOG_LEVEL": "ERROR"} | FIRST
    command = [sys.executable, __file__, str(theirs.fileno())]
    server = subprocess.Popen(command, env=environment, pass_fds=[theirs.fileno()])
    theirs.close()
    atexit.register(_dismiss, server)
    return ours


def _dismiss(server: subprocess.Popen[bytes]) -> None:
    """Ends the idle process.

    It does not see that its orders have ended where a fork of this process, such as one that reads
    images, holds the socket open too.
    """
    server.terminate()
    server.wait()


# --- in the process that forks --------------------------------------------------------------------

Order = tuple[list[str], str, dict[str, str], bool]
"""Arguments, folder, environment, and whether it is alone in a session."""


def _orders(orders: socket.socket) -> tuple[Order, list[int]] | None:
    """Forks for each order that comes; returns it in the fork, and None when no more come.

    With an order come open files: the three streams, and where its process and status are told.
    """
    while True:
        order, files, *_ = socket.recv_fds(orders, 1 << 20, 4)
        if not order:
            return None
        if os.fork() == 0:
            orders.close()
            *streams, tell = files
            child = os.fork()
            if child == 0:
                os.close(tell)
                return json.loads(order), streams
            for file in streams:
                os.close(file)
            os.write(tell, b"%d\n" % child)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            os.write(tell, b"%d\n" % status)
            os._exit(0)
        for file in files:
            os.close(file)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:  # those that have told all
                pass


def _become(order: Order, streams: list[int]) -> None:
    """Runs `python ARGUMENTS` here, as a shell would start it."""
    arguments, cwd, environment, session = order
    for number, file in enumerate(streams):
        os.dup2(file, number)
        os.close(file)
    if session:
        os.setsid()
        if os.isatty(0):
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    how = {"encoding": environment.get("PYTHONIOENCODING"), "closefd": False}
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", 1 if os.isatty(1) else -1, **how)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", 1, errors="backslashreplace", **how)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    numpy.random.seed()  # no two commands start alike
    signal.alarm(SECONDS)
    # As in a terminal, though the tests run under nohup or in the background of a script.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    sys.orig_argv = [sys.executable, *arguments]
    folders = [folder for folder in environment.get("PYTHONPATH", "").split(":") if folder]
    if arguments[0] == "-m":
        sys.argv, sys.path[:1] = arguments[1:], [cwd, *folders]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        script = Path(cwd, arguments[0])
        sys.argv, sys.path[:1] = arguments, [str(script.parent), *folders]
        runpy.run_path(str(script), run_name="__main__")


def _end(work: Callable[[], None]) -> NoReturn:
    """Does the work and ends the process as Python does, less the second in which it tidies up."""
    status: object = 0
    try:
        work()
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
        status = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    import numpy.random
    import scipy.stats  # noqa: F401
    import torchvision.models  # noqa: F401 (with torch._dynamo, which an optimiser would load)
    from PIL import Image

    Image.init()  # loads what reads each kind of picture, as all that reads pictures does
    gc.freeze()  # a collection would write to, and so copy, every page that is shared
    order = _orders(socket.socket(fileno=int(sys.argv[1])))
    _end((lambda: None) if order is None else functools.partial(_become, *order))
