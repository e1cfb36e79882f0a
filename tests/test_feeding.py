"""Samplers, transforms, loader, cache: the same batches whatever makes them, and right pixels."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import logging
import multiprocessing
import os
import resource
import secrets
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import start_python, wait_for
from PIL import Image
from programs import Program
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as tv

import dataset
from dataset import cache as cache_module
from dataset import shard_building
from dataset.augment import AUGMENTATIONS, Album, Redraw
from dataset.base import BadImageError, ImageSet, PathTable
from dataset.cache import Cache, open_cache
from dataset.cluster_sampler import ClusterSampler
from dataset.files import said_anew
from dataset.loader import Loader, eval_loader, train_loader
from dataset.pixel_store import PixelStore
from dataset.plans import Plan, Plans, Substitutes, ViewRule
from dataset.reading import FROM_FILES, Reading
from dataset.samplers import (
    BalancedSampler,
    IndexBatch,
    SequentialSampler,
    ShuffledSampler,
    make_sampler,
)
from dataset.sources import FromMemory
from dataset.transforms import (
    RandomCrop,
    Views,
    centre_views,
    cut,
    to_network,
    uniforms,
    with_short_side,
)
from dataset.waiting import waiting_on
from net import INPUTS
from utils import InputError, sentence_errors

CPU = torch.device("cpu")
FIXTURES = Path(__file__).parent / "fixtures"
ROOT = Path(__file__).resolve().parents[1]

# --- pictures -------------------------------------------------------------------------------------


def photograph(height: int, width: int, seed: int) -> np.ndarray:
    """Smooth colours with some grain, (height, width, 3) uint8."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.float64)
    return np.clip(smooth + rng.normal(0, 6, smooth.shape), 0, 255).astype(np.uint8)


SHAPES = [(75, 100), (100, 75), (64, 64), (90, 160), (70, 71)]


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> ImageSet:
    """30 JPEG files of 5 classes, in several shapes; a test that changes a file takes a copy."""
    return write_photographs(tmp_path_factory.mktemp("photographs"), 30)


def write_photographs(folder: Path, count: int, classes: int = 5) -> ImageSet:
    folder.mkdir(exist_ok=True)
    names = [f"{number:03d}.jpg" for number in range(count)]
    for number, name in enumerate(names):
        shape = SHAPES[number % len(SHAPES)]
        Image.fromarray(photograph(*shape, seed=number)).save(folder / name, quality=92)
    return ImageSet(
        name="own",
        split="train",
        labels=np.arange(count) % classes,
        class_names=tuple("abcdefgh"[:classes]),
        paths=PathTable(names, f"{folder}{os.sep}"),
    )


@pytest.fixture(scope="session")
def drawings() -> ImageSet:
    """40 pictures of 10 classes in memory, 64 pixels square."""
    pixels = np.stack([photograph(64, 64, seed) for seed in range(40)])
    paths = PathTable(f"drawing/{number}" for number in range(40))
    return ImageSet(
        "drawings", "train", np.repeat(np.arange(10), 4), tuple("abcdefghij"), paths, pixels=pixels
    )


SPEC = replace(INPUTS["imagenet"], size=48, resize=56)


def cached(folder: Path, size: int = 256) -> Reading:
    """A cache in a folder."""
    return Reading("cache", size, folder)


def loader_of(images: ImageSet, **changes) -> Loader:
    options = {
        "augment": "crop",
        "spec": SPEC,
        "device": CPU,
        "workers": 0,
        "seed": 5,
    }
    sampler = changes.pop("sampler", None) or make_sampler(images.labels, 8, seed=5)
    return train_loader(images, sampler, **{**options, **changes})


def epoch_of(loader: Loader, epoch: int = 0, skip: int = 0) -> list:
    loader.set_epoch(epoch)
    loader.skip(skip)
    return list(loader)


def assert_same_batches(some: list, others: list) -> None:
    assert len(some) == len(others)
    for one, other in zip(some, others, strict=True):
        assert torch.equal(one.index, other.index)
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.images, other.images)
        assert one.cluster == other.cluster


# --- random numbers -------------------------------------------------------------------------------


def test_uniforms_depend_on_each_argument_and_on_nothing_else():
    index = np.arange(50)
    first = uniforms(1, 2, index, 6, stream=0, visit=0)
    np.testing.assert_array_equal(first[[7, 3]], uniforms(1, 2, np.array([7, 3]), 6))
    np.testing.assert_array_equal(first[:, :4], uniforms(1, 2, index, 4))
    others = [
        uniforms(2, 2, index, 6),
        uniforms(1, 3, index, 6),
        uniforms(1, 2, index + 50, 6),
        uniforms(1, 2, index, 6, stream=1),
        uniforms(1, 2, index, 6, visit=np.ones(50, int)),
        uniforms(-1, 2, index, 6),
    ]
    for position, other in enumerate(others):
        assert not np.isin(first, other).any(), position


def test_uniforms_are_uniform_and_independent():
    u = uniforms(0, 0, np.arange(20000), 4)
    assert u.min() >= 0 and u.max() < 1
    for column in u.T:
        counts = np.histogram(column, 20, (0, 1))[0]
        # 20 cells of 1000: the χ² of 19 degrees of freedom exceeds 50 once in 10,000 times.
        assert ((counts - 1000) ** 2 / 1000).sum() < 50
    assert np.abs(np.corrcoef(u.T) - np.eye(4)).max() < 0.03
    assert abs(np.corrcoef(u[:-1, 0], u[1:, 0])[0, 1]) < 0.03


# --- views ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(375, 500), (500, 300), (60, 700)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (0.16, 1.0)])
def test_random_crops_are_distributed_as_torchvisions(shape, scale):
    torch.manual_seed(0)
    picture = torch.empty(3, *shape)
    ratio = (3 / 4, 4 / 3)
    theirs = np.array(
        [RandomResizedCrop.get_params(picture, list(scale), list(ratio)) for _ in range(1500)]
    )
    crop = RandomCrop(scale=scale)
    u = uniforms(0, 0, np.arange(6000), crop.draws)
    ours = crop.views(np.tile(shape, (6000, 1)), u, resize=0)
    for column, name in enumerate(("top", "left", "height", "width")):
        assert ks_2samp(theirs[:, column], ours.boxes[:, column]).pvalue > 1e-3, name
    assert abs(ours.flip.mean() - 0.5) < 0.03


def test_a_picture_too_narrow_for_any_crop_gives_the_largest_central_one():
    crop = RandomCrop(scale=(1.0, 1.0))
    shapes = np.array([[40, 400], [400, 40]])
    views = crop.views(shapes, np.full((2, crop.draws), 0.5), resize=0)
    assert views.boxes.tolist() == [[0, 173, 40, 53], [173, 0, 53, 40]]


def random_views(images: list[np.ndarray], crop: RandomCrop, seed: int = 0) -> Views:
    shapes = np.array([image.shape[:2] for image in images])
    return crop.views(shapes, uniforms(seed, 0, np.arange(len(images)), crop.draws), resize=56)


def torchvisions(image: np.ndarray, views: Views, position: int, size: int) -> np.ndarray:
    """What torchvision makes of a PIL image with the parameters of a view."""
    picture = Image.fromarray(image)
    how = InterpolationMode.BICUBIC if views.cubic else InterpolationMode.BILINEAR
    if views.resize:
        picture = tv.resize(picture, views.resize, how)
    box = views.boxes[position].tolist()
    picture = tv.resized_crop(picture, *box, [size, size], how)
    return np.asarray(tv.hflip(picture) if views.flip[position] else picture)


PICTURES = [photograph(*shape, seed) for seed, shape in enumerate(SHAPES * 4)]
CROPS = {
    "crop": RandomCrop(),
    "after resizing": RandomCrop(scale=(0.16, 1.0), resize=True),
    "mirrored": RandomCrop(flip=1.0),
}


@pytest.mark.parametrize("cubic", [False, True])
@pytest.mark.parametrize("name", CROPS)
def test_cut_agrees_with_torchvision(name, cubic):
    views = random_views(PICTURES, CROPS[name])._replace(cubic=cubic)
    ours = np.stack([cut(image, views, i, 48).numpy() for i, image in enumerate(PICTURES)])
    theirs = np.stack([torchvisions(image, views, i, 48) for i, image in enumerate(PICTURES)])
    difference = np.abs(ours.astype(int) - theirs)
    assert difference.max() <= (2 if cubic else 1) and difference.mean() < 0.1


