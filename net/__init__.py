"""Networks: a backbone, pooling, and the linear heads that give embeddings.

`build` makes them, `load_checkpoint` fills them from our checkpoints and from those of the released
codes. Outputs are raw and in float32; who needs unit length normalises.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from losses import Embeddings
from net.bn_inception import BNInception
from net.googlenet import GoogLeNet
from net.heads import (
    HEADS,
    POOLINGS,
    UNCERTAINTY_SCALE,
    head_sizes,
    make_head,
    pool,
)
from net.heads import (
    head_init as check_head_init,
)
from net.masks import EmbeddingMasks
from net.resnet import DEPTHS, ResNet
from net.weights import (
    canonical,
    checkpoint_options,
    load_checkpoint,
    load_pretrained,
    without_dead_layers,
)
from utils import InputError, nearest_names

__all__ = [
    "BN_FREEZE",
    "INPUTS",
    "MODELS",
    "STEMS",
    "EmbeddingMasks",
    "EmbeddingNet",
    "InputSpec",
    "build",
    "canonical",
    "checkpoint_options",
    "load_checkpoint",
]


def __getattr__(name: str) -> Any:
    """`from net import load_run`: a run as a function from pictures to embeddings (inference.py).

    It looks at pictures as evaluation does and so stands above it: nothing here may import it.
    """
    if name != "load_run":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from inference import load_run

    return load_run


MODELS = ("bn_inception", *DEPTHS, "googlenet")
STEMS = ("imagenet", "small", "tiny")
_HEAD_KEYS = tuple(f"{name}." for name in (*HEADS, "head_norm"))
BN_FREEZE = ("0", "1", "affine", "statistics")


@dataclass(frozen=True)
class InputSpec:
    """What a backbone wants to be fed.

    An image, channels in the order `color`, values in 0..`scale`, is normalised by
    (image - mean) / std; `mean` and `std` are in the order of `color`. At test time its short side
    is brought to `resize` pixels and its centre, `size` pixels square, is cut out.
    """

    color: str = "RGB"
    scale: float = 1.0
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    size: int = 224
    resize: int = 256


INPUTS = {
    "imagenet": InputSpec(),
    "caffe": InputSpec("BGR", 255.0, (104.0, 117.0, 128.0), (1.0, 1.0, 1.0)),
    "spherical": InputSpec("BGR", 255.0, (104.0, 117.0, 123.0), (1.0, 1.0, 1.0), size=227),
    "white": InputSpec("RGB", 1.0, (1.0, 1.0, 1.0), (0.35, 0.35, 0.35)),
}
"""`imagenet`: torchvision's weights; `caffe`: BN-Inception's; `spherical`: BN-Inception as the
spherical-embedding code feeds it; `white`: drawings, the white background becomes 0."""


class EmbeddingNet(nn.Module):
    """Backbone, pooling, heads and, for divide and conquer, masks. `build` makes one.

    The state_dict is that of the released codes: `model.<backbone key>`, `model.embedding.*`,
    `model.uncertainty.*`, `model.specific.*`; ours are `model.head_norm.*` and `masks.weight`.

    Attributes:
        name: the backbone's name.
        embedding_size: d.
        heads: the names of the heads.
        l2_norm: whether losses that leave the choice to the user (IDML) are to be given unit
            length; the outputs here are raw either way.
        input: what the backbone wants to be fed.
        masks: None, or divide and conquer's masks.
    """

    def __init__(
        self,
        name: str,
        backbone: nn.Module,
        embedding_size: int,
        heads: tuple[str, ...],
        *,
        l2_norm: bool,
        pooling: str,
        head_norm: bool,
        head_init: str,
        head_parts: int,
        dropout: float,
        bn_freeze: str,
        masks: EmbeddingMasks | None,
        input_spec: InputSpec,
    ) -> None:
        super().__init__()
        self.name = name
        self.embedding_size = embedding_size
        self.heads = heads
        self.l2_norm = l2_norm
        self.pooling = pooling
        self.bn_freeze = bn_freeze
        self.input = input_spec
        self._frozen = False
        self.model = backbone
        features = backbone.num_features * POOLINGS[pooling] ** 2
        # The heads are the backbone's children because the released state_dicts have them there.
        backbone.add_module("head_norm", nn.BatchNorm1d(features) if head_norm else None)
        for head, size in head_sizes(heads, embedding_size).items():
            scale = UNCERTAINTY_SCALE if head == "uncertainty" else 1.0
            backbone.add_module(head, make_head(features, size, head_init, scale, head_parts))
        self.dropout = nn.Dropout(dropout)
        self.masks = masks
        self.register_load_state_dict_pre_hook(_drop_dead_layers)
        if bn_freeze in ("1", "affine"):
            self._train_affine(False)
        self.train()

    # -- forward

    def forward(self, images: Tensor, cluster: int | None = None) -> Embeddings:
        """Images (B, 3, H, W), normalised as `input` says → raw head outputs (B, d), float32.

        With a `specific` head, it and the embedding are (B, 2d). With masks, the embedding is
        multiplied by the mask of `cluster`, or by what their `full` says when there is none.
        """
        features = self.features(images)
        # Heads cost nothing beside the backbone; in bfloat16 they would round the embeddings.
        with torch.autocast(features.device.type, enabled=False):
            outputs = self._head_outputs(features, self.heads)
            if self.masks is not None:
                outputs["embedding"] = self.masks(outputs["embedding"], cluster)
        return Embeddings(**outputs)

    def features(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → pooled features (B, F) float32; (B, 16F) with pooling `grid`."""
        return pool(self.model(images), self.pooling)

    @torch.no_grad()
    def check_image_size(self, size: int) -> None:
        """Looks at one blank image of `size` pixels.

        Raises:
            InputError: branches of a block would give maps of different sizes, or none is left.
        """
        training, device = self.training, next(self.parameters()).device
        self.eval()
        try:
            self.features(torch.zeros(1, 3, size, size, device=device))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise InputError(
                f"{self.name} cannot take images of {size} pixels: its maps do not fit together; "
                f"choose an --image-size that 32 divides, such as {max(32, round(size / 32) * 32)}"
            ) from error
        finally:
            self.train(training)

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → test-time embeddings (B, d), raw; the means where disentangled."""
        return self(images).embedding[:, : self.embedding_size]

    def _head_outputs(self, features: Tensor, heads: Iterable[str]) -> dict[str, Tensor]:
        if self.model.head_norm is not None:
            features = self.model.head_norm(features)
        features = self.dropout(features)
        return {head: self.model.get_submodule(head)(features) for head in heads}

    # -- what is trained

    def train(self, mode: bool = True) -> EmbeddingNet:
        """As `Module.train`, but frozen BatchNorms of the backbone stay in evaluation mode."""
        super().train(mode)
        if self.bn_freeze != "0":
            for norm in self._backbone_norms():
                norm.eval()
        return self

    def freeze_backbone(self, frozen: bool) -> None:
        """Stops or resumes the training of the backbone, as in a warm-up; heads and masks train on.

        When the backbone is released, `bn_freeze="1"` gives its BatchNorms' scales and shifts their
        gradient too: the released loops do so, and the published numbers come from that. Without a
        warm-up they stay frozen. A call that changes nothing has no effect.
        """
        if frozen == self._frozen:
            return
        self._frozen = frozen
        for parameter in self.backbone_parameters():
            parameter.requires_grad_(not frozen)
        if self.bn_freeze == "affine":
            self._train_affine(False)

    def _train_affine(self, trained: bool) -> None:
        for norm in self._backbone_norms():
            norm.requires_grad_(trained)

    def _backbone_norms(self) -> list[nn.BatchNorm2d]:
        # The BatchNorm before the heads is a BatchNorm1d.
        return [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]

    def backbone_parameters(self) -> list[nn.Parameter]:
        """All parameters of the backbone, frozen ones too (they may be released later)."""
        return [p for name, p in self.model.named_parameters() if not name.startswith(_HEAD_KEYS)]

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters of the heads and of the BatchNorm before them."""
        return [p for name, p in self.model.named_parameters() if name.startswith(_HEAD_KEYS)]

    def parameter_groups(
        self,
        lr: float,
        head_lr: float | None = None,
        *,
        decay_all: bool = True,
        decay_biases: bool = False,
    ) -> list[dict]:
        """Optimiser groups: `backbone` at `lr`, `head` and, if there are any, `masks` at `head_lr`.

        With `decay_all=False` biases and BatchNorms stand in groups of their own, `backbone
        vectors` and `head vectors`, which have no weight decay; with `decay_biases` only
        BatchNorms do (spherical embeddings).
        """
        head_lr = lr if head_lr is None else head_lr
        groups = [
            {"name": "backbone", "params": self.backbone_parameters(), "lr": lr},
            {"name": "head", "params": self.head_parameters(), "lr": head_lr},
        ]
        if not decay_all:
            undecayed = self._undecayed(decay_biases)
            groups = [part for group in groups for part in _apart(group, undecayed)]
        if self.masks is not None:
            groups.append({"name": "masks", "params": list(self.masks.parameters()), "lr": head_lr})
        return groups

    def _undecayed(self, decay_biases: bool) -> set[nn.Parameter]:
        if not decay_biases:
            return {p for p in self.parameters() if p.dim() < 2}
        norms = (m for m in self.modules() if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)))
        return {p for norm in norms for p in norm.parameters()}

    def description(self):
        return {}

    @property
    def head_norm(self) -> bool:
        """Whether a BatchNorm stands before the heads."""
        return self.model.head_norm is not None

    def ensure_masks(self) -> None:
        """Gives a network without masks one (of ones), so that a file's masks have a place."""
        if self.masks is None:
            weight = self.model.embedding.weight
            self.masks = EmbeddingMasks(self.embedding_size).to(weight.device)


