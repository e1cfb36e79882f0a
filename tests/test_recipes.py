"""Every recipe is read, and two steps of it run; the published ones ask for what was published.

The recipes are those in the folder. The table of published settings comes from the papers' READMEs
and released code, not from what options/ answers.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import official_layouts
import pytest
import tiny
import torch
from conftest import ROOT, refusal

import dataset
import options
import train
from dataset.loader import eval_loader
from evaluation.networks import open_checkpoint
from methods.warmup import Warmup
from net import INPUTS

# --- which there are ------------------------------------------------------------------------------

DATA_SETS = ("cub", "cars", "sop", "inshop")
NETWORKS = ("bn_inception", "resnet50")
PUBLISHED_ROWS = {
    *(f"proxy_anchor_{data}_bn_inception" for data in DATA_SETS),
    *(f"proxy_anchor_{data}_resnet50" for data in ("cub", "cars")),
    *(f"amloss_{data}_{network}" for data in DATA_SETS for network in NETWORKS),
    *(f"ddml_{data}_bn_inception" for data in ("cub", "cars", "sop")),
    *(f"idml_{data}_resnet50" for data in ("cub", "cars", "sop")),
    *(
        f"sec_{data}_{loss}_{variant}"
        for data in DATA_SETS
        for loss in ("triplet", "semihtriplet", "npair", "ms")
        for variant in ("plain", "sec", "l2")
    ),
    *(f"divide_{data}_{masks}" for data in (*DATA_SETS, "vid") for masks in ("fixed", "learned")),
}
# Those on networks of timm and for the losses of 2022 to 2024 have test_recent_recipes.py.
RECENT = ("dinov2", "frozen", "hier", "hyp", "rsk", "sph", "unicom", "vptsp")
RECIPES = sorted(
    path.stem for path in (ROOT / "recipes").glob("*.txt") if not path.stem.startswith(RECENT)
)
PUBLISHED = sorted(PUBLISHED_ROWS)
RUN_IN_THE_FAST_SET = {
    "proxy_anchor_cub_bn_inception",
    "amloss_inshop_resnet50",
    "ddml_cars_bn_inception",
    "idml_sop_resnet50",
    "sec_cub_ms_sec",
    "divide_vid_learned",
}

# --- the published settings -----------------------------------------------------------------------

# IPC: images per class. Length and schedule: e epochs, s steps; 0.5/10e is a factor every ten
# epochs, 0.1@5000 a factor at a step. `lr` is the heads'. The first row whose pattern fits counts.
SETTINGS = """
recipe                          net          batch IPC length lr      backbone decay   schedule      warm BN         clip optimiser size
proxy_anchor_cub_bn_inception   bn_inception 180   0   60e    1e-4    1e-4     1e-4    0.5/10e       1    1          10   adamw     224
proxy_anchor_cub_resnet50       resnet50     120   0   60e    1e-4    1e-4     1e-4    0.5/5e        5    1          10   adamw     224
proxy_anchor_cars_bn_inception  bn_inception 180   0   60e    1e-4    1e-4     1e-4    0.5/20e       1    1          10   adamw     224
proxy_anchor_cars_resnet50      resnet50     120   0   60e    1e-4    1e-4     1e-4    0.5/10e       5    1          10   adamw     224
proxy_anchor_sop_*              bn_inception 180   0   60e    6e-4    6e-4     1e-4    0.25/20e      1    0          10   adamw     224
proxy_anchor_inshop_*           bn_inception 180   0   60e    6e-4    6e-4     1e-4    0.25/20e      1    0          10   adamw     224
amloss_cub_bn_inception         bn_inception 180   0   40e    1e-4    1e-4     1e-4    0.5/20e       1    1          10   adamw     224
amloss_cub_resnet50             resnet50     120   0   40e    1e-4    1e-4     1e-4    0.5/10e       5    1          10   adamw     224
amloss_cars_bn_inception        bn_inception 180   0   40e    1e-4    1e-4     1e-4    0.5/20e       1    1          10   adamw     224
amloss_cars_resnet50            resnet50     120   0   40e    1e-4    1e-4     1e-4    0.5/10e       5    1          10   adamw     224
amloss_sop_bn_inception         bn_inception 180   0   40e    6e-4    6e-4     1e-4    0.25/20e      1    0          10   adamw     224
amloss_sop_resnet50             resnet50     180   0   60e    6e-4    6e-4     1e-4    0.5/10e       5    0          10   adamw     224
amloss_inshop_bn_inception      bn_inception 180   0   40e    6e-4    6e-4     1e-4    0.25/20e      1    0          10   adamw     224
amloss_inshop_resnet50          resnet50     180   0   60e    6e-4    6e-4     1e-4    0.5/10e       5    0          10   adamw     224
ddml_cub_*                      bn_inception 180   0   60e    1e-4    1e-4     1e-4    0.5/10e       1    1          10   adamw     224
ddml_cars_*                     bn_inception 180   0   60e    1e-4    1e-4     1e-4    0.5/20e       1    1          10   adamw     224
ddml_sop_*                      bn_inception 180   0   60e    6e-4    6e-4     1e-4    0.25/20e      1    0          10   adamw     224
idml_cub_*                      resnet50     120   0   60e    6e-4    6e-4     1e-4    0.5/5e        5    1          10   adamw     224
idml_cars_*                     resnet50     120   0   60e    2.5e-4  2.5e-4   1e-4    0.5/10e       5    1          10   adamw     224
idml_sop_*                      resnet50     120   0   60e    6e-4    6e-4     1e-4    0.25/10e      5    1          10   adamw     224
sec_cub_triplet_*               bn_inception 120   3   8000s  0.5e-5  0.25e-5  2.5e-3  0.1@5000      0    affine     0    adam      227
sec_cub_semihtriplet_*          bn_inception 120   3   8000s  1e-5    0.5e-5   2.5e-3  0.1@5000      0    affine     0    adam      227
sec_cub_npair_*                 bn_inception 120   2   8000s  1e-5    0.5e-5   2.5e-3  0.1@5000      0    affine     0    adam      227
sec_cub_ms_*                    bn_inception 120   5   8000s  1e-5    0.5e-5   2.5e-3  0.1@3000,6000 0    affine     0    adam      227
sec_cars_ms_plain               bn_inception 120   5   8000s  2e-5    2e-5     2.5e-3  0.1@2000      0    affine     0    adam      227
sec_cars_ms_*                   bn_inception 120   5   8000s  1e-5    1e-5     2.5e-3  0.1@2000      0    affine     0    adam      227
sec_cars_npair_*                bn_inception 120   2   8000s  1e-5    1e-5     2.5e-3  0.1@2000      0    affine     0    adam      227
sec_cars_*                      bn_inception 120   3   8000s  1e-5    1e-5     2.5e-3  0.1@2000      0    affine     0    adam      227
sec_sop_npair_*                 bn_inception 120   2   12000s 2.5e-4  0.5e-4   1e-5    0.1@6000      0    affine     0    adam      227
sec_sop_ms_*                    bn_inception 120   5   12000s 2.5e-4  0.5e-4   1e-5    0.1@6000      0    affine     0    adam      227
sec_sop_*                       bn_inception 120   3   12000s 2.5e-4  0.5e-4   1e-5    0.1@6000      0    affine     0    adam      227
sec_inshop_npair_*              bn_inception 120   2   12000s 5e-4    1e-4     1e-5    0.1@6000      0    affine     0    adam      227
sec_inshop_ms_*                 bn_inception 120   5   12000s 5e-4    1e-4     1e-5    0.1@6000      0    affine     0    adam      227
sec_inshop_*                    bn_inception 120   3   12000s 5e-4    1e-4     1e-5    0.1@6000      0    affine     0    adam      227
divide_*                        resnet50     80    2   180e   1e-5    1e-5     1e-4    constant      0    statistics 0    adam      224
"""  # noqa: E501
HEADER, *ROWS = (line.split() for line in SETTINGS.strip().splitlines())

LOSSES = {
    "proxy_anchor": {"loss": "Proxy_Anchor", "alpha": 32, "mrg": 0.1, "proxy_lr_scale": 100},
    "amloss": {"loss": "AMLoss", "mrg": 0.1, "delta": 0.1, "lam": 1, "proxy_lr_scale": 100},
    "amloss_cub": {"alphap": 48, "alphan": 48},
    "amloss_cars": {"alphap": 48, "alphan": 48},
    "amloss_sop": {"alphap": 32, "alphan": 32},
    "amloss_inshop": {"alphap": 32, "alphan": 32},
    "ddml": {"loss": "Proxy_Anchor", "disent": True, "al": 1},
    "ddml_cub": {"be": 0.1, "gam": 1e-5},
    "ddml_cars": {"be": 0.1, "gam": 1e-3},
    "ddml_sop": {"be": 1, "gam": 1e-4},
    "idml": {"loss": "Proxy_Anchor", "introspective": "released", "mixup": 1, "l2_norm": 1},
    "sec": {"norm_momentum": 1, "pooling": "avg", "head_init": "default", "augment": "sec"},
    "sec_*_triplet": {"loss": "triplet"},
    "sec_*_semihtriplet": {"loss": "semihtriplet"},
    "sec_*_npair": {"loss": "n-npair"},
    "sec_*_ms": {"loss": "ms"},
    "sec_*_plain": {"sec_wei": 0, "l2reg_wei": 0},
    "sec_*_sec": {"sec_wei": 1, "l2reg_wei": 0, "head_norm": 1},
    "sec_*_l2": {"sec_wei": 0, "l2reg_wei": 1e-4, "head_norm": 1},
    "sec_*_ms_plain": {"head_norm": 0},
    "sec_*_triplet_plain": {"head_norm": 1},
    "sec_cub": {"eval_steps": 100},
    "sec_cars": {"eval_steps": 100},
    "sec_sop": {"eval_steps": 500},
    "sec_inshop": {"eval_steps": 200},
    "divide": {
        **{"loss": "MarginLoss", "margin": 0.2, "lr_beta": 0, "sampler": "distanceweighted"},
        **{"nb_clusters": 32, "mod_epoch": 2, "mod_epoch_freeze": 1, "seed": 4, "dropout": 0.01},
        **{"force_full_embedding_epoch": 80, "hierarchy_method": "top_bot", "mask_relu": 1},
        **{"batch_sampler": "adaptbalanced", "small_class_action": "sample_other"},
        **{"penultimate_for_clusters": 1, "masks_sum_for_full_emb": 0, "num_replicas": 1},
    },
    "divide_*_learned": {"fixed_mask": 0, "masking_lambda": 0.01},
    "divide_*_fixed": {"fixed_mask": 1},
}
"""What the loss and the method are built with; every pattern that a recipe's name starts with."""


