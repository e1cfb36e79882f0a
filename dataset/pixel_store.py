"""Images in the device's memory, and views of whole batches of them, cut there.

Views are those of transforms.py's `cut`, up to rounding: antialiased resizing along each axis is a
matrix, so a batch of views is two matrix products.
"""

from __future__ import annotations

import functools
import math

import numpy as np
import torch

import kernels
from dataset.transforms import Views, resize, resized_shape
from devices import on_device

MOST_TAPS = 12
"""For more, in each direction, matrices are faster than one pass over all pixels of a view."""


class PixelStore:
    """Images of any shapes in the device's memory.

    Attributes:
        pixels: (P, 3) uint8, the images' pixels row by row, one image after the other.
        starts: (N,) where each image begins. shapes: (N, 2) int64 heights and widths.
    """

    def __init__(self, pixels: torch.Tensor, shapes: np.ndarray) -> None:
        self.pixels = pixels
        self.shapes = shapes
        areas = shapes.prod(axis=1)
        self.starts = np.cumsum(areas) - areas
        same = len(shapes) > 0 and (shapes == shapes[0]).all()
        self._stack = pixels.view(-1, *shapes[0].tolist(), 3) if same else None

    @classmethod
    def of_stack(cls, images: np.ndarray, device: torch.device) -> PixelStore:
        """The store of (N, H, W, 3) uint8 images of one shape."""
        pixels = torch.from_numpy(images).to(device)
        return cls(pixels.view(-1, 3), np.tile(images.shape[1:3], (len(images), 1)))

    @property
    def device(self) -> torch.device:
        """Where the pixels are."""
        return self.pixels.device

    def cut(self, index: np.ndarray, views: Views, size: int) -> torch.Tensor:
        """The views of the images at `index`, all at once.

        Returns:
            (B, 3, size, size), 0..255: uint8 if nothing had to be resized, else float32.
        """
        shapes = self.shapes[index]
        boxes = views.boxes
        if self._stack is not None and (boxes[:, 2:] == shapes).all() and not views.flip.any():
            whole = self._stack.index_select(0, self._upload(index))
            return resize(whole.permute(0, 3, 1, 2), (size, size), views.cubic)
        resized = resized_shape(shapes, views.resize)
        ratio = shapes / resized
        start, extent = boxes[:, :2] * ratio, boxes[:, 2:] * ratio
        low = np.floor(start).astype(np.int64)
        high = np.minimum(np.ceil(start + extent).astype(np.int64), shapes)
        if (resized != shapes).any():
            low, high = np.zeros_like(low), shapes
        if (resized == shapes).all() and (boxes[:, 2:] == size).all() and not views.flip.any():
            return self._windows(index, low, high)
        taps = _taps(extent.max(), size, views.cubic)
        if taps <= MOST_TAPS and kernels.usable(self.device) and _kernel_is_right(self.device):
            way = self._in_one_pass
        else:
            way = self._by_matrices
        result = way(index, low, high, start, extent, views, size)
        return result.clamp_(0, 255) if views.cubic else result  # cubic resizing overshoots

    def _in_one_pass(
        self,
        index: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        start: np.ndarray,
        extent: np.ndarray,
        views: Views,
        size: int,
    ) -> torch.Tensor:
        """The views, by a kernel; see there for the arguments."""
        limits = np.column_stack([low, high - low, views.flip]).astype(np.int64)
        places = np.column_stack([self.starts[index], self.shapes[index, 1], limits])
        taps = _taps(extent.max(), size, views.cubic)
        out = torch.empty(len(index), size, size, 3, device=self.device)
        kernels.launch(
            "crops.cut",
            len(index) * size,
            *(self.pixels, self._upload(places), self._upload(np.hstack([start - low, extent]))),
            *(out, size, taps),
            CUBIC=views.cubic,
            TAPS=_power_of_two(taps),
            COLUMNS=_power_of_two(size),
        )
        return out.permute(0, 3, 1, 2)

    def _by_matrices(
        self,
        index: np.ndarray,
        low: np.ndarray,
        high: np.ndarray,
        start: np.ndarray,
        extent: np.ndarray,
        views: Views,
        size: int,
    ) -> torch.Tensor:
        window = self._windows(index, low, high)
        down, across = (
            _weights(
                self._upload(start[:, axis] - low[:, axis]),
                self._upload(extent[:, axis]),
                self._upload(high[:, axis] - low[:, axis]),
                self._upload(views.flip & (axis == 1)),
                window.shape[2 + axis],
                size,
                views.cubic,
                extent[:, axis].max(),
            )
            for axis in (0, 1)
        )
        return _resampled(down, window, across)

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        return on_device(array, self.device)

    def _windows(self, index: np.ndarray, low: np.ndarray, high: np.ndarray) -> torch.Tensor:
        """Rows and columns low..high of each image: (B, 3, h, w) uint8, the size of the largest.

        On a GPU, h and w are rounded up to multiples of 8, which matrix products need to be fast.
        """
        unit = 1 if self.device.type == "cpu" else 8
        height, width = (unit * -(-(high - low).max(axis=0) // unit)).tolist()
        row, column = (
            np.minimum(low[:, a, None] + np.arange(length), high[:, a, None] - 1)
            for a, length in ((0, height), (1, width))
        )
        row = self.starts[index][:, None] + row * self.shapes[index, 1:]
        if len(self.pixels) < 2**31:  # half the memory for millions of indices
            row, column = row.astype(np.int32), column.astype(np.int32)
        where = self._upload(row)[:, :, None] + self._upload(column)[:, None, :]
        window = self.pixels.index_select(0, where.flatten()).view(*where.shape, 3)
        return window.permute(0, 3, 1, 2)


@functools.cache
def _kernel_is_right(device: torch.device) -> bool:
    """Whether the kernel cuts on this device what matrices cut."""
    shapes, index = np.array([(5, 6), (7, 4)]), np.array([1, 0])
    store = PixelStore((torch.arange(58 * 3, device=device) * 37 % 256).byte().view(-1, 3), shapes)
    low, start = np.array([(0, 1), (2, 0)]), np.array([(0.5, 1.25), (2.0, 0.0)])
    extent, flip = np.array([(6.0, 2.5), (3.0, 6.0)]), np.array([True, False])
    high = np.array([(7, 4), (5, 6)])
    given = (index, low, high, start, extent, Views(0, np.zeros((2, 4), np.int64), flip), 3)
    return kernels.agree(
        lambda: store._in_one_pass(*given),
        store._by_matrices(*given),
        tolerance=1.0,  # of 255 levels: matrices are in half precision
    )


def _resampled(down: torch.Tensor, window: torch.Tensor, across: torch.Tensor) -> torch.Tensor:
    """down @ window @ acrossᵀ, for every channel of each window.

    On a GPU in half precision, whose products are ten times as fast. It represents 0..255 exactly
    and rounds weights and rows to 11 bits: an error of a tenth of a level.

    Args:
        down: (B, size, h) and across: (B, size, w), made by `_weights` on this device.
        window: (B, 3, h, w) uint8, channels last.

    Returns:
        (B, 3, size, size) float32.
    """
    if window.device.type == "cpu":
        return down[:, None] @ window.float() @ across.transpose(1, 2)[:, None]
    images, _, height, width = window.shape
    size = down.shape[1]
    rows = window.permute(0, 2, 3, 1).reshape(images, height, width * 3).half()
    rows = (down @ rows).view(images, size, width, 3)  # channels last, as stored
    columns = rows.permute(0, 2, 1, 3).reshape(images, width, size * 3)
    result = (across @ columns).view(images, size, size, 3)  # a column of pixels each
    return result.permute(0, 3, 2, 1).to(torch.float32, memory_format=torch.channels_last)


def _weights(
    start: torch.Tensor,
    extent: torch.Tensor,
    valid: torch.Tensor,
    mirror: torch.Tensor,
    length: int,
    size: int,
    cubic: bool,
    widest: float,
) -> torch.Tensor:
    """Antialiased resizing along one axis as matrices.

    Args:
        start, extent: (B,) the beginning and length of each view, in pixels of windows of `length`
            pixels, of which the first `valid` (B,) belong to the image. mirror: (B,) bool.
        widest: the largest extent, as a number in the host's memory.

    Returns:
        (B, size, length), float32 on a CPU, half on a GPU (see `_resampled`); rows sum to one.
    """
    scale = (extent / size)[:, None, None]
    place = torch.arange(size, device=start.device)[:, None] + 0.5
    place = torch.where(mirror[:, None, None], size - place, place) * scale
    # Few pixels of a row have a weight.
    taps = min(length, _taps(widest, size, cubic))
    first = (start[:, None, None] + place - taps / 2).floor_().clamp_(0, length - taps).long()
    pixel = first + torch.arange(taps, device=start.device)
    distance = (pixel + 0.5 - start[:, None, None] - place).abs_()
    distance /= scale.clamp(min=1)
    weights = _cubic(distance) if cubic else (1 - distance).clamp_(min=0)
    weights *= pixel < valid[:, None, None]
    weights /= weights.sum(dim=2, keepdim=True)
    kind = torch.float32 if start.device.type == "cpu" else torch.float16
    whole = torch.zeros(len(start), size, length, dtype=kind, device=start.device)
    return whole.scatter_(2, pixel, weights.to(kind))


def _power_of_two(number: int) -> int:
    """The lowest that is not below."""
    return 1 << (number - 1).bit_length()


def _taps(widest: float, size: int, cubic: bool) -> int:
    """The most pixels that have a weight: those nearer than `reach`, and one more on each side."""
    reach = (2 if cubic else 1) * max(1.0, widest / size)
    return 2 * math.ceil(reach) + 2


def _cubic(x: torch.Tensor) -> torch.Tensor:
    """Keys' cubic of distances x ≥ 0, with the slope (-0.5) of antialiasing in Pillow and torch."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
