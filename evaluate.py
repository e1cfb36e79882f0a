"""Checkpoint → embeddings → metrics on classes that were never trained on.

    python evaluate.py --resume logs/RUN/emoji_resnet18_best.pth

A checkpoint of ours knows its own data set and network; a released one needs the flags of both.
"""

from __future__ import annotations

import options

ARGS = options.parse_evaluate() if __name__ == "__main__" else None

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

import dataset
import metrics
import net
from dataset.base import ImageSet
from dataset.loader import eval_loader
from report import nearest, neighbours_picture, random_queries, save_picture
from runs import load_checkpoint
from utils import (
    InputError,
    Precision,
    human_seconds,
    pick_device,
    sentence_errors,
    write_atomically,
    write_json,
    write_table,
)

KEPT_FLAGS = ("dataset", "data_root", "eval_classes", "split_seed", "ratio_classes")
KEPT_FLAGS += ("image_size", "eval_zoom", "eval_resize", "batch_size")
"""What an evaluation takes over from the run that made the checkpoint, unless it is given."""
READING = ("decode", "data_device", "cache_dir", "cache_size")

FOOTNOTE = (
    "R@K: share of queries with an image of their class among the K nearest (cosine, the query "
    "left out).\nRP: share of the R nearest that are right, R = other images of the class. MAP@R: "
    "Σ precision@j over\nright j ≤ R, over R; mARP: the same sum over the number of right ones. "
    "NMI (arithmetic), F1 (pairwise): k-means with one cluster a class."
)


@dataclass(frozen=True)
class Evaluation:
    """One retrieval task: queries against themselves, or against a gallery.

    `ks` are the K of R@K; `group_name` says what `queries.groups` are, where a query's own group is
    also left out of the gallery for a second R@1.
    """

    title: str
    queries: ImageSet
    gallery: ImageSet | None
    ks: tuple[int, ...]
    group_name: str | None = None

    @classmethod
    def published(
        cls,
        title: str,
        queries: ImageSet,
        gallery: ImageSet | None,
        protocol: dataset.Protocol,
        ks: Sequence[int] | None = None,
    ) -> Evaluation:
        """With the K asked for, or else those of the papers that the gallery has images for."""
        size = len(queries if gallery is None else gallery)
        wanted = ks or [k for k in protocol.ks if k <= size]
        return cls(title, queries, gallery, tuple(wanted), protocol.group_name)

    def describe(self) -> str:
        """Counts, in words."""
        text = f"{len(self.queries):,} images, {self.queries.num_classes:,} classes"
        return f"{text}, gallery {len(self.gallery):,} images" if self.gallery else text


def data_choice(args: argparse.Namespace) -> dataset.Choice:
    """The data that the options ask for."""
    return dataset.Choice(
        args.dataset, args.data_root, args.eval_classes, args.split_seed, args.ratio_classes
    )


def evaluations(data: dataset.Choice, ks: Sequence[int] | None = None) -> list[Evaluation]:
    """The published evaluation of a data set; VehicleID has three, the large one first.

    Raises:
        InputError: the data set is unknown or not there.
    """
    name, protocol = data.name, data.protocol
    if protocol.query_gallery:
        query, gallery = (data.load(split) for split in ("query", "gallery"))
        return [Evaluation.published(name, query, gallery, protocol, ks)]
    if protocol.sizes:
        lists = {size: data.load("eval", size=size) for size in protocol.sizes}
        return [
            Evaluation.published(f"{name} {size}", queries, None, protocol, ks)
            for size, queries in lists.items()
        ]
    queries = data.load("eval")
    return [Evaluation.published(name, queries, None, protocol, ks)]


def resolve_data_defaults(args: argparse.Namespace) -> None:
    """Fills in what the data set decides: image size, pretrained weights, stem, BatchNorm.

    Raises:
        InputError: an unknown data set, or evaluation is to cut more out of an image than it has.
    """
    protocol = dataset.protocol(args.dataset)
    if args.image_size is None:
        args.image_size = protocol.image_size
    if args.eval_resize is not None and args.eval_resize < args.image_size:
        raise InputError(
            f"--eval-resize {args.eval_resize} is less than the {args.image_size} pixels that are "
            f"cut out of the image; choose at least {args.image_size}"
        )
    if args.pretrained is None:
        args.pretrained = protocol.pretrained
    if args.stem is None:
        args.stem = "imagenet" if args.image_size >= 128 else "small"
    if args.bn_freeze is None:
        args.bn_freeze = "0" if args.pretrained == "none" else "1"


def network_options(args: argparse.Namespace, heads: tuple[str, ...]) -> dict[str, Any]:
    """The arguments of `net.build` that the options ask for; a checkpoint keeps them."""
    names = ("model", "embedding_size", "l2_norm", "pooling", "stem", "width", "bn_freeze")
    names += ("head_norm", "head_init", "dropout", "input_spec")
    return {"heads": heads, **{name: getattr(args, name) for name in names}}


