"""PCA-whitening of embeddings (Jégou and Chum, ECCV 2012).

With the mean μ and covariance C = U Λ Uᵀ of training embeddings of unit length, x of unit length
becomes

    x' = Λ_D^(-1/2) · U_Dᵀ · (x - μ)

As for any embedding, only its direction matters. D is the number of largest eigenvalues that are
kept. Directions in which the training embeddings do not vary cannot be whitened and are left out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from metrics.neighbours import as_images
from metrics.products import Array

LEAST = 1e-8  # a variance below this share of the largest is a rounding error


class Whitening(NamedTuple):
    """A whitening of embeddings with d entries.

    Attributes:
        mean: (d,) float64. axes: (R, d) float64, the eigenvectors by decreasing eigenvalue.
        variances: (R,) float64, the R <= d eigenvalues that are not 0.
    """

    mean: Tensor
    axes: Tensor
    variances: Tensor

    def projection(self, size: int) -> Tensor:
        """Λ_D^(-1/2)·U_Dᵀ, (size, d) float32.

        Raises:
            ValueError: there are fewer axes.
        """
        if not 1 <= size <= len(self.axes):
            raise ValueError(
                f"whitening to {size} numbers: the training images vary in {len(self.axes)} "
                f"directions; choose 1 to {len(self.axes)}"
            )
        return (self.axes[:size] / self.variances[:size, None].sqrt()).float()


def fit(embeddings: Array) -> Whitening:
    """Fits the whitening to embeddings (N, d), which are normalised first.

    Raises:
        ValueError: they are not finite, or all the same.
    """
    x = as_images(embeddings, "training embeddings").exact_unit(slice(None))
    mean = x.mean(dim=0)
    x -= mean
    variances, axes = torch.linalg.eigh(x.T @ x / len(x))
    kept = variances > LEAST * variances[-1].clamp_min(LEAST)
    if not kept.any():
        raise ValueError("all training embeddings are the same, so nothing can be whitened")
    return Whitening(mean.cpu(), axes.T[kept].flip(0).cpu(), variances[kept].flip(0).cpu())
