"""A penalty on the mean squared norm of the embeddings: SEC with a fixed target of 0."""

from __future__ import annotations

from flags import Group, flag, not_negative
from methods.base import Method

# fmt: off
METHOD = Method(
    name="l2",
    title="L2 of the norms",
    flags=(Group("penalty on the norms, for any loss", (
        flag("--l2reg_wei --l2reg-wei", 0.0, not_negative("W"),
             "weight of the mean squared norm"),
    )),),
    wanted=lambda options: options.l2reg_wei > 0,
    attach={"weight": "l2reg_wei"},
    off={"l2reg_wei": 0.0},
)
