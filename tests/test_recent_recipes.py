"""Recipes on networks of timm and for the losses of 2022 to 2024: constants, and that they run.

The constants come from the authors' scripts and configurations, the numbers from the tables in
their repositories; both stand here a second time, so that neither can change by itself.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest
import tiny
from conftest import ROOT, run_cli
from test_recipes import DATA_SETS, assert_asks_for, number, parse, recipe, small_benchmarks

import criteria
import dataset
import evaluate
import options
import train
from evaluation.networks import open_checkpoint
from training.describing import describe

SMALL_VITS = ("deit", "dino", "vit")
FROZEN = ("dino", "vit", "dinov2", "dinov3", "clip", "siglip2")
NAMES = sorted(
    (
        *(f"{k}_{d}_{n}" for k in ("sph", "hyp", "hier") for d in DATA_SETS for n in SMALL_VITS),
        *(f"rsk_{d}_{n}" for d in ("cub", "cars", "sop", "vid") for n in ("resnet50", "vitb16")),
        *(f"vptsp_{d}_{n}" for d in DATA_SETS for n in ("vits", "vitb")),
        *(f"unicom_{d}_clip" for d in ("sop", "inshop")),
        *(f"frozen_{d}_{n}" for d in DATA_SETS for n in FROZEN),
        "dinov2_cub",
    )
)
RUN_IN_THE_FAST_SET = {"sph_cub_dino", "hier_cub_deit", "vptsp_cub_vits", "dinov2_cub"}

# --- the authors' constants -----------------------------------------------------------------------

# Length: e epochs, s steps. `lr` is the heads'. The first row whose pattern fits counts.
SETTINGS = """
recipe                loss         batch IPC length lr     backbone decay  schedule  warm clip norm optimiser d   crop
[hs][yp][ph]_cub_dino pairs        900   9   50s    1e-5   1e-5     1e-2   constant  0    0    3    adamw     128 0.2
[hs][yp][ph]_cub_*    pairs        900   9   50s    3e-5   3e-5     1e-2   constant  0    0    3    adamw     128 0.2
[hs][yp][ph]_cars_dino pairs        882   9   300s   1e-5   1e-5     1e-2   constant  0    0    3    adamw     128 0.2
[hs][yp][ph]_cars_*   pairs        882   9   300s   3e-5   3e-5     1e-2   constant  0    0    3    adamw     128 0.2
[hs][yp][ph]_sop_dino pairs        900   2   5000s  1e-5   1e-5     1e-2   constant  0    0    3    adamw     128 0.2
[hs][yp][ph]_sop_*    pairs        900   2   5000s  3e-5   3e-5     1e-2   constant  0    0    3    adamw     128 0.2
[hs][yp][ph]_inshop_dino pairs        900   2   3200s  1e-5   1e-5     1e-2   constant  0    0    3    adamw     128 0.2
[hs][yp][ph]_inshop_* pairs        900   2   3200s  3e-5   3e-5     1e-2   constant  0    0    3    adamw     128 0.2
hier_cub_dino         HIER         180   2   100e   5e-6   5e-6     1e-2   constant  1    10   0    adamw     128 0.2
hier_cars_dino        HIER         180   2   100e   5e-6   5e-6     1e-2   constant  1    10   0    adamw     128 0.2
hier_cub_*            HIER         180   2   100e   1e-5   1e-5     1e-2   constant  1    10   0    adamw     128 0.2
hier_cars_*           HIER         180   2   100e   1e-5   1e-5     1e-2   constant  1    10   0    adamw     128 0.2
hier_*_dino           HIER         180   2   150e   5e-4   5e-6     1e-4   constant  5    10   0    adamw     128 0.2
hier_*                HIER         180   2   150e   1e-3   1e-5     1e-4   constant  5    10   0    adamw     128 0.2
rsk_sop_resnet50      RecallAtK    4000  4   55e    2e-4   2e-4     4e-4   25,50     0    0    0    adam      512 None
rsk_sop_vitb16        RecallAtK    4000  4   55e    5e-5   5e-5     4e-4   25,50     0    0    0    adamw     512 None
rsk_vid_resnet50      RecallAtK    4000  4   90e    1e-4   1e-4     4e-4   40,70     0    0    0    adam      512 None
rsk_vid_vitb16        RecallAtK    4000  4   90e    5e-5   5e-5     4e-4   40,70     0    0    0    adamw     512 None
rsk_cars_resnet50     RecallAtK    392   4   170e   1e-4   1e-4     4e-4   80,140    0    0    0    adam      512 None
rsk_cars_vitb16       RecallAtK    392   4   50e    1e-5   1e-5     4e-4   20,30,40  0    0    0    adamw     512 None
rsk_cub_resnet50      RecallAtK    400   4   40e    1e-4   1e-4     4e-4   10,20,30  0    0    0    adam      512 None
rsk_cub_vitb16        RecallAtK    400   4   40e    1e-5   1e-5     4e-4   10,20,30  0    0    0    adamw     512 None
vptsp_cub_vits        Proxy_Anchor 64    2   15e    5e-3   5e-3     1e-6   cosine    0    0    0    sgd       384 None
vptsp_cub_vitb        Proxy_Anchor 64    2   60e    1e-3   1e-3     1e-6   cosine    0    0    0    sgd       512 None
vptsp_cars_vits       Proxy_Anchor 64    2   50e    5e-4   5e-4     0      cosine    0    0    0    adamw     384 None
vptsp_cars_vitb       Proxy_Anchor 64    2   60e    5e-4   5e-4     0      cosine    0    0    0    adamw     512 None
vptsp_sop_vits        Proxy_Anchor 32    1   120e   1e-4   1e-4     1e-4   cosine    0    0    0    adamw     384 None
vptsp_sop_vitb        Proxy_Anchor 32    1   120e   1e-4   1e-4     1e-4   cosine    0    0    0    adamw     512 None
vptsp_inshop_vits     Proxy_Anchor 32    1   80e    1e-4   1e-4     1e-7   cosine    0    0    0    adamw     384 None
vptsp_inshop_vitb     Proxy_Anchor 32    1   75e    1e-4   1e-4     0      cosine    0    0    0    adamw     512 None
unicom_sop_clip       ArcFace      64    0   64e    1e-5   1e-5     0      onecycle  0    0    0    adamw     512 None
unicom_inshop_clip    ArcFace      64    0   128e   1e-5   1e-5     0      onecycle  0    0    0    adamw     512 None
"""  # noqa: E501
HEADER, *ROWS = (line.split() for line in SETTINGS.strip().splitlines())
STEPS_AN_EPOCH = {
    "sop": 59551 // 4000,
    "vid": 113346 // 4000,
    "cars": 8054 // 392,
    "cub": 5864 // 400,
}

OTHERS = {
    "sph": {"loss": "Sph", "freeze_stem": True, "head_init": "orthogonal", "head": "training"},
    "hyp": {"loss": "Hyp", "freeze_stem": True, "head_init": "orthogonal", "head": "training"},
    "hier": {
        **{"head_norm": "layer-plain", "head_init": "orthogonal", "freeze_stem": True},
        **{"IPC_repeat": 1, "adam_eps": 1e-4, "eval_resize": 256, "head": "linear"},
    },
    "rsk": {"head_norm": "layer", "head_init": "default", "lr_decay_gamma": 0.3},
    "rsk_sop_resnet50": {"micro_batch": 200},
    "rsk_vid_resnet50": {"micro_batch": 200},
    "rsk_sop_vitb16": {"micro_batch": 100},
    "rsk_vid_vitb16": {"micro_batch": 100},
    "rsk_*_resnet50": {"pooling": "gem", "bn_freeze": "statistics", "model": "resnet50"},
    "rsk_*_vitb16": {"pooling": "cls", "input_spec": "imagenet", "eval_resize": 256},
    "vptsp": {"alpha": 32, "mrg": 0.1, "head_norm": "layer", "lr_warmup": 0},
    "vptsp_cub_vits": {"peft": "prompts:10,bitfit", "proxy_lr_scale": 20, "nesterov": 0},
    "vptsp_cub_vitb": {"peft": "prompts:20,bitfit", "proxy_lr_scale": 10, "nesterov": 0},
    "vptsp_cars": {"peft": "prompts:80,bitfit", "proxy_lr_scale": 20},
    "vptsp_sop": {"peft": "prompts:90,bitfit", "proxy_lr_scale": 500},
    "vptsp_inshop": {"peft": "prompts:90,bitfit", "proxy_lr_scale": 500},
    "unicom": {"loss_args": [("margin", 0.25), ("scale", 32), ("proxy_lr_scale", 10)]},
    "unicom_sop": {"augment": "none"},
    "frozen": {"freeze_blocks": "all"},
}
"""What else they ask for; every pattern that a recipe's name starts with."""