def recipe(name: str) -> Path:
    return ROOT / "recipes" / f"{name}.txt"


def family(name: str) -> str:
    return name.split("_")[0].replace("proxy", "proxy_anchor")


def data_of(name: str) -> str:
    return name.removeprefix("proxy_anchor_").split("_")[0 if name.startswith("proxy") else 1]


def number(text: str) -> float | str | None:
    """A cell of a table of settings."""
    try:
        return None if text == "None" else float(text)
    except ValueError:
        return text


def settings(name: str) -> dict[str, float | str]:
    """The row of the table for a recipe."""
    row = next(row for row in ROWS if fnmatch(name, row[0]))
    return dict(zip(HEADER[1:], map(number, row[1:]), strict=True))


def parse(name: str, flags: str = "") -> argparse.Namespace:
    return options.parse_train([f"@{recipe(name)}", *flags.split()])


def schedule_words(args: argparse.Namespace) -> str:
    return {
        "step": f"{args.lr_decay_gamma:g}/{args.lr_decay_step}e",
        "milestones": f"{args.lr_decay_gamma:g}@{','.join(map(str, args.milestones))}",
        "constant": "constant",
    }[args.schedule]


# --- the tiny data they are run on ----------------------------------------------------------------


@contextmanager
def small_benchmarks(root: Path) -> Iterator[Path]:
    """All five benchmarks with few images, in the official layouts, and the embedded data.

    The galleries are too small for the published K (up to 1,000), so that K is 1 and 2 here.
    """
    with pytest.MonkeyPatch.context() as changed:
        for name in (*DATA_SETS, "vid"):
            official_layouts.write(name, "official", root, classes=12, images=6)
            entry = dataset.find(name)
            changed.setattr(type(entry), "protocol", replace(entry.protocol, ks=(1, 2)))
        (root / "emoji").symlink_to(ROOT / "data" / "emoji")
        yield root


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with small_benchmarks(tmp_path_factory.mktemp("data")) as root:
        yield root


