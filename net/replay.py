"""A backbone whose training step is recorded once, on a GPU, and replayed from then on.

A step of BN-Inception is some 1,700 kernels, and starting them one by one takes the host longer
than a fast GPU needs to run them. A recording (a CUDA graph) starts all of them at once. It holds
for batches of one shape, the same trained parameters and the same precision; whatever differs is
computed as usual, and recorded in its turn when it comes often enough.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

CALLS_BEFORE = 3
"""Calls of one kind that are computed as usual before it is recorded: a short run never is."""
MOST = 2
"""Recordings at a time, one for each shape: the last batch of an epoch may be a smaller one."""
WARM_UPS = 2
"""Passes on the recording's stream before it: libraries set themselves up in the first."""

logger = logging.getLogger(__name__)


class Replay:
    """Features of images, by a recording where one fits.

    Args:
        compute: images (B, 3, H, W) → features (B, F), what is recorded.
        parameters: what it may train. buffers: what it changes by being called (running means).
        record: makes a recording; see `recorded`.
    """

    def __init__(
        self,
        compute: Callable[[Tensor], Tensor],
        parameters: Callable[[], Sequence[nn.Parameter]],
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
        self._under_way = 0  # batches whose backward has not come yet
        self._over = False

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of the network computes as usual: recordings write to the parameters they know."""
        return None

    def __call__(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) → features (B, F)."""
        trained = [p for p in self._parameters() if p.requires_grad]
        if self._over or not trained or not torch.is_grad_enabled() or images.requires_grad:
            return self._compute(images)
        if self._under_way:
            # A replay would overwrite what the backward of the first batch still needs, and while
            # that one's graph lives nothing can be recorded: no more of it (mixup, for one).
            self._over, self._tapes = True, {}
            return self._compute(images)
        tape = self._tape(images, trained)
        features = self._compute(images) if tape is None else tape.play(images)
        if features.requires_grad:
            self._under_way += 1
            features.register_hook(self._arrived)
        else:
            self._over = True  # nothing of what it may train has part in the features
        return features

    def _arrived(self, gradient: Tensor) -> None:
        self._under_way -= 1

    def _tape(self, images: Tensor, trained: list[nn.Parameter]) -> Tape | None:
        setting = (_autocast(), *(parameter.data_ptr() for parameter in trained))
        if setting != self._setting:
            self._setting, self._tapes = setting, {}
            self._calls.clear()
        kind = _kind(images)
        self._calls[kind] += 1
        wanted = self._calls[kind] > CALLS_BEFORE and len(self._tapes) < MOST
        if kind not in self._tapes and wanted:
            try:
                self._tapes[kind] = self._record(self._compute, images, trained, self._buffers())
            except (RuntimeError, torch.OutOfMemoryError) as error:
                self._over, self._tapes = True, {}
                reason = str(error).strip().splitlines()[0]
                logger.warning("the step is not recorded on the GPU, and slower for it: %s", reason)
        return self._tapes.get(kind)


def recorded(
    compute: Callable[[Tensor], Tensor],
    images: Tensor,
    trained: list[nn.Parameter],
    buffers: Sequence[Tensor],
) -> Tape:
    """A recording of `compute` on such images; buffers and random state stay what they were.

    Raises:
        RuntimeError: something in `compute` cannot be recorded, or there is no memory for it.
    """
    states = [buffer.clone() for buffer in buffers]
    random_state = torch.cuda.get_rng_state(images.device)
    torch.cuda.empty_cache()  # a recording has memory of its own
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
    """One recording: forward and backward of a batch, on tensors that stay where they are.

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
        return self._features.detach()  # another tensor in the same memory, with no graph

    def backward(self, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """Replays the backward pass."""
        self._gradient.copy_(gradient)
        self._backward.replay()
        return tuple(None if each is None else each.detach() for each in self._gradients)


class _Played(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tape: Tape, images: Tensor, *trained: nn.Parameter) -> Tensor:
        ctx.tape = tape
        return tape.forward(images)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.tape.backward(gradient)
