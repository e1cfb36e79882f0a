"""The losses of 2018 to 2025 against the authors' released code, and against their equations."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from test_losses import batch, fixture, leaf, names

import criteria
from criteria import hierarchy, softmax, strips, timing
from criteria.poincare import ball_distances, to_ball
from criteria.recall import with_mixtures
from losses import Embeddings, build, compose

pytestmark = pytest.mark.usefixtures("one_thread")


def answers(name):
    """A fixture's arrays, floating-point ones in float64, in which the released code ran."""
    values = fixture(name).items()
    return {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in values}


def agree(actual, expected, tolerance=1e-6):
    """To float32's precision, in which the answers are kept, unless said otherwise."""
    expected = torch.as_tensor(expected, dtype=actual.dtype).reshape(actual.shape)
    size = expected.abs().max().item()
    torch.testing.assert_close(actual.detach(), expected, rtol=tolerance, atol=tolerance * size)


def step(name, embeddings, labels, classes=30, **options):
    """The loss of raw embeddings as the command line computes it, and their gradient."""
    embeddings = leaf(embeddings.detach())
    objective = compose(name, classes, embeddings.shape[1], **options).double()
    loss = objective(Embeddings(embeddings), labels)
    loss.backward()
    return loss, embeddings.grad


def agree_with(name, data, tolerance=1e-6, **options):
    """A loss with the proxies of a fixture, its gradients too, against the answers; its terms."""
    embeddings = leaf(data["embeddings"])
    classes, size = (*data["proxies"].shape,) if "proxies" in data else (30, embeddings.shape[1])
    objective = compose(name, classes, size, **options).double()
    parameters = dict(objective.named_parameters())
    (proxies,) = [p for key, p in parameters.items() if key.endswith("proxies")] or [None]
    if proxies is not None:
        proxies.data = data["proxies"].clone()
    loss = objective(Embeddings(embeddings), data["labels"])
    loss.backward()
    agree(loss, data["loss"], tolerance)
    agree(embeddings.grad, data["grad_embeddings"], tolerance)
    if proxies is not None:
        agree(proxies.grad, data["grad_proxies"], tolerance)
    return objective.terms


# --- the authors' code ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", names("hyp_*") + names("sph_*"))
def test_cross_entropy_of_pairs_is_the_released_one(name):
    data = answers(name)
    loss, gradient = step(name[:3].title(), data["embeddings"], data["labels"])
    # The released distance has 1e-5 added to a denominator, and to the length that is clipped.
    tolerance = 2e-4 if name.startswith("hyp") else 1e-6
    agree(loss, data["loss"], tolerance)
    agree(gradient, data["grad_embeddings"], tolerance)


@pytest.mark.parametrize("strip_elements", [2**24, 300])
@pytest.mark.parametrize("name", names("recall_at_k*"))
def test_recall_at_k_is_the_released_one(name, strip_elements, monkeypatch):
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", strip_elements)
    data = answers(name)
    monkeypatch.setattr(torch, "rand", lambda *_, **__: data["shares"][:, None])
    loss, gradient = step(
        "RecallAtK",
        data["embeddings"],
        data["labels"],
        temperature=data["temperature"],
        simix=len(data["shares"]) > 0,
    )
    agree(loss, data["loss"])
    agree(gradient, data["grad_embeddings"])


@pytest.mark.parametrize("strip_elements", [2**24, 300])
@pytest.mark.parametrize("name", names("sup_ap*"))
def test_sup_ap_is_the_released_one(name, strip_elements, monkeypatch):
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", strip_elements)
    data = answers(name)
    terms = agree_with("SupAP", data)
    agree(1 - terms["ap"], data["ap"])
    agree(terms["softmax"], data["softmax"])


@pytest.mark.parametrize("name", names("norm_softmax*"))
def test_normalised_softmax_is_the_released_one(name):
    agree_with("NormSoftmax", answers(name))


