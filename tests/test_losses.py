"""The losses against the authors' released code (fixtures), against finite differences, and against
what their equations say about special cases."""

from __future__ import annotations

import copy
import importlib
import inspect
import itertools
import math
import pickle
import pkgutil
import re
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_python

import criteria
import losses
import options
from criteria.arguments import arguments_of
from criteria.base import check_batch, pair_masks
from criteria.ddml import log_softplus
from losses import (
    AMLoss,
    DisentanglingLoss,
    DistanceWeightedMiner,
    Embeddings,
    MarginLoss,
    MultiSimilarityLoss,
    NearestNegativeMiner,
    NormPenalty,
    NPairLoss,
    Objective,
    ProxyAnchorLoss,
    ProxyCrowding,
    ProxyLoss,
    SemihardTripletLoss,
    SoftmaxPairLoss,
    SphericalConstraint,
    Term,
    TripletLoss,
    build,
    build_miner,
    compose,
    introspective_similarity,
    mask_orthogonality,
    options_of,
)
from utils import InputError

pytest.importorskip("pytorch_metric_learning")
FIXTURES = Path(__file__).parent / "fixtures"
CLASSES, SIZE = 20, 16


pytestmark = pytest.mark.usefixtures("one_thread")


def fixture(name):
    """The arrays of a fixture as tensors; scalars as Python numbers."""
    with np.load(FIXTURES / f"{name}.npz") as archive:
        arrays = {key: archive[key] for key in archive.files}
    return {k: v.item() if v.ndim == 0 else torch.from_numpy(v) for k, v in arrays.items()}


def names(pattern):
    found = sorted(path.stem for path in FIXTURES.glob(f"{pattern}.npz"))
    assert found, f"no fixture matches {pattern}"
    return found


def agree(actual, expected):
    expected = torch.as_tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(
        actual.detach().float(), expected.reshape(actual.shape), rtol=2e-4, atol=2e-5
    )


def leaf(tensor):
    return tensor.clone().requires_grad_()


def assert_released(data, loss, **learnt):
    """The loss, and the gradient of every tensor, are the released code's."""
    loss.backward()
    agree(loss, data["loss"])
    for name, tensor in learnt.items():
        agree(tensor.grad, data[f"grad_{name}"])


def with_parameters(criterion, **values):
    """The criterion with these parameter values; every name must exist."""
    parameters = dict(criterion.named_parameters())
    for name, value in values.items():
        parameters[name].data = value.clone()
    return criterion


def batch(classes=8, images=3, size=SIZE, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(classes).repeat_interleave(images)
    embeddings = torch.randn(len(labels), size, generator=generator, dtype=dtype)
    return embeddings.requires_grad_(), labels


# --- the authors' code ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("proxy_anchor*"))
def test_proxy_anchor_is_the_released_one(name):
    data = fixture(name)
    criterion = ProxyAnchorLoss(*data["proxies"].shape, data["margin"], data["alpha"])
    with_parameters(criterion, proxies=data["proxies"])
    embeddings = leaf(data["embeddings"])
    loss = criterion(embeddings, data["labels"])
    assert_released(data, loss, embeddings=embeddings, proxies=criterion.proxies)


@pytest.mark.parametrize("strip_elements", [2**24, 60])
@pytest.mark.parametrize("name", names("amloss*"))
def test_amloss_is_the_released_one(name, strip_elements, monkeypatch):
    monkeypatch.setattr(ProxyCrowding, "strip_elements", strip_elements)
    data = fixture(name)
    constants = [data[key] for key in ("margin", "alphap", "alphan", "delta", "lam")]
    criterion = AMLoss(*data["proxies"].shape, *constants)
    with_parameters(criterion, proxies=data["proxies"], margins=data["margins"])
    embeddings = leaf(data["embeddings"])
    loss = criterion(embeddings, data["labels"])
    learnt = {"proxies": criterion.proxies, "margins": criterion.margins}
    assert_released(data, loss, embeddings=embeddings, **learnt)


@pytest.mark.parametrize("name", names("ddml[01]*"))
def test_ddml_is_the_released_one(name):
    data = fixture(name)
    base = ProxyAnchorLoss(*data["proxies"].shape, data["margin"], data["alpha"])
    with_parameters(base, proxies=data["proxies"])
    criterion = DisentanglingLoss(base, data["al"], data["be"], data["gam"], data["scale"])
    main, specific = leaf(data["embedding_params"]), leaf(data["specific_params"])
    torch.manual_seed(data["rng_seed"])
    loss = criterion(main, specific, data["labels"])
    heads = {"embedding_params": main, "specific_params": specific}
    assert_released(data, loss, **heads, proxies=base.proxies)
    for part in ("metric", "agnostic", "specific", "split"):
        agree(criterion.terms[part], data[part])


@pytest.mark.parametrize("name", names("idml*"))
def test_idml_is_the_released_one(name):
    data = fixture(name)
    objective = compose(
        "Proxy_Anchor",
        *data["proxies"].shape,
        attach={"introspective": {}},
        l2_norm=data["l2_normalised"],
        margin=data["margin"],
        alpha=data["alpha"],
    )
    criterion = objective.parts["metric"].criterion
    with_parameters(criterion, proxies=data["proxies"])
    outputs = Embeddings(leaf(data["semantic"]), leaf(data["uncertainty"]))
    loss = objective(outputs, data["labels"])
    heads = {"semantic": outputs.embedding, "uncertainty": outputs.uncertainty}
    assert_released(data, loss, **heads, proxies=criterion.proxies)


@pytest.mark.parametrize("loss_name", ["triplet", "semihtriplet", "n-npair", "ms"])
@pytest.mark.parametrize("seed", [0, 1])
def test_sec_pair_losses_are_the_released_ones(loss_name, seed):
    data = fixture(f"sec_{loss_name}_{seed}")
    embeddings = leaf(data["embeddings"])
    loss = build(loss_name, CLASSES, SIZE)(embeddings, data["labels"])
    assert_released(data, loss, embeddings=embeddings)


@pytest.mark.parametrize("name", names("sec_regulariser*"))
def test_spherical_constraint_is_the_released_one(name):
    data = fixture(name)
    constraint, penalty = SphericalConstraint(momentum=data["norm_momentum"]), NormPenalty()
    for step, values in enumerate(data["embeddings"]):
        embeddings = leaf(values)
        loss = constraint(embeddings)
        loss.backward()
        agree(loss, data["loss"][step])
        agree(embeddings.grad, data["grad_embeddings"][step])
        agree(penalty(embeddings), data["l2reg"][step])


@pytest.mark.parametrize("name", names("dc_margin*"))
def test_margin_loss_is_the_released_one(name):
    data = fixture(name)
    criterion = MarginLoss(data["beta"], data["margin"])
    embeddings = leaf(data["embeddings"])
    triplets = data["anchors"], data["positives"], data["negatives"]
    loss = criterion(embeddings, data["labels"], triplets)
    assert_released(data, loss, embeddings=embeddings, beta=criterion.beta)


def drawing_shares(miner, embeddings, labels):
    """How likely each image is drawn as a negative of the row's, if one is drawn."""
    unit = F.normalize(embeddings)
    weights = miner.weights(unit, unit, pair_masks(labels)[1])
    return weights / weights.sum(dim=1, keepdim=True)


@pytest.mark.parametrize("name", names("dc_distance_weights*"))
def test_distance_weights_are_the_released_ones(name):
    data = fixture(name)
    miner = DistanceWeightedMiner(data["cutoff"], data["nonzero_loss_cutoff"])
    agree(drawing_shares(miner, data["embeddings"], data["labels"]), data["probabilities"])


@pytest.mark.parametrize("name", names("dc_mask_orthogonality*"))
def test_mask_orthogonality_is_the_released_one(name):
    data = fixture(name)
    masks = leaf(data["masks"])
    assert_released(data, mask_orthogonality(masks), masks=masks)


# --- gradients, precision, numerical range --------------------------------------------------------


def triplets_of(labels):
    positive, negative = pair_masks(labels)
    anchors, positives = positive.nonzero(as_tuple=True)
    return anchors, positives, negative[anchors].int().argmax(dim=1)


GRADCHECKED = {
    "proxy_anchor": lambda x, y: ProxyAnchorLoss(6, 5, alpha=8.0).double()(x, y),
    "amloss": lambda x, y: AMLoss(6, 5, alphap=8.0, alphan=8.0).double()(x, y),
    "introspective": lambda x, y: ProxyAnchorLoss(6, 5, alpha=8.0).double()(x, y, x.flip(0)),
    "disentangling": lambda x, y: DisentanglingLoss(
        ProxyAnchorLoss(6, 5, alpha=8.0).double(), al=1.0, be=0.1, gam=0.1
    )(x.repeat(1, 2), x.flip(0).repeat(1, 2), y),
    "triplet": lambda x, y: TripletLoss()(x, y),
    "semihard": lambda x, y: SemihardTripletLoss(squared=False, soft=True)(x, y),
    "n-pair": lambda x, y: NPairLoss()(x, y),
    "multi-similarity": lambda x, y: MultiSimilarityLoss(beta=5.0)(x, y),
    "sphere": lambda x, y: SphericalConstraint().double()(F.pad(x, (0, 1), value=3.0)),
    "l2": lambda x, y: NormPenalty()(x),
    "margin": lambda x, y: MarginLoss().double()(F.normalize(x), y, triplets_of(y)),
    "softmax pairs": lambda x, y: SoftmaxPairLoss().double()(x, y),
    "masks": lambda x, y: mask_orthogonality(x),
    "Hyp": lambda x, y: build("Hyp", 6, 5)(x, y),
    "Sph": lambda x, y: build("Sph", 6, 5)(x, y),
    "RecallAtK": lambda x, y: build("RecallAtK", 6, 5, temperature=0.1)(F.normalize(x), y),
    "SupAP": lambda x, y: build("SupAP", 6, 5, temperature=0.1).double()(F.normalize(x), y),
    "NormSoftmax": lambda x, y: build("NormSoftmax", 6, 5, smoothing=0.1).double()(x, y),
    "ProxyNCA_pp": lambda x, y: build("ProxyNCA_pp", 6, 5).double()(x, y),
    "ArcFace": lambda x, y: build("ArcFace", 6, 5, scale=4, exact_gradient=True).double()(x, y),
    "CosFace": lambda x, y: build("CosFace", 6, 5, scale=4, sub_centers=2).double()(x, y),
    "SupCon": lambda x, y: build("SupCon", 6, 5)(x, y),
    "HIST": lambda x, y: build("HIST", 6, 5, tau=2, hidden=4).double()(x, y),
    "PFML": lambda x, y: build("PFML", 6, 5, delta=0.7, proxies_per_class=2).double()(x, y),
    "SiMix": lambda x, y: build("RecallAtK", 6, 5, temperature=0.1, simix=True)(x, y),
}


@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradients_are_those_of_finite_differences(name):
    embeddings, labels = batch(3, 3, size=5, dtype=torch.float64)
    if name == "sphere":  # its mean is a constant for the gradient, not for the difference
        constraint = SphericalConstraint(momentum=1e-12).double()
        constraint(embeddings)
        constraint.eval()
        assert torch.autograd.gradcheck(constraint, (embeddings,))
        return

    def loss(values):
        torch.manual_seed(0)  # the same proxies and noise in every evaluation
        return GRADCHECKED[name](values, labels)

    assert loss(embeddings).dtype == torch.float64
    assert torch.autograd.gradcheck(loss, (embeddings,))


def test_the_two_terms_of_proxy_anchor_are_its_loss():
    criterion = build("Proxy_Anchor", 5, SIZE, margin=0.2, alpha=8.0)
    embeddings, labels = torch.randn(9, SIZE), torch.tensor([0, 0, 0, 1, 1, 3, 3, 3, 4])
    similarity = F.normalize(embeddings) @ F.normalize(criterion.proxies.detach()).T
    own = F.one_hot(labels, 5).bool()
    pull = (torch.exp(-8 * (similarity - 0.2)) * own).sum(dim=0)
    push = (torch.exp(8 * (similarity + 0.2)) * ~own).sum(dim=0)
    pulled = losses.positive_term(similarity, labels, 0.2, 8.0)
    pushed = losses.negative_term(similarity, labels, 0.2, 8.0)
    torch.testing.assert_close(pulled, torch.log1p(pull[own.any(dim=0)]).mean())
    torch.testing.assert_close(pushed, torch.log1p(push).mean())
    torch.testing.assert_close(criterion(embeddings, labels), pulled + pushed)


@pytest.mark.parametrize("strip_elements", [2**24, 14, 1])
def test_amloss_gradients_of_proxies_and_margins(strip_elements, monkeypatch):
    monkeypatch.setattr(ProxyCrowding, "strip_elements", strip_elements)
    embeddings, labels = batch(3, 2, size=4, dtype=torch.float64)
    criterion = AMLoss(7, 4, alphap=8.0, alphan=8.0, lam=2.0).double()

    def loss(proxies, margins):
        parameters = {"proxies": proxies, "margins": margins}
        return torch.func.functional_call(criterion, parameters, (embeddings.detach(), labels))

    assert torch.autograd.gradcheck(loss, (leaf(criterion.proxies.data), leaf(criterion.margins)))


@pytest.mark.parametrize("name", ["Proxy_Anchor", "AMLoss", "triplet", "NormSoftmax", "HIER"])
def test_a_second_derivative_is_refused_and_never_left_out(name):
    embeddings, labels = batch()
    loss = build(name, CLASSES, SIZE, **SMALL.get(name, {}))(embeddings, labels)
    with pytest.raises(RuntimeError, match="leave out create_graph=True"):
        torch.autograd.grad(loss, embeddings, create_graph=True)


def test_crowding_is_the_logarithm_of_the_matrix_form():
    proxies = F.normalize(torch.randn(50, 8, dtype=torch.float64))
    exponents = (proxies @ proxies.T).fill_diagonal_(-torch.inf)
    torch.testing.assert_close(ProxyCrowding.apply(proxies), exponents.logsumexp(dim=1))


EVERY_LOSS = list(criteria.LOSSES)
SMALL = {"HIER": {"ancestors": 16}}
"""Arguments with which a loss takes no longer than the others."""
PROXY_LOSSES = [name for name in EVERY_LOSS if isinstance(build(name, CLASSES, SIZE), ProxyLoss)]


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_every_loss_is_float32_under_autocast(name):
    criterion = build(name, CLASSES, SIZE, **SMALL.get(name, {}))
    criterion.train()
    embeddings, labels = batch()
    head = leaf(embeddings.detach().bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.manual_seed(1)
        loss = criterion(head, labels)
    assert loss.dtype == torch.float32 and loss.ndim == 0
    loss.backward()
    assert head.grad.dtype == torch.bfloat16 and head.grad.isfinite().all()
    assert all(parameter.dtype == torch.float32 for parameter in criterion.parameters())
    torch.manual_seed(1)
    torch.testing.assert_close(criterion(head.float(), labels), loss)


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_every_loss_reports_and_lists_its_parameters_once(name):
    criterion = build(name, CLASSES, SIZE, **SMALL.get(name, {}))
    embeddings, labels = batch()
    loss = criterion(embeddings, labels)
    assert loss.requires_grad
    for term in criterion.terms.values():
        assert term.ndim == 0 and not term.requires_grad
    groups = criterion.parameter_groups(1e-4)
    assert all({"name", "params", "lr"} <= set(group) for group in groups)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    learnt = [id(p) for p in criterion.parameters() if p.requires_grad]
    assert sorted(grouped) == sorted(learnt)


@pytest.mark.parametrize("alpha", [32.0, 128.0, 1000.0])
@pytest.mark.parametrize("similarity", [-1.0, 1.0])
def test_extreme_similarities_stay_finite(alpha, similarity):
    for criterion in (ProxyAnchorLoss(4, 3, 0.1, alpha), AMLoss(4, 3, 0.1, alpha, alpha)):
        with torch.no_grad():
            criterion.proxies.copy_(torch.tensor([1.0, 0.0, 0.0]).expand(4, 3))
        embeddings = leaf(similarity * criterion.proxies.detach())
        loss = criterion(embeddings, torch.tensor([0, 0, 1, 2]))
        loss.backward()
        assert loss.isfinite()
        assert embeddings.grad.isfinite().all() and criterion.proxies.grad.isfinite().all()
    expected = alpha * (0.1 + max(-similarity, similarity))  # one term saturates, the other is 0
    assert criterion.terms["negative" if similarity > 0 else "positive"] == pytest.approx(
        expected, rel=0.2
    )


def test_log_one_plus_sum_exp_is_exact_in_the_easy_range():
    exponents = torch.randn(5, 7, dtype=torch.float64)
    expected = torch.log1p(exponents.exp().sum(dim=0))
    torch.testing.assert_close(losses.log_one_plus_sum_exp(exponents, dim=0), expected)
    nothing = torch.full((3, 2), -torch.inf)
    assert torch.equal(losses.log_one_plus_sum_exp(nothing, dim=0), torch.zeros(2))


# --- properties -----------------------------------------------------------------------------------

# The first and the second image of a class, or the i-th of all; a miner that pairs by index; draws.
ORDERED = {"n-npair", "NPair", "TripletLoss", "MarginLoss", "Hyp", "Sph", "HIER"}


@pytest.mark.parametrize("name", sorted(set(EVERY_LOSS) - ORDERED))
def test_order_of_the_batch_does_not_matter(name):
    criterion = build(name, CLASSES, SIZE)
    embeddings, labels = batch()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        criterion(embeddings[order], labels[order]), criterion(embeddings, labels)
    )


def test_margin_of_an_absent_class_still_learns():
    embeddings, labels = batch(4, 3)
    criterion = AMLoss(CLASSES, SIZE)
    criterion(embeddings, labels).backward()
    assert (criterion.margins.grad[4:] < 0).all()  # descent raises it: the third term
    without = AMLoss(CLASSES, SIZE, lam=0.0)
    without(embeddings, labels).backward()
    assert (without.margins.grad[4:] == 0).all() and (without.margins.grad[:4] > 0).all()


def test_crowded_proxies_raise_their_margins_faster():
    criterion = AMLoss(6, 4)
    with torch.no_grad():
        criterion.proxies.copy_(
            torch.tensor([[1.0, 0, 0, 0]] * 3 + [[0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]])
        )
    crowding = ProxyCrowding.apply(F.normalize(criterion.proxies))
    assert crowding[:3].min() > crowding[3:].max()


def test_amloss_with_one_class_is_finite():
    criterion = AMLoss(1, 4)
    loss = criterion(torch.randn(3, 4), torch.zeros(3, dtype=torch.long))
    loss.backward()
    assert loss.isfinite() and criterion.proxies.grad.isfinite().all()


def test_amloss_without_third_term_and_own_margins_is_proxy_anchor():
    embeddings, labels = batch()
    anchor, am = ProxyAnchorLoss(CLASSES, SIZE), AMLoss(CLASSES, SIZE, lam=0.0)
    with_parameters(am, proxies=anchor.proxies.data)
    torch.testing.assert_close(am(embeddings, labels), anchor(embeddings, labels))


def test_amloss_class_by_class():
    """Unequal classes, unequal margins, and a different constant in every place."""
    embeddings, labels = torch.randn(9, 5).double(), torch.tensor([0, 0, 0, 0, 2, 2, 3, 3, 3])
    criterion = AMLoss(5, 5, 0.3, alphap=7.0, alphan=3.0, delta=0.2, lam=1.5).double()
    margins = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.4]).double()
    with_parameters(criterion, margins=margins)
    proxies = F.normalize(criterion.proxies.detach())
    s = F.normalize(embeddings) @ proxies.T
    pull, push, apart = [], [], []
    for c in range(5):
        own = labels == c
        if own.any():
            pull.append(torch.log1p(torch.exp(-7 * (s[own, c] - margins[c])).sum()))
        push.append(torch.log1p(torch.exp(3 * (s[~own, c] + 0.3)).sum()))
        others = torch.cat([proxies[:c], proxies[c + 1 :]]) @ proxies[c]
        apart.append(torch.log1p(torch.exp(others - margins[c] + 0.2).sum()))
    expected = sum(pull) / 3 + sum(push) / 5 + 1.5 * sum(apart) / 5
    torch.testing.assert_close(criterion(embeddings, labels).detach(), expected)


