"""Direct implementations of the papers, with which our losses and layers are compared."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from net import bn_inception, layers, resnet


def proxy_terms(similarity: Tensor, labels: Tensor, margin: float | Tensor, alpha: float) -> Tensor:
    """Both terms of Proxy-Anchor with full masks and exponentials; similarity (B, C)."""
    positive = F.one_hot(labels, similarity.shape[1]).bool()
    zero = torch.zeros_like(similarity)
    pull = torch.where(positive, torch.exp(-alpha * (similarity - margin)), zero).sum(dim=0)
    push = torch.where(positive, zero, torch.exp(alpha * (similarity + 0.1))).sum(dim=0)
    present = positive.any(dim=0).sum()
    return torch.log(1 + pull).sum() / present + torch.log(1 + push).mean()


def _conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    return norm(conv(x))


def _conv_norm_relu(
    x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, shortcut: Tensor | None = None
) -> Tensor:
    maps = norm(conv(x))
    return F.relu(maps if shortcut is None else maps + shortcut, inplace=True)


def _average_conv_norm_relu(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    return F.relu(norm(conv(F.avg_pool2d(x, 3, 1, 1))), inplace=True)


def _max_pool(x: Tensor, stride: int, padding: int = 0, ceil_mode: bool = False) -> Tensor:
    return F.max_pool2d(x, 3, stride, padding, ceil_mode=ceil_mode)


@contextlib.contextmanager
def modules_one_by_one() -> Iterator[None]:
    """Within it, a network calls convolution, BatchNorm and pooling as separate modules."""
    plain = {
        "conv_norm": _conv_norm,
        "conv_norm_relu": _conv_norm_relu,
        "average_conv_norm_relu": _average_conv_norm_relu,
        "max_pool": _max_pool,
    }
    with contextlib.ExitStack() as stack:
        for module in (layers, bn_inception, resnet):
            names = {name: each for name, each in plain.items() if hasattr(module, name)}
            stack.enter_context(mock.patch.multiple(module, **names))
        yield
