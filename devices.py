"""Random states, devices, precision, and the description of a run's environment."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import random
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from terminal import as_shell
from utils import InputError, counted, first_line, is_full_gpu

# --- randomness, device, precision ----------------------------------------------------------------


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seeds Python, NumPy and torch; `deterministic` also fixes the GPU's algorithms."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False


def random_states() -> dict:
    """All random states of this process, as values that torch.load(weights_only=True) accepts."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        # Of this process's GPU alone: the other processes of a run draw the same on theirs.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict) -> None:
    """Restores the result of `random_states`."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0])


def pick_device(gpu_id: int) -> torch.device:
    """The device for `--gpu-id N`: that GPU (-1: the first one), or the CPU if there are no GPUs.

    Raises:
        InputError: the machine has GPUs, but not this one, or CUDA cannot compute on it.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if gpu_id >= (count := torch.cuda.device_count()):
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        has = "this machine has" if visible is None else f"CUDA_VISIBLE_DEVICES={visible} leaves"
        raise InputError(
            f"--gpu-id {gpu_id}: {has} {counted(count, 'GPU')}, numbered from 0; choose one of them"
        )
    device = torch.device("cuda", max(gpu_id, 0))
    try:
        torch.cuda.set_device(device)
        torch.zeros(1, device=device)  # set_device alone does not initialise it
    except RuntimeError as error:
        if is_full_gpu(error):
            raise
        raise InputError(
            f"GPU {device.index} cannot be used: {first_line(error)}; choose another (--gpu-id N, "
            'in Python device="cuda:N"), name the GPUs or MIG parts that may be used in '
            "CUDA_VISIBLE_DEVICES (nvidia-smi -L lists them), or compute on the CPU: "
            "CUDA_VISIBLE_DEVICES= before the command"
        ) from error
    return device


def device_named(name: str | torch.device) -> torch.device:
    """The device that a program names as torch does: `cpu`, `cuda`, `cuda:1`.

    Raises:
        InputError: torch cannot compute on it here.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
        if isinstance(error, RuntimeError) and is_full_gpu(error):
            raise
        if str(name).startswith("cuda") and not torch.cuda.is_available():
            why = "this machine has no GPU that torch can use"
        else:
            why = f"torch cannot use it here ({first_line(error)})"
        raise InputError(f"device {name}: {why}; use cpu, or leave it out") from error
    return device


def on_device(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy of a small array in the host's memory on a device, without waiting for a busy GPU.

    A copy from memory that is not pinned would wait for all earlier work of its stream.
    """
    tensor = torch.as_tensor(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def with_host_copy(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """``on_device``, with a copy in the host's memory as the attribute ``host`` of the result.

    Reading a number from that copy does not wait for a GPU.
    """
    tensor = on_device(values, device)
    tensor.host = torch.as_tensor(values).detach()  # or on a CPU the tensor would hold itself
    return tensor


def bf16_is_fast(device: torch.device) -> bool:
    """Whether the hardware has bfloat16 arithmetic (Ampere and later; AVX512-BF16, AMX)."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    # Not all versions of torch that we support have a public query for these instructions.
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(_cpu_says("flags").split())


def _cpu_says(key: str) -> str:
    """The entry of Linux's /proc/cpuinfo under a key; "" if there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}
"""The precisions of `Precision` by name."""


class Precision:
    """The device and the precision (`--amp auto|bf16|fp16|off`) of the network's arithmetic.

    The network runs under autocast; losses and proxies stay float32 (they get `.float()` outputs).

    Raises:
        InputError: fp16 on a CPU, or an unknown precision.
    """

    def __init__(self, amp: str, device: torch.device) -> None:
        if amp == "auto":
            amp = "bf16" if bf16_is_fast(device) else "off"
        if amp not in DTYPES:
            raise InputError(f"precision {amp} is unknown; use auto, {', '.join(DTYPES)} (amp=)")
        if amp == "fp16" and device.type != "cuda":
            raise InputError("fp16 needs a GPU; on a CPU use bf16 or off (--amp, in Python amp=)")
        self.name = amp
        self.device = device
        self.dtype = DTYPES[amp]
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        # oneDNN and cuDNN need channels_last to be fast in reduced precision; for float32 on a CPU
        # it is as fast as the other layout.
        self.memory_format = torch.channels_last
        if device.type == "cuda":
            mend_average_pooling(device)

    def shared(self) -> dict[str, str]:
        """Settings, by name, that must be the same in all processes that compute together."""
        return {
            "their torch": torch.__version__,
            "their device": self.device.type,
            "their precision": self.name,
        }

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which the network's forward runs."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.name != "off")


# --- a fault of torch ---


@functools.cache
def mend_average_pooling(device: torch.device) -> torch.library.Library | None:
    """Replaces torch's gradient of padded average pooling on a kind of device, if it is wrong.

    In torch 2.11, for one, a GPU's gradients of channels-last maps are shifted by the padding,
    without a word (https://github.com/pytorch/pytorch/issues/188344); Res2Net, ResNeSt, PoolFormer
    and the Inceptions have such layers. The replacement computes them on contiguous maps.

    Returns:
        The replacement, which lasts as long as this object (kept by the cache); None if all is
        well.
    """
    if _averages_have_right_gradients(device):
        return None
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that its own kernel is replaced
        library.impl("avg_pool2d_backward", gradient_of_averages, device.type.upper())
    return library


def _averages_have_right_gradients(device: torch.device) -> bool:
    maps = torch.arange(36.0, device=device).reshape(1, 2, 3, 6)
    weights = maps.square()
    found = []
    for form in (torch.contiguous_format, torch.channels_last):
        leaf = maps.clone(memory_format=form).requires_grad_()
        averages = F.avg_pool2d(leaf, kernel_size=3, stride=1, padding=1)
        found += torch.autograd.grad((averages * weights).sum(), leaf)
    return torch.allclose(*found)


def gradient_of_averages(
    gradient: Tensor,
    maps: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """`aten::avg_pool2d_backward` by the kernel for contiguous maps, which is right."""
    if any(padding):
        gradient, maps = gradient.contiguous(), maps.contiguous()
    found = torch.empty_like(maps)
    how = (kernel_size, stride, padding, ceil_mode, count_include_pad, divisor_override)
    return torch.ops.aten.avg_pool2d_backward.grad_input(gradient, maps, *how, grad_input=found)


# --- the environment of a run ---------------------------------------------------------------------


def environment(device: torch.device) -> dict:
    """Versions, hardware and the state of the code, for `environment.json`."""
    return {
        "python": platform.python_version(),
        "packages": versions(),
        "platform": platform.platform(),
        "device": device_name(device),
        "cpu_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "git_commit": git_commit(),
        "command": as_shell(*sys.orig_argv[1:]),
    }


@functools.cache  # otherwise each save of a checkpoint would read seven files again
def versions() -> dict[str, str]:
    """The versions of the installed packages that a run's numbers may depend on."""
    from importlib import metadata

    packages, names = {}, "torch torchvision numpy scipy pillow pytorch-metric-learning timm"
    for name in names.split():
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return packages


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = _cpu_says("model name") or platform.processor() or platform.machine()
    return f"{model}, {counted(torch.get_num_threads(), 'thread')}"


@functools.cache  # every checkpoint holds it, and git takes longer than saving
def git_commit() -> str | None:
    """The commit of the code, with `+changes` if files differ from it; None outside git."""
    here = Path(__file__).resolve().parent
    if not (here / ".git").exists():  # installed: the repository around it is somebody else's
        return None

    def git(*words: str) -> str:
        return subprocess.run(
            ["git", *words], cwd=here, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None