def cut_down(name: str, root: Path, flags: str = "") -> argparse.Namespace:
    """The recipe on tiny data: few images a batch, four clusters instead of 32."""
    batch = 10 if parse(name).IPC == 5 else 12
    clusters = "--nb-clusters 4" if (parse(name).nb_clusters or 0) > 4 else ""
    shared = f"--data-root {root} --pretrained none --workers 0 --wandb disabled"
    return parse(name, f"{shared} --batch-size {batch} {clusters} {flags}")


# --- what they ask for ----------------------------------------------------------------------------


def test_there_is_a_recipe_for_every_published_row() -> None:
    assert not PUBLISHED_ROWS - set(RECIPES)


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_hold_no_flag_that_nobody_reads(name: str) -> None:
    assert not [note for note in options.notices(parse(name)) if "file of flags" in note]


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_ask_for_the_published_settings(name: str) -> None:
    args = parse(name)
    assert dataset.find(args.dataset).name == data_of(name)
    protocol = dataset.protocol(args.dataset)
    asked = {
        "net": args.model,
        "batch": args.batch_size,
        "IPC": args.IPC,
        "length": f"{args.steps}s" if args.steps else f"{args.epochs}e",
        "lr": args.lr,
        "backbone": args.lr if args.lr_p is None else args.lr_p,
        "decay": args.weight_decay,
        "schedule": schedule_words(args),
        "warm": args.warm,
        "BN": number(args.bn_freeze),
        "clip": args.clip,
        "optimiser": args.optimizer,
        "size": args.image_size or protocol.image_size,
    }
    assert asked == settings(name)
    assert args.embedding_size == 512
    assert_asks_for(name, args, LOSSES)


