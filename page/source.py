"""What a page reads of a run: its best checkpoint, opened, and the data it is judged on.

All that pages need from evaluation comes in through this file.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import net
import options
from dataset.base import ImageSet
from devices import Precision, pick_device
from evaluate import (
    Evaluation,
    Viewing,
    data_choice,
    data_options,
    embed,
    evaluations,
    load_network,
    resolve_data_defaults,
)
from inspection import Embedded, random_neighbours
from page.findings import TOP, Judged
from page.records import Record
from runs import load_checkpoint
from utils import InputError


@dataclass(frozen=True)
class Source:
    """The best checkpoint of a run, opened: its network, and the data it is judged on."""

    args: argparse.Namespace
    checkpoint: dict[str, Any]
    network: net.EmbeddingNet
    precision: Precision
    task: Evaluation

    def embed(self, images: ImageSet, *, title: str = "report") -> torch.Tensor:
        """Raw embeddings (n, d), on the CPU."""
        made = embed(self.network, images, self.precision, Viewing.of(self.args), title=title)
        return made.float().cpu()

    def embed_with_uncertainty(self, images: ImageSet) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Raw embeddings (n, d) and, where the network has that head, uncertainties (n, d)."""
        if "uncertainty" not in self.network.heads:
            return self.embed(images), None
        size = self.network.embedding_size

        def both(batch: torch.Tensor) -> torch.Tensor:
            outputs = self.network(batch)
            return torch.cat([outputs.embedding[:, :size], outputs.uncertainty], dim=1)

        viewing = Viewing.of(self.args)
        made = embed(self.network, images, self.precision, viewing, title="report", represent=both)
        made = made.float().cpu()
        return made[:, :size], made[:, size:]

    def training_images(self, names: Sequence[str]) -> ImageSet | None:
        """The images of the criterion's classes `names`; None where they are gone or not told."""
        try:
            train = data_choice(self.args).load("train")
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
    path = record.best_checkpoint
    if path is None:
        raise InputError(f"{record.name} has no best checkpoint yet, so nothing was embedded")
    if record.options.no_test:
        raise InputError(f"{record.name} was trained with --no-test: its test classes stay unseen")
    args = options.parse_evaluate(["--resume", str(path), "--gpu-id", str(gpu_id)])
    args.resume = str(path)
    checkpoint = load_checkpoint(path)
    args = data_options(checkpoint, args)
    args.workers = record.options.workers
    resolve_data_defaults(args)
    task = evaluations(data_choice(args))[0]
    precision = Precision(args.amp, pick_device(gpu_id))
    network = load_network(checkpoint, args)
    network.to(precision.device, memory_format=precision.memory_format)
    return Source(args, checkpoint, network, precision, task)


def judge(source: Source, file: str | None = None) -> Judged:
    """Embeds the evaluation, or takes its embeddings from a file of `evaluate.py --export`.

    Raises:
        InputError: the file cannot be read, or is of another evaluation.
    """
    task = source.task
    if file is not None:
        return _exported(task, Path(file))
    embeddings, uncertainty = source.embed_with_uncertainty(task.queries)
    gallery = None if task.gallery is None else source.embed(task.gallery)
    return Judged(task.title, task.ks, task.queries, embeddings, task.gallery, gallery, uncertainty)


def _exported(task: Evaluation, path: Path) -> Judged:
    try:
        with np.load(path, allow_pickle=False) as file:
            content = dict(file)
    except (OSError, ValueError) as error:
        raise InputError(f"--embeddings {path} cannot be read ({error})") from error
    sides = [("", task.queries), ("gallery_", task.gallery)]
    for prefix, images in sides:
        labels = content.get(f"{prefix}labels")
        if images is not None and not np.array_equal(labels, images.labels):
            raise InputError(
                f"--embeddings {path} is not of this run's evaluation ({task.title}): the labels "
                "differ; make it with evaluate.py --export"
            )
    arrays = {name: torch.from_numpy(value) for name, value in content.items() if value.ndim == 2}
    return Judged(
        task.title,
        task.ks,
        task.queries,
        arrays["embeddings"],
        task.gallery,
        arrays.get("gallery_embeddings"),
        arrays.get("uncertainty"),
        unit=True,
    )


def neighbours_picture(source: Source, seed: int) -> Image.Image:
    """Random queries of the evaluation, each with the images nearest to it."""
    judged = judge(source)
    embedded = Embedded(judged.images, judged.embeddings, judged.gallery_images, judged.gallery)
    return random_neighbours(embedded, seed, TOP)
