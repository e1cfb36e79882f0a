"""The network: backbone, pooling, heads and masks, and which of them are trained."""

from __future__ import annotations

import weakref
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from criteria.base import ParameterGroup
from losses import Embeddings
from net.architecture import Architecture
from net.blocks import Block, belongs
from net.choices import POOLINGS, InputSpec, Peft
from net.depth import recompute_blocks
from net.freezing import prepare_backbone
from net.heads import (
    HEAD_KEYS,
    HEADS,
    UNCERTAINTY_SCALE,
    Pool,
    classifiers,
    head_sizes,
    make_head,
    make_norm,
)
from net.masks import EmbeddingMasks
from net.peft import NO_TOKENS
from net.pieces import in_pieces
from net.replay import Replay
from utils import InputError

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)


def _refuse_unsound(name: str, backbone: nn.Module) -> None:
    """Raise InputError for a backbone of one's own that heads cannot be added to."""
    taken = sorted({*HEADS.values(), "head_norm"} & set(backbone._modules))
    if not isinstance(getattr(backbone, "num_features", None), int):
        fault = "has no num_features, the number of channels of its maps; set it"
    elif isinstance(backbone, nn.Sequential):
        fault = "is an nn.Sequential, which would take the heads for layers; put it into a module"
    elif taken:
        fault = f"has a child called {taken[0]}, as a head is called here; give it another name"
    else:
        return
    raise InputError(f"the backbone {name} {fault}")


