"""IDML (Wang et al., Introspective Deep Metric Learning), attached to a proxy loss."""

from __future__ import annotations

from typing import Any

from flags import Group, Kind, flag
from methods.base import Method, Options


def authors_settings(options: Options) -> dict[str, Any]:
    """Its authors mix the images."""
    return {"mixup": 1.0} if options.introspective else {}


def note(options: Options) -> str:
    """What the released variant cannot learn."""
    if options.introspective == "released" and options.l2_norm:
        return "introspective as released: at unit length the uncertainty learns nothing"
    return ""


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
