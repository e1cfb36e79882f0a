"""What cannot learn is refused before a run begins: losses, their arguments, and batches."""

from __future__ import annotations

import inspect
import logging
import random

import numpy as np
import pytest
import tiny
import torch

import criteria
import losses
from criteria.library import OUT_OF_REACH
from criteria.margin import MarginLoss
from losses import build, try_out
from utils import InputError

library = pytest.importorskip("pytorch_metric_learning.losses")

LABELS = torch.arange(6).repeat_interleave(3)
SIZE = 8


# --- the losses of pytorch-metric-learning --------------------------------------------------------

ALL_OF_THE_LIBRARY = sorted(
    name for name, _ in inspect.getmembers(library, inspect.isclass) if not name.endswith("Mixin")
)
PARTS = {"BaseMetricLossFunction", "BaseLossWrapper", "GenericPairLoss"}
NEEDED = {"RankedListLoss": {"margin": 0.5, "Tn": 10}}


@pytest.mark.parametrize("name", ALL_OF_THE_LIBRARY)
def test_every_loss_of_the_library_can_be_trained_or_says_why_not(name):
    if name in PARTS:
        with pytest.raises(ValueError, match=f"'{name}'; (did you mean|known names)"):
            build(f"pml:{name}", 6, SIZE)
    elif name in OUT_OF_REACH:
        with pytest.raises(ValueError, match=r"cannot be trained here: .*; choose one of Angular"):
            build(f"pml:{name}", 6, SIZE)
    else:
        try_out(f"pml:{name}", LABELS, SIZE, **NEEDED.get(name, {}))


def test_what_is_out_of_reach_is_in_the_library():
    assert set(OUT_OF_REACH) <= set(ALL_OF_THE_LIBRARY)


@pytest.mark.parametrize("name", ALL_OF_THE_LIBRARY)
@pytest.mark.parametrize("value", [0, -1, True, "word"])
def test_any_argument_gives_a_loss_or_a_sentence(name, value):
    """Whatever the library makes of it: zeros, negatives, words, the argument by itself."""
    try:
        known = losses.options_of(f"pml:{name}")
    except ValueError:
        known = frozenset()
    for key in sorted(known):
        options = {**NEEDED.get(name, {}), key: value}
        try:
            try_out(f"pml:{name}", LABELS, SIZE, **options)
        except (ValueError, InputError) as error:
            assert str(error) and "\n" not in str(error), (key, error)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("RankedListLoss", {}, "needs a value for margin and Tn"),
        ("NTXentLoss", {"temperature": 0}, "is nan on random embeddings"),
        ("FastAPLoss", {"num_bins": 0}, "ZeroDivisionError"),
        ("ContrastiveLoss", {"pos_margin": 100, "neg_margin": 0}, "teaches the network nothing"),
        ("ContrastiveLoss", {"reducer": "DoNothingReducer"}, "does not give one number"),
        ("ContrastiveLoss", {"distance": "LpDistanc"}, "did you mean LpDistance"),
        ("ContrastiveLoss", {"distance": "LpDistance(p=1"}, "no closing bracket"),
        ("ContrastiveLoss", {"distance": "LpDistance(p)"}, "not of the form key=value"),
        ("ContrastiveLoss", {"distance": "LpDistance(q=1)"}, "option of LpDistance called 'q'"),
        (
            "ContrastiveLoss",
            {"distance": 3},
            "name of a class of pytorch_metric_learning.distances",
        ),
        ("CircleLoss", {"distance": "LpDistance"}, "to be CosineSimilarity"),
        ("CircleLoss", {"gamma": float("nan")}, "must be a finite number in float32, not nan"),
        ("CircleLoss", {"gamma": 1e300}, "must be a finite number in float32, not 1e+300"),
        ("CircleLoss", {"gamma": 10**40}, "must be a finite number in float32, not 1000"),
        ("CircleLoss", {"gamma": True}, "cannot be True"),
        ("list", {}, "known names: AngularLoss, ArcFaceLoss"),
    ],
)
def test_the_sentence_says_what_is_wrong(name, options, words):
    with pytest.raises((ValueError, InputError)) as error:
        try_out(f"pml:{name}", LABELS, SIZE, **options)
    assert words in str(error.value)


def test_parts_by_name_are_those_of_the_library():
    from pytorch_metric_learning import distances, miners, reducers, regularizers

    found = build(
        "pml:ContrastiveLoss",
        6,
        SIZE,
        distance="LpDistance(p=1, normalize_embeddings=false)",
        reducer="MeanReducer",
        embedding_regularizer="LpRegularizer(power=2)",
        miner="PairMarginMiner(pos_margin=0.1)",
        pos_margin=0.3,
    )
    loss = library.ContrastiveLoss(
        pos_margin=0.3,
        distance=distances.LpDistance(p=1, normalize_embeddings=False),
        reducer=reducers.MeanReducer(),
        embedding_regularizer=regularizers.LpRegularizer(power=2),
    )
    x = torch.randn(len(LABELS), SIZE, generator=torch.Generator().manual_seed(0))
    mined = miners.PairMarginMiner(pos_margin=0.1)(x, LABELS)
    torch.testing.assert_close(found(x, LABELS), loss(x, LABELS, mined))
    assert build("MS", 6, SIZE, miner="none").miner is None
    assert type(build("MS", 6, SIZE, miner="PairMarginMiner").miner) is miners.PairMarginMiner


