"""The running mean of a network's weights, beside the weights that train (Polyak, 1990).

    mean ← dₜ mean + (1 - dₜ) weights,    dₜ = min(d, (1 + t) / (10 + t)),    t = 0, 1, 2, …

after every step that is not skipped. If dₜ did not grow, a mean with d = .999 would still hold 37 %
of its random starting weights after 1,000 steps, a whole run on a small data set. With the growing
dₜ none of them are left after the first hundred steps.

BatchNorm's running statistics are averaged like the weights they belong to; integers are copied.
There is no mean of the criterion, which is not evaluated, nor of a base that never trains.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


class Average:
    """The mean of a network's weights and buffers, on their device; starts as a copy of them.

    When a tensor changes its shape, as masks do when they are split, its mean starts again.
    Processes that train together have the same weights, and so the same mean.

    Args:
        weights: returns the current weights by name: `EmbeddingNet.trained_state`.
        decay: d, above 0 and below 1.
    """

    def __init__(self, weights: Callable[[], Mapping[str, Tensor]], decay: float) -> None:
        self.weights = weights
        self.decay = decay
        self.updates = 0
        self.tensors = {name: value.clone() for name, value in weights().items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights that a step has left."""
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
        """Swaps the mean and the weights inside the `with`, without changing a bit of either."""
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
        """Continues from `state()`, with the network's weights of the same moment loaded already.

        Masks that were split after the last step have more rows than their mean. Such a mean is
        kept until the next step, with which it starts again.

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
