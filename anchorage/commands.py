"""The subcommands of `anchorage`, and the script that each of them runs."""

from __future__ import annotations

import importlib.util
import runpy
import sys
from collections.abc import Sequence
from typing import NamedTuple

from utils import our_name


class Command(NamedTuple):
    """A subcommand: the module that it runs, its description, and the module's first arguments."""

    module: str
    about: str
    words: tuple[str, ...] = ()

    @property
    def full_name(self) -> str:
        """The name by which its module is imported here."""
        inside = self.module.startswith(f"{__package__}.")
        return self.module if inside else our_name(self.module)


COMMANDS = {
    "train": Command("train", "train a network, and judge it on classes it never saw"),
    "evaluate": Command("evaluate", "measure checkpoints, compare them, look at single images"),
    "report": Command("report", "one HTML page that explains a run, or compares several"),
    "study": Command("study", "compare methods fairly: one budget, folds, seeds, a table"),
    "search": Command("search", "an index of your own images, and what is nearest in it"),
    "dataset": Command("dataset", "check what a data set holds, or download a public one"),
    "export": Command(
        "net", "write a network for use elsewhere, a model card, or to the Hub", ("export",)
    ),
    "completion": Command(f"{__package__}.completion", "print the completion of a shell"),
}


def commands() -> dict[str, Command]:
    """The subcommands whose module exists here."""
    return {
        name: command
        for name, command in COMMANDS.items()
        if importlib.util.find_spec(command.full_name) is not None
    }


def run(command: Command, words: Sequence[str]) -> None:
    """Runs a script with these words on its command line, as `python SCRIPT WORDS` does."""
    before = sys.argv
    sys.argv = [before[0], *command.words, *words]
    try:
        # As __main__, so that worker processes that are spawned can import it again.
        runpy.run_module(command.full_name, run_name="__main__", alter_sys=True)
    finally:
        sys.argv = before
