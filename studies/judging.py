"""Measures a trained network on the test classes, and ensembles of a method's seeds.

    python -m studies.judging LAST.pth OUT GPU

writes OUT.json, the metrics of each task, and OUT.npz: for the first task, the embeddings, and the
sums for each class from which its metrics are computed. It is a process of its own, as trainings
are.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import metrics
from devices import Precision, pick_device
from evaluation.meanings import without_counts
from evaluation.measuring import measure
from evaluation.networks import open_checkpoint
from evaluation.tasks import tasks_of
from metrics import comparison
from metrics.comparison import Scores
from storage import load_arrays, save_arrays, write_json
from terminal import leave_out_remarks
from utils import sentence_errors


class Judged(NamedTuple):
    """The content of OUT.npz: unit embeddings (N, d), labels (N,), the same of a gallery, scores.

    `scores` has one row per class, the sums over its queries.
    """

    embeddings: torch.Tensor | None
    labels: torch.Tensor
    gallery: torch.Tensor | None
    gallery_labels: torch.Tensor | None
    ks: tuple[int, ...]
    scores: Scores


def judge(checkpoint: Path, out: Path, gpu: int = 0) -> None:
    """Measures a checkpoint on the test classes of its own data set, once.

    Raises:
        InputError: the checkpoint or the images cannot be used.
    """
    opened = open_checkpoint(str(checkpoint))
    precision = Precision("auto", pick_device(gpu))
    opened.network.to(precision.device, memory_format=precision.memory_format)
    results = [
        measure(opened.network, task, precision, opened.viewing) for task in tasks_of(opened.data)
    ]
    first = results[0]
    assert first.per_query is not None and first.task is not None
    task = first.task
    scores = comparison.query_scores(first.per_query, task.ks, task.queries.labels)
    save(
        out.with_suffix(".npz"),
        Judged(
            first.embeddings,
            torch.from_numpy(task.queries.labels),
            first.gallery,
            None if task.gallery is None else torch.from_numpy(task.gallery.labels),
            task.ks,
            by_classes(scores),
        ),
    )
    shown = [without_counts(result.numbers) for result in results]
    titles = [result.title for result in results]
    write_json(out.with_suffix(".json"), {"results": dict(zip(titles, shown, strict=True))})


def by_classes(scores: Scores) -> Scores:
    """Scores with one row per class, which is all that a bootstrap over classes needs."""
    classes, _, values, counted = scores.of_classes()
    return Scores(scores.names, values, counted, classes)


# --- the file -------------------------------------------------------------------------------------


def save(path: Path, judged: Judged) -> None:
    """Writes the npz, with embeddings in half precision, which is enough for cosines."""
    content: dict[str, Any] = {
        "labels": judged.labels.numpy(),
        "ks": np.array(judged.ks),
        "names": np.array(judged.scores.names),
        "values": judged.scores.values.numpy(),
        "counted": judged.scores.counted.numpy(),
        "classes": judged.scores.labels.numpy(),
    }
    for name in ("embeddings", "gallery"):
        rows = getattr(judged, name)
        if rows is not None:
            unit = torch.nn.functional.normalize(rows.float(), dim=1)
            content[name] = unit.cpu().numpy().astype(np.float16)
    if judged.gallery_labels is not None:
        content["gallery_labels"] = judged.gallery_labels.numpy()
    save_arrays(path, content)


def load(path: Path) -> Judged:
    """Reads a file of `save`.

    Raises:
        InputError: the file is damaged.
    """
    content = load_arrays(path, "file of a study")
    tensors = {name: torch.from_numpy(value) for name, value in content.items() if name != "names"}
    names = tuple(content["names"].tolist())
    return Judged(
        tensors["embeddings"].float() if "embeddings" in tensors else None,
        tensors["labels"],
        tensors["gallery"].float() if "gallery" in tensors else None,
        tensors.get("gallery_labels"),
        tuple(content["ks"].tolist()),
        Scores(names, tensors["values"], tensors["counted"], tensors["classes"]),
    )


def without_embeddings(path: Path) -> None:
    """Removes the embeddings from a file, once the ensembles have been measured."""
    judged = load(path)
    save(path, judged._replace(embeddings=None, gallery=None))


# --- ensembles ------------------------------------------------------------------------------------


def ensembles(runs: Sequence[Judged]) -> dict[str, dict[str, float]]:
    """The metrics of two ensembles of the seeds.

    - concatenated: unit embeddings side by side, S·d dimensions; its cosine is the mean of the
      seeds' cosines.
    - aligned mean, d dimensions: each seed's embeddings are rotated so that they are nearest to the
      first seed's (orthogonal Procrustes, Schönemann 1966), then averaged.

    Returns {} if the embeddings were already removed, or are of different sizes.
    """
    if any(run.embeddings is None for run in runs):
        return {}
    if len({run.embeddings.shape for run in runs}) > 1:
        return {}
    sides = [(run.embeddings, run.gallery) for run in runs]
    joined = [torch.cat([query for query, _ in sides], 1)]
    rotations = [rotation(query, sides[0][0]) for query, _ in sides]
    aligned = [sum(q @ turn for (q, _), turn in zip(sides, rotations, strict=True))]
    if runs[0].gallery is not None:
        joined.append(torch.cat([gallery for _, gallery in sides], 1))
        aligned.append(sum(g @ turn for (_, g), turn in zip(sides, rotations, strict=True)))
    return {
        "concatenated": _measured(runs[0], *joined),
        "aligned mean": _measured(runs[0], *aligned),
    }


def rotation(source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The orthogonal (d, d) matrix R for which source @ R is nearest to target, both (N, d)."""
    left, _, right = torch.linalg.svd(source.double().T @ target.double())
    return (left @ right).float()


def _measured(
    run: Judged, queries: torch.Tensor, gallery: torch.Tensor | None = None
) -> dict[str, float]:
    found = metrics.retrieval_per_query(queries, run.labels, gallery, run.gallery_labels)
    return without_counts(metrics.summarise(found, run.ks))


if __name__ == "__main__":
    leave_out_remarks()
    with sentence_errors():
        judge(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
