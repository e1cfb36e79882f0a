"""Augmentation beyond cropping, and how each data set is augmented.

A view (transforms.py) cuts a part out of an image. The changes here are then made on the device, to
a whole batch of views at once: `Redraw` for drawings, `Album` for photographs, `Shrunk` for the
evaluation of drawings. All random numbers come from `transforms.uniforms`, so they depend only on
(seed, epoch, image, visit).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dataset.transforms import Change, RandomCrop, between
from devices import on_device

# --- redrawing: drawn pictures in another hand ----------------------------------------------------


@dataclass(frozen=True)
class Redraw:
    """Random geometry and colour for drawings on white: the same thing, drawn by another hand.

    Pictures are never mirrored and hardly rotated, because that changes the meaning of many
    drawings. Everything is batched float32 arithmetic on the device, on ink = 1 - RGB: white is 0,
    so the area outside the picture is white, and white paper stays white. 0 turns a change off.

    Attributes:
        scale: range of the zoom. aspect: largest log stretch of one axis against the other.
        rotation: largest angle in degrees. shift: largest shift as a share of the side.
        bend: standard deviation of a smooth random displacement, as a share of half the side.
        outline: probability of keeping only the edges.
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
        """Where each pixel of the result is sampled: (B, S, S, 2) x, y in -1..1.

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
        """(B, 3, 3): mixes the channels, and changes saturation and the amount of ink."""
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


@dataclass(frozen=True)
class Album:
    """Random geometry and colour for photographs, like those of the divide-and-conquer code.

    Deviations from it: all changes come after the crop; colour is one linear map, with hue as a
    rotation about the grey axis. 0 turns a change off.

    Attributes:
        turn: probability of a rotation and shift. rotation: largest angle in degrees. shift:
            largest shift as a share of the side. The area outside the picture is mirrored.
        colour: probability of a change of light, contrast, saturation (largest relative changes)
            and hue (largest angle as a share of the circle). grey: probability of losing colour.
        drop: probability of black holes: 1 to `holes` rectangles with sides up to the share `hole`.
        blur: probability of a mean over a square of 3, 5 or 7 pixels.
    """

    turn: float = 0.0
    rotation: float = 45.0
    shift: float = 0.0625
    colour: float = 0.0
    light: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.1
    grey: float = 0.0
    drop: float = 0.0
    holes: int = 5
    hole: float = 40 / 224
    blur: float = 0.0

    @property
    def draws(self) -> int:
        """How many random numbers an image needs."""
        return 4 + 6 + 2 + 4 * self.holes + 2

    def __call__(self, pixels: torch.Tensor, u: np.ndarray) -> torch.Tensor:
        """(B, 3, S, S), 0..255, and (B, draws) → (B, 3, S, S) float32, 0..255."""
        draw = _Draws(u, pixels.device)
        images = pixels.to(torch.float32, memory_format=torch.contiguous_format, copy=True)
        self._turn(images, draw)
        images = self._recolour(images, draw)
        self._blank(images, draw)
        self._blur(images, draw)
        return images

    def _turn(self, images: torch.Tensor, draw: _Draws) -> None:
        chosen = draw.rows(self.turn)
        angle, shift = draw.around(np.deg2rad(self.rotation)), 2 * draw.around(self.shift, 2)
        rows = [np.cos(angle), -np.sin(angle), shift[:, 0], np.sin(angle), np.cos(angle)]
        affine = draw.tensor(np.stack([*rows, shift[:, 1]], axis=1).reshape(-1, 2, 3))
        for turned in chosen:
            some = images[turned]
            grid = F.affine_grid(affine[turned], list(some.shape), align_corners=False)
            images[turned] = F.grid_sample(
                some, grid, padding_mode="reflection", align_corners=False
            )

    def _recolour(self, images: torch.Tensor, draw: _Draws) -> torch.Tensor:
        changed = draw.chance(self.colour)[:, None, None]
        reach = (self.light, self.contrast, self.saturation)
        light, contrast, saturation = (1 + draw.around(each)[:, None, None] for each in reach)
        hue = _turns_about_grey(2 * np.pi * draw.around(self.hue))
        grey = draw.chance(self.grey)[:, None, None]
        matrix = light * ((saturation * np.eye(3) + (1 - saturation) * _LUMA) @ hue)
        matrix = np.where(changed, matrix, np.eye(3))
        matrix = np.where(grey, np.broadcast_to(_LUMA, (3, 3)) @ matrix, matrix)
        contrast = draw.tensor(np.where(changed, contrast, 1.0))
        flat = torch.bmm(draw.tensor(matrix), images.flatten(2))
        level = torch.einsum("c,bcp->b", draw.tensor(_LUMA), flat) / flat.shape[2]
        flat = contrast * flat + (1 - contrast) * level[:, None, None]
        return flat.view_as(images).clamp_(0, 255)

    def _blank(self, images: torch.Tensor, draw: _Draws) -> None:
        chosen = draw.rows(self.drop)
        count = np.ceil(draw.between((0, self.holes)))
        sides = draw.between((0, self.hole), 2 * self.holes).reshape(-1, 2, self.holes)
        centre = draw.between((0, 1), 2 * self.holes).reshape(-1, 2, self.holes)
        sides = np.where(np.arange(self.holes) < count[:, None, None], sides, 0)
        low, high = draw.tensor(centre - sides / 2), draw.tensor(centre + sides / 2)
        for rows in chosen:
            size = images.shape[2]
            place = (torch.arange(size, device=images.device) + 0.5) / size
            inside = (place >= low[rows][..., None]) & (place < high[rows][..., None])
            down, across = inside.float().unbind(1)  # (b, holes, S)
            images[rows] *= (torch.einsum("bhy,bhx->byx", down, across) == 0)[:, None]

    def _blur(self, images: torch.Tensor, draw: _Draws) -> None:
        blurred, reach = draw.chance(self.blur), np.ceil(draw.between((0, 3)))
        for radius in (1, 2, 3):
            rows = np.flatnonzero(blurred & (reach == radius))
            if len(rows):
                index = on_device(rows, images.device)
                padded = F.pad(images[index], (radius,) * 4, mode="reflect")
                images[index] = F.avg_pool2d(padded, 2 * radius + 1, stride=1)


_LUMA = np.array([0.299, 0.587, 0.114])


def _turns_about_grey(angles: np.ndarray) -> np.ndarray:
    """(B,) radians → (B, 3, 3) rotations of colours about the grey axis."""
    axis = np.full(3, 3**-0.5)
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) * 3**-0.5
    cosine, sine = np.cos(angles)[:, None, None], np.sin(angles)[:, None, None]
    return cosine * np.eye(3) + sine * cross + (1 - cosine) * np.outer(axis, axis)


class _Draws:
    """Hands out the columns of (B, draws) uniform numbers, each once.

    The numbers stay on the CPU, so that the images with a rare change are known without waiting for
    the GPU.
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
        return between(limits, self._take(count))

    def around(self, reach: float, count: int | None = None) -> np.ndarray:
        """(B,) or (B, count), uniform in ± reach."""
        return self.between((-reach, reach), count)

    def normal(self, count: int) -> np.ndarray:
        """(B, count) standard normal, by the inverse of the distribution function."""
        u = np.clip(self._take(count), 1e-9, 1 - 1e-9)
        return torch.special.ndtri(torch.from_numpy(u)).numpy()

    def chance(self, probability: float) -> np.ndarray:
        """(B,) bool, true with this probability."""
        return self._take(None) < probability

    def rows(self, probability: float) -> list[torch.Tensor]:
        """The images chosen with this probability: one index tensor, or [] if there are none."""
        rows = np.flatnonzero(self.chance(probability))
        return [on_device(rows, self._device)] if len(rows) else []

    def tensor(self, values: np.ndarray) -> torch.Tensor:
        """As float32 on the device."""
        return on_device(values.astype(np.float32), self._device)


