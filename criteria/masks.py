"""The regulariser of divide and conquer's masks.

Sanakoyeu et al., Divide and Conquer the Embedding Space, CVPR 2019; TPAMI 2021.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from criteria import checks
from criteria.base import Criterion, Embeddings, in_float32
from criteria.objective import Term


@in_float32
def mask_orthogonality(masks: Tensor) -> Tensor:
    """Mean cosine between the rectified masks of different learners, (K, d) → 0-d.

        R = 1/(K(K-1)) Σ_{i≠j} cos(relu m_i, relu m_j)

    0 for a single mask. A mask without a positive entry has cosine 0 with all others. Raises
    ValueError if ``masks`` is not a matrix.
    """
    if masks.ndim != 2:
        raise ValueError(f"Masks must have the shape (learners, size), not {tuple(masks.shape)}.")
    unit = F.normalize(F.relu(masks), eps=1e-8)
    gram = unit @ unit.T
    return (gram.sum() - gram.trace()) / max(1, len(masks) * (len(masks) - 1))


class MaskOrthogonality(Criterion):
    """``mask_orthogonality`` as a term of an Objective. ``terms``: masks."""

    def forward(self, masks: Tensor) -> Tensor:
        """The regulariser of masks (K, d), 0-d."""
        loss = mask_orthogonality(masks)
        self._report(masks=loss)
        return loss


def masks(name: str, metric: Term, l2_norm: bool, *, weight: float = 1.0) -> dict[str, Term]:
    """Adds the masks' mean cosine to a loss, if it is called with ``masks=``."""
    checks.not_negative(weight=weight)
    return {"masks": Term(MaskOrthogonality(), _masks_of_call, weight=weight)}


def _masks_of_call(
    outputs: Embeddings, labels: Tensor, context: Mapping[str, Any]
) -> tuple[Any, ...] | None:
    return None if context.get("masks") is None else (context["masks"],)
