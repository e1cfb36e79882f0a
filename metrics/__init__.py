"""Metrics: tensors in, numbers out. Nothing here knows the rest of the project.

`retrieval` has R@K, MAP@R and their kin, `clustering` k-means, NMI and F1; `comparison` says how
sure a number is: intervals, paired tests, seeds.
"""

from metrics.clustering import (
    Array,
    Clustering,
    Progress,
    full_float32,
    inner_products,
    kmeans,
    nmi_f1,
)
from metrics.retrieval import (
    ALONE,
    BLOCK_SIZE,
    MAX_BLOCK_SIZE,
    MAX_ENTRIES,
    MAX_PAIRS,
    Share,
    check_ks,
    clustering_metrics,
    one_per_class_gallery,
    retrieval_metrics,
    retrieval_per_query,
    summarise,
)

__all__ = [
    "ALONE",
    "BLOCK_SIZE",
    "MAX_BLOCK_SIZE",
    "MAX_ENTRIES",
    "MAX_PAIRS",
    "Array",
    "Clustering",
    "Progress",
    "Share",
    "check_ks",
    "clustering_metrics",
    "full_float32",
    "inner_products",
    "kmeans",
    "nmi_f1",
    "one_per_class_gallery",
    "retrieval_metrics",
    "retrieval_per_query",
    "summarise",
]