def store_of(images: list[np.ndarray]) -> PixelStore:
    flat = torch.from_numpy(np.concatenate([image.reshape(-1, 3) for image in images]))
    return PixelStore(flat, np.array([image.shape[:2] for image in images]))


@pytest.mark.parametrize("name", ["crop", "mirrored"])
@pytest.mark.parametrize("size", [48, 96])
@pytest.mark.parametrize("cubic", [False, True])
def test_crops_of_a_whole_batch_agree_with_torchvision(name, size, cubic):
    views = random_views(PICTURES, CROPS[name])._replace(cubic=cubic)
    ours = store_of(PICTURES).cut(np.arange(len(PICTURES)), views, size)
    assert ours.dtype == torch.float32 and ours.shape == (len(PICTURES), 3, size, size)
    for position, image in enumerate(PICTURES):
        theirs = torchvisions(image, views, position, size)
        difference = np.abs(ours[position].permute(1, 2, 0).numpy() - theirs)
        assert difference.mean() < 0.5  # of 255: rounding alone
        assert difference.max() < 2.5


def test_crops_of_a_batch_in_any_order_and_of_one_shape():
    images = [photograph(64, 64, seed) for seed in range(6)]
    views = random_views(images, RandomCrop())
    order = np.array([4, 1, 1, 5])
    some = Views(0, views.boxes[order], views.flip[order])
    stacked = PixelStore.of_stack(np.stack(images), CPU)
    torch.testing.assert_close(
        stacked.cut(order, some, 40), store_of(images).cut(np.arange(6), views, 40)[order]
    )


def test_evaluation_views_of_a_batch_are_exact_without_resizing_and_close_with_it():
    resized = [
        np.asarray(tv.resize(Image.fromarray(image), 56, InterpolationMode.BILINEAR))
        for image in PICTURES
    ]
    index = np.arange(len(PICTURES))
    shapes = np.array([image.shape[:2] for image in resized])
    exact = store_of(resized).cut(index, centre_views(shapes, 56, 48), 48)
    assert exact.dtype == torch.uint8
    for position, image in enumerate(resized):
        expected = np.asarray(tv.center_crop(Image.fromarray(image), [48, 48]))
        np.testing.assert_array_equal(exact[position].permute(1, 2, 0), expected)
    shapes = np.array([image.shape[:2] for image in PICTURES])
    close = store_of(PICTURES).cut(index, centre_views(shapes, 56, 48), 48)
    assert (close - exact).abs().mean() < 0.5


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("bn_inception_224", "caffe"),
        ("resnet_224", "imagenet"),
        ("sec_bn_inception_227", "spherical"),
    ],
)
def test_evaluation_transform_fixture(name, spec):
    fixture = np.load(FIXTURES / "eval_transform_0.npz")
    image = np.asarray(Image.open(io.BytesIO(fixture["png"].tobytes())).convert("RGB"))
    spec = INPUTS[spec]
    views = centre_views(np.array([image.shape[:2]]), spec.resize, spec.size)
    pixels = cut(np.array(image), views, 0, spec.size).permute(2, 0, 1)[None]
    result = to_network(pixels, spec)[0].numpy()
    assert result.shape == tuple(fixture[f"{name}_shape"])
    np.testing.assert_allclose(result[:, ::9, ::9], fixture[f"{name}_strided9"], 1e-3, 1e-4)
    np.testing.assert_allclose(result.mean(axis=(1, 2)), fixture[f"{name}_mean"], 1e-3, 1e-4)


def test_a_loader_resizes_as_the_backbone_wants(photographs):
    spec = replace(SPEC, cubic=True)
    batches = [
        next(iter(eval_loader(photographs, spec=each, batch_size=4, device=CPU, workers=0)))
        for each in (spec, SPEC)
    ]
    assert not torch.equal(batches[0].images, batches[1].images)
    picture = tv.resize(Image.fromarray(photographs.read(0)), 56, InterpolationMode.BICUBIC)
    expected = torch.from_numpy(np.asarray(tv.center_crop(picture, [48, 48])).copy())
    expected = to_network(expected.permute(2, 0, 1)[None], spec)[0]
    torch.testing.assert_close(batches[0].images[0], expected)


# --- redrawing ------------------------------------------------------------------------------------

CALM = Redraw(
    scale=(1, 1), aspect=0, rotation=0, shift=0, bend=0, outline=0, mixing=0, grey=0,
    saturation=(1, 1), ink=0, tone=0, negative=0, erase=0,
)  # fmt: skip


def redrawn(redraw: Redraw, pixels: torch.Tensor, index: np.ndarray) -> torch.Tensor:
    return redraw(pixels, uniforms(3, 0, index, redraw.draws))


def test_redrawing_without_strength_changes_nothing(drawings):
    pixels = torch.from_numpy(drawings.pixels).permute(0, 3, 1, 2)
    same = redrawn(CALM, pixels, np.arange(40))
    torch.testing.assert_close(same, pixels.float(), atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("scale", (0.7, 0.8)), ("aspect", 0.3), ("rotation", 30.0), ("shift", 0.3), ("bend", 0.1),
        ("outline", 1.0), ("mixing", 0.3), ("grey", 1.0), ("saturation", (0.4, 0.5)), ("ink", 0.5),
        ("tone", 0.5), ("negative", 1.0), ("erase", 1.0),
    ],
)  # fmt: skip
def test_each_strength_of_redrawing_does_something(drawings, name, value):
    pixels = torch.from_numpy(drawings.pixels).permute(0, 3, 1, 2)
    changed = redrawn(replace(CALM, **{name: value}), pixels, np.arange(40))
    assert ((changed - pixels).abs().amax(dim=(1, 2, 3)) > 3).float().mean() > 0.9
    assert changed.min() >= -0.01 and changed.max() <= 255.01


def test_redrawing_leaves_white_white_but_for_erasing_and_negatives():
    white = torch.full((64, 3, 32, 32), 255, dtype=torch.uint8)
    redraw = replace(Redraw(), erase=0, negative=0)
    torch.testing.assert_close(redrawn(redraw, white, np.arange(64)), white.float())


def test_what_lies_outside_is_white():
    black = torch.zeros((8, 3, 32, 32), dtype=torch.uint8)
    small = redrawn(replace(CALM, scale=(0.5, 0.5)), black, np.arange(8))
    assert (small[:, :, :7] > 254).all() and (small[:, :, 9:23, 9:23] < 1).all()


def test_an_image_is_redrawn_alike_in_any_batch_and_never_mirrored(drawings):
    pixels = torch.from_numpy(drawings.pixels).permute(0, 3, 1, 2)
    together = redrawn(Redraw(), pixels, np.arange(40))
    some = np.array([31, 2, 17])
    alone = redrawn(Redraw(), pixels[some], some)
    torch.testing.assert_close(alone, together[some], atol=2e-3, rtol=0)
    gentle = redrawn(Redraw(outline=0, negative=0, erase=0), pixels, np.arange(40))
    ink = pixels.float().mean(1).flatten(1)
    ink = ink - ink.mean(1, keepdim=True)
    new = gentle.mean(1).flatten(1)
    mirrored = pixels.float().mean(1).flip(2).flatten(1)
    mirrored = mirrored - mirrored.mean(1, keepdim=True)
    upright = ((ink * new).sum(1) > (mirrored * new).sum(1)).float().mean()
    assert upright > 0.8


# --- samplers -------------------------------------------------------------------------------------

LABELS = np.repeat(np.arange(12), [3, 9, 9, 9, 9, 9, 9, 9, 9, 9, 1, 15])


def drawn(sampler, epoch: int = 0) -> list:
    sampler.set_epoch(epoch)
    batches = list(sampler)
    assert len(batches) == len(sampler)
    return batches


def test_shuffled_batches_cover_the_data_once():
    sampler = make_sampler(LABELS, 16, seed=3)
    first = drawn(sampler)
    index = np.concatenate([batch.index for batch in first])
    assert len(first) == len(LABELS) // 16 and len(set(index)) == len(index) == 96
    assert not any(batch.visit.any() for batch in first)
    again, later = drawn(make_sampler(LABELS, 16, seed=3)), drawn(sampler, 1)
    assert all((a.index == b.index).all() for a, b in zip(first, again, strict=True))
    assert any((a.index != b.index).any() for a, b in zip(first, later, strict=True))