# R@1 of the tables in the authors' repositories: CUB, Cars, SOP, In-Shop.
NUMBERS = {
    "sph_*_deit": "76.2 81.7 82.5 89.6",
    "sph_*_dino": "78.7 86.6 82.2 90.1",
    "sph_*_vit": "85.1 81.7 82.1 90.4",
    "hyp_*_deit": "77.8 86.4 83.3 90.5",
    "hyp_*_dino": "80.9 89.2 85.1 92.4",
    "hyp_*_vit": "85.6 86.5 85.9 92.5",
    "hier_*_deit": "75.2 85.1 82.5 91.0",
    "hier_*_dino": "78.5 88.4 84.9 92.6",
    "hier_*_vit": "84.2 86.4 85.6 92.7",
    "vptsp_*_vits": "86.6 87.7 84.4 91.2",
    "vptsp_*_vitb": "88.5 91.2 86.8 92.5",
    "frozen_*_dino": "70.8 42.9 63.4 46.1",
    "frozen_*_vit": "83.1 47.8 62.1 43.2",
}
RSK_PUBLISHED = {"rsk_sop_vitb16": "88.0", "rsk_cars_vitb16": "89.5"}
OTHER_NUMBERS = {
    **RSK_PUBLISHED,
    **{"unicom_sop_clip": "88.8", "unicom_inshop_clip": "95.5"},
}


