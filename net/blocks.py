"""The blocks of a backbone, in order from the input to the output.

Freezing, layer-wise rates and whatever else depends on depth use blocks. A block is given by the
names of its modules and parameters. The first block holds everything before the repeated ones: the
stem, or patch embedding, position embeddings and class tokens. Whatever comes after the last one,
such as the final norm, belongs to the last one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

Block = tuple[str, ...]
"""Names of modules, and of parameters outside these modules: `("stem", "cls_token")`."""


def belongs(name: str, block: Block) -> bool:
    """Whether a parameter or module of this name is part of a block."""
    return any(name == part or name.startswith(f"{part}.") for part in block)


def numbered_blocks(module: nn.Module) -> list[Block]:
    """The blocks of a backbone whose modules are numbered, like those of a Sequential.

    - `layer1.0`, `blocks.2.1`, `layers.3` are a block each: a name up to its first number, and the
      numbers that follow it directly.
    - Modules without a number are the stem, or belong to the block before them if there is one.
    - Vectors alone are no block: a BatchNorm after its convolution belongs to the block before it.
    """
    matrices = {name for name, parameter in module.named_parameters() if parameter.dim() > 1}
    groups: dict[str, list[str]] = {"": []}
    for name, _ in module.named_parameters():
        groups.setdefault(_numbered_part(name) or list(groups)[-1], []).append(name)
    merged: list[list[str]] = []
    for names in groups.values():
        if not merged or matrices.intersection(names):
            merged.append(names)
        else:
            merged[-1].extend(names)
    return as_blocks(module, [names for names in merged if names])


def _numbered_part(name: str) -> str:
    """`layer1.0.conv2.weight` → `layer1.0`; "" if no module is numbered."""
    numbered = re.match(r"(?:.*?\.)?\d+(?:\.\d+)*(?=\.)", name)
    return numbered[0] if numbered else ""


def sorted_blocks(module: nn.Module, place: Callable[[str], int]) -> list[Block]:
    """The blocks of a backbone, given the number of the block of each parameter's name.

    place: a parameter's name → the number of its block; 0 is the stem.
    """
    groups: dict[int, list[str]] = {}
    for name, _ in module.named_parameters():
        groups.setdefault(place(name), []).append(name)
    return as_blocks(module, [groups[at] for at in sorted(groups)])


def as_blocks(module: nn.Module, groups: Iterable[Iterable[str]]) -> list[Block]:
    """Groups of parameter names as blocks, with whole modules by their names."""
    groups = [list(group) for group in groups]
    place = {name: at for at, group in enumerate(groups) for name in group}
    return [
        tuple(dict.fromkeys(_largest_module(name, place) for name in group)) for group in groups
    ]


def _largest_module(name: str, place: Mapping[str, int]) -> str:
    """The largest module that contains a parameter, and only parameters of the same group."""
    parts = name.split(".")
    for length in range(1, len(parts)):
        module = ".".join(parts[:length])
        inside = {at for other, at in place.items() if other.startswith(f"{module}.")}
        if inside == {place[name]}:
            return module
    return name
