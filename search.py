"""Photos → an index → what is nearest to a picture: a trained network put to use.

    python search.py build logs/RUN --images photos/ --index shop.index
    python search.py query shop.index picture.jpg
    python search.py add shop.index new/ ; python search.py remove shop.index new/17.jpg

An index is one file. It holds ids, labels, paths and embeddings, not the images.
"""

from __future__ import annotations

import door

if __name__ == "__main__":
    door.enter()

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from flags import number, whole
from machine import expanded
from net.choices import WEIGHTS
from options.parsing import Formatter, Parser
from terminal import say
from utils import InputError, sentence_errors

# What needs torch is imported by each command, so that --help and a typing error answer at once.


class Command(NamedTuple):
    """One of the things that an index is for: its flags, and what carries it out."""

    name: str
    help: str
    declare: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], None]


def _file(text: str) -> Path:
    return Path(expanded(text))


def _index(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("index", metavar="INDEX", type=_file, help="the file that build wrote")


def _network(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--run", metavar="RUN", help="where the run is now, if it has moved")
    _device(parser)


def _device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", metavar="NAME", help="cpu or cuda (default: the GPU where there is one)"
    )


def _reading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--max-bad-images",
        metavar="F",
        type=number(0.0, 1.0),
        default=0.1,
        help="the share of the images that may be unreadable; they are named and left out "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=whole(0),
        help="processes that read images (default: one for each core)",
    )
    parser.add_argument(
        "--keep-copies",
        action="store_true",
        help="take in pictures that the index holds already under another path",
    )


# --- build, add, remove ---------------------------------------------------------------------------


def _declare_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run folder, or a checkpoint")
    parser.add_argument(
        "--images",
        metavar="PATH",
        nargs="+",
        action="extend",
        required=True,
        help="folders of any depth (their names are the labels), image files, and tables (.csv) "
        "with a column path and, if you like, id and label",
    )
    parser.add_argument(
        "--index", metavar="FILE", type=_file, required=True, help="the file to write"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an index of that name")
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="of a run that kept a running mean of its weights: the mean (ema, the default) or the "
        "weights themselves (raw)",
    )
    _reading(parser)
    _device(parser)


def _build(args: argparse.Namespace) -> None:
    if args.index.exists() and not args.overwrite:
        raise InputError(
            f"{args.index} is there already; `add` adds images to it, and --overwrite makes it anew"
        )
    from index import making, network, showing, sources

    photos = sources.photos_of(args.images)
    embedder = network.load_run(args.run, device=args.device, weights=args.weights)
    about = network.description(args.run, embedder, args.weights, args.index)
    outcome = making.build(args.index, photos, embedder, about, **_how(args))
    showing.tell_outcome(outcome, args.index)


def _how(args: argparse.Namespace) -> dict:
    names = ("workers", "max_bad_images", "keep_copies")
    return {name: getattr(args, name) for name in names}


def _declare_add(parser: argparse.ArgumentParser) -> None:
    _index(parser)
    parser.add_argument(
        "images", metavar="PATH", nargs="+", help="folders, image files and tables, as for build"
    )
    _reading(parser)
    _network(parser)


def _add(args: argparse.Namespace) -> None:
    from index import Index, making, showing, sources

    photos = sources.photos_of(args.images)
    embedder = Index.open(args.index).embedder(args.device, args.run)
    outcome = making.add(args.index, photos, embedder, **_how(args))
    showing.tell_outcome(outcome, args.index)


def _declare_remove(parser: argparse.ArgumentParser) -> None:
    _index(parser)
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help="ids, image files, or folders for all below them"
    )
    parser.add_argument(
        "--missing", action="store_true", help="remove the images whose files are gone"
    )


def _remove(args: argparse.Namespace) -> None:
    if not args.names and not args.missing:
        raise InputError("nothing to remove; give ids, files or folders, or --missing")
    from index import making, showing

    showing.tell_removed(making.remove(args.index, args.names, args.missing), args.index)


# --- query ----------------------------------------------------------------------------------------


def _declare_query(parser: argparse.ArgumentParser) -> None:
    _index(parser)
    parser.add_argument("images", metavar="IMAGE", nargs="+", type=expanded, help="image files")
    parser.add_argument(
        "--top",
        metavar="N",
        type=whole(1),
        default=10,
        help="how many are shown for each (default: %(default)s)",
    )
    parser.add_argument(
        "--without-self",
        action="store_true",
        help="leave out what is the very same file as the query",
    )
    parser.add_argument("--json", metavar="FILE", type=_file, help="write the answers as JSON")
    _network(parser)


def _query(args: argparse.Namespace) -> None:
    from index import Index, asking, showing

    index = Index.open(args.index)
    embedder = index.embedder(args.device, args.run)
    answers = asking.ask(index, embedder, args.images, args.top, without_self=args.without_self)
    showing.tell_answers(answers, index)
    if args.json:
        showing.write_answers(args.json, answers, index)


# --- serve ----------------------------------------------------------------------------------------


def _declare_serve(parser: argparse.ArgumentParser) -> None:
    _index(parser)
    parser.add_argument(
        "--port",
        metavar="N",
        type=_port,
        default=8000,
        help="where the page is on this machine; 0 is any free one (default: %(default)s)",
    )
    parser.add_argument(
        "--host",
        metavar="ADDRESS",
        default="127.0.0.1",
        help="the address to listen at; 0.0.0.0 lets every machine of the network search here, "
        "without a password (default: %(default)s, this machine alone)",
    )
    parser.add_argument(
        "--allow-host",
        metavar="NAME",
        action="append",
        default=[],
        help="a further name that the page may be opened by, such as that of a proxy",
    )
    _network(parser)


def _port(text: str) -> int:
    value = whole(0)(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"{value} is no port; the last one is 65535")
    return value


def _serve(args: argparse.Namespace) -> None:
    say("reading the index and its network ...", flush=True)
    from serving.server import serve

    names = {"host": args.host, "port": args.port, "allow_host": args.allow_host}
    serve(args.index, **names, device=args.device, run=args.run)


COMMANDS = (
    Command("build", "make an index of images", _declare_build, _build),
    Command("add", "add images to an index", _declare_add, _add),
    Command("remove", "take images out of an index", _declare_remove, _remove),
    Command("query", "find the images nearest to some others", _declare_query, _query),
    Command("serve", "open a page in the browser to search on", _declare_serve, _serve),
)


# --- the command ----------------------------------------------------------------------------------


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """A command line → options; `carry_out` is what carries them out."""
    parser = Parser(prog="search.py", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in COMMANDS:
        own = commands.add_parser(
            command.name,
            help=command.help,
            description=f"{command.help[:1].upper()}{command.help[1:]}.",
            formatter_class=Formatter,
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
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    with sentence_errors(), door.answering():
        args.carry_out(args)


if __name__ == "__main__":
    main()
