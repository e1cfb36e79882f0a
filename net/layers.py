"""Convolution and BatchNorm as one step, shared by every backbone.

Deviation: a BatchNorm in evaluation mode, as in training with `--bn-freeze 1` in all published
recipes, is an affine map with constant statistics. It is folded into the convolution before it.
Outputs and gradients are the same up to rounding, and one pass over the activations is saved, both
forward and backward.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """norm(conv(x)): (B, C, H, W) → (B, C', H', W')."""
    if torch.is_autocast_enabled("cpu") and _is_trained_depthwise(x, conv, norm):
        with torch.autocast("cpu", enabled=False):
            return conv_norm(x.to(conv.weight.dtype), conv, norm)
    if norm.training:
        return norm(conv(x))
    weight, bias = folded(conv, norm)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups)


def _is_trained_depthwise(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    """Whether bfloat16 would be slower, because oneDNN has no fast backward of depthwise kernels.

    The gradient of a 5×5 kernel takes 4 times as long, and that of the input with stride 2 up to
    100 times. The forward pass alone is faster.
    """
    gradients = (x.requires_grad, conv.weight.requires_grad, norm.weight.requires_grad)
    return conv.groups > 1 and torch.is_grad_enabled() and any(gradients)


def average_conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """norm(conv(average of 3×3 neighbours of x)) for a 1×1 `conv` with a bias.

    Averaging commutes with a 1×1 convolution, after which there are 3 to 8 times fewer channels to
    average. The bias is added last, because the padding of the average must be 0, not the bias.
    """
    weight, bias = (conv.weight, conv.bias) if norm.training else folded(conv, norm)
    maps = F.avg_pool2d(F.conv2d(x, weight), kernel_size=3, stride=1, padding=1)
    maps = maps + bias.to(maps.dtype)[:, None, None]
    return norm(maps) if norm.training else maps


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of one convolution that equals `conv` followed by the frozen `norm`."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    return conv.weight * scale[:, None, None, None], norm.bias - shift * scale


def init_convolutions(module: nn.Module) -> None:
    """Kaiming-normal (fan_out) weights and zero biases for every convolution in `module`."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            if layer.groups > 1:  # torch counts the outputs of all groups, not those of one
                with torch.no_grad():
                    layer.weight.mul_(layer.groups**0.5)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
