"""Losses of pytorch-metric-learning, patched where the library's fail or give NaN.

Goldberger et al., Neighbourhood Components Analysis, NeurIPS 2004. Movshovitz-Attias et al., No
Fuss Distance Metric Learning Using Proxies, ICCV 2017. Yu and Tao, Deep Metric Learning with Tuplet
Margin Loss, ICCV 2019. Ustinova and Lempitsky, Learning Deep Embeddings with Histogram Loss,
NeurIPS 2016. Only library.py imports this file.
"""

from __future__ import annotations

from typing import Any

import torch
from pytorch_metric_learning import losses
from pytorch_metric_learning.utils.loss_and_miner_utils import convert_to_weights
from torch import Tensor


class _InLogSpace:
    """-log Σ_{j: y_j = y_i} softmax_j(-scale·D_i) of each image i, computed with log-softmax.

    The library sums the probabilities and then takes the logarithm. If an image is far from its
    proxy and near another one, they are 0 in float32, and the library leaves the image out; if they
    are nearly 0, its gradient is NaN. Otherwise the two are the same, up to rounding.
    """

    def nca_computation(
        self,
        query: Tensor,
        reference: Tensor,
        query_labels: Tensor,
        reference_labels: Tensor,
        indices_tuple: tuple[Tensor, ...] | None,
    ) -> dict[str, dict[str, Any]]:
        """The losses of images with a positive ``reference``, in the form that reducers take."""
        apart = query is not reference
        weights = convert_to_weights(indices_tuple, query_labels, query.dtype, using_ref=apart)
        table = self.distance(query, reference)
        logits = self.softmax_scale * (table if self.distance.is_inverted else -table)
        same = query_labels[:, None] == reference_labels
        if not apart:
            itself = torch.eye(len(same), dtype=torch.bool, device=same.device)
            logits, same = logits.masked_fill(itself, -torch.inf), same & ~itself
        (found,) = same.any(dim=1).nonzero(as_tuple=True)
        if len(found) == 0:
            return self.zero_losses()
        shares = logits.log_softmax(dim=1)[found]
        own = shares.masked_fill(~same[found], -torch.inf).logsumexp(dim=1)
        of_each = {"losses": -own * weights[found], "indices": found, "reduction_type": "element"}
        return {"loss": of_each}


class NCALoss(_InLogSpace, losses.NCALoss):
    """The library's loss with log-softmax; a batch without a pair gives 0.

    The library's memory supports it, but there each image finds its own entry, at a distance of 0.
    """

    no_memory = "its softmax over a whole memory would find an image's own entry, and nothing else"


class ProxyNCALoss(_InLogSpace, losses.ProxyNCALoss):
    """The library's loss with log-softmax."""


EDGE = 1e-6
"""The smallest distance of a cosine from 1 or -1: 17 steps of float32."""


def _inside(cosines: Tensor) -> Tensor:
    """Cosines clamped away from 1 and -1, which rounding may even exceed; the gradient is 0."""
    return cosines.clamp(EDGE - 1, 1 - EDGE)


class TupletMarginLoss(losses.TupletMarginLoss):
    """The library's loss, in which rounding makes the angle of two equal embeddings NaN."""

    def _compute_loss(
        self, pos_pairs: Tensor, neg_pairs: Tensor, indices_tuple: tuple[Tensor, ...]
    ) -> dict[str, dict[str, Any]]:
        if len(pos_pairs):  # otherwise it is an empty list instead of a tensor
            pos_pairs = _inside(pos_pairs)
        return super()._compute_loss(pos_pairs, neg_pairs, indices_tuple)


class HistogramLoss(losses.HistogramLoss):
    """The library's loss, whose histogram fails for a cosine of 1, that of equal embeddings."""

    def compute_density(self, distances: Tensor) -> Tensor:
        """The histogram of the cosines, (bins + 1,)."""
        return super().compute_density(_inside(distances))
