"""Runs Python command lines of any source tree, each in a process of its own that starts at once.

    python scripts/command_server.py SOCKET

A request is a connection with one line of JSON: `root`, the folder of the source; `argv`
(`["train.py", …]` or `["-m", "net", …]`); `cwd`; and `output`, the file that stdout and stderr go
to. The answer is the exit status; no answer means that the command was killed.

Loading torch takes longer than twenty steps of a small network. So it is loaded once, and every
command runs in a fork of this process, which loads the modules of its source tree afresh.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import runpy
import signal
import socketserver
import sys
import traceback
from pathlib import Path

LIMIT = 300
"""Seconds after which a command is killed."""

HEAVY = (
    "torch torch._dynamo torchvision.models scipy.optimize scipy.io PIL.Image PIL.ImageDraw tqdm "
    "pytorch_metric_learning.losses pytorch_metric_learning.miners"
).split()
"""What is loaded beforehand; what is missing is left to the commands to complain about."""


def run(root: str, argv: list[str], cwd: str, output: str) -> int:
    """Does what `python ARGV` does in the folder `cwd`; returns the exit status."""
    signal.alarm(LIMIT)
    with Path(output).open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(cwd)
    sys.path[0] = root
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(str(Path(root) / argv[0]), run_name="__main__")
    except SystemExit as end:
        if not isinstance(end.code, str):
            return int(end.code or 0)
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class Request(socketserver.StreamRequestHandler):
    """One command, in the fork that the server made for it."""

    def handle(self) -> None:
        """Runs it and answers."""
        status = run(**json.loads(self.rfile.readline()))
        sys.stdout.flush()
        sys.stderr.flush()
        self.wfile.write(str(status).encode())


class Server(socketserver.ForkingMixIn, socketserver.UnixStreamServer):
    """A fork for each request; it ends without taking torch down, which would take a second."""


def serve(socket: str) -> None:
    """Answers requests until it is killed; prints a line when it is ready."""
    for name in HEAVY:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    gc.freeze()  # a collection in a fork would touch, and so copy, all that was loaded
    with Server(socket, Request) as server:
        print("ready", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    serve(sys.argv[1])
