"""k-reciprocal re-ranking (Zhong, Zheng, Cao and Li, CVPR 2017).

Two images are near if they are near to the same images. Of queries and gallery together,

    N(p, k)    p and its k nearest images
    R(p, k)    the g in N(p, k) with p in N(g, k)
    R*(p)      R(p, k1), and R(q, k1/2) of each q in R(p, k1)
               with |R(p, k1) ∩ R(q, k1/2)| >= 2/3 |R(q, k1/2)|
    V(p, g)    exp(-d(p, g)) for g in R*(p), else 0; divided by its sum over g
    V'(p)      the mean of V(i) over i in N(p, k2 - 1)
    J(p, g)    1 - Σ_j min(V'(p, j), V'(g, j)) / Σ_j max(V'(p, j), V'(g, j))

and images are ranked by (1 - λ)·J + λ·d with d = 1 - cos. All images that are exactly as close as
the k-th nearest are in N(p, k), so that the order of the images does not matter.

Deviations: d is 1 - cosine, where the released code divides squared distances by the largest of a
row; a q at exactly 2/3 counts, as in the paper, where the released code leaves it out. The sum of V
is divided out as in the released code; k1/2 is rounded half to even.

The queries are part of the graph: results of a query depend on the other queries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metrics.images import Images, pairwise_cosines
from metrics.neighbours import as_images, check_count, nearest
from metrics.products import Array
from metrics.ragged import spread

MOST_LINKS = 2**26  # of the graph: it has more only if most embeddings are the same
AT_ONCE = 2**12  # images or pairs whose neighbours are processed at once
HELD = 2**20  # entries that each thread combines at once


class Links:
    """A relation between N images: P pairs (p, g), stored as the sorted numbers p·N + g.

    Attributes:
        keys: (P,) int64, increasing. count: N.
    """

    def __init__(self, keys: Tensor, count: int) -> None:
        self.keys, self.count = keys, count
        self.offsets = torch.searchsorted(keys, torch.arange(count + 1, device=keys.device) * count)

    @property
    def pairs(self) -> tuple[Tensor, Tensor]:
        """p and g of all pairs, (P,) each."""
        return self.keys // self.count, self.keys % self.count

    def has(self, keys: Tensor) -> Tensor:
        """Whether each of the given pairs is in the relation; a mask."""
        if not len(self.keys):
            return torch.zeros_like(keys, dtype=torch.bool)
        place = torch.searchsorted(self.keys, keys).clamp_max(len(self.keys) - 1)
        return self.keys[place] == keys

    def mutual(self) -> Links:
        """The pairs whose reverse is in the relation too."""
        p, g = self.pairs
        return Links(self.keys[self.has(g * self.count + p)], self.count)

    def of(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The partners of the images (M,), concatenated: positions in `images`, and partners."""
        run, place = spread(*_runs(self.offsets, images))
        return run, self.keys[place] % self.count


class Reranking:
    """The re-ranking distance, as a `rows.Score` that replaces the cosine.

    Args:
        embeddings: (Q, d) queries. gallery: (G, d); None if they search among themselves.
        k1, k2, balance: see the file's header; balance is λ.

    Raises:
        ValueError: k1 or k2 is below 1 or above the number of images that one can find, or most of
            the embeddings are exactly the same.
    """

    @torch.no_grad()
    def __init__(
        self,
        embeddings: Array,
        gallery: Array | None,
        k1: int,
        k2: int,
        balance: float,
    ) -> None:
        x = torch.as_tensor(embeddings)
        parts = [x] if gallery is None else [x, torch.as_tensor(gallery)]
        images = as_images(torch.cat(parts))
        check_count(k1, len(images) - 1)
        check_count(k2, k1)
        self.first = 0 if gallery is None else len(x)  # of the gallery among all images
        self.balance = balance
        near, before = _graph(images, k1)
        close = Links(near.keys[before < k2 - 1], len(images))
        half = Links(near.keys[before < round(k1 / 2)], len(images)).mutual()
        wide = _widened(near.mutual(), half)
        self.weights = _averaged(_vectors(images, wide), close)
        self.unit = images.exact_unit(slice(None))
        self.columns = _Columns(self.weights, self.first)

    @torch.no_grad()
    def __call__(self, queries: Tensor) -> Tensor:
        """Queries (B,) → minus their distances to the gallery images, (B, G) float64."""
        rows = self.weights
        shared = self.columns.shared(rows, queries)
        cosine = self.unit[queries] @ self.unit[self.first :].T
        jaccard = 1 - shared / (2 - shared)
        return -((1 - self.balance) * jaccard + self.balance * (1 - cosine))