@pytest.mark.parametrize("miner", losses.MINERS)
def test_mined_losses_are_means_over_what_is_active(miner):
    torch.manual_seed(0)
    x, y = F.normalize(torch.randn(20, 3).double()), torch.randint(0, 4, (20,))
    triplets = build_miner(miner, margin=0.5)(x, y)
    near, far = (
        [math.dist(x[a], x[b]) for a, b in zip(triplets[0], others, strict=True)]
        for others in triplets[1:]
    )
    costs = [max(0.0, p - n + 0.5) for p, n in zip(near, far, strict=True)]
    active = [cost for cost in costs if cost]
    assert len(active) > 1
    criterion = TripletLoss(0.5, squared=False)
    assert criterion(x, y, triplets).item() == pytest.approx(np.mean(active), rel=1e-5)
    assert criterion.terms["active"].item() == pytest.approx(len(active) / len(costs))
    costs = [max(0.0, p - 1) for p in near] + [max(0.0, 1.4 - n) for n in far]
    active = [cost for cost in costs if cost]
    assert MarginLoss()(x, y, triplets).item() == pytest.approx(np.mean(active), rel=1e-5)


KAIMING = (2 / 500) ** 0.5  # by the number of classes


@pytest.mark.parametrize(
    "name, deviations",
    [
        ("Proxy_Anchor", {"proxies": KAIMING}),
        ("AMLoss", {"proxies": KAIMING, "margins": 0}),
        ("NormSoftmax", {"proxies": (1 / 3 / 64) ** 0.5}),  # uniform in ±1/√d
        ("ProxyNCA_pp", {"proxies": 1 / 8}),
        ("ArcFace", {"proxies": 0.01}),
        ("CosFace", {"proxies": 0.01}),
        ("HIST", {"means": KAIMING, "log_variances": KAIMING}),
        ("HIER", {"proxies": KAIMING, "ancestors": 0.9 * 2.3 / 8}),
        ("PFML", {"proxies": 1}),
    ],
)
def test_what_a_loss_learns_starts_as_published(name, deviations):
    torch.manual_seed(0)
    learned = dict(build(name, 500, 64).named_parameters())
    found = {part: learned[part].detach().std().item() for part in deviations}
    assert found == pytest.approx(deviations, rel=0.03, abs=1e-6)
    for part in set(found) - {"margins"}:
        assert abs(learned[part].detach().mean().item()) < 0.03 * deviations[part]
    if name == "NormSoftmax":
        assert learned["proxies"].abs().max() <= 1 / 8


def test_introspective_similarity_lies_between_cosine_and_one():
    embeddings, proxies = torch.randn(9, 5), torch.randn(7, 5)
    cosine = losses.cosine_similarity(embeddings, proxies)
    certain = introspective_similarity(embeddings, torch.zeros(9, 5), proxies)
    doubtful = introspective_similarity(embeddings, torch.full((9, 5), 3.0), proxies)
    assert (cosine <= certain).all() and (certain <= doubtful).all() and (doubtful <= 1).all()
    at_proxy = introspective_similarity(proxies, torch.zeros(7, 5), proxies)
    torch.testing.assert_close(at_proxy.diagonal(), torch.ones(7))