@pytest.mark.parametrize("name", names("proxy_nca_pp*"))
def test_proxy_nca_plus_plus_is_the_released_one(name):
    agree_with("ProxyNCA_pp", answers(name))


@pytest.mark.parametrize("name", names("supcon*"))
def test_supcon_is_the_released_one(name):
    data = answers(name)
    agree_with("SupCon", data, temperature=data["temperature"])


@pytest.mark.parametrize("name", names("arcface_[01]") + names("cosface*"))
def test_softmax_with_a_margin_is_the_released_one(name):
    agree_with({"a": "ArcFace", "c": "CosFace"}[name[0]], answers(name))


@pytest.mark.parametrize("name", names("arcface_exact*"))
def test_the_true_gradient_of_arcface_is_that_of_the_older_release(name):
    agree_with("ArcFace", answers(name), exact_gradient=True)


@pytest.mark.parametrize("name", names("partial_fc*"))
def test_a_sample_of_the_classes_is_compared_as_released(name, monkeypatch):
    data = answers(name)
    monkeypatch.setattr(softmax, "sampled_classes", lambda *_: data["classes"])
    agree_with("CosFace", data, sample_rate=0.5)


@pytest.mark.parametrize("name", names("hist_*"))
def test_hist_is_the_released_one(name):
    data = answers(name)
    objective = compose("HIST", 20, 16, tau=data["tau"], alpha=data["alpha"], hidden=8).double()
    parameters = {key.split("criterion.")[1]: p for key, p in objective.named_parameters()}
    for key, parameter in parameters.items():
        parameter.data = data[key.replace(".", "_")].clone()
    embeddings = leaf(data["embeddings"])
    loss = objective(Embeddings(embeddings), data["labels"])
    loss.backward()
    agree(loss, data["loss"])
    for term in ("distribution", "hypergraph"):
        agree(objective.terms[term], data[term])
    agree(embeddings.grad, data["grad_embeddings"])
    for key, parameter in parameters.items():
        expected = data[f"grad_{key.replace('.', '_')}"]
        # The BatchNorm takes a constant away: the bias before it has no gradient.
        assert expected.abs().max() > 1e-12 or key == "first.bias"
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", names("hier_*"))
def test_hier_is_the_released_one(name, monkeypatch):
    data = answers(name)
    triplets = iter((data["triplets_images"], data["triplets_ancestors"]))
    monkeypatch.setattr(hierarchy, "reciprocal_triplets", lambda *_: tuple(next(triplets)))
    objective = compose("HIER", 20, 16, ancestors=12).double()
    criterion = objective.parts["metric"].criterion
    criterion.proxies.data = data["proxies"].clone()
    criterion.ancestors.data = data["ancestors"].clone()
    embeddings = leaf(data["embeddings"])
    torch.manual_seed(data["rng_seed"])
    loss = objective(Embeddings(embeddings), data["labels"])
    loss.backward()
    terms, tolerance = objective.terms, 5e-4  # the released distance has an ε, as Hyp's
    agree(loss, data["loss"], tolerance)
    agree(terms["positive"] + terms["negative"], data["metric"], tolerance)
    agree(terms["images"] + terms["ancestors"], data["hierarchy"], tolerance)
    agree(embeddings.grad, data["grad_embeddings"], tolerance)
    agree(criterion.proxies.grad, data["grad_proxies"], tolerance)
    agree(criterion.ancestors.grad, data["grad_ancestors"], tolerance)