@lru_cache(maxsize=8)
def _position_functions(size: int, knots: int, device: torch.device) -> torch.Tensor:
    """x, y, 1 and a smooth bump for each knot, at each pixel: (3 + knots², size²)."""
    line = (torch.arange(size) + 0.5) * 2 / size - 1
    y, x = torch.meshgrid(line, line, indexing="ij")
    bumps = torch.eye(knots**2).view(-1, 1, knots, knots)
    bumps = F.interpolate(bumps, (size, size), mode="bicubic", align_corners=True)
    plane = torch.stack([x, y, torch.ones_like(x)])
    return torch.cat([plane, bumps[:, 0]]).flatten(1).to(device)


@dataclass(frozen=True)
class Shrunk:
    """Pictures at a fixed zoom on white, for the evaluation of drawings.

    Attributes:
        zoom: 0.9 shows a picture at 90 % of its size.
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


class Augmentation(NamedTuple):
    """The augmentation of training images; without `crop` they are cut out as in evaluation."""

    crop: RandomCrop | None = None
    change: Change | None = None


AUGMENTATIONS = {
    "none": Augmentation(),
    "crop": Augmentation(crop=RandomCrop()),
    "sec": Augmentation(crop=RandomCrop(scale=(0.16, 1.0), resize=True)),
    "emoji": Augmentation(change=Redraw()),
    "Geom": Augmentation(RandomCrop(), Album(turn=0.5, drop=0.5, blur=0.5)),
    "GeomColor": Augmentation(
        RandomCrop(),
        Album(
            **{"turn": 0.5, "drop": 0.5, "blur": 0.5, "colour": 0.5},
            **{"light": 0.2, "contrast": 0.2, "saturation": 0.0, "hue": 0.0},
        ),
    ),
    "ColorHeavy": Augmentation(RandomCrop(), Album(colour=0.8, grey=0.2)),
}
"""The values of `--augment`; "sec" is that of the spherical-embedding code, the last three those of
divide and conquer."""
