"""The base: the resting weights that checkpoints of a PEFT run leave out, and how they come back.

A run folder holds its base once, in base.pth, and stands on its own. A checkpoint that was taken
out of its folder says what its base was; from that it is built once more and compared.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from machine import expanded
from net.building import build
from net.checkpoints import architecture_of, load_checkpoint, with_weights
from net.network import EmbeddingNet
from net.peft import fingerprint
from runs import load_checkpoint as read
from runs import with_base
from utils import InputError


def describe_base(
    network: EmbeddingNet, pretrained: str, checkpoint: str | None
) -> dict[str, Any] | None:
    """What a checkpoint says of the weights that it leaves out; None where it leaves out none.

    Args:
        network: at its start. pretrained, checkpoint: what it started from, by the flags' names.
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


def whole(content: dict[str, Any], source: str | Path) -> dict[str, Any]:
    """A checkpoint with all weights: its base is built anew where it came without it.

    Args:
        content: as `runs.load_checkpoint` reads it. source: what to call it in errors.

    Raises:
        InputError: what the base was made from is not here, or has changed.
    """
    if "base" not in content:
        return content
    base = content["base"]
    lacking = (
        f"{source} holds only what was trained on top of {_in_words(base)}; put the base.pth of "
        "its run into its folder"
    )
    if base["pretrained"] == "none" and base["checkpoint"] is None:
        raise InputError(lacking)
    try:
        network = build(architecture_of(content, source), pretrained=base["pretrained"])
        if base["checkpoint"] is not None:
            start = with_weights(whole(read(base["checkpoint"]), base["checkpoint"]))
            load_checkpoint(network, start, base["checkpoint"], masks=False)
    except InputError as error:
        raise InputError(f"{lacking}, or make that available ({error})") from error
    weights = network.base_state()
    if fingerprint(weights) != base["fingerprint"]:
        raise InputError(f"{lacking}, because the {_in_words(base)} that is here is another one")
    return with_base(content, weights)


def _in_words(base: dict[str, Any]) -> str:
    if base["checkpoint"] is not None:
        return f"the {base['model']} in {base['checkpoint']}"
    words = {"imagenet": "with its pretrained weights", "none": "that was started at random"}
    return f"a {base['model']} {words.get(base['pretrained'], 'from ' + base['pretrained'])}"
