"""What is done to pixels between the file and the network.

Two steps, wherever they run. A *view* says which part of an image is looked at: it is cut out of
uint8 pixels, resized and perhaps mirrored. Then the stack of equally large views is finished on the
device in float32: redrawn (`Redraw`), put into the backbone's colour order and scale, normalised.

All resizing is bilinear with antialiasing. The evaluation's is Pillow's, bit for bit what
torchvision makes of a PIL image; crops are resized by torch, which is several times as fast and
differs from it by at most one of 255 levels.

Every random number is a hash of (seed, epoch, image, visit): the number of workers, the order of
the batches and restarts do not change it.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

if TYPE_CHECKING:
    from net import InputSpec

# --- random numbers that depend on nothing but their names ----------------------------------------

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
VIEW_STREAM, REDRAW_STREAM, REPLACEMENT_STREAM = range(3)


def uniforms(
    seed: int,
    epoch: int,
    index: np.ndarray,
    draws: int,
    stream: int = 0,
    visit: np.ndarray | int = 0,
) -> np.ndarray:
    """Random numbers in [0, 1) that are a function of the arguments alone.

    A SplitMix64 sequence per image, whose start is the hash of (seed, stream, epoch, visit, index).

    Args:
        index: (B,) image indices. visit: (B,) how often each was drawn before in this epoch.
        draws: how many numbers an image needs. stream: keeps different uses apart.

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


# --- views: which part of an image is looked at ---------------------------------------------------


class Views(NamedTuple):
    """One view per image of a batch.

    Attributes:
        resize: the short side to which every image is brought first, in pixels; 0 leaves it.
        boxes: (B, 4) int64 top, left, height, width, in pixels of the resized image.
        flip: (B,) bool, whether the view is mirrored left to right.
    """

    resize: int
    boxes: np.ndarray
    flip: np.ndarray


def resized_shape(shapes: np.ndarray, short_side: int) -> np.ndarray:
    """(B, 2) heights and widths after bringing the short side to `short_side` (0: unchanged).

    The long side is rounded down, as torchvision does.
    """
    if not short_side:
        return shapes
    return shapes * short_side // shapes.min(axis=1, keepdims=True)


def centre_views(shapes: np.ndarray, resize: int, size: int) -> Views:
    """The evaluation view: short side to `resize`, then the central square of `size` pixels.

    Args:
        shapes: (B, 2) heights and widths of the images in pixels. resize: 0 takes images whole.
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
        flip: probability of mirroring. resize: True crops from the image after bringing it to the
            evaluation's short side (256), False from the image as it is.
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
            resize: the evaluation's short side, used when `self.resize`.
        """
        resize = resize if self.resize else 0
        shapes = resized_shape(shapes, resize)
        height, width = shapes[:, :1], shapes[:, 1:]
        area = height * width * _between(self.scale, u[:, : self.attempts])
        low, high = np.log(self.ratio)
        ratio = np.exp(_between((low, high), u[:, self.attempts : 2 * self.attempts]))
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
        """The largest central crop of an allowed ratio: what is taken when no attempt fits."""
        height, width = shapes[:, 0], shapes[:, 1]
        low, high = self.ratio
        tall = np.minimum(height, np.rint(width / low))
        wide = np.minimum(width, np.rint(height * high))
        return np.stack([tall, wide], axis=1).astype(np.int64)


def _between(limits: Sequence[float], u: np.ndarray) -> np.ndarray:
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
        image = with_short_side(image, views.resize)
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    top, left, height, width = views.boxes[position].tolist()
    pixels = resize(pixels[:, :, top : top + height, left : left + width], (size, size))
    if views.flip[position]:
        pixels = pixels.flip(3)
    return pixels[0].permute(1, 2, 0)


