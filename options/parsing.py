"""A command line → options; published commands are accepted as printed.

Reads nothing but the command line, so `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import re
import sys
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import criteria
import dataset
import door
import methods
from dataset.files import is_file
from flags import SWITCH, Flag, Group, Options
from machine import expanded
from options.declared import (
    EVALUATE_GROUPS,
    REPORT_GROUPS,
    TRAIN_GROUPS,
    defaults,
    flags_of,
    train_flags,
)
from options.files import file_of_flags, words_of
from options.meaning import (
    as_published,
    as_suited,
    changed,
    check_metrics,
    check_one_checkpoint,
    check_ranking,
    check_schedule,
    resolved,
    unread,
    useless,
)
from options.training import DATA
from terminal import as_shell, fitted, reading_width, say
from utils import InputError, close_names, join_words, program, sentence_errors

# --- the parser -----------------------------------------------------------------------------------


class Formatter(argparse.HelpFormatter):
    """Help that fits the terminal, with switches shown bare."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=30, width=reading_width())

    def add_argument(self, action: argparse.Action) -> None:
        """Makes room for commands, too, which argparse indents further than it reckons with."""
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
        """A heading that fits, too."""
        super().start_section(heading and textwrap.fill(heading, self._width - 1))

    def _split_lines(self, text: str, width: int) -> list[str]:
        """Lines that are broken at blanks, not inside a flag, unless a word does not fit at all."""
        words = text.split()
        too_long = max(map(len, words), default=0) > width
        return textwrap.wrap(" ".join(words), width, break_on_hyphens=too_long)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """A description, whose own line ends stay."""
        lines = (self._split_lines(line, width - len(indent)) for line in text.split("\n"))
        return "\n".join(indent + part for parts in lines for part in parts or [""])


class Parser(argparse.ArgumentParser):
    """argparse with errors of one sentence, and help that fits; so are those of subcommands."""

    _taker = ""  # the last flag of several values that has taken words

    def __init__(self, **settings: Any) -> None:
        super().__init__(**{"formatter_class": Formatter, **settings})

    def parse_args(
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As argparse's, but for the sentence about words that mean nothing here."""
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._command_of(found)._unknown(unknown[0]))
        return found

    def _command_of(self, found: argparse.Namespace) -> Parser:
        """The parser of the command that was given; this one where there are no commands."""
        for action in self._actions:
            if isinstance(action, argparse._SubParsersAction):
                return action.choices[getattr(found, action.dest)]
        return self

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
        """How many words each place takes; one that may take none waits while words follow.

        Before Python 3.13, `INDEX --missing NAME` left NAME over.
        """
        counts = super()._match_arguments_partial(actions, pattern)
        while counts and counts[-1] == 0 and "A" in pattern[sum(counts) :]:
            counts.pop()
        return counts

    def _get_values(self, action: argparse.Action, words: list[str]) -> Any:
        """Values of words; where a flag of several has taken what stands alone, says where to."""
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
        """Ends the program; status 2 where the help that was asked for could not be written."""
        with sentence_errors(), door.answering():
            pass
        super().exit(status, message)

    def _names(self) -> list[str]:
        """What stands alone on the command line, without a flag."""
        return [str(each.metavar or each.dest) for each in self._get_positional_actions()]

    @staticmethod
    def _where_to(flag: str, names: Sequence[str]) -> str:
        """The part of a sentence that says where to give what a flag has taken."""
        where = join_words(names, "and")
        return (
            f"; {flag} takes the words that follow it, so give {where} before it" if names else ""
        )

    def error(self, message: str) -> NoReturn:
        """Ends the program with the sentence and status 2."""
        required, _, _ = argparse._("the following arguments are required: %s").partition("%s")
        if self._taker and message.startswith(required):
            missing = message.removeprefix(required).split(", ")
            taken = [name for name in self._names() if name in missing]
            message += self._where_to(self._taker, taken)
        sentence = f"error: {message[:1].lower()}{message[1:]} (see --help)"
        say(fitted(sentence, "  ", sys.stderr), file=sys.stderr)
        raise SystemExit(2)


def unknown_flag(name: str, known: Mapping[str, str], about: Mapping[str, str]) -> str:
    """What is said of a flag that there is not, with those that may have been meant.

    Args:
        known: spelling → what it sets. Of several spellings of one flag the nearest is named.
        about: what is set → its help, with whose first words a flag may be called elsewhere.
    """
    words = re.sub("[-_]+", " ", name).strip().lower()
    called = [s for s, dest in known.items() if f"{about[dest]} ".lower().startswith(f"{words} ")]
    near: dict[str, str] = {}
    for spelling in (*sorted(called, key=len), *close_names(name, known)):
        near.setdefault(known[spelling], spelling)
    hint = f"; did you mean {join_words([*near.values()][:2], 'or')}?" if near else ""
    return f"unknown argument {name}{hint}"


