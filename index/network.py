"""The network behind an index: what the index keeps of it, and how it is found and known again."""

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
    """What an index keeps of the network that makes its embeddings.

    Args:
        run: the run folder or checkpoint, as it was given. index: the index that is made.
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
    """What an index keeps of where its run is: as seen from its own folder, and that folder."""
    # Of a model on the Hub, what was fetched is a file like any other.
    fetched = str(run).startswith(hub.PREFIX)
    place = embedder.model.path if fetched else Path(expanded(str(run)))
    folder = followed(index).absolute().parent
    return {"run": os.path.relpath(place.absolute(), folder), "folder": str(folder)}


def measured(embedder: Embedder) -> dict[str, Any] | None:
    """The thresholds that a run has measured for this network, as JSON keeps them."""
    found = thresholds_of(embedder.model.path, embedder.model.network)
    return None if found is None else json.loads(as_json(found.as_dict()))


def identity(model: Model) -> str:
    """32 hexadecimal digits of all that an embedding depends on: weights, and how it looks."""
    looks: dict[str, Any] = {
        "image_size": model.viewing.image_size,
        "zoom": model.viewing.zoom,
        "resize": model.resize,
        "square": model.square,
        "upright": model.upright,
    }
    held = f"{fingerprint_of(model.network)} {sorted(looks.items())}"
    return digest(held.encode())


def opened(
    run: str | Path,
    device: str | torch.device | None = None,
    weights: str | None = None,
    whiten: int | None = None,
) -> Embedder:
    """The network of a run; see `load_run`.

    Raises:
        InputError: there is none, or no GPU where one is asked for.
    """
    if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this machine has no GPU that torch can use; leave it out")
    return load_run(run, device=device, weights=weights, whiten=whiten)


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
    place = run_of(index, about, run)
    embedder = opened(place, device, about["weights"], about.get("whiten"))
    if identity(embedder.model) != about["fingerprint"]:
        raise InputError(
            f"{place} holds another network than the one that made {index}, and embeddings of two "
            "networks cannot be compared; give the run it was made with (--run), or build it again "
            "with this one"
        )
    return embedder


def places_of(index: Path, about: dict[str, Any]) -> list[Path]:
    """Where the run may be: as seen from the index, and where it was when the index was made."""
    folders = (followed(index).absolute().parent, Path(about["folder"]))
    return [Path(os.path.normpath(folder / about["run"])) for folder in folders]


def has_moved(index: Path, about: dict[str, Any]) -> bool:
    """Whether the run of an index is where the index looks for it no more."""
    return not any(place.exists() for place in places_of(index, about))


def run_of(index: Path, about: dict[str, Any], run: str | Path | None = None) -> Path:
    """Where the run of an index is, see `embedder_of`; raises InputError where it is nowhere."""
    if run:
        return Path(expanded(str(run)))
    places = places_of(index, about)
    for place in places:
        if place.exists():
            return place
    raise InputError(
        f"the network that made {index} was in {places[-1]}, which is not there any more; say "
        "where it is now with --run"
    )