def assert_asks_for(name: str, args: argparse.Namespace, wanted: dict[str, dict]) -> None:
    """Options are those of every pattern of `wanted` that the recipe's name starts with."""
    for pattern, expected in wanted.items():
        if fnmatch(name, pattern) or fnmatch(name, f"{pattern}_*"):
            assert {option: getattr(args, option) for option in expected} == expected, pattern


def test_inputs_are_those_of_the_released_code() -> None:
    caffe, spherical = INPUTS["caffe"], INPUTS["spherical"]
    assert (caffe.color, caffe.scale, caffe.mean) == ("BGR", 255, (104, 117, 128))
    assert (spherical.color, spherical.scale, spherical.mean) == ("BGR", 255, (104, 117, 123))
    for name in PUBLISHED:
        expected = "spherical" if name.startswith("sec") else None  # None: the network's own
        assert parse(name).input_spec == expected, name


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_tell_what_was_published_and_where(name: str) -> None:
    text = recipe(name).read_text(encoding="utf-8")
    title, published, *rest = re.sub("\n#   ", " ", text).splitlines()
    notes = [line for line in rest if line.startswith("#")]
    network = {"bn_inception": "BN-Inception", "resnet50": "ResNet-50"}[parse(name).model]
    assert title.startswith("# ") and network in title
    assert published.startswith("# Published: ") and "authors" in published
    assert re.search(r"R@1 \d\d\.\d", published)
    assert any(line.startswith("# Deviation: ") and "--amp off" in line for line in notes)
    assert all(len(line) <= 100 for line in text.splitlines())


PUBLISHED_R1 = """
proxy_anchor_cub_bn_inception 69.1  proxy_anchor_cars_bn_inception 86.4  proxy_anchor_sop_bn_inception 79.2
proxy_anchor_inshop_bn_inception 91.9  proxy_anchor_cub_resnet50 69.9  proxy_anchor_cars_resnet50 87.7
amloss_cub_bn_inception 69.0  amloss_cars_bn_inception 87.0  amloss_sop_bn_inception 78.7
amloss_inshop_bn_inception 92.0  amloss_cub_resnet50 70.2  amloss_cars_resnet50 89.4
amloss_sop_resnet50 80.5  amloss_inshop_resnet50 92.8
ddml_cub_bn_inception 70.0  ddml_cars_bn_inception 87.9  ddml_sop_bn_inception 79.9
idml_cub_resnet50 70.7  idml_cars_resnet50 90.6  idml_sop_resnet50 81.5
divide_cub_fixed 67.39  divide_cub_learned 67.71  divide_cars_fixed 87.22  divide_cars_learned 86.90
divide_sop_fixed 79.50  divide_sop_learned 79.80  divide_inshop_fixed 89.84  divide_inshop_learned 90.49
divide_vid_fixed 94.01  divide_vid_learned 93.93
sec_cub_ms_plain 66.14  sec_cub_ms_sec 68.79  sec_cars_ms_plain 84.07  sec_cars_ms_sec 85.73
sec_sop_ms_plain 76.29  sec_sop_ms_sec 78.67  sec_inshop_ms_plain 88.11  sec_inshop_ms_sec 89.87
sec_cub_semihtriplet_plain 65.31  sec_cub_semihtriplet_sec 67.35  sec_cars_semihtriplet_plain 80.17
sec_cars_semihtriplet_sec 85.19  sec_sop_semihtriplet_plain 74.46  sec_sop_semihtriplet_sec 77.59
sec_inshop_semihtriplet_plain 87.16  sec_inshop_semihtriplet_sec 89.68  sec_cub_npair_plain 61.36
sec_cub_npair_sec 66.00  sec_cars_npair_plain 78.59  sec_cars_npair_sec 82.29  sec_sop_npair_plain 74.30
sec_sop_npair_sec 76.89  sec_inshop_npair_plain 86.43  sec_inshop_npair_sec 88.63
sec_cub_triplet_plain 53.34  sec_cub_triplet_sec 60.82  sec_cars_triplet_plain 60.79
sec_cars_triplet_sec 67.89  sec_sop_triplet_plain 62.69  sec_sop_triplet_sec 68.86
sec_inshop_triplet_plain 82.12  sec_inshop_triplet_sec 85.29
sec_cub_triplet_l2 54.81  sec_cars_triplet_l2 63.02  sec_sop_triplet_l2 64.07  sec_inshop_triplet_l2 83.01
sec_cub_semihtriplet_l2 65.60  sec_cars_semihtriplet_l2 82.60  sec_sop_semihtriplet_l2 74.88
sec_inshop_semihtriplet_l2 88.04  sec_cub_npair_l2 64.58  sec_cars_npair_l2 81.87  sec_sop_npair_l2 75.11
sec_inshop_npair_l2 86.54  sec_cub_ms_l2 65.67  sec_cars_ms_l2 84.82  sec_sop_ms_l2 77.34
sec_inshop_ms_l2 88.51
""".split()  # noqa: E501


