"""A run as a function from pictures to embeddings.

    from net import load_run
    embed = load_run("logs/demo")
    embeddings = embed(["one.jpg", "two.png"])  # (2, d), unit length
    embed.compare("one.jpg", "two.png")         # Comparison(cosine=0.83, verdict='same')

Pictures are prepared as evaluate.py prepares the run's evaluation images. (Deviation: files are
always decoded as with `--decode exact`.)
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image

import dataset
from dataset.base import ImageSet, PathTable, decode, reason, to_rgb
from dataset.emoji import Emoji
from dataset.reading import FROM_FILES
from devices import Precision, device_named, pick_device
from evaluation.embedding import Viewing, embed, unit_length
from evaluation.files import on_white
from evaluation.networks import Opened, open_checkpoint
from evaluation.thresholds import Thresholds, Verdict, thresholds_of
from evaluation.whitening import Origin, whitened
from utils import InputError

if TYPE_CHECKING:
    from net import EmbeddingNet

Picture = str | os.PathLike[str] | Image.Image | np.ndarray | BinaryIO | bytes


@dataclass(frozen=True)
class Model:
    """The network of a run, and how pictures are prepared for it.

    Attributes:
        square: if the run's data set has drawings, their side in pixels: pictures are fitted whole
            into such a square, on white. None: pictures are resized and cropped.
        upright: whether the EXIF orientation of pictures is applied, as in the run.
        origin: the checkpoint, and its run's data.
        trained_on: its training data, if its file describes them.
    """

    network: EmbeddingNet
    viewing: Viewing
    square: int | None
    upright: bool
    origin: Origin
    trained_on: dataset.TrainedOn | None = None

    @property
    def path(self) -> Path:
        """The checkpoint."""
        return self.origin.path

    @property
    def resize(self) -> int | None:
        """The short side that pictures are resized to; None if they are fitted whole."""
        return None if self.square is not None else self.viewing.short_side(self.network.input)


def open_model(path: str | Path, weights: str | None = None) -> Model:
    """The network of a run, a folder or a file, as `networks.open_checkpoint` finds it.

    Args:
        weights: see `net.with_weights`.

    Raises:
        InputError: there is no network at `path`, or it cannot be used.
    """
    opened = open_checkpoint(path, weights=weights)
    known = opened.trained_on
    square = _square_of_older(opened) if known is None else known.square
    viewing = replace(opened.viewing, workers=0, reading=FROM_FILES)
    upright = opened.data.exif == "apply"
    return Model(opened.network.eval(), viewing, square, upright, Origin.of(opened), known)


class Comparison(NamedTuple):
    """The cosine of two pictures, and the verdict of the run's thresholds."""

    cosine: float
    verdict: Verdict


def _square_of_older(opened: Opened) -> int | None:
    """`Model.square` for an older checkpoint that does not say it, by its data set's name."""
    drawn = bool(opened.trained) and isinstance(dataset.find(opened.data.name), Emoji)
    return opened.data.protocol.image_size if drawn else None


class Embedder:
    """Pictures → unit-length test-time embeddings; `load_run` makes one.

    Attributes:
        model: the network, and how pictures are prepared for it.
    """

    def __init__(self, model: Model, precision: Precision) -> None:
        self.model = model
        self.precision = precision
        model.network.to(precision.device, memory_format=precision.memory_format)

    def __call__(self, pictures: Picture | Sequence[Picture]) -> np.ndarray:
        """Pictures, one or several → (N, d) float32, unit length; a single one gives (1, d).

        A picture is a file's path, a Pillow image, an array (H, W, 3) or grey (H, W) of uint8, an
        open file or `BytesIO`, or the bytes of a file; an array (N, H, W, 3) is N of them. Pictures
        become RGB as in `dataset.base.decode`, upright unless the run had `--exif ignore`.

        Raises:
            InputError: a file is missing or no picture; the message names it, but quotes no pixels.
                Or the network returns NaN, because its training has diverged.
        """
        pictures = [pictures] if _is_one(pictures) else list(pictures)
        if not pictures:
            return np.empty((0, self.model.network.test_size), np.float32)
        images = _image_set(pictures, self.model.square, self.model.upright)
        return unit_length(*embed(self.model.network, images, self.precision, self.model.viewing))

    def __repr__(self) -> str:
        network = self.model.network
        what = f"{network.architecture.model}, {network.test_size} numbers each"
        return f"Embedder({self.model.path}: {what}, on {self.precision.device})"

    @cached_property
    def thresholds(self) -> Thresholds | None:
        """The thresholds that the run measured for this network; None if it measured none.

        There are none for embeddings that are cut short (`dims`).

        Raises:
            InputError: the run's results.json is damaged.
        """
        if self.model.network.is_cut:
            return None
        return thresholds_of(self.model.path, self.model.network)

    def compare(self, a: Picture, b: Picture) -> Comparison:
        """Whether two pictures show the same class: their cosine, and the thresholds' verdict.

        Raises:
            InputError: a picture cannot be read, or there are no thresholds for this network.
        """
        if self.thresholds is None:
            raise InputError(
                f"no thresholds were measured for {self.model.origin.path}, so two pictures cannot "
                "be called the same or different; compare their embeddings, or load the best "
                "checkpoint of a run that has ended"
            )
        x, y = self([a, b]).astype(np.float64)
        cosine = float(np.clip(x @ y, -1, 1))  # the lengths are 1, except for rounding
        return Comparison(cosine, self.thresholds.verdict(cosine))


