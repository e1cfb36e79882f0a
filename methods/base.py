"""What a method is: one record with its flags, and what it does to losses, network and steps.

Nothing in methods/ loads torch when it is imported, because the command line reads the flags here;
what needs torch is imported by the function that makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from flags import Group, Need, Options

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from criteria.base import ParameterGroup
    from dataset.loader import Batch, Loader
    from dataset.samplers import BatchSampler
    from net import EmbeddingMasks, EmbeddingNet
else:
    Batch = Any  # so that the file of a method can name it, and torch is not loaded


def never(options: Options) -> bool:
    """The answer of a method that is not asked for."""
    return False


def nothing(options: Options) -> dict[str, Any]:
    """The answer of a method that adds nothing."""
    return {}


@dataclass(frozen=True)
class Method:
    """One published method, or one part of a recipe that can be switched on by itself.

    Attributes:
        name: as `losses.compose` knows what is attached, where something is.
        title: for people: `SEC`.
        flags: its groups of flags in `--help`.
        wanted: whether these options switch it on.
        attach: what it adds to a loss: constructor argument → option; None adds nothing.
        watched: whether its term is attached even so, at weight 0, so that it is logged.
        off: the options that leave it out, for 'was it worth it?'; {} where nobody would ask that.
        defaults: what a published command of its authors sets unless it is given.
        architecture: what `net.Architecture` must be told for it.
        masks: the masks that it lays on the embedding; at most one method has some.
        routine: (options, labels (N,) of the training images) → what it does around the steps.
        sampler: the same arguments → the batches to begin with; at most one method has one.
        note: a sentence about these options, or "".
        refuses: why these options cannot go with it, in a sentence, or "".
    """

    name: str
    title: str
    flags: tuple[Group, ...] = ()
    wanted: Callable[[Options], bool] = never
    attach: Mapping[str, str] | None = None
    watched: Callable[[Options], bool] = never
    off: Mapping[str, Any] = field(default_factory=dict)
    defaults: Callable[[Options], dict[str, Any]] = nothing
    architecture: Callable[[Options], dict[str, Any]] = nothing
    masks: Callable[[Options], EmbeddingMasks | None] = lambda options: None
    routine: Callable[[Options, np.ndarray], Routine] | None = None
    sampler: Callable[[Options, np.ndarray], BatchSampler] | None = None
    note: Callable[[Options], str] = lambda options: ""
    refuses: Callable[[Options], str] = lambda options: ""


def loss_is(*names: str) -> Need:
    """The flag belongs to these losses."""
    return Need(f"--loss {' or '.join(names)}", lambda options: options.loss in names)


# --- around the steps -----------------------------------------------------------------------------


class Forward(NamedTuple):
    """One forward of a step: images, and the weighted labels that its loss is taken with."""

    images: torch.Tensor
    targets: list[tuple[torch.Tensor | float, torch.Tensor]]


class Optimisers(Protocol):
    """What a routine may ask of the optimisers (training/optim.py)."""

    def hold(self, name: str, factor: float) -> None:
        """Multiplies the rate of a group, on top of its schedule; with 0 the group rests."""

    def replace(self, name: str, parameters: list[nn.Parameter]) -> None:
        """Gives a group other parameters; with none it trains no more."""


class Loop(Protocol):
    """What a routine sees of the run."""

    network: EmbeddingNet
    loader: Loader
    optimisers: Optimisers

    @property
    def epoch(self) -> int:
        """Epochs done."""

    def embed_training_images(self, *, pooled: bool) -> torch.Tensor:
        """Pooled features (N, F), or embeddings (N, d), of the training images."""


class Routine:
    """What a method does around the steps: here nothing. A method overrides what it needs.

    The loop calls every routine in turn and knows none of them: once before it begins (`start`),
    before an epoch (`begin_epoch`), for a batch (`prepare`, then `forwards` and `context`), and
    when a run is saved and continued (`state_dict`).
    """

    def start(self, network: EmbeddingNet) -> None:
        """Called once, when the network is built."""

    def parameter_groups(self, groups: Sequence[ParameterGroup]) -> Sequence[ParameterGroup]:
        """May change how the network's parameters are trained."""
        return groups

    def begin_epoch(self, loop: Loop) -> None:
        """Called before the first batch of an epoch."""

    def prepare(self, batch: Batch) -> Batch:
        """May change a batch."""
        return batch

    def forwards(self, batch: Batch, planned: list[Forward]) -> list[Forward]:
        """May add forwards to a step; `planned` holds those so far, first the batch itself."""
        return planned

    def context(self) -> dict[str, Any]:
        """What the objective is told besides outputs and labels."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs, as tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any], loop: Loop) -> None:
        """Continues from `state_dict()`; called before network and optimisers load theirs."""

    def resume(self, loop: Loop) -> None:
        """Called instead of `begin_epoch` when a run continues inside an epoch."""
