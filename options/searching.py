"""The flags of search.py, command by command."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

from dataset.decoding import need_picture, reason
from flags import number, whole
from machine import expanded
from net.choices import WEIGHTS
from options.parser import file
from options.ranking import ALPHA, RERANKING
from storage import check_outputs, followed
from utils import InputError

CODES = ("none", "int8", "binary")
APPROXIMATE = ("auto", "yes", "no")
ABOVE = 0.95


def index(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that names the index."""
    parser.add_argument("index", metavar="INDEX", type=file, help="the file that build wrote")


def device(parser: argparse.ArgumentParser) -> None:
    """Adds the flag for where the network computes."""
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="where the network computes (default: the GPU where there is one)",
    )


def network(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the network of an index."""
    parser.add_argument(
        "--run", metavar="RUN", help="where the run of the index is now, if it has moved"
    )
    device(parser)


def exact(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that makes a search compare every vector."""
    parser.add_argument(
        "--exact",
        action="store_true",
        help="compare with every image, though the index has codes or a graph",
    )


def graph_of(index: Path) -> Path:
    """The path of an index's graph, which is beside it."""
    index = followed(index)
    return index.with_name(f"{index.name}.graph")


def written(parser: argparse.ArgumentParser) -> None:
    """Adds the flag for results as a file."""
    parser.add_argument("--json", metavar="FILE", type=file, help="write it all as JSON")


def check_written(args: argparse.Namespace) -> None:
    """Raises InputError if an output file cannot be written, or is one that is read."""
    asked = {f"--{name}": getattr(args, name, None) for name in ("json", "picture")}
    check_outputs(asked, [args.index, graph_of(args.index), *getattr(args, "images", ())])
    drawn = asked["--picture"]
    if drawn and drawn.suffix.lower() not in ("", ".png"):
        raise InputError(f"--picture: {drawn} is drawn as PNG; give it the ending .png")


def check_pictures(pictures: Sequence[str]) -> None:
    """Raises InputError if a picture is missing or is not a file; none is read yet."""
    for picture in pictures:
        try:
            need_picture(picture)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{picture} cannot be read ({reason(error)}); give another image file"
            ) from error


def _taking_in(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for adding images."""
    parser.add_argument(
        "--max-bad-images",
        metavar="F",
        type=number(0.0, 1.0),
        default=0.1,
        help="the share of the images that may be unreadable; they are named and left out "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--keep-copies",
        action="store_true",
        help="take in pictures that the index holds already, byte by byte, under another path",
    )
    parser.add_argument(
        "--workers",
        metavar="N",
        type=whole(0),
        help="processes that read images (default: one for each core)",
    )
    parser.add_argument(
        "--approximate",
        choices=APPROXIMATE,
        default="auto",
        help="make a graph, or bring it up to date, so that a search need not look at every image; "
        "auto: where that would take longer than 0.1 s per query (default: %(default)s)",
    )


# --- the commands ---------------------------------------------------------------------------------


def build(parser: argparse.ArgumentParser) -> None:
    """`search.py build`."""
    parser.add_argument("run", metavar="RUN", help="a run folder, or a checkpoint")
    parser.add_argument(
        "--images",
        metavar="PATH",
        nargs="+",
        action="extend",
        required=True,
        help="folders of any depth (the names of the folders in them are the labels), image files, "
        "and tables (.csv, .tsv) with a column path and, if you like, id and label",
    )
    parser.add_argument(
        "--index", metavar="FILE", type=file, required=True, help="the file to write"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an index of that name")
    parser.add_argument(
        "--codes",
        choices=CODES,
        default="none",
        help="search by short codes, a quarter (int8) or 1/32 (binary) of the memory, and score "
        "what they find exactly (default: %(default)s)",
    )
    parser.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="for a run that kept a running mean of its weights: the mean (ema, the default) or "
        "the weights themselves (raw)",
    )
    parser.add_argument(
        "--whiten",
        metavar="D",
        type=whole(1),
        nargs="?",
        const=0,
        help="PCA-whiten the embeddings to D numbers (without D: as many as vary), fitted on the "
        "run's training images; the run's thresholds do not hold for them (default: off)",
    )
    _taking_in(parser)
    device(parser)


def add(parser: argparse.ArgumentParser) -> None:
    """`search.py add`."""
    index(parser)
    parser.add_argument(
        "images", metavar="PATH", nargs="+", help="folders, image files and tables, as for build"
    )
    _taking_in(parser)
    network(parser)


def remove(parser: argparse.ArgumentParser) -> None:
    """`search.py remove`."""
    index(parser)
    parser.add_argument(
        "names", metavar="NAME", nargs="*", help="ids, image files, or folders for all below them"
    )
    parser.add_argument(
        "--missing", action="store_true", help="remove the images whose files are gone"
    )


def query(parser: argparse.ArgumentParser) -> None:
    """`search.py query`."""
    index(parser)
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
        help="leave out what is, byte by byte, the query itself",
    )
    parser.add_argument(
        "--query-expansion",
        metavar="K",
        type=number(0.0),
        nargs="+",
        help="search once more with the query moved towards its K nearest, which count with their "
        f"cosine to the power alpha: --query-expansion K [ALPHA] (default: off; alpha {ALPHA:g})",
    )
    parser.add_argument(
        "--rerank",
        metavar="N",
        type=number(0.0),
        nargs="*",
        help="put the 200 nearest in order by whose neighbours they are (k-reciprocal): "
        f"--rerank [K1 K2 LAMBDA] (default: off; {' '.join(f'{v:g}' for v in RERANKING)})",
    )
    written(parser)
    parser.add_argument("--picture", metavar="FILE", type=file, help="draw the answers, as PNG")
    exact(parser)
    network(parser)


def duplicates(parser: argparse.ArgumentParser) -> None:
    """`search.py duplicates`."""
    index(parser)
    parser.add_argument(
        "--above",
        metavar="S",
        type=number(-1.0, 1.0),
        default=ABOVE,
        help="the least cosine of a pair (default: %(default)s)",
    )
    parser.add_argument(
        "--top",
        metavar="N",
        type=whole(1),
        default=20,
        help="how many pairs are shown (default: %(default)s)",
    )
    written(parser)


def info(parser: argparse.ArgumentParser) -> None:
    """`search.py info`."""
    index(parser)
    written(parser)


def serve(parser: argparse.ArgumentParser) -> None:
    """`search.py serve`."""
    index(parser)
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
        type=_host_name,
        default=[],
        help="a further name that the page may be opened by, such as that of a proxy",
    )
    network(parser)


def _host_name(text: str) -> str:
    with contextlib.suppress(UnicodeError):
        name = text.encode("idna").decode()  # as browsers send it
        if re.fullmatch("[A-Za-z0-9._-]+", name):
            return name
    raise argparse.ArgumentTypeError(
        f"{text} is more than a name; give it without http://, port and path (shop.example)"
    )


def _port(text: str) -> int:
    value = whole(0)(text)
    if value > 65535:
        raise argparse.ArgumentTypeError(f"{value} is not a port; the last one is 65535")
    return value
