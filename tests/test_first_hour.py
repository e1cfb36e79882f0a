"""Own images without further flags: what is chosen suits them, is told, and gives way to flags."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, refusal
from PIL import Image

import dataset
import options
import train
from dataset.files import said_anew
from dataset.samplers import make_sampler
from options import suited
from options.suited import Images, Machine
from training import data as run_data
from training.clock import Estimate
from training.describing import describe
from training.doubts import doubts
from training.progress import print_estimate
from utils import human_seconds

LAPTOP = Machine(cores=2, gpu=False, weights=True, remedy="pip install it", free=10**11)
SERVER = LAPTOP._replace(cores=16, gpu=True)
SHOP = Images(72, False, trained=58, images=464, smallest=8, largest=8, side=600)


def chosen(images: Images, machine: Machine = LAPTOP, flags: str = "") -> Namespace:
    """The options that are chosen for such images, with these flags given."""
    args = options.parse_train(["--dataset", "cub", *flags.split()])
    bare = {**options.defaults(options.TRAIN_GROUPS), "given": args.given, "recipe": None}
    bare |= {name: getattr(args, name) for name in args.given}
    found, told = suited.choose(Namespace(**bare), lambda args: images, machine)
    found.told = told
    return found


# --- the rules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [LAPTOP, SERVER, LAPTOP._replace(weights=False)])
@pytest.mark.parametrize("flags", ["", "--loss ms", "--loss Triplet", "--pretrained none"])
@pytest.mark.parametrize(
    ("classes", "each"),
    [(4, 2), (5, 3), (5, 10), (12, 200), (72, 8), (60, 5), (1077, 9), (9, 1000)],
)
def test_what_is_chosen_fits_any_number_of_images(
    classes: int, each: int, flags: str, machine: Machine
) -> None:
    held_out = max(2, min(round(classes / 5), classes - 2))
    trained = classes - held_out
    images = Images(classes, False, trained, trained * each, each, each, side=600)
    args = chosen(images, machine, flags)
    assert 0 < args.eval_classes < 1
    assert 2 <= args.batch_size <= images.images
    assert args.batch_size <= 8 or images.images // args.batch_size >= suited.LEAST_STEPS
    assert 10 <= args.epochs <= 100 and args.eval_every == args.epochs
    if flags.startswith("--loss"):
        assert args.IPC >= 2 and args.batch_size % args.IPC == 0
        assert args.batch_size // args.IPC <= trained
    scratch = "none" in flags or not machine.weights
    assert args.pretrained == ("none" if scratch else "imagenet")
    assert args.lr > 1e-4 and args.warm == 0


def test_each_setting_is_told_with_its_reason() -> None:
    told = chosen(SHOP).told
    assert "464 training images of 58 classes, 8 each, on 2 CPU cores" in told[0][1]
    words = " ".join(settings for settings, _ in told)
    for setting in ("--model efficientnet_lite0", "--pretrained imagenet", "--decode cache"):
        assert setting in words
    assert all(why for _, why in told)


def test_a_single_step_is_told_as_one() -> None:
    told = [why for _, why in chosen(Images(5, False, 3, 9, 3, 3, side=200)).told]
    assert "1 step per epoch" in told and any(why.startswith("1 step each") for why in told)


@pytest.mark.parametrize(
    ("flags", "once"),
    [
        ("--epochs 4 --eval-every 4", True),
        ("--epochs 4 --eval-every 2", False),
        ("--epochs 4 --max-steps 3", True),
        ("--steps 8 --eval-steps 8", True),
        ("--steps 8 --eval-steps 4", False),
    ],
)
def test_no_epoch_is_said_to_be_picked_where_there_is_one_evaluation(
    flags: str, once: bool, images: Path
) -> None:
    said = describe(tiny.prepare(images, flags))
    assert ("best epoch  none is picked: evaluated once" in said) == once
    assert ("best epoch  on the test classes" in said) != once


def test_a_flag_that_is_given_wins_and_the_choice_adapts() -> None:
    usual = chosen(SHOP)
    args = chosen(SHOP, flags="--batch-size 46 --lr 2e-3")
    assert (args.batch_size, args.lr, args.lr_p) == (46, 2e-3, 1e-3)
    assert any("10 steps each" in why for _, why in args.told)
    assert not any("--batch-size" in settings for settings, _ in args.told)
    bare = chosen(SHOP, flags="--pretrained none")
    assert bare.model != usual.model and bare.lr > usual.lr and bare.epochs > usual.epochs
    assert chosen(SHOP, flags="--epochs 3").eval_every == 3
    assert chosen(SHOP, flags="--steps 50").epochs == 60  # the default, which nobody reads
    assert chosen(SHOP, flags="--val-classes 0.2").eval_every < usual.eval_every
    assert chosen(SHOP, flags="--optimizer sgd").lr == 1e-4
    assert chosen(SHOP, flags="--image-size 384").decode == "exact"


@pytest.mark.parametrize("loss", ["Contrastive", "Triplet"])
@pytest.mark.parametrize("size", [4, 5, 6, 7, 9, 10, 12, 46, 60])
def test_pairs_adapt_to_a_batch_that_is_given(size: int, loss: str) -> None:
    args = chosen(SHOP, flags=f"--loss {loss} --batch-size {size}")
    assert args.batch_size == size
    labels = np.repeat(np.arange(SHOP.trained), 8)
    assert len(make_sampler(labels, size, instances=args.IPC))
    assert args.IPC >= 2 or size in (5, 7)  # which nothing divides


def test_a_batch_has_two_classes_of_the_images_that_are_given() -> None:
    few = Images(7, False, trained=5, images=15, smallest=3, largest=3, side=600)
    args = chosen(few, flags="--loss Triplet --IPC 5")
    assert (args.IPC, args.batch_size) == (5, 10)
    assert chosen(few, flags="--loss Triplet --IPC 0").batch_size <= 15


def test_weights_and_blocks_of_another_network_are_not_chosen() -> None:
    for machine in (LAPTOP, LAPTOP._replace(weights=False)):
        args = chosen(SHOP, machine, "--model resnet50")
        assert (args.model, args.pretrained, args.freeze_blocks) == ("resnet50", None, 0)
        assert args.width == 1.0
    args = chosen(SHOP, machine, f"--model {suited.MODEL}")
    assert (args.model, args.pretrained, args.width) == (suited.MODEL, "none", 1.0)


def test_validation_takes_two_classes_at_least(tmp_path: Path) -> None:
    images = tiny.write_images(tmp_path, classes=6, images=3) / "train"
    args = parse(images, "--val-classes", "0.2")
    validation = run_data.HeldOut(0.2, seed=args.seed)
    data = run_data.load(dataset.Choice.of(args), validation, args.batch_size)
    assert (data.train.num_classes, len(data.train)) == (2, 6)


def test_the_machine_and_the_pictures_decide_how_much_is_seen() -> None:
    assert chosen(SHOP, SERVER).epochs > chosen(SHOP).epochs
    assert chosen(SHOP).image_size == 224
    assert chosen(SHOP._replace(side=64)).image_size == 64
    assert chosen(SHOP, LAPTOP._replace(free=10**6)).decode == "exact"
    without = chosen(SHOP, LAPTOP._replace(weights=False))
    assert any("pip install it" in why for _, why in without.told)


def test_data_that_say_what_is_held_out_are_left_alone() -> None:
    assert chosen(SHOP._replace(divided=True)).eval_classes is None


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Eight folders of six small pictures."""
    return tiny.write_images(tmp_path / "shop") / "train"


