"""Forward + backward of every loss, against pytorch-metric-learning and the plain formula.

    python benchmarks/losses.py [--repeats 9] [--only Proxy_Anchor AMLoss] [--device cuda]
    python benchmarks/losses.py --classes 1000000 --batch 512 --only Proxy_Anchor ArcFace --alone

All variants of a row are called in turn, in one run, on the same batch in float32; the table has
the median and, because other programs on the machine only ever slow a step down, the fastest call.
Before anything is timed, ours and the plain formula must give the same loss. The plain formula is
what the paper's equation becomes in PyTorch when one writes it down directly: full matrices, masks,
exponentials before logarithms. "Operators" are those of PyTorch that compute something, of which
each starts a kernel on a GPU, and little else takes time there. "Memory" is the peak a step adds,
gradients included, where the system tells it. Pair losses do not depend on the number of classes
and are timed once. ``--alone`` leaves the others out, for sizes that they have no memory for. On a
machine that is not idle, set OMP_WAIT_POLICY=PASSIVE: threads that spin while they wait for each
other would be timed instead.
"""

from __future__ import annotations

import argparse
import functools
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import losses
from benchmarks.measuring import Memory, heads, line, timed
from benchmarks.plain import proxy_terms
from criteria.hierarchy import reciprocal_triplets

INSTANCES = 3  # images of a class in the batch
LEARNERS = 32  # masks of divide and conquer


@dataclass
class Batch:
    """What all variants of a row are given; the tensors that learn are leaves.

    ``learnt`` is our criterion, whose other parameters its plain formula uses too.
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
        """All tensors that may get a gradient."""
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


# --- the plain formulas ---------------------------------------------------------------------------


def plain_proxy_anchor(batch: Batch) -> Tensor:
    """Proxy-Anchor."""
    similarity = F.normalize(batch.embeddings) @ F.normalize(batch.proxies).T
    return proxy_terms(similarity, batch.labels, 0.1, 32.0)


def plain_amloss(batch: Batch) -> Tensor:
    """AMLoss with the whole (C, C) matrix."""
    proxies = F.normalize(batch.proxies)
    similarity = F.normalize(batch.embeddings) @ proxies.T
    anchor = proxy_terms(similarity, batch.labels, batch.margins, 32.0)
    between = torch.exp(proxies @ proxies.T - batch.margins[:, None] + 0.1)
    others = between * (1 - torch.eye(len(proxies), device=proxies.device))
    return anchor + torch.log(1 + others.sum(dim=1)).mean()


def plain_introspective(batch: Batch) -> Tensor:
    """Proxy-Anchor on IDML's similarity."""
    embeddings, uncertainty = F.normalize(batch.embeddings), F.normalize(batch.second)
    cosine = embeddings @ F.normalize(batch.proxies).T
    distance = torch.cdist(embeddings, batch.proxies).square()
    spread = uncertainty.square().sum(dim=1, keepdim=True) + 4
    similarity = 1 - (1 - cosine) * torch.exp(-spread / (5 * distance))
    return proxy_terms(similarity, batch.labels, 0.1, 32.0)


def plain_disentangling(batch: Batch) -> Tensor:
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


