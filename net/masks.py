"""Divide and conquer's embedding masks: Sanakoyeu et al., TPAMI 2021.

Each cluster of the training images trains the dimensions of the embedding that its mask selects.
The number of masks doubles together with that of the clusters. Their regulariser is
`losses.mask_orthogonality`.

Deviation: the masks are the rows of one (K, d) parameter, not a list of K vectors, so that the
regulariser is one matrix product; released files are converted when they are loaded.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from net.choices import MASK_INITS, MASKS_AT_TEST, check_choice
from utils import InputError


class EmbeddingMasks(nn.Module):
    """K masks over the d dimensions of an embedding; cluster c has mask c. Starts with one mask.

    Args:
        size: d.
        learned: whether masks are trained; a split then copies them. Otherwise they are binary and
            fixed, and a split gives each child one half of its parent's run of ones.
        relu: whether masks are passed through a ReLU before they are applied.
        init: the first mask; `ones`, or `normal` with mean .9 and deviation .7 (learned only).
        full: the factor of an embedding that belongs to no cluster. `none`: 1; `sum`: the sum of
            all masks; `l1`: the sum of all masks, each scaled to an l1 norm of 1.

    Attributes:
        weight: (K, d) the raw masks.

    Raises:
        InputError: an unknown `init` or `full`, or fixed masks with a normal start.
    """

    def __init__(
        self,
        size: int,
        *,
        learned: bool = True,
        relu: bool = True,
        init: str = "ones",
        full: str = "none",
    ) -> None:
        super().__init__()
        check_choice("init", init, MASK_INITS)
        check_choice("full", full, MASKS_AT_TEST)
        if init == "normal" and not learned:
            raise InputError("fixed masks are 0 or 1: start them with ones, or learn the masks")
        self.learned = learned
        self.relu = relu
        self.full = full
        first = torch.ones(1, size) if init == "ones" else torch.empty(1, size).normal_(0.9, 0.7)
        self.weight = nn.Parameter(first, requires_grad=learned)

    def __len__(self) -> int:
        return len(self.weight)

    def forward(self, embeddings: Tensor, cluster: int | None = None) -> Tensor:
        """Embeddings (B, d) times the mask of their cluster, or without a cluster see `full`."""
        if cluster is not None:
            return embeddings * self._effective(self.weight[cluster])
        if self.full == "none":
            return embeddings
        masks = self._effective(self.weight)
        if self.full == "l1":
            masks = nn.functional.normalize(masks, p=1.0, dim=1)
        return embeddings * masks.sum(dim=0)

    def split(self) -> None:
        """Doubles the masks: mask c becomes masks 2c and 2c + 1.

        Afterwards `weight` is a new parameter, which the optimiser does not have yet.

        Raises:
            InputError: a fixed mask of a single dimension cannot be halved.
        """
        children = self.weight.detach().repeat_interleave(2, dim=0)
        if not self.learned:
            _halve_runs(children)
        self.weight = nn.Parameter(children, requires_grad=self.weight.requires_grad)

    def freeze(self) -> None:
        """Ends the training of the masks, as in the full-embedding phase."""
        self.weight.requires_grad_(False)

    def _effective(self, masks: Tensor) -> Tensor:
        return masks.relu() if self.relu else masks

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *args: object) -> None:
        # The number of masks is part of the saved state.
        saved = state_dict.get(f"{prefix}weight")
        if saved is not None and saved.dim() == 2 and len(saved) != len(self.weight):
            resized = self.weight.new_ones(len(saved), self.weight.shape[1])
            self.weight = nn.Parameter(resized, requires_grad=self.weight.requires_grad)
        super()._load_from_state_dict(state_dict, prefix, *args)


def _halve_runs(children: Tensor) -> None:
    # In place: in each pair of equal rows, the first keeps the first half of the ones.
    for first, second in zip(children[0::2], children[1::2], strict=True):
        run = first.nonzero().flatten()
        if len(run) < 2:
            raise InputError(
                f"the {len(children) // 2} fixed masks cannot be split again: a mask of one "
                "dimension is left; use fewer clusters or a larger embedding"
            )
        half = len(run) // 2
        first[run[half:]] = 0.0
        second[run[:half]] = 0.0
