"""t-SNE in a process of its own: points (n, d) come in as .npy, their places (n, 2) go out as .npy.

    python -m page.tsne SEED < points.npy > places.npy

scikit-learn computes it in compiled code, which can die and then takes its process with it: here
that is this one, and not a run that has just ended well. Neither torch nor the rest of the project
is loaded, so that it starts quickly.
"""

from __future__ import annotations

import io
import sys

import numpy as np
from sklearn.manifold import TSNE


def places(points: np.ndarray, seed: int) -> np.ndarray:
    """Where t-SNE puts points (n, d): (n, 2) float32."""
    perplexity = min(30.0, (len(points) - 1) / 3)
    tsne = TSNE(init="pca", perplexity=perplexity, random_state=seed, max_iter=500, n_jobs=2)
    return tsne.fit_transform(points)


if __name__ == "__main__":
    given = np.load(io.BytesIO(sys.stdin.buffer.read()), allow_pickle=False)
    np.save(sys.stdout.buffer, places(given, int(sys.argv[1])), allow_pickle=False)
