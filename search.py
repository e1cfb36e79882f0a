"""Build an index of photos with a trained network, and find those nearest to a picture.

    python search.py build logs/RUN --images photos/ --index shop.index
    python search.py query shop.index picture.jpg
    python search.py add shop.index new/
    python search.py remove shop.index new/17.jpg

An index is one file. It holds ids, labels, paths and embeddings of images, not the images.
"""

from __future__ import annotations

import door

if __name__ == "__main__":
    door.enter()

import argparse
import contextlib
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from options import searching
from options.parser import Parser
from options.ranking import ranking_by
from storage import in_bytes
from terminal import as_shell, hear, say, terminal_width
from utils import InputError, counted, program, sentence_errors

if TYPE_CHECKING:
    from index.adding import How

LARGE = 100_000_000  # bytes of an index for which most commands take seconds

# Modules that need torch are imported by each command, so that --help and a typing error answer at
# once.


class Command(NamedTuple):
    """A subcommand: name, line in --help, and the functions that declare its flags and run it."""

    name: str
    help: str
    declare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def build(args: argparse.Namespace) -> None:
    """Makes an index of images."""
    from evaluation.inference import load_run
    from index import graph, making, network, showing, sources

    making.check_place(args.index, args.overwrite)
    graph.check_wanted(args.approximate)
    photos = sources.photos_of(args.images)
    say(f"{counted(len(photos))}; opening {args.run}", flush=True)
    embedder = load_run(args.run, device=args.device, weights=args.weights, whiten=args.whiten)
    about = network.description(
        args.run, embedder, args.weights, args.index, args.codes, args.whiten
    )
    with going_on():
        outcome = making.build(
            args.index, photos, embedder, about, _how(args), overwrite=args.overwrite
        )
    showing.print_outcome(outcome, args.index)
    showing.speed_up(args.index, args.approximate)
    showing.print_next(args.index)


def add(args: argparse.Namespace) -> None:
    """Adds images to an index."""
    from index import Index, graph, making, network, showing, sources

    graph.check_wanted(args.approximate)
    index, photos = Index.open(args.index), sources.photos_of(args.images)
    say(f"{counted(len(photos))}; opening the network of {args.index}", flush=True)
    embedder = index.embedder(args.device, args.run)
    thresholds = network.measured(embedder)
    place = None
    if args.run and network.has_moved(args.index, index.about):
        place = network.place_of(args.run, embedder, args.index)
    print_waiting(args.index, "looking through")
    with going_on():
        outcome = making.add(args.index, photos, embedder, thresholds, place, _how(args))
    showing.print_outcome(outcome, args.index)
    showing.speed_up(args.index, args.approximate)


def print_waiting(index: Path, doing: str) -> None:
    """On a terminal, says what is being done to an index that is so large that it takes seconds."""
    with contextlib.suppress(OSError):
        if terminal_width() is not None and index.stat().st_size > LARGE:
            say(f"{doing} {index} ...", flush=True)


@contextlib.contextmanager
def going_on() -> Iterator[None]:
    """For work that a second start continues: turns Ctrl-C into a message and status 130."""
    try:
        yield
    except KeyboardInterrupt:
        say("\nstopped; the same command goes on with what is done", file=sys.stderr)
        raise SystemExit(130) from None


def _how(args: argparse.Namespace) -> How:
    from index.adding import How

    return How(args.workers, args.max_bad_images, args.keep_copies)


def remove(args: argparse.Namespace) -> None:
    """Removes images from an index."""
    if not args.names and not args.missing:
        raise InputError("nothing to remove; give ids, files or folders, or --missing")
    from index import making, showing

    print_waiting(args.index, "looking through")
    showing.print_removed(making.remove(args.index, args.names, args.missing), args.index)


def compact(args: argparse.Namespace) -> None:
    """Rewrites an index without the images that were removed."""
    from index import making

    print_waiting(args.index, "copying")
    had_graph = searching.graph_of(args.index).exists()
    freed = making.compact(args.index)
    say(f"{args.index} rewritten, {in_bytes(freed)} smaller")
    if had_graph:
        say("its graph numbered the images as they were, and is gone; to make it again:")
        say(f"  {program('search')} approximate {as_shell(args.index)}")


def approximate(args: argparse.Namespace) -> None:
    """Makes or extends the graph of an index."""
    from index import showing

    showing.speed_up(args.index, "yes")


def query(args: argparse.Namespace) -> None:
    """Finds the images nearest to some others."""
    searching.check_written(args)
    searching.check_pictures(args.images)
    ranking = ranking_by(args.query_expansion, args.rerank)
    from index import Index, asking, showing

    index = Index.open(args.index, exact=args.exact)
    if terminal_width() is not None:
        say(f"opening the network of {args.index}", flush=True)
    embedder = index.embedder(args.device, args.run)
    how = {"without_self": args.without_self, "ranking": ranking}
    answers = asking.ask(index, embedder, args.images, args.top, **how)
    showing.print_answers(answers, index)
    if args.json:
        showing.write_answers(args.json, answers, index)
    if args.picture:
        showing.draw_answers(args.picture, answers, embedder.model.upright)
    asking.check_all_answered(answers)


def duplicates(args: argparse.Namespace) -> None:
    """Finds the pairs of images that are nearest to each other."""
    searching.check_written(args)
    from index import Index, showing
    from index.duplicates import pairs_above

    index = Index.open(args.index, exact=True)
    pairs = pairs_above(index, args.above)
    showing.print_pairs(pairs, index, args.above, args.top)
    if args.json:
        showing.write_pairs(args.json, pairs, index, args.above)


def info(args: argparse.Namespace) -> None:
    """Prints what an index holds, and checks that it is as it was written."""
    searching.check_written(args)
    from index import Index, showing

    print_waiting(args.index, "checking")
    facts = showing.facts(Index.open(args.index))
    showing.print_facts(facts)
    if args.json:
        showing.write_json(args.json, facts)


def serve(args: argparse.Namespace) -> None:
    """Opens a page to search on, until it is interrupted."""
    say("reading the index and its network ...", flush=True)
    from serving import server

    where = {"host": args.host, "port": args.port, "allow_host": args.allow_host}
    server.serve(args.index, **where, device=args.device, run=args.run)


COMMANDS = (
    Command("build", "make an index of images", searching.build, build),
    Command("add", "add images to an index", searching.add, add),
    Command("remove", "take images out of an index", searching.remove, remove),
    Command("query", "find the images nearest to some others", searching.query, query),
    Command("duplicates", "find images that look alike", searching.duplicates, duplicates),
    Command("info", "what an index holds, and whether it is sound", searching.info, info),
    Command("approximate", "make searching a large index fast", searching.index, approximate),
    Command("compact", "rewrite an index without the removed images", searching.index, compact),
    Command("serve", "open a page in the browser to search on", searching.serve, serve),
)


# --- the command line -----------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options of a command line; `carry_out` is the command's function."""
    parser = Parser(prog=program("search"), description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        own = commands.add_parser(
            command.name,
            help=command.help,
            description=f"{command.help[:1].upper()}{command.help[1:]}.",
        )
        command.declare(own)
        own.set_defaults(carry_out=command.run)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command.

    Raises:
        SystemExit: with status 2 and one sentence for bad input, 0 for --help.
    """
    args = parse(argv)
    hear(logging.WARNING, "%(message)s")
    with sentence_errors(), door.answering():
        args.carry_out(args)


if __name__ == "__main__":
    main()
