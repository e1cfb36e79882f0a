"""The GPU's kernels give torch's numbers: on a GPU, or on the CPU by Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from torch import Tensor, nn

import kernels
import net
from dataset.pixel_store import PixelStore
from dataset.transforms import RandomCrop, uniforms
from net import fused
from net.heads import Pool
from net.layers import folded

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
pytest.importorskip("triton")


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the kernels take its tensors too."""
    if DEVICE.type == "cpu":
        monkeypatch.setattr(kernels, "usable", lambda device: True)
        monkeypatch.setattr(fused, "fits", lambda maps: maps.dim() == 4 and maps.numel() > 0)
        monkeypatch.setattr(fused, "can_fold", lambda conv, norm: True)


def maps_of(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Channels-last maps (B, C, H, W) with some zeros and equal values."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).mul(4).round() / 4
    return drawn.to(DEVICE, dtype).to(memory_format=torch.channels_last)


def gradients(out: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Of a sum in which each number has a weight of its own."""
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(9)).to(out)
    return list(torch.autograd.grad((out * weights).sum(), inputs))


def assert_alike(ours: list[Tensor], reference: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(ours, reference, strict=True):
        assert one.shape == other.shape and one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * 10)


SHAPES = [(3, 5, 4, 3), (2, 64, 9, 7), (5, 96, 3, 3), (2, 3, 1, 1), (1, 33, 1, 5)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("relu", [True, False])
@pytest.mark.parametrize("has_shortcut", [True, False])
def test_bias_shortcut_and_relu(shape, relu, has_shortcut):
    found = []
    for ours in (True, False):
        maps, shortcut = (maps_of(*shape, seed=seed).requires_grad_() for seed in (0, 1))
        bias = maps_of(1, shape[1], 1, 1, seed=2).flatten().requires_grad_()
        inputs = [maps, bias, *[shortcut] * has_shortcut]
        if ours:
            out = fused.add_bias(maps * 1, bias, shortcut if has_shortcut else None, relu=relu)
        else:
            out = maps + bias[:, None, None] + (shortcut if has_shortcut else 0)
            out = F.relu(out) if relu else out
        found.append([out, *gradients(out, *inputs)])
    assert_alike(*found)


def test_a_frozen_bias_gets_no_gradient():
    maps, bias = maps_of(2, 8, 3, 3).requires_grad_(), maps_of(1, 8, 1, 1).flatten()
    out = fused.add_bias(maps * 1, bias, relu=True)
    assert_alike(gradients(out, maps), gradients(F.relu(maps + bias[:, None, None]), maps))


def test_what_is_not_a_number_stays():
    maps = maps_of(1, 4, 2, 2)
    maps[0, 1, 1, 0] = float("nan")
    out = fused.add_bias(maps.clone(), maps.new_zeros(4), relu=True)
    assert out.isnan().sum() == 1 and out[0, 1, 1, 0].isnan()
    assert fused.max_pool(maps, 1, 1, False)[0, 1].isnan().all()


def test_a_branch_of_concatenated_maps():
    """The gradient is a slice of wider maps, and is read where it lies."""
    found = []
    for ours in (True, False):
        maps = maps_of(2, 32, 5, 4).requires_grad_()
        bias = maps_of(1, 32, 1, 1, seed=2).flatten().requires_grad_()
        if ours:
            out = fused.add_bias(maps * 1, bias, relu=True)
            pooled = fused.max_pool(out, 1, 1, False)
        else:
            out = F.relu(maps + bias[:, None, None])
            pooled = F.max_pool2d(out, 3, 1, 1)
        whole = torch.cat([maps_of(2, 7, 5, 4), out, pooled, maps_of(2, 2, 5, 4)], dim=1)
        found.append(gradients(whole, maps, bias))
    assert_alike(*found)


POOLS = [(2, 0, True), (2, 1, False), (1, 1, False), (2, 0, False), (2, 1, True), (1, 0, False)]


@pytest.mark.parametrize("stride, padding, ceil_mode", POOLS)
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (3, 4), (4, 3), (5, 12)])
def test_maximum_of_neighbours(stride, padding, ceil_mode, size):
    """With equal values in a window the first has the gradient, as in torch."""
    found = []
    for pool in (
        fused.max_pool,
        lambda x, *how: F.max_pool2d(x, 3, how[0], how[1], ceil_mode=how[2]),
    ):
        maps = maps_of(2, 20, *size).relu().requires_grad_()
        out = pool(maps, stride, padding, ceil_mode)
        found.append([out, *gradients(out, maps)])
    assert_alike(*found)


def test_average_of_neighbours():
    """On contiguous maps for torch, whose gradient of channels-last ones is wrong on some GPUs."""
    found = []
    for ours in (True, False):
        maps = maps_of(2, 6, 5, 4)
        maps = (maps if ours else maps.contiguous()).requires_grad_()
        out = fused.average_pool(maps) if ours else F.avg_pool2d(maps, 3, 1, 1)
        found.append([out, *gradients(out, maps)])
    assert_alike(*found)


@pytest.mark.parametrize("pooling", ["avg", "max", "avg+max"])
@pytest.mark.parametrize("size", [(7, 7), (1, 1), (9, 8), (3, 50)])
def test_pooling_of_whole_maps(pooling, size, monkeypatch):
    found = []
    for ours in (True, False):
        if not ours:
            monkeypatch.setattr(fused, "fits", lambda maps: False)
        maps = maps_of(3, 40, *size).relu().requires_grad_()
        found.append([out := Pool(pooling)(maps), *gradients(out, maps)])
    assert_alike(*found)


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("kernel, inputs", [(3, 5), (1, 7), (3, 300)])
def test_a_frozen_norm_folds(has_bias, form, kernel, inputs):
    found = []
    for fold in (fused.folded, folded):
        torch.manual_seed(0)
        conv = nn.Conv2d(inputs, 6, kernel, bias=has_bias)
        norm = nn.BatchNorm2d(6).eval()
        for each in (norm.weight, norm.bias, norm.running_mean):
            nn.init.normal_(each)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        conv, norm = conv.to(DEVICE).to(memory_format=form), norm.to(DEVICE)
        weight, bias = fold(conv, norm)
        parameters = [*conv.parameters(), *norm.parameters()]
        total = torch.cat([weight.flatten(), bias])
        found.append([weight, bias, *gradients(total, *parameters)])
    assert_alike(*found)


@pytest.mark.parametrize("form", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("size", [(32, 32), (18, 44), (2, 6)])
def test_the_first_convolution(form, size, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    conv = nn.Conv2d(3, 5, 7, 2, padding=3).to(DEVICE)
    images = maps_of(2, 3, *size).contiguous(memory_format=form)
    assert fused.is_stem(images, conv)
    found = []
    for out in (
        fused.stem(images, conv.weight),
        F.conv2d(images, conv.weight, stride=2, padding=3),
    ):
        found.append([out, *gradients(out, conv.weight)])
    assert_alike(*found, tolerance=1e-4)


@pytest.mark.parametrize("cubic", [False, True])
def test_views_of_images(cubic, monkeypatch):
    """As matrix products cut them out of the same images, on a CPU in float32."""
    shapes = np.array([(13, 17), (17, 13), (13, 20), (9, 8), (10, 10)])
    pixels = torch.randint(0, 256, (int(shapes.prod(axis=1).sum()), 3), dtype=torch.uint8)
    crop, index = RandomCrop(), np.array([2, 0, 4, 1, 3])
    drawn = uniforms(0, 0, index, crop.draws)
    views = crop.views(shapes[index], drawn, 0)._replace(cubic=cubic)
    assert views.flip.any() and not views.flip.all()
    ours = PixelStore(pixels.to(DEVICE), shapes).cut(index, views, 10)
    monkeypatch.setattr(kernels, "usable", lambda device: False)
    reference = PixelStore(pixels, shapes).cut(index, views, 10)
    assert ours.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(ours.cpu(), reference, rtol=0, atol=0.01)  # of 255 levels


def test_all_kernels_compile(tmp_path):
    """In a process of its own, because in this one the interpreter was chosen."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "compiled_kernels.py"],
        env=os.environ
        | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "all compiled" in done.stdout, done.stderr


def test_a_kernel_that_fails_or_errs_is_not_used(caplog):
    expected = torch.ones(3)
    assert kernels.agree(lambda: torch.ones(3), expected)
    assert not kernels.agree(lambda: torch.tensor([1.0, 1.0, 3.0]), expected, tolerance=1.0)

    def failing() -> Tensor:
        raise FileNotFoundError("gcc\nis not there")

    assert not kernels.agree(failing, expected)
    assert [record.getMessage() for record in caplog.records] == [
        "a Triton kernel cannot be used on cpu, which makes it slower: numbers are off by 2",
        "a Triton kernel cannot be used on cpu, which makes it slower: FileNotFoundError: gcc",
    ]


NETWORKS = ["bn_inception", "resnet18", "resnet50", "googlenet", "efficientnet_lite0"]
if DEVICE.type == "cpu":  # where the interpreter takes a minute for each
    NETWORKS = [pytest.param(name, True, marks=pytest.mark.slow) for name in NETWORKS]
else:
    NETWORKS = [(name, affine) for name in NETWORKS for affine in (True, False)]


@pytest.mark.parametrize("name, affine", [("resnet10", True), ("resnet10", False), *NETWORKS])
def test_a_network_is_the_same(name, affine, monkeypatch):
    """Its output and all gradients, with the kernels, and without them on a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    # Two devices round differently, and in 50 layers some ReLUs then take the other side.
    tolerance = 1e-4 if DEVICE.type == "cpu" else 1e-2
    found = []
    for ours in (True, False):
        if not ours:
            monkeypatch.setattr(fused, "fits", lambda maps: False)
        torch.manual_seed(0)
        width = 0.125 if name == "resnet10" else 1.0
        shape = net.Architecture(name, 8, stem="small", width=width, bn_freeze="1")
        place = DEVICE if ours else torch.device("cpu")
        network = net.build(shape).to(place)
        network.to(memory_format=torch.channels_last)
        network.freeze_backbone(True)
        network.freeze_backbone(False)  # now scales and shifts train
        if not affine:
            for module in network.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.requires_grad_(False)
        out = network(maps_of(2, 3, 32, 32).to(place)).embedding
        out.square().sum().backward()
        trained = [p.grad for p in network.parameters() if p.requires_grad]
        found.append([each.detach().cpu() for each in (out, *trained)])
    for one, other in zip(*found, strict=True):
        assert (one - other).norm() <= tolerance * other.norm() + 1e-6