def data_of(name: str) -> str:
    return next(part for part in name.split("_") if part in (*DATA_SETS, "vid"))


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith(("frozen", "dinov2"))])
def test_recipes_ask_for_the_authors_settings(name: str) -> None:
    args = parse(name)
    row = next(row for row in ROWS if fnmatch(name, row[0]))
    expected = dict(zip(HEADER[1:], map(number, row[1:]), strict=True))
    schedule = args.schedule
    if schedule == "milestones":
        schedule = ",".join(f"{step / STEPS_AN_EPOCH[data_of(name)]:g}" for step in args.milestones)
    asked = {
        "loss": "pairs" if args.loss in ("Hyp", "Sph") else args.loss,
        "batch": args.batch_size,
        "IPC": args.IPC,
        "length": f"{args.steps}s" if args.steps else f"{args.epochs}e",
        "lr": args.lr,
        "backbone": args.lr if args.lr_p is None else args.lr_p,
        "decay": args.weight_decay,
        "schedule": schedule,
        "warm": args.warm,
        "clip": args.clip,
        "norm": args.clip_norm,
        "optimiser": args.optimizer,
        "d": args.embedding_size,
        "crop": args.crop_scale,
    }
    assert asked == expected
    assert dataset.find(args.dataset).name == data_of(name)
    assert args.image_size == 224
    assert_asks_for(name, args, OTHERS)


def test_the_loss_of_hier_has_the_authors_constants() -> None:
    """Proxies learn 10,000 times as fast as the network and ancestors 50 times, whatever --lr."""
    names = [name for name in NAMES if name.startswith("hier")]
    assert names
    for name in names:
        args = parse(name)
        loss = criteria.load(criteria.LOSSES[args.loss])(
            4, args.embedding_size, **dict(args.loss_args or ())
        )
        told = (loss.weight, loss.hierarchy_margin, loss.tau, loss.topk, len(loss.ancestors))
        assert told == (0.5, 0.1, 0.1, 20, 512), name
        assert (loss.curvature, loss.clip, loss.margin, loss.alpha) == (0.1, 2.3, 0.1, 32), name
        backbone = args.lr if args.lr_p is None else args.lr_p
        rates = [group["lr"] / backbone for group in loss.parameter_groups(args.lr)]
        assert rates == pytest.approx([1e4, 50]), name


