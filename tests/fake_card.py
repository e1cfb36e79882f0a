"""A GPU that is none: tensors that say they lie on cuda:0, and are computed on the CPU.

It refuses what a GPU refuses, an operator on tensors of two devices, and notes what the host waits
for: numbers that it reads, masks whose entries it has to count, copies of memory that is not
pinned. It has no streams: whatever is asked for is done at once.
"""

from __future__ import annotations

import contextlib
import linecache
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map

import devices
import kernels

OURS = f"{Path(__file__).resolve().parent.parent}/"
NOT_OURS = (f"{OURS}tests/", f"{OURS}.venv/")
DEVICE = torch.device("cuda:0")
ELSEWHERE = {"cuda", "meta"}  # meta: of what torch's own C++ makes to be where a Tensor is

# Operators whose result's shape, or whose check, depends on values.
COUNTED = (
    "_local_scalar_dense equal nonzero masked_select _unique2 unique_dim unique_consecutive "
    "bincount _linalg_eigh _linalg_svd linalg_qr"
).split()
INDEXED = ("index", "index_put", "index_put_")
NOT_OF_INTEGERS = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot")


class TwoDevices(RuntimeError):
    """As torch's own: not all tensors are on one device."""


class OnCard(torch.Tensor):
    """A tensor on the card; `values` are its values, in the host's memory.

    For C++ it is a tensor without values whose operators are a GPU's, so that autocast knows it.
    """

    values: torch.Tensor
    is_cuda, is_cpu, is_meta = True, False, False
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> OnCard:
        with _disable_current_modes():
            shape, stride = values.shape, values.stride()
            shell = torch.empty_strided(shape, stride, dtype=values.dtype, device="meta")
        made = torch.Tensor._make_subclass(cls, shell, False, device_for_backend_keys=DEVICE)
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        return CARD.run(function, args, kwargs or {})

    @property
    def device(self) -> torch.device:
        return DEVICE

    def __repr__(self, **_: Any) -> str:
        return f"OnCard({self.values})"

    def __reduce_ex__(self, protocol: int) -> Any:  # what `torch.save` keeps
        return self.detach().values.clone().__reduce_ex__(protocol)

    def to(self, *args: Any, copy: bool = False, **kwargs: Any) -> torch.Tensor:
        device, dtype, _, form = torch._C._nn._parse_to(*args, **kwargs)
        if device is not None and device.type == "cpu":
            return super().to(*args, **kwargs)
        if not copy and dtype in (None, self.dtype) and form is None:
            return self
        form = torch.preserve_format if form is None else form
        return super().to(self.dtype if dtype is None else dtype, copy=copy, memory_format=form)

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy

    def new_tensor(self, data: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype).to(DEVICE)

    def data_ptr(self) -> int:
        return self.values.data_ptr()

    def record_stream(self, stream: Any) -> None:
        pass


class Card(TorchDispatchMode):
    """The card; while entered, tensors can be made on it.

    Attributes:
        waits: what the host has waited for: the operator, and the line of ours that called it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.pinned: set[int] = set()
        self.seed(0)

    def seed(self, seed: int) -> None:
        """Begins the card's own random numbers anew."""
        self.random_state = torch.Generator().manual_seed(seed).get_state()

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """As `Tensor.pin_memory`."""
        if not self._is_pinned(tensor):
            tensor = tensor.clone()
            self.pinned.add(tensor.untyped_storage().data_ptr())
        return tensor

    def _is_pinned(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.pinned

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None):
        kwargs = kwargs or {}
        if OnCard in types or _is_there(kwargs.get("device")):
            return self.run(function, args, kwargs)
        return function(*args, **kwargs)

    def run(self, function: Any, args: tuple, kwargs: dict) -> Any:
        """Computes what a GPU would, where there is none."""
        name = function.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ours = {id(x.values): x for x in tensors if isinstance(x, OnCard)}
        there = bool(ours)
        if kwargs.get("device") is not None:
            there = _is_there(kwargs["device"])
            kwargs = {**kwargs, "device": torch.device("cpu")}
        if name in ("_to_copy", "copy_"):
            there = (
                self._copy(args, kwargs, there) if name == "_to_copy" else self._copy_into(*args)
            )
        else:
            self._check(name, args, tensors)
        drawing = there and torch.Tag.nondeterministic_seeded in function.tags
        with self._draws() if drawing else contextlib.nullcontext():
            result = function(*tree_map(_values, args), **tree_map(_values, kwargs))
        if name == "copy_":
            return args[0]
        if not there or name == "_local_scalar_dense":
            return result
        return tree_map(lambda x: ours[id(x)] if id(x) in ours else _on_card(x), result)

    def _copy(self, args: tuple, kwargs: dict, there: bool) -> bool:
        came = isinstance(args[0], OnCard)
        if came and not there:
            self._wait("copy to the host")
        if there and not came and not (kwargs.get("non_blocking") and self._is_pinned(args[0])):
            self._wait("copy of memory that is not pinned")
        return there

    def _copy_into(self, into: torch.Tensor, values: torch.Tensor, soon: bool = False) -> bool:
        if isinstance(values, OnCard) != isinstance(into, OnCard):
            soon = soon and isinstance(into, OnCard) and self._is_pinned(values)
            if not soon:
                self._wait("copy_ between the devices")
        return isinstance(into, OnCard)

    def _check(self, name: str, args: tuple, tensors: list[torch.Tensor]) -> None:
        ours = [x for x in tensors if isinstance(x, OnCard)]
        hosts = [x for x in tensors if not isinstance(x, OnCard)]
        if name in INDEXED and isinstance(args[0], OnCard):  # an index may lie with the host
            index = [x for x in args[1] if x is not None]
            hosts = [x for x in hosts if not any(x is each for each in index)]
            if not all(isinstance(x, OnCard) for x in index):
                self._wait(f"{name}, by an index of the host's")
            elif any(x.dtype == torch.bool for x in index):
                self._wait(f"{name}, by a mask")
        together = "foreach" in name or "fused" in name  # a number of the host's is none there
        if ours and any(x.ndim or together for x in hosts if x.numel()):
            raise TwoDevices(f"{name} of {[type(x).__name__ for x in tensors]}, {_line()}")
        if name in NOT_OF_INTEGERS and not all(x.is_floating_point() for x in ours):
            raise NotImplementedError(f'"{name}_cuda" not implemented for integers, {_line()}')
        if name in COUNTED:
            self._wait(name)

    def _wait(self, what: str) -> None:
        self.waits.append(f"{what}, {_line()}")

    @contextlib.contextmanager
    def _draws(self) -> Iterator[None]:
        """Random numbers inside are the card's own."""
        generator = torch.default_generator
        before = generator.get_state()
        generator.set_state(self.random_state)
        try:
            yield
        finally:
            self.random_state = generator.get_state()
            generator.set_state(before)


