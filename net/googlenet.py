"""GoogLeNet with BatchNorm: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015.

torchvision's modules, without classifier and auxiliary heads. Its ImageNet weights were trained
with inputs in -1..1; like the released Proxy-Anchor code, we use ImageNet-normalised inputs.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn
from torchvision import models
from torchvision.models.googlenet import BasicConv2d, Inception, InceptionAux

from net.backbones import Backbone
from net.blocks import Block, sorted_blocks
from net.choices import STEMS
from net.layers import conv_norm_relu, init_convolutions

LAYERS = (
    *("conv1", "maxpool1", "conv2", "conv3", "maxpool2"),
    *("inception3a", "inception3b", "maxpool3"),
    *("inception4a", "inception4b", "inception4c", "inception4d", "inception4e", "maxpool4"),
    *("inception5a", "inception5b"),
)
"""The names of torchvision's modules, in order."""


class ConvNorm(BasicConv2d):
    """Convolution, BatchNorm, ReLU."""

    def forward(self, x: Tensor) -> Tensor:
        """As torchvision's, with a frozen BatchNorm folded."""
        return conv_norm_relu(x, self.conv, self.bn)


class GoogLeNet(models.GoogLeNet):
    """Images (B, 3, H, W) → feature maps (B, 1024, H/32, W/32), larger with the other stems."""

    num_features = 1024

    def __init__(self, stem: str = "imagenet") -> None:
        inception = partial(Inception, conv_block=ConvNorm)
        super().__init__(
            num_classes=1,
            aux_logits=False,
            init_weights=False,
            blocks=[ConvNorm, inception, InceptionAux],
        )
        del self.avgpool, self.dropout, self.fc
        stride, pool = STEMS[stem]
        self.conv1.conv.stride = (stride, stride)
        if not pool:
            self.maxpool1 = nn.Identity()
        init_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) → (B, 1024, h, w)."""
        x = images
        for name in LAYERS:
            x = self.get_submodule(name)(x)
        return x


def _blocks(module: nn.Module) -> list[Block]:
    inceptions = [name for name in LAYERS if name.startswith("inception")]
    places = {name: place for place, name in enumerate(inceptions, 1)}
    return sorted_blocks(module, lambda name: places.get(name.partition(".")[0], 0))


BACKBONES = (
    Backbone(
        "googlenet",
        lambda stem, width: GoogLeNet(stem),
        stems=tuple(STEMS),
        imagenet_url="https://download.pytorch.org/models/googlenet-1378be20.pth",
        bn_momentum=0.1,
        weights_fit_all_stems=True,
        is_in=lambda keys: "inception3a.branch1.conv.weight" in keys,
        blocks=_blocks,
    ),
)
