"""Every method and every sensible pair of them through train.py's own functions, on tiny images."""

from __future__ import annotations

import csv
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import ROOT, SMALL, files_in, refusal
from PIL import Image
from tiny import same, saved

import evaluate
import options
import train
from criteria import COMMANDS
from dataset.loader import Batch, eval_loader
from evaluation.networks import open_checkpoint
from evaluation.tasks import tasks_of
from methods.base import Forward, Routine
from methods.mixup import Mixup
from utils import InputError

LOSSES = ("Proxy_Anchor", "AMLoss", "MS")
METHODS = {
    "plain": "",
    "SEC": "--sec_wei 0.5",
    "introspective": "--introspective",
    "disentangled": "--disent True --al 1 --be 0.1 --gam 1e-5",
    "masks": "--nb-clusters 2 --hierarchy-method none",
}
NEEDS_PROXIES = ("introspective", "disentangled")
PAIRS = [
    (loss, method)
    for loss in LOSSES
    for method in METHODS
    if loss != "MS" or method not in NEEDS_PROXIES
]
TERMS = {
    "Proxy_Anchor": {"positive", "negative"},
    "AMLoss": {"positive", "negative", "margin"},
    "MS": set(),
    "plain": set(),
    "SEC": {"sec", "norm_mean", "norm_var", "norm_ema", "cos_positive", "cos_negative"},
    "introspective": set(),
    "disentangled": {"metric", "agnostic", "specific", "split"},
    "masks": {"masks"},
}


# --- the matrix -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("loss", "method"), PAIRS)
def test_every_sensible_pair_trains(loss: str, method: str, images: Path, tmp_path: Path) -> None:
    flags = f"--epochs 1 --warm 0 --IPC 2 --loss {loss} {METHODS[method]}"
    folder = tiny.run(images, tmp_path, "run", flags)
    (row,) = tiny.metrics_rows(folder)
    for term in {"loss", "R@1"} | TERMS[loss] | TERMS[method]:
        assert np.isfinite(float(row[term])), term
    start = tiny.prepare(images, flags).network.state_dict()
    end = saved(folder)["model_state_dict"]
    moved = [
        key for key in start if start[key].shape != end[key].shape or (start[key] != end[key]).any()
    ]
    assert {"model.conv1.weight", "model.embedding.weight"} <= set(moved)
    assert ("masks.weight" in moved) == (method == "masks")
    assert ("model.embedding_specific.weight" in moved) == (method == "disentangled")


@pytest.mark.parametrize(("loss", "method"), PAIRS)
def test_every_sensible_pair_trains_on_the_embedded_data(
    loss: str, method: str, tmp_path: Path
) -> None:
    flags = f"--ratio-classes 0.1 --epochs 1 --warm 0 --IPC 2 --loss {loss} {METHODS[method]}"
    where = f"--metrics retrieval --data-root {ROOT / 'data'} --LOG_DIR {tmp_path} --name run"
    train.main(options.parse_train([*SMALL, *flags.split(), *where.split()]))
    (row,) = tiny.metrics_rows(tmp_path / "run")
    assert np.isfinite(float(row["loss"])) and float(row["R@1"]) > 1 / 54  # chance


RECENT_TERMS = {
    "Hyp": {"positive", "negative"},
    "Sph": {"positive", "negative"},
    "RecallAtK --loss-args simix=true ks=1,2": {"recall"},
    "SupAP": {"ap", "softmax"},
    "NormSoftmax --loss-args smoothing=0.1": {"accuracy"},
    "ProxyNCA_pp": {"accuracy"},
    "ArcFace --loss-args sub_centers=2 sample_rate=0.5": {"own", "accuracy"},
    "CosFace": {"own", "accuracy"},
    "SupCon": {"positive", "negative"},
    "HIST --loss-args hidden=8": {"distribution", "hypergraph"},
    "HIER --loss-args ancestors=16": {"positive", "negative", "images", "ancestors"},
    "PFML --loss-args proxies_per_class=2": {"attraction", "repulsion"},
}


