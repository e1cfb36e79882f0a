"""Metrics: tensors in, numbers out. Nothing here knows the rest of the project.

`retrieval` has R@K, MAP@R and the like, `clustering` k-means, `agreement` NMI and F1, and
`verification` pairs of images. `comparison` says how sure a number is: intervals, paired tests,
seeds. `correlation` relates two quantities over classes, and `ties` defines retrieval metrics for
images that are exactly as close.
"""

from metrics.agreement import by_construction, clustering_metrics, nmi_f1
from metrics.clustering import Clustering, kmeans
from metrics.products import Array, as_numbers, full_float32, inner_products
from metrics.retrieval import (
    BLOCK_SIZE,
    MANY_TIED,
    MAX_BLOCK_SIZE,
    about_ties,
    check_ks,
    one_per_class_gallery,
    recall_at,
    retrieval_metrics,
    retrieval_per_query,
    summarise,
)
from metrics.sharing import ALONE, Progress, Share

__all__ = [
    "ALONE", "BLOCK_SIZE", "MANY_TIED", "MAX_BLOCK_SIZE", "Array", "Clustering", "Progress",
    "Share", "about_ties", "as_numbers", "by_construction", "check_ks", "clustering_metrics",
    "full_float32", "inner_products", "kmeans", "nmi_f1", "one_per_class_gallery", "recall_at",
    "retrieval_metrics", "retrieval_per_query", "summarise",
]  # fmt: skip
