"""A backbone whose training step is recorded once, on a GPU, and then replayed.

A step of BN-Inception has about 1,700 kernels, and launching them one by one takes the host longer
than a fast GPU needs to run them. A recording (a CUDA graph) launches all of them at once. It is
valid for batches of one shape, the same trained parameters and the same precision. Other batches
are computed as usual, and get their own recording if there are enough of them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from criteria.base import only_once
from utils import first_line

CALLS_BEFORE = 3
"""Calls of one kind that are computed as usual before one is recorded, so that short runs have no
recording."""
MOST = 2
"""The most shapes of batches that are recorded: the last batch of an epoch may be smaller."""
TOGETHER = 2
"""The most batches that wait for their backward pass at the same time: mixup has a second one. Each
needs its own recording, because a replay overwrites what the other's backward pass needs."""
WARM_UPS = 2
"""Passes on the recording's stream before it starts: in the first, libraries initialise."""

logger = logging.getLogger(__name__)


class Replay:
    """Computes features of images, with a recording if one fits.

    Args:
        compute: the function to record: images (B, 3, H, W) → features (B, F).
        parameters: those it may train. buffers: the buffers it changes (running means).
        record: makes a recording; see `recorded`.
    """

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        parameters: Sequence[nn.Parameter],
        buffers: Callable[[], Sequence[Tensor]],
        record: Callable[..., Tape] | None = None,
    ) -> None:
        self._compute = compute
        self._parameters = parameters
        self._buffers = buffers
        self._record = record or recorded
        self._setting: tuple | None = None
        self._calls: Counter[tuple] = Counter()
        self._tapes: dict[tuple, Tape] = {}
        self._pending = 0  # batches whose backward pass is still to come
        self._over = False

    def __deepcopy__(self, memo: dict) -> None:
        """Copies of a network have no recordings, which write to the parameters of the original."""
        return None

    @property
    def holds_memory(self) -> bool:
        """Whether there is a recording, which always holds the memory of a step."""
        return bool(self._tapes)

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → features (B, F)."""
        trained = [p for p in self._parameters if p.requires_grad]
        if self._over or not trained or not torch.is_grad_enabled() or images.requires_grad:
            return self._compute(images)
        tape = self._tape(images, trained)
        features = self._compute(images) if tape is None else tape.play(images)
        if features.requires_grad:
            self._pending += 1
            features.register_hook(self._arrived)
        else:
            self._over = True  # the features depend on no trained parameter
        return features

    def _arrived(self, gradient: Tensor) -> None:
        self._pending -= 1

    def _tape(self, images: Tensor, trained: list[nn.Parameter]) -> Tape | None:
        setting = (_autocast(), *(parameter.data_ptr() for parameter in trained))
        if setting != self._setting:
            self._setting, self._tapes = setting, {}
            self._calls.clear()
        shape, place = _kind(images), self._pending
        self._calls[shape, place] += 1
        if place == 0:  # nothing can be recorded while another batch's graph is alive
            for other in range(TOGETHER):
                # A second batch of this step has not been counted yet.
                calls = self._calls[shape, other] + (other > 0)
                if calls > CALLS_BEFORE and (shape, other) not in self._tapes:
                    self._add_tape(shape, other, images, trained)
        return self._tapes.get((shape, place))

    def _add_tape(
        self, shape: tuple, place: int, images: Tensor, trained: list[nn.Parameter]
    ) -> None:
        shapes = {shape for shape, _ in self._tapes}
        if self._over or (shape not in shapes and len(shapes) == MOST):
            return
        try:
            tape = self._record(self._compute, images, trained, self._buffers())
        except (RuntimeError, torch.OutOfMemoryError) as error:
            self._over, self._tapes = True, {}
            logger.warning(
                "the step cannot be recorded on the GPU, which makes it slower: %s",
                first_line(error),
            )
        else:
            self._tapes[shape, place] = tape


def recorded(
    compute: Callable[[Tensor], Tensor],
    images: Tensor,
    trained: list[nn.Parameter],
    buffers: Sequence[Tensor],
) -> Tape:
    """Record `compute` for images like these, and restore the buffers and the random state.

    Raises:
        RuntimeError: something in `compute` cannot be recorded, or there is no memory for it.
    """
    states = [buffer.clone() for buffer in buffers]
    random_state = torch.cuda.get_rng_state(images.device)
    torch.cuda.empty_cache()  # a recording has its own memory
    try:
        return Tape(compute, images, trained)
    finally:
        for buffer, state in zip(buffers, states, strict=True):
            buffer.copy_(state)
        torch.cuda.set_rng_state(random_state, images.device)


def _kind(images: Tensor) -> tuple:
    return images.shape, images.stride(), images.dtype


def _autocast() -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")


class Tape:
    """One recording: forward and backward of a batch, on tensors at fixed addresses.

    Raises:
        RuntimeError: something in `compute` cannot be recorded.
    """

    def __init__(
        self, compute: Callable[[Tensor], Tensor], images: Tensor, trained: list[nn.Parameter]
    ) -> None:
        self.trained = trained
        self._images = images.clone()
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        enabled, dtype = _autocast()
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))

        def features() -> Tensor:
            # Without autocast's cache, which would reuse tensors of one pass in the next.
            with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
                return compute(self._images)

        def gradients() -> list[Tensor | None]:
            found = torch.autograd.grad(self._features, trained, self._gradient, allow_unused=True)
            return in_separate_memory(found)

        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._features = features()
                self._gradient = torch.zeros_like(self._features)
                gradients()
        torch.cuda.synchronize(images.device)
        # Only this mode lets other threads, such as the one that pins memory, run meanwhile.
        how: dict[str, Any] = {"stream": stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self._forward, **how):
            self._features = features()
        self._gradient = torch.zeros_like(self._features)
        with torch.cuda.graph(self._backward, pool=self._forward.pool(), **how):
            self._gradients = gradients()
        # Otherwise every later backward pass would wait for the recording's stream.
        self._features = self._features.detach()
        torch.cuda.current_stream(images.device).wait_stream(stream)

    def play(self, images: Tensor) -> Tensor:
        """The features of a batch like the recorded one, connected to autograd."""
        return _Played.apply(self, images, *self.trained)

    def forward(self, images: Tensor) -> Tensor:
        """Replays the forward pass."""
        self._images.copy_(images)
        self._forward.replay()
        return self._features.detach()  # another tensor in the same memory, without a graph

    def backward(self, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Replays the backward pass."""
        self._gradient.copy_(gradient)
        self._backward.replay()
        return tuple(None if each is None else each.detach() for each in self._gradients)


def in_separate_memory(gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same gradients, no two of which share memory.

    For parameters that are added to each other, autograd returns one tensor as the gradient of all.
    backward() copies it for each of them, but a recording does not, and clipping in place would
    then clip it once for each parameter.
    """
    taken: set[int] = set()
    found: list[Tensor | None] = []
    for each in gradients:
        if each is not None and each.data_ptr() in taken:
            each = each.clone()
        if each is not None:
            taken.add(each.data_ptr())
        found.append(each)
    return found


class _Played(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tape: Tape, images: Tensor, *trained: nn.Parameter) -> Tensor:
        ctx.tape = tape
        return tape.forward(images)

    @staticmethod
    @only_once
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.tape.backward(gradient)
