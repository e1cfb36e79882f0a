"""The margin loss of divide and conquer.

Wu et al., Sampling Matters in Deep Embedding Learning, ICCV 2017.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from criteria import checks
from criteria.base import Criterion, ParameterGroup, References, check_batch, in_float32
from criteria.miners import BOUNDARY, Miner, Triplets, miner_of


class MarginLoss(Criterion):
    """Margin loss over mined triplets, with a fixed or learnable boundary β.

        L = (Σ [D_ap - β + margin]₊ + Σ [β - D_an + margin]₊ + ν·Σ |β|) / N
        D_ij = √(‖x_i - x_j‖² + 1e-8)

    N counts the active terms of the first two sums (1 when there are none). ``beta`` 1.2,
    ``margin`` 0.2, ``nu`` 0. With ``num_classes`` each class has its own β, a triplet takes that of
    its anchor, and the last sum is over the triplets too. Otherwise there is one β for all, which
    the last sum counts once, as released. β learns at ``beta_lr``, without weight decay (None: at
    the network's rate; 0: it stays fixed). Expects unit vectors (B, d). ``triplets`` (anchors,
    positives, negatives) are given in the call, or chosen by ``miner``, an object or a name of
    MINERS. ``terms``: positive and negative (the sums over N), beta (mean). Raises ValueError for
    an empty batch and, if each class has its own β, for labels outside 0..C-1; a batch without
    triplets gives 0.
    """

    unit_length = True
    needs_pairs = True
    no_memory = ""

    def __init__(
        self,
        beta: float = BOUNDARY,
        margin: float = 0.2,
        nu: float = 0.0,
        num_classes: int | None = None,
        *,
        beta_lr: float | None = None,
        miner: Miner | str = "distanceweighted",
        mining: str = "released",
    ) -> None:
        super().__init__()
        checks.positive(beta=beta)
        checks.not_negative(margin=margin, nu=nu, beta_lr=beta_lr or 0.0)
        self.margin = margin
        self.nu = nu
        self.num_classes = num_classes
        self.beta_lr = beta_lr
        self.beta = nn.Parameter(torch.full((num_classes or 1,), float(beta)), beta_lr != 0)
        self.miner = miner_of(miner, margin, mining, beta)

    @in_float32
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor,
        triplets: Triplets | None = None,
        references: References | None = None,
    ) -> Tensor:
        """The loss, 0-d."""
        labels = check_batch(embeddings, labels, classes=self.num_classes)
        anchors, positives, negatives = triplets or self.miner(embeddings, labels, references)
        beta = self.beta if self.num_classes is None else self.beta[labels[anchors]]
        others = embeddings if references is None else references.embeddings
        to_positive = self._distance(embeddings[anchors], others[positives])
        to_negative = self._distance(embeddings[anchors], others[negatives])
        positive = F.relu(to_positive - beta + self.margin)
        negative = F.relu(beta - to_negative + self.margin)
        active = ((positive > 0).sum() + (negative > 0).sum()).clamp_min(1)
        positive, negative = positive.sum() / active, negative.sum() / active
        self._report(positive=positive, negative=negative, beta=self.beta.mean())
        return positive + negative + self.nu * beta.abs().sum() / active

    @staticmethod
    def _distance(left: Tensor, right: Tensor) -> Tensor:
        return ((left - right).square().sum(dim=1) + 1e-8).sqrt()

    def parameter_groups(self, lr: float) -> list[ParameterGroup]:
        """β with its own learning rate and without weight decay; [] if it is fixed."""
        if not self.beta.requires_grad:
            return []
        beta_lr = lr if self.beta_lr is None else self.beta_lr
        return [{"name": "beta", "params": [self.beta], "lr": beta_lr, "weight_decay": 0.0}]

    def class_values(self) -> dict[str, Tensor]:
        """The boundary of each class, if each has its own."""
        return {} if self.num_classes is None else {"beta": self.beta.detach()}


def margin_loss(
    num_classes: int,
    *,
    beta: float = BOUNDARY,
    margin: float = 0.2,
    nu: float = 0.0,
    beta_lr: float = 0.0,
    miner: Miner | str = "easypeasy",
    mining: str = "released",
) -> MarginLoss:
    """The loss of divide and conquer: β is fixed, or with ``beta_lr`` learned for each class."""
    classes = num_classes if beta_lr else None
    return MarginLoss(beta, margin, nu, classes, beta_lr=beta_lr, miner=miner, mining=mining)
