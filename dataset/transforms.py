"""What happens to pixels between the file and the network.

There are two steps, wherever they run. First, a *view* of each image is cut out of its uint8
pixels, resized and perhaps mirrored. Then the stack of equally large views is finished on the
device in float32: changed (augment.py), put into the backbone's colour order and scale, normalised.

All resizing is antialiased: bilinear, or cubic if the backbone expects that. In evaluation it is
Pillow's, with the same bits as torchvision for a PIL image. Crops are resized by torch, which is
several times as fast and differs by at most one of 255 levels, or two if it is cubic.

Every random number is a hash of (seed, epoch, image, visit): it does not depend on the number of
workers, the order of batches, or restarts.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from dataset.base import InputSpec

# --- random numbers -------------------------------------------------------------------------------

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
VIEW_STREAM, CHANGE_STREAM, REPLACEMENT_STREAM = range(3)


def uniforms(
    seed: int,
    epoch: int,
    index: np.ndarray,
    draws: int,
    stream: int = 0,
    visit: np.ndarray | int = 0,
) -> np.ndarray:
    """Random numbers in [0, 1) that depend only on the arguments.

    A SplitMix64 sequence per image, whose start is the hash of (seed, stream, epoch, visit, index).

    Args:
        index: (B,) image indices. visit: (B,) how often each was drawn before in this epoch.
        draws: the number of random numbers per image. stream: different for different uses.

    Returns:
        (B, draws) float64.
    """
    index = np.asarray(index).astype(np.uint64)
    state = np.zeros(index.shape, np.uint64)
    for part in (seed % 2**64, stream, epoch, np.asarray(visit).astype(np.uint64), index):
        state = _mix(state + _GOLDEN + np.asarray(part, np.uint64))
    counters = np.arange(1, draws + 1, dtype=np.uint64) * _GOLDEN
    bits = _mix(state[:, None] + counters)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


# --- views ----------------------------------------------------------------------------------------


class Views(NamedTuple):
    """One view per image of a batch.

    Attributes:
        resize: the short side to which every image is resized first, in pixels; 0: not resized.
        boxes: (B, 4) int64 top, left, height, width, in pixels of the resized image.
        flip: (B,) bool, whether the view is mirrored left to right.
        cubic: whether resizing is cubic instead of bilinear.
    """

    resize: int
    boxes: np.ndarray
    flip: np.ndarray
    cubic: bool = False


def resized_shape(shapes: np.ndarray, short_side: int) -> np.ndarray:
    """(B, 2) heights and widths after resizing the short side to `short_side` (0: unchanged).

    The long side is rounded down, as torchvision does.
    """
    if not short_side:
        return shapes
    return shapes * short_side // shapes.min(axis=1, keepdims=True)


def centre_views(shapes: np.ndarray, resize: int, size: int) -> Views:
    """The views in evaluation: short side to `resize`, then the central square of `size` pixels.

    Args:
        shapes: (B, 2) heights and widths of the images in pixels. resize: 0 takes whole images.
    """
    shapes = resized_shape(shapes, resize)
    extent = np.full_like(shapes, size) if resize else shapes
    corner = np.rint((shapes - extent) / 2).astype(np.int64)
    boxes = np.concatenate([corner, extent], axis=1)
    return Views(resize, boxes, np.zeros(len(boxes), bool))


@dataclass(frozen=True)
class RandomCrop:
    """RandomResizedCrop and horizontal flip, with torchvision's defaults and its distribution.

    Attributes:
        scale: range of the crop's share of the image's area. ratio: range of width / height.
        flip: probability of mirroring. resize: whether the image is first resized to the short side
            in evaluation (256).
    """

    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    resize: bool = False

    attempts = 10
    draws = 2 * attempts + 3

    def views(self, shapes: np.ndarray, u: np.ndarray, resize: int) -> Views:
        """A random view of each image.

        Args:
            shapes: (B, 2) heights and widths in pixels. u: (B, draws) uniform numbers.
            resize: the short side in evaluation, used if `self.resize`.
        """
        resize = resize if self.resize else 0
        shapes = resized_shape(shapes, resize)
        height, width = shapes[:, :1], shapes[:, 1:]
        area = height * width * between(self.scale, u[:, : self.attempts])
        low, high = np.log(self.ratio)
        ratio = np.exp(between((low, high), u[:, self.attempts : 2 * self.attempts]))
        crop = np.stack([np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))], axis=2)
        crop = crop.astype(np.int64)  # (B, attempts, 2)
        fits = ((crop > 0) & (crop <= shapes[:, None])).all(axis=2)
        first = fits.argmax(axis=1)
        rows = np.arange(len(shapes))
        found = fits[rows, first][:, None]
        crop = np.where(found, crop[rows, first], self._largest(shapes))
        free = shapes - crop
        corner = np.floor(u[:, -3:-1] * (free + 1)).astype(np.int64)
        corner = np.where(found, corner, free // 2)
        return Views(resize, np.concatenate([corner, crop], axis=1), u[:, -1] < self.flip)

    def _largest(self, shapes: np.ndarray) -> np.ndarray:
        """The largest central crop of an allowed ratio, used if no attempt fits."""
        height, width = shapes[:, 0], shapes[:, 1]
        low, high = self.ratio
        tall = np.minimum(height, np.rint(width / low))
        wide = np.minimum(width, np.rint(height * high))
        return np.stack([tall, wide], axis=1).astype(np.int64)


def between(limits: Sequence[float], u: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1) mapped to [low, high)."""
    low, high = limits
    return low + (high - low) * u


