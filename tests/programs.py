"""Starts our commands in processes of their own, without waiting for torch each time.

Importing torch and torchvision takes a core three seconds, and the tests start some two hundred
commands. So one process imports them, once, and forks for each command. All that is ours is
imported in the fork, which then is what a shell would have started: with its own arguments, folder,
environment, streams and exit status. Two things are not: what Python and torch read from the
environment at their own start is the first process's (see `STARTS`), and memory is not tidied up at
the end. Tests of signals, terminals and the installed command start a Python of their own.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

STARTS = ("PYTHON", "LC_", "LANG", "OMP_", "LD_")
"""Variables that are read before a command is: one that was changed wants a Python of its own."""
FIRST = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
"""The environment that the process which forks has: this one's, when the tests began."""


def run(
    arguments: Sequence[str], cwd: Path, environment: Mapping[str, str], seconds: int
) -> subprocess.CompletedProcess[str]:
    """What `python ARGUMENTS` printed, and its status (-14 where it took over `seconds`)."""
    server = _server()
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        order = [list(arguments), str(cwd), dict(environment), seconds, str(out), str(err)]
        print(json.dumps(order), file=server.stdin, flush=True)
        status = int(server.stdout.readline())
        return subprocess.CompletedProcess(
            [sys.executable, *arguments], status, out.read_text(), err.read_text()
        )


def suits(arguments: Sequence[str], environment: Mapping[str, str]) -> bool:
    """Whether a fork runs `python ARGUMENTS` as a Python of its own would."""
    # Elsewhere a fork of what has loaded torch may crash.
    if sys.platform != "linux" or not (arguments[0] == "-m" or arguments[0].endswith(".py")):
        return False
    return _at_start(environment) == _at_start(FIRST)


def _at_start(environment: Mapping[str, str]) -> dict[str, str]:
    return {n: v for n, v in environment.items() if n.startswith(STARTS) and n != "PYTHONPATH"}


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The process that forks, until this one ends."""
    # What a command says itself before it loads torch (door.enter).
    environment = {"TORCH_CPP_LOG_LEVEL": "ERROR"} | FIRST
    server = subprocess.Popen(
        [sys.executable, __file__],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(_dismiss, server)
    return server


def _dismiss(server: subprocess.Popen[str]) -> None:
    """Ends the idle process.

    It does not see that its orders have ended where a fork of this process, such as one that reads
    images, holds the pipe open too.
    """
    server.terminate()
    server.communicate()


# --- in the process that forks --------------------------------------------------------------------


def _orders() -> tuple[list[str], str, dict[str, str], int, str, str] | None:
    """Forks for each order that comes; returns it in the fork, and None when no more come."""
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
    return None


def _become(
    arguments: list[str], cwd: str, environment: dict[str, str], seconds: int, out: str, err: str
) -> None:
    """Runs `python ARGUMENTS` here, as a shell would start it from `cwd`."""
    for number, file in enumerate((os.devnull, out, err)):
        opened = os.open(file, os.O_RDWR | os.O_CREAT)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    numpy.random.seed()  # no two commands start alike
    signal.alarm(seconds)
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
    import torchvision.models  # noqa: F401 (with torch._dynamo, which an optimiser would load)

    gc.freeze()  # a collection would write to, and so copy, every page that is shared
    order = _orders()
    _end((lambda: None) if order is None else functools.partial(_become, *order))
