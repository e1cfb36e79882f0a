"""Pooling, and the linear heads that turn features into embeddings.

`embedding` is the main head of every method; `uncertainty` is IDML's. `specific` (class-specific)
is DDML's: with it both heads are twice as wide, because each gives a mean and a deviation, and the
specific head takes the raw output of the main one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from net import fused
from net.choices import POOLINGS
from utils import InputError

HEADS = {
    "embedding": "embedding",
    "uncertainty": "uncertainty",
    "specific": "embedding_specific",
}
"""Each head's name → the name of its layer in the released state_dicts."""
HEAD_KEYS = tuple(f"{key}." for key in (*HEADS.values(), "head_norm"))
"""The prefixes of the state_dict's keys of the heads, and of the norm before them."""
GEM_START = 3.0
"""The initial power of generalised mean pooling."""

WHOLE = ("avg", "max", "avg+max")
"""Poolings over all places of a map."""

Init = Callable[[Tensor], object]


def head_init(name: str) -> tuple[Init | None, float | None]:
    """How a head's weights and biases are initialised, by the name of `--head-init`.

    `kaiming`: normal by fan_out with zero bias (Proxy-Anchor and methods built on it);
    `orthogonal`: orthonormal rows (or columns, if there are fewer), zero bias (Hyp-ViT, HIER);
    `default` and `pt_splitted`: PyTorch's own; `xavier_uniform_GAIN`, `xavier_normal_GAIN`,
    `kaiming_normal_fan_in`, `kaiming_normal_fan_out` with PyTorch's own biases; `trunc_normal`:
    standard deviation .1, cut at two of them, biases .1.

    Returns:
        A function that fills the weights, and the value of the biases; None leaves PyTorch's own.

    Raises:
        InputError: an unknown name, or a gain that is no positive number.
    """
    if name in ("default", "pt_splitted"):
        return None, None
    if name == "kaiming":
        return partial(nn.init.kaiming_normal_, mode="fan_out"), 0.0
    if name == "orthogonal":
        return nn.init.orthogonal_, 0.0
    if name == "trunc_normal":
        return partial(nn.init.trunc_normal_, std=0.1, a=-0.2, b=0.2), 0.1
    if name in ("kaiming_normal_fan_in", "kaiming_normal_fan_out"):
        mode = name.removeprefix("kaiming_normal_")
        return partial(nn.init.kaiming_normal_, mode=mode, nonlinearity="linear"), None
    kinds = {"xavier_uniform": nn.init.xavier_uniform_, "xavier_normal": nn.init.xavier_normal_}
    match = re.fullmatch(r"(xavier_uniform|xavier_normal)(?:_(\d*\.?\d+))?", name)
    if match is None:
        raise InputError(
            f"--head-init {name} is unknown; use kaiming, default, orthogonal, "
            "xavier_uniform_GAIN, xavier_normal_GAIN, kaiming_normal_fan_in, "
            "kaiming_normal_fan_out, trunc_normal or pt_splitted"
        )
    return partial(kinds[match[1]], gain=float(match[2] or 1)), None


class Pool(nn.Module):
    """Feature maps (B, F, h, w) → features (B, F), float32 or wider; (B, 16F) for `grid`.

    `avg`: global average; `max`: global maximum; `avg+max`: their sum, as in Proxy-Anchor; `grid`:
    the average in each cell of a 4 × 4 grid, for objects that are always upright; `gem`:
    generalised mean (Radenović et al., TPAMI 2019), (mean x^p)^(1/p) over x ≥ 1e-6, with one
    trained p, initially 3. For `cls` and `attention` the maps have one cell.
    """

    def __init__(self, pooling: str) -> None:
        super().__init__()
        self.pooling = pooling
        self.p = nn.Parameter(torch.tensor([GEM_START])) if pooling == "gem" else None

    def forward(self, maps: Tensor) -> Tensor:
        """(B, F, h, w) → (B, F)."""
        if self.pooling in WHOLE and fused.fits(maps) and fused.is_plain(maps):
            return fused.pool(maps, average="avg" in self.pooling, maximum="max" in self.pooling)
        maps = maps.to(torch.promote_types(maps.dtype, torch.float32))
        if self.p is not None:
            return maps.clamp(min=1e-6).pow(self.p).mean((2, 3)).pow(1 / self.p)
        cells = POOLINGS[self.pooling]
        average = F.adaptive_avg_pool2d(maps, cells) if self.pooling != "max" else 0.0
        maximum = _maximum(maps) if "max" in self.pooling else 0.0
        return (average + maximum).flatten(1)


def _maximum(maps: Tensor) -> Tensor:
    # Both give the same numbers. With equal maxima, the first gives the whole gradient to one of
    # them; the second is the only one that the ONNX export of torch 2.11 supports.
    if torch.is_grad_enabled():
        return F.adaptive_max_pool2d(maps, 1)
    return maps.amax((2, 3), keepdim=True)


def head_sizes(heads: tuple[str, ...], embedding_size: int) -> dict[str, int]:
    """The output size of each head: 2d for the two heads of a disentangled network, else d.

    Raises:
        InputError: unknown or repeated heads, or no `embedding` among them.
    """
    if not set(heads) <= HEADS.keys() or "embedding" not in heads or len(set(heads)) < len(heads):
        raise InputError(
            f"heads {', '.join(heads) or '(none)'}: name embedding and, if wanted, uncertainty and "
            "specific, each once"
        )
    doubled = {"embedding", "specific"} if "specific" in heads else set()
    return {head: embedding_size * (2 if head in doubled else 1) for head in heads}


def make_norm(kind: bool | str, features: int) -> nn.Module | None:
    """The norm before the heads, as `Architecture.head_norm` says: (B, F) → (B, F), or None."""
    if isinstance(kind, str):
        return nn.LayerNorm(features, elementwise_affine=kind == "layer")
    return nn.BatchNorm1d(features) if kind else None


UNCERTAINTY_SCALE = 0.01
"""Initial scale of the uncertainty head, for ‖u‖² around 1: IDML's similarity vanishes for large u.
"""


def make_head(features: int, size: int, init: str, scale: float = 1.0, parts: int = 1) -> nn.Linear:
    """A linear head F → size, initialised by `init`, a name of `head_init`.

    Args:
        features: F. size: of the output.
        scale: a factor for the initial weights.
        parts: the number of equal parts of the rows that are initialised as if each were a layer of
            its own (divide and conquer: one per cluster).
    """
    head = nn.Linear(features, size)
    start_weight, start_bias = head_init(init)
    with torch.no_grad():
        if start_weight is not None:
            for rows in head.weight.tensor_split(min(parts, size)):
                start_weight(rows)
        if start_bias is not None:
            head.bias.fill_(start_bias)
        head.weight.mul_(scale)
    return head


_CLASSIFIERS = ("fc.", "_fc.", "last_linear.", "aux1.", "aux2.")


def classifiers(weights: Iterable[str], own: Collection[str]) -> set[str]:
    """The keys of classifiers in a released file, which the network does not have."""
    return {
        key
        for key in weights
        if key not in own and key.removeprefix("model.").startswith(_CLASSIFIERS)
    }