def with_short_side(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, 3) uint8 with its short side brought to `size` pixels by Pillow."""
    height, width = resized_shape(np.array([image.shape[:2]]), size)[0].tolist()
    if (height, width) == image.shape[:2]:
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def resize(pixels: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    """(B, 3, H, W) → (B, 3, *shape), bilinear with antialiasing; uint8 stays uint8."""
    if tuple(pixels.shape[2:]) == shape:
        return pixels
    if pixels.dtype == torch.uint8 and pixels.device.type != "cpu":
        exact = F.interpolate(pixels.float(), shape, mode="bilinear", antialias=True)
        return exact.round_().clamp_(0, 255).to(torch.uint8)
    return F.interpolate(pixels, shape, mode="bilinear", antialias=True)


# --- redrawing: drawn pictures in another hand ----------------------------------------------------


@dataclass(frozen=True)
class Redraw:
    """Random geometry and colour for drawings on white: the same thing, drawn by another hand.

    Never mirrors and hardly turns a picture, since for many drawings that changes what they mean.
    All of it is batched float32 arithmetic on the device, on ink = 1 - RGB: white is zero, what
    lies outside the picture is white, and the paper keeps its colour. 0 turns a change off.

    Attributes:
        scale: range of the zoom. aspect: largest log stretch of one axis against the other.
        rotation: largest angle in degrees. shift: largest shift as a share of the side.
        bend: standard deviation of a smooth random displacement, as a share of half the side.
        outline: probability of keeping the edges alone.
        mixing: standard deviation of the entries of a random 3×3 matrix on the colours' ink.
        grey: probability of losing all colour; saturation: range of its factor otherwise.
        ink: largest change of the amount of ink.
        tone: largest t of RGB → RGB + t·RGB·(1 - RGB), a cheap gamma (0.4 is about e^±0.3).
        negative: probability of inverted colours.
        erase: probability of one rectangle of a random colour; sides: range of its sides' share.
    """

    scale: tuple[float, float] = (0.75, 1.2)
    aspect: float = 0.1
    rotation: float = 10.0
    shift: float = 0.08
    bend: float = 0.04
    outline: float = 0.1
    mixing: float = 0.3
    grey: float = 0.3
    saturation: tuple[float, float] = (0.4, 1.4)
    ink: float = 0.2
    tone: float = 0.4
    negative: float = 0.05
    erase: float = 0.3
    sides: tuple[float, float] = (0.1, 0.4)

    knots = 4
    draws = 5 + 2 * knots * knots + 9 + 5 + 4 + 8

    def __call__(self, pixels: torch.Tensor, u: np.ndarray) -> torch.Tensor:
        """Redraws a batch.

        Args:
            pixels: (B, 3, S, S), 0..255, drawn on white. u: (B, draws) uniform numbers.

        Returns:
            (B, 3, S, S) float32, 0..255.
        """
        draw = _Draws(u, pixels.device)
        ink = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        ink = (255.0 - ink).mul_(1 / 255)
        ink = F.grid_sample(ink, self._grid(draw, ink.shape[2]), align_corners=False)
        self._keep_outlines(ink, draw)
        ink = torch.bmm(self._colour_matrix(draw), ink.flatten(2)).view_as(ink).clamp_(0, 1)
        bright = draw.tensor(draw.around(self.tone))[:, None, None, None]
        if self.tone:
            ink.mul_((1 - bright) + bright * ink)
        for rows in draw.rows(self.negative):
            ink[rows] = 1 - ink[rows]
        self._erase(ink, draw)
        return ink.mul_(-255).add_(255)

    def _grid(self, draw: _Draws, size: int) -> torch.Tensor:
        """Where each pixel of the result is looked up: (B, S, S, 2) x, y in -1..1.

        Rotation, zoom, shift and bend are linear in fixed functions of the position, so all grids
        are one matrix product.
        """
        zoom = np.exp(draw.between(np.log(self.scale)))
        stretch = np.exp(draw.around(self.aspect))
        angle = draw.around(np.deg2rad(self.rotation))
        shift = 2 * draw.around(self.shift, 2)
        bend = self.bend * draw.normal(2 * self.knots**2)
        across, down = 1 / (zoom * stretch), stretch / zoom
        rows = (np.cos(angle) * across, -np.sin(angle) * across)
        rows += (np.sin(angle) * down, np.cos(angle) * down)
        parts = [np.stack(rows, axis=1).reshape(-1, 2, 2), shift[:, :, None]]
        parts.append(bend.reshape(len(bend), 2, -1))
        coefficients = draw.tensor(np.concatenate(parts, axis=2)).flatten(0, 1)
        grid = coefficients @ _position_functions(size, self.knots, coefficients.device)
        return grid.view(-1, 2, size, size).permute(0, 2, 3, 1)

    def _keep_outlines(self, ink: torch.Tensor, draw: _Draws) -> None:
        for rows in draw.rows(self.outline):
            grey = F.pad(ink[rows].mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
            across = grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2]
            down = grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]
            ink[rows] = torch.hypot(across, down).mul_(2).clamp_(max=1).expand(-1, 3, -1, -1)

    def _colour_matrix(self, draw: _Draws) -> torch.Tensor:
        """(B, 3, 3): the channels mixed, their saturation and the amount of ink changed."""
        mixing = np.eye(3) + self.mixing * draw.normal(9).reshape(-1, 3, 3)
        mixing = mixing / np.maximum(mixing.sum(axis=2, keepdims=True), 0.5)
        weights = draw.between((0.2, 1.2), 3)
        weights = weights / weights.sum(axis=1, keepdims=True)
        saturation = draw.between(self.saturation)
        saturation = np.where(draw.chance(self.grey), 0, saturation)[:, None, None]
        saturate = saturation * np.eye(3) + (1 - saturation) * weights[:, None, :]
        amount = 1 + draw.around(self.ink)[:, None, None]
        return draw.tensor(amount * (saturate @ mixing))

    def _erase(self, ink: torch.Tensor, draw: _Draws) -> None:
        chosen = draw.rows(self.erase)
        sides, centre = draw.between(self.sides, 2), draw.between((0, 1), 2)
        corners = draw.tensor(np.stack([centre - sides / 2, centre + sides / 2]))
        paint = draw.tensor(draw.between((0, 1), 3))
        for rows in chosen:
            size = ink.shape[2]
            place = (torch.arange(size, device=ink.device) + 0.5) / size
            low, high = corners[:, rows, :, None]
            inside = (place >= low) & (place < high)
            box = inside[:, :1, :, None] & inside[:, 1:, None, :]
            ink[rows] = torch.where(box, paint[rows][:, :, None, None], ink[rows])


class _Draws:
    """Hands out the columns of (B, draws) uniform numbers, each once.

    Everything stays on the CPU until it is needed: which images a rare change concerns is then
    known without waiting for the GPU.
    """

    def __init__(self, u: np.ndarray, device: torch.device) -> None:
        self._u = u
        self._next = 0
        self._device = device

    def _take(self, count: int | None) -> np.ndarray:
        start, self._next = self._next, self._next + (count or 1)
        return self._u[:, start] if count is None else self._u[:, start : self._next]

    def between(self, limits: Sequence[float], count: int | None = None) -> np.ndarray:
        """(B,) or (B, count), uniform between two limits."""
        return _between(limits, self._take(count))

    def around(self, reach: float, count: int | None = None) -> np.ndarray:
        """(B,) or (B, count), uniform in ± reach."""
        return self.between((-reach, reach), count)

    def normal(self, count: int) -> np.ndarray:
        """(B, count) standard normal: the inverse of their distribution function."""
        u = np.clip(self._take(count), 1e-9, 1 - 1e-9)
        return torch.special.ndtri(torch.from_numpy(u)).numpy()

    def chance(self, probability: float) -> np.ndarray:
        """(B,) bool, true with a probability."""
        return self._take(None) < probability

    def rows(self, probability: float) -> list[torch.Tensor]:
        """The images with `chance`: one index tensor, or nothing where there are none."""
        rows = np.flatnonzero(self.chance(probability))
        return [torch.from_numpy(rows).to(self._device, non_blocking=True)] if len(rows) else []

    def tensor(self, values: np.ndarray) -> torch.Tensor:
        """As float32 on the device."""
        return torch.from_numpy(values.astype(np.float32)).to(self._device, non_blocking=True)


@lru_cache(maxsize=8)
def _position_functions(size: int, knots: int, device: torch.device) -> torch.Tensor:
    """x, y, 1 and a smooth bump for each knot, at each pixel: (3 + knots², size²)."""
    line = (torch.arange(size) + 0.5) * 2 / size - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    bumps = torch.eye(knots**2).view(-1, 1, knots, knots)
    bumps = F.interpolate(bumps, (size, size), mode="bicubic", align_corners=True)
    plane = torch.stack([x, y, torch.ones_like(x)])
    return torch.cat([plane, bumps[:, 0]]).flatten(1).to(device)


class Augmentation(NamedTuple):
    """What training does to an image; without `crop` it is looked at as in evaluation."""

    crop: RandomCrop | None = None
    redraw: Redraw | None = None


AUGMENTATIONS = {
    "none": Augmentation(),
    "crop": Augmentation(crop=RandomCrop()),
    "sec": Augmentation(crop=RandomCrop(scale=(0.16, 1.0), resize=True)),
    "emoji": Augmentation(redraw=Redraw()),
}
"""Values of `--augment`; "sec" is what the spherical-embedding code does."""


# --- what the network gets ------------------------------------------------------------------------


@dataclass(frozen=True)
class Shrunk:
    """Every picture at a fixed zoom on white: how evaluation may look at drawings.

    Attributes:
        zoom: 0.9 shows the picture at 90 % of its size; 1 leaves it.
    """

    zoom: float

    draws = 0

    def __call__(self, images: torch.Tensor, u: np.ndarray) -> torch.Tensor:
        """(B, 3, H, W), 0..255 → the same, float32; `u` is not used."""
        ink = 255.0 - images
        scaling = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], device=ink.device) / self.zoom
        scaling = scaling.expand(len(ink), 2, 3)
        grid = F.affine_grid(scaling, list(ink.shape), align_corners=False)
        return 255.0 - F.grid_sample(ink, grid, align_corners=False)


def to_network(
    pixels: torch.Tensor,
    spec: InputSpec,
    redraw: Redraw | Shrunk | None = None,
    u: np.ndarray | None = None,
) -> torch.Tensor:
    """Pixels as the backbone wants them.

    Args:
        pixels: (B, 3, S, S) RGB, 0..255, uint8 or float32; fastest with the channels last.
        spec: colour order, scale, mean and standard deviation (net.InputSpec).
        redraw: changes the pixels first, with `u` (B, redraw.draws).

    Returns:
        (B, 3, S, S) float32, channels last.
    """
    images, size = len(pixels), pixels.shape[2]
    gain, shift = _row_of_constants(spec, size, pixels.device)
    result = _empty((images, size, size * 3), pixels.device)
    step = images
    if pixels.device.type == "cpu":
        step = max(1, _PIXELS_AT_A_TIME // size**2)
    for start in range(0, images, step):
        part, out = pixels[start : start + step], result[start : start + step]
        if redraw is not None:
            part = redraw(part, u[start : start + step])
        rows = part.permute(0, 2, 3, 1)
        if spec.color == "BGR":
            rows = rows.flip(3)
        out.copy_(rows.reshape(out.shape))
        torch.addcmul(shift, out, gain, out=out)
    return result.view(images, size, size, 3).permute(0, 3, 1, 2)


_PIXELS_AT_A_TIME = 1 << 18  # a part of a batch that a CPU's cache holds through all its steps


def _empty(shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """An uninitialised float32 tensor; a large one on the CPU lies in huge pages.

    Fresh memory comes page by page, and touching 4 kB pages costs five times as much as all the
    arithmetic on them.
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
    """Factor and summand of an image row; three constants repeated, so that vectors can be used."""
    mean, std = np.array(spec.mean), np.array(spec.std)
    gain, shift = spec.scale / 255 / std, -mean / std
    return tuple(
        torch.from_numpy(np.tile(each, size).astype(np.float32)).to(device)
        for each in (gain, shift)
    )


