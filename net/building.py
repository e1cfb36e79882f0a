"""An architecture, and where its backbone starts → the network."""

from __future__ import annotations

from net.architecture import Architecture
from net.masks import EmbeddingMasks
from net.network import EmbeddingNet
from net.weights import load_pretrained
from utils import InputError


def build(
    architecture: Architecture,
    *,
    pretrained: str | None = None,
    masks: EmbeddingMasks | None = None,
) -> EmbeddingNet:
    """Makes an embedding network, in training mode.

    Args:
        architecture: which; `Architecture("resnet50", 512)`.
        pretrained: where its backbone starts. None or `none`: at random; `imagenet`, which
            downloads; or a file of weights.
        masks: divide and conquer's.

    Raises:
        InputError: masks that do not fit the heads, or weights that cannot be had.
    """
    size, heads = architecture.embedding_size, architecture.heads
    if masks is not None and ("specific" in heads or masks.weight.shape[1] != size):
        raise InputError(
            f"masks of {masks.weight.shape[1]} dimensions cannot be laid on heads "
            f"{', '.join(heads)} of size {size}; choose equal sizes and no disentangling"
        )
    if masks is not None and architecture.head != "linear":
        raise InputError(f"masks lie on a linear head; use --head linear, not {architecture.head}")
    if pretrained == "imagenet":
        _check_imagenet_fits(architecture)
    backbone = architecture.build_backbone()
    if pretrained not in (None, "none"):
        load_pretrained(backbone, architecture.backbone, pretrained)
    return EmbeddingNet(architecture, backbone, masks)


def _check_imagenet_fits(architecture: Architecture) -> None:
    published = architecture.stem == "imagenet" or architecture.backbone.weights_fit_all_stems
    if architecture.width != 1.0 or not published:
        raise InputError(
            f"the ImageNet weights of {architecture.model} fit width 1 and stem imagenet only, not "
            f"width {architecture.width:g} and stem {architecture.stem}; use --pretrained none"
        )
