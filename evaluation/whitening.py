"""Whitened embeddings: a network with a whitening fitted to its embeddings of training images.

The whitening is stored next to the checkpoint, in whitening.npz, with a fingerprint of what it
belongs to, so that it can be used when the training images are gone. Embeddings that are cut short
have their own file, whitening_D.npz. For a network that flags have changed (--head, --pooling, …),
or show other pixels (--image-size, …), the whitening is fitted each time.
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
from evaluation.networks import Opened, fingerprint_of
from metrics import whitening
from metrics.whitening import Whitening
from net import EmbeddingNet
from storage import load_arrays, save_arrays
from utils import InputError

logger = logging.getLogger("evaluate")


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
        path: its checkpoint. data: its run's own data, whatever is evaluated. kept: whether the
            whitening is stored; not for a released file, nor for a network that flags have changed.
    """

    path: Path
    data: dataset.Choice
    kept: bool

    @classmethod
    def of(cls, opened: Opened) -> Origin:
        """The origin of an opened network."""
        kept = bool(opened.trained) and not opened.network.changed
        return cls(opened.path, opened.training_data, kept)

    def file(self, network: EmbeddingNet) -> Path | None:
        """Where the whitening of the network's embeddings is stored."""
        if not self.kept:
            return None
        cut = f"_{network.test_size}" if network.is_cut else ""
        return self.path.parent / f"whitening{cut}.npz"


def whitened(
    network: EmbeddingNet, origin: Origin, viewing: Viewing, precision: Precision, size: int = 0
) -> WhitenedNet:
    """The network with embeddings whitened to `size` dimensions; 0 is as many as vary.

    Raises:
        InputError: there are neither training images nor a stored whitening, or `size` is too
            large.
    """
    file = origin.file(network)
    # What a whitening belongs to: the weights, and how images are prepared.
    look = f"{viewing.image_size} {viewing.zoom:g} {viewing.resize}"
    belongs = f"{fingerprint_of(network)} {look}"
    found = processes.from_main(lambda: _kept(file, belongs, network.test_size))
    if found is None:
        found = _fitted(network, origin, viewing, precision)
        processes.from_main(lambda: _keep(file, belongs, found))
    try:
        made = WhitenedNet(network, found, size or len(found.axes))
    except ValueError as error:
        raise InputError(str(error)) from error
    return made.to(precision.device)


def _kept(file: Path | None, belongs: str, size: int) -> Whitening | None:
    """The stored whitening of so many dimensions for this network; None if there is none."""
    if file is None or not file.is_file():
        return None
    arrays = load_arrays(file, "the whitening")
    names = ("mean", "axes", "variances")
    if not {"belongs", *names} <= arrays.keys() or str(arrays["belongs"]) != belongs:
        return None
    if arrays["mean"].shape != (size,):  # older versions kept that of cut embeddings in its place
        return None
    return Whitening(*(torch.from_numpy(arrays[name]) for name in names))


def _fitted(
    network: EmbeddingNet, origin: Origin, viewing: Viewing, precision: Precision
) -> Whitening:
    try:
        images = origin.data.load("train")
        dataset.require_files(None, [images])
    except InputError as error:
        raise InputError(f"a whitening is fitted on the training images: {error}") from error
    images, embeddings = embed_readable(
        network, images, precision, viewing, title="training images"
    )
    logger.info("whitening fitted on %d training images", len(images))
    try:
        return whitening.fit(embeddings)
    except ValueError as error:
        raise InputError(f"whitening: {error}") from error


def _keep(file: Path | None, belongs: str, found: Whitening) -> None:
    if file is None:
        return
    content = {name: value.numpy() for name, value in found._asdict().items()}
    try:
        save_arrays(file, {**content, "belongs": np.array(belongs)})
    except InputError as error:
        logger.warning("%s; the whitening is fitted again next time", error)
