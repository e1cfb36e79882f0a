"""The float32 products that all metrics and k-means use, and checks of the numbers given."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

Array = Tensor | np.ndarray

# torch's operator for oneDNN's float32 product, which torch.compile uses too. Unlike
# `F.linear(a.to_mkldnn(), b).to_dense()`, which gives the same numbers, it copies no matrix.
ONEDNN_PRODUCT = getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@contextmanager
def full_float32(device: torch.device) -> Iterator[None]:
    """A context in which float32 products are real float32: no TF32, no bfloat16, no autocast."""
    backends = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(backends, before, strict=True):
            backend.fp32_precision = precision


def inner_products(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a (n, d), b (m, d), both float32 -> a·bᵀ (n, m), in `out` if given."""
    # With AVX-512, oneDNN is twice as fast as the BLAS behind `@` on AMD and its equal on Intel.
    if (
        ONEDNN_PRODUCT is not None
        and a.device.type == "cpu"
        and len(b) >= 64
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    ):
        found = ONEDNN_PRODUCT(a, b, None, "none", [], "")
        return found if out is None else out.copy_(found)
    return torch.mm(a, b.T, out=out)


def as_numbers(values: Array, demand: str) -> Tensor:
    """Real numbers as a tensor, without copying: given as a tensor, or anything numpy can read.

    Raises:
        ValueError: they are no real numbers; the message is `demand`, and what they are instead.
    """
    if isinstance(values, Tensor):
        x = values
    else:
        try:
            x = _as_tensor(np.asarray(values))
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:  # text, ragged, ...
            raise ValueError(f"{demand}.") from error
    if x.is_complex():
        raise ValueError(f"{demand}, not {said_of(x)}.")
    return x


def _as_tensor(array: np.ndarray) -> Tensor:
    """An array as a tensor; copied only if torch cannot read it in place."""
    readable = array.dtype.isnative and all(stride >= 0 for stride in array.strides)
    if not readable:  # such as array[::-1], or a foreign byte order
        array = array.astype(array.dtype.newbyteorder("="))
    with warnings.catch_warnings():  # about read-only arrays, such as those of pandas
        warnings.filterwarnings("ignore", "The given NumPy array is not writable")
        return torch.from_numpy(array)


def said_of(x: Tensor) -> str:
    """Type and shape of a tensor, for an error."""
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"
