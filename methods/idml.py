"""IDML (Wang et al., Introspective Deep Metric Learning), attached to a proxy loss."""

from __future__ import annotations

from typing import Any

from flags import Group, Kind, Options, flag
from methods.base import Method


def authors_settings(options: Options) -> dict[str, Any]:
    """The authors use mixup, and train a ResNet-50."""
    return {"mixup": 1.0, "model": "resnet50"} if options.introspective else {}


def note(options: Options) -> str:
    """Remarks on what the released variant cannot learn, and on commands printed by the authors."""
    if options.introspective == "released" and options.l2_norm:
        return "introspective as released: at unit length the uncertainty learns nothing"
    if not options.introspective and _is_printed(options):
        return (
            "IDML's printed commands have these flags, and its code no other method: "
            "--introspective adds it here"
        )
    return ""


def _is_printed(options: Options) -> bool:
    """Whether these look like the flags of one of the authors' commands, which omit the method."""
    network = (options.loss, options.model, options.batch_size, options.warm)
    return network == ("Proxy_Anchor", "resnet50", 120, 5) and options.lr in (6e-4, 2.5e-4)


# fmt: off
METHOD = Method(
    name="introspective",
    title="IDML",
    flags=(Group("IDML: introspective similarity", (
        flag("--introspective", None,
             Kind(str, choices=("released", "paper"), nargs="?", const="released"),
             "released: both heads at unit length, as the code does, so that the uncertainty "
             "learns nothing; paper: the uncertainty keeps its length and learns", shown="off"),
    )),),
    wanted=lambda options: bool(options.introspective),
    attach={"variant": "introspective"},
    off={"introspective": None, "mixup": 0.0},
    defaults=authors_settings,
    note=note,
)
