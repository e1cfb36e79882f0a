"""Builds a network from an architecture and initial weights of its backbone."""

from __future__ import annotations

from pathlib import Path

from net.architecture import Architecture
from net.base import in_words
from net.checkpoints import architecture_of, load_checkpoint, with_weights
from net.masks import EmbeddingMasks
from net.network import EmbeddingNet
from net.peft import fingerprint
from net.weights import imagenet_file, load_pretrained
from runs import Checkpoint, checked, is_ours, with_base
from runs import load_checkpoint as read
from storage import load_tensors, need_file
from utils import InputError


def build(
    architecture: Architecture,
    *,
    pretrained: str | None = None,
    masks: EmbeddingMasks | None = None,
) -> EmbeddingNet:
    """Makes an embedding network, in training mode.

    Args:
        architecture: which network; `Architecture("resnet50", 512)`.
        pretrained: initial weights of its backbone. None or `none`: random; `imagenet`:
            downloaded; or a file of weights. From the checkpoint of a run come the weights that
            evaluation uses: their running mean (--ema), with LoRA merged into the layers.
        masks: divide and conquer's masks.

    Raises:
        InputError: masks that do not fit the heads, or weights that cannot be found or loaded.
    """
    size, heads = architecture.embedding_size, architecture.heads
    if masks is not None and ("specific" in heads or masks.weight.shape[1] != size):
        raise InputError(
            f"masks of {masks.weight.shape[1]} dimensions do not fit the heads "
            f"{', '.join(heads)} of size {size}; choose equal sizes and no disentangling"
        )
    if masks is not None and architecture.head != "linear":
        raise InputError(f"masks need a linear head; use --head linear, not {architecture.head}")
    check_pretrained(architecture, pretrained)
    backbone = architecture.build_backbone()
    if pretrained not in (None, "none"):
        record = architecture.backbone
        file = imagenet_file(record) if pretrained == "imagenet" else Path(pretrained)
        load_pretrained(backbone, record, _content(file), file)
    return EmbeddingNet(architecture, backbone, masks)


def check_pretrained(architecture: Architecture, pretrained: str | None) -> None:
    """Checks initial weights as far as nothing has to be downloaded or read for that.

    Args:
        pretrained: see `build`.

    Raises:
        InputError: the ImageNet weights do not fit the architecture, or there is no such file.
    """
    if pretrained == "imagenet":
        _check_imagenet_fits(architecture)
    elif pretrained not in (None, "none"):
        need_file(Path(pretrained), "weights file")


def _check_imagenet_fits(architecture: Architecture) -> None:
    published = architecture.stem == "imagenet" or architecture.backbone.weights_fit_all_stems
    if architecture.width != 1.0 or not published:
        raise InputError(
            f"the ImageNet weights of {architecture.model} fit width 1 and stem imagenet only, not "
            f"width {architecture.width:g} and stem {architecture.stem}; use --pretrained none"
        )


def _content(file: Path) -> Checkpoint:
    """The content of a file of weights; of our checkpoints, with the base and the running mean."""
    content = load_tensors(file, "weights file")
    if not is_ours(content):
        return content
    return with_weights(whole(checked(content, file), file), source=file)


# --- what a checkpoint leaves out -----------------------------------------------------------------


def whole(content: Checkpoint, source: str | Path) -> Checkpoint:
    """A checkpoint with all weights; a missing base is rebuilt.

    Args:
        content: as `runs.load_checkpoint` reads it. source: what to call it in errors.

    Raises:
        InputError: the weights that the base was made from are missing, or have changed.
    """
    if "base" not in content:
        return content
    base = content["base"]
    lacking = (
        f"{source} holds only what was trained on top of {in_words(base)}; put the base.pth of "
        "its run into its folder"
    )
    if base["pretrained"] == "none" and base["checkpoint"] is None:
        raise InputError(lacking)
    try:
        begun = base["checkpoint"] is None
        network = build(
            architecture_of(content, source), pretrained=base["pretrained"] if begun else None
        )
        if not begun:
            start = with_weights(whole(read(base["checkpoint"]), base["checkpoint"]))
            load_checkpoint(network, start, base["checkpoint"], masks=False)
    except InputError as error:
        raise InputError(f"{lacking}, or make that available ({error})") from error
    weights = network.base_state()
    if fingerprint(weights) != base["fingerprint"]:
        raise InputError(f"{lacking}, because the {in_words(base)} that is here is another one")
    return with_base(content, weights)
