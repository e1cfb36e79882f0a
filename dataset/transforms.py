"""What is done to pixels between the file and the network.

Two steps, wherever they run. A *view* says which part of an image is looked at: it is cut out of
uint8 pixels, resized and perhaps mirrored. Then the stack of equally large views is finished on the
device in float32: redrawn (`Redraw`), put into the backbone's colour order and scale, normalised.

Resizing is bilinear with antialiasing, on x86 bit for bit what Pillow and torchvision compute.
Every random number is a hash of (seed, epoch, image, visit): the number of workers, the order of
the batches and restarts do not change it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

if TYPE_CHECKING:
    from net import InputSpec

# --- random numbers that depend on nothing but their names ----------------------------------------

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
VIEW_STREAM, WARP_STREAM, REPLACEMENT_STREAM = range(3)


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
        shapes: (B, 2) heights and widths of the images in pixels.
    """
    shapes = resized_shape(shapes, resize)
    corner = np.rint((shapes - size) / 2).astype(np.int64)
    boxes = np.concatenate([corner, np.full_like(corner, size)], axis=1)
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
    pixels = torch.from_numpy(image).permute(2, 0, 1)[None]
    if views.resize:
        shape = resized_shape(np.array([image.shape[:2]]), views.resize)[0]
        pixels = resize(pixels, tuple(shape.tolist()))
    top, left, height, width = views.boxes[position].tolist()
    pixels = resize(pixels[:, :, top : top + height, left : left + width], (size, size))
    if views.flip[position]:
        pixels = pixels.flip(3)
    return pixels[0].permute(1, 2, 0)


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
    All of it is batched float32 arithmetic on the device.

    Attributes:
        scale: range of the zoom. aspect: largest log stretch of one axis against the other.
        rotation: largest angle in degrees. shift: largest shift as a share of the side.
        bend: standard deviation of a smooth random displacement, as a share of half the side.
        mixing: standard deviation of the entries of a random 3×3 matrix on the colours' ink.
        grey: probability of losing all colour; otherwise saturation changes by up to 60 %.
        gamma, ink: largest log gamma, and largest change of the amount of ink.
        negative, outline: probabilities of inverted colours, and of keeping the edges alone.
        erase: probability of one rectangle of a random colour, up to 40 % of the side.
    """

    scale: tuple[float, float] = (0.75, 1.2)
    aspect: float = 0.1
    rotation: float = 10.0
    shift: float = 0.08
    bend: float = 0.04
    mixing: float = 0.3
    grey: float = 0.3
    gamma: float = 0.3
    ink: float = 0.2
    negative: float = 0.05
    outline: float = 0.1
    erase: float = 0.3

    knots = 4
    draws = 63
    chunk = 32  # images at a time on a CPU: what is worked on stays in its cache

    def __call__(self, images: torch.Tensor, u: np.ndarray) -> torch.Tensor:
        """Redraws a batch.

        Args:
            images: (B, 3, H, W) float32 in 0..1, drawn on white.
            u: (B, draws) uniform numbers.

        Returns:
            (B, 3, H, W) float32 in 0..1.
        """
        uniform = torch.from_numpy(u).to(images.device, torch.float32)
        chunk = self.chunk if images.device.type == "cpu" else len(images)
        parts = zip(images.split(chunk), uniform.split(chunk), strict=True)
        return torch.cat([self._redrawn(part, _Draws(numbers)) for part, numbers in parts])

    def _redrawn(self, images: torch.Tensor, draw: _Draws) -> torch.Tensor:
        ink = self._warped(1 - images, draw)  # white is 0: what lies outside the picture is white
        ink = self._recoloured(self._outlined(ink, draw), draw)
        return 1 - self._erased(ink, draw)

    def _warped(self, ink: torch.Tensor, draw: _Draws) -> torch.Tensor:
        zoom = draw.between(*np.log(self.scale)).exp()
        stretch = draw.between(-self.aspect, self.aspect).exp()
        angle = torch.deg2rad(draw.between(-self.rotation, self.rotation))
        shift = draw.between(-2 * self.shift, 2 * self.shift, 2)
        across, down = 1 / (zoom * stretch), stretch / zoom
        rows = [
            torch.stack([angle.cos() * across, -angle.sin() * across, shift[:, 0]], dim=1),
            torch.stack([angle.sin() * down, angle.cos() * down, shift[:, 1]], dim=1),
        ]
        grid = F.affine_grid(torch.stack(rows, dim=1), list(ink.shape), align_corners=False)
        bend = self.bend * draw.normal(2 * self.knots**2).view(-1, 2, self.knots, self.knots)
        rows, columns = (_bicubic(self.knots, side).to(ink.device) for side in ink.shape[2:])
        bend = rows @ bend @ columns.T
        return F.grid_sample(ink, grid + bend.permute(0, 2, 3, 1), align_corners=False)

    def _outlined(self, ink: torch.Tensor, draw: _Draws) -> torch.Tensor:
        chosen = draw.chance(self.outline).nonzero().flatten()
        if len(chosen) == 0:
            return ink
        grey = F.pad(ink[chosen].mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        across = grey[:, :, 1:-1, 2:] - grey[:, :, 1:-1, :-2]
        down = grey[:, :, 2:, 1:-1] - grey[:, :, :-2, 1:-1]
        edges = (2 * torch.hypot(across, down)).clamp(0, 1)
        return ink.index_copy(0, chosen, edges.expand(-1, 3, -1, -1))

    def _recoloured(self, ink: torch.Tensor, draw: _Draws) -> torch.Tensor:
        # Rows of the saturation matrix sum to 1, so it acts on ink as it does on colour.
        matrix = torch.bmm(self._saturation(draw), self._mixing(draw))
        ink = torch.bmm(matrix, ink.flatten(2)).view_as(ink)
        gamma = draw.between(-self.gamma, self.gamma).exp()[:, None, None, None]
        amount = draw.between(1 - self.ink, 1 + self.ink)[:, None, None, None]
        negative = draw.chance(self.negative).float()[:, None, None, None]
        colour = ink.neg_().add_(1).clamp_(1e-3, 1).pow_(gamma)
        ink = colour.neg_().add_(1).mul_(amount).clamp_(0, 1)
        return ink.mul_(1 - 2 * negative).add_(negative)

    def _mixing(self, draw: _Draws) -> torch.Tensor:
        """(B, 3, 3) around the identity, rows scaled to a sum of 1 where that is above a half."""
        noise = self.mixing * draw.normal(9).view(-1, 3, 3)
        matrix = torch.eye(3, device=noise.device) + noise
        return matrix / matrix.sum(2, keepdim=True).clamp_min(0.5)

    def _saturation(self, draw: _Draws) -> torch.Tensor:
        """(B, 3, 3): between a random grey of the colour and the colour itself, or beyond it."""
        weights = 0.2 + draw.between(0, 1, 3)
        weights = weights / weights.sum(1, keepdim=True)
        saturation = draw.between(0.4, 1.4).masked_fill(draw.chance(self.grey), 0.0)[:, None, None]
        identity = torch.eye(3, device=weights.device)
        return saturation * identity + (1 - saturation) * weights[:, None, :]

    def _erased(self, ink: torch.Tensor, draw: _Draws) -> torch.Tensor:
        height, width = ink.shape[2:]
        size, centre = draw.between(0.1, 0.4, 2), draw.between(0, 1, 2)
        paint = draw.between(0, 1, 3)[:, :, None, None]
        y = torch.linspace(0, 1, height, device=ink.device)
        x = torch.linspace(0, 1, width, device=ink.device)
        rows = (y - centre[:, :1]).abs() < size[:, :1] / 2
        columns = (x - centre[:, 1:]).abs() < size[:, 1:] / 2
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        inside &= draw.chance(self.erase)[:, None, None, None]
        return torch.where(inside, paint, ink)


def _bicubic(knots: int, side: int) -> torch.Tensor:
    """(side, knots): the matrix that interpolates `knots` values to `side` of them."""
    impulses = torch.eye(knots).view(1, knots, knots, 1)
    waves = F.interpolate(impulses, (side, 1), mode="bicubic", align_corners=True)
    return waves.view(knots, side).T


class _Draws:
    """Hands out the columns of (B, draws) uniform numbers, each once."""

    def __init__(self, u: torch.Tensor) -> None:
        self._u = u
        self._next = 0

    def _take(self, count: int) -> torch.Tensor:
        self._next += count
        return self._u[:, self._next - count : self._next]

    def between(self, low: float, high: float, count: int | None = None) -> torch.Tensor:
        """(B,) numbers between two limits, or (B, count) of them."""
        values = low + (high - low) * self._take(count or 1)
        return values if count else values[:, 0]

    def chance(self, probability: float) -> torch.Tensor:
        """(B,) bool, true with a probability."""
        return self._take(1)[:, 0] < probability

    def normal(self, count: int) -> torch.Tensor:
        """(B, count) standard normal numbers: the inverse of their distribution function."""
        return torch.special.ndtri(self._take(count).clamp(1e-6, 1 - 1e-6))


# --- augmentations by name, and the last step -----------------------------------------------------


class Augmentation(NamedTuple):
    """A random view and a random redrawing; None leaves a step out."""

    crop: RandomCrop | None = None
    redraw: Redraw | None = None


AUGMENTATIONS = {
    "crop": Augmentation(crop=RandomCrop()),
    "sec": Augmentation(crop=RandomCrop(scale=(0.16, 1.0), resize=True)),
    "emoji": Augmentation(redraw=Redraw()),
    "none": Augmentation(),
}
"""Values of `--augment`."""


def normalised(images: torch.Tensor, spec: InputSpec) -> torch.Tensor:
    """(B, 3, H, W) float32 RGB in 0..1 → what the backbone wants, channels last in memory."""
    if spec.color == "BGR":
        images = images.flip(1)
    mean = torch.tensor(spec.mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(spec.std, device=images.device).view(1, 3, 1, 1)
    images = (images * spec.scale - mean) / std
    return images.contiguous(memory_format=torch.channels_last)
