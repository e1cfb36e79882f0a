"""The losses: tensors in, one scalar out. The door to criteria/, where each family has a file.

Notation: batch B, embedding size d, classes C; x_i the raw head output of image i, x̂ = x/‖x‖₂,
y_i its label; p_c the raw proxy of class c, p̂_c at unit length; s_ic = x̂_i·p̂_c.

``build`` makes a loss by its name. ``compose`` makes a loss with attachments, as an Objective: a
weighted sum of terms over the same Embeddings. ``try_out`` checks that it can be trained. The names
are listed in criteria/__init__.py.

Every criterion is called as ``criterion(embeddings, labels)``, says how its parameters are
optimised (``parameter_groups``), and keeps the values of its summands for the log (``terms``,
detached 0-d tensors, unweighted). All of them compute in float32 whatever the autocast state;
float64 stays float64. Bad input raises a ValueError of one sentence. The range of labels is checked
on the CPU only, because on an accelerator every step would have to wait for the device.

Deviations from the released code: every exponential is part of a log-sum-exp, so that the loss
stays finite with an alpha of 128 and more; a table of images and classes (B, C) of more than 64 MiB
is computed in strips, and AMLoss' proxy-proxy term never holds the (C, C) matrix; a miner never
returns the anchor itself or an image of its class as a negative.
"""

from __future__ import annotations

import inspect
import random
from collections import Counter, UserDict
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

import criteria
from criteria.amloss import AMLoss, ProxyCrowding
from criteria.arguments import (
    SIZES,
    Parameters,
    arguments_of,
    check_arguments,
    check_complete,
    unknown,
)
from criteria.base import Criterion, Embeddings, References, in_float32, log_one_plus_sum_exp
from criteria.ddml import DisentanglingLoss
from criteria.library import LibraryEntry, LibraryLoss, LibraryPart, library_loss
from criteria.margin import MarginLoss
from criteria.masks import MaskOrthogonality, mask_orthogonality
from criteria.memory import MemoryBank
from criteria.miners import (
    MINERS,
    AnchorMiner,
    DistanceWeightedMiner,
    Miner,
    NearestNegativeMiner,
    Triplets,
    at_random,
    build_miner,
    farthest,
    nearest,
)
from criteria.objective import Inputs, Objective, Term, raw_retrieval, unit_retrieval
from criteria.pairs import (
    MultiSimilarityLoss,
    NPairLoss,
    SemihardTripletLoss,
    SoftmaxPairLoss,
    TripletLoss,
)
from criteria.proxies import ProxyAnchorLoss, ProxyLoss, negative_term, positive_term, proxy_losses
from criteria.similarity import cosine_similarity, introspective_similarity
from criteria.sphere import NormPenalty, SphericalConstraint
from utils import InputError

__all__ = [
    "ATTACHMENTS", "CRITERIA", "FILLED_IN", "MINERS", "AMLoss", "AnchorMiner", "Criterion",
    "DisentanglingLoss", "DistanceWeightedMiner", "Embeddings", "Inputs", "LibraryEntry",
    "LibraryLoss", "LibraryPart", "MarginLoss", "MaskOrthogonality", "MemoryBank", "Miner",
    "MultiSimilarityLoss", "NPairLoss", "NearestNegativeMiner", "NormPenalty", "Objective",
    "ProxyAnchorLoss", "ProxyCrowding", "ProxyLoss", "References", "SemihardTripletLoss",
    "SoftmaxPairLoss", "SphericalConstraint", "Term", "TripletLoss", "Triplets", "at_random",
    "build", "build_miner", "compose", "cosine_similarity", "default_of", "farthest", "in_float32",
    "introspective_similarity", "library_loss", "log_one_plus_sum_exp", "mask_orthogonality",
    "nearest", "needs_pairs", "negative_term", "options_of", "positive_term", "proxy_losses",
    "raw_retrieval", "try_out", "unit_retrieval",
]  # fmt: skip


class _Loaded(UserDict[str, Any]):
    """Losses by name, each imported when it is asked for.

    So a file of one's own that cannot be imported stops the runs that want its loss, and no others.
    """

    def __getitem__(self, name: str) -> Callable[..., Criterion]:
        found = super().__getitem__(name)
        return criteria.load(found) if isinstance(found, str) else found


CRITERIA: MutableMapping[str, Callable[..., Criterion]] = _Loaded(criteria.LOSSES)
"""The name of a loss → its class, or the function that builds it."""

