"""The network behind an index: what the index keeps of it, and how it is found and known again."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import torch

from evaluation.inference import Embedder, Model, load_run
from machine import expanded
from net.peft import fingerprint
from utils import InputError


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
    index: Path,
    about: dict[str, Any],
    device: str | torch.device | None = None,
    run: str | Path | None = None,
) -> Embedder:
    """The network that made an index.

    Args:
        index: its file. about: what it keeps of the network, see `description`.
        run: where its run is now; None is where it was, as seen from the index or from the root.

    Raises:
        InputError: the run is not there, or its network is another one.
    """
    place = Path(expanded(str(run))) if run else _run_of(index, about)
    embedder = load_run(place, device=device, weights=about["weights"])
    if identity(embedder.model) != about["fingerprint"]:
        raise InputError(
            f"{place} holds another network than the one that made {index}, and embeddings of two "
            "networks cannot be compared; give the run it was made with (--run), or build it again "
            "with this one"
        )
    return embedder


def places_of(index: Path, about: dict[str, Any]) -> list[Path]:
    """Where the run may be: as seen from the index, and where it was when the index was made."""
    folders = (index.absolute().parent, Path(about["folder"]))
    return [Path(os.path.normpath(folder / about["run"])) for folder in folders]


def _run_of(index: Path, about: dict[str, Any]) -> Path:
    places = places_of(index, about)
    for place in places:
        if place.exists():
            return place
    raise InputError(
        f"the network that made {index} was in {places[-1]}, which is not there any more; say "
        "where it is now with --run"
    )
