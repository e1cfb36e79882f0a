"""The losses of pytorch-metric-learning, which is imported only when one of them is built."""

from __future__ import annotations

import argparse
import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from criteria import LIBRARY, PROXY_LR_SCALE, checks
from criteria.arguments import (
    SIZES,
    Parameters,
    arguments_of,
    check_arguments,
    check_complete,
    unknown,
)
from criteria.base import Criterion, ParameterGroup, References, check_batch, in_float32
from flags import key_value
from utils import InputError

LibraryPart = tuple[str, Mapping[str, Any]]
"""The name of a class of the library, and its arguments."""

PARTS = {
    "miner": "miners",
    "distance": "distances",
    "reducer": "reducers",
    "embedding_regularizer": "regularizers",
    "weight_regularizer": "regularizers",
}
"""The arguments of a loss that are classes of the library → the modules of these classes."""

SIZE_NAMES = {"descriptors_dim": "embedding_size"}
"""Other names of the library for our sizes → our names."""

WORDS = {
    "type_of_triplets": ("all", "easy", "hard", "semihard"),
    "triplets_per_anchor": ("all",),
}
"""Words of which the library takes any other for "all", or fails over it at the first step."""

OUT_OF_REACH = {
    "CrossBatchMemory": "it remembers images of earlier steps, which a continued run would not",
    "DynamicSoftMarginLoss": "it keeps the graph of a step for the next one",
    "ManifoldLoss": "it learns without labels",
    "MultipleLosses": "it is made of other losses",
    "SelfSupervisedLoss": "it learns from two views of each image, without labels",
    "VICRegLoss": "it learns from two views of each image, without labels",
}
"""The losses of the library that cannot be trained here, and why."""