ATTACHMENTS: dict[str, Callable[..., dict[str, Term]]] = {
    name: criteria.load(place) for name, place in criteria.ATTACHMENTS.items()
}
"""The name of an attachment → the function that attaches it, in the order of attaching."""

FILLED_IN = ("embedding_size", "metric_of_size")
"""Arguments of attachments that ``compose`` fills in, not the user; see criteria/__init__.py."""


def build(name: str, num_classes: int, embedding_size: int, **options: Any) -> Criterion:
    """The criterion called ``name`` in CRITERIA, or any library loss as ``pml:NAME``.

    ``options`` are arguments of its class; the others keep the values published for that loss.
    Raises ValueError for an unknown name or option (the message has the nearest ones), for a
    missing value, and for a value that the loss cannot use.
    """
    make = _entry(name)
    check_arguments(name, options, _options(make))
    taken = arguments_of(make)
    sizes = {"num_classes": num_classes, "embedding_size": embedding_size}
    check_complete(f"The loss {name}", {*sizes, *options}, inspect.signature(make).parameters)
    made = make(**{key: size for key, size in sizes.items() if key in taken}, **options)
    if not isinstance(made, Criterion):
        raise ValueError(
            f"The loss {name} is made by {type(made).__name__}, which is not a Criterion: begin "
            "its class with Criterion or ProxyLoss."
        )
    return made


def needs_pairs(name: str) -> bool:
    """Whether the loss called ``name`` learns from pairs within a batch.

    False if that is unknown because the loss cannot be built without options.
    """
    try:
        return build(name, num_classes=2, embedding_size=2).needs_pairs
    except (ValueError, TypeError, InputError):
        return False


def options_of(name: str) -> frozenset[str]:
    """Names of the options that ``build(name, ...)`` takes; ValueError for an unknown name."""
    return frozenset(_options(_entry(name)))


def default_of(name: str, option: str) -> Any:
    """The default of an option of the loss called ``name``; None if it has none.

    Raises ValueError for an unknown name of a loss.
    """
    default = getattr(_options(_entry(name)).get(option), "default", None)
    return None if default is inspect.Parameter.empty else default


def _entry(name: str) -> Callable[..., Criterion]:
    name = criteria.name_of(name)
    if name in CRITERIA:
        return CRITERIA[name]
    criteria.check_name(name)
    return LibraryEntry(name.removeprefix(criteria.LIBRARY))


def _options(make: Callable[..., Criterion]) -> Parameters:
    found = make.options() if isinstance(make, LibraryEntry) else arguments_of(make)
    return {name: argument for name, argument in found.items() if name not in SIZES}


def compose(
    name: str,
    num_classes: int,
    embedding_size: int,
    attach: Mapping[str, Mapping[str, Any]] | None = None,
    l2_norm: bool = True,
    **options: Any,
) -> Objective:
    """The loss ``name`` with its attachments, as one Objective.

    ``options`` go to ``build``. ``attach`` maps names of ATTACHMENTS to their options:

        introspective  variant ("released" or "paper")        losses with proxies of our own only
        disentangled   al, be, gam, scale                     losses with proxies of our own only
        memory         size, start                            losses on pairs
        matryoshka     sizes, the last embedding_size         any loss, on each prefix
        sec            weight, momentum                       any loss; raw lengths
        l2             weight                                 any loss; raw lengths
        masks          weight                                 any loss; needs masks= in the call

    With ``l2_norm``, IDML and losses that do not normalise by themselves get unit vectors. Raises
    ValueError for unknown names, missing values, and combinations that make no sense.
    """
    attach = attach or {}
    for attachment in attach:
        if attachment not in ATTACHMENTS:
            raise ValueError(unknown("attachment", attachment, ATTACHMENTS))
    criterion = build(name, num_classes, embedding_size, **options)
    unit = l2_norm if criterion.unit_length is None else criterion.unit_length
    terms = {"metric": Term(criterion, unit_retrieval if unit else raw_retrieval)}
    attached: dict[str, Mapping[str, Any]] = {}
    for attachment, make in ATTACHMENTS.items():
        if attachment not in attach:
            continue
        given, taken = attach[attachment], _keywords(make)
        known = {key: argument for key, argument in taken.items() if key not in FILLED_IN}
        check_arguments(attachment, given, known)
        check_complete(f"The attachment {attachment}", given, known)
        resized = partial(_metric_of_size, name, num_classes, dict(attached), l2_norm, options)
        filled = {"embedding_size": embedding_size, "metric_of_size": resized}
        filled = {key: value for key, value in filled.items() if key in taken}
        terms |= make(name, terms["metric"], l2_norm, **given, **filled)
        attached[attachment] = given
    return Objective(terms)


