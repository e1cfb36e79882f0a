"""The map of an evaluation: some of its classes in two dimensions.

The places are computed by t-SNE, in a process of its own (page/tsne.py). If it fails, or if the
embeddings vary in one direction only, they are the principal components, and the page says so.
"""

from __future__ import annotations

import importlib.util
import io
import signal
import subprocess
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional as F

from evaluation.embedding import Embedded
from page.thumbnails import Thumbnails
from terminal import notice_if_slow
from utils import our_command, top_folder

MOST_IMAGES, MOST_PER_CLASS, FEWEST_IMAGES = 1000, 12, 5
COMPONENTS = 50  # principal components for t-SNE: enough for its neighbours
SPREAD = 1e-6  # standard deviation below which embeddings of length 1 are the same along an axis
COMMAND = our_command("page.tsne")
PATIENCE = 300.0  # seconds; ten are usual


class TSNEError(Exception):
    """t-SNE has failed; the message is the beginning of a sentence."""


def embedding_map(judged: Embedded, thumbs: Thumbnails, seed: int) -> dict[str, Any] | None:
    """Some classes in two dimensions, or None with fewer than 5 images.

    - `neighbours`: the share of the images whose nearest on the map is among their ten nearest in
      the embedding.
    - `wrong`: the points whose nearest image is of another class, as [place among the points, class
      found].
    - `principal`: set if the two dimensions are the first principal components, because the
      embeddings vary in one direction only (`--embedding-size 1`), or t-SNE failed.
    - Without `points` there is no map, and `note` says why.
    """
    images = judged.images
    chosen = _whole_classes(images.labels, seed)
    if len(chosen) < FEWEST_IMAGES:
        return None
    if importlib.util.find_spec("sklearn") is None:
        return {"note": "Left out: it needs scikit-learn (pip install scikit-learn)."}
    axes = _Axes.of(F.normalize(judged.embeddings[torch.from_numpy(chosen)].float(), dim=1))
    if axes.count == 0:
        return {"note": "Left out: all images have the same embedding."}
    places, about = _places(axes, seed)
    about["neighbours"] = _kept_neighbours(axes.centred, places)
    found, wrong = _nearest(judged, chosen)
    shown, classes = np.unique(images.labels[chosen], return_inverse=True)
    gallery = judged.searched[0]
    if len(chosen) < len(images):
        part = (
            f"{len(chosen):,} of the {len(images):,} images: "
            f"{len(shown):,} of {images.num_classes:,} classes, drawn at random."
        )
        about["note"] = " ".join(filter(None, [part, about["note"]]))
    return {
        **about,
        "names": [images.class_names[label] for label in shown],
        "points": [
            [round(float(x), 4), round(float(y), 4), int(c), thumbs.want(images, i, needed=False)]
            for (x, y), c, i in zip(places, classes, chosen, strict=True)
        ],
        "wrong": [
            [place, str(gallery.class_names[gallery.labels[found[place]]])]
            for place in np.flatnonzero(wrong).tolist()
        ],
    }