@pytest.mark.parametrize("loss", RECENT_TERMS)
def test_every_recent_loss_trains_and_goes_on_bit_by_bit(
    loss: str, images: Path, tmp_path: Path
) -> None:
    flags = f"--epochs 2 --warm 0 --IPC 2 --loss {loss}"
    whole = tiny.run(images, tmp_path, "whole", flags)
    rows = tiny.metrics_rows(whole)
    for term in {"loss", "R@1"} | RECENT_TERMS[loss]:
        assert np.isfinite(float(rows[-1][term])), term
    start = tiny.prepare(images, flags).network.state_dict()
    end = saved(whole)["model_state_dict"]
    for key in ("model.conv1.weight", "model.embedding.weight"):
        assert (start[key] != end[key]).any()
    parts = tiny.run(images, tmp_path, "parts", f"{flags} --max-steps {int(rows[0]['step']) + 1}")
    tiny.resume(parts, "")
    for part in ("model_state_dict", "criterion_state_dict", "optimisers", "random"):
        assert same(saved(whole)[part], saved(parts)[part]), part


def test_every_recent_loss_is_tried_from_the_command_line() -> None:
    assert [words.split()[0] for words in RECENT_TERMS] == [*COMMANDS["of 2018 to 2025"]]


@pytest.mark.parametrize("loss", ["triplet", "semihtriplet", "n-npair", "ms"])
@pytest.mark.parametrize("constraint", ["", "--sec_wei 1", "--l2reg_wei 1e-3"])
def test_spherical_losses_log_norms_and_cosines_with_and_without_a_constraint(
    loss: str, constraint: str, images: Path, tmp_path: Path
) -> None:
    flags = f"--use_loss {loss} --instances 2 --steps 4 --eval-steps 4 {constraint}"
    (row,) = tiny.metrics_rows(tiny.run(images, tmp_path, "run", flags))
    assert float(row["norm_mean"]) > 0 and float(row["norm_var"]) >= 0
    assert -1 <= float(row["cos_negative"]) < float(row["cos_positive"]) <= 1


def test_every_epoch_has_a_row_with_its_terms(images: Path, tmp_path: Path) -> None:
    flags = "--disent True --epochs 3 --eval-every 2 --warm 0"
    rows = tiny.metrics_rows(tiny.run(images, tmp_path, "run", flags))
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row in rows:
        assert all(np.isfinite(float(row[term])) for term in ("agnostic", "specific", "split"))
    assert [bool(row["R@1"]) for row in rows] == [False, True, True]


def test_training_starts_from_the_weights_of_a_checkpoint(images: Path, tmp_path: Path) -> None:
    first = tiny.run(images, tmp_path, "first", "--epochs 2 --warm 0")
    start = saved(first, "best")["model_state_dict"]
    file = tiny.best_checkpoint(first)
    network = tiny.prepare(images, f"--checkpoint {file}").network.state_dict()
    assert same(dict(network), dict(start))
    divided = tiny.prepare(images, f"--checkpoint {file} --nb-clusters 2").network
    assert len(divided.masks) == 1 and same(
        {k: v for k, v in divided.state_dict().items() if k != "masks.weight"}, dict(start)
    )
    with pytest.raises(InputError, match="embeddings of size 8, the network 4"):
        tiny.prepare(images, f"--checkpoint {file} --embedding-size 4")


def test_a_share_of_the_classes(images: Path, tmp_path: Path) -> None:
    training = tiny.prepare(images, "--ratio-classes 0.5")
    assert training.data.train.num_classes == 4 and len(training.data.train) == 24
    assert training.data.test[0].queries.num_classes == 4
    folder = tiny.run(images, tmp_path, "run", "--ratio-classes 0.5 --epochs 1")
    file = tiny.best_checkpoint(folder)
    assert tasks_of(open_checkpoint(file).data)[0].queries.num_classes == 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--loss MS --introspective", ["MS", "cosine", "Proxy_Anchor", "AMLoss"]),
        ("--loss MS --disent True", ["MS", "proxies", "Proxy_Anchor", "AMLoss"]),
        ("--loss Contrastive --introspective paper", ["Contrastive", "Proxy_Anchor"]),
    ],
)
def test_pairs_without_a_meaning_are_refused(
    flags: str, words: list[str], images: Path, tmp_path: Path
) -> None:
    assert_refused(flags, words, images, tmp_path)