def test_a_balanced_epoch_has_a_batch_however_few_the_images():
    (batch,) = drawn(BalancedSampler(np.repeat([0, 1], 3), 8, 4))
    assert np.bincount(batch.index // 3).tolist() == [4, 4]


@pytest.mark.parametrize(("seed", "entropy"), [(5, 5), (0, 0), (-1, 2**63 - 1), (2**63 + 3, 3)])
def test_a_seed_and_an_epoch_draw_the_same_batches_for_good(seed, entropy):
    """By numpy's generator alone: another machine or version must not train on other batches."""
    labels = np.random.default_rng(0).permutation(LABELS)
    whole, balanced = ShuffledSampler(100, 16, seed), BalancedSampler(labels, 12, 3, seed)
    for epoch in (0, 2):
        order = np.random.default_rng([entropy, epoch]).permutation(100)
        expected = order[:96].reshape(6, 16)
        assert np.array_equal([batch.index for batch in drawn(whole, epoch)], expected)
        rng = np.random.default_rng([entropy, epoch])
        for batch in drawn(balanced, epoch):
            for number, c in enumerate(rng.choice(12, 4, replace=False)):
                members = np.flatnonzero(labels == c)
                images = rng.choice(members, 3, replace=len(members) < 3)
                assert batch.index[3 * number :][:3].tolist() == images.tolist()
    given = ShuffledSampler(100, 16) if seed == 0 else ShuffledSampler(100, 16, seed)
    first = [batch.index for batch in given]  # epoch 0, where none was chosen
    assert np.array_equal(first, [batch.index for batch in drawn(whole, 0)])


@pytest.mark.parametrize("size", [1, 10])
def test_a_batch_may_be_of_one_image_or_of_all(size):
    index = [batch.index for batch in drawn(ShuffledSampler(10, size))]
    assert np.shape(index) == (10 // size, size) and len(np.unique(index)) == 10


def test_sequential_batches_give_every_image_in_order():
    index = [batch.index for batch in drawn(SequentialSampler(10, 4))]
    assert [each.tolist() for each in index] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize(("batch", "instances"), [(12, 3), (10, 5), (12, 2)])
def test_balanced_batches(batch, instances):
    batches = drawn(make_sampler(LABELS, batch, instances=instances, seed=1))
    assert len(batches) == 100 // batch
    for each in batches:
        groups = each.index.reshape(-1, instances)
        labels = LABELS[groups]
        assert (labels == labels[:, :1]).all(), "class by class, as N-pair losses need it"
        assert len(set(labels[:, 0])) == batch // instances
        for row, label in zip(groups, labels[:, 0], strict=True):
            if np.sum(label == LABELS) >= instances:
                assert len(set(row)) == instances


def test_balanced_batches_with_repetition_draw_each_image_from_all_of_its_class():
    """Of 25 images of a class three are all different with probability 24/25 · 23/25 = .883."""
    labels = np.repeat(np.arange(4), 25)
    batches = [
        batch.index.reshape(-1, 3)
        for epoch in range(60)
        for batch in drawn(make_sampler(labels, 12, instances=3, repeat=True, seed=1), epoch)
    ]
    rows = np.concatenate(batches)
    assert (labels[rows] == labels[rows[:, :1]]).all()
    assert all(len(set(labels[batch[:, 0]])) == 4 for batch in batches)
    distinct = np.mean([len(set(row)) == 3 for row in rows.tolist()])
    assert distinct == pytest.approx(24 / 25 * 23 / 25, abs=0.03)


def test_visits_count_earlier_draws_of_the_same_epoch():
    sampler = BalancedSampler(LABELS, 36, 3, seed=0)
    seen = dict.fromkeys(range(len(LABELS)), 0)
    for _ in range(2):
        for batch in drawn(sampler, 4):
            for index, visit in zip(batch.index.tolist(), batch.visit.tolist(), strict=True):
                assert visit == seen[index]
                seen[index] += 1
        assert max(seen.values()) > 2
        seen = dict.fromkeys(seen, 0)


def test_samplers_say_what_does_not_fit():
    with pytest.raises(InputError, match="--batch-size"):
        ShuffledSampler(10, 11)
    with pytest.raises(InputError, match="a --batch-size from 1 to 10"):
        ShuffledSampler(10, 0)
    with pytest.raises(InputError, match="multiple, such as --batch-size 12"):
        BalancedSampler(LABELS, 14, 3)
    with pytest.raises(InputError, match="20 classes, and the data have 12"):
        BalancedSampler(LABELS, 40, 2)


# 3 clusters with 40, 23 and 8 images and 10, 12 and 4 classes; 29 images in none.
_RNG = np.random.default_rng(7)
CLUSTERED = np.concatenate(
    [np.repeat(np.arange(10), 4), np.r_[np.arange(12), np.arange(11)], np.repeat(np.arange(4), 2)]
)
CLUSTERED = np.r_[CLUSTERED, _RNG.integers(0, 12, 29)]
CLUSTERS = np.repeat([0, 1, 2, -1], [40, 23, 8, 29])
KINDS = ("balanced_old", "adaptbalanced", "randombatch", "npairs")


def cluster_sampler(**changes) -> ClusterSampler:
    return ClusterSampler(CLUSTERED, CLUSTERS, 10, **{"instances": 2, "seed": 3, **changes})


@pytest.mark.parametrize("kind", KINDS)
def test_clusters_take_turns(kind):
    sampler = cluster_sampler(kind=kind)
    assert len(sampler) == 3 * (40 // 10)
    for epoch in range(3):
        batches = drawn(sampler, epoch)
        assert [batch.cluster for batch in batches] == [0, 1, 2] * 4
        for batch in batches:
            assert len(batch.index) == 10
            assert (CLUSTERS[batch.index] == batch.cluster).all()
            assert kind == "npairs" or len(set(CLUSTERED[batch.index])) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_cluster_batches_can_be_drawn_again_from_any_epoch(kind):
    once = cluster_sampler(kind=kind, first_epoch=2)
    whole = [drawn(once, epoch) for epoch in (2, 3, 4)]
    jumped = drawn(cluster_sampler(kind=kind, first_epoch=2), 4)
    repeated = drawn(once, 4)
    for a, b, c in zip(whole[2], jumped, repeated, strict=True):
        assert a.index.tolist() == b.index.tolist() == c.index.tolist()
    for a, b in zip(whole[1], drawn(once, 3), strict=True):  # an earlier one than the last
        assert a.index.tolist() == b.index.tolist()
    with pytest.raises(ValueError, match="for epoch 2 and later"):
        drawn(once, 1)
    other = drawn(cluster_sampler(kind=kind, first_epoch=2, seed=4), 4)
    assert any(a.index.tolist() != b.index.tolist() for a, b in zip(jumped, other, strict=True))


def test_a_negative_seed_of_clusters_is_one_too():
    for a, b in zip(*(drawn(cluster_sampler(seed=each)) for each in (-1, 2**63 - 1)), strict=True):
        assert a.index.tolist() == b.index.tolist()


@pytest.mark.parametrize("kind", ["balanced_old", "adaptbalanced"])
def test_cursors_use_all_images_of_a_class_before_any_again(kind):
    # One cluster of 5 classes with 4 images: each batch takes 2 of every class.
    labels = np.repeat(np.arange(5), 4)
    sampler = ClusterSampler(labels, np.zeros(20, int), 10, 2, kind=kind)
    pairs = set()
    for epoch in range(3):
        first, second = drawn(sampler, epoch)
        assert sorted([*first.index, *second.index]) == list(range(20))
        rows = np.sort(first.index.reshape(5, 2))
        pairs.add(tuple(rows[np.argsort(rows[:, 0])].flatten().tolist()))
    assert len(pairs) == 3, "each time in another order"
    assert (0, 1, 4, 5, 8, 9, 12, 13, 16, 17) not in pairs


@pytest.mark.parametrize("images", [12, 15])
def test_slices_of_a_permutation_share_no_image(images):
    """Those that do not fill a batch are left out."""
    sampler = ClusterSampler(np.arange(images), np.zeros(images, int), 4, 1, kind="randombatch")
    left_out = set()
    for epoch in range(6):
        batches = [batch.index for batch in drawn(sampler, epoch)]
        assert np.shape(batches) == (3, 4) and len(np.unique(batches)) == 12
        left_out |= set(range(images)).difference(np.ravel(batches))
    assert len(left_out) > 3 if images == 15 else not left_out


def test_slices_of_one_class_are_left_out():
    sampler = ClusterSampler(np.repeat([0, 1], 6), np.zeros(12, int), 2, 1, kind="randombatch")
    for epoch in range(6):
        assert all(batch.index.min() < 6 <= batch.index.max() for batch in drawn(sampler, epoch))


def test_an_order_of_images_lives_on_through_epochs():
    # 5 images per class and 2 of each in a batch: two batches share no image, the third cannot go
    # on in the order, so it is drawn at random; the fourth begins a new one. An epoch has two.
    labels = np.repeat(np.arange(2), 5)
    sampler = ClusterSampler(labels, np.zeros(10, int), 4, 2, kind="balanced_old", seed=1)
    batches = [set(batch.index) for epoch in range(15) for batch in drawn(sampler, epoch)]
    assert len(batches) == 30
    assert {len(batch) for batch in batches} == {4}, "different ones, if drawn at random too"
    shared = [len(one & other) for one, other in itertools.pairwise(batches)]
    assert not any(shared[0::3]) and any(shared[1::3]) and any(shared[2::3])


def small_classes(action: str):
    """One cluster: classes of 1, 2 and 13 images; a batch of 9 wants 3 of each."""
    labels = np.repeat(np.arange(3), [1, 2, 13])
    sampler = ClusterSampler(
        labels, np.zeros(16, int), 9, 1, kind="adaptbalanced", small_class_action=action
    )
    (batch,) = drawn(sampler)
    return batch.index, np.bincount(labels[batch.index], minlength=3)


def test_small_classes_filled_with_other_images():
    index, counts = small_classes("sample_other")
    assert len(set(index)) == len(index) == 9 and counts.tolist() == [1, 2, 6]


def test_small_classes_repeat_their_own():
    index, counts = small_classes("duplicate")
    assert counts.tolist() == [3, 3, 3] and len(set(index)) in (5, 6)


def test_small_classes_make_the_batch_smaller():
    index, counts = small_classes("smaller_batch")
    assert counts.tolist() == [1, 2, 3] and len(set(index)) == 6


@pytest.mark.parametrize("action", ["sample_other", "smaller_batch"])
@pytest.mark.parametrize(("size", "counts"), [(10, [3, 3, 4]), (14, [4, 5, 5])])
def test_few_classes_share_the_batch(size, counts, action, caplog):
    labels = np.repeat(np.arange(3), 20)
    sampler = ClusterSampler(labels, np.zeros(60, int), size, 2, small_class_action=action)
    for epoch in range(3):
        for batch in drawn(sampler, epoch):
            assert sorted(np.bincount(labels[batch.index]).tolist()) == counts
    assert not sampler.skipped and not caplog.text


def test_replicas_repeat_images_with_visits_of_their_own():
    batches = drawn(cluster_sampler(replicas=5, instances=1))
    assert {batch.cluster for batch in batches} == {0, 1, 2}
    for batch in batches:
        halves = batch.index.reshape(5, 2)
        assert (halves == halves[0]).all()
        if batch.cluster == 0:
            visits = batch.visit.reshape(5, 2)
            assert (np.diff(visits, axis=0) == 1).all()


def test_clusters_of_one_class_are_left_out_and_reported(caplog):
    clusters = np.array([0] * 8 + [1] * 4)
    labels = np.array([0, 1] * 4 + [2] * 4)
    sampler = ClusterSampler(labels, clusters, 4, 2)
    assert sampler.skipped == (1,) and "single class" in caplog.text
    assert {batch.cluster for batch in drawn(sampler)} == {0}
    with pytest.raises(InputError, match="fewer --nb-clusters"):
        ClusterSampler(np.zeros(4, int), np.zeros(4, int), 4, 2)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kind": "adaptbalance"}, "did you mean adaptbalanced"),
        ({"small_class_action": "duplicates"}, "did you mean duplicate"),
        ({"kind": "npairs", "replicas": 2}, "no effect"),
        ({"replicas": 3}, "multiple of --num-replicas"),
        ({"instances": 3}, "multiple, such as --batch-size 9"),
        ({"instances": 10}, "no room for a second class"),
        ({"kind": "npairs", "instances": 10}, "no room for a second class"),
        ({"kind": "randombatch", "replicas": 10}, "no room for a second class"),
    ],
)
def test_cluster_sampler_says_what_is_wrong(changes, words):
    with pytest.raises(InputError, match=words):
        cluster_sampler(**changes)


def test_kinds_that_do_not_divide_a_batch_by_class_take_any_number():
    for changes in ({"kind": "npairs", "instances": 3}, {"kind": "randombatch", "instances": 10}):
        assert len(drawn(cluster_sampler(**changes))[0].index) == 10


# --- the loader -----------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", ["crop", "sec", "emoji", "none"])
def test_the_same_batches_with_any_number_of_workers(photographs, augment):
    alone = loader_of(photographs, augment=augment)
    pair = loader_of(photographs, augment=augment, workers=2)
    for epoch in (0, 1):
        assert_same_batches(epoch_of(alone, epoch), epoch_of(pair, epoch))
    images = epoch_of(alone)[0].images
    assert images.shape == (8, 3, 48, 48) and images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("kind", ["photographs", "drawings"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_can_begin_in_its_middle(kind, workers, request):
    images = request.getfixturevalue(kind)
    whole = epoch_of(loader_of(images, workers=workers), 3)
    assert_same_batches(whole[2:], epoch_of(loader_of(images, workers=workers), 3, skip=2))
    loader = loader_of(images, workers=workers)
    loader.set_epoch(3)
    next(iter(loader))  # an iteration that is broken off leaves nothing behind
    assert_same_batches(whole, epoch_of(loader, 3))


@pytest.mark.parametrize("way", ["in turn", "workers", "threads", "memory"])
@pytest.mark.parametrize("instances", [0, 2])
def test_reading_ahead_changes_no_batch(way, instances, photographs, drawings, tmp_path):
    images = drawings if way == "memory" else photographs
    more = {"workers": 0 if way == "in turn" else 2}
    more |= {"reading": cached(tmp_path)} if way == "threads" else {}

    def sampler(seed: int = 5):
        return make_sampler(images.labels, 8, instances=instances, seed=seed)

    expected = [epoch_of(loader_of(images, sampler=sampler(), **more), epoch) for epoch in range(4)]
    loader = loader_of(images, sampler=sampler(), **more)
    loader.read_ahead(3)
    for epoch in (0, 1, 2, 1):  # beyond the last one, and back
        assert_same_batches(expected[epoch], epoch_of(loader, epoch))
    assert_same_batches(expected[3], epoch_of(loader, 3))
    loader.set_epoch(0)
    broken_off = iter(loader)
    first = [next(broken_off), next(broken_off)]
    assert_same_batches(expected[0], [*first, *epoch_of(loader, 0, skip=2)])  # goes on there
    assert_same_batches(expected[1][1:], epoch_of(loader, 1, skip=1))
    assert_same_batches(expected[2], epoch_of(loader, 2))
    assert_same_batches(expected[0], epoch_of(loader, 0))
    other = sampler(seed=6)
    loader.set_sampler(other)
    expected = epoch_of(loader_of(images, sampler=sampler(seed=6), **more), 1)
    assert_same_batches(expected, epoch_of(loader, 1))


@pytest.mark.parametrize("way", ["workers", "threads"])
def test_the_next_epoch_is_read_before_it_begins_and_none_beyond(
    way, photographs, tmp_path, monkeypatch
):
    told, noted = os.pipe()  # a byte for each image that somebody reads
    os.set_blocking(told, False)
    kind = Cache if way == "threads" else ImageSet
    read = kind.read

    def noting(self, index: int) -> np.ndarray:
        os.write(noted, b".")
        return read(self, index)

    more = {"reading": cached(tmp_path)} if way == "threads" else {}
    loader = loader_of(photographs, workers=2, **more)
    monkeypatch.setattr(kind, "read", noting)
    loader.read_ahead(2)
    seen = 0

    def reads(least: int) -> int:
        nonlocal seen
        end = time.monotonic() + 60
        while seen < least and time.monotonic() < end:
            with contextlib.suppress(BlockingIOError):
                seen += len(os.read(told, 10_000))
            time.sleep(0.01)
        return seen

    epoch_of(loader, 0)
    assert reads(48) == 48  # three batches of 8 an epoch
    assert len(epoch_of(loader, 1)) == 3
    time.sleep(0.2)
    with pytest.raises(BlockingIOError):
        os.read(told, 1)
    os.close(told)
    os.close(noted)


def test_epochs_differ_and_an_image_drawn_twice_is_cut_twice(photographs):
    two = epoch_of(loader_of(photographs), 0), epoch_of(loader_of(photographs), 1)
    views = [
        {i: x for b in e for i, x in zip(b.index.tolist(), b.images, strict=True)} for e in two
    ]
    shared = views[0].keys() & views[1].keys()
    assert shared and not any(torch.equal(views[0][i], views[1][i]) for i in shared)
    sampler = BalancedSampler(np.array([0, 0, 1, 1]), 8, 4)
    batch = epoch_of(loader_of(photographs.subset(np.array([0, 5, 1, 6])), sampler=sampler))[0]
    assert len(set(batch.index.tolist())) < len(batch.index)
    assert len(batch.images.flatten(1).unique(dim=0)) == 8


def test_a_new_sampler_and_the_clusters_reach_the_batches(photographs):
    loader = loader_of(photographs, workers=2)
    list(loader)
    clusters = np.arange(30) % 2
    loader.set_sampler(ClusterSampler(photographs.labels, clusters, 4, 2, seed=2))
    batches = epoch_of(loader)
    assert len(batches) == len(loader) == 6
    assert [batch.cluster for batch in batches] == [0, 1] * 3
    for batch in batches:
        assert (clusters[batch.index] == batch.cluster).all()
        assert batch.labels.tolist() == photographs.labels[batch.index].tolist()


@pytest.mark.parametrize("workers", [0, 1])
def test_reading_leaves_torchs_random_state_alone(photographs, workers):
    torch.manual_seed(11)
    expected = torch.rand(3)
    torch.manual_seed(11)
    list(loader_of(photographs, workers=workers))
    assert torch.equal(torch.rand(3), expected)


def test_evaluation_gives_every_image_in_order(photographs, drawings):
    for images, spec in ((photographs, SPEC), (drawings, replace(INPUTS["white"], size=64))):
        batches = list(eval_loader(images, spec=spec, batch_size=7, device=CPU, workers=0))
        index = torch.cat([batch.index for batch in batches])
        assert index.tolist() == list(range(len(images)))
    whole = torch.cat([batch.images for batch in batches])
    expected = (torch.from_numpy(drawings.pixels).permute(0, 3, 1, 2) / 255 - 1) / 0.35
    torch.testing.assert_close(whole, expected, atol=1e-5, rtol=0)


def test_evaluation_of_files_is_resize_and_centre_crop(photographs):
    loader = eval_loader(photographs, spec=INPUTS["caffe"], batch_size=9, device=CPU, workers=0,
                         image_size=32)  # fmt: skip
    ours = torch.cat([batch.images for batch in loader])
    for index in range(0, 30, 4):
        picture = Image.open(photographs.paths[index])
        short = round(32 * 256 / 224)
        picture = tv.center_crop(tv.resize(picture, short, InterpolationMode.BILINEAR), [32, 32])
        bgr = np.asarray(picture)[:, :, ::-1].astype(np.float32) - (104, 117, 128)
        assert np.abs(ours[index].permute(1, 2, 0).numpy() - bgr).max() <= 1


def test_pictures_in_memory_are_resized_to_the_size_asked_for(drawings):
    loader = eval_loader(drawings, spec=SPEC, batch_size=40, device=CPU, workers=0, image_size=32)
    (batch,) = loader
    assert batch.images.shape[2:] == (32, 32)
    picture = Image.fromarray(drawings.pixels[3]).resize((32, 32), Image.Resampling.BILINEAR)
    expected = tv.normalize(tv.to_tensor(picture), SPEC.mean, SPEC.std)
    assert (batch.images[3] - expected).abs().mean() < 0.02


def test_waiting_is_measured_afresh_each_epoch(photographs):
    loader = loader_of(photographs)
    iterator = iter(loader)
    next(iterator)
    first = loader.wait_seconds()
    time.sleep(0.05)
    next(iterator)
    assert 0 < first < loader.wait_seconds() < 10
    waited = loader.wait_seconds()
    iter(loader)
    assert loader.wait_seconds() == 0 < waited


class Card:
    """A GPU's clock, in the place of torch.cuda's events: it is where its work ends."""

    def __init__(self) -> None:
        self.now = self.done = 0.0

    def computes(self, seconds: float) -> None:
        self.done = max(self.now, self.done) + seconds

    def event(self, enable_timing: bool) -> SimpleNamespace:
        event = SimpleNamespace()

        def record(stream: object) -> None:
            event.at = max(self.now, self.done)

        def synchronize() -> None:
            self.now = max(self.now, event.at)

        def elapsed_time(other: SimpleNamespace) -> float:
            assert enable_timing and self.now >= other.at, "an event that is still to come is read"
            return 1e3 * (other.at - event.at)

        event.query = lambda: self.now >= event.at
        event.record, event.synchronize, event.elapsed_time = record, synchronize, elapsed_time
        return event


def test_a_gpu_waits_for_data_only_when_it_has_nothing_to_do(monkeypatch):
    card = Card()
    monkeypatch.setattr(torch.cuda, "Event", card.event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    waiting = waiting_on(torch.device("cuda"))
    for work in (3.0, 0.5, 0.0):  # of the step before; the host needs 1 s for each batch
        card.computes(work)
        waiting.asked()
        card.now += 1.0
        waiting.given()
    # The batches are there after 1, 2 and 3 s; the work before them lasts until 3.0, 3.5 and 3.5.
    assert waiting.seconds() == 0.0
    card.computes(0.25)
    waiting.asked()
    card.now += 1.0
    waiting.given()
    assert waiting.seconds() == 0.75


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"augment": "corp"}, "did you mean crop"),
        ({"reading": Reading(data_device="cuda")}, "needs a GPU"),
    ],
)
def test_the_loader_says_what_is_wrong(photographs, changes, words):
    with pytest.raises(InputError, match=words):
        loader_of(photographs, **changes)