def load_run(
    path: str | Path,
    *,
    device: str | torch.device | None = None,
    amp: str = "auto",
    weights: str | None = None,
    whiten: int | None = None,
    dims: int | None = None,
) -> Embedder:
    """Loads a run as a function from pictures to embeddings.

    Args:
        path: a run folder (its best checkpoint is taken), or a checkpoint of a run or released.
        device: None is the GPU if there is one. amp: as evaluate.py's --amp.
        weights: `ema` or `raw`, if the run kept a running mean of its weights (--ema); None is the
            mean if there is one.
        dims: the number of first entries of the embeddings to keep, for a run with --matryoshka;
            None is all of them.
        whiten: the number of dimensions to PCA-whiten the embeddings to; 0 is as many as vary in
            the run's training images; see evaluation/whitening.py. A run's thresholds are for
            embeddings that are not whitened.

    Raises:
        InputError: there is no usable checkpoint at `path`, its embeddings have fewer entries, the
            data for whitening are missing, or this machine has no such device or precision.
    """
    device = pick_device(0) if device is None else device_named(device)
    model, precision = open_model(path, weights), Precision(amp, device)
    model.network.keep(dims)
    if whiten is not None:
        model.network.to(device)
        looked = replace(model.viewing, workers=0)
        network = whitened(model.network, model.origin, looked, precision, whiten)
        model = replace(model, network=network)
    return Embedder(model, precision)


# --- pictures -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False, repr=False)
class _Given(ImageSet):
    """Pictures as an image set; each is read when it is needed."""

    pictures: Sequence[Picture] = ()

    def read(self, index: int) -> np.ndarray:
        return _pixels(self.pictures[index], index, self.upright)


def _image_set(pictures: list[Picture], square: int | None, upright: bool) -> ImageSet:
    pixels = None
    if square is not None:
        given = (_pixels(each, index, upright) for index, each in enumerate(pictures))
        pixels = np.stack([on_white(each, square, square) for each in given])
    return _Given(
        name="pictures",
        split="query",
        labels=np.zeros(len(pictures), np.int64),
        class_names=("unknown",),
        paths=PathTable("" for _ in pictures),
        pixels=pixels,
        upright=upright,
        pictures=pictures,
    )


def _is_one(pictures: Picture | Sequence[Picture]) -> bool:
    """Whether this is a single picture."""
    if isinstance(pictures, np.ndarray):
        return pictures.ndim < 4
    one = isinstance(pictures, (str, bytes, os.PathLike, Image.Image))
    return one or hasattr(pictures, "read")


def _pixels(picture: Picture, index: int, upright: bool) -> np.ndarray:
    """(H, W, 3) uint8 RGB of picture number `index`; InputError if it cannot be read."""
    try:
        if isinstance(picture, Image.Image):
            # A copy, because turning it upright would change the caller's picture.
            return to_rgb(picture.copy(), upright)
        if isinstance(picture, np.ndarray):
            return to_rgb(_from_array(picture))
        if isinstance(picture, bytes):
            picture = io.BytesIO(picture)
        if hasattr(picture, "read"):
            picture.seek(0)  # a file that was just written is at its end
        elif not isinstance(picture, (str, os.PathLike)):
            raise TypeError(f"it is a {type(picture).__name__}")
        return decode(picture, upright)
    except Exception as error:  # Pillow raises a dozen unrelated types for damaged files
        wanted = "image files, their bytes, Pillow images, or arrays (H, W, 3) of uint8, RGB"
        if isinstance(picture, (str, os.PathLike)):
            wanted = "another image file"
        said = f"{_called(picture, index)} cannot be read ({reason(error)}); give {wanted}"
        raise InputError(said) from error


def _from_array(pixels: np.ndarray) -> Image.Image:
    known = pixels.ndim in (2, 3) and pixels.shape[2:] in ((), (1,), (3,), (4,))
    if pixels.dtype != np.uint8 or not known:
        raise TypeError(f"it is an array of shape {pixels.shape} and type {pixels.dtype}")
    if 0 in pixels.shape:
        raise ValueError("it has no pixels")
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def _called(picture: object, index: int) -> str:
    if isinstance(picture, (str, os.PathLike)):
        return os.fspath(picture)
    return f"picture {index + 1}"
