"""Embeddings whose first entries are useful embeddings themselves, like nested dolls.

Kusupati et al., Matryoshka Representation Learning, NeurIPS 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from criteria.base import Embeddings
from criteria.objective import Inputs, Term


def matryoshka(
    name: str,
    metric: Term,
    l2_norm: bool,
    *,
    sizes: Sequence[int],
    embedding_size: int,
    metric_of_size: Callable[[int], Term],
) -> dict[str, Term]:
    """The loss, and the same loss on the first m entries of the embedding for smaller sizes m.

        L = Σ_{m∈sizes} L_m(x_{1:m}, y)

    Every L_m is a separate loss, with proxies (C, m) and other parameters of its own: the paper's
    MRL. Its MRL-E takes the first columns of the largest loss's proxies instead and is worse, most
    of all at small sizes. The loss on the whole embedding stays the first term, "metric".
    """
    _check(sizes, embedding_size)
    smaller = {f"d{size}": _of_prefix(metric_of_size(size), size) for size in sizes[:-1]}
    return {"metric": metric, **smaller}


def _check(sizes: Sequence[int], embedding_size: int) -> None:
    """Raise ValueError unless the sizes increase and end with that of the whole embedding."""
    given = " ".join(map(str, sizes))
    if [*sizes] != sorted({*sizes}) or not sizes or sizes[0] < 1:
        raise ValueError(
            f"The Matryoshka sizes {given} must be whole numbers above 0, each larger than the one "
            "before."
        )
    if sizes[-1] != embedding_size:
        raise ValueError(
            f"The last Matryoshka size is {sizes[-1]} and must be the embedding's own, "
            f"{embedding_size}: end with {embedding_size}, or make an embedding of {sizes[-1]}."
        )


def _of_prefix(term: Term, size: int) -> Term:
    """The same term on the first ``size`` entries of the embedding."""
    return Term(term.criterion, partial(_prefix, term.inputs, size), term.heads, term.weight)


def _prefix(
    inputs: Inputs, size: int, outputs: Embeddings, labels: Tensor, context: Mapping[str, Any]
) -> tuple[Any, ...] | None:
    return inputs(outputs.first(size), labels, context)
