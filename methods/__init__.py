"""The methods: each is one file with one record, and one line below.

Options, training, the report and the comparison of runs ask these records; none of them names a
method.
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
"""The files of this folder that hold a `METHOD`, in the order of --help, of titles, and in which
routines act."""

METHODS: tuple[Method, ...] = tuple(
    importlib.import_module(f".{name}", __name__).METHOD for name in FILES
)


def groups() -> list[Group]:
    """All groups of flags, those that change something."""
    return [group for method in METHODS for group in method.flags if not _is_dead(group)]


def dead_groups() -> list[Group]:
    """The groups whose flags are accepted and change nothing."""
    return [group for method in METHODS for group in method.flags if _is_dead(group)]


def _is_dead(group: Group) -> bool:
    return all(entry.dead for entry in group.flags)


def wanted(options: Options) -> list[Method]:
    """The methods that the options switch on."""
    return [method for method in METHODS if method.wanted(options)]


def added(options: Options) -> list[Method]:
    """Those of the wanted methods that are added to a plain loss.

    A method that is switched off together with another one is a part of that one, and not listed:
    mixup is a part of IDML.
    """
    found = [method for method in wanted(options) if method.off and "loss" not in method.off]
    return [m for m in found if not any(set(m.off) < set(other.off) for other in found)]


def title(options: Options) -> str:
    """The loss and what is added to it: `AMLoss + SEC`."""
    return " + ".join([options.loss, *(method.title for method in added(options))])


def attachments(options: Options) -> dict[str, dict[str, Any]]:
    """What is attached to the loss, as `losses.compose` wants it."""
    return {
        method.name: {argument: getattr(options, name) for argument, name in method.attach.items()}
        for method in METHODS
        if method.attach is not None and (method.wanted(options) or method.watched(options))
    }


def architecture(options: Options) -> dict[str, Any]:
    """What the methods need of the network: entries of `net.Architecture`."""
    found: dict[str, Any] = {}
    for method in METHODS:
        found |= method.architecture(options)
    return found


def masks(options: Options) -> EmbeddingMasks | None:
    """The masks on the embedding that one of the methods begins with; None without one."""
    made = (method.masks(options) for method in METHODS)
    return next((masks for masks in made if masks is not None), None)


def routines(options: Options, labels: np.ndarray) -> list[Routine]:
    """What the wanted methods do around the steps; `labels` (N,) are those of the training images.

    Raises:
        InputError: settings that cannot work together, or do not suit the images.
    """
    return [method.routine(options, labels) for method in wanted(options) if method.routine]


def sampler(options: Options, labels: np.ndarray) -> BatchSampler | None:
    """The batches that a method begins with; None where none has batches of its own.

    Raises:
        InputError: the batch size does not suit the method or the images.
    """
    made = [method.sampler(options, labels) for method in wanted(options) if method.sampler]
    return made[0] if made else None


def notes(options: Options) -> list[str]:
    """What the methods have to say about these options."""
    return [words for method in METHODS if (words := method.note(options))]


def check(options: Options) -> None:
    """Makes sure that the methods can go with the options.

    Raises:
        InputError: one of them refuses.
    """
    for method in wanted(options):
        if words := method.refuses(options):
            raise InputError(words)


def without(options: Options) -> tuple[Sequence[Method], Mapping[str, Any]]:
    """What to leave out to see what it was worth, and the options that leave it out.

    That is all that is added to the loss. Where nothing is, it is what the loss itself adds to a
    simpler one: AMLoss becomes Proxy-Anchor.
    """
    chosen = added(options) or [method for method in wanted(options) if method.off]
    return chosen, {name: value for method in chosen for name, value in method.off.items()}