def assert_refused(flags: str, words: list[str], images: Path, folder: Path) -> None:
    """A run with these flags ends with one sentence, in which words stand, and writes nothing."""
    with pytest.raises(InputError) as refusal:
        tiny.run(images, folder, "run", flags)
    assert "\n" not in str(refusal.value)
    for word in words:
        assert word in str(refusal.value)
    assert files_in(folder) == []


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--loss MS --mrg 0.1", ["--mrg", "Proxy_Anchor"]),
        ("--al 2", ["--al", "--disent True"]),
        ("--norm_momentum 0.5", ["--norm_momentum", "--sec_wei"]),
        ("--fixed-mask 1", ["--fixed-mask", "--nb-clusters"]),
        ("--nb-clusters 2 --masks-normalize-before-sum l1", ["--masks-sum-for-full-emb"]),
        ("--nb-clusters 2 --small-class-action duplicate", ["adaptbalanced"]),
        *(
            (f"--nb-clusters 2 --fixed-mask 1 {words}", [words.split()[0], "are learned"])
            for words in (
                *("--mask-lr-mult 3", "--mask-wd-mult 1", "--mask-relu 0", "--masking-lambda 2"),
                *("--masking-init normal", "--masks-freeze-one-cluster 1"),
            )
        ),
        ("--mrg -0.1", ["--mrg", "out of range"]),
        ("--loss MarginLoss --margin -0.2", ["--margin", "out of range"]),
        ("--loss AMLoss --lam -1", ["--lam", "out of range"]),
        ("--sec_wei -1", ["--sec_wei", "out of range"]),
        ("--sec_wei 1 --norm_momentum 0", ["--norm_momentum", "out of range"]),
        ("--mixup -1", ["--mixup", "out of range"]),
        ("--disent True --introspective", ["--disent", "--introspective", "leave one of them"]),
        ("--disent True --nb-clusters 2", ["--disent", "--nb-clusters", "leave one of them"]),
    ],
)
def test_flags_nobody_reads_and_impossible_values_stop_at_once(
    flags: str, words: list[str], images: Path, capsys: pytest.CaptureFixture
) -> None:
    said = refusal(capsys, tiny.parse, images, flags)
    for word in words:
        assert word in said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--nb-clusters 6", ["--nb-clusters 6", "power of two"]),
        ("--nb-clusters 3 --hierarchy-method none", ["--nb-clusters 3", "power of two"]),
        ("--nb-clusters 16", ["--nb-clusters 16", "48 training images", "at most 8"]),
        ("--nb-clusters 4 --force-full-embedding-epoch 4", ["epoch 4", "at least 5"]),
        ("--nb-clusters 4 --mod-epoch 1 --mod-epoch-freeze 1", ["--mod-epoch-freeze 1"]),
        ("--nb-clusters 2 --IPC 5", ["12 images", "classes of 5", "multiple"]),
        ("--nb-clusters 2 --IPC 12", ["12 per class", "second class"]),
        ("--nb-clusters 2 --num-replicas 2", ["--num-replicas 2", "balanced_old"]),
        (
            "--nb-clusters 2 --num-replicas 5 --batch-sampler randombatch",
            ["5 replicas", "multiple"],
        ),
        (
            "--nb-clusters 2 --num-replicas 12 --batch-sampler randombatch",
            ["12 replicas", "second class"],
        ),
        ("--nb-clusters 8 --fixed-mask 1 --embedding-size 4", ["8 clusters", "4 dimensions"]),
        ("--IPC 5", ["12 images", "classes of 5", "multiple"]),
        ("--IPC 1", ["takes 12 classes", "have 8"]),
        ("--loss triplet --batch-size 16", ["16 images", "classes of 3"]),
        ("--batch-size 60", ["--batch-size 60", "48"]),
    ],
)
def test_bad_values_get_one_sentence_before_anything_is_written(
    flags: str, words: list[str], images: Path, tmp_path: Path
) -> None:
    assert_refused(flags, words, images, tmp_path)


def test_classes_of_one_image_are_refused_or_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tiny.write_images(tmp_path / "data", images=1)
    with pytest.raises(InputError, match=r"every training class .* single image"):
        tiny.run(root, tmp_path / "logs", "run", "--batch-size 4")
    assert not (tmp_path / "logs").exists()
    Image.new("RGB", (40, 36)).save(root / "train" / "train2" / "more.png")
    tiny.prepare(root, "--batch-size 4")
    (record,) = caplog.records
    assert "7 of the 8 training classes" in record.getMessage()
    assert "train0" in record.getMessage()