def test_recipes_name_the_published_r1() -> None:
    expected = dict(zip(PUBLISHED_R1[::2], PUBLISHED_R1[1::2], strict=True))
    assert set(expected) == PUBLISHED_ROWS
    for name, value in expected.items():
        assert f"R@1 {value}," in recipe(name).read_text(encoding="utf-8"), name


# --- what is optimised, how -----------------------------------------------------------------------


def expected_groups(name: str) -> dict[str, tuple[float, float]]:
    """Group → (learning rate, weight decay), as the released code has them."""
    row = settings(name)
    lr, backbone, decay = row["lr"], row["backbone"], row["decay"]
    groups = {"backbone": (backbone, decay), "head": (lr, decay)}
    if name.startswith("sec"):
        groups["backbone vectors"] = (backbone, 0)
        if not name.endswith("ms_plain"):  # no BatchNorm before its head
            groups["head vectors"] = (lr, 0)
    elif name.startswith("divide"):
        groups["masks"] = (100 * lr, decay) if name.endswith("learned") else (0, 0)
    else:
        groups["proxies"] = (100 * lr, decay)
    if name.startswith("amloss"):
        groups["margins"] = (1e-4, 1e-4)
    return groups


TINY_NETWORK = "--model resnet10 --width 0.125 --embedding-size 32"


@pytest.mark.parametrize("name", PUBLISHED)
def test_optimiser_groups_are_the_published_ones(name: str, data: Path) -> None:
    training = train.prepare(cut_down(name, data, TINY_NETWORK))
    optimisers, row = training.optimisers, settings(name)
    print(name, *optimisers.describe(), sep="\n")  # pytest -rP shows the groups of every recipe
    built = {group["name"]: (group["lr"], group["weight_decay"]) for group in optimisers.groups}
    assert built == {group: pytest.approx(pair) for group, pair in expected_groups(name).items()}
    assert set(optimisers.kinds) == {row["optimiser"]}
    assert optimisers.clipping.entry == row["clip"]
    assert [r.epochs for r in training.routines if isinstance(r, Warmup)] == (
        [row["warm"]] if row["warm"] else []
    )