@pytest.mark.parametrize("name", names("hier_*"))
def test_triplets_are_drawn_from_those_that_the_released_code_draws_from(name):
    """Its i with all of their j, and no i, j or k besides; from the fixture's 50 draws of each."""
    data = answers(name)
    labels, points = data["labels"], to_ball(data["embeddings"], 0.1, 2.3)
    likeness = torch.exp(-ball_distances(points, points, 0.1)) + (labels[:, None] == labels)
    drawn = [set(), set()]
    for seed in range(40):
        torch.manual_seed(seed)
        i, j, k = hierarchy.reciprocal_triplets(likeness, data["topk"])
        drawn[0] |= set(zip(i.tolist(), j.tolist(), strict=True))
        drawn[1] |= set(zip(i.tolist(), k.tolist(), strict=True))
    i, j, k = data["triplets_images"].tolist()
    released = set(zip(i, j, strict=True)), set(zip(i, k, strict=True))
    assert drawn[0] == released[0]  # few: 50 draws meet all of them
    assert drawn[1] >= released[1] and not drawn[1] & released[0]
    assert {a for a, _ in drawn[1]} == set(i)


# --- batches from which there is little to learn --------------------------------------------------

RECENT = list(criteria.COMMANDS["of 2018 to 2025"])
ONE = torch.zeros(6, dtype=torch.long)
PAIRS = torch.tensor([0, 0, 1, 1, 2, 2])
SINGLE = torch.arange(6)
VECTORS = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
POOR = {
    "one class": (VECTORS, ONE),
    "no positives": (VECTORS, SINGLE),
    "one image": (VECTORS[:1], ONE[:1]),
    "one pair": (VECTORS, torch.tensor([0, 0, 1, 2, 3, 4])),
    "duplicates": (VECTORS[[0, 0, 1, 1, 0, 0]], PAIRS),
    "zeros": (torch.zeros(6, 8), PAIRS),
    "one zero": (VECTORS.index_fill(0, torch.tensor([2]), 0.0), PAIRS),
    "opposite": (VECTORS[:1] * torch.tensor([[1.0], [-1], [1], [-1], [1], [-1]]), PAIRS),
    "huge": (1e6 * VECTORS, PAIRS),
    "tiny": (1e-6 * VECTORS, PAIRS),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("poor", POOR)
@pytest.mark.parametrize("name", RECENT)
def test_poor_batches_give_finite_numbers(name, poor, dtype):
    torch.manual_seed(0)
    vectors, labels = POOR[poor]
    vectors = leaf(vectors.to(dtype))
    objective = compose(name, 6, 8, **({"ancestors": 16} if name == "HIER" else {}))
    loss = objective(Embeddings(vectors), labels)
    assert loss.isfinite()
    if not loss.requires_grad:
        return
    loss.backward()
    learnt = [*objective.parameters(), vectors]
    assert all(each.grad is None or each.grad.isfinite().all() for each in learnt)


# --- pairs on the sphere and in the ball ----------------------------------------------------------


def test_the_distance_of_the_ball_is_that_of_moebius_addition():
    x, y = (0.4 * torch.randn(n, 5, dtype=torch.float64) for n in (4, 6))
    c = 0.3
    expected = torch.empty(4, 6, dtype=torch.float64)
    for i, a in enumerate(-x):
        for j, b in enumerate(y):
            dot, aa, bb = a @ b, a @ a, b @ b
            total = (1 + 2 * c * dot + c * bb) * a + (1 - c * aa) * b
            total = total / (1 + 2 * c * dot + c * c * aa * bb)
            expected[i, j] = 2 / c**0.5 * torch.atanh(c**0.5 * total.norm())
    torch.testing.assert_close(ball_distances(x, y, c), expected)


def test_the_map_into_the_ball_keeps_directions_and_distances_from_the_centre():
    vectors = (
        torch.tensor([[3.0, 4.0], [0.3, 0.4], [0.0, 0.0], [3e4, 4e4]]).double().requires_grad_()
    )
    points = to_ball(vectors, 1.0)
    # ‖exp₀(x)‖ = tanh‖x‖, whose distance from the centre is 2‖x‖; the last is pulled back.
    distances = ball_distances(points, torch.zeros(1, 2, dtype=torch.float64), 1.0).squeeze(1)
    expected = torch.tensor([2 * math.atanh(0.999), 1.0, 0.0, 2 * math.atanh(0.999)]).double()
    torch.testing.assert_close(distances, expected, rtol=1e-9, atol=1e-5)
    clipped = to_ball(vectors, 1.0, clip=0.5)
    torch.testing.assert_close(clipped[0], clipped[3])
    torch.testing.assert_close(clipped[1], clipped[0])
    (points.sum() + clipped.sum()).backward()
    assert vectors.grad.isfinite().all()


def test_pairs_of_the_sphere_by_hand():
    """Two classes of two: an ordered pair has its positive, one other of each place, itself out."""
    angles = torch.tensor([0.0, 0.5, 1.4, 2.0]).double()
    unit = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels, t = torch.tensor([7, 7, 3, 3]), 0.3
    s = torch.cos(angles[:, None] - angles) / t
    expected = 0.0
    for a, p in ((0, 1), (1, 0), (2, 3), (3, 2)):
        others = [j for j in range(4) if j not in (a, p)]
        expected += math.log1p(sum(math.exp(s[a, j] - s[a, p]) for j in others)) / 2
    assert build("Sph", 2, 2, temperature=t)(unit, labels).item() == pytest.approx(expected)


def test_pairs_of_classes_of_unequal_size():
    """Every ordered pair counts once; its negatives are the images in one of its two places."""
    labels = torch.tensor([4, 0, 4, 0, 4, 2])
    unit = F.normalize(torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).double())
    place, t = [0, 0, 1, 1, 2, 0], 0.2
    s = unit @ unit.T / t
    expected = 0.0
    for a in range(6):
        for p in range(6):
            if a != p and labels[a] == labels[p]:
                candidates = [j for j in range(6) if j != a and place[j] in (place[a], place[p])]
                expected += (s[a, candidates].logsumexp(0) - s[a, p]).item()
    assert build("Sph", 5, 3, temperature=t)(unit, labels).item() == pytest.approx(expected / 2)