def test_ddml_draws_the_main_noise_first():
    base = ProxyAnchorLoss(CLASSES, SIZE)
    embeddings, labels = batch()
    params = torch.cat([embeddings, torch.full_like(embeddings, 5.0)], dim=1)
    wide = torch.cat([embeddings, torch.full_like(embeddings, 9.0)], dim=1)
    criterion = DisentanglingLoss(base)
    torch.manual_seed(4)
    criterion(params, params, labels)
    first = criterion.terms
    torch.manual_seed(4)
    criterion(params, wide, labels)
    torch.testing.assert_close(criterion.terms["agnostic"], first["agnostic"], rtol=0, atol=0)
    assert criterion.terms["specific"] != first["specific"]


def test_ddml_wraps_amloss_too():
    criterion = DisentanglingLoss(AMLoss(CLASSES, SIZE), 1.0, 0.1, 1e-5)
    embeddings, labels = batch(size=2 * SIZE)
    criterion(embeddings, embeddings.flip(0), labels).backward()
    assert {"positive", "negative", "margin", "agnostic", "specific", "split"} <= set(
        criterion.terms
    )
    assert [group["name"] for group in criterion.parameter_groups(1.0)] == ["proxies", "margins"]
    assert criterion.class_values()["margin"].shape == (CLASSES,)


def test_triplet_loss_by_hand():
    unit = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    labels = torch.tensor([0, 0, 1])
    # squared distances: 0-1 .8, 0-2 2, 1-2 .4; triplets (0,1,2) and (1,0,2)
    assert TripletLoss(0.5)(unit, labels).item() == pytest.approx((0 + 0.9) / 2)
    # mined: the mean is over active triplets
    triplets = tuple(torch.tensor(index) for index in ([0, 1], [1, 0], [2, 2]))
    assert TripletLoss(0.5)(unit, labels, triplets).item() == pytest.approx(0.9)
    soft = TripletLoss(soft=True)(unit, labels)
    assert soft.item() == pytest.approx((np.log1p(np.exp(-1.2)) + np.log1p(np.exp(0.4))) / 2)
    plain = TripletLoss(0.5, squared=False)(unit, labels)
    assert plain.item() == pytest.approx((0.8**0.5 - 0.4**0.5 + 0.5) / 2, rel=1e-5)


def test_semihard_takes_the_farthest_negative_when_none_is_behind_the_positive():
    angle = torch.tensor([0.0, 2.0, 0.5, 1.0]) * torch.pi / 3
    unit = torch.stack([angle.cos(), angle.sin()], dim=1)
    labels = torch.tensor([0, 0, 1, 2])
    # from image 0: positive at 3, negatives at 2 - 2cos 30° and at 1, all nearer
    # from image 1: positive at 3, negatives at 2 (angle 90°) and 1
    expected = ((3 - 1 + 0.2) + (3 - 2 + 0.2)) / 2
    assert SemihardTripletLoss()(unit, labels).item() == pytest.approx(expected, rel=1e-5)


def test_n_pair_leaves_out_single_images_and_third_ones():
    embeddings, _ = batch(3, 3)
    labels = torch.tensor([5, 5, 5, 2, 7, 7, 2, 9, 7])
    used = torch.tensor([0, 1, 3, 6, 4, 5])
    torch.testing.assert_close(
        NPairLoss()(embeddings, labels), NPairLoss()(embeddings[used], labels[used])
    )


def test_multi_similarity_takes_a_duplicate_for_the_image_itself():
    labels = torch.tensor([0, 0, 1])
    twice = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.95, 0.31]])
    assert MultiSimilarityLoss()(twice, labels) == 0
    moved = torch.tensor([[1.0, 0.0], [1.0, 0.02], [0.95, 0.31]])
    assert MultiSimilarityLoss()(moved, labels) > 0


def test_softmax_pairs_by_hand():
    unit = torch.eye(3)[[0, 0, 1]]
    loss = SoftmaxPairLoss(2.0)(unit, torch.tensor([0, 0, 1]))
    assert loss.item() == pytest.approx(np.log1p(np.exp(-2.0)))


def test_margin_loss_by_hand():
    # distances: a-p .5, a-n 1.3 → [.5 - 1.2 + .2]+ = 0, [1.2 - 1.3 + .2]+ = .1
    embeddings = torch.tensor([[0.0], [0.5], [1.3]])
    triplet = tuple(torch.tensor([index]) for index in range(3))
    criterion = MarginLoss(nu=0.5)
    loss = criterion(embeddings, torch.tensor([0, 0, 1]), triplet)
    assert loss.item() == pytest.approx(0.1 + 0.5 * 1.2, rel=1e-5)
    assert criterion.terms["positive"] == 0
    assert criterion.terms["negative"].item() == pytest.approx(0.1, rel=1e-5)


def test_the_penalty_on_boundaries_is_of_the_classes_of_the_anchors():
    """Of each triplet, as in Wu et al.; a class that the batch does not have keeps its own."""
    embeddings = torch.tensor([[0.0], [0.5], [1.3], [1.4]])
    triplets = tuple(map(torch.tensor, ([0, 1, 2], [1, 0, 3], [2, 2, 0])))
    criterion = MarginLoss(nu=0.5, num_classes=4)
    with torch.no_grad():
        criterion.beta += torch.tensor([0.0, -0.2, 0.7, 0.9])
    labels = torch.tensor([0, 0, 1, 1])
    free = copy.deepcopy(criterion)
    free.nu = 0.0
    with_penalty, without = (each(embeddings, labels, triplets) for each in (criterion, free))
    # Active are two negatives of class 0, 1.3 and .8 away, and none of class 1.
    assert (with_penalty - without).item() == pytest.approx(0.5 * (1.2 + 1.2 + 1.0) / 2)
    for loss in (with_penalty, without):
        loss.backward()
    assert (criterion.beta.grad - free.beta.grad).tolist() == pytest.approx([0.5, 0.25, 0, 0])


def active_triplets(c, y):
    """Of all (a, p, n): D_ap - D_an + 0.2 = 2 (c_an - c_ap) + 0.2 above 0."""
    found = [
        c[a, n] - c[a, p] > -0.1
        for a, p in itertools.permutations(range(len(y)), 2)
        for n in range(len(y))
        if y[a] == y[p] != y[n]
    ]
    return {"active": np.mean(found)}


def active_pairs(c, y):
    found = []
    for a, p in itertools.permutations(range(len(y)), 2):
        if y[a] == y[p]:
            others = [c[a, n] for n in range(len(y)) if y[n] != y[a]]
            farther = [value for value in others if value < c[a, p]]
            found.append((max(farther) if farther else min(others)) - c[a, p] > -0.1)
    return {"active": np.mean(found)}


def active_images(c, y):
    """Those with a positive and a negative within 0.1 of the hardest of the others."""
    found = []
    for a in range(len(y)):
        positive = [c[a, i] for i in range(len(y)) if i != a and y[i] == y[a]]
        negative = [c[a, i] for i in range(len(y)) if y[i] != y[a]]
        found.append(bool(positive) and max(negative) + 0.1 > min(positive))
    return {"active": np.mean(found)}


def nearest_seconds(c, y):
    places = [[i for i in range(len(y)) if y[i] == label][:2] for label in sorted(set(y))]
    first, second = np.transpose([place for place in places if len(place) == 2])
    return {"accuracy": np.mean(second[c[np.ix_(first, second)].argmax(axis=1)] == second)}


def mean_cosines(c, y):
    same = np.equal.outer(y, y)
    return {"positive": c[same & ~np.eye(len(y), dtype=bool)].mean(), "negative": c[~same].mean()}


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("triplet", {"margin": 0.2}, active_triplets),
        ("semihtriplet", {}, active_pairs),
        ("ms", {}, active_images),
        ("n-npair", {}, nearest_seconds),
        ("NPairsLoss", {"alpha": 3.0}, lambda c, y: {"alpha": 3}),
        ("Sph", {}, mean_cosines),
        ("SupCon", {}, mean_cosines),
    ],
)
def test_terms_are_what_the_loss_says_of_them(name, options, said):
    labels = [0, 1, 0, 2, 1, 0, 3, 2]
    for seed in range(4):
        unit = F.normalize(
            torch.randn(8, 3, generator=torch.Generator().manual_seed(seed)).double()
        )
        criterion = build(name, 4, 3, **options).double()
        criterion(unit, torch.tensor(labels))
        expected = said((unit @ unit.T).numpy(), labels)
        assert {k: v.item() for k, v in criterion.terms.items()} == pytest.approx(expected), seed


def test_the_second_image_that_is_as_near_as_others_is_not_the_nearest():
    criterion = build("n-npair", 2, 3)
    criterion(torch.ones(4, 3), torch.tensor([0, 0, 1, 1]))  # a network that has collapsed
    assert criterion.terms["accuracy"] == 0


def test_boundaries_and_temperatures_learn_as_they_are_told():
    assert MarginLoss(beta_lr=0.0).parameter_groups(0.01) == []
    for given, rate in ((None, 0.01), (0.5, 0.5)):
        (group,) = MarginLoss(num_classes=3, beta_lr=given).parameter_groups(0.01)
        assert (group["lr"], group["weight_decay"]) == (rate, 0)
    (group,) = build("NPairsLoss", CLASSES, SIZE, alpha_lr=0.5).parameter_groups(0.01)
    assert (group["lr"], group["weight_decay"]) == (0.5, 0)
    assert MarginLoss().class_values() == {}
    assert MarginLoss(num_classes=3).class_values()["beta"].tolist() == pytest.approx([1.2] * 3)


def test_margin_loss_without_active_term_is_zero_with_finite_gradient():
    embeddings = leaf(torch.tensor([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0]]))
    criterion = MarginLoss()
    triplet = tuple(torch.tensor([index]) for index in range(3))
    loss = criterion(embeddings, torch.tensor([0, 0, 1]), triplet)
    loss.backward()
    assert loss == 0 and (embeddings.grad == 0).all() and (criterion.beta.grad == 0).all()


def test_margin_loss_takes_the_beta_of_the_anchor():
    embeddings = torch.tensor([[0.0], [0.1], [1.0], [1.1]])
    labels = torch.tensor([3, 3, 1, 1])
    triplets = tuple(torch.tensor(index) for index in ([0, 1], [1, 0], [2, 3]))
    criterion = MarginLoss(num_classes=CLASSES, beta_lr=0.5)
    criterion(embeddings, labels, triplets).backward()
    assert criterion.beta.grad[3] == 1  # both negatives, and only they, are too near
    assert criterion.beta.grad.count_nonzero() == 1
    (group,) = criterion.parameter_groups(1e-5)
    assert group["lr"] == 0.5 and group["weight_decay"] == 0
    assert criterion.class_values()["beta"].shape == (CLASSES,)
    assert build("MarginLoss", CLASSES, SIZE).parameter_groups(1e-5) == []
    assert build("MarginLoss", CLASSES, SIZE, beta_lr=0.1).beta.shape == (CLASSES,)


PAIRLESS = ["triplet", "semihtriplet", "n-npair", "ms", "MarginLoss", "TripletLoss", "NPairsLoss"]


@pytest.mark.parametrize("name", PAIRLESS)
@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [2]], ids=["no positives", "one image"])
def test_batches_without_pairs_cost_nothing(name, labels):
    embeddings = torch.randn(len(labels), SIZE, requires_grad=True)
    loss = build(name, CLASSES, SIZE)(embeddings, torch.tensor(labels))
    loss.backward()
    assert loss == 0 and (embeddings.grad == 0).all()


