"""The papers' equations of the losses, written down directly in PyTorch.

With full matrices, masks, and exponentials before logarithms; for benchmarks/losses.py.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.plain import proxy_terms
from criteria.hierarchy import reciprocal_triplets

INSTANCES = 3  # images of a class in the batch
LEARNERS = 32  # masks of divide and conquer


@dataclass
class Batch:
    """The inputs of all variants of a row; tensors that are learned are leaves.

    `learnt` is our criterion, whose other parameters the plain formula uses, too.
    """

    embeddings: Tensor
    second: Tensor
    labels: Tensor
    proxies: Tensor
    margins: Tensor
    masks: Tensor
    learnt: nn.Module | None = None

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """All tensors that may have a gradient."""
        own = () if self.learnt is None else self.learnt.parameters()
        return self.embeddings, self.second, self.proxies, self.margins, self.masks, *own


def make_batch(classes: int, size: int, batch: int, device: str, wide: bool) -> Batch:
    """Random heads (B, d), or (B, 2d) when ``wide``, and proxies; three images per class."""
    torch.manual_seed(0)
    chosen = torch.randperm(classes)[: math.ceil(batch / INSTANCES)]
    labels = chosen.repeat(INSTANCES)[:batch].sort().values
    width = 2 * size if wide else size

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.to(device).requires_grad_()

    return Batch(
        leaf(torch.randn(batch, width)),
        leaf(torch.randn(batch, width)),
        labels.to(device),
        leaf(torch.randn(classes, size) * math.sqrt(2 / classes)),
        leaf(torch.full((classes,), 0.1)),
        leaf(torch.rand(LEARNERS, size)),
    )


# --- the formulas ---------------------------------------------------------------------------------


def proxy_anchor(batch: Batch) -> Tensor:
    """Proxy-Anchor."""
    similarity = F.normalize(batch.embeddings) @ F.normalize(batch.proxies).T
    return proxy_terms(similarity, batch.labels, 0.1, 32.0)


def amloss(batch: Batch) -> Tensor:
    """AMLoss with the whole (C, C) matrix."""
    proxies = F.normalize(batch.proxies)
    similarity = F.normalize(batch.embeddings) @ proxies.T
    anchor = proxy_terms(similarity, batch.labels, batch.margins, 32.0)
    between = torch.exp(proxies @ proxies.T - batch.margins[:, None] + 0.1)
    others = between * (1 - torch.eye(len(proxies), device=proxies.device))
    return anchor + torch.log(1 + others.sum(dim=1)).mean()


def introspective(batch: Batch) -> Tensor:
    """Proxy-Anchor on IDML's similarity."""
    embeddings, uncertainty = F.normalize(batch.embeddings), F.normalize(batch.second)
    cosine = embeddings @ F.normalize(batch.proxies).T
    distance = torch.cdist(embeddings, batch.proxies).square()
    spread = uncertainty.square().sum(dim=1, keepdim=True) + 4
    similarity = 1 - (1 - cosine) * torch.exp(-spread / (5 * distance))
    return proxy_terms(similarity, batch.labels, 0.1, 32.0)


def disentangling(batch: Batch) -> Tensor:
    """DDML around Proxy-Anchor, with distributions as objects."""
    proxies = F.normalize(batch.proxies)
    normals = [
        torch.distributions.Normal(mean, F.softplus(raw - 5))
        for mean, raw in (head.chunk(2, dim=1) for head in (batch.embeddings, batch.second))
    ]
    main, specific = normals[0].rsample(), normals[1].rsample()
    uniform = torch.full((len(main), len(proxies)), 1 / len(proxies), device=main.device)
    similarity = F.normalize(normals[0].mean) @ proxies.T
    prior = torch.distributions.Normal(torch.zeros_like(main), torch.ones_like(main))
    split = (normals[1].log_prob(specific) - prior.log_prob(specific)).sum(dim=1).mean()
    return (
        proxy_terms(similarity, batch.labels, 0.1, 32.0)
        + F.cross_entropy(23 * F.normalize(main) @ proxies.T, uniform)
        + 0.1 * F.cross_entropy(23 * F.normalize(specific) @ proxies.T, batch.labels)
        + 1e-5 * split
    )