def _nearest(judged: Embedded, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(n,) the image nearest to each in the gallery, and (n,) whether it is of another class.

    If the gallery has no image of a query's class, that does not count as wrong.
    """
    gallery, own = judged.searched[0], judged.images.labels[chosen]
    found = judged.nearest(chosen, 1)[0][:, 0]
    count = np.bincount(gallery.labels, minlength=judged.images.num_classes)
    possible = count[own] > (judged.gallery is None)
    return found, possible & (gallery.labels[found] != own)


def _kept_neighbours(points: torch.Tensor, places: np.ndarray) -> float:
    """The share of the images whose nearest on the map is among their ten nearest embeddings."""
    near = torch.cdist(points, points).fill_diagonal_(torch.inf)
    near = near.topk(min(10, len(points) - 1), largest=False).indices
    flat = torch.from_numpy(np.asarray(places, dtype=np.float32))
    first = torch.cdist(flat, flat).fill_diagonal_(torch.inf).argmin(dim=1, keepdim=True)
    return round(float((near == first).any(dim=1).float().mean()), 4)


# --- which images ---------------------------------------------------------------------------------


def _whole_classes(labels: np.ndarray, seed: int) -> np.ndarray:
    """Images of random classes, a dozen of each, until the map is full; ascending."""
    rng = np.random.default_rng(seed)
    chosen: list[int] = []
    for label in rng.permutation(np.unique(labels)):
        if len(chosen) >= MOST_IMAGES:
            break
        chosen += rng.permutation(np.flatnonzero(labels == label))[:MOST_PER_CLASS].tolist()
    return np.sort(np.array(chosen[:MOST_IMAGES]))


# --- their places ---------------------------------------------------------------------------------


def _places(axes: _Axes, seed: int) -> tuple[np.ndarray, dict[str, Any]]:
    """(n, 2) in 0..1, and the entries `note` and `principal` of the map."""
    if axes.count == 1:
        return axes.plane(), {
            "note": "The embeddings vary in one direction only: no t-SNE, but that direction.",
            "principal": True,
        }
    try:
        with notice_if_slow("drawing the map of the embedding (t-SNE)"):
            places = _tsne(axes.points(COMPONENTS), seed)
    except TSNEError as error:
        note = f"{error}; shown instead are the first two principal components."
        return axes.plane(), {"note": note, "principal": True}
    return (places - places.min(0)) / np.maximum(np.ptp(places, axis=0), 1e-9), {"note": ""}


class _Axes(NamedTuple):
    """Centred points (n, d) with their principal axes (k, d).

    Attributes:
        count: the number of axes along which the points vary.
    """

    centred: torch.Tensor
    axes: torch.Tensor
    count: int

    @classmethod
    def of(cls, points: torch.Tensor) -> _Axes:
        centred = points - points.mean(dim=0)
        _, values, axes = torch.linalg.svd(centred, full_matrices=False)
        return cls(centred, axes, int((values > SPREAD * len(points) ** 0.5).sum()))

    def points(self, dimensions: int) -> np.ndarray:
        """The first principal components; the centred points if they have no more dimensions."""
        dimensions = min(dimensions, *self.centred.shape)
        if dimensions == self.centred.shape[1]:
            return self.centred.numpy()
        return (self.centred @ self.axes[:dimensions].T).numpy()

    def plane(self) -> np.ndarray:
        """(n, 2) the first two principal components, in 0..1 and to one scale."""
        components = (self.centred @ self.axes[: min(2, self.count)].T).numpy()
        places = np.zeros((len(components), 2), np.float32)
        places[:, : components.shape[1]] = components
        middle = (places.max(0) + places.min(0)) / 2
        return 0.5 + (places - middle) / np.ptp(places, axis=0).max()


def _tsne(points: np.ndarray, seed: int) -> np.ndarray:
    """Computes the places (n, 2) of points (n, d) in a child process.

    Raises:
        TSNEError: it failed, died, or took too long.
    """
    given = io.BytesIO()
    np.save(given, points, allow_pickle=False)
    try:
        ended = subprocess.run(
            [*COMMAND, str(seed)],
            input=given.getvalue(),
            capture_output=True,
            cwd=top_folder(),
            timeout=PATIENCE,
        )
    except subprocess.TimeoutExpired:
        raise TSNEError(f"t-SNE took more than {PATIENCE:g} seconds") from None
    except OSError as error:
        raise TSNEError(f"t-SNE could not be started ({error.strerror})") from error
    if ended.returncode:
        raise TSNEError(f"t-SNE failed ({_cause(ended)})")
    try:
        places = np.load(io.BytesIO(ended.stdout), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise TSNEError("t-SNE gave no answer") from error
    if not np.isfinite(places).all():
        raise TSNEError("t-SNE gave places that are not finite")
    return places


def _cause(ended: subprocess.CompletedProcess[bytes]) -> str:
    """The reason why a process failed, in a few words."""
    if ended.returncode < 0:
        return signal.strsignal(-ended.returncode) or f"signal {-ended.returncode}"
    last = ended.stderr.decode(errors="replace").strip().splitlines()[-1:]
    return last[0] if last else f"exit status {ended.returncode}"
