"""A smooth recall@k, over large batches.

Patel et al., Recall@k Surrogate Loss with Large Batches and Similarity Mixup, CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from criteria import checks
from criteria.base import Criterion, References, check_batch, in_float32, of_labels, pair_masks
from criteria.strips import of_queries
from devices import on_device


class RecallAtKLoss(Criterion):
    """RS@k: 1 - recall@k of every image of the batch among the others, with sigmoids for steps.

        L    = 1 - mean_q 1/|K| Σ_{k∈K} min(k, Σ_{p∈P_q} σ((k - r_qp)/τ_k)) / min(k, |P_q|)
        r_qp = 1 + Σ_{j≠p} σ((s_qj - s_qp)/τ)

    K ``ks`` 1, 2, 4, 8, 16 (none above the size of the batch); τ ``temperature`` 0.01 of the ranks,
    τ_k ``rank_temperature`` 1 of the recall. As released, the query itself counts among the images
    j, so that the best rank is 2. Images without a positive are no queries.

    ``simix`` adds a mixture of every pair of images of a class, λ·x_i + (1 - λ)·x_j with its own
    λ ~ U(0, 1), as another image of that class. It is not brought to unit length, so its similarity
    to another image is the mixture of theirs. Expects unit vectors (B, d). The ranks are computed
    in strips, and again in the backward pass. ``terms``: recall, the mean over K. Raises ValueError
    for an empty batch; a batch without a pair gives 0.
    """

    unit_length = True
    needs_pairs = True

    def __init__(
        self,
        ks: Sequence[int] | str | int = (1, 2, 4, 8, 16),
        temperature: float = 0.01,
        rank_temperature: float = 1.0,
        simix: bool = False,
    ) -> None:
        super().__init__()
        checks.positive(temperature=temperature, rank_temperature=rank_temperature)
        self.ks = whole_numbers(ks)
        self.temperature = temperature
        self.rank_temperature = rank_temperature
        self.simix = simix
        self.no_memory = "simix mixes only images of the batch" if simix else ""

    @in_float32
    def forward(
        self, embeddings: Tensor, labels: Tensor, references: References | None = None
    ) -> Tensor:
        """The loss, 0-d."""
        labels = check_batch(embeddings, labels)
        images = len(labels if references is None else references.labels)
        ks = [min(k, images) for k in self.ks]
        if self.simix:
            embeddings, labels = with_mixtures(embeddings, labels)
        positive = of_labels(_positives, labels, references)
        others = embeddings if references is None else references.embeddings
        recalls = of_queries(partial(self._recall, ks), embeddings @ others.T, *positive)
        count = positive[0].any(dim=1).sum()
        recall = recalls.sum() / count.clamp_min(1)
        self._report(recall=recall)
        return count.clamp_max(1) - recall

    def _recall(
        self,
        ks: Sequence[int],
        similarity: Tensor,
        positive: Tensor,
        pairs: Sequence[Tensor] | None,
    ) -> Tensor:
        """Recall@k of n queries, mean over ``ks``: (n,), from their rows of the tables (n, B).

        ``pairs``: the indices of the true entries of ``positive``, if they are known.
        """
        queries, positives = pairs or positive.nonzero(as_tuple=True)
        gaps = similarity[queries] - similarity[queries, positives][:, None]
        # The sum includes the positive itself, σ(0) = 1/2; with 0.5 that is the 1 of the equation.
        ranks = 0.5 + torch.sigmoid(gaps / self.temperature).sum(dim=1)
        levels = on_device(torch.tensor(ks, dtype=ranks.dtype), ranks.device)
        found = torch.sigmoid((levels - ranks[:, None]) / self.rank_temperature)
        hits = found.new_zeros(len(similarity), len(ks)).index_add(0, queries, found)
        most = torch.minimum(levels, positive.sum(dim=1, keepdim=True).clamp_min(1))
        return (torch.minimum(hits, levels) / most).mean(dim=1)


def _positives(labels: Tensor, references: References | None) -> tuple[Tensor, int, Tensor, Tensor]:
    """The mask of positive pairs (B, R), the largest number of positives of an image (at least 1),
    and the indices of the mask's true entries, (P,) each."""
    positive, _ = pair_masks(labels, references)
    most = max(1, int(positive.sum(dim=1).max()))
    return positive, most, *positive.nonzero(as_tuple=True)


def with_mixtures(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Embeddings (B + P, d), the given ones and mixtures of the P pairs of a class; and labels."""
    first, second, labels = of_labels(_class_pairs, labels)
    # Drawn on the CPU, so that a seed gives the same numbers on any device.
    shares = on_device(torch.rand(len(first), 1, dtype=embeddings.dtype), embeddings.device)
    mixed = torch.lerp(embeddings[second], embeddings[first], shares)
    return torch.cat([embeddings, mixed]), labels


def _class_pairs(labels: Tensor, references: None) -> tuple[Tensor, Tensor, Tensor]:
    """Every two images of one class (and each with itself), (P,) each; labels (B + P,)."""
    first, second = (labels[:, None] == labels).triu(1).nonzero(as_tuple=True)
    return first, second, torch.cat([labels, labels[first]])


def whole_numbers(text: Sequence[int] | str | int) -> tuple[int, ...]:
    """`1,2,4`, or numbers, as a tuple; ValueError unless all are whole numbers above 0."""
    words = text.split(",") if isinstance(text, str) else text
    words = [words] if isinstance(words, int | float) else words
    try:
        numbers = tuple(int(word) for word in words)
    except ValueError:
        numbers = ()
    if not numbers or min(numbers) < 1 or [*numbers] != [float(word) for word in words]:
        raise ValueError(
            f"ks must be whole numbers above 0 with commas between them, as in 1,2,4, not {text!r}."
        )
    return numbers
