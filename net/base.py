"""The base: the frozen weights of a PEFT run, which its checkpoints leave out.

A run folder holds its base once, in base.pth, and is complete. A checkpoint that is moved out of
its folder describes its base, and `building.whole` rebuilds it from that.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from machine import expanded
from net.network import EmbeddingNet
from net.peft import fingerprint


def describe_base(
    network: EmbeddingNet, pretrained: str, checkpoint: str | None
) -> dict[str, Any] | None:
    """The description of the base that a checkpoint leaves out; None if there is none.

    Args:
        network: before training. pretrained, checkpoint: the values of these flags.
    """
    weights = network.base_state()
    if not weights:
        return None
    return {
        "model": network.architecture.model,
        "pretrained": pretrained if pretrained in ("imagenet", "none") else _absolute(pretrained),
        "checkpoint": None if checkpoint is None else _absolute(checkpoint),
        "fingerprint": fingerprint(weights),
    }


def _absolute(path: str) -> str:
    return str(Path(expanded(path)).absolute())


def in_words(base: dict[str, Any]) -> str:
    """A description made by `describe_base`, in words."""
    if base["checkpoint"] is not None:
        return f"the {base['model']} in {base['checkpoint']}"
    words = {"imagenet": "with its pretrained weights", "none": "that was started at random"}
    return f"a {base['model']} {words.get(base['pretrained'], 'from ' + base['pretrained'])}"
