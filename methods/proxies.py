"""Proxy-Anchor (Kim et al., CVPR 2020): the flags that it shares with what is built on it."""

from __future__ import annotations

from criteria import PROXY_LR_SCALE
from flags import Group, flag, not_negative, positive
from methods.base import Method, loss_is

PROXY_LOSSES = loss_is("Proxy_Anchor", "AMLoss")

# fmt: off
METHOD = Method(
    name="proxies",
    title="Proxy-Anchor",
    flags=(Group("losses with proxies", (
        flag("--mrg", 0.1, not_negative("M"), "margin; AMLoss starts every class at it",
             need=PROXY_LOSSES, argument="margin"),
        flag("--alpha", 32.0, positive("A"), "scale of the similarities (NPairsLoss: 1, learned)",
             need=loss_is("Proxy_Anchor", "NPairsLoss"), argument="alpha"),
        flag("--proxy-lr-scale", PROXY_LR_SCALE, not_negative("X"),
             "learning rate of the proxies as a multiple of --lr",
             need=PROXY_LOSSES, argument="proxy_lr_scale"),
    )),),
    wanted=PROXY_LOSSES.met,
)
