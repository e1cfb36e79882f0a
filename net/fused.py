"""Layers of convolutional networks in few passes over the maps, on a GPU.

torch adds a bias, adds a shortcut, applies ReLU and sums the bias's gradient in a pass over the
maps each. A modern GPU multiplies so fast that these passes, and pooling, took nearly half of a
step of BN-Inception in half precision. Where there is no Triton, layers.py computes the same with
torch alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kernels
from criteria.base import only_once

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHANNELS_LAST = torch.channels_last

# Sizes of a tile, the part of the maps that one program computes.
ROWS, FEW_CHANNELS, MANY_CHANNELS = 64, 32, 64
SUM_ROWS, PROGRAMS = 128, 512
"""For sums over rows: larger tiles, and the most programs among which the rows are shared."""
FOLD_BLOCK = 1024


# --- where the kernels can be used ----------------------------------------------------------------


def fits(maps: Tensor) -> bool:
    """Whether the kernels can take maps (B, C, H, W) like these.

    Not while a compiler or an exporter looks on, which cannot see into them, and not for kinds of
    tensors without memory of their own.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        maps.is_cuda
        and type(maps) in (Tensor, nn.Parameter)
        and maps.dtype in DTYPES
        and maps.dim() == 4
        and maps.numel() > 0
        and maps.numel() // maps.shape[1] < 2**31
        and kernels.usable(maps.device)
    )


def is_plain(maps: Tensor) -> bool:
    """Whether maps (B, C, H, W) are channels-last, without gaps."""
    return maps.is_contiguous(memory_format=CHANNELS_LAST)