@pytest.mark.parametrize("name", PUBLISHED)
def test_learning_rates_follow_the_published_schedule(name: str, data: Path) -> None:
    optimisers = train.prepare(cut_down(name, data, TINY_NETWORK)).optimisers
    schedule, margins = str(settings(name)["schedule"]), name.startswith("amloss")

    def factors(epoch: int, step: int) -> dict[str, float]:
        optimisers.set_learning_rates(epoch, step)
        return {g["name"]: g["lr"] / g["base_lr"] for g in optimisers.groups if g["base_lr"]}

    if "/" in schedule:
        gamma, every = schedule.removesuffix("e").split("/")
        points = [
            (k * int(every) + past, 0, float(gamma) ** k) for k in (1, 2) for past in (0, 1, 4)
        ]
        points.append((int(every) - 1, 10**6, 1.0))
    elif "@" in schedule:
        gamma, steps = schedule.split("@")
        points = [(0, 0, 1.0)]
        for passed, step in enumerate(map(int, steps.split(",")), 1):
            before, after = float(gamma) ** (passed - 1), float(gamma) ** passed
            points += [(99, step - 1, before), (99, step, after)]
    else:
        points = [(0, 0, 1.0), (179, 10**6, 1.0)]
    for epoch, step, factor in points:
        found = factors(epoch, step)
        if margins:  # half every ten epochs, whatever the rest does
            assert found.pop("margins") == pytest.approx(0.5 ** (epoch // 10))
        assert found == dict.fromkeys(found, pytest.approx(factor)), (epoch, step)


@pytest.mark.parametrize("name", ["sec_cub_triplet_sec", "sec_sop_ms_plain"])
def test_sec_decays_all_but_the_batch_norms(name: str, data: Path) -> None:
    training = train.prepare(cut_down(name, data, "--image-size 64"))
    decays = {p: g["weight_decay"] for g in training.optimisers.groups for p in g["params"]}
    norms, others = {}, {}
    for module in training.network.modules():
        normalises = isinstance(module, (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d))
        for parameter in module.parameters(recurse=False):
            (norms if normalises else others)[parameter] = decays[parameter]
    assert set(norms.values()) == {0.0}
    assert set(others.values()) == {settings(name)["decay"]}
    assert any(p.dim() == 1 for p in others)  # the biases


# --- BatchNorm ------------------------------------------------------------------------------------


def batch_norms(network: torch.nn.Module) -> dict[str, list[torch.Tensor]]:
    """Copies of the convolutions, and of BatchNorm's scales and shifts and running statistics."""
    found: dict[str, list[torch.Tensor]] = {"convolutions": [], "affine": [], "statistics": []}
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            found["convolutions"].append(module.weight.detach().clone())
        if isinstance(module, torch.nn.BatchNorm2d):
            found["affine"] += [module.weight.detach().clone(), module.bias.detach().clone()]
            found["statistics"] += [module.running_mean.clone(), module.running_var.clone()]
    return found


@pytest.mark.parametrize(
    ("flags", "in_the_warm_up", "after_it"),
    [
        # The released loop sets requires_grad of everything when the warm-up ends, BatchNorms too.
        ("--bn-freeze 1 --warm 1", set(), {"convolutions", "affine"}),
        ("--bn-freeze affine --warm 1", set(), {"convolutions"}),
        ("--bn-freeze 1 --warm 0", {"convolutions"}, {"convolutions"}),
        ("--freeze_bn 1 --warm 0", {"convolutions"}, {"convolutions"}),
        ("--bn-freeze statistics --warm 0", {"convolutions", "affine"}, {"convolutions", "affine"}),
        ("--bn-freeze 0 --warm 1", {"statistics"}, {"convolutions", "affine", "statistics"}),
    ],
)
def test_what_moves_during_and_after_a_warm_up(
    flags: str, in_the_warm_up: set[str], after_it: set[str], images: Path
) -> None:
    training = tiny.prepare(images, f"{flags} --lr 1e-2 --amp off")
    for expected in (in_the_warm_up, after_it):
        before = batch_norms(training.network)
        train.advance(training)  # one epoch
        after = batch_norms(training.network)
        moved = {
            part
            for part in before
            if any(not torch.equal(a, b) for a, b in zip(before[part], after[part], strict=True))
        }
        assert moved == expected


# --- two steps of each ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[] if name in RUN_IN_THE_FAST_SET else pytest.mark.slow)
        for name in RECIPES
    ],
)
def test_recipes_run(name: str, data: Path, tmp_path: Path) -> None:
    narrow = name in RUN_IN_THE_FAST_SET and parse(name).model == "resnet50"
    width = "--width 0.25" if narrow else ""
    short = f"--max-steps 2 --image-size 64 --LOG_DIR {tmp_path} --name {name} {width}"
    train.main(cut_down(name, data, short))
    *_, row = tiny.metrics_rows(tmp_path / name)
    assert int(row["step"]) == 2 and math.isfinite(float(row["loss"]))
    assert 0 <= float(row["R@1"]) <= 1
    stored, size = tiny.saved(tmp_path / name, "best"), parse(name).embedding_size
    heads = 2 if parse(name).disent else 1  # DDML's have twice the width
    assert stored["model_state_dict"]["model.embedding.weight"].shape[0] == heads * size
    assert stored["args"]["loss"] == parse(name).loss


# --- the commands as printed ----------------------------------------------------------------------

PROXY_ANCHOR = """
--gpu-id 0 --loss Proxy_Anchor --model bn_inception --embedding-size 512 --batch-size 180 --lr 6e-4
--dataset SOP --warm 1 --bn-freeze 0 --l2-norm 1 --lr-decay-step 20 --lr-decay-gamma 0.25
"""
AMLOSS = """
--gpu-id 0 --loss AMLoss --model bn_inception --embedding-size 512 --batch-size 180 --lr 1e-4
--dataset cub --warm 1 --bn-freeze 1 --lr-decay-step 20 --alphap 48 --alphan 48
"""
AMLOSS_RESNET = """
--gpu-id 0 --loss AMLoss --model resnet50 --embedding-size 512 --batch-size 180 --lr 6e-4
--dataset SOP --warm 5 --bn-freeze 0 --lr-decay-step 10 --lr-decay-gamma 0.5 --epoch 60
"""
AMLOSS_FEW = """
--gpu-id 0 --loss AMLoss --model resnet50 --embedding-size 512 --batch-size 120 --lr 1e-4
--dataset cub --warm 5 --bn-freeze 1 --lr-decay-step 10 --alphap 48 --alphan 48
"""
AMLOSS_SOP = """
--gpu-id 0 --loss AMLoss --model bn_inception --embedding-size 512 --batch-size 180 --lr 6e-4
--dataset SOP --warm 1 --bn-freeze 0 --lr-decay-step 20 --lr-decay-gamma 0.25
"""
DDML = """
--gpu-id 0 --loss Proxy_Anchor --model bn_inception --embedding-size 512 --batch-size 180 --lr 1e-4
--dataset car --warm 1 --bn-freeze 1 --lr-decay-step 20 --disent True --al 1.0 --be 0.1 --gam 0.001
"""
IDML = """
--gpu -1 --loss Proxy_Anchor --model resnet50 --embedding-size 512 --batch-size 120 --lr 6e-4
--dataset SOP --warm 5 --bn-freeze 1 --lr-decay-step 10 --lr-decay-gamma 0.25
"""
SEC = "--use_dataset CUB --instances 3 --lr 0.5e-5 --lr_p 0.25e-5 --lr_gamma 0.1 --use_loss triplet"
DIVIDE = """
--experiment margin_loss_resnet50 --dataset=sop -i=NAME -seed=4 --sz-embedding=512 --mod-epoch=2
--nb-clusters=32 --nb-epochs=180 --batch-size=80 --num-samples-per-class=2 --backend=faiss-gpu
--lr-gamma=0.3 --mod-epoch-freeze=1 --sampler=distanceweighted --weight-decay=1e-4
--batch-sampler=adaptbalanced --force-full-embedding-epoch=80 --mask-lr-mult=100
--masking-lambda=0.01 --mask-wd-mult=1 --dataset-dir=data
"""