def parse(photos: Path, *flags: str) -> Namespace:
    return options.parse_train(["--dataset", f"folder:{photos}", *flags])


def test_own_images_alone_are_suited(photos: Path) -> None:
    args = parse(photos)
    assert args.defaults == "suited" and args.chosen
    assert (args.model, args.image_size, args.stem) == (suited.MODEL, 32, "small")
    again = options.kept(json.loads(json.dumps(options.plain(args))))
    assert (again.chosen, again.batch_size) == (args.chosen, args.batch_size)


def test_no_cache_is_chosen_where_none_can_be_written(tmp_path: Path, monkeypatch) -> None:
    for number in range(8):
        (tmp_path / f"shop/{number // 2}").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (140, 140)).save(tmp_path / f"shop/{number // 2}/{number}.png")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse(tmp_path / "shop").decode == "cache"
    (tmp_path / ".cache").write_text("a file, as good as a read-only home")
    assert parse(tmp_path / "shop").decode == "exact"


def test_a_method_adds_what_is_its_own_and_leaves_what_was_chosen(photos: Path) -> None:
    plain, own = parse(photos), parse(photos, "--loss", "AMLoss")
    assert (own.epochs, own.batch_size) == (plain.epochs, plain.batch_size)
    assert parse(photos, "--loss", "Proxy_NCA").proxy_lr_scale == 1.0