class EmbeddingNet(nn.Module):
    """Backbone, pooling, heads and, for divide and conquer, masks. `build` makes one.

    The state_dict is that of the released codes: `model.<backbone key>`, `model.embedding.*`,
    `model.uncertainty.*`, `model.embedding_specific.*`; ours are `model.head_norm.*` and
    `masks.weight`.

    Attributes:
        architecture: describes the network.
        masks: None, or divide and conquer's masks.
        changed: what an evaluation's flags have changed: entries of the architecture, and how
            images are prepared.
    """

    def __init__(
        self, architecture: Architecture, backbone: nn.Module, masks: EmbeddingMasks | None = None
    ) -> None:
        super().__init__()
        self.architecture = architecture
        self.changed: dict[str, Any] = {}
        self._in_warm_up = False
        self._kept: int | None = None
        self._replay: Replay | None = None
        _refuse_unsound(architecture.model, backbone)
        self._blocks = architecture.backbone.blocks(backbone)  # while it has no heads yet
        self._frozen = prepare_backbone(backbone, self._blocks, architecture)
        self.model = backbone
        self.pool = Pool(architecture.pooling)
        features = backbone.num_features * POOLINGS[architecture.pooling] ** 2
        # The heads are the backbone's children because the released state_dicts have them there.
        backbone.add_module("head_norm", make_norm(architecture.head_norm, features))
        init, parts = architecture.head_init, architecture.head_parts
        for head, size in head_sizes(self.heads, self.embedding_size).items():
            scale = UNCERTAINTY_SCALE if head == "uncertainty" else 1.0
            below = size if head == "specific" else features
            backbone.add_module(HEADS[head], make_head(below, size, init, scale, parts))
        if architecture.head == "none":
            self._without_head(features)
        self.dropout = nn.Dropout(architecture.dropout)
        self.masks = masks
        self.register_load_state_dict_pre_hook(_drop_classifiers)
        if architecture.bn_momentum is not None:
            for batch_norm in self._backbone_norms():
                batch_norm.momentum = architecture.bn_momentum
        # With BitFit scales and shifts train from the start, not only after a warm-up.
        quirk = architecture.bn_freeze == "1" and not Peft.of(architecture.peft).biases
        if quirk or architecture.bn_freeze == "affine":
            self._freeze_affine()
        self.train()

    def _without_head(self, features: int) -> None:
        if features != self.embedding_size:
            raise InputError(
                f"--head none: the pooled features of {self.architecture.model} have {features} "
                f"dimensions; use --embedding-size {features}"
            )
        self.model.embedding = nn.Identity()

    @property
    def embedding_size(self) -> int:
        """d of the embeddings that the losses see."""
        return self.architecture.embedding_size

    @property
    def test_size(self) -> int:
        """d of the test-time embeddings."""
        return self._kept or self._whole_size

    @property
    def _whole_size(self) -> int:
        if self.architecture.head == "training":
            return self.model.embedding.in_features
        return self.embedding_size

    @property
    def is_cut(self) -> bool:
        """Whether test-time embeddings lack entries that the network computes (see `keep`)."""
        return self.test_size < self._whole_size

    def keep(self, dims: int | None) -> None:
        """Cuts test-time embeddings to their first `dims` entries; None undoes it.

        Raises:
            InputError: they have fewer.
        """
        if dims is not None and not 1 <= dims <= self._whole_size:
            raise InputError(
                f"{dims} dimensions cannot be taken from embeddings that have {self._whole_size}; "
                f"choose 1 to {self._whole_size}"
            )
        self._kept = dims

    @property
    def heads(self) -> tuple[str, ...]:
        """The names of the heads."""
        return self.architecture.heads

    @property
    def input(self) -> InputSpec:
        """The kind of input that the network expects."""
        return self.architecture.input

    def description(self) -> dict[str, Any]:
        """The entry of a checkpoint from which `architecture_of` builds the same network again."""
        described = asdict(self.architecture)
        if self.masks is not None:
            described |= {"masks_at_test": self.masks.full, "mask_relu": self.masks.relu}
        return described

    def base_state(self) -> dict[str, Tensor]:
        """The frozen weights of a network with PEFT, which checkpoints leave out; otherwise {}."""
        return {k: v for k, v in self.state_dict().items() if self._is_base(k)}

    def trained_state(self) -> dict[str, Tensor]:
        """The part of the state_dict that checkpoints keep: all but `base_state`."""
        return {k: v for k, v in self.state_dict().items() if not self._is_base(k)}

    def _is_base(self, key: str) -> bool:
        return key.removeprefix("model.") in self._frozen.base

    # -- forward

    def forward(self, images: Tensor, cluster: int | None = None, pieces: int = 1) -> Embeddings:
        """Images (B, 3, H, W), normalised as `input` says → raw head outputs (B, d), float32.

        With a `specific` head, that head and the embedding are (B, 2d).

        Args:
            cluster: with masks, the cluster whose mask multiplies the embedding; if it is None, the
                masks' `full` decides.
            pieces: with more than one, the backbone computes the batch piece by piece, twice, and
                needs memory for only one piece: see pieces.py.
        """
        features = self.features(images, pieces)
        # Heads cost little compared with the backbone; bfloat16 would round the embeddings.
        with torch.autocast(features.device.type, enabled=False):
            outputs = self._head_outputs(features)
            if self.masks is not None:
                outputs["embedding"] = self.masks(outputs["embedding"], cluster)
        return Embeddings(**outputs)

    def features(self, images: Tensor, pieces: int = 1) -> Tensor:
        """Images (B, 3, H, W) → pooled features (B, F) float32; (B, 16F) with pooling `grid`."""
        if pieces > 1:
            parts = self._below_heads(), self._running_statistics()
            return in_pieces(self._pooled, images, pieces, *parts)
        if self._replay is None or not self.training:
            return self._pooled(images)
        return self._replay(images)

    def _pooled(self, images: Tensor) -> Tensor:
        if hasattr(self.model, "pooled"):
            return self.model.pooled(images, self.pool)
        return self.pool(self.model(images))

    def record(self, recorded: bool = True) -> None:
        """Switches recording of the backbone's training steps on a GPU on or off; see replay.py."""
        self._replay = None
        if recorded:
            # A weak reference, so that a recording's memory is freed together with its network.
            me = weakref.proxy(self)
            self._replay = Replay(
                lambda images: me._pooled(images),
                self._below_heads(),  # to look for them in each step would take a millisecond
                lambda: me._running_statistics(),
            )

    @property
    def is_recorded(self) -> bool:
        """Whether a step has been recorded, which keeps its GPU memory between the steps."""
        return self._replay is not None and self._replay.holds_memory

    def _below_heads(self) -> list[nn.Parameter]:
        return [*self.backbone_parameters(), *self.pool.parameters()]

    def _running_statistics(self) -> list[Tensor]:
        return list(self.model.buffers())

    def check_image_size(self, size: int) -> None:
        """Tries one blank image of `size` pixels.

        Raises:
            InputError: branches of a block have maps of different sizes, or a map is empty; or
                there are prompts, and the blocks do not process tokens.
        """
        error = self._trouble_with(size)
        if error is None:
            return
        if Peft.of(self.architecture.peft).prompts:  # plain ViTs take the size they are built for
            raise InputError(NO_TOKENS) from error
        near = max(32, round(size / 32) * 32)
        advice = f"choose another --image-size, such as {self.input.size}"
        if near != size and self._trouble_with(near) is None:
            advice = f"choose an --image-size that 32 divides, such as {near}"
        elif size == self.input.size:
            advice = "choose another --image-size, or another --model"
        raise InputError(
            f"{self.architecture.model} cannot take images of {size} pixels: its maps do not fit "
            f"together; {advice}"
        ) from error

    @torch.no_grad()
    def _trouble_with(self, size: int) -> Exception | None:
        """The error that an image of `size` pixels causes, or None."""
        training, device = self.training, next(self.parameters()).device
        self.eval()
        try:
            self.features(torch.zeros(1, 3, size, size, device=device))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, AssertionError) as error:
            return error
        finally:
            self.train(training)
        return None

    def embed(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → test-time embeddings (B, d), raw; with DDML the main head's means.

        If the head is for training only, they are the pooled features before it. `keep` cuts them
        to their first entries.
        """
        if self.architecture.head == "training":
            return self.features(images)[:, : self.test_size]
        return self(images).embedding[:, : self.test_size]

    def _head_outputs(self, features: Tensor) -> dict[str, Tensor]:
        if self.model.head_norm is not None:
            features = self.model.head_norm(features)
        features = self.dropout(features)
        outputs = {"embedding": self.model.embedding(features)}
        if "uncertainty" in self.heads:
            outputs["uncertainty"] = self.model.uncertainty(features)
        if "specific" in self.heads:
            outputs["specific"] = self.model.embedding_specific(outputs["embedding"])
        return outputs

    # -- which parameters train

    def recompute_blocks(self) -> None:
        """Saves memory in training at the cost of a second forward pass of the blocks that train.

        Raises:
            InputError: none of them trains, or they are not modules.
        """
        open_blocks = [b for b in self._blocks[1:] if not belongs(b[0], self._frozen.modules)]
        if not open_blocks:
            raise InputError(
                "--grad-checkpointing: all blocks are frozen (--freeze-blocks), so they keep "
                "nothing for the backward pass; leave it out"
            )
        recompute_blocks(self.model, open_blocks)

    @property
    def updates_statistics(self) -> bool:
        """Whether training batches update running statistics of the backbone's BatchNorms."""
        return any(norm.training for norm in self._backbone_norms())

    @property
    def has_batch_norms(self) -> bool:
        """Whether the backbone has BatchNorms."""
        return bool(self._backbone_norms())

    @property
    def is_partly_frozen(self) -> bool:
        """Whether parameters of the backbone other than BatchNorms are frozen in the whole run."""
        return bool(self._frozen.parameters)

    def counts(self) -> tuple[int, int]:
        """The numbers of trained parameters (after a warm-up, if any), and of all parameters."""
        trained = {p for p in self.parameters() if p.requires_grad}
        if self._in_warm_up:  # then these train later
            trained.update(self.backbone_parameters())
            if self.architecture.bn_freeze == "affine":
                trained -= self._affine()
        return sum(p.numel() for p in trained), sum(p.numel() for p in self.parameters())

    def train(self, mode: bool = True) -> EmbeddingNet:
        """Like `Module.train`, but frozen parts stay in evaluation mode."""
        super().train(mode)
        for name, module in self.model.named_modules():
            if self._frozen.holds(name, module):
                module.eval()
        if self.architecture.bn_freeze != "0":
            for norm in self._backbone_norms():
                norm.eval()
        return self

    def freeze_backbone(self, frozen: bool) -> None:
        """Freezes or unfreezes the backbone, as a warm-up does; heads and masks always train.

        Unfreezing also makes the scales and shifts of its BatchNorms train with `bn_freeze="1"`, as
        in the released loops, which the published numbers come from. Without a warm-up they stay
        frozen, except with BitFit, which trains them from the start. Calling it again with the same
        value has no effect.
        """
        if frozen == self._in_warm_up:
            return
        self._in_warm_up = frozen
        for parameter in self.backbone_parameters():
            parameter.requires_grad_(not frozen)
        if self.architecture.bn_freeze == "affine":
            self._freeze_affine()

    def _freeze_affine(self) -> None:
        for parameter in self._affine():
            parameter.requires_grad_(False)

    def _affine(self) -> set[nn.Parameter]:
        """The scales and shifts of the backbone's BatchNorms."""
        return {p for norm in self._backbone_norms() for p in norm.parameters()}

    def _backbone_norms(self) -> list[nn.BatchNorm2d]:
        # The BatchNorm before the heads is a BatchNorm1d.
        return [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]

    def blocks(self) -> list[Block]:
        """The backbone's blocks from input to output, as names within `model`; see blocks.py."""
        return self._blocks

    def block_parameters(self) -> list[list[nn.Parameter]]:
        """The `backbone_parameters` of each of the `blocks`."""
        named = self._trained_backbone()
        return [[p for n, p in named if belongs(n, block)] for block in self.blocks()]

    def backbone_parameters(self) -> list[nn.Parameter]:
        """The backbone's parameters that train, now or after a warm-up."""
        return [parameter for _, parameter in self._trained_backbone()]

    def _trained_backbone(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (name, parameter)
            for name, parameter in self.model.named_parameters()
            if not name.startswith(HEAD_KEYS) and name not in self._frozen.parameters
        ]

    def head_parameters(self) -> list[nn.Parameter]:
        """The parameters of the heads, of the norm before them and of the pooling."""
        heads = [p for name, p in self.model.named_parameters() if name.startswith(HEAD_KEYS)]
        return [*heads, *self.pool.parameters()]

    def parameter_groups(
        self,
        lr: float,
        head_lr: float | None = None,
        *,
        decay_all: bool = True,
        decay_biases: bool = False,
        layer_decay: float = 1.0,
    ) -> list[ParameterGroup]:
        """Optimiser groups: `backbone` at `lr`, `head` and, if there are any, `masks` at `head_lr`.

        With `decay_all=False` biases and norms get groups of their own without weight decay,
        `backbone vectors` and `head vectors`; with `decay_biases`, only norms do (spherical
        embeddings). With a `layer_decay` F below 1 each block of the backbone gets a group of its
        own, all with the same name, at lr × Fⁿ if n blocks follow it.
        """
        head_lr = lr if head_lr is None else head_lr
        groups = [
            *self._backbone_groups(lr, layer_decay),
            {"name": "head", "params": self.head_parameters(), "lr": head_lr},
        ]
        if not decay_all:
            undecayed = self._undecayed(decay_biases)
            groups = [part for group in groups for part in _apart(group, undecayed)]
        if self.masks is not None:
            groups.append({"name": "masks", "params": list(self.masks.parameters()), "lr": head_lr})
        return groups

    def _backbone_groups(self, lr: float, layer_decay: float) -> list[ParameterGroup]:
        if layer_decay == 1.0:
            return [{"name": "backbone", "params": self.backbone_parameters(), "lr": lr}]
        blocks = self.block_parameters()
        return [
            {"name": "backbone", "params": block, "lr": lr * layer_decay ** (len(blocks) - place)}
            for place, block in enumerate(blocks, 1)
        ]

    def _undecayed(self, decay_biases: bool) -> set[nn.Parameter]:
        if not decay_biases:
            return {p for p in self.parameters() if p.dim() < 2}
        norms = (m for m in self.modules() if isinstance(m, NORMS))
        return {p for norm in norms for p in norm.parameters()}

    def ensure_masks(self) -> None:
        """Gives a network without masks a mask of ones, so that a file's masks can be loaded.

        Raises:
            InputError: its embedding does not come from a linear head.
        """
        if self.masks is None:
            if self.architecture.head != "linear":
                raise InputError("masks need a linear head; use --head linear")
            weight = self.model.embedding.weight
            self.masks = EmbeddingMasks(self.embedding_size).to(weight.device)


def _apart(group: ParameterGroup, undecayed: set[nn.Parameter]) -> list[ParameterGroup]:
    """Splits a group: the parameters with weight decay, and those without."""
    kept = [p for p in group["params"] if p not in undecayed]
    vectors = [p for p in group["params"] if p in undecayed]
    apart = {"name": f"{group['name']} vectors", "params": vectors, "weight_decay": 0.0}
    return [{**group, "params": kept}, {**group, **apart}]


def _drop_classifiers(network: EmbeddingNet, state_dict: dict, *_: object) -> None:
    # So that the state_dict of a released network can be loaded although it has a classifier.
    for key in classifiers(state_dict, network.state_dict()):
        del state_dict[key]