@pytest.mark.parametrize("name", [name for name in EVERY_LOSS if name != "NPairsLoss"])
def test_batches_of_one_class_are_finite(name):
    embeddings = torch.randn(6, SIZE, requires_grad=True)
    loss = build(name, CLASSES, SIZE, **SMALL.get(name, {}))(
        embeddings, torch.zeros(6, dtype=torch.long)
    )
    loss.backward()
    assert loss.isfinite() and embeddings.grad.isfinite().all()


def test_spherical_constraint_keeps_a_running_mean():
    embeddings, labels = batch()
    constraint = SphericalConstraint(weight=2.0, momentum=0.25)
    assert constraint.norm_mean.isnan()
    first = constraint(embeddings, labels)
    norms = embeddings.detach().norm(dim=1)
    torch.testing.assert_close(constraint.norm_mean, norms.mean())
    torch.testing.assert_close(first, 2 * norms.var(correction=0))
    torch.testing.assert_close(constraint.terms["norm_var"], norms.var(correction=0))
    torch.testing.assert_close(constraint.terms["sec"] * 2, first.detach())
    constraint(3 * embeddings)
    torch.testing.assert_close(constraint.norm_mean, 1.5 * norms.mean())
    torch.testing.assert_close(constraint.terms["norm_ema"], 1.5 * norms.mean())
    torch.testing.assert_close(constraint.terms["norm_mean"], 3 * norms.mean())
    constraint.eval()
    constraint(embeddings)
    torch.testing.assert_close(constraint.norm_mean, 1.5 * norms.mean())
    again = SphericalConstraint(momentum=0.25)
    again.load_state_dict(constraint.state_dict())
    torch.testing.assert_close(again.norm_mean, constraint.norm_mean)


def test_spherical_constraint_reports_the_cosines_of_pairs():
    embeddings = torch.tensor([[2.0, 0.0], [3.0, 0.0], [0.0, 1.0]])
    constraint = SphericalConstraint()
    constraint(embeddings, torch.tensor([0, 0, 1]))
    assert constraint.terms["cos_positive"] == 1 and constraint.terms["cos_negative"] == 0


def test_equal_masks_have_regulariser_one_without_gradient():
    masks = leaf(torch.rand(1, 32).repeat(4, 1))
    loss = mask_orthogonality(masks)
    loss.backward()
    assert loss.item() == pytest.approx(1.0)
    torch.testing.assert_close(masks.grad, torch.zeros_like(masks), rtol=0, atol=1e-7)


def test_disjoint_empty_and_single_masks_have_regulariser_zero():
    assert mask_orthogonality(torch.eye(8).repeat_interleave(4, dim=1)) == 0
    assert mask_orthogonality(torch.tensor([[1.0, 2.0], [-1.0, -2.0]])) == 0
    single = torch.rand(1, 8, requires_grad=True)
    loss = mask_orthogonality(single)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_mask_regulariser_is_the_mean_over_ordered_pairs():
    masks = torch.randn(5, 12)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    expected = sum(F.cosine_similarity(masks[i].relu(), masks[j].relu(), dim=0) for i, j in pairs)
    torch.testing.assert_close(mask_orthogonality(masks), expected / len(pairs))


# --- miners ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", losses.MINERS)
def test_miners_never_return_the_anchor_or_a_wrong_class(name):
    miner = build_miner(name)
    for seed in range(20):
        torch.manual_seed(seed)
        labels = torch.randint(0, 6, (30,))
        if seed % 2:  # most are of class 0, and have fewer negatives than positives
            labels *= torch.rand(30) < 0.2
        embeddings = torch.randn(30, 4) + F.one_hot(labels % 4, 4)
        anchors, positives, negatives = miner(embeddings, labels)
        assert len(anchors) == len(positives) == len(negatives) > 0
        assert (anchors != positives).all()
        assert (labels[anchors] == labels[positives]).all()
        assert (labels[anchors] != labels[negatives]).all()


@pytest.mark.parametrize("name", losses.MINERS)
def test_miners_return_nothing_where_there_is_no_triplet(name):
    miner = build_miner(name)
    for labels in ([0, 0, 0], [0, 1, 2], [4]):
        triplets = miner(torch.randn(len(labels), 8), torch.tensor(labels))
        assert [len(index) for index in triplets] == [0, 0, 0]


@pytest.mark.parametrize("name", ["HPHN", "EPHN"])
def test_letter_miners_take_the_extremes(name):
    embeddings, labels = batch(5, 4, size=6)
    unit = F.normalize(embeddings.detach())
    distances = torch.cdist(unit, unit)
    anchors, positives, negatives = build_miner(name)(embeddings, labels)
    assert anchors.tolist() == list(range(20))
    for a, p, n in zip(anchors, positives, negatives, strict=True):
        same = [i for i in range(20) if labels[i] == labels[a] and i != a]
        other = [i for i in range(20) if labels[i] != labels[a]]
        chosen = max if name == "HPHN" else min
        assert p == chosen(same, key=lambda i, a=a: distances[a, i].item())
        assert n == min(other, key=lambda i, a=a: distances[a, i].item())


@pytest.mark.parametrize("name", ["EPSHN", "RPSHN"])
def test_semihard_negatives_lie_in_the_band(name):
    embeddings, labels = batch(6, 4, size=4)
    unit = F.normalize(embeddings.detach())
    anchors, positives, negatives = build_miner(name, margin=0.3)(embeddings, labels)
    gap = (unit[anchors] - unit[negatives]).norm(dim=1) - (unit[anchors] - unit[positives]).norm(
        dim=1
    )
    assert len(anchors) > 0 and (gap > -1e-6).all() and (gap < 0.3 + 1e-6).all()


def test_random_positives_reach_all_of_them():
    embeddings, labels = batch(2, 4)
    seen = {
        tuple(p.tolist()) for _ in range(50) for p in [build_miner("RPHN")(embeddings, labels)[1]]
    }
    assert {row[0] for row in seen} == {1, 2, 3}


def test_distance_weighted_miner_gives_one_pair_each_for_two_per_class():
    embeddings, labels = batch(10, 2)
    anchors, positives, _ = DistanceWeightedMiner()(embeddings, labels)
    assert anchors.tolist() == list(range(20))
    assert positives.tolist() == [i ^ 1 for i in range(20)]


def test_distance_weighted_miner_draws_as_many_negatives_as_positives_on_average():
    embeddings, labels = batch(5, 4)
    anchors, positives, negatives = DistanceWeightedMiner()(embeddings, labels)
    assert torch.bincount(anchors).tolist() == [3] * 20
    assert positives[:3].tolist() == [1, 2, 3]
    for a in range(20):
        assert len(set(negatives[anchors == a].tolist())) == 3  # without replacement
    # few negatives in reach: as many as the largest class leaves
    anchors, _, _ = DistanceWeightedMiner()(embeddings[:6], torch.tensor([0, 0, 0, 0, 0, 1]))
    assert torch.bincount(anchors).tolist() == [1] * 5


def test_distance_weighted_miner_fills_up_small_classes_with_replacement():
    labels = torch.tensor([0] * 6 + [1] * 6 + [2, 2, 3])
    embeddings = torch.randn(15, 8)
    anchors, positives, _ = DistanceWeightedMiner()(embeddings, labels)
    draws = int((labels[:, None] == labels).sum() - 15) / 15
    assert torch.bincount(anchors).tolist() == [round(draws)] * 14
    assert positives[anchors == 12].unique().tolist() == [13]
    assert positives[anchors == 0].unique().numel() == round(draws)  # a subset, no repetition


def test_distance_weights_prefer_near_negatives():
    embeddings, labels = batch(8, 3, size=64)
    shares = drawing_shares(DistanceWeightedMiner(), embeddings.detach(), labels)
    assert (shares[labels[:, None] == labels] == 0).all()
    unit = F.normalize(embeddings.detach())
    distances = torch.cdist(unit, unit).masked_fill(labels[:, None] == labels, torch.inf)
    assert torch.equal(shares.argmax(dim=1), distances.argmin(dim=1))


@pytest.mark.parametrize("size", [2, 3, 8, 512])
def test_distance_weights_of_opposite_embeddings_are_finite(size):
    """With a margin above 0.8 they are near enough to count."""
    one, two, three = F.normalize(torch.randn(3, size))
    unit = torch.stack([one, -one, -one, two, three])
    negative = torch.tensor([[False, True, True, True, True]])
    weights = DistanceWeightedMiner(nonzero_loss_cutoff=2.1).weights(unit[:1], unit, negative)
    assert weights.isfinite().all() and weights[0, 0] == 0 and (weights[0, 1:] > 0).all()
    if size > 3:  # where opposite points are rarest
        assert weights.argmax() in (1, 2)


def test_distance_weighted_negatives_are_drawn_as_often_as_the_equation_says():
    """From image 0, in four dimensions: w = D^-2 · (1 - D²/4)^-½, D at least 0.5 and below 1.4."""
    angles = torch.tensor([0.0, 0.0, 0.3, 0.7, 1.1, 2.0])
    embeddings = torch.stack([angles.cos(), angles.sin(), 0 * angles, 0 * angles], dim=1)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    distances = (2 * (angles[2:] / 2).sin()).clamp_min(0.5)
    expected = (distances**-2 * (1 - distances**2 / 4) ** -0.5).masked_fill(distances > 1.4, 0)
    torch.manual_seed(0)
    drawn = torch.zeros(6)
    miner, draws = DistanceWeightedMiner(), 3000
    for _ in range(draws):
        anchors, _, negatives = miner(embeddings, labels)
        drawn[negatives[anchors == 0]] += 1
    assert drawn.sum() == draws and (drawn[:2] == 0).all()
    torch.testing.assert_close(drawn[2:] / draws, expected / expected.sum(), rtol=0, atol=0.04)


def test_cutoffs_of_the_distance_weighted_miner():
    angles = torch.tensor([0.0, 0.1, 0.2, 1.0, 3.0])
    embeddings = torch.stack([angles.cos(), angles.sin(), 0 * angles, 0 * angles], dim=1)
    labels = torch.arange(5)
    row = drawing_shares(DistanceWeightedMiner(), embeddings, labels)[0]
    torch.testing.assert_close(row[1], row[2])  # both nearer than the cutoff
    assert row[1] > row[3] > row[4] and 0 < row[4] < 1e-6  # out of reach, yet possible


def nearest_negatives(distances, labels, anchor, count, cutoff=0.5):
    """An anchor's negatives: the nearest from the cutoff on, then those before; in index order."""
    others = [i for i in range(len(labels)) if labels[i] != labels[anchor]]
    others.sort(key=lambda i: (bool(distances[anchor, i] < cutoff), float(distances[anchor, i])))
    return sorted(others[:count])


@pytest.mark.parametrize("spread", [0.02, 0.3, 0.6, 5.0])
def test_nearest_negatives_are_paired_in_index_order_and_near_ones_fill_up(spread):
    """Embeddings around one point: all nearer than the cutoff, some, and none."""
    torch.manual_seed(3)
    labels = torch.tensor([0] * 4 + [1] * 3 + [2, 2, 3] + [4] * 2)
    embeddings = torch.eye(5)[0] + spread * torch.randn(12, 5)
    unit = F.normalize(embeddings)
    distances = (2 - 2 * unit @ unit.T).clamp_min(0).sqrt()
    count = int((labels[:, None] == labels).sum() - 12) // 12
    triplets = []
    for anchor in range(12):
        positives = [i for i in range(12) if labels[i] == labels[anchor] and i != anchor]
        negatives = nearest_negatives(distances, labels, anchor, count)
        triplets += zip([anchor] * 12, positives, negatives, strict=False)
    found = build_miner("easypeasy")(embeddings, labels)
    assert list(zip(*(indices.tolist() for indices in found), strict=True)) == triplets