@pytest.mark.parametrize("name", NAMES)
def test_recipes_say_what_was_published_and_hold_no_flag_that_nobody_reads(name: str) -> None:
    text = recipe(name).read_text(encoding="utf-8")
    title, published, *notes = re.sub("\n#   ", " ", text).splitlines()
    assert title.startswith("# ") and re.search(r"d = \d+\.$", title)
    assert published.startswith(("# Published: ", "# Reference: "))
    assert all(len(line) <= 100 for line in text.splitlines())
    assert not [note for note in options.notices(parse(name)) if "file of flags" in note]
    # The page compares a run with what is called published: only where the whole method is here.
    compared = name.startswith(("sph", "hyp", "hier")) or name in RSK_PUBLISHED
    assert published.startswith("# Published: ") == compared
    ours = name.startswith(("frozen", "dinov2"))
    assert any(line.startswith("# Deviation: ") for line in notes) != ours
    assert ("ours" in published) == ours


def test_recipes_name_the_published_r1() -> None:
    expected = dict(OTHER_NUMBERS)
    for pattern, values in NUMBERS.items():
        names = [pattern.replace("*", data) for data in DATA_SETS]
        expected |= dict(zip(names, values.split(), strict=True))
    for name, value in expected.items():
        line = re.sub("\n#   ", " ", recipe(name).read_text(encoding="utf-8")).splitlines()[1]
        assert re.search(rf"R@1 {value}\b", line), name
    unknown = set(NAMES) - set(expected)
    assert all(not re.search(r"R@1 \d", recipe(name).read_text()) for name in unknown)


# --- dry runs, and two steps of each --------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with small_benchmarks(tmp_path_factory.mktemp("data")) as root:
        yield root


def cut_down(name: str, root: Path, flags: str = "") -> argparse.Namespace:
    """The recipe without weights, on tiny data, with batches of two or more classes."""
    per_class = parse(name).IPC
    batch = {0: 12, 1: 6}.get(per_class, 2 * per_class)
    shared = f"--data-root {root} --pretrained none --workers 0 --wandb disabled --no-report"
    return parse(name, f"{shared} --batch-size {batch} {flags}")


def fast_or_slow(names: list[str]) -> list:
    slow = pytest.mark.slow
    return [pytest.param(n, marks=[] if n in RUN_IN_THE_FAST_SET else slow) for n in names]


@pytest.mark.parametrize("name", fast_or_slow(NAMES))
def test_a_dry_run_builds_the_recipes_own_network(name: str, data: Path) -> None:
    """Without its weights, which a test cannot download."""
    training = train.prepare(cut_down(name, data, "--dry-run"))
    said = describe(training)
    assert f"network     {parse(name).model}, 224 px" in said
    trained, total = training.network.counts()
    if name.startswith("frozen"):
        assert trained / total < 0.02
    elif name.startswith("vptsp"):
        assert trained / total < 0.06
    elif "freeze-stem" in recipe(name).read_text():
        assert 0.9 < trained / total < 1
    else:
        assert trained == total


SMALL = {"cls": "timm:test_vit", "attention": "timm:test_vit3", "gem": "resnet10 --width 0.125"}


def in_small(name: str, data: Path, logs: Path, flags: str) -> Path:
    """The folder of two steps of the recipe with a small network in its place."""
    short = f"--model {SMALL[parse(name).pooling]} --max-steps 2 --image-size 64 --LOG_DIR {logs}"
    train.main(cut_down(name, data, f"{short} --metrics retrieval {flags}"))
    return next(logs.iterdir())


