"""Files about single images: embeddings, neighbours, failures, answers to queries.

All of them are about the first task of a data set (for VehicleID, the large list).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps

import processes
from dataset.base import ImageSet, PathTable, decode, reason
from dataset.decoding import central_part
from dataset.files import warn_once
from dataset.reading import FROM_FILES
from devices import Precision
from evaluation.embedding import Embedded, Viewing, embed, nearest
from evaluation.measuring import worst_queries
from evaluation.networks import fingerprint_of
from evaluation.pictures import contact_sheet, neighbours_picture, random_queries, save_picture
from metrics import comparison
from storage import save_arrays, write_table
from utils import InputError, counted, program

if TYPE_CHECKING:
    from net import EmbeddingNet

logger = logging.getLogger("evaluate")

MOST_ROWS = 50  # rows of a picture; the table written with it has all


def cosines(queries: torch.Tensor, gallery: torch.Tensor, found: np.ndarray) -> np.ndarray:
    """Cosines (Q, top) of queries (Q, d) with the images that each found, at indices (Q, top)."""
    unit = torch.nn.functional.normalize
    neighbours = unit(gallery[torch.from_numpy(found)].double(), dim=2)
    own = unit(queries.double(), dim=1)[:, None]
    return (own * neighbours).sum(dim=2).cpu().numpy()


# --- all images -----------------------------------------------------------------------------------


def export(
    path: Path,
    embedded: Embedded,
    network: str,
    uncertainty: Sequence[torch.Tensor | None] = (None, None),
) -> None:
    """Writes unit-length embeddings, labels, class names and paths to an .npz.

    Args:
        network: the fingerprint of the network that made them, `networks.fingerprint_of`.
        uncertainty: raw uncertainty vectors of the queries and of the gallery, if there are any.
    """
    sides = [
        ("", embedded.images, embedded.embeddings, uncertainty[0]),
        ("gallery_", embedded.task.gallery, embedded.gallery, uncertainty[1]),
    ]
    content = {"network": np.array(network)}
    for prefix, images, embeddings, uncertain in sides:
        if images is None or embeddings is None:
            continue
        unit = torch.nn.functional.normalize(embeddings, dim=1).cpu().numpy()
        content[f"{prefix}embeddings"] = unit
        content[f"{prefix}labels"] = images.labels
        content[f"{prefix}paths"] = np.array([images.paths[i] for i in range(len(images))])
        content[f"{prefix}class_names"] = np.array(images.class_names)
        if uncertain is not None:
            content[f"{prefix}uncertainty"] = uncertain.cpu().numpy()
    save_arrays(path, content)


def write_uncertain(path: Path, images: ImageSet, norms: torch.Tensor) -> None:
    """Writes path, class and ‖u‖ (N,) of every image, the most uncertain first."""
    norms, order = norms.sort(descending=True, stable=True)
    rows = [
        [images.paths[index], images.class_names[images.labels[index]], f"{norm:.6g}"]
        for norm, index in zip(norms.tolist(), order.tolist(), strict=True)
    ]
    write_table(path, ["path", "class", "uncertainty"], rows)


def write_classes(path: Path, images: ImageSet, scores: comparison.Scores) -> None:
    """Writes every class with its retrieval metrics, the lowest R@1 (then MAP@R) first."""
    classes, sizes, metrics = comparison.by_class(scores)
    keys = [scores.names.index(name) for name in scores.names if name.startswith("R@")][:1]
    keys.append(scores.names.index("MAP@R"))
    order = np.lexsort([metrics[:, key].nan_to_num(-1).numpy() for key in reversed(keys)])
    rows = [
        [
            images.class_names[int(classes[c])],
            int(sizes[c]),
            *("" if math.isnan(value) else f"{value:.6g}" for value in metrics[c].tolist()),
        ]
        for c in order
    ]
    write_table(path, ["class", "images", *scores.names], rows)


# --- some of them ---------------------------------------------------------------------------------


def random_neighbours(
    embedded: Embedded, seed: int, top: int, *, named: bool = False
) -> Image.Image:
    """A picture of ten random queries and their nearest images; `named` adds all names."""
    chosen = random_queries(embedded.images.labels, 10, seed)
    found, values = embedded.nearest(chosen, top)
    caption = f"{len(chosen)} queries drawn at random (seed {seed}), one per class"
    gallery = embedded.task.gallery
    below = values if named else None
    return neighbours_picture(embedded.images, chosen, found, gallery, caption, cosines=below)


def write_failures(
    folder: Path, embedded: Embedded, per_query: Mapping[str, torch.Tensor], count: int, top: int
) -> list[Path]:
    """Writes the worst queries with their neighbours to failures.csv and failures.png.

    Returns the files that were written: none if no query failed.
    """
    queries = worst_queries(per_query)[:count]
    if len(queries) == 0:
        return []
    images, (gallery_images, gallery) = embedded.images, embedded.searched
    found, _ = embedded.nearest(queries, top)
    scores = cosines(embedded.embeddings[torch.from_numpy(queries)], gallery, found)
    rows = []
    for query, neighbours, values in zip(queries.tolist(), found.tolist(), scores, strict=True):
        label = images.labels[query]
        row = [images.paths[query], images.class_names[label], int(per_query["rank"][query]) + 1]
        row.append(f"{float(per_query['MAP@R'][query]):.6g}")
        for neighbour, value in zip(neighbours, values, strict=True):
            name = gallery_images.class_names[gallery_images.labels[neighbour]]
            row += [gallery_images.paths[neighbour], name, f"{value:.6g}"]
        rows.append(row)
    header = ["path", "class", "rank of the nearest right image", "MAP@R"]
    for place in range(1, found.shape[1] + 1):
        header += [f"path {place}", f"class {place}", f"cosine {place}"]
    shown = queries[:MOST_ROWS]
    which = f"{len(shown)} queries" if len(shown) > 1 else "query"
    caption = f"The {which} whose nearest right image is farthest down"
    ranks = [int(per_query["rank"][query]) + 1 for query in shown]
    picture = neighbours_picture(
        images,
        shown,
        found[: len(shown)],
        embedded.task.gallery,
        caption,
        cosines=scores[: len(shown)],
        notes=[f"nearest right: place {rank:,}" for rank in ranks],
    )
    table, drawing = (folder / name for name in WRITTEN["failures"])
    write_table(table, header, rows)
    save_picture(picture, drawing)
    return [table, drawing]


# --- images of the user's own ---------------------------------------------------------------------


def own_images(paths: Sequence[str], like: ImageSet) -> ImageSet:
    """Image files as a set with the properties of `like`; each is a class named after its file.

    Files that cannot be read are named in a warning and left out.

    Raises:
        InputError: a file is missing, or none of them is a picture.
    """
    readable, pictures = [], []
    for path in paths:
        try:
            pictures.append(central_part(decode(path, like.upright)))
            readable.append(path)
        except Exception as error:  # Pillow raises a dozen unrelated types for damaged files
            said = f"--query {path} cannot be read ({reason(error)})"
            if len(paths) == 1 or isinstance(error, FileNotFoundError):
                raise InputError(f"{said}; give image files") from error
            warn_once(f"{said}; it is left out", logger)
    if not pictures:
        raise InputError(f"--query: none of {counted(len(paths))} can be read; give image files")
    pixels = None
    if like.pixels is not None:  # drawings in memory are fitted whole, on white
        height, width = like.pixels.shape[1:3]
        pixels = np.stack([on_white(picture, height, width) for picture in pictures])
    return ImageSet(
        name="query",
        split="query",
        labels=np.arange(len(readable)),
        class_names=tuple(Path(path).name for path in readable),
        paths=PathTable(map(str, readable)),
        pixels=pixels,
        source="--query",
        upright=like.upright,
    )


def on_white(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Fits (H, W, 3) uint8 whole into (height, width, 3), on white."""
    # A copy: an array on a picture's own memory is read-only, which torch warns about.
    return np.array(ImageOps.pad(Image.fromarray(pixels), (width, height), color="white"))