CARD = Card()


def _is_there(device: Any) -> bool:
    return device is not None and torch.device(device).type in ELSEWHERE


def _on_card(value: Any) -> Any:
    return OnCard(value) if isinstance(value, torch.Tensor) else value


def _values(value: Any) -> Any:
    if isinstance(value, OnCard):
        return value.values
    if isinstance(value, torch.Tensor) and value.is_meta:  # C++ made it, of nothing
        assert not value.numel(), _line()
        with _disable_current_modes():
            return torch.empty(value.shape, dtype=value.dtype)
    return value


def _line() -> str:
    """The innermost line of ours that is being computed."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(OURS) and not path.startswith(NOT_OURS):
            return f"{path.removeprefix(OURS)}: {linecache.getline(path, frame.f_lineno).strip()}"
        frame = frame.f_back
    return "backward"


class _Event:
    """All that is asked of the card is done at once."""

    def __init__(self, **_: Any) -> None:
        pass

    def record(self, *_: Any) -> None:
        pass

    def query(self) -> bool:
        return True

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: _Event) -> float:
        return 0.0


class _Stream:
    def __init__(self, *_: Any) -> None:
        pass

    def wait_stream(self, other: _Stream) -> None:
        pass

    def wait_event(self, event: _Event) -> None:
        pass

    def record_event(self) -> _Event:
        return _Event()


def _cuda() -> dict[str, Any]:
    """What stands in the place of torch.cuda's functions."""
    stream = _Stream()
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda device: None,
        "get_device_capability": lambda device=None: (9, 0),
        "get_device_name": lambda device=None: "a card that is none",
        "mem_get_info": lambda device=None: (2**36, 2**37),
        "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: None,
        "get_rng_state": lambda device=None: CARD.random_state.clone(),
        "set_rng_state": lambda state, device=None: setattr(CARD, "random_state", state.clone()),
        "manual_seed_all": CARD.seed,
        "Stream": _Stream,
        "Event": _Event,
        "current_stream": lambda device=None: stream,
        "stream": lambda stream: contextlib.nullcontext(),
    }


@contextlib.contextmanager
def plugged_in() -> Iterator[Card]:
    """A machine with a card; whether it has one of its own does not matter."""
    seed: Callable[[int], torch.Generator] = torch.manual_seed
    overwritten = torch.__future__.get_overwrite_module_params_on_conversion()

    def seed_both(number: int) -> torch.Generator:
        CARD.seed(number)
        return seed(number)

    torch._C._ensureCUDADeviceGuardSet()
    with pytest.MonkeyPatch.context() as patch:
        for name, instead in _cuda().items():
            patch.setattr(torch.cuda, name, instead)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: CARD.pin(tensor))
        patch.setattr(torch, "manual_seed", seed_both)
        # Kernels need its memory, and what is found out about it says nothing about a real one.
        patch.setattr(kernels, "usable", lambda device: False)
        patch.setattr(devices, "mend_average_pooling", lambda device: None)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        CARD.waits.clear()
        try:
            with CARD:
                yield CARD
        finally:
            torch.__future__.set_overwrite_module_params_on_conversion(overwritten)
