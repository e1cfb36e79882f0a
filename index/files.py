"""Embeddings and checksums of image files."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from dataset.base import ImageSet, PathTable
from evaluation.embedding import embed, unit_length
from evaluation.files import on_white
from evaluation.inference import Embedder
from index.form import CONTENT_SIZE
from machine import cores


@dataclass(frozen=True, eq=False, repr=False)
class _Files(ImageSet):
    """Image files; if `square` is set, each is fitted whole into that many pixels, on white."""

    square: int | None = None

    def read(self, index: int) -> np.ndarray:
        pixels = super().read(index)
        return pixels if self.square is None else on_white(pixels, self.square, self.square)


def embedded(
    embedder: Embedder, paths: Sequence[str], workers: int | None = None, title: str = "embedding"
) -> tuple[np.ndarray, np.ndarray]:
    """Unit-length embeddings (N, d) of image files, and which could be read, (N,) bool.

    Args:
        workers: number of processes that read files; None: one per core.

    Raises:
        InputError: an embedding is not finite.
    """
    model = embedder.model
    images = _Files(
        name="images",
        split="gallery",
        labels=np.zeros(len(paths), np.int64),
        class_names=("unknown",),
        paths=PathTable(paths),
        upright=model.upright,
        square=model.square,
    )
    workers = cores() if workers is None else workers
    viewing = replace(
        model.viewing,
        workers=min(workers, -(-len(paths) // model.viewing.batch_size)),
        resize=model.viewing.resize if model.square is None else model.viewing.image_size,
        max_bad_images=1.0,
    )
    raw, readable = embed(model.network, images, embedder.precision, viewing, title=title)
    return unit_length(raw, readable), readable.cpu().numpy()


def content_of(source: str | os.PathLike[str] | bytes) -> bytes:
    """The checksum of a file, given by its path or its bytes."""
    found = hashlib.blake2b(digest_size=CONTENT_SIZE)
    with io.BytesIO(source) if isinstance(source, bytes) else Path(source).open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.digest()
