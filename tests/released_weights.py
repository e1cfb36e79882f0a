"""Weights of released networks, as the fixtures' README rebuilds them from their keys."""

from __future__ import annotations

import torch
from parity_inputs import rebuilt


def released_tensor(key: str, shape: tuple[int, ...]) -> torch.Tensor:
    """The tensor of a state_dict: float32, and int64 where batches are counted."""
    values = torch.from_numpy(rebuilt(key, shape))
    return values.long() if key.endswith("num_batches_tracked") else values.float()