@pytest.mark.parametrize(
    ("words", "answer"),
    [({"decode": "exakt"}, "did you mean exact"), ({"data_device": "gpu"}, "choose cpu or cuda")],
)
def test_there_is_no_other_way_of_reading(words, answer):
    with pytest.raises(InputError, match=answer):
        Reading(**words)


# --- images that cannot be read -------------------------------------------------------------------


@pytest.fixture()
def damaged(tmp_path) -> ImageSet:
    """30 photographs, two of which are no pictures any more."""
    images = write_photographs(tmp_path / "damaged", 30)
    Path(images.paths[3]).write_bytes(Path(images.paths[3]).read_bytes()[:300])
    Path(images.paths[14]).unlink()
    return images


@pytest.mark.parametrize("decode", ["exact", "cache"])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_image_is_named_once_and_replaced_by_its_class(
    damaged, tmp_path, caplog, decode, workers
):
    loader = loader_of(
        damaged,
        sampler=SequentialSampler(30, 10),
        workers=workers,
        max_bad_images=0.1,
        reading=Reading(decode, cache_dir=tmp_path / "cache"),
    )
    for epoch in (0, 1):
        batches = epoch_of(loader, epoch)
        assert torch.cat([batch.index for batch in batches]).tolist() == list(range(30))
        labels = torch.cat([batch.labels for batch in batches])
        assert labels.tolist() == damaged.labels.tolist()
        assert batches[0].images[3].std() > 0.1
    assert sorted(loader.bad_images) == [3, 14]
    for name in ("003.jpg", "014.jpg"):
        named = [r for r in caplog.records if name in r.message and "cannot be read" in r.message]
        assert len(named) == 1, name