class LibraryLoss(Criterion):
    """A loss of pytorch-metric-learning, with or without a miner, as a criterion.

    The library casts its proxies to the type of the embeddings, in place; ``in_float32`` passes it
    both in one type, so nothing is cast. Matrices that the loss learns count as proxies
    (``proxy_lr_scale`` × the learning rate); the rest learns at the network's rate, without weight
    decay. Batches are checked against ``num_classes`` and ``embedding_size``, those that the loss
    was built with, if any; a loss built without a size has no proxies and ``needs_pairs``.
    ``terms`` stays empty. Any exception of the library becomes an InputError.
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
        checks.not_negative(proxy_lr_scale=proxy_lr_scale)
        self.proxy_lr_scale = proxy_lr_scale
        self.loss = loss
        self.miner = miner
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.needs_pairs = embedding_size is None

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor, references: References | None = None
    ) -> Tensor:
        """The loss, 0-d, from embeddings (B, d) and labels (B,)."""
        labels = check_batch(embeddings, labels, self.embedding_size, self.num_classes)
        try:
            if references is not None:
                loss = self._among(embeddings, labels, references)
            else:
                mined = None if self.miner is None else self._mined(embeddings, labels)
                loss = self.loss(embeddings, labels, mined)
        except (torch.OutOfMemoryError, MemoryError):
            raise
        except Exception as error:
            raise InputError(
                f"{_named(self.loss)} cannot use a batch of {len(labels)} images of "
                f"{len(labels.unique())} classes, or not with these arguments: {_words(error)}"
            ) from error
        if not isinstance(loss, Tensor) or loss.ndim:
            raise InputError(
                f"{_named(self.loss)} with {_named(self.loss.reducer)} does not give one number; "
                "choose another reducer"
            )
        return loss

    def _mined(self, embeddings: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        """The miner's pairs or triplets; a single one is repeated.

        The library returns 0 for a single pair. Repeating it does not change its loss otherwise,
        because the library marks pairs in a matrix, or takes a mean over them.
        """
        return _at_least_two(self.miner(embeddings, labels))

    def _among(self, embeddings: Tensor, labels: Tensor, references: References) -> Tensor:
        """The loss with references, without the pairs of an image and itself."""
        from pytorch_metric_learning.utils.loss_and_miner_utils import get_all_pairs_indices

        others, other_labels, own = references
        if self.miner is None:
            mined = get_all_pairs_indices(labels, other_labels)
        else:
            mined = self.miner(embeddings, labels, others, other_labels)
        together = 2 if len(mined) == 4 else 3  # pairs (a, p) and (a, n), or triplets
        kept = own[mined[0]] != mined[1]
        mined = (*(part[kept] for part in mined[:together]), *mined[together:])
        return self.loss(embeddings, labels, _at_least_two(mined), others, other_labels)

    @property
    def no_memory(self) -> str:
        """Why the loss cannot be used with a memory; "" if the library's own memory supports it."""
        from pytorch_metric_learning.losses import CrossBatchMemory

        if reason := getattr(self.loss, "no_memory", ""):
            return reason
        supported = CrossBatchMemory.supported_losses()
        if type(self.loss).__name__ in supported:
            return ""
        unusable = {each.__name__ for each in _patched() if getattr(each, "no_memory", "")}
        usable = [name for name in supported if name not in unusable]
        return f"the library has one for {', '.join(usable)}"

    def parameter_groups(self, lr: float) -> list[ParameterGroup]:
        """Matrices at ``proxy_lr_scale`` × ``lr``, the rest at ``lr`` without weight decay."""
        parameters = list(self.loss.parameters())
        proxies = [parameter for parameter in parameters if parameter.ndim > 1]
        others = [parameter for parameter in parameters if parameter.ndim <= 1]
        groups = [
            {"name": "proxies", "params": proxies, "lr": self.proxy_lr_scale * lr},
            {"name": "library", "params": others, "lr": lr, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]


def _at_least_two(mined: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(part.repeat(2) for part in mined) if max(map(len, mined)) == 1 else mined


def _named(part: nn.Module) -> str:
    return f"{LIBRARY}{type(part).__name__}"


def _words(error: Exception) -> str:
    # What follows is torch's list of everything that it accepts.
    said, _, _ = str(error).partition("but expected one of:")
    return f"{type(error).__name__}, {' '.join(said.split())}".rstrip(", ").rstrip(".")


def _classes(kind: str) -> dict[str, type[nn.Module]]:
    """The usable classes of a module of the library (losses, miners, distances, ...), by name."""
    try:
        module = importlib.import_module(f"pytorch_metric_learning.{kind}")
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{LIBRARY}NAME comes from pytorch-metric-learning, which is not installed: "
            "run pip install pytorch-metric-learning."
        ) from error
    found = dict(inspect.getmembers(module, inspect.isclass))
    if kind == "losses":
        loss, parts = module.BaseMetricLossFunction, {"GenericPairLoss", *OUT_OF_REACH}
        found = {
            name: each
            for name, each in found.items()
            if issubclass(each, loss) and name not in parts
        }
        found |= {each.__name__: each for each in _patched()}
    return {name: each for name, each in found.items() if not name.startswith("Base")}


def _patched() -> tuple[type[nn.Module], ...]:
    """The losses of the library that we replace by patched subclasses."""
    from criteria.patched import HistogramLoss, NCALoss, ProxyNCALoss, TupletMarginLoss

    return HistogramLoss, NCALoss, ProxyNCALoss, TupletMarginLoss


def _library(kind: str, name: str) -> type[nn.Module]:
    """The class ``name`` of a module; ValueError, with names that exist, if there is none."""
    classes = _classes(kind)
    if kind == "losses" and name in OUT_OF_REACH:
        raise ValueError(
            f"{LIBRARY}{name} cannot be trained here: {OUT_OF_REACH[name]}; "
            f"choose one of {', '.join(classes)}."
        )
    if name not in classes:
        raise ValueError(unknown(f"class of pytorch_metric_learning.{kind}", name, classes))
    return classes[name]


def read_part(text: str) -> LibraryPart:
    """`LpDistance(p=1, power=2)`, or a name alone → the name and its arguments.

    Raises ValueError for a missing closing bracket, or an argument that is not key=value.
    """
    name, bracket, rest = text.partition("(")
    if not bracket:
        return name, {}
    if not rest.endswith(")"):
        raise ValueError(f"{text!r} has no closing bracket: write it as NAME(key=value,key=value).")
    words = [word.strip() for word in rest[:-1].split(",") if word.strip()]
    try:
        return name, dict(key_value(word) for word in words)
    except argparse.ArgumentTypeError as error:
        raise ValueError(f"{text!r}: {error}.") from error


def _library_part(
    argument: str, part: LibraryPart | str | nn.Module, sizes: Mapping[str, int]
) -> nn.Module:
    """Build the class given for an argument of PARTS, with those of the ``sizes`` it takes."""
    if isinstance(part, nn.Module):
        return part
    if isinstance(part, str):
        part = read_part(part)
    if not isinstance(part, tuple):
        raise ValueError(
            f"The option {argument} is the name of a class of pytorch_metric_learning."
            f"{PARTS[argument]}, not {part!r}."
        )
    name, arguments = part
    make = _library(PARTS[argument], name)
    known = arguments_of(make)
    _check(name, arguments, {key: known[key] for key in known if key not in SIZES})
    filled = {key: size for key, size in sizes.items() if key in known}
    return _built(name, make, {**filled, **arguments})


def _check(owner: str, given: Mapping[str, Any], known: Parameters) -> None:
    """`check_arguments`, and ValueError for a word that the library would not know."""
    check_arguments(owner, given, known)
    for name, words in WORDS.items():
        value = given.get(name)
        if isinstance(value, str) and value not in words:
            number = ", or a number" if name == "triplets_per_anchor" else ""
            raise ValueError(
                f"The option {name} of {owner} cannot be {value!r}: "
                f"choose one of {', '.join(words)}{number}."
            )


def _built(name: str, make: Callable[..., nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
    try:
        return make(**arguments)
    except Exception as error:
        raise ValueError(
            f"{name} cannot be built with these arguments: {_words(error)}."
        ) from error


def library_loss(
    name: str,
    num_classes: int,
    embedding_size: int,
    *,
    miner: LibraryPart | str | None = None,
    proxy_lr_scale: float = PROXY_LR_SCALE,
    **arguments: Any,
) -> LibraryLoss:
    """Any loss of pytorch-metric-learning by its class name, e.g. "CircleLoss", with its arguments.

    ``num_classes`` and ``embedding_size`` are passed to the loss and its parts if they take them.
    ``miner``, and any argument that is a class of the library (PARTS), is given as a class name,
    with or without arguments: ``distance="LpDistance(p=1)"``. The miner "none" means no miner.
    Raises ValueError if the library is not installed or has no such loss, and for arguments that
    the loss does not take.
    """
    loss = _library("losses", name)
    options = arguments_of(loss)
    _check(f"{LIBRARY}{name}", arguments, options)
    sizes = {"num_classes": num_classes, "embedding_size": embedding_size}
    named = inspect.signature(loss).parameters
    check_complete(f"The loss {LIBRARY}{name}", {*arguments, *SIZE_NAMES, *sizes}, named)
    called = {key: SIZE_NAMES.get(key, key) for key in options}  # its name → ours
    called = {key: size for key, size in called.items() if size in sizes}
    given = {key: sizes[size] for key, size in called.items()}
    for key, value in arguments.items():
        named_part = key in PARTS and value is not None
        given[key] = _library_part(key, value, sizes) if named_part else value
    built = _built(f"{LIBRARY}{name}", loss, given)
    chosen = None if miner in (None, "none") else _library_part("miner", miner, sizes)
    if chosen is not None and arguments.get("triplets_per_anchor", "all") != "all":
        raise ValueError(
            f"The option triplets_per_anchor of {LIBRARY}{name} has no effect when a miner chooses "
            "the triplets: give miner=none too, or leave it out."
        )
    taken = {size: sizes[size] for size in called.values()}
    return LibraryLoss(built, chosen, **taken, proxy_lr_scale=proxy_lr_scale)


class LibraryEntry(NamedTuple):
    """A loss of the library with the constants of a published command."""

    name: str
    arguments: Mapping[str, Any] = {}
    miner: LibraryPart | None = None
    proxy_lr_scale: float = PROXY_LR_SCALE

    def __call__(self, num_classes: int, embedding_size: int, **options: Any) -> LibraryLoss:
        """Build the loss; an option that the miner has too, such as a margin, goes to both."""
        miner = self.miner
        if miner is not None:
            shared = {key: value for key, value in options.items() if key in miner[1]}
            miner = (miner[0], {**miner[1], **shared})
        arguments = {"miner": miner, "proxy_lr_scale": self.proxy_lr_scale, **self.arguments}
        return library_loss(self.name, num_classes, embedding_size, **{**arguments, **options})

    def options(self) -> Parameters:
        """The arguments that may be given, with the defaults of the published command."""
        found = arguments_of(_library("losses", self.name))
        miner = inspect.Parameter("miner", inspect.Parameter.KEYWORD_ONLY, default=None)
        more = {"miner": miner, "proxy_lr_scale": arguments_of(library_loss)["proxy_lr_scale"]}
        found = {name: one for name, one in found.items() if name not in SIZE_NAMES} | more
        own = {**self.arguments, "proxy_lr_scale": self.proxy_lr_scale}
        return {
            name: one.replace(default=own[name]) if name in own else one
            for name, one in found.items()
        }


# Proxy-Anchor's released training loop trains these proxies at the network's own rate.
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