def load_network(checkpoint: dict, args: argparse.Namespace) -> net.EmbeddingNet:
    """The network of a checkpoint: what its keys tell, under what it keeps, under the flags.

    Raises:
        InputError: the flags, or the file, describe another network.
    """
    chosen = {**net.checkpoint_options(checkpoint, args.resume), **checkpoint.get("network", {})}
    asked = network_options(args, chosen["heads"])
    chosen |= {name: asked[name] for name in asked if name in args.given or name not in chosen}
    masks_at_test, mask_relu = chosen.pop("masks_at_test", "none"), chosen.pop("mask_relu", True)
    network = net.build(**chosen)
    net.load_checkpoint(network, checkpoint, source=args.resume)
    if network.masks is not None:
        network.masks.full, network.masks.relu = masks_at_test, mask_relu
    return network


@dataclass(frozen=True)
class Viewing:
    """How evaluation looks at images: see the flags of the same names."""

    batch_size: int
    workers: int
    image_size: int
    zoom: float = 1.0
    resize: int | None = None
    decode: str = "exact"
    data_device: str | None = None
    cache_dir: str | None = None
    cache_size: int = 256

    @classmethod
    def of(cls, args: argparse.Namespace) -> Viewing:
        """From the options."""
        return cls(
            args.batch_size,
            args.workers,
            args.image_size,
            args.eval_zoom,
            args.eval_resize,
            **reading(args),
        )


def reading(args: argparse.Namespace) -> dict[str, Any]:
    """Where loaders take their pixels from: see `dataset.loader`."""
    return {name: getattr(args, name) for name in READING}