@pytest.mark.parametrize("name", ["MarginLoss", "TripletLoss"])
def test_embeddings_that_all_lie_together_still_give_a_loss_and_a_gradient(name):
    torch.manual_seed(0)
    embeddings = (torch.ones(8, 4) + 0.1 * torch.randn(8, 4)).requires_grad_()
    labels = torch.arange(8) // 4
    loss = build(name, 2, 4)(F.normalize(embeddings), labels)
    loss.backward()
    assert loss > 0.1 and embeddings.grad.norm() > 1e-3
    assert build(name, 2, 4, mining="earlier")(F.normalize(embeddings), labels) == 0


def test_earlier_mining_is_what_the_first_versions_did():
    """By distance, and nothing nearer than the cutoff: runs of then go on with it."""
    embeddings, labels = batch(6, 3, size=3)
    unit = F.normalize(embeddings.detach())
    distances = torch.cdist(unit, unit)
    miner = build_miner("easypeasy", mining="earlier")
    anchors, positives, negatives = miner(embeddings, labels)
    assert (distances[anchors, negatives] >= 0.5 - 1e-5).all()
    assert torch.bincount(anchors).tolist() == [2] * 18  # as many as positives
    for a in anchors.unique():
        allowed = (labels != labels[a]) & (distances[a] >= 0.5)
        chosen = distances[a, negatives[anchors == a]]
        expected = distances[a][allowed].sort().values[: len(chosen)]
        torch.testing.assert_close(chosen, expected)
        assert positives[anchors == a].tolist() == sorted(positives[anchors == a].tolist())


@pytest.mark.parametrize(
    ("beta", "costly"), [(0.7, {0.6}), (1.2, {0.6, 1.0}), (1.4, {0.6, 1.0, 1.5})]
)
def test_negatives_that_cost_the_margin_loss_are_those_that_are_drawn(beta, costly):
    """Up to β + margin from the anchor, whatever β is; one image of each of four classes."""
    distances = [0.0, 0.6, 1.0, 1.5]
    angles = 2 * torch.tensor(distances).div(2).asin()
    embeddings = torch.stack([angles.cos(), angles.sin(), torch.zeros(4)], dim=1)
    embeddings, labels = torch.cat([embeddings[:1], embeddings]), torch.tensor([0, 0, 1, 2, 3])
    miner = build("MarginLoss", 4, 3, beta=beta, miner="distanceweighted").miner
    drawn = set()
    for _ in range(50):
        anchors, _, negatives = miner(embeddings, labels)
        drawn |= {distances[n - 1] for n in negatives[anchors == 0].tolist()}
    assert drawn == costly


def test_distance_weighted_pairs_are_in_index_order():
    embeddings, labels = batch(8, 4, size=64)
    anchors, positives, negatives = DistanceWeightedMiner()(embeddings, labels)
    for a in anchors.unique():
        own = anchors == a
        assert positives[own].tolist() == sorted(positives[own].tolist())
        assert negatives[own].tolist() == sorted(negatives[own].tolist())
    torch.manual_seed(1)
    *_, sorted_ones = build_miner("distanceweighted")(embeddings, labels)
    torch.manual_seed(1)
    *_, drawn = build_miner("distanceweighted", mining="earlier")(embeddings, labels)
    assert drawn.tolist() != sorted_ones.tolist() and sorted(drawn) == sorted(sorted_ones)


def test_an_unknown_way_of_mining_is_answered_with_names():
    with pytest.raises(ValueError, match=r"way of mining called 'relased'.*released"):
        build_miner("easypeasy", mining="relased")
    with pytest.raises(ValueError, match=r"way of mining called 'relased'.*released"):
        build("triplet", CLASSES, SIZE, mining="relased")  # which mines nothing


@pytest.mark.parametrize(
    ("loss", "miner"),
    [("triplet", {}), ("TripletLoss", {"miner": "HPHN"}), ("TripletLoss", {"miner": print})],
)
def test_a_way_of_mining_that_the_miner_has_not_is_refused(loss, miner):
    with pytest.raises(ValueError, match=r"mining='earlier' is for the miners easypeasy"):
        build(loss, CLASSES, SIZE, mining="earlier", **miner)
    build(loss, CLASSES, SIZE, mining="released", **miner)


def test_a_miner_that_is_no_name_is_answered_with_names():
    with pytest.raises(ValueError, match=r"no miner called '5'; known names: distanceweighted"):
        build("triplet", CLASSES, SIZE, miner=5)


def test_the_circle_loss_of_amloss_counts_what_it_leaves_out_as_one():
    """Two classes of two at unit length, by hand; the library's leaves out what is no pair."""
    embeddings = F.normalize(torch.tensor([[1.0, 0.2], [1, 0.5], [0.1, 1], [0.4, 1]])).double()
    labels, m, gamma = torch.tensor([0, 0, 1, 1]), 0.4, 2.0
    total = 0.0
    for i in range(4):
        sums = [0.0, 0.0]
        for j in range(4):
            s = float(embeddings[i] @ embeddings[j])
            own, other = labels[i] == labels[j] and i != j, labels[i] != labels[j]
            sums[0] += math.exp(-gamma * max(1 + m - s, 0) * (s - 1 + m)) if own else 1.0
            sums[1] += math.exp(gamma * max(s + m, 0) * (s - m)) if other else 1.0
        total += math.log1p(sums[0] * sums[1]) / 4
    loss = build("CircleLoss", 2, 2, gamma=gamma)(embeddings, labels)
    assert loss.item() == pytest.approx(total, rel=1e-12)
    assert build("Circle", 2, 2, gamma=gamma)(embeddings.float(), labels) < loss


def test_the_circle_loss_of_amloss_takes_its_weights_as_constants():
    embeddings, labels = batch(3, 2, size=4)
    embeddings = F.normalize(embeddings.detach().double()).requires_grad_()
    criterion = build("CircleLoss", 3, 4)
    criterion(embeddings, labels).backward()
    step = torch.zeros_like(embeddings)
    step[0, 0] = 1e-6
    above, below = (criterion(embeddings.detach() + sign * step, labels) for sign in (1, -1))
    whole = (above - below).item() / 2e-6  # with the weights' own derivative
    assert abs(embeddings.grad[0, 0].item() - whole) > 1e-3 * abs(whole)


# --- by name --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY_LOSS)
def test_a_loss_by_its_name_is_what_the_command_line_trains(name):
    asked = options.criterion_arguments(options.parse_train(["--loss", name]))
    seen = []
    for arguments in ({}, asked):
        torch.manual_seed(0)
        criterion = build(name, CLASSES, SIZE, **{**SMALL.get(name, {}), **arguments})
        embeddings, labels = batch(size=SIZE)
        loss = criterion(F.normalize(embeddings), labels)
        groups = [{**group, "params": None} for group in criterion.parameter_groups(1e-4)]
        seen.append((loss.item(), groups))
    assert seen[0] == seen[1]


def test_the_margin_loss_by_its_name_mines_as_divide_and_conquer_does():
    assert isinstance(build("MarginLoss", CLASSES, SIZE).miner, NearestNegativeMiner)


@pytest.mark.parametrize("printed, name", sorted(criteria.ALIASES.items()))
def test_losses_by_the_other_names_of_the_published_commands(printed, name):
    assert options.parse_train(["--loss", printed]).loss == name
    torch.manual_seed(0)
    expected = build(name, CLASSES, SIZE)
    torch.manual_seed(0)
    found = build(printed, CLASSES, SIZE)
    assert type(found) is type(expected)
    for one, other in zip(found.parameters(), expected.parameters(), strict=True):
        assert torch.equal(one, other)


def test_proxies_learn_at_the_rate_of_the_released_loops():
    rates = {}
    for name in ("Proxy_Anchor", "AMLoss", "Proxy_NCA", "SoftTriple"):
        proxies = build(name, CLASSES, SIZE).parameter_groups(1e-4)[0]
        rates[name] = round(proxies["lr"] / 1e-4)
    assert rates == {"Proxy_Anchor": 100, "AMLoss": 100, "Proxy_NCA": 1, "SoftTriple": 100}
    (scaled,) = build("Proxy_NCA", CLASSES, SIZE, proxy_lr_scale=7.0).parameter_groups(1e-4)
    assert scaled["lr"] == pytest.approx(7e-4)


def test_every_name_stands_once_and_keeps_its_place():
    assert sum(map(len, criteria.COMMANDS.values())) == len(losses.CRITERIA)
    assert list(losses.CRITERIA) == list(criteria.LOSSES)


def test_the_names_are_read_without_torch():
    code = "import criteria, sys; assert 'torch' not in sys.modules and criteria.LOSSES"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=FIXTURES.parent.parent)


def test_one_optimiser_of_torch_trains_what_a_criterion_learns():
    criterion = build("AMLoss", CLASSES, SIZE, margin_lr=3e-4)
    proxies, margins = criterion.torch_groups(lr=1e-4)
    assert proxies == {"params": [criterion.proxies], "lr": pytest.approx(1e-2)}
    assert margins == {"params": [criterion.margins], "lr": 3e-4}
    (beta,) = build("MarginLoss", CLASSES, SIZE, beta_lr=0.1).torch_groups(lr=1e-4)
    assert beta["weight_decay"] == 0.0 and beta["lr"] == 0.1
    assert compose("triplet", CLASSES, SIZE).torch_groups(lr=1e-4) == []


def test_published_constants_of_the_library_losses():
    loss = build("MS", CLASSES, SIZE)
    assert (loss.loss.alpha, loss.loss.beta, loss.loss.base) == (2, 50, 0.5)
    assert loss.miner.epsilon == 0.1
    triplet = build("Triplet", CLASSES, SIZE)
    assert triplet.loss.margin == triplet.miner.margin == 0.1
    assert triplet.miner.type_of_triplets == "semihard"
    wider = build("Triplet", CLASSES, SIZE, margin=0.3)
    assert wider.loss.margin == wider.miner.margin == 0.3
    n_pair = build("NPair", CLASSES, SIZE)
    assert not n_pair.loss.distance.normalize_embeddings
    assert build("Proxy_NCA", CLASSES, SIZE).loss.softmax_scale == 32
    assert build("Contrastive", CLASSES, SIZE).loss.neg_margin == 0.5
    circle = build("Circle", CLASSES, SIZE).loss
    assert (circle.m, circle.gamma) == (0.4, 80)
    assert build("Margin", CLASSES, SIZE).loss.beta.requires_grad


def test_library_agrees_with_our_proxy_anchor():
    embeddings, labels = batch()
    ours, theirs = ProxyAnchorLoss(CLASSES, SIZE), build("pml:ProxyAnchorLoss", CLASSES, SIZE)
    theirs.loss.proxies.data = ours.proxies.data.clone()
    torch.testing.assert_close(ours(embeddings, labels), theirs(embeddings, labels))
    (group,) = theirs.parameter_groups(1e-4)
    assert group["name"] == "proxies" and group["lr"] == pytest.approx(1e-2)


NCA = {"pml:NCALoss": {}, "Proxy_NCA": {}, "pml:ProxyNCALoss": {"distance": "CosineSimilarity"}}


