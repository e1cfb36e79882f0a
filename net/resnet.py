"""ResNet: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016.

torchvision's blocks and layer names (so its weights load), with stems for small images, a width
multiplier, and no classifier. `resnet10`, with one basic block per stage, is for small images:
there are no pretrained weights for it.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from functools import partial

from torch import Tensor, nn
from torchvision.models import resnet as torchvision_resnet

from net.backbones import Backbone
from net.choices import STEMS
from net.layers import conv_norm, conv_norm_relu, init_convolutions, max_pool


class BasicBlock(torchvision_resnet.BasicBlock):
    """Two 3×3 convolutions and a shortcut; (B, C, H, W) → (B, C', H/stride, W/stride)."""

    def forward(self, x: Tensor) -> Tensor:
        """As torchvision's, with frozen BatchNorms folded."""
        out = conv_norm_relu(x, self.conv1, self.bn1)
        return conv_norm_relu(out, self.conv2, self.bn2, _shortcut(self, x))


class Bottleneck(torchvision_resnet.Bottleneck):
    """1×1, 3×3 and 1×1 convolutions and a shortcut; the 3×3 one has the stride."""

    def forward(self, x: Tensor) -> Tensor:
        """As torchvision's, with frozen BatchNorms folded."""
        out = conv_norm_relu(x, self.conv1, self.bn1)
        out = conv_norm_relu(out, self.conv2, self.bn2)
        return conv_norm_relu(out, self.conv3, self.bn3, _shortcut(self, x))


FEW = 16
"""Channels below which a shortcut is subsampled before its 1×1 convolution, which has no stride.

oneDNN 3.13, which torch 2.15 uses on CPUs, writes outside its memory when it computes the gradient
of a 1×1 kernel with stride and so few channels, for an odd batch size and several threads, and the
process crashes sooner or later. Outputs and gradients are the same to the bit.
"""


def _shortcut(block: BasicBlock | Bottleneck, x: Tensor) -> Tensor:
    if block.downsample is None:
        return x
    if x.shape[1] < FEW:
        x = x[:, :, :: block.stride, :: block.stride]
    return conv_norm(x, *block.downsample)


BlockClass = type[BasicBlock] | type[Bottleneck]
Counts = tuple[int, int, int, int]
"""The number of blocks of each of the four stages."""


class ResNet(nn.Module):
    """Images (B, 3, H, W) → feature maps (B, F, H/32, W/32), larger with the other stems.

    Args:
        block: the class of its blocks. blocks: how many of them each of the four stages has.
        stem: one of `STEMS`.
        width: channels as a multiple of the published ones.
    """

    def __init__(
        self, block: BlockClass, blocks: Counts, stem: str = "imagenet", width: float = 1.0
    ) -> None:
        super().__init__()
        stride, pool = STEMS[stem]
        kernel = 7 if stem == "imagenet" else 3
        channels = max(1, round(64 * width))
        self.conv1 = nn.Conv2d(3, channels, kernel, stride, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.first_pool = pool
        inputs = channels
        for stage, count in enumerate(blocks):
            planes, stride = channels * 2**stage, 1 if stage == 0 else 2
            self.add_module(f"layer{stage + 1}", _stage(block, inputs, planes, count, stride))
            inputs = planes * block.expansion
        self.num_features = inputs
        init_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, F, h, w)."""
        x = conv_norm_relu(images, self.conv1, self.bn1)
        if self.first_pool:
            x = max_pool(x, 2, padding=1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def _stage(block: BlockClass, inputs: int, planes: int, count: int, stride: int) -> nn.Sequential:
    outputs = planes * block.expansion
    downsample = None
    if stride != 1 or inputs != outputs:
        projection = nn.Conv2d(inputs, outputs, 1, stride if inputs >= FEW else 1, bias=False)
        downsample = nn.Sequential(projection, nn.BatchNorm2d(outputs))
    first = block(inputs, planes, stride, downsample)
    return nn.Sequential(first, *(block(outputs, planes) for _ in range(count - 1)))


def _resnet(name: str, block: BlockClass, blocks: Counts, file: str | None = None) -> Backbone:
    return Backbone(
        name,
        partial(ResNet, block, blocks),
        stems=tuple(STEMS),
        can_widen=True,
        bn_momentum=0.1,
        imagenet_url=file and f"https://download.pytorch.org/models/{file}",
        is_in=partial(_is_in, block, blocks),
    )


def _is_in(block: BlockClass, blocks: Counts, keys: Collection[str]) -> bool:
    places = [re.match(r"layer([1-4])\.(\d+)\.", key) for key in keys]
    found = {match.groups() for match in places if match}
    counts = tuple(sum(stage == own for stage, _ in found) for own in "1234")
    return counts == blocks and ("layer1.0.conv3.weight" in keys) == (block is Bottleneck)


# The files are torchvision's IMAGENET1K_V1, which the published numbers were measured with.
BACKBONES = (
    _resnet("resnet10", BasicBlock, (1, 1, 1, 1)),
    _resnet("resnet18", BasicBlock, (2, 2, 2, 2), "resnet18-f37072fd.pth"),
    _resnet("resnet34", BasicBlock, (3, 4, 6, 3), "resnet34-b627a593.pth"),
    _resnet("resnet50", Bottleneck, (3, 4, 6, 3), "resnet50-0676ba61.pth"),
    _resnet("resnet101", Bottleneck, (3, 4, 23, 3), "resnet101-63fe2227.pth"),
    _resnet("resnet152", Bottleneck, (3, 8, 36, 3), "resnet152-394f9c45.pth"),
)
