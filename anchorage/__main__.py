"""`anchorage train …`: the scripts as one command, which `pip install .` makes.

    anchorage train @recipes/emoji_scratch.txt
    anchorage evaluate --resume logs/demo
    anchorage completion bash

A subcommand is a script that runs as it does by itself, so it takes the flags of the script and has
its --help. In the repository `python -m anchorage train …` does the same as `python train.py …`.
"""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from typing import NamedTuple

import door
from anchorage import __version__
from terminal import say
from utils import InputError, nearest_names, our_name, sentence_errors


class Command(NamedTuple):
    """A subcommand: the module that is run, the words that it is given first, and what it does."""

    module: str
    about: str
    words: tuple[str, ...] = ()


COMMANDS = {
    "train": Command("train", "train a network, and judge it on classes it never saw"),
    "evaluate": Command("evaluate", "measure checkpoints, compare them, look at single images"),
    "report": Command("report", "one HTML page that explains a run, or compares several"),
    "search": Command("search", "an index of your own images, and what is nearest in it"),
    "dataset": Command("dataset", "check what a data set holds, or download a public one"),
    "export": Command(
        "net", "write a network for use elsewhere, a model card, or to the Hub", ("export",)
    ),
    "completion": Command("anchorage.completion", "print the completion of a shell"),
}


def commands() -> dict[str, Command]:
    """The subcommands whose module is here."""
    return {
        name: command
        for name, command in COMMANDS.items()
        if importlib.util.find_spec(_module(command)) is not None
    }


def _module(command: Command) -> str:
    ours = command.module.startswith(f"{__package__}.")
    return command.module if ours else our_name(command.module)


def usage() -> str:
    """What --help prints."""
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
            "`anchorage COMMAND --help` lists the flags of a command; `anchorage --version`.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a subcommand.

    Raises:
        SystemExit: as the subcommand ends; with status 2 and a sentence where there is none.
    """
    door.enter()
    words = sys.argv[1:] if argv is None else list(argv)
    name, rest = (words[0], words[1:]) if words else ("--help", [])
    if name in ("-h", "--help"):
        say(usage())
    elif name == "--version":
        say(f"anchorage {__version__}")
    else:
        with sentence_errors():
            command = _found(name)
        run(command, rest)


def _found(name: str) -> Command:
    known = commands()
    if name not in known:
        raise InputError(f"there is no command {name}; {nearest_names(name, known)}")
    return known[name]


def run(command: Command, words: Sequence[str]) -> None:
    """Runs a script with these words on its command line, as `python SCRIPT WORDS` does."""
    before = sys.argv
    sys.argv = [before[0], *command.words, *words]
    try:
        # As __main__, also for the processes that read images where they load it once more.
        runpy.run_module(_module(command), run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before


if __name__ == "__main__":
    main()
