"""`python -m net export RUN --onnx FILE` writes a trained network for use elsewhere.

It is a command, in the same layer as train.py; nothing imports it.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import door
from flags import SWITCH, Kind, any_text, one_of
from net.choices import WEIGHTS, WEIGHTS_TEXT
from options.parser import Parser, file, take
from storage import check_outputs
from terminal import Wait, fitted, notice_if_slow, say
from utils import InputError, program, sentence_errors

if TYPE_CHECKING:
    from evaluation.inference import Model
    from evaluation.networks import Opened
    from sharing.card import Card


class Form(NamedTuple):
    """A file format for the network as a graph from pixels to embeddings.

    Attributes:
        about: the text in --help. title: its name while it is written.
        runs_in: the runtime whose outputs are compared with torch's.
        remark: printed after the file is written.
    """

    about: str
    title: str
    runs_in: str
    remark: str = ""


GRAPHS = {
    "onnx": Form("ONNX, checked with onnxruntime", "ONNX", "onnxruntime"),
    "torch_export": Form(
        "a program of torch.export, for torch without this repository (FILE.pt2)",
        "torch.export's program",
        "torch.export",
    ),
    "torchscript": Form(
        "TorchScript, traced; PyTorch has deprecated it, so use --torch-export for new work",
        "TorchScript",
        "TorchScript",
        "; PyTorch has deprecated TorchScript, --torch-export comes after it",
    ),
}
FILE = Kind(file, "FILE")
OTHERS = ("safetensors", "card", "push_to_hub")


def _parser() -> argparse.ArgumentParser:
    name = program("export").removesuffix(" export")
    parser = Parser(prog=name, description="Write a trained network for use elsewhere.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    export = commands.add_parser(
        "export",
        help="write a network for use elsewhere, a model card, or to the Hugging Face hub",
        description="Write the best network of a run, or that of a checkpoint.",
    )
    take(export, "run", None, any_text("RUN"), "a run folder, or a checkpoint")
    take(export, "--weights", None, one_of(*WEIGHTS), WEIGHTS_TEXT)
    _declare_graphs(export)
    _declare_shared(export)
    return parser


def _declare_graphs(export: argparse.ArgumentParser) -> None:
    graphs = export.add_argument_group(
        "as a graph",
        "It takes float32 pixels (B, 3, S, S), RGB, 0..255, and gives embeddings (B, d) of unit "
        "length; normalisation is part of it, and B is free. It is compared with the network "
        "before it is written.",
    )
    for name, form in GRAPHS.items():
        take(graphs, _flag(name), None, FILE, form.about)


# fmt: off
def _declare_shared(export: argparse.ArgumentParser) -> None:
    shared = export.add_argument_group("to be shared")
    take(shared, "--safetensors", None, FILE,
         "the weights and what describes the network, for load_run and evaluation")
    take(shared, "--card", None, FILE,
         "a model card, written from the run folder: data, metrics, limits, licences, how to load, "
         "what to cite")
    take(shared, "--push-to-hub", None, any_text("USER/NAME"),
         "upload weights, card and results to the Hugging Face hub")
    take(shared, "--private", False, SWITCH, "make the repository on the hub private")
    take(shared, "--licence", None, any_text("NAME"),
         "of the weights, for the card: apache-2.0, cc-by-nc-4.0, …; without it the card says that "
         "none was given")
    take(shared, "--numbers", None, FILE,
         "for the card: a file of an evaluation with --bootstrap 1000 --json FILE, whose intervals "
         "it takes")
# fmt: on


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def export(args: argparse.Namespace) -> None:
    """Writes the files, and prints what input a graph takes and how well it agrees with torch.

    Raises:
        InputError: no file is given, flags cannot be combined, or a file cannot be made.
    """
    _check(args)
    # Only now, so that --help and errors in flags are printed at once.
    loading = Wait("loading PyTorch")
    from evaluation.inference import open_model

    model = open_model(args.run, args.weights)
    loading.over()
    if any(getattr(args, name) for name in OTHERS):
        share(args, model)
    if any(getattr(args, name) for name in GRAPHS):
        write_graphs(args, model)


def _check(args: argparse.Namespace) -> None:
    if not any(getattr(args, name) for name in (*GRAPHS, *OTHERS)):
        wanted = [f"{_flag(name)} FILE" for name in (*GRAPHS, *OTHERS) if name != "push_to_hub"]
        raise InputError(
            f"nothing to write; give {', '.join(wanted)} or --push-to-hub USER/NAME, or several"
        )
    for name in ("licence", "numbers"):
        if getattr(args, name) and not (args.card or args.push_to_hub):
            raise InputError(
                f"--{name} is for the model card; give --card FILE too, or leave it out"
            )
    if args.private and not args.push_to_hub:
        raise InputError("--private is for --push-to-hub USER/NAME; leave it out")
    from runs import files_of

    run = file(args.run)
    kept = [run, *files_of(run if run.is_dir() else run.parent), *filter(None, [args.numbers])]
    asked = {_flag(name): getattr(args, name) for name in (*GRAPHS, "safetensors", "card")}
    check_outputs(asked, kept)
    if args.card and args.card.is_file() and not _is_card(args.card):
        raise InputError(
            f"--card {args.card}: this file exists, is not a model card of ours, and would be "
            "lost; name another one, such as card.md"
        )
    if args.safetensors and args.safetensors.suffix != ".safetensors":
        raise InputError(
            f"--safetensors {args.safetensors}: load_run knows such a file by its ending; call it "
            f"{args.safetensors.with_suffix('.safetensors').name}"
        )


def _is_card(path: Path) -> bool:
    """Whether a file begins like our model cards, and is not, say, a README.md of the user's."""
    with path.open("rb") as card:
        head = card.read(4096)
    return re.search(rb'^library_name: "?anchorage"?$', head, re.MULTILINE) is not None


