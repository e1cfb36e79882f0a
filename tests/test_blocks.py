"""The blocks of backbones: in order, each parameter in one of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import net
from net import Architecture
from net.blocks import belongs, numbered_blocks

COUNTS = {"bn_inception": 11, "googlenet": 10, "resnet10": 5, "resnet18": 9, "resnet34": 17}
COUNTS |= {"resnet50": 17, "resnet101": 34, "resnet152": 51, "efficientnet_lite0": 17}


@pytest.mark.parametrize("model", COUNTS)
def test_blocks_are_the_backbone_in_order(model: str) -> None:
    with torch.device("meta"):
        network = net.build(Architecture(model, 8, head_norm=True))
    assert len(network.blocks()) == COUNTS[model]
    names = [name for name, _ in network.model.named_parameters()]
    places = [[at for at, block in enumerate(network.blocks()) if belongs(n, block)] for n in names]
    heads = [name.startswith(("embedding.", "head_norm.")) for name in names]
    assert [len(found) for found in places] == [0 if head else 1 for head in heads]
    inside = [found[0] for found in places if found]
    assert inside == sorted(inside) and inside[0] == 0  # modules are registered as they follow
    listed = [id(p) for block in network.block_parameters() for p in block]
    assert sorted(listed) == sorted(map(id, network.backbone_parameters()))


UNNUMBERED = {"regnety_002": 14, "regnetv_064": 26, "densenet121": 59, "dpn68": 23}
UNNUMBERED |= {"inception_v3": 13, "dla34": 11}


@pytest.mark.parametrize("model", UNNUMBERED)
def test_blocks_of_timm_that_are_not_numbered(model: str) -> None:
    """`s1.b2`, `denselayer3`, `Mixed_5b`: each is a block, and a norm behind the last is its."""
    with torch.device("meta"):
        network = net.build(Architecture(f"timm:{model}", 8, bn_freeze="affine"))
    blocks = network.blocks()
    assert len(blocks) == UNNUMBERED[model]
    names = [n for n, _ in network.model.named_parameters() if not n.startswith("embedding.")]
    assert all(sum(belongs(name, block) for block in blocks) == 1 for name in names)
    groups = network.parameter_groups(1.0, layer_decay=0.5)
    assert [g["lr"] for g in groups[:-1]] == [0.5**n for n in range(len(blocks) - 1, -1, -1)]


class Numbered(nn.Module):
    """A stem, two stages of two blocks, and what comes after them; a norm by itself in a row."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm0 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        pair = [nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)) for _ in range(2)]
        self.stages = nn.Sequential(nn.Sequential(*pair), nn.Sequential(*pair))
        self.row = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
        self.last = nn.BatchNorm2d(4)


def test_numbered_modules_are_blocks() -> None:
    module = Numbered()
    module.stages[1] = nn.Sequential(nn.Conv2d(4, 4, 3))
    assert numbered_blocks(module) == [
        ("stem", "norm0"),
        ("stages.0.0",),
        ("stages.0.1",),
        ("stages.1",),
        ("row", "last"),
    ]


def test_parameters_in_a_list_are_no_blocks() -> None:
    """Their own numbers are not those of modules: `scales.0`, `rows.1.0`."""
    module = nn.Module()
    module.stem = nn.Conv2d(3, 4, 3)
    module.scales = nn.ParameterList([nn.Parameter(torch.ones(4, 4)) for _ in range(2)])
    pair = [nn.Parameter(torch.ones(4, 4)) for _ in range(2)]
    module.rows = nn.ModuleList([nn.Conv2d(4, 4, 3), nn.ParameterList(pair)])
    assert numbered_blocks(module) == [("stem", "scales"), ("rows.0",), ("rows.1",)]
