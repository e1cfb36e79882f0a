"""Cross-batch memory: the library's numbers, a plain loop's, and runs that go on with it."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
import pytest
import pytorch_metric_learning.losses as library
import tiny
import together
import torch
import torch.nn.functional as F
from conftest import refusal
from tiny import same, saved
from together import five_steps, in_float64, largest_difference
from torch import Tensor

import losses
import train
from utils import InputError

STEPS, BATCH, SIZE, MEMORY, CLASSES = 7, 8, 6, 20, 3


def bank(name: str, size: int = MEMORY, start: int = 0, **options) -> losses.Objective:
    """The loss with a memory, in float64."""
    attach = {"memory": {"size": size, "start": start}}
    return losses.compose(name, CLASSES, SIZE, attach, **options).double()


def batches(steps: int = STEPS) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(BATCH, SIZE, dtype=torch.float64, generator=generator, requires_grad=True),
            torch.randint(CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(steps)
    ]


def value_and_gradient(loss: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    return loss.detach(), torch.autograd.grad(loss, x)[0]


class Everything:
    """What a plain loop remembers: the last images, as they came."""

    def __init__(self) -> None:
        self.rows: list[tuple[Tensor, int]] = []

    def take(self, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, list[int]]:
        """All that is remembered, and which of it the images of the batch are."""
        self.rows += [*zip(x.detach(), labels.tolist(), strict=True)]
        self.rows = self.rows[-MEMORY:]
        own = range(len(self.rows) - len(x), len(self.rows))
        return torch.stack([r for r, _ in self.rows]), torch.tensor([c for _, c in self.rows]), own


# --- the numbers ----------------------------------------------------------------------------------

PEERS = {
    "Contrastive": (lambda: library.ContrastiveLoss(neg_margin=0.5), {}),
    "SupCon": (
        lambda: library.SupConLoss(temperature=0.07),
        {},
    ),
    "pml:NTXentLoss": (lambda: library.NTXentLoss(temperature=0.1), {"temperature": 0.1}),
    "Margin": (lambda: library.MarginLoss(learn_beta=True), {}),
    "triplet": (
        lambda: library.TripletMarginLoss(
            margin=1.0,
            distance=library.TripletMarginLoss().distance.__class__(power=2),
            reducer=_mean_of_all(),
        ),
        {},
    ),
}


def _mean_of_all():
    from pytorch_metric_learning.reducers import MeanReducer

    return MeanReducer()


@pytest.mark.parametrize("name", PEERS)
def test_values_and_gradients_are_those_of_the_librarys_memory(name: str, one_thread: None) -> None:
    """Over batches that fill the memory, go round it, and meet its end in their middle."""
    make, options = PEERS[name]
    objective = bank(name, **options)
    peer = library.CrossBatchMemory(make(), SIZE, MEMORY)
    peer.embedding_memory = peer.embedding_memory.double()
    for number, (x, labels) in enumerate(batches()):
        unit = F.normalize(x)
        ours = value_and_gradient(objective(losses.Embeddings(x), labels), x)
        theirs = value_and_gradient(peer(unit, labels), x)
        for own, expected in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-10, msg=f"step {number}")


def test_what_is_not_trained_on_is_not_remembered() -> None:
    objective, alone = bank("Contrastive"), bank("Contrastive", start=STEPS)
    (x, labels), (other, others) = batches(2)
    objective(losses.Embeddings(x), labels)
    before = {name: buffer.clone() for name, buffer in objective.named_buffers()}
    objective.eval()
    found = objective(losses.Embeddings(other), others)
    torch.testing.assert_close(found, alone(losses.Embeddings(other), others))
    assert all(torch.equal(before[name], buffer) for name, buffer in objective.named_buffers())


def test_what_a_step_reads_stays_on_the_host() -> None:
    moved = bank("Contrastive").to("meta").named_buffers()
    places = {name.rsplit(".", 1)[-1]: buffer.device.type for name, buffer in moved}
    assert places == {"embeddings": "meta", "labels": "cpu", "steps": "cpu", "taken": "cpu"}


def test_what_a_loss_says_of_itself_it_says_with_a_memory() -> None:
    boundaries = bank("MarginLoss", beta_lr=0.1)
    assert boundaries.needs_pairs
    assert boundaries.class_values()["beta"].shape == (CLASSES,)


def test_the_mined_multi_similarity_is_the_librarys(one_thread: None) -> None:
    from pytorch_metric_learning.miners import MultiSimilarityMiner

    loss = library.MultiSimilarityLoss(alpha=2.0, beta=50.0, base=0.5)
    peer = library.CrossBatchMemory(loss, SIZE, MEMORY, MultiSimilarityMiner(epsilon=0.1))
    peer.embedding_memory = peer.embedding_memory.double()
    objective = bank("MS")
    for x, labels in batches():
        ours = value_and_gradient(objective(losses.Embeddings(x), labels), x)
        for own, expected in zip(ours, value_and_gradient(peer(x, labels), x), strict=True):
            torch.testing.assert_close(own, expected, rtol=1e-8, atol=1e-10)


def loop_triplets(unit: Tensor, labels: Tensor, others: Tensor, classes: Tensor, own) -> Tensor:
    terms = []
    for i in range(len(unit)):
        for p in (classes == labels[i]).nonzero()[:, 0].tolist():
            if p == own[i]:
                continue
            for n in (classes != labels[i]).nonzero()[:, 0].tolist():
                gap = (unit[i] - others[p]).square().sum() - (unit[i] - others[n]).square().sum()
                terms.append(F.relu(gap + 1.0))
    return torch.stack(terms).mean()


def loop_semihard(unit: Tensor, labels: Tensor, others: Tensor, classes: Tensor, own) -> Tensor:
    terms = []
    for i in range(len(unit)):
        distances = (unit[i] - others).square().sum(dim=1)
        negatives = distances[classes != labels[i]]
        for p in (classes == labels[i]).nonzero()[:, 0].tolist():
            if p != own[i]:
                farther = negatives[negatives > distances[p]]
                negative = farther.min() if len(farther) else negatives.max()
                terms.append(F.relu(distances[p] - negative + 0.2))
    return torch.stack(terms).mean()


def loop_similarities(unit, labels, others, classes, own) -> Tensor:
    """Multi-similarity of SEC's constants."""
    terms = []
    for i in range(len(unit)):
        s = others @ unit[i]
        positive = (classes == labels[i]) & (s < 1 - 1e-5)
        positive[own[i]] = False
        negative = classes != labels[i]
        hard = negative & (s + 0.1 > s[positive].min())
        near = positive & (s - 0.1 < s[negative].max())
        if near.any() and hard.any():
            pull = torch.log1p(torch.exp(-2 * (s[near] - 0.5)).sum()) / 2
            terms.append(pull + torch.log1p(torch.exp(40 * (s[hard] - 0.5)).sum()) / 40)
    return torch.stack(terms).sum() / len(unit)