class _Sparse:
    """A sparse matrix (N, N), row by row, columns increasing within a row."""

    def __init__(self, keys: Tensor, values: Tensor, count: int) -> None:
        self.links = Links(keys, count)
        self.values = values


def _graph(images: Images, k: int) -> tuple[Links, Tensor]:
    """N(p, k) of all images, and for each pair the number of closer images, -1 for p itself."""
    keys, before, total = [], [], 0
    for near in nearest(images, images, k, own=True):
        row, place = (near.index >= 0).nonzero(as_tuple=True)
        keys.append(near.queries[row] * len(images) + near.index[row, place])
        before.append(near.before[row, place])
        total += len(row)
        if total > MOST_LINKS:
            raise ValueError(
                "so many embeddings are exactly the same that re-ranking by their neighbours "
                "says nothing; look at R@1 without it."
            )
    own = torch.arange(len(images), device=images.order.device)
    keys.append(own * len(images) + own)
    before.append(torch.full_like(own, -1))
    key, order = torch.cat(keys).sort()
    return Links(key, len(images)), torch.cat(before)[order]


def _widened(mutual: Links, half: Links) -> Links:
    """R* of all images, from R(·, k1) and R(·, k1/2)."""
    count, found = mutual.count, [mutual.keys]
    p, q = mutual.pairs
    for pairs in torch.arange(len(p), device=p.device).split(AT_ONCE):
        pair, partner = half.of(q[pairs])
        keys = p[pairs][pair] * count + partner
        shared = pair.new_zeros(len(pairs)).index_add_(0, pair, mutual.has(keys).long())
        sizes = pair.bincount(minlength=len(pairs))
        found.append(keys[(3 * shared >= 2 * sizes)[pair]])
    return Links(torch.cat(found).unique(), count)


def _vectors(images: Images, wide: Links) -> _Sparse:
    """V of all images."""
    p, g = wide.pairs
    values = (pairwise_cosines(images, p, images, g) - 1).exp()
    sums = values.new_zeros(wide.count).index_add_(0, p, values)
    return _Sparse(wide.keys, values / sums[p], wide.count)


def _averaged(vectors: _Sparse, close: Links) -> _Sparse:
    """V' of all images: the mean of V over the closest ones."""
    count = close.count
    sizes = close.offsets.diff().double()
    keys, values = [], []
    for rows in torch.arange(count, device=sizes.device).split(AT_ONCE // 4):
        run, partner = close.of(rows)
        entry, place = spread(*_runs(vectors.links.offsets, partner))
        key = rows[run[entry]] * count + vectors.links.keys[place] % count
        unique, inverse = key.unique(return_inverse=True)
        sums = vectors.values.new_zeros(len(unique))
        sums.index_add_(0, inverse, vectors.values[place])
        keys.append(unique)
        values.append(sums / sizes[unique // count])
    return _Sparse(torch.cat(keys), torch.cat(values), count)


def _runs(offsets: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Where the entries of the rows begin, and their numbers."""
    begin = offsets[rows]
    return begin, offsets[rows + 1] - begin


class _Columns:
    """V' of the gallery images, column by column."""

    def __init__(self, weights: _Sparse, first: int) -> None:
        p, column = weights.links.pairs
        chosen = p >= first
        order = (column[chosen] * weights.links.count + p[chosen]).argsort()
        self.image = (p[chosen] - first)[order]
        self.values = weights.values[chosen][order]
        self.count = weights.links.count - first
        sizes = column[chosen].bincount(minlength=weights.links.count)
        self.offsets = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))

    def shared(self, rows: _Sparse, queries: Tensor) -> Tensor:
        """Σ_j min(V'(p, j), V'(g, j)) of queries p and all gallery images g, (B, G)."""
        found = self.values.new_zeros(len(queries) * self.count)
        run, place = spread(*_runs(rows.links.offsets, queries))
        column = rows.links.keys[place] % rows.links.count
        begin, sizes = _runs(self.offsets, column)
        part = sizes.cumsum(0) // HELD
        for number in range(int(part[-1]) + 1 if len(part) else 0):
            some = part == number
            entry, at = spread(begin[some], sizes[some])
            least = rows.values[place[some]][entry].minimum(self.values[at])
            found.index_add_(0, run[some][entry] * self.count + self.image[at], least)
        return found.view(len(queries), self.count)
