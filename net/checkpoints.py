"""Checkpoints, ours and those of the released codes: their networks and their weights.

Ours describe their network (`EmbeddingNet.description`, under `network`), so that any backbone can
be loaded. Foreign files are recognised by their keys:

- the released Proxy-Anchor, AMLoss, DDML and IDML: `model.<backbone key>`, `model.embedding.*`,
  possibly under `model_state_dict`, possibly with `module.` in front;
- spherical embeddings: `<backbone key>`, `head.fc.*` and perhaps `head.bn.*`;
- divide and conquer: torchvision's keys, the same tensors again as `features.*`, `embedding.*`,
  `masks.0` to `masks.K-1`;
- ImageNet files: the backbone's keys and nothing else.

Wrappers of other training codes (`WRAPPERS`) are removed, and so are the parts of names that come
from them (`_LAID_ROUND`). All layouts are converted to the first. Classifiers, which nothing here
uses, are dropped on loading.

In our first version, DDML's class-specific head took the features (`model.specific.*`); in its
authors' code it takes the main head's output. From such a file only the means of the main head are
loaded, which are its embedding; it cannot be trained further.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from net.architecture import Architecture
from net.backbones import find_backbone, recognised
from net.choices import MASKS_AT_TEST, WEIGHTS, Peft, check_choice
from net.heads import HEADS, classifiers
from net.network import EmbeddingNet
from net.peft import ADDED_KEYS, merged
from runs import Checkpoint, is_ours
from utils import InputError

_MASK_ENTRIES = ("masks_at_test", "mask_relu")
_NO_LONGER_KEPT = ("l2_norm",)
_UNSAID = {"bn_momentum": 0.1}
"""Entries that our old checkpoints lack → the value that they had, which is no longer the default.
"""
_NORM_COUNTER = "num_batches_tracked"
_FORMER_SPECIFIC = "model.specific."


WRAPPERS = ("model_ema", "state_dict_ema", "state_dict", "model_state_dict", "model", "teacher")
WRAPPERS += ("network", "net")
"""The entries in which training codes keep the weights; the first that exists counts."""

_LAID_ROUND = ("module", "_orig_mod")
"""Parts of a weight's name that come from a wrapper around its network or a part of it:
DataParallel or a running mean, and torch.compile."""
_AVERAGED = "n_averaged"
"""A counter that torch's running mean stores beside its weights."""


# --- which network --------------------------------------------------------------------------------


def architecture_of(
    checkpoint: Checkpoint, source: str | Path = "checkpoint", *, image_size: int = 224
) -> Architecture:
    """The network that a checkpoint holds.

    - Our checkpoints describe it; entries that an old one lacks have their defaults.
    - The keys of a foreign file show the backbone, the embedding size and the heads; pooling and
      input are those of its published code.

    Args:
        checkpoint: a state_dict, or a dict with one under `model_state_dict`.
        source: what to call the checkpoint in errors.
        image_size: side in pixels of the images it is for; decides the stem of a foreign file.

    Raises:
        InputError: it is not a checkpoint of an embedding network, or is of a newer version.
    """
    described = description_of(checkpoint, source)
    if described is None:
        return _architecture_of_foreign(checkpoint, source, image_size)
    try:
        return Architecture(**Architecture.entries(described))
    except InputError as error:
        raise InputError(f"{source} describes a network that cannot be built: {error}") from error


def description_of(checkpoint: Checkpoint, source: str | Path) -> dict[str, Any] | None:
    """The description of the network in a checkpoint of ours; None for a foreign file.

    Raises:
        InputError: it has entries that this version does not know.
    """
    if not is_ours(checkpoint):
        return None
    said = checkpoint["network"] if "network" in checkpoint else _described_by_flags(checkpoint)
    said = {**_UNSAID, **said}
    described = {entry: value for entry, value in said.items() if entry not in _NO_LONGER_KEPT}
    if _has_former_specific(_unwrapped(checkpoint)):
        described["heads"] = tuple(head for head in described["heads"] if head != "specific")
    known = {*(field.name for field in fields(Architecture)), *_MASK_ENTRIES}
    if unknown := sorted(described.keys() - known):
        raise InputError(
            f"{source} describes its network by {' and '.join(unknown)}, which this version does "
            "not know; update the code"
        )
    if lacking := sorted({"model", "embedding_size"} - described.keys()):
        raise InputError(f"{source} does not say its network's {lacking[0]}; choose another file")
    return described


def _described_by_flags(checkpoint: Checkpoint) -> dict[str, Any]:
    """The description of an old last.pth, which has none, made from the flags of its run."""
    flags, weights = checkpoint["args"], checkpoint["model_state_dict"]
    described = {**Architecture.entries(flags), "heads": _heads_in(weights)}
    if "masks.weight" in weights:
        scaling = flags.get("masks_normalize_before_sum") or "sum"
        described["masks_at_test"] = scaling if flags.get("masks_sum_for_full_emb") else "none"
        described["mask_relu"] = bool(flags.get("mask_relu", True))
    return described


