"""`anchorage train …`: the scripts as subcommands of one command, which `pip install .` makes.

    anchorage train @recipes/emoji_scratch.txt
    anchorage evaluate --resume logs/demo
    anchorage completion bash

A subcommand runs a script unchanged, with its flags and its --help. In the repository
`python -m anchorage train …` does the same as `python train.py …`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import door
from anchorage import __version__
from anchorage.commands import Command, commands, run
from terminal import say
from utils import InputError, called_as, nearest_names, sentence_errors


def usage() -> str:
    """The text of --help."""
    known = commands()
    width = max(map(len, known))
    lines = [f"  {name:<{width}}  {command.about}" for name, command in known.items()]
    return "\n".join(
        [
            "usage: anchorage COMMAND ...",
            "",
            "Deep metric learning: train, measure, explain, search, share.",
            "",
            *lines,
            "",
            "`anchorage COMMAND --help` lists the flags of a command.",
            "`anchorage --version` prints the version.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a subcommand.

    Raises:
        SystemExit: with the subcommand's status; with status 2 and a sentence for an unknown one.
    """
    door.enter()
    by_module = Path(sys.argv[0]).name == "__main__.py"  # `python -m anchorage …`
    called_as("python -m anchorage" if by_module else "anchorage")
    words = sys.argv[1:] if argv is None else list(argv)
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("-h", "--help"):
        _answer(usage())
    elif name == "--version":
        _answer(f"anchorage {__version__}")
    else:
        with sentence_errors():
            command = _found(name)
        run(command, rest)


def _answer(text: str) -> None:
    with sentence_errors(), door.answering():
        say(text)


def _found(name: str) -> Command:
    known = commands()
    if name not in known:
        raise InputError(f"there is no command {name}; {nearest_names(name, known)}")
    return known[name]


if __name__ == "__main__":
    main()