def write_answers(
    folder: Path, queries: ImageSet, embeddings: torch.Tensor, embedded: Embedded, top: int
) -> tuple[list[Path], str]:
    """Writes the images nearest to the queries (Q, d) to query.csv and query.png.

    Returns the files, and the same answers in words.
    """
    images, gallery = embedded.searched
    found, _ = nearest(embeddings, gallery, None, top)
    scores = cosines(embeddings, gallery, found)
    rows, lines = [], []
    for query, (neighbours, values) in enumerate(zip(found.tolist(), scores, strict=True)):
        lines.append(f"nearest to {queries.paths[query]}:")
        for place, (neighbour, value) in enumerate(zip(neighbours, values, strict=True), 1):
            name, path = images.class_names[images.labels[neighbour]], images.paths[neighbour]
            rows.append([queries.paths[query], place, f"{value:.6g}", name, path])
            lines.append(f"{place:>4}  {value:.4f}  {name}  {path}")
    table, drawing = (folder / name for name in WRITTEN["query"])
    notes = np.array([[f"{value:.3f}" for value in values] for values in scores])
    picture = contact_sheet(queries, found, notes, images)
    write_table(table, ["query", "place", "cosine", "class", "path"], rows)
    save_picture(picture, drawing)
    return [table, drawing], "\n".join(lines)


