"""DDML (Park et al., Deep Disentangled Metric Learning, AAAI 2025), attached to a proxy loss."""

from __future__ import annotations

from typing import Any

from flags import TRUTH, Group, Need, Options, Search, flag, not_negative
from methods.base import Method

WANTED = Need("--disent True", lambda options: bool(options.disent))


def authors_settings(options: Options) -> dict[str, Any]:
    """The batch size of the authors' command."""
    return {"batch_size": 180} if options.disent else {}


def note(options: Options) -> str:
    """Warns if all terms have weight 0, which is their default, as in the authors' code."""
    if options.disent and not (options.al or options.be or options.gam):
        return (
            f"--disent with --al, --be and --gam 0 trains {options.loss} alone, on a wider head; "
            "its authors use --al 1 --be 0.1 --gam 1e-5 on CUB"
        )
    return ""


def refuses(options: Options) -> str:
    """Refuses methods that need the main head to be a plain vector of the embedding's size."""
    if options.introspective:
        return (
            "--disent cannot go with --introspective: one reads the main head as a mean and a "
            "spread, the other as a vector; leave one of them out"
        )
    if options.nb_clusters is not None:
        return (
            "--disent cannot go with divide and conquer (--nb-clusters): its masks have as many "
            "entries as the embedding, and the main head of --disent twice as many; leave one of "
            "them out"
        )
    return ""


# fmt: off
METHOD = Method(
    name="disentangled",
    title="DDML",
    flags=(Group("DDML: disentangling", (
        flag("--disent", False, TRUTH,
             "True: two heads of twice the width, a class-agnostic and a class-specific term"),
        flag("--al", 0.0, not_negative("W"), "weight of the class-agnostic term", need=WANTED,
             search=Search(0.1, 10)),
        flag("--be", 0.0, not_negative("W"), "weight of the class-specific term", need=WANTED,
             search=Search(0.01, 1)),
        flag("--gam", 0.0, not_negative("W"), "weight of the split term", need=WANTED,
             search=Search(1e-7, 1e-3)),
    )),),
    wanted=WANTED.met,
    attach={"al": "al", "be": "be", "gam": "gam"},
    off={"disent": False},
    defaults=authors_settings,
    note=note,
    refuses=refuses,
)
