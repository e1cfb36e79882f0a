"""The parts of a backbone that stay frozen: --freeze-stem, --freeze-blocks, --peft.

Frozen parameters have no gradient. If nothing below a frozen block has a gradient either, autograd
stores nothing of its forward pass, which then costs no more than in evaluation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from net.architecture import Architecture
from net.blocks import Block, belongs
from net.choices import ALL_BLOCKS, Peft
from net.depth import set_drop_path
from net.peft import add_peft
from utils import InputError


class Frozen(NamedTuple):
    """Names of the frozen modules and parameters of a backbone.

    Attributes:
        modules: they stay in evaluation mode, with everything they contain.
        parameters: they are never trained.
        base: the parameters that checkpoints leave out, see base.py.
    """

    modules: Block
    parameters: frozenset[str]
    base: frozenset[str]

    def holds(self, name: str, module: nn.Module) -> bool:
        """Whether a module is frozen, or a layer whose parameters are listed by themselves."""
        if next(module.children(), None) is not None:
            return belongs(name, self.modules)
        own = [name, *(f"{name}.{each}" for each, _ in module.named_parameters())]
        return any(belongs(each, self.modules) for each in own)


def prepare_backbone(
    module: nn.Module, blocks: Sequence[Block], architecture: Architecture
) -> Frozen:
    """Give a backbone the stochastic depth, PEFT and frozen parts of its architecture.

    Args:
        module: the backbone, without heads. blocks: its blocks, the stem first.

    Raises:
        InputError: the backbone does not support one of these, or has fewer blocks.
    """
    if architecture.drop_path:
        set_drop_path(module, blocks, architecture.drop_path)
    count = _frozen_blocks(architecture, blocks)
    names = [part for block in blocks[:count] for part in block]
    if architecture.freeze_stem:
        known = {name for name, _ in module.named_modules()}
        names += [name for name in blocks[0] if name in known]
    modules = tuple(dict.fromkeys(names))
    frozen = {name for name, _ in module.named_parameters() if belongs(name, modules)}
    peft, base = Peft.of(architecture.peft), set()
    if peft != Peft():
        trained = add_peft(module, blocks, count, peft) - frozen
        if architecture.bn_freeze == "affine" and trained <= _of_batch_norms(module):
            raise InputError(
                f"--peft {peft} trains nothing, because --bn-freeze affine keeps the BatchNorms as "
                f"they are, and nothing else of {architecture.model} has biases; use --bn-freeze 1"
            )
        frozen = base = {name for name, _ in module.named_parameters()} - trained
    for name, parameter in module.named_parameters():
        if name in frozen:
            parameter.requires_grad_(False)
    return Frozen(modules, frozenset(frozen), frozenset(base))


def _of_batch_norms(module: nn.Module) -> set[str]:
    norms = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.BatchNorm2d)]
    return {f"{name}.{own}" for name, norm in norms for own, _ in norm.named_parameters()}


def _frozen_blocks(architecture: Architecture, blocks: Sequence[Block]) -> int:
    """The number of frozen blocks, including the stem."""
    asked, most = architecture.freeze_blocks, len(blocks) - 1
    if asked == ALL_BLOCKS:
        return len(blocks)
    if asked > most:
        raise InputError(
            f"--freeze-blocks {asked}: {architecture.model} has {most} blocks; choose at most "
            f"{most}, which is all of them"
        )
    return asked + 1 if asked else 0