@pytest.mark.parametrize("flags", ["--model resnet18", "--pretrained x.pth", "--checkpoint x.pth"])
def test_who_names_a_network_gets_the_published_defaults(flags: str, photos: Path) -> None:
    args = parse(photos, *flags.split())
    assert (args.defaults, args.batch_size, args.lr, args.epochs) == ("published", 150, 1e-4, 60)
    named = parse(photos, *flags.split(), "--defaults", "suited")
    assert named.defaults == "suited" and named.batch_size < 24 and named.lr > 1e-4


def test_benchmarks_keep_their_defaults(capsys: pytest.CaptureFixture) -> None:
    args = options.parse_train(["--dataset", "cub"])
    assert (args.defaults, args.model, args.batch_size) == ("published", "bn_inception", 150)
    said = refusal(capsys, options.parse_train, ["--dataset", "cub", "--defaults", "suited"])
    assert "your own images" in said


def test_too_few_classes_are_refused_in_a_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in "abc":
        (tmp_path / name).mkdir()
        Image.new("RGB", (40, 40)).save(tmp_path / name / "0.png")
    said = refusal(capsys, options.parse_train, ["--dataset", f"folder:{tmp_path}"])
    assert "3 classes" in said and "need 2 each" in said


def test_a_run_keeps_its_settings_and_names_what_comes_next(
    photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "train.index").touch()  # of another run: the command that is printed must not fail
    # In fewer steps than are chosen.
    quick = "--max-steps 2 --workers 0 --wandb disabled --no-report --embedding-size 8 --name first"
    args = parse(photos, *quick.split(), "--LOG_DIR", str(tmp_path))
    train.main(args)
    said = capsys.readouterr().out
    assert "chosen      for 30 training images of 5 classes" in said
    search = said.partition("search:")[2].split()
    script = str(ROOT / "search.py")
    assert search[:4] == ["python", script, "build", str(tmp_path / "first")]
    assert search[4:8] == ["--images", str(photos), "--index", "train-2.index"]
    assert search[8:12] == ["python", script, "serve", "train-2.index"]
    stored = json.loads((tmp_path / "first/args.json").read_text())
    assert stored["model"] == suited.MODEL and stored["defaults"] == "suited"
    assert stored["batch_size"] == args.batch_size
    # A continued run has its own settings, whatever would be chosen now.
    tiny.resume(tmp_path / "first", "--max-steps 3")
    assert [row["step"] for row in tiny.metrics_rows(tmp_path / "first")] == ["2", "3"]