def _apart(group: dict, undecayed: set[nn.Parameter]) -> list[dict]:
    """The group without some of its parameters, and those without weight decay."""
    kept = [p for p in group["params"] if p not in undecayed]
    vectors = [p for p in group["params"] if p in undecayed]
    apart = {"name": f"{group['name']} vectors", "params": vectors, "weight_decay": 0.0}
    return [{**group, "params": kept}, {**group, **apart}]


def _drop_dead_layers(net: EmbeddingNet, state_dict: dict, *_: object) -> None:
    # So that the state_dict of a released network loads as it is, classifier and all.
    kept = without_dead_layers(state_dict)
    for key in state_dict.keys() - kept.keys():
        del state_dict[key]


def build(
    model: str,
    embedding_size: int,
    heads: Sequence[str] = ("embedding",),
    *,
    pretrained: str | None = None,
    l2_norm: bool = True,
    pooling: str = "avg+max",
    stem: str = "imagenet",
    width: float = 1.0,
    head_norm: bool = False,
    head_init: str = "kaiming",
    head_parts: int = 1,
    dropout: float = 0.0,
    bn_freeze: str | int = "0",
    masks: EmbeddingMasks | None = None,
    input_spec: str | None = None,
) -> EmbeddingNet:
    """Makes an embedding network, in training mode.

    Args:
        model: one of `MODELS`, in any spelling: `bn_inception`, `BN-Inception`, `ResNet50`.
        embedding_size: d, at least 1.
        heads: `embedding`, and beside it `uncertainty` (IDML) or `specific` (DDML).
        pretrained: None or `none`; `imagenet`, which downloads; or a file of weights.
        l2_norm: kept as an attribute for the losses that ask.
        pooling: `avg+max`, `avg` or `max`; `grid` averages each cell of 4 × 4.
        stem: `imagenet`, as published, reduces an image 32 times; `small` 16 times (no max pooling
            after the first convolution), `tiny` 8 times (and that convolution has stride 1). With
            both a ResNet's first kernel is 3×3; the inceptions keep theirs, so that weights load.
        width: channels of a ResNet as a multiple of the published ones.
        head_norm: a trained BatchNorm before the heads (spherical embeddings).
        head_init: `kaiming`, or PyTorch's `default` (spherical embeddings, divide and conquer), and
            others: see `heads.head_init`. head_parts: runs of rows that start separately.
        dropout: on the pooled features (divide and conquer: .01).
        bn_freeze: BatchNorms of the backbone. `0`: trained. `1`: running statistics are fixed,
            scale and shift have no gradient until `freeze_backbone(False)` ends a warm-up.
            `affine`: all are fixed for good. `statistics`: only the running statistics are fixed.
        masks: divide and conquer's.
        input_spec: one of `INPUTS`; None is what the model's ImageNet weights want.

    Raises:
        InputError: an unknown name, a bad value, options that exclude each other, or weights that
            cannot be had.
    """
    name = _model_name(model)
    heads, bn_freeze = tuple(heads), str(int(bn_freeze) if bn_freeze in (0, 1) else bn_freeze)
    _check_choices(pooling=pooling, stem=stem, bn_freeze=bn_freeze)
    check_head_init(head_init)
    pretrained = None if pretrained == "none" else pretrained
    if embedding_size < 1:
        raise InputError(f"embedding size {embedding_size}: it must be at least 1")
    if masks is not None and ("specific" in heads or masks.weight.shape[1] != embedding_size):
        raise InputError(
            f"masks of {masks.weight.shape[1]} dimensions cannot be laid on heads "
            f"{', '.join(heads)} of size {embedding_size}; choose equal sizes and no disentangling"
        )
    backbone = _backbone(name, stem, width, pretrained)
    if pretrained is not None:
        load_pretrained(backbone, name, pretrained)
    if input_spec is None:
        input_spec = "caffe" if name == "bn_inception" else "imagenet"
    _check_choices(input_spec=input_spec)
    return EmbeddingNet(
        name,
        backbone,
        embedding_size,
        heads,
        l2_norm=l2_norm,
        pooling=pooling,
        head_norm=head_norm,
        head_init=head_init,
        head_parts=head_parts,
        dropout=dropout,
        bn_freeze=bn_freeze,
        masks=masks,
        input_spec=INPUTS[input_spec],
    )


def _backbone(name: str, stem: str, width: float, pretrained: str | None) -> nn.Module:
    if name not in DEPTHS:
        if width != 1.0:
            raise InputError(f"width {width:g}: only ResNets can be widened, {name} has width 1")
        return {"bn_inception": BNInception, "googlenet": GoogLeNet}[name](stem)
    if pretrained == "imagenet" and (width != 1.0 or stem != "imagenet"):
        raise InputError(
            f"the ImageNet weights of {name} fit width 1 and stem imagenet only, not width "
            f"{width:g} and stem {stem}; use --pretrained none"
        )
    return ResNet(name, stem, width)


def _model_name(model: str) -> str:
    by_letters = {_letters(known): known for known in MODELS}
    if _letters(model) not in by_letters:
        raise InputError(f"unknown model {model!r}; {nearest_names(model, MODELS)}")
    return by_letters[_letters(model)]


def _letters(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _check_choices(**chosen: str) -> None:
    known = {
        "pooling": POOLINGS,
        "stem": STEMS,
        "bn_freeze": BN_FREEZE,
        "input_spec": INPUTS,
    }
    for option, value in chosen.items():
        if value not in known[option]:
            raise InputError(f"{option} {value!r} is unknown; use {', '.join(known[option])}")
