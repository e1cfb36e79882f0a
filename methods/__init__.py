"""The methods: each is one file with one record, and one line below.

Options, training, the report and the comparison of runs read these records and never name a method
themselves.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flags import Group, Options
from methods.base import Method, Routine
from utils import InputError

if TYPE_CHECKING:
    import numpy as np

    from dataset.samplers import BatchSampler
    from net import EmbeddingMasks

FILES = (
    "proxies",
    "amloss",
    "ddml",
    "idml",
    "memory",
    "matryoshka",
    "sec",
    "norms",
    "warmup",
    "mixup",
    "divide",
    "pairs",
)
"""The files of this folder with a `METHOD`, in the order of --help, of titles and of routines."""

METHODS: tuple[Method, ...] = tuple(
    importlib.import_module(f".{name}", __name__).METHOD for name in FILES
)


def groups() -> list[Group]:
    """The groups of flags that have an effect."""
    return [group for method in METHODS for group in method.flags if not _is_dead(group)]


def dead_groups() -> list[Group]:
    """The groups of flags that are accepted without effect."""
    return [group for method in METHODS for group in method.flags if _is_dead(group)]


def _is_dead(group: Group) -> bool:
    return all(entry.dead for entry in group.flags)


def wanted(options: Options) -> list[Method]:
    """The methods that the options switch on."""
    return [method for method in METHODS if method.wanted(options)]


def added(options: Options) -> list[Method]:
    """The wanted methods that are added to a plain loss.

    A method that another one switches off together with itself is a part of that one and is not
    listed: mixup is a part of IDML.
    """
    found = [method for method in wanted(options) if method.off and "loss" not in method.off]
    return [m for m in found if not any(set(m.off) < set(other.off) for other in found)]


def title(options: Options) -> str:
    """The loss and what is added to it: `AMLoss + SEC`."""
    return " + ".join([options.loss, *(method.title for method in added(options))])


def attachments(options: Options) -> dict[str, dict[str, Any]]:
    """What is attached to the loss, as `losses.compose` takes it."""
    return {
        method.name: {argument: getattr(options, name) for argument, name in method.attach.items()}
        for method in METHODS
        if method.attach is not None and (method.wanted(options) or method.watched(options))
    }


def architecture(options: Options) -> dict[str, Any]:
    """What the methods require of the network: entries of `net.Architecture`."""
    found: dict[str, Any] = {}
    for method in METHODS:
        found |= method.architecture(options)
    return found


def masks(options: Options) -> EmbeddingMasks | None:
    """The initial masks on the embedding; None if no method has any."""
    made = (method.masks(options) for method in METHODS)
    return next((masks for masks in made if masks is not None), None)


def routines(options: Options, labels: np.ndarray) -> list[Routine]:
    """The routines of the wanted methods; `labels` (N,) are those of the training images.

    Raises:
        InputError: settings that cannot work together, or do not suit the images.
    """
    return [method.routine(options, labels) for method in wanted(options) if method.routine]


def sampler(options: Options, labels: np.ndarray) -> BatchSampler | None:
    """The initial batch sampler of a method; None if no wanted method has one.

    Raises:
        InputError: the batch size does not suit the method or the images.
    """
    made = [method.sampler(options, labels) for method in wanted(options) if method.sampler]
    return made[0] if made else None


def notes(options: Options) -> list[str]:
    """The methods' remarks on these options, for the log."""
    return [words for method in METHODS if (words := method.note(options))]


def check(options: Options) -> None:
    """Raise InputError if one of the wanted methods refuses these options."""
    for method in wanted(options):
        if words := method.refuses(options):
            raise InputError(words)


def without(options: Options) -> tuple[Sequence[Method], Mapping[str, Any]]:
    """The methods to leave out to see what they gain, and the options that leave them out.

    These are all methods that are added to the loss. If there are none, it is what the loss itself
    adds to a simpler one: AMLoss becomes Proxy-Anchor.
    """
    chosen = added(options) or [method for method in wanted(options) if method.off]
    return chosen, {name: value for method in chosen for name, value in method.off.items()}