def test_too_many_bad_images_stop_the_run_with_the_list(damaged):
    loader = loader_of(damaged, sampler=SequentialSampler(30, 30), max_bad_images=0.05)
    with pytest.raises(InputError, match=r"2 of the 30 training images.*003.jpg.*014.jpg"):
        list(loader)


def test_a_bad_image_stops_an_evaluation(damaged):
    loader = eval_loader(damaged, spec=SPEC, batch_size=10, device=CPU, workers=0)
    with pytest.raises(
        InputError, match=r"003.jpg cannot be read .* evaluation leaves no image out"
    ):
        list(loader)


@pytest.mark.parametrize("decode", ["exact", "cache"])
@pytest.mark.parametrize("workers", [0, 2])
def test_an_evaluation_that_admits_bad_images_names_them(
    damaged, tmp_path, caplog, decode, workers
):
    def evaluation(share: float) -> Loader:
        return eval_loader(
            damaged,
            spec=SPEC,
            batch_size=10,
            device=CPU,
            workers=workers,
            max_bad_images=share,
            reading=Reading(decode, cache_dir=tmp_path / "cache"),
        )

    loader = evaluation(0.1)
    batches = list(loader)
    assert torch.cat([batch.index for batch in batches]).tolist() == list(range(30))
    assert sorted(loader.bad_images) == [3, 14] and "Truncated" in loader.bad_images[3]
    assert "it is left out" in caplog.text and "take its place" not in caplog.text
    with pytest.raises(InputError, match=r"2 of the 30 evaluation images .*cannot be read"):
        list(evaluation(0.05))


