"""A command line → options; published commands are accepted as printed.

Reads nothing but the command line, so `--help` and a mistyped flag answer at once.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import criteria
import dataset
import methods
import net
from dataset.files import is_file
from flags import Flag, Group, Options
from machine import expanded
from options.declared import (
    EVALUATE_GROUPS,
    REPORT_GROUPS,
    TRAIN_GROUPS,
    defaults,
    flags_of,
)
from options.files import file_of_flags, words_of
from options.meaning import (
    as_published,
    as_suited,
    changed,
    check_metrics,
    check_name,
    check_one_checkpoint,
    check_ranking,
    check_schedule,
    resolved,
    unread,
    useless,
)
from options.parser import Parser, settings_of, unknown_flag
from options.training import DATA
from terminal import as_shell, fitted, say
from utils import InputError, program

EXAMPLES = {
    "train": (
        "@recipes/emoji_imagenet.txt",
        "--dataset folder:photos --name shop",
        "--resume-run logs/shop",
    ),
    "evaluate": (
        "--resume logs/shop",
        "--resume logs/seed1 logs/seed2 --bootstrap 1000",
    ),
    "report": ("logs/shop", "logs/seed1 logs/seed2", "--compare logs --grep seed"),
}
"""Words after each command that stand at the end of its help, where a terminal comes to rest."""

# --- from flags to a parser -----------------------------------------------------------------------


def _make_parser(
    command: str, description: str, groups: Sequence[Group], positional: str | None
) -> Parser:
    name, runs = program(command), " [RUN ...]" if positional else ""
    parser = Parser(
        prog=name,
        usage=fitted(f"{name}{runs} [@FILE] [--flag VALUE] ...", "  ").replace("%", "%%"),
        description=description,
        epilog="\n".join(["examples:", *(f"  {name} {words}" for words in EXAMPLES[command])]),
        argument_default=argparse.SUPPRESS,  # so that only given flags appear in the result
        allow_abbrev=False,
    )
    if positional:
        parser.add_argument(
            positional, nargs="*", type=expanded, default=[], metavar="RUN", help="run folders"
        )
    for group in groups:
        heading = parser.add_argument_group(group.title, group.about)
        for entry in group.flags:
            heading.add_argument(*entry.spellings, dest=entry.dest, **settings_of(entry))
    taken = {spelling for entry in flags_of(groups) for spelling in entry.spellings}
    for entry in flags_of(groups):
        if variants := _swapped(entry.spellings) - taken:
            settings = {**settings_of(entry), "help": argparse.SUPPRESS}
            parser.add_argument(*sorted(variants), dest=entry.dest, **settings)
            taken |= variants
    return parser


def _swapped(spellings: Iterable[str]) -> set[str]:
    """The same spellings with `_` in place of `-`, and the other way round."""
    names = [spelling[2:] for spelling in spellings if spelling.startswith("--")]
    return {f"--{name.replace(*pair)}" for name in names for pair in (("-", "_"), ("_", "-"))}


def _parse(
    command: str,
    description: str,
    groups: Sequence[Group],
    argv: Sequence[str] | None,
    positional: str | None = None,
) -> tuple[Options, list[Flag], Parser]:
    parser = _make_parser(command, description, groups, positional)
    words = _typed(argv)
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


def _typed(argv: Sequence[str] | None) -> list[str]:
    """The words of the command line; values drawn by a sweep as a user would have typed them."""
    words = sys.argv[1:] if argv is None else list(argv)
    if any(word.partition("=")[0] == "--sweep" for word in words):
        return [part for word in words for part in _as_typed(word)]
    return words


def _as_typed(word: str) -> Iterator[str]:
    """The typed form of `--name=VALUE`, whose value a sweep of wandb writes as Python would.

    `[1, 2]` becomes two words, `{'a': 1}` becomes `a=1`; an empty value (`None`, `[]`) no flag.
    """
    name, equals, text = word.partition("=")
    value = _literal(text) if equals and name.startswith("--") else text
    if isinstance(value, Mapping):
        value = [f"{key}={_in_one_word(of)}" for key, of in value.items()]
    if isinstance(value, list):
        yield from (name, *map(_in_one_word, value)) if value else ()
    elif value is not None:
        yield word


def _literal(text: str) -> Any:
    """The list, mapping or None that a text spells; any other text unchanged."""
    with contextlib.suppress(ValueError, SyntaxError):
        if text == "None" or text.startswith(("[", "{")):
            return ast.literal_eval(text)
    return text


def _in_one_word(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _about_unknown(word: str, command: str, entries: Sequence[Flag]) -> str:
    """The sentence about a word that the parser does not know."""
    alive = [entry for entry in entries if not entry.dead]
    known = {spelling: entry.dest for entry in alive for spelling in entry.spellings}
    name = word.split("=")[0]
    if not name.startswith("-"):
        meant = _meant(word, known)
        hint = f"did you mean {meant}?" if meant else "leave it out, or give its flag before it"
        return f"no flag takes the word {word}; {hint}"
    for purpose, groups in (("training", TRAIN_GROUPS), ("evaluation", EVALUATE_GROUPS)):
        if any(name in {*e.spellings, *_swapped(e.spellings)} for e in flags_of(groups)):
            return f"{name} is for {purpose}, and {program(command)} does not read it; leave it out"
    return unknown_flag(name, known, {entry.dest: entry.help for entry in entries})


def _meant(word: str, known: Collection[str]) -> str | None:
    """What a word without a flag was probably meant as: a run, or a file of flags."""
    path = Path(expanded(word))
    if is_file(path / "args.json") or path.suffix == ".pth":
        return as_shell("--resume-run" if "--resume-run" in known else "--resume", word)
    return as_shell(f"@{word}") if is_file(file_of_flags(word)) else None


# --- the commands ---------------------------------------------------------------------------------


def parse_train(argv: Sequence[str] | None = None) -> Options:
    """The options of train.py, resolved; see `resolved`.

    `given` lists the options that were given, `recipe` is the first file of flags (`@FILE`) or
    None. With --resume-run they are not resolved yet; see `continued`.

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
        if args.resume_run:  # the meaning of the flags depends on the run: see `continued`
            return args
        check_name(args)
        dataset.find(args.dataset)
        _check_loss(args, entries, parser)
        net.find_backbone(args.model)
        args = as_published(as_suited(args))
        if args.sweep:
            args = _without_unread(args, entries)
        # A recipe may be used with another loss than its own: `notices` names the unused flags.
        _check_needs(args, entries, parser, excused=_only_in_files(parser, args, argv))
        args = _without_effect(args, entries)
        check_metrics(args, [dataset.find(args.dataset)])
        methods.check(args)
        check_schedule(args)
        return resolved(args)
    except InputError as error:
        parser.error(str(error))


