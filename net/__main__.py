"""`python -m net export RUN --onnx FILE` writes a trained network for use elsewhere.

A command, so it stands above evaluate.py like train.py does; nothing imports it.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import door
from machine import expanded
from net.choices import WEIGHTS
from terminal import Wait, fitted, say, told
from utils import InputError, sentence_errors


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m net", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser(
        "export",
        help="write a network as ONNX or TorchScript",
        description="The file takes float32 pixels (B, 3, S, S), RGB, 0..255, and gives embeddings "
        "(B, d) of unit length; normalisation is part of it, and B is free. It is compared with "
        "the network before it is written.",
    )
    export.add_argument("run", metavar="RUN", help="a run folder, or a checkpoint")
    export.add_argument("--onnx", metavar="FILE", type=_file, help="checked with onnxruntime")
    export.add_argument("--torchscript", metavar="FILE", type=_file, help="traced")
    export.add_argument(
        "--weights",
        choices=WEIGHTS,
        help="of a run that kept a running mean of its weights: the mean (ema, the default) or the "
        "weights themselves (raw)",
    )
    return parser


def _file(text: str) -> Path:
    return Path(expanded(text))


def export(args: argparse.Namespace) -> None:
    """Writes the files that are asked for, and prints what they take and how well they agree."""
    if not (args.onnx or args.torchscript):
        raise InputError("nothing to write; give --onnx FILE, --torchscript FILE or both")
    # Not before, so that --help and a typing error answer at once.
    loading = Wait("loading PyTorch")
    from evaluation.inference import open_model
    from net.export import Graph, describe_input, export_onnx, export_torchscript

    model = open_model(args.run, args.weights)
    loading.over()
    graph = Graph(model.network, model.viewing.image_size, model.viewing.zoom)
    cubic = model.network.input.cubic
    note = describe_input(graph.size, model.resize, cubic=cubic, upright=model.upright)
    say(
        fitted(f"input   {note}", " " * 8)
        + f"\noutput  float32 (B, {model.network.test_size}), unit length"
    )
    if args.onnx:
        with told("writing ONNX, and comparing it with the network"):
            difference = export_onnx(graph, args.onnx, note)
        say(f"{args.onnx}: onnxruntime and torch differ by at most {difference:.1e}")
    if args.torchscript:
        with told("writing TorchScript, and comparing it with the network"):
            difference = export_torchscript(graph, args.torchscript)
        say(f"{args.torchscript}: TorchScript and torch differ by at most {difference:.1e}")


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
