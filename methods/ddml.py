"""DDML (Park et al., Deep Disentangled Metric Learning, AAAI 2025), attached to a proxy loss."""

from __future__ import annotations

from flags import TRUTH, Group, Need, flag, not_negative
from methods.base import Method

WANTED = Need("--disent True", lambda options: bool(options.disent))

# fmt: off
METHOD = Method(
    name="disentangled",
    title="DDML",
    flags=(Group("DDML: disentangling", (
        flag("--disent", False, TRUTH,
             "True: two heads of twice the width, a class-agnostic and a class-specific term"),
        flag("--al", 1.0, not_negative("W"), "weight of the class-agnostic term", need=WANTED),
        flag("--be", 0.1, not_negative("W"), "weight of the class-specific term", need=WANTED),
        flag("--gam", 1e-5, not_negative("W"), "weight of the split term", need=WANTED),
    )),),
    wanted=WANTED.met,
    attach={"al": "al", "be": "be", "gam": "gam"},
    off={"disent": False},
)