# --- recall@k -------------------------------------------------------------------------------------


def test_recall_at_k_counts_as_the_metric_does_where_the_steps_are_sharp():
    """With sharp sigmoids it is recall@(k-1), for the query itself is counted among the images."""
    embeddings, labels = batch(6, 3, size=4, seed=3, dtype=torch.float64)
    unit = F.normalize(embeddings.detach())
    order = (unit @ unit.T).fill_diagonal_(-torch.inf).argsort(dim=1, descending=True)
    hits = (labels[order] == labels[:, None])[:, :3].sum(dim=1).double()
    expected = 1 - (hits / 2).mean()  # two positives, among the first three
    loss = build("RecallAtK", 6, 4, ks=4, temperature=1e-6, rank_temperature=1e-3)(unit, labels)
    # A positive exactly at rank k is half found.
    at_edge = (labels[order[:, 2]] == labels).double() / 2 / 2
    torch.testing.assert_close(loss, expected + at_edge.mean())


def test_a_mixture_is_as_like_as_its_parts_on_average():
    embeddings, labels = batch(3, 4, size=6, dtype=torch.float64)
    torch.manual_seed(2)
    mixed, classes = with_mixtures(embeddings, labels)
    assert torch.equal(mixed[:12], embeddings) and len(mixed) == 12 + 3 * 6
    assert torch.equal(classes.bincount(), torch.tensor([10, 10, 10]))
    torch.manual_seed(2)
    share = torch.rand(18, 1, dtype=torch.float64)[0]
    torch.testing.assert_close(mixed[12], share * embeddings[0] + (1 - share) * embeddings[1])