# --- the files of evaluate.py ---------------------------------------------------------------------


@dataclass(frozen=True)
class Subject:
    """An evaluated checkpoint, as the functions below take it.

    Attributes:
        per_query: retrieval metrics of each query; None if they were not computed.
        folder, seed, top: see --out, --seed and --top.
    """

    network: EmbeddingNet
    precision: Precision
    viewing: Viewing
    embedded: Embedded
    per_query: Mapping[str, torch.Tensor] | None
    folder: Path
    seed: int
    top: int

    def uncertainty(self, images: ImageSet | None) -> torch.Tensor | None:
        """Raw uncertainty vectors (N, d), computed by all processes; None without that head."""
        if images is None or "uncertainty" not in self.network.heads:
            return None
        vectors, _ = embed(
            self.network,
            images,
            self.precision,
            self.viewing,
            title="uncertainty",
            represent=lambda batch: self.network(batch).uncertainty,
        )
        return vectors


def _in_main(function: Callable, *arguments: Any) -> Any:
    """Calls a function in the main process only, with arguments that all processes have made."""
    return processes.from_main(partial(function, *arguments))


def _per_class(subject: Subject, path: str) -> str:
    task = subject.embedded.task
    scores = comparison.query_scores(subject.per_query, task.ks, task.queries.labels)
    _in_main(write_classes, Path(path), task.queries, scores)
    return f"metrics of each class written to {path}"


def _export(subject: Subject, path: str) -> str:
    task = subject.embedded.task
    uncertain = [subject.uncertainty(images) for images in (task.queries, task.gallery)]
    network = fingerprint_of(subject.network)
    _in_main(export, Path(path), subject.embedded, network, uncertain)
    return f"embeddings written to {path}"


def _uncertain(subject: Subject, path: str) -> str:
    queries = subject.embedded.images
    norms = subject.uncertainty(queries).norm(dim=1)
    _in_main(write_uncertain, Path(path), queries, norms)
    return f"images by uncertainty written to {path}"


def _neighbours(subject: Subject, path: str) -> str:
    def draw() -> None:
        picture = random_neighbours(subject.embedded, subject.seed, subject.top, named=True)
        save_picture(picture, Path(path))

    processes.from_main(draw)
    return f"queries and their neighbours drawn to {path}"


def _failures(subject: Subject, count: int) -> str:
    asked = (subject.folder, subject.embedded, subject.per_query, count, subject.top)
    written = _in_main(write_failures, *asked)
    return f"worst queries written to {_listed(written)}" if written else "no query failed"


def _query(subject: Subject, paths: Sequence[str]) -> str:
    queries = own_images(paths, like=subject.embedded.images)
    once = replace(subject.viewing, reading=FROM_FILES)
    embeddings, _ = embed(subject.network, queries, subject.precision, once, title="queries")
    asked = (subject.folder, queries, embeddings, subject.embedded, subject.top)
    written, answer = _in_main(write_answers, *asked)
    searched = subject.embedded.searched[0]
    answer += (
        f"\nsearched: the {len(searched):,} evaluated images of {searched.num_classes:,} classes; "
        "an image of another class, such as a training class, has no right answer among them "
        f"({program('search')} build RUN --images PHOTOS makes any images searchable)"
    )
    if left_out := len(paths) - len(queries):
        answer += f"\nleft out: {counted(left_out)} that cannot be read (named above)"
    return f"{answer}\nanswers written to {_listed(written)}"


def _listed(paths: Sequence[Path]) -> str:
    return " and ".join(map(str, paths))


WRITERS: dict[str, Callable[[Subject, Any], str]] = {
    "per_class": _per_class,
    "export": _export,
    "uncertain": _uncertain,
    "neighbours": _neighbours,
    "failures": _failures,
    "query": _query,
}
"""Option → a function that writes its file and returns a sentence; called in all processes."""

WRITTEN = {
    "failures": ("failures.csv", "failures.png"),
    "query": ("query.csv", "query.png"),
}
"""Option → the files that it writes into the folder of --out."""