def parsed(words: Sequence[str]) -> Options | None:
    """The options of a command line of train.py; None if train.py would refuse it."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return parse_train(words)
    except SystemExit:  # a file of flags is missing or older, or flags clash
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
    # Whether flags about data have an effect depends on the run, read later: `check_read`.
    _check_needs(args, entries, parser, excused={entry.dest for entry in DATA.flags})
    try:
        check_ranking(args)
        check_one_checkpoint(args, len(args.resume or [args.model]))
    except InputError as error:
        parser.error(str(error))
    return args


def parse_report(argv: Sequence[str] | None = None) -> Options:
    """The options of report.py; `runs` are the folders. See `parse_train`."""
    about = "Make one HTML page that explains a run or compares several, or a table of all runs."
    args, entries, parser = _parse("report", about, REPORT_GROUPS, argv, "runs")
    _check_needs(args, entries, parser)
    if bool(args.runs) == bool(args.compare):
        parser.error("name the run folders, such as logs/NAME, or give --compare DIR")
    if args.embeddings and len(args.runs) > 1:
        parser.error("--embeddings are those of one run; name one")
    if args.picture and len(args.runs) > 1:
        parser.error("--picture is of one run; name one")
    return args


# --- flags that clash or have no effect -----------------------------------------------------------


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
    """Drops the flags of a sweep's command that have no effect, and prints a note for each."""
    while entry := next(iter(unread(args, entries)), None):
        say(f"note: {useless(entry).split(';')[0]}; left out (--sweep)")
        given = [name for name in args.given if name != entry.dest]
        args = changed(args, {entry.dest: entry.default, "given": given})
    return args


def _without_effect(args: Options, entries: list[Flag]) -> Options:
    """Resets options that have no effect to their defaults."""
    while idle := [e for e in unread(args, entries) if getattr(args, e.dest) != e.default]:
        args = changed(args, {entry.dest: entry.default for entry in idle})
    return args


def _check_loss(args: Options, entries: list[Flag], parser: Parser) -> None:
    """Checks that the loss exists, and that none of its arguments is given twice."""
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
    """The options that were given in a file of flags, but not on the command line itself."""
    words = _typed(argv)
    typed = [word for word in words if not word.startswith("@")]
    if typed == words:
        return set()
    return set(args.given) - set(vars(parser.parse_known_args(typed)[0]))
