"""The network that made an index: its description in the index, and how it is found again."""

from __future__ import annotations

import json
import os
import secrets
from pathlib import Path
from typing import Any

import torch

from evaluation.inference import Embedder, Model, load_run
from evaluation.networks import fingerprint_of
from evaluation.thresholds import thresholds_of
from machine import expanded
from net import hub
from storage import as_json, digest, followed
from utils import InputError


def description(
    run: str | Path,
    embedder: Embedder,
    weights: str | None,
    index: Path,
    codes: str = "none",
    whiten: int | None = None,
) -> dict[str, Any]:
    """The description, stored in an index, of the network that makes its embeddings.

    Args:
        run: the run folder or checkpoint, as given. index: the index to be made.
        codes: see `codes.CODINGS`. whiten: see `load_run`.
    """
    model = embedder.model
    return {
        "kind": "network",
        "made": secrets.token_hex(8),
        "size": model.network.test_size,
        "fingerprint": identity(model),
        **place_of(run, embedder, index),
        "weights": weights,
        **({} if whiten is None else {"whiten": whiten}),
        "model": model.network.architecture.model,
        "codes": codes,
        "thresholds": measured(embedder),
    }


def place_of(run: str | Path, embedder: Embedder, index: Path) -> dict[str, str]:
    """The place of a run, stored in an index: relative to the index's folder, and that folder."""
    # A model from the Hub is stored as the file that was downloaded.
    fetched = str(run).startswith(hub.PREFIX)
    place = embedder.model.path if fetched else Path(expanded(str(run)))
    folder = followed(index).absolute().parent
    return {"run": os.path.relpath(place.absolute(), folder), "folder": str(folder)}


def measured(embedder: Embedder) -> dict[str, Any] | None:
    """The thresholds that a run has measured for this network, as values of JSON."""
    found = thresholds_of(embedder.model.path, embedder.model.network)
    return None if found is None else json.loads(as_json(found.as_dict()))


def identity(model: Model) -> str:
    """A checksum of all that an embedding depends on: the weights, and how images are prepared."""
    viewing: dict[str, Any] = {
        "image_size": model.viewing.image_size,
        "zoom": model.viewing.zoom,
        "resize": model.resize,
        "square": model.square,
        "upright": model.upright,
    }
    held = f"{fingerprint_of(model.network)} {sorted(viewing.items())}"
    return digest(held.encode())


def embedder_of(
    index: Path,
    about: dict[str, Any],
    device: str | torch.device | None = None,
    run: str | Path | None = None,
) -> Embedder:
    """The network that made an index.

    Args:
        index: its file. about: its description of the network, see `description`.
        run: the run's present place; None: one of `places_of`.

    Raises:
        InputError: the run is not there, or has another network.
    """
    place = run_of(index, about, run)
    embedder = load_run(place, device=device, weights=about["weights"], whiten=about.get("whiten"))
    if identity(embedder.model) != about["fingerprint"]:
        raise InputError(
            f"{place} holds another network than the one that made {index}, and embeddings of two "
            "networks cannot be compared; give the run it was made with (--run, in Python run=), "
            "or build it again with this one"
        )
    return embedder


def places_of(index: Path, about: dict[str, Any]) -> list[Path]:
    """Possible places of the run: relative to the index now, and to where the index was made."""
    folders = (followed(index).absolute().parent, Path(about["folder"]))
    return [Path(os.path.normpath(folder / about["run"])) for folder in folders]


def has_moved(index: Path, about: dict[str, Any]) -> bool:
    """Whether the run of an index is in none of `places_of`."""
    return not any(place.exists() for place in places_of(index, about))


def run_of(index: Path, about: dict[str, Any], run: str | Path | None = None) -> Path:
    """The place of an index's run, see `embedder_of`; raises InputError if it is not found."""
    if run:
        return Path(expanded(str(run)))
    places = places_of(index, about)
    for place in places:
        if place.exists():
            return place
    raise InputError(
        f"the network that made {index} was in {places[-1]}, which is not there any more; say "
        "where it is now (--run FOLDER, in Python run=)"
    )