# --- SEC ------------------------------------------------------------------------------------------


def test_sec_by_steps_logs_norms_and_cosines_at_each_evaluation(
    images: Path, tmp_path: Path
) -> None:
    flags = (
        "--loss semihtriplet --sec_wei 0.5 --l2reg_wei 0.1 --steps 7 --eval-steps 2 "
        "--milestones 3 5 --lr 1e-3 --lr_p 1e-4 --augment none --image-size 32"
    )
    folder = tiny.run(images, tmp_path, "sec", flags)
    rows = tiny.metrics_rows(folder)
    assert [int(row["step"]) for row in rows if row["R@1"]] == [2, 4, 6, 7]
    for row in rows:
        assert float(row["norm_mean"]) > 0 and float(row["norm_var"]) >= 0
        assert -1 <= float(row["cos_negative"]) <= 1 and -1 <= float(row["cos_positive"]) <= 1
        assert float(row["l2"]) >= float(row["norm_mean"]) ** 2 - 1e-3
    rates = [float(row["lr head"]) for row in rows if row["R@1"]]
    assert rates == pytest.approx([1e-3, 1e-4, 1e-5, 1e-5])  # of the step before
    assert float(rows[0]["lr backbone"]) == pytest.approx(1e-4)


def test_sec_pulls_the_norms_together(images: Path, tmp_path: Path) -> None:
    flags = "--epochs 8 --warm 0 --lr 3e-3 --schedule constant --sec_wei"
    spread = {
        weight: float(
            tiny.metrics_rows(tiny.run(images, tmp_path, weight, f"{flags} {weight}"))[-1][
                "norm_var"
            ]
        )
        for weight in ("1e-9", "10")
    }
    assert spread["10"] < 0.5 * spread["1e-9"]


# --- DDML -----------------------------------------------------------------------------------------


def test_disentangled_embeddings_are_the_means_of_the_main_head(images: Path) -> None:
    training = tiny.prepare(images, "--disent True")
    network = training.network.eval()
    batch = next(iter(training.loader)).images
    with torch.no_grad():
        outputs = network(batch)
        embeddings = network.embed(batch)
    assert outputs.embedding.shape == outputs.specific.shape == (12, 16)
    assert torch.equal(embeddings, outputs.embedding[:, :8])
    (result,) = training.evaluate(training.data.test)
    assert result.embeddings.shape == (24, 8)


def test_a_seed_reproduces_the_samples_of_ddml(images: Path, tmp_path: Path) -> None:
    first, second, other = (
        tiny.run(images, tmp_path, name, f"--disent True --be 1 --epochs 1 --seed {seed}")
        for name, seed in (("a", 4), ("b", 4), ("c", 5))
    )
    assert same(saved(first)["model_state_dict"], saved(second)["model_state_dict"])
    assert not same(saved(first)["model_state_dict"], saved(other)["model_state_dict"])


# --- IDML -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss", ["Proxy_Anchor", "AMLoss"])
def test_the_uncertainty_learns_in_the_paper_and_not_in_the_release(
    loss: str, images: Path
) -> None:
    share = {}
    for variant in ("released", "paper"):
        flags = f"--loss {loss} --introspective {variant} --max-steps 1 --warm 0 --amp off"
        training = tiny.prepare(images, flags)
        train.advance(training)
        heads = training.network.model
        share[variant] = float(
            heads.uncertainty.weight.grad.norm() / heads.embedding.weight.grad.norm()
        )
    assert share["released"] < 1e-5 < 1e-3 < share["paper"]


def test_the_log_says_once_that_released_uncertainty_learns_nothing(images: Path) -> None:
    said = train.describe(tiny.prepare(images, "--introspective"))
    assert said.count("uncertainty learns nothing") == 1
    for flags in ("--introspective paper", ""):
        assert "uncertainty" not in train.describe(tiny.prepare(images, flags))