def test_one_mined_pair_counts():
    """Wang et al.'s loss of an anchor with one positive and one negative; the library gives 0."""
    labels = torch.tensor([0, 0, 1])
    x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.75, -0.6614378]])
    criterion = build("MS", 2, 2)
    anchors, positives, others, negatives = criterion.miner(x, labels)
    assert (anchors.tolist(), positives.tolist()) == ([0], [1])
    assert (others.tolist(), negatives.tolist()) == ([0], [2])
    pull = torch.log1p(torch.exp(-2 * torch.tensor(0.8 - 0.5))) / 2
    push = torch.log1p(torch.exp(50 * torch.tensor(0.75 - 0.5))) / 50
    torch.testing.assert_close(criterion(x, labels), (pull + push) / 3)


# --- trying a loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", criteria.LOSSES)
def test_every_loss_passes_where_there_are_pairs_and_where_it_needs_none(name):
    fewer = {"ancestors": 24} if name == "HIER" else {}
    try_out(name, LABELS, SIZE, **fewer)
    alone = torch.arange(12)
    if build(name, 12, SIZE).needs_pairs:
        # The first three push what is near apart and pull nothing together, and a tenth of SupAP is
        # a softmax over classes: there is a gradient, but not the one that they are chosen for.
        if name in ("MS", "Contrastive", "CircleLoss", "SupAP"):
            return
        with pytest.raises(ValueError, match="teaches the network nothing"):
            try_out(name, alone, SIZE)
    else:
        try_out(name, alone, SIZE, **fewer)


def test_trying_leaves_the_random_numbers_alone():
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    expected = torch.rand(2), np.random.rand(2), random.random()
    torch.manual_seed(3), np.random.seed(3), random.seed(3)
    try_out("MarginLoss", LABELS, SIZE, miner="distanceweighted")
    assert torch.equal(torch.rand(2), expected[0])
    assert (np.random.rand(2) == expected[1]).all() and random.random() == expected[2]


def test_needs_pairs_is_said_by_the_loss_and_passed_on():
    assert MarginLoss().needs_pairs and losses.compose("MarginLoss", 6, SIZE).needs_pairs
    assert not losses.compose("Proxy_Anchor", 6, SIZE, {"sec": {}}).needs_pairs
    assert losses.compose("triplet", 6, SIZE, {"sec": {}}).needs_pairs
    assert build("pml:TripletMarginLoss", 6, SIZE).needs_pairs
    assert not build("pml:ArcFaceLoss", 6, SIZE).needs_pairs


# --- before a run ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tiny.write_images(tmp_path_factory.mktemp("images"), classes=4)


@pytest.mark.parametrize(
    "loss", ["Triplet", "MS", "Contrastive", "Margin", "triplet", "ms", "n-npair", "pml:SupConLoss"]
)
@pytest.mark.parametrize("flags", ["--IPC 1 --batch-size 2", "--IPC 2 --batch-size 2"])
def test_batches_without_pairs_are_refused(images, loss, flags):
    with pytest.raises(InputError, match="learns from pairs, and no batch of 2 images has both"):
        tiny.prepare(images, f"--loss {loss} {flags}")


@pytest.mark.parametrize("loss", ["Proxy_Anchor", "pml:NormalizedSoftmaxLoss"])
def test_losses_with_proxies_need_no_pairs(images, loss):
    tiny.prepare(images, f"--loss {loss} --IPC 1 --batch-size 2")


def test_one_training_class_is_refused(tmp_path):
    """Where the validation classes leave one; a folder of one class is refused as it is read."""
    images = tiny.write_images(tmp_path, classes=3, images=12)
    with pytest.raises(InputError, match="holds out 2 of the 3 training classes"):
        tiny.prepare(images, "--val-classes 0.5")


def test_a_number_that_is_none_is_refused(images):
    with pytest.raises(InputError, match="margin of Proxy_Anchor must be a finite number"):
        tiny.prepare(images, "--loss-args margin=nan")


def test_an_epoch_without_a_loss_is_said(images, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(losses, "try_out", lambda *_, **__: None)
    flags = "--loss pml:ContrastiveLoss --loss-args pos_margin=100 neg_margin=0 --epochs 1"
    with caplog.at_level(logging.WARNING):
        folder = tiny.run(images, tmp_path, "zero", flags)
    (row,) = tiny.metrics_rows(folder)
    assert float(row["loss"]) == 0
    assert "the loss was exactly 0 in every step of epoch 1" in caplog.text
