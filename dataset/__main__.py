"""`python -m dataset check NAME` examines a data set, `... download NAME` fetches a public one."""

from __future__ import annotations

import argparse
import contextlib
import logging
import sys
from collections.abc import Sequence

import door
from dataset import NAMES, find
from dataset.base import ROOT, check_command, root_words
from dataset.download import SOURCES, download
from dataset.own import SEED, OwnData
from dataset.showing import run
from flags import COUNT_OR_ZERO, SWITCH, Kind, a_path, any_text, one_of
from options.parser import Parser, file, take
from storage import check_outputs
from terminal import hear, say
from utils import InputError, program, sentence_errors

_TO_STDOUT = "-"


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog=program("dataset"), description="Examine a data set, or fetch one.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (_add_check(commands), _add_download(commands)):
        take(command, "--data-root", ROOT, a_path("DIR"), "folder that holds the data sets")
    return parser


# fmt: off
def _add_check(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    check = commands.add_parser(
        "check",
        help="what is there, compared with what is published, and what is wrong with it",
        description="Say what is there, compared with what is published, and what is wrong with "
        "it.\nExit status: 0 clean, 1 findings, 2 not usable. Notes (such as grey images, which "
        "are converted) are not findings.",
    )
    take(check, "name", None, Kind(str, "NAME", nargs="?"),
         f"{', '.join(NAMES)}, folder:PATH or csv:FILE")
    take(check, "--all", False, SWITCH, "every data set under the data root")
    take(check, "--json", None, Kind(str, "FILE", nargs="?", const=_TO_STDOUT),
         "print JSON, which names every file, instead of a table, or write it to FILE")
    take(check, "--eval-classes", None, Kind(float, "F"),
         "own images: share of the classes that is held out",
         shown="as in a run: a fifth; with few classes up to a third")
    take(check, "--seed", None, COUNT_OR_ZERO,
         "own images: seed of the draw of the held-out classes", shown=str(SEED))
    take(check, "--exif", "apply", one_of("apply", "ignore"),
         "as in training: turn pictures as their EXIF data say, or not")
    return check
# fmt: on


def _add_download(commands: argparse._SubParsersAction) -> argparse.ArgumentParser:
    get = commands.add_parser(
        "download",
        help="fetch a data set, check it and unpack it under the data root",
        description="Fetch a data set, check it and unpack it under the data root.",
    )
    take(get, "name", None, any_text("NAME"), f"one of {', '.join(SOURCES)}")
    return get


def _check(args: argparse.Namespace) -> int:
    if not args.name and not args.all and args.json:
        args.name, args.json = args.json, _TO_STDOUT  # `check --json NAME`
    if bool(args.name) == args.all:
        raise InputError("give either the name of one data set or --all")
    options = {
        key: value
        for key, value in (("eval_classes", args.eval_classes), ("seed", args.seed))
        if value is not None
    }
    entry = find(args.name) if args.name else None
    if options and not isinstance(entry, OwnData):
        raise InputError(
            "--eval-classes and --seed are for folder:PATH and csv:FILE; leave them out"
        )
    if entry and root_words(args.data_root) and not entry.lies_under(args.data_root):
        raise InputError(f"--data-root has no effect on {args.name}; leave it out")
    if isinstance(entry, OwnData) and "eval_classes" not in options:
        options |= _held_out_by_a_run(entry)
    as_json = args.json == _TO_STDOUT
    written = file(args.json) if args.json and not as_json else None
    check_outputs({"--json": written}, [entry.place] if isinstance(entry, OwnData) else [])
    names = [args.name] if args.name else None
    return run(names, args.data_root, as_json, written, exif=args.exif, **options)


def _held_out_by_a_run(entry: OwnData) -> dict[str, float]:
    """The share of the classes that training would hold out; {} if the data define the splits."""
    with contextlib.suppress(InputError):  # the check itself will report it
        share = entry.share_held_out()
        return {} if share is None else {"eval_classes": share}
    return {}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status.

    Raises:
        SystemExit: with status 2 and one sentence for bad input, 0 for --help.
    """
    args = _parser().parse_args(argv)
    with sentence_errors(), door.answering():
        if args.command == "check":
            return _check(args)
        hear(logging.INFO, "%(message)s")
        folder = download(args.name, args.data_root)
        say(f"`{check_command(args.name, args.data_root)}` examines {folder}")
    return 0


if __name__ == "__main__":
    door.enter()
    sys.exit(main())