def test_what_is_told_of_a_choice_is_kept_back_in_that_run_only(
    photos: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shared = "--max-steps 1 --workers 0 --wandb disabled --no-report --embedding-size 8".split()
    said = []
    with said_anew():
        for name, given in (("chosen", []), ("given", ["--decode", "cache"])):
            train.main(parse(photos, *shared, *given, "--LOG_DIR", str(tmp_path), "--name", name))
            said.append("training crops come from the cache's images" in caplog.text)
    assert said == [False, True]


# --- what cannot work, and how long it takes ------------------------------------------------------


def test_what_can_hardly_work_is_said(images: Path) -> None:
    def said(flags: str) -> str:
        return "\n".join(doubts(tiny.prepare(images, flags)))

    assert said("--lr 1e-3 --warm 0") == ""
    few = said("--epochs 3")
    assert "4 steps per epoch, 12 in all" in few and "starts from scratch" in few
    assert "1 step per epoch, 1 in all" in said("--epochs 1 --batch-size 30")
    assert "--warm 3 of 3 epochs" in said("--epochs 3 --warm 3 --lr 1e-3")
    assert "--warm 3 of 1 epoch:" in said("--steps 2 --warm 3 --lr 1e-3")
    assert said("--freeze-blocks all --epochs 1 --lr 1e-3") == ""
    pairs = "--loss Contrastive --lr 1e-3 --warm 0 --batch-size"
    for size, better in ((4, "--IPC 2"), (5, "--IPC 4 --batch-size 8")):
        assert said(f"{pairs} {size}").endswith(f"use {better}"), size
        assert said(f"{pairs} {size} {better}") == ""  # it can be done
    assert said("--loss ms --IPC 2 --lr 1e-3 --warm 0 --optimizer sgd --epochs 2") == ""


def test_a_verdict_on_few_classes_is_no_verdict(photos: Path) -> None:
    few = tiny.prepare(photos, "--eval-classes 0.25 --lr 1e-3 --warm 0")
    assert "judged on 2 classes" in " ".join(doubts(few))


def test_the_time_is_told_once_without_the_first_steps() -> None:
    estimate = Estimate(not_counted=2, counted=3)
    told = [estimate.after(seconds, 9 - step) for step, seconds in enumerate([9, 9, 1, 2, 3, 1])]
    assert told == [None, None, None, None, 5 * 2.0, None]


def test_photographs_are_made_up_alike_each_time(tmp_path: Path) -> None:
    from benchmarks import photos as made

    first = made.photograph(made.product(3), np.random.default_rng(1), (80, 60))
    again = made.photograph(made.product(3), np.random.default_rng(1), (80, 60))
    other = made.photograph(made.product(4), np.random.default_rng(1), (80, 60))
    assert first.size == (80, 60) and first.tobytes() == again.tobytes() != other.tobytes()
    assert sum(made.counts_of(60, 8, uneven=True)) > 400
    made.write(tmp_path, [2, 1], (80, 60))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["product 000", "product 001"]


@pytest.mark.parametrize("behind", [0.002, 0.02])
def test_a_gpu_that_works_behind_the_host_is_waited_for_twice(behind, monkeypatch, capsys):
    """The host asks for a step in a millisecond, and the GPU takes longer to do it."""
    device = torch.device("cuda")
    clock, done, waits = 0.0, 0.0, 0

    def wait(_: torch.device) -> None:
        nonlocal clock, waits
        clock, waits = max(clock, done), waits + 1

    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    training = SimpleNamespace(
        estimate=Estimate.on(device),
        precision=SimpleNamespace(device=device),
        length=SimpleNamespace(steps_left=lambda *_: 60_000),
        clock=None,
        loader=(),
    )
    started = 0.0
    for _ in range(30):
        clock += 0.001
        done = max(done, clock) + behind
        took, started = clock - started, clock
        print_estimate(SimpleNamespace(clear=lambda: None), training, took)
    assert waits == 2
    # In one of the ten steps that were counted it stands still while the host asks for it.
    step = behind + 0.001 / 10
    assert f"about {human_seconds(60_000 * step)} of training to go" in capsys.readouterr().out