@pytest.mark.parametrize(
    ("command", "name", "differing"),
    [
        (PROXY_ANCHOR, "proxy_anchor_sop_bn_inception", set()),
        (AMLOSS, "amloss_cub_bn_inception", set()),
        (AMLOSS.replace("dataset cub", "dataset cars"), "amloss_cars_bn_inception", set()),
        (AMLOSS_FEW, "amloss_cub_resnet50", set()),
        (AMLOSS_FEW.replace("dataset cub", "dataset cars"), "amloss_cars_resnet50", set()),
        (AMLOSS_SOP, "amloss_sop_bn_inception", set()),
        (AMLOSS_RESNET, "amloss_sop_resnet50", set()),
        (AMLOSS_RESNET.replace("dataset SOP", "dataset Inshop"), "amloss_inshop_resnet50", set()),
        (DDML, "ddml_cars_bn_inception", set()),
        (IDML, "idml_sop_resnet50", {"introspective", "mixup"}),
        (SEC, "sec_cub_triplet_plain", set()),
        (f"{SEC} --sec_wei 1.0", "sec_cub_triplet_sec", set()),
        (f"{SEC} --l2reg_wei 1e-4", "sec_cub_triplet_l2", set()),
        (DIVIDE, "divide_sop_learned", {"name", "backend", "lr_gamma"}),
    ],
)
def test_printed_commands_are_the_recipes(command: str, name: str, differing: set[str]) -> None:
    printed = vars(options.parse_train(command.split()))
    of_recipe = vars(parse(name))
    told = {"given", "command", "recipe"}  # how it was said, not what
    assert {key for key in printed if printed[key] != of_recipe[key]} - told == differing


def test_printed_command_of_divide_and_conquer_runs(data: Path, tmp_path: Path) -> None:
    flags = (
        f"--data-root {data} --LOG_DIR {tmp_path} --pretrained none --max-steps 2 --workers 0 "
        f"--wandb disabled --image-size 64 --batch-size 8 --nb-clusters 4 {TINY_NETWORK}"
    )
    args = options.parse_train([*DIVIDE.split(), *flags.split()])
    train.main(args)
    assert (tmp_path / "NAME" / "results.json").is_file()
    said = train.describe(train.prepare(args))
    assert "--lr-gamma changes nothing" in said and "--backend changes nothing" in said
    assert "--mod-epoch" not in said


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--gpu -1", {"gpu_id": -1}),
        ("--epoch 3", {"epochs": 3}),
        ("--dataset car", {"dataset": "car"}),
        ("--use_dataset Inshop --use_loss ms", {"dataset": "Inshop", "loss": "ms", "steps": 12000}),
        ("-i=NAME -seed=4", {"name": "NAME", "seed": 4}),
        ("--arch resnet50", {"model": "resnet50"}),
        ("--use_dataset CUB --use_loss ms --freeze_bn 1", {"bn_freeze": "1", "lr": 1e-5}),
        ("--use_loss ms --use_dataset SOP --sec_wei 1 --norm_momentum 0.5", {"norm_momentum": 0.5}),
        ("--use_dataset Cars --use_loss triplet --lr_gamma 0.5", {"milestones": (4000, 6000)}),
        ("--experiment margin_loss_resnet50 -crs=3", {"clustering_random_state": 3, "lr": 1e-5}),
        (
            "--experiment margin_loss_resnet50 --criterion NPairsLoss --optimizer AdamW",
            {"loss": "NPairsLoss", "alpha": 1, "lr_alpha": 1, "optimizer": "adamw"},
        ),
        (
            "--experiment margin_loss_resnet50 --base-lr 1e-4 --num-workers 2 --cuda-device 1",
            {"lr": 1e-4, "workers": 2, "gpu_id": 1, "IPC": 4, "batch_size": 128},
        ),
        (
            "--experiment margin_loss_resnet50 --sz-crop 256 --sz-resize 288",
            {"image_size": 256, "eval_resize": 288},
        ),
        (
            "--experiment margin_loss_resnet50 --features-pooling max --hierarchy-method bot_top",
            {"pooling": "max", "hierarchy_method": "none"},
        ),
        (
            "--experiment margin_loss_resnet50 --log-dir x --clustering-method kmeans "
            "--ratio-classes 1.0 --wandb-enabled --verbose --is-debug --save-model 2 "
            "--save-masks 1 --lr-step 3 --emb-lr-mult 1 --with-l1 --init-clusters 2 "
            "--reset-learners-fix 1 --backend torch+sklearn",
            {"LOG_DIR": "x", "nb_clusters": 1},
        ),
    ],
)
def test_flags_of_published_commands(flags: str, expected: dict[str, object]) -> None:
    args = options.parse_train(flags.split())
    assert {name: getattr(args, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--album Sepia", ["--augment/--album", "Sepia", "ColorHeavy"]),
        ("--ratio-classes 0", ["--ratio-classes", "above 0"]),
        ("--clustering-method spectral", ["--clustering-method", "kmeans_adaptive_centroids"]),
        ("--hierarchy-method sideways", ["--hierarchy-method", "top_bot"]),
        ("--lr_gamma 0.3", ["--lr-decay-gamma", "--schedule step"]),
    ],
)
def test_what_would_change_results_is_refused(
    flags: str, words: list[str], capsys: pytest.CaptureFixture
) -> None:
    command = ["--experiment", "margin_loss_resnet50", *flags.split()]
    said = refusal(capsys, options.parse_train, command)
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--lr-gamma 0.3", ["--lr-gamma", "divide and conquer"]),
        ("--clustering-method kmeans", ["--clustering-method", "divide and conquer"]),
        ("--verbose", ["--verbose", "divide and conquer"]),
        ("--norm_momentum 0.5", ["--norm_momentum", "--sec_wei"]),
        ("--epochs 3 --steps 4", ["--epochs", "--steps"]),
        ("--eval-every 3 --eval-steps 4", ["--eval-every", "--eval-steps"]),
        ("--val-classes 0.2 --val-fold 1", ["--val-classes", "--val-fold"]),
        ("--dataset cub --decay-biases 1", ["--decay-biases", "--decay-vectors 0"]),
        ("--dataset emoji --eval-resize 256", ["--eval-resize", "photographs"]),
    ],
)
def test_flags_that_nobody_reads_name_who_would(
    flags: str, words: list[str], capsys: pytest.CaptureFixture
) -> None:
    said = refusal(capsys, options.parse_train, flags.split())
    for word in words:
        assert word in said