def file(text: str) -> Path:
    """A path of the command line; `~` is the home folder."""
    return Path(expanded(text))


def _help_text(entry: Flag) -> str:
    shown = entry.shown
    if shown is None and entry.kind is not SWITCH and entry.default not in (None, "", ()):
        shown = entry.default
    words = entry.help if shown is None else f"{entry.help} (default: {shown})"
    return words.replace("%", "%%")


def _make_parser(
    command: str, description: str, groups: Sequence[Group], positional: str | None
) -> Parser:
    name, runs = program(command), " [RUN ...]" if positional else ""
    parser = Parser(
        prog=name,
        usage=fitted(f"{name}{runs} [@FILE] [--flag VALUE] ...", "  ").replace("%", "%%"),
        description=description,
        argument_default=argparse.SUPPRESS,  # so that a given flag can be told from a default
        allow_abbrev=False,
    )
    if positional:
        parser.add_argument(
            positional, nargs="*", type=expanded, default=[], metavar="RUN", help="run folders"
        )
    for group in groups:
        heading = parser.add_argument_group(group.title, group.about)
        for entry in group.flags:
            heading.add_argument(*entry.spellings, **_argparse_settings(entry))
    taken = {spelling for entry in flags_of(groups) for spelling in entry.spellings}
    for entry in flags_of(groups):
        if variants := _swapped(entry.spellings) - taken:
            settings = {**_argparse_settings(entry), "help": argparse.SUPPRESS}
            parser.add_argument(*sorted(variants), **settings)
            taken |= variants
    return parser


def _swapped(spellings: Iterable[str]) -> set[str]:
    """Spellings with `_` for `-`, and the other way round."""
    names = [spelling[2:] for spelling in spellings if spelling.startswith("--")]
    return {f"--{name.replace(*pair)}" for name in names for pair in (("-", "_"), ("_", "-"))}


def _all_spellings(entry: Flag) -> set[str]:
    return {*entry.spellings, *_swapped(entry.spellings)}


def _argparse_settings(entry: Flag) -> dict[str, Any]:
    settings: dict[str, Any] = {"dest": entry.dest, "help": _help_text(entry)}
    kind = entry.kind
    settings |= {"type": kind.parse, "choices": kind.choices, "metavar": kind.metavar}
    return settings | {"nargs": kind.nargs, "const": kind.const}


def _parse(
    command: str,
    description: str,
    groups: Sequence[Group],
    argv: Sequence[str] | None,
    positional: str | None = None,
) -> tuple[Options, list[Flag], Parser]:
    parser = _make_parser(command, description, groups, positional)
    words = sys.argv[1:] if argv is None else list(argv)
    try:
        given, unknown = parser.parse_known_args(list(words_of(words)))
    except InputError as error:
        parser.error(str(error))
    entries = flags_of(groups)
    if unknown:
        parser.error(_about_unknown(unknown[0], command, entries))
    args = Options(**{**defaults(groups), **vars(given)})
    args.given = sorted(vars(given))
    args.recipe = next((word[1:] for word in words if word.startswith("@")), None)
    return args, entries, parser


def _about_unknown(word: str, command: str, entries: Sequence[Flag]) -> str:
    """The sentence about a word that the parser could do nothing with."""
    alive = [entry for entry in entries if not entry.dead]
    known = {spelling: entry.dest for entry in alive for spelling in entry.spellings}
    name = word.split("=")[0]
    if not name.startswith("-"):
        meant = _meant(word, known)
        hint = f"did you mean {meant}?" if meant else "leave it out, or give its flag before it"
        return f"no flag takes the word {word}; {hint}"
    if any(name in _all_spellings(entry) for entry in train_flags()):
        return f"{name} is for training, and {program(command)} does not read it; leave it out"
    return unknown_flag(name, known, {entry.dest: entry.help for entry in entries})


def _meant(word: str, known: Collection[str]) -> str | None:
    """What a word without a flag stands for, where that can be seen: a run, or a file of flags."""
    path = Path(expanded(word))
    if is_file(path / "args.json") or path.suffix == ".pth":
        return as_shell("--resume-run" if "--resume-run" in known else "--resume", word)
    return as_shell(f"@{word}") if is_file(file_of_flags(word)) else None


# --- the commands ---------------------------------------------------------------------------------


