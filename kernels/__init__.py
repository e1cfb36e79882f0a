"""Triton kernels for GPUs, and whether they can be used.

torch's Linux packages for GPUs bring Triton along. It compiles a kernel when it is first used, a
second or so each, and keeps what it compiled in the user's folder. Where it cannot, or there is no
GPU, the callers compute the same with torch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from utils import first_line

logger = logging.getLogger(__name__)


def launch(kernel: str, programs: int, *arguments: Any, **constants: Any) -> None:
    """Runs a kernel on the GPU of its first argument.

    Args:
        kernel: its module in this folder and its name, as in `maps.bias_forward`.
        programs: how many of it run. arguments, constants: its own.
    """
    # Otherwise Triton 3.9 warns that its default will change.
    constants["enable_fp_fusion"] = True
    with torch.cuda.device_of(arguments[0]):
        _kernel(kernel)[(programs,)](*arguments, **constants)


@functools.cache
def _kernel(path: str) -> Any:
    """Imports the kernel's module, which is possible only where there is Triton."""
    module, name = path.split(".")
    return getattr(importlib.import_module(f".{module}", __name__), name)


@functools.cache
def usable(device: torch.device) -> bool:
    """Whether kernels can be compiled for this device, and one of them gives the right numbers.

    Not so on a CPU, on an old GPU, or without a C compiler, which Triton needs; of the last two a
    warning says what is missing.
    """
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    maps = torch.arange(-6.0, 6.0, device=device).reshape(4, 3)
    bias = torch.tensor([1.0, 0.0, -1.0], device=device)

    def found() -> Tensor:
        out = maps.clone()
        how = {"SHORTCUT": False, "RELU": True, "ROWS": 16, "CHANNELS": 16}
        launch("maps.bias_forward", 1, out, bias, out, *out.shape, **how)
        return out

    return agree(found, (maps + bias).relu())


def agree(found: Callable[[], Tensor], expected: Tensor, tolerance: float = 0.0) -> bool:
    """Whether a kernel gives the expected numbers; a warning says if not, or if it fails.

    Args:
        found: calls the kernel. expected: what torch alone computes. tolerance: absolute.
    """
    try:
        off = (found() - expected).abs().max().item()
        if off <= tolerance:
            return True
        trouble = f"numbers are off by {off:.3g}"
    except Exception as error:  # whatever a compiler, a linker or a driver raises
        trouble = f"{type(error).__name__}: {first_line(error)}"
    logger.warning(
        "a Triton kernel cannot be used on %s, which makes it slower: %s", expected.device, trouble
    )
    return False