def plain_distances(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances of unit vectors and the masks of positive and negative pairs, (B, B)."""
    unit = F.normalize(batch.embeddings)
    same = batch.labels[:, None] == batch.labels
    itself = torch.eye(len(same), dtype=torch.bool, device=same.device)
    return (unit[:, None] - unit).square().sum(dim=2), same & ~itself, ~same


def plain_triplet(batch: Batch) -> Tensor:
    """All triplets as a (B, B, B) tensor."""
    distances, positive, negative = plain_distances(batch)
    valid = positive[:, :, None] & negative[:, None, :]
    violation = F.relu(distances[:, :, None] - distances[:, None, :] + 1.0)
    return (violation * valid).sum() / valid.sum()


def plain_semihard(batch: Batch) -> Tensor:
    """The semi-hard negative of each pair, one pair after the other."""
    distances, positive, negative = plain_distances(batch)
    total, pairs = torch.zeros((), device=distances.device), positive.nonzero().tolist()
    for anchor, partner in pairs:
        others = distances[anchor][negative[anchor]]
        farther = others[others > distances[anchor, partner]]
        chosen = farther.min() if len(farther) else others.max()
        total = total + F.relu(distances[anchor, partner] - chosen + 0.2)
    return total / len(pairs)


def plain_n_pair(batch: Batch) -> Tensor:
    """First against second image of each class."""
    vectors = 5 * F.normalize(batch.embeddings)
    rows = [(batch.labels == c).nonzero()[:2, 0] for c in batch.labels.unique()]
    first, second = torch.stack([row for row in rows if len(row) == 2]).T
    target = torch.arange(len(first), device=first.device)
    return F.cross_entropy(vectors[first] @ vectors[second].T, target)


def plain_multi_similarity(batch: Batch) -> Tensor:
    """Mining and loss of one image after the other."""
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
    """Each positive pair of the batch with one negative."""
    same = labels[:, None] == labels
    anchors, positives = (same & ~torch.eye(len(same), dtype=torch.bool).to(same)).nonzero().T
    return anchors, positives, (~same)[anchors].int().argmax(dim=1)


def plain_margin(batch: Batch) -> Tensor:
    """Margin loss, one triplet after the other."""
    unit = F.normalize(batch.embeddings)
    total, active = torch.zeros((), device=unit.device), 0
    for a, p, n in zip(*(index.tolist() for index in every_triplet(batch.labels)), strict=True):
        positive = F.relu(((unit[a] - unit[p]).square().sum() + 1e-8).sqrt() - 1.2 + 0.2)
        negative = F.relu(1.2 - ((unit[a] - unit[n]).square().sum() + 1e-8).sqrt() + 0.2)
        active += int(positive > 0) + int(negative > 0)
        total = total + positive + negative
    return total / active


def plain_sphere(batch: Batch) -> Tensor:
    """SEC's constraint."""
    norms = batch.embeddings.norm(dim=1)
    return ((norms - norms.mean().detach()) ** 2).mean()


def plain_masks(batch: Batch) -> Tensor:
    """A cosine for each pair of masks."""
    masks = batch.masks.relu()
    pairs = [(i, j) for i in range(len(masks)) for j in range(len(masks)) if i != j]
    return sum(F.cosine_similarity(masks[i], masks[j], dim=0) for i, j in pairs) / len(pairs)


def plain_sphere_pairs(batch: Batch) -> Tensor:
    """Sph."""
    unit = F.normalize(batch.embeddings)
    return plain_pair_cross_entropy(batch, lambda a, b: unit[a] @ unit[b].T / 0.1)


def plain_hyperbolic_pairs(batch: Batch) -> Tensor:
    """Hyp, by Möbius addition in the ball."""
    points = plain_ball(batch.embeddings)
    return plain_pair_cross_entropy(
        batch, lambda a, b: -plain_mobius_distance(points[a][:, None], points[b]) / 0.2
    )


def plain_ball(vectors: Tensor, curvature: float = 0.1) -> Tensor:
    """The exponential map at the centre, of vectors clipped to a length of 2.3."""
    length = vectors.norm(dim=1, keepdim=True)
    vectors = vectors * (2.3 / length).clamp_max(1)
    reach = curvature**0.5 * vectors.norm(dim=1, keepdim=True)
    return torch.tanh(reach) * vectors / reach


def plain_mobius_distance(x: Tensor, y: Tensor, curvature: float = 0.1) -> Tensor:
    """2/√c · artanh(√c‖-x ⊕ y‖)."""
    product = -(x * y).sum(dim=-1, keepdim=True)
    inner, outer = (v.square().sum(dim=-1, keepdim=True) for v in (x, y))
    top = (1 + 2 * curvature * product + curvature * outer) * -x + (1 - curvature * inner) * y
    sum_ = top / (1 + 2 * curvature * product + curvature**2 * inner * outer)
    reach = curvature**0.5 * sum_.norm(dim=-1)
    return 2 / curvature**0.5 * torch.atanh(reach.clamp_max(1 - 1e-5))


def plain_pair_cross_entropy(batch: Batch, logits: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """A pair of places at a time; a class with fewer images has none in the later ones."""
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


def plain_ranks(batch: Batch) -> tuple[Tensor, Tensor]:
    """What is how much nearer to image q than p is, (q, p, j), and whose class is that of q."""
    unit = F.normalize(batch.embeddings)
    similarity = unit @ unit.T
    gaps = similarity[:, None] - similarity[:, :, None]
    return gaps, batch.labels[:, None] == batch.labels


def plain_recall(batch: Batch) -> Tensor:
    """RS@k with the whole (B, B, B) table."""
    gaps, same = plain_ranks(batch)
    itself = torch.eye(len(same), dtype=torch.bool, device=same.device)
    ranks = 1 + torch.sigmoid(gaps / 0.01).masked_fill(itself, 0).sum(dim=2)
    positive, total = same & ~itself, 0.0
    for k in (min(k, len(same)) for k in (1, 2, 4, 8, 16)):  # none above the batch
        hits = (torch.sigmoid(k - ranks) * positive).sum(dim=1).clamp_max(k)
        total = total + hits / positive.sum(dim=1).clamp_max(k) / 5
    return 1 - total.mean()


def plain_average_precision(batch: Batch) -> Tensor:
    """SupAP with the whole (B, B, B) table."""
    gaps, same = plain_ranks(batch)
    ranks = ((gaps >= 0) & same[:, None]).sum(dim=2)
    sigmoid = torch.sigmoid(gaps / 0.01)
    step = torch.where(gaps > 0, 0.5 + sigmoid, sigmoid)
    step = torch.where(gaps > 0.05, 100 * (gaps - 0.05) + 1.44, step)
    shares = ranks / (ranks + (step * ~same[:, None]).sum(dim=2))
    return 1 - ((shares * same).sum(dim=1) / same.sum(dim=1)).mean()


def plain_softmax(batch: Batch) -> Tensor:
    """Normalised softmax."""
    cosines = F.normalize(batch.embeddings) @ F.normalize(batch.proxies).T
    return F.cross_entropy(cosines / 0.05, batch.labels)


def plain_arcface(batch: Batch) -> Tensor:
    """ArcFace by its angles."""
    cosines = F.normalize(batch.embeddings) @ F.normalize(batch.proxies).T
    own = F.one_hot(batch.labels, len(batch.proxies))
    return F.cross_entropy(64 * torch.cos(torch.arccos(cosines) + 0.5 * own), batch.labels)


def plain_cosface(batch: Batch) -> Tensor:
    """CosFace."""
    cosines = F.normalize(batch.embeddings) @ F.normalize(batch.proxies).T
    own = F.one_hot(batch.labels, len(batch.proxies))
    return F.cross_entropy(64 * (cosines - 0.4 * own), batch.labels)


def plain_hypergraph(batch: Batch) -> Tensor:
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


def plain_hierarchy(batch: Batch) -> Tensor:
    """HIER; its triplets are drawn as ours are, so that both have the same."""
    points, ancestors = plain_ball(batch.embeddings), plain_ball(batch.learnt.ancestors)
    similarity = F.normalize(points) @ F.normalize(batch.proxies).T
    metric = proxy_terms(similarity, batch.labels, 0.1, 32.0)
    same = (batch.labels[:, None] == batch.labels).float()
    likeness = torch.exp(-plain_distance(points, points)).detach() + same
    images = plain_ancestry(plain_distance(points, ancestors), likeness)
    between = plain_distance(ancestors, ancestors)
    return metric + 0.5 * (images + plain_ancestry(between, torch.exp(-between.detach())))


def plain_distance(x: Tensor, y: Tensor, curvature: float = 0.1) -> Tensor:
    """arcosh(1 + 2c‖x - y‖² / ((1 - c‖x‖²)(1 - c‖y‖²))) / √c of all pairs."""
    inner, outer = (1 - curvature * v.square().sum(dim=1) for v in (x, y))
    squares = torch.cdist(x, y).square()
    ratio = 2 * curvature * squares / (inner[:, None] * outer)
    return torch.acosh(1 + ratio.clamp_min(1e-6)) / curvature**0.5


def plain_ancestry(distances: Tensor, likeness: Tensor) -> Tensor:
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


def plain_field(batch: Batch) -> Tensor:
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


def plain_contrast(batch: Batch) -> Tensor:
    """SupCon."""
    unit = F.normalize(batch.embeddings)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    logs = (unit @ unit.T / 0.1).masked_fill(itself, -1e9).log_softmax(dim=1)
    positive = (batch.labels[:, None] == batch.labels) & ~itself
    return -(0.1 / 0.07 * (logs * positive).sum(dim=1) / positive.sum(dim=1)).mean()


# --- the rows -------------------------------------------------------------------------------------

Step = Callable[[], Tensor]


class Case(NamedTuple):
    """A row: the plain formula, the library's, and ours as a criterion and what it is called with.

    ``ours`` is the loss of that name unless it is told.
    """

    name: str
    plain: Callable[[Batch], Tensor]
    library: str | None = None
    inputs: Callable[[Batch], tuple] = lambda batch: (batch.embeddings, batch.labels)
    ours: Callable[[int, int], nn.Module] | None = None
    by_class: bool = False
    wide: bool = False
    most: int = sys.maxsize  # classes that the plain formula has memory for

    def criterion(self, classes: int, size: int) -> nn.Module:
        """Ours, for so many classes and embeddings of this size."""
        return (self.ours or functools.partial(losses.build, self.name))(classes, size)


def unit_inputs(batch: Batch) -> tuple:
    """(unit embeddings, labels)."""
    return F.normalize(batch.embeddings), batch.labels


def introspective_inputs(batch: Batch) -> tuple:
    """(embeddings, labels, uncertainty) at unit length."""
    return *unit_inputs(batch), F.normalize(batch.second)


def both_heads(batch: Batch) -> tuple:
    """(main head, specific head, labels)."""
    return batch.embeddings, batch.second, batch.labels


def disentangling(classes: int, size: int) -> nn.Module:
    """DDML around Proxy-Anchor."""
    return losses.DisentanglingLoss(losses.ProxyAnchorLoss(classes, size), 1.0, 0.1, 1e-5)


def named(name: str, **options: Any) -> Callable[[int, int], nn.Module]:
    """Our loss of this name, with options."""
    return functools.partial(losses.build, name, **options)


by_class = functools.partial(Case, by_class=True)
CASES = (
    by_class("Proxy_Anchor", plain_proxy_anchor, "pml:ProxyAnchorLoss"),
    by_class("AMLoss", plain_amloss),
    by_class("IDML", plain_introspective, None, introspective_inputs, named("Proxy_Anchor")),
    by_class("DDML", plain_disentangling, None, both_heads, disentangling, wide=True),
    Case("triplet", plain_triplet, "pml:TripletMarginLoss"),
    Case("semihtriplet", plain_semihard, "Triplet"),
    Case("n-npair", plain_n_pair, "pml:NPairsLoss"),
    Case("ms", plain_multi_similarity, "MS"),
    Case("MarginLoss", plain_margin, None, lambda b: (*unit_inputs(b), every_triplet(b.labels))),
    Case(
        "SEC",
        plain_sphere,
        None,
        lambda b: (b.embeddings,),
        lambda *_: losses.SphericalConstraint(),
    ),
    Case("Sph", plain_sphere_pairs),
    Case("Hyp", plain_hyperbolic_pairs),
    Case("RecallAtK", plain_recall, None, unit_inputs),
    Case("SupAP", plain_average_precision, None, unit_inputs, named("SupAP", weight=1.0)),
    Case("SupCon", plain_contrast, "pml:SupConLoss", ours=named("SupCon", temperature=0.1)),
    by_class("NormSoftmax", plain_softmax, "pml:NormalizedSoftmaxLoss"),
    by_class(
        "ArcFace", plain_arcface, "pml:ArcFaceLoss", ours=named("ArcFace", exact_gradient=True)
    ),
    by_class("CosFace", plain_cosface, "pml:CosFaceLoss"),
    by_class("HIST", plain_hypergraph, most=1000),
    by_class("HIER", plain_hierarchy),
    by_class("PFML", plain_field, most=1000),
    Case("masks", plain_masks, None, lambda b: (b.masks,), lambda *_: losses.MaskOrthogonality()),
)


def variants(
    case: Case, batch: Batch, size: int, device: str, alone: bool = False
) -> dict[str, Step]:
    """The steps to be timed: ours, the plain formula, the library's, on the same parameters."""
    criterion = case.criterion(len(batch.proxies), size).to(device)
    steps: dict[str, Step] = {"ours": lambda: criterion(*case.inputs(batch))}
    share_parameters(criterion, batch)
    batch.learnt = criterion
    if alone:
        return steps
    steps["plain"] = lambda: case.plain(batch)
    if case.library:
        library = losses.build(case.library, len(batch.proxies), size).to(device)
        share_parameters(library, batch)
        steps["library"] = lambda: library(batch.embeddings, batch.labels)
    return steps


def share_parameters(criterion: nn.Module, batch: Batch) -> None:
    """Make the batch's proxies and margins those of the criterion."""
    shared = {"proxies": batch.proxies, "margins": batch.margins}
    for module in criterion.modules():
        for name in shared.keys() & dict(module.named_parameters(recurse=False)).keys():
            if getattr(module, name).shape != shared[name].shape:
                continue  # several proxies of a class
            del module._parameters[name]
            setattr(module, name, shared[name])  # the leaf itself, so that its gradient is cleared


# --- measuring ------------------------------------------------------------------------------------


def duration(step: Step, clear: Callable[[], None], device: str) -> float:
    """Seconds of one forward and backward pass."""
    clear()
    return timed(lambda: step().backward(), device)


def peak_mebibytes(step: Step, clear: Callable[[], None], device: str) -> float | None:
    """What one pass adds to the memory at its peak, or None where the system does not tell."""
    clear()
    try:
        memory = Memory(device)
    except (OSError, AttributeError):
        return None
    step().backward()
    return memory.peak() / 2**20


class OperatorCount(TorchDispatchMode):
    """Counts the operators that compute something: neither views nor empty memory."""

    IDLE = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count it, and do it."""
        name = function.overloadpacket.__name__
        self.count += not function.is_view and name not in self.IDLE
        return function(*args, **(kwargs or {}))


def operators(step: Step, clear: Callable[[], None]) -> int:
    """Operators of one forward and backward pass."""
    clear()
    with OperatorCount() as counter:
        step().backward()
    return counter.count


def check_agreement(case: Case, steps: dict[str, Step]) -> None:
    """Stop when ours and the plain formula differ."""
    values = []
    for kind in ("ours", "plain"):
        torch.manual_seed(1)
        values.append(steps[kind]().item())
    if not math.isclose(*values, rel_tol=1e-3):
        raise SystemExit(
            f"{case.name}: ours gives {values[0]:.6f}, the plain formula {values[1]:.6f}"
        )


def measure(case: Case, classes: int, args: argparse.Namespace) -> str:
    """One line of the table."""
    batch = make_batch(classes, args.dim, args.batch, args.device, case.wide)
    steps = variants(case, batch, args.dim, args.device, args.alone)
    if not args.alone:
        check_agreement(case, steps)

    def clear() -> None:
        for leaf in batch.leaves:
            leaf.grad = None

    counts = {} if args.alone else {kind: operators(step, clear) for kind, step in steps.items()}
    memory = {kind: peak_mebibytes(step, clear, args.device) for kind, step in steps.items()}
    times: dict[str, list[float]] = {kind: [] for kind in steps}
    for _ in range(args.repeats):
        for kind, step in steps.items():
            times[kind].append(duration(step, clear, args.device))
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    fastest = {kind: min(values) for kind, values in times.items()}
    cells = [case.name, f"{classes:,}" if case.by_class else "any"]
    cells += [
        f"{1e3 * medians[kind]:.2f} ({1e3 * fastest[kind]:.2f})" if kind in steps else "–"
        for kind in COLUMNS
    ]
    cells += [f"{gain(medians):.2f}× ({gain(fastest):.2f}×)" if len(steps) > 1 else "–"]
    cells += [f"{counts[kind]}" if kind in counts else "–" for kind in ("ours", "plain")]
    cells += [f"{memory[kind]:.0f}" if memory.get(kind) is not None else "–" for kind in COLUMNS]
    return line(cells)


def gain(times: dict[str, float]) -> float:
    """How many times longer the faster of the others takes than ours."""
    return min(value for kind, value in times.items() if kind != "ours") / times["ours"]


COLUMNS = ("ours", "plain", "library")
HEADER = (
    *("loss", "C", "ours, ms", "plain formula, ms", "library, ms", "faster other / ours"),
    *("operators ours", "plain", "memory ours, MiB", "plain", "library"),
)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--classes", type=int, nargs="+", default=[100, 11318])
    parser.add_argument("--dim", type=int, default=512)
    parser.add_argument("--batch", type=int, default=180)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--alone", action="store_true", help="time ours and nothing else")
    parser.add_argument("--only", nargs="+", choices=[case.name for case in CASES])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    where = torch.cuda.get_device_name() if args.device.startswith("cuda") else "CPU"
    print(
        f"torch {torch.__version__}, {where}, {args.threads} threads, float32, B = {args.batch}, "
        f"d = {args.dim}, median (fastest) of {args.repeats}\n\n{heads(HEADER)}"
    )
    for case in CASES:
        if args.only and case.name not in args.only:
            continue
        for classes in args.classes if case.by_class else args.classes[:1]:
            if classes > case.most and not args.alone:
                continue
            print(measure(case, classes, args), flush=True)


if __name__ == "__main__":
    main()
