"""AMLoss: Proxy-Anchor with a learnable margin for each class."""

from __future__ import annotations

from typing import Any

from flags import EPOCHS, SHARE, Group, Kind, Options, Search, flag, not_negative, number, positive
from machine import cores
from methods.base import Method, loss_is

WANTED = loss_is("AMLoss")


def authors_settings(options: Options) -> dict[str, Any]:
    """The defaults of the authors' train.py that differ from Proxy-Anchor's."""
    own = {"epochs": 40, "batch_size": 90, "workers": min(2, cores())}
    return own if WANTED.met(options) else {}


# fmt: off
METHOD = Method(
    name="amloss",
    title="learning the margins",
    flags=(Group("AMLoss: learnable margin of each class", (
        flag("--alphap", 32.0, positive("A"), "scale on the positive side",
             need=WANTED, argument="alphap", search=Search(8, 64)),
        flag("--alphan", 32.0, positive("A"), "scale on the negative side",
             need=WANTED, argument="alphan", search=Search(8, 64)),
        flag("--delta", 0.1, Kind(number(), "D"), "offset of the proxy-proxy term",
             need=WANTED, argument="delta"),
        flag("--lam", 1.0, not_negative("L"), "weight of the proxy-proxy term",
             need=WANTED, argument="lam"),
        flag("--mrg-lr --mrg_lr", 1e-4, not_negative("LR"),
             "learning rate of the margins (AdamW of their own)", need=WANTED,
             argument="margin_lr", search=Search(1e-5, 1e-2)),
        flag("--mrg-lr-decay-step", 10, EPOCHS, "epochs between two decays of it",
             need=WANTED, argument="margin_step"),
        flag("--mrg-lr-decay-gamma", 0.5, SHARE, "factor of a decay",
             need=WANTED, argument="margin_gamma"),
    )),),
    wanted=WANTED.met,
    off={"loss": "Proxy_Anchor", "loss_args": ()},
    defaults=authors_settings,
)
