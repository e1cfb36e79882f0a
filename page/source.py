"""The best checkpoint of a run, opened, and the data that it is evaluated on.

It embeds images for pages, or reads embeddings from a file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import dataset
import net
from dataset.base import ImageSet
from devices import Precision, pick_device
from evaluation.embedding import Embedded, Viewing, embed_readable
from evaluation.files import random_neighbours
from evaluation.networks import fingerprint_of, found_again, looked_for, open_checkpoint
from evaluation.tasks import Task
from page.findings import TOP
from page.records import Record, read
from storage import load_arrays
from utils import InputError, program

logger = logging.getLogger("report")


@dataclass(frozen=True)
class Source:
    """The best checkpoint of a run, opened: its network, and the data that it is evaluated on."""

    data: dataset.Choice
    viewing: Viewing
    checkpoint: dict[str, Any]
    network: net.EmbeddingNet
    precision: Precision
    task: Task

    def embed(
        self,
        images: ImageSet,
        represent: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> tuple[ImageSet, torch.Tensor]:
        """The images that can be read, and their raw embeddings (n, d) on the CPU."""
        images, made = embed_readable(
            self.network, images, self.precision, self.viewing, title="report", represent=represent
        )
        return images, made.float().cpu()

    def embed_with_uncertainty(
        self, images: ImageSet
    ) -> tuple[ImageSet, torch.Tensor, torch.Tensor | None]:
        """The result of `embed`, and uncertainties (n, d) if the network has that head."""
        if "uncertainty" not in self.network.heads:
            return *self.embed(images), None
        size = self.network.embedding_size

        def both(batch: torch.Tensor) -> torch.Tensor:
            outputs = self.network(batch)
            return torch.cat([outputs.embedding[:, :size], outputs.uncertainty], dim=1)

        images, made = self.embed(images, both)
        return images, made[:, :size], made[:, size:]

    def training_images(self, names: Sequence[str]) -> ImageSet | None:
        """The training images of the criterion's classes `names`; None if not all are found."""
        try:
            train = self.data.load("train")
        except InputError:
            return None
        label_of = {name: label for label, name in enumerate(train.class_names)}
        if len(label_of) < train.num_classes or not all(name in label_of for name in names):
            return None
        return train.select_classes([label_of[name] for name in names])


def open_best(record: Record, gpu_id: int) -> Source:
    """The best checkpoint of a run and its evaluation data.

    Raises:
        InputError: there is no checkpoint yet, or the data are not here.
    """
    path = record.folder.best_checkpoint()
    if path is None:
        raise InputError(f"{record.name} has no best checkpoint yet, so nothing was embedded")
    if record.options.no_test:
        raise InputError(f"{record.name} was trained with --no-test: its test classes stay unseen")
    opened = open_checkpoint(path)
    # Unreadable images are no error here: the metrics were measured by the run.
    viewing = replace(opened.viewing, workers=record.options.workers, max_bad_images=1.0)
    task = opened.tasks()[0]
    precision = Precision("auto", pick_device(gpu_id))
    opened.network.to(precision.device, memory_format=precision.memory_format)
    return Source(opened.data, viewing, opened.content, opened.network, precision, task)


def without_images(path: str | Path) -> str:
    """A sentence if the user's own images of the run in `path` are gone; else ""."""
    record = read(path)
    choice = found_again(dataset.Choice(record.options.dataset), record.path)
    if not choice.is_gone:
        return ""
    return f"the images of {record.name} are gone ({looked_for(choice, record.path)})"


def judge(source: Source, file: str | None = None) -> Embedded:
    """Embeds the evaluation, or takes its embeddings from a file of `evaluate.py --export`.

    Raises:
        InputError: the file cannot be read, or is of another evaluation; or none of its images can
            be read.
    """
    task = source.task
    if file is not None:
        return _exported(task, Path(file), source.network)
    queries, embeddings, uncertainty = source.embed_with_uncertainty(task.queries)
    searched, gallery = (None, None) if task.gallery is None else source.embed(task.gallery)
    if not len(queries) or len(queries if searched is None else searched) < 2:
        raise InputError(
            f"no images of the evaluation ({task.title}) can be read any more; put them back, and "
            f"{program('report')} makes the whole page"
        )
    return Embedded(task.narrowed(queries, searched), embeddings, gallery, uncertainty)


