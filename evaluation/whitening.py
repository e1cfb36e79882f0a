"""Whitened embeddings: a network with a whitening fitted to its embeddings of training images.

The whitening is stored beside the checkpoint, in whitening.npz, together with the fingerprint of
what it belongs to. So it is still there when the training images are gone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import dataset
import processes
from devices import Precision
from evaluation.embedding import Viewing, embed_readable
from evaluation.networks import fingerprint_of
from metrics import whitening
from metrics.whitening import Whitening
from net import EmbeddingNet
from storage import load_arrays, save_arrays
from utils import InputError

logger = logging.getLogger("evaluate")

FILE = "whitening.npz"


class WhitenedNet(nn.Module):
    """A network with whitened test-time embeddings; everything else is the network's own.

    Its weights, and so its fingerprint, differ from those of the network alone.
    """

    def __init__(self, network: EmbeddingNet, white: Whitening, size: int) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", white.mean.float())
        self.register_buffer("projection", white.projection(size))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("network"), name)

    @property
    def test_size(self) -> int:
        """d of the test-time embeddings."""
        return len(self.projection)

    def forward(self, *arguments: Any, **more: Any) -> Any:
        """The outputs of the network itself."""
        return self.network(*arguments, **more)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → whitened test-time embeddings (B, D), of any length."""
        raw = self.network.embed(images).float()
        with torch.autocast(raw.device.type, enabled=False):
            unit = nn.functional.normalize(raw, dim=1)
            return (unit - self.mean) @ self.projection.T


@dataclass(frozen=True)
class Origin:
    """Where a network comes from, which decides how its whitening is fitted and where it is stored.

    Attributes:
        path: its checkpoint. data: its run's data. trained: the options of its training; empty for
            a released file, whose whitening is not stored.
    """

    path: Path
    data: dataset.Choice
    trained: dict[str, Any]

    @property
    def file(self) -> Path | None:
        """Where the whitening is stored."""
        return self.path.parent / FILE if self.trained else None


def whitened(
    network: EmbeddingNet, origin: Origin, viewing: Viewing, precision: Precision, size: int = 0
) -> WhitenedNet:
    """The network with embeddings whitened to `size` dimensions; 0 is as many as vary.

    Raises:
        InputError: there are neither training images nor a stored whitening, or `size` is too
            large.
    """
    belongs = _belongs(network, viewing)
    found = processes.from_main(lambda: _kept(origin, belongs))
    if found is None:
        found = _fitted(network, origin, viewing, precision)
        processes.from_main(lambda: _keep(origin, belongs, found))
    try:
        made = WhitenedNet(network, found, size or len(found.axes))
    except ValueError as error:
        raise InputError(f"--whiten {size}: {error}") from error
    return made.to(precision.device)


def _belongs(network: EmbeddingNet, viewing: Viewing) -> str:
    """Identifies what a whitening belongs to: the weights, and how images are prepared."""
    return f"{fingerprint_of(network)} {viewing.image_size} {viewing.zoom:g} {viewing.resize}"


def _kept(origin: Origin, belongs: str) -> Whitening | None:
    """The stored whitening of this network; None if there is none."""
    if origin.file is None or not origin.file.is_file():
        return None
    arrays = load_arrays(origin.file, "the whitening")
    names = ("mean", "axes", "variances")
    if not {"belongs", *names} <= arrays.keys() or str(arrays["belongs"]) != belongs:
        return None
    return Whitening(*(torch.from_numpy(arrays[name]) for name in names))


def _fitted(
    network: EmbeddingNet, origin: Origin, viewing: Viewing, precision: Precision
) -> Whitening:
    try:
        images = origin.data.load("train")
        dataset.require_files(None, [images])
    except InputError as error:
        raise InputError(f"--whiten is fitted on the training images: {error}") from error
    images, embeddings = embed_readable(
        network, images, precision, viewing, title="training images"
    )
    logger.info("whitening fitted on %d training images", len(images))
    try:
        return whitening.fit(embeddings)
    except ValueError as error:
        raise InputError(f"--whiten: {error}") from error


def _keep(origin: Origin, belongs: str, found: Whitening) -> None:
    if origin.file is None:
        return
    content = {name: value.numpy() for name, value in found._asdict().items()}
    try:
        save_arrays(origin.file, {**content, "belongs": np.array(belongs)})
    except InputError as error:
        logger.warning("%s; the whitening is fitted again next time", error)