def test_strips_of_recall_give_the_same_numbers(monkeypatch):
    embeddings, labels = batch(12, 4, dtype=torch.float64)
    torch.manual_seed(0)
    whole = step("RecallAtK", embeddings, labels, simix=True)
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", 5000)
    torch.manual_seed(0)
    for one, other in zip(whole, step("RecallAtK", embeddings, labels, simix=True), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("ks", ["1,2,x", "0", "1.5", 0, "", 2.5])
def test_ks_that_are_no_whole_numbers_are_one_sentence(ks):
    with pytest.raises(ValueError, match=r"ks must be whole numbers above 0 .*, not .*\.$"):
        build("RecallAtK", 5, 4, ks=ks)


@pytest.mark.parametrize("ks", ["1,4", (1, 4), [1, 4]])
def test_ks_as_words_and_as_numbers(ks):
    assert build("RecallAtK", 5, 4, ks=ks).ks == (1, 4)


# --- average precision ----------------------------------------------------------------------------


def test_sup_ap_is_never_below_one_minus_average_precision():
    embeddings, labels = batch(6, 4, size=6, seed=2, dtype=torch.float64)
    unit = F.normalize(embeddings.detach())
    similarity = unit @ unit.T  # the query is a positive of its own, as released
    precision = []
    for q in range(len(labels)):
        hits = (labels[similarity[q].argsort(descending=True)] == labels[q]).double()
        at = hits.cumsum(0) / torch.arange(1, len(labels) + 1)
        precision.append((hits * at).sum() / hits.sum())
    exact = 1 - torch.stack(precision).mean()
    for temperature in (1e-6, 0.01, 0.1):
        loss = build("SupAP", 6, 6, weight=1.0, temperature=temperature)(unit, labels)
        assert loss >= exact - 1e-9
    # Where only what is on the right side counts, and a wrong image in front counts once, it is it.
    sharp = {"temperature": 1e-9, "start": 0.0, "delta": 3.0}
    torch.testing.assert_close(build("SupAP", 6, 6, weight=1.0, **sharp)(unit, labels), exact)


def test_sup_ap_alone_has_no_proxies():
    assert list(build("SupAP", 6, 4, weight=1).parameters()) == []
    (group,) = build("SupAP", 6, 4).parameter_groups(1e-4)
    assert (group["name"], group["lr"], group["weight_decay"]) == ("proxies", 10.0, 0.0)


# --- classification -------------------------------------------------------------------------------


def test_label_smoothing_by_hand():
    embeddings, labels = batch(3, 2, size=4, dtype=torch.float64)
    criterion = build("NormSoftmax", 5, 4, temperature=0.5, smoothing=0.2).double()
    logs = (criterion.similarity(embeddings) / 0.5).log_softmax(dim=1)
    target = 0.2 / 5 + 0.8 * F.one_hot(labels, 5)
    torch.testing.assert_close(criterion(embeddings, labels), -(target * logs).sum(dim=1).mean())


def test_the_nearest_of_the_proxies_of_a_class_counts():
    embeddings, labels = batch(3, 2, size=4, dtype=torch.float64)
    criterion = build("CosFace", 5, 4, sub_centers=3).double()
    assert criterion.proxies.shape == (15, 4)
    cosines = F.normalize(embeddings) @ F.normalize(criterion.proxies).T
    nearest = torch.stack([cosines[:, 3 * c : 3 * c + 3].amax(dim=1) for c in range(5)], dim=1)
    torch.testing.assert_close(criterion.similarity(embeddings), nearest)
    own = F.one_hot(labels, 5)
    expected = F.cross_entropy(64 * (nearest - 0.4 * own), labels)
    torch.testing.assert_close(criterion(embeddings, labels), expected)


def test_sub_centers_and_sampling_go_together():
    embeddings, labels = batch(3, 2, size=4, dtype=torch.float64)
    criterion = build("ArcFace", 50, 4, sub_centers=2, sample_rate=0.2).double()
    criterion(embeddings, labels).backward()
    learnt = criterion.proxies.grad.unflatten(0, (50, 2)).abs().sum(dim=(1, 2)) > 0
    assert learnt[:3].all() and learnt.sum() <= 10
    assert criterion.similarity(embeddings).shape == (6, 50)  # what DDML compares with: all


def test_the_classes_of_a_batch_are_always_in_the_sample():
    labels = torch.tensor([40, 3, 3, 17])
    seen = torch.zeros(50)
    for seed in range(200):
        torch.manual_seed(seed)
        classes = softmax.sampled_classes(labels, 50, 0.2)
        assert len(classes) == 10 and {3, 17, 40} <= set(classes.tolist())
        assert torch.equal(classes, classes.unique())
        seen[classes] += 1
    others = seen[[c for c in range(50) if c not in (3, 17, 40)]]
    assert others.min() > 10 and others.max() < 60  # 30 on average
    assert softmax.sampled_classes(labels, 50, 0.01).tolist() == [3, 17, 40]


def test_a_sample_of_all_classes_is_the_whole_loss():
    embeddings, labels = batch(3, 2, size=4, dtype=torch.float64)
    whole = build("ArcFace", 9, 4).double()
    almost = build("ArcFace", 9, 4, sample_rate=0.999).double()
    almost.proxies = whole.proxies
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(softmax, "sampled_classes", lambda *_: torch.arange(9))
        torch.testing.assert_close(almost(embeddings, labels), whole(embeddings, labels))


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("CosFace", {"sample_rate": 1.5}, "sample_rate must be above 0 and at most 1"),
        ("NormSoftmax", {"smoothing": 1.0}, "smoothing must be at least 0 and below 1"),
        ("SupAP", {"weight": 0}, "weight must be above 0 and at most 1"),
        ("PFML", {"delta": 1e30}, "delta must be at most 2, the largest distance of unit vectors"),
        (
            "PFML",
            {"delta": 1e-30},
            "alpha 4.0 and delta 1e-30 .* a larger delta",
        ),
        ("PFML", {"alpha": 1e30}, "alpha 1e.30 and delta 0.2 .* a smaller alpha"),
    ],
)
def test_impossible_constants_are_one_sentence(name, options, words):
    with pytest.raises(ValueError, match=words) as caught:
        build(name, 5, 4, **options)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_rates_of_the_released_codes():
    groups = {}
    for name in ("NormSoftmax", "ProxyNCA_pp", "ArcFace", "CosFace"):
        (group,) = build(name, 6, 4).parameter_groups(1e-4)
        groups[name] = round(group["lr"] / 1e-4), group.get("weight_decay"), group.get("eps")
    assert groups == {
        "NormSoftmax": (1, None, None),
        "ProxyNCA_pp": (100_000, 0.0, 1.0),
        "ArcFace": (1, None, None),
        "CosFace": (1, None, None),
    }
    (group,) = build("ProxyNCA_pp", 6, 4).torch_groups(1e-4)
    assert group["eps"] == 1.0