# --- to be shared ---------------------------------------------------------------------------------


def share(args: argparse.Namespace, model: Model) -> None:
    """Write weights and card, and upload them; before any graph, which merges LoRA's weights."""
    from evaluation.networks import open_checkpoint
    from net import hub
    from sharing.bundle import write_bundle, write_card, write_weights
    from sharing.card import check_measured

    if args.push_to_hub:
        hub.check_name(args.push_to_hub)
    opened = open_checkpoint(args.run, weights=args.weights)
    if args.card or args.push_to_hub:
        check_measured(opened)
    if args.safetensors:
        write_weights(opened, args.safetensors)
        say(f"{args.safetensors}: load_run({str(args.safetensors)!r}) loads it")
    if args.card:
        # Only the name: the card should not show folders of this machine.
        shown = (args.safetensors or file(args.run)).resolve().name
        write_card(_card(args, model, opened, shown), args.card)
        say(f"{args.card}: the model card")
    if args.push_to_hub:
        name = args.push_to_hub
        card = _card(args, model, opened, f"{hub.PREFIX}{name}")
        # What has arrived there has arrived, whether or not the files here can be removed.
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            write_bundle(opened, card, Path(folder))
            words = f"{card.record.method} on {card.data}, by Anchorage"
            address = hub.upload(Path(folder), name, private=args.private, message=words)
        say(f"{address}: load_run('{hub.PREFIX}{name}') loads it")


def _card(args: argparse.Namespace, model: Model, opened: Opened, source: str) -> Card:
    from sharing.card import card_of

    name = args.push_to_hub.partition("/")[2] if args.push_to_hub else None
    return card_of(
        opened.path.parent, model, source, name=name, licence=args.licence, numbers=args.numbers
    )


# --- as a graph -----------------------------------------------------------------------------------


def write_graphs(args: argparse.Namespace, model: Model) -> None:
    """Write the network as a graph from pixels to embeddings, in the formats that were given."""
    from net.export import Graph, describe_input, export_onnx, export_program, export_torchscript

    graph = Graph(model.network, model.viewing.image_size, model.viewing.zoom)
    cubic = model.network.input.cubic
    note = describe_input(graph.size, model.resize, cubic=cubic, upright=model.upright)
    say(
        fitted(f"input   {note}", " " * 8)
        + f"\noutput  float32 (B, {model.network.test_size}), unit length"
    )
    writers = {
        "onnx": partial(export_onnx, note=note),
        "torch_export": partial(export_program, note=note),
        "torchscript": export_torchscript,
    }
    for name, form in GRAPHS.items():
        if path := getattr(args, name):
            with notice_if_slow(f"writing {form.title}, and comparing it with the network"):
                difference = writers[name](graph, path)
            agreed = f"{form.runs_in} and torch differ by at most {difference:.1e}"
            say(fitted(f"{path}: {agreed}{form.remark}", "  "))


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command.

    Raises:
        SystemExit: with status 2 and one sentence for bad input, 0 for --help.
    """
    args = _parser().parse_args(argv)
    with sentence_errors(), door.answering():
        export(args)


if __name__ == "__main__":
    door.enter()
    main()
