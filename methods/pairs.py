"""The losses on pairs and triplets of divide and conquer's released code, and their miners."""

from __future__ import annotations

from typing import Any

from flags import SWITCH, Group, Need, Options, Search, flag, not_negative, one_of
from methods.base import Method, loss_is

MINED = loss_is("MarginLoss", "TripletLoss")
IN_ORDER = Need(
    f"{MINED.name} with --sampler easypeasy or distanceweighted",
    lambda options: MINED.met(options) and options.sampler in ("easypeasy", "distanceweighted"),
)
LOSSES = loss_is("MarginLoss", "TripletLoss", "TripletAllLoss", "TripletSemihardLoss", "NPairsLoss")


def authors_settings(options: Options) -> dict[str, Any]:
    """NPairsLoss learns its scale, starting at 1."""
    return {"alpha": 1.0} if options.loss == "NPairsLoss" else {}


# fmt: off
METHOD = Method(
    name="pairs",
    title="pairs and triplets",
    flags=(Group("losses on pairs and triplets", (
        flag("--margin", 0.2, not_negative("M"), "margin of the losses on distances",
             need=loss_is("MarginLoss", "TripletLoss", "TripletAllLoss", "TripletSemihardLoss"),
             argument="margin", search=Search(0.05, 0.5, log=False)),
        flag("--sampler", "easypeasy",
             one_of("easypeasy", "distanceweighted", "HPHN", "EPHN", "EPSHN", "RPSHN", "RPHN"),
             "how triplets are mined from a batch", need=MINED,
             argument="miner"),
        flag("--mining", "released", one_of("released", "earlier"),
             "how easypeasy and distanceweighted take and pair images. released: in index order, "
             "and easypeasy takes nearer negatives where too few are 0.5 away; earlier, as runs of "
             "older versions did: by distance or as drawn, and none nearer than that",
             need=IN_ORDER, argument="mining", before="earlier"),
        flag("--soft-loss", False, SWITCH, "softplus instead of the hinge",
             need=loss_is("TripletLoss", "TripletSemihardLoss"), argument="soft"),
        flag("--lr-beta", 0.0, not_negative("LR"),
             "above 0 each class learns its own boundary at this rate",
             need=loss_is("MarginLoss"), argument="beta_lr"),
        flag("--lr-alpha", 1.0, not_negative("LR"), "learning rate of --alpha",
             need=loss_is("NPairsLoss"), argument="alpha_lr"),
    )),),
    wanted=LOSSES.met,
    defaults=authors_settings,
)
