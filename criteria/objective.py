"""Weighted sums of losses over the same Embeddings."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from criteria.base import Criterion, Embeddings, in_float32, unit_rows

Inputs = Callable[[Embeddings, Tensor, Mapping[str, Any]], tuple[Any, ...] | None]
"""A module-level function, or a partial of one: an Objective with a closure cannot be pickled."""


def raw_retrieval(
    outputs: Embeddings, labels: Tensor, context: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The retrieval embedding at its own length, and the labels."""
    return outputs.retrieval, labels


def unit_retrieval(
    outputs: Embeddings, labels: Tensor, context: Mapping[str, Any]
) -> tuple[Any, ...]:
    """The retrieval embedding at unit length, and the labels."""
    return unit_rows(outputs.retrieval), labels


class Term(nn.Module):
    """One summand of an Objective: weight · criterion(*inputs(outputs, labels, context)).

    ``inputs`` selects the criterion's arguments from the network's outputs, the labels and the
    step's context: by default the retrieval embedding (raw, unless the criterion's ``unit_length``
    says otherwise) and the labels. If it returns None, the term is left out of this step.
    ``heads`` are the fields of Embeddings that the term needs.
    """

    def __init__(
        self,
        criterion: Criterion,
        inputs: Inputs | None = None,
        heads: tuple[str, ...] = ("embedding",),
        weight: float = 1.0,
    ) -> None:
        super().__init__()
        self.criterion = criterion
        self.inputs = inputs or (unit_retrieval if criterion.unit_length else raw_retrieval)
        self.heads = heads
        self.weight = weight

    def forward(
        self, outputs: Embeddings, labels: Tensor, context: Mapping[str, Any]
    ) -> Tensor | None:
        """The weighted loss, 0-d, or None if this step leaves the term out.

        Raises ValueError when a head is missing, for a loss that is not one number, and what the
        criterion raises.
        """
        for head in self.heads:
            if getattr(outputs, head) is None:
                raise ValueError(
                    f"The loss {type(self.criterion).__name__} needs the network's {head} head: "
                    f"build the network with the heads {', '.join(self.heads)}."
                )
        inputs = self.inputs(outputs, labels, context)
        if inputs is None:
            return None
        loss, name = self.criterion(*inputs), type(self.criterion).__name__
        if not isinstance(loss, Tensor):
            raise ValueError(
                f"The loss {name} returned no tensor but {type(loss).__name__}: return one number "
                "as a tensor, such as its mean."
            )
        if loss.ndim:
            raise ValueError(
                f"The loss {name} returned a loss of shape {tuple(loss.shape)}: return one "
                "number, such as its mean."
            )
        return self.weight * loss


class Objective(Criterion):
    """A weighted sum of named terms over the same Embeddings: ``objective(outputs, labels)``.

    Keywords pass whatever else terms need: ``masks=`` (K, d), or None in divide and conquer's full
    phase; ``again=`` whether this step has called the objective before, with other images or
    labels. ``terms`` collects those of all criteria; if two have the same name, the name of the
    term is put in front. ``heads`` are the outputs that the network must have.
    """

    def __init__(self, terms: Mapping[str, Term]) -> None:
        super().__init__()
        if not terms:
            raise ValueError("An objective needs at least one term.")
        self.parts = nn.ModuleDict(terms)

    @property
    def heads(self) -> tuple[str, ...]:
        """Fields of Embeddings that the network must fill, in the order of Embeddings."""
        needed = {head for part in self.parts.values() for head in part.heads}
        return tuple(head for head in Embeddings._fields if head in needed)

    @property
    def needs_pairs(self) -> bool:
        """Whether one of the terms needs pairs."""
        return any(part.criterion.needs_pairs for part in self.parts.values())

    @in_float32
    def forward(self, outputs: Embeddings, labels: Tensor, **context: Any) -> Tensor:
        """The sum, 0-d.

        Raises ValueError when a head is missing, for a loss or a term of its own that is not one
        number, for one that is called "loss", and what the terms raise.
        """
        losses, terms = [], {}
        for name, part in self.parts.items():
            loss = part(outputs, labels, context)
            if loss is None:
                continue
            if "loss" in part.criterion.terms:
                raise ValueError(
                    f"The loss {type(part.criterion).__name__} reports a term called loss, which "
                    "is what the log calls the sum of all terms: give it another name."
                )
            losses.append(loss)
            for key, value in part.criterion.terms.items():
                if not isinstance(value, Tensor) or value.ndim:
                    raise ValueError(
                        f"The loss {type(part.criterion).__name__} reports a term {key} that is "
                        "not one number as a tensor: report its mean."
                    )
                terms[f"{name}/{key}" if key in terms else key] = value
        self.terms = terms
        return torch.stack(losses).sum()
