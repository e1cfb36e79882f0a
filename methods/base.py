"""What a method is: one record with its flags, and what it does to losses, network and steps.

Importing methods/ does not load torch, because the command line reads the flags here; functions
that need torch import it themselves.
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
    Batch = Any  # so that a method's file can name it without loading torch


def never(options: Options) -> bool:
    """The default of `Method.wanted` and `Method.watched`."""
    return False


def nothing(options: Options) -> dict[str, Any]:
    """The default of `Method.defaults` and `Method.architecture`."""
    return {}


@dataclass(frozen=True)
class Method:
    """One published method, or one part of a recipe that can be switched on by itself.

    Attributes:
        name: if it attaches something to a loss, the name of that in `losses.compose`.
        title: what readers see: `SEC`.
        flags: its groups of flags in `--help`.
        wanted: whether these options switch it on.
        attach: the arguments of what it attaches to a loss → the options that give them; None if
            it attaches nothing.
        watched: whether its term is attached, and logged, at weight 0 if it is not wanted.
        off: the options that leave it out, to see what it gains; {} if that makes no sense.
        defaults: the defaults of its authors' command that differ from ours.
        architecture: entries of `net.Architecture` that it needs.
        masks: its initial masks on the embedding; at most one method has masks.
        routine: (options, labels (N,) of the training images) → what it does around the steps.
        sampler: the same arguments → the initial batch sampler; at most one method has one.
        note: a remark on these options, or "".
        refuses: a sentence that says why it cannot be used with these options, or "".
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
    """The need of a flag that belongs to these losses only."""
    return Need(f"--loss {' or '.join(names)}", lambda options: options.loss in names)


# --- around the steps -----------------------------------------------------------------------------


class Forward(NamedTuple):
    """One forward pass of a step: images, and the labels of its loss with their weights."""

    images: torch.Tensor
    targets: list[tuple[torch.Tensor | float, torch.Tensor]]


class Optimisers(Protocol):
    """What a routine can do to the optimisers (training/optim.py)."""

    def hold(self, name: str, factor: float) -> None:
        """Multiply the learning rate of a group, on top of its schedule; 0 freezes the group."""

    def replace(self, name: str, parameters: list[nn.Parameter]) -> None:
        """Give a group other parameters; with none, it is no longer trained."""


class Loop(Protocol):
    """What a routine can use of the run."""

    network: EmbeddingNet
    loader: Loader
    optimisers: Optimisers

    @property
    def epoch(self) -> int:
        """The number of finished epochs."""

    def embed_training_images(self, *, pooled: bool) -> torch.Tensor:
        """Pooled features (N, F), or embeddings (N, d), of the training images."""


class Routine:
    """What a method does around the steps: here nothing; methods override what they need.

    The loop calls every routine in turn: once before training (`start`), before every epoch
    (`begin_epoch`), for every batch (`prepare`, then `forwards` and `context`), and when a run is
    saved or continued (`state_dict`, `load_state_dict`).
    """

    def start(self, network: EmbeddingNet) -> None:
        """Called once, after the network is built."""

    def parameter_groups(self, groups: Sequence[ParameterGroup]) -> Sequence[ParameterGroup]:
        """The network's parameter groups; a routine may change how they are trained."""
        return groups

    def begin_epoch(self, loop: Loop) -> None:
        """Called before the first batch of an epoch."""

    def prepare(self, batch: Batch) -> Batch:
        """The batch, which a routine may change."""
        return batch

    def forwards(self, batch: Batch, planned: list[Forward]) -> list[Forward]:
        """The forward passes of a step: those `planned` so far (first, the batch), and new ones."""
        return planned

    def context(self) -> dict[str, Any]:
        """Keyword arguments for the objective, besides outputs and labels."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """The state that a continued run needs, as tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any], loop: Loop) -> None:
        """Restore the state; called before network and optimisers load theirs."""

    def resume(self, loop: Loop) -> None:
        """Called instead of `begin_epoch` when a run continues in the middle of an epoch."""
