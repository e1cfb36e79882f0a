"""Where and how a run computes: random states, the device, precision, and what it ran on."""

from __future__ import annotations

import contextlib
import functools
import os
import platform
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

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
    """Every random state of this process, as values that `weights_only` can load."""
    version, internal, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        # This process's GPU alone: processes that share a run draw alike, each on its own.
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict) -> None:
    """Puts back what `random_states` returned."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"][0])


def pick_device(gpu_id: int) -> torch.device:
    """`--gpu-id N`: that GPU; without one the CPU. -1 takes the first GPU.

    Raises:
        InputError: GPU `gpu_id` is asked for on a machine that has GPUs, but not that one, or CUDA
            cannot compute on it.
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
        torch.zeros(1, device=device)  # only now does CUDA begin to use it
    except RuntimeError as error:
        if is_full_gpu(error):
            raise
        raise InputError(
            f"GPU {device.index} cannot be used: {first_line(error)}; choose "
            "another --gpu-id, name the GPUs or MIG parts that may be used in "
            "CUDA_VISIBLE_DEVICES (nvidia-smi -L lists them), or compute on the CPU: "
            "CUDA_VISIBLE_DEVICES= before the command"
        ) from error
    return device


def on_device(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """A small array of the host's memory on the device, without waiting for a GPU that is busy.

    From ordinary memory a copy waits until its stream has done all that was asked of it before.
    """
    tensor = torch.as_tensor(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def with_host_copy(values: np.ndarray | torch.Tensor, device: torch.device) -> torch.Tensor:
    """``on_device``; the result's ``host`` is the same in the host's memory.

    To read a number from that waits for no GPU.
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
    # torch has no public query for these instructions in all versions that we admit.
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(_cpu_says("flags").split())


def _cpu_says(key: str) -> str:
    """What Linux says of the CPU under a key; "" where it says nothing."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == key:
                return value.strip()
    return ""


class Precision:
    """Where the network's arithmetic runs: `--amp auto|bf16|fp16|off` on a device.

    The network runs under autocast; losses and proxies stay float32 (they see `.float()` outputs).

    Raises:
        InputError: fp16 on a CPU.
    """

    def __init__(self, amp: str, device: torch.device) -> None:
        if amp == "auto":
            amp = "bf16" if bf16_is_fast(device) else "off"
        if amp == "fp16" and device.type != "cuda":
            raise InputError("--amp fp16 needs a GPU; use --amp bf16 or --amp off on a CPU")
        self.name = amp
        self.device = device
        self.dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": torch.float32}[amp]
        self.scaler = torch.amp.GradScaler(device.type, enabled=amp == "fp16")
        # oneDNN and cuDNN want the channels last for reduced precision; for float32 on the CPU
        # channels_last is as fast, and one layout is simpler than two.
        self.memory_format = torch.channels_last

    def shared(self) -> dict[str, str]:
        """What has to be the same in all processes that compute one thing together, by its name."""
        return {
            "their torch": torch.__version__,
            "their device": self.device.type,
            "their precision": self.name,
        }

    def autocast(self) -> contextlib.AbstractContextManager:
        """The context in which the network's forward runs."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.name != "off")


# --- what was run where ---------------------------------------------------------------------------


def environment(device: torch.device) -> dict:
    """Versions, hardware and the state of the code: what `environment.json` keeps."""
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


@functools.cache  # each save of a checkpoint asks, and would read seven files again
def versions() -> dict[str, str]:
    """The versions of the packages that a run's numbers may depend on, of those installed."""
    from importlib import metadata

    packages = {}
    for name in (
        "torch",
        "torchvision",
        "numpy",
        "scipy",
        "pillow",
        "pytorch-metric-learning",
        "timm",
    ):
        with contextlib.suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
    return packages


def device_name(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = _cpu_says("model name") or platform.processor() or platform.machine()
    return f"{model}, {counted(torch.get_num_threads(), 'thread')}"


@functools.cache  # a checkpoint keeps it, and asking git takes longer than saving does
def git_commit() -> str | None:
    """The commit of the code, with `+changes` when files differ from it; None outside git."""
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
