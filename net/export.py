"""A network as one file that runs without this repository: ONNX, torch.export or TorchScript.

The graph maps pixels to unit vectors. It includes the colour order, scale, mean and deviation of
`InputSpec` and the evaluation's zoom, so its users need none of these constants. It does not
include decoding and cropping pictures (`describe_input`).
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from net import EmbeddingNet
from net.peft import merge_lora
from storage import write_content
from utils import InputError, first_line, installing

TOLERANCE = 1e-4
"""The largest difference allowed in an entry of a unit embedding from an exported file."""
CHECKED_BATCHES = (1, 2, 5)
_INPUT, _OUTPUT = "images", "embeddings"
Run = Callable[[Tensor], Tensor]


class Graph(nn.Module):
    """Pixels (B, 3, S, S) float32, RGB, 0..255 → unit-length test-time embeddings (B, d) float32.

    Args:
        network: is put into evaluation mode, and LoRA is merged into its weights.
        size: S in pixels.
        zoom: below 1, pictures are made smaller, on white, as with `--eval-zoom`.
    """

    def __init__(self, network: EmbeddingNet, size: int, zoom: float = 1.0) -> None:
        super().__init__()
        merge_lora(network)
        self.network = network
        self.size = size
        spec = network.input
        mean, std = (torch.tensor(each, dtype=torch.float64) for each in (spec.mean, spec.std))
        self.register_buffer("gain", (spec.scale / 255 / std).float()[:, None, None])
        self.register_buffer("shift", (-mean / std).float()[:, None, None])
        self.register_buffer("grid", None if zoom == 1.0 else _zoom_grid(size, zoom))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, S, S) → (B, d)."""
        if self.grid is not None:
            grid = self.grid.expand(images.shape[0], -1, -1, -1)
            images = 255.0 - F.grid_sample(255.0 - images, grid, align_corners=False)
        if self.network.input.color == "BGR":
            images = images.flip(1)
        return F.normalize(self.network.embed(images * self.gain + self.shift), dim=1)


def _zoom_grid(size: int, zoom: float) -> Tensor:
    # A constant: if it were computed in the graph, tracing would fix the batch size.
    scaling = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]]) / zoom
    return F.affine_grid(scaling, [1, 3, size, size], align_corners=False)


def describe_input(
    size: int, resize: int | None, *, cubic: bool = False, upright: bool = True
) -> str:
    """The input that the graph expects, in words.

    Args:
        resize: the short side before cropping; None takes whole pictures.
        cubic: whether resizing is bicubic. upright: whether EXIF orientation is applied.
    """
    if resize is None:
        cut = f"the whole picture, made square on white, {size} pixels a side"
    else:
        how = "bicubic" if cubic else "bilinear"
        cut = f"short side to {resize} pixels ({how}, antialiased), then the central {size}"
    turned = "turned as their EXIF data say" if upright else "as stored, EXIF data ignored"
    seen = f"pictures {turned}, transparency laid on white"
    return f"float32 (B, 3, {size}, {size}), RGB, 0..255: {seen}; {cut}"


# --- files ----------------------------------------------------------------------------------------


def export_onnx(graph: Graph, path: Path, note: str = "") -> float:
    """Write an ONNX file with free batch size, if onnxruntime agrees with torch.

    Args:
        note: describes the input; becomes the model's metadata `input`.

    Returns:
        The largest difference of an entry of an embedding.

    Raises:
        InputError: a package is missing or too old, onnxruntime disagrees, or the file cannot be
                written.
    """
    runtime = _needed("onnx", "onnxscript", "onnxruntime")[-1]
    with _quiet(), torch.no_grad():
        try:
            program = torch.onnx.export(
                graph,
                (_sample(graph, 2),),
                input_names=[_INPUT],
                output_names=[_OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
        except ImportError as error:  # torch needs something that this version does not have
            raise InputError(
                f"--onnx: the installed onnxscript does not go with torch {torch.__version__} "
                f"({first_line(error)}); {installing('--upgrade', 'onnxscript')}"
            ) from error
    program.model.metadata_props["input"] = note
    content = program.model_proto.SerializeToString()
    session = runtime.InferenceSession(content, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run([_OUTPUT], {_INPUT: images.numpy()})[0])

    return write_checked(graph, run, content, path, "onnxruntime")


def export_program(graph: Graph, path: Path, note: str = "") -> float:
    """Write a program of torch.export with free batch size, if it agrees with the network.

    `torch.export.load(path).module()` is the network.

    Args:
        note: describes the input; becomes the extra file `input`.

    Returns:
        The largest difference of an entry of an embedding.

    Raises:
        InputError: the program disagrees, or the file cannot be written.
    """
    shapes = {"images": {0: torch.export.Dim("batch")}}
    buffer = io.BytesIO()
    with _quiet(), torch.no_grad():
        program = torch.export.export(graph, (_sample(graph, 2),), dynamic_shapes=shapes)
        torch.export.save(program, buffer, extra_files={"input": note})
        buffer.seek(0)
        loaded = torch.export.load(buffer).module()
        return write_checked(graph, loaded, buffer.getvalue(), path, "torch.export")


def export_torchscript(graph: Graph, path: Path) -> float:
    """Write a traced TorchScript file with free batch size, if it agrees with the network.

    Returns:
        The largest difference of an entry of an embedding.

    Raises:
        InputError: the traced network disagrees, or the file cannot be written.
    """
    buffer = io.BytesIO()
    with _quiet(), torch.no_grad():
        torch.jit.save(torch.jit.trace(graph, _sample(graph, 2), check_trace=False), buffer)
        buffer.seek(0)
        loaded = torch.jit.load(buffer)
    return write_checked(graph, loaded, buffer.getvalue(), path, "TorchScript")


def _needed(*packages: str) -> list:
    missing = []
    modules = []
    for name in packages:
        try:
            modules.append(importlib.import_module(name))
        except ImportError:
            missing.append(name)
    if missing:
        raise InputError(
            f"--onnx needs {', '.join(missing)}, not installed here; {installing(*missing)}"
        )
    return modules


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide the exporters' messages about their internals."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        # onnxscript prints to stdout, which is for the output of the command.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# --- the check ------------------------------------------------------------------------------------


def _sample(graph: Graph, count: int) -> Tensor:
    """Coloured blobs (count, 3, S, S); noise would give similar embeddings for all images."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand(count, 3, 4, 4, generator=generator) * 255
    return F.interpolate(coarse, (graph.size, graph.size), mode="bilinear")


def write_checked(graph: Graph, run: Run, content: bytes, path: Path, who: str) -> float:
    """Write `content` if its outputs agree with the graph's; returns the largest difference.

    Raises:
        InputError: it disagrees, or the file cannot be written.
    """
    difference = largest_difference(graph, run)
    if not difference <= TOLERANCE:  # NaN too
        raise InputError(
            f"{who} and torch differ by {difference:.1e} in an entry of an embedding, more than "
            f"{TOLERANCE:.0e}; {path} was not written: report this with the versions of both"
        )
    write_content(path, content)
    return difference


@torch.no_grad()
def largest_difference(graph: Graph, run: Run) -> float:
    """The largest difference between entries of the two's embeddings, for several batch sizes."""
    batches = [_sample(graph, count) for count in CHECKED_BATCHES]
    return max(float((run(images) - graph(images)).abs().max()) for images in batches)
