"""What the flags of a network, and the checkpoints that remember them, may say.

Needs no torch: options/ reads the choices for --help.
"""

from __future__ import annotations

from collections.abc import Iterable

from dataset.base import InputSpec
from utils import InputError

STEMS = {"imagenet": (2, True), "small": (2, False), "tiny": (1, False)}
"""Name → stride of the first convolution, and whether the first max pooling is there.

The last map is 32, 16 or 8 times smaller than the image. With `small` and `tiny` a ResNet's first
kernel is 3×3 instead of 7×7; the inceptions keep theirs, so that ImageNet weights fit every stem.
EfficientNet has no max pooling: `small` takes the stride from its first convolution, `tiny` from
its second stage too.
"""

POOLINGS = {"avg+max": 1, "avg": 1, "max": 1, "grid": 4, "gem": 1, "cls": 1, "attention": 1}
"""Name → cells along each side of the pooled map; the features of all cells follow each other."""

BN_FREEZE = ("0", "1", "affine", "statistics")
"""What rests in the backbone's BatchNorms: see `EmbeddingNet` in network.py, which does it."""

MASK_INITS = ("ones", "normal")
"""How the first of divide and conquer's masks starts: see `EmbeddingMasks`."""

MASKS_AT_TEST = ("none", "sum", "l1")
"""What multiplies an embedding that belongs to no cluster: see `EmbeddingMasks`."""


INPUTS = {
    "imagenet": InputSpec(),
    "caffe": InputSpec("BGR", 255.0, (104.0, 117.0, 128.0), (1.0, 1.0, 1.0)),
    "spherical": InputSpec("BGR", 255.0, (104.0, 117.0, 123.0), (1.0, 1.0, 1.0), size=227),
    "lite": InputSpec("RGB", 255.0, (127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
    "white": InputSpec("RGB", 1.0, (1.0, 1.0, 1.0), (0.35, 0.35, 0.35)),
}
"""`imagenet`: torchvision's weights; `caffe`: BN-Inception's; `spherical`: BN-Inception as the
spherical-embedding code feeds it; `lite`: EfficientNet-Lite's; `white`: drawings, the white
background becomes 0."""


def check_choice(option: str, value: str, known: Iterable[str]) -> None:
    """Raises InputError unless `value` is one of `known`."""
    if value not in known:
        raise InputError(f"{option} {value!r} is unknown; use {', '.join(known)}")
