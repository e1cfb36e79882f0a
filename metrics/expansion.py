"""Embeddings moved towards their neighbours: α query expansion and database augmentation.

With x of unit length, its K nearest images x_1 … x_K in the gallery and their cosines s_j,

    x' = (x + Σ_j max(s_j, 0)^α · x_j) / ‖…‖

is α query expansion if x is a query (Radenović, Tolias and Chum, 2019; α = 0 is the plain mean of
Chum et al., 2007), and database augmentation if x is an image of the gallery (Turcot and Lowe,
2009; Arandjelović and Zisserman, 2012). An image is never its own neighbour. Images tied with the
K-th share the remaining places, see neighbours.py.

If queries search among themselves, an augmented image may have been moved by the query itself,
namely if that is among its K nearest. Queries that are not in the gallery move nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metrics.neighbours import Near, as_images, check_count, nearest
from metrics.products import Array


def expanded(
    embeddings: Array, gallery: Array | None, k: int, alpha: float, *, own: bool = False
) -> Tensor:
    """The embeddings (N, d) moved towards their k nearest in the gallery, (N, d) float32.

    Args:
        gallery: (G, d); None if the embeddings are their own gallery.
        k: the number of neighbours, 1 or more. alpha: the power of the cosine as their weight.
        own: whether embedding i is image i of the gallery, which is then not its neighbour.

    Raises:
        ValueError: there are not that many neighbours; or as `retrieval_per_query`.
    """
    queries = as_images(embeddings)
    images = queries if gallery is None else as_images(gallery, "gallery")
    own |= gallery is None
    check_count(k, len(images) - own)
    found = torch.empty(queries.embeddings.shape, device=queries.embeddings.device)
    everything = images.exact_unit(slice(None))
    for near in nearest(queries, images, k, own):
        weights = near.cosine.clamp_min(0).pow(alpha) * near.share
        part = slice(int(near.queries[0]), int(near.queries[-1]) + 1)
        moved = queries.exact_unit(part) + _weighted_sum(near, weights, everything)
        found[part] = torch.nn.functional.normalize(moved, dim=1).float()
    return found


def _weighted_sum(near: Near, weights: Tensor, everything: Tensor) -> Tensor:
    """Σ_j weight_j · x_j for each query, (B, d) float64; everything: the gallery (G, d)."""
    row, place = (near.index >= 0).nonzero(as_tuple=True)
    where = torch.stack([row, near.index[row, place]])
    shape = (len(near.queries), len(everything))
    with torch.sparse.check_sparse_tensor_invariants(False):
        matrix = torch.sparse_coo_tensor(where, weights[row, place], shape)
        return torch.sparse.mm(matrix, everything)
