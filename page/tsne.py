"""t-SNE as a process of its own: reads points (n, d) and writes their places (n, 2), as .npy.

    python -m page.tsne SEED < points.npy > places.npy

scikit-learn's compiled code may crash its process: it shall be this one, not that of a training
that has just ended. Neither torch nor the rest of the project is imported, so it starts quickly.
"""

from __future__ import annotations

import io
import sys

import numpy as np
from sklearn.manifold import TSNE


def places(points: np.ndarray, seed: int) -> np.ndarray:
    """The places (n, 2) float32 of points (n, d) by t-SNE."""
    perplexity = min(30.0, (len(points) - 1) / 3)
    tsne = TSNE(init="pca", perplexity=perplexity, random_state=seed, max_iter=500, n_jobs=2)
    return tsne.fit_transform(points)


if __name__ == "__main__":
    given = np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False)
    np.save(sys.stdout.buffer, places(given, int(sys.argv[1])), allow_pickle=False)