def pair_distances(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances of unit vectors and the masks of positive and negative pairs, (B, B)."""
    unit = F.normalize(batch.embeddings)
    same = batch.labels[:, None] == batch.labels
    itself = torch.eye(len(same), dtype=torch.bool, device=same.device)
    return (unit[:, None] - unit).square().sum(dim=2), same & ~itself, ~same


def triplet(batch: Batch) -> Tensor:
    """All triplets as a (B, B, B) tensor."""
    distances, positive, negative = pair_distances(batch)
    valid = positive[:, :, None] & negative[:, None, :]
    violation = F.relu(distances[:, :, None] - distances[:, None, :] + 1.0)
    return (violation * valid).sum() / valid.sum()


def semihard(batch: Batch) -> Tensor:
    """The semi-hard negative of each pair, in a loop over the pairs."""
    distances, positive, negative = pair_distances(batch)
    total, pairs = torch.zeros((), device=distances.device), positive.nonzero().tolist()
    for anchor, partner in pairs:
        others = distances[anchor][negative[anchor]]
        farther = others[others > distances[anchor, partner]]
        chosen = farther.min() if len(farther) else others.max()
        total = total + F.relu(distances[anchor, partner] - chosen + 0.2)
    return total / len(pairs)


def n_pair(batch: Batch) -> Tensor:
    """N-pair: the first against the second image of each class."""
    vectors = 5 * F.normalize(batch.embeddings)
    rows = [(batch.labels == c).nonzero()[:2, 0] for c in batch.labels.unique()]
    first, second = torch.stack([row for row in rows if len(row) == 2]).T
    target = torch.arange(len(first), device=first.device)
    return F.cross_entropy(vectors[first] @ vectors[second].T, target)


def multi_similarity(batch: Batch) -> Tensor:
    """Multi-similarity with mining, in a loop over the images."""
    unit = F.normalize(batch.embeddings)
    similarity = unit @ unit.T
    total = torch.zeros((), device=unit.device)
    for i, row in enumerate(similarity):
        same = batch.labels == batch.labels[i]
        positive, negative = row[same & (row < 1 - 1e-5)], row[~same]
        if len(positive) == 0:
            continue
        hard = negative[negative + 0.1 > positive.min()]
        easy = positive[positive - 0.1 < negative.max()]
        if len(hard) == 0 or len(easy) == 0:
            continue
        total = total + torch.log(1 + torch.exp(-2 * (easy - 0.5)).sum()) / 2
        total = total + torch.log(1 + torch.exp(40 * (hard - 0.5)).sum()) / 40
    return total / len(unit)


def every_triplet(labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A triplet for each positive pair of the batch, with one negative."""
    same = labels[:, None] == labels
    anchors, positives = (same & ~torch.eye(len(same), dtype=torch.bool).to(same)).nonzero().T
    return anchors, positives, (~same)[anchors].int().argmax(dim=1)


def margin(batch: Batch) -> Tensor:
    """Margin loss, in a loop over the triplets."""
    unit = F.normalize(batch.embeddings)
    total, active = torch.zeros((), device=unit.device), 0
    for a, p, n in zip(*(index.tolist() for index in every_triplet(batch.labels)), strict=True):
        positive = F.relu(((unit[a] - unit[p]).square().sum() + 1e-8).sqrt() - 1.2 + 0.2)
        negative = F.relu(1.2 - ((unit[a] - unit[n]).square().sum() + 1e-8).sqrt() + 0.2)
        active += int(positive > 0) + int(negative > 0)
        total = total + positive + negative
    return total / active


def sphere(batch: Batch) -> Tensor:
    """SEC's constraint."""
    norms = batch.embeddings.norm(dim=1)
    return ((norms - norms.mean().detach()) ** 2).mean()


def masks(batch: Batch) -> Tensor:
    """A cosine for each pair of masks."""
    masks = batch.masks.relu()
    pairs = [(i, j) for i in range(len(masks)) for j in range(len(masks)) if i != j]
    return sum(F.cosine_similarity(masks[i], masks[j], dim=0) for i, j in pairs) / len(pairs)


def sphere_pairs(batch: Batch) -> Tensor:
    """Sph."""
    unit = F.normalize(batch.embeddings)
    return pair_cross_entropy(batch, lambda a, b: unit[a] @ unit[b].T / 0.1)


def hyperbolic_pairs(batch: Batch) -> Tensor:
    """Hyp, by Möbius addition in the ball."""
    points = ball(batch.embeddings)
    return pair_cross_entropy(
        batch, lambda a, b: -mobius_distance(points[a][:, None], points[b]) / 0.2
    )


def ball(vectors: Tensor, curvature: float = 0.1) -> Tensor:
    """The exponential map at the centre, of vectors clipped to a length of 2.3."""
    length = vectors.norm(dim=1, keepdim=True)
    vectors = vectors * (2.3 / length).clamp_max(1)
    reach = curvature**0.5 * vectors.norm(dim=1, keepdim=True)
    return torch.tanh(reach) * vectors / reach


def mobius_distance(x: Tensor, y: Tensor, curvature: float = 0.1) -> Tensor:
    """2/√c · artanh(√c‖-x ⊕ y‖)."""
    product = -(x * y).sum(dim=-1, keepdim=True)
    inner, outer = (v.square().sum(dim=-1, keepdim=True) for v in (x, y))
    top = (1 + 2 * curvature * product + curvature * outer) * -x + (1 - curvature * inner) * y
    sum_ = top / (1 + 2 * curvature * product + curvature**2 * inner * outer)
    reach = curvature**0.5 * sum_.norm(dim=-1)
    return 2 / curvature**0.5 * torch.atanh(reach.clamp_max(1 - 1e-5))


def pair_cross_entropy(batch: Batch, logits: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Cross-entropy, in a loop over pairs of places within the classes."""
    rows = [(batch.labels == c).nonzero()[:, 0] for c in batch.labels.unique()]
    total = torch.zeros((), device=batch.labels.device)
    for i in range(INSTANCES):
        for j in range(INSTANCES):
            if i == j:
                continue
            first, second = (torch.stack([row[place] for row in rows]) for place in (i, j))
            across, within = logits(first, second), logits(first, first)
            within = within - 1e9 * torch.eye(len(within), device=within.device)
            target = torch.arange(len(first), device=first.device)
            total = total + F.cross_entropy(torch.cat([across, within], dim=1), target)
    return total


def rank_gaps(batch: Batch) -> tuple[Tensor, Tensor]:
    """(q, p, j) by how much j is nearer to image q than p is, and the mask of q's class."""
    unit = F.normalize(batch.embeddings)
    similarity = unit @ unit.T
    gaps = similarity[:, None] - similarity[:, :, None]
    return gaps, batch.labels[:, None] == batch.labels


def recall(batch: Batch) -> Tensor:
    """RS@k with the whole (B, B, B) table."""
    gaps, same = rank_gaps(batch)
    itself = torch.eye(len(same), dtype=torch.bool, device=same.device)
    ranks = 1 + torch.sigmoid(gaps / 0.01).masked_fill(itself, 0).sum(dim=2)
    positive, total = same & ~itself, 0.0
    for k in (min(k, len(same)) for k in (1, 2, 4, 8, 16)):  # at most the batch size
        hits = (torch.sigmoid(k - ranks) * positive).sum(dim=1).clamp_max(k)
        total = total + hits / positive.sum(dim=1).clamp_max(k) / 5
    return 1 - total.mean()


def average_precision(batch: Batch) -> Tensor:
    """SupAP with the whole (B, B, B) table."""
    gaps, same = rank_gaps(batch)
    ranks = ((gaps >= 0) & same[:, None]).sum(dim=2)
    sigmoid = torch.sigmoid(gaps / 0.01)
    step = torch.where(gaps > 0, 0.5 + sigmoid, sigmoid)
    step = torch.where(gaps > 0.05, 100 * (gaps - 0.05) + 1.44, step)
    shares = ranks / (ranks + (step * ~same[:, None]).sum(dim=2))
    return 1 - ((shares * same).sum(dim=1) / same.sum(dim=1)).mean()


def softmax(batch: Batch) -> Tensor:
    """Normalised softmax."""
    cosines = F.normalize(batch.embeddings) @ F.normalize(batch.proxies).T
    return F.cross_entropy(cosines / 0.05, batch.labels)


def arcface(batch: Batch) -> Tensor:
    """ArcFace by its angles."""
    cosines = F.normalize(batch.embeddings) @ F.normalize(batch.proxies).T
    own = F.one_hot(batch.labels, len(batch.proxies))
    return F.cross_entropy(64 * torch.cos(torch.arccos(cosines) + 0.5 * own), batch.labels)


def cosface(batch: Batch) -> Tensor:
    """CosFace."""
    cosines = F.normalize(batch.embeddings) @ F.normalize(batch.proxies).T
    own = F.one_hot(batch.labels, len(batch.proxies))
    return F.cross_entropy(64 * (cosines - 0.4 * own), batch.labels)


def hypergraph(batch: Batch) -> Tensor:
    """HIST with the (B, C, d) table of differences."""
    learnt, x = batch.learnt, F.layer_norm(batch.embeddings, batch.embeddings.shape[1:])
    differences = F.normalize(x)[:, None] - F.normalize(learnt.means)
    distances = (differences.square() / F.relu6(learnt.log_variances).exp()).sum(dim=2)
    classes = batch.labels.unique()
    own = (batch.labels[:, None] == classes).float()
    edges = own + (1 - own) * torch.exp(-0.9 * distances[:, classes])
    nodes = torch.diag(edges.sum(dim=1) ** -0.5)
    graph = nodes @ edges @ torch.diag(1 / edges.sum(dim=0)) @ edges.T @ nodes
    hidden = F.leaky_relu(learnt.norm(graph @ learnt.first(x)), 0.1)
    classified = F.cross_entropy(graph @ learnt.second(hidden), batch.labels)
    return F.cross_entropy(-32 * distances, batch.labels) + classified


def hierarchy(batch: Batch) -> Tensor:
    """HIER; its triplets are drawn like ours, so that both have the same ones."""
    points, ancestors = ball(batch.embeddings), ball(batch.learnt.ancestors)
    similarity = F.normalize(points) @ F.normalize(batch.proxies).T
    metric = proxy_terms(similarity, batch.labels, 0.1, 32.0)
    same = (batch.labels[:, None] == batch.labels).float()
    likeness = torch.exp(-distance_in_ball(points, points)).detach() + same
    images = ancestry(distance_in_ball(points, ancestors), likeness)
    between = distance_in_ball(ancestors, ancestors)
    return metric + 0.5 * (images + ancestry(between, torch.exp(-between.detach())))


def distance_in_ball(x: Tensor, y: Tensor, curvature: float = 0.1) -> Tensor:
    """arcosh(1 + 2c‖x - y‖² / ((1 - c‖x‖²)(1 - c‖y‖²))) / √c of all pairs."""
    inner, outer = (1 - curvature * v.square().sum(dim=1) for v in (x, y))
    squares = torch.cdist(x, y).square()
    ratio = 2 * curvature * squares / (inner[:, None] * outer)
    return torch.acosh(1 + ratio.clamp_min(1e-6)) / curvature**0.5


def ancestry(distances: Tensor, likeness: Tensor) -> Tensor:
    """HIER's triplets with the lowest common ancestors of two and of three."""
    i, j, k = reciprocal_triplets(likeness, 20)
    pair = torch.stack([distances[i], distances[j]]).amax(dim=0)
    three = torch.stack([pair, distances[k]]).amax(dim=0)
    of_two, of_three = (F.gumbel_softmax(-far / 0.1, hard=True) for far in (pair, three))
    found = torch.zeros((), device=distances.device)
    for node, sign in ((i, 1), (j, 1), (k, -1)):
        to_two, to_three = ((distances[node] * chosen).sum(dim=1) for chosen in (of_two, of_three))
        found = found + F.relu(sign * (to_two - to_three) + 0.1)
    other = of_two.argmax(dim=1) != of_three.argmax(dim=1)
    return (found * other).mean()


def field(batch: Batch) -> Tensor:
    """PFML with the whole table of charges."""
    per_class = len(batch.learnt.proxies) // len(batch.proxies)
    classes = torch.arange(len(batch.proxies), device=batch.labels.device)
    charges = torch.cat([batch.labels, classes.repeat_interleave(per_class)])
    points = F.normalize(torch.cat([batch.embeddings, batch.learnt.proxies]))
    distances = ((2 - 2 * points @ points.T).clamp_min(0) + 0.002**2).sqrt()
    same = charges[:, None] == charges
    itself = torch.eye(len(same), dtype=torch.bool, device=same.device)
    attraction = -1 / distances.clamp_min(0.2) ** 4
    repulsion = 1 / distances.clamp_max(0.2) ** 4 - 1 / 0.2**4
    total = (attraction * (same & ~itself)).sum() + (repulsion * ~same).sum()
    return total / len(batch.labels)


def contrast(batch: Batch) -> Tensor:
    """SupCon."""
    unit = F.normalize(batch.embeddings)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    logs = (unit @ unit.T / 0.1).masked_fill(itself, -1e9).log_softmax(dim=1)
    positive = (batch.labels[:, None] == batch.labels) & ~itself
    return -(0.1 / 0.07 * (logs * positive).sum(dim=1) / positive.sum(dim=1)).mean()
