"""The running mean of a network's weights, beside the weights that train (Polyak, 1990).

    mean ← dₜ mean + (1 - dₜ) weights,    dₜ = min(d, (1 + t) / (10 + t)),    t = 0, 1, 2, …

after every step that counts. Without the growing dₜ, a mean with d = .999 would hold 37 % of the
random weights of its start after 1,000 steps, which is a whole run on a small data set; with it
none are left after the first hundred.

BatchNorm's running statistics are averaged like the weights they belong to; whole numbers are
copied. The criterion is not evaluated and has no mean, and neither has a base that never trains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Average:
    """The mean of the weights and buffers of a network, on their device; starts as a copy.

    Where a tensor has changed its shape, as masks do when they are split, its mean starts anew.
    Several processes have the same weights, and so the same mean.

    Args:
        weights: gives them as they are, by name: `EmbeddingNet.trained_state`.
        decay: d, above 0 and below 1.
    """

    def __init__(self, weights: Callable[[], Mapping[str, Tensor]], decay: float) -> None:
        self.weights = weights
        self.decay = decay
        self.updates = 0
        self.tensors = {name: value.clone() for name, value in weights().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights as they are after a step."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        means, values = [], []
        for name, value in self.weights().items():
            if value.shape != self.tensors[name].shape:
                self.tensors[name] = value.clone()
            elif value.is_floating_point():
                means.append(self.tensors[name])
                values.append(value)
            else:
                self.tensors[name].copy_(value)
        torch._foreach_lerp_(means, values, 1 - decay)
        self.updates += 1

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """While entered, the mean and the weights have changed places, bit by bit."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for name, value in self.weights().items():
            kept = value.clone()
            value.copy_(self.tensors[name])
            self.tensors[name].copy_(kept)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"ema_state_dict": dict(self.tensors), "ema_updates": self.updates}

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Goes on from `state()`; the network has its own weights of that moment.

        Masks that were split after the last step have more rows than their mean. The mean is kept
        as it is then, and starts anew with the next step.

        Raises:
            ValueError: it is the mean of another network.
        """
        stored, own = checkpoint["ema_state_dict"], self.weights()
        if stored.keys() != own.keys():
            raise ValueError("its running mean is of another network")
        for name, value in own.items():
            mean = stored[name]
            if mean.shape[1:] != value.shape[1:] or mean.dtype != value.dtype:
                raise ValueError(f"its running mean of {name} does not fit the network")
            like = value if mean.shape == value.shape else mean.to(value.device)
            self.tensors[name] = like.clone().copy_(mean)
        self.updates = int(checkpoint["ema_updates"])
