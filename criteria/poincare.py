"""The Poincaré ball: mapping vectors into it, and distances between its points.

Its radius is 1/√c, with −c the curvature. Its geodesics are arcs of circles that meet the edge at
right angles, and distances grow without bound towards the edge.
"""

from __future__ import annotations

import torch
from torch import Tensor

EDGE = 1e-3  # points closer to the edge than this share of the radius are pulled back


def to_ball(vectors: Tensor, curvature: float, clip: float = 0.0) -> Tensor:
    """Vectors (..., d) as points of the ball, by the exponential map at its centre.

        x ← x·min(1, r/‖x‖),  exp₀(x) = tanh(√c‖x‖)·x / (√c‖x‖)

    Clipping at ``clip`` r keeps points away from the edge, where gradients vanish (Guo et al., CVPR
    2022); 0 clips nothing. The zero vector is mapped to the centre.
    """
    root = curvature**0.5
    length = vectors.norm(dim=-1, keepdim=True).clamp_min(1e-5)
    clipped = length.clamp_max(clip) if clip else length
    radius = torch.tanh(root * clipped).clamp_max(1 - EDGE) / root
    return vectors / length * radius


def ball_distances(points: Tensor, others: Tensor, curvature: float) -> Tensor:
    """Distances (N, M) between points (N, d) and (M, d) of the ball.

        d(x, y) = 2/√c · arsinh √( c‖x - y‖² / ((1 - c‖x‖²)(1 - c‖y‖²)) )

    This equals the usual 2/√c · artanh(√c‖-x ⊕ y‖), but avoids artanh's pole at the edge. Equal
    points have a distance of nearly 0 and no gradient.
    """
    inner = 1 - curvature * points.square().sum(dim=1, keepdim=True)
    outer = 1 - curvature * others.square().sum(dim=1)
    squared = (
        points.square().sum(dim=1, keepdim=True)
        + others.square().sum(dim=1)
        - 2 * points @ others.T
    )
    ratio = (curvature * squared / (inner * outer)).clamp_min(1e-12)
    return 2 / curvature**0.5 * ratio.sqrt().asinh()


def riemannian(points: Tensor, curvature: float) -> Tensor:
    """The points unchanged, but with the Riemannian gradient: (1 - c‖x‖²)²/4 times the Euclidean.

    It is smaller near the edge, where a Euclidean step of the same length covers more distance.
    """
    if points.requires_grad:
        inner = 1 - curvature * points.detach().square().sum(dim=-1, keepdim=True)
        scale = inner.square() / 4
        points.register_hook(lambda gradient: gradient * scale)
    return points
