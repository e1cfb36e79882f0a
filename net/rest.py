"""What of a backbone rests for the whole run: `--freeze-stem`, `--freeze-blocks` and `--peft`.

What rests has no gradient. Where nothing below a block has one either, autograd keeps nothing of
its forward pass, which then costs as much as in an evaluation.
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


class Rest(NamedTuple):
    """What rests, by the names of the backbone's modules and parameters.

    Attributes:
        modules: which stay in evaluation mode, with all that is in them.
        parameters: which are never trained.
        base: those of the parameters that checkpoints leave out; see base.py.
    """

    modules: Block
    parameters: frozenset[str]
    base: frozenset[str]

    def holds(self, name: str, module: nn.Module) -> bool:
        """Whether a module rests; a single layer does also where its parameters are named alone."""
        if next(module.children(), None) is not None:
            return belongs(name, self.modules)
        own = [name, *(f"{name}.{each}" for each, _ in module.named_parameters())]
        return any(belongs(each, self.modules) for each in own)


def prepare(module: nn.Module, blocks: Sequence[Block], architecture: Architecture) -> Rest:
    """Changes a backbone as its architecture says: stochastic depth, PEFT, what rests.

    Args:
        module: the backbone, without heads. blocks: its blocks, the stem first.

    Raises:
        InputError: it has no place for that, or not so many blocks.
    """
    if architecture.drop_path:
        set_drop_path(module, blocks, architecture.drop_path)
    rested = _count(architecture, blocks)
    names = [part for block in blocks[:rested] for part in block]
    if architecture.freeze_stem:
        modules = {name for name, _ in module.named_modules()}
        names += [name for name in blocks[0] if name in modules]
    asleep = tuple(dict.fromkeys(names))
    resting = {name for name, _ in module.named_parameters() if belongs(name, asleep)}
    peft, base = Peft.of(architecture.peft), set()
    if peft != Peft():
        trained = add_peft(module, blocks, rested, peft) - resting
        if architecture.bn_freeze == "affine" and trained <= _of_batch_norms(module):
            raise InputError(
                f"--peft {peft} trains nothing, because --bn-freeze affine keeps the BatchNorms as "
                f"they are, and nothing else of {architecture.model} has biases; use --bn-freeze 1"
            )
        resting = base = {name for name, _ in module.named_parameters()} - trained
    for name, parameter in module.named_parameters():
        if name in resting:
            parameter.requires_grad_(False)
    return Rest(asleep, frozenset(resting), frozenset(base))


def _of_batch_norms(module: nn.Module) -> set[str]:
    norms = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.BatchNorm2d)]
    return {f"{name}.{own}" for name, norm in norms for own, _ in norm.named_parameters()}


def _count(architecture: Architecture, blocks: Sequence[Block]) -> int:
    """How many blocks rest, the stem counted."""
    asked, most = architecture.freeze_blocks, len(blocks) - 1
    if asked == ALL_BLOCKS:
        return len(blocks)
    if asked > most:
        raise InputError(
            f"--freeze-blocks {asked}: {architecture.model} has {most} blocks; choose at most "
            f"{most}, which is all of them"
        )
    return asked + 1 if asked else 0