def _architecture_of_foreign(
    checkpoint: Checkpoint, source: str | Path, image_size: int
) -> Architecture:
    layout, weights = _layout(_unwrapped(checkpoint)), weights_of(checkpoint)
    model, heads = recognised(_backbone_keys(weights)), _heads_in(weights)
    if model is None or "embedding" not in heads:
        held = "no embedding network of a known architecture"
        alone = held if model is None else f"a {model} without an embedding"
        raise InputError(
            f"{source} holds {alone}; choose another file, or take it for a backbone "
            f"(--model {model or 'NAME'} --pretrained FILE)"
        )
    rows = len(weights["model.embedding.weight"])
    return Architecture(
        model,
        rows // 2 if "specific" in heads else rows,
        heads,
        stem=find_backbone(model).default_stem(image_size),
        head_norm="model.head_norm.weight" in weights,
        pooling="avg+max" if layout == "proxy-anchor" else "avg",
        input_spec="spherical" if layout == "spherical" else None,
    )


def backbone_of(checkpoint: Checkpoint, source: str | Path) -> str | None:
    """The name of the backbone in a checkpoint, with or without heads; None if unknown."""
    if description_of(checkpoint, source) is not None:
        return architecture_of(checkpoint, source).model
    return recognised(_backbone_keys(weights_of(checkpoint)))


def _heads_in(weights: Collection[str]) -> tuple[str, ...]:
    return tuple(head for head, key in HEADS.items() if f"model.{key}.weight" in weights)


def _backbone_keys(weights: Iterable[str]) -> set[str]:
    return {key.removeprefix("model.") for key in weights if key.startswith("model.")}


# --- its weights ----------------------------------------------------------------------------------


def with_weights(
    checkpoint: Checkpoint, weights: str | None = None, source: str | Path = "checkpoint"
) -> Checkpoint:
    """The checkpoint with the chosen weights as its `model_state_dict`.

    Args:
        checkpoint: ours or released; it is not changed.
        weights: `ema`, the running mean that the run kept; `raw`, the weights that were trained;
            None is the mean if there is one.

    Raises:
        InputError: it holds no running mean, or `weights` has another value.
    """
    if weights is not None:
        check_choice("weights", weights, WEIGHTS)
    mean = checkpoint.get("ema_state_dict")
    if mean is None and weights == "ema":
        raise InputError(
            f"{source} holds no running mean of weights, because its run kept none (--ema); leave "
            "out which weights are meant"
        )
    if mean is None or weights == "raw":
        return checkpoint
    return {**checkpoint, "model_state_dict": checkpoint.get("model_state_dict", {}) | mean}


def load_checkpoint(
    network: EmbeddingNet,
    checkpoint: Checkpoint,
    source: str | Path = "checkpoint",
    *,
    masks: bool = True,
) -> None:
    """Loads the weights of a checkpoint, ours or a released one, into a network.

    - A network without masks gets those of the file, and how they act at test time.
    - With `masks=False` masks in the file are ignored, and the network keeps its own.
    - Position embeddings are resized if the network is built for images of another size.

    Args:
        network: of the same backbone, embedding size and heads.
        checkpoint: a state_dict, or a dict with one under `model_state_dict`.
        source: what to call the checkpoint in errors.
        masks: whether masks are loaded too.

    Raises:
        InputError: it holds no such network; names both architectures, sizes or heads.
    """
    held = architecture_of(checkpoint, source)
    _check_same(held, network.architecture, source)
    weights = weights_of(checkpoint)
    if held.image_size != network.architecture.image_size:
        weights = _for_other_size(network, weights)
    if held.peft != network.architecture.peft:
        weights = _with_other_peft(weights, Peft.of(held.peft), network, source)
    if not masks:
        own = {k: v for k, v in network.state_dict().items() if k.startswith("masks.")}
        weights = {k: v for k, v in weights.items() if not k.startswith("masks.")} | own
    elif "masks.weight" in weights:
        network.ensure_masks()
    load_weights(network, weights, str(source))
    if masks and network.masks is not None:
        described = description_of(checkpoint, source) or {}
        at_test = described.get("masks_at_test", network.masks.full)
        check_choice("masks_at_test", at_test, MASKS_AT_TEST)
        network.masks.full = at_test
        network.masks.relu = described.get("mask_relu", network.masks.relu)


