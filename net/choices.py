"""The values that flags about a network, and descriptions in checkpoints, may have.

Needs no torch: options/ reads the choices for --help.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dataset.base import InputSpec
from utils import InputError

STEMS = {"imagenet": (2, True), "small": (2, False), "tiny": (1, False)}
"""Name → stride of the first convolution, and whether the first max pooling is kept.

The last map is 32, 16 or 8 times smaller than the image. With `small` and `tiny` a ResNet's first
kernel is 3×3 instead of 7×7; the inceptions keep theirs, so that ImageNet weights fit every stem.
EfficientNet has no max pooling: `small` removes the stride of its first convolution, `tiny` that of
its second stage too.
"""

POOLINGS = {"avg+max": 1, "avg": 1, "max": 1, "grid": 4, "gem": 1, "cls": 1, "attention": 1}
"""Name → cells along each side of the pooled map; the features of all cells are concatenated."""

BN_FREEZE = ("0", "1", "affine", "statistics")
"""How far the backbone's BatchNorms are frozen: see `Architecture.bn_freeze`."""

HEAD_USES = ("linear", "training", "none")
"""What the embedding is. `linear`: the output of a linear head. `training`: in training that, and
in evaluation the pooled features before the head. `none`: the pooled features, without a head."""

HEAD_NORMS = (0, 1, "layer", "layer-plain")
"""The norm before the heads: none, a BatchNorm, a LayerNorm, or one without scale and shift.

Checkpoints store the first two as False and True, as when there were no others.
"""


def head_norm_of(text: str) -> int | str:
    """Converts `0` and `1` to numbers, as runs store them."""
    return int(text) if text in ("0", "1") else text


ALL_BLOCKS = "all"


def blocks_of(text: str) -> int | str:
    """A number of blocks, or `all`.

    Raises:
        ArgumentTypeError: it is neither.
    """
    if text == ALL_BLOCKS:
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number of blocks nor all")
    return int(text)


@dataclass(frozen=True)
class Peft:
    """The trained parameters of a backbone whose own weights are frozen (`--peft`), see peft.py.

    Attributes:
        rank: that of the two factors added to each linear layer (LoRA); 0 adds none.
        alpha: their product is multiplied by alpha / rank; None is the rank, a factor of 1.
        prompts: the number of learned tokens prepended to those of each block (VPT-deep).
        biases: whether biases, and scales and shifts of norms, are trained (BitFit).
    """

    rank: int = 0
    alpha: int | None = None
    prompts: int = 0
    biases: bool = False

    @classmethod
    def of(cls, text: str) -> Peft:
        """`none`, or parts joined by commas: `lora:8` or `lora:8:16`, `prompts:10`, `bitfit`.

        Raises:
            InputError: it says something else.
        """
        found: dict[str, Any] = {}
        for part in [] if text == "none" else text.split(","):
            if lora := re.fullmatch(r"lora:([1-9]\d*)(?::([1-9]\d*))?", part):
                rank, alpha = lora.groups(default=lora[1])
                own = {"rank": int(rank), "alpha": None if alpha == rank else int(alpha)}
            elif prompts := re.fullmatch(r"prompts:([1-9]\d*)", part):
                own = {"prompts": int(prompts[1])}
            elif part == "bitfit":
                own = {"biases": True}
            else:
                raise InputError(
                    f"{part!r} is unknown; use lora:RANK (or lora:RANK:ALPHA), "
                    "prompts:N, bitfit, several of them joined by commas, or none"
                )
            if own.keys() & found.keys():
                raise InputError(f"{text!r} names {part.partition(':')[0]} twice")
            found |= own
        return cls(**found)

    @property
    def scale(self) -> float:
        """The factor alpha / rank of LoRA's product; `rank` must be above 0."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank

    def __str__(self) -> str:
        """The form that `of` reads."""
        alpha = "" if self.alpha is None else f":{self.alpha}"
        parts = [f"lora:{self.rank}{alpha}"] if self.rank else []
        parts += [f"prompts:{self.prompts}"] if self.prompts else []
        return ",".join(parts + ["bitfit"] * self.biases) or "none"


def peft_of(text: str) -> str:
    """The value of `--peft` in the order and spelling that runs store.

    Raises:
        ArgumentTypeError: it is not a known value.
    """
    try:
        return str(Peft.of(text))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


WEIGHTS = ("ema", "raw")
"""The weights of a run with a running mean of its weights: the mean, or the trained weights."""
WEIGHTS_TEXT = (
    "for a run that kept a running mean of its weights: the mean (ema, the default) or the weights "
    "themselves (raw)"
)

MASK_INITS = ("ones", "normal")
"""How the first of divide and conquer's masks is initialised: see `EmbeddingMasks`."""

MASKS_AT_TEST = ("none", "sum", "l1")
"""What multiplies an embedding that belongs to no cluster: see `EmbeddingMasks`."""


INPUTS = {
    "imagenet": InputSpec(),
    "caffe": InputSpec("BGR", 255.0, (104.0, 117.0, 128.0), (1.0, 1.0, 1.0)),
    "spherical": InputSpec("BGR", 255.0, (104.0, 117.0, 123.0), (1.0, 1.0, 1.0), size=227),
    "lite": InputSpec("RGB", 255.0, (127.0, 127.0, 127.0), (128.0, 128.0, 128.0)),
    "white": InputSpec("RGB", 1.0, (1.0, 1.0, 1.0), (0.35, 0.35, 0.35)),
}
"""`imagenet`: for torchvision's weights; `caffe`: BN-Inception's; `spherical`: for BN-Inception, as
in the spherical-embedding code; `lite`: for EfficientNet-Lite; `white`: for drawings, whose white
background becomes 0."""


def check_choice(option: str, value: object, known: Iterable[object]) -> None:
    """Raise InputError unless `value` is one of `known`."""
    if value not in known:
        raise InputError(f"{option} {value!r} is unknown; use {', '.join(map(str, known))}")
