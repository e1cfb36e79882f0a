"""Divide and conquer: the division itself, its schedule, the masks' life, and what is refused."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F

import evaluate
import methods
import options
import train
from dataset import clusters
from dataset.cluster_sampler import ClusterSampler
from dataset.clusters import can_divide, divide, is_acceptable, renumber, without_singles
from dataset.loader import Batch
from methods.divide.routine import DivideAndConquer
from methods.divide.settings import Division
from metrics.clustering import Clustering
from training import schedules
from training.state import Training
from utils import InputError

DIVIDED = "--nb-clusters 4 --mod-epoch 2 --warm 0 --IPC 2 --amp off --lr 1e-3 --schedule constant"


# --- the learning rate ----------------------------------------------------------------------------


def test_cosine_follows_the_epochs_where_their_length_is_known():
    by_steps, by_epochs = schedules.cosine(100), schedules.cosine(100, 10)
    for step in range(101):
        assert by_epochs(step / 10, step) == pytest.approx(by_steps(0, step), abs=1e-12)
    assert by_epochs(9.5, 10**6) == pytest.approx(by_steps(0, 95))  # however many steps it took
    assert by_epochs(9.99, 0) > 0 == by_epochs(10.0, 0)


def test_rate_follows_the_epochs_though_divided_ones_have_other_lengths(images, tmp_path):
    flags = DIVIDED.replace("constant", "cosine").replace("--mod-epoch 2", "--mod-epoch 1")
    flags = f"{flags} --loss MarginLoss --epochs 4 --batch-size 8"
    rows = tiny.metrics_rows(tiny.run(images, tmp_path, "run", flags))
    steps = np.diff([0, *(int(row["step"]) for row in rows)])
    assert len(set(steps)) > 1  # else this shows nothing
    expected = schedules.cosine(4 * steps[0], steps[0])
    for epoch, (row, count) in enumerate(zip(rows, steps, strict=True)):
        last_step = epoch + (count - 1) / count
        assert float(row["lr backbone"]) == pytest.approx(1e-3 * expected(last_step, 0), rel=1e-4)


# --- the division ---------------------------------------------------------------------------------


def relabelled(count: int, permutation: np.ndarray, images: int = 400) -> tuple[np.ndarray, ...]:
    """A division, and the same one under other numbers."""
    previous = np.random.default_rng(count).integers(count, size=images)
    return permutation[previous], previous


@pytest.mark.parametrize(
    "permutation",
    [
        np.array([1, 2, 0]),
        np.random.default_rng(0).permutation(8),
        np.random.default_rng(1).permutation(32),
    ],
    ids=["3-cycle", "8 clusters", "32 clusters"],
)
def test_renumbering_undoes_any_permutation_and_the_released_code_does_not(
    permutation: np.ndarray,
) -> None:
    count = len(permutation)
    now, previous = relabelled(count, permutation)
    assert (renumber(now, previous, count) == previous).all()
    legacy = renumber(now, previous, count, legacy=True)
    assert (legacy != previous).any()
    # The inverse of what is needed, applied to what is already permuted.
    assert (legacy == permutation[permutation[previous]]).all()


@pytest.mark.parametrize("permutation", [[1, 0], [2, 1, 0], [1, 0, 3, 2]])
def test_the_released_renumbering_is_right_where_two_clusters_swap(permutation: list[int]) -> None:
    now, previous = relabelled(len(permutation), np.array(permutation))
    assert (renumber(now, previous, len(permutation), legacy=True) == previous).all()


def test_unused_images_and_empty_clusters_do_not_disturb_renumbering() -> None:
    now, previous = relabelled(4, np.array([2, 3, 1, 0]))
    previous[::7] = -1
    expected = np.argsort([2, 3, 1, 0])[now]
    assert (renumber(now, previous, 4) == expected).all()
    kept = previous != 3  # all that remember the last cluster are gone; its number is left for it
    assert (renumber(now[kept], previous[kept], 4) == expected[kept]).all()


def test_renumbering_follows_the_majority() -> None:
    previous = np.repeat([0, 1, 2], 10)
    now = np.repeat([2, 0, 1], 10)
    now[[0, 1, 12]] = [0, 1, 2]
    number = {2: 0, 0: 1, 1: 2}
    assert renumber(now, previous, 3).tolist() == [number[c] for c in now.tolist()]


@pytest.mark.parametrize(
    ("assignment", "labels", "count", "accepted"),
    [
        ([0, 0, 0, 0], [0, 0, 1, 1], 1, True),
        ([0, 0, 0, 0], [0, 0, 0, 1], 1, False),
        ([0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2, 3, 3], 2, True),
        ([0, 0, 1, 1, 1, 1, 1, 1], [0, 0, 1, 1, 2, 2, 3, 3], 2, False),
        ([0, 0, 0, 0, 1, 1, 1, 1], [0, 0, 1, 1, 0, 0, 1, 1], 2, True),
        ([0, 0, 0, 0, 0, 0, 0, 0], [0, 0, 1, 1, 2, 2, 3, 3], 2, False),
    ],
)
def test_a_cluster_needs_two_classes_with_two_images(
    assignment: list[int], labels: list[int], count: int, accepted: bool
) -> None:
    assert is_acceptable(np.array(assignment), np.array(labels), count) == accepted


LABELS = np.repeat(np.arange(4), 4)
GOOD, BAD = np.repeat([0, 1], 8), np.repeat([0, 1], [4, 12])


def answers(monkeypatch: pytest.MonkeyPatch, good: Callable[[int], bool]) -> list[int]:
    """k-means answers with a good division for some seeds; returns the list of seeds asked for."""
    asked: list[int] = []

    def kmeans(x: torch.Tensor, k: int, seed: int, start: None) -> Clustering:
        asked.append(seed)
        return Clustering(torch.from_numpy(GOOD if good(seed) else BAD), x[:k], 0.0)

    monkeypatch.setattr(clusters, "kmeans", kmeans)
    return asked


def test_k_means_is_tried_with_the_next_seeds_until_all_clusters_can_train(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = answers(monkeypatch, lambda seed: seed >= 1237)
    assert (divide(torch.eye(16), LABELS, 2, 1234) == GOOD).all()
    assert asked == [1234, 1235, 1236, 1237]


def test_the_last_of_thirty_trials_is_taken_and_reported(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = answers(monkeypatch, lambda seed: False)
    assert (divide(torch.eye(16), LABELS, 2, 5) == BAD).all()
    assert asked == list(range(5, 35))
    assert "30 trials" in caplog.text and caplog.text.count("\n") == 1


def test_images_alone_in_their_class_and_cluster_are_unused() -> None:
    assignment = np.array([0, 0, 0, 1, 1, 1, 1, 2])
    labels = np.array([7, 7, 8, 7, 9, 9, 8, 9])
    assert without_singles(assignment, labels).tolist() == [0, 0, -1, -1, 1, 1, -1, -1]


def corners(groups: int, images: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Unit vectors in `groups` tight groups, neighbours 2g and 2g + 1 nearer to each other.

    Returns features, labels (two classes a group) and the group of each image.
    """
    group = np.repeat(np.arange(groups), images)
    features = torch.zeros(len(group), 2 * groups)
    features[torch.arange(len(group)), torch.from_numpy(group // 2)] = 3.0
    features[torch.arange(len(group)), torch.from_numpy(groups + group)] = 1.0
    noise = torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    labels = 2 * group + np.arange(len(group)) % 2
    return F.normalize(features + 0.01 * noise), labels, group


def test_every_live_flag_of_the_released_command_trains(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = f"{DIVIDED} --epochs 1 --init-method xavier_normal_2"
    (file,) = tiny.run(images, tmp_path, "first", words).glob("*best.pth")
    flags = (
        f"--album ColorHeavy --ratio-classes 1.0 --checkpoint {file} "
        "--clustering-method kmeans_adaptive_centroids --num-replicas 2 --batch-sampler randombatch"
    )
    words = f"{DIVIDED} --epochs 3 {flags}".replace("--IPC 2", "")
    folder = tiny.run(images, tmp_path, "second", words)
    assert len(tiny.metrics_rows(folder)) == 3


def test_adaptive_centroids_keep_a_division_that_starting_anew_would_change(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    centres = F.normalize(torch.randn(4, 16, generator=generator))
    features = centres.repeat_interleave(30, dim=0)
    features = F.normalize(features + 0.05 * torch.randn(120, 16, generator=generator))
    labels = np.arange(120) // 10
    previous = np.repeat([2, 0, 3, 1], 30)
    starts: list[torch.Tensor | None] = []
    real = clusters.kmeans

    def watched(*args, start=None, **more):
        starts.append(start)
        return real(*args, start=start, **more)

    monkeypatch.setattr(clusters, "kmeans", watched)
    found = divide(features, labels, 4, 1, previous=previous, adaptive=True)
    assert (found == previous).all()
    means = torch.stack([features[torch.from_numpy(previous == c)].mean(0) for c in range(4)])
    torch.testing.assert_close(starts[0], means)
    starts.clear()
    # A cluster without images has no mean, and a first division nothing before it.
    divide(features, labels, 4, 1, previous=np.where(previous == 3, 1, previous), adaptive=True)
    divide(features, labels, 4, 1, adaptive=True)
    divide(features, labels, 4, 1, previous=previous)
    assert starts == [None, None, None]


def test_a_division_doubles_after_it_is_renumbered() -> None:
    features, labels, group = corners(groups=8, images=8)
    before = divide(features, labels, 4, 1)
    assert [len(np.unique(before[group // 2 == pair])) for pair in range(4)] == [1] * 4
    for renamed in (before, (before + 1) % 4):
        after = divide(features, labels, 4, 2, previous=renamed, split=True)
        assert (after // 2 == renamed).all() and set(after) == set(range(8))
        assert all(len(np.unique(after[group == g])) == 1 for g in range(8))
    legacy = divide(features, labels, 4, 2, previous=(before + 1) % 4, split=True, legacy=True)
    cycle = divide(features, labels, 4, 2)  # what k-means alone calls them
    moved = not (cycle == (before + 1) % 4).all()
    assert (legacy // 2 != (before + 1) % 4).any() == moved


def test_halves_have_seeds_and_trials_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    features, labels, _ = corners(groups=4, images=8)
    asked = []
    kmeans = clusters.kmeans
    monkeypatch.setattr(
        clusters,
        "kmeans",
        lambda x, k, seed, start: asked.append((len(x), k, seed)) or kmeans(x, k, seed),
    )
    divide(features, labels, 2, 1234, split=True)
    assert asked[0] == (32, 2, 1234)
    assert all(k == 2 and size == 16 and seed >= 1234 for size, k, seed in asked[1:])
    assert sum(seed == 1234 for _, _, seed in asked[1:]) == 2


@pytest.mark.parametrize(
    ("sizes", "most"),
    [([6] * 8, 8), ([2, 2], 1), ([2], 0), ([100, 2, 2], 2), ([100], 0), ([3, 3, 1], 1), ([1], 0)],
)
def test_how_many_clusters_the_images_can_fill(sizes: list[int], most: int) -> None:
    labels = np.repeat(np.arange(len(sizes)), sizes)
    assert [k for k in (1, 2, 4, 8, 16) if can_divide(labels, k)][-1:] == ([most] if most else [])


# --- a run, step by step --------------------------------------------------------------------------


class Seen(NamedTuple):
    """What held just before a training step."""

    epoch: int
    cluster: int | None
    count: int
    masks: torch.Tensor
    mask_steps: int | None
    groups: dict[str, int]
    backbone: torch.Tensor


class Watched:
    """A run whose steps, divisions and evaluations of features are written down."""

    def __init__(self, images: Path, flags: str, epochs: int) -> None:
        self.training = tiny.prepare(images, f"{flags} --epochs {epochs}")
        self.routine: DivideAndConquer = self.training.routines[-1]
        self.steps: list[Seen] = []
        self.rates: list[dict[str, float]] = []
        self.embedded: list[int] = []
        self.divided: list[int] = []
        self._step, self._embed = train.step, self.training.embed_training_images
        self._divide = self.routine.divide_anew
        self.training.embed_training_images = self.embed
        self.routine.divide_anew = self.divide
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train, "step", self.step)
            for _ in range(epochs):
                train.advance(self.training)

    def step(self, training: Training, batch: Batch) -> dict[str, torch.Tensor]:
        groups = {group["name"]: len(group["params"]) for group in training.optimisers.groups}
        (optimiser,) = training.optimisers.optimisers
        masks = training.network.masks.weight
        steps = optimiser.state[masks]["step"] if masks in optimiser.state else None
        self.steps.append(
            Seen(
                training.clock.epoch,
                batch.cluster,
                self.routine.count,
                masks.detach().clone(),
                None if steps is None else int(steps),
                groups,
                training.network.model.conv1.weight.detach().clone(),
            )
        )
        values = self._step(training, batch)
        self.rates.append(training.optimisers.learning_rates())
        return values

    def embed(self, *, pooled: bool) -> torch.Tensor:
        self.embedded.append(self.training.clock.epoch)
        return self._embed(pooled=pooled)

    def divide(self, training: Training) -> None:
        self.divided.append(training.clock.epoch)
        self._divide(training)

    def first_of(self, epoch: int) -> Seen:
        return next(seen for seen in self.steps if seen.epoch == epoch)

    def rests(self) -> list[bool]:
        """For each epoch, whether the backbone had no learning rate in all of its steps."""
        by_epoch: dict[int, set[float]] = {}
        for seen, rates in zip(self.steps, self.rates, strict=True):
            by_epoch.setdefault(seen.epoch, set()).add(rates["backbone"])
        assert all(len(rates) == 1 for rates in by_epoch.values())
        return [rates == {0.0} for rates in by_epoch.values()]


@pytest.fixture(scope="module")
def hierarchy(images: Path) -> Watched:
    """K = 1, 1, 2, 2, 4, 4, 4 and two epochs of the full phase."""
    flags = "--mod-epoch-freeze 1 --force-full-embedding-epoch 7 --mask-lr-mult 10"
    return Watched(images, f"{DIVIDED} {flags}", epochs=9)


def test_clusters_double_every_other_epoch_and_masks_before_the_first_step(
    hierarchy: Watched,
) -> None:
    firsts = [hierarchy.first_of(epoch) for epoch in range(9)]
    assert [seen.count for seen in firsts] == [1, 1, 2, 2, 4, 4, 4, 4, 4]
    assert [len(seen.masks) for seen in firsts] == [1, 1, 2, 2, 4, 4, 4, 4, 4]
    assert hierarchy.divided == [0, 2, 4, 6, 8]
    assert hierarchy.embedded == [2, 4, 6, 8]  # one cluster is no question of features


def test_the_published_command_reaches_32_clusters_in_epoch_10() -> None:
    command = "--nb-clusters 32 --mod-epoch 2 --mod-epoch-freeze 1 --force-full-embedding-epoch 80"
    args = options.parse_train(["--experiment", "margin_loss_resnet50", *command.split()])
    labels = np.repeat(np.arange(100), 10)
    assert DivideAndConquer(Division.of(args), labels).division.full_from == 80
    args.force_full_embedding_epoch = 11
    DivideAndConquer(Division.of(args), labels)
    args.force_full_embedding_epoch = 10
    with pytest.raises(InputError, match="from epoch 10 on; choose at least 11"):
        DivideAndConquer(Division.of(args), labels)


def test_the_backbone_rests_in_even_epochs_from_the_first_to_the_last(hierarchy: Watched) -> None:
    assert hierarchy.rests() == [True, False] * 4 + [True]
    for epoch in range(8):
        before, after = hierarchy.first_of(epoch).backbone, hierarchy.first_of(epoch + 1).backbone
        assert torch.equal(before, after) == (epoch % 2 == 0)
    rates = [rates for rates in hierarchy.rates if rates["backbone"]]
    assert {rates["backbone"] for rates in rates} == {1e-3}
    assert {rates["head"] for rates in hierarchy.rates} == {1e-3}


def test_every_batch_comes_from_one_cluster_and_the_clusters_take_turns(hierarchy: Watched) -> None:
    for epoch in range(7):
        turns = [seen.cluster for seen in hierarchy.steps if seen.epoch == epoch]
        present = sorted(set(turns))
        assert turns == present * (len(turns) // len(present))
        assert set(present) <= set(range(hierarchy.first_of(epoch).count))
    assert {seen.cluster for seen in hierarchy.steps if seen.epoch == 5} == {0, 1, 2, 3}


def test_children_start_as_copies_and_part_in_training(hierarchy: Watched) -> None:
    for epoch in (2, 4):
        masks = hierarchy.first_of(epoch).masks
        assert torch.equal(masks[0::2], masks[1::2])
        later = hierarchy.first_of(epoch + 1).masks
        assert not torch.equal(later[0], later[1])
    assert not torch.equal(hierarchy.first_of(1).masks, torch.ones(1, 8))  # the root trained, too


def test_masks_get_fresh_moments_when_they_double_and_only_then(hierarchy: Watched) -> None:
    per_epoch = [sum(seen.epoch == epoch for seen in hierarchy.steps) for epoch in range(7)]
    expected = [0, per_epoch[0], 0, per_epoch[2], 0, per_epoch[4], sum(per_epoch[4:6])]
    assert [hierarchy.first_of(epoch).mask_steps or 0 for epoch in range(7)] == expected


def test_the_full_phase_trains_no_masks_and_uses_none(hierarchy: Watched) -> None:
    for seen in hierarchy.steps:
        assert seen.groups["masks"] == (0 if seen.epoch >= 7 else 1)
        assert {name for name, params in seen.groups.items() if params} >= {"backbone", "head"}
    ended = hierarchy.first_of(7).masks
    assert torch.equal(hierarchy.training.network.masks.weight, ended)
    assert not hierarchy.training.network.masks.weight.requires_grad
    assert hierarchy.first_of(7).mask_steps is None
    assert hierarchy.routine.context() == {"masks": None}
    batch = next(iter(hierarchy.training.loader))
    assert batch.cluster is not None and hierarchy.routine.prepare(batch).cluster is None


def test_without_a_hierarchy_all_clusters_are_there_from_the_start(images: Path) -> None:
    watched = Watched(images, f"{DIVIDED} --hierarchy-method none --mod-epoch-freeze 1", epochs=4)
    assert {(seen.count, len(seen.masks)) for seen in watched.steps} == {(4, 4)}
    assert torch.equal(watched.steps[0].masks, torch.ones(4, 8))
    assert watched.divided == watched.embedded == [0, 2]
    assert watched.rests() == [True, False, True, False]


def test_one_cluster_is_never_divided_and_never_rests(images: Path) -> None:
    flags = DIVIDED.replace("--nb-clusters 4", "--nb-clusters 1") + " --mod-epoch-freeze 2"
    watched = Watched(images, flags, epochs=4)
    assert watched.divided == [0] and watched.embedded == []
    assert watched.rests() == [False] * 4
    assert {seen.cluster for seen in watched.steps} == {0}  # the mask is used, and trains
    assert not torch.equal(watched.training.network.masks.weight, torch.ones(1, 8))


@pytest.mark.parametrize(
    ("flags", "divided", "rests"),
    [
        ("--mod-epoch-freeze 1", [0, 2, 4], [1, 0, 1, 0, 1, 0, 0]),
        ("--mod-epoch 3 --mod-epoch-freeze 2 --nb-clusters 2", [0, 3], [1, 1, 0, 1, 0, 0, 0]),
        (
            "--hierarchy-method none --mod-epoch 3 --mod-epoch-freeze 2",
            [0],
            [1, 1, 0, 0, 0, 0, 0],
        ),
        ("--hierarchy-method none", [0], [0] * 7),
    ],
)
def test_stop_recluster_ends_division_and_rest(
    flags: str, divided: list[int], rests: list[int], images: Path
) -> None:
    watched = Watched(images, f"{DIVIDED} --stop-recluster {flags}", epochs=7)
    assert watched.divided == divided
    assert watched.rests() == [bool(rest) for rest in rests]


def test_the_single_mask_can_wait_for_the_first_division(images: Path) -> None:
    watched = Watched(images, f"{DIVIDED} --masks-freeze-one-cluster 1", epochs=4)
    for seen in watched.steps:
        if seen.count == 1:
            assert torch.equal(seen.masks, torch.ones(1, 8))
    assert not torch.equal(watched.first_of(3).masks, torch.ones(2, 8))


def test_fixed_masks_share_the_dimensions_out_and_never_move(images: Path) -> None:
    watched = Watched(images, f"{DIVIDED} --fixed-mask 1", epochs=5)
    for seen in watched.steps:
        assert (seen.masks.sum(1) == 8 // seen.count).all() and (seen.masks.sum(0) == 1).all()
        assert all(
            torch.equal(m.nonzero().diff(dim=0).unique(), torch.tensor([1])) for m in seen.masks
        )
    assert {rates["masks"] for rates in watched.rates} == {0.0}
    groups = {group["name"]: group for group in watched.training.optimisers.groups}
    assert groups["masks"]["weight_decay"] == 0.0 < groups["head"]["weight_decay"]
    assert float(watched.training.objective.terms["masks"]) == 0.0


def test_fixed_masks_of_the_published_size() -> None:
    args = options.parse_train(["--nb-clusters", "32", "--fixed-mask", "1"])
    masks = methods.masks(args)
    while len(masks) < 32:
        masks.split()
    rows = masks.weight
    assert (rows.sum(1) == 16).all() and (rows.sum(0) == 1).all()
    assert all(
        torch.equal(row.nonzero().flatten(), torch.arange(16 * k, 16 * k + 16))
        for k, row in enumerate(rows)
    )


def test_clustering_can_use_the_embedding_instead_of_pooled_features(images: Path) -> None:
    training = tiny.prepare(images, DIVIDED)
    network = training.network.eval()
    shapes = {
        pooled: training.embed_training_images(pooled=pooled).shape for pooled in (True, False)
    }
    assert shapes == {True: (48, network.model.num_features), False: (48, 8)}
    asked = []
    for flag in (0, 1):
        flags = f"{DIVIDED} --hierarchy-method none --penultimate-for-clusters {flag}"
        training = tiny.prepare(images, flags)
        embed = training.embed_training_images
        training.embed_training_images = lambda *, pooled, embed=embed: (
            asked.append(pooled) or embed(pooled=pooled)
        )
        training.routines[-1].begin_epoch(training)
    assert asked == [False, True]


def test_the_seed_of_k_means_is_the_same_each_time_unless_one_is_drawn(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seeds(flags: str) -> list[int]:
        used = []
        kept = divide

        def noting(features, labels, count, seed, **more):
            used.append(seed)
            return kept(features, labels, count, seed, **more)

        monkeypatch.setattr("methods.divide.routine.divide", noting)
        Watched(images, f"{DIVIDED} {flags}", epochs=5)
        return used

    assert seeds("") == [1234, 1234]
    first = seeds("-crs 7")
    assert first == seeds("-crs 7") != seeds("-crs 8") and len(set(first)) == 2


def test_one_loader_serves_all_clusters(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {process.pid for process in multiprocessing.active_children()}
    workers = []
    step = Watched.step

    def counting(self: Watched, training: Training, batch: Batch) -> dict[str, torch.Tensor]:
        workers.append({process.pid for process in multiprocessing.active_children()} - before)
        return step(self, training, batch)

    monkeypatch.setattr(Watched, "step", counting)
    watched = Watched(images, f"{DIVIDED} --hierarchy-method none --workers 1", epochs=1)
    assert workers[0] and all(processes == workers[0] for processes in workers)
    assert {seen.cluster for seen in watched.steps} == {0, 1, 2, 3}


def test_cursors_of_classes_live_on_until_the_next_division(images: Path) -> None:
    training = tiny.prepare(images, f"{DIVIDED} --mod-epoch 3 --hierarchy-method none")
    samplers = []
    training.loader.set_sampler = lambda each, kept=training.loader.set_sampler: (
        samplers.append(each) or kept(each)
    )
    for _ in range(4):
        train.advance(training)
    assert samplers[0] is samplers[1] is samplers[2] is not samplers[3]


# --- masks after training -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("flags", "full", "relu"),
    [
        ("", "none", True),
        ("--masks-sum-for-full-emb 1", "sum", True),
        ("--masks-sum-for-full-emb 1 --mask-relu 0 --masking-init normal", "sum", False),
        ("--masks-sum-for-full-emb 1 --masks-normalize-before-sum l1", "l1", True),
    ],
)
def test_evaluation_restores_what_masks_do_at_test_time(
    flags: str, full: str, relu: bool, images: Path, tmp_path: Path
) -> None:
    flags = f"{DIVIDED} --hierarchy-method none --epochs 1 --mask-lr-mult 300 {flags}"
    folder = tiny.run(images, tmp_path, "run", flags)
    (best,) = folder.glob("*_best.pth")
    checkpoint = torch.load(best, weights_only=True)
    command = ["--resume", str(best), "--export", str(tmp_path / "e.npz"), "--amp", "off"]
    evaluate.run(options.parse_evaluate([*command, "--workers", "0"]))
    exported = np.load(tmp_path / "e.npz")["embeddings"]

    training = tiny.prepare(images, flags.replace("--epochs 1", "--epochs 1 --seed 9"))
    network = training.network
    network.load_state_dict(checkpoint["model_state_dict"])
    assert (network.masks.full, network.masks.relu) == (full, relu)
    network.masks.full = "none"
    (result,) = training.evaluate(training.data.test)
    masks = network.masks.weight.detach()
    masks = masks.relu() if relu else masks
    if full == "l1":
        masks = masks / masks.abs().sum(1, keepdim=True)
    factor = torch.ones(8) if full == "none" else masks.sum(0)
    expected = F.normalize(result.embeddings * factor)
    np.testing.assert_allclose(exported, expected, atol=1e-5)
    plain = F.normalize(result.embeddings).numpy()
    assert np.allclose(exported, plain, atol=1e-5) == (full == "none")


def test_training_evaluates_the_whole_embedding(images: Path) -> None:
    watched = Watched(images, f"{DIVIDED} --hierarchy-method none --mask-lr-mult 300", epochs=1)
    network = watched.training.network.eval()
    batch = next(iter(watched.training.loader)).images
    with torch.no_grad():
        whole, masked = network.embed(batch), network(batch, cluster=1).embedding
        network.masks = None
        assert torch.equal(whole, network.embed(batch)) and not torch.equal(whole, masked)


# --- guards ---------------------------------------------------------------------------------------


def sampler(labels: list[int], assignment: list[int], **more: object) -> ClusterSampler:
    return ClusterSampler(np.array(labels), np.array(assignment), **more)


def test_a_cluster_smaller_than_a_batch_still_gives_whole_batches() -> None:
    labels, assignment = [0] * 8 + [1] * 8 + [2, 2, 3, 3], [0] * 16 + [1] * 4
    for kind in ("balanced_old", "adaptbalanced", "randombatch", "npairs"):
        batches = list(sampler(labels, assignment, batch_size=8, instances=2, kind=kind))
        assert [batch.cluster for batch in batches] == [0, 1, 0, 1]
        for batch in batches:
            assert len(batch.index) == 8 and {assignment[i] for i in batch.index} == {batch.cluster}


def test_a_cluster_of_one_class_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    made = sampler([0, 0, 1, 1, 2, 2], [0, 0, 0, 0, 1, 1], batch_size=4, instances=2)
    assert made.skipped == (1,) and {batch.cluster for batch in made} == {0}
    assert "single class" in caplog.text
    with pytest.raises(InputError, match="no cluster holds images of two classes"):
        sampler([0, 0, 1, 1], [0, 0, 1, 1], batch_size=4, instances=2)


def test_unused_images_are_never_drawn() -> None:
    assignment = [0, 0, 0, 0, -1, 0, 0, -1]
    made = sampler([0, 0, 1, 1, 1, 2, 2, 2], assignment, batch_size=4, instances=2)
    for epoch in range(20):
        made.set_epoch(epoch)
        for batch in made:
            assert not {4, 7} & set(batch.index.tolist())


def test_pairs_of_the_npairs_sampler_are_mined_as_asked(images: Path) -> None:
    flags = "--loss TripletLoss --batch-sampler npairs --sampler distanceweighted"
    training = tiny.prepare(images, f"{DIVIDED} {flags}")
    miner = training.objective.parts["metric"].criterion.miner
    assert type(miner).__name__ == "DistanceWeightedMiner"
    train.advance(training)


def test_a_division_can_end_before_all_clusters_are_there(images: Path, tmp_path: Path) -> None:
    folder = tiny.run(images, tmp_path, "run", f"{DIVIDED} --epochs 3")
    (best,) = folder.glob("*_best.pth")
    masks = torch.load(best, weights_only=True)["model_state_dict"]["masks.weight"]
    assert len(masks) in (1, 2)  # fewer than --nb-clusters: the file says how many
    evaluate.run(options.parse_evaluate(["--resume", str(best), "--workers", "0"]))


def test_steps_alone_end_a_run_whose_epochs_change_their_length(images: Path) -> None:
    training = tiny.prepare(images, f"{DIVIDED} --steps 30")
    assert training.length.epochs == 8  # of four steps each while there is one cluster
    training.clock.epoch, training.clock.step = 8, 29
    assert not training.finished
    training.clock.step = 30
    assert training.finished


def test_the_first_checkpoints_do_not_say_that_an_epoch_has_begun(
    images: Path, tmp_path: Path
) -> None:
    """Divided anew in the middle of an epoch, a run would go on to other batches."""
    folder = tiny.run(images, tmp_path, "run", f"{DIVIDED} --epochs 3 --save-every 3 --keep 9")
    before = tiny.saved(folder)
    (*_, middle) = [
        file
        for file in sorted(folder.glob("step_*.pth"))
        if (clock := torch.load(file)["clock"])["epoch"] > 0 and clock["step_in_epoch"] > 0
    ]
    content = torch.load(middle)
    del content["clock"]["begun"]
    torch.save(content, middle)
    tiny.resume(middle, "")
    assert tiny.same(tiny.saved(folder)["model_state_dict"], before["model_state_dict"])
    assert tiny.saved(folder)["clock"]["step"] == before["clock"]["step"]
