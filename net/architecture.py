"""The description of a network: everything needed to build it, except its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from torch import nn

from net.backbones import Backbone, find_backbone
from net.choices import (
    BN_FREEZE,
    HEAD_NORMS,
    HEAD_USES,
    INPUTS,
    POOLINGS,
    InputSpec,
    Peft,
    check_choice,
)
from net.heads import head_init, head_sizes
from utils import InputError


@dataclass(frozen=True)
class Architecture:
    """A network's description; flags and checkpoints use the same names.

    Attributes:
        model: one of `MODELS`, in any spelling; becomes the spelling there.
        embedding_size: d, at least 1.
        heads: `embedding`, and with it `uncertainty` (IDML) or `specific` (DDML).
        head: one of `HEAD_USES`; with `none`, embedding_size is that of the pooled features.
        pooling: one of `POOLINGS`, see `heads.Pool`; None becomes the backbone's usual one.
        stem: `imagenet`, as published, reduces an image 32 times; `small` 16 times (no max pooling
            after the first convolution), `tiny` 8 times (and that convolution has stride 1).
        width: channels of a ResNet as a multiple of the published ones.
        head_norm: the norm before the heads: none (False); a trained BatchNorm (True: spherical
            embeddings); `layer`, a trained LayerNorm (RS@k), or `layer-plain`, one without scale
            and shift (HIER).
        head_init: `kaiming`, or PyTorch's `default` (spherical embeddings, divide and conquer), and
            others: see `heads.head_init`.
        head_parts: the number of parts of a head's rows that are initialised as if each were a
            layer of its own (divide and conquer).
        dropout: on the pooled features (divide and conquer: .01).
        bn_freeze: how far BatchNorms of the backbone are frozen. `0`: not at all. `1`: running
            statistics are fixed, and scale and shift have no gradient until
            `freeze_backbone(False)` ends a warm-up, or with BitFit have one from the start.
            `affine`: everything stays fixed. `statistics`: only the running statistics are fixed.
        bn_momentum: share of the batch in the running statistics of these BatchNorms; None becomes
            the backbone's own, if its record has one.
        keep_blocks: the number of blocks after which the backbone ends; None keeps all.
        freeze_stem: whether the modules before the first block are frozen (the patch embedding; not
            the position embeddings and class tokens).
        freeze_blocks: how many of the first blocks are frozen, or `all`, together with the stem and
            its tokens: they have no gradient and stay in evaluation mode.
        drop_path: stochastic depth of the last block; it rises from 0 at the first.
        peft: what is trained while the backbone's own weights are frozen, as `Peft.of` reads it.
        input_spec: one of `INPUTS`; None is the one that the backbone's ImageNet weights expect.
        image_size: side in pixels of the images that it is built for; None if any size will do.
        model_args: more arguments for timm's constructor, as pairs of a name and a value.

    Raises:
        InputError: an unknown name, a bad value, or something that the backbone does not support.
    """

    model: str
    embedding_size: int
    heads: tuple[str, ...] = ("embedding",)
    head: str = "linear"
    pooling: str | None = None
    stem: str = "imagenet"
    width: float = 1.0
    head_norm: bool | str = False
    head_init: str = "kaiming"
    head_parts: int = 1
    dropout: float = 0.0
    bn_freeze: str = "0"
    bn_momentum: float | None = None
    keep_blocks: int | None = None
    freeze_stem: bool = False
    freeze_blocks: int | str = 0
    drop_path: float = 0.0
    peft: str = "none"
    input_spec: str | None = None
    image_size: int | None = None
    model_args: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        backbone = self.backbone
        if self.model_args and "model_args" not in backbone.takes:
            raise InputError(
                f"--model-args are for models of timm; {backbone.name} takes none; leave them out"
            )
        sized = "image_size" in backbone.takes
        self._set(
            model=backbone.name,
            heads=tuple(self.heads),
            pooling=backbone.poolings[0] if self.pooling is None else self.pooling,
            head_norm=self.head_norm if isinstance(self.head_norm, str) else bool(self.head_norm),
            bn_freeze=str(self.bn_freeze),
            bn_momentum=backbone.bn_momentum if self.bn_momentum is None else self.bn_momentum,
            freeze_stem=bool(self.freeze_stem),
            peft=str(Peft.of(self.peft)),
            # None where the backbone does not use it, so that equal networks compare equal.
            image_size=(self.image_size or backbone.image_size) if sized else None,
            model_args=tuple(
                (name, tuple(value) if isinstance(value, list) else value)
                for name, value in self.model_args
            ),
        )
        self._check()

    def _check(self) -> None:
        """Raise InputError for a name or a number that the network cannot have."""
        check_choice("pooling", self.pooling, POOLINGS)
        if self.pooling not in self.backbone.poolings:
            raise InputError(
                f"pooling {self.pooling}: {self.model} cannot be pooled like that; use "
                f"{', '.join(self.backbone.poolings)}"
            )
        if self.keep_blocks is not None and "keep_blocks" not in self.backbone.takes:
            raise InputError(
                f"--keep-blocks {self.keep_blocks}: {self.model} cannot be cut short; leave it out"
            )
        check_choice("stem", self.stem, self.backbone.stems)
        check_choice("bn_freeze", self.bn_freeze, BN_FREEZE)
        check_choice("head", self.head, HEAD_USES)
        check_choice("head_norm", self.head_norm, HEAD_NORMS)
        if self.input_spec is not None:
            check_choice("input_spec", self.input_spec, INPUTS)
        head_init(self.head_init)
        if self.embedding_size < 1:
            raise InputError(f"embedding size {self.embedding_size}: it must be at least 1")
        head_sizes(self.heads, self.embedding_size)
        if self.head != "linear" and self.heads != ("embedding",):
            raise InputError(
                f"head {self.head}: the method needs the heads {', '.join(self.heads)}; use head "
                "linear"
            )
        if self.bn_momentum is not None and not 0 < self.bn_momentum <= 1:
            raise InputError(f"bn_momentum {self.bn_momentum:g}: it must be above 0 and at most 1")
        if not 0 <= self.drop_path < 1:
            raise InputError(f"drop_path {self.drop_path:g}: it must be from 0 to below 1")
        if self.width != 1.0 and not self.backbone.can_widen:
            raise InputError(f"width {self.width:g}: {self.model} cannot be widened; use width 1")

    def _set(self, **values: object) -> None:
        for name, value in values.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def backbone(self) -> Backbone:
        """The record of `model`."""
        return find_backbone(self.model)

    def build_backbone(self) -> nn.Module:
        """The backbone, with random weights and without heads."""
        more = {name: getattr(self, name) for name in self.backbone.takes}
        return self.backbone.build(self.stem, self.width, **more)

    @property
    def input(self) -> InputSpec:
        """The kind of input that the network expects."""
        wanted = self.input_spec or self.backbone.input_spec
        return INPUTS[wanted] if isinstance(wanted, str) else wanted

    @classmethod
    def entries(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """The entries of `options`, or of a checkpoint, that describe a network."""
        return {each.name: options[each.name] for each in fields(cls) if each.name in options}