def test_mixup_mixes_a_batch_with_a_permuted_copy() -> None:
    torch.manual_seed(0)
    pictures, labels = torch.randn(6, 3, 4, 4), torch.arange(6)
    batch = Batch(pictures, labels, labels)
    first = Forward(pictures, [(1.0, labels)])
    shares = []
    for _ in range(200):
        kept, mixed = Mixup(1.0).forwards(batch, [first])
        assert kept is first
        (share, own), (rest, others) = mixed.targets
        assert torch.equal(own, labels) and share + rest == pytest.approx(1)
        assert sorted(others.tolist()) == list(range(6))
        torch.testing.assert_close(mixed.images, share * pictures + rest * pictures[others])
        shares.append(share)
    # Beta(1, 1) is uniform.
    assert (
        min(shares) < 0.1 and max(shares) > 0.9 and np.mean(shares) == pytest.approx(0.5, abs=0.08)
    )


def test_a_mixup_step_is_two_forwards_and_three_weighted_losses(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = tiny.prepare(images, "--introspective --warm 0")
    seen, losses = [], []
    forward, objective = training.network.forward, training.objective.forward

    def seeing(pictures: torch.Tensor, **more: object) -> object:
        seen.append(pictures)
        return forward(pictures, **more)

    def noting(outputs: object, labels: torch.Tensor, **context: object) -> torch.Tensor:
        losses.append((labels, objective(outputs, labels, **context)))
        return losses[-1][1]

    monkeypatch.setattr(training.network, "forward", seeing)
    monkeypatch.setattr(training.objective, "forward", noting)
    batch = next(iter(training.loader))
    torch.manual_seed(5)
    values = train.step(training, batch)
    torch.manual_seed(5)
    _, mixed = Mixup(1.0).forwards(batch, [Forward(batch.images, [(1.0, batch.labels)])])
    (share, _), (rest, others) = mixed.targets
    whole_and_mixed = (batch.images, mixed.images)
    assert all(torch.equal(*pair) for pair in zip(seen, whole_and_mixed, strict=True))
    assert 0 < share < 1
    expected_labels = (batch.labels, batch.labels, others)
    for (labels, _), expected in zip(losses, expected_labels, strict=True):
        assert torch.equal(labels, expected)
    whole, own, other = (loss.item() for _, loss in losses)
    assert float(values["loss"]) == pytest.approx(whole + share * own + rest * other, rel=1e-5)


def test_the_mean_of_the_norms_moves_once_a_step_also_with_mixup(
    images: Path, tmp_path: Path
) -> None:
    flags = "--sec_wei 1 --norm_momentum 0.25 --mixup 1 --warm 0 --eval-steps 1 --max-steps 3"
    rows = tiny.metrics_rows(tiny.run(images, tmp_path, "run", flags))
    batch, kept = ([float(row[name]) for row in rows] for name in ("norm_mean", "norm_ema"))
    assert kept[0] == batch[0]
    for step in (1, 2):
        moved = 0.75 * kept[step - 1] + 0.25 * batch[step]
        assert kept[step] == pytest.approx(moved, rel=1e-5)


def test_every_forward_sees_the_batch_as_the_routines_have_prepared_it(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Brighter(Routine):
        def prepare(self, batch: Batch) -> Batch:
            return batch._replace(images=batch.images + 100)

    training = tiny.prepare(images, "--introspective --warm 0")
    training.routines.append(Brighter())  # after mixup, which plans its forward from the batch
    seen, forward = [], training.network.forward

    def seeing(pictures: torch.Tensor, **more: object) -> object:
        seen.append(pictures)
        return forward(pictures, **more)

    monkeypatch.setattr(training.network, "forward", seeing)
    train.step(training, next(iter(training.loader)))
    assert len(seen) == 2 and all(pictures.min() > 50 for pictures in seen)


def evaluated(*flags: str) -> None:
    evaluate.run(options.parse_evaluate([*flags, "--workers", "0"]))


def test_evaluation_lists_the_most_uncertain_images(images: Path, tmp_path: Path) -> None:
    flags = "--introspective paper --epochs 1 --warm 0"
    folder = tiny.run(images, tmp_path, "idml", flags)
    (best,) = folder.glob("*_best.pth")
    evaluated("--resume", str(best), "--uncertain", str(tmp_path / "u.csv"), "--amp", "off")
    with (tmp_path / "u.csv").open() as file:
        rows = list(csv.DictReader(file))
    norms = [float(row["uncertainty"]) for row in rows]
    assert len(rows) == 24 and norms == sorted(norms, reverse=True) and norms[0] > norms[-1]
    assert {Path(row["path"]).parent.name for row in rows} == {f"eval{c}" for c in range(8)}
    assert all(Path(row["path"]).parent.name == row["class"] for row in rows)

    training = tiny.prepare(images, f"{flags} --amp off")
    training.network.load_state_dict(saved(folder, "best")["model_state_dict"])
    network, queries = training.network.eval(), training.data.test[0].queries
    of_image = {}
    with torch.no_grad():
        for batch in eval_loader(
            queries,
            spec=network.input,
            batch_size=5,
            device=torch.device("cpu"),
            workers=0,
            image_size=32,
        ):
            lengths = network(batch.images).uncertainty.norm(dim=1)
            of_image |= {
                queries.paths[i]: float(n) for i, n in zip(batch.index, lengths, strict=True)
            }
    assert {row["path"]: float(row["uncertainty"]) for row in rows} == pytest.approx(
        of_image, rel=1e-4
    )


def test_uncertainty_of_a_network_without_that_head_is_refused(
    images: Path, tmp_path: Path
) -> None:
    (best,) = tiny.run(images, tmp_path, "plain", "--epochs 1").glob("*_best.pth")
    with pytest.raises(InputError, match=r"--uncertain: .* no uncertainty head; .*--introspective"):
        evaluated("--resume", str(best), "--uncertain", str(tmp_path / "u.csv"))
    assert not (tmp_path / "u.csv").exists()


# --- continuing -----------------------------------------------------------------------------------

DIVIDED = (
    "--experiment margin_loss_resnet50 --model resnet10 --sampler distanceweighted --lr 1e-3 "
    "--batch-sampler adaptbalanced --num-samples-per-class 2 --nb-clusters 4 --mod-epoch 2 "
    "--mod-epoch-freeze 1 --force-full-embedding-epoch 6 -crs 3 --epochs 8"
)
LEARNED = f"{DIVIDED} --mask-lr-mult 10"


@pytest.fixture(scope="module")
def uninterrupted(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a run with these flags, trained when it is first asked for."""
    return cache(lambda flags: tiny.run(images, tmp_path_factory.mktemp("logs"), "whole", flags))


@pytest.mark.parametrize(
    ("flags", "epochs", "steps"),
    [
        pytest.param(LEARNED, 2, 1, id="division, two clusters"),
        pytest.param(LEARNED, 4, 0, id="division, before the second doubling"),
        pytest.param(LEARNED, 5, 1, id="division, four clusters"),
        pytest.param(LEARNED, 6, 2, id="division, full phase"),
        pytest.param(f"{DIVIDED} --fixed-mask 1", 4, 2, id="division, fixed masks"),
        pytest.param("--introspective --epochs 3 --lr 1e-3", 1, 2, id="mixup"),
        pytest.param("--introspective --epochs 2 --workers 1", 0, 2, id="mixup, worker"),
        pytest.param("--disent True --be 1 --dropout 0.2 --epochs 3", 1, 1, id="disentangled"),
        pytest.param(
            "--loss semihtriplet --sec_wei 1 --norm_momentum 0.5 --steps 11 --eval-steps 3 "
            "--milestones 5 8 --augment crop --image-size 32 --lr 1e-3",
            0,
            7,
            id="SEC by steps",
        ),
    ],
)
def test_a_resumed_run_ends_bit_by_bit_like_an_uninterrupted_one(
    flags: str,
    epochs: int,
    steps: int,
    uninterrupted: Callable[[str], Path],
    images: Path,
    tmp_path: Path,
) -> None:
    whole = uninterrupted(flags)
    ends = [0, *(int(row["step"]) for row in tiny.metrics_rows(whole))]
    stop = ends[epochs] + steps
    assert stop < ends[-1]
    parts = tiny.run(images, tmp_path, "parts", f"{flags} --max-steps {stop}")
    halfway = saved(parts)
    tiny.resume(parts, "")
    first, second = saved(whole), saved(parts)
    for part in ("model_state_dict", "criterion_state_dict", "optimisers", "routines", "random"):
        assert same(first[part], second[part]), part
    assert halfway["clock"]["step"] == stop and second["clock"]["step"] == ends[-1]
    assert not same(halfway["model_state_dict"], second["model_state_dict"])
