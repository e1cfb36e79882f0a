"""Embeds images for evaluation, and finds nearest neighbours."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

import metrics
import processes
from bars import Bar
from dataset.base import ImageSet
from dataset.loader import eval_loader
from dataset.reading import FROM_FILES, Reading
from dataset.workers import worker_deaths_in_words
from devices import Precision
from evaluation.tasks import Task
from flags import Options
from utils import InputError, counted

if TYPE_CHECKING:
    from net import EmbeddingNet, InputSpec

SEARCHED_AT_ONCE = 256  # queries; more would make large blocks of similarities

# --- from images to embeddings --------------------------------------------------------------------


@dataclass(frozen=True)
class Viewing:
    """How evaluation looks at images: see the flags of the same names."""

    batch_size: int
    workers: int
    image_size: int
    zoom: float = 1.0
    resize: int | None = None
    max_bad_images: float = 0.0
    reading: Reading = FROM_FILES

    @classmethod
    def of(cls, options: Options) -> Viewing:
        """From resolved options."""
        return cls(
            options.batch_size,
            options.workers,
            options.image_size,
            options.eval_zoom,
            options.eval_resize,
            options.max_bad_images,
            Reading.of(options),
        )

    def short_side(self, spec: InputSpec) -> int:
        """The short side that photographs are resized to before the centre crop."""
        return self.resize or round(self.image_size * spec.resize / spec.size)


@torch.inference_mode()
def embed(
    network: EmbeddingNet,
    images: ImageSet,
    precision: Precision,
    viewing: Viewing,
    *,
    title: str = "embedding",
    represent: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Test-time embeddings of all images, in their order; several processes share the batches.

    Args:
        title: the title of the progress bar.
        represent: maps a batch of images (B, 3, S, S) to rows; None is `network.embed`.

    Returns:
        (N, d) float32 on the network's device, raw (the metrics normalise), and (N,) bool: which
        images could be read. The rows of unreadable images, if `viewing` allows any, are arbitrary.

    Raises:
        InputError: more images cannot be read than the viewing allows.
    """
    network.eval()
    represent = represent or network.embed
    size = viewing.batch_size
    count = math.ceil(len(images) / size)
    own = processes.shard(count)
    loader = eval_loader(
        images,
        spec=network.input,
        device=precision.device,
        batches=slice(own.start, max(own.stop, own.start + 1)),  # at least one
        **vars(viewing),
    )
    parts, total = [], min(len(loader) * size, len(images))
    with Bar(title, total, speaks=processes.is_main()) as bar, worker_deaths_in_words():
        for batch in loader:
            with precision.autocast():
                parts.append(represent(batch.images).float())
            bar.update(len(batch.labels))
    rows = torch.cat(parts)
    readable = rows.new_ones(len(rows), 1)
    readable[[index - own.start * size for index in loader.bad_images]] = 0
    rows, readable = (_gathered(part, own, size, len(images)) for part in (rows, readable))
    return rows, readable[:, 0] > 0


def unit_length(raw: torch.Tensor, readable: torch.Tensor) -> np.ndarray:
    """Turns the result of `embed` into unit vectors (N, d) float32 on the CPU.

    Raises:
        InputError: the network gives NaN or infinity for an image that could be read.
    """
    broken = readable & ~raw.isfinite().all(dim=1)
    if broken.any():
        raise InputError(
            f"the network makes NaN or infinity of {int(broken.sum()):,} of {counted(len(raw))}, "
            "which cannot be compared; its training may have diverged: choose another checkpoint"
        )
    return torch.nn.functional.normalize(raw, dim=1).cpu().numpy()


def embed_readable(
    network: EmbeddingNet, images: ImageSet, *how: Any, **more: Any
) -> tuple[ImageSet, torch.Tensor]:
    """The readable images and their embeddings; takes the arguments of `embed`."""
    rows, readable = embed(network, images, *how, **more)
    if readable.all():
        return images, rows
    return images.subset(readable.cpu().numpy()), rows[readable]


def _gathered(rows: torch.Tensor, own: slice, size: int, total: int) -> torch.Tensor:
    """Gathers the rows of all processes; this one has computed the batches `own`."""
    if processes.world() == 1:
        return rows
    batches = rows.new_zeros((own.stop - own.start) * size, *rows.shape[1:])
    whole = rows[: len(batches)]
    batches[: len(whole)] = whole
    batches = batches.view(-1, size, *rows.shape[1:])
    return processes.gather_rows(batches, math.ceil(total / size)).flatten(0, 1)[:total]


@contextlib.contextmanager
def progress_bar(title: str) -> Iterator[metrics.Progress]:
    """A progress bar for work that reports the fraction that is done, in 0..1."""
    look = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
    with Bar(title, 1.0, bar_format=look, speaks=processes.is_main()) as bar:
        yield lambda share: bar.update(share - bar.n)


# --- nearest neighbours ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Embedded:
    """The images of a task with their raw embeddings.

    Attributes:
        embeddings: (N, d) of the task's queries. gallery: (G, d) of its gallery, if it has one.
        uncertainty: (N, d) raw output of the uncertainty head, if the network has one.
        unit: whether the embeddings were normalised, so that their lengths are lost.
    """

    task: Task
    embeddings: torch.Tensor
    gallery: torch.Tensor | None = None
    uncertainty: torch.Tensor | None = None
    unit: bool = False

    @property
    def images(self) -> ImageSet:
        """The queries."""
        return self.task.queries

    @property
    def searched(self) -> tuple[ImageSet, torch.Tensor]:
        """The images and embeddings that the queries are compared with."""
        if self.task.gallery is None or self.gallery is None:
            return self.images, self.embeddings
        return self.task.gallery, self.gallery

    def nearest(self, queries: np.ndarray, top: int) -> tuple[np.ndarray, np.ndarray]:
        """The nearest neighbours of some queries; without a gallery, a query does not find itself.

        Args:
            queries: (n,) indices of the queries.

        Returns:
            (n, top) indices into the searched set, nearest first, and (n, top) cosines.
        """
        own = queries if self.gallery is None else None
        return nearest(self.embeddings[torch.from_numpy(queries)], self.searched[1], own, top)


def nearest(
    queries: torch.Tensor, gallery: torch.Tensor, own: np.ndarray | None, top: int
) -> tuple[np.ndarray, np.ndarray]:
    """The gallery images nearest to each query by cosine, nearest first.

    Args:
        queries: (Q, d). gallery: (G, d). own: (Q,) indices of the queries in the gallery, which
            they do not find; None if they are not in it.

    Returns:
        (Q, top) indices into the gallery and (Q, top) cosines; fewer columns if the gallery has
        fewer images.
    """
    unit = torch.nn.functional.normalize(gallery.float(), dim=1)
    top = min(top, len(unit) - (own is not None))
    places, cosines = [], []
    for start in range(0, max(1, len(queries)), SEARCHED_AT_ONCE):
        part = slice(start, start + SEARCHED_AT_ONCE)
        similarity = torch.nn.functional.normalize(queries[part].float(), dim=1) @ unit.T
        if own is not None:
            rows = torch.arange(len(similarity))
            similarity[rows, torch.from_numpy(own[part])] = -torch.inf
        best = similarity.topk(top)
        places.append(best.indices.cpu().numpy())
        cosines.append(best.values.cpu().numpy())
    return np.concatenate(places), np.concatenate(cosines)