def _for_other_size(network: EmbeddingNet, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of a network for images of another size, adapted to this one's size."""
    backbone = {key.removeprefix("model."): value for key, value in weights.items()}
    fitted = network.architecture.backbone.adapt(network.model, backbone)
    return weights | {f"model.{key}": value for key, value in fitted.items()}


def _with_other_peft(
    weights: dict[str, Tensor], held: Peft, network: EmbeddingNet, source: str | Path
) -> dict[str, Tensor]:
    """The weights for a network with another PEFT, or none.

    LoRA is merged into the weights. Parameters of the network's own PEFT keep their values.
    """
    prompts = Peft.of(network.architecture.peft).prompts
    if held.prompts and held.prompts != prompts:
        raise InputError(
            f"{source} has {held.prompts} prompts in each block, the network {prompts or 'none'}, "
            f"and without them it is another one; use --peft {held}"
        )
    added = {k: v for k, v in network.state_dict().items() if k.endswith(ADDED_KEYS)}
    return added | merged(weights, held)


def _check_same(held: Architecture, wanted: Architecture, source: str | Path) -> None:
    if held.model != wanted.model:
        raise InputError(
            f"{source} holds a {held.model}, the network is a {wanted.model}; "
            f"use --model {held.model}"
        )
    if held.embedding_size != wanted.embedding_size:
        raise InputError(
            f"{source} has embeddings of size {held.embedding_size}, the network "
            f"{wanted.embedding_size}; use --embedding-size {held.embedding_size}"
        )
    if (held.heads, held.head_norm) != (wanted.heads, wanted.head_norm):
        raise InputError(
            f"{source} has the heads {_heads_in_words(held)}, the network "
            f"{_heads_in_words(wanted)}; choose the options that it was trained with"
        )


def _heads_in_words(architecture: Architecture) -> str:
    norms = {False: "", True: " behind a BatchNorm", "layer": " behind a LayerNorm"}
    norms["layer-plain"] = " behind a LayerNorm without scale and shift"
    return " and ".join(architecture.heads) + norms[architecture.head_norm]


def weights_of(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """A checkpoint's weights under our keys, whatever its layout."""
    weights = _unwrapped(checkpoint)
    if _layout(weights) == "proxy-anchor":
        return _means_alone(weights) if _has_former_specific(weights) else weights
    masks = [weights[f"masks.{k}"] for k in range(sum(key[:6] == "masks." for key in weights))]
    # Divide and conquer's features.* are copies; without a head they may be the backbone itself.
    aside = ("masks.", "features.") if "embedding.weight" in weights else ("masks.",)
    weights = {_renamed(key): value for key, value in weights.items() if not key.startswith(aside)}
    if masks:
        weights["masks.weight"] = torch.stack([mask.flatten() for mask in masks])
    return weights


def _has_former_specific(weights: Collection[str]) -> bool:
    """Whether this is our first version of DDML, with its specific head on the features."""
    return f"{_FORMER_SPECIFIC}weight" in weights


def _means_alone(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Reduce the weights to a network with one head: the rows of the main head that are means."""
    main = ("model.embedding.weight", "model.embedding.bias")
    return {
        key: value[: len(value) // 2] if key in main else value
        for key, value in weights.items()
        if not key.startswith(_FORMER_SPECIFIC)
    }


def _unwrapped(checkpoint: Checkpoint) -> dict[str, Tensor]:
    weights = {key: value for key, value in inside(checkpoint).items() if isinstance(value, Tensor)}
    return weights if is_ours(checkpoint) else _network_in(weights) or weights


def inside(content: Checkpoint) -> dict[str, Any]:
    """The entries of a file, without the wrappers of training codes.

    `WRAPPERS` are removed, and the parts of names that are `_LAID_ROUND`.
    """
    while wrapped := [key for key in WRAPPERS if isinstance(content.get(key), dict)]:
        content = content[wrapped[0]]
    return {_inner_name(str(key)): value for key, value in content.items() if key != _AVERAGED}


def _inner_name(name: str) -> str:
    return ".".join(part for part in name.split(".") if part not in _LAID_ROUND)


def _network_in(weights: dict[str, Tensor]) -> dict[str, Tensor] | None:
    """The weights of the network among all weights of a training code's module.

    None if no known backbone is found, or several are.
    """
    if recognised({key.removeprefix("model.") for key in weights}) is not None:
        return weights
    parts: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        part, _, inner = key.partition(".")
        if inner:
            parts.setdefault(part, {})[inner] = value
    found = [network for network in map(_network_in, parts.values()) if network is not None]
    return found[0] if len(found) == 1 else None


def _layout(weights: Iterable[str]) -> str:
    keys = set(weights)
    if any(key.startswith("model.") for key in keys):
        return "proxy-anchor"
    return "spherical" if "head.fc.weight" in keys else "bare"


def _renamed(key: str) -> str:
    for theirs, ours in (("head.fc.", "embedding."), ("head.bn.", "head_norm.")):
        if key.startswith(theirs):
            key = ours + key.removeprefix(theirs)
    return f"model.{key}"


# --- loading --------------------------------------------------------------------------------------


def load_weights(module: nn.Module, weights: dict[str, Tensor], source: str) -> None:
    """Load all `weights`, or nothing.

    Raises:
        InputError: keys or shapes differ.
    """
    own = module.state_dict()
    dead = classifiers(weights, own)
    # Files of torch 0.3 have (1, C) BatchNorm vectors and no counters.
    weights = {
        key: value.flatten() if key in own and own[key].dim() == 1 else value
        for key, value in weights.items()
        if key not in dead
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
    # The number of masks is taken from the file.
    return value.shape[1:] if key == "masks.weight" else value.shape