def _empty(like: Tensor, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    how = {"dtype": dtype or like.dtype, "device": like.device}
    return torch.empty(tuple(shape), **how, memory_format=CHANNELS_LAST)


def _rows(maps: Tensor) -> tuple[int, int]:
    return maps.numel() // maps.shape[1], maps.shape[1]


def _tile(channels: int) -> dict[str, int]:
    few = channels % MANY_CHANNELS != 0
    return {"ROWS": ROWS * (2 if few else 1), "CHANNELS": FEW_CHANNELS if few else MANY_CHANNELS}


def _programs(rows: int, channels: int, tile: dict[str, int]) -> int:
    return -(-rows // tile["ROWS"]) * -(-channels // tile["CHANNELS"])


def _with_row_step(maps: Tensor) -> tuple[Tensor, int]:
    """The maps, copied only if they must be, and how many numbers lie between their rows' starts.

    Gradients of concatenated branches are slices of wider maps, which are read where they lie.
    """
    channels, height, width = maps.shape[1:]
    if not is_plain(maps):
        step = maps.stride(3)
        strides = (height * width * step, 1, width * step, step)
        if min(channels, width) > 1 and step >= channels and maps.stride() == strides:
            return maps, step
        maps = maps.contiguous(memory_format=CHANNELS_LAST)
    return maps, channels


# --- bias, shortcut and ReLU ----------------------------------------------------------------------


def add_bias(
    maps: Tensor, bias: Tensor, shortcut: Tensor | None = None, *, relu: bool = False
) -> Tensor:
    """relu(maps + bias + shortcut), or the sum alone; it takes the place of `maps`, (B, C, H, W).

    Args:
        maps: in one pass if they are channels-last. bias: (C,), float32. shortcut: like the maps.
    """
    if not is_plain(maps) or (shortcut is not None and not is_plain(shortcut)):
        total = maps + bias.to(maps.dtype)[:, None, None]
        total = total if shortcut is None else total + shortcut
        return F.relu(total) if relu else total
    return _AddBias.apply(maps, bias, shortcut, relu)


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, maps: Tensor, bias: Tensor, shortcut: Tensor | None, relu: bool
    ) -> Tensor:
        ctx.mark_dirty(maps)
        rows, channels = _rows(maps)
        tile = _tile(channels)
        kernels.launch(
            "maps.bias_forward",
            _programs(rows, channels, tile),
            *(maps, bias, maps if shortcut is None else shortcut, rows, channels),
            SHORTCUT=shortcut is not None,
            RELU=relu,
            **tile,
        )
        ctx.relu = relu
        ctx.save_for_backward(*[maps] * relu)
        return maps

    @staticmethod
    @only_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors if ctx.relu else (gradient,)
        to_maps, to_bias, to_shortcut, _ = ctx.needs_input_grad
        if not to_bias:
            if ctx.relu:
                gradient = torch.ops.aten.threshold_backward(gradient, out, 0)
            return gradient, None, gradient if to_shortcut else None, None
        gradient, bias = gradients_of_bias(gradient, out, relu=ctx.relu)
        return gradient if to_maps else None, bias, gradient if to_shortcut else None, None


def gradients_of_bias(gradient: Tensor, out: Tensor, *, relu: bool) -> tuple[Tensor, Tensor]:
    """The gradients of `add_bias`: of its maps, and of its bias (C,), their sum.

    Args:
        gradient: of its result `out`, (B, C, H, W); with `relu` that of the maps is 0 where `out`
            is.
    """
    gradient, step = _with_row_step(gradient)
    rows, channels = _rows(gradient)
    tile = _tile(channels) | {"ROWS": SUM_ROWS}
    across = -(-channels // tile["CHANNELS"])
    parts = min(-(-rows // SUM_ROWS), max(1, PROGRAMS // across))
    masked = _empty(out, out.shape) if relu else gradient
    sums = torch.empty(parts, channels, dtype=torch.float32, device=gradient.device)
    kernels.launch(
        "maps.bias_backward",
        parts * across,
        *(gradient, out, masked, sums, rows, channels, step, parts),
        RELU=relu,
        **tile,
    )
    return masked, sums.sum(0)


# --- folding a frozen BatchNorm -------------------------------------------------------------------


def folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """As `layers.folded`, by one kernel; the weight has the type that autocast wants."""
    dtype = conv.weight.dtype
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    statistics = (norm.running_mean, norm.running_var, norm.eps)
    return _Fold.apply(conv.weight, conv.bias, norm.weight, norm.bias, *statistics, dtype)


def can_fold(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> bool:
    """Whether `folded` can take these layers: all in float32, without gaps in the weights."""
    weight = conv.weight
    given = (weight, conv.bias, norm.weight, norm.bias, norm.running_mean, norm.running_var)
    tensors = [each for each in given if each is not None]
    return (
        all(each.dtype == torch.float32 and each.is_cuda for each in tensors)
        and norm.affine
        and (weight.is_contiguous() or is_plain(weight))
    )


class _Fold(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        weight: Tensor,
        bias: Tensor | None,
        gamma: Tensor,
        beta: Tensor,
        mean: Tensor,
        variance: Tensor,
        epsilon: float,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        channels, size = len(weight), weight[0].numel()
        found = torch.empty_like(weight, dtype=dtype), torch.empty_like(mean)
        kernels.launch(
            "maps.fold_forward",
            channels,
            *(weight, weight if bias is None else bias, gamma, beta, mean, variance, epsilon),
            *(*found, size),
            BIAS=bias is not None,
            BLOCK=FOLD_BLOCK,
        )
        if not any(ctx.needs_input_grad[1:4]):
            ctx.mark_non_differentiable(found[1])  # saves the sum of the maps' gradient
        ctx.epsilon, ctx.has_bias = epsilon, bias is not None
        ctx.save_for_backward(weight, weight if bias is None else bias, gamma, mean, variance)
        return found

    @staticmethod
    @only_once
    def backward(
        ctx: Any, gradient: Tensor | None, of_bias: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        weight, bias, gamma, mean, variance = ctx.saved_tensors
        form = CHANNELS_LAST if is_plain(weight) else torch.contiguous_format
        gradient = torch.zeros_like(weight) if gradient is None else gradient
        of_bias = torch.zeros_like(mean) if of_bias is None else of_bias
        to_weight, to_bias, to_gamma = (torch.empty_like(each) for each in (weight, mean, mean))
        kernels.launch(
            "maps.fold_backward",
            len(weight),
            *(gradient.contiguous(memory_format=form), of_bias.contiguous()),
            *(weight, bias, gamma, mean, variance, ctx.epsilon),
            *(to_weight, to_bias, to_gamma, weight[0].numel()),
            BIAS=ctx.has_bias,
            BLOCK=FOLD_BLOCK,
        )
        found = (to_weight, to_bias if ctx.has_bias else None, to_gamma, of_bias)
        wanted = zip(found, ctx.needs_input_grad[:4], strict=True)
        return *(each if needed else None for each, needed in wanted), None, None, None, None


# --- the first convolution ---


def is_stem(images: Tensor, conv: nn.Conv2d) -> bool:
    """Whether `stem` can be used: a 7×7 convolution of colours with stride 2, on even sizes."""
    kind = (conv.in_channels, conv.kernel_size, conv.stride, conv.padding, conv.groups)
    return (
        kind == (3, (7, 7), (2, 2), (3, 3), 1)
        and not (images.shape[2] % 2 or images.shape[3] % 2)
        and not images.requires_grad
    )


def stem(images: Tensor, weight: Tensor) -> Tensor:
    """`F.conv2d(images, weight, stride=2, padding=3)`: (B, 3, H, W) → (B, C, H/2, W/2).

    cuDNN is slow with three channels. Squares of 2×2 pixels are twelve, and the kernel of 7×7, as
    one of 8×8 with a zero row and column in front, has 4×4 of them.
    """
    images_count, _, height, width = images.shape
    size = (height // 2 + 3, width // 2 + 3)
    squares = _empty(images, (images_count, 16, *size), weight.dtype)
    places = images_count * size[0] * size[1]
    kernels.launch(
        "maps.squares",
        -(-places // SUM_ROWS),
        *(images, squares, places, height, width, *size, *images.stride()),
        BEFORE=4,
        ROWS=SUM_ROWS,
    )
    outputs = len(weight)
    weight = F.pad(weight, (1, 0, 1, 0)).reshape(outputs, 3, 4, 2, 4, 2)
    weight = weight.permute(0, 1, 3, 5, 2, 4).reshape(outputs, 12, 4, 4)
    weight = F.pad(weight, (0, 0, 0, 0, 0, 4)).contiguous(memory_format=CHANNELS_LAST)
    return F.conv2d(squares, weight)


# --- pooling --------------------------------------------------------------------------------------


def max_pool(maps: Tensor, stride: int, padding: int, ceil_mode: bool) -> Tensor:
    """The maximum of 3×3 neighbours: channels-last maps (B, C, H, W) → (B, C, H', W').

    Args:
        stride: 1 or 2. padding, ceil_mode: as in `F.max_pool2d`.
    """
    size = [_pooled(length, stride, padding, ceil_mode) for length in maps.shape[2:]]
    return _MaxPool.apply(maps, size, stride, padding)


def _pooled(length: int, stride: int, padding: int, ceil_mode: bool) -> int:
    rest = length + 2 * padding - 3
    windows = (-(-rest // stride) if ceil_mode else rest // stride) + 1
    # No window begins outside the maps and their padding on the left.
    return windows - (ceil_mode and (windows - 1) * stride >= length + padding)


class _MaxPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, size: list[int], stride: int, padding: int) -> Tensor:
        images, channels, *before = maps.shape
        out = _empty(maps, (images, channels, *size))
        taps = torch.empty_like(out, dtype=torch.uint8)
        tile = _tile(channels)
        rows = images * size[0] * size[1]
        kernels.launch(
            "maps.pool_forward",
            _programs(rows, channels, tile),
            *(maps, out, taps, rows, channels, *before, *size),
            STRIDE=stride,
            PADDING=padding,
            **tile,
        )
        ctx.shape, ctx.stride, ctx.padding = maps.shape, stride, padding
        ctx.save_for_backward(taps)
        return out

    @staticmethod
    @only_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (taps,) = ctx.saved_tensors
        gradient, step = _with_row_step(gradient)
        images, channels, *before = ctx.shape
        to_maps = _empty(gradient, ctx.shape)
        tile = _tile(channels)
        rows = images * before[0] * before[1]
        kernels.launch(
            "maps.pool_backward",
            _programs(rows, channels, tile),
            *(gradient, taps, to_maps, rows, channels, *before, *gradient.shape[2:], step),
            STRIDE=ctx.stride,
            PADDING=ctx.padding,
            **tile,
        )
        return to_maps, None, None, None


def average_pool(maps: Tensor) -> Tensor:
    """The average of 3×3 neighbours, zeros outside: (B, C, H, W) → the same, channels-last."""
    return _AveragePool.apply(maps)


class _AveragePool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor) -> Tensor:
        return _averaged(maps)

    @staticmethod
    @only_once
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _averaged(gradient)  # a symmetric filter is its own adjoint


def _averaged(maps: Tensor) -> Tensor:
    maps, step = _with_row_step(maps)
    rows, channels = _rows(maps)
    tile, out = _tile(channels), _empty(maps, maps.shape)
    kernels.launch(
        "maps.average",
        _programs(rows, channels, tile),
        *(maps, out, rows, channels, *maps.shape[2:], step),
        **tile,
    )
    return out


def pool(maps: Tensor, *, average: bool, maximum: bool) -> Tensor:
    """Average, maximum or their sum over the places of channels-last maps: (B, C, H, W) → (B, C).

    The result is float32.
    """
    return _Pool.apply(maps, average, maximum)


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, average: bool, maximum: bool) -> Tensor:
        images, channels, height, width = maps.shape
        out = torch.empty(images, channels, dtype=torch.float32, device=maps.device)
        maxima = torch.empty_like(out, dtype=torch.int32)
        tile = _tile(channels)
        ctx.how = {"AVERAGE": average, "MAXIMUM": maximum}
        kernels.launch(
            "maps.whole_forward",
            images * -(-channels // tile["CHANNELS"]),
            *(maps, out, maxima, height * width, channels),
            **ctx.how,
            **tile,
        )
        ctx.shape, ctx.dtype = maps.shape, maps.dtype
        ctx.save_for_backward(maxima)
        return out

    @staticmethod
    @only_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (maxima,) = ctx.saved_tensors
        to_maps = _empty(gradient, ctx.shape, ctx.dtype)
        rows, channels = _rows(to_maps)
        tile, places = _tile(channels), rows // len(maxima)
        kernels.launch(
            "maps.whole_backward",
            _programs(rows, channels, tile),
            *(gradient.contiguous(), maxima, to_maps, rows, places, channels),
            **ctx.how,
            **tile,
        )
        return to_maps, None, None