@torch.inference_mode()
def embed(
    network: net.EmbeddingNet,
    images: ImageSet,
    precision: Precision,
    viewing: Viewing,
    *,
    title: str = "embedding",
    represent: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Test-time embeddings of all images, in their order.

    Args:
        represent: what else a batch of images (B, 3, S, S) becomes; None is `network.embed`.

    Returns:
        (N, d) float32 on the network's device, raw (the metrics normalise).
    """
    network.eval()
    represent = represent or network.embed
    loader = eval_loader(
        images,
        spec=network.input,
        device=precision.device,
        **vars(viewing),
    )
    parts = []
    with tqdm(total=len(images), desc=title, unit="img", leave=False, disable=None) as bar:
        for batch in loader:
            with precision.autocast():
                parts.append(represent(batch.images).float())
            bar.update(len(batch.labels))
    return torch.cat(parts)


@dataclass(frozen=True)
class Result:
    """The numbers of one evaluation, and the embeddings they were computed from."""

    title: str
    numbers: dict[str, float]
    embeddings: torch.Tensor
    gallery: torch.Tensor | None
    seconds: float


def evaluate(
    network: net.EmbeddingNet,
    task: Evaluation,
    precision: Precision,
    viewing: Viewing,
    *,
    seed: int = 1,
    kmeans_restarts: int = 1,
) -> Result:
    """Embeds and measures one evaluation.

    Raises:
        InputError: the embeddings are not finite, or K exceeds the gallery.
    """
    start = time.perf_counter()
    embeddings = embed(network, task.queries, precision, viewing, title=task.title)
    labels = torch.from_numpy(task.queries.labels).to(embeddings.device)
    gallery = gallery_labels = None
    if task.gallery is not None:
        gallery = embed(network, task.gallery, precision, viewing, title=f"{task.title} gallery")
        gallery_labels = torch.from_numpy(task.gallery.labels).to(embeddings.device)
    try:
        numbers = metrics.retrieval_metrics(embeddings, labels, gallery, gallery_labels, task.ks)
        if task.group_name and task.queries.groups is not None:
            groups = torch.from_numpy(task.queries.groups).to(embeddings.device)
            others = metrics.retrieval_metrics(embeddings, labels, ks=(1,), exclude=groups)
            numbers[f"R@1 other {task.group_name}s"] = others["R@1"]
        everything = embeddings if gallery is None else torch.cat([embeddings, gallery])
        every_label = labels if gallery_labels is None else torch.cat([labels, gallery_labels])
        numbers |= metrics.clustering_metrics(
            everything, every_label, seed=seed, restarts=kmeans_restarts
        )
    except ValueError as error:
        raise InputError(f"{task.title}: {error}") from error
    return Result(task.title, numbers, embeddings, gallery, time.perf_counter() - start)


def table(results: Sequence[Result]) -> str:
    """The metrics as an aligned table, one row an evaluation."""
    names = [name for name in results[0].numbers if not name.startswith("queries")]
    width = max(len(result.title) for result in results)
    widths = [max(len(name), 6) for name in names]
    lines = [" ".join([" " * width, *(n.rjust(w) for n, w in zip(names, widths, strict=True))])]
    for result in results:
        cells = [f"{result.numbers[n]:.4f}".rjust(w) for n, w in zip(names, widths, strict=True)]
        lines.append(" ".join([result.title.ljust(width), *cells]))
    return "\n".join(lines)


def export(path: Path, task: Evaluation, result: Result) -> None:
    """Writes unit-length embeddings, labels, class names and paths to an .npz."""
    sides = [("", task.queries, result.embeddings), ("gallery_", task.gallery, result.gallery)]
    content: dict[str, np.ndarray] = {}
    for prefix, images, embeddings in sides:
        if images is None or embeddings is None:
            continue
        unit = torch.nn.functional.normalize(embeddings, dim=1).cpu().numpy()
        content[f"{prefix}embeddings"] = unit
        content[f"{prefix}labels"] = images.labels
        content[f"{prefix}paths"] = np.array([images.paths[i] for i in range(len(images))])
        content[f"{prefix}class_names"] = np.array(images.class_names)
    write_atomically(path, lambda file: np.savez(file, **content))


def draw_neighbours(path: Path, task: Evaluation, result: Result, seed: int) -> None:
    """Draws ten random queries and the ten images nearest to each."""
    chosen = random_queries(task.queries.labels, 10, seed)
    gallery = result.embeddings if result.gallery is None else result.gallery
    own = chosen if result.gallery is None else None
    found = nearest(result.embeddings[torch.from_numpy(chosen)], gallery, own, top=10)
    caption = f"{len(chosen)} queries drawn at random (seed {seed}), one a class"
    save_picture(neighbours_picture(task.queries, chosen, found, task.gallery, caption), path)


def uncertain_images(
    network: net.EmbeddingNet, images: ImageSet, precision: Precision, viewing: Viewing
) -> list[list[str]]:
    """Path, class and ‖u‖ of the raw uncertainty head for every image, the most uncertain first."""

    def lengths(batch: torch.Tensor) -> torch.Tensor:
        return network(batch).uncertainty.norm(dim=1)

    norms = embed(network, images, precision, viewing, title="uncertainty", represent=lengths)
    norms, order = norms.sort(descending=True, stable=True)
    return [
        [images.paths[index], images.class_names[images.labels[index]], f"{norm:.6g}"]
        for norm, index in zip(norms.tolist(), order.tolist(), strict=True)
    ]


def data_options(checkpoint: dict, args: argparse.Namespace) -> argparse.Namespace:
    """The options with the checkpoint's own data set and image size, where none are given."""
    stored = checkpoint.get("args", {})
    spec = net.checkpoint_options(checkpoint, args.resume)["input_spec"]
    if spec is not None:
        stored = {"image_size": net.INPUTS[spec].size, **stored}
    own = {name: stored[name] for name in KEPT_FLAGS if name in stored and name not in args.given}
    return argparse.Namespace(**{**vars(args), **own})


def run(args: argparse.Namespace) -> None:
    """Evaluates `args.resume` and prints, and where asked writes, the results."""
    checkpoint = load_checkpoint(args.resume)
    args = data_options(checkpoint, args)
    device = pick_device(args.gpu_id)
    precision = Precision(args.amp, device)
    resolve_data_defaults(args)
    tasks = evaluations(data_choice(args), args.ks)
    network = load_network(checkpoint, args)
    if args.uncertain and "uncertainty" not in network.heads:
        raise InputError(
            f"--uncertain: {args.resume} has no uncertainty head; evaluate a checkpoint that was "
            "trained with --introspective"
        )
    network.to(device, memory_format=precision.memory_format)
    viewing = Viewing.of(args)
    results = []
    for task in tasks:
        result = evaluate(
            network,
            task,
            precision,
            viewing,
            seed=args.seed,
            kmeans_restarts=args.kmeans_restarts,
        )
        results.append(result)
        print(f"{task.title}: {task.describe()}, {human_seconds(result.seconds)}")
    print(table(results))
    print(FOOTNOTE)
    if args.json:
        write_json(Path(args.json), _json_content(args, tasks, results))
        print(f"numbers written to {args.json}")
    if args.export:
        export(Path(args.export), tasks[0], results[0])
        print(f"embeddings written to {args.export}")
    if args.neighbours:
        draw_neighbours(Path(args.neighbours), tasks[0], results[0], args.seed)
        print(f"queries and their neighbours drawn to {args.neighbours}")
    if args.uncertain:
        rows = uncertain_images(network, tasks[0].queries, precision, viewing)
        write_table(Path(args.uncertain), ["path", "class", "uncertainty"], rows)
        print(f"images by uncertainty written to {args.uncertain}")


def _json_content(
    args: argparse.Namespace, tasks: Sequence[Evaluation], results: Sequence[Result]
) -> dict[str, Any]:
    return {
        "checkpoint": str(args.resume),
        "dataset": args.dataset,
        "results": [
            {
                "title": task.title,
                "images": len(task.queries),
                "classes": task.queries.num_classes,
                "kmeans_restarts": args.kmeans_restarts,
                **result.numbers,
            }
            for task, result in zip(tasks, results, strict=True)
        ],
    }


if __name__ == "__main__":
    with sentence_errors():
        run(ARGS)