def test_a_class_without_a_readable_image_stops_the_run(damaged):
    alone = replace(damaged, labels=np.r_[0, 1, 2, 5, np.arange(26) % 3])
    loader = loader_of(alone, sampler=SequentialSampler(30, 10), max_bad_images=0.5)
    with pytest.raises(InputError, match=r"003.jpg cannot be read .* no other image of its class"):
        list(loader)


def test_bad_images_are_replaced_in_memory_too(damaged, tmp_path):
    kept = open_cache(damaged, 56, tmp_path)
    rule = ViewRule(RandomCrop(), 48, 56, seed=0)
    source = FromMemory(damaged, kept.on_device(CPU), rule, Substitutes(damaged.labels, 0, True))
    (views,) = source(Plans(SequentialSampler(30, 30)))
    assert [bad.index for bad in views.bad] == [3, 14] and all(bad.replaced for bad in views.bad)
    assert views.pixels.shape == (30, 3, 48, 48)
    assert (views.pixels.float().std(dim=(1, 2, 3)) > 1).all()


# --- the cache ------------------------------------------------------------------------------------


@pytest.fixture()
def small_shards(monkeypatch):
    monkeypatch.setattr(shard_building, "SHARD", 4)


def evaluation_pixels(images: ImageSet, reading: Reading = FROM_FILES) -> torch.Tensor:
    loader = eval_loader(images, spec=SPEC, batch_size=8, device=CPU, workers=0, reading=reading)
    return torch.cat([batch.images for batch in loader])


def test_evaluation_from_the_cache_is_that_of_the_files_bit_for_bit(photographs, tmp_path):
    exact = evaluation_pixels(photographs)
    assert torch.equal(evaluation_pixels(photographs, cached(tmp_path, 56)), exact)
    store = open_cache(photographs, 56, tmp_path).on_device(CPU)
    views = centre_views(store.shapes, 56, 48)
    assert torch.equal(to_network(store.cut(np.arange(30), views, 48), SPEC), exact)


def test_the_cached_crops_of_sec_are_those_of_the_files(photographs, tmp_path):
    assert_same_batches(
        epoch_of(loader_of(photographs, augment="sec")),
        epoch_of(loader_of(photographs, augment="sec", workers=2, reading=cached(tmp_path, 56))),
    )


def test_crops_from_the_cache_are_announced(photographs, tmp_path, caplog):
    with said_anew():  # else once for a process
        loader_of(photographs, reading=cached(tmp_path, 61))
        evaluation_pixels(photographs, cached(tmp_path, 61))
    assert "training crops come from the cache's images" in caplog.text
    assert "--cache-size 56 gives the same as --decode exact" in caplog.text


def test_an_announcement_that_is_kept_back_is_made_later(photographs, tmp_path, caplog):
    with said_anew():
        with caplog.at_level(logging.ERROR, logger="dataset.views"):
            loader_of(photographs, reading=cached(tmp_path, 61))
            assert "training crops" not in caplog.text
        for _ in range(2):
            loader_of(photographs, reading=cached(tmp_path, 61))
        assert caplog.text.count("training crops") == 1


def files_of(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.rglob("*.pixels")}


@pytest.fixture()
def decoded(monkeypatch) -> list[str]:
    """The names of the files that are decoded from now on, in this process."""
    names: list[str] = []
    read = ImageSet.read

    def noting(self: ImageSet, index: int) -> np.ndarray:
        names.append(Path(self.paths[index]).name)
        return read(self, index)

    monkeypatch.setattr(ImageSet, "read", noting)
    monkeypatch.setattr(shard_building, "item_loader", lambda builder, _: builder_items(builder))
    return names


def builder_items(builder) -> Iterator:
    return (builder[position] for position in range(len(builder)))


def assert_as_the_files(kept: Cache, images: ImageSet) -> None:
    assert len(kept) == len(images)
    for index in range(len(images)):
        fresh = with_short_side(images.read(index), kept.size)
        np.testing.assert_array_equal(kept.read(index), fresh)


def test_only_new_and_changed_files_are_decoded(tmp_path, small_shards, decoded):
    images = write_photographs(tmp_path / "images", 14)
    open_cache(images, 56, tmp_path / "cache")
    before = files_of(tmp_path / "cache")
    assert len(before) == 4 and len(decoded) == 14
    Image.fromarray(photograph(80, 80, 99)).save(images.paths[5], quality=92)  # replaced
    write_photographs(tmp_path / "more", 15)
    (tmp_path / "more" / "014.jpg").rename(tmp_path / "images" / "007b.jpg")  # added
    Path(images.paths[2]).unlink()
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    paths = PathTable(names, f"{tmp_path / 'images'}/")
    now = ImageSet("own", "train", np.zeros(14, np.int64), ("a",), paths)
    decoded.clear()
    kept = open_cache(now, 56, tmp_path / "cache")
    assert decoded == ["005.jpg", "007b.jpg"]
    after = files_of(tmp_path / "cache")
    assert sum(name in after for name in before) >= 3, "a shard in use was written again"
    assert_as_the_files(kept, now)
    decoded.clear()
    for part in (now, now.subset([13, 2, 2, 0]), replace(now, split="eval")):
        open_cache(part, 56, tmp_path / "cache")
    assert decoded == []  # lists of the same files share what is kept
    open_cache(now.subset([2, 2, 0]), 56, tmp_path / "twice")
    assert sorted(decoded) == sorted(Path(now.paths[index]).name for index in (0, 2))
    smaller = open_cache(now, 40, tmp_path / "cache")
    assert min(smaller.read(0).shape[:2]) == 40 and min(kept.read(0).shape[:2]) == 56


def test_what_is_out_of_date_leaves_the_cache(tmp_path, small_shards, photographs):
    images = write_photographs(tmp_path / "images", 14)
    for _ in range(5):
        for path in images.paths:
            os.utime(path, ns=(0, os.stat(path).st_mtime_ns + 1))  # noqa: PTH116
        kept = open_cache(images, 56, tmp_path / "cache")
    assert len(files_of(tmp_path / "cache")) == 4
    (shard,) = {path.parent for path in (tmp_path / "cache").rglob("*.npz")}
    (shard / "killed.pixels").write_bytes(b"half")
    for index in {*range(14)} - {0, 4, 8}:  # one of each shard stays: they are packed into others
        os.utime(images.paths[index], (1, 1))
    assert_as_the_files(open_cache(images, 56, tmp_path / "cache"), images)
    listed = [np.load(path)["versions"] for path in shard.glob("*.npz")]
    assert sorted(map(len, listed)) == [2, 4, 4, 4]
    assert len(set(np.concatenate(listed).tolist())) == 14
    assert len(files_of(tmp_path / "cache")) == 4
    for number in range(1, 12):  # one photograph a day
        kept = open_cache(photographs.subset(np.arange(number)), 56, tmp_path / "daily")
    assert len(files_of(tmp_path / "daily")) <= 6
    assert_as_the_files(kept, photographs.subset(np.arange(11)))