def parse_train(argv: Sequence[str] | None = None) -> Options:
    """The options of train.py, resolved; see `resolved`.

    `given` lists those that stood on the command line, `recipe` is the first file of flags on it
    (`@FILE`), or None. With --resume-run they are not resolved yet; see `continued`.

    Raises:
        SystemExit: with status 2 and one sentence for a bad or ineffective flag, 0 for --help.
    """
    about = "Train an embedding network and judge it on classes it never saw."
    args, entries, parser = _parse("train", about, TRAIN_GROUPS, argv)
    try:
        if args.resume_run and args.folds:
            parser.error(
                "--folds and --resume-run: the same command with --folds goes on where it was "
                "stopped, and --resume-run with one fold alone; leave one of them out"
            )
        if args.resume_run:  # what its flags mean depends on the run: see `continued`
            return args
        dataset.find(args.dataset)
        _check_loss(args, entries, parser)
        args = as_published(as_suited(args))
        if args.sweep:
            args = _without_unread(args, entries)
        # A recipe with another loss keeps flags of its own loss: `notices` tells of them.
        _check_needs(args, entries, parser, excused=_only_in_files(parser, args, argv))
        args = _without_effect(args, entries)
        check_metrics(args, [dataset.find(args.dataset)])
        methods.check(args)
        check_schedule(args)
        return resolved(args)
    except InputError as error:
        parser.error(str(error))


def parsed(words: Sequence[str]) -> Options | None:
    """The options that words of train.py's command line ask for; None if it refuses them."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return parse_train(words)
    except SystemExit:  # a file of flags that is gone or older, or flags that do not go together
        return None


def parse_evaluate(argv: Sequence[str] | None = None) -> Options:
    """The options of evaluate.py; see `parse_train`."""
    about = "Evaluate a checkpoint on the classes it never saw."
    args, entries, parser = _parse("evaluate", about, EVALUATE_GROUPS, argv)
    if not args.resume and "model" not in args.given:
        parser.error(
            "--resume FILE is needed: the checkpoint to evaluate; or --model NAME, which is "
            "evaluated as it starts"
        )
    # Who listens to those of the data depends on the run, which is not read yet: `check_read`.
    _check_needs(args, entries, parser, excused={entry.dest for entry in DATA.flags})
    try:
        check_ranking(args)
        check_one_checkpoint(args, len(args.resume or [args.model]))
    except InputError as error:
        parser.error(str(error))
    return args


def parse_report(argv: Sequence[str] | None = None) -> Options:
    """The options of report.py; `runs` are the folders. See `parse_train`."""
    about = "One HTML page that explains a run, or compares several; or all runs in a table."
    args, entries, parser = _parse("report", about, REPORT_GROUPS, argv, "runs")
    _check_needs(args, entries, parser)
    if bool(args.runs) == bool(args.compare):
        parser.error("name the run folders, such as logs/NAME, or give --compare DIR")
    if args.embeddings and len(args.runs) > 1:
        parser.error("--embeddings are those of one run; name one")
    if args.picture and len(args.runs) > 1:
        parser.error("--picture is of one run; name one")
    return args


# --- what does not go together --------------------------------------------------------------------


def _check_needs(
    args: Options,
    entries: list[Flag],
    parser: Parser,
    excused: Collection[str] = (),
) -> None:
    for entry in unread(args, entries):
        if entry.dest not in excused:
            parser.error(useless(entry))


def _without_unread(args: Options, entries: list[Flag]) -> Options:
    """The options of a drawn command without the flags that nobody reads; it notes each."""
    while entry := next(iter(unread(args, entries)), None):
        say(f"note: {useless(entry).split(';')[0]}; left out (--sweep)")
        given = [name for name in args.given if name != entry.dest]
        args = changed(args, {entry.dest: entry.default, "given": given})
    return args


def _without_effect(args: Options, entries: list[Flag]) -> Options:
    """The options; what nobody reads is as it is without its flag, whoever looks at it."""
    while idle := [e for e in unread(args, entries) if getattr(args, e.dest) != e.default]:
        args = changed(args, {entry.dest: entry.default for entry in idle})
    return args


def _check_loss(args: Options, entries: list[Flag], parser: Parser) -> None:
    """The loss exists, and each of its arguments has one value: by its flag or by its own name."""
    try:
        criteria.check_name(args.loss)
    except ValueError as error:
        parser.error(str(error))
    named = dict(args.loss_args)
    for entry in entries:
        if entry.argument in named and entry.dest in args.given and entry.is_read(args):
            parser.error(
                f"{entry.spellings[0]} and --loss-args {entry.argument}={named[entry.argument]} "
                "are the same argument of the loss; leave one of them out"
            )


def _only_in_files(parser: Parser, args: Options, argv: Sequence[str] | None) -> set[str]:
    """The given options that stand in a file of flags and not on the command line itself."""
    words = sys.argv[1:] if argv is None else list(argv)
    typed = [word for word in words if not word.startswith("@")]
    if typed == words:
        return set()
    return set(args.given) - set(vars(parser.parse_known_args(typed)[0]))
