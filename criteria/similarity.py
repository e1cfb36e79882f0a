"""How an image is compared with a proxy: by the cosine, or as IDML does it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from criteria.base import check_embeddings, in_float32


def cosine_similarity(embeddings: Tensor, proxies: Tensor) -> Tensor:
    """s_ic = x̂_i·p̂_c, (B, d) and (C, d) → (B, C).

    The columns of the product are scaled instead of the proxies: with C in the thousands that is
    the smaller matrix.
    """
    return F.normalize(embeddings) @ proxies.T / proxies.norm(dim=1).clamp_min(1e-12)


@in_float32
def introspective_similarity(embeddings: Tensor, uncertainty: Tensor, proxies: Tensor) -> Tensor:
    """IDML's similarity, which takes the place of the cosine in a proxy loss.

        s'_ic = 1 - (1 - s_ic)·exp(-(‖u_i‖² + 4) / (5·‖x_i - p_c‖²))

    ``embeddings`` x (B, d) and ``uncertainty`` u (B, d) as the network gives them, ``proxies`` p
    (C, d) raw → (B, C). A proxy's own uncertainty is 0. With both heads at unit length, as
    released, ‖u‖² + 4 is the constant 5 and nothing is learnt about the uncertainty.

    Raises ValueError when the two heads disagree about the batch or the sizes do not fit.
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
