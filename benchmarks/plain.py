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

from net import layers


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


def _average_conv_norm(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d) -> Tensor:
    return norm(conv(F.avg_pool2d(x, 3, 1, 1)))


@contextlib.contextmanager
def modules_one_by_one() -> Iterator[None]:
    """Within it, a network calls convolution, BatchNorm and pooling as separate modules."""
    with (
        mock.patch.object(layers, "conv_norm", _conv_norm),
        mock.patch("net.bn_inception.conv_norm", _conv_norm),
        mock.patch("net.bn_inception.average_conv_norm", _average_conv_norm),
        mock.patch("net.resnet.conv_norm", _conv_norm),
    ):
        yield
