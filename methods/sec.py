"""SEC (Zhang et al., Deep Metric Learning with Spherical Embedding, NeurIPS 2020)."""

from __future__ import annotations

from typing import Any

import dataset
import net
from criteria import COMMANDS
from flags import Group, Kind, Need, Options, Search, flag, not_negative, number
from methods.base import Method

LOSSES = tuple(COMMANDS["spherical embeddings'"])
"""The losses of the authors' command, which has defaults of its own."""
SMALL = ("cub", "cars", "emoji")
DECAY = 0.1  # the authors' factor for decaying learning rates
WANTED = Need("--sec_wei above 0", lambda options: options.sec_wei > 0)


def authors_settings(options: Options) -> dict[str, Any]:
    """The authors count steps, use Adam with two learning rates, and have settings per data set."""
    if options.loss not in LOSSES:
        return {}
    data = dataset.find(options.dataset).name
    small = data in SMALL
    constrained = options.sec_wei > 0 or options.l2reg_wei > 0
    lr, lr_p = {
        "cub": (1e-5, 0.5e-5),
        "sop": (2.5e-4, 0.5e-4),
        "inshop": (5e-4, 1e-4),
    }.get(data, (1e-5, 1e-5))
    gamma = options.lr_decay_gamma if "lr_decay_gamma" in options.given else DECAY
    defaults = {
        "batch_size": 120, "IPC": {"n-npair": 2, "ms": 5}.get(options.loss, 3),
        "optimizer": "adam", "lr": lr, "lr_p": lr_p, "lr_decay_gamma": DECAY,
        "weight_decay": 2.5e-3 if small else 1e-5, "decay_vectors": 0, "decay_biases": 1,
        "schedule": "milestones", "milestones": _milestones(data, options.loss, gamma),
        "steps": 8000 if small else 12000, "eval_steps": {"sop": 500, "inshop": 200}.get(data, 100),
        "warm": 0, "clip": 0.0, "pooling": "avg", "head_init": "default", "bn_freeze": "affine",
        "head_norm": int(options.loss != "ms" or constrained), "l2_norm": 0, "bn_momentum": 0.1,
    }  # fmt: skip
    if data != "emoji":
        defaults |= {"image_size": 227, "augment": "sec"}
        if net.find_backbone(options.model).name == "bn_inception":
            defaults["input_spec"] = "spherical"
    else:  # trained from scratch: settings for pretrained networks do not apply
        del defaults["bn_freeze"]
    if "epochs" in options.given:
        del defaults["steps"]
    if "eval_every" in options.given:
        del defaults["eval_steps"]
    if data == "sop":  # k-means of 60,502 images takes long: its authors do it once, at the end
        defaults["metrics"] = ("retrieval",)
    return defaults


def _milestones(data: str, loss: str, gamma: float) -> tuple[int, ...]:
    """The steps at which the learning rates are multiplied by ``gamma``."""
    if data in ("sop", "inshop"):
        return (6000,)
    if data == "cars":
        return (2000,) if gamma == DECAY else (4000, 6000)
    return (3000, 6000) if loss == "ms" else (5000,)


# fmt: off
METHOD = Method(
    name="sec",
    title="SEC",
    flags=(Group("SEC: spherical embedding constraint, for any loss", (
        flag("--sec_wei --sec-wei", 0.0, not_negative("W"), "weight of the variance of the norms",
             search=Search(0.03, 3)),
        flag("--norm_momentum --norm-momentum", 1.0, Kind(number(0.0, 1.0, above=True), "RHO"),
             "share of the batch in the running mean of the norms", need=WANTED),
    )),),
    wanted=WANTED.met,
    attach={"weight": "sec_wei", "momentum": "norm_momentum"},
    # The authors log the same statistics without the constraint.
    watched=lambda options: options.loss in LOSSES,
    off={"sec_wei": 0.0},
    defaults=authors_settings,
)