def test_a_run_goes_on_while_another_changes_its_cache(tmp_path, small_shards, monkeypatch):
    images = write_photographs(tmp_path / "images", 14)
    mapped = open_cache(images, 56, tmp_path / "cache")
    monkeypatch.setattr(cache_module, "MAPPED", 1)
    kept = open_cache(images, 56, tmp_path / "cache")
    expected = [kept.read(index).copy() for index in range(14)]
    for path in images.paths:
        os.utime(path, (1, 1))
    open_cache(images, 56, tmp_path / "cache")
    for index in (0, 9, 13, 4):
        np.testing.assert_array_equal(kept.read(index), expected[index])
    flat = np.concatenate([image.reshape(-1, 3) for image in expected])
    assert torch.equal(kept.on_device(CPU).pixels, torch.from_numpy(flat))
    Image.new("RGB", (300, 56)).save(images.paths[0])
    with pytest.raises(InputError, match=r"changed while it was cached"):
        kept.on_device(CPU)
    for path in images.paths:
        Path(path).unlink()
    for index in (0, 9, 13, 4):  # its shards were open when they were removed
        np.testing.assert_array_equal(mapped.read(index), expected[index])


@pytest.mark.parametrize(
    ("of", "name", "number", "words"),
    [
        (Path, "open", errno.EIO, "cannot be read"),
        (np, "memmap", errno.EMFILE, "may not open more files"),
        (np, "memmap", errno.ENOMEM, "memory is full"),
    ],
)
def test_a_cache_that_cannot_be_read_just_now_stays(
    tmp_path, small_shards, monkeypatch, capsys, of, name, number, words
):
    """Neither a limit on open files nor a disk that fails says that a shard is damaged."""
    images = write_photographs(tmp_path / "images", 6)
    open_cache(images, 56, tmp_path / "made")
    shutil.copytree(tmp_path / "made", tmp_path / "cache")  # which nobody has looked at
    before = files_of(tmp_path / "cache")
    usual = getattr(of, name)

    def failing(path, *more, **how):
        if path.suffix in (".npz", ".pixels"):
            raise OSError(number, os.strerror(number))
        return usual(path, *more, **how)

    monkeypatch.setattr(of, name, failing)
    with pytest.raises(SystemExit), sentence_errors():
        open_cache(images, 56, tmp_path / "cache")
    assert words in " ".join(capsys.readouterr().err.split())
    monkeypatch.undo()
    assert files_of(tmp_path / "cache") == before


def test_a_file_that_changes_while_it_is_cached_is_named(tmp_path, monkeypatch):
    images, read = write_photographs(tmp_path / "images", 4), ImageSet.read

    def changing(self: ImageSet, index: int) -> np.ndarray:
        os.utime(self.paths[2])
        return read(self, index)

    monkeypatch.setattr(ImageSet, "read", changing)
    monkeypatch.setattr(shard_building, "item_loader", lambda builder, _: builder_items(builder))
    with pytest.raises(InputError, match=r"002\.jpg changed while it was cached"):
        open_cache(images, 56, tmp_path / "cache")


def test_how_much_a_cache_takes_is_known_from_some_headers(tmp_path):
    images = write_photographs(tmp_path / "images", 8)
    kept = open_cache(images, 56, tmp_path / "cache").shapes.prod(axis=1) * 3
    assert shard_building.bytes_of_one(images, 56) == pytest.approx(kept.mean(), rel=0.02)
    few = shard_building.bytes_of_one(images, 56, sample=2)
    assert few == pytest.approx(kept[[0, 7]].mean(), rel=0.02)


@pytest.mark.parametrize(
    ("from_inside", "from_above"),
    [
        ("folder:.", "folder:photos"),
        ("folder:../photos", "folder:photos"),
        ("csv:all.csv", "csv:photos/all.csv"),
        ("csv:absolute.csv", "csv:photos/absolute.csv"),
    ],
)
def test_what_is_kept_is_found_however_the_folder_is_called(
    from_inside, from_above, tmp_path, monkeypatch
):
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in "abcd":
        write_photographs(folder / name, 2)
    paths = [path.relative_to(folder) for path in sorted(folder.rglob("*.jpg"))]
    for table, start in (("all", ""), ("absolute", f"{folder}/")):
        rows = [f"{start}{path},{path.parent}" for path in paths]
        (folder / f"{table}.csv").write_text("\n".join(["path,label", *rows]))
    monkeypatch.chdir(folder)
    kept = open_cache(dataset.load(from_inside), 56, tmp_path / "cache")
    expected = kept.read(0).copy()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ImageSet, "read", None)  # nothing is decoded a second time
    again = open_cache(dataset.load(from_above), 56, tmp_path / "cache")
    np.testing.assert_array_equal(again.read(0), expected)


@pytest.mark.parametrize("names", ["ab", "ba"])  # of the shards, which are found in their order
@pytest.mark.parametrize("failing", [range(30), [3]])
def test_what_can_be_read_again_is_kept_although_its_file_is_the_same(
    failing, names, photographs, tmp_path, monkeypatch
):
    left, read, token = iter(names), ImageSet.read, secrets.token_hex
    monkeypatch.setattr(secrets, "token_hex", lambda n: next(left) if n == 8 else token(n))
    monkeypatch.setattr(shard_building, "item_loader", lambda builder, _: builder_items(builder))

    def gone(self: ImageSet, index: int) -> np.ndarray:
        if index in failing:
            raise BadImageError(self.paths[index], "Stale file handle")
        return read(self, index)

    monkeypatch.setattr(shard_building, "SHARD", 32)
    with monkeypatch.context() as patch:
        patch.setattr(ImageSet, "read", gone)
        shapes = open_cache(photographs, 56, tmp_path).shapes
        assert np.flatnonzero(shapes[:, 0] == 0).tolist() == list(failing)
    for _ in range(2):  # nothing is made anew the second time
        kept = open_cache(photographs, 56, tmp_path)
        assert kept.shapes.all()
        assert_as_the_files(kept, photographs)
    assert len(files_of(tmp_path)) == 1 + (failing == [3])


def test_a_damaged_shard_is_noticed_and_rebuilt(photographs, tmp_path, small_shards, caplog):
    expected = [
        image.copy() for image in map(open_cache(photographs, 56, tmp_path).read, range(30))
    ]
    path, cut_short, *_ = sorted(tmp_path.rglob("*.pixels"))
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    cut_short.write_bytes(cut_short.read_bytes()[:-1])
    kept = open_cache(photographs, 56, tmp_path)
    for damaged in (path, cut_short):
        assert f"{damaged.name} is damaged" in caplog.text and not damaged.exists()
    for index, image in enumerate(expected):
        np.testing.assert_array_equal(kept.read(index), image)


def test_damage_does_not_pass_into_a_new_shard(photographs, tmp_path, caplog):
    others = photographs.subset(np.arange(20, 30))
    other = multiprocessing.get_context("fork").Process(
        target=open_cache, args=(others, 56, tmp_path)
    )
    other.start()  # another one, which has seen its shard whole
    other.join()
    (path,) = tmp_path.rglob("*.pixels")
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content)
    open_cache(photographs.subset(np.arange(20)), 56, tmp_path)  # packs what there is with its own
    assert "is damaged" in caplog.text
    assert_as_the_files(open_cache(others, 56, tmp_path), others)


