"""Convolution, BatchNorm, ReLU and pooling in few passes, shared by every backbone.

Deviation: a BatchNorm in evaluation mode, as in training with `--bn-freeze 1` in all published
recipes, is an affine map with constant statistics. It is folded into the convolution before it.
Outputs and gradients are the same up to rounding, and one pass over the activations is saved, both
forward and backward. On a GPU, the kernels of fused.py save most of the others.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from net import fused


def conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """norm(conv(x)): (B, C, H, W) → (B, C', H', W')."""
    if torch.is_autocast_enabled("cpu") and _is_trained_depthwise(x, conv, norm):
        with torch.autocast("cpu", enabled=False):
            return conv_norm(x.to(conv.weight.dtype), conv, norm)
    if norm.training:
        return norm(conv(x))
    if _can_fuse(x, conv, norm):
        return _fused(x, conv, norm)
    weight, bias = folded(conv, norm)
    return F.conv2d(x, weight, bias, conv.stride, conv.padding, groups=conv.groups)


def conv_norm_relu(
    x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, shortcut: Tensor | None = None
) -> Tensor:
    """relu(norm(conv(x)) + shortcut): (B, C, H, W) → (B, C', H', W'), the shape of `shortcut`."""
    if _can_fuse(x, conv, norm):
        return _fused(x, conv, norm, shortcut, relu=True)
    maps = conv_norm(x, conv, norm)
    return F.relu(maps if shortcut is None else maps + shortcut, inplace=True)


def _is_trained_depthwise(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    """Whether bfloat16 would be slower, because oneDNN has no fast backward of depthwise kernels.

    The gradient of a 5×5 kernel takes 4 times as long, and that of the input with stride 2 up to
    100 times. The forward pass alone is faster.
    """
    gradients = (x.requires_grad, conv.weight.requires_grad, norm.weight.requires_grad)
    return conv.groups > 1 and torch.is_grad_enabled() and any(gradients)


def average_conv_norm_relu(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    """relu(norm(conv(average of 3×3 neighbours of x))) for a 1×1 `conv` with a bias.

    Averaging commutes with a 1×1 convolution, after which there are 3 to 8 times fewer channels to
    average. The bias is added last, because the padding of the average must be 0, not the bias.
    """
    if _can_fuse(x, conv, norm):
        weight, bias = fused.folded(conv, norm)
        return fused.add_bias(average_pool(F.conv2d(x, weight)), bias, relu=True)
    weight, bias = (conv.weight, conv.bias) if norm.training else folded(conv, norm)
    maps = average_pool(F.conv2d(x, weight))
    maps = maps + bias.to(maps.dtype)[:, None, None]
    return F.relu(norm(maps) if norm.training else maps, inplace=True)


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of one convolution that equals `conv` followed by the frozen `norm`.

    scale = γ / √(variance + ε); weight · scale, and β - (mean - bias) · scale.
    """
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    shift = norm.running_mean if conv.bias is None else norm.running_mean - conv.bias
    return conv.weight * scale[:, None, None, None], norm.bias - shift * scale


def _can_fuse(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    return not norm.training and fused.fits(x) and fused.can_fold(conv, norm)


def _fused(
    x: Tensor,
    conv: nn.Conv2d,
    norm: nn.BatchNorm2d,
    shortcut: Tensor | None = None,
    relu: bool = False,
) -> Tensor:
    weight, bias = fused.folded(conv, norm)
    if fused.is_stem(x, conv):
        maps = fused.stem(x, weight)
    else:
        maps = F.conv2d(x, weight, None, conv.stride, conv.padding, groups=conv.groups)
    return fused.add_bias(maps, bias, shortcut, relu=relu)


def average_pool(x: Tensor) -> Tensor:
    """The average of 3×3 neighbours, zeros outside: (B, C, H, W) → (B, C, H, W)."""
    if fused.fits(x):
        return fused.average_pool(x)
    # Contiguous on a GPU, where torch's other gradient may be wrong: devices.mend_average_pooling.
    return F.avg_pool2d(x.contiguous() if x.is_cuda else x, kernel_size=3, stride=1, padding=1)


def max_pool(x: Tensor, stride: int, padding: int = 0, ceil_mode: bool = False) -> Tensor:
    """The maximum of 3×3 neighbours: (B, C, H, W) → (B, C, H', W')."""
    if fused.fits(x) and fused.is_plain(x):
        return fused.max_pool(x, stride, padding, ceil_mode)
    return F.max_pool2d(x, 3, stride, padding, ceil_mode=ceil_mode)


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
