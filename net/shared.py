"""BatchNorm, dropout and stochastic depth for a batch that is divided among several processes.

A BatchNorm normalises with the statistics of all images of the batch (Ioffe and Szegedy, 2015), and
a dropout draws its mask for all of them, although each process has only a part. On GPUs, torch's
SyncBatchNorm does the former; it has no CPU version.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import processes
from net.depth import DropPath


def share_batches(network: nn.Module) -> None:
    """Replace layers that depend on the whole batch by versions for several processes, in place."""
    for module in network.modules():
        for plain, shared in SHARED.items():
            if type(module) is plain:
                # Only the class changes: names, parameters and buffers stay.
                module.__class__ = shared
                module.process_group = None


class _SharedNorm(nn.SyncBatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        """(n, C, …), this process's part of the batch → the same shape."""
        if x.is_cuda or not self.training:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        mean, variance, count = _statistics(x.float())
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        shape = (1, -1, *[1] * (x.dim() - 2))
        return torch.addcmul(shift.view(shape), x.float(), scale.view(shape)).to(x.dtype)


def _statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and biased variance of each channel over all processes, (C,) each, and the count."""
    others = [dim for dim in range(x.dim()) if dim != 1]
    own = x.new_full((1,), x.numel() // x.shape[1])
    sums = processes.sum_over(torch.cat([x.sum(others), own]))
    mean, count = sums[:-1] / sums[-1], sums[-1].detach()
    deviations = x - mean.view(1, -1, *[1] * (x.dim() - 2))
    return mean, processes.sum_over(deviations.square().sum(others)) / count, count


class SharedBatchNorm1d(nn.BatchNorm1d, _SharedNorm):
    """`nn.BatchNorm1d` over the images of all processes."""


class SharedBatchNorm2d(nn.BatchNorm2d, _SharedNorm):
    """`nn.BatchNorm2d` over the images of all processes."""


class SharedDropout(nn.Dropout):
    """`nn.Dropout` whose draws are those of the whole batch, in every process."""

    def forward(self, x: Tensor) -> Tensor:
        """(n, …), this process's part of the batch → the same shape."""
        if not self.training or self.p == 0:
            return x
        return x * _own_draws(x, x.shape[1:], self.p)


class SharedDropPath(DropPath):
    """`DropPath` whose draws are those of the whole batch, in every process."""

    def draw(self, x: Tensor) -> Tensor:
        """The factor of each image of this process, (n, 1, …)."""
        return _own_draws(x, [1] * (x.dim() - 1), self.p)


def _own_draws(x: Tensor, shape: Sequence[int], p: float) -> Tensor:
    """This process's part (n, *shape) of a dropout's factors for the whole batch."""
    sizes = torch.zeros(processes.world(), dtype=torch.int64)
    sizes[processes.rank()] = len(x)
    dist.all_reduce(sizes)
    before = int(sizes[: processes.rank()].sum())
    whole = F.dropout(x.new_ones(int(sizes.sum()), *shape), p)
    return whole[before : before + len(x)]


SHARED: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: SharedBatchNorm1d,
    nn.BatchNorm2d: SharedBatchNorm2d,
    nn.Dropout: SharedDropout,
    DropPath: SharedDropPath,
}
