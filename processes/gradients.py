"""Gradients of several processes, combined so that they equal those of a single one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from processes.group import is_group, is_main
from processes.rows import share_of, with_gradient

BUCKET_BYTES = 2**25


def once(tensor: Tensor) -> Tensor:
    """The same tensor, whose gradient counts in the main process only; `processes` says why."""
    return with_gradient(tensor, _of_main)


def count_once(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Makes gradients of the loss's own parameters count in the main process only.

    Divided parameters are left out, because each process has different rows of them.
    """
    if not is_group():
        return
    for parameter in parameters:
        if parameter.requires_grad and share_of(parameter) is None:
            parameter.register_hook(_of_main)


def _of_main(gradient: Tensor) -> Tensor:
    return gradient if is_main() else torch.zeros_like(gradient)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Sums `.grad` over processes, in place; all must pass the parameters in the same order.

    Divided parameters are left out, because each process has different rows of them.
    """
    if not is_group():
        return
    under_way = []
    whole = (p for p in parameters if share_of(p) is None)
    for bucket in _buckets(p.grad for p in whole if p.grad is not None):
        flat = torch.cat([gradient.reshape(-1) for gradient in bucket])
        under_way.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in under_way:
        work.wait()
        sizes = [gradient.numel() for gradient in bucket]
        for gradient, total in zip(bucket, flat.split(sizes), strict=True):
            gradient.copy_(total.view(gradient.shape))


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Groups consecutive tensors of one type and device into messages of about `BUCKET_BYTES`."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        alike = bucket and (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        full = sum(t.numel() * t.element_size() for t in bucket) >= BUCKET_BYTES
        if bucket and (full or not alike):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
