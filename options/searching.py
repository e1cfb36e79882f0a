"""The flags of search.py, command by command."""

from __future__ import annotations

import argparse
import contextlib
import re
from collections.abc import Sequence
from pathlib import Path

from dataset.decoding import need_picture, reason
from flags import COUNT, COUNT_OR_ZERO, SWITCH, Kind, any_text, number, one_of, whole
from machine import expanded
from net.choices import WEIGHTS, WEIGHTS_TEXT
from options.parser import file, take
from options.ranking import ALPHA, RERANKING
from storage import check_outputs, followed
from utils import InputError

CODES = ("none", "int8", "binary")
APPROXIMATE = ("auto", "yes", "no")
ABOVE = 0.95


def graph_of(index: Path) -> Path:
    """The path of an index's graph, which is beside it."""
    index = followed(index)
    return index.with_name(f"{index.name}.graph")


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


# fmt: off
def index(parser: argparse.ArgumentParser) -> None:
    """Adds the argument that names the index."""
    take(parser, "index", None, Kind(file, "INDEX"), "the file that build wrote")


def device(parser: argparse.ArgumentParser) -> None:
    """Adds the flag for where the network computes."""
    take(parser, "--device", None, one_of("cpu", "cuda"), "where the network computes",
         shown="the GPU where there is one")


def network(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for the network of an index."""
    take(parser, "--run", None, any_text("RUN"),
         "where the run of the index is now, if it has moved")
    device(parser)


def exact(parser: argparse.ArgumentParser) -> None:
    """Adds the flag that makes a search compare every vector."""
    take(parser, "--exact", False, SWITCH,
         "compare with every image, though the index has codes or a graph")


def written(parser: argparse.ArgumentParser) -> None:
    """Adds the flag for results as a file."""
    take(parser, "--json", None, Kind(file, "FILE"), "write it all as JSON")


def _taking_in(parser: argparse.ArgumentParser) -> None:
    """Adds the flags for adding images."""
    take(parser, "--max-bad-images", 0.1, Kind(number(0.0, 1.0), "F"),
         "the share of the images that may be unreadable; they are named and left out")
    take(parser, "--keep-copies", False, SWITCH,
         "take in pictures that the index holds already, byte by byte, under another path")
    take(parser, "--workers", None, COUNT_OR_ZERO, "processes that read images",
         shown="one for each core")
    take(parser, "--approximate", "auto", one_of(*APPROXIMATE),
         "make a graph, or bring it up to date, so that a search need not look at every image; "
         "auto: where that would take longer than 0.1 s per query")


# --- the commands ---------------------------------------------------------------------------------


def build(parser: argparse.ArgumentParser) -> None:
    """`search.py build`."""
    take(parser, "run", None, any_text("RUN"), "a run folder, or a checkpoint")
    take(parser, "--images", None, Kind(str, "PATH", nargs="+"),
         "folders of any depth (the names of the folders in them are the labels), image files, "
         "and tables (.csv, .tsv) with a column path and, if you like, id and label",
         action="extend", required=True)
    take(parser, "--index", None, Kind(file, "FILE"), "the file to write", required=True)
    take(parser, "--overwrite", False, SWITCH, "replace an index of that name")
    take(parser, "--codes", "none", one_of(*CODES),
         "search by short codes, a quarter (int8) or 1/32 (binary) of the memory, and score "
         "what they find exactly")
    take(parser, "--weights", None, one_of(*WEIGHTS), WEIGHTS_TEXT)
    take(parser, "--whiten", None, Kind(whole(1), "D", nargs="?", const=0),
         "PCA-whiten the embeddings to D numbers (without D: as many as vary), fitted on the "
         "run's training images; the run's thresholds do not hold for them", shown="off")
    _taking_in(parser)
    device(parser)


def add(parser: argparse.ArgumentParser) -> None:
    """`search.py add`."""
    index(parser)
    take(parser, "images", None, Kind(str, "PATH", nargs="+"),
         "folders, image files and tables, as for build")
    _taking_in(parser)
    network(parser)


def remove(parser: argparse.ArgumentParser) -> None:
    """`search.py remove`."""
    index(parser)
    take(parser, "names", None, Kind(str, "NAME", nargs="*"),
         "ids, image files, or folders for all below them")
    take(parser, "--missing", False, SWITCH, "remove the images whose files are gone")


def query(parser: argparse.ArgumentParser) -> None:
    """`search.py query`."""
    index(parser)
    take(parser, "images", None, Kind(expanded, "IMAGE", nargs="+"), "image files")
    take(parser, "--top", 10, COUNT, "how many are shown for each")
    take(parser, "--without-self", False, SWITCH,
         "leave out what is, byte by byte, the query itself")
    take(parser, "--query-expansion", None, Kind(number(0.0), "K", nargs="+"),
         "search once more with the query moved towards its K nearest, which count with their "
         "cosine to the power alpha: --query-expansion K [ALPHA]", shown=f"off; alpha {ALPHA:g}")
    take(parser, "--rerank", None, Kind(number(0.0), "N", nargs="*"),
         "put the 200 nearest in order by whose neighbours they are (k-reciprocal): "
         "--rerank [K1 K2 LAMBDA]", shown=f"off; {' '.join(f'{v:g}' for v in RERANKING)}")
    written(parser)
    take(parser, "--picture", None, Kind(file, "FILE"), "draw the answers, as PNG")
    exact(parser)
    network(parser)


def duplicates(parser: argparse.ArgumentParser) -> None:
    """`search.py duplicates`."""
    index(parser)
    take(parser, "--above", ABOVE, Kind(number(-1.0, 1.0), "S"), "the least cosine of a pair")
    take(parser, "--top", 20, COUNT, "how many pairs are shown")
    written(parser)


def info(parser: argparse.ArgumentParser) -> None:
    """`search.py info`."""
    index(parser)
    written(parser)


def serve(parser: argparse.ArgumentParser) -> None:
    """`search.py serve`."""
    index(parser)
    take(parser, "--port", 8000, Kind(_port, "N"),
         "where the page is on this machine; 0 is any free one")
    take(parser, "--host", "127.0.0.1", any_text("ADDRESS"),
         "the address to listen at; 0.0.0.0 lets every machine of the network search here, "
         "without a password", shown="127.0.0.1, this machine alone")
    take(parser, "--allow-host", [], Kind(_host_name, "NAME"),
         "a further name that the page may be opened by, such as that of a proxy",
         action="append")
    network(parser)
# fmt: on


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
