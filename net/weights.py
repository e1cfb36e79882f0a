"""Weights: ImageNet's for a fresh backbone, and checkpoints of ours and of the released codes.

Layouts of a checkpoint, told apart by their keys:

- ours, and the released Proxy-Anchor, AMLoss, DDML and IDML: `model.<backbone key>`,
  `model.embedding.*`, possibly under `model_state_dict`, possibly with `module.` in front;
- spherical embeddings: `<backbone key>`, `head.fc.*` and, where it has one, `head.bn.*`;
- divide and conquer: torchvision's keys, the same tensors again as `features.*`, `embedding.*`,
  `masks.0` to `masks.K-1`;
- ImageNet files: the backbone's keys and nothing else.

All become the first one; classifiers, which nothing here uses, are dropped.
"""

from __future__ import annotations

import re
import socket
import sys
from collections.abc import Iterable
from http.client import HTTPException
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from net.heads import HEADS
from utils import InputError, load_tensors

if TYPE_CHECKING:
    from net import EmbeddingNet

WEIGHTS_FOLDER = Path(__file__).resolve().parents[1] / "data" / "weights"
"""Searched before torch's own cache."""

_TORCHVISION = "https://download.pytorch.org/models"
IMAGENET_URLS = {
    # The released BN-Inception was converted from Caffe; its host is slow and often away.
    "bn_inception": "http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth",
    # torchvision's IMAGENET1K_V1, the weights of the published numbers.
    "resnet18": f"{_TORCHVISION}/resnet18-f37072fd.pth",
    "resnet34": f"{_TORCHVISION}/resnet34-b627a593.pth",
    "resnet50": f"{_TORCHVISION}/resnet50-0676ba61.pth",
    "resnet101": f"{_TORCHVISION}/resnet101-63fe2227.pth",
    "resnet152": f"{_TORCHVISION}/resnet152-394f9c45.pth",
    "googlenet": f"{_TORCHVISION}/googlenet-1378be20.pth",
}
"""The name of each file ends with the first digits of its sha256."""

SECONDS_WITHOUT_ANSWER = 20

_DEAD_LAYERS = ("fc.", "last_linear.", "aux1.", "aux2.")
_NORM_COUNTER = "num_batches_tracked"


# --- ImageNet weights -----------------------------------------------------------------------------


def load_pretrained(backbone: nn.Module, model: str, pretrained: str) -> None:
    """Gives a backbone its starting weights; heads in the file are left aside.

    Args:
        backbone: the backbone alone, without heads.
        model: its name.
        pretrained: `imagenet`, or a file in any of the layouts of this module's header.

    Raises:
        InputError: the file cannot be had, read or matched with the backbone.
    """
    file = imagenet_file(model) if pretrained == "imagenet" else Path(pretrained)
    weights = canonical(load_tensors(file, "weights file"))
    found = architecture(weights)
    if found != model:
        raise InputError(
            f"weights file {file} holds {_a(found)}, not {_a(model)}; "
            "choose another file or another --model"
        )
    heads = tuple(f"model.{name}." for name in (*HEADS, "head_norm"))
    weights = {
        key.removeprefix("model."): value
        for key, value in weights.items()
        if key.startswith("model.") and not key.startswith(heads)
    }
    _load(backbone, weights, f"weights file {file}")


def imagenet_file(model: str) -> Path:
    """The file of a backbone's ImageNet weights; downloads it when it is nowhere yet.

    Searched are data/weights/ and torch's cache. A download is checked against the hash in its
    name, and nothing of one that fails is left behind.

    Raises:
        InputError: there are no such weights, or they cannot be downloaded.
    """
    if model not in IMAGENET_URLS:
        raise InputError(f"there are no ImageNet weights of {model}; use --pretrained none or FILE")
    url = IMAGENET_URLS[model]
    name = url.rsplit("/", 1)[1]
    cached = Path(torch.hub.get_dir()) / "checkpoints" / name
    for place in (WEIGHTS_FOLDER / name, cached):
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


