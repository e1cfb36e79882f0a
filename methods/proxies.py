"""Proxy-Anchor (Kim et al., CVPR 2020): its flags, some of which other losses share."""

from __future__ import annotations

from typing import Any

from criteria import PROXY_LR_SCALE
from flags import NOTHING, SWITCH, Group, Options, Search, flag, not_negative, positive
from methods.base import Method, loss_is

PROXY_LOSSES = loss_is("Proxy_Anchor", "AMLoss")
RATED = loss_is("Proxy_Anchor", "AMLoss", "Proxy_NCA")


def authors_settings(options: Options) -> dict[str, Any]:
    """The proxies of Proxy_NCA learn at the network's rate."""
    return {"proxy_lr_scale": 1.0} if options.loss == "Proxy_NCA" else {}


# fmt: off
METHOD = Method(
    name="proxies",
    title="Proxy-Anchor",
    flags=(Group("losses with proxies", (
        flag("--mrg", 0.1, not_negative("M"), "margin; AMLoss starts every class at it",
             need=PROXY_LOSSES, argument="margin", search=Search(0, 0.4, log=False)),
        flag("--alpha", 32.0, positive("A"), "scale of the similarities (NPairsLoss: 1, learned)",
             need=loss_is("Proxy_Anchor", "NPairsLoss"), argument="alpha", search=Search(8, 64)),
        flag("--proxy-lr-scale", PROXY_LR_SCALE, not_negative("X"),
             "learning rate of the proxies as a multiple of --lr",
             need=RATED, argument="proxy_lr_scale", shown="100; Proxy_NCA 1"),
        flag("--shard-proxies", False, SWITCH,
             "several processes: each holds, and trains, its share of the proxies; the numbers and "
             "the checkpoints are those of one", change=NOTHING),
    )),),
    wanted=PROXY_LOSSES.met,
    defaults=authors_settings,
)
