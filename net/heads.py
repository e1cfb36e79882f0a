"""What stands on the backbone: pooling, and the linear heads that turn features into embeddings.

`embedding` is the main head of every method; `uncertainty` is IDML's, `specific` (class-specific)
DDML's, where it and the main head give a mean and a deviation each and are twice as wide.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from utils import InputError

HEADS = ("embedding", "uncertainty", "specific")
POOLINGS = {"avg+max": 1, "avg": 1, "max": 1, "grid": 4}
"""Name → cells along each side of the pooled map; the features of all cells follow each other."""
HEAD_INITS = ("kaiming", "default")


def pool(maps: Tensor, pooling: str) -> Tensor:
    """Feature maps (B, F, h, w) → features (B, F), in float32; (B, 16F) for `grid`.

    `avg`: global average; `max`: global maximum; `avg+max`: their sum, as Proxy-Anchor has it;
    `grid`: the average in each cell of 4 × 4, for things that always stand upright.
    """
    maps, cells = maps.float(), POOLINGS[pooling]
    average = F.adaptive_avg_pool2d(maps, cells) if pooling != "max" else 0.0
    maximum = F.adaptive_max_pool2d(maps, cells) if "max" in pooling else 0.0
    return (average + maximum).flatten(1)


def head_sizes(heads: tuple[str, ...], embedding_size: int) -> dict[str, int]:
    """The output size of each head: 2d for the two heads of a disentangled network, else d.

    Raises:
        InputError: unknown or repeated heads, or no `embedding` among them.
    """
    if not set(heads) <= set(HEADS) or "embedding" not in heads or len(set(heads)) < len(heads):
        raise InputError(
            f"heads {', '.join(heads) or '(none)'}: there must be embedding, and beside it at most "
            "uncertainty and specific, each once"
        )
    doubled = {"embedding", "specific"} if "specific" in heads else set()
    return {head: embedding_size * (2 if head in doubled else 1) for head in heads}


UNCERTAINTY_SCALE = 0.01
"""IDML's similarity vanishes for a large uncertainty: its head starts with ‖u‖² around 1."""


def make_head(features: int, size: int, init: str, scale: float = 1.0) -> nn.Linear:
    """A linear head F → size.

    `init` is `kaiming` (Kaiming-normal by fan_out, zero bias: Proxy-Anchor and all that is built
    on it) or `default` (PyTorch's own: spherical embeddings, divide and conquer); `scale` times
    the weights it starts with.
    """
    head = nn.Linear(features, size)
    if init == "kaiming":
        nn.init.kaiming_normal_(head.weight, mode="fan_out")
        nn.init.zeros_(head.bias)
    with torch.no_grad():
        head.weight.mul_(scale)
    return head
