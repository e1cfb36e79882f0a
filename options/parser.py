"""argparse with errors of one sentence, and help that fits the terminal; for all commands."""

from __future__ import annotations

import argparse
import re
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import door
from flags import SWITCH, Flag, Kind, flag
from machine import expanded
from terminal import fitted, reading_width, say
from utils import as_clause, close_names, join_words, sentence_errors


class Formatter(argparse.HelpFormatter):
    """Help that fits the terminal, with switches shown bare."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=reading_width())

    def add_argument(self, action: argparse.Action) -> None:
        """Makes room for subcommands, whose indent argparse forgets to count."""
        super().add_argument(action)
        for command in self._iter_indented_subactions(action):
            width = len(self._format_action_invocation(command)) + self._current_indent
            self._action_max_length = max(self._action_max_length, width)

    def _format_args(self, action: argparse.Action, default_metavar: str) -> str:
        return "" if action.type is SWITCH.parse else super()._format_args(action, default_metavar)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        words = super()._format_action_invocation(action).replace(" ,", ",").rstrip()
        lines, room = [""], self._width - self._current_indent
        for part in re.split("(?<=,)", words):  # between spellings, or between choices
            if lines[-1] and len(lines[-1] + part) > room:
                lines.append(part.lstrip())
            else:
                lines[-1] += part
        return f"\n{' ' * self._current_indent}".join(lines)

    def start_section(self, heading: str | None) -> None:
        """Breaks a heading that is too long."""
        super().start_section(heading and textwrap.fill(heading, self._width - 1))

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Breaks lines at blanks, not inside a flag, unless a word is too long for a line."""
        words = text.split()
        too_long = max(map(len, words), default=0) > width
        return textwrap.wrap(" ".join(words), width, break_on_hyphens=too_long)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Breaks a description, but keeps its own line ends and what its lines begin with."""
        filled = []
        for line in text.split("\n"):
            own = indent + line[: len(line) - len(line.lstrip())]
            filled += [own + part for part in self._split_lines(line, width - len(own)) or [""]]
        return "\n".join(filled)


class Parser(argparse.ArgumentParser):
    """argparse with errors of one sentence and help that fits, for subcommands as well."""

    _taker = ""  # the last flag with several values that was given words

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": Formatter, **settings})

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As argparse's, with our own sentence about unknown words."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._command_of(found)._unknown(unknown[0]))
        return found

    def _command_of(self, found: argparse.Namespace) -> Parser:
        """The parser of the subcommand that was given, or this one if there are none."""
        commands = self._commands()
        return self if commands is None else commands.choices[getattr(found, commands.dest)]

    def _commands(self) -> argparse._SubParsersAction | None:
        """The parsers of the subcommands, if there are any."""
        found = (each for each in self._actions if isinstance(each, argparse._SubParsersAction))
        return next(found, None)

    def _unknown(self, word: str) -> str:
        if not word.startswith("-"):
            several = [each for each in self._get_positional_actions() if each.nargs in ("+", "*")]
            where = "; give it beside the others, not behind a flag" if several else ""
            return f"unknown argument {word}{where}"
        known = {flag: action.dest for flag, action in self._option_string_actions.items()}
        about = {action.dest: action.help or "" for action in self._actions}
        return unknown_flag(word.split("=")[0], known, about)

    def _match_arguments_partial(
        self, actions: Sequence[argparse.Action], pattern: str
    ) -> list[int]:
        """How many words each positional takes; one that may be empty waits if words follow.

        Before Python 3.13, `INDEX --missing NAME` would not find a place for NAME.
        """
        counts = super()._match_arguments_partial(actions, pattern)
        while counts and counts[-1] == 0 and "A" in pattern[sum(counts) :]:
            counts.pop()
        return counts

    def _get_values(self, action: argparse.Action, words: list[str]) -> Any:
        """Converts words; if a flag took words meant as positionals, the error says so."""
        takes_several = action.option_strings and action.nargs in ("?", "*", "+")
        if takes_several and words:
            self._taker = action.option_strings[0]
        try:
            return super()._get_values(action, words)
        except argparse.ArgumentError as error:
            if takes_several:
                error.message += self._where_to("the flag", self._names())
            raise

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """Ends the program; with an error where the help could not be written."""
        with sentence_errors(), door.answering():
            pass
        super().exit(status, message)

    def _names(self) -> list[str]:
        """The names of the positionals."""
        return [str(each.metavar or each.dest) for each in self._get_positional_actions()]

    @staticmethod
    def _where_to(flag: str, names: Sequence[str]) -> str:
        """The part of a sentence that says where to give words that a flag has taken."""
        where = join_words(names, "and")
        return (
            f"; {flag} takes the words that follow it, so give {where} before it" if names else ""
        )

    def error(self, message: str) -> NoReturn:
        """Ends the program with the sentence and status 2."""
        required, _, _ = argparse._("the following arguments are required: %s").partition("%s")
        commands = self._commands()
        if commands is not None and message == f"{required}{commands.metavar}":
            known = join_words(commands.choices, "or")
            message = f"a command is missing after `{self.prog}`: {known}"
        if self._taker and message.startswith(required):
            missing = message.removeprefix(required).split(", ")
            taken = [name for name in self._names() if name in missing]
            message += self._where_to(self._taker, taken)
        sentence = f"error: {as_clause(message)} (see --help)"
        say(fitted(sentence, "  ", sys.stderr), file=sys.stderr)
        raise SystemExit(2)


def unknown_flag(name: str, known: Mapping[str, str], about: Mapping[str, str]) -> str:
    """The sentence about an unknown flag, with flags that may have been meant.

    Args:
        known: spelling → option. Of several spellings of one flag the nearest is named.
        about: option → its help, whose first words may be the flag's name in other programs.
    """
    words = re.sub("[-_]+", " ", name).strip().lower()
    called = [s for s, dest in known.items() if f"{about[dest]} ".lower().startswith(f"{words} ")]
    near: dict[str, str] = {}
    for spelling in (*sorted(called, key=len), *close_names(name, known)):
        near.setdefault(known[spelling], spelling)
    hint = f"; did you mean {join_words([*near.values()][:2], 'or')}?" if near else ""
    return f"unknown argument {name}{hint}"


def settings_of(entry: Flag) -> dict[str, Any]:
    """What argparse is told about a flag, besides its spellings and its default."""
    kind, shown = entry.kind, entry.shown
    if shown is None and kind is not SWITCH and entry.default not in (None, "", (), []):
        shown = entry.default
    words = entry.help if shown is None else f"{entry.help} (default: {shown})"
    told = {"type": kind.parse, "choices": kind.choices, "metavar": kind.metavar}
    return {**told, "nargs": kind.nargs, "const": kind.const, "help": words.replace("%", "%%")}


def take(
    parser: argparse._ActionsContainer,
    spellings: str,
    default: Any,
    kind: Kind,
    help: str,
    *,
    shown: str | None = None,
    **how: Any,
) -> None:
    """Declares a flag or a positional of a subcommand, as `flag` declares one of a command.

    Args:
        parser: of the subcommand, or a group in it. how: what else argparse is told.
    """
    entry = flag(spellings, default, kind, help, shown=shown)
    if kind is SWITCH:  # with a value, which the commands accept, it could take a positional
        parser.add_argument(*entry.spellings, action="store_true", help=help)
    else:
        parser.add_argument(*entry.spellings, default=default, **settings_of(entry), **how)


def file(text: str) -> Path:
    """A path of the command line; `~` is the home folder."""
    return Path(expanded(text))