@pytest.mark.parametrize("miner", ["none", "MultiSimilarityMiner"])
@pytest.mark.parametrize("name", NCA)
def test_nca_is_the_librarys_where_that_is_finite(name, miner):
    from pytorch_metric_learning import losses as library

    ours = build(name, CLASSES, SIZE, softmax_scale=8.0, miner=miner, **NCA[name]).double()
    make, theirs = getattr(library, type(ours.loss).__name__), copy.deepcopy(ours)
    sizes = () if name == "pml:NCALoss" else (CLASSES, SIZE)
    theirs.loss = make(*sizes, softmax_scale=8.0, distance=ours.loss.distance).double()
    theirs.loss.load_state_dict(ours.loss.state_dict())
    assert type(ours.loss) is not make
    found = []
    for criterion in (ours, theirs):
        embeddings, labels = batch(dtype=torch.float64)
        loss = criterion(embeddings, labels)
        loss.backward()
        found.append([loss, embeddings.grad, *(p.grad for p in criterion.parameters())])
    assert found[0][0] > 0
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("angle", [90, 100, 110, 120, 180])
def test_an_image_far_from_its_proxy_counts_in_proxy_nca(angle):
    """There the library's probability leaves float32, and its gradient is NaN before that."""
    criterion = build("Proxy_NCA", 2, 2)
    criterion.loss.proxies.data = torch.eye(2)
    turned = torch.tensor(math.radians(angle))
    embeddings = torch.stack([turned.cos(), turned.sin()])[None].requires_grad_()
    loss = criterion(embeddings, torch.tensor([0]))
    loss.backward()
    near, far = (2 - 2 * math.sin(turned)), (2 - 2 * math.cos(turned))
    assert loss.item() == pytest.approx(math.log1p(math.exp(32 * (near - far))) + 32 * (far - near))
    assert embeddings.grad.isfinite().all() and criterion.loss.proxies.grad.isfinite().all()
    # Its slope along the circle: 64·(sin + cos) times the share of the other proxy, here 1.
    along = (embeddings.grad * torch.stack([-turned.sin(), turned.cos()])).sum()
    assert along == pytest.approx(64 * (math.sin(turned) + math.cos(turned)), rel=1e-3, abs=1e-3)


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")  # the library's
@pytest.mark.parametrize("name", ["TupletMarginLoss", "HistogramLoss"])
def test_a_library_loss_takes_copies_of_an_image(name):
    """And is the library's, to the bit, where there are none."""
    from pytorch_metric_learning import losses as library

    given, labels = batch(4, 3, seed=1)  # one whose cosine with itself is 1, or more by rounding
    different, copies = given.detach(), torch.cat([given[:2], given[1:]])[:-1].detach()
    ours, theirs = build(f"pml:{name}", CLASSES, SIZE), getattr(library, name)()
    found = []
    for criterion, images in ((ours, different), (theirs, different), (ours, copies)):
        embeddings = leaf(images)
        loss = criterion(embeddings, labels)
        loss.backward()
        found.append((loss, embeddings.grad))
    assert all(map(torch.equal, found[0], found[1]))
    assert all(each.isfinite().all() and each.any() for each in found[2])


@pytest.mark.parametrize("labels", [[0, 1, 2, 3], [0, 0, 0, 0]])
@pytest.mark.parametrize("name", ["TupletMarginLoss", "HistogramLoss", "NCALoss", "ProxyNCALoss"])
def test_a_patched_library_loss_takes_a_batch_without_pairs_of_one_kind(name, labels):
    embeddings = torch.randn(4, SIZE, requires_grad=True)
    loss = build(f"pml:{name}", CLASSES, SIZE)(embeddings, torch.tensor(labels))
    loss.backward()
    assert loss.isfinite() and embeddings.grad.isfinite().all()
    if name != "ProxyNCALoss":  # which compares images with proxies
        assert loss.item() == pytest.approx(0, abs=1e-6)


def test_library_loss_takes_its_arguments_and_float64_leaves_its_proxies_alone():
    criterion = build("pml:SoftTripleLoss", CLASSES, SIZE, centers_per_class=3)
    assert criterion.loss.fc.shape == (SIZE, 3 * CLASSES)
    embeddings, labels = batch(dtype=torch.float64)
    criterion(embeddings, labels).backward()
    assert criterion.loss.fc.dtype == torch.float32 and embeddings.grad.dtype == torch.float64


@pytest.mark.parametrize("name", ["Margin", "pml:MarginLoss", "pml:TripletMarginLoss"])
def test_a_number_may_stand_for_a_word_of_the_library(name):
    from pytorch_metric_learning.utils.loss_and_miner_utils import get_random_triplet_indices

    criterion, (embeddings, labels) = build(name, CLASSES, SIZE, triplets_per_anchor=2), batch()
    torch.manual_seed(0)
    loss = criterion(embeddings, labels)
    torch.manual_seed(0)
    triplets = get_random_triplet_indices(labels, t_per_anchor=2)
    assert len(triplets[0]) == 2 * len(labels)
    assert loss > 0 and torch.equal(loss, criterion.loss(embeddings, labels, triplets))
    with pytest.raises(ValueError, match=r"way of mining called 5; known names: earlier, released"):
        build("MarginLoss", CLASSES, SIZE, mining=5)


def test_a_part_of_the_library_is_built_for_the_classes_of_the_data():
    """SoftTriple's regulariser of the centres, as its paper has it; by hand."""
    part, centres = "SparseCentersRegularizer(centers_per_class=10)", 10
    options = {"weight_regularizer": part, "weight_reg_weight": 0.2}
    losses.try_out("SoftTriple", torch.arange(8) // 2, SIZE, **options)  # of four classes
    criterion, (embeddings, labels) = (
        build("SoftTriple", CLASSES, SIZE, **options).double(),
        batch(),
    )
    plain = build("SoftTriple", CLASSES, SIZE).double()
    plain.load_state_dict(criterion.state_dict())
    of_class = F.normalize(criterion.loss.fc.T).unflatten(0, (CLASSES, centres))
    apart = torch.cdist(of_class, of_class).sum() / 2 / (CLASSES * centres * (centres - 1))
    expected = plain(embeddings, labels) + 0.2 * apart
    torch.testing.assert_close(criterion(embeddings, labels), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match=r"no option of SparseCentersRegularizer .*'num_classes'"):
        build("SoftTriple", CLASSES, SIZE, weight_regularizer=f"{part[:-1]},num_classes=9)")


def test_triplets_are_counted_where_no_miner_chooses_them():
    with pytest.raises(ValueError, match=r"triplets_per_anchor .* no effect .* miner=none too"):
        build("Triplet", CLASSES, SIZE, triplets_per_anchor=2)
    mined = build("Triplet", CLASSES, SIZE, triplets_per_anchor="all")
    assert mined.miner is not None
    assert build("Triplet", CLASSES, SIZE, triplets_per_anchor=2, miner="none").miner is None


def test_what_the_library_makes_of_a_wrong_argument_is_short():
    criterion = build("Margin", CLASSES, SIZE, triplets_per_anchor=[2])
    with pytest.raises(InputError, match=r"randint\(\) .* arguments - got [^*]*$"):
        criterion(*batch())


def test_a_word_that_the_library_would_take_for_another_is_refused():
    with pytest.raises(
        ValueError, match=r"type_of_triplets .* 'hrad': choose one of all, easy, ha"
    ):
        build("Triplet", CLASSES, SIZE, miner="TripletMarginMiner(type_of_triplets=hrad)")
    for name in ("Margin", "pml:TripletMarginLoss"):
        with pytest.raises(ValueError, match="'al': choose one of all, or a number"):
            build(name, CLASSES, SIZE, triplets_per_anchor="al")
    hard = build("Triplet", CLASSES, SIZE, miner="TripletMarginMiner(type_of_triplets=hard)")
    assert hard.miner.type_of_triplets == "hard"


def test_own_losses_do_not_import_the_library(tmp_path):
    (tmp_path / "program.py").write_text(
        "import sys, losses; losses.compose('AMLoss', 9, 4); losses.options_of('ms');"
        "assert 'pytorch_metric_learning' not in sys.modules"
    )
    assert run_python(tmp_path / "program.py").returncode == 0


def test_missing_library_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.losses", None)
    with pytest.raises(ValueError, match="pip install pytorch-metric-learning"):
        build("pml:CircleLoss", CLASSES, SIZE)


@pytest.mark.parametrize(
    "name, nearest",
    [
        ("AMLos", "AMLoss"),
        ("proxy-anchor", "Proxy_Anchor"),
        ("nonsense?!", "semihtriplet"),
        ("pml:CirleLoss", "CircleLoss"),
        ("tripet", "Triplet, triplet"),  # which case tells apart
    ],
)
def test_unknown_losses_are_answered_with_names(name, nearest):
    with pytest.raises(ValueError, match=nearest):
        build(name, CLASSES, SIZE)
    with pytest.raises(ValueError, match=nearest):
        options_of(name)


def test_options_are_those_of_the_loss():
    assert options_of("Proxy_Anchor") == {"margin", "alpha", "proxy_lr_scale"}
    assert {"alphap", "alphan", "delta", "lam", "margin_lr"} <= options_of("AMLoss")
    assert {"m", "gamma"} <= options_of("Circle") and "alpha" not in options_of("Circle")
    for name in EVERY_LOSS:
        assert not {"num_classes", "embedding_size"} & options_of(name)
    with pytest.raises(ValueError, match="did you mean alpha"):
        build("Proxy_Anchor", CLASSES, SIZE, alhpa=3)
    with pytest.raises(ValueError, match="gamma"):
        build("pml:CircleLoss", CLASSES, SIZE, gama=3)
    with pytest.raises(ValueError, match="cannot be trained here"):
        build("pml:CrossBatchMemory", CLASSES, SIZE)


def test_a_loss_takes_the_options_that_it_hands_on_to_its_base(monkeypatch):
    class Handing(AMLoss):
        def __init__(self, *sizes, pull=1.0, **more):
            super().__init__(*sizes, **more)

    class Keeping(AMLoss):
        def __init__(self, num_classes, embedding_size, pull=1.0):
            super().__init__(num_classes, embedding_size)

    for make in (Handing, Keeping):
        monkeypatch.setitem(losses.CRITERIA, make.__name__, make)
    assert options_of("Handing") == options_of("AMLoss") | {"pull"}
    assert build("Handing", CLASSES, SIZE, alphap=8.0).alphap == 8
    assert options_of("Keeping") == {"pull"}
    with pytest.raises(ValueError, match="no option of Keeping called 'alphap'"):
        build("Keeping", CLASSES, SIZE, alphap=8.0)


@pytest.mark.parametrize(
    "name, option, value, default",
    [
        ("Proxy_Anchor", "margin", "wide", "0.1"),
        ("TripletLoss", "soft", "maybe", "False"),
        ("TripletLoss", "soft", 2, "False"),
        ("pml:CircleLoss", "gamma", "much", "80"),
    ],
)
def test_a_word_in_place_of_a_number_is_answered_with_the_default(name, option, value, default):
    with pytest.raises(ValueError, match=rf"{option} of {name} cannot be '?{value}.*{default}"):
        build(name, CLASSES, SIZE, **{option: value})


def test_a_distance_of_the_library_by_its_name():
    criterion = build("pml:TripletMarginLoss", CLASSES, SIZE, distance="CosineSimilarity")
    assert type(criterion.loss.distance).__name__ == "CosineSimilarity"
    with pytest.raises(ValueError, match="did you mean CosineSimilarity"):
        build("pml:TripletMarginLoss", CLASSES, SIZE, distance="CosineSimilarty")


# --- a loss of one's own --------------------------------------------------------------------------


class OwnLoss(ProxyLoss):
    """What docs/extending.md shows, and what may be wrong with it."""

    def __init__(self, num_classes, embedding_size, temperature, *, learned=False, fault=""):
        super().__init__(num_classes, embedding_size)
        self.temperature = temperature
        self.fault = fault
        if learned:
            self.scale = torch.nn.Parameter(torch.ones(()))

    def parameter_groups(self, lr):
        groups = super().parameter_groups(lr)
        if self.fault == "group":
            return [{"params": list(self.parameters())}]
        return 2 * groups if self.fault == "twice" else groups

    def forward(self, embeddings, labels):
        if self.fault == "term":
            self._report(loss=embeddings.sum())
        if self.fault == "terms":
            self._report(lengths=embeddings.norm(dim=1))
        if self.fault == "nothing":
            return None
        logits = self.similarity(embeddings) / self.temperature
        reduction = "none" if self.fault == "shape" else "mean"
        return F.cross_entropy(logits, labels, reduction=reduction)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({}, "The loss Own needs a value for temperature: .* an option, temperature=VALUE."),
        ({"temperature": 0.1, "learned": True}, "would not learn.*: scale."),
        ({"temperature": 0.1, "fault": "group"}, "Own has a parameter group without lr and name"),
        ({"temperature": 0.1, "fault": "twice"}, "list more than once: proxies."),
        ({"temperature": 0.1, "fault": "shape"}, r"The loss OwnLoss returned .* shape \(6,\)"),
        ({"temperature": 0.1, "fault": "nothing"}, "The loss OwnLoss returned no tensor but None"),
        ({"temperature": 0.1, "fault": "terms"}, "reports a term lengths that is not one number"),
        ({"temperature": 0.1, "fault": "term"}, "reports a term called loss"),
        ({"temperature": 0.1, "attach": {"introspective": {}}}, "Own does not take an uncertainty"),
    ],
)
def test_what_is_wrong_with_it_is_said_before_training(arguments, sentence, monkeypatch):
    monkeypatch.setitem(losses.CRITERIA, "Own", OwnLoss)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    losses.try_out("Own", labels, SIZE, temperature=0.1)
    with pytest.raises(ValueError, match=sentence):
        losses.try_out("Own", labels, SIZE, **arguments)


