"""The network behind an index: what the index keeps of it, and how it is found and known again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from evaluation.inference import Embedder, Model, load_run
from machine import expanded
from net.peft import fingerprint
from utils import InputError

if TYPE_CHECKING:
    from index.gallery import Index


def description(run: str | Path, embedder: Embedder, weights: str | None, index: Path) -> dict:
    """What an index keeps of the network that makes its embeddings.

    Args:
        run: the run folder or checkpoint, as it was given. index: the index that is made.
    """
    model = embedder.model
    return {
        "kind": "network",
        "size": model.network.test_size,
        "fingerprint": identity(model),
        "run": os.path.relpath(Path(expanded(str(run))).absolute(), index.absolute().parent),
        "folder": str(index.absolute().parent),
        "weights": weights,
        "model": model.network.architecture.model,
    }


def identity(model: Model) -> str:
    """32 hexadecimal digits of all that an embedding depends on: weights, and how it looks."""
    looks: dict[str, Any] = {
        "image_size": model.viewing.image_size,
        "zoom": model.viewing.zoom,
        "resize": model.resize,
        "square": model.square,
        "upright": model.upright,
    }
    held = f"{fingerprint(model.network.state_dict())} {sorted(looks.items())}"
    return hashlib.blake2b(held.encode(), digest_size=16).hexdigest()


def embedder_of(
    index: Index, device: str | torch.device | None = None, run: str | Path | None = None
) -> Embedder:
    """The network that made an index.

    Args:
        run: where its run is now; None is where it was, from the index or absolutely.

    Raises:
        InputError: the run is not there, or its network is another one.
    """
    place = Path(expanded(str(run))) if run else _run_of(index)
    embedder = load_run(place, device=device, weights=index.about["weights"])
    check_same(index, embedder, place)
    return embedder


def check_same(index: Index, embedder: Embedder, place: str | Path) -> None:
    """Raises InputError unless the network is the one that made the index."""
    if identity(embedder.model) != index.about["fingerprint"]:
        raise InputError(
            f"{place} holds another network than the one that made {index.path}, and embeddings of "
            "two networks cannot be compared; give the run it was made with, or build it again "
            "with this one"
        )


def _run_of(index: Index) -> Path:
    kept = index.about["run"]
    folders = (index.path.absolute().parent, Path(index.about["folder"]))
    places = [Path(os.path.normpath(folder / kept)) for folder in folders]
    for place in places:
        if place.exists():
            return place
    raise InputError(
        f"the network that made {index.path} was in {places[-1]}, which is not there any more; "
        "say where it is now with --run"
    )
