"""The losses of pytorch-metric-learning, which is imported when one of them is built."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from criteria import PROXY_LR_SCALE
from criteria.arguments import Parameters, arguments_of, check_arguments, unknown
from criteria.base import Criterion, check_batch, check_not_negative, in_float32

LibraryPart = tuple[str, Mapping[str, Any]]
"""A class of the library by its name, and its arguments."""


class LibraryLoss(Criterion):
    """A loss of pytorch-metric-learning (and a miner) as a criterion.

    The library casts its proxies to the type of the embeddings, in place; ``in_float32`` hands it
    both in one type, so they keep theirs. Matrices it learns count as proxies (``proxy_lr_scale`` ×
    the learning rate), vectors do not and get no weight decay. ``num_classes`` and
    ``embedding_size`` are those the loss was built with, if any, and checked. `terms` stays empty.
    """

    def __init__(
        self,
        loss: nn.Module,
        miner: nn.Module | None = None,
        *,
        num_classes: int | None = None,
        embedding_size: int | None = None,
        proxy_lr_scale: float = PROXY_LR_SCALE,
    ) -> None:
        super().__init__()
        check_not_negative(proxy_lr_scale=proxy_lr_scale)
        self.proxy_lr_scale = proxy_lr_scale
        self.loss = loss
        self.miner = miner
        self.num_classes = num_classes
        self.embedding_size = embedding_size

    @in_float32
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-d, from embeddings (B, d) and labels (B,)."""
        labels = check_batch(embeddings, labels, self.embedding_size, self.num_classes)
        mined = None if self.miner is None else self.miner(embeddings, labels)
        return self.loss(embeddings, labels, mined)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Matrices as proxies at theirs, the rest at ``lr`` without weight decay."""
        parameters = list(self.loss.parameters())
        proxies = [parameter for parameter in parameters if parameter.ndim > 1]
        others = [parameter for parameter in parameters if parameter.ndim <= 1]
        groups = [
            {"name": "proxies", "params": proxies, "lr": self.proxy_lr_scale * lr},
            {"name": "library", "params": others, "lr": lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]


def _library(kind: str, name: str) -> type[nn.Module]:
    """The class ``name`` of pytorch_metric_learning's losses, miners or distances."""
    try:
        module = importlib.import_module(f"pytorch_metric_learning.{kind}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{name} comes from pytorch-metric-learning, which is not installed: "
            "run pip install pytorch-metric-learning."
        ) from error
    classes = dict(inspect.getmembers(module, inspect.isclass))
    if name not in classes:
        raise ValueError(unknown(f"class of pytorch_metric_learning.{kind}", name, classes))
    return classes[name]


def _library_part(kind: str, part: LibraryPart | str) -> nn.Module:
    name, arguments = (part, {}) if isinstance(part, str) else part
    return _library(kind, name)(**arguments)


def library_loss(
    name: str,
    num_classes: int,
    embedding_size: int,
    *,
    miner: LibraryPart | str | None = None,
    distance: LibraryPart | str | None = None,
    proxy_lr_scale: float = PROXY_LR_SCALE,
    **arguments: Any,
) -> LibraryLoss:
    """Any loss of pytorch-metric-learning by its class name, e.g. "CircleLoss", with its arguments.

    ``num_classes`` and ``embedding_size`` reach it when it takes them; ``miner`` and ``distance``
    are a class name of the library, alone or with its arguments. Raises ValueError when the
    library is missing, has no such loss, or the loss does not take the arguments.
    """
    loss = _library("losses", name)
    options = arguments_of(loss)
    check_arguments(f"pml:{name}", arguments, options)
    sizes = {"num_classes": num_classes, "embedding_size": embedding_size}
    sizes = {key: size for key, size in sizes.items() if key in options}
    try:
        if distance is not None:
            arguments["distance"] = _library_part("distances", distance)
        built = loss(**sizes, **arguments)
        chosen = None if miner is None else _library_part("miners", miner)
    except (TypeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"pml:{name} cannot be built with these arguments: {error}.") from error
    return LibraryLoss(built, chosen, **sizes, proxy_lr_scale=proxy_lr_scale)


class LibraryEntry(NamedTuple):
    """A loss of the library with the constants of a published command."""

    name: str
    arguments: Mapping[str, Any] = {}
    miner: LibraryPart | None = None
    proxy_lr_scale: float = PROXY_LR_SCALE

    def __call__(self, num_classes: int, embedding_size: int, **options: Any) -> LibraryLoss:
        """The loss; an option that its miner shares (a margin) goes to both."""
        miner = self.miner
        if miner is not None:
            shared = {key: value for key, value in options.items() if key in miner[1]}
            miner = (miner[0], {**miner[1], **shared})
        arguments = {"proxy_lr_scale": self.proxy_lr_scale, **self.arguments, **options}
        return library_loss(self.name, num_classes, embedding_size, miner=miner, **arguments)

    def options(self) -> Parameters:
        """The arguments that may be given."""
        shared = arguments_of(library_loss)["proxy_lr_scale"]
        return {**arguments_of(_library("losses", self.name)), "proxy_lr_scale": shared}


# The released Proxy-Anchor loop trains these proxies at the network's own rate.
PROXY_NCA = LibraryEntry("ProxyNCALoss", {"softmax_scale": 32.0}, proxy_lr_scale=1.0)
MULTI_SIMILARITY = LibraryEntry(
    "MultiSimilarityLoss",
    {"alpha": 2.0, "beta": 50.0, "base": 0.5},
    miner=("MultiSimilarityMiner", {"epsilon": 0.1}),
)
CONTRASTIVE = LibraryEntry("ContrastiveLoss", {"neg_margin": 0.5})
TRIPLET = LibraryEntry(
    "TripletMarginLoss",
    {"margin": 0.1},
    miner=("TripletMarginMiner", {"margin": 0.1, "type_of_triplets": "semihard"}),
)
N_PAIR = LibraryEntry(
    "NPairsLoss", {"distance": ("DotProductSimilarity", {"normalize_embeddings": False})}
)
SOFT_TRIPLE = LibraryEntry("SoftTripleLoss")
CIRCLE = LibraryEntry("CircleLoss", {"m": 0.4, "gamma": 80.0})
MARGIN = LibraryEntry("MarginLoss", {"learn_beta": True})