def test_a_loss_that_is_no_criterion_is_told_to_be_one(monkeypatch):
    monkeypatch.setitem(losses.CRITERIA, "Own", torch.nn.TripletMarginLoss)
    with pytest.raises(ValueError, match=r"TripletMarginLoss, which is not a Criterion: begin its"):
        losses.try_out("Own", torch.tensor([0, 0, 1, 1]), SIZE)


@pytest.mark.parametrize(
    ("place", "sentence"),
    [
        ("proxies:ProxyAnkerLoss", "has no ProxyAnkerLoss; did you mean ProxyAnchorLoss"),
        ("draft:Draft", "there is no criteria/draft.py"),
    ],
)
def test_a_line_that_leads_to_no_loss_is_named(place, sentence, monkeypatch):
    monkeypatch.setitem(losses.CRITERIA, "Own", place)
    with pytest.raises(InputError, match=rf"__init__\.py lists {place}, but .*{sentence}"):
        build("Own", CLASSES, SIZE)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["Proxy_Anchor", "AMLoss", "triplet", "ms", "Proxy_NCA", "HIER", "Hyp", "SupCon"]
)
def test_bad_batches_are_one_sentence(name):
    criterion = build(name, CLASSES, SIZE)
    good, labels = torch.randn(3, SIZE), torch.tensor([0, 0, 1])
    bad = [
        (torch.randn(0, SIZE), labels[:0], "batch is empty"),
        (torch.randn(3, SIZE, 1), labels, "shape"),
        (good, labels[:2], "one label for each"),
        (good, labels.float(), "must be integers"),
        (good, labels + 0j, "must be integers"),
        (good.long(), labels, "must be floating-point numbers"),
        (good.numpy(), labels, "Embeddings must be a tensor, not ndarray: convert"),
        (good.tolist(), labels, "Embeddings must be a tensor, not list: convert"),
        (good, labels.numpy(), "Labels must be a tensor, not ndarray: convert"),
        (good, ["a", "a", "b"], "Labels must be a tensor, not list: convert"),
        (good, None, "Labels must be a tensor, not NoneType"),
    ]
    if name in ("Proxy_Anchor", "AMLoss", "Proxy_NCA", "HIER"):
        bad += [
            (good, torch.tensor([0, 1, CLASSES]), f"built for {CLASSES} classes"),
            (good, torch.tensor([0, -1, 2]), "from -1 to 2"),
            (torch.randn(3, SIZE + 1), labels, "same embedding size"),
        ]
    for embeddings, batch_labels, sentence in bad:
        with pytest.raises(ValueError, match=sentence) as caught:
            criterion(embeddings, batch_labels)
        assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_labels_go_to_where_the_embeddings_are():
    there = check_batch(torch.empty(3, SIZE, device="meta"), torch.tensor([0, 1, 1]).int())
    assert there.device.type == "meta" and there.dtype == torch.long


@pytest.mark.parametrize(
    "make, sentence",
    [
        (lambda: ProxyAnchorLoss(0, 4), "num_classes must be above 0"),
        (lambda: SphericalConstraint(momentum=0), "momentum"),
        (lambda: SphericalConstraint(weight=float("nan")), "weight"),
        (lambda: DistanceWeightedMiner(1.5), "cutoff"),
        (lambda: build_miner("EPNH"), "EPHN"),
        (lambda: DisentanglingLoss(TripletLoss()), ", ".join(PROXY_LOSSES)),
        (lambda: mask_orthogonality(torch.rand(4)), "shape"),
        (lambda: Objective({}), "at least one term"),
        (
            lambda: introspective_similarity(torch.rand(3, 4), torch.rand(2, 4), torch.rand(5, 4)),
            "one uncertainty vector",
        ),
    ],
)
def test_bad_arguments_are_one_sentence(make, sentence):
    with pytest.raises(ValueError, match=sentence):
        make()


def said_of_numbers(text):
    """``alpha`` 32, ``temperature`` 1/9, ``rate`` 10,000 → the first number said of each name."""
    found = re.findall(r"``(\w+)``\s(-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?:/\d+)?)", text)
    return {name: float(Fraction(number.replace(",", ""))) for name, number in reversed(found)}


def test_the_constants_of_a_loss_are_those_that_it_says():
    said = {}
    for file in pkgutil.iter_modules(criteria.__path__):
        module = importlib.import_module(f"criteria.{file.name}")
        for name, kind in inspect.getmembers(module, inspect.isclass):
            known = arguments_of(kind)
            for option, number in said_of_numbers(kind.__doc__ or "").items():
                if option in known and type(known[option].default) in (int, float):
                    said[name, option] = number, known[option].default
    assert {key: pair for key, pair in said.items() if pair[0] != pair[1]} == {}
    assert len(said) > 50
    for option in ("beta", "margin", "nu"):
        assert losses.default_of("MarginLoss", option) == said["MarginLoss", option][1]


MAY_BE_0 = {
    "Proxy_Anchor": "proxy_lr_scale",
    "AMLoss": "lam margin_lr proxy_lr_scale",
    "MarginLoss": "beta_lr margin nu",
    "NPairsLoss": "alpha_lr",
    "Hyp": "clip",
    "SupAP": "delta offset proxy_lr slope start",
    "NormSoftmax": "proxy_lr_scale smoothing",
    "ProxyNCA_pp": "proxy_lr_scale",
    "ArcFace": "margin proxy_lr_scale",
    "CosFace": "margin proxy_lr_scale",
    "HIST": "alpha distribution_lr lam layer_lr_scale",
    "HIER": "ancestor_lr_scale hierarchy_margin proxy_lr_scale weight",
    "PFML": "proxy_lr_scale",
} | dict.fromkeys(
    "triplet semihtriplet TripletLoss TripletAllLoss TripletSemihardLoss".split(), "margin"
)
MAY_BE_NEGATIVE = {
    "Proxy_Anchor": "margin",
    "AMLoss": "delta margin",
    "CircleLoss": "m",
    "ms": "base epsilon",
    "HIER": "margin",
}
WHOLE = "margin_step sub_centers hidden ancestors topk proxies_per_class".split()


@pytest.mark.parametrize(
    "name", [name for name, place in criteria.LOSSES.items() if not place.startswith("library:")]
)
def test_a_number_out_of_its_range_is_named(name):
    """Numbers are above 0 unless it is said here, and a count is whole."""
    numbers = {
        option: losses.default_of(name, option)
        for option in options_of(name)
        if type(losses.default_of(name, option)) in (int, float)
    }
    for option in set(numbers).difference(MAY_BE_NEGATIVE.get(name, "").split()):
        may_be_0 = option in MAY_BE_0.get(name, "").split()
        wrong = [-1, *([] if may_be_0 else [0]), *([2.5] if option in WHOLE else [])]
        for value in wrong:
            with pytest.raises(ValueError, match=rf"^{option} must be .*not {value}.*\.$"):
                build(name, CLASSES, SIZE, **{option: value})
        if may_be_0:
            build(name, CLASSES, SIZE, **{option: 0})


def test_ddml_refuses_heads_of_the_wrong_width():
    criterion = DisentanglingLoss(ProxyAnchorLoss(CLASSES, SIZE))
    with pytest.raises(ValueError, match="same embedding size"):
        criterion(torch.randn(2, SIZE), torch.randn(2, 2 * SIZE), torch.tensor([0, 1]))


# --- sums of terms --------------------------------------------------------------------------------


def outputs_for(objective, labels, seed=0):
    """What a network with the objective's heads would give, as leaves."""
    generator = torch.Generator().manual_seed(seed)
    width = 2 * SIZE if "specific" in objective.heads else SIZE
    heads = {
        head: torch.randn(
            len(labels), SIZE if head == "uncertainty" else width, generator=generator
        ).requires_grad_()
        for head in objective.heads
    }
    return Embeddings(**heads)


ATTACHED = {
    "plain": {},
    "sec": {"sec": {"weight": 0.5}},
    "l2": {"l2": {"weight": 0.01}},
    "introspective": {"introspective": {}},
    "paper": {"introspective": {"variant": "paper"}},
    "disentangled": {"disentangled": {"be": 1.0}},
    "masks": {"masks": {"weight": 0.01}},
    "disentangled+sec": {"disentangled": {"al": 1.0, "be": 0.1}, "sec": {}},
    "introspective+sec+masks": {"introspective": {}, "sec": {}, "masks": {}},
}


RECENT = list(criteria.COMMANDS["of 2018 to 2025"])


@pytest.mark.parametrize("attached", ATTACHED)
@pytest.mark.parametrize("name", ["Proxy_Anchor", "AMLoss", "MS", *RECENT])
def test_the_matrix_of_combinations(name, attached):
    attach = ATTACHED[attached]
    if name not in PROXY_LOSSES and {"introspective", "disentangled"} & set(attach):
        offered = re.escape(", ".join(PROXY_LOSSES))
        with pytest.raises(ValueError, match=rf"which {name} .* combine it with {offered}\.$"):
            compose(name, CLASSES, SIZE, attach)
        return
    objective = compose(name, CLASSES, SIZE, attach, **SMALL.get(name, {}))
    labels = torch.arange(8).repeat_interleave(3)
    outputs = outputs_for(objective, labels)
    masks = torch.rand(4, SIZE, requires_grad=True)
    context = {"masks": masks} if "masks" in attach else {}
    torch.manual_seed(0)
    loss = objective(outputs, labels, **context)
    loss.backward()
    assert loss.isfinite() and all(
        head.grad.abs().sum() > 0 for head in outputs if head is not None
    )
    assert all(term.ndim == 0 and not term.requires_grad for term in objective.terms.values())
    assert {"sec", "l2", "masks"} & set(attach) <= set(objective.terms)
    grouped = [id(p) for group in objective.parameter_groups(1e-4) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in objective.parameters())