def test_epochs_given_to_a_run_by_steps_are_obeyed() -> None:
    by_steps = options.parse_train("--use_dataset CUB --use_loss ms".split())
    by_epochs = options.parse_train(
        "--use_dataset CUB --use_loss ms --epochs 7 --eval-every 2".split()
    )
    assert (by_steps.steps, by_steps.eval_steps) == (8000, 100)
    assert (by_epochs.steps, by_epochs.eval_steps) == (None, None)
    assert (by_epochs.epochs, by_epochs.eval_every) == (7, 2)


@pytest.mark.parametrize("known", DATA_SETS)
def test_spherical_settings_know_every_spelling_of_a_data_set(known: str) -> None:
    spellings = {known, known.upper(), *dataset.find(known).aliases}
    found = {options.parse_train(["--use_loss", "ms", "--dataset", s]).lr_p for s in spellings}
    assert found == {{"cub": 0.5e-5, "cars": 1e-5, "sop": 0.5e-4, "inshop": 1e-4}[known]}


# --- the size that evaluation cuts from -----------------------------------------------------------


def test_eval_resize_decides_what_evaluation_sees(images: Path) -> None:
    pictures = {}
    for flags in ("", "--sz-resize 37", "--sz-resize 64"):
        training = tiny.prepare(images, flags)
        task, network = training.data.test[0], training.network
        loader = eval_loader(
            task.queries, spec=network.input, device=torch.device("cpu"), **vars(training.viewing)
        )
        pictures[flags] = next(iter(loader)).images
    # 32 pixels are cut from 37 without the flag, as 224 from 256.
    assert torch.equal(pictures[""], pictures["--sz-resize 37"])
    assert pictures["--sz-resize 64"].shape == pictures[""].shape
    assert not torch.allclose(pictures["--sz-resize 64"], pictures[""], atol=0.1)


def test_a_checkpoint_remembers_eval_resize(images: Path, tmp_path: Path) -> None:
    training = tiny.prepare(images, "--eval-resize 48")
    torch.save(training.best_checkpoint([]), tmp_path / "x.pth")
    assert open_checkpoint(tmp_path / "x.pth").viewing.resize == 48


def test_eval_resize_below_the_image_size_is_refused(
    images: Path, capsys: pytest.CaptureFixture
) -> None:
    said = refusal(capsys, tiny.parse, images, "--eval-resize 20")
    assert re.search(r"--eval-resize 20 .* 32 pixels .* at least 32", said)