def _download(url: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    hash_prefix = file.stem.rsplit("-", 1)[1]
    patience = socket.getdefaulttimeout()
    # A host that is away would otherwise keep the user waiting for minutes.
    socket.setdefaulttimeout(SECONDS_WITHOUT_ANSWER)
    try:
        torch.hub.download_url_to_file(url, str(file), hash_prefix, progress=sys.stderr.isatty())
    finally:
        socket.setdefaulttimeout(patience)


# --- checkpoints ----------------------------------------------------------------------------------


def load_checkpoint(net: EmbeddingNet, checkpoint: dict, source: str | Path = "checkpoint") -> None:
    """Loads a checkpoint, in any of the layouts of this module's header, into a network.

    Masks in the file are loaded too; a network without masks is given them.

    Args:
        net: a network of the same architecture, embedding size and heads.
        checkpoint: a state_dict, or a dict with one under `model_state_dict`.
        source: what to call the checkpoint in errors.

    Raises:
        InputError: it holds no such network; names both architectures, sizes or heads.
    """
    options = checkpoint_options(checkpoint, source)
    if options["model"] != net.name:
        raise InputError(
            f"{source} holds {_a(options['model'])}, the network is {_a(net.name)}; "
            f"use --model {options['model']}"
        )
    if options["embedding_size"] != net.embedding_size:
        raise InputError(
            f"{source} has embeddings of size {options['embedding_size']}, the network "
            f"{net.embedding_size}; use --embedding-size {options['embedding_size']}"
        )
    if (options["heads"], options["head_norm"]) != (net.heads, net.head_norm):
        raise InputError(
            f"{source} has the heads {_heads(options['heads'], options['head_norm'])}, the network "
            f"{_heads(net.heads, net.head_norm)}; choose the options that it was trained with"
        )
    weights = canonical(checkpoint)
    if "masks.weight" in weights:
        net.ensure_masks()
    _load(net, weights, str(source))


def checkpoint_options(checkpoint: dict, source: str | Path = "checkpoint") -> dict[str, object]:
    """The arguments of `net.build` that fit a checkpoint, as far as its keys tell.

    Returns:
        `model`, `embedding_size`, `heads`, `head_norm`, `pooling`, `input_spec`.

    Raises:
        InputError: it is no checkpoint of an embedding network.
    """
    layout = _layout(_unwrapped(checkpoint))
    weights = canonical(checkpoint)
    model = architecture(weights)
    heads = tuple(head for head in HEADS if f"model.{head}.weight" in weights)
    if model is None or "embedding" not in heads:
        raise InputError(
            f"{source} holds no embedding network of a known architecture; choose another file"
        )
    rows = len(weights["model.embedding.weight"])
    return {
        "model": model,
        "embedding_size": rows // 2 if "specific" in heads else rows,
        "heads": heads,
        "head_norm": "model.head_norm.weight" in weights,
        "pooling": "avg+max" if layout == "anchorage" else "avg",
        "input_spec": "spherical" if layout == "spherical" else None,
    }


def canonical(checkpoint: dict) -> dict[str, Tensor]:
    """A checkpoint's weights under our keys, without the layers that nothing uses."""
    weights = _unwrapped(checkpoint)
    layout = _layout(weights)
    if layout != "anchorage":
        masks = [weights[f"masks.{k}"] for k in range(sum(key[:6] == "masks." for key in weights))]
        weights = {
            _renamed(key): value
            for key, value in weights.items()
            if not key.startswith(("features.", "masks."))
        }
        if masks:
            weights["masks.weight"] = torch.stack([mask.flatten() for mask in masks])
    return without_dead_layers(weights)


def without_dead_layers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` less the classifiers that released files carry along."""
    dead = tuple(f"model.{layer}" for layer in _DEAD_LAYERS)
    return {key: value for key, value in weights.items() if not key.startswith(dead)}


def _unwrapped(checkpoint: dict) -> dict[str, Tensor]:
    weights = checkpoint.get("model_state_dict", checkpoint)
    return {
        str(key).removeprefix("module."): value
        for key, value in weights.items()
        if isinstance(value, Tensor)
    }


def _layout(weights: Iterable[str]) -> str:
    keys = set(weights)
    if any(key.startswith("model.") for key in keys):
        return "anchorage"
    return "spherical" if "head.fc.weight" in keys else "bare"


def _renamed(key: str) -> str:
    for theirs, ours in (("head.fc.", "embedding."), ("head.bn.", "head_norm.")):
        if key.startswith(theirs):
            key = ours + key.removeprefix(theirs)
    return f"model.{key}"


def architecture(weights: Iterable[str]) -> str | None:
    """The model whose keys these are (ours, see `canonical`), or None."""
    keys = set(weights)
    if "model.inception_3a_1x1.weight" in keys:
        return "bn_inception"
    if "model.inception3a.branch1.conv.weight" in keys:
        return "googlenet"
    stages = [_count(keys, rf"model\.layer{stage}\.(\d+)\.") for stage in (1, 2, 3, 4)]
    bottleneck = "model.layer1.0.conv3.weight" in keys
    return _RESNETS.get((bottleneck, *stages))


_RESNETS = {
    (False, 1, 1, 1, 1): "resnet10",
    (False, 2, 2, 2, 2): "resnet18",
    (False, 3, 4, 6, 3): "resnet34",
    (True, 3, 4, 6, 3): "resnet50",
    (True, 3, 4, 23, 3): "resnet101",
    (True, 3, 8, 36, 3): "resnet152",
}


def _count(keys: set[str], pattern: str) -> int:
    return len({match[1] for match in map(re.compile(pattern).match, keys) if match})


def _load(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    own = module.state_dict()
    # Files of torch 0.3 have (1, C) BatchNorm vectors and no counters.
    weights = {
        key: value.flatten() if key in own and own[key].dim() == 1 else value
        for key, value in weights.items()
    }
    lacking = [key for key in own if key not in weights and not key.endswith(_NORM_COUNTER)]
    unknown = [key for key in weights if key not in own]
    reshaped = [
        f"{key} {tuple(value.shape)} instead of {tuple(own[key].shape)}"
        for key, value in weights.items()
        if key in own and _shape(key, value) != _shape(key, own[key])
    ]
    for what, keys in (("lacks", lacking), ("also has", unknown), ("has", reshaped)):
        if keys:
            more = f" and {len(keys) - 1} more" if len(keys) > 1 else ""
            raise InputError(
                f"{source} does not fit the network: it {what} {keys[0]}{more}; "
                "build the network with the options that the file was trained with"
            )
    module.load_state_dict(weights, strict=False)


def _shape(key: str, value: Tensor) -> torch.Size:
    # The masks take over the number of masks from the file.
    return value.shape[1:] if key == "masks.weight" else value.shape


def _heads(heads: tuple[str, ...], norm: bool) -> str:
    return " and ".join(heads) + (" behind a BatchNorm" if norm else "")


def _a(model: str | None) -> str:
    return f"a {model}" if model else "no known network"
