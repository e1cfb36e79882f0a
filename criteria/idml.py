"""IDML: replaces the cosine in a proxy loss by the introspective similarity (similarity.py).

Wang et al., Introspective Deep Metric Learning, TPAMI 2023.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from criteria.arguments import unknown
from criteria.base import Embeddings, unit_rows
from criteria.objective import Term
from criteria.proxies import ProxyLoss, proxy_losses


def introspective(
    name: str, metric: Term, l2_norm: bool, *, variant: str = "released"
) -> dict[str, Term]:
    """A proxy loss with IDML's similarity in place of the cosine.

    With ``l2_norm``, ``variant`` "released" brings both heads to unit length, and "paper" only the
    embedding. Raises ValueError if the loss is no ProxyLoss or takes no uncertainty, and for
    another variant.
    """
    if not isinstance(metric.criterion, ProxyLoss):
        raise ValueError(
            "The introspective similarity replaces the cosine between an image and a proxy, which "
            f"{name} does not compute here: combine it with {proxy_losses()}."
        )
    if "uncertainty" not in inspect.signature(metric.criterion.forward).parameters:
        raise ValueError(
            f"The loss {name} does not take an uncertainty, which the introspective similarity "
            "needs: give its forward an argument of that name, and hand it to self.similarity."
        )
    if variant not in ("released", "paper"):
        raise ValueError(unknown("introspective variant", variant, ["released", "paper"]))
    inputs = partial(_both_heads, l2_norm, l2_norm and variant == "released")
    return {"metric": Term(metric.criterion, inputs, heads=("embedding", "uncertainty"))}


def _both_heads(
    unit: bool,
    unit_uncertainty: bool,
    outputs: Embeddings,
    labels: Tensor,
    context: Mapping[str, Any],
) -> tuple[Any, ...]:
    embedding, uncertainty = outputs.embedding, outputs.uncertainty
    if unit:
        embedding = unit_rows(embedding)
    if unit_uncertainty:
        uncertainty = unit_rows(uncertainty)
    return embedding, labels, uncertainty