# --- views on the device --------------------------------------------------------------------------


class PixelStore:
    """Images of any shapes in the device's memory, and views of whole batches of them.

    Attributes:
        pixels: (P, 3) uint8, every image's pixels row by row, one image after the other.
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
            (B, 3, size, size), 0..255: uint8 where nothing had to be resized, else float32.
        """
        shapes = self.shapes[index]
        boxes = views.boxes
        if self._stack is not None and (boxes[:, 2:] == shapes).all() and not views.flip.any():
            whole = self._stack.index_select(0, self._upload(index))
            return resize(whole.permute(0, 3, 1, 2), (size, size))
        resized = resized_shape(shapes, views.resize)
        ratio = shapes / resized
        start, extent = boxes[:, :2] * ratio, boxes[:, 2:] * ratio
        low = np.floor(start).astype(np.int64)
        high = np.minimum(np.ceil(start + extent).astype(np.int64), shapes)
        if (resized != shapes).any():
            low, high = np.zeros_like(low), shapes
        window = self._windows(index, low, high)
        if (resized == shapes).all() and (boxes[:, 2:] == size).all() and not views.flip.any():
            return window
        down, across = (
            _weights(
                self._upload(start[:, axis] - low[:, axis]),
                self._upload(extent[:, axis]),
                self._upload(high[:, axis] - low[:, axis]),
                self._upload(views.flip & (axis == 1)),
                window.shape[2 + axis],
                size,
            )
            for axis in (0, 1)
        )
        return down[:, None] @ window.float() @ across.transpose(1, 2)[:, None]

    def _upload(self, array: np.ndarray) -> torch.Tensor:
        array = array.astype(np.float32) if array.dtype == np.float64 else array
        return torch.from_numpy(array).to(self.device, non_blocking=True)

    def _windows(self, index: np.ndarray, low: np.ndarray, high: np.ndarray) -> torch.Tensor:
        """Rows and columns low..high of each image: (B, 3, h, w) uint8, as large as the largest."""
        height, width = (high - low).max(axis=0).tolist()
        row, column = (
            np.minimum(low[:, a, None] + np.arange(length), high[:, a, None] - 1)
            for a, length in ((0, height), (1, width))
        )
        row = self.starts[index][:, None] + row * self.shapes[index, 1:]
        where = self._upload(row)[:, :, None] + self._upload(column)[:, None, :]
        window = self.pixels.index_select(0, where.flatten()).view(*where.shape, 3)
        return window.permute(0, 3, 1, 2)


def _weights(
    start: torch.Tensor,
    extent: torch.Tensor,
    valid: torch.Tensor,
    mirror: torch.Tensor,
    length: int,
    size: int,
) -> torch.Tensor:
    """Antialiased bilinear resizing along one axis as matrices.

    Args:
        start, extent: (B,) where each view begins and how long it is, in pixels of windows of
            `length` pixels, of which the first `valid` (B,) count. mirror: (B,) bool.

    Returns:
        (B, size, length) float32; rows sum to one.
    """
    scale = (extent / size)[:, None, None]
    place = torch.arange(size, device=start.device)[:, None] + 0.5
    place = torch.where(mirror[:, None, None], size - place, place)
    pixel = torch.arange(length, device=start.device)
    distance = (pixel + 0.5 - start[:, None, None] - place * scale).abs_()
    weights = (1 - distance / scale.clamp(min=1)).clamp_(min=0)
    weights *= pixel < valid[:, None, None]
    return weights / weights.sum(dim=2, keepdim=True)