def test_rates_of_hist_and_hier():
    rates = {g["name"]: g["lr"] for g in build("HIST", 6, 4).parameter_groups(1e-4)}
    assert rates == {"distributions": 0.1, "hypergraph": pytest.approx(1e-3)}
    rates = {g["name"]: g["lr"] for g in build("HIER", 6, 4).parameter_groups(1e-4)}
    assert rates == {"proxies": pytest.approx(1.0), "ancestors": pytest.approx(5e-3)}
    (group,) = build("PFML", 6, 4).parameter_groups(1e-4)
    assert group["lr"] == pytest.approx(1e-2)


# --- hypergraphs, hierarchies ---------------------------------------------------------------------


def test_distances_from_the_distributions_by_hand():
    embeddings, _ = batch(3, 2, size=4, dtype=torch.float64)
    criterion = build("HIST", 5, 4).double()
    gaps = F.normalize(embeddings)[:, None] - F.normalize(criterion.means)
    expected = (gaps.square() / criterion.log_variances.clamp(0, 6).exp()).sum(dim=2)
    torch.testing.assert_close(criterion.distances(embeddings), expected)


def test_the_gradient_of_the_ball_is_smaller_towards_its_edge():
    points = torch.tensor([[0.0, 0.0], [0.6, 0.0], [0.0, 0.99]]).requires_grad_()
    hierarchy.riemannian(points * 1, 1.0).sum().backward()
    expected = (1 - torch.tensor([0.0, 0.36, 0.99**2])) ** 2 / 4
    torch.testing.assert_close(points.grad, expected[:, None].expand(3, 2))


