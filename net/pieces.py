"""A batch embedded in pieces: the loss of the whole batch with the memory of one piece.

The features are first computed piece by piece, without a graph. Heads and loss then get the whole
batch, which gives the gradient of the features. Then each piece is computed again, with a graph,
and its part of that gradient is propagated back. (Gao et al., Scaling Deep Contrastive Learning
Batch Size under Memory Limited Setup, 2021.) The gradients are those of the whole batch, as long as
images do not interact inside the backbone: a BatchNorm in training mode normalises each piece
separately.

The second computation of a piece draws the same random numbers (stochastic depth) and does not
update running statistics again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from criteria.base import only_once

Compute = Callable[[Tensor], Tensor]


def in_pieces(
    compute: Compute,
    images: Tensor,
    count: int,
    parameters: Sequence[Tensor],
    buffers: Sequence[Tensor],
) -> Tensor:
    """`compute(images)` of images (n, 3, H, W), in `count` pieces of nearly equal sizes.

    Args:
        compute: images (n, 3, H, W) → features (n, F), with a graph where gradients are on.
        count: the number of pieces, the same in all processes; a piece may be empty.
        parameters: those it may train. buffers: those it changes (running statistics).
    """
    pieces = images.tensor_split(count)
    if not any(parameter.requires_grad for parameter in parameters):
        return torch.cat([compute(piece) for piece in pieces])
    anchor = torch.zeros((), device=images.device, requires_grad=True)  # so that backward is called
    return _Pieces.apply(anchor, compute, buffers, *pieces)


class _Pieces(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, compute: Compute, buffers: Sequence[Tensor], *pieces: Tensor
    ) -> Tensor:
        device = pieces[0].device
        ctx.compute, ctx.buffers, ctx.pieces, ctx.states = compute, buffers, pieces, []
        enabled = torch.is_autocast_enabled(device.type)
        ctx.autocast = device.type, torch.get_autocast_dtype(device.type), enabled
        made = []
        for piece in pieces:
            ctx.states.append(_random_state(device))
            made.append(compute(piece))
        return torch.cat(made)

    @staticmethod
    @only_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, ...]:
        device, statistics = gradient.device, [buffer.clone() for buffer in ctx.buffers]
        after = _random_state(device)
        parts = gradient.split([len(piece) for piece in ctx.pieces])
        for piece, state, part in zip(ctx.pieces, ctx.states, parts, strict=True):
            _set_random_state(state, device)
            with torch.enable_grad(), torch.autocast(*ctx.autocast):
                features = ctx.compute(piece)
            torch.autograd.backward(features, part.to(features.dtype))
        _set_random_state(after, device)
        for buffer, value in zip(ctx.buffers, statistics, strict=True):
            buffer.copy_(value)
        return (None,) * (3 + len(ctx.pieces))


def _random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """The random state of the CPU, and of the device if it is a GPU."""
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_gpu


def _set_random_state(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