def test_a_large_cache_opens_few_files(photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(shard_building, "SHARD", 1)
    monkeypatch.setattr(cache_module, "MAPPED", 5)
    expected = [with_short_side(photographs.read(index), 56) for index in range(30)]
    open_cache(photographs, 56, tmp_path)
    assert len(list(tmp_path.rglob("*.pixels"))) == 30
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir("/proc/self/fd")}  # noqa: PTH208
    free = [number for number in range(len(taken) + 16) if number not in taken]
    resource.setrlimit(resource.RLIMIT_NOFILE, (free[15] + 1, limit[1]))
    try:
        kept = open_cache(photographs, 56, tmp_path)
        for index in [*range(30), 3, 29, 0, 3]:
            assert np.array_equal(kept.read(index), expected[index])
        store = kept.on_device(CPU)
        with contextlib.ExitStack() as files, pytest.raises(OSError, match="Too many open files"):
            for path in tmp_path.rglob("*.pixels"):  # as many as the cache has shards
                files.enter_context(path.open("rb"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    flat = torch.from_numpy(np.concatenate([image.reshape(-1, 3) for image in expected]))
    assert torch.equal(store.pixels, flat)


def test_the_cache_folder_needs_a_home_or_a_name(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr("machine.home", lambda: None)
    monkeypatch.setattr("dataset.kept.home", lambda: None)
    with pytest.raises(InputError, match=r"no home folder.*--cache-dir"):
        cache_module.default_folder()


SLOW_BUILD = """
import sys, time
import numpy as np
from dataset import cache, shard_building
from dataset.augment import AUGMENTATIONS, Album, Redraw
from dataset.base import ImageSet, PathTable
folder, count, out = sys.argv[1], int(sys.argv[2]), sys.argv[3]
shard_building.SHARD = 4
read = ImageSet.read
def slowly(self, index):
    time.sleep(float(sys.argv[4]))
    return read(self, index)
ImageSet.read = slowly
names = [f"{number:03d}.jpg" for number in range(count)]
paths = PathTable(names, folder + "/")
images = ImageSet("own", "train", np.arange(count) % 5, tuple("abcde"), paths)
from pathlib import Path
kept = cache.open_cache(images, 56, Path(out))
print(sum(int(kept.read(index).astype(int).sum()) for index in range(count)))
"""


def slow_build(images: ImageSet, out: Path, seconds: float) -> Program | subprocess.Popen[str]:
    folder = Path(images.paths[0]).parent
    script = out.with_name("slow_build.py")
    script.write_text(SLOW_BUILD)
    return start_python(script, folder, len(images), out, seconds)


def test_where_files_cannot_be_locked_a_cache_is_made_and_says_so(
    photographs, tmp_path, no_locks, caplog
):
    assert len(open_cache(photographs, 56, tmp_path)) == len(photographs)
    assert "nothing keeps other processes out of" in caplog.text
    assert "another run" not in caplog.text


def test_a_killed_build_goes_on_where_it_stopped(tmp_path, small_shards):
    images = write_photographs(tmp_path / "images", 40)
    out = tmp_path / "cache"
    build = slow_build(images, out, 0.05)
    wait_for(lambda: len(list(out.rglob("*.npz"))) >= 2)
    build.send_signal(signal.SIGKILL)
    build.communicate()
    done = files_of(out)
    listed = {path.stem for path in out.rglob("*.npz")}
    assert 2 <= len(listed) < 10
    kept = open_cache(images, 56, out)  # the lock of a killed process holds nobody up
    after = files_of(out)
    assert len(after) == 10
    assert all(after[f"{stem}.pixels"] == done[f"{stem}.pixels"] for stem in listed)
    for index in (0, 17, 39):
        fresh = with_short_side(images.read(index), 56)
        np.testing.assert_array_equal(kept.read(index), fresh)


def test_two_runs_at_once_make_one_cache(tmp_path, small_shards):
    images = write_photographs(tmp_path / "images", 24)
    runs = [slow_build(images, tmp_path / "cache", 0.02) for _ in range(2)]
    sums = [run.communicate(timeout=120)[0].strip() for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    kept = open_cache(images, 56, tmp_path / "cache")
    assert sums == [str(sum(int(kept.read(i).astype(int).sum()) for i in range(24)))] * 2
    assert not list((tmp_path / "cache").rglob("*.tmp"))


def test_a_folder_that_cannot_be_written_is_an_input_error(photographs, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(InputError, match="--cache-dir"):
        open_cache(photographs, 56, tmp_path / "file")


def test_a_cache_too_large_for_the_gpu_is_an_input_error(photographs, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 30, 8 << 30))
    # What an evaluation has given back is torch's still, and free for the next one.
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 6 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 4 << 30)
    cuda = torch.device("cuda")
    cache_module.check_room(3 << 30, cuda, photographs)
    with pytest.raises(InputError, match=r"4.0 GiB and the GPU has 3.0 of 8.0 GiB free"):
        cache_module.check_room(4 << 30, cuda, photographs)


# --- albums ---------------------------------------------------------------------------------------


def through_album(album: Album, pixels: torch.Tensor, index: np.ndarray) -> torch.Tensor:
    return album(pixels, uniforms(3, 0, index, album.draws))


def test_an_album_with_nothing_in_it_changes_nothing():
    pixels = torch.from_numpy(np.stack([photograph(32, 32, seed) for seed in range(6)]))
    pixels = pixels.permute(0, 3, 1, 2)
    assert torch.allclose(through_album(Album(), pixels, np.arange(6)), pixels.float(), atol=1e-3)


@pytest.mark.parametrize("name", ["Geom", "GeomColor", "ColorHeavy"])
def test_an_album_changes_each_image_alone(name):
    pixels = torch.from_numpy(np.stack([photograph(48, 48, seed) for seed in range(24)]))
    pixels, album = pixels.permute(0, 3, 1, 2), AUGMENTATIONS[name].change
    together = through_album(album, pixels, np.arange(24))
    some = np.array([17, 2, 9])
    assert torch.allclose(through_album(album, pixels[some], some), together[some], atol=1e-3)
    assert together.dtype == torch.float32 and together.min() >= 0 and together.max() <= 255
    changed = (together - pixels).abs().amax((1, 2, 3)) > 1
    assert changed.sum() > 12


def test_colour_of_albums_is_that_of_torchvision():
    image = torch.from_numpy(photograph(40, 40, 5)).permute(2, 0, 1)[None]
    still = {"light": 0.0, "contrast": 0.0, "saturation": 0.0, "hue": 0.0}
    by_name = {
        "light": (1, tv.adjust_brightness),
        "contrast": (2, tv.adjust_contrast),
        "saturation": (3, tv.adjust_saturation),
    }
    for name, (column, reference) in by_name.items():
        album = Album(colour=1.0, **{**still, name: 0.4})
        u = uniforms(8, 0, np.array([4]), album.draws)
        factor = 0.6 + 0.8 * u[0, 4 + column]
        expected = reference(image, factor).float()
        assert (album(image, u) - expected).abs().mean() < 1, name
    grey = through_album(Album(grey=1.0), image, np.array([1]))
    assert (grey - tv.rgb_to_grayscale(image, 3)).abs().max() < 1.5
    turned = through_album(Album(colour=1.0, **{**still, "hue": 0.1}), image, np.array([1]))
    inside = ((turned > 0) & (turned < 255)).all(1)
    kept, was = turned.mean(1)[inside], image.float().mean(1)[inside]
    assert inside.float().mean() > 0.5 and (turned - image).abs().mean() > 2
    assert torch.allclose(kept, was, atol=0.01 * 255)


def test_geometry_of_albums():
    white = torch.full((64, 3, 56, 56), 255, dtype=torch.uint8)
    index = np.arange(64)
    assert torch.allclose(through_album(Album(turn=1.0), white, index), white.float(), atol=1e-2)
    assert torch.allclose(through_album(Album(blur=1.0), white, index), white.float(), atol=1e-2)
    holed = through_album(Album(drop=1.0), white, index)
    black = (holed == 0).all(1).float().mean((1, 2))
    assert (black > 0).float().mean() > 0.9 and black.max() <= 5 * (40 / 224) ** 2
    one = torch.from_numpy(photograph(56, 56, 1)).permute(2, 0, 1).expand(64, -1, -1, -1)
    turned = through_album(Album(turn=1.0), one, index)
    assert ((turned - one).abs().mean((1, 2, 3)) > 1).float().mean() > 0.9
    blurred = through_album(Album(blur=1.0), one, index)
    assert (blurred.diff(dim=3).abs().mean((1, 2, 3)) < one.float().diff(dim=3).abs().mean()).all()


def test_names_of_augmentations():
    assert set(AUGMENTATIONS) == {"crop", "sec", "emoji", "none", "Geom", "GeomColor", "ColorHeavy"}
    assert AUGMENTATIONS["emoji"].crop is None and AUGMENTATIONS["sec"].crop.scale == (0.16, 1.0)
    assert logging.getLogger("dataset").level == logging.NOTSET


def test_crop_scale_is_the_smallest_share_of_a_picture_that_is_shown(drawings) -> None:
    index = np.arange(2000)
    plan = Plan(0, IndexBatch(index, None, np.zeros_like(index)), index)

    def shares(**changes: float) -> np.ndarray:
        rule = loader_of(drawings, **changes).look.rule
        return rule(np.tile([300, 400], (2000, 1)), plan).boxes[:, 2:].prod(axis=1) / 120_000

    for least, found in ((0.08, shares()), (0.5, shares(crop_scale=0.5))):
        assert least - 0.01 < found.min() < least + 0.03 and found.max() > 0.95