@pytest.mark.parametrize("elements", [2**24, 12])
@pytest.mark.parametrize("name", ["NormSoftmax", "ProxyNCA_pp", "ArcFace", "CosFace"])
def test_accuracy_is_the_share_that_are_nearest_to_their_own_and_a_tie_is_not(
    name, elements, monkeypatch
):
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", elements)
    torch.manual_seed(0)
    criterion, labels = build(name, 9, 8).double(), torch.arange(6)
    criterion(torch.zeros(6, 8, dtype=torch.float64), labels)
    assert criterion.terms["accuracy"] == 0, "all classes are as near"
    images = torch.randn(6, 8, dtype=torch.float64)
    criterion(images, labels)
    nearest = (F.normalize(images) @ F.normalize(criterion.proxies).T).argmax(dim=1)
    assert criterion.terms["accuracy"].item() == pytest.approx((nearest == labels).double().mean())


# --- potential fields -----------------------------------------------------------------------------


def energy(points, charges, alpha, delta):
    """The sum of ψ over all ordered pairs, one after the other."""
    total = 0.0
    for i, one in enumerate(points):
        for j, other in enumerate(points):
            r = math.sqrt(float((one - other).square().sum()) + (delta / 100) ** 2)
            if i != j and charges[i] == charges[j]:
                total -= max(r, delta) ** -alpha
            elif i != j:
                total += min(r, delta) ** -alpha - delta**-alpha
    return total


@pytest.mark.parametrize("strip_elements", [2**24, 60, 1])
@pytest.mark.parametrize(("alpha", "delta"), [(1.0, 0.2), (4.0, 0.6), (6.0, 1.2)])
def test_the_potential_field_by_hand(alpha, delta, strip_elements, monkeypatch):
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", strip_elements)
    embeddings, labels = batch(3, 2, size=3, dtype=torch.float64)
    criterion = build("PFML", 4, 3, alpha=alpha, delta=delta, proxies_per_class=2).double()
    points = F.normalize(torch.cat([embeddings, criterion.proxies])).detach()
    charges = [*labels.tolist(), 0, 0, 1, 1, 2, 2, 3, 3]
    loss = criterion(embeddings, labels)
    assert loss.item() == pytest.approx(energy(points, charges, alpha, delta) / 6, rel=1e-9)
    parts = criterion.terms["attraction"] + criterion.terms["repulsion"]
    torch.testing.assert_close(parts, loss.detach())


def test_forces_of_the_potential_field_are_those_of_finite_differences():
    embeddings, labels = batch(3, 2, size=3, dtype=torch.float64)
    criterion = build("PFML", 4, 3, alpha=3.0, delta=0.7, proxies_per_class=2).double()

    def loss(values, proxies):
        return torch.func.functional_call(criterion, {"proxies": proxies}, (values, labels))

    assert torch.autograd.gradcheck(loss, (embeddings, leaf(criterion.proxies.detach())))


def pair_force(angle, same, alpha=4.0, delta=0.2):
    """How the energy of two images on a circle changes with the angle between them."""
    torch.manual_seed(0)
    criterion = build("PFML", 2, 2, alpha=alpha, delta=delta, proxies_per_class=1).double()
    labels = torch.tensor([0, 0 if same else 1])

    def torque(first):
        """Of the second image, beside the proxies and the images from ``first`` on."""
        turned = torch.tensor(angle, dtype=torch.float64, requires_grad=True)
        fixed = torch.tensor([1.0, 0.0], dtype=torch.float64)
        images = torch.stack([fixed, torch.stack([turned.cos(), turned.sin()])])
        (criterion(images[first:], labels[first:]) * (2 - first)).backward()
        return turned.grad.item()

    return torque(0) - torque(1)