def _metric_of_size(
    name: str,
    num_classes: int,
    attach: Mapping[str, Mapping[str, Any]],
    l2_norm: bool,
    options: Mapping[str, Any],
    size: int,
) -> Term:
    """The loss's own term, with its attachments, for embeddings of another size."""
    return compose(name, num_classes, size, attach, l2_norm, **options).parts["metric"]


def try_out(
    name: str,
    labels: Tensor,
    embedding_size: int,
    attach: Mapping[str, Mapping[str, Any]] | None = None,
    l2_norm: bool = True,
    **options: Any,
) -> None:
    """Try ``compose(name, ...)`` on random embeddings of a batch with these labels (B,).

    Takes two steps, or up to eight until one has a gradient, because random embeddings may happen
    to satisfy the loss. The loss is built for the classes of the batch. The state of the random
    number generators is restored afterwards. Raises ValueError for a loss that is not finite, has
    no gradient, or has parameters that are in none of its groups, and what ``compose`` and the loss
    raise.
    """
    classes, labels = labels.unique(return_inverse=True)
    with _fixed_random_numbers():
        objective = compose(name, len(classes), embedding_size, attach, l2_norm, **options)
        _check_groups(name, objective)
        wide = 2 * embedding_size if "specific" in objective.heads else embedding_size
        # One-dimensional cosines have no gradient: that is no fault of the loss.
        learns = embedding_size == 1
        about = f"on random embeddings of {len(labels)} images of {len(classes)} classes"
        for step in range(8):
            outputs = Embeddings(
                **{h: torch.randn(len(labels), wide, requires_grad=True) for h in objective.heads}
            )
            loss = objective(outputs, labels)
            if not loss.isfinite():
                raise ValueError(f"The loss {name} is {loss.item()} {about}: change its arguments.")
            if loss.requires_grad:
                loss.backward()
            gradients = (head.grad for head in outputs if head is not None)
            learns |= any(each is not None and bool(each.any()) for each in gradients)
            if learns and step > 0:
                return
        raise ValueError(
            f"The loss {name} teaches the network nothing {about}, where it is "
            f"{loss.item():g} and has no gradient: change its arguments, or the batches."
        )


def _check_groups(name: str, objective: Objective) -> None:
    """Raise ValueError unless each trainable parameter is in one of the loss's groups, and once."""
    groups = objective.parameter_groups(lr=1.0)
    for group in groups:
        if missing := {"name", "params", "lr"} - group.keys():
            raise ValueError(
                f"The loss {name} has a parameter group without {' and '.join(sorted(missing))}: "
                "give each of its parameter_groups a name, params and lr."
            )
    listed = Counter(id(parameter) for group in groups for parameter in group["params"])
    parameters = [
        (path.rpartition("criterion.")[2], parameter)
        for path, parameter in objective.named_parameters()
        if parameter.requires_grad
    ]
    if left := [path for path, parameter in parameters if not listed[id(parameter)]]:
        raise ValueError(
            f"The loss {name} has parameters that would not learn, because none of its "
            f"parameter_groups has them: {', '.join(left)}."
        )
    if twice := [path for path, parameter in parameters if listed[id(parameter)] > 1]:
        raise ValueError(
            f"The loss {name} has parameters that its parameter_groups list more than once: "
            f"{', '.join(twice)}."
        )


@contextmanager
def _fixed_random_numbers() -> Iterator[None]:
    """Seed torch, numpy and Python with 0, and restore their states afterwards."""
    of_numpy, of_python = np.random.get_state(), random.getstate()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            np.random.seed(0)
            random.seed(0)
            yield
    finally:
        np.random.set_state(of_numpy)
        random.setstate(of_python)


def _keywords(make: Callable[..., dict[str, Term]]) -> Parameters:
    """An attachment's own options; its positional arguments say what it is attached to."""
    found = arguments_of(make).items()
    return {name: argument for name, argument in found if argument.kind is argument.KEYWORD_ONLY}
