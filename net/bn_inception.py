"""BN-Inception (Inception v2): Ioffe and Szegedy, "Batch Normalization", ICML 2015, appendix.

The layers have the names of the released ImageNet weights (`bn_inception-52deb4733.pth`), so the
state_dict is flat: `inception_3a_1x1.weight`, `inception_3a_1x1_bn.weight`, and so on. The table
below is the architecture; the classifier of the released file, which nothing uses, is left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from net.backbones import Backbone
from net.blocks import Block, sorted_blocks
from net.choices import STEMS
from net.layers import average_conv_norm_relu, conv_norm_relu, init_convolutions, max_pool


class InceptionBlock(NamedTuple):
    """Channels of an inception block's four branches; `pool_proj` 0: the block halves the size."""

    name: str
    conv1x1: int
    conv3x3: tuple[int, int]
    """Channels after the reduction and after the 3×3 convolution."""
    double_3x3: tuple[int, int]
    """Channels after the reduction and after each of two 3×3 convolutions."""
    pool: str
    pool_proj: int

    @property
    def prefix(self) -> str:
        """The prefix of the names of the block's layers."""
        return f"inception_{self.name}_"

    @property
    def stride(self) -> int:
        """2 if the pooled input is passed through without a projection."""
        return 1 if self.pool_proj else 2


BLOCKS = (
    InceptionBlock("3a", 64, (64, 64), (64, 96), "avg", 32),
    InceptionBlock("3b", 64, (64, 96), (64, 96), "avg", 64),
    InceptionBlock("3c", 0, (128, 160), (64, 96), "max", 0),
    InceptionBlock("4a", 224, (64, 96), (96, 128), "avg", 128),
    InceptionBlock("4b", 192, (96, 128), (96, 128), "avg", 128),
    InceptionBlock("4c", 160, (128, 160), (128, 160), "avg", 128),
    InceptionBlock("4d", 96, (128, 192), (160, 192), "avg", 128),
    InceptionBlock("4e", 0, (128, 192), (192, 256), "max", 0),
    InceptionBlock("5a", 352, (192, 320), (160, 224), "avg", 128),
    InceptionBlock("5b", 352, (192, 320), (192, 224), "max", 128),
)


class BNInception(nn.Module):
    """Images (B, 3, H, W) → feature maps (B, 1024, H/32, W/32), larger with the other stems."""

    def __init__(self, stem: str = "imagenet") -> None:
        super().__init__()
        stride, self.first_pool = STEMS[stem]
        self._add("conv1_7x7_s2", 3, 64, 7, stride)
        self._add("conv2_3x3_reduce", 64, 64, 1)
        channels = self._add("conv2_3x3", 64, 192, 3)
        for block in BLOCKS:
            channels = self._add_block(block, channels)
        self.num_features = channels
        init_convolutions(self)

    def _add(self, name: str, inputs: int, outputs: int, kernel: int, stride: int = 1) -> int:
        conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2)
        self.add_module(name, conv)
        self.add_module(f"{name}_bn", nn.BatchNorm2d(outputs))
        return outputs

    def _add_block(self, block: InceptionBlock, inputs: int) -> int:
        prefix, stride = block.prefix, block.stride
        outputs = 0
        if block.conv1x1:
            outputs += self._add(f"{prefix}1x1", inputs, block.conv1x1, 1)
        reduced, channels = block.conv3x3
        self._add(f"{prefix}3x3_reduce", inputs, reduced, 1)
        outputs += self._add(f"{prefix}3x3", reduced, channels, 3, stride)
        reduced, channels = block.double_3x3
        self._add(f"{prefix}double_3x3_reduce", inputs, reduced, 1)
        self._add(f"{prefix}double_3x3_1", reduced, channels, 3)
        outputs += self._add(f"{prefix}double_3x3_2", channels, channels, 3, stride)
        if not block.pool_proj:
            return outputs + inputs
        return outputs + self._add(f"{prefix}pool_proj", inputs, block.pool_proj, 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, 1024, h, w)."""
        x = self._run("conv1_7x7_s2", images)
        if self.first_pool:
            x = max_pool(x, 2, ceil_mode=True)
        x = self._run("conv2_3x3", self._run("conv2_3x3_reduce", x))
        x = max_pool(x, 2, ceil_mode=True)
        for block in BLOCKS:
            x = self._run_block(block, x)
        return x

    def _layer(self, name: str) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
        return self.get_submodule(name), self.get_submodule(f"{name}_bn")

    def _run(self, name: str, x: Tensor) -> Tensor:
        return conv_norm_relu(x, *self._layer(name))

    def _run_block(self, block: InceptionBlock, x: Tensor) -> Tensor:
        prefix = block.prefix
        branches = [self._run(f"{prefix}1x1", x)] if block.conv1x1 else []
        branches.append(self._run(f"{prefix}3x3", self._run(f"{prefix}3x3_reduce", x)))
        double = self._run(f"{prefix}double_3x3_reduce", x)
        double = self._run(f"{prefix}double_3x3_1", double)
        branches.append(self._run(f"{prefix}double_3x3_2", double))
        branches.append(self._pooled(block, x))
        return torch.cat(branches, dim=1)

    def _pooled(self, block: InceptionBlock, x: Tensor) -> Tensor:
        if not block.pool_proj:
            return max_pool(x, 2, ceil_mode=True)
        name = f"{block.prefix}pool_proj"
        if block.pool == "max":
            return self._run(name, max_pool(x, 1, padding=1))
        return average_conv_norm_relu(x, *self._layer(name))


def _blocks(module: nn.Module) -> list[Block]:
    places = {block.prefix: place for place, block in enumerate(BLOCKS, 1)}
    return sorted_blocks(
        module,
        lambda name: next((at for prefix, at in places.items() if name.startswith(prefix)), 0),
    )


BACKBONES = (
    Backbone(
        "bn_inception",
        lambda stem, width: BNInception(stem),
        stems=tuple(STEMS),
        input_spec="caffe",
        # The released codes have .9, except spherical embeddings (methods/sec.py).
        bn_momentum=0.9,
        # The released weights were converted from Caffe; their host is slow and often offline.
        imagenet_url="http://data.lip6.fr/cadene/pretrainedmodels/bn_inception-52deb4733.pth",
        weights_fit_all_stems=True,
        is_in=lambda keys: "inception_3a_1x1.weight" in keys,
        blocks=_blocks,
    ),
)
