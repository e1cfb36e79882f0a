"""Triton kernels for convolutional networks on a GPU: what lies between two convolutions.

Maps are (rows, channels), the memory of channels-last feature maps, one row per place of an image.
Half-precision values are computed in float32. `net/fused.py` calls them.
"""

from __future__ import annotations

import triton
import triton.language as tl

# --- bias, shortcut and ReLU ----------------------------------------------------------------------


@triton.jit
def bias_forward(
    maps, bias, shortcut, rows, channels,
    SHORTCUT: tl.constexpr, RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """maps ← maps + bias (+ shortcut), or its ReLU, in a tile of ROWS × CHANNELS."""
    across = tl.cdiv(channels, CHANNELS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS).to(tl.int64)
    channel = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    at = row[:, None] * channels + channel[None, :]
    value = tl.load(maps + at, mask=inside, other=0.0).to(tl.float32)
    value += tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)[None, :]
    if SHORTCUT:
        value += tl.load(shortcut + at, mask=inside, other=0.0).to(tl.float32)
    if RELU:
        value = tl.where(value < 0, 0.0, value)  # NaN stays, as in torch
    tl.store(maps + at, value.to(maps.dtype.element_ty), mask=inside)


@triton.jit
def bias_backward(
    gradient, out, masked, sums, rows, channels, step, parts,
    RELU: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient behind the ReLU, and the sum of every `parts`-th block of its rows.

    A row of `gradient` begins `step` numbers after the one before it, because it can be a part of
    wider maps. `sums` is (parts, channels) in float32. Without RELU only the sums are made.
    """
    across = tl.cdiv(channels, CHANNELS)
    part = tl.program_id(0) // across
    channel = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float32)
    for block in range(part, tl.cdiv(rows, ROWS), parts):
        row = block * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (row < rows)[:, None] & (channel < channels)[None, :]
        value = tl.load(
            gradient + row[:, None] * step + channel[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        if RELU:
            at = row[:, None] * channels + channel[None, :]
            value = tl.where(tl.load(out + at, mask=inside, other=0.0) <= 0, 0.0, value)
            tl.store(masked + at, value.to(masked.dtype.element_ty), mask=inside)
        total += tl.sum(value, axis=0)
    tl.store(sums + part * channels + channel, total, mask=channel < channels)


# --- folding a frozen BatchNorm -------------------------------------------------------------------


@triton.jit
def fold_forward(
    weight, bias, gamma, beta, mean, variance, epsilon, folded, folded_bias, size,
    BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`layers.folded` for one output channel, whose kernel has `size` weights."""
    channel = tl.program_id(0)
    scale = tl.load(gamma + channel) / tl.sqrt(tl.load(variance + channel) + epsilon)
    shift = tl.load(mean + channel)
    if BIAS:
        shift -= tl.load(bias + channel)
    tl.store(folded_bias + channel, tl.load(beta + channel) - shift * scale)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(weight + channel * size + at, mask=at < size, other=0.0) * scale
        tl.store(folded + channel * size + at, value.to(folded.dtype.element_ty), mask=at < size)


@triton.jit
def fold_backward(
    gradient, gradient_bias, weight, bias, gamma, mean, variance, epsilon, to_weight, to_bias,
    to_gamma, size,
    BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The gradients of the kernel, of its bias and of the norm's scale, for one output channel."""
    channel = tl.program_id(0)
    root = 1.0 / tl.sqrt(tl.load(variance + channel) + epsilon)
    scale = tl.load(gamma + channel) * root
    of_bias = tl.load(gradient_bias + channel)
    shift = tl.load(mean + channel)
    if BIAS:
        shift -= tl.load(bias + channel)
        tl.store(to_bias + channel, of_bias * scale)
    product = tl.zeros([BLOCK], tl.float32)
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        value = tl.load(gradient + channel * size + at, mask=at < size, other=0.0).to(tl.float32)
        product += value * tl.load(weight + channel * size + at, mask=at < size, other=0.0)
        tl.store(to_weight + channel * size + at, value * scale, mask=at < size)
    tl.store(to_gamma + channel, root * (tl.sum(product, axis=0) - of_bias * shift))


# --- maximum of 3×3 neighbours --------------------------------------------------------------------


@triton.jit
def pool_forward(
    maps, out, taps, places, channels, height, width, out_height, out_width,
    STRIDE: tl.constexpr, PADDING: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The maximum of 3×3 neighbours, and the number of the first of them that has it (0 to 8)."""
    across = tl.cdiv(channels, CHANNELS)
    place = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)
    left = place % out_width * STRIDE - PADDING
    top = place // out_width % out_height * STRIDE - PADDING
    image = place // out_width // out_height * height
    best = tl.full([ROWS, CHANNELS], float("-inf"), tl.float32)
    tap = tl.full([ROWS, CHANNELS], 9, tl.int32)
    exists = (place < places)[:, None] & (channel < channels)[None, :]
    for number in tl.static_range(9):
        y, x = top + number // 3, left + number % 3
        inside = exists & ((y >= 0) & (y < height) & (x >= 0) & (x < width))[:, None]
        at = ((image + y) * width + x).to(tl.int64)[:, None] * channels + channel[None, :]
        value = tl.load(maps + at, mask=inside, other=0.0).to(tl.float32)
        better = inside & ((value > best) | (value != value) | (tap == 9))
        best = tl.where(better, value, best)
        tap = tl.where(better, number, tap)
    at = place.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(out + at, best.to(out.dtype.element_ty), mask=exists)
    tl.store(taps + at, tap.to(tl.uint8), mask=exists)


@triton.jit
def pool_backward(
    gradient, taps, to_maps, places, channels, height, width, out_height, out_width, step,
    STRIDE: tl.constexpr, PADDING: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Each place takes the gradients of those windows whose maximum it was.

    No two programs write to one place, so the result is the same every time.
    """
    across = tl.cdiv(channels, CHANNELS)
    place = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)
    x = place % width + PADDING
    y = place // width % height + PADDING
    image = place // width // height * out_height
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    exists = (place < places)[:, None] & (channel < channels)[None, :]
    REACH: tl.constexpr = 2 // STRIDE + 1  # windows that contain a place, in one direction
    for number in tl.static_range(REACH * REACH):
        row, column = y // STRIDE - number // REACH, x // STRIDE - number % REACH
        tap = (y - row * STRIDE) * 3 + x - column * STRIDE
        inside = (y - row * STRIDE < 3) & (x - column * STRIDE < 3)
        inside &= (row >= 0) & (row < out_height) & (column >= 0) & (column < out_width)
        inside = exists & inside[:, None]
        window = ((image + row) * out_width + column).to(tl.int64)[:, None]
        is_maximum = tl.load(taps + window * channels + channel[None, :], mask=inside, other=9)
        value = tl.load(gradient + window * step + channel[None, :], mask=inside, other=0.0)
        total += tl.where(is_maximum.to(tl.int32) == tap[:, None], value.to(tl.float32), 0.0)
    at = place.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(to_maps + at, total.to(to_maps.dtype.element_ty), mask=exists)


# --- average of 3×3 neighbours --------------------------------------------------------------------


@triton.jit
def average(
    maps, out, places, channels, height, width, step,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The average of 3×3 neighbours, zeros outside; a row of `maps` begins every `step` numbers."""
    across = tl.cdiv(channels, CHANNELS)
    place = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)
    left = place % width - 1
    top = place // width % height - 1
    image = place // width // height * height
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    exists = (place < places)[:, None] & (channel < channels)[None, :]
    for number in tl.static_range(9):
        y, x = top + number // 3, left + number % 3
        inside = exists & ((y >= 0) & (y < height) & (x >= 0) & (x < width))[:, None]
        at = ((image + y) * width + x).to(tl.int64)[:, None] * step + channel[None, :]
        total += tl.load(maps + at, mask=inside, other=0.0).to(tl.float32)
    at = place.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(out + at, (total / 9).to(out.dtype.element_ty), mask=exists)


# --- average and maximum of whole maps ------------------------------------------------------------


@triton.jit
def whole_forward(
    maps, out, maxima, places, channels,
    AVERAGE: tl.constexpr, MAXIMUM: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Average, maximum or their sum over an image's places; the first place of each maximum."""
    across = tl.cdiv(channels, CHANNELS)
    image = tl.program_id(0) // across
    channel = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)
    total = tl.zeros([CHANNELS], tl.float32)
    best = tl.full([CHANNELS], float("-inf"), tl.float32)
    found = tl.zeros([CHANNELS], tl.int32)
    start = image.to(tl.int64) * places
    for block in range(0, places, ROWS):
        place = block + tl.arange(0, ROWS)
        inside = (place < places)[:, None] & (channel < channels)[None, :]
        at = (start + place)[:, None] * channels + channel[None, :]
        value = tl.load(maps + at, mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(value, axis=0)
        if MAXIMUM:
            value = tl.where(inside, value, float("-inf"))
            highest = tl.max(value, axis=0)
            first = tl.min(tl.where(value == highest[None, :], place[:, None], places), axis=0)
            found = tl.where(highest > best, first, found)
            best = tl.maximum(best, highest)
    result = tl.zeros([CHANNELS], tl.float32)
    at = image.to(tl.int64) * channels + channel
    if MAXIMUM:
        best = tl.where(total != total, total, best)  # NaN stays, as in torch
        result += best
        tl.store(maxima + at, found, mask=channel < channels)
    if AVERAGE:
        result += total / places
    tl.store(out + at, result, mask=channel < channels)


@triton.jit
def whole_backward(
    gradient, maxima, to_maps, rows, places, channels,
    AVERAGE: tl.constexpr, MAXIMUM: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient of the maps, of which there are `rows` places in all images."""
    across = tl.cdiv(channels, CHANNELS)
    row = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(0) % across * CHANNELS + tl.arange(0, CHANNELS)
    inside = (row < rows)[:, None] & (channel < channels)[None, :]
    at = (row // places).to(tl.int64)[:, None] * channels + channel[None, :]
    value = tl.load(gradient + at, mask=inside, other=0.0)
    total = tl.zeros([ROWS, CHANNELS], tl.float32)
    if AVERAGE:
        total += value / places
    if MAXIMUM:
        is_maximum = tl.load(maxima + at, mask=inside, other=-1) == (row % places)[:, None]
        total += tl.where(is_maximum, value, 0.0)
    at = row.to(tl.int64)[:, None] * channels + channel[None, :]
    tl.store(to_maps + at, total.to(to_maps.dtype.element_ty), mask=inside)


# --- the first convolution ------------------------------------------------------------------------


@triton.jit
def squares(
    images, out, places, height, width, out_height, out_width, of_image, of_color, of_row,
    of_column,
    BEFORE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Squares of 2×2 pixels, 3 colours, as 12 channels of a place; 4 more are zero.

    The images have BEFORE zeros on the left and above; `of_…` are their strides.
    """
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, 16)
    y = place // out_width % out_height * 2 - BEFORE
    x = place % out_width * 2 - BEFORE
    image = (place // out_width // out_height).to(tl.int64)
    row = y[:, None] + (channel % 4 // 2)[None, :]
    column = x[:, None] + (channel % 2)[None, :]
    inside = (row >= 0) & (row < height) & (column >= 0) & (column < width)
    inside &= (place < places)[:, None] & (channel < 12)[None, :]
    at = image[:, None] * of_image + (channel // 4)[None, :] * of_color
    at += row * of_row + column * of_column
    value = tl.load(images + at, mask=inside, other=0.0).to(tl.float32)
    at = place.to(tl.int64)[:, None] * 16 + channel[None, :]
    tl.store(out + at, value.to(out.dtype.element_ty), mask=(place < places)[:, None])