def cut(image: np.ndarray, views: Views, position: int, size: int) -> torch.Tensor:
    """The view at `position` of `views`, taken from its image.

    Args:
        image: (H, W, 3) uint8.

    Returns:
        (size, size, 3) uint8.
    """
    if views.resize:
        image = with_short_side(image, views.resize, views.cubic)
    top, left, height, width = views.boxes[position].tolist()
    box = torch.from_numpy(image[top : top + height, left : left + width])
    # Contiguous pixels with channels last are resized twice as fast, to the same values.
    pixels = resize(box.contiguous()[None].permute(0, 3, 1, 2), (size, size), views.cubic)
    if views.flip[position]:
        pixels = pixels.flip(3)
    return pixels[0].permute(1, 2, 0)


def with_short_side(image: np.ndarray, size: int, cubic: bool = False) -> np.ndarray:
    """(H, W, 3) uint8 with its short side resized to `size` pixels by Pillow."""
    height, width = resized_shape(np.array([image.shape[:2]]), size)[0].tolist()
    if (height, width) == image.shape[:2]:
        return image
    how = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
    return np.array(Image.fromarray(image).resize((width, height), how))


def resize(pixels: torch.Tensor, shape: tuple[int, int], cubic: bool = False) -> torch.Tensor:
    """(B, 3, H, W) → (B, 3, *shape) with antialiasing; uint8 stays uint8."""
    if tuple(pixels.shape[2:]) == shape:
        return pixels
    mode = "bicubic" if cubic else "bilinear"
    if pixels.dtype == torch.uint8 and pixels.device.type != "cpu":
        exact = F.interpolate(pixels.float(), shape, mode=mode, antialias=True)
        return exact.round_().clamp_(0, 255).to(torch.uint8)
    return F.interpolate(pixels, shape, mode=mode, antialias=True)


# --- inputs of the network ------------------------------------------------------------------------


class Change(Protocol):
    """A change of views, decided by `draws` uniform numbers per image."""

    draws: int

    def __call__(self, pixels: torch.Tensor, u: np.ndarray) -> torch.Tensor:
        """(B, 3, S, S), 0..255, and (B, draws) → (B, 3, S, S) float32, 0..255."""


def to_network(
    pixels: torch.Tensor,
    spec: InputSpec,
    change: Change | None = None,
    u: np.ndarray | None = None,
) -> torch.Tensor:
    """Pixels as inputs of the backbone.

    Args:
        pixels: (B, 3, S, S) RGB, 0..255, uint8 or float32; fastest with channels last.
        spec: colour order, scale, mean and standard deviation.
        change: applied to the pixels first, with `u` (B, change.draws).

    Returns:
        (B, 3, S, S) float32, channels last.
    """
    images, size = len(pixels), pixels.shape[2]
    gain, shift = _row_of_constants(spec, size, pixels.device)
    result = _empty((images, size, size * 3), pixels.device)
    at_once = _ON_A_CPU if pixels.device.type == "cpu" else _ON_A_GPU
    step = max(1, at_once // size**2)
    for start in range(0, images, step):
        part, out = pixels[start : start + step], result[start : start + step]
        if change is not None:
            part = change(part, u[start : start + step])
        rows = part.permute(0, 2, 3, 1)
        if spec.color == "BGR":
            rows = rows.flip(3)
        rows = rows.reshape(out.shape)
        torch.addcmul(shift, rows if rows.is_floating_point() else out.copy_(rows), gain, out=out)
    return result.view(images, size, size, 3).permute(0, 3, 1, 2)


_ON_A_CPU, _ON_A_GPU = 1 << 18, 1 << 25
"""Pixels that are finished at once: on a CPU as many as fit its cache, on a GPU more."""


def _empty(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """An uninitialised float32 tensor; a large one on the CPU uses huge pages.

    New memory is allocated page by page, and with pages of 4 kB that takes five times as long as
    all the arithmetic on them.
    """
    size = 4 * math.prod(shape)
    if device.type != "cpu" or size < _HUGE_FROM or not hasattr(mmap, "MADV_HUGEPAGE"):
        return torch.empty(shape, device=device)
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.float32).view(shape)


_HUGE_FROM = 1 << 22  # two huge pages of most machines, in bytes


@lru_cache(maxsize=8)
def _row_of_constants(
    spec: InputSpec, size: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factor and summand for an image row: three constants, repeated for vectorised arithmetic."""
    mean, std = np.array(spec.mean), np.array(spec.std)
    gain, shift = spec.scale / 255 / std, -mean / std
    return tuple(
        torch.from_numpy(np.tile(each, size).astype(np.float32)).to(device)
        for each in (gain, shift)
    )