def test_an_objective_is_the_weighted_sum_of_its_terms():
    objective = compose(
        "AMLoss",
        CLASSES,
        SIZE,
        {"sec": {"weight": 0.5}, "l2": {"weight": 0.25}, "masks": {"weight": 0.1}},
        lam=2.0,
    )
    embeddings, labels = batch()
    masks = torch.rand(4, SIZE)
    loss = objective(Embeddings(embeddings), labels, masks=masks)
    weights = {"positive": 1, "negative": 1, "margin": 2, "sec": 0.5, "l2": 0.25, "masks": 0.1}
    expected = sum(weight * objective.terms[key] for key, weight in weights.items())
    torch.testing.assert_close(loss.detach(), expected)
    without = objective(Embeddings(embeddings), labels, masks=None)  # the full phase
    assert "masks" not in objective.terms
    torch.testing.assert_close(loss - without, 0.1 * mask_orthogonality(masks), rtol=0, atol=1e-5)


def test_terms_of_one_name_are_told_apart():
    objective = Objective({"near": Term(TripletLoss(0.1)), "far": Term(TripletLoss(2.0), weight=2)})
    embeddings, labels = batch()
    loss = objective(Embeddings(embeddings), labels)
    assert set(objective.terms) == {"active", "far/active"}
    expected = TripletLoss(0.1)(embeddings, labels) + 2 * TripletLoss(2.0)(embeddings, labels)
    torch.testing.assert_close(loss, expected)


def test_sec_sees_the_raw_mean_of_a_disentangled_head():
    objective = compose("Proxy_Anchor", CLASSES, SIZE, {"disentangled": {}, "sec": {}})
    labels = torch.arange(8).repeat_interleave(3)
    outputs = outputs_for(objective, labels)
    objective(outputs, labels)
    norms = outputs.embedding.detach()[:, :SIZE].norm(dim=1)
    torch.testing.assert_close(objective.terms["norm_mean"], norms.mean())
    assert torch.equal(outputs.retrieval, outputs.embedding[:, :SIZE])


def test_what_each_loss_is_fed():
    """Unit vectors for the margin loss, raw ones for N-pairs and SEC, l2_norm decides the rest."""
    embeddings, labels = batch()
    outputs, unit = Embeddings(embeddings), F.normalize(embeddings)

    def fed(name, l2_norm, **options):
        objective = compose(name, CLASSES, SIZE, l2_norm=l2_norm, **options)
        torch.manual_seed(2)
        return objective(outputs, labels), objective.parts["metric"].criterion

    for l2_norm in (True, False):
        loss, criterion = fed("MarginLoss", l2_norm)
        torch.manual_seed(2)
        torch.testing.assert_close(loss, criterion(unit, labels))
        loss, criterion = fed("NPair", l2_norm)
        torch.testing.assert_close(loss, criterion(unit if l2_norm else embeddings, labels))


def test_uncertainty_learns_in_the_papers_variant_only():
    labels = torch.arange(8).repeat_interleave(3)
    learnt = {}
    for variant in ("released", "paper"):
        objective = compose("Proxy_Anchor", CLASSES, SIZE, {"introspective": {"variant": variant}})
        outputs = outputs_for(objective, labels)
        objective(outputs, labels).backward()
        learnt[variant] = outputs.uncertainty.grad.abs().max()
    assert learnt["released"] < 1e-5 < 1e-3 < learnt["paper"]


def test_heads_and_their_absence():
    assert compose("AMLoss", CLASSES, SIZE).heads == ("embedding",)
    assert compose("AMLoss", CLASSES, SIZE, {"disentangled": {}, "l2": {}}).heads == (
        "embedding",
        "specific",
    )
    objective = compose("AMLoss", CLASSES, SIZE, {"introspective": {}})
    assert objective.heads == ("embedding", "uncertainty")
    with pytest.raises(ValueError, match="needs the network's uncertainty head"):
        objective(Embeddings(torch.randn(2, SIZE)), torch.tensor([0, 1]))


@pytest.mark.parametrize(
    "attach, sentence",
    [
        ({"introspective": {}, "disentangled": {}}, "cannot be combined"),
        ({"introspective": {"variant": "papr"}}, "did you mean paper"),
        ({"sec": {"wieght": 1}}, "did you mean weight"),
        ({"spherical": {}}, "There is no attachment"),
        ({"masks": {"weight": -1}}, "weight must be 0 or more"),
        ({"matryoshka": {}}, "needs a value for sizes"),
    ],
)
def test_attachments_that_make_no_sense_are_one_sentence(attach, sentence):
    with pytest.raises(ValueError, match=sentence):
        compose("Proxy_Anchor", CLASSES, SIZE, attach)


@pytest.mark.parametrize(
    "attach",
    [
        {"introspective": {}, "matryoshka": {"sizes": [2, SIZE]}, "sec": {}, "l2": {}, "masks": {}},
        {"disentangled": {"al": 1.0}},
    ],
)
def test_an_objective_can_be_pickled(attach):
    objective = compose("AMLoss", CLASSES, SIZE, attach)
    again = pickle.loads(pickle.dumps(objective))
    wide = 2 * SIZE if "specific" in objective.heads else SIZE
    outputs = Embeddings(**{head: torch.randn(5, wide) for head in objective.heads})
    found = []
    for each in (objective, again):
        torch.manual_seed(0)
        found.append(each(outputs, torch.arange(5) % CLASSES, masks=torch.rand(2, SIZE)))
    assert torch.equal(*found)


def test_an_objective_saves_and_loads_what_it_learnt():
    objective = compose("AMLoss", CLASSES, SIZE, {"sec": {"momentum": 0.5}})
    embeddings, labels = batch()
    objective(Embeddings(embeddings), labels)
    other = compose("AMLoss", CLASSES, SIZE, {"sec": {"momentum": 0.5}})
    other.load_state_dict(objective.state_dict())
    torch.testing.assert_close(
        other(Embeddings(embeddings), labels), objective(Embeddings(embeddings), labels)
    )
    assert torch.equal(other.class_values()["margin"], torch.full((CLASSES,), 0.1))


def test_margins_have_an_optimiser_of_their_own():
    objective = compose("AMLoss", CLASSES, SIZE, margin_lr=3e-4, margin_step=5, margin_gamma=0.2)
    proxies, margins = objective.parameter_groups(2e-4)
    assert proxies["name"] == "proxies" and proxies["lr"] == pytest.approx(2e-2)
    assert {k: v for k, v in margins.items() if k != "params"} == {
        "name": "margins",
        "optimizer": "adamw",
        "lr": 3e-4,
        "step": 5,
        "gamma": 0.2,
    }


def test_disentangling_is_finite_for_a_deviation_that_leaves_float32():
    loss = DisentanglingLoss(ProxyAnchorLoss(4, 6), gam=1.0)
    heads = [torch.randn(8, 12) for _ in range(2)]
    heads[1][:, 6:] = torch.linspace(-500, 40, 48).view(8, 6)
    for head in heads:
        head.requires_grad_()
    loss(*heads, torch.arange(8) % 4).backward()
    assert loss.terms["split"].isfinite() and all(head.grad.isfinite().all() for head in heads)
    raw = torch.linspace(-30, 30, 61, dtype=torch.float64, requires_grad=True)
    exact = torch.nn.functional.softplus(raw, threshold=100).log()
    ours = log_softplus(raw)
    torch.testing.assert_close(ours, exact, rtol=0, atol=2e-9)
    gradients = [torch.autograd.grad(value.sum(), raw)[0] for value in (ours, exact)]
    torch.testing.assert_close(*gradients, rtol=0, atol=2e-9)


# --- a GPU is not waited for ----------------------------------------------------------------------

OURS = [
    name for name, entry in losses.CRITERIA.items() if not isinstance(entry, losses.LibraryEntry)
]
# How much there is to compute depends on the embeddings here.
WAITING = {"HIER", "PFML"}
WITH_ARGUMENTS = {
    **{name: (name, SMALL.get(name, {})) for name in OURS},
    **{
        f"{name} {miner}": (name, {"miner": miner})
        for name in ("MarginLoss", "TripletLoss")
        for miner in losses.MINERS
        if "SHN" not in miner  # which are semi-hard depends on the embeddings
    },
    "SiMix": ("RecallAtK", {"simix": True}),
    "PartialFC": ("ArcFace", {"sample_rate": 0.5, "sub_centers": 2}),
}
REMEMBERED = [
    case for case, (name, more) in WITH_ARGUMENTS.items() if not build(name, 5, 6, **more).no_memory
]


def batch_with_labels_on_the_host(device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Unlike classes, one of them of a single image; the loader leaves such a copy."""
    host = torch.tensor([0, 1, 0, 2, 1, 0, 3, 2, 0, 1])
    embeddings = torch.randn(10, 6, generator=torch.Generator().manual_seed(0))
    labels = host.to(device, copy=True)
    labels.host = host
    return embeddings.to(device).requires_grad_(), labels


@pytest.fixture
def valueless(monkeypatch):
    """Tensors without values stand for those of a GPU: who asks for one gets an error."""
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda *_: False)  # which they do not know


@pytest.mark.parametrize("case", [case for case in WITH_ARGUMENTS if case not in WAITING])
def test_no_loss_asks_a_device_for_a_number(case, valueless):
    name, arguments = WITH_ARGUMENTS[case]
    embeddings, labels = batch_with_labels_on_the_host("meta")
    build(name, 5, 6, **arguments).to("meta")(embeddings, labels).backward()
    assert embeddings.grad.shape == embeddings.shape


@pytest.mark.parametrize("case", REMEMBERED)
def test_no_loss_with_a_memory_asks_a_device_for_a_number(case, valueless):
    name, arguments = WITH_ARGUMENTS[case]
    memory = {"memory": {"size": 25, "start": 1}}
    objective = compose(name, 5, 6, memory, **arguments).to("meta")
    for step in range(4):
        embeddings, labels = batch_with_labels_on_the_host("meta")
        objective(Embeddings(embeddings), labels).backward()
        assert embeddings.grad.shape == embeddings.shape
        assert objective.terms["remembered"] == min(10 * step, 25)
    state = objective.state_dict()
    assert state["parts.metric.criterion.taken"] == 30
    assert state["parts.metric.criterion.labels"].tolist()[:5] == [0, 3, 2, 0, 1]


@pytest.mark.parametrize(
    ("case", "memory"),
    [(case, {}) for case in WITH_ARGUMENTS]
    + [(case, {"memory": {"size": 25}}) for case in REMEMBERED],
)
def test_the_copy_of_the_labels_changes_no_bit(case, memory):
    name, arguments = WITH_ARGUMENTS[case]
    found = []
    for copied in (False, True):
        torch.manual_seed(1)
        objective = compose(name, 5, 6, memory, **arguments)
        for _ in range(3 if memory else 1):
            embeddings, labels = batch_with_labels_on_the_host("cpu")
            loss = objective(Embeddings(embeddings), labels if copied else labels.clone())
            loss.backward()
            found.append((loss.detach(), embeddings.grad))
    half = len(found) // 2
    for plain, ours in zip(found[:half], found[half:], strict=True):
        assert all(map(torch.equal, plain, ours))


def test_mixed_labels_keep_their_copy():
    embeddings, labels = batch_with_labels_on_the_host("meta")
    _, mixed = losses.criteria.load("recall:with_mixtures")(embeddings, labels)
    assert mixed.host.tolist()[:10] == labels.host.tolist() and len(mixed) == 10 + 6 + 3 + 1


def test_weighted_draws_are_those_of_torch():
    """Which looks whether the weights can be drawn from, and so waits for a GPU."""
    draw = losses.criteria.load("miners:_drawn")
    weights = torch.rand(8, 12).clamp_min(0.3) - 0.3 + 1e-6
    for count in (1, 2, 5):
        for again in (False, True):
            torch.manual_seed(0)
            expected = torch.multinomial(weights, count, again)
            torch.manual_seed(0)
            assert torch.equal(draw(weights, count, again), expected)