def loop_softmax(unit, labels, others, classes, own) -> Tensor:
    """NPairsLoss at an inverse temperature of 1."""
    terms = []
    for i in range(len(unit)):
        keep = torch.arange(len(others)) != own[i]
        logs = (others @ unit[i])[keep].log_softmax(dim=0)
        terms.append(-logs[classes[keep] == labels[i]].mean())
    return torch.stack(terms).mean()


def loop_circle(unit, labels, others, classes, own) -> Tensor:
    terms = []
    for i in range(len(unit)):
        s, zero = others @ unit[i], torch.zeros(())
        p, n = [], []
        for j in range(len(others)):
            mine = classes[j] == labels[i]
            weight_p, weight_n = (F.relu(w).detach() for w in (1.4 - s[j], s[j] + 0.4))
            p.append(-80 * weight_p * (s[j] - 0.6) if mine and j != own[i] else zero)
            n.append(80 * weight_n * (s[j] - 0.4) if not mine else zero)
        terms.append(F.softplus(sum(torch.stack(e).logsumexp(dim=0) for e in (p, n))))
    return torch.stack(terms).mean()


def loop_recall(unit, labels, others, classes, own) -> Tensor:
    terms = []
    for i in range(len(unit)):
        s = others @ unit[i]
        positives = [p for p in range(len(others)) if classes[p] == labels[i] and p != own[i]]
        ranks = [
            1 + sum(torch.sigmoid((s[j] - s[p]) / 0.01) for j in range(len(s)) if j != p)
            for p in positives
        ]
        found = 0.0
        for k in (1, 2, 4, 8, 16):
            hits = sum(torch.sigmoid(min(k, len(s)) - rank) for rank in ranks)
            found = found + torch.clamp(hits, max=min(k, len(s))) / min(k, len(positives))
        terms.append(found / 5)
    return 1 - torch.stack(terms).mean()


