"""Networks: a backbone, pooling, and the linear heads that give embeddings.

    network = net.build(net.Architecture("resnet50", 512), pretrained="imagenet")

`architecture_of` reads from a checkpoint, ours or of a released code, which network it holds, and
`load_checkpoint` fills that network with its weights. Outputs are raw and in float32: code that
needs unit length normalises them. A new backbone needs one file and one line: see backbones.py.

Importing this package does not load torch, so that options/ can read the choices for --help.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from net.backbones import MODELS, TIMM, Backbone, find_backbone
from net.choices import (
    ALL_BLOCKS,
    BN_FREEZE,
    HEAD_NORMS,
    HEAD_USES,
    INPUTS,
    MASK_INITS,
    POOLINGS,
    STEMS,
    WEIGHTS,
    InputSpec,
    blocks_of,
    head_norm_of,
    peft_of,
)
from utils import our_name

if TYPE_CHECKING:
    from net.architecture import Architecture
    from net.building import build
    from net.checkpoints import architecture_of, load_checkpoint, with_weights
    from net.masks import EmbeddingMasks
    from net.network import EmbeddingNet

__all__ = [
    "ALL_BLOCKS", "BN_FREEZE", "HEAD_NORMS", "HEAD_USES", "INPUTS", "MASK_INITS", "MODELS",
    "POOLINGS", "STEMS", "TIMM", "WEIGHTS", "Architecture", "Backbone", "EmbeddingMasks",
    "EmbeddingNet", "InputSpec", "architecture_of", "blocks_of", "build", "find_backbone",
    "head_norm_of", "load_checkpoint", "peft_of", "with_weights",
]  # fmt: skip

_HOMES = {
    "Architecture": "net.architecture",
    "EmbeddingMasks": "net.masks",
    "EmbeddingNet": "net.network",
    "architecture_of": "net.checkpoints",
    "build": "net.building",
    "load_checkpoint": "net.checkpoints",
    "with_weights": "net.checkpoints",
    # A run as a function from pictures to embeddings. It prepares pictures as evaluation does, so
    # it is in a higher layer than this package, which only offers it by the name in README.
    "load_run": "evaluation.inference",
}
"""Names that are imported when they are first used → their modules."""


def __getattr__(name: str) -> Any:
    """Import a name of `_HOMES`."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(our_name(_HOMES[name])), name)