def test_attraction_acts_beyond_delta_and_repulsion_within():
    assert pair_force(0.1, same=True) == 0 and pair_force(0.3, same=True) > 0
    assert pair_force(0.3, same=False) == 0 and pair_force(0.1, same=False) < 0
    # Both weaken with the distance.
    assert pair_force(0.3, same=True) > pair_force(0.6, same=True) > pair_force(2.0, same=True)
    assert pair_force(0.05, same=False) < pair_force(0.1, same=False)


@pytest.mark.parametrize("crowd", [1e-3, 1.0])
def test_the_field_of_few_and_of_many_near_pairs_is_that_of_all(crowd, monkeypatch):
    """Pairs that push are computed one by one where they are few, and as a table elsewhere."""
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", 2000)
    torch.manual_seed(3)
    images = leaf(torch.randn(30, 8, dtype=torch.float64))
    criterion = build("PFML", 20, 8, alpha=2.0, delta=0.3, proxies_per_class=3).double()
    with torch.no_grad():  # all near one point, or in pairs that are
        criterion.proxies[1:] = criterion.proxies[0] + crowd * torch.randn(59, 8).double()
        criterion.proxies[40] = criterion.proxies[3] + 0.01
    labels = torch.arange(30) % 20
    loss = criterion(images, labels)
    found = torch.autograd.grad(loss, [images, criterion.proxies])

    points = F.normalize(torch.cat([images, criterion.proxies]))
    squares = (2 - 2 * points @ points.T).clamp_min(0) + 0.003**2
    charges = torch.cat([labels, torch.arange(20).repeat_interleave(3)])
    same = charges[:, None] == charges
    pulls = -(squares.clamp_min(0.09) ** -1) * (same & ~torch.eye(90, dtype=torch.bool))
    pushes = (squares.clamp_max(0.09) ** -1 - 0.3**-2) * ~same
    expected = (pulls + pushes).sum() / 30
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        found, torch.autograd.grad(expected, [images, criterion.proxies]), rtol=1e-7, atol=1e-9
    )
    assert criterion.terms["repulsion"] > 0


def test_charges_find_their_classes():
    """Gradient descent brings a class's points together and other classes' beyond delta."""
    torch.manual_seed(1)
    labels = torch.arange(3).repeat_interleave(4)
    points = torch.randn(12, 3, requires_grad=True)
    criterion = build("PFML", 3, 3, alpha=2.0, delta=0.3, proxies_per_class=2)
    optimiser = torch.optim.Adam([points, *criterion.parameters()], lr=0.02)
    for _ in range(200):
        optimiser.zero_grad()
        criterion(points, labels).backward()
        optimiser.step()
    unit = F.normalize(points.detach())
    distances = torch.cdist(unit, unit)
    same = labels[:, None] == labels
    assert distances[~same].min() > 0.29
    assert distances[same].median() < 0.3  # not all: what is far away is hardly attracted


def test_many_proxies_are_told_what_they_cost(monkeypatch):
    assert build("PFML", 100, 4).cost() == ""
    monkeypatch.setattr(timing, "LONG", 0.0)
    said = build("PFML", 3000, 4, proxies_per_class=2).cost()
    assert said.startswith("PFML compares all 6,000 proxies with each other") and "\n" not in said


def test_a_loss_around_another_says_what_that_one_costs_and_learns(monkeypatch):
    monkeypatch.setattr(timing, "LONG", 0.0)
    around = compose("AMLoss", 6000, 4, {"disentangled": {"al": 1.0}})
    assert around.cost().startswith("AMLoss compares the proxies of all 6,000 classes")
    assert [group["name"] for group in around.parameter_groups(1.0)] == ["proxies", "margins"]
    assert around.class_values()["margin"].shape == (6000,)