@pytest.mark.parametrize("name", fast_or_slow(NAMES))
def test_recipes_run_with_a_small_network_in_its_place(
    name: str, data: Path, tmp_path: Path
) -> None:
    *_, row = tiny.metrics_rows(in_small(name, data, tmp_path, ""))
    assert int(row["step"]) == 2 and math.isfinite(float(row["loss"]))
    assert 0 <= float(row["R@1"]) <= 1


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name for name in NAMES if "--micro-batch" in recipe(name).read_text()]
)
def test_a_batch_of_four_thousand_is_embedded_in_pieces(
    name: str, data: Path, tmp_path: Path
) -> None:
    """A batch of eight in threes: the losses of both steps are those of all eight at once."""
    assert parse(name, "--micro-batch 100").batch_size == 4000
    pieces, whole = (
        tiny.metrics_rows(in_small(name, data, tmp_path / size, f"--amp off --micro-batch {size}"))
        for size in ("3", "8")
    )
    assert [float(row["loss"]) for row in pieces] == pytest.approx(
        [float(row["loss"]) for row in whole], rel=1e-4
    )


def test_hyp_and_sph_rank_the_features_and_the_head_can_be_asked_for(
    data: Path, tmp_path: Path
) -> None:
    run = in_small("sph_cub_dino", data, tmp_path, "")
    for words, size in (("", 64), ("--head linear", 128), ("--head none", 64)):
        asked = options.parse_evaluate(["--resume", str(run), *words.split()])
        assert open_checkpoint(run, asked).network.test_size == size


def test_a_dry_run_without_its_weights_says_where_they_go(data: Path, tmp_path: Path) -> None:
    done = run_cli(
        *("train.py", f"@{recipe('dinov2_cub')}", "--dry-run", "--data-root", data),
        *("--batch-size", "6", "--workers", "0"),
        cwd=tmp_path,
        HF_HUB_OFFLINE="1",
        HF_HOME=str(tmp_path / "hub"),
    )
    assert done.returncode == 2
    (said,) = (line for line in done.stderr.splitlines() if line.startswith("error: "))
    assert "vit_small_patch14_reg4_dinov2" in said and "cannot be downloaded" in said
    assert "--pretrained" in said and not list(tmp_path.glob("logs"))


# --- the table ------------------------------------------------------------------------------------


def test_the_table_of_recipes_has_every_family_and_the_numbers_of_the_recipes() -> None:
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| `")]
    told = {row[0].strip(" `"): [cell.strip() for cell in row[2:6]] for row in rows}
    assert told == {
        **{name.replace("*", "DATA"): values.split() for name, values in NUMBERS.items()},
        "unicom_DATA_clip": ["", "", "88.8", "95.5"],
        "rsk_DATA_vitb16": ["", "89.5", "88.0", ""],
    }
    for name in NAMES:
        family = name.replace(f"_{data_of(name)}_", "_DATA_")
        last = f"`_{name.rsplit('_', 1)[1]}`"
        assert family in text or name in text or last in text, name


# --- networks as they start -----------------------------------------------------------------------


def starts() -> list[str]:
    """The commands of the page that evaluate a network as it starts."""
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    return re.findall(r"^python evaluate.py (--dataset .*)$", text, flags=re.MULTILINE)


def test_every_frozen_start_has_a_command_that_evaluates_it() -> None:
    asked = [options.parse_evaluate(command.split()) for command in starts()]
    frozen = [parse(f"frozen_cub_{name}") for name in FROZEN]
    for start, recipe_of_it in zip(asked, frozen, strict=True):
        assert (start.model, start.image_size) == (recipe_of_it.model, recipe_of_it.image_size)
        assert start.dataset == "cub" and not start.resume


@pytest.mark.slow
@pytest.mark.parametrize("command", starts(), ids=lambda command: command.split()[3])
def test_a_start_is_evaluated_by_its_command(command: str, data: Path, tmp_path: Path) -> None:
    small = f"--data-root {data} --pretrained none --workers 0 --csv {tmp_path / 'table.csv'}"
    evaluate.run(options.parse_evaluate([*command.split(), *small.split()]))
    assert "R@1" in (tmp_path / "table.csv").read_text()
