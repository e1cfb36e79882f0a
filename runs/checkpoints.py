"""Checkpoints: their entries, checks of these, and the base weights that some leave out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from storage import load_tensors
from utils import InputError, damage_in_words

FORMAT = 1
"""Version of the checkpoints' layout; a newer one is refused with a sentence."""
BASE = "base.pth"

Checkpoint = dict[str, Any]
"""The content of a checkpoint: entries of `KINDS`, or, in other programs' files, any others."""

KINDS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("format", "epoch", "step", "skipped"), int),
    **dict.fromkeys(("model_state_dict", "criterion_state_dict", "network", "args"), dict),
    **dict.fromkeys(("clock", "lap", "random", "environment", "metrics"), dict),
    **dict.fromkeys(("base", "base_state_dict", "data"), dict),
    **{"ema_state_dict": dict, "ema_updates": int},
    "row": (dict, type(None)),
    "wandb_id": (str, type(None)),
}
"""The entries of our checkpoints, and their types."""


_OF_OTHERS = ("model_state_dict", "ema_state_dict", "network")
"""The entries of `KINDS` under which other training codes save weights."""


def is_ours(content: Checkpoint) -> bool:
    """Whether this program wrote a checkpoint: it describes its network, or has a `clock`.

    Other training codes save the weights themselves under `network`.
    """
    network = content.get("network")
    described = isinstance(network, dict) and not any(hasattr(v, "shape") for v in network.values())
    return described or "clock" in content


def load_checkpoint(path: str | Path) -> Checkpoint:
    """Loads one of our checkpoints, or a released file of weights, as a dictionary.

    If a checkpoint leaves out its base (--peft), the weights of base.pth beside it are added, and
    the entry `base` is renamed to `joined_base`. Without such a file it is unchanged.

    Raises:
        InputError: it cannot be read safely, or a newer version wrote it, or base.pth is another
            run's.
    """
    return checked(load_tensors(Path(path)), path)


def checked(content: Checkpoint, path: str | Path) -> Checkpoint:
    """`load_checkpoint` for content that `load_tensors` has already read from `path`.

    Raises:
        InputError: as for `load_checkpoint`.
    """
    if isinstance(written := content.get("format"), int) and written > FORMAT:
        raise InputError(
            f"checkpoint {path} has format {written}, newer than {FORMAT}, which this version "
            "reads; update the code"
        )
    if "base_state_dict" in content:
        raise InputError(
            f"{path} holds the weights that a run left as they were; give the run folder, or one "
            "of the checkpoints in it"
        )
    if not is_ours(content):  # there, entries with our names may mean something else
        ignored = KINDS.keys() - set(_OF_OTHERS)
        return {name: value for name, value in content.items() if name not in ignored}
    advice = "use another copy of it, or another checkpoint"
    with damage_in_words(f"checkpoint {path}", advice):
        for name, kinds in KINDS.items():
            if name in content and not isinstance(content[name], kinds):
                raise ValueError(f"its {name} is a {type(content[name]).__name__}")
        for title, numbers in content.get("metrics", {}).items():
            if not all(isinstance(value, int | float) for value in numbers.values()):
                raise ValueError(f"its metrics of {title} are not numbers")
        row = content.get("row") or {"epoch": 0, "step": 0}
        if not all(isinstance(row[name], int) for name in ("epoch", "step")):
            raise ValueError("its row has no epoch, or no step")
        if not all(isinstance(value, int | float) for value in row.values()):
            raise ValueError("its row has other things than numbers")
        for name, what in (("criterion", "criterion"), ("ema", "running mean")):
            held = content.get(f"{name}_state_dict", {}).values()
            if not all(hasattr(value, "shape") for value in held):
                raise ValueError(f"its {what} has other things than tensors")
    beside = Path(path).parent / BASE
    return _joined(content, path, beside) if "base" in content and beside.is_file() else content


def _joined(content: Checkpoint, path: str | Path, beside: Path) -> Checkpoint:
    """A checkpoint with the weights of its base."""
    base, held = content["base"], load_tensors(beside, "the base")
    if held.get("fingerprint") != base["fingerprint"]:
        raise InputError(f"{beside} is not the base of {path}; put that of its own run there")
    return with_base(content, held["base_state_dict"])


def with_base(content: Checkpoint, weights: dict[str, Any]) -> Checkpoint:
    """A checkpoint that leaves out its base, with the base's weights added to the model's.

    The running mean (--ema) is not changed: it consists of the trained weights alone.
    """
    rest = {name: value for name, value in content.items() if name != "base"}
    joined = weights | content["model_state_dict"]
    return {**rest, "model_state_dict": joined, "joined_base": content["base"]}
