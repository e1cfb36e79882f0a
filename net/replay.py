"""A backbone whose training step is recorded once, on a GPU, and replayed from then on.

A step of BN-Inception is some 1,700 kernels, and starting them one by one takes the host longer
than a fast GPU needs to run them. A recording (a CUDA graph) starts all of them at once. It holds
for batches of one shape, the same trained parameters and the same precision; whatever differs is
computed as usual, and recorded in its turn when it comes often enough.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

CALLS_BEFORE = 3
"""Calls of one kind that are computed as usual before it is recorded: a short run never is."""
WARM_UPS = 2
"""Passes on the recording's stream before it: libraries set themselves up in the first."""

logger = logging.getLogger(__name__)


class Replay:
    """Features of images, by a recording where one fits.

    Args:
        compute: images (B, 3, H, W) → features (B, F), what is recorded.
        parameters: what it may train. buffers: what it changes by being called (running means).
    """

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        parameters: Callable[[], Sequence[nn.Parameter]],
        buffers: Callable[[], Sequence[Tensor]],
    ) -> None:
        self._compute = compute
        self._parameters = parameters
        self._buffers = buffers
        self._kind: tuple | None = None
        self._calls = 0
        self._tape: _Tape | None = None
        self._failed = False

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the network computes as usual: recordings write to the parameters they know."""
        return None

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → features (B, F)."""
        trained = [p for p in self._parameters() if p.requires_grad]
        if self._failed or not trained or not torch.is_grad_enabled() or images.requires_grad:
            return self._compute(images)
        kind = (images.shape, images.stride(), images.dtype, _autocast(), *map(_place, trained))
        if kind != self._kind:
            self._kind, self._calls, self._tape = kind, 0, None
        self._calls += 1
        if self._tape is None and self._calls > CALLS_BEFORE:
            self._record(images, trained)
        # A second batch before the backward of the first would overwrite what that still needs.
        if self._tape is None or self._tape.waits_for_backward:
            return self._compute(images)
        return self._tape.play(images)

    def _record(self, images: Tensor, trained: list[nn.Parameter]) -> None:
        states = [buffer.clone() for buffer in self._buffers()]
        random_state = torch.cuda.get_rng_state(images.device)
        try:
            torch.cuda.empty_cache()  # a recording has memory of its own
            self._tape = _Tape(self._compute, images, trained)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            self._failed, self._tape = True, None
            torch.cuda.empty_cache()
            reason = str(error).strip().splitlines()[0]
            logger.warning("the step is not recorded on the GPU (%s); it is slower so", reason)
        for buffer, state in zip(self._buffers(), states, strict=True):
            buffer.copy_(state)
        torch.cuda.set_rng_state(random_state, images.device)


def _place(parameter: nn.Parameter) -> int:
    return parameter.data_ptr()


def _autocast() -> tuple[bool, torch.dtype]:
    return torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")


class _Tape:
    """One recording: forward and backward of a batch, on tensors that stay where they are.

    Raises:
        RuntimeError: something in `compute` cannot be recorded.
    """

    def __init__(
        self, compute: Callable[[Tensor], Tensor], images: Tensor, trained: list[nn.Parameter]
    ) -> None:
        self.trained = trained
        self.waits_for_backward = False
        self._images = images.clone()
        self._forward, self._backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        enabled, dtype = _autocast()
        stream = torch.cuda.Stream(images.device)
        stream.wait_stream(torch.cuda.current_stream(images.device))

        def features() -> Tensor:
            # The cache of casts would keep tensors of one pass for the next.
            with torch.autocast("cuda", dtype, enabled=enabled, cache_enabled=False):
                return compute(self._images)

        def gradients() -> tuple[Tensor | None, ...]:
            return torch.autograd.grad(self._features, trained, self._gradient, allow_unused=True)

        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._features = features()
                self._gradient = torch.zeros_like(self._features)
                gradients()
        torch.cuda.synchronize(images.device)
        # Other threads (one that pins memory) go on meanwhile, which only thread_local admits.
        how: dict[str, Any] = {"stream": stream, "capture_error_mode": "thread_local"}
        with torch.cuda.graph(self._forward, **how):
            self._features = features()
        self._gradient = torch.zeros_like(self._features)
        with torch.cuda.graph(self._backward, pool=self._forward.pool(), **how):
            self._gradients = gradients()
        # With its graph, every later backward would wait for the stream of the recording.
        self._features = self._features.detach()
        torch.cuda.current_stream(images.device).wait_stream(stream)

    def play(self, images: Tensor) -> Tensor:
        """The features of a batch like the recorded one, with a graph."""
        return _Played.apply(self, images, *self.trained)

    def forward(self, images: Tensor) -> Tensor:
        """Replays the forward pass."""
        self._images.copy_(images)
        self._forward.replay()
        self.waits_for_backward = True
        return self._features.detach()  # another tensor in the same memory, with no graph

    def backward(self, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Replays the backward pass."""
        self._gradient.copy_(gradient)
        self._backward.replay()
        self.waits_for_backward = False
        return tuple(None if each is None else each.detach() for each in self._gradients)


class _Played(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tape: _Tape, images: Tensor, *trained: nn.Parameter) -> Tensor:
        ctx.tape = tape
        return tape.forward(images)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.tape.backward(gradient)