def loop_precision(unit, labels, others, classes, own) -> Tensor:
    terms = []
    for i in range(len(unit)):
        s = others @ unit[i]
        shares = []
        for p in (classes == labels[i]).nonzero()[:, 0].tolist():
            same = classes == labels[i]
            rank = ((s >= s[p]) & same).sum()
            x = (s - s[p])[~same]
            sigmoid = torch.sigmoid(x / 0.01)
            step = torch.where(x > 0, 0.5 + sigmoid, sigmoid)
            wrong = torch.where(x > 0.05, 100 * (x - 0.05) + 1.44, step).sum()
            shares.append(rank / (rank + wrong))
        terms.append(torch.stack(shares).mean())
    return 1 - torch.stack(terms).mean()


LOOPS = {
    "triplet": (loop_triplets, {}),
    "semihtriplet": (loop_semihard, {}),
    "ms": (loop_similarities, {}),
    "NPairsLoss": (loop_softmax, {}),
    "CircleLoss": (loop_circle, {}),
    "RecallAtK": (loop_recall, {}),
    "SupAP": (loop_precision, {"weight": 1.0}),
}


@pytest.mark.parametrize("name", LOOPS)
def test_values_and_gradients_are_those_of_a_plain_loop(name: str, one_thread: None) -> None:
    loop, options = LOOPS[name]
    objective, everything = bank(name, **options), Everything()
    for x, labels in batches(4):
        remembered, classes, own = everything.take(F.normalize(x), labels)
        expected = value_and_gradient(loop(F.normalize(x), labels, remembered, classes, own), x)
        found = value_and_gradient(objective(losses.Embeddings(x), labels), x)
        for ours, plain in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-7, atol=1e-9)
    assert len(everything.rows) == MEMORY == int(objective.terms["remembered"])


@pytest.mark.parametrize("miner", losses.MINERS)
@pytest.mark.parametrize("name", ["MarginLoss", "TripletLoss"])
def test_mined_triplets_are_of_the_memory(name: str, miner: str, one_thread: None) -> None:
    """Positives and negatives are remembered ones of the right classes, never the image itself."""
    objective = bank(name, miner=miner)
    criterion = objective.parts["metric"].criterion
    seen = []
    mine = criterion.loss.miner

    def watched(embeddings, labels, references):
        found = mine(embeddings, labels, references)
        anchors, positives, negatives = found
        seen.append(len(anchors))
        assert (references.labels[positives] == labels[anchors]).all()
        assert (references.labels[negatives] != labels[anchors]).all()
        assert (positives != references.own[anchors]).all()
        own = references.embeddings[references.own]
        torch.testing.assert_close(own, F.normalize(embeddings.detach()))
        return found

    criterion.loss.miner = watched
    for x, labels in batches():
        loss, gradient = value_and_gradient(objective(losses.Embeddings(x), labels), x)
        assert loss.isfinite() and gradient.isfinite().all()
    assert sum(seen) > 0


def test_before_its_start_the_loss_is_that_of_the_batch() -> None:
    objective, alone = bank("ms", start=2), losses.compose("ms", CLASSES, SIZE).double()
    for number, (x, labels) in enumerate(batches(4)):
        found = objective(losses.Embeddings(x), labels)
        # In the first step with a memory it holds the batch alone.
        assert torch.equal(found, alone(losses.Embeddings(x), labels)) == (number < 3)
        assert int(objective.terms["remembered"]) == BATCH * max(0, number - 1)


def test_a_smaller_memory_than_a_batch_is_refused() -> None:
    (x, labels), *_ = batches(1)
    with pytest.raises(ValueError, match="7 embeddings cannot hold a batch of 8"):
        bank("ms", size=7)(losses.Embeddings(x), labels)
    alone = losses.compose("ms", CLASSES, SIZE).double()(losses.Embeddings(x), labels)
    assert torch.equal(bank("ms", size=8)(losses.Embeddings(x), labels), alone)


# --- which losses ---------------------------------------------------------------------------------

REFUSED = {
    "Proxy_Anchor": "proxies",
    "AMLoss": "proxies",
    "NormSoftmax": "proxies",
    "ArcFace": "proxies",
    "HIER": "proxies",
    "PFML": "proxies",
    "HIST": "classes",
    "n-npair": "two images of each class",
    "Hyp": "one image per class",
    "Sph": "one image per class",
    "NPair": "the library has one for AngularLoss",
    "pml:NCALoss": "own entry",
    "SoftTriple": "the library has one for AngularLoss",
    "RecallAtK --loss-args simix=true": "simix",
}


