"""HIST: relations between images and classes as a hypergraph.

Lim et al., Hypergraph-Induced Semantic Tuplet Loss for Deep Metric Learning, CVPR 2022.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from criteria import checks
from criteria.base import Criterion, ParameterGroup, check_batch, in_float32, of_labels, unit_rows


class HistLoss(Criterion):
    """HIST: every class has a normal distribution, and every class of the batch is a hyperedge.

        D_ic   = Σ_k (x̂_ik - μ̂_ck)² / exp(min(relu(v_ck), 6))
        L_dist = mean_i CE(-τ·D_i, y_i)
        H_ic   = 1 for c = y_i, else e^{-α·D_ic}            c among the classes of the batch
        G      = A^{-1/2} H E^{-1} Hᵀ A^{-1/2}              A and E the sums of H's rows and columns
        L      = L_dist + λ · mean_i CE((G·relu(norm(G·x·W₁ + …))·W₂ + …)_i, y_i)

    τ ``tau`` 32, α ``alpha`` 0.9, λ ``lam`` 1. Two layers W₁ (d, ``hidden`` 512) and W₂ (hidden,
    C), with a BatchNorm and a leaky relu (0.1) between them, are not used after training. x is the
    raw embedding after a LayerNorm without parameters (``layer_norm``), which is the network's last
    layer in the released code. The distributions learn at ``distribution_lr`` 0.1 whatever the
    network's rate, the layers at ``layer_lr_scale`` 10 × that. Call with raw embeddings (B, d).
    ``terms``: distribution, hypergraph. Raises ValueError like ProxyAnchorLoss.
    """

    unit_length = False
    no_memory = "it compares images with classes, and its graph holds a single batch"

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        tau: float = 32.0,
        alpha: float = 0.9,
        lam: float = 1.0,
        hidden: int = 512,
        *,
        layer_norm: bool = True,
        distribution_lr: float = 0.1,
        layer_lr_scale: float = 10.0,
    ) -> None:
        super().__init__()
        checks.positive(num_classes=num_classes, tau=tau, hidden=hidden)
        checks.not_negative(
            alpha=alpha, lam=lam, distribution_lr=distribution_lr, layer_lr_scale=layer_lr_scale
        )
        checks.whole(hidden=hidden)
        self.num_classes = num_classes
        self.embedding_size = embedding_size
        self.tau = tau
        self.alpha = alpha
        self.lam = lam
        self.layer_norm = layer_norm
        self.distribution_lr = distribution_lr
        self.layer_lr_scale = layer_lr_scale
        self.means = nn.Parameter(torch.empty(num_classes, embedding_size))
        self.log_variances = nn.Parameter(torch.empty(num_classes, embedding_size))
        nn.init.kaiming_normal_(self.means, mode="fan_out")
        nn.init.kaiming_normal_(self.log_variances, mode="fan_out")
        self.first = nn.Linear(embedding_size, int(hidden))
        # Used in training only, with the batch's own statistics.
        self.norm = nn.BatchNorm1d(int(hidden), track_running_stats=False)
        self.second = nn.Linear(int(hidden), num_classes)

    @in_float32
    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss, 0-d."""
        labels = check_batch(embeddings, labels, self.embedding_size, self.num_classes)
        if self.layer_norm:
            embeddings = F.layer_norm(embeddings, embeddings.shape[1:])
        distances = self.distances(embeddings)
        distribution = F.cross_entropy(-self.tau * distances, labels)
        graph = propagation(incidence(distances, labels, self.alpha))
        hypergraph = F.cross_entropy(self._classified(embeddings, graph), labels)
        self._report(distribution=distribution, hypergraph=hypergraph)
        return distribution + self.lam * hypergraph

    def distances(self, embeddings: Tensor) -> Tensor:
        """Squared Mahalanobis distances D between images and classes, (B, C)."""
        unit, means = unit_rows(embeddings), unit_rows(self.means)
        precisions = torch.exp(-F.relu6(self.log_variances))
        # The square is multiplied out to avoid a tensor of (B, C, d).
        squares = unit.square() @ precisions.T - 2 * unit @ (means * precisions).T
        return (squares + (means.square() * precisions).sum(dim=1)).clamp_min(0)

    def _classified(self, embeddings: Tensor, graph: Tensor) -> Tensor:
        """Logits (B, C) of the two layers, each of which averages over neighbours in the graph."""
        hidden = graph @ self.first(embeddings)
        if len(hidden) > 1:  # a single image has no statistics
            hidden = self.norm(hidden)
        return graph @ self.second(F.leaky_relu(hidden, 0.1))

    def parameter_groups(self, lr: float) -> list[ParameterGroup]:
        """The distributions at ``distribution_lr``, the layers at ``layer_lr_scale`` × ``lr``."""
        layers = [*self.first.parameters(), *self.norm.parameters(), *self.second.parameters()]
        distributions = [self.means, self.log_variances]
        return [
            {"name": "distributions", "params": distributions, "lr": self.distribution_lr},
            {"name": "hypergraph", "params": layers, "lr": self.layer_lr_scale * lr},
        ]


def incidence(distances: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """H (B, classes of the batch), from distances to all classes (B, C)."""
    (classes,) = of_labels(lambda labels, _: (labels.unique(),), labels)
    own = labels[:, None] == classes
    return torch.exp(-alpha * distances[:, classes]).masked_fill(own, 1.0)


def propagation(incidence: Tensor) -> Tensor:
    """G (B, B): the average over the hyperedges that two images share."""
    scaled = incidence / incidence.sum(dim=1, keepdim=True).sqrt()
    return scaled / incidence.sum(dim=0) @ scaled.T
