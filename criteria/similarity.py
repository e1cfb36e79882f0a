"""The similarity of an image and a proxy: the cosine, or IDML's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from criteria.base import check_embeddings, in_float32, unit_rows, written_out


class _Cosines(torch.autograd.Function):
    """x̂_i·p_c/‖p_c‖ of unit rows x̂ (B, d) and raw proxies p (C, d), (B, C).

    The columns of the product are scaled instead of the proxies, which with thousands of classes
    are the larger matrix. The gradient is written out, which gives the same bits as autograd with
    half the operators and half the memory. The proxies are passed twice for the same reason as the
    rows of ``unit_rows``.
    """

    @staticmethod
    def forward(ctx: Any, measured: Tensor, unit: Tensor, proxies: Tensor) -> Tensor:
        lengths = measured.norm(dim=1).clamp_min(1e-12)
        cosines = (unit @ proxies.T).div_(lengths)
        ctx.save_for_backward(unit, proxies, lengths, cosines)
        return cosines

    @staticmethod
    @written_out
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        unit, proxies, lengths, cosines = ctx.saved_tensors
        scaled = grad / lengths
        of_unit = scaled @ proxies if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[2]:
            return None, of_unit, None
        along = (cosines / lengths).mul_(grad).sum(dim=0).neg_()
        of_lengths = (proxies / lengths[:, None]).mul_(along[:, None])
        return of_lengths, of_unit, scaled.T @ unit


def cosine_similarity(embeddings: Tensor, proxies: Tensor) -> Tensor:
    """s_ic = x̂_i·p̂_c, (B, d) and (C, d) → (B, C)."""
    return _Cosines.apply(proxies, unit_rows(embeddings), proxies)


@in_float32
def introspective_similarity(embeddings: Tensor, uncertainty: Tensor, proxies: Tensor) -> Tensor:
    """IDML's similarity, which replaces the cosine in a proxy loss.

        s'_ic = 1 - (1 - s_ic)·exp(-(‖u_i‖² + 4) / (5·‖x_i - p_c‖²))

    ``embeddings`` x (B, d), ``uncertainty`` u (B, d) and raw ``proxies`` p (C, d) → (B, C). Proxies
    have no uncertainty. With both heads at unit length, as released, ‖u‖² + 4 is the constant 5,
    and no uncertainty is learned.

    Raises ValueError for different numbers of embeddings and uncertainties, or sizes that differ.
    """
    check_embeddings(embeddings, proxies.shape[1])
    if uncertainty.shape[:1] != embeddings.shape[:1] or uncertainty.ndim != 2:
        raise ValueError(
            f"The uncertainty has the shape {tuple(uncertainty.shape)} but there are "
            f"{len(embeddings)} embeddings: give one uncertainty vector for each embedding."
        )
    product = embeddings @ proxies.T
    length, proxy_length = embeddings.norm(dim=1, keepdim=True), proxies.norm(dim=1)
    cosine = product / (length * proxy_length).clamp_min(1e-12)
    distance = (length.square() + proxy_length.square() - 2 * product).clamp_min(1e-12)
    spread = uncertainty.square().sum(dim=1, keepdim=True) + 4
    return 1 - (1 - cosine) * torch.exp(-spread / (5 * distance))


def compare(embeddings: Tensor, proxies: Tensor, uncertainty: Tensor | None = None) -> Tensor:
    """(B, C): the cosine s_ic, or IDML's s'_ic when there is an ``uncertainty``."""
    if uncertainty is None:
        return cosine_similarity(embeddings, proxies)
    return introspective_similarity(embeddings, uncertainty, proxies)