def _exported(task: Task, path: Path, network: net.EmbeddingNet) -> Embedded:
    """The embeddings of a file that this network has made."""
    size = network.test_size
    content = load_arrays(path, "--embeddings")
    gallery = None if task.gallery is None else _of_export(content, "gallery_", task.gallery)
    task = task.narrowed(_of_export(content, "", task.queries), gallery)
    found = {}
    for prefix, images in (("", task.queries), ("gallery_", task.gallery)):
        if images is None:
            continue
        if not np.array_equal(content.get(f"{prefix}labels"), images.labels):
            why = f"is not of this run's evaluation ({task.title}): the labels differ"
            raise _refusal(path, why)
        for name in ("embeddings", "uncertainty"):
            found[prefix + name] = _vectors(content, prefix + name, len(images), path)
    if found["embeddings"] is None or (task.gallery and found["gallery_embeddings"] is None):
        raise _refusal(path, "holds no embeddings of all images")
    for vectors in (found["embeddings"], found.get("gallery_embeddings")):
        if vectors is not None and vectors.shape[1] != size:
            why = f"holds embeddings of {vectors.shape[1]} numbers, and the run's have {size}"
            how = ", of the run's best checkpoint and without --dims and --whiten"
            raise _refusal(path, why, how)
    _check_network(content, network, path)
    return Embedded(
        task,
        found["embeddings"],
        found.get("gallery_embeddings"),
        found["uncertainty"],
        unit=True,
    )


def _check_network(
    content: Mapping[str, np.ndarray], network: net.EmbeddingNet, path: Path
) -> None:
    """Raises InputError if a file's embeddings are another network's; warns if that is unknown."""
    if (made_by := content.get("network")) is None:
        logger.warning(
            "--embeddings %s does not say which network made it (%s --export writes that "
            "by now), so whether it was this run's best checkpoint is not checked",
            path,
            program("evaluate"),
        )
    elif str(made_by) != fingerprint_of(network):
        raise _refusal(
            path,
            "was made by another network than the run's best checkpoint, or from other pixels",
            ", of that checkpoint and without flags that change it or its images, such as "
            "--pooling and --image-size",
        )


def _refusal(path: Path, why: str, how: str = "") -> InputError:
    return InputError(
        f"--embeddings {path} {why}; make it with {program('evaluate')} --export{how}"
    )


def _of_export(content: Mapping[str, np.ndarray], prefix: str, images: ImageSet) -> ImageSet:
    """The images of an export, which leaves out those that could not be read."""
    paths = content.get(f"{prefix}paths")
    if paths is None or len(paths) == len(images):
        return images
    held = set(paths.tolist())
    return images.subset(np.array([images.paths[index] in held for index in range(len(images))]))


def _vectors(
    content: Mapping[str, np.ndarray], name: str, count: int, path: Path
) -> torch.Tensor | None:
    """The array `name` (count, d) of a file of embeddings; None if the file does not have it."""
    if name not in content:
        return None
    vectors = content[name]
    fine = vectors.ndim == 2 and len(vectors) == count and vectors.dtype.kind == "f"
    if not (fine and np.isfinite(vectors).all()):
        raise InputError(
            f"--embeddings {path}: its {name} are not finite vectors, one for each of the {count} "
            f"images; make it again with {program('evaluate')} --export"
        )
    return torch.from_numpy(vectors.astype(np.float32))


def neighbours_picture(source: Source, seed: int) -> Image.Image:
    """Random queries of the evaluation, each with the images nearest to it."""
    return random_neighbours(judge(source), seed, TOP)
