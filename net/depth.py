"""Stochastic depth and recomputation (gradient checkpointing) of a backbone's blocks."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from net.blocks import Block
from utils import InputError

_BRANCH = re.compile(r"drop_path\d*")


class DropPath(nn.Module):
    """Drops a residual branch for a share `p` of the images: Huang et al., ECCV 2016.

    The others are divided by 1 - p, so that the mean does not change.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        """(B, …) → the same shape; has no effect in evaluation mode."""
        if not self.training or self.p == 0:
            return x
        return x * self.draw(x)

    def draw(self, x: Tensor) -> Tensor:
        """The factor of each image of the batch, (B, 1, …)."""
        return F.dropout(x.new_ones(len(x), *[1] * (x.dim() - 1)), self.p)


def set_drop_path(module: nn.Module, blocks: Sequence[Block], rate: float) -> None:
    """Gives the residual branches of a backbone stochastic depth, from 0 linearly up to `rate`.

    Args:
        module: the backbone. blocks: all its blocks, the stem first.

    Raises:
        InputError: it has no residual branches above its first block.
    """
    modules = dict(module.named_modules())
    inner = [[modules[name] for name in block if name in modules] for block in blocks[1:]]
    found = False
    for place, parts in enumerate(inner):
        share = rate * place / max(1, len(inner) - 1)
        for part in [part for each in parts for part in each.modules()]:
            for name in [*part.__dict__, *dict(part.named_children())]:
                # Only None or a module: some blocks have the rate itself under this name.
                if _BRANCH.fullmatch(name) and isinstance(getattr(part, name), nn.Module | None):
                    setattr(part, name, DropPath(share))
                    found = found or share > 0
    if not found:
        raise InputError(
            f"--drop-path {rate:g}: this network has no residual branches above its first block "
            "that can be left out; use 0, or a model of timm that has them (--model timm:NAME)"
        )


# --- recomputation --------------------------------------------------------------------------------


def recompute_blocks(module: nn.Module, blocks: Sequence[Block]) -> None:
    """Stores only the inputs of blocks for the backward pass, which computes the blocks again.

    Gradients, random draws and running statistics are those without it: Chen et al., "Training Deep
    Nets with Sublinear Memory Cost", 2016.

    Args:
        module: the backbone. blocks: those of its blocks that train.

    Raises:
        InputError: its blocks are no modules.
    """
    modules = dict(module.named_modules())
    parts = [modules[name] for block in blocks for name in block if name in modules]
    parts = [part for part in parts if next(part.children(), None) is not None]
    if not parts:
        raise InputError(
            "--grad-checkpointing: the blocks of this network are not modules that could be "
            "computed by themselves; leave it out, or use a smaller --batch-size"
        )
    for part in parts:
        part.forward = _Recomputed(part)


class _Recomputed:
    """The forward pass of a block, whose activations are recomputed in the backward pass."""

    def __init__(self, block: nn.Module) -> None:
        self.inner = block.forward
        kind = nn.modules.batchnorm._BatchNorm
        self.norms = [part for part in block.modules() if isinstance(part, kind)]

    def __call__(self, *inputs: object, **named: object) -> object:
        if not torch.is_grad_enabled():
            return self.inner(*inputs, **named)
        if any(norm.training for norm in self.norms):  # only then: torch.compile takes no contexts
            named["context_fn"] = lambda: (contextlib.nullcontext(), _put_back(self.norms))
        return checkpoint(self.inner, *inputs, use_reentrant=False, **named)


@contextlib.contextmanager
def _put_back(norms: Sequence[nn.Module]) -> Iterator[None]:
    """Let BatchNorms update copies of their running statistics, which include the batch already."""
    before = [dict(norm._buffers) for norm in norms]
    for norm, buffers in zip(norms, before, strict=True):
        norm._buffers |= {name: b if b is None else b.clone() for name, b in buffers.items()}
    try:
        yield
    finally:
        for norm, buffers in zip(norms, before, strict=True):
            norm._buffers |= buffers