def test_every_loss_that_a_refusal_names_takes_a_memory() -> None:
    reason = losses.build("NPair", 2, 4).no_memory
    named = reason.removeprefix("the library has one for ").split(", ")
    assert len(named) > 10
    for name in named:
        assert losses.build(f"pml:{name}", 2, 4).no_memory == "", name


@pytest.mark.parametrize("loss", REFUSED)
def test_other_losses_say_why_they_do_without(loss: str, images: Path) -> None:
    with pytest.raises(InputError) as stop:
        tiny.prepare(images, f"--memory-bank 24 --IPC 2 --loss {loss}")
    assert REFUSED[loss] in str(stop.value) and "cannot use a memory" in str(stop.value)
    assert "\n" not in str(stop.value) and "leave the memory bank out" in str(stop.value)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--memory-bank 24 --loss ms --mixup 1", ["--memory-bank", "--mixup", "two classes"]),
        ("--memory-bank 24 --loss MarginLoss --nb-clusters 2", ["--memory-bank", "cluster"]),
        ("--memory-bank-start 5 --loss ms", ["--memory-bank-start", "belongs to --memory-bank"]),
        ("--memory-bank -1", ["--memory-bank", "-1 is below"]),
    ],
)
def test_what_makes_no_sense_is_refused_at_once(flags, words, images, capsys) -> None:
    said = refusal(capsys, tiny.parse, images, flags)
    assert all(word in said for word in words)


def test_a_batch_that_does_not_fit_is_refused_before_the_run(images: Path) -> None:
    with pytest.raises(InputError, match="memory of 11 embeddings cannot hold a batch of 12"):
        tiny.prepare(images, "--memory-bank 11 --loss ms --IPC 3")


# --- runs -----------------------------------------------------------------------------------------

BANK = "--memory-bank 30 --warm 0 --IPC 2"
COMBINED = {
    "SEC": "--loss semihtriplet --sec_wei 0.5 --image-size 32 --batch-size 12 --steps 9",
    "margin": "--loss MarginLoss --sampler distanceweighted --lr-beta 1e-2",
    "Matryoshka": "--loss SupCon --matryoshka 2 8",
    "pieces": "--loss RecallAtK --micro-batch 5",
    "half precision": "--loss SupAP --amp bf16",
    "library": "--loss Contrastive",
}


@pytest.mark.parametrize("flags", COMBINED.values(), ids=COMBINED)
def test_it_trains_with_other_methods(flags: str, images: Path) -> None:
    training = tiny.prepare(images, f"{BANK} {flags}")
    for batch in training.loader:
        assert np.isfinite(float(train.step(training, batch)["loss"]))
    bank = training.objective.parts["metric"].criterion
    assert int(bank.taken) == 12 * len(training.loader) > 30
    assert bank.embeddings.abs().sum(dim=1).min() > 0


def test_a_run_goes_on_with_its_memory_bit_by_bit(images: Path, tmp_path: Path) -> None:
    flags = f"{BANK} --loss ms --epochs 2 --lr 1e-3 --memory-bank-start 2 --image-size 32"
    flags += " --batch-size 12 --max-steps 7"
    whole = tiny.run(images, tmp_path, "whole", flags)
    parts = tiny.run(images, tmp_path, "parts", f"{flags} --max-steps 5")
    tiny.resume(parts, "--max-steps 7")
    assert int(saved(whole)["criterion_state_dict"]["parts.metric.criterion.taken"]) == 12 * 5
    for part in ("model_state_dict", "criterion_state_dict", "optimisers", "random"):
        assert same(saved(whole)[part], saved(parts)[part]), part


def test_a_step_that_is_skipped_is_not_remembered(images: Path) -> None:
    training = tiny.prepare(images, f"{BANK} --loss SupCon --on-nan skip")
    bank = training.objective.parts["metric"].criterion
    first, second = list(training.loader)[:2]
    train.step(training, first)
    before = {name: value.clone() for name, value in bank.state_dict().items()}
    second.images.fill_(torch.nan)
    assert train.step(training, second) is None
    assert same(before, dict(bank.state_dict()))


def test_two_processes_are_one(images, tmp_path, monkeypatch) -> None:
    in_float64(monkeypatch)
    steps = partial(five_steps, images, f"{BANK} --loss SupCon --lr 1e-3")
    alone = steps()
    assert alone["loss parts.metric.criterion.taken"] == 54
    for result in together.run(2, steps, tmp_path):
        assert largest_difference(alone, result) < 1e-9
